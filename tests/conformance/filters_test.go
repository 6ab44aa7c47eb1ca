package conformance

import (
	"context"
	"math/rand"
	"reflect"
	"sort"
	"strings"
	"testing"

	"github.com/containerd/containerd/filters"
	"github.com/containerd/containerd/snapshots"
	"gotest.tools/assert"
)

// Filters that are tried. The seed is fixed: two runs try the same.
const filterCount = 3000

// The daemon selects what containerd's own filters select, and refuses what they refuse.
func TestFilters(t *testing.T) {
	ctx := context.Background()
	snapshotter, stop, err := startDaemon(ctx, t.TempDir())
	assert.NilError(t, err)
	defer func() { assert.NilError(t, stop()) }()
	all := makeSnapshots(ctx, t, snapshotter)
	random := rand.New(rand.NewSource(1))
	accepted := 0
	for number := 0; number < filterCount; number++ {
		var given []string
		for len(given) == 0 || random.Intn(4) == 0 {
			given = append(given, randomFilter(random))
		}
		filter, refused := filters.ParseAll(given...)
		var expected []string
		if refused == nil {
			accepted++
			for _, info := range all {
				if filter.Match(adapt(info)) {
					expected = append(expected, info.Name)
				}
			}
		}
		var found []string
		err := snapshotter.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
			found = append(found, info.Name)
			return nil
		}, given...)
		sort.Strings(found)
		if (err != nil) != (refused != nil) || !reflect.DeepEqual(found, expected) {
			t.Errorf("%q: found %q (%v), containerd finds %q (%v)", given, found, err, expected, refused)
		}
	}
	if accepted < filterCount/4 || accepted > filterCount*3/4 {
		t.Errorf("%d of %d filters were accepted: too few or too many to show anything", accepted, filterCount)
	}
}

func makeSnapshots(ctx context.Context, t *testing.T, snapshotter snapshots.Snapshotter) []snapshots.Info {
	labelled := func(labels map[string]string) snapshots.Opt { return snapshots.WithLabels(labels) }
	_, prepared := snapshotter.Prepare(ctx, "base active", "", labelled(map[string]string{"a": "1"}))
	committed := snapshotter.Commit(ctx, "base", "base active", labelled(map[string]string{"a": "1", "b.c/d": "x y"}))
	_, active := snapshotter.Prepare(ctx, "active", "base", labelled(map[string]string{"a": "2", "b": "\"quoted\""}))
	_, view := snapshotter.View(ctx, "view/1", "base", labelled(map[string]string{"b.c": "é"}))
	for _, err := range []error{prepared, committed, active, view} {
		assert.NilError(t, err)
	}
	var all []snapshots.Info
	assert.NilError(t, snapshotter.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		all = append(all, info)
		return nil
	}))
	sort.Slice(all, func(one, other int) bool { return all[one].Name < all[other].Name })
	return all
}

// adapt shows a snapshot to containerd's filters as its own metadata store does.
func adapt(info snapshots.Info) filters.Adaptor {
	return filters.AdapterFunc(func(path []string) (string, bool) {
		switch path[0] {
		case "kind":
			return strings.ToLower(info.Kind.String()), true
		case "name":
			return info.Name, true
		case "parent":
			return info.Parent, true
		case "labels":
			value, ok := info.Labels[strings.Join(path[1:], ".")]
			return value, ok
		}
		return "", false
	})
}

// randomFilter makes filters with all that the grammar has, and now and then with what it has not.
func randomFilter(random *rand.Rand) string {
	one := func(good, bad []string) string {
		choices := good
		if random.Intn(10) == 0 {
			choices = bad
		}
		return choices[random.Intn(len(choices))]
	}
	paths := []string{"name", "kind", "parent", "labels.a", "labels.b", "labels.b.c", `labels."b.c/d"`, `"labels".a`,
		`labels."b"."c/d"`, "labels", "unknown", "name.more", "labels.missing", " name", "labels. a"}
	noPaths := []string{"", ".", "labels.", "ké", "labels .a", "a-b", "/name/", `"open`}
	operators := []string{"==", "!=", "~=", " == ", " !="}
	noOperators := []string{"=", "<", "===", "=!", "~", "= ="}
	values := []string{"1", "2", "base", "active", "committed", "view", "view/1", `"x y"`, `"\"quoted\""`, `"\u00e9"`, "é",
		`"\x31"`, `""`, "^a", "[ab]", `"\062"`, `"\xc3\xa9"`, `'1'`, "1/2", "a=b", "a.b", "x~y", "(", `"("`}
	// Those between slashes and bars are values after ~= only.
	noValues := []string{"/^b/", "|1|", `/\//`, `/a\|b/`, `/\\d/`, `"open`, "/view", "", "a b", `"\q"`, `"\400"`, `1"2"`, ".a"}
	var selectors []string
	for len(selectors) == 0 || random.Intn(2) == 0 {
		selector := one(paths, noPaths)
		if random.Intn(5) > 0 {
			selector += one(operators, noOperators) + one(values, noValues)
		}
		selectors = append(selectors, selector)
	}
	return strings.Join(selectors, one([]string{",", ", "}, []string{" ,", ";", ",,", " "}))
}

package conformance

import (
	"context"
	"fmt"
	"sort"
	"testing"
	"time"

	"github.com/containerd/containerd/snapshots"
	"gotest.tools/assert"
)

// Snapshots that are there while the time of further ones is taken.
const snapshotCount = 1000

// BenchmarkPrepareAndMounts prints how long a container waits for its snapshot on a busy node, on an
// ordinary base and on a lazy one: half and 99 of 100 within.
func BenchmarkPrepareAndMounts(b *testing.B) {
	for name, start := range map[string]func(context.Context, string) (snapshots.Snapshotter, func() error, error){
		"ordinary": startDaemon, "lazy": startLazily(baseIsLazy),
	} {
		b.Run(name, func(b *testing.B) {
			ctx := context.Background()
			snapshotter, stop, err := start(ctx, b.TempDir())
			assert.NilError(b, err)
			defer func() { assert.NilError(b, stop()) }()
			_, err = snapshotter.Prepare(ctx, "base active", "")
			assert.NilError(b, err)
			assert.NilError(b, snapshotter.Commit(ctx, "base", "base active"))
			var waited []time.Duration
			for number := 0; number < 2*snapshotCount; number++ {
				key := fmt.Sprintf("container-%d", number)
				started := time.Now()
				_, err := snapshotter.Prepare(ctx, key, "base")
				assert.NilError(b, err)
				_, err = snapshotter.Mounts(ctx, key)
				assert.NilError(b, err)
				if number >= snapshotCount {
					waited = append(waited, time.Since(started))
				}
			}
			sort.Slice(waited, func(one, other int) bool { return waited[one] < waited[other] })
			b.ReportMetric(waited[len(waited)/2].Seconds()*1000, "ms-median")
			b.ReportMetric(waited[len(waited)*99/100].Seconds()*1000, "ms-p99")
			b.ReportMetric(0, "ns/op")
		})
	}
}

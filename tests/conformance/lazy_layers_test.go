package conformance

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"

	"github.com/containerd/containerd/archive"
	"github.com/containerd/containerd/errdefs"
	"github.com/containerd/containerd/mount"
	"github.com/containerd/containerd/snapshots"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// lazyLayers turns what is committed into lazy layers: it makes an image of the changes, converts it
// into the registry, and has the daemon prepare it with the labels that containerd would pass. So the
// suite, unchanged, compares what it wrote with what a lazy layer shows.
type lazyLayers struct {
	snapshots.Snapshotter
	isLazy func(snapshots.Info) bool
}

// Which active snapshots become lazy layers when they are committed.
func baseIsLazy(active snapshots.Info) bool { return active.Parent == "" }
func allAreLazy(snapshots.Info) bool        { return true }

var imageNumber int64

func startLazily(isLazy func(snapshots.Info) bool) func(context.Context, string) (snapshots.Snapshotter, func() error, error) {
	return func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		inner, stop, err := startDaemon(ctx, root)
		return lazyLayers{inner, isLazy}, stop, err
	}
}

// Commit has the outcome of an ordinary one, times included: they are those of the moment of the commit.
func (l lazyLayers) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	active, err := l.Stat(ctx, key)
	if err != nil {
		return err
	}
	if _, err := l.Stat(ctx, name); err == nil || active.Kind != snapshots.KindActive || !l.isLazy(active) {
		return l.Snapshotter.Commit(ctx, name, key, opts...)
	}
	tar, err := l.changes(ctx, active)
	if err != nil {
		return fmt.Errorf("reading the changes in %s: %w", key, err)
	}
	labels, err := publish(tar)
	if err != nil {
		return err
	}
	labels["containerd.io/snapshot.ref"] = name
	extra := append([]snapshots.Opt{snapshots.WithLabels(labels)}, opts...)
	if _, err := l.Prepare(ctx, "extract-"+key, active.Parent, extra...); !errdefs.IsAlreadyExists(err) {
		return fmt.Errorf("a lazy layer was prepared as an ordinary one: %w", err)
	}
	return l.Remove(ctx, key)
}

// changes returns what a snapshot adds to its parent, as a layer.
func (l lazyLayers) changes(ctx context.Context, active snapshots.Info) ([]byte, error) {
	var tar bytes.Buffer
	upper, err := l.Mounts(ctx, active.Name)
	if err != nil {
		return nil, err
	}
	if active.Parent == "" {
		err := mount.WithTempMount(ctx, upper, func(upper string) error {
			return archive.WriteDiff(ctx, &tar, "", upper)
		})
		return tar.Bytes(), err
	}
	view := active.Name + " below"
	lower, err := l.View(ctx, view, active.Parent)
	if err != nil {
		return nil, err
	}
	err = mount.WithTempMount(ctx, lower, func(lower string) error {
		return mount.WithTempMount(ctx, upper, func(upper string) error {
			return archive.WriteDiff(ctx, &tar, lower, upper)
		})
	})
	if removed := l.Remove(ctx, view); err == nil {
		err = removed
	}
	return tar.Bytes(), err
}

// publish converts an image of one layer into the registry and returns the labels of the lazy layer.
func publish(tar []byte) (map[string]string, error) {
	layout, err := os.MkdirTemp("", "layout-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(layout)
	if err := writeLayout(layout, tar); err != nil {
		return nil, err
	}
	registry := os.Getenv("REGISTRY")
	// One repository: layers of others below would have to be verified first.
	tag := fmt.Sprintf("lazy-%d", atomic.AddInt64(&imageNumber, 1))
	image := registry + "/conformance:" + tag
	convert := exec.Command(os.Getenv("LAZULI"), "convert", "oci:"+layout, image)
	convert.Env = append(os.Environ(), "XDG_CACHE_HOME=/dev/null")
	if output, err := convert.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("lazuli convert: %w: %s", err, output)
	}
	layer, err := onlyLayer("http://" + registry + "/v2/conformance/manifests/" + tag)
	if err != nil {
		return nil, err
	}
	labels := map[string]string{
		"containerd.io/snapshot/cri.image-ref":    image,
		"containerd.io/snapshot/cri.layer-digest": layer.Digest.String(),
	}
	for key, value := range layer.Annotations {
		if strings.HasPrefix(key, "containerd.io/snapshot/") {
			labels[key] = value
		}
	}
	return labels, nil
}

func onlyLayer(url string) (v1.Descriptor, error) {
	request, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return v1.Descriptor{}, err
	}
	request.Header.Set("Accept", v1.MediaTypeImageManifest)
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return v1.Descriptor{}, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return v1.Descriptor{}, err
	}
	var manifest v1.Manifest
	if err := json.Unmarshal(body, &manifest); err != nil || len(manifest.Layers) != 1 {
		return v1.Descriptor{}, errors.New("no manifest with one layer: " + string(body))
	}
	return manifest.Layers[0], nil
}

// writeLayout writes an OCI image layout with an image of one uncompressed layer.
func writeLayout(layout string, tar []byte) error {
	platform := v1.Platform{Architecture: "amd64", OS: "linux"}
	add := func(mediaType string, content []byte) (v1.Descriptor, error) {
		id := digest.FromBytes(content)
		path := filepath.Join(layout, "blobs", "sha256", id.Encoded())
		return v1.Descriptor{MediaType: mediaType, Digest: id, Size: int64(len(content))}, os.WriteFile(path, content, 0o644)
	}
	addJSON := func(mediaType string, content interface{}) (v1.Descriptor, error) {
		text, err := json.Marshal(content)
		if err != nil {
			return v1.Descriptor{}, err
		}
		return add(mediaType, text)
	}
	if err := os.MkdirAll(filepath.Join(layout, "blobs", "sha256"), 0o755); err != nil {
		return err
	}
	layer, err := add(v1.MediaTypeImageLayer, tar)
	if err != nil {
		return err
	}
	config, err := addJSON(v1.MediaTypeImageConfig, v1.Image{
		Architecture: platform.Architecture,
		OS:           platform.OS,
		RootFS:       v1.RootFS{Type: "layers", DiffIDs: []digest.Digest{layer.Digest}},
	})
	if err != nil {
		return err
	}
	manifest, err := addJSON(v1.MediaTypeImageManifest, v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: v1.MediaTypeImageManifest,
		Config:    config,
		Layers:    []v1.Descriptor{layer},
	})
	if err != nil {
		return err
	}
	manifest.Platform = &platform
	index, err := json.Marshal(v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []v1.Descriptor{manifest}})
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(layout, "index.json"), index, 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(layout, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644)
}

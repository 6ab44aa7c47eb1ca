package conformance

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"testing"
	"time"

	"github.com/containerd/containerd/errdefs"
	"github.com/containerd/containerd/mount"
	"github.com/containerd/containerd/snapshots"
	"gotest.tools/assert"
)

const (
	// Snapshots that are there while the time of further ones is taken.
	snapshotCount = 1000
	// What is mounted while memory is measured.
	imageCount, filesOfImage = 10, 50_000
)

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

// BenchmarkMemory prints what both daemons hold in memory with several large images mounted, each of whose files was
// looked at: all of it, and what of that is no part of a file, which the kernel could not take away.
func BenchmarkMemory(b *testing.B) {
	for _, mode := range []string{"erofs", "fuse"} {
		b.Run(mode, func(b *testing.B) {
			b.Setenv("LAZULI_MODE", mode)
			ctx, root := context.Background(), b.TempDir()
			snapshotter, stop, err := startDaemon(ctx, root)
			assert.NilError(b, err)
			defer func() { assert.NilError(b, stop()) }()
			for number := 0; number < imageCount; number++ {
				image, container := fmt.Sprintf("image-%d", number), fmt.Sprintf("container-%d", number)
				labels, err := publish(manyFiles(b, number))
				assert.NilError(b, err)
				labels["containerd.io/snapshot.ref"] = image
				_, err = snapshotter.Prepare(ctx, "extract-"+image, "", snapshots.WithLabels(labels))
				assert.Assert(b, errdefs.IsAlreadyExists(err), "%v", err)
				mounts, err := snapshotter.Prepare(ctx, container, image)
				assert.NilError(b, err)
				target := filepath.Join(root, container)
				assert.NilError(b, os.Mkdir(target, 0o755))
				assert.NilError(b, mount.All(mounts, target))
				assert.Equal(b, countFiles(b, target), filesOfImage)
			}
			all, unbacked := 0, 0
			for _, id := range processesOf(root) {
				all += statusOf(b, id, "VmRSS")
				unbacked += statusOf(b, id, "RssAnon")
			}
			b.ReportMetric(float64(all)/1024, "MiB-resident")
			b.ReportMetric(float64(unbacked)/1024, "MiB-anonymous")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// manyFiles returns a layer of small files, 50 to a directory; no two numbers have a file in common.
func manyFiles(b *testing.B, number int) []byte {
	var layer bytes.Buffer
	writer := tar.NewWriter(&layer)
	for file := 0; file < filesOfImage; file++ {
		name := fmt.Sprintf("lib/package-%d/module_%d/source_%d_%d.py", file/1000, file/50, number, file)
		content := []byte(fmt.Sprintf("name = %d\n", number*filesOfImage+file))
		assert.NilError(b, writer.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content))}))
		_, err := writer.Write(content)
		assert.NilError(b, err)
	}
	assert.NilError(b, writer.Close())
	return layer.Bytes()
}

func countFiles(b *testing.B, directory string) int {
	count := 0
	assert.NilError(b, filepath.WalkDir(directory, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.Type().IsRegular() {
			count++
			_, err = entry.Info()
		}
		return err
	}))
	return count
}

// statusOf returns a figure of /proc/ID/status in KiB.
func statusOf(b *testing.B, id int, name string) int {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", id))
	assert.NilError(b, err)
	for _, line := range bytes.Split(status, []byte("\n")) {
		var figure int
		if _, err := fmt.Sscanf(string(line), name+": %d kB", &figure); err == nil {
			return figure
		}
	}
	b.Fatalf("process %d has no %s", id, name)
	return 0
}

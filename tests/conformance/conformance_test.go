// Package conformance holds lazuli-snapshotter to containerd's own suite for snapshotters, over gRPC.
//
// tests/tests/conformance.rs builds it with Debian's Go and containerd packages and says through the
// environment where the programs and a registry are. Every case gets a daemon with a root of its own.
package conformance

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/mount"
	"github.com/containerd/containerd/pkg/dialer"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/proxy"
	"github.com/containerd/containerd/snapshots/testsuite"
	"github.com/containerd/continuity/fs/fstest"
	"github.com/moby/sys/mountinfo"
	"google.golang.org/grpc"
	"gotest.tools/assert"
)

// How long the daemon may take to serve, and its processes to end.
const patience = 60 * time.Second

// Layers as the suite makes them.
func TestOrdinaryLayers(t *testing.T) {
	conforms(t, "ordinary", startDaemon)
}

// What the suite commits as a base becomes a lazy image; what it stacks on that stays ordinary.
func TestOnLazyImage(t *testing.T) {
	conforms(t, "on-lazy", startLazily(baseIsLazy))
}

// Whatever the suite commits becomes a lazy layer.
func TestEveryLayerLazy(t *testing.T) {
	conforms(t, "all-lazy", startLazily(allAreLazy))
}

func conforms(t *testing.T, name string, start testsuite.SnapshotterFunc) {
	testsuite.SnapshotterSuite(t, name, start)
	t.Run("Move", func(t *testing.T) { checkMove(t, start) })
}

// checkMove is the suite's Rename as far as overlayfs goes. The suite leaves its own out: the kernel moves
// a directory of a lower layer only with redirect_dir, and says EXDEV otherwise, so that mv(1) copies.
func checkMove(t *testing.T, start testsuite.SnapshotterFunc) {
	ctx, root := context.Background(), t.TempDir()
	snapshotter, stop, err := start(ctx, root)
	assert.NilError(t, err)
	defer func() { assert.NilError(t, stop()) }()
	flat, merged := t.TempDir(), t.TempDir()
	layer := func(parent, name string, change fstest.Applier) {
		mounts, err := snapshotter.Prepare(ctx, name+" active", parent)
		assert.NilError(t, err)
		assert.NilError(t, mount.All(mounts, merged))
		err = change.Apply(merged)
		assert.NilError(t, mount.UnmountAll(merged, 0))
		assert.NilError(t, err)
		assert.NilError(t, snapshotter.Commit(ctx, name, name+" active"))
		assert.NilError(t, change.Apply(flat))
	}
	layer("", "below", fstest.Apply(
		fstest.CreateDir("/moved", 0o700),
		fstest.CreateFile("/moved/file", []byte("moves along"), 0o600),
		fstest.CreateDir("/files", 0o700),
		fstest.CreateFile("/files/replaced", []byte("was here first"), 0o644),
		fstest.CreateFile("/files/renamed", []byte("nothing interesting"), 0o644),
	))
	layer("below", "above", fstest.Apply(
		applyFunc(func(root string) error {
			return exec.Command("mv", filepath.Join(root, "moved"), filepath.Join(root, "there")).Run()
		}),
		fstest.CreateFile("/files/new", []byte("new content"), 0o644),
		fstest.Rename("/files/new", "/files/replaced"),
		fstest.Rename("/files/renamed", "/files/other"),
	))
	mounts, err := snapshotter.View(ctx, "view", "above")
	assert.NilError(t, err)
	assert.NilError(t, mount.All(mounts, merged))
	err = fstest.CheckDirectoryEqual(merged, flat)
	assert.NilError(t, mount.UnmountAll(merged, 0))
	assert.NilError(t, err)
}

type applyFunc func(root string) error

func (f applyFunc) Apply(root string) error { return f(root) }

// startDaemon starts a lazuli-snapshotter; the function it returns ends it with all that it started.
func startDaemon(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
	address := filepath.Join(root, "s.sock")
	log, err := os.Create(filepath.Join(root, "snapshotter.log"))
	if err != nil {
		return nil, nil, err
	}
	defer log.Close()
	daemon := exec.Command(os.Getenv("LAZULI_SNAPSHOTTER"), "--config", "/dev/null", "--root", root, "--address", address)
	if mode := os.Getenv("LAZULI_MODE"); mode != "" {
		daemon.Args = append(daemon.Args, "--mode", mode)
	}
	daemon.Stderr = log
	if err := daemon.Start(); err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	connection, err := grpc.DialContext(ctx, dialer.DialAddress(address), grpc.WithBlock(),
		grpc.WithInsecure(), grpc.WithContextDialer(dialer.ContextDialer))
	stop := func() error {
		if connection != nil {
			connection.Close()
		}
		err := clear(root)
		daemon.Wait()
		return err
	}
	if err != nil {
		stop()
		return nil, nil, fmt.Errorf("lazuli-snapshotter does not serve on %s: %w", address, err)
	}
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(connection), "lazuli"), stop, nil
}

// clear ends every process that names the root on its command line, and unmounts what is below.
func clear(root string) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		running := processesOf(root)
		if len(running) == 0 {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes %v of %s do not end", running, root)
		}
		for _, id := range running {
			syscall.Kill(id, syscall.SIGKILL)
		}
	}
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(root))
	for last := len(mounts) - 1; err == nil && last >= 0; last-- {
		err = syscall.Unmount(mounts[last].Mountpoint, syscall.MNT_DETACH)
	}
	return err
}

func processesOf(root string) []int {
	var found []int
	entries, _ := filepath.Glob("/proc/[0-9]*")
	for _, entry := range entries {
		id, _ := strconv.Atoi(filepath.Base(entry))
		// One that has ended and waits to be reaped has an empty command line.
		words, _ := os.ReadFile(filepath.Join(entry, "cmdline"))
		if id != os.Getpid() && bytes.Contains(words, []byte("\x00"+root+"\x00")) {
			found = append(found, id)
		}
	}
	return found
}

//! What an operator does with a node, on every containerd in use: 1.6, 1.7 and 2.1.
//!
//! `make test-matrix` unpacks the newer ones and runs this; it takes minutes.

use std::thread;

use lazuli_tests::{
    Compression, HarnessError, ImageBuilder, Node, Pod, Release, Result, Scratch, TarLayer, TestRegistry,
    containerd::{LAZULI, OVERLAYFS},
    process::{Service, command, finish, run, wait_for},
    programs::{MODES, lazuli_ok},
    samples::{LARGE_FILE_LEN, LARGE_FILES_LEN, checksum_line, publish_sample, readable_layers},
};

/// Layers of a tall image, about as many as builders allow (overlayfs stacks 500).
const TALL: usize = 100;
/// A container that waits to be looked at.
const SLEEP: [&str; 2] = ["/bin/sleep", "600"];

macro_rules! on_every_release {
    ($($claim:ident),* $(,)?) => {
        mod containerd_1_6 { $(#[test] fn $claim() -> super::Result<()> { super::$claim(super::Release::V1_6, "1.6") })* }
        mod containerd_1_7 { $(#[test] fn $claim() -> super::Result<()> { super::$claim(super::Release::V1_7, "1.7") })* }
        mod containerd_2_1 { $(#[test] fn $claim() -> super::Result<()> { super::$claim(super::Release::V2_1, "2.1") })* }
    };
}

on_every_release!(
    pod_starts_before_its_image_has_arrived,
    image_without_annotations_is_pulled_completely,
    ctr_runs_an_image_lazily,
    namespaces_share_layers_and_free_them_with_the_last,
    image_can_be_removed_under_a_running_container,
    images_that_share_layers_are_pulled_at_once,
    tall_image_runs,
    node_is_switched_to_lazuli_and_back,
    containerds_own_snapshotter_works_beside_lazuli,
    user_namespaces_read_lazily_in_each_mode,
);

/// A scratch directory for one claim on one release, and a registry with `sample:original` and `sample:lazy`.
fn given(claim: &str, version: &str) -> Result<(Scratch, TestRegistry)> {
    let scratch = Scratch::new(&format!("matrix-{version}-{claim}"))?;
    let registry = publish_sample(&scratch)?;
    Ok((scratch, registry))
}

/// Pulls as the release pulls lazily without pods: by containerd 2 itself, for others by `lazuli pull`.
fn pull_lazily(node: &Node, release: Release, namespace: &str, reference: &str) -> Result<()> {
    let mut pull = match release {
        Release::V2_1 => {
            let words = ["-n", namespace, "images", "pull", "--plain-http", "--snapshotter", LAZULI, reference];
            node.containerd.ctr(words)
        }
        Release::V1_6 | Release::V1_7 => {
            let mut pull = node.lazuli_pull_command(reference)?;
            pull.args(["--namespace", namespace]);
            pull
        }
    };
    run(&mut pull).map(drop)
}

/// Runs a shell script in a container of its own.
fn run_script(node: &Node, namespace: &str, reference: &str, id: &str, script: &str) -> Result<String> {
    let words = ["-n", namespace, "run", "--rm", "--snapshotter", LAZULI, reference, id, "/bin/sh", "-c", script];
    finish(&mut node.containerd.ctr(words))?.stdout_of(script)
}

fn check_is_remote(node: &Node, namespace: &str) -> Result<()> {
    let filter = r#"labels."containerd.io/snapshot/remote""#;
    let words = ["-n", namespace, "snapshots", "--snapshotter", LAZULI, "list", filter];
    let listed = run(&mut node.containerd.ctr(words))?;
    assert!(listed.lines().filter(|line| line.contains("Committed")).count() >= 3, "{listed}");
    Ok(())
}

fn pod_starts_before_its_image_has_arrived(release: Release, version: &str) -> Result<()> {
    let (scratch, registry) = given("pod", version)?;
    let (node, cri) = Node::start_release_with_cri(&scratch, &registry, release, LAZULI)?;
    let lazy = registry.reference("sample:lazy");
    let before = registry.blob_bytes()?;
    cri.pull_image(&lazy)?;
    let pod = cri.run_pod("reader")?;
    let container = pod.start_container("reader", &lazy, &SLEEP)?;
    assert_eq!(pod.shell(&container, "cat /etc/greeting")?, "good morning\n");
    let moved = registry.blob_bytes()? - before;
    assert!(moved < LARGE_FILES_LEN / 2, "{moved} bytes to start a container that reads a line");
    assert_eq!(pod.shell(&container, "sha256sum /large/0; echo mine > /tmp/note")?, checksum_line(0));
    check_is_remote(&node, "k8s.io")
}

fn image_without_annotations_is_pulled_completely(release: Release, version: &str) -> Result<()> {
    let (scratch, registry) = given("ordinary", version)?;
    let (_node, cri) = Node::start_release_with_cri(&scratch, &registry, release, LAZULI)?;
    let original = registry.reference("sample:original");
    cri.pull_image(&original)?;
    let pod = cri.run_pod("reader")?;
    let container = pod.start_container("reader", &original, &SLEEP)?;
    drop(registry);
    assert_eq!(
        pod.shell(&container, "cat /etc/greeting; sha256sum /large/5")?,
        "good morning\n".to_owned() + &checksum_line(5)
    );
    Ok(())
}

fn ctr_runs_an_image_lazily(release: Release, version: &str) -> Result<()> {
    let (scratch, registry) = given("ctr", version)?;
    let node = Node::start_release(&scratch, release)?;
    let lazy = registry.reference("sample:lazy");
    let before = registry.blob_bytes()?;
    pull_lazily(&node, release, "default", &lazy)?;
    assert_eq!(run_script(&node, "default", &lazy, "reader", "cat /etc/greeting")?, "good morning\n");
    let moved = registry.blob_bytes()? - before;
    assert!(moved < LARGE_FILES_LEN / 2, "{moved} bytes for a container that reads a line");
    assert_eq!(run_script(&node, "default", &lazy, "second", "sha256sum /large/1")?, checksum_line(1));
    check_is_remote(&node, "default")
}

fn remove_image(node: &Node, namespace: &str, reference: &str) -> Result<()> {
    run(&mut node.containerd.ctr(["-n", namespace, "images", "rm", "--sync", reference])).map(drop)
}

fn namespaces_share_layers_and_free_them_with_the_last(release: Release, version: &str) -> Result<()> {
    let (scratch, registry) = given("namespaces", version)?;
    let node = Node::start_release(&scratch, release)?;
    let lazy = registry.reference("sample:lazy");
    pull_lazily(&node, release, "one", &lazy)?;
    assert_eq!(run_script(&node, "one", &lazy, "reader", "sha256sum /large/0")?, checksum_line(0));
    let before = registry.blob_bytes()?;
    pull_lazily(&node, release, "two", &lazy)?;
    assert_eq!(run_script(&node, "two", &lazy, "reader", "sha256sum /large/0")?, checksum_line(0));
    // The configuration is kept for each namespace, layers are not.
    let moved = registry.blob_bytes()? - before;
    assert!(moved < LARGE_FILE_LEN as u64 / 2, "{moved} bytes for what another namespace has read");
    remove_image(&node, "one", &lazy)?;
    assert_eq!(run_script(&node, "two", &lazy, "again", "sha256sum /large/1")?, checksum_line(1));
    remove_image(&node, "two", &lazy)?;
    wait_for("the cache was not emptied", || Ok((node.snapshotter.cached_layers()? == 0).then_some(())))
}

fn image_can_be_removed_under_a_running_container(release: Release, version: &str) -> Result<()> {
    let (scratch, registry) = given("removed", version)?;
    let node = Node::start_release(&scratch, release)?;
    let lazy = registry.reference("sample:lazy");
    pull_lazily(&node, release, "default", &lazy)?;
    let mut start = node.containerd.ctr(["run", "--snapshotter", LAZULI, &lazy, "running"]);
    start.args(SLEEP);
    let tasks = || run(&mut node.containerd.ctr(["tasks", "list"]));
    let is_running = || tasks().is_ok_and(|tasks| tasks.contains("RUNNING"));
    let container = Service::start("ctr run", &mut start, &scratch.log("running"), is_running)?;
    remove_image(&node, "default", &lazy)?;
    let script = "sha256sum /large/2; echo mine > /tmp/note; cat /tmp/note";
    let exec = ["tasks", "exec", "--exec-id", "reader", "running", "/bin/sh", "-c", script];
    let printed = finish(&mut node.containerd.ctr(exec))?.stdout_of(script)?;
    assert_eq!(printed, checksum_line(2) + "mine\n");
    assert_eq!(node.snapshotter.cached_layers()?, 3);
    run(&mut node.containerd.ctr(["tasks", "kill", "--signal", "SIGKILL", "running"]))?;
    drop(container);
    wait_for("the container did not end", || Ok((!tasks()?.contains("RUNNING")).then_some(())))?;
    // Deleting the last container has containerd collect what it held.
    run(&mut node.containerd.ctr(["containers", "rm", "running"]))?;
    wait_for("the cache was not emptied", || Ok((node.snapshotter.cached_layers()? == 0).then_some(())))
}

fn images_that_share_layers_are_pulled_at_once(release: Release, version: &str) -> Result<()> {
    let (scratch, registry) = given("parallel", version)?;
    let node = Node::start_release(&scratch, release)?;
    let names: Vec<String> = (0..4).map(|number| format!("sharing-{number}")).collect();
    let mut references = Vec::new();
    for name in &names {
        let image =
            readable_layers()?.into_iter().fold(ImageBuilder::new(), |image, tar| image.layer(tar, Compression::Gzip));
        let own = TarLayer::new().directory("own").file("own/name", name).finish()?;
        let image = image.layer(own, Compression::Gzip).write(&scratch, name)?;
        let lazy = registry.reference(&format!("{name}:lazy"));
        lazuli_ok(["convert", &image, &lazy, "--cache-from", &registry.reference("sample:lazy")])?;
        references.push(lazy);
    }
    let start = |(reference, name): (&String, &String)| {
        pull_lazily(&node, release, "default", reference)?;
        run_script(&node, "default", reference, name, "cat /own/name; echo; sha256sum /large/4")
    };
    let printed: Vec<Result<String>> = thread::scope(|scope| {
        let threads: Vec<_> = references.iter().zip(&names).map(|pair| scope.spawn(move || start(pair))).collect();
        threads.into_iter().map(|thread| thread.join().expect("the thread does not panic")).collect()
    });
    for (printed, name) in printed.into_iter().zip(&names) {
        assert_eq!(printed?, format!("{name}\n{}", checksum_line(4)));
    }
    // Three layers that all have, and one of each.
    assert_eq!(node.snapshotter.cached_layers()?, 3 + names.len());
    Ok(())
}

fn tall_image_runs(release: Release, version: &str) -> Result<()> {
    let (scratch, registry) = given("tall", version)?;
    let shell = readable_layers()?.swap_remove(0);
    let mut image = ImageBuilder::new().layer(shell, Compression::Gzip);
    for number in 1..TALL {
        let layer = TarLayer::new().directory("of").file(&format!("of/{number}"), format!("{number}\n"));
        image = image.layer(layer.file("top", format!("{number}\n")).finish()?, Compression::Gzip);
    }
    let lazy = registry.reference("tall:lazy");
    lazuli_ok(["convert", &image.write(&scratch, "tall")?, &lazy])?;
    let node = Node::start_release(&scratch, release)?;
    pull_lazily(&node, release, "default", &lazy)?;
    let printed = run_script(&node, "default", &lazy, "tall", "ls /of | cut -c1-9; cat /top /of/1")?;
    assert_eq!(printed.lines().count(), TALL - 1 + 2, "{printed}");
    assert!(printed.ends_with(&format!("{}\n1\n", TALL - 1)), "{printed}");
    Ok(())
}

/// Pods of before go on, through every switch; the image that containerd has is taken by the other snapshotter.
fn node_is_switched_to_lazuli_and_back(release: Release, version: &str) -> Result<()> {
    let (scratch, registry) = given("switched", version)?;
    let (mut node, cri) = Node::start_release_with_cri(&scratch, &registry, release, OVERLAYFS)?;
    let lazy = registry.reference("sample:lazy");
    let mut running: Vec<(&str, Pod<'_>, String)> = Vec::new();
    for (number, (name, snapshotter)) in
        [("first", OVERLAYFS), ("second", LAZULI), ("third", OVERLAYFS)].into_iter().enumerate()
    {
        if number > 0 {
            node.switch_pods_to(snapshotter, &cri)?;
        }
        // As kubelet does before it starts a container.
        cri.pull_image(&lazy)?;
        let pod = cri.run_pod(name)?;
        let container = pod.start_container(name, &lazy, &SLEEP)?;
        pod.shell(&container, &format!("echo {name} > /tmp/note"))?;
        running.push((name, pod, container));
        for (name, pod, container) in &running {
            let script = format!("sha256sum /large/{number}; cat /tmp/note");
            assert_eq!(pod.shell(container, &script)?, format!("{}{name}\n", checksum_line(number)));
        }
        if snapshotter == LAZULI {
            check_is_remote(&node, "k8s.io")?;
        }
    }
    Ok(())
}

/// A plugin that is configured takes nothing from who does not use it.
fn containerds_own_snapshotter_works_beside_lazuli(release: Release, version: &str) -> Result<()> {
    let (scratch, registry) = given("beside", version)?;
    let node = Node::start_release(&scratch, release)?;
    let original = registry.reference("sample:original");
    pull_lazily(&node, release, "default", &registry.reference("sample:lazy"))?;
    run(&mut node.containerd.ctr(["images", "pull", "--plain-http", "--snapshotter", OVERLAYFS, &original]))?;
    // runc keeps all containers in one place.
    let name = format!("ordinary-{version}-{}", std::process::id());
    let words = ["run", "--rm", "--snapshotter", OVERLAYFS, &original, &name, "/bin/cat", "/etc/greeting"];
    assert_eq!(finish(&mut node.containerd.ctr(words))?.stdout_of("cat")?, "good morning\n");
    check_is_remote(&node, "default")
}

/// Root of the container is a user of the host without rights, and the image arrives no faster for it: no owner is
/// changed in a copy.
fn user_namespaces_read_lazily_in_each_mode(release: Release, version: &str) -> Result<()> {
    for mode in MODES {
        let (scratch, registry) = given(&format!("users-{mode}"), version)?;
        // runc keeps all containers in one place.
        let name = format!("users-{version}-{mode}-{}", std::process::id());
        let node = Node::start_release_in(mode, &scratch, release)?;
        let lazy = registry.reference("sample:lazy");
        let before = registry.blob_bytes()?;
        pull_lazily(&node, release, "default", &lazy)?;
        let mut start = node.containerd.ctr(["run", "--snapshotter", LAZULI, "--remap-labels"]);
        start.args(["--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536", &lazy, &name]).args(SLEEP);
        let tasks = || run(&mut node.containerd.ctr(["tasks", "list"]));
        let is_running = || tasks().is_ok_and(|tasks| tasks.contains("RUNNING"));
        let container = Service::start("ctr run", &mut start, &scratch.log("users"), is_running)?;
        let tasks_running = tasks()?;
        let id = tasks_running.lines().find_map(|line| line.strip_prefix(&name)?.split_whitespace().next());
        let id = id.ok_or_else(|| HarnessError::Unexpected(tasks_running.clone()))?;
        let outside = run(&mut command("stat", ["-c", "%u %g", &format!("/proc/{id}")]))?;
        assert_eq!(outside, "100000 200000\n", "{mode}");
        let script = "stat -c '%u %g %n' /etc/greeting /large/0; cat /etc/greeting; echo mine >> /etc/greeting; \
                      echo mine > /tmp/note; stat -c '%u %g' /tmp/note; tail -n 1 /etc/greeting";
        let exec = |script| {
            let exec = ["tasks", "exec", "--exec-id", "reader", &name, "/bin/sh", "-c", script];
            finish(&mut node.containerd.ctr(exec))?.stdout_of(script)
        };
        let expected = "0 0 /etc/greeting\n0 0 /large/0\ngood morning\n0 0\nmine\n";
        assert_eq!(exec(script)?, expected, "{mode}");
        let moved = registry.blob_bytes()? - before;
        assert!(moved < LARGE_FILES_LEN / 2, "{mode}: {moved} bytes for a container that reads a line");
        assert_eq!(exec("sha256sum /large/1")?, checksum_line(1), "{mode}");
        run(&mut node.containerd.ctr(["tasks", "kill", "--signal", "SIGKILL", &name]))?;
        drop(container);
        wait_for("the container did not end", || Ok((!tasks()?.contains("RUNNING")).then_some(())))?;
        run(&mut node.containerd.ctr(["containers", "rm", &name]))?;
        let mapped = node.snapshotter.root().join("id-mapped");
        wait_for("id-mapped mounts stay", || {
            Ok(scratch.mounts().iter().all(|mount| !mount.starts_with(&mapped)).then_some(()))
        })?;
    }
    Ok(())
}

/// As a kubelet has it with `hostUsers: false`. On 1.7 alone: 1.6 has no such pods, and for 2.1 runc must have id-mapped
/// mounts, 1.2 or later, which is not installed here.
#[test]
fn pod_with_users_of_its_own_reads_lazily() -> Result<()> {
    let (scratch, registry) = given("pod-users", "1.7")?;
    let (_node, cri) = Node::start_release_with_cri(&scratch, &registry, Release::V1_7, LAZULI)?;
    let lazy = registry.reference("sample:lazy");
    let before = registry.blob_bytes()?;
    cri.pull_image(&lazy)?;
    let pod = cri.run_pod_with_users("users", 300_000, 65_536)?;
    let container = pod.start_container("users", &lazy, &SLEEP)?;
    let script = "read inside outside count </proc/self/uid_map; echo $inside $outside $count; cat /etc/greeting; \
                  echo mine > /tmp/note; stat -c '%u %g' /tmp/note /large/0";
    assert_eq!(pod.shell(&container, script)?, "0 300000 65536\ngood morning\n0 0\n0 0\n");
    let moved = registry.blob_bytes()? - before;
    assert!(moved < LARGE_FILES_LEN / 2, "{moved} bytes to start a container that reads a line");
    assert_eq!(pod.shell(&container, "sha256sum /large/1")?, checksum_line(1));
    Ok(())
}

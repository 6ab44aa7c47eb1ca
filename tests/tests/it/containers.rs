//! Containers on lazy images, through `ctr` and through the container runtime interface.

use std::{fs, path::Path, thread, time::Instant};

use lazuli_tests::{
    HarnessError, Node, Result, Scratch, TarLayer,
    containerd::LAZULI,
    error::Context as _,
    image::extend_image,
    process::{command, run, wait_for},
    registry_server::digest_in,
    samples::{LARGE_FILE_COUNT, LARGE_FILES_LEN, checksum_line, publish_sample},
};
use serde_json::Value;

fn pull_lazily(node: &Node, reference: &str) -> Result<()> {
    let finished = node.lazuli_pull(reference)?;
    match finished.code {
        Some(0) => Ok(()),
        _ => Err(HarnessError::Unexpected(format!("lazuli pull: {}", finished.stderr))),
    }
}

#[test]
fn ctr_runs_an_image_after_a_lazy_pull() -> Result<()> {
    let scratch = Scratch::new("ctr-runs")?;
    let registry = publish_sample(&scratch)?;
    let node = Node::start(&scratch)?;
    let lazy = registry.reference("sample:lazy");
    let before = registry.blob_bytes()?;
    pull_lazily(&node, &lazy)?;
    let finished = node.containerd.run(&lazy, LAZULI, "greeting", &[])?;
    assert_eq!((finished.code, finished.stdout.as_str()), (Some(0), "good morning\n"), "{}", finished.stderr);
    let moved = registry.blob_bytes()? - before;
    assert!(moved < LARGE_FILES_LEN / 4, "{moved} bytes for a container that reads a line");

    let script = "sha256sum /large/1; echo new > /etc/greeting; rm /large/2; cat /etc/greeting; ls /large";
    let finished = node.containerd.run(&lazy, LAZULI, "writing", &["/bin/sh", "-c", script])?;
    let expected = format!("{}new\n0\n1\n3\n4\n5\n", checksum_line(1));
    assert_eq!((finished.code, finished.stdout), (Some(0), expected), "{}", finished.stderr);
    // What one container wrote, another does not see.
    let finished = node.containerd.run(&lazy, LAZULI, "again", &["/bin/cat", "/etc/greeting"])?;
    assert_eq!((finished.code, finished.stdout.as_str()), (Some(0), "good morning\n"), "{}", finished.stderr);
    Ok(())
}

/// One that fails leaves nothing that it stored either.
#[test]
fn a_pull_gives_its_lease_up_however_it_ends() -> Result<()> {
    let scratch = Scratch::new("pull-lease")?;
    let registry = publish_sample(&scratch)?;
    let node = Node::start(&scratch)?;
    let original = registry.reference("sample:original");
    let listed = |kind: &str| {
        let words = if kind == "leases" { [kind, "list", "-q"] } else { [kind, "ls", "-q"] };
        run(&mut node.containerd.ctr(words))
    };
    let manifest = registry.manifest("sample:original")?;
    let top = digest_in(manifest["layers"].as_array().and_then(|layers| layers.last()).unwrap_or(&Value::Null))?;
    let file = registry.blob_file(top);
    let blob = fs::read(&file).at("reading", &file)?;
    fs::write(&file, vec![0; blob.len()]).at("writing", &file)?;
    let failed = node.lazuli_pull(&original)?;
    assert_eq!(failed.code, Some(1), "{}", failed.stderr);
    assert!(failed.stderr.contains(&top.to_string()), "{}", failed.stderr);
    for kind in ["leases", "images", "content"] {
        assert_eq!(listed(kind)?, "", "{kind} after a pull that failed");
    }

    fs::write(&file, blob).at("writing", &file)?;
    pull_lazily(&node, &original)?;
    assert_eq!(listed("leases")?, "");
    assert_eq!(listed("images")?.trim(), original);
    assert_ne!(listed("content")?, "");
    Ok(())
}

#[test]
fn ctr_runs_an_ordinary_image() -> Result<()> {
    let scratch = Scratch::new("ctr-runs-ordinary")?;
    let registry = publish_sample(&scratch)?;
    let node = Node::start(&scratch)?;
    let original = registry.reference("sample:original");
    node.containerd.pull(&original, LAZULI)?;
    let finished =
        node.containerd.run(&original, LAZULI, "ordinary", &["/bin/sh", "-c", "sha256sum /large/0; ls /etc"])?;
    assert_eq!((finished.code, finished.stdout), (Some(0), checksum_line(0) + "greeting\n"), "{}", finished.stderr);
    Ok(())
}

/// Builds an image on the converted one as a builder would, with one ordinary layer on top that adds,
/// replaces and deletes, and runs it after a lazy pull.
#[test]
fn ctr_runs_an_image_built_on_a_lazy_one() -> Result<()> {
    let scratch = Scratch::new("ctr-runs-built-on")?;
    let registry = publish_sample(&scratch)?;
    let base = format!("oci:{}:latest", scratch.join("base").display());
    let copy = ["copy", "--quiet", "--src-tls-verify=false"];
    run(command("skopeo", copy).arg(format!("docker://{}", registry.reference("sample:lazy"))).arg(&base))?;
    let layer = TarLayer::new()
        .directory("etc")
        .file("etc/greeting", "good evening\n")
        .directory("large")
        .whiteout("large", "0")
        .directory("application")
        .file("application/name", "built on top\n")
        .finish()?;
    let built = registry.push(&extend_image(&base, &layer, &scratch, "built")?, "built:latest")?;

    let node = Node::start(&scratch)?;
    let before = registry.blob_bytes()?;
    pull_lazily(&node, &built)?;
    let script = "cat /etc/greeting /application/name; ls /large; sha256sum /large/3";
    let finished = node.containerd.run(&built, LAZULI, "built", &["/bin/sh", "-c", script])?;
    let expected = format!("good evening\nbuilt on top\n1\n2\n3\n4\n5\n{}", checksum_line(3));
    assert_eq!((finished.code, finished.stdout), (Some(0), expected), "{}", finished.stderr);
    let moved = registry.blob_bytes()? - before;
    assert!(moved < LARGE_FILES_LEN / 2, "{moved} bytes: the layers below were not lazy");
    Ok(())
}

/// A pod on a lazy image: containerd downloads nothing of it, the container reads and writes; then the
/// snapshotter is restarted and after that killed, and the same container reads what it has not read
/// before, keeps what it wrote, and another container starts beside it.
#[test]
fn pod_outlives_restarts_of_the_snapshotter() -> Result<()> {
    let scratch = Scratch::new("pod-outlives-restarts")?;
    let registry = publish_sample(&scratch)?;
    let (mut node, cri) = Node::start_with_cri(&scratch, &registry)?;
    let lazy = registry.reference("sample:lazy");
    let before = registry.blob_bytes()?;
    cri.pull_image(&lazy)?;
    let pod = cri.run_pod("reader")?;
    let container = pod.start_container("reader", &lazy, &["/bin/sleep", "600"])?;
    assert_eq!(pod.shell(&container, "cat /etc/greeting; ls /etc | grep obsolete || true")?, "good morning\n");
    let moved = registry.blob_bytes()? - before;
    assert!(moved < LARGE_FILES_LEN / 2, "{moved} bytes to start a container that reads a line");
    assert_eq!(pod.shell(&container, "sha256sum /large/0; echo mine > /tmp/note")?, checksum_line(0));

    node.snapshotter.restart()?;
    assert_eq!(pod.shell(&container, "sha256sum /large/1; cat /tmp/note")?, checksum_line(1) + "mine\n");
    node.snapshotter.kill_and_restart()?;
    assert_eq!(pod.shell(&container, "sha256sum /large/2; cat /tmp/note")?, checksum_line(2) + "mine\n");

    // containerd redials the plugin with a back-off of some seconds and fails meanwhile.
    let second = wait_for("no container could be started after the restarts", || {
        match pod.start_container("second", &lazy, &["/bin/sleep", "600"]) {
            Err(HarnessError::Rpc { status, .. }) if status.code() == tonic::Code::Unavailable => Ok(None),
            result => result.map(Some),
        }
    })?;
    assert_eq!(pod.shell(&second, "sha256sum /large/3")?, checksum_line(3));
    assert_eq!(pod.shell(&container, "cat /tmp/note")?, "mine\n");
    Ok(())
}

#[test]
fn pod_runs_an_ordinary_image_beside_a_lazy_one() -> Result<()> {
    let scratch = Scratch::new("pod-runs-ordinary")?;
    let registry = publish_sample(&scratch)?;
    let (_node, cri) = Node::start_with_cri(&scratch, &registry)?;
    let pod = cri.run_pod("both")?;
    for name in ["sample:original", "sample:lazy"] {
        let reference = registry.reference(name);
        cri.pull_image(&reference)?;
        let container = pod.start_container(&name.replace(':', "-"), &reference, &["/bin/sleep", "600"])?;
        assert_eq!(
            pod.shell(&container, "cat /etc/greeting; sha256sum /large/5")?,
            format!("good morning\n{}", checksum_line(5))
        );
    }
    Ok(())
}

/// The image goes while the rest of it is fetched that nobody has read: that ends too, and no file stays open.
#[test]
fn removed_image_leaves_nothing_in_the_cache() -> Result<()> {
    // Between the first step, two thirds of the large files, and the second lie some seconds.
    const SLOWLY: [&str; 2] = ["--background-rate", "1"];
    let scratch = Scratch::new("removed-image")?;
    let registry = publish_sample(&scratch)?;
    let (node, cri) = Node::start_with_flags_and_cri(&SLOWLY, &scratch, &registry)?;
    let cache = node.snapshotter.root().join("cache");
    let lazy = registry.reference("sample:lazy");
    let before = registry.blob_bytes()?;
    cri.pull_image(&lazy)?;
    let pod = cri.run_pod("reader")?;
    let container = pod.start_container("reader", &lazy, &["/bin/sleep", "600"])?;
    pod.shell(&container, "cat /etc/greeting")?;
    let fused = node.snapshotter.fused_id().expect("it serves the container");
    wait_for("nothing was fetched but what was read", || {
        Ok((registry.blob_bytes()? - before > LARGE_FILES_LEN / 2).then_some(()))
    })?;
    assert_eq!((node.snapshotter.cached_layers()?, open_files(fused, &cache) > 0), (3, true));
    drop(pod);
    cri.remove_image(&lazy)?;
    wait_for("the cache was not emptied", || {
        Ok((node.snapshotter.cached_layers()? == 0 && open_files(fused, &cache) == 0).then_some(()))
    })?;
    let moved = registry.blob_bytes()? - before;
    assert!(moved < LARGE_FILES_LEN, "{moved} bytes: the layers were complete before they were removed");
    Ok(())
}

/// How many files below a directory a process has open.
fn open_files(id: u32, directory: &Path) -> usize {
    let descriptors = fs::read_dir(format!("/proc/{id}/fd")).into_iter().flatten().flatten();
    let targets = descriptors.filter_map(|entry| fs::read_link(entry.path()).ok());
    targets.filter(|target| target.starts_with(directory)).count()
}

/// Many containers of one cold image at once read everything, and every byte comes once. Prints how long that
/// takes beside a single one.
#[test]
fn fifty_containers_of_one_cold_image_fetch_every_byte_once() -> Result<()> {
    let sums: String = (0..LARGE_FILE_COUNT).map(checksum_line).collect();
    for count in [1, 50] {
        let scratch = Scratch::new(&format!("cold-{count}"))?;
        let registry = publish_sample(&scratch)?;
        let node = Node::start(&scratch)?;
        let lazy = registry.reference("sample:lazy");
        let before = registry.blob_bytes()?;
        pull_lazily(&node, &lazy)?;
        let run = |number: usize| {
            let id = format!("sharing-{number}");
            node.containerd.run(&lazy, LAZULI, &id, &["/bin/sh", "-c", "sha256sum /large/*"])
        };
        let started = Instant::now();
        let outputs: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = (0..count).map(|number| scope.spawn(move || run(number))).collect();
            threads.into_iter().map(|thread| thread.join().expect("the thread does not panic")).collect()
        });
        let elapsed = started.elapsed();
        for output in outputs {
            let finished = output?;
            assert_eq!((finished.code, finished.stdout.as_str()), (Some(0), sums.as_str()), "{}", finished.stderr);
        }
        let manifest = registry.manifest("sample:lazy")?;
        let size_of = |descriptor: &Value| descriptor["size"].as_u64().unwrap_or_default();
        let layers: u64 = manifest["layers"].as_array().into_iter().flatten().map(size_of).sum();
        let whole = layers + size_of(&manifest["config"]);
        let moved = registry.blob_bytes()? - before;
        println!("{count} cold containers at once: {elapsed:.1?}, {moved} bytes of an image of {whole}");
        assert!(moved <= whole, "{moved} bytes moved of an image of {whole}");
    }
    Ok(())
}

/// Logs are kept under the name of the test, also the daemon's: a failure can be understood.
#[test]
fn logs_outlive_the_test() -> Result<()> {
    let scratch = Scratch::new("logs-outlive")?;
    let registry = publish_sample(&scratch)?;
    let node = Node::start(&scratch)?;
    pull_lazily(&node, &registry.reference("sample:lazy"))?;
    node.containerd.run(&registry.reference("sample:lazy"), LAZULI, "once", &[])?;
    let logs = ["registry", "containerd", "snapshotter", "fused"].map(|name| scratch.log(name));
    drop((node, registry, scratch));
    for log in logs {
        assert!(fs::metadata(&log).is_ok_and(|log| log.len() > 0), "{}", log.display());
    }
    Ok(())
}

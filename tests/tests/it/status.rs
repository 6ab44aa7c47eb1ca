//! `lazuli status` on a real node: what is there, how it is mounted, and what readers wait for.

use std::{
    process::Stdio,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use lazuli_tests::{
    Finished, Node, Result, Scratch,
    containerd::LAZULI,
    error::Context as _,
    process::{command, finish, wait_for},
    programs::{lazuli, program},
    samples::publish_sample,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::json::check_schema;

/// What `lazuli status --json` says of an image; null before it is there.
fn image_status(node: &Node, image: &str) -> Result<Value> {
    let printed = status(node, &["--json"])?.stdout;
    let status: Value = serde_json::from_str(&printed).unwrap_or_default();
    assert!(status["mode_reason"].is_string(), "{printed}");
    check_schema("status", &printed)?;
    let found = status["images"].as_array().into_iter().flatten().find(|found| found["image"] == image);
    Ok(found.cloned().unwrap_or_default())
}

fn status(node: &Node, words: &[&str]) -> Result<Finished> {
    let root = node.snapshotter.root().display().to_string();
    lazuli([&["status", "--root", &root], words].concat())
}

fn run(node: &Node, image: &str, id: &str, script: &str) -> Result<Finished> {
    finish(&mut node.containerd.ctr(["run", "--rm", "--snapshotter", LAZULI, image, id, "/bin/sh", "-c", script]))
}

const READ_ALL: &str = "sha256sum /bin/* /etc/* /large/*";

#[test]
fn an_image_becomes_complete_by_itself_and_needs_no_registry_then() -> Result<()> {
    let scratch = Scratch::new("complete")?;
    let mut registry = publish_sample(&scratch)?;
    let lazy = registry.reference("sample:lazy");
    let node = Node::start_with(&["--background-rate", "1000"], &scratch)?;
    assert_eq!(node.lazuli_pull(&lazy)?.code, Some(0));
    assert_eq!(run(&node, &lazy, "complete-first", "true")?.code, Some(0));
    let complete = wait_for("the image does not become complete", || {
        let found = image_status(&node, &lazy)?;
        Ok((found["is_complete"] == true).then_some(found))
    })?;
    registry.pause();
    let read = run(&node, &lazy, "complete-second", READ_ALL);
    registry.resume();
    let read = read?;
    assert_eq!(read.code, Some(0), "{} {complete}", read.stderr);
    let mounted = image_status(&node, &lazy)?;
    if mounted["mode"] == "erofs" {
        assert!(
            mounted["layers"].as_array().is_some_and(|all| all.iter().all(|layer| layer["is_direct"] == true)),
            "{mounted}"
        );
    }
    Ok(())
}

#[test]
fn status_tells_what_has_arrived_and_what_readers_wait_for() -> Result<()> {
    let scratch = Scratch::new("status")?;
    let mut registry = publish_sample(&scratch)?;
    let node = Node::start(&scratch)?;
    let lazy = registry.reference("sample:lazy");
    assert_eq!(node.lazuli_pull(&lazy)?.code, Some(0));
    let pulled = wait_for("the image has no layers", || {
        let found = image_status(&node, &lazy)?;
        Ok(found["layers"].as_array().is_some_and(|layers| layers.len() == 3).then_some(found))
    })?;
    assert_eq!((&pulled["mode"], &pulled["is_complete"]), (&Value::Null, &Value::Bool(false)));

    let run = |id: &str, script: &str| run(&node, &lazy, id, script);
    assert_eq!(run("first", "sha256sum /large/0")?.code, Some(0));
    let mounted = image_status(&node, &lazy)?;
    assert!(mounted["mode"].is_string(), "{mounted}");
    assert!(mounted["present_frame_count"].as_u64() < mounted["needed_frame_count"].as_u64(), "{mounted}");
    assert!(mounted["disk_bytes"].as_u64() > Some(2 << 20), "{mounted}");

    registry.pause();
    thread::scope(|scope| {
        let reader = scope.spawn(|| run("blocked", "sha256sum /large/5"));
        let waiting = wait_for("no read was shown to wait", || {
            let found = image_status(&node, &lazy)?;
            Ok((found["awaited_frame_count"].as_u64() > Some(0)).then_some(found))
        });
        let shown = status(&node, &[&lazy]);
        registry.resume();
        let waiting = waiting?;
        assert_eq!(waiting["reads"][0]["path"], "/large/5");
        let shown = shown?.stdout;
        assert!(shown.contains("waited for: /large/5 for ") && shown.contains("readers wait for"), "{shown}");
        assert_eq!(shown.lines().filter(|line| line.starts_with("  layer ")).count(), 3, "{shown}");
        assert_eq!(reader.join().expect("the thread does not panic")?.code, Some(0));
        Ok(())
    })?;

    assert_eq!(run("all", READ_ALL)?.code, Some(0));
    let all = image_status(&node, &lazy)?;
    let complete: Vec<_> = all["layers"].as_array().into_iter().flatten().map(|layer| &layer["is_complete"]).collect();
    // The second layer has a file that the third one removes: nobody can read it.
    assert_eq!(complete, [true, false, true], "{all:#}");
    let unknown = status(&node, &["host/unknown:tag"])?;
    assert_eq!((unknown.code, unknown.stderr.lines().count()), (Some(1), 1), "{unknown:?}");
    Ok(())
}

/// A first user sees this: the daemon runs from the first lazy pull on, and that it does not yet is no fault.
#[test]
fn a_node_without_lazy_images_is_healthy_and_a_directory_that_is_no_node_is_not() -> Result<()> {
    let scratch = Scratch::new("status-empty")?;
    let node = Node::start(&scratch)?;
    let empty = status(&node, &[])?;
    assert_eq!((empty.code, empty.stderr.as_str()), (Some(0), ""), "{empty:?}");
    assert!(empty.stdout.contains("no lazily pulled images"), "{}", empty.stdout);
    let json: Value = serde_json::from_str(&status(&node, &["--json"])?.stdout).unwrap_or_default();
    assert_eq!(json["images"], serde_json::json!([]), "{json:#}");
    let absent = status(&node, &["host/image:tag"])?;
    assert!(absent.code == Some(1) && absent.stderr.contains("no layer of it is here"), "{absent:?}");
    let nowhere = scratch.directory("nowhere")?.display().to_string();
    let refused = lazuli(["status", "--root", &nowhere])?;
    assert_eq!((refused.code, refused.stderr.lines().count()), (Some(1), 1), "{refused:?}");
    assert!(refused.stderr.contains("no lazuli-fused listens on"), "{refused:?}");

    // It is asked why an image is not lazy on such a node above all.
    let noted = r#"[{"image":"host/image:tag","reason":"answered 401","since":1}]"#;
    let file = node.snapshotter.root().join("not-lazy.json");
    std::fs::write(&file, noted).at("writing", &file)?;
    for words in [&[][..], &["host/image:tag"]] {
        let told = status(&node, words)?;
        assert!(told.code == Some(0) && told.stdout.contains("pulled completely: answered 401"), "{told:?}");
    }
    Ok(())
}

/// Told to end, as by an upgrade; whether it is to end for good is the business of others.
fn end_fused(node: &Node) -> Result<()> {
    let ended = node.snapshotter.fused_id().expect("it serves the image");
    let id = i32::try_from(ended).ok().and_then(Pid::from_raw).expect("a process ID");
    kill_process(id, Signal::TERM).map_err(std::io::Error::from).context("telling lazuli-fused to end")?;
    wait_for("lazuli-fused did not end", || Ok((node.snapshotter.fused_id() != Some(ended)).then_some(())))
}

/// Whoever wakes for warnings sleeps through pulls, upgrades, removals and a shutdown, while somebody looks at status.
#[test]
fn a_healthy_life_leaves_no_warning_in_the_logs() -> Result<()> {
    let scratch = Scratch::new("healthy")?;
    let registry = publish_sample(&scratch)?;
    let mut node = Node::start_with(&["--background-rate", "1000"], &scratch)?;
    let lazy = registry.reference("sample:lazy");
    let is_pulled = AtomicBool::new(false);
    thread::scope(|scope| {
        let looking = scope.spawn(|| {
            while !is_pulled.load(Ordering::Relaxed) {
                status(&node, &["--json"])?;
            }
            Ok(())
        });
        let pulled = node.lazuli_pull(&lazy);
        let first = run(&node, &lazy, "healthy-first", "true");
        is_pulled.store(true, Ordering::Relaxed);
        assert_eq!((pulled?.code, first?.code), (Some(0), Some(0)));
        looking.join().expect("the thread does not panic")
    })?;
    wait_for("the image is not verified", || Ok((image_status(&node, &lazy)?["is_verified"] == true).then_some(())))?;
    end_fused(&node)?;
    assert_eq!(run(&node, &lazy, "healthy-second", READ_ALL)?.code, Some(0));
    let removed = finish(&mut node.containerd.ctr(["images", "rm", "--sync", &lazy]))?;
    assert_eq!(removed.code, Some(0), "{}", removed.stderr);
    wait_for("the cache was not emptied", || Ok((node.snapshotter.cached_layers()? == 0).then_some(())))?;
    let fused_log = || std::fs::read_to_string(node.snapshotter.root().join("fused.log")).unwrap_or_default();
    let log = wait_for("the last removal was not told", || {
        let log = fused_log();
        Ok((log.matches("layer removed").count() == 3).then_some(log))
    })?;
    assert_eq!(log.matches("tree unmounted").count(), 1, "{log}");

    assert_eq!(node.lazuli_pull(&lazy)?.code, Some(0));
    assert_eq!(run(&node, &lazy, "healthy-third", "true")?.code, Some(0));
    node.snapshotter.stop();
    end_fused(&node)?;
    let root = node.snapshotter.root();
    let logs = std::fs::read_to_string(root.join("fused.log")).at("reading", root)? + &node.snapshotter.log();
    let loud: Vec<_> = logs.lines().filter(|line| line.contains(" WARN ") || line.contains(" ERROR ")).collect();
    assert_eq!(loud, [""; 0]);
    Ok(())
}

/// Everything that a person can do about it ends a command that waits for a daemon that hangs.
#[test]
fn status_of_a_daemon_that_hangs_ends_by_itself_and_by_a_signal() -> Result<()> {
    let scratch = Scratch::new("status-hangs")?;
    let root = scratch.directory("root")?;
    // Connections are taken by the kernel, and nobody answers them.
    let _listener = std::os::unix::net::UnixListener::bind(root.join("fused.sock")).at("binding", &root)?;
    let mut status = command(program("lazuli")?, ["status", "--root"]);
    status.arg(&root).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut told_to_end = status.spawn().context("starting lazuli")?;
    let by_itself = status.spawn().context("starting lazuli")?;
    // Until the handler of the signal is there.
    thread::sleep(Duration::from_secs(1));
    kill_process(Pid::from_child(&told_to_end), Signal::TERM)
        .map_err(std::io::Error::from)
        .context("killing lazuli")?;
    let ended = told_to_end.wait().context("waiting for lazuli")?;
    assert_eq!(ended.code(), Some(1));
    let output = by_itself.wait_with_output().context("waiting for lazuli")?;
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!((output.status.code(), message.lines().count()), (Some(1), 1), "{message}");
    assert!(message.contains("does not answer"), "{message}");
    Ok(())
}

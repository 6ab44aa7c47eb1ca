//! `lazuli why` on a real node: which file was waited for, and what is said of what is not lazy.

use lazuli_tests::{
    Finished, Node, Result, Scratch, TarLayer, containerd::LAZULI, image::extend_image, lazuli, process::finish,
    programs::lazuli_ok, samples::publish_sample,
};
use serde_json::{Value, json};

use crate::json::check_schema;

fn why(node: &Node, words: &[&str]) -> Result<Finished> {
    let (root, socket) =
        (node.snapshotter.root().display().to_string(), node.containerd.socket().display().to_string());
    lazuli([&["why", "--root", &root, "--address", &socket], words].concat())
}

/// The container's record stays when it has ended.
fn run(node: &Node, image: &str, id: &str, script: &str) -> Result<()> {
    let words = ["run", "--snapshotter", LAZULI, image, id, "/bin/sh", "-c", script];
    let ran = finish(&mut node.containerd.ctr(words))?;
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    Ok(())
}

/// One line, exit code 1.
fn refusal(finished: Finished) -> String {
    let Finished { code, stdout, stderr, .. } = finished;
    assert_eq!((code, stdout.as_str(), stderr.lines().count()), (Some(1), "", 1), "{stderr}");
    stderr
}

#[test]
fn why_names_the_file_that_was_waited_for_by_image_and_by_container() -> Result<()> {
    let scratch = Scratch::new("why")?;
    let registry = publish_sample(&scratch)?;
    let node = Node::start(&scratch)?;
    let lazy = registry.reference("sample:lazy");
    assert_eq!(node.lazuli_pull(&lazy)?.code, Some(0));
    run(&node, &lazy, "why-first", "cat /large/0 | sha256sum")?;

    let told = why(&node, &[&lazy])?;
    assert_eq!((told.code, told.stderr.as_str()), (Some(0), ""), "{told:?}");
    let lines: Vec<_> = told.stdout.lines().collect();
    assert!(lines[0] == lazy && lines[1].starts_with("  lazy, "), "{}", told.stdout);
    let table = lines.iter().filter(|line| line.trim_start().starts_with("/large/0 "));
    assert!(table.clone().any(|line| line.ends_with("  a frame that this read asked for")), "{}", told.stdout);
    for words in ["  readers waited ", "  a full pull ", " that no profile expected, beside "] {
        assert!(told.stdout.contains(words), "{words}: {}", told.stdout);
    }

    for container in ["why-first", "why-f"] {
        let printed = why(&node, &["--json", container])?;
        assert_eq!((printed.code, printed.stderr.as_str()), (Some(0), ""), "{printed:?}");
        check_schema("why", &printed.stdout)?;
        let found: Value = serde_json::from_str(&printed.stdout).unwrap_or_default();
        assert_eq!((&found["image"], &found["container"]), (&json!(lazy), &json!("why-first")), "{found:#}");
        assert_eq!((&found["is_lazy"], &found["obstacles"]), (&json!(true), &json!([])), "{found:#}");
        let waits = found["waits"].as_array().cloned().unwrap_or_default();
        assert!(waits.iter().any(|wait| wait["path"] == "/large/0" && wait["cause"] == "frame"), "{found:#}");
        // Noise does not compress, and nobody derives from an image that it is read.
        assert!(found["demanded_bytes"].as_u64() > Some(1 << 20), "{found:#}");
        assert!(found["wait_count"].as_u64() > Some(0), "{found:#}");
        let (waited, blocked) = (found["waited_ms"].as_u64(), found["blocked_ms"].as_u64());
        assert!(blocked <= waited, "{found:#}");
        let lens =
            found["layers"].as_array().into_iter().flatten().filter_map(|layer| layer["compressed_len"].as_u64());
        assert_eq!(found["compressed_len"].as_u64(), Some(lens.sum()), "{found:#}");
    }
    Ok(())
}

#[test]
fn why_says_of_everything_else_in_one_line_what_it_is() -> Result<()> {
    let scratch = Scratch::new("why-not")?;
    let registry = publish_sample(&scratch)?;
    let node = Node::start(&scratch)?;
    let (lazy, ordinary) = (registry.reference("sample:lazy"), registry.reference("sample:original"));
    assert_eq!(node.lazuli_pull(&ordinary)?.code, Some(0));
    run(&node, &ordinary, "why-ordinary", "true")?;
    let told = refusal(why(&node, &[&ordinary])?);
    assert!(told.contains(&format!("{ordinary}: not lazy: none of its 3 layers is converted")), "{told}");
    let told = refusal(why(&node, &["--json", "why-ordinary"])?);
    assert!(told.contains(&format!("why-ordinary: {ordinary}: not lazy")), "{told}");
    let unknown = refusal(why(&node, &["host/unknown:tag"])?);
    assert!(unknown.contains("host/unknown:tag: no image and no container is called so"), "{unknown}");
    let elsewhere = refusal(why(&node, &["-n", "other", "why-ordinary"])?);
    assert!(elsewhere.contains("namespace other"), "{elsewhere}");

    // Its layers are here under the same chain IDs.
    assert_eq!(node.lazuli_pull(&lazy)?.code, Some(0));
    let told = refusal(why(&node, &[&lazy])?);
    assert!(told.contains(&format!("{lazy}: not lazy: it is converted, and was pulled completely")), "{told}");
    Ok(())
}

#[test]
fn why_says_where_a_daemon_is_missing_and_which_layers_are_ordinary() -> Result<()> {
    let scratch = Scratch::new("why-parts")?;
    let registry = publish_sample(&scratch)?;
    let node = Node::start(&scratch)?;
    let (lazy, layout) = (registry.reference("sample:lazy"), format!("oci:{}:lazy", scratch.join("lazy").display()));
    assert_eq!(node.lazuli_pull(&lazy)?.code, Some(0));
    // A build on top of a lazy image, by a tool that knows nothing of Lazuli.
    lazuli_ok(["convert", &registry.reference("sample:original"), &layout])?;
    let layer = TarLayer::new().file("built", "on top").finish()?;
    let built = registry.push(&extend_image(&layout, &layer, &scratch, "built")?, "built:latest")?;
    assert_eq!(node.lazuli_pull(&built)?.code, Some(0));
    let told = why(&node, &[&built])?;
    assert_eq!((told.code, told.stderr.as_str()), (Some(0), ""), "{told:?}");
    for words in [
        "  lazy, ",
        "  not lazy: 1 of 4 layers is not converted, and downloaded before the start: ",
        "  convert the layers",
    ] {
        assert!(told.stdout.contains(words), "{words}: {}", told.stdout);
    }
    check_schema("why", &why(&node, &["--json", &built])?.stdout)?;

    let nowhere = scratch.directory("nowhere")?.display().to_string();
    let root = node.snapshotter.root().display().to_string();
    let refused = refusal(lazuli(["why", "--root", &nowhere, &lazy])?);
    assert!(refused.contains("no lazuli-fused listens on") && refused.contains("--root"), "{refused}");
    let socket = format!("{nowhere}/containerd.sock");
    let refused = refusal(lazuli(["why", "--root", &root, "--address", &socket, "some-container"])?);
    assert!(refused.contains(&socket) && refused.contains("--address"), "{refused}");
    // Whatever containerd alone knows is missing then, and no more.
    let without = lazuli(["why", "--root", &root, "--address", &socket, &lazy])?;
    assert_eq!((without.code, without.stderr.lines().count()), (Some(0), 1), "{without:?}");
    assert!(without.stdout.contains("  lazy, ") && without.stderr.contains("warning: "), "{without:?}");
    Ok(())
}

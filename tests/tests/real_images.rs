//! The three real images: the same image, the same tree, ready when run, with the bytes that it took.
//!
//! Not part of a plain `cargo test`: each takes a minute or two. `make test` runs the Python one,
//! `make test-images` all.

use lazuli_tests::{
    LazyMount, Node, Result, Scratch, TestRegistry, compare_trees,
    containerd::{LAZULI, OVERLAYFS},
    diff_trees,
    process::{command, run},
    programs::{FROM_NOTHING_TO_COMPLETE, lazuli},
    real_images::real_image,
    registry_server::digest_in,
};

/// Goal: everything promised of an image holds for a real one.
/// Method: convert it registry to registry, without reaching the bound of the search for what a start reads, so that
/// the hot packs are what they would be without it; compare config and diff IDs; let containerd's overlayfs
/// unpack the original, compare every field of the lazy tree with it, and again with `diff`; run the
/// converted image after a full pull with overlayfs, and after a lazy pull with Lazuli, counting bytes.
fn check(name: &str) -> Result<()> {
    let scratch = Scratch::new(&format!("image-{name}"))?;
    let registry = TestRegistry::start(&scratch)?;
    let original = registry.push(&real_image(name)?, &format!("{name}:original"))?;
    let lazy = registry.reference(&format!("{name}:lazy"));
    let converted = lazuli(["convert", &original, &lazy])?;
    assert_eq!((converted.code, converted.stderr.contains("was ended")), (Some(0), false), "{}", converted.stderr);
    let manifests = ["original", "lazy"].map(|tag| registry.manifest(&format!("{name}:{tag}")));
    let [before, after] = [manifests[0].as_ref(), manifests[1].as_ref()].map(|manifest| manifest.expect("just pushed"));
    assert_eq!(digest_in(&before["config"])?, digest_in(&after["config"])?);
    let sizes = [before, after].map(|manifest| {
        let layers = manifest["layers"].as_array().expect("a manifest has layers");
        layers.iter().filter_map(|layer| layer["size"].as_u64()).sum::<u64>()
    });

    let node = Node::start(&scratch)?;
    let start = registry.blob_bytes()?;
    let pulled = node.lazuli_pull(&lazy)?;
    assert_eq!(pulled.code, Some(0), "{}", pulled.stderr);
    let finished = node.containerd.run(&lazy, LAZULI, "lazy", &[])?;
    assert_eq!((finished.code, finished.stdout.as_str()), (Some(0), "ready\n"), "{}", finished.stderr);
    let moved = registry.blob_bytes()? - start;
    assert!(moved < sizes[1], "{moved} bytes moved of {}", sizes[1]);
    println!(
        "{name}: {} bytes of layers, {} converted, {moved} fetched until ready ({} % of the layers, {} % of the converted)",
        sizes[0],
        sizes[1],
        moved * 100 / sizes[0],
        moved * 100 / sizes[1]
    );

    let copied = registry.reference(&format!("{name}-copied:lazy"));
    let copy = ["copy", "--quiet", "--src-tls-verify=false", "--dest-tls-verify=false"];
    run(command("skopeo", copy).args([format!("docker://{lazy}"), format!("docker://{copied}")]))?;
    node.containerd.pull(&copied, OVERLAYFS)?;
    let finished = node.containerd.run(&copied, OVERLAYFS, "full", &[])?;
    assert_eq!((finished.code, finished.stdout.as_str()), (Some(0), "ready\n"), "{}", finished.stderr);
    // What follows is unpacked from the original, not from the copy: its chain IDs are the same.
    run(&mut node.containerd.ctr(["images", "remove", "--sync", &copied]))?;

    node.containerd.pull(&original, OVERLAYFS)?;
    let truth = scratch.directory("truth")?;
    node.containerd.mount_image(&original, OVERLAYFS, &truth)?;
    for mode in FROM_NOTHING_TO_COMPLETE {
        let mount = LazyMount::in_mode(mode, &scratch, "lazy", &lazy)?;
        let differences: Vec<_> = compare_trees(&truth, mount.path())?.iter().map(ToString::to_string).collect();
        assert_eq!(differences, Vec::<String>::new(), "{mode}");
        assert_eq!(diff_trees(&truth, mount.path())?, Vec::<String>::new(), "{mode}");
        mount.fsck()?;
    }
    Ok(())
}

#[test]
fn python() -> Result<()> {
    check("python")
}

#[test]
fn node() -> Result<()> {
    check("node")
}

#[test]
fn jre() -> Result<()> {
    check("jre")
}

//! A container is shown what its config says: images that lie, on real nodes, beside the honest ones that they claim
//! to be.

use std::path::Path;

use format_spec::{LazyLayer, records::hot_reason, signature::SIGNATURE};
use lazuli_tests::{
    Compression, HarnessError, ImageBuilder, Node, Result, Scratch, TarLayer, TestRegistry,
    containerd::LAZULI,
    error::Context as _,
    image::{edit_manifest, layout_blob, layout_manifest, replace_layer},
    lazy_blob::LazyBlob,
    process::{Finished, command, finish, run, wait_for},
    programs::{lazuli_ok, program},
    registry_server::digest_in,
    samples::readable_layers,
};
use serde_json::Value;

/// The path that images here differ in, as tar and as containers see it.
const NAME: &str = "etc/name";
/// A namespace of containerd beside the usual one.
const OTHER: &str = "other";

/// An image of two layers, the upper one of which says `name`, and its conversion: two layouts.
fn image(scratch: &Scratch, name: &str) -> Result<(String, String)> {
    converted(scratch, name, &[])
}

/// The same, converted with `options`.
fn converted(scratch: &Scratch, name: &str, options: &[&str]) -> Result<(String, String)> {
    let layer = TarLayer::new().directory("etc").file(NAME, name).finish()?;
    let image = ImageBuilder::new().layer(readable_layers()?.swap_remove(0), Compression::Gzip);
    let original = image.layer(layer, Compression::Gzip).write(scratch, &format!("{name}-original"))?;
    let lazy = format!("oci:{}:latest", scratch.join(format!("{name}-lazy")).display());
    lazuli_ok([&["convert", &original, &lazy], options].concat())?;
    Ok((original, lazy))
}

/// The lazy blob of a layer of a layout, and its annotations.
fn lazy_layer(layout: &str, number: usize) -> Result<(Vec<u8>, LazyLayer)> {
    let descriptor = &layout_manifest(layout)?["layers"][number];
    let annotations = LazyLayer::from_annotations(|key| descriptor["annotations"][key].as_str());
    let described = annotations.expect("annotations are well-formed").expect("the layer is lazy");
    Ok((std::fs::read(layout_blob(layout, digest_in(descriptor)?)).context("reading a blob")?, described))
}

/// `good`, ordinary and lazy, and `trap` with the config of `good` and layers of `evil`.
fn publish_good_and_trap(scratch: &Scratch) -> Result<TestRegistry> {
    let registry = TestRegistry::start(scratch)?;
    let ((original, lazy), (_, evil)) = (image(scratch, "good")?, image(scratch, "evil")?);
    registry.push(&original, "good:original")?;
    registry.push(&lazy, "good:lazy")?;
    let (blob, described) = lazy_layer(&evil, 1)?;
    replace_layer(&lazy, 1, &blob, &described)?;
    registry.push(&lazy, "trap:latest")?;
    Ok(registry)
}

fn pull(node: &Node, namespace: &str, reference: &str) -> Result<Finished> {
    finish(node.lazuli_pull_command(reference)?.args(["--namespace", namespace]))
}

fn pulled(node: &Node, namespace: &str, reference: &str) -> Result<()> {
    match pull(node, namespace, reference)? {
        Finished { code: Some(0), .. } => Ok(()),
        finished => Err(HarnessError::Unexpected(format!("lazuli pull {reference}: {}", finished.stderr))),
    }
}

fn read_name(node: &Node, namespace: &str, reference: &str, id: &str) -> Result<Finished> {
    let words = ["-n", namespace, "run", "--rm", "--snapshotter", LAZULI, reference, id, "/bin/cat", "/etc/name"];
    finish(&mut node.containerd.ctr(words))
}

fn wait_for_refusal(node: &Node) -> Result<()> {
    wait_for("no snapshot was refused", || Ok(node.snapshotter.log().contains("snapshot refused").then_some(())))
}

/// The image status of a reference, from `lazuli status`.
fn status(root: &Path, reference: &str) -> Result<Value> {
    let mut status = command(program("lazuli")?, ["status", reference, "--json", "--root"]);
    let status: Value = serde_json::from_str(&run(status.arg(root))?).context("reading a status")?;
    Ok(status["images"][0].clone())
}

/// The status of a chain of this image that is as it is wanted, from `lazuli status`.
fn wait_for_chain(root: &Path, reference: &str, is_wanted: impl Fn(&Value) -> bool) -> Result<Value> {
    wait_for("no chain is as it is wanted", || {
        let mut status = command(program("lazuli")?, ["status", "--json", "--root"]);
        let status: Value = serde_json::from_str(&run(status.arg(root))?).context("reading a status")?;
        let chains = status["chains"].as_array().cloned().unwrap_or_default();
        Ok(chains.into_iter().find(|chain| chain["image"] == reference && is_wanted(chain)))
    })
}

/// A node that starts nothing from elsewhere before it is verified, and fetches nothing that nobody reads.
fn strict_node(scratch: &Scratch, trust: &str) -> Result<Node> {
    let configuration = scratch.join("config.toml");
    std::fs::write(&configuration, format!("[trust]\nunverified = 'wait'\n{trust}"))
        .context("writing a configuration")?;
    Node::start_with(&["--background-rate", "0", "--config", &configuration.display().to_string()], scratch)
}

/// The trap is pulled first, into a namespace of its own, and never started. Whatever was found out by the time that
/// the honest image comes: it shows its own content.
#[test]
fn an_image_that_lies_about_its_chain_changes_nothing_in_another_namespace() -> Result<()> {
    let scratch = Scratch::new("truth-namespaces")?;
    let registry = publish_good_and_trap(&scratch)?;
    let node = Node::start_with(&[], &scratch)?;
    pulled(&node, OTHER, &registry.reference("trap:latest"))?;
    for (number, reference) in ["good:lazy", "good:original"].into_iter().enumerate() {
        let reference = registry.reference(reference);
        match number {
            0 => pulled(&node, "default", &reference)?,
            _ => node.containerd.pull(&reference, LAZULI)?,
        }
        let finished = read_name(&node, "default", &reference, &format!("honest-{number}"))?;
        assert_eq!((finished.code, finished.stdout.as_str()), (Some(0), "good"), "{}", finished.stderr);
    }
    wait_for_refusal(&node)?;
    let finished = read_name(&node, OTHER, &registry.reference("trap:latest"), "trapped")?;
    assert!(!finished.stdout.contains("evil"), "{}", finished.stdout);
    Ok(())
}

/// In one namespace containerd takes the snapshot that is there for the honest image's, and asks nobody.
#[test]
fn an_image_that_lies_about_its_chain_is_refused_and_the_honest_one_takes_its_place() -> Result<()> {
    let scratch = Scratch::new("truth-refused")?;
    let registry = publish_good_and_trap(&scratch)?;
    let node = Node::start_with(&[], &scratch)?;
    let (trap, good) = (registry.reference("trap:latest"), registry.reference("good:original"));
    pulled(&node, "default", &trap)?;
    wait_for_refusal(&node)?;
    let refused = wait_for_chain(node.snapshotter.root(), &trap, |chain| chain["truth"] == "refused")?;
    let reason = refused["reason"].as_str().unwrap_or_default();
    assert!(reason.starts_with("its tar stream has digest sha256:"), "{refused}");
    assert!(reason.ends_with(&format!("the image's config names {}", refused["chain_id"].as_str().unwrap_or("none"))));
    assert!(refused["since"].as_i64() > Some(1_600_000_000), "{refused}");
    // The layer itself is sound: it is what its tar stream says.
    let layers = status(node.snapshotter.root(), &trap)?["layers"].as_array().cloned().unwrap_or_default();
    assert!(layers.iter().all(|layer| layer["truth"] == "verified"), "{layers:?}");
    let mut told = command(program("lazuli")?, ["status", "--root"]);
    let told = run(told.arg(node.snapshotter.root()))?;
    assert!(told.contains(" ago, nothing is started on it: its tar stream has digest"), "{told}");
    node.containerd.pull(&good, LAZULI)?;
    for (image, id) in [(&trap, "trapped"), (&good, "deceived")] {
        let finished = read_name(&node, "default", image, id)?;
        assert_ne!(finished.code, Some(0), "{}", finished.stdout);
        assert!(finished.stderr.contains("is refused") && !finished.stdout.contains("evil"), "{}", finished.stderr);
    }
    run(&mut node.containerd.ctr(["images", "rm", "--sync", &trap, &good]))?;
    pulled(&node, "default", &registry.reference("good:lazy"))?;
    let finished = read_name(&node, "default", &registry.reference("good:lazy"), "honest")?;
    assert_eq!((finished.code, finished.stdout.as_str()), (Some(0), "good"), "{}", finished.stderr);
    Ok(())
}

/// Right frames, so that scanners and complete pulls see the right files: an index with a set-user-ID bit, and a hot
/// pack with another program.
#[test]
fn a_layer_with_two_faces_is_refused() -> Result<()> {
    let scratch = Scratch::new("truth-two-faces")?;
    let registry = TestRegistry::start(&scratch)?;
    let node = Node::start_with(&[], &scratch)?;
    for lie in ["mode", "hot"] {
        let (_, lazy) = image(&scratch, lie)?;
        let (honest, _) = lazy_layer(&lazy, 1)?;
        let mut blob = LazyBlob::open(&honest)?;
        let file = blob.inode_at("/etc/name")?;
        if lie == "hot" {
            blob.add_hot("/etc/name", 100, hot_reason::PROFILE)?;
            blob.hot[0].1 = b"hat".to_vec();
        }
        let (blob, described) = blob.assemble(|number, inode| {
            if number == file && lie == "mode" {
                inode.mode = (inode.mode.get() | 0o4000).into();
            }
        })?;
        replace_layer(&lazy, 1, &blob, &described)?;
        let reference = registry.push(&lazy, &format!("{lie}:lazy"))?;
        pulled(&node, "default", &reference)?;
        let refusal = wait_for("the layer was not refused", || {
            let status = status(node.snapshotter.root(), &reference)?;
            let layers = status["layers"].as_array().cloned().unwrap_or_default();
            let reasons = layers.iter().filter_map(|layer| layer["reason"].as_str());
            Ok(reasons.map(str::to_owned).next())
        })?;
        let expected = match lie {
            "mode" => "/etc/name: mode is 4644 by the index, 0644 by the tar stream",
            _ => "content at 1 of the plain address space is not that of frame 0",
        };
        assert_eq!(refusal, expected);
        let finished = read_name(&node, "default", &reference, lie)?;
        assert_ne!(finished.code, Some(0), "{}", finished.stdout);
        assert!(finished.stderr.contains("is refused"), "{}", finished.stderr);
    }
    Ok(())
}

/// Nothing of an image from elsewhere is started before it was verified, and nothing else has to be done for that.
#[test]
fn in_strict_mode_a_container_starts_when_its_layers_are_verified() -> Result<()> {
    let scratch = Scratch::new("truth-strict")?;
    let registry = publish_good_and_trap(&scratch)?;
    let configuration = scratch.join("config.toml");
    std::fs::write(&configuration, "[trust]\nunverified = 'wait'\n").context("writing a configuration")?;
    let node = Node::start_with(&["--config", &configuration.display().to_string()], &scratch)?;
    let reference = registry.reference("good:lazy");
    pulled(&node, "default", &reference)?;
    let mut attempt = 0;
    let finished = wait_for("the container did not start", || {
        attempt += 1;
        let finished = read_name(&node, "default", &reference, &format!("strict-{attempt}"))?;
        let is_told_to_wait = finished.stderr.contains("ask again");
        Ok((!is_told_to_wait).then_some(finished))
    })?;
    assert_eq!((finished.code, finished.stdout.as_str()), (Some(0), "good"), "{}", finished.stderr);
    let status = status(node.snapshotter.root(), &reference)?;
    let layers = status["layers"].as_array().cloned().unwrap_or_default();
    assert!(layers.iter().all(|layer| layer["truth"] == "verified"), "{layers:?}");
    // With the trap it never starts.
    let trap = registry.reference("trap:latest");
    let finished = pull(&node, OTHER, &trap)?;
    if finished.code == Some(0) {
        let finished = read_name(&node, OTHER, &trap, "trapped")?;
        assert!(!finished.stdout.contains("evil"), "{}", finished.stdout);
    }
    Ok(())
}

/// The converter has said who it is, and the node believes it: that is enough to start, and no more.
#[test]
fn a_signed_image_starts_at_once_on_a_strict_node_and_others_wait() -> Result<()> {
    let scratch = Scratch::new("truth-signed")?;
    let registry = TestRegistry::start(&scratch)?;
    let path = |name: &str| scratch.join(name).display().to_string();
    run(&mut command("openssl", ["genpkey", "-algorithm", "ed25519", "-out", &path("key.pem")]))?;
    run(&mut command("openssl", ["pkey", "-in", &path("key.pem"), "-pubout", "-out", &path("key.pub")]))?;
    let (_, good) = converted(&scratch, "good", &["--sign", &path("key.pem")])?;
    let (_, plain) = image(&scratch, "plain")?;
    let (signed, unsigned) = (registry.push(&good, "good:signed")?, registry.push(&plain, "plain:lazy")?);
    // The config of `good` with a layer of `evil`, and the signature that `good` has in its place.
    let (_, evil) = image(&scratch, "evil")?;
    let signature = layout_manifest(&good)?["layers"][1]["annotations"][SIGNATURE].clone();
    assert!(signature.is_string(), "{signature}");
    let (blob, described) = lazy_layer(&evil, 1)?;
    replace_layer(&good, 1, &blob, &described)?;
    edit_manifest(&good, |manifest| manifest["layers"][1]["annotations"][SIGNATURE] = signature)?;
    let trap = registry.push(&good, "trap:signed")?;

    let node = strict_node(&scratch, &format!("keys = ['{}']\n", path("key.pub")))?;
    let root = node.snapshotter.root();
    pulled(&node, OTHER, &trap)?;
    let finished = read_name(&node, OTHER, &trap, "trapped")?;
    assert!(finished.code != Some(0) && !finished.stdout.contains("evil"), "{}", finished.stdout);
    wait_for_chain(root, &trap, |chain| chain["truth"] == "refused")?;
    pulled(&node, OTHER, &trap)?;
    assert_eq!(node.snapshotter.log().matches("a signature of this layer is not believed").count(), 1);
    run(&mut node.containerd.ctr(["-n", OTHER, "images", "rm", "--sync", &trap]))?;

    pulled(&node, "default", &signed)?;
    let finished = read_name(&node, "default", &signed, "signed")?;
    assert_eq!((finished.code, finished.stdout.as_str()), (Some(0), "good"), "{}", finished.stderr);
    let chain = wait_for_chain(root, &signed, |chain| chain["signed_by"][0].is_string())?;
    assert_eq!(chain["truth"], "believed");

    pulled(&node, "default", &unsigned)?;
    let mut attempt = 0;
    let finished = wait_for("the container did not start", || {
        attempt += 1;
        let finished = read_name(&node, "default", &unsigned, &format!("unsigned-{attempt}"))?;
        Ok((!finished.stderr.contains("ask again")).then_some(finished))
    })?;
    assert_eq!((finished.code, finished.stdout.as_str()), (Some(0), "plain"), "{}", finished.stderr);
    // Not before all of it was known, while of the signed one nobody had to know.
    let is_of_it = |chain: &Value| chain["truth"] == "verified" && chain["signed_by"] == Value::Array(Vec::new());
    wait_for_chain(root, &unsigned, is_of_it)?;
    let signed = wait_for_chain(root, &signed, |_| true)?;
    assert_eq!(signed["truth"], "believed", "{signed}");
    Ok(())
}

//! Credentials: whose are used for what, and helpers that hang.

use std::{fs, os::unix::fs::PermissionsExt as _, thread, time::Duration};

use lazuli_tests::{
    Fault, FaultyRegistry, HarnessError, Result, SnapshotterOptions, TarLayer,
    error::Context as _,
    image::layout_manifest,
    process::{command, run},
    registry_server::push_to,
};
use serde_json::json;
use tonic::Code;

use crate::{
    bench::{Bench, logged},
    images::{SINGLE_LEN, single, single_content, write_lazy},
    rows::image::with_label,
    snapshots::{Snapshots, cri_labels, has_code, lazy_layer, mount_at, words},
};

/// `name:one` and `name:two` in base 64.
const ONE: (&str, &str) = ("one", "Basic bmFtZTpvbmU=");
const TWO: (&str, &str) = ("two", "Basic bmFtZTp0d28=");
const CALL_WITHIN: Duration = Duration::from_secs(30);

/// A directory with a `config.json` that has the first password for `host`; its path.
fn logged_in(bench: &Bench, name: &str, host: &str) -> Result<String> {
    let directory = bench.scratch.directory(name)?;
    let auth = ONE.1.trim_start_matches("Basic ");
    let config = json!({ "auths": { host: { "auth": auth } } });
    fs::write(directory.join("config.json"), config.to_string()).at("writing", &directory)?;
    Ok(directory.to_string_lossy().into_owned())
}

/// A manifest that names a private image in an annotation: the node's credentials must not be used for it.
pub(crate) fn deputy(bench: &Bench) -> Result<()> {
    let secret = b"the secret of the private repository\n";
    let layout = write_lazy(&bench.scratch, "deputy", vec![TarLayer::new().file("data", secret).finish()?])?;
    push_to(&bench.upstream, &layout, "deputy:lazy")?;
    bench.registry.require("deputy", Some(ONE.1));
    let environment = vec![("DOCKER_CONFIG".to_owned(), logged_in(bench, "docker", bench.registry.address())?)];
    let flags = SnapshotterOptions::with_flags(&["--background-rate", "0"]).flags;
    let node = bench.node_as(SnapshotterOptions { environment, flags, ..SnapshotterOptions::default() })?;
    let snapshots = Snapshots::connect(&node)?;
    let public = FaultyRegistry::before(&bench.upstream)?;
    public.set("public", Fault::AllStatus(404));
    let (attacker, private) = (public.reference("public:lazy"), bench.registry.reference("deputy:lazy"));
    let manifest = layout_manifest(&layout)?;
    let layer = lazy_layer(&manifest["layers"][0])?;
    let chain = format!("{}", layer.blob);
    let labels = cri_labels(&attacker, &manifest, 0, &chain);
    let labels = with_label(labels, "containerd.io/snapshot/lazuli/image", &private);
    let prepared = snapshots.prepare(&format!("default/901/extract-901-0 {chain}"), "", labels, CALL_WITHIN);
    let mut sees = format!("Prepare: {}", words(&prepared));
    let mut has_secret = false;
    if has_code(&prepared, Code::AlreadyExists) {
        let names = snapshots.names_with("containerd.io/snapshot.ref", &chain)?;
        let parent = names.first().ok_or_else(|| HarnessError::Unexpected("no snapshot is there".to_owned()))?;
        let container = snapshots.prepare("default/902/container", parent, [].into(), CALL_WITHIN);
        sees = format!("{sees}; container: {}", words(&container));
        if let (Some(Ok(mounts)), _) = &container {
            let tree = mount_at(mounts, &bench.scratch, "deputy-mnt")?;
            let seen = bench.read(&tree.join("data"), secret.len(), Duration::from_secs(15))?;
            has_secret = seen.is(secret);
            sees = if has_secret { "THE SECRET".to_owned() } else { format!("{sees}; {}", seen.words(secret)) };
        }
    }
    let asked = bench.registry.asked("deputy").iter().filter(|asked| !asked.authorization.is_empty()).count();
    let sees = format!("{sees}; {asked} requests with the node's password");
    let is_right = !has_secret && asked == 0;
    bench.line("an annotation that names a private image", sees, logged(&node, &[]), is_right);
    Ok(())
}

/// An image that containerd may pull and `lazuli-fused` may not read: it starts all the same.
pub(crate) fn pull_secret(bench: &Bench) -> Result<()> {
    let node = bench.node()?;
    bench.registry.require(&single(0), Some(ONE.1));
    let image = bench.registry.reference(&format!("{}:lazy", single(0)));
    let mut pull = node.lazuli_pull_command(&image)?;
    pull.env("DOCKER_CONFIG", logged_in(bench, "docker", bench.registry.address())?);
    bench.pull_with(&node, &mut pull)?;
    let mounted = bench.mount(&node, &image, Duration::from_secs(60))?;
    let expected = single_content(0);
    match mounted.path() {
        Some(tree) => {
            let seen = bench.read(&tree.join("data"), SINGLE_LEN, Duration::from_secs(20))?;
            let sees = format!("{}; {}", mounted.words(), seen.words(&expected));
            bench.line("a pull secret that the node does not have", sees, logged(&node, &[]), seen.is(&expected));
        }
        None => bench.line("a pull secret that the node does not have", mounted.words(), logged(&node, &[]), false),
    }
    Ok(())
}

/// A credential helper that hangs when passwords have changed; then it answers again.
pub(crate) fn helper(bench: &Bench) -> Result<()> {
    const IMAGES: u64 = 18;
    let directory = bench.scratch.directory("helper")?;
    let at = |name: &str| directory.join(name);
    let (hangs, secret, program) = (at("hangs"), at("secret"), at("docker-credential-torture"));
    let script = format!(
        "#!/bin/sh\ncat >/dev/null\n[ -e {} ] && exec sleep 1000\nprintf '{{\"ServerURL\":\"x\",\"Username\":\"name\",\"Secret\":\"%s\"}}' \"$(cat {})\"\n",
        hangs.display(),
        secret.display()
    );
    fs::write(&program, script).at("writing", &program)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).at("changing", &program)?;
    fs::write(&secret, ONE.0).at("writing", &secret)?;
    let config = json!({ "credHelpers": { bench.registry.address(): "torture" } });
    fs::write(at("config.json"), config.to_string()).at("writing", &directory)?;
    let path = format!("{}:{}", directory.display(), std::env::var("PATH").unwrap_or_default());
    let environment =
        vec![("DOCKER_CONFIG".to_owned(), directory.to_string_lossy().into_owned()), ("PATH".to_owned(), path.clone())];
    let flags = SnapshotterOptions::with_flags(&["--background-rate", "0"]).flags;
    let node = bench.node_as(SnapshotterOptions { environment, flags, ..SnapshotterOptions::default() })?;
    let healthy = FaultyRegistry::before(&bench.upstream)?;
    let healthy_tree = bench.pulled_and_mounted(&node, &healthy.reference("healthy:lazy"))?;
    let mut trees = Vec::new();
    for number in 0..IMAGES {
        bench.registry.require(&single(number), Some(ONE.1));
        let image = bench.registry.reference(&format!("{}:lazy", single(number)));
        let mut pull = node.lazuli_pull_command(&image)?;
        bench.pull_with(&node, pull.env("DOCKER_CONFIG", &directory).env("PATH", &path))?;
        trees.push(bench.mounted(&node, &image)?);
    }
    run(command("touch", [&hangs]).env("LC_ALL", "C"))?;
    let mut readers = Vec::new();
    for (number, tree) in (0..).zip(&trees) {
        bench.registry.require(&single(number), Some(TWO.1));
        readers.push(bench.reader(&tree.join("data"), SINGLE_LEN)?);
    }
    thread::sleep(Duration::from_secs(2));
    bench.healthy_line(&node, "passwords change, the helper hangs, 18 readers wait", &healthy_tree, 3)?;
    let status = bench.status(&node, Duration::from_secs(10))?;
    let sees = if status.is_some() { "lazuli status answers" } else { "lazuli status hangs" };
    bench.line("the same", sees, "", status.is_some());
    // The helper that hangs must be given up by itself.
    fs::write(&secret, TWO.0).at("writing", &secret)?;
    fs::remove_file(&hangs).at("removing", &hangs)?;
    let (mut right, mut last) = (0, String::new());
    for (number, reader) in (0..).zip(readers) {
        let (seen, expected) = (reader.finish(Duration::from_secs(100))?, single_content(number));
        right += u64::from(seen.is(&expected));
        last = seen.words(&expected);
    }
    let sees = format!("{right} of {IMAGES} readers right; the last: {last}");
    bench.line("the helper answers again, with the new password", sees, logged(&node, &[]), right == IMAGES);
    Ok(())
}

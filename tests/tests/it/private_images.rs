//! Images that containerd may read and `lazuli-fused` may not: pulled with the secret of a pod.

use std::fs;

use lazuli_tests::{
    Node, Result, Scratch, error::Context as _, node::SnapshotterOptions, programs::lazuli_ok, registry_server::USER,
    samples::publish_sample,
};

/// Base64 of user and password of [`USER`], as docker writes them.
const AUTH: &str = "YWxhZGRpbjpvcGVuIHNlc2FtZQ==";

/// Runs a pod of the private image; returns whether it is lazy, and what `lazuli status` says where it is not.
fn start_private_pod(name: &str, with_credentials: bool) -> Result<(bool, String)> {
    let scratch = Scratch::new(name)?;
    let open = publish_sample(&scratch)?;
    let private = open.start_private_door(&scratch)?;
    let docker = scratch.directory("docker")?;
    let login = match with_credentials {
        true => format!("{{\"auths\": {{\"{}\": {{\"auth\": \"{AUTH}\"}}}}}}", private.address()),
        false => "{}".to_owned(),
    };
    fs::write(docker.join("config.json"), login).context("writing config.json")?;
    let docker = docker.display().to_string();
    let options = SnapshotterOptions {
        environment: vec![("DOCKER_CONFIG".to_owned(), docker)],
        ..SnapshotterOptions::with_flags(&["--background-rate", "0"])
    };
    let (node, cri) = Node::start_as_with_cri(options, &scratch, &open)?;
    let image = private.reference("sample:lazy");
    cri.pull_image_as(&image, USER)?;
    let pod = cri.run_pod("private")?;
    let container = pod.start_container("sample", &image, &["/bin/sleep", "1000"])?;
    assert_eq!(pod.shell(&container, "cat /etc/greeting")?, "good morning\n");
    drop(pod);
    let log = node.snapshotter.log();
    let is_lazy = log.contains("layer is lazy");
    assert_ne!(is_lazy, log.contains("it is pulled completely"), "{log}");
    let root = node.snapshotter.root().display().to_string();
    let status = if is_lazy { String::new() } else { lazuli_ok(["status", "--root", &root, &image])? };
    Ok((is_lazy, status))
}

#[test]
fn a_pod_with_a_secret_that_the_node_does_not_have_runs_from_a_complete_pull() -> Result<()> {
    let (is_lazy, status) = start_private_pod("private-without", false)?;
    assert!(!is_lazy);
    assert!(status.contains("not lazy: it was pulled completely") && status.contains("401"), "{status}");
    Ok(())
}

#[test]
fn a_pod_with_a_secret_that_the_node_has_too_is_lazy() -> Result<()> {
    assert_eq!(start_private_pod("private-with", true)?, (true, String::new()));
    Ok(())
}

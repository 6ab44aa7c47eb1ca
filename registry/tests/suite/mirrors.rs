//! Mirrors of `hosts.toml`: who is asked for what, in which order, and what follows when one fails.

use std::net::TcpListener;

use format_spec::Digest;
use registry::{BlobSource, Client, ClientOptions, Error};
use storage::Source;
use tempfile::TempDir;

use crate::{
    client_with_hosts, collect,
    docker_registry::DockerRegistry,
    fault_server::{FaultServer, Reply},
    hosts_dir, options, pattern, push, push_image,
};

const MANIFEST: &[u8] = br#"{"layers":[]}"#;

/// Answers everything with this status, and with a manifest where it is 200.
async fn server(status: u16) -> FaultServer {
    FaultServer::start(move |_, _| Reply::full(status, &[], if status == 200 { MANIFEST } else { b"" })).await
}

/// Hosts for `r.example:5000`: mirrors with their capabilities, then the server. The files are read on first use.
fn client(mirrors: &[(&FaultServer, &str)], server: &FaultServer) -> (Client, TempDir) {
    let mut text = format!("server = \"http://{}\"\n", server.host());
    for (mirror, capabilities) in mirrors {
        text.push_str(&format!("[host.\"http://{}\"]\ncapabilities = {capabilities}\n", mirror.host()));
    }
    let hosts = hosts_dir(&[("r.example:5000", &text)]);
    (client_with_hosts(&hosts), hosts)
}

#[tokio::test]
async fn a_mirror_is_asked_first_and_told_the_registry() {
    let (mirror, origin) = (server(200).await, server(200).await);
    let (client, _hosts) = client(&[(&mirror, r#"["pull", "resolve"]"#)], &origin);
    client.manifest(&"r.example:5000/a".parse().unwrap()).await.unwrap();
    assert_eq!(mirror.requests(), ["GET /v2/a/manifests/latest?ns=r.example%3A5000"]);
    assert_eq!(origin.requests(), [""; 0]);
}

#[tokio::test]
async fn every_failure_moves_on_to_the_next_host() {
    for status in [400, 401, 403, 404, 429, 500, 503] {
        let (first, second, origin) = (server(status).await, server(status).await, server(200).await);
        let all = r#"["pull", "resolve"]"#;
        let (client, _hosts) = client(&[(&first, all), (&second, all)], &origin);
        client.manifest(&"r.example:5000/a".parse().unwrap()).await.unwrap();
        let counts = [first, second, origin].map(|server| server.requests().len());
        assert_eq!(counts, [1, 1, 1], "{status}");
    }
}

#[tokio::test]
async fn a_mirror_is_trusted_with_what_it_is_listed_for() {
    let (puller, resolver, origin) = (server(200).await, server(200).await, server(200).await);
    let (client, _hosts) = client(&[(&puller, r#"["pull"]"#), (&resolver, r#"["resolve"]"#)], &origin);
    client.manifest(&"r.example:5000/a:tag".parse().unwrap()).await.unwrap();
    let by_digest = format!("r.example:5000/a@{}", Digest::of(MANIFEST)).parse().unwrap();
    client.manifest(&by_digest).await.unwrap();
    client.has_blob(&by_digest, &Digest::of(b""), 0).await.unwrap();
    client.has_stored_blob(&by_digest, &Digest::of(b""), 0).await.unwrap();
    let found = [puller, resolver, origin].map(|server| {
        let requests = server.requests();
        requests.iter().map(|request| request.split(&['/', '?'][..]).nth(3).unwrap().to_owned()).collect::<Vec<_>>()
    });
    assert_eq!(found, [vec!["manifests", "blobs"], vec!["manifests"], vec!["blobs"]]);
}

#[tokio::test]
async fn a_mirror_that_is_down_is_asked_last_for_a_while() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let down = listener.local_addr().unwrap();
    drop(listener);
    let (busy, origin) = (server(503).await, server(200).await);
    let text =
        format!("server = \"http://{}\"\n[host.\"http://{down}\"]\n[host.\"http://{}\"]\n", origin.host(), busy.host());
    let hosts = hosts_dir(&[("_default", &text)]);
    let client = client_with_hosts(&hosts);
    for _ in 0..5 {
        client.manifest(&"r.example/a".parse().unwrap()).await.unwrap();
    }
    assert_eq!((busy.requests().len(), origin.requests().len()), (1, 5));
}

/// Blobs that were cold, slow or broken in one repository took the mirror from all others.
#[tokio::test]
async fn a_mirror_rests_for_the_repository_that_fails_and_wholly_where_nobody_connects() {
    let mirror = FaultServer::start(|_, request| match request.target.starts_with("/v2/evil/") {
        true if request.target.contains("redirected") => Reply::full(307, &["Location: http://127.0.0.1:1/gone"], b""),
        true => Reply::status(503),
        false => Reply::full(200, &[], MANIFEST),
    })
    .await;
    let origin = server(200).await;
    let (client, _hosts) = client(&[(&mirror, r#"["pull", "resolve"]"#)], &origin);
    for (name, expected) in [("evil/a", (1, 1)), ("evil/a", (1, 2)), ("evil/redirected", (2, 3)), ("team/b", (3, 3))] {
        client.manifest(&format!("r.example:5000/{name}").parse().unwrap()).await.unwrap();
        assert_eq!((mirror.requests().len(), origin.requests().len()), expected, "{name}");
    }
    let down = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let text = format!("server = \"http://{}\"\n[host.\"http://{down}\"]\n", origin.host());
    let hosts = hosts_dir(&[("_default", &text)]);
    let client = client_with_hosts(&hosts);
    client.manifest(&"r.example/evil/a".parse().unwrap()).await.unwrap();
    // It is back, and not asked yet, for no repository.
    let listener = TcpListener::bind(down).unwrap();
    listener.set_nonblocking(true).unwrap();
    client.manifest(&"r.example/team/b".parse().unwrap()).await.unwrap();
    assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}

#[tokio::test]
async fn all_failures_are_said_and_the_registrys_own_counts() {
    let (mirror, origin) = (server(503).await, server(404).await);
    let (client, _hosts) = client(&[(&mirror, r#"["pull", "resolve"]"#)], &origin);
    let error = client.manifest(&"r.example:5000/a".parse().unwrap()).await.unwrap_err();
    assert!(error.is_not_found() && matches!(error, Error::Mirrors { .. }), "{error:?}");
    let expected = format!(
        "manifest of r.example:5000/a:latest: not found at {} (before that: {} answered 503)",
        origin.host(),
        mirror.host()
    );
    assert_eq!(error.to_string(), expected);
    // What a tag means the registry has said: no reason to ask the mirror once more.
    assert_eq!((mirror.requests().len(), origin.requests().len()), (1, 1));
}

#[tokio::test]
async fn content_that_only_a_mirror_has_is_waited_for() {
    let mirror = FaultServer::start(|count, request| match count {
        0..=2 => Reply::status(502),
        _ if request.method == "HEAD" => Reply::full(200, &[], b"blob"),
        _ => Reply::status(500),
    })
    .await;
    let origin = server(404).await;
    let (client, _hosts) = client(&[(&mirror, r#"["pull"]"#)], &origin);
    let found = client.has_blob(&"r.example:5000/a".parse().unwrap(), &Digest::of(b"blob"), 4).await;
    assert!(found.unwrap());
}

#[tokio::test]
async fn a_read_that_breaks_at_a_mirror_goes_on_at_the_registry() {
    let registry = DockerRegistry::start();
    let content = pattern(100_000);
    let digest = push(&crate::client(), &registry.reference("a"), &content).await;
    let mirror = FaultServer::start(|_, request| {
        let first: usize = request.header("range")["bytes=".len()..].split('-').next().unwrap().parse().unwrap();
        let range = format!("Content-Range: bytes {first}-{}/100000", 49_999);
        let cut = if first == 10_000 { 1000 } else { 0 };
        Reply::cut(206, &[&range], &pattern(100_000)[first..50_000], cut)
    })
    .await;
    let text = format!("server = \"http://{}\"\n[host.\"http://{}\"]\n", registry.host(), mirror.host());
    let hosts = hosts_dir(&[(registry.host(), &text)]);
    let source = BlobSource::new(client_with_hosts(&hosts), registry.reference("a"), digest, 100_000);
    assert!(collect(source.fetch(10_000..50_000).await.unwrap()).await.unwrap() == content[10_000..50_000]);
    assert_eq!(mirror.headers("range"), ["bytes=10000-49999"]);
}

#[tokio::test]
async fn a_mirror_with_other_content_under_a_digest_is_passed_over() {
    let registry = DockerRegistry::start();
    let (_, digest) = push_image(&crate::client(), &registry.reference("a:v1")).await;
    let liar = server(200).await;
    let text = format!("server = \"http://{}\"\n[host.\"http://{}\"]\n", registry.host(), liar.host());
    let hosts = hosts_dir(&[(registry.host(), &text)]);
    let reference = registry.reference("a").with_digest(digest);
    assert_eq!(client_with_hosts(&hosts).manifest(&reference).await.unwrap().digest, digest);
    assert_eq!(liar.requests().len(), 1);
}

#[tokio::test]
async fn pushes_go_past_mirrors_and_nowhere_without_the_capability() {
    let registry = DockerRegistry::start();
    let mirror = server(200).await;
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\ncapabilities = [\"pull\", \"resolve\"]",
        registry.host(),
        mirror.host()
    );
    let hosts = hosts_dir(&[("r.example", &text)]);
    let client = client_with_hosts(&hosts);
    let (_, digest) = push_image(&client, &"r.example/a:v1".parse().unwrap()).await;
    assert_eq!(mirror.requests(), [""; 0]);
    let stored = crate::client().manifest_digest(&registry.reference("a:v1")).await.unwrap();
    assert_eq!(stored, Some(digest));

    let text = format!("server = \"http://{}\"\ncapabilities = [\"pull\"]", registry.host());
    let hosts = hosts_dir(&[("r.example", &text)]);
    let client = client_with_hosts(&hosts);
    let error = client.has_stored_blob(&"r.example/a".parse().unwrap(), &digest, 0).await.unwrap_err().to_string();
    assert_eq!(error, "no host that hosts.toml names for r.example has the capability \"push\"");
}

#[tokio::test]
async fn configured_headers_and_paths_reach_the_mirror_only() {
    let store = server(200).await;
    let location = format!("Location: http://{}/x", store.host());
    let mirror = FaultServer::start(move |_, _| Reply::full(307, &[&location], b"")).await;
    let text = format!(
        "[host.\"http://{}/up/stream/\"]\noverride_path = true\nheader = {{ x-node = [\"a\", \"b\"] }}\n",
        mirror.host()
    );
    let hosts = hosts_dir(&[("docker.io", &text)]);
    client_with_hosts(&hosts).manifest(&"docker.io/debian".parse().unwrap()).await.unwrap();
    assert_eq!(mirror.requests(), ["GET /up/stream/library/debian/manifests/latest?ns=docker.io"]);
    assert_eq!((mirror.headers("x-node"), store.headers("x-node")), (vec!["a".to_owned()], vec![String::new()]));
}

#[tokio::test]
async fn a_file_that_cannot_be_used_is_named_and_nothing_is_asked() {
    let hosts = hosts_dir(&[("r.example", "skip-verify = true")]);
    let error = client_with_hosts(&hosts).manifest(&"r.example/a".parse().unwrap()).await.unwrap_err().to_string();
    let expected =
        format!("{}: line 1: unknown field `skip-verify`", hosts.path().join("r.example/hosts.toml").display());
    assert!(error.starts_with(&expected) && !error.contains('\n'), "{error}");
}

#[tokio::test]
async fn a_mirrors_own_credentials_are_used() {
    let registry = DockerRegistry::start_with_password();
    let logins = tempfile::tempdir().unwrap();
    push_image(
        &crate::logged_in_client(logins.path(), registry.host(), "aladdin", "open sesame"),
        &registry.reference("a:v1"),
    )
    .await;
    let hosts = hosts_dir(&[("r.example", &format!("server = \"http://{}\"", registry.host()))]);
    let client = Client::new(ClientOptions {
        hosts_dir: Some(hosts.path().to_owned()),
        docker_config: Some(logins.path().join("config.json")),
        ..options()
    });
    client.manifest(&"r.example/a:v1".parse().unwrap()).await.unwrap();
}

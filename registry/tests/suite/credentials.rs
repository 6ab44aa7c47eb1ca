//! Credentials that change, expire or do not come: helpers, `config.json`, `hosts.toml`.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use registry::{Client, ClientOptions};

use crate::{
    certificates::Certificates,
    client_with_hosts,
    docker_registry::DockerRegistry,
    fault_server::{FaultServer, Received, Reply},
    hosts_dir, logged_in_client, options,
};

const MANIFEST: &[u8] = br#"{"layers":[]}"#;
/// "aladdin:one" and "aladdin:two", as they are sent.
const ONE: &str = "Basic YWxhZGRpbjpvbmU=";
const TWO: &str = "Basic YWxhZGRpbjp0d28=";
const DIRECTORY_VARIABLE: &str = "HELPER_TEST_DIRECTORY";

/// A directory for a helper, in a process that finds it there: helpers are found through `PATH`, which belongs to the
/// whole process. So the `test` runs itself in another one, and here it is over: `None`.
fn helper_directory(test: &str) -> Option<PathBuf> {
    if let Some(directory) = std::env::var_os(DIRECTORY_VARIABLE) {
        return Some(directory.into());
    }
    let directory = tempfile::tempdir().unwrap();
    let path = format!("{}:{}", directory.path().display(), std::env::var("PATH").unwrap());
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("credentials::{test}"), "--nocapture"])
        .env("PATH", path)
        .env(DIRECTORY_VARIABLE, directory.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}{}", String::from_utf8_lossy(&output.stderr));
    None
}

/// A client whose credentials all come from a helper that does what `script` says.
fn client_with_helper(directory: &Path, script: &str) -> Client {
    let helper = directory.join("docker-credential-cave");
    fs::write(&helper, format!("#!/bin/sh\ncd {}\necho run >>runs\n{script}\n", directory.display())).unwrap();
    fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
    let config = directory.join("config.json");
    fs::write(&config, r#"{"credsStore": "cave"}"#).unwrap();
    Client::new(ClientOptions { docker_config: Some(config), ..options() })
}

/// Answers with the password that stands in a file.
const PASSWORD_OF_FILE: &str = r#"cat >/dev/null; printf '{"Username": "aladdin", "Secret": "%s"}' "$(cat password)""#;

fn run_count(directory: &Path) -> usize {
    fs::read_to_string(directory.join("runs")).unwrap_or_default().lines().count()
}

/// Lets in who has the password that `wanted` gives; says `status` to other passwords, and 401 to nobody's.
async fn basic_server(status: u16, wanted: impl Fn(usize) -> &'static str + Send + Sync + 'static) -> FaultServer {
    FaultServer::start(move |count, request: &Received| match request.header("authorization") {
        "" => Reply::full(401, &["WWW-Authenticate: Basic realm=\"cave\""], b""),
        found if found == wanted(count) => Reply::full(200, &[], MANIFEST),
        _ => Reply::full(status, &[], br#"{"errors":[{"code":"DENIED","message":"your token has expired"}]}"#),
    })
    .await
}

#[tokio::test]
async fn a_credential_helper_is_asked() {
    let Some(directory) = helper_directory("a_credential_helper_is_asked") else { return };
    let script = "read host\nprintf '{\"Username\": \"aladdin\", \"Secret\": \"one\"}'";
    let server = basic_server(403, |_| ONE).await;
    client_with_helper(&directory, script).manifest(&server.reference("a")).await.unwrap();
    assert_eq!(server.headers("authorization"), ["", ONE]);
}

#[tokio::test]
async fn a_password_that_expires_is_asked_for_again() {
    let Some(directory) = helper_directory("a_password_that_expires_is_asked_for_again") else { return };
    for status in [401, 403] {
        fs::write(directory.join("password"), "one").unwrap();
        fs::write(directory.join("runs"), "").unwrap();
        let server = basic_server(status, |count| if count < 3 { ONE } else { TWO }).await;
        let client = client_with_helper(&directory, PASSWORD_OF_FILE);
        for _ in 0..2 {
            client.manifest(&server.reference("a")).await.unwrap();
        }
        fs::write(directory.join("password"), "two").unwrap();
        for _ in 0..2 {
            client.manifest(&server.reference("a")).await.unwrap();
        }
        assert_eq!(server.headers("authorization"), ["", ONE, ONE, ONE, TWO, TWO], "{status}");
        assert_eq!(run_count(&directory), 2, "{status}");
    }
}

#[tokio::test]
async fn a_refusal_stands_where_the_helper_has_nothing_new() {
    let Some(directory) = helper_directory("a_refusal_stands_where_the_helper_has_nothing_new") else { return };
    fs::write(directory.join("password"), "one").unwrap();
    let server = basic_server(403, |count| if count < 2 { ONE } else { TWO }).await;
    let client = client_with_helper(&directory, PASSWORD_OF_FILE);
    client.manifest(&server.reference("a")).await.unwrap();
    for _ in 0..3 {
        let error = client.manifest(&server.reference("a")).await.unwrap_err();
        assert!(error.is_denied(), "{error}");
        let hint = format!("what the credential helper docker-credential-cave has for {}", server.host());
        assert!(error.to_string().ends_with(&hint), "{error}");
    }
    // One request each, and one look whether there is something new: not one for every refusal.
    assert_eq!(server.headers("authorization"), ["", ONE, ONE, ONE, ONE]);
    assert_eq!(run_count(&directory), 2);
}

#[tokio::test]
async fn all_who_wait_share_one_run_of_a_helper() {
    let Some(directory) = helper_directory("all_who_wait_share_one_run_of_a_helper") else { return };
    fs::write(directory.join("password"), "one").unwrap();
    let server = basic_server(403, |_| ONE).await;
    let client = client_with_helper(&directory, &format!("sleep 2; {PASSWORD_OF_FILE}"));
    let references: Vec<_> = (0..20).map(|number| server.reference(&format!("repository-{number}"))).collect();
    futures_util::future::try_join_all(references.iter().map(|reference| client.manifest(reference))).await.unwrap();
    assert_eq!(run_count(&directory), 1);
}

#[tokio::test]
async fn a_helper_that_nobody_waits_for_is_killed_with_what_it_has_started() {
    let test = "a_helper_that_nobody_waits_for_is_killed_with_what_it_has_started";
    let Some(directory) = helper_directory(test) else { return };
    let server = basic_server(403, |_| ONE).await;
    let client = client_with_helper(&directory, "sleep 300 & echo $! $$ >started.new; mv started.new started; wait");
    let reference = server.reference("a");
    let started = directory.join("started");
    tokio::select! {
        result = client.manifest(&reference) => panic!("{result:?}"),
        () = until(|| started.exists()) => {}
    }
    let numbers = fs::read_to_string(started).unwrap();
    // Whoever is dead and has not been waited for yet has no command line.
    let is_alive = |number: &str| fs::read(format!("/proc/{number}/cmdline")).is_ok_and(|line| !line.is_empty());
    until(|| !numbers.split_whitespace().any(is_alive)).await;
}

#[tokio::test]
async fn a_helper_that_hangs_holds_up_nothing_but_its_host() {
    let Some(directory) = helper_directory("a_helper_that_hangs_holds_up_nothing_but_its_host") else { return };
    let (hanging, healthy) =
        (basic_server(403, |_| ONE).await, FaultServer::start(|_, _| Reply::full(200, &[], MANIFEST)));
    let (client, healthy) = (client_with_helper(&directory, "exec sleep 300"), healthy.await);
    let references: Vec<_> = (0..40).map(|number| hanging.reference(&format!("repository-{number}"))).collect();
    let begun = Instant::now();
    let refused = futures_util::future::join_all(references.iter().map(|reference| client.manifest(reference)));
    let reads = async {
        until(|| run_count(&directory) > 0).await;
        // Threads that may block are free.
        tokio::task::spawn_blocking(|| ()).await.unwrap();
        client.manifest(&healthy.reference("a")).await.unwrap();
        assert!(begun.elapsed() < Duration::from_secs(9), "the helper's time limit was waited for");
    };
    let (refused, ()) = tokio::join!(refused, reads);
    for result in refused {
        let error = result.unwrap_err().to_string();
        assert!(error.ends_with("the credential helper docker-credential-cave did not answer in 10 s"), "{error}");
    }
    assert_eq!(run_count(&directory), 1);
}

#[tokio::test]
async fn an_answer_of_a_helper_has_a_bound() {
    let Some(directory) = helper_directory("an_answer_of_a_helper_has_a_bound") else { return };
    let server = basic_server(403, |_| ONE).await;
    let error =
        client_with_helper(&directory, "exec cat /dev/zero").manifest(&server.reference("a")).await.unwrap_err();
    assert!(error.to_string().ends_with("answers with more than 1048576 bytes"), "{error}");
}

#[tokio::test]
async fn a_login_that_changes_counts_after_the_next_refusal() {
    for status in [401, 403] {
        let server = basic_server(status, |count| if count < 2 { ONE } else { TWO }).await;
        let directory = tempfile::tempdir().unwrap();
        let client = logged_in_client(directory.path(), server.host(), "aladdin", "one");
        client.manifest(&server.reference("a")).await.unwrap();
        logged_in_client(directory.path(), server.host(), "aladdin", "two");
        client.manifest(&server.reference("a")).await.unwrap();
        assert_eq!(server.headers("authorization"), ["", ONE, ONE, TWO], "{status}");
    }
}

#[tokio::test]
async fn a_refused_login_is_said_to_be_in_the_file() {
    let server = basic_server(403, |_| TWO).await;
    let directory = tempfile::tempdir().unwrap();
    let client = logged_in_client(directory.path(), server.host(), "aladdin", "one");
    let error = client.manifest(&server.reference("a")).await.unwrap_err().to_string();
    let config = directory.path().join("config.json");
    let hint = format!("the login for {0} in {1} (`docker login {0}`)", server.host(), config.display());
    assert!(error.ends_with(&hint), "{error}");
}

#[tokio::test]
async fn a_header_that_changes_counts_after_the_next_refusal() {
    let server = FaultServer::start(|count, request| match (count, request.header("x-token")) {
        (0, "one") | (_, "two") => Reply::full(200, &[], MANIFEST),
        _ => Reply::status(403),
    })
    .await;
    let text = |token: &str| format!("server = \"http://{}\"\nheader = {{ x-token = \"{token}\" }}\n", server.host());
    let hosts = hosts_dir(&[("r.example", &text("one"))]);
    let client = client_with_hosts(&hosts);
    let reference = "r.example/a".parse().unwrap();
    client.manifest(&reference).await.unwrap();
    assert!(client.manifest(&reference).await.unwrap_err().is_denied());
    fs::write(hosts.path().join("r.example/hosts.toml"), text("two")).unwrap();
    // Files that were read just now are not read again: not more than a second is waited for.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    client.manifest(&reference).await.unwrap();
    assert_eq!(server.headers("x-token"), ["one", "one", "one", "two"]);
}

#[tokio::test]
async fn a_ca_certificate_that_is_replaced_counts_after_the_next_failure() {
    let (right, wrong) = (Certificates::new(), Certificates::new());
    let registry = DockerRegistry::start_with_tls(&right, false);
    let hosts = hosts_dir(&[(registry.host(), "ca = \"ca.pem\"")]);
    let ca = hosts.path().join(registry.host()).join("ca.pem");
    fs::copy(wrong.path().join("ca.pem"), &ca).unwrap();
    let client = client_with_hosts(&hosts);
    let reference = registry.reference("a");
    let error = client.manifest_digest(&reference).await.unwrap_err();
    assert!(matches!(error, registry::Error::Tls { .. }), "{error}");
    fs::copy(right.path().join("ca.pem"), &ca).unwrap();
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(client.manifest_digest(&reference).await.unwrap(), None);
}

/// Waits until something holds that will soon.
async fn until(holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(60), "it never happened");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

//! Bearer tokens: fetched once, kept, renewed, and never shown to the wrong server.

use std::sync::atomic::{AtomicUsize, Ordering};

use registry::{Client, ClientOptions};

use crate::{
    client,
    fault_server::{FaultServer, Received, Reply},
    logged_in_client, options,
};

const MANIFEST: &[u8] = br#"{"layers":[]}"#;

/// A registry with its own token service, whose n-th token is `token-n`; `is_valid` says which it takes.
async fn bearer_server(is_valid: impl Fn(usize, &str) -> bool + Send + Sync + 'static) -> FaultServer {
    let tokens = AtomicUsize::new(0);
    FaultServer::start(move |count, request| {
        if request.target.starts_with("/token") {
            let token =
                format!(r#"{{"token": "token-{}", "expires_in": 300}}"#, tokens.fetch_add(1, Ordering::Relaxed));
            return Reply::full(200, &[], token.as_bytes());
        }
        if is_valid(count, request.header("authorization")) {
            return Reply::full(200, &[], MANIFEST);
        }
        challenge(request)
    })
    .await
}

fn challenge(request: &Received) -> Reply {
    let host = request.header("host");
    let challenge = format!(
        r#"WWW-Authenticate: Bearer realm="http://{host}/token?tenant=1",service="the registry",scope="repository:a:pull""#
    );
    Reply::full(401, &[&challenge], b"")
}

#[tokio::test]
async fn a_token_is_fetched_once_for_a_scope_and_kept() {
    let server = bearer_server(|_, authorization| authorization.starts_with("Bearer token-")).await;
    let client = client();
    for repository in ["a", "a", "b"] {
        client.manifest(&server.reference(repository)).await.unwrap();
    }
    let token = "GET /token?tenant=1&service=the+registry&scope=repository%3Aa%3Apull";
    assert_eq!(
        server.requests(),
        [
            "GET /v2/a/manifests/latest",
            token,
            "GET /v2/a/manifests/latest",
            "GET /v2/a/manifests/latest",
            "GET /v2/b/manifests/latest",
            &format!("{token}&scope=repository%3Ab%3Apull"),
            "GET /v2/b/manifests/latest",
        ]
    );
    let expected = ["", "", "Bearer token-0", "Bearer token-0", "", "", "Bearer token-1"];
    assert_eq!(server.headers("authorization"), expected);
}

#[tokio::test]
async fn a_token_that_is_refused_is_renewed_once() {
    // Requests 0 to 2 get the first token; from then on only the second is good.
    let server = bearer_server(|count, authorization| match count {
        ..=2 => authorization == "Bearer token-0",
        _ => authorization == "Bearer token-1",
    })
    .await;
    let client = client();
    for _ in 0..2 {
        client.manifest(&server.reference("a")).await.unwrap();
    }
    let expected = ["", "", "Bearer token-0", "Bearer token-0", "", "Bearer token-1"];
    assert_eq!(server.headers("authorization"), expected);
}

#[tokio::test]
async fn tokens_that_never_help_end_in_one_refusal() {
    let server = bearer_server(|_, _| false).await;
    let error = client().manifest(&server.reference("a")).await.unwrap_err();
    assert!(error.is_denied(), "{error}");
    assert_eq!(server.requests().len(), 3);
}

#[tokio::test]
async fn many_requests_at_once_fetch_one_token() {
    let server = bearer_server(|_, authorization| authorization == "Bearer token-0").await;
    let (client, reference) = (client(), server.reference("a"));
    let all = (0..20).map(|_| client.manifest(&reference));
    futures_util::future::try_join_all(all).await.unwrap();
    assert_eq!(server.requests().iter().filter(|request| request.starts_with("GET /token")).count(), 1);
}

#[tokio::test]
async fn credentials_go_to_the_token_service_and_the_token_to_the_registry() {
    let server = bearer_server(|_, authorization| authorization == "Bearer token-0").await;
    let directory = tempfile::tempdir().unwrap();
    let client = logged_in_client(directory.path(), server.host(), "aladdin", "open sesame");
    client.manifest(&server.reference("a")).await.unwrap();
    assert_eq!(server.headers("authorization"), ["", "Basic YWxhZGRpbjpvcGVuIHNlc2FtZQ==", "Bearer token-0"]);
}

#[tokio::test]
async fn an_identity_token_is_exchanged() {
    let server = bearer_server(|_, authorization| authorization == "Bearer token-0").await;
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("config.json");
    std::fs::write(&config, format!(r#"{{"auths": {{"{}": {{"identitytoken": "secret"}}}}}}"#, server.host())).unwrap();
    let client = Client::new(ClientOptions { docker_config: Some(config), ..options() });
    client.manifest(&server.reference("a")).await.unwrap();
    let asked = &server.received()[1];
    assert_eq!((asked.method.as_str(), asked.target.as_str()), ("POST", "/token?tenant=1"));
    let form = "grant_type=refresh_token&client_id=lazuli&scope=repository%3Aa%3Apull&service=the+registry&refresh_token=secret";
    assert_eq!(String::from_utf8_lossy(&asked.body), form);
}

#[tokio::test]
async fn a_failing_token_service_is_named() {
    let server = FaultServer::start(|_, request| match request.target.starts_with("/token") {
        true => Reply::full(403, &[], br#"{"errors":[{"code":"DENIED","message":"no such account"}]}"#),
        false => challenge(request),
    })
    .await;
    let reference = server.reference("a");
    let error = client().manifest(&reference).await.unwrap_err().to_string();
    assert!(error.starts_with(&format!("token for manifest of {reference}: no permission: ")), "{error}");
    assert!(error.contains("answered 403: DENIED: no such account"), "{error}");
}

#[tokio::test]
async fn another_server_learns_neither_token_nor_credentials() {
    let thief = FaultServer::start(|_, request| challenge(request)).await;
    let location = format!("Location: http://{}/blob", thief.host());
    let server = FaultServer::start(move |_, request| match request.target.as_str() {
        target if target.starts_with("/token") => Reply::full(200, &[], br#"{"token": "token-0"}"#),
        _ if request.header("authorization").is_empty() => challenge(request),
        _ => Reply::full(307, &[&location], b""),
    })
    .await;
    let directory = tempfile::tempdir().unwrap();
    let client = logged_in_client(directory.path(), server.host(), "aladdin", "open sesame");
    let error = client.manifest(&server.reference("a")).await.unwrap_err();
    assert!(error.is_denied(), "{error}");
    assert_eq!(thief.headers("authorization"), [""]);
    assert_eq!(thief.requests(), ["GET /blob"]);
}

#[tokio::test]
async fn a_token_that_is_revoked_with_403_is_renewed_once() {
    let server = FaultServer::start(|count, request| match (count, request.header("authorization")) {
        _ if request.target.starts_with("/token") => {
            Reply::full(200, &[], format!(r#"{{"token": "token-{count}", "expires_in": 300}}"#).as_bytes())
        }
        (_, "") => challenge(request),
        // The first token is good for one request.
        (2, _) | (_, "Bearer token-4") => Reply::full(200, &[], MANIFEST),
        _ => Reply::status(403),
    })
    .await;
    let client = client();
    for _ in 0..3 {
        client.manifest(&server.reference("a")).await.unwrap();
    }
    let expected = ["", "", "Bearer token-1", "Bearer token-1", "", "Bearer token-4", "Bearer token-4"];
    assert_eq!(server.headers("authorization"), expected);
}

#[tokio::test]
async fn who_may_not_read_something_does_not_have_the_token_service_asked_each_time() {
    let server = FaultServer::start(|_, request| match request.header("authorization") {
        _ if request.target.starts_with("/token") => Reply::full(200, &[], br#"{"token": "x", "expires_in": 300}"#),
        "" => challenge(request),
        _ => Reply::status(403),
    })
    .await;
    let client = client();
    for _ in 0..5 {
        assert!(client.manifest(&server.reference("a")).await.unwrap_err().is_denied());
    }
    assert_eq!(server.requests().iter().filter(|request| request.starts_with("GET /token")).count(), 2);
}

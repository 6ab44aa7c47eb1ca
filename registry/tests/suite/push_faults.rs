//! Uploads to a registry that misbehaves.

use std::time::Duration;

use bytes::Bytes;
use format_spec::Digest;
use registry::{BlobContent, Client, ClientOptions, Error, media_type};

use crate::{
    client,
    fault_server::{FaultServer, Reply},
    logged_in_client, no_progress,
};

const BLOB: &[u8] = b"blob";

async fn push(server: &FaultServer) -> Result<(), Error> {
    let content = BlobContent::Bytes(Bytes::from_static(BLOB));
    client().push_blob(&server.reference("a"), &Digest::of(BLOB), 4, content, no_progress()).await
}

fn put() -> String {
    format!("PUT /upload?state=1&digest=sha256%3A{}", Digest::of(BLOB).hex())
}

fn head() -> String {
    format!("HEAD /v2/a/blobs/{}", Digest::of(BLOB))
}

#[tokio::test]
async fn a_broken_upload_is_repeated_as_a_whole() {
    let server = FaultServer::start(|count, request| match (request.method.as_str(), count) {
        ("POST", _) => Reply::full(202, &["Location: /upload?state=1"], b""),
        ("PUT", 1) => Reply::Raw(Vec::new()),
        ("PUT", _) => Reply::status(201),
        _ => Reply::status(404),
    })
    .await;
    push(&server).await.unwrap();
    let post = "POST /v2/a/blobs/uploads/".to_owned();
    assert_eq!(server.requests(), [post.clone(), put(), head(), post, put()]);
    assert_eq!(server.received().last().unwrap().body, BLOB);
}

#[tokio::test]
async fn an_upload_whose_answer_got_lost_is_not_repeated() {
    let server = FaultServer::start(|_, request| match request.method.as_str() {
        "POST" => Reply::full(202, &["Location: /upload?state=1"], b""),
        "PUT" => Reply::status(502),
        _ => Reply::full(200, &[], BLOB),
    })
    .await;
    push(&server).await.unwrap();
    assert_eq!(server.requests(), ["POST /v2/a/blobs/uploads/".to_owned(), put(), head()]);
}

#[tokio::test]
async fn unusable_answers_to_an_upload_are_refused() {
    let nowhere = FaultServer::start(|_, _| Reply::status(202)).await;
    let error = push(&nowhere).await.unwrap_err().to_string();
    assert!(error.ends_with("an upload without a usable Location"), "{error}");

    let full = FaultServer::start(|_, request| match request.method.as_str() {
        "POST" => Reply::full(202, &["Location: /upload?state=1"], b""),
        _ => Reply::full(413, &[], b"blob too large"),
    })
    .await;
    let error = push(&full).await.unwrap_err().to_string();
    assert!(error.ends_with("answered 413: blob too large"), "{error}");

    let other = Digest::of(b"other");
    let wrong = FaultServer::start(move |_, request| match request.method.as_str() {
        "POST" => Reply::full(202, &["Location: /upload?state=1"], b""),
        _ => Reply::full(201, &[&format!("Docker-Content-Digest: {other}")], b""),
    })
    .await;
    let error = push(&wrong).await.unwrap_err();
    assert!(matches!(error, Error::DigestMismatch { found, .. } if found == other), "{error}");
}

/// A registry that says where an upload goes on: at `storage`.
async fn sends_on(storage: &FaultServer) -> FaultServer {
    let location = format!("Location: http://{}/upload?state=1", storage.host());
    FaultServer::start(move |_, request| match request.header("authorization") {
        "" => Reply::full(401, &["WWW-Authenticate: Basic realm=\"cave\""], b""),
        _ => Reply::full(202, &[&location], b""),
    })
    .await
}

/// A registry could make a build machine send requests to any address that it reaches.
#[tokio::test]
async fn nothing_is_sent_to_another_host_and_nothing_deleted_there_unless_it_is_named() {
    let storage = FaultServer::start(|_, _| Reply::status(201)).await;
    let server = sends_on(&storage).await;
    let directory = tempfile::tempdir().unwrap();
    let client = logged_in_client(directory.path(), server.host(), "aladdin", "open sesame");
    let content = || BlobContent::Bytes(Bytes::from_static(BLOB));
    let reference = server.reference("a");
    let error = client.push_blob(&reference, &Digest::of(BLOB), 4, content(), no_progress()).await.unwrap_err();
    let words =
        format!("it wants the upload at {0}, which is another host; --upload-host={0} allows it", storage.host());
    assert!(error.to_string().ends_with(&words), "{error}");
    let other = format!("{}/b", server.host()).parse().unwrap();
    assert!(!client.mount_blob(&other, &reference, &Digest::of(BLOB)).await.unwrap());

    let location = format!("Location: http://{}/", storage.host());
    let redirecting = FaultServer::start(move |_, _| Reply::full(307, &[&location], b"")).await;
    let error = push(&redirecting).await.unwrap_err().to_string();
    assert!(error.contains("redirects a POST to") && error.contains("--upload-host="), "{error}");
    assert_eq!(storage.requests(), [] as [String; 0]);
}

#[tokio::test]
async fn an_upload_to_a_host_that_is_named_goes_without_credentials() {
    let storage = FaultServer::start(|_, _| Reply::status(201)).await;
    let server = sends_on(&storage).await;
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("config.json");
    drop(logged_in_client(directory.path(), server.host(), "aladdin", "open sesame"));
    let upload_hosts = [storage.host().to_owned()].into();
    let client = Client::new(ClientOptions { docker_config: Some(config), upload_hosts, ..crate::options() });
    let content = BlobContent::Bytes(Bytes::from_static(BLOB));
    client.push_blob(&server.reference("a"), &Digest::of(BLOB), 4, content, no_progress()).await.unwrap();
    assert_eq!((storage.requests(), storage.headers("authorization")), (vec![put()], vec![String::new()]));
}

/// Whoever waits for a push may be interrupted; some registries keep what was sent for ever.
#[tokio::test]
async fn an_upload_that_nobody_waits_for_any_more_is_ended() {
    let server = FaultServer::start(|_, request| match request.method.as_str() {
        "POST" => Reply::full(202, &["Location: /upload?state=1"], b""),
        "PUT" => Reply::Silence,
        _ => Reply::status(204),
    })
    .await;
    let client = client();
    let content = BlobContent::Bytes(Bytes::from_static(BLOB));
    let (reference, digest) = (server.reference("a"), Digest::of(BLOB));
    let push = client.push_blob(&reference, &digest, 4, content, no_progress());
    assert!(tokio::time::timeout(Duration::from_millis(500), push).await.is_err());
    client.uploads_have_ended(Duration::from_secs(5)).await;
    assert_eq!(server.requests(), ["POST /v2/a/blobs/uploads/".to_owned(), put(), "DELETE /upload?state=1".to_owned()]);
}

const BLOB_UNKNOWN: &[u8] = br#"{"errors":[{"code":"MANIFEST_BLOB_UNKNOWN","message":"blob unknown to registry"}]}"#;

#[tokio::test]
async fn a_blob_that_a_registry_has_confirmed_and_does_not_see_fails_no_push() {
    let server = FaultServer::start(|count, _| match count {
        0 | 1 => Reply::full(400, &[], BLOB_UNKNOWN),
        _ => Reply::status(201),
    })
    .await;
    let manifest = Bytes::from_static(b"{}");
    let pushed = client().push_manifest(&server.reference("a:1"), media_type::OCI_MANIFEST, manifest.clone()).await;
    assert_eq!(pushed.unwrap(), Digest::of(&manifest));
    assert_eq!(server.requests().len(), 3);

    let missing = FaultServer::start(|_, _| Reply::full(400, &[], BLOB_UNKNOWN)).await;
    let refused = client().push_manifest(&missing.reference("a:1"), media_type::OCI_MANIFEST, manifest).await;
    assert!(refused.unwrap_err().to_string().contains("MANIFEST_BLOB_UNKNOWN"));
    assert_eq!(missing.requests().len(), 4);
}

//! Uploads to a registry that misbehaves.

use bytes::Bytes;
use format_spec::Digest;
use registry::{BlobContent, Error};

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

#[tokio::test]
async fn an_upload_elsewhere_goes_without_credentials() {
    let storage = FaultServer::start(|_, _| Reply::status(201)).await;
    let location = format!("Location: http://{}/upload?state=1", storage.host());
    let server = FaultServer::start(move |_, request| match request.header("authorization") {
        "" => Reply::full(401, &["WWW-Authenticate: Basic realm=\"cave\""], b""),
        _ => Reply::full(202, &[&location], b""),
    })
    .await;
    let directory = tempfile::tempdir().unwrap();
    let client = logged_in_client(directory.path(), server.host(), "aladdin", "open sesame");
    let content = BlobContent::Bytes(Bytes::from_static(BLOB));
    client.push_blob(&server.reference("a"), &Digest::of(BLOB), 4, content, no_progress()).await.unwrap();
    assert_eq!((storage.requests(), storage.headers("authorization")), (vec![put()], vec![String::new()]));
}

//! Everything a converter and a node do, with a real registry.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use format_spec::Digest;
use registry::{BlobContent, BlobSource, Client, ClientOptions, Error, Reference, media_type};
use storage::Source;

use crate::{
    client, collect, docker_registry::DockerRegistry, logged_in_client, no_progress, options, pattern, push, push_image,
};

#[tokio::test]
async fn a_pushed_manifest_is_found_by_tag_and_by_digest() {
    let registry = DockerRegistry::start();
    let (client, reference) = (client(), registry.reference("a/b:v1"));
    assert_eq!(client.manifest_digest(&reference).await.unwrap(), None);
    let (bytes, digest) = push_image(&client, &reference).await;
    assert_eq!(digest, Digest::of(&bytes));
    assert_eq!(client.manifest_digest(&reference).await.unwrap(), Some(digest));
    let by_digest = registry.reference(&format!("a/b@{digest}"));
    for reference in [&reference, &by_digest, &reference.with_digest(digest)] {
        let manifest = client.manifest(reference).await.unwrap();
        assert_eq!((&manifest.bytes, manifest.media_type.as_str()), (&bytes, media_type::OCI_MANIFEST));
        assert_eq!((manifest.digest, manifest.is_index()), (digest, false));
    }
}

#[tokio::test]
async fn an_index_is_pushed_by_digest() {
    let registry = DockerRegistry::start();
    let (client, reference) = (client(), registry.reference("a:v1"));
    let (image, digest) = push_image(&client, &reference).await;
    let index = Bytes::from(format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"{}","digest":"{digest}","size":{}}}]}}"#,
        media_type::OCI_MANIFEST,
        image.len()
    ));
    let by_digest = registry.reference(&format!("a@{}", Digest::of(&index)));
    client.push_manifest(&by_digest, media_type::OCI_INDEX, index.clone()).await.unwrap();
    let manifest = client.manifest(&by_digest).await.unwrap();
    assert_eq!((&manifest.bytes, manifest.is_index()), (&index, true));
}

#[tokio::test]
async fn a_missing_tag_and_a_missing_blob_are_said_in_one_line() {
    let registry = DockerRegistry::start();
    let (client, reference) = (client(), registry.reference("a:none"));
    let error = client.manifest(&reference).await.unwrap_err();
    assert!(error.is_not_found());
    let expected =
        format!("manifest of {reference}: not found at {0}: MANIFEST_UNKNOWN: manifest unknown", registry.host());
    assert_eq!(error.to_string(), expected);

    let digest = Digest::of(b"none");
    assert!(!client.has_blob(&reference, &digest, 4).await.unwrap());
    let error = client.blob_stream(&reference, &digest, None).await.err().unwrap();
    let host = registry.host();
    let expected = format!("blob {digest} of {host}/a: not found at {host}: BLOB_UNKNOWN: blob unknown to registry");
    assert_eq!(error.to_string(), expected);
}

#[tokio::test]
async fn a_pushed_blob_is_read_whole_and_by_range() {
    let registry = DockerRegistry::start();
    let (client, reference) = (client(), registry.reference("a"));
    let content = pattern(1_000_000);
    let digest = push(&client, &reference, &content).await;
    assert!(client.has_blob(&reference, &digest, 1_000_000).await.unwrap());
    let read = async |range| collect(client.blob_stream(&reference, &digest, range).await.unwrap()).await.unwrap();
    assert!(read(None).await == content);
    assert!(read(Some(0..1)).await == content[..1]);
    assert!(read(Some(5..5)).await.is_empty());
    assert!(read(Some(999_999..1_000_000)).await == content[999_999..]);

    let source = BlobSource::new(client.clone(), reference.clone(), digest, 1_000_000);
    assert!(collect(source.fetch(1234..56789).await.unwrap()).await.unwrap() == content[1234..56789]);
    let error = source.fetch(999_999..1_000_001).await.err().unwrap().to_string();
    assert_eq!(error, format!("bytes 999999..1000001 of {digest}, which has 1000000"));
    let longer = BlobSource::new(client.clone(), reference.clone(), digest, 2_000_000);
    let error = longer.fetch(0..10).await.err().unwrap().to_string();
    assert!(error.ends_with("the blob has 1000000 bytes, expected 2000000"), "{error}");
    assert!(client.blob_stream(&reference, &digest, Some(2_000_000..2_000_001)).await.is_err());
}

#[tokio::test]
async fn an_empty_blob_goes_both_ways() {
    let registry = DockerRegistry::start();
    let (client, reference) = (client(), registry.reference("a"));
    let digest = push(&client, &reference, b"").await;
    assert!(client.has_blob(&reference, &digest, 0).await.unwrap());
    let stream = client.blob_stream(&reference, &digest, None).await.unwrap();
    assert_eq!(collect(stream).await.unwrap(), b"");
}

#[tokio::test]
async fn a_file_is_pushed_with_progress() {
    let registry = DockerRegistry::start();
    let (client, reference) = (client(), registry.reference("a"));
    let directory = tempfile::tempdir().unwrap();
    let (path, content) = (directory.path().join("blob"), pattern(3_000_000));
    std::fs::write(&path, &content).unwrap();
    let digest = Digest::of(&content);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&seen);
    let progress = Arc::new(move |sent| log.lock().unwrap().push(sent));
    client.push_blob(&reference, &digest, 3_000_000, BlobContent::File(path), progress).await.unwrap();
    let seen = seen.lock().unwrap().clone();
    assert!(seen.is_sorted() && seen.len() > 3 && seen.last() == Some(&3_000_000), "{seen:?}");
    let stream = client.blob_stream(&reference, &digest, None).await.unwrap();
    assert!(collect(stream).await.unwrap() == content);
}

#[tokio::test]
async fn a_blob_is_copied_from_registry_to_registry() {
    let (from, to) = (DockerRegistry::start(), DockerRegistry::start());
    let client = client();
    let content = pattern(2_000_000);
    let digest = push(&client, &from.reference("a"), &content).await;
    let source = BlobSource::new(client.clone(), from.reference("a"), digest, 2_000_000);
    let content = BlobContent::Source(Arc::new(source));
    client.push_blob(&to.reference("b"), &digest, 2_000_000, content, no_progress()).await.unwrap();
    assert!(client.has_blob(&to.reference("b"), &digest, 2_000_000).await.unwrap());
}

#[tokio::test]
async fn content_that_is_not_what_was_announced_is_refused() {
    let registry = DockerRegistry::start();
    let (client, reference) = (client(), registry.reference("a"));
    let push = async |digest: &Digest, len, content| {
        let error = client.push_blob(&reference, digest, len, content, no_progress()).await.unwrap_err();
        assert!(!client.has_blob(&reference, digest, 4).await.unwrap());
        error.to_string()
    };
    let digest = Digest::of(b"blob");
    let bytes = |text: &'static [u8]| BlobContent::Bytes(Bytes::from_static(text));
    let prefix = format!("push of blob {digest} to {}/a: ", registry.host());
    let check = |found: String, expected: &str| {
        let rest = found.strip_prefix(&prefix).unwrap_or(&found);
        assert!(rest.starts_with(expected), "{found}");
    };
    check(push(&digest, 5, bytes(b"blob")).await, "content to upload: 4 bytes instead of 5");
    check(push(&digest, 3, bytes(b"blob")).await, "content to upload: more than 3 bytes");
    check(push(&digest, 4, bytes(b"blub")).await, &format!("{} answered 400: DIGEST_INVALID: ", registry.host()));
    let missing = BlobContent::File("/nonexistent/blob".into());
    check(push(&digest, 4, missing).await, "content to upload: /nonexistent/blob: No such file");
}

#[tokio::test]
async fn a_blob_is_mounted_where_the_registry_has_it() {
    let registry = DockerRegistry::start();
    let (client, from, to) = (client(), registry.reference("from"), registry.reference("to"));
    let digest = push(&client, &from, b"blob").await;
    assert!(client.mount_blob(&from, &to, &digest).await.unwrap());
    assert!(client.has_blob(&to, &digest, 4).await.unwrap());
    assert!(!client.mount_blob(&from, &to, &Digest::of(b"other")).await.unwrap());
    let elsewhere: Reference = "r.example/from".parse().unwrap();
    assert!(!client.mount_blob(&elsewhere, &to, &digest).await.unwrap());
}

#[tokio::test]
async fn basic_authentication_uses_the_credentials_of_docker_login() {
    let registry = DockerRegistry::start_with_password();
    let reference = registry.reference("a:v1");
    let directory = tempfile::tempdir().unwrap();
    let client = logged_in_client(directory.path(), registry.host(), "aladdin", "open sesame");
    let (bytes, _) = push_image(&client, &reference).await;
    assert_eq!(client.manifest(&reference).await.unwrap().bytes, bytes);

    let directory = tempfile::tempdir().unwrap();
    let wrong = logged_in_client(directory.path(), registry.host(), "aladdin", "open barley");
    let host = registry.host();
    let login =
        format!("check the name, and the login for {host} in {}", directory.path().join("config.json").display());
    let hints = [format!("check the name and `docker login {host}`"), format!("{login} (`docker login {host}`)")];
    for (client, hint) in [crate::client(), wrong].into_iter().zip(hints) {
        let error = client.manifest(&reference).await.unwrap_err();
        assert!(error.is_denied(), "{error}");
        let expected = format!(
            "manifest of {reference}: no permission: {host} answered 401: UNAUTHORIZED: authentication required; {hint}"
        );
        assert_eq!(error.to_string(), expected);
    }
}

#[tokio::test]
async fn a_registry_that_restarts_within_patience_is_waited_for() {
    let mut registry = DockerRegistry::start();
    let (client, reference) = (client(), registry.reference("a"));
    let digest = push(&client, &reference, b"blob").await;
    registry.stop();
    let restart = tokio::task::spawn_blocking(move || {
        registry.restart();
        registry
    });
    assert!(client.has_blob(&reference, &digest, 4).await.unwrap());
    drop(restart.await);
}

#[tokio::test]
async fn a_registry_that_stays_away_is_given_up_after_patience() {
    let mut registry = DockerRegistry::start();
    let reference = registry.reference("a");
    let client = Client::new(ClientOptions { patience: Duration::from_millis(100), ..options() });
    let digest = push(&client, &reference, b"blob").await;
    registry.stop();
    let error = client.has_blob(&reference, &digest, 4).await.unwrap_err();
    let is_refused = |error: &Error| matches!(error, Error::Connect { .. });
    assert!(matches!(&error, Error::GaveUp { last, attempts: 3.., .. } if is_refused(last)), "{error}");
}

#[tokio::test]
async fn every_operation_can_move_between_threads() {
    fn check<T: Send>(future: T) {
        drop(future);
    }
    let (client, reference, digest) = (client(), "localhost/a".parse::<Reference>().unwrap(), Digest::of(b""));
    check(client.manifest(&reference));
    check(client.manifest_digest(&reference));
    check(client.push_manifest(&reference, media_type::OCI_MANIFEST, Bytes::new()));
    check(client.has_blob(&reference, &digest, 4));
    check(client.blob_stream(&reference, &digest, None));
    check(client.push_blob(&reference, &digest, 0, BlobContent::Bytes(Bytes::new()), no_progress()));
    check(client.mount_blob(&reference, &reference, &digest));
}

//! Blobs that go up while they are being written.

use std::{
    io::Write as _,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use format_spec::Digest;
use registry::{Client, ClientOptions, Error, GrowingFile, Growth};
use tokio::sync::watch;

use crate::{client, collect, docker_registry::DockerRegistry, no_progress, options, pattern};

/// A file and how to say that it has grown.
fn growing() -> (std::fs::File, watch::Sender<Growth>, GrowingFile) {
    let file = tempfile::tempfile().unwrap();
    let growth = watch::Sender::default();
    let growing = GrowingFile { file: Arc::new(file.try_clone().unwrap()), growth: growth.subscribe() };
    (file, growth, growing)
}

#[tokio::test]
async fn a_file_arrives_while_it_is_written() {
    let registry = DockerRegistry::start();
    let (mut file, growth, growing) = growing();
    let content = pattern(1_000_000);
    let sent = Arc::new(AtomicU64::new(0));
    let (counter, reference) = (Arc::clone(&sent), registry.reference("a"));
    let progress = Arc::new(move |len| counter.store(len, Ordering::SeqCst));
    let upload = tokio::spawn(async move { client().send_growing_blob(&reference, growing, progress).await });
    for end in [300_000, 300_001, 1_000_000] {
        let start = usize::try_from(sent.load(Ordering::SeqCst)).unwrap();
        file.write_all(&content[start..end]).unwrap();
        growth.send_replace(Growth { len: end as u64, is_complete: false });
        while sent.load(Ordering::SeqCst) < end as u64 {
            assert!(!upload.is_finished());
            tokio::task::yield_now().await;
        }
    }
    assert_eq!(registry.open_uploads("a"), 1);
    growth.send_replace(Growth { len: 1_000_000, is_complete: true });
    let uncommitted = upload.await.unwrap().unwrap().unwrap();
    let (digest, reference) = (Digest::of(&content), registry.reference("a"));
    assert!(!client().has_stored_blob(&reference, &digest, 0).await.unwrap());
    uncommitted.commit(&digest).await.unwrap();
    let stream = client().blob_stream(&reference, &digest, None).await.unwrap();
    assert!(collect(stream).await.unwrap() == content);
}

#[tokio::test]
async fn what_is_given_up_leaves_nothing() {
    let registry = DockerRegistry::start();
    let (mut file, growth, growing) = growing();
    file.write_all(b"half").unwrap();
    growth.send_replace(Growth { len: 4, is_complete: false });
    drop(growth);
    let error = client().send_growing_blob(&registry.reference("a"), growing, no_progress()).await.unwrap_err();
    assert!(matches!(&error, Error::Content { reason, .. } if reason == "its writer has given up"), "{error}");
    assert_eq!(registry.open_uploads("a"), 0);
}

#[tokio::test]
async fn another_digest_is_not_kept() {
    let registry = DockerRegistry::start();
    let (mut file, growth, growing) = growing();
    file.write_all(b"blob").unwrap();
    growth.send_replace(Growth { len: 4, is_complete: true });
    let reference = registry.reference("a");
    let uncommitted = client().send_growing_blob(&reference, growing, no_progress()).await.unwrap().unwrap();
    uncommitted.commit(&Digest::of(b"other")).await.unwrap_err();
    for content in [&b"blob"[..], b"other"] {
        assert!(!client().has_stored_blob(&reference, &Digest::of(content), 0).await.unwrap());
    }
    assert_eq!(registry.open_uploads("a"), 0);
}

#[tokio::test]
async fn who_asks_for_chunks_gets_no_long_requests() {
    let registry = DockerRegistry::start();
    let (_file, _growth, growing) = growing();
    let client = Client::new(ClientOptions { upload_chunk_len: Some(1000), ..options() });
    let sent = client.send_growing_blob(&registry.reference("a"), growing, no_progress()).await.unwrap();
    assert!(sent.is_none());
}

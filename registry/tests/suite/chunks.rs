//! Uploads in chunks: on demand, and where a registry or a proxy refuses whole blobs.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
};

use bytes::Bytes;
use format_spec::Digest;
use registry::{BlobContent, BlobSource, Client, ClientOptions, Error};

use crate::{
    client, collect,
    docker_registry::DockerRegistry,
    fault_server::{FaultServer, Received, Reply},
    no_progress, options, pattern, push,
};

const KIB: u64 = 1 << 10;

fn chunking_client(chunk_len: u64) -> Client {
    Client::new(ClientOptions { upload_chunk_len: Some(chunk_len), ..options() })
}

#[tokio::test]
async fn every_kind_of_content_goes_up_in_chunks() {
    let registry = DockerRegistry::start();
    let (client, content) = (chunking_client(300_000), pattern(1_000_000));
    let digest = push(&client, &registry.reference("bytes"), &content).await;
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("blob"), &content).unwrap();
    let source = BlobSource::new(client.clone(), registry.reference("bytes"), digest, 1_000_000);
    let contents =
        [("file", BlobContent::File(directory.path().join("blob"))), ("source", BlobContent::Source(Arc::new(source)))];
    for (name, content) in contents {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&seen);
        let progress = Arc::new(move |sent| log.lock().unwrap().push(sent));
        client.push_blob(&registry.reference(name), &digest, 1_000_000, content, progress).await.unwrap();
        let seen = seen.lock().unwrap().clone();
        assert!(seen.is_sorted() && seen.last() == Some(&1_000_000), "{seen:?}");
    }
    for name in ["bytes", "file", "source"] {
        let stream = client.blob_stream(&registry.reference(name), &digest, None).await.unwrap();
        assert!(collect(stream).await.unwrap() == content, "{name}");
    }
    let digest = push(&client, &registry.reference("empty"), b"").await;
    assert!(client.has_stored_blob(&registry.reference("empty"), &digest, 0).await.unwrap());
}

#[tokio::test]
async fn content_that_is_too_short_is_refused() {
    let registry = DockerRegistry::start();
    let content = BlobContent::Bytes(Bytes::from_static(b"blob"));
    let (reference, digest) = (registry.reference("a"), Digest::of(b"blob"));
    let error = chunking_client(3).push_blob(&reference, &digest, 5, content, no_progress()).await.unwrap_err();
    assert!(matches!(&error, Error::Content { reason, .. } if reason == "4 bytes instead of 5"), "{error}");
}

/// A registry that assembles uploads, behind a proxy: `refuse` may answer in its place.
struct Assembler {
    server: FaultServer,
    stored: Arc<Mutex<Vec<u8>>>,
}

impl Assembler {
    async fn start(refuse: impl Fn(usize, &Received, &mut Vec<u8>) -> Option<Reply> + Send + Sync + 'static) -> Self {
        let stored = Arc::<Mutex<Vec<u8>>>::default();
        let bytes = Arc::clone(&stored);
        let server = FaultServer::start(move |count, request| {
            let mut bytes = bytes.lock().unwrap();
            if let Some(refusal) = refuse(count, request, &mut bytes) {
                return refusal;
            }
            let place = |bytes: &[u8]| {
                [format!("Location: /upload?at={}", bytes.len()), format!("Range: 0-{}", bytes.len().saturating_sub(1))]
            };
            let reply = |status, headers: [String; 2]| Reply::full(status, &[&headers[0], &headers[1]], b"");
            match request.method.as_str() {
                "POST" => {
                    bytes.clear();
                    reply(202, place(&bytes))
                }
                "PATCH" if !request.header("content-range").starts_with(&format!("{}-", bytes.len())) => {
                    reply(416, place(&bytes))
                }
                "PATCH" => {
                    bytes.extend_from_slice(&request.body);
                    reply(202, place(&bytes))
                }
                "GET" => reply(204, place(&bytes)),
                "PUT" => {
                    bytes.extend_from_slice(&request.body);
                    Reply::status(201)
                }
                _ => Reply::status(404),
            }
        })
        .await;
        Self { server, stored }
    }

    /// Lengths of the bodies that were sent, with their methods.
    fn bodies(&self) -> Vec<(String, u64)> {
        let received = self.server.received();
        received.into_iter().filter(|r| !r.body.is_empty()).map(|r| (r.method, r.body.len() as u64)).collect()
    }
}

#[tokio::test]
async fn a_limit_on_request_bodies_is_found_and_remembered() {
    let assembler = Assembler::start(|_, request, _| {
        (request.body.len() as u64 > 1024 * KIB).then(|| Reply::full(413, &[], b"<html>too large</html>"))
    })
    .await;
    let (client, content) = (client(), pattern(2_500_000));
    push(&client, &assembler.server.reference("a"), &content).await;
    assert!(*assembler.stored.lock().unwrap() == content);
    let body = |method: &str, len| (method.to_owned(), len);
    let chunks = [body("PATCH", 1024 * KIB), body("PATCH", 1024 * KIB), body("PATCH", 2_500_000 - 2048 * KIB)];
    assert_eq!(assembler.bodies(), [&[body("PUT", 2_500_000)], &chunks[..]].concat());

    push(&client, &assembler.server.reference("a"), &content).await;
    assert_eq!(assembler.bodies()[4..], chunks);
}

#[tokio::test]
async fn a_chunk_that_broke_off_goes_on_where_the_registry_is() {
    let assembler = Assembler::start(|count, request, bytes| {
        (count == 2).then(|| {
            // Half of it has arrived, the answer gets lost.
            bytes.extend_from_slice(&request.body[..100_000]);
            Reply::Raw(Vec::new())
        })
    })
    .await;
    let content = pattern(700_000);
    push(&chunking_client(300_000), &assembler.server.reference("a"), &content).await;
    assert!(*assembler.stored.lock().unwrap() == content);
    let ranges: Vec<String> =
        assembler.server.headers("content-range").into_iter().filter(|range| !range.is_empty()).collect();
    // A smaller chunk after the broken one: less to lose.
    assert_eq!(ranges, ["0-299999", "300000-599999", "400000-662143", "662144-699999"]);
}

#[tokio::test]
async fn a_chunk_out_of_place_is_sent_from_where_the_registry_is() {
    let assembler = Assembler::start(|count, _, bytes| {
        if count == 2 {
            bytes.truncate(50);
        }
        None
    })
    .await;
    let content = pattern(250);
    push(&chunking_client(100), &assembler.server.reference("a"), &content).await;
    assert!(*assembler.stored.lock().unwrap() == content);
}

#[tokio::test]
async fn an_upload_that_the_registry_forgot_begins_again() {
    let has_lost = AtomicBool::new(false);
    let assembler = Assembler::start(move |count, request, _| match (count, request.method.as_str()) {
        (2, _) => Some(Reply::status(500)),
        (_, "GET") if !has_lost.swap(true, Ordering::Relaxed) => Some(Reply::status(404)),
        _ => None,
    })
    .await;
    let content = pattern(250);
    push(&chunking_client(100), &assembler.server.reference("a"), &content).await;
    assert!(*assembler.stored.lock().unwrap() == content);
    let begun = assembler.server.requests().iter().filter(|request| request.starts_with("POST")).count();
    assert_eq!(begun, 2);
}

#[tokio::test]
async fn a_shortest_chunk_is_respected() {
    let assembler = Assembler::start(|_, request, _| {
        (request.method == "POST")
            .then(|| Reply::full(202, &["Location: /upload?at=0", "OCI-Chunk-Min-Length: 200"], b""))
    })
    .await;
    push(&chunking_client(100), &assembler.server.reference("a"), &pattern(250)).await;
    assert_eq!(assembler.bodies(), [("PATCH".to_owned(), 200), ("PATCH".to_owned(), 50)]);
}

#[tokio::test]
async fn a_registry_that_takes_nothing_is_not_asked_for_ever() {
    let stuck = FaultServer::start(|_, _| Reply::full(202, &["Location: /upload", "Range: 0-49"], b"")).await;
    let content = BlobContent::Bytes(Bytes::from(pattern(250)));
    let digest = Digest::of(&pattern(250));
    let (client, reference) = (chunking_client(100), stuck.reference("a"));
    let pushed = client.push_blob(&reference, &digest, 250, content, no_progress()).await;
    let error = pushed.unwrap_err().to_string();
    assert!(error.ends_with("it has taken nothing of bytes 50..150"), "{error}");
    assert!(stuck.requests().len() < 10);
}

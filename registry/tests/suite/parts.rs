//! Answers to ranges that hold something else than was asked for, and failures of every kind.

use std::time::Duration;

use format_spec::Digest;
use registry::{BlobSource, Client, ClientOptions};
use storage::{Source, SourceErrorKind};

use crate::{
    certificates::Certificates,
    client, client_with_hosts, collect,
    docker_registry::DockerRegistry,
    fault_server::{FaultServer, Received, Reply},
    faults::honest,
    hosts_dir, options, pattern,
};

const LEN: u32 = 20_000;

fn source(client: Client, server: &FaultServer) -> BlobSource {
    BlobSource::new(client, server.reference("a"), Digest::of(&pattern(LEN)), u64::from(LEN))
}

/// First and last byte that a request asks for.
fn asked(request: &Received) -> (usize, usize) {
    let (first, last) = request.header("range")["bytes=".len()..].split_once('-').unwrap();
    (first.parse().unwrap(), last.parse().unwrap())
}

fn part(first: usize, last: usize) -> Reply {
    Reply::full(206, &[&format!("Content-Range: bytes {first}-{last}/{LEN}")], &pattern(LEN)[first..=last])
}

#[tokio::test]
async fn a_part_that_ends_early_is_used_and_the_rest_is_asked_for() {
    let server = FaultServer::start(|_, request| {
        let (first, last) = asked(request);
        part(first, last.min(first + 4999))
    })
    .await;
    // As many answers as it takes are progress, however little patience there is.
    let client = Client::new(ClientOptions { patience: Duration::ZERO, ..options() });
    let bytes = collect(source(client, &server).fetch(1000..14_000).await.unwrap()).await.unwrap();
    assert_eq!(bytes, pattern(LEN)[1000..14_000]);
    assert_eq!(server.headers("range"), ["bytes=1000-13999", "bytes=6000-13999", "bytes=11000-13999"]);
}

#[tokio::test]
async fn a_part_that_begins_earlier_is_used_from_the_byte_asked_for() {
    let server = FaultServer::start(|_, request| {
        let (first, last) = asked(request);
        part(first - first % 4096, last)
    })
    .await;
    let bytes = collect(source(client(), &server).fetch(5000..14_000).await.unwrap()).await.unwrap();
    assert_eq!(bytes, pattern(LEN)[5000..14_000]);
    assert_eq!(server.requests().len(), 1);
}

#[tokio::test]
async fn a_part_that_is_all_of_the_blob_is_used() {
    let server = FaultServer::start(|_, _| part(0, 19_999)).await;
    let bytes = collect(source(client(), &server).fetch(5000..14_000).await.unwrap()).await.unwrap();
    assert_eq!(bytes, pattern(LEN)[5000..14_000]);
}

#[tokio::test]
async fn a_part_that_does_not_say_which_is_asked_for_without_a_range() {
    for wrong in ["X-Nothing: 1", "Content-Range: bytes */20000"] {
        let server = FaultServer::start(move |_, request| match request.header("range") {
            "" => Reply::full(200, &[], &pattern(LEN)),
            _ => Reply::full(206, &[wrong], &pattern(100)),
        })
        .await;
        let bytes = collect(source(client(), &server).fetch(5000..14_000).await.unwrap()).await.unwrap();
        assert_eq!(bytes, pattern(LEN)[5000..14_000], "{wrong}");
        assert_eq!(server.headers("range"), ["bytes=5000-13999", ""], "{wrong}");
    }
}

#[tokio::test]
async fn a_part_without_the_byte_asked_for_is_an_error() {
    let check = async |headers: &'static [&'static str], body_len: u32, expected: &str, request_count: usize| {
        let server = FaultServer::start(move |_, _| Reply::full(206, headers, &pattern(body_len))).await;
        let error = source(client(), &server).fetch(200..300).await.err().unwrap();
        assert_eq!(error.kind, SourceErrorKind::Unusable);
        assert!(error.to_string().ends_with(expected), "{error}");
        assert_eq!(server.requests().len(), request_count, "{expected}");
    };
    check(&[], 100, "Content-Range \"\"", 2).await;
    check(&["Content-Range: bytes 201-300/20000"], 100, "bytes 201..301 where byte 200 was asked for", 1).await;
    check(&["Content-Range: bytes 200-299/20001"], 100, "the blob has 20001 bytes, expected 20000", 1).await;
    check(&["Content-Range: bytes 200-299/20000"], 99, "99 bytes for 200..300", 1).await;
}

/// A name, what the answer means for another try, and the answer.
type Failure = (&'static str, SourceErrorKind, fn() -> Reply);

/// Every answer that is none.
fn failures() -> Vec<Failure> {
    use SourceErrorKind::{Passing, Refused, Unusable};
    vec![
        ("401", Refused, || Reply::status(401)),
        ("403", Refused, || Reply::status(403)),
        ("404", Refused, || Reply::status(404)),
        ("400", Unusable, || Reply::status(400)),
        ("416", Unusable, || Reply::full(416, &["Content-Range: bytes */20000"], b"")),
        ("a page", Unusable, || Reply::full(200, &["Content-Type: text/html; charset=utf-8"], b"<html>Log in")),
        ("a page of unknown length", Unusable, || {
            Reply::Raw(b"HTTP/1.1 200 x\r\nConnection: close\r\nContent-Type: text/html\r\n\r\n<html>".to_vec())
        }),
        ("another blob's length", Unusable, || Reply::full(200, &[], b"short")),
        ("another range", Unusable, || Reply::full(206, &["Content-Range: bytes 0-9/20000"], &pattern(10))),
        ("429", Passing, || Reply::full(429, &["Retry-After: 90"], b"")),
        ("503", Passing, || Reply::full(503, &["Retry-After: 120"], b"")),
        ("no HTTP", Passing, || Reply::Raw(b"HELLO\r\n\r\n".to_vec())),
    ]
}

#[tokio::test]
async fn every_failure_says_what_another_try_is_good_for() {
    for (name, kind, reply) in failures() {
        let server = FaultServer::start(move |_, _| reply()).await;
        let client = Client::new(ClientOptions {
            patience: Duration::from_millis(20),
            first_contact_patience: Duration::from_millis(20),
            ..options()
        });
        let error = source(client, &server).fetch(5000..14_000).await.err().unwrap();
        assert_eq!(error.kind, kind, "{name}: {error}");
        let asked = match name {
            "429" => Some(Duration::from_secs(90)),
            "503" => Some(Duration::from_secs(120)),
            _ => None,
        };
        assert_eq!(error.retry_after, asked, "{name}");
    }
    let registry = DockerRegistry::start_with_tls(&Certificates::new(), false);
    let hosts = hosts_dir(&[(registry.host(), "ca = \"ca.pem\"")]);
    let others = Certificates::new();
    std::fs::copy(others.path().join("ca.pem"), hosts.path().join(registry.host()).join("ca.pem")).unwrap();
    let source = BlobSource::new(client_with_hosts(&hosts), registry.reference("a"), Digest::of(b""), 10);
    assert_eq!(source.fetch(0..10).await.err().unwrap().kind, SourceErrorKind::Passing);
}

#[tokio::test]
async fn every_failure_of_a_mirror_sends_a_read_to_the_next_host() {
    for (name, _, reply) in failures() {
        let mirror = FaultServer::start(move |_, _| reply()).await;
        let origin = FaultServer::start(|_, request| {
            let (status, headers, body) = honest(&pattern(LEN), request);
            Reply::full(status, &headers.iter().map(String::as_str).collect::<Vec<_>>(), &body)
        })
        .await;
        let text = format!("server = \"http://{}\"\n[host.\"http://{}\"]\n", origin.host(), mirror.host());
        let hosts = hosts_dir(&[("r.example", &text)]);
        let reference = "r.example/a".parse().unwrap();
        let source = BlobSource::new(client_with_hosts(&hosts), reference, Digest::of(&pattern(LEN)), u64::from(LEN));
        let bytes = collect(source.fetch(5000..14_000).await.unwrap()).await.unwrap();
        assert_eq!(bytes, pattern(LEN)[5000..14_000], "{name}");
        assert_eq!((mirror.requests().len(), origin.requests().len()), (1, 1), "{name}");
        // An answer that does not fit this blob says nothing of others: an image may lie about its blobs.
        collect(source.fetch(0..10).await.unwrap()).await.unwrap();
        let rests = ["429", "503", "no HTTP"].contains(&name);
        assert_eq!(mirror.requests().len(), 1 + usize::from(!rests), "{name}");
    }
}

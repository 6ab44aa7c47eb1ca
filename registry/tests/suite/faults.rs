//! Downloads and manifests from a registry that misbehaves.

use std::time::{Duration, Instant};

use format_spec::Digest;
use registry::{BlobSource, Client, ClientOptions, Error, MANIFEST_LEN_MAX, media_type};
use storage::Source;
use tokio::io::AsyncWriteExt;

use crate::{
    client, collect,
    fault_server::{FaultServer, Received, Reply},
    options, pattern,
};

const LEN: u32 = 1000;

/// What an honest registry answers to a request for (a range of) `content`.
pub(crate) fn honest(content: &[u8], request: &Received) -> (u16, Vec<String>, Vec<u8>) {
    let Some(range) = request.header("range").strip_prefix("bytes=") else {
        return (200, Vec::new(), content.to_vec());
    };
    let (first, last) = range.split_once('-').unwrap();
    let first: usize = first.parse().unwrap();
    let end = last.parse::<usize>().map_or(content.len(), |last| last + 1);
    let head = format!("Content-Range: bytes {first}-{}/{}", end - 1, content.len());
    (206, vec![head], content[first..end].to_vec())
}

/// Serves a pattern; each of the first `cuts` answers ends after 100 bytes.
async fn cutting_server(cuts: usize) -> FaultServer {
    FaultServer::start(move |count, request| {
        let (status, headers, body) = honest(&pattern(LEN), request);
        let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
        match count < cuts {
            true => Reply::cut(status, &headers, &body, 100.min(body.len())),
            false => Reply::full(status, &headers, &body),
        }
    })
    .await
}

fn source(server: &FaultServer) -> BlobSource {
    BlobSource::new(client(), server.reference("a"), Digest::of(&pattern(LEN)), u64::from(LEN))
}

#[tokio::test]
async fn a_range_goes_on_where_the_connection_was_cut() {
    let server = cutting_server(3).await;
    let bytes = collect(source(&server).fetch(200..900).await.unwrap()).await.unwrap();
    assert_eq!(bytes, pattern(LEN)[200..900]);
    assert_eq!(server.headers("range"), ["bytes=200-899", "bytes=300-899", "bytes=400-899", "bytes=500-899"]);
}

#[tokio::test]
async fn a_whole_blob_goes_on_where_the_connection_was_cut() {
    let server = cutting_server(2).await;
    let stream = client().blob_stream(&server.reference("a"), &Digest::of(b""), None).await.unwrap();
    assert_eq!(collect(stream).await.unwrap(), pattern(LEN));
    assert_eq!(server.headers("range"), ["", "bytes=100-999", "bytes=200-999"]);
}

#[tokio::test]
async fn a_connection_that_never_holds_is_given_up() {
    let server = FaultServer::start(|_, request| {
        let (status, headers, body) = honest(&pattern(LEN), request);
        Reply::cut(status, &headers.iter().map(String::as_str).collect::<Vec<_>>(), &body, 0)
    })
    .await;
    let client = Client::new(ClientOptions { patience: Duration::from_millis(100), ..options() });
    let error = client.blob_stream(&server.reference("a"), &Digest::of(b""), None).await.err().unwrap().to_string();
    assert!(error.contains("broke: ") && error.contains("gave up after"), "{error}");
}

#[tokio::test]
async fn a_whole_blob_in_place_of_a_range_is_cut_to_size() {
    let server = FaultServer::start(|count, _| match count {
        0 => Reply::cut(200, &[], &pattern(LEN), 500),
        _ => Reply::full(200, &[], &pattern(LEN)),
    })
    .await;
    let bytes = collect(source(&server).fetch(300..700).await.unwrap()).await.unwrap();
    assert_eq!(bytes, pattern(LEN)[300..700]);
    assert_eq!(server.headers("range"), ["bytes=300-699", "bytes=500-699"]);
}

#[tokio::test]
async fn more_bytes_than_the_range_are_not_passed_on() {
    let server = FaultServer::start(|_, _| {
        let head = "HTTP/1.1 206 x\r\nConnection: close\r\nContent-Range: bytes 200-299/1000\r\n\r\n";
        Reply::Raw([head.as_bytes(), &pattern(5000)].concat())
    })
    .await;
    let bytes = collect(source(&server).fetch(200..300).await.unwrap()).await.unwrap();
    assert_eq!(bytes, pattern(100));
}

#[tokio::test]
async fn busy_answers_are_repeated_and_final_ones_are_not() {
    let busy = FaultServer::start(|count, _| match count {
        0 => Reply::full(429, &["Retry-After: 0"], b""),
        1 => Reply::status(503),
        2 => Reply::status(500),
        _ => Reply::full(200, &["Content-Type: application/json"], br#"{"layers":[]}"#),
    })
    .await;
    client().manifest(&busy.reference("a")).await.unwrap();
    assert_eq!(busy.requests().len(), 4);
    for status in [400, 403, 404, 405] {
        let server = FaultServer::start(move |_, _| Reply::status(status)).await;
        client().manifest(&server.reference("a")).await.unwrap_err();
        assert_eq!(server.requests().len(), 1, "{status}");
    }
}

#[tokio::test]
async fn a_wait_beyond_patience_is_not_begun() {
    let server = FaultServer::start(|_, _| {
        Reply::full(429, &["Retry-After: 3600"], b"{\"errors\":[{\"code\":\"TOOMANYREQUESTS\"}]}")
    })
    .await;
    let error = client().manifest(&server.reference("a")).await.unwrap_err().to_string();
    let expected = format!(
        "manifest of {0}/a:latest: {0} answered 429: TOOMANYREQUESTS (to be repeated after 3600 s)",
        server.host()
    );
    assert_eq!(error, expected);
    assert_eq!(server.requests().len(), 1);
}

#[tokio::test]
async fn silence_is_not_waited_for() {
    let server = FaultServer::start(|_, _| Reply::Silence).await;
    let limits = ClientOptions { stall_timeout: Duration::from_millis(50), ..options() };
    let error = Client::new(limits).manifest(&server.reference("a")).await.unwrap_err();
    assert!(matches!(&error, Error::GaveUp { last, .. } if matches!(**last, Error::Stalled { .. })), "{error}");
}

#[tokio::test]
async fn a_manifest_that_is_not_what_was_asked_for_is_refused() {
    let text = br#"{"layers":[]}"#;
    let server = FaultServer::start(|_, _| Reply::full(200, &[], text)).await;
    let (asked, found) = (Digest::of(b"another"), Digest::of(text));
    let reference = server.reference("a").with_digest(asked);
    let error = client().manifest(&reference).await.unwrap_err().to_string();
    assert_eq!(error, format!("manifest of {reference}: {} delivered {found}, expected {asked}", server.host()));
    assert_eq!(server.requests().len(), 1);

    let announced = format!("Docker-Content-Digest: {asked}");
    let server = FaultServer::start(move |_, _| Reply::full(200, &[&announced], text)).await;
    let error = client().manifest(&server.reference("a")).await.unwrap_err();
    assert!(matches!(error, Error::DigestMismatch { expected, .. } if expected == asked), "{error}");
}

#[tokio::test]
async fn a_manifest_without_end_is_refused_early() {
    let announced =
        FaultServer::start(|_, _| Reply::Raw(b"HTTP/1.1 200 x\r\nContent-Length: 1000000000000\r\n\r\n".to_vec()))
            .await;
    let streamed = FaultServer::start(|_, _| {
        let head = "HTTP/1.1 200 x\r\nConnection: close\r\n\r\n";
        Reply::Raw([head.as_bytes(), &vec![b' '; 5 << 20]].concat())
    })
    .await;
    for server in [announced, streamed] {
        let error = client().manifest(&server.reference("a")).await.unwrap_err();
        assert!(matches!(error, Error::TooLong { limit_bytes: MANIFEST_LEN_MAX, .. }), "{error}");
    }
}

#[tokio::test]
async fn a_web_page_is_no_manifest() {
    let server =
        FaultServer::start(|_, _| Reply::full(200, &["Content-Type: text/html"], b"<html>\x1b[2JLogin</html>")).await;
    let error = client().manifest(&server.reference("a")).await.unwrap_err().to_string();
    assert!(error.ends_with("an HTML page instead of a manifest, so perhaps no registry"), "{error}");
}

#[tokio::test]
async fn the_registrys_own_words_are_cleaned() {
    let body = br#"{"errors":[{"code":"DENIED","message":"\u001b[31mpull\naccess\u0007 denied"}]}"#;
    let server = FaultServer::start(|_, _| Reply::full(403, &[], body)).await;
    let error = client().manifest(&server.reference("a")).await.unwrap_err().to_string();
    assert!(error.contains("answered 403: DENIED: [31mpull access denied; check"), "{error}");
}

#[tokio::test]
async fn a_digest_that_is_not_announced_is_computed() {
    let text = br#"{"layers":[]}"#;
    let server = FaultServer::start(|_, _| Reply::full(200, &["Content-Type: application/json"], text)).await;
    assert_eq!(client().manifest_digest(&server.reference("a")).await.unwrap(), Some(Digest::of(text)));
    assert_eq!(server.requests(), ["HEAD /v2/a/manifests/latest", "GET /v2/a/manifests/latest"]);
    assert!(server.headers("accept").iter().all(|accept| accept.contains(media_type::DOCKER_LIST)));
}

#[tokio::test]
async fn redirects_are_followed_but_not_for_ever() {
    let storage = FaultServer::start(|_, request| {
        let (status, headers, body) = honest(&pattern(LEN), request);
        Reply::full(status, &headers.iter().map(String::as_str).collect::<Vec<_>>(), &body)
    })
    .await;
    let location = format!("Location: http://{}/bucket/key?signature=1", storage.host());
    let server = FaultServer::start(move |_, _| Reply::full(307, &[&location], b"")).await;
    assert_eq!(collect(source(&server).fetch(10..20).await.unwrap()).await.unwrap(), pattern(LEN)[10..20]);
    assert_eq!(storage.headers("range"), ["bytes=10-19"]);

    let circle = FaultServer::start(|_, _| Reply::full(307, &["Location: /v2/a/blobs/again"], b"")).await;
    let error = source(&circle).fetch(10..20).await.err().unwrap().to_string();
    assert!(error.ends_with("redirects without end"), "{error}");
}

#[tokio::test]
async fn a_resumed_range_asks_the_registry_and_not_the_expired_address() {
    let storage = FaultServer::start(|count, request| {
        let (status, headers, body) = honest(&pattern(LEN), request);
        let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
        match (count, request.target.as_str()) {
            (0, "/0") => Reply::cut(status, &headers, &body, 100),
            (1, "/1") => Reply::full(status, &headers, &body),
            _ => Reply::status(403),
        }
    })
    .await;
    let host = storage.host().to_owned();
    let server =
        FaultServer::start(move |count, _| Reply::full(307, &[&format!("Location: http://{host}/{count}")], b"")).await;
    assert_eq!(collect(source(&server).fetch(0..1000).await.unwrap()).await.unwrap(), pattern(LEN));
}

#[tokio::test]
async fn a_host_that_does_not_answer_is_named_soon() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap();
    drop(listener);
    let (client, started) = (client(), Instant::now());
    let error = client.manifest(&format!("{host}/a").parse().unwrap()).await.unwrap_err().to_string();
    let expected = format!("manifest of {host}/a:latest: cannot connect to {host}: Connection refused");
    assert!(error.starts_with(&expected), "{error}");
    assert!(started.elapsed() < options().patience);
}

#[tokio::test]
async fn an_unknown_host_is_said_to_be_unknown() {
    let client = Client::new(ClientOptions { first_contact_patience: Duration::ZERO, ..options() });
    let error = client.manifest(&"registry.invalid/a".parse().unwrap()).await.unwrap_err().to_string();
    let expected = "manifest of registry.invalid/a:latest: registry host registry.invalid is not known: ";
    assert!(error.starts_with(expected), "{error}");
}

#[tokio::test]
async fn a_server_without_tls_suggests_plain_http() {
    let plain = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let plain_host = plain.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut connection, _) = plain.accept().await.unwrap();
        connection.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
    });
    let location = format!("Location: https://{plain_host}/x");
    let server = FaultServer::start(move |_, _| Reply::full(307, &[&location], b"")).await;
    let error = client().manifest(&server.reference("a")).await.unwrap_err();
    let expected = format!("TLS with {plain_host} (for {}) failed: it does not speak TLS; ", server.host());
    assert!(matches!(error, Error::Tls { .. }) && error.to_string().contains(&expected), "{error}");
    assert!(error.to_string().ends_with("use --plain-http if it has no TLS"), "{error}");
}

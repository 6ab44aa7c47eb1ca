//! Hosts that answer late, slowly, or not to the end.

use std::time::{Duration, Instant};

use format_spec::Digest;
use registry::{BlobSource, Client, ClientOptions};
use storage::Source;
use tempfile::TempDir;

use crate::{
    collect,
    fault_server::{FaultServer, Received, Reply},
    faults::honest,
    hosts_dir, options, pattern,
};

const LEN: u32 = 400_000;
/// Far more than anything here takes, and what it would take without another host.
const LONG: Duration = Duration::from_secs(120);

/// An honest answer to a request, made into a reply.
fn answer(request: &Received, make: impl Fn(u16, &[&str], &[u8]) -> Reply) -> Reply {
    let (status, headers, body) = honest(&pattern(LEN), request);
    make(status, &headers.iter().map(String::as_str).collect::<Vec<_>>(), &body)
}

async fn honest_server() -> FaultServer {
    FaultServer::start(|_, request| answer(request, Reply::full)).await
}

/// A blob of a registry that has this mirror, and whose client has the patience of a person.
fn source(mirror: &FaultServer, origin: &FaultServer) -> (BlobSource, TempDir) {
    let text = format!("server = \"http://{}\"\n[host.\"http://{}\"]\n", origin.host(), mirror.host());
    let hosts = hosts_dir(&[("r.example", &text)]);
    let client = Client::new(ClientOptions {
        hosts_dir: Some(hosts.path().to_owned()),
        stall_timeout: LONG,
        patience: LONG,
        slow_timeout: Duration::from_millis(300),
        hedge_delay: Duration::from_millis(300),
        ..options()
    });
    let reference = "r.example/a".parse().unwrap();
    (BlobSource::new(client, reference, Digest::of(&pattern(LEN)), u64::from(LEN)), hosts)
}

/// Reads twice from a mirror that is no good, and is left for the registry the first time.
async fn check_that_it_is_left(mirror: FaultServer) {
    let origin = honest_server().await;
    let (source, _hosts) = source(&mirror, &origin);
    let begun = Instant::now();
    for _ in 0..2 {
        let bytes = collect(source.fetch(1000..390_000).await.unwrap()).await.unwrap();
        assert!(bytes == pattern(LEN)[1000..390_000]);
    }
    assert!(begun.elapsed() < LONG, "its end was waited for");
    assert_eq!((mirror.requests().len(), origin.requests().len()), (1, 2));
}

#[tokio::test]
async fn a_mirror_that_stalls_in_the_middle_is_left_for_the_registry() {
    check_that_it_is_left(
        FaultServer::start(|_, request| {
            answer(request, |status, headers, body| Reply::stall(status, headers, body, 65_536))
        })
        .await,
    )
    .await;
}

#[tokio::test]
async fn a_mirror_that_trickles_is_left_for_the_registry() {
    let pause = Duration::from_millis(50);
    let trickle = move |status: u16, headers: &[&str], body: &[u8]| Reply::slow(status, headers, body, 10, pause);
    check_that_it_is_left(FaultServer::start(move |_, request| answer(request, trickle)).await).await;
}

#[tokio::test]
async fn a_mirror_that_breaks_off_in_the_middle_is_left_for_the_registry() {
    check_that_it_is_left(
        FaultServer::start(|_, request| {
            answer(request, |status, headers, body| Reply::cut(status, headers, body, 65_536))
        })
        .await,
    )
    .await;
}

#[tokio::test]
async fn a_mirror_that_does_not_begin_is_overtaken_by_the_registry() {
    check_that_it_is_left(FaultServer::start(|_, _| Reply::Silence).await).await;
    check_that_it_is_left(
        FaultServer::start(|_, request| {
            answer(request, |status, headers, body| Reply::stall(status, headers, body, 0))
        })
        .await,
    )
    .await;
}

#[tokio::test]
async fn a_mirror_that_answers_is_not_overtaken() {
    let (mirror, origin) = (honest_server().await, honest_server().await);
    let (source, _hosts) = source(&mirror, &origin);
    for _ in 0..3 {
        collect(source.fetch(1000..390_000).await.unwrap()).await.unwrap();
    }
    assert_eq!((mirror.requests().len(), origin.requests().len()), (3, 0));
}

#[tokio::test]
async fn whoever_is_overtaken_may_still_win() {
    // The registry has begun nothing when the mirror answers: its first piece comes after a second.
    let slow = |pause: u64| {
        let pause = Duration::from_millis(pause);
        move |status: u16, headers: &[&str], body: &[u8]| Reply::slow(status, headers, body, 1 << 20, pause)
    };
    let mirror = FaultServer::start(move |_, request| answer(request, slow(1000))).await;
    let origin = FaultServer::start(move |_, request| answer(request, slow(60_000))).await;
    let (source, _hosts) = source(&mirror, &origin);
    for _ in 0..2 {
        let bytes = collect(source.fetch(1000..390_000).await.unwrap()).await.unwrap();
        assert!(bytes == pattern(LEN)[1000..390_000]);
    }
    assert_eq!((mirror.requests().len(), origin.requests().len()), (2, 2));
}

#[tokio::test]
async fn a_trickle_of_the_only_host_is_given_up_when_patience_ends() {
    let server = FaultServer::start(|_, request| {
        answer(request, |status, headers, body| Reply::stall(status, headers, body, 100))
    })
    .await;
    let client = Client::new(ClientOptions {
        stall_timeout: Duration::from_millis(400),
        patience: Duration::from_secs(2),
        ..options()
    });
    let source = BlobSource::new(client, server.reference("a"), Digest::of(&pattern(LEN)), u64::from(LEN));
    let error = tokio::time::timeout(LONG, collect(source.fetch(1000..390_000).await.unwrap())).await;
    let error = error.expect("each answer had some bytes, and there was no end").unwrap_err().to_string();
    assert!(error.contains("sent next to nothing for") && error.contains("gave up after"), "{error}");
}

#[tokio::test]
async fn the_only_host_may_be_slow() {
    let pause = Duration::from_millis(20);
    let slow = move |status: u16, headers: &[&str], body: &[u8]| Reply::slow(status, headers, body, 8_000, pause);
    let server = FaultServer::start(move |_, request| answer(request, slow)).await;
    let client = Client::new(ClientOptions { slow_timeout: Duration::ZERO, ..options() });
    let source = BlobSource::new(client, server.reference("a"), Digest::of(&pattern(LEN)), u64::from(LEN));
    let bytes = collect(source.fetch(1000..390_000).await.unwrap()).await.unwrap();
    assert!(bytes == pattern(LEN)[1000..390_000]);
    assert_eq!(server.requests().len(), 1);
}

/// It never stalls, and would take years.
#[tokio::test]
async fn a_document_that_comes_a_byte_at_a_time_is_given_up() {
    let text = format!(r#"{{"mediaType":"{}"}}"#, registry::media_type::OCI_MANIFEST);
    let server = FaultServer::start(move |_, _| {
        Reply::slow(200, &["Content-Type: application/json"], text.as_bytes(), 1, Duration::from_millis(100))
    })
    .await;
    let (document_timeout, patience) = (Duration::from_millis(400), Duration::from_millis(10));
    let options = registry::ClientOptions { document_timeout, patience, ..crate::options() };
    let error = registry::Client::new(options).manifest(&server.reference("a")).await.unwrap_err();
    assert!(error.to_string().contains("sent next to nothing for 0 s"), "{error}");
}

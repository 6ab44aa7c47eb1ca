//! Registries that send all of a blob where a range was asked for: always, or until they have it themselves.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use format_spec::Digest;
use registry::BlobSource;
use storage::Source;

use crate::{
    client, collect,
    fault_server::{FaultServer, Reply},
    faults::honest,
    pattern,
};

const LEN: u32 = 6 << 20;
const PIECE_LEN: usize = 128 << 10;

fn source(server: &FaultServer) -> BlobSource {
    BlobSource::new(client(), server.reference("a"), Digest::of(&pattern(LEN)), u64::from(LEN))
}

#[tokio::test]
async fn all_of_a_blob_can_be_taken_where_a_range_is_ignored() {
    let content = pattern(LEN);
    let server = FaultServer::start(|_, _| Reply::full(200, &[], &pattern(LEN))).await;
    let wide = source(&server).fetch_wide(5_000_000..5_000_100).await.unwrap();
    assert_eq!(wide.range, 0..u64::from(LEN));
    assert!(collect(wide.stream).await.unwrap() == content);
    // A caller that cannot use more gets what it asked for.
    let bytes = collect(source(&server).fetch(5_000_000..5_000_100).await.unwrap()).await.unwrap();
    assert_eq!(bytes, content[5_000_000..5_000_100]);
}

#[tokio::test]
async fn all_of_a_blob_can_be_taken_where_it_is_called_a_part() {
    let range = format!("Content-Range: bytes 0-{}/{LEN}", LEN - 1);
    let server = FaultServer::start(move |_, _| Reply::full(206, &[&range], &pattern(LEN))).await;
    let wide = source(&server).fetch_wide(5_000_000..5_000_100).await.unwrap();
    assert_eq!(wide.range, 0..u64::from(LEN));
    assert!(collect(wide.stream).await.unwrap() == pattern(LEN));
}

#[tokio::test]
async fn a_range_stays_one_where_ranges_are_known() {
    let server = FaultServer::start(|_, request| {
        let (status, headers, body) = honest(&pattern(LEN), request);
        Reply::full(status, &headers.iter().map(String::as_str).collect::<Vec<_>>(), &body)
    })
    .await;
    let wide = source(&server).fetch_wide(5_000_000..5_000_100).await.unwrap();
    assert_eq!(wide.range, 5_000_000..5_000_100);
    assert_eq!(collect(wide.stream).await.unwrap(), pattern(LEN)[5_000_000..5_000_100]);
}

/// A cache in front of a registry: a blob comes whole until it has been through once.
#[tokio::test]
async fn reads_wait_for_the_first_answer_of_a_pull_through_cache() {
    let has_blob = Arc::new(AtomicBool::new(false));
    let cache = FaultServer::start({
        let has_blob = Arc::clone(&has_blob);
        move |_, request| {
            let (status, headers, body) = match has_blob.load(Ordering::Acquire) {
                true => honest(&pattern(LEN), request),
                false => (200, Vec::new(), pattern(LEN)),
            };
            let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
            Reply::slow(status, &headers, &body, PIECE_LEN, Duration::from_millis(10))
        }
    })
    .await;
    let (source, has_blob) = (&source(&cache), &has_blob);
    let read = async |start: u64| {
        let bytes = collect(source.fetch(start..start + 1000).await.unwrap()).await.unwrap();
        has_blob.store(true, Ordering::Release);
        let start = usize::try_from(start).unwrap();
        assert_eq!(bytes, pattern(LEN)[start..start + 1000]);
    };
    futures_util::future::join_all((0..10).map(|number| read(5_000_000 + number * 100_000))).await;
    // Once whole; of what others had begun no more than a few pieces.
    let sent = cache.sent_len();
    assert!(sent < u64::from(LEN) * 2, "{sent} bytes were sent for a blob of {LEN}");
}

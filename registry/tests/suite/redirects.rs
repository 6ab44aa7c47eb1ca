//! Ranged reads that a registry redirects to an object store.

use std::{collections::HashMap, sync::Mutex};

use format_spec::Digest;
use registry::{BlobSource, Client, ClientOptions};
use storage::{Source, SourceErrorKind};

use crate::{
    client, collect,
    fault_server::{FaultServer, Received, Reply},
    logged_in_client, pattern,
};

const LEN: u32 = 1000;

/// A store that answers ranges of a pattern, or with the status that `refuse` gives.
async fn store(refuse: impl Fn(usize, &str) -> Option<u16> + Send + Sync + 'static) -> FaultServer {
    FaultServer::start(move |count, request| match refuse(count, &request.target) {
        Some(status) => Reply::status(status),
        None => ranged(request),
    })
    .await
}

fn ranged(request: &Received) -> Reply {
    let (first, last) = request.header("range")["bytes=".len()..].split_once('-').unwrap();
    let (first, last) = (first.parse::<usize>().unwrap(), last.parse::<usize>().unwrap());
    let range = format!("Content-Range: bytes {first}-{last}/{LEN}");
    Reply::full(206, &[&range], &pattern(LEN)[first..=last])
}

/// A registry that redirects its n-th request to `/n` of the store.
async fn registry(store: &FaultServer) -> FaultServer {
    let host = store.host().to_owned();
    FaultServer::start(move |count, _| Reply::full(307, &[&format!("Location: http://{host}/{count}")], b"")).await
}

async fn read(client: &Client, registry: &FaultServer, start: u32) {
    let digest = Digest::of(&pattern(LEN));
    let source = BlobSource::new(client.clone(), registry.reference("a"), digest, u64::from(LEN));
    let range = start as usize..start as usize + 10;
    let bytes = collect(source.fetch(u64::from(start)..u64::from(start) + 10).await.unwrap()).await.unwrap();
    assert_eq!(bytes, pattern(LEN)[range]);
}

#[tokio::test]
async fn later_reads_go_to_the_store_at_once() {
    let store = store(|_, _| None).await;
    let (registry, client) = (registry(&store).await, client());
    for start in [0, 100, 200] {
        read(&client, &registry, start).await;
    }
    assert_eq!(registry.requests().len(), 1);
    assert_eq!(store.requests(), ["GET /0"; 3]);
}

#[tokio::test]
async fn an_expired_address_sends_back_to_the_registry() {
    for status in [400, 401, 403, 404, 410, 503] {
        // Three reads: the address of the first expires after it, then one for each read.
        let store = store(move |count, target| (count > 0 && target == "/0").then_some(status)).await;
        let (registry, client) = (registry(&store).await, client());
        for start in [0, 100] {
            read(&client, &registry, start).await;
        }
        assert_eq!(registry.requests().len(), 2, "{status}");
        assert_eq!(store.requests(), ["GET /0", "GET /0", "GET /1"], "{status}");
    }
}

#[tokio::test]
async fn addresses_for_one_use_are_not_tried_twice() {
    let store = store(move |count, target| (count == 1 && target == "/0").then_some(403)).await;
    let (registry, client) = (registry(&store).await, client());
    for start in [0, 100, 200, 300] {
        read(&client, &registry, start).await;
    }
    assert_eq!(store.requests(), ["GET /0", "GET /0", "GET /1", "GET /2", "GET /3"]);
}

#[tokio::test]
async fn whole_reads_ask_the_registry() {
    let store = FaultServer::start(|_, request| match request.header("range") {
        "" => Reply::full(200, &[], &pattern(LEN)),
        _ => ranged(request),
    })
    .await;
    let (registry, client) = (registry(&store).await, client());
    read(&client, &registry, 0).await;
    let stream = client.blob_stream(&registry.reference("a"), &Digest::of(&pattern(LEN)), None).await.unwrap();
    assert_eq!(collect(stream).await.unwrap(), pattern(LEN));
    assert_eq!(registry.requests().len(), 2);
}

/// A long session: the store's addresses expire, and so do the registry's tokens; reads go on.
#[tokio::test]
async fn a_session_outlives_its_tokens_and_addresses() {
    let uses = Mutex::<HashMap<String, u32>>::default();
    let store = store(move |_, target| {
        let mut uses = uses.lock().unwrap();
        let used = uses.entry(target.to_owned()).or_default();
        *used += 1;
        (*used > 3).then_some(403)
    })
    .await;
    let host = store.host().to_owned();
    let registry = FaultServer::start(move |count, request| {
        let token = format!("Bearer {}", count / 4);
        if request.target.starts_with("/token") {
            return Reply::full(200, &[], format!(r#"{{"token": "{}", "expires_in": 300}}"#, count / 4).as_bytes());
        }
        if request.header("authorization") == token {
            return Reply::full(307, &[&format!("Location: http://{host}/{count}")], b"");
        }
        let challenge = format!(r#"WWW-Authenticate: Bearer realm="http://{}/token""#, request.header("host"));
        Reply::full(401, &[&challenge], b"")
    })
    .await;
    let directory = tempfile::tempdir().unwrap();
    let client = logged_in_client(directory.path(), registry.host(), "aladdin", "open sesame");
    for start in 0..20 {
        read(&client, &registry, start * 10).await;
    }
    let tokens = registry.requests().iter().filter(|request| request.starts_with("GET /token")).count();
    assert!(tokens > 1, "{:?}", registry.requests());
    assert!(store.headers("authorization").iter().all(String::is_empty));
}

/// The registry has another name than loopback's, as one elsewhere has: its address comes from a proxy.
#[tokio::test]
async fn a_registry_elsewhere_cannot_redirect_to_this_machine() {
    let store = store(|_, _| None).await;
    let host = store.host().to_owned();
    let proxy = FaultServer::start(move |_, _| Reply::full(307, &[&format!("Location: http://{host}/0")], b"")).await;
    let text = format!("server = \"http://r.example\"\nproxy = \"http://{}\"\n", proxy.host());
    let hosts = crate::hosts_dir(&[("r.example", &text)]);
    let options = ClientOptions { hosts_dir: Some(hosts.path().to_owned()), ..crate::options() };
    let digest = Digest::of(&pattern(LEN));
    let source = BlobSource::new(Client::new(options), "r.example/a".parse().unwrap(), digest, u64::from(LEN));
    let error = source.fetch(10..20).await.err().unwrap();
    assert_eq!(error.kind, SourceErrorKind::Unusable);
    let error = error.to_string();
    assert!(error.ends_with("r.example redirects to 127.0.0.1, which is this machine or its link"), "{error}");
    assert_eq!((proxy.requests().len(), store.requests().len()), (1, 0));
}

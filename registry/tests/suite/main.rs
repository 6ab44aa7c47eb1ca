//! The client against a real registry, and against a server that does what a real one only does on bad days.

// clippy knows only functions marked #[test] as tests; these are their helpers.
#![allow(clippy::unwrap_used)]

mod auth;
mod certificates;
mod chunks;
mod credentials;
mod docker_registry;
mod fault_server;
mod faults;
mod growing;
mod mirrors;
mod parts;
mod proxies;
mod push_faults;
mod real;
mod redirects;
mod referrers;
mod slow;
mod tls;
mod uploads;
mod whole;

use std::{path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use format_spec::Digest;
use futures_util::TryStreamExt;
use registry::{BlobContent, Client, ClientOptions, Progress, Reference, media_type};
use storage::{ByteStream, SourceError};
use tempfile::TempDir;

/// Options under which a failing test fails soon.
fn options() -> ClientOptions {
    ClientOptions {
        connect_timeout: Duration::from_secs(5),
        stall_timeout: Duration::from_secs(5),
        patience: Duration::from_secs(5),
        first_contact_patience: Duration::from_millis(50),
        retry_delay_min: Duration::from_millis(2),
        retry_delay_max: Duration::from_millis(20),
        ..ClientOptions::default()
    }
}

fn client() -> Client {
    Client::new(options())
}

/// A client that is logged in at `host` as `user` with `password`, as `docker login` leaves it.
fn logged_in_client(directory: &Path, host: &str, user: &str, password: &str) -> Client {
    let config = directory.join("config.json");
    let text = format!(r#"{{"auths": {{"{host}": {{"username": "{user}", "password": "{password}"}}}}}}"#);
    std::fs::write(&config, text).unwrap();
    Client::new(ClientOptions { docker_config: Some(config), ..options() })
}

/// A directory of `hosts.toml` files; each is given by the folder's name and its text.
fn hosts_dir(files: &[(&str, &str)]) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (folder, text) in files {
        let folder = directory.path().join(folder);
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("hosts.toml"), text).unwrap();
    }
    directory
}

/// A client that follows the `hosts.toml` files of `directory`.
fn client_with_hosts(directory: &TempDir) -> Client {
    Client::new(ClientOptions { hosts_dir: Some(directory.path().to_owned()), ..options() })
}

async fn push(client: &Client, reference: &Reference, content: &[u8]) -> Digest {
    let digest = Digest::of(content);
    let bytes = BlobContent::Bytes(Bytes::copy_from_slice(content));
    client.push_blob(reference, &digest, content.len() as u64, bytes, no_progress()).await.unwrap();
    digest
}

/// Pushes a config and a manifest that names it.
async fn push_image(client: &Client, reference: &Reference) -> (Bytes, Digest) {
    let config = push(client, reference, b"{}").await;
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"{}","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{config}","size":2}},"layers":[]}}"#,
        media_type::OCI_MANIFEST
    );
    let bytes = Bytes::from(manifest);
    let digest = client.push_manifest(reference, media_type::OCI_MANIFEST, bytes.clone()).await.unwrap();
    (bytes, digest)
}

async fn collect(stream: ByteStream) -> Result<Vec<u8>, SourceError> {
    stream
        .try_fold(Vec::new(), async |mut all, piece| {
            all.extend_from_slice(&piece);
            Ok(all)
        })
        .await
}

fn no_progress() -> Progress {
    Arc::new(|_| ())
}

/// Bytes that differ from their neighbours, so that a shifted range shows.
fn pattern(len: u32) -> Vec<u8> {
    (0..len).map(|position| (position.wrapping_mul(2_654_435_761) >> 24).to_le_bytes()[0]).collect()
}

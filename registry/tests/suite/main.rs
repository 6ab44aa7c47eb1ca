//! The client against a real registry, and against a server that does what a real one only does on bad days.

// clippy knows only functions marked #[test] as tests; these are their helpers.
#![allow(clippy::unwrap_used)]

mod auth;
mod docker_registry;
mod fault_server;
mod faults;
mod push_faults;
mod real;

use std::{path::Path, sync::Arc, time::Duration};

use futures_util::TryStreamExt;
use registry::{Client, ClientOptions, Progress};
use storage::{ByteStream, SourceError};

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

//! Registries with their own ideas of uploads.

use std::sync::Mutex;

use bytes::Bytes;
use format_spec::Digest;
use registry::{BlobContent, Client, ClientOptions};

use crate::{
    fault_server::{FaultServer, Reply},
    no_progress, options, pattern,
};

const CHUNK_LEN_MAX: usize = 4 << 20;

/// Takes chunks of at most 4 MiB and says 416 to longer ones, as one large registry does.
async fn chunk_server() -> FaultServer {
    let taken = Mutex::new(Vec::<u8>::new());
    FaultServer::start(move |_, request| {
        let mut taken = taken.lock().unwrap();
        match request.method.as_str() {
            "POST" => Reply::full(202, &["Location: /v2/a/blobs/uploads/1"], b""),
            "PATCH" if request.body.len() > CHUNK_LEN_MAX => {
                let error =
                    br#"{"errors":[{"code":"UNKNOWN","message":"exceeds the maximum permissible limit of 4.00MiB"}]}"#;
                Reply::full(416, &[], error)
            }
            "PATCH" => {
                taken.extend_from_slice(&request.body);
                Reply::full(202, &[&format!("Range: 0-{}", taken.len() - 1)], b"")
            }
            "GET" => match taken.len() {
                0 => Reply::full(204, &[], b""),
                len => Reply::full(204, &[&format!("Range: 0-{}", len - 1)], b""),
            },
            "PUT" if request.target.contains(&Digest::of(&taken).to_string().replace(':', "%3A")) => Reply::status(201),
            _ => Reply::status(404),
        }
    })
    .await
}

#[tokio::test]
async fn a_chunk_that_is_too_long_may_be_refused_as_a_wrong_range() {
    let content = pattern(9 << 20);
    let digest = Digest::of(&content);
    let server = chunk_server().await;
    let client = Client::new(ClientOptions { upload_chunk_len: Some(16 << 20), ..options() });
    let (bytes, len) = (BlobContent::Bytes(Bytes::from(content)), 9 << 20);
    client.push_blob(&server.reference("a"), &digest, len, bytes.clone(), no_progress()).await.unwrap();
    let lens = |server: &FaultServer| -> Vec<usize> {
        let received = server.received();
        received.iter().filter(|request| request.method == "PATCH").map(|request| request.body.len()).collect()
    };
    assert_eq!(lens(&server), [9 << 20, 4 << 20, 4 << 20, 1 << 20]);
    // It is remembered for the next blob.
    let server_again = server.reference("b");
    let _ = client.push_blob(&server_again, &digest, len, bytes, no_progress()).await;
    assert_eq!(lens(&server)[4], 4 << 20);
}

#[tokio::test]
async fn a_registry_that_refuses_every_chunk_ends_the_push() {
    let server = FaultServer::start(|_, request| match request.method.as_str() {
        "POST" => Reply::full(202, &["Location: /v2/a/blobs/uploads/1"], b""),
        "GET" => Reply::full(204, &[], b""),
        _ => Reply::status(416),
    })
    .await;
    let client = Client::new(ClientOptions { upload_chunk_len: Some(16 << 20), ..options() });
    let content = pattern(5 << 20);
    let (digest, bytes) = (Digest::of(&content), BlobContent::Bytes(Bytes::from(content)));
    let error = client.push_blob(&server.reference("a"), &digest, 5 << 20, bytes, no_progress()).await.unwrap_err();
    assert!(error.to_string().contains("answered 416"), "{error}");
    let lens: Vec<usize> = server.received().iter().map(|request| request.body.len()).filter(|len| *len > 0).collect();
    assert_eq!(lens, [5 << 20, 4 << 20, 1 << 20, 256 << 10]);
}

#[tokio::test]
async fn a_blob_is_there_also_when_its_length_is_not_said() {
    let server = FaultServer::start(|_, _| Reply::Raw(b"HTTP/1.1 200 x\r\nConnection: close\r\n\r\n".to_vec())).await;
    let (client, reference, digest) = (crate::client(), server.reference("a"), Digest::of(b"blob"));
    assert!(client.has_blob(&reference, &digest, 4).await.unwrap());
    assert!(client.has_stored_blob(&reference, &digest, 4).await.unwrap());
    let other = FaultServer::start(|_, _| Reply::full(200, &[], b"another")).await;
    assert!(!client.has_stored_blob(&other.reference("a"), &digest, 4).await.unwrap());
}

//! Referrers by API, by tag scheme, and as cosign stores them.

use bytes::Bytes;
use format_spec::Digest;
use registry::{Client, Error, Reference, Referrer, media_type};

use crate::{
    client,
    docker_registry::DockerRegistry,
    fault_server::{FaultServer, Reply},
    push_image,
};

const SBOM: &str = "application/spdx+json";
const SIGNATURE: &str = "application/vnd.example.signature";

/// Pushes an artifact of `artifact_type` that refers to `subject`; `note` makes it differ from others. Its config is
/// that of [`push_image`].
async fn push_referrer(
    client: &Client,
    reference: &Reference,
    subject: &Digest,
    artifact_type: &str,
    note: &str,
) -> Result<Digest, Error> {
    let config = Digest::of(b"{}");
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"{}","artifactType":"{artifact_type}","config":{{"mediaType":"application/vnd.oci.empty.v1+json","digest":"{config}","size":2}},"layers":[],"subject":{{"mediaType":"{0}","digest":"{subject}","size":1}},"annotations":{{"note":"{note}"}}}}"#,
        media_type::OCI_MANIFEST
    );
    client.push_referrer(reference, media_type::OCI_MANIFEST, Bytes::from(manifest)).await
}

fn digests(referrers: &[Referrer]) -> Vec<Digest> {
    referrers.iter().map(|referrer| referrer.digest).collect()
}

#[tokio::test]
async fn a_registry_without_the_api_gets_the_tag_scheme() {
    let registry = DockerRegistry::start();
    let (client, reference) = (client(), registry.reference("a:v1"));
    let (_, subject) = push_image(&client, &reference).await;
    assert_eq!(client.referrers(&reference, &subject, None).await.unwrap(), []);
    let push = async |artifact_type, note| push_referrer(&client, &reference, &subject, artifact_type, note).await;
    let sbom = push(SBOM, "1").await.unwrap();
    let signature = push(SIGNATURE, "2").await.unwrap();
    assert_eq!(push(SBOM, "1").await.unwrap(), sbom);

    let found = client.referrers(&reference, &subject, None).await.unwrap();
    assert_eq!(digests(&found), [sbom, signature]);
    let manifest = client.manifest(&reference.with_digest(sbom)).await.unwrap();
    let expected = Referrer {
        media_type: media_type::OCI_MANIFEST.to_owned(),
        digest: sbom,
        len: manifest.bytes.len() as u64,
        artifact_type: Some(SBOM.to_owned()),
        annotations: [("note".to_owned(), "1".to_owned())].into(),
    };
    assert_eq!(found[0], expected);
    assert_eq!(digests(&client.referrers(&reference, &subject, Some(SIGNATURE)).await.unwrap()), [signature]);
    // The image's own tag is where it was.
    assert_eq!(client.manifest_digest(&reference).await.unwrap(), Some(subject));
}

#[tokio::test]
async fn many_referrers_pushed_at_once_are_all_listed() {
    let registry = DockerRegistry::start();
    let (client, reference) = (client(), registry.reference("a:v1"));
    let (_, subject) = push_image(&client, &reference).await;
    let notes: Vec<String> = (0..8).map(|note: u32| note.to_string()).collect();
    let all = notes.iter().map(|note| push_referrer(&client, &reference, &subject, SBOM, note));
    let mut pushed = futures_util::future::try_join_all(all).await.unwrap();
    let mut found = digests(&client.referrers(&reference, &subject, None).await.unwrap());
    pushed.sort();
    found.sort();
    assert_eq!(found, pushed);
}

#[tokio::test]
async fn an_image_under_the_tag_of_referrers_is_not_overwritten() {
    let registry = DockerRegistry::start();
    let (client, reference) = (client(), registry.reference("a:v1"));
    let (_, subject) = push_image(&client, &reference).await;
    let tag = reference.with_tag(&format!("sha256-{}", subject.hex())).unwrap();
    push_image(&client, &tag).await;
    let error = push_referrer(&client, &reference, &subject, SBOM, "1").await.unwrap_err().to_string();
    assert!(error.ends_with("an image, where an index of referrers is expected"), "{error}");
    assert_eq!(client.manifest_digest(&tag).await.unwrap(), Some(subject));
    // A client that only reads learns that it names no referrers.
    assert_eq!(client.referrers(&reference, &subject, None).await.unwrap(), []);
}

#[tokio::test]
async fn a_manifest_without_a_subject_is_no_referrer() {
    let reference = "localhost:1/a".parse().unwrap();
    let pushed = client().push_referrer(&reference, media_type::OCI_MANIFEST, Bytes::from_static(b"{}")).await;
    let error = pushed.unwrap_err().to_string();
    assert!(error.ends_with("content to upload: a manifest without a subject"), "{error}");
}

#[tokio::test]
async fn the_api_is_read_page_by_page_and_filtered() {
    let (first, second, other) = (Digest::of(b"1"), Digest::of(b"2"), Digest::of(b"3"));
    let server = FaultServer::start(move |count, _| {
        let entry = |digest: Digest, artifact_type: &str| {
            let media_type = media_type::OCI_MANIFEST;
            format!(r#"{{"mediaType":"{media_type}","digest":"{digest}","size":1,"artifactType":"{artifact_type}"}}"#)
        };
        let index = format!("Content-Type: {}", media_type::OCI_INDEX);
        let (entries, link) = match count {
            0 => ([entry(first, SBOM), entry(other, SIGNATURE)].join(","), "Link: </v2/next?n=1>; rel=\"next\""),
            _ => (entry(second, SBOM), "X-None: 1"),
        };
        Reply::full(200, &[&index, link], format!(r#"{{"manifests":[{entries}]}}"#).as_bytes())
    })
    .await;
    let subject = Digest::of(b"s");
    let found = client().referrers(&server.reference("a"), &subject, Some(SBOM)).await.unwrap();
    assert_eq!(digests(&found), [first, second]);
    let asked = format!("GET /v2/a/referrers/{subject}?artifactType=application%2Fspdx%2Bjson");
    assert_eq!(server.requests(), [asked.as_str(), "GET /v2/next?n=1"]);
}

#[tokio::test]
async fn a_registry_that_knows_subjects_keeps_its_own_list() {
    let server = FaultServer::start(|_, _| {
        let subject = format!("OCI-Subject: {}", Digest::of(b"s"));
        Reply::full(201, &[&subject], b"")
    })
    .await;
    push_referrer(&client(), &server.reference("a"), &Digest::of(b"s"), SBOM, "1").await.unwrap();
    assert_eq!(server.requests().len(), 1);
}

#[tokio::test]
async fn odd_answers_to_the_api_lead_to_the_tag() {
    for (status, content_type) in [(404, "a/b"), (405, "a/b"), (400, "a/b"), (200, "text/html")] {
        let server = FaultServer::start(move |count, _| match count {
            0 => Reply::full(status, &[&format!("Content-Type: {content_type}")], b"<html>"),
            _ => Reply::status(404),
        })
        .await;
        let found = client().referrers(&server.reference("a"), &Digest::of(b"s"), None).await.unwrap();
        assert_eq!((found, server.requests().len()), (Vec::new(), 2), "{status}");
    }
}

#[tokio::test]
async fn cosigns_tags_are_found() {
    let registry = DockerRegistry::start();
    let (client, reference) = (client(), registry.reference("a:v1"));
    let (_, subject) = push_image(&client, &reference).await;
    assert_eq!(client.cosign_tags(&reference, &subject).await.unwrap(), []);
    let tags = [".sig", ".sbom"].map(|end| reference.with_tag(&format!("sha256-{}{end}", subject.hex())).unwrap());
    for tag in &tags {
        push_image(&client, tag).await;
    }
    assert_eq!(client.cosign_tags(&reference, &subject).await.unwrap(), tags);
}

/// A hundred pages of 4 MiB would be held before anybody counted.
#[tokio::test]
async fn a_list_of_referrers_without_end_is_given_up() {
    let page = format!(r#"{{"manifests":[],"filler":"{}"}}"#, "x".repeat(3 << 20));
    let server = FaultServer::start(move |_, _| {
        let headers = [format!("Content-Type: {}", media_type::OCI_INDEX), "Link: </again>; rel=\"next\"".to_owned()];
        Reply::full(200, &headers.each_ref().map(String::as_str), page.as_bytes())
    })
    .await;
    let error = client().referrers(&server.reference("a"), &Digest::of(b""), None).await.unwrap_err();
    assert!(matches!(error, Error::TooLong { .. }), "{error}");
    assert_eq!(server.requests().len(), 3);
}

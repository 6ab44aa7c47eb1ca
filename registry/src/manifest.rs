//! Manifests and indexes: fetched whole, verified, pushed.

use std::sync::Arc;

use bytes::Bytes;
use format_spec::Digest;
use reqwest::{Method, StatusCode, header};
use serde::Deserialize;

use crate::{
    auth::Scopes,
    client::Client,
    endpoint::Endpoint,
    error::{Error, clean},
    hosts::Capability,
    reference::Reference,
    transport::{Payload, Request, header_text, is_html, read_bounded, refusal},
};

/// Longest manifest accepted, the limit that the OCI distribution specification names for registries.
pub const MANIFEST_LEN_MAX: u64 = 4 << 20;
/// How often a manifest is sent that names blobs which the registry does not see. A registry that writes its links in
/// place, as docker-registry 2.8 does, misses for a moment a blob that it has confirmed when somebody else sends the same.
const BLOB_ATTEMPTS_MAX: u32 = 4;
/// Tells what the registry thinks it stores or sends.
const CONTENT_DIGEST: header::HeaderName = header::HeaderName::from_static("docker-content-digest");
/// Tells that the registry has understood the manifest's subject. Source: OCI distribution specification 1.1.
const SUBJECT: header::HeaderName = header::HeaderName::from_static("oci-subject");

/// The media types of manifests that registries deliver.
pub mod media_type {
    /// Manifest of one OCI image.
    pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    /// OCI index over several manifests.
    pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
    /// Manifest of one docker image, version 2 schema 2.
    pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
    /// docker's list of several manifests.
    pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
}

const ACCEPTED: [&str; 4] =
    [media_type::OCI_MANIFEST, media_type::OCI_INDEX, media_type::DOCKER_MANIFEST, media_type::DOCKER_LIST];

/// A manifest or index as the registry holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The bytes, unchanged: their digest is the identity of the image.
    pub bytes: Bytes,
    /// One of [`media_type`].
    pub media_type: String,
    /// SHA-256 of `bytes`.
    pub digest: Digest,
}

impl Manifest {
    /// Whether it lists manifests instead of describing one image.
    pub fn is_index(&self) -> bool {
        matches!(self.media_type.as_str(), media_type::OCI_INDEX | media_type::DOCKER_LIST)
    }
}

impl Client {
    /// Fetches the manifest or index that `reference` names: by its digest where it has one, else by its tag.
    ///
    /// # Errors
    ///
    /// [`Error::DigestMismatch`] when the content is not what the reference's digest says;
    /// [`Error::Malformed`] when it is no manifest of a type in [`media_type`];
    /// [`Error::TooLong`] above [`MANIFEST_LEN_MAX`].
    pub async fn manifest(&self, reference: &Reference) -> Result<Manifest, Error> {
        let attempt = |endpoint| self.manifest_once(reference, endpoint);
        self.with_mirrors(reference, capability(reference), attempt).await
    }

    /// The same where [`Self::push_manifest`] would store it, past any mirror.
    pub async fn stored_manifest(&self, reference: &Reference) -> Result<Manifest, Error> {
        let endpoint = self.push_endpoint(reference.host()).await?;
        self.with_retries(reference.host(), || self.manifest_once(reference, Arc::clone(&endpoint))).await
    }

    async fn manifest_once(&self, reference: &Reference, endpoint: Arc<Endpoint>) -> Result<Manifest, Error> {
        let (what, host) = (what(reference), endpoint.name());
        let response = self.send(&manifest_request(Method::GET, reference, &endpoint, &what)?).await?;
        if response.status() != StatusCode::OK {
            return Err(refusal(self, &what, &endpoint, response).await);
        }
        let content_type = header_text(response.headers(), header::CONTENT_TYPE).unwrap_or_default().to_owned();
        let announced = announced_digest(response.headers());
        let bytes = read_bounded(self, &what, host, response, MANIFEST_LEN_MAX).await?;
        let found = Digest::of(&bytes);
        if let Some(&expected) = reference.digest().or(announced.as_ref()).filter(|expected| **expected != found) {
            return Err(Error::DigestMismatch { what, host: host.to_owned(), expected, found });
        }
        let media_type =
            find_media_type(&bytes, &content_type).map_err(|reason| Error::malformed(&what, host, reason))?;
        Ok(Manifest { bytes, media_type: media_type.to_owned(), digest: found })
    }

    /// The digest of the manifest that `reference` names; `None` when there is none. Nothing is fetched where the
    /// registry says it in a header.
    pub async fn manifest_digest(&self, reference: &Reference) -> Result<Option<Digest>, Error> {
        let attempt = |endpoint| self.manifest_digest_once(reference, endpoint);
        match self.with_mirrors(reference, capability(reference), attempt).await {
            Ok(digest) => Ok(Some(digest)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn manifest_digest_once(&self, reference: &Reference, endpoint: Arc<Endpoint>) -> Result<Digest, Error> {
        let what = what(reference);
        let response = self.send(&manifest_request(Method::HEAD, reference, &endpoint, &what)?).await?;
        if response.status() != StatusCode::OK {
            return Err(refusal(self, &what, &endpoint, response).await);
        }
        match announced_digest(response.headers()) {
            Some(digest) => Ok(digest),
            None => self.manifest_once(reference, endpoint).await.map(|manifest| manifest.digest),
        }
    }

    /// Stores `bytes` under the tag of `reference`, or under their digest where it has no tag.
    ///
    /// # Errors
    ///
    /// [`Error::DigestMismatch`] when `reference` has a digest and `bytes` another (nothing is sent), or when the
    /// registry stored something else.
    pub async fn push_manifest(&self, reference: &Reference, media_type: &str, bytes: Bytes) -> Result<Digest, Error> {
        let digest = Digest::of(&bytes);
        if let Some(&expected) = reference.digest().filter(|expected| **expected != digest) {
            let host = reference.host().to_owned();
            return Err(Error::DigestMismatch { what: format!("push of {reference}"), host, expected, found: digest });
        }
        let endpoint = self.push_endpoint(reference.host()).await?;
        let once = || self.push_manifest_once(reference, &endpoint, media_type, &bytes, digest);
        let mut attempts = 1;
        loop {
            match self.with_retries(reference.host(), once).await {
                Err(error) if error.misses_blob() && attempts < BLOB_ATTEMPTS_MAX => {
                    tracing::debug!(%reference, attempts, %error, "manifest is sent again");
                    attempts += 1;
                    tokio::time::sleep(self.options().retry_delay_min).await;
                }
                result => return result.map(|_| digest),
            }
        }
    }

    /// Returns whether the registry lists it with the referrers of its subject.
    pub(crate) async fn push_manifest_once(
        &self,
        reference: &Reference,
        endpoint: &Endpoint,
        media_type: &str,
        bytes: &Bytes,
        digest: Digest,
    ) -> Result<bool, Error> {
        let what = format!("push of {reference}");
        let name = reference.tag().map_or_else(|| digest.to_string(), str::to_owned);
        let url = endpoint.url(reference.repository(), &format!("manifests/{name}"))?;
        let request = Request::new(&what, endpoint, Method::PUT, url, Scopes::push(reference.repository()))
            .header(header::CONTENT_TYPE, media_type)
            .payload(Payload::Bytes(bytes.clone()));
        let response = self.send(&request).await?;
        if !response.status().is_success() {
            return Err(refusal(self, &what, endpoint, response).await);
        }
        match announced_digest(response.headers()) {
            Some(found) if found != digest => {
                Err(Error::DigestMismatch { what, host: endpoint.name().to_owned(), expected: digest, found })
            }
            _ => Ok(response.headers().contains_key(SUBJECT)),
        }
    }
}

fn manifest_request<'a>(
    method: Method,
    reference: &'a Reference,
    endpoint: &'a Endpoint,
    what: &'a str,
) -> Result<Request<'a>, Error> {
    let url = endpoint.url(reference.repository(), &format!("manifests/{}", reference.manifest_name()))?;
    let scopes = Scopes::pull(reference.repository());
    Ok(Request::new(what, endpoint, method, url, scopes).header(header::ACCEPT, ACCEPTED.join(", ")))
}

/// What a host must be trusted with to answer for `reference`.
fn capability(reference: &Reference) -> Capability {
    if reference.digest().is_some() { Capability::Pull } else { Capability::Resolve }
}

fn what(reference: &Reference) -> String {
    format!("manifest of {reference}")
}

/// What the registry says the content hashes to; a digest of another algorithm says nothing to us.
pub(crate) fn announced_digest(headers: &header::HeaderMap) -> Option<Digest> {
    header_text(headers, CONTENT_DIGEST)?.parse().ok()
}

/// The few fields that tell manifests apart.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Outline {
    schema_version: Option<u64>,
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
    layers: Option<serde::de::IgnoredAny>,
}

/// What kind of manifest `bytes` are. Their own word comes first, for the digest covers it.
pub(crate) fn find_media_type(bytes: &[u8], content_type: &str) -> Result<&'static str, String> {
    let Ok(outline) = serde_json::from_slice::<Outline>(bytes) else {
        let start = String::from_utf8_lossy(&bytes[..bytes.len().min(256)]).into_owned();
        return Err(match is_html(&start) {
            true => "an HTML page instead of a manifest, so perhaps no registry".to_owned(),
            false => "no manifest: not the JSON it should be".to_owned(),
        });
    };
    if outline.schema_version == Some(1) {
        return Err("a manifest of docker's schema 1, which is not supported: push the image again".to_owned());
    }
    let header = content_type.split(';').next().unwrap_or_default().trim();
    let own = outline.media_type.as_deref().filter(|own| !own.is_empty());
    let known = |name: &str| ACCEPTED.into_iter().find(|accepted| *accepted == name);
    match (own, known(header)) {
        (Some(own), _) => known(own).ok_or_else(|| format!("media type {:?} is no image manifest", clean(own))),
        (None, Some(header)) => Ok(header),
        (None, None) if outline.manifests.is_some() => Ok(media_type::OCI_INDEX),
        (None, None) if outline.layers.is_some() => Ok(media_type::OCI_MANIFEST),
        (None, None) => Err("JSON that is no image manifest".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_manifests_apart() {
        let check = |text: &str, content_type: &str, expected: Result<&str, &str>| {
            let found = find_media_type(text.as_bytes(), content_type);
            assert_eq!(found.as_ref().map(|kind| *kind).map_err(String::as_str), expected, "{text}");
        };
        check(r#"{"mediaType":"application/vnd.oci.image.index.v1+json"}"#, "text/plain", Ok(media_type::OCI_INDEX));
        check(
            r#"{"layers":[]}"#,
            &format!("{}; charset=utf-8", media_type::DOCKER_MANIFEST),
            Ok(media_type::DOCKER_MANIFEST),
        );
        check(r#"{"layers":[]}"#, "application/json", Ok(media_type::OCI_MANIFEST));
        check(r#"{"manifests":[]}"#, "", Ok(media_type::OCI_INDEX));
        check(r#"{"mediaType":"a\u001bb"}"#, media_type::OCI_INDEX, Err("media type \"a b\" is no image manifest"));
        check("{}", "", Err("JSON that is no image manifest"));
        check("<HTML>", "text/html", Err("an HTML page instead of a manifest, so perhaps no registry"));
        check("", media_type::OCI_INDEX, Err("no manifest: not the JSON it should be"));
        assert!(find_media_type(br#"{"schemaVersion":1}"#, "").is_err());
    }
}

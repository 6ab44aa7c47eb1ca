//! What refers to an image: signatures, SBOMs and other manifests whose `subject` it is.
//!
//! A registry that knows subjects is asked; for others the clients keep an index under a tag made of the digest
//! (the *tag scheme*). cosign has tags of its own, older than both.
//!
//! Source: OCI distribution specification 1.1, "Listing Referrers", "Referrers Tag Schema", "Pushing Manifests
//! with Subject"; OCI image specification 1.1, `artifactType`.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use format_spec::Digest;
use reqwest::{Method, StatusCode, header};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    auth::Scopes,
    client::Client,
    endpoint::Endpoint,
    error::{Error, clean},
    hosts::Capability,
    manifest::{MANIFEST_LEN_MAX, media_type},
    reference::Reference,
    transport::{Request, header_text, read_bounded, refusal},
};

/// Pages of a list of referrers that are read at most.
const PAGES_MAX: usize = 100;
/// Bytes of all pages together: some ten thousand referrers, and more than anybody follows.
const PAGES_LEN_MAX: u64 = 2 * MANIFEST_LEN_MAX;
/// Ends of the tags under which cosign stores signatures, attestations and SBOMs.
const COSIGN_ENDS: [&str; 3] = [".sig", ".att", ".sbom"];

/// A manifest that refers to another.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Referrer {
    /// Media type of the manifest.
    pub media_type: String,
    /// Digest of the manifest.
    pub digest: Digest,
    /// Length of the manifest in bytes.
    #[serde(rename = "size")]
    pub len: u64,
    /// What it is about, such as `application/spdx+json`.
    pub artifact_type: Option<String>,
    /// The manifest's annotations, if it has any.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
}

/// A list of referrers.
#[derive(Deserialize)]
struct ReferrersIndex {
    manifests: Vec<Referrer>,
}

impl Client {
    /// Lists what refers to the manifest `subject` in the repository of `reference`, by API or by tag scheme.
    ///
    /// With `artifact_type` only referrers of that type. Empty when there are none.
    pub async fn referrers(
        &self,
        reference: &Reference,
        subject: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Vec<Referrer>, Error> {
        let attempt = |endpoint| self.referrers_by_api(reference, subject, artifact_type, endpoint);
        let found = self.with_mirrors(reference, Capability::Resolve, attempt).await;
        let mut referrers = match found {
            Ok(Some(referrers)) => referrers,
            Ok(None) => self.referrers_by_tag(reference, subject).await?,
            Err(error) if error.is_not_found() => self.referrers_by_tag(reference, subject).await?,
            Err(error) => return Err(error),
        };
        // A registry may leave the filtering to us.
        referrers.retain(|referrer| artifact_type.is_none() || referrer.artifact_type.as_deref() == artifact_type);
        Ok(referrers)
    }

    /// `None` where the host has no such API and says so in other ways than 404.
    async fn referrers_by_api(
        &self,
        reference: &Reference,
        subject: &Digest,
        artifact_type: Option<&str>,
        endpoint: Arc<Endpoint>,
    ) -> Result<Option<Vec<Referrer>>, Error> {
        let (what, host) = (format!("referrers of {subject} in {}", reference.name()), endpoint.name());
        let scopes = Scopes::pull(reference.repository());
        let mut url = endpoint.url(reference.repository(), &format!("referrers/{subject}"))?;
        if let Some(artifact_type) = artifact_type {
            url.query_pairs_mut().append_pair("artifactType", artifact_type);
        }
        let own = url.clone();
        let mut all = Vec::new();
        let mut left = PAGES_LEN_MAX;
        for _ in 0..PAGES_MAX {
            let request = Request::new(&what, &endpoint, Method::GET, url, scopes.clone())
                .header(header::ACCEPT, media_type::OCI_INDEX)
                .trusted_like(&own);
            let response = self.send(&request).await?;
            match response.status() {
                StatusCode::OK => {}
                StatusCode::BAD_REQUEST | StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED => {
                    return Ok(None);
                }
                _ => return Err(refusal(self, &what, &endpoint, response).await),
            }
            let content_type = header_text(response.headers(), header::CONTENT_TYPE).unwrap_or_default();
            if !content_type.starts_with(media_type::OCI_INDEX) {
                return Ok(None);
            }
            let next = header_text(response.headers(), header::LINK)
                .and_then(next_link)
                .and_then(|link| response.url().join(link).ok())
                .filter(|url| matches!(url.scheme(), "http" | "https"));
            let bytes = read_bounded(self, &what, host, response, MANIFEST_LEN_MAX.min(left)).await?;
            left -= bytes.len() as u64;
            all.append(&mut parse_index(&what, host, &bytes)?);
            match next {
                Some(next) => url = next,
                None => return Ok(Some(all)),
            }
        }
        Err(Error::malformed(&what, host, format!("more than {PAGES_MAX} pages")))
    }

    async fn referrers_by_tag(&self, reference: &Reference, subject: &Digest) -> Result<Vec<Referrer>, Error> {
        let reference = tagged(reference, subject, "");
        match self.manifest(&reference).await {
            Ok(manifest) if manifest.is_index() => {
                parse_index(&format!("referrers at {reference}"), reference.host(), &manifest.bytes)
            }
            // Tools that copy everything with such a tag leave the image itself there. It names no referrers.
            Ok(manifest) => {
                tracing::warn!(%reference, digest = %manifest.digest, "the tag of referrers names no index: nothing is taken from it");
                Ok(Vec::new())
            }
            Err(error) if error.is_not_found() => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Stores a manifest with a `subject` under its digest, and where the registry does not know subjects, enters
    /// it into the index of the tag scheme.
    ///
    /// Two programs that do this for one subject at the same time may lose one entry: the tag scheme has no lock.
    ///
    /// # Errors
    ///
    /// [`Error::Content`] when `bytes` are no manifest with a subject; [`Error::Malformed`] when something else
    /// than an index is stored under the tag: it is not overwritten.
    pub async fn push_referrer(&self, reference: &Reference, media_type: &str, bytes: Bytes) -> Result<Digest, Error> {
        let digest = Digest::of(&bytes);
        let reference = reference.with_digest(digest).without_tag();
        let what = format!("push of {reference}");
        let (subject, entry) =
            describe(&bytes, media_type, digest).map_err(|reason| Error::Content { what: what.clone(), reason })?;
        let endpoint = self.push_endpoint(reference.host()).await?;
        let once = || self.push_manifest_once(&reference, &endpoint, media_type, &bytes, digest);
        if self.with_retries(reference.host(), once).await? {
            return Ok(digest);
        }
        let tag = tagged(&reference, &subject, "");
        let _lock = self.lock_referrers().await;
        let old = match self.stored_manifest(&tag).await {
            Ok(manifest) => Some(manifest),
            Err(error) if error.is_not_found() => None,
            Err(error) => return Err(error),
        };
        let malformed = |reason| Error::malformed(&format!("referrers at {tag}"), tag.host(), reason);
        if old.as_ref().is_some_and(|old| !old.is_index()) {
            return Err(malformed("an image, where an index of referrers is expected"));
        }
        let merged = merge(old.as_ref().map(|old| &old.bytes[..]), entry).map_err(malformed)?;
        let Some(merged) = merged else { return Ok(digest) };
        if merged.len() as u64 > MANIFEST_LEN_MAX {
            return Err(malformed("too many referrers for one index"));
        }
        self.push_manifest(&tag, media_type::OCI_INDEX, merged.into()).await?;
        Ok(digest)
    }

    /// The tags under which cosign keeps signatures, attestations and SBOMs of the manifest `subject`, as far as
    /// they exist in the repository of `reference`.
    pub async fn cosign_tags(&self, reference: &Reference, subject: &Digest) -> Result<Vec<Reference>, Error> {
        let mut found = Vec::new();
        for end in COSIGN_ENDS {
            let reference = tagged(reference, subject, end);
            if self.manifest_digest(&reference).await?.is_some() {
                found.push(reference);
            }
        }
        Ok(found)
    }
}

/// `sha256-<hex>` and `end` as a tag.
fn tagged(reference: &Reference, subject: &Digest, end: &str) -> Reference {
    reference.with_tag(&format!("sha256-{}{end}", subject.hex())).expect("hex digits and known ends make a tag")
}

pub(crate) fn parse_index(what: &str, host: &str, bytes: &[u8]) -> Result<Vec<Referrer>, Error> {
    let parsed = serde_json::from_slice::<ReferrersIndex>(bytes);
    parsed.map(|index| index.manifests).map_err(|error| Error::malformed(what, host, clean(&error.to_string())))
}

/// The target of the `next` link. Source: RFC 8288 3.
pub(crate) fn next_link(text: &str) -> Option<&str> {
    text.split(',').find_map(|link| {
        let (target, parameters) = link.trim().strip_prefix('<')?.split_once('>')?;
        let is_next = |parameter: &str| matches!(parameter.trim(), "rel=\"next\"" | "rel=next");
        parameters.split(';').any(is_next).then_some(target)
    })
}

/// The parts of a manifest that matter for a list of referrers.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ReferrerManifest {
    subject: Option<Subject>,
    artifact_type: Option<String>,
    config: Option<Config>,
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
struct Subject {
    digest: Digest,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Config {
    media_type: String,
}

/// The subject of a manifest, and the entry for it in an index of referrers.
fn describe(bytes: &[u8], media_type: &str, digest: Digest) -> Result<(Digest, Value), String> {
    let manifest: ReferrerManifest = serde_json::from_slice(bytes).map_err(|error| clean(&error.to_string()))?;
    let subject = manifest.subject.ok_or("a manifest without a subject")?.digest;
    let mut entry = json!({"mediaType": media_type, "digest": digest.to_string(), "size": bytes.len()});
    let own_type = manifest.artifact_type.filter(|own| !own.is_empty());
    if let Some(artifact_type) = own_type.or(manifest.config.map(|config| config.media_type)) {
        entry["artifactType"] = artifact_type.into();
    }
    if let Some(annotations) = manifest.annotations {
        entry["annotations"] = json!(annotations);
    }
    Ok((subject, entry))
}

/// An index with the entries of `old` and with `entry`; `None` where it is there already. What else the old one
/// contains stays.
fn merge(old: Option<&[u8]>, entry: Value) -> Result<Option<Vec<u8>>, &'static str> {
    const NO_INDEX: &str = "what is there is no index";
    let mut index = match old {
        Some(old) => serde_json::from_slice(old).map_err(|_| NO_INDEX)?,
        None => json!({"schemaVersion": 2, "mediaType": media_type::OCI_INDEX, "manifests": []}),
    };
    let manifests = index.get_mut("manifests").and_then(Value::as_array_mut).ok_or(NO_INDEX)?;
    if manifests.iter().any(|kept| kept["digest"] == entry["digest"]) {
        return Ok(None);
    }
    manifests.push(entry);
    Ok(Some(serde_json::to_vec(&index).expect("a JSON value becomes text")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_next_page() {
        assert_eq!(next_link("</v2/a?n=1&last=b>; rel=\"next\""), Some("/v2/a?n=1&last=b"));
        assert_eq!(next_link("</x>; rel=prev, </y>; title=a; rel=next"), Some("/y"));
        for text in ["", "</x>", "</x>; rel=\"prev\"", "x; rel=next"] {
            assert_eq!(next_link(text), None, "{text}");
        }
    }

    #[test]
    fn an_entry_says_what_the_manifest_says() {
        let subject = Digest::of(b"s");
        let check = |manifest: &str, expected: Value| {
            let text = manifest.replace("SUBJECT", &format!(r#""subject":{{"digest":"{subject}","size":1}}"#));
            let digest = Digest::of(text.as_bytes());
            let mut all = json!({"mediaType": "m", "digest": digest.to_string(), "size": text.len()});
            all.as_object_mut().unwrap().extend(expected.as_object().unwrap().clone());
            assert_eq!(describe(text.as_bytes(), "m", digest), Ok((subject, all)));
        };
        check("{SUBJECT}", json!({}));
        check(r#"{SUBJECT,"config":{"mediaType":"c"}}"#, json!({"artifactType": "c"}));
        check(r#"{SUBJECT,"artifactType":"a","config":{"mediaType":"c"}}"#, json!({"artifactType": "a"}));
        check(r#"{SUBJECT,"annotations":{"k":"v"}}"#, json!({"annotations": {"k": "v"}}));
        assert_eq!(describe(b"{}", "m", subject), Err("a manifest without a subject".to_owned()));
    }

    #[test]
    fn merging_keeps_what_is_there_and_adds_once() {
        let entry = |digest: &str| json!({"digest": digest});
        let first = merge(None, entry("a")).unwrap().unwrap();
        let old = json!({"schemaVersion": 2, "x": 1, "manifests": [{"digest": "a", "y": 2}]}).to_string();
        let second: Value = serde_json::from_slice(&merge(Some(old.as_bytes()), entry("b")).unwrap().unwrap()).unwrap();
        assert_eq!(
            second,
            json!({"schemaVersion": 2, "x": 1, "manifests": [{"digest": "a", "y": 2}, {"digest": "b"}]})
        );
        assert_eq!(merge(Some(&first), entry("a")), Ok(None));
        assert!(merge(Some(b"[]"), entry("a")).is_err());
        assert!(merge(Some(b"{\"manifests\": 1}"), entry("a")).is_err());
    }
}

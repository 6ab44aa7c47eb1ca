//! Whom to believe about a lazy layer before it was verified: decided here, from records and labels alone.
//!
//! A lazy layer is recorded under a chain ID, which containerd computes from an image's config, and shows what its
//! index says. Until `lazuli-fused` has hashed the layer's tar stream, that it is the one that the chain ID names is the
//! word of the images that were pulled with it: their repositories *vouch* for it. Whoever else comes to the chain gets
//! it when it is verified, or when the operator trusts a repository that vouches, or a key that has signed it.

use std::{collections::BTreeSet, time::Duration};

pub use control::chains::Truth;
use control::{RemoteLayer, repository_of};
use format_spec::{Digest, PublicKey};
use serde::Deserialize;

use crate::{
    names::{Labels, SnapshotKey},
    records::{LazySnapshot, NewSnapshot, Snapshot},
    remote::{CRI_IMAGE, is_extraction},
};

/// Repositories that may vouch for one layer: bounds a record.
const VOUCHERS_MAX: usize = 16;
/// How long a call waits for a verification, unless the configuration says otherwise: as for a look at a registry.
const WAIT: Duration = Duration::from_secs(2);

/// The policy for containers of images from elsewhere before a layer is verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unverified {
    /// The layer, as its index says.
    #[default]
    Believe,
    /// Nothing: it is fetched whole and verified first.
    Wait,
}

/// The section `trust` of the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrustSettings {
    /// Repositories, or what begins them up to a slash, whose indexes are believed: `host/team` or `host/team/app`.
    #[serde(default)]
    pub repositories: Vec<String>,
    /// Ed25519 public keys whose signatures are believed, in PEM or as paths of files of such: [`read_keys`].
    ///
    /// [`read_keys`]: crate::signers::read_keys
    #[serde(default)]
    pub keys: Vec<String>,
    /// The policy for containers of other images.
    #[serde(default)]
    pub unverified: Unverified,
    /// Seconds that a call waits for a verification before containerd is told to ask again.
    pub wait_seconds: Option<u32>,
}

/// The policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trust {
    repositories: Vec<String>,
    /// Keys whose signatures are believed.
    pub keys: Vec<PublicKey>,
    /// The policy for containers of images from elsewhere.
    pub unverified: Unverified,
    /// How long a call waits for a verification.
    pub wait: Duration,
}

impl Default for Trust {
    fn default() -> Self {
        TrustSettings::default().into()
    }
}

/// Without the keys: whoever fills this in reads them.
impl From<TrustSettings> for Trust {
    fn from(settings: TrustSettings) -> Self {
        let TrustSettings { repositories, keys: _, unverified, wait_seconds } = settings;
        let wait = wait_seconds.map_or(WAIT, |seconds| Duration::from_secs(seconds.into()));
        Self { repositories, keys: Vec::new(), unverified, wait }
    }
}

impl Trust {
    /// Whether the operator believes this repository.
    pub fn includes(&self, repository: &str) -> bool {
        let begins = |known: &String| {
            let known = known.trim_end_matches('/');
            let rest = repository.strip_prefix(known).filter(|_| !known.is_empty());
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        self.repositories.iter().any(begins)
    }

    /// Whether the operator believes one of the repositories that vouch for a layer, or of the keys that signed it.
    fn believes(&self, layer: &LazySnapshot) -> bool {
        layer.vouchers().any(|repository| self.includes(repository))
            || self.keys.iter().any(|key| layer.signers.contains(&key.id().to_string()))
    }

    /// Whether somebody may be shown a lazy layer now.
    pub fn may_see(&self, asker: Asker<'_>, layer: &LazySnapshot) -> bool {
        match (&layer.truth, asker) {
            (Truth::Verified, _) => true,
            (Truth::Refused { .. }, _) => false,
            (Truth::Believed, Asker::Image(image)) => {
                layer.vouchers().any(|repository| repository == repository_of(image)) || self.believes(layer)
            }
            (Truth::Believed, Asker::UnknownImage) => self.believes(layer),
            (Truth::Believed, Asker::Container) => self.unverified == Unverified::Believe || self.believes(layer),
        }
    }
}

/// On whose behalf a snapshot is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asker<'a> {
    /// A further layer of this image.
    Image(&'a str),
    /// A further layer of an image that containerd does not name.
    UnknownImage,
    /// A container, or a view; containerd does not say of which image.
    Container,
}

impl<'a> Asker<'a> {
    /// The asker of a snapshot.
    pub fn of(new: &'a NewSnapshot) -> Self {
        Self::from_labels(&new.key, &new.labels)
    }

    /// The asker of one with this key and these labels.
    pub fn from_labels(key: &SnapshotKey, labels: &'a Labels) -> Self {
        match labels.get(CRI_IMAGE).filter(|_| is_extraction(key)) {
            Some(image) => Self::Image(image),
            None if is_extraction(key) => Self::UnknownImage,
            None => Self::Container,
        }
    }
}

/// The consequence for a snapshot of the digest of its layer's tar stream.
///
/// Source: OCI image specification, config.md, "Layer ChainID". A name that is no chain ID binds nothing and can
/// only be believed: containerd's own clients give none.
pub fn truth_under(key: &SnapshotKey, parent: Option<&SnapshotKey>, tar: &Digest) -> Truth {
    if key.as_str().parse::<Digest>().is_err() {
        return Truth::Believed;
    }
    let found = match parent {
        None => *tar,
        Some(parent) => Digest::of(format!("{parent} {tar}").as_bytes()),
    };
    if found.to_string() == key.as_str() {
        Truth::Verified
    } else {
        let chain = if parent.is_some() { format!(", which makes chain {found}") } else { String::new() };
        Truth::Refused { reason: format!("its tar stream has digest {tar}{chain}; the image's config names {key}") }
    }
}

impl LazySnapshot {
    /// The repositories whose images named this very layer for this chain.
    pub fn vouchers(&self) -> impl Iterator<Item = &str> {
        std::iter::once(repository_of(&self.layer.image)).chain(self.further_vouchers.iter().map(String::as_str))
    }

    /// Another image names the same layer for the same chain; whether that is news.
    pub(crate) fn add_voucher(&mut self, image: &str) -> bool {
        let repository = repository_of(image);
        let is_news = !self.vouchers().any(|known| known == repository) && self.further_vouchers.len() < VOUCHERS_MAX;
        is_news && self.further_vouchers.insert(repository.to_owned())
    }

    /// Another image names the layer, which it may have in another blob; whether that is news.
    pub(crate) fn add_place(&mut self, layer: &RemoteLayer) -> bool {
        let repository = repository_of(&layer.image);
        if self.named_by(&layer.image).is_some_and(|known| known.layer == layer.layer) {
            return false;
        }
        let known = self.further_places.len();
        self.further_places.retain(|place| repository_of(&place.image) != repository);
        let has_room = self.further_places.len() < VOUCHERS_MAX;
        if has_room {
            self.further_places.push(layer.clone());
        }
        has_room || self.further_places.len() < known
    }

    /// The layer as the repository of an image has named it last.
    pub(crate) fn named_by(&self, image: &str) -> Option<&RemoteLayer> {
        let mut places = self.further_places.iter().chain([&self.layer]);
        places.find(|place| repository_of(&place.image) == repository_of(image))
    }
}

/// The lazy snapshots among `parents` that `asker` may not be shown, nearest first.
pub fn objections<'a>(trust: &Trust, asker: Asker<'_>, parents: &'a [Snapshot]) -> Vec<&'a Snapshot> {
    let may_see = |snapshot: &Snapshot| snapshot.lazy.as_ref().is_none_or(|lazy| trust.may_see(asker, lazy));
    parents.iter().filter(|snapshot| !may_see(snapshot)).collect()
}

/// Repositories beside that of the first image.
pub type Vouchers = BTreeSet<String>;

#[cfg(test)]
mod tests {
    use format_spec::{IndexLocation, LazyLayer};

    use super::*;
    use crate::signers::Signers;

    fn lazy(image: &str, truth: Truth) -> LazySnapshot {
        let digest = Digest::of(b"layer");
        let index = IndexLocation { offset: 0, compressed_len: 1, plain_len: 1, digest };
        let layer = LazyLayer { blob: digest, blob_len: 1, index, hot_len: 0 };
        let layer = RemoteLayer { layer, image: image.to_owned() };
        LazySnapshot {
            layer,
            tree: digest,
            truth,
            truth_since: None,
            further_vouchers: Vouchers::new(),
            signers: Signers::new(),
            further_places: Vec::new(),
        }
    }

    #[test]
    fn before_it_is_verified_a_layer_is_for_images_of_the_repositories_that_vouch_for_it() {
        let trust = Trust::default();
        let believed = lazy("host:5000/team/app:1", Truth::Believed);
        for (asker, expected) in [
            (Asker::Image("host:5000/team/app:2"), true),
            (Asker::Image("host:5000/team/app@sha256:00"), true),
            (Asker::Image("host:5000/team/apple:1"), false),
            (Asker::Image("host:5000/team:1"), false),
            (Asker::Image("other/team/app:1"), false),
            (Asker::Image("host/team/app:1"), false),
            (Asker::Image("host:5001/team/app:1"), false),
            (Asker::Image("HOST:5000/team/app:1"), false),
            (Asker::UnknownImage, false),
            (Asker::Container, true),
        ] {
            assert_eq!(trust.may_see(asker, &believed), expected, "{asker:?}");
            assert!(trust.may_see(asker, &lazy("any/thing", Truth::Verified)), "{asker:?}");
            let refused = Truth::Refused { reason: String::new() };
            assert!(!trust.may_see(asker, &lazy("host:5000/team/app:1", refused)), "{asker:?}");
        }
        let mut vouched = believed;
        assert!(vouched.add_voucher("other/team/app:7") && !vouched.add_voucher("other/team/app:8"));
        assert!(trust.may_see(Asker::Image("other/team/app:1"), &vouched));
    }

    #[test]
    fn whom_the_operator_trusts_is_believed_by_everybody() {
        let settings =
            TrustSettings { repositories: vec!["host/team/".into(), "hub/base".into()], ..Default::default() };
        let trust = Trust { unverified: Unverified::Wait, ..settings.into() };
        for (image, expected) in [
            ("host/team/app:1", true),
            ("host/team:1", true),
            ("hub/base@sha256:00", true),
            ("host/teams/app:1", false),
            ("host:1", false),
            ("hub/based:1", false),
        ] {
            let layer = lazy(image, Truth::Believed);
            for asker in [Asker::Image("else/where:1"), Asker::UnknownImage, Asker::Container] {
                assert_eq!(trust.may_see(asker, &layer), expected, "{image} {asker:?}");
            }
        }
        let nobody = Trust { repositories: vec![String::new(), "/".into()], ..Trust::default() };
        assert!(!nobody.includes("host/team/app"));
    }

    #[test]
    fn whose_key_signed_it_is_believed_by_everybody_as_long_as_the_key_is_there() {
        const PEM: &str = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=\n-----END PUBLIC KEY-----\n";
        let keys = PublicKey::all_from_pem(PEM).unwrap();
        let mut signed = lazy("host/app:1", Truth::Believed);
        signed.signers.insert(keys[0].id().to_string());
        let refused = LazySnapshot { truth: Truth::Refused { reason: String::new() }, ..signed.clone() };
        for (keys, expected) in [(keys, true), (Vec::new(), false)] {
            let trust = Trust { keys, unverified: Unverified::Wait, ..Trust::default() };
            for asker in [Asker::Image("else/where:1"), Asker::UnknownImage, Asker::Container] {
                assert_eq!(trust.may_see(asker, &signed), expected, "{asker:?}");
                assert!(!trust.may_see(asker, &lazy("host/app:1", Truth::Believed)), "{asker:?}");
                assert!(!trust.may_see(asker, &refused), "{asker:?}");
            }
        }
    }

    #[test]
    fn one_line_makes_it_strict() {
        let trust: Trust = toml::from_str::<TrustSettings>("unverified = 'wait'").unwrap().into();
        let layer = lazy("host/app:1", Truth::Believed);
        assert!(!trust.may_see(Asker::Container, &layer));
        assert!(Trust::default().may_see(Asker::Container, &layer));
    }

    #[test]
    fn a_chain_id_binds_the_digest_of_the_tar_stream() {
        let key = |digest: &Digest| SnapshotKey::new(digest.to_string()).unwrap();
        let (one, two) = (Digest::of(b"one"), Digest::of(b"two"));
        let chain = Digest::of(format!("{one} {two}").as_bytes());
        assert_eq!(truth_under(&key(&one), None, &one), Truth::Verified);
        assert_eq!(truth_under(&key(&chain), Some(&key(&one)), &two), Truth::Verified);
        for (name, parent, tar) in [(&one, None, &two), (&chain, None, &two), (&two, Some(&one), &two)] {
            let parent = parent.map(key);
            assert!(matches!(truth_under(&key(name), parent.as_ref(), tar), Truth::Refused { .. }), "{name} {tar}");
        }
        assert_eq!(truth_under(&SnapshotKey::new("a name").unwrap(), None, &one), Truth::Believed);
    }

    #[test]
    fn only_who_unpacks_speaks_for_an_image() {
        let labels: Labels = [(CRI_IMAGE.to_owned(), "host/app:1".to_owned())].into();
        let key = |key: &str| SnapshotKey::new(key).unwrap();
        for name in ["extract-123 sha256:ab", "k8s.io/7/extract-123 sha256:ab"] {
            assert_eq!(Asker::from_labels(&key(name), &labels), Asker::Image("host/app:1"));
            assert_eq!(Asker::from_labels(&key(name), &Labels::new()), Asker::UnknownImage);
        }
        // A pod's annotations become labels of its sandbox.
        assert_eq!(Asker::from_labels(&key("k8s.io/8/0123456789abcdef"), &labels), Asker::Container);
    }
}

//! Signatures of converters over lazy layers, and the keys that make and check them (SPEC.md 8.1).
//!
//! A signature says: the index with this digest is that of the tar stream with that one. It says nothing of who may
//! see the layer or where it lies. A node that believes the key need not have the layer to believe the index.

use std::{fmt, str::FromStr};

use base64::{Engine, prelude::BASE64_STANDARD};
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};

use crate::digest::Digest;

/// Signatures of a layer, and the digest of the tar stream that they are about.
pub const SIGNATURE: &str = "containerd.io/snapshot/lazuli/signature";
/// First line of what is signed: no signature of another kind is one of this, or the reverse.
pub const CONTEXT: &str = "lazuli layer signature v1";
/// Most signatures of a layer: the annotation becomes a label, for which containerd has 4096 bytes with its name.
pub const SIGNATURES_MAX: usize = 8;

/// An Ed25519 signature (RFC 8032 5.1.6).
const SIGNATURE_LEN: usize = 64;
/// The first bytes of every Ed25519 public key as SubjectPublicKeyInfo in DER (RFC 8410 4).
const PUBLIC_KEY_START: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
const PUBLIC_KEY_LEN: usize = 32;

/// Names a public key: SHA-256 of its SubjectPublicKeyInfo in DER, as `openssl pkey -pubout -outform DER | sha256sum`
/// prints it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(Digest);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.hex())
    }
}

impl FromStr for KeyId {
    type Err = SignatureError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digest = format!("sha256:{text}").parse();
        digest.map(Self).map_err(|_| SignatureError("a key id is no 64 lower-case hex digits"))
    }
}

/// The bytes that are signed for the layer whose tar stream and index have these digests.
pub fn message(tar: &Digest, index: &Digest) -> Vec<u8> {
    format!("{CONTEXT}\n{tar}\n{index}\n").into_bytes()
}

/// One signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Signature {
    /// The key that it claims to be of.
    pub key: KeyId,
    bytes: [u8; SIGNATURE_LEN],
}

/// The content of the annotation of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerSignatures {
    /// Digest of the tar stream: the diff ID of the layer.
    pub tar: Digest,
    /// At most [`SIGNATURES_MAX`], at least one, of different keys.
    pub signatures: Vec<Signature>,
}

/// An annotation says nothing: why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SignatureError(&'static str);

impl FromStr for LayerSignatures {
    type Err = SignatureError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.split(',');
        let tar = parts.next().and_then(|tar| tar.parse().ok());
        let tar = tar.ok_or(SignatureError("it does not begin with the digest of a tar stream"))?;
        let mut signatures = Vec::new();
        for part in parts {
            if signatures.len() == SIGNATURES_MAX {
                return Err(SignatureError("there are more than 8 signatures"));
            }
            let (key, hex) = part.split_once(':').ok_or(SignatureError("a signature has no key id"))?;
            let bytes = from_hex(hex).ok_or(SignatureError("a signature is no 128 lower-case hex digits"))?;
            let signature = Signature { key: key.parse()?, bytes };
            if signatures.iter().any(|other: &Signature| other.key == signature.key) {
                return Err(SignatureError("there are two signatures of one key"));
            }
            signatures.push(signature);
        }
        match signatures.is_empty() {
            true => Err(SignatureError("there is no signature")),
            false => Ok(Self { tar, signatures }),
        }
    }
}

impl fmt::Display for LayerSignatures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.tar)?;
        self.signatures.iter().try_for_each(|Signature { key, bytes }| {
            write!(f, ",{key}:")?;
            bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
        })
    }
}

impl LayerSignatures {
    /// The ids of those `keys` of which a signature verifies for the layer with this index. It binds the layer to the
    /// tar stream [`Self::tar`] and to no other.
    pub fn verified_by<'a>(&self, index: &Digest, keys: &'a [PublicKey]) -> impl Iterator<Item = KeyId> + use<'a> {
        let message = message(&self.tar, index);
        let signatures = self.signatures.clone();
        keys.iter().filter_map(move |key| {
            let signature = signatures.iter().find(|signature| signature.key == key.id())?;
            key.verifies(&message, &signature.bytes).then(|| key.id())
        })
    }

    /// Adds signatures of `keys`; those that others made go along as far as there is room and they are about the same
    /// tar stream.
    pub fn signed(before: Option<Self>, tar: Digest, index: &Digest, keys: &[SigningKey]) -> Option<Self> {
        let message = message(&tar, index);
        let sign = |key: &SigningKey| Signature { key: key.public().id(), bytes: key.sign(&message) };
        let mut signatures: Vec<_> = keys.iter().map(sign).collect();
        for other in before.filter(|before| before.tar == tar).into_iter().flat_map(|before| before.signatures) {
            if !signatures.iter().any(|signature| signature.key == other.key) {
                signatures.push(other);
            }
        }
        signatures.truncate(SIGNATURES_MAX);
        (!signatures.is_empty()).then_some(Self { tar, signatures })
    }
}

fn from_hex(text: &str) -> Option<[u8; SIGNATURE_LEN]> {
    if text.len() != 2 * SIGNATURE_LEN {
        return None;
    }
    let nibble = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; SIGNATURE_LEN];
    for (byte, [high, low]) in bytes.iter_mut().zip(text.as_bytes().as_chunks::<2>().0) {
        *byte = nibble(*high)? << 4 | nibble(*low)?;
    }
    Some(bytes)
}

/// Text or bytes are no key: what is wrong and what was expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// There is no such block, or more than one where one is meant.
    #[error("expected one PEM block {0:?}")]
    NoBlock(&'static str),
    /// A block begins and does not end, or holds something else than base64.
    #[error("a PEM block {0:?} is damaged")]
    Damaged(&'static str),
    /// The key is of another kind.
    #[error("it is no Ed25519 public key; `openssl pkey -in KEYFILE -pubout` writes one")]
    NotPublic,
    /// The key is of another kind, or has a passphrase.
    #[error("it is no Ed25519 private key without passphrase; `openssl genpkey -algorithm ed25519` makes one")]
    NotPrivate,
    /// Somebody gave away what he should keep.
    #[error("it is a private key, and a public one is wanted: `openssl pkey -in KEYFILE -pubout` writes it")]
    Private,
}

const PUBLIC_LABEL: &str = "PUBLIC KEY";
const PRIVATE_LABEL: &str = "PRIVATE KEY";

/// The contents of all PEM blocks (RFC 7468) with this label.
fn pem_blocks(text: &str, label: &'static str) -> Result<Vec<Vec<u8>>, KeyError> {
    let (begin, end) = (format!("-----BEGIN {label}-----"), format!("-----END {label}-----"));
    let parts = text.split(&begin).skip(1);
    let decode = |part: &str| {
        let (body, _) = part.split_once(&end)?;
        let body: String = body.split_ascii_whitespace().collect();
        BASE64_STANDARD.decode(body).ok()
    };
    parts.map(|part| decode(part).ok_or(KeyError::Damaged(label))).collect()
}

/// An Ed25519 public key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey {
    bytes: [u8; PUBLIC_KEY_LEN],
}

impl PublicKey {
    /// All keys in a text of PEM blocks, at least one.
    ///
    /// # Errors
    ///
    /// When there is none, or one is no Ed25519 public key as SubjectPublicKeyInfo.
    pub fn all_from_pem(text: &str) -> Result<Vec<Self>, KeyError> {
        let blocks = pem_blocks(text, PUBLIC_LABEL)?;
        if blocks.is_empty() {
            return Err(match text.contains(&format!("{PRIVATE_LABEL}-----")) {
                true => KeyError::Private,
                false => KeyError::NoBlock(PUBLIC_LABEL),
            });
        }
        blocks.iter().map(|block| Self::from_der(block)).collect()
    }

    fn from_der(der: &[u8]) -> Result<Self, KeyError> {
        let bytes = der.strip_prefix(&PUBLIC_KEY_START).and_then(|bytes| bytes.try_into().ok());
        bytes.map(|bytes| Self { bytes }).ok_or(KeyError::NotPublic)
    }

    /// Its name.
    pub fn id(&self) -> KeyId {
        KeyId(Digest::of(&[&PUBLIC_KEY_START[..], &self.bytes].concat()))
    }

    fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ED25519, &self.bytes).verify(message, signature).is_ok()
    }
}

/// An Ed25519 private key. It never shows itself.
pub struct SigningKey {
    pair: Ed25519KeyPair,
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey({})", self.public().id())
    }
}

impl SigningKey {
    /// The key in PKCS#8 (RFC 5958, RFC 8410), as one PEM block or as DER.
    ///
    /// # Errors
    ///
    /// When it is none, of another kind, or has a passphrase.
    pub fn from_pkcs8(bytes: &[u8]) -> Result<Self, KeyError> {
        let text = std::str::from_utf8(bytes).ok().filter(|text| text.contains("-----BEGIN "));
        let der = match text {
            None => bytes.to_vec(),
            // A passphrase has a label of its own.
            Some(text) => match pem_blocks(text, PRIVATE_LABEL)?.as_slice() {
                [der] => der.clone(),
                [] => return Err(KeyError::NotPrivate),
                _ => return Err(KeyError::NoBlock(PRIVATE_LABEL)),
            },
        };
        // openssl leaves the public key out, which is computed then.
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(&der).map_err(|_| KeyError::NotPrivate)?;
        Ok(Self { pair })
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        let bytes = self.pair.public_key().as_ref().try_into().expect("an Ed25519 public key has 32 bytes");
        PublicKey { bytes }
    }

    fn sign(&self, message: &[u8]) -> [u8; SIGNATURE_LEN] {
        self.pair.sign(message).as_ref().try_into().expect("an Ed25519 signature has 64 bytes")
    }
}

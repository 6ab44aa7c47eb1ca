//! Signatures over lazy layers: made where a conversion has compared a layer, told where one is looked at.
//!
//! SPEC.md 8.1 says what is signed, and what it means to a node; the keys are those of `format_spec::signature`.

use std::{
    fmt,
    io::{self, Read},
    path::{Path, PathBuf},
};

use format_spec::{
    Digest, LayerSignatures, LazyLayer, PublicKey, SigningKey,
    signature::{KeyError, SIGNATURE, SignatureError},
};
use serde::Serialize;

use crate::image::manifest::Descriptor;

/// Longest file of keys that is read, in bytes: some hundred keys.
const KEY_FILE_LEN_MAX: u64 = 64 << 10;

/// A file of keys cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("key {}: {problem}", path.display())]
pub struct KeyFileError {
    path: PathBuf,
    problem: KeyProblem,
}

#[derive(Debug, thiserror::Error)]
enum KeyProblem {
    #[error(transparent)]
    Read(io::Error),
    #[error("it is longer than {KEY_FILE_LEN_MAX} bytes")]
    TooLong,
    #[error("it is no text")]
    NoText,
    #[error(transparent)]
    Key(#[from] KeyError),
}

/// The Ed25519 private key in a file, as `openssl genpkey -algorithm ed25519` writes it in PEM or DER.
///
/// # Errors
///
/// When the file cannot be read, or is no such key.
pub fn read_signing_key(path: &Path) -> Result<SigningKey, KeyFileError> {
    let key = read(path).and_then(|bytes| Ok(SigningKey::from_pkcs8(&bytes)?));
    key.map_err(|problem| KeyFileError { path: path.to_owned(), problem })
}

/// The Ed25519 public keys in a file of PEM blocks, as `openssl pkey -pubout` writes them; at least one.
///
/// # Errors
///
/// When the file cannot be read, or has none, or one of another kind.
pub fn read_public_keys(path: &Path) -> Result<Vec<PublicKey>, KeyFileError> {
    let text = read(path).and_then(|bytes| String::from_utf8(bytes).map_err(|_| KeyProblem::NoText));
    let keys = text.and_then(|text| Ok(PublicKey::all_from_pem(&text)?));
    keys.map_err(|problem| KeyFileError { path: path.to_owned(), problem })
}

fn read(path: &Path) -> Result<Vec<u8>, KeyProblem> {
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(KeyProblem::Read)?;
    file.take(KEY_FILE_LEN_MAX + 1).read_to_end(&mut bytes).map_err(KeyProblem::Read)?;
    if bytes.len() as u64 > KEY_FILE_LEN_MAX { Err(KeyProblem::TooLong) } else { Ok(bytes) }
}

/// The signatures that the descriptor of a layer names; `None` without the annotation.
pub(crate) fn signatures_of(descriptor: &Descriptor) -> Option<Result<LayerSignatures, SignatureError>> {
    descriptor.annotation(SIGNATURE).map(str::parse)
}

/// Adds signatures of `keys` to the descriptor of a layer, which must have been compared with its diff ID.
pub(crate) fn sign(descriptor: &mut Descriptor, layer: &LazyLayer, diff_id: Digest, keys: &[SigningKey]) {
    if keys.is_empty() {
        return;
    }
    let before = signatures_of(descriptor).and_then(Result::ok);
    if let Some(signed) = LayerSignatures::signed(before, diff_id, &layer.index.digest, keys) {
        let annotations = descriptor.annotations.get_or_insert_default();
        annotations.insert(SIGNATURE.to_owned(), signed.to_string());
    }
}

/// A signature of a layer, as it is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SignatureFacts {
    /// Id of the key that it claims to be of.
    pub key: String,
    /// Whether it verifies; `None` where that key was not given.
    pub is_verified: Option<bool>,
}

impl fmt::Display for SignatureFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = match self.is_verified {
            None => "not verified",
            Some(true) => "verified",
            Some(false) => "WRONG",
        };
        write!(f, "{} ({verdict})", self.key)
    }
}

/// The signatures of a layer with this index, held against `keys`.
pub(crate) fn signature_facts(signed: &LayerSignatures, index: &Digest, keys: &[PublicKey]) -> Vec<SignatureFacts> {
    let verified: Vec<_> = signed.verified_by(index, keys).collect();
    let facts = |key: format_spec::KeyId| {
        let is_given = keys.iter().any(|given| given.id() == key);
        SignatureFacts { key: key.to_string(), is_verified: is_given.then(|| verified.contains(&key)) }
    };
    signed.signatures.iter().map(|signature| facts(signature.key)).collect()
}

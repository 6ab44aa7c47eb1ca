//! Keys of converters that the operator believes, and which of them have signed a layer for a chain (SPEC.md 8.1).

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, Read},
    path::Path,
};

use format_spec::{
    LayerSignatures, PublicKey,
    signature::{KeyError, SIGNATURE},
};

use crate::{
    names::{Labels, SnapshotKey},
    remote::RemoteRequest,
    trust::{Truth, truth_under},
};

/// Longest file of keys that is read, in bytes.
const KEY_FILE_LEN_MAX: u64 = 64 << 10;

/// Ids of keys.
pub type Signers = BTreeSet<String>;

/// An entry under `trust.keys` cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("trust.keys, entry {number}{}: {problem}", .file.as_ref().map_or(String::new(), |file| format!(", {file}")))]
pub struct KeysError {
    number: usize,
    file: Option<String>,
    problem: KeyProblem,
}

#[derive(Debug, thiserror::Error)]
enum KeyProblem {
    #[error(transparent)]
    Read(io::Error),
    #[error("it is longer than {KEY_FILE_LEN_MAX} bytes")]
    TooLong,
    #[error("it is neither a PEM block nor the absolute path of a file with some")]
    Neither,
    #[error(transparent)]
    Key(#[from] KeyError),
}

/// The keys of these entries: each the absolute path of a file of PEM blocks, or such blocks themselves.
///
/// # Errors
///
/// When a file cannot be read, or something is no Ed25519 public key.
pub fn read_keys(entries: &[String]) -> Result<Vec<PublicKey>, KeysError> {
    let mut keys = Vec::new();
    for (number, entry) in (1..).zip(entries) {
        let is_inline = entry.contains("-----BEGIN ");
        let read = match is_inline {
            true => PublicKey::all_from_pem(entry).map_err(Into::into),
            false => read_key_file(Path::new(entry)),
        };
        let file = (!is_inline).then(|| entry.escape_debug().to_string());
        keys.extend(read.map_err(|problem| KeysError { number, file, problem })?);
    }
    Ok(keys)
}

fn read_key_file(path: &Path) -> Result<Vec<PublicKey>, KeyProblem> {
    if !path.is_absolute() {
        return Err(KeyProblem::Neither);
    }
    let mut text = String::new();
    let file = File::open(path).map_err(KeyProblem::Read)?;
    file.take(KEY_FILE_LEN_MAX + 1).read_to_string(&mut text).map_err(KeyProblem::Read)?;
    if text.len() as u64 > KEY_FILE_LEN_MAX {
        return Err(KeyProblem::TooLong);
    }
    Ok(PublicKey::all_from_pem(&text)?)
}

/// The `keys` that have signed the requested layer for the requested chain on `parent`.
///
/// # Errors
///
/// One line: why the signatures that the labels bring say nothing. Without labels or without keys there is nothing to
/// say.
pub(crate) fn signers(
    keys: &[PublicKey],
    labels: &Labels,
    request: &RemoteRequest,
    parent: Option<&SnapshotKey>,
) -> Result<Signers, String> {
    let Some(text) = labels.get(SIGNATURE).filter(|_| !keys.is_empty()) else { return Ok(Signers::new()) };
    let signed: LayerSignatures = text.parse().map_err(|error| format!("it is none: {error}"))?;
    // The tar stream is signed. That it is the one of this chain is computed, whatever the labels say.
    if truth_under(&request.target, parent, &signed.tar) != Truth::Verified {
        return Err(format!("it is about the tar stream {}, the image's config names another", signed.tar));
    }
    let signers: Signers =
        signed.verified_by(&request.layer.layer.index.digest, keys).map(|key| key.to_string()).collect();
    if signers.is_empty() {
        let claimed: Vec<_> = signed.signatures.iter().map(|signature| signature.key.to_string()).collect();
        return Err(format!("none of a key under trust.keys verifies, they name {}", claimed.join(", ")));
    }
    Ok(signers)
}

#[cfg(test)]
mod tests {
    use control::RemoteLayer;
    use format_spec::{Digest, IndexLocation, LazyLayer, SigningKey};

    use super::*;

    const START: [u8; 16] =
        [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];

    fn key(secret: u8) -> SigningKey {
        SigningKey::from_pkcs8(&[&START[..], &[secret; 32]].concat()).unwrap()
    }

    fn request(target: &Digest, index: &str) -> RemoteRequest {
        let digest = Digest::of(index.as_bytes());
        let index = IndexLocation { offset: 0, compressed_len: 1, plain_len: 1, digest };
        let layer = LazyLayer { blob: digest, blob_len: 9, index, hot_len: 0 };
        let target = SnapshotKey::new(target.to_string()).unwrap();
        RemoteRequest { target, layer: RemoteLayer { layer, image: "host/app:1".to_owned() } }
    }

    /// Whoever writes a manifest may take any signature that he has seen, and put it anywhere.
    #[test]
    fn a_signature_that_was_moved_says_nothing() {
        let (base, tar, other) = (Digest::of(b"base"), Digest::of(b"tar"), Digest::of(b"other"));
        let chain = |below: &Digest, tar: &Digest| Digest::of(format!("{below} {tar}").as_bytes());
        let parent = |digest: &Digest| SnapshotKey::new(digest.to_string());
        let keys = [key(1).public()];
        let id = keys[0].id().to_string();
        let signed = |secret| {
            let index = Digest::of(b"index");
            LayerSignatures::signed(None, tar, &index, &[key(secret)]).unwrap().to_string()
        };
        let found = |text: &str, request: RemoteRequest, parent: Option<SnapshotKey>| {
            let labels: Labels = [(SIGNATURE.to_owned(), text.to_owned())].into();
            signers(&keys, &labels, &request, parent.as_ref())
        };
        let good = signed(1);
        let expected = Ok(Signers::from([id.clone()]));
        assert_eq!(found(&good, request(&tar, "index"), None), expected);
        assert_eq!(found(&good, request(&chain(&base, &tar), "index"), parent(&base)), expected);
        for (what, text, request, parent) in [
            ("another index", &good, request(&tar, "another"), None),
            ("another chain", &good, request(&other, "index"), None),
            ("another place in the chain", &good, request(&tar, "index"), parent(&base)),
            ("another layer below", &good, request(&chain(&base, &tar), "index"), parent(&other)),
            ("another tar stream", &good.replace(&tar.hex(), &other.hex()), request(&other, "index"), None),
            ("another key", &signed(2), request(&tar, "index"), None),
            (
                "another key's id",
                &signed(2).replace(&key(2).public().id().to_string(), &id),
                request(&tar, "index"),
                None,
            ),
            ("no signature", &"yes".to_owned(), request(&tar, "index"), None),
        ] {
            let said = found(text, request, parent).unwrap_err();
            assert!(!said.contains('\n'), "{what}: {said}");
        }
        // A name that is no chain ID binds no tar stream.
        let named = RemoteRequest { target: SnapshotKey::new("name").unwrap(), ..request(&tar, "index") };
        assert!(found(&good, named, None).is_err());
        // A node without keys has nothing to complain about; keys of annotations are compared letter by letter.
        let labels: Labels = [(SIGNATURE.to_owned(), "yes".to_owned())].into();
        assert_eq!(signers(&[], &labels, &request(&tar, "index"), None), Ok(Signers::new()));
        let labels: Labels = [(SIGNATURE.to_uppercase(), good.clone()), (format!("{SIGNATURE} "), good)].into();
        assert_eq!(signers(&keys, &labels, &request(&tar, "index"), None), Ok(Signers::new()));
    }

    #[test]
    fn keys_stand_in_the_configuration_or_in_files_and_others_are_refused_in_one_line() {
        const PEM: &str = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=\n-----END PUBLIC KEY-----\n";
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &[u8]| {
            std::fs::write(directory.path().join(name), content).unwrap();
            directory.path().join(name).display().to_string()
        };
        let keys = read_keys(&[PEM.to_owned(), file("two", PEM.repeat(2).as_bytes())]).unwrap();
        assert_eq!((keys.len(), keys[0] == keys[2]), (3, true));
        let private = PEM.replace("PUBLIC", "PRIVATE");
        for (entry, expected) in [
            (directory.path().join("none").display().to_string(), "No such file"),
            (directory.path().display().to_string(), "directory"),
            ("keys/one.pem".to_owned(), "neither a PEM block nor the absolute path"),
            (String::new(), "neither a PEM block nor the absolute path"),
            (file("empty", b""), "expected one PEM block \"PUBLIC KEY\""),
            (file("binary", &[0xff; 9]), "UTF-8"),
            (file("long", &[b' '; 70_000]), "longer than 65536 bytes"),
            (file("private", private.as_bytes()), "it is a private key"),
            (private.clone(), "it is a private key"),
        ] {
            let error = read_keys(&[PEM.to_owned(), entry.clone()]).unwrap_err().to_string();
            assert!(error.starts_with("trust.keys, entry 2") && error.contains(expected), "{error}");
            assert!(!error.contains('\n') && !error.contains("MCow"), "{error}");
        }
    }
}

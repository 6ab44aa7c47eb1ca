//! Signatures of layers: the example of the specification, which openssl has made, and everything that is no signature.

use format_spec::{
    Digest, LayerSignatures, PublicKey, SigningKey,
    signature::{KeyError, SIGNATURES_MAX, message},
};

const SPEC: &str = include_str!("../../SPEC.md");

/// The blocks of the example in SPEC.md 8.1: public key, signed bytes, annotation.
fn example() -> [&'static str; 3] {
    let section = SPEC.split("### 8.1 Signatures").nth(1).unwrap();
    let mut blocks = section.split("```").skip(1).step_by(2);
    [(); 3].map(|()| blocks.next().unwrap().strip_prefix('\n').unwrap())
}

/// A key from its secret bytes, in PKCS#8 as openssl writes it.
fn signing_key(secret: &[u8; 32]) -> SigningKey {
    let start = [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];
    SigningKey::from_pkcs8(&[&start[..], secret].concat()).unwrap()
}

fn example_key() -> SigningKey {
    let secret = SPEC.split("whose secret is `").nth(1).unwrap();
    let byte = |at: usize| u8::from_str_radix(&secret[2 * at..2 * at + 2], 16).unwrap();
    signing_key(&std::array::from_fn(byte))
}

fn sign(tar: &str, index: &str, keys: &[SigningKey]) -> LayerSignatures {
    LayerSignatures::signed(None, Digest::of(tar.as_bytes()), &Digest::of(index.as_bytes()), keys).unwrap()
}

#[test]
fn the_example_of_the_specification_verifies_and_is_made_again() {
    let [public, signed, annotation] = example();
    let keys = PublicKey::all_from_pem(public).unwrap();
    let signatures: LayerSignatures = annotation.trim_end().parse().unwrap();
    let index: Digest = signed.lines().nth(2).unwrap().parse().unwrap();
    assert_eq!(message(&signatures.tar, &index), signed.as_bytes());
    assert_eq!(signatures.verified_by(&index, &keys).collect::<Vec<_>>(), [keys[0].id()]);
    let key = example_key();
    assert_eq!(key.public(), keys[0]);
    let made = LayerSignatures::signed(None, signatures.tar, &index, &[key]).unwrap();
    assert_eq!(made.to_string(), annotation.trim_end());
}

#[test]
fn a_signature_is_about_one_tar_stream_one_index_and_one_key() {
    let (key, other) = (example_key(), signing_key(&[7; 32]));
    let signatures = sign("tar", "index", &[key]);
    let index = Digest::of(b"index");
    let keys = [example_key().public(), other.public()];
    assert_eq!(signatures.verified_by(&index, &keys).count(), 1);
    assert_eq!(signatures.verified_by(&Digest::of(b"another"), &keys).count(), 0);
    assert_eq!(signatures.verified_by(&index, &keys[1..]).count(), 0);
    let of_another = LayerSignatures { tar: Digest::of(b"another"), ..signatures.clone() };
    assert_eq!(of_another.verified_by(&index, &keys).count(), 0);
    // Under the id of another key.
    let text = signatures.to_string().replace(&keys[0].id().to_string(), &keys[1].id().to_string());
    assert_eq!(text.parse::<LayerSignatures>().unwrap().verified_by(&index, &keys).count(), 0);
    // A changed bit.
    let text = signatures.to_string();
    let last = if text.ends_with('0') { "1" } else { "0" };
    let changed = format!("{}{last}", &text[..text.len() - 1]);
    assert_eq!(changed.parse::<LayerSignatures>().unwrap().verified_by(&index, &keys).count(), 0);
}

#[test]
fn old_and_new_key_sign_side_by_side_as_far_as_there_is_room() {
    let (tar, index) = (Digest::of(b"tar"), Digest::of(b"index"));
    let keys: Vec<SigningKey> = (0..=u8::try_from(SIGNATURES_MAX).unwrap()).map(|n| signing_key(&[n; 32])).collect();
    let ids: Vec<_> = keys.iter().map(|key| key.public().id()).collect();
    let public: Vec<PublicKey> = keys.iter().map(SigningKey::public).collect();
    let before = LayerSignatures::signed(None, tar, &index, &keys[..SIGNATURES_MAX]).unwrap();
    let after = LayerSignatures::signed(Some(before), tar, &index, &keys[SIGNATURES_MAX..]).unwrap();
    let read: LayerSignatures = after.to_string().parse().unwrap();
    assert_eq!(read, after);
    let verified: Vec<_> = read.verified_by(&index, &public).collect();
    assert_eq!(verified, [&ids[..SIGNATURES_MAX - 1], &ids[SIGNATURES_MAX..]].concat());
    assert!(after.to_string().len() < 4096 - format_spec::signature::SIGNATURE.len(), "a label of containerd");
    // Once is enough for each key, and another tar stream has signatures of its own.
    let again = LayerSignatures::signed(Some(after.clone()), tar, &index, &keys[SIGNATURES_MAX..]).unwrap();
    assert_eq!(again, after);
    let other = LayerSignatures::signed(Some(after), Digest::of(b"other"), &index, &keys[..1]).unwrap();
    assert_eq!(other.signatures.len(), 1);
    assert_eq!(LayerSignatures::signed(None, tar, &index, &[]), None);
}

#[test]
fn what_is_no_signature_is_refused() {
    let good = sign("tar", "index", &[example_key()]).to_string();
    assert!(good.parse::<LayerSignatures>().is_ok());
    let (tar, signature) = good.split_once(',').unwrap();
    let nine = (0..9).map(|number| format!(",{}{}", format!("{number:02}").repeat(32), &signature[64..]));
    for bad in [
        String::new(),
        tar.to_owned(),
        format!("{tar},"),
        signature.to_owned(),
        format!("{good},"),
        format!("{good},{signature}"),
        format!(" {good}"),
        format!("{good} "),
        good.to_uppercase(),
        format!("{tar},{}", signature.to_uppercase()),
        good.replace(':', ""),
        good[..good.len() - 1].to_owned(),
        format!("{good}0"),
        format!("{tar}{}", nine.collect::<String>()),
    ] {
        assert!(bad.parse::<LayerSignatures>().is_err(), "{bad}");
    }
}

#[test]
fn keys_are_read_as_openssl_writes_them_and_others_are_refused_with_the_reason() {
    let [public, ..] = example();
    let two = PublicKey::all_from_pem(&format!("old key\n{public}\nnew key\n{}", public.replace('\n', "\r\n")));
    assert_eq!(two.unwrap().len(), 2);
    let private = public.replace("PUBLIC", "PRIVATE");
    let curve = "-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE\n-----END PUBLIC KEY-----";
    for (text, expected) in [
        ("", KeyError::NoBlock("PUBLIC KEY")),
        ("-----BEGIN PUBLIC KEY-----\nMCow", KeyError::Damaged("PUBLIC KEY")),
        ("-----BEGIN PUBLIC KEY-----\n?\n-----END PUBLIC KEY-----", KeyError::Damaged("PUBLIC KEY")),
        (curve, KeyError::NotPublic),
        (&private, KeyError::Private),
    ] {
        assert_eq!(PublicKey::all_from_pem(text), Err(expected), "{text}");
    }
    for text in
        ["", public, &private, "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMCow\n-----END ENCRYPTED PRIVATE KEY-----"]
    {
        assert_eq!(SigningKey::from_pkcs8(text.as_bytes()).unwrap_err(), KeyError::NotPrivate, "{text}");
    }
    // Nothing of a private key gets into a log.
    assert_eq!(format!("{:?}", example_key()), format!("SigningKey({})", example_key().public().id()));
}

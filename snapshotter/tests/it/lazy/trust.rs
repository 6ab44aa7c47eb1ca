//! Whom the daemon believes: signatures, images that race, restarts in between, and what it says of chains.

use control::{
    chains::{ChainStatus, Truth},
    root::CHAINS,
};
use format_spec::{LayerSignatures, PublicKey, SigningKey, signature::SIGNATURE};

use super::*;

const PUBLIC: &str = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=\n-----END PUBLIC KEY-----\n";
const PRIVATE: &str = "MC4CAQAwBQYDK2VwBCIEIJ1hsZ3v/VpguoRK9JLsLMREScVpezJpGXA7rAMcrn9g";

fn signing_key() -> SigningKey {
    let label = "PRIVATE KEY";
    SigningKey::from_pkcs8(format!("-----BEGIN {label}-----\n{PRIVATE}\n-----END {label}-----\n").as_bytes()).unwrap()
}

/// The labels of the layer `name` for a chain, with a signature for the tar stream `tar`.
fn signed_labels(name: &str, chain: &str, tar: Digest) -> HashMap<String, String> {
    let mut labels = labels_of(name, chain, "elsewhere/app:1");
    let index = remote(name).layer.index.digest;
    let signed = LayerSignatures::signed(None, tar, &index, &[signing_key()]).unwrap();
    labels.insert(SIGNATURE.to_owned(), signed.to_string());
    labels
}

/// A strict daemon that knows the key.
async fn start_strict(trust: &str) -> (Daemon, Fused) {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("node.toml"), format!("[trust]\nunverified = 'wait'\nwait_seconds = 0\n{trust}"))
        .unwrap();
    let fused = Fused::start(directory.path(), Vec::new());
    (Daemon::start_in(directory).await, fused)
}

fn known_key() -> String {
    format!("keys = ['''{PUBLIC}''']\n")
}

fn chains_of(daemon: &Daemon) -> Vec<ChainStatus> {
    ChainStatus::read(&daemon.root().join(CHAINS)).unwrap()
}

async fn wait_for_chains(daemon: &Daemon, is_there: impl Fn(&[ChainStatus]) -> bool) -> Vec<ChainStatus> {
    for _ in 0..1000 {
        let chains = chains_of(daemon);
        if is_there(&chains) {
            return chains;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{:?}", chains_of(daemon));
}

#[tokio::test]
async fn in_strict_mode_a_signed_image_starts_before_it_is_verified_and_the_same_unsigned_waits() {
    for (trust, is_signed, starts) in
        [(known_key(), true, true), (known_key(), false, false), (String::new(), true, false)]
    {
        let (daemon, fused) = start_strict(&trust).await;
        let (tar, chain, above) = chains();
        let upper = Digest::of(b"above");
        for (name, chain, parent, tar) in [("base", &chain, "", tar), ("above", &above, chain.as_str(), upper)] {
            let mut labels = signed_labels(name, chain, tar);
            if !is_signed {
                labels.remove(SIGNATURE);
            }
            assert_eq!(
                code(daemon.prepare_with(&format!("extract {name}"), parent, labels).await),
                Code::AlreadyExists
            );
        }
        let started = daemon.prepare("container", &above).await;
        assert_eq!(started.is_ok(), starts, "{trust} {is_signed}: {started:?}");
        if starts {
            // The record says so, not the process.
            let daemon = daemon.restarted(Signal::KILL).await;
            assert!(daemon.prepare("another", &above).await.is_ok());
            assert!(!fused.take_asked().iter().any(|asked| matches!(asked, Request::Verify { .. })), "fetched whole");
            let said = wait_for_chains(&daemon, |chains| chains.len() == 2).await;
            let id = PublicKey::all_from_pem(PUBLIC).unwrap()[0].id().to_string();
            assert!(
                said.iter().all(|chain| chain.truth == Truth::Believed && chain.signed_by == [id.clone()]),
                "{said:?}"
            );
            // A key that is taken away is believed no longer, whatever it has signed.
            fs::write(daemon.directory.path().join("node.toml"), "[trust]\nunverified = 'wait'\nwait_seconds = 0\n")
                .unwrap();
            let daemon = daemon.restarted(Signal::TERM).await;
            assert_eq!(code(daemon.prepare("third", &above).await), Code::Unavailable);
            // The truth is found out all the same, and goes over every signature.
            fused.hashed("above", Digest::of(b"another tar stream"));
            wait_for_chains(&daemon, |chains| chains.iter().any(|chain| matches!(chain.truth, Truth::Refused { .. })))
                .await;
            assert_eq!(code(daemon.prepare("fourth", &above).await), Code::FailedPrecondition);
        }
    }
}

#[tokio::test]
async fn a_signature_of_another_layer_index_or_chain_starts_nothing() {
    let (daemon, _fused) = start_strict(&known_key()).await;
    let (tar, chain, _) = chains();
    let other = Digest::of(b"other");
    for (number, (name, target, signature)) in [
        ("another index", &chain, signed_labels("base", &chain, tar)),
        ("another chain", &other.to_string(), signed_labels("another chain", &chain, tar)),
    ]
    .into_iter()
    .enumerate()
    {
        let mut labels = labels_of(name, target, "elsewhere/app:1");
        labels.insert(SIGNATURE.to_owned(), signature[SIGNATURE].clone());
        let prepared = daemon.prepare_with(&format!("extract {number}"), "", labels).await;
        assert_eq!(code(prepared), Code::AlreadyExists, "{name}");
        assert_eq!(code(daemon.prepare(&format!("container {number}"), target).await), Code::Unavailable, "{name}");
    }
}

/// The first image had none, or it was wrong: nobody has to pull it anew.
#[tokio::test]
async fn a_signature_that_comes_with_a_later_image_counts() {
    let (daemon, _fused) = start_strict(&known_key()).await;
    let (tar, chain, _) = chains();
    let unsigned = labels_of("base", &chain, "elsewhere/app:1");
    assert_eq!(code(daemon.prepare_with("extract 1", "", unsigned).await), Code::AlreadyExists);
    assert_eq!(code(daemon.prepare("early", &chain).await), Code::Unavailable);
    let signed = signed_labels("base", &chain, tar);
    assert_eq!(code(daemon.prepare_with("extract 2", "", signed).await), Code::AlreadyExists);
    assert!(daemon.prepare("late", &chain).await.is_ok());
}

/// A container's labels are whatever its pod says.
#[tokio::test]
async fn a_signature_in_the_labels_of_a_container_says_nothing() {
    let (daemon, _fused) = start_strict(&known_key()).await;
    let (tar, chain, _) = chains();
    let unsigned = labels_of("base", &chain, "elsewhere/app:1");
    assert_eq!(code(daemon.prepare_with("extract 1", "", unsigned).await), Code::AlreadyExists);
    let refused = daemon.prepare_with("k8s.io/4/0123abcd", &chain, signed_labels("base", &chain, tar)).await;
    assert_eq!(code(refused), Code::Unavailable);
}

#[tokio::test]
async fn of_two_images_that_claim_a_chain_at_the_same_moment_one_is_lazy() {
    let (daemon, _fused) = start().await;
    let images = 8;
    for round in 0..3 {
        let chain = Digest::of(format!("chain {round}").as_bytes()).to_string();
        let prepared = (0..images).map(|image| {
            let labels = labels_of(&format!("layer {image}"), &chain, &format!("host/tenant-{image}:1"));
            let key = format!("ns{image}/{round}/extract-{image} {chain}");
            let daemon = &daemon;
            async move { daemon.prepare_with(&key, "", labels).await }
        });
        let answers: Vec<_> = futures_util::future::join_all(prepared).await;
        let lazy: Vec<_> = (0..images).filter(|image| answers[*image].is_err()).collect();
        assert_eq!(lazy.len(), 1, "{answers:?}");
        for answer in answers {
            match answer {
                Ok(mount) => assert_eq!(mount.r#type, "bind"),
                Err(status) => assert_eq!(status.code(), Code::AlreadyExists, "{status}"),
            }
        }
        let said = wait_for_chains(&daemon, |chains| chains.iter().any(|known| known.chain == chain)).await;
        let said = said.iter().find(|known| known.chain == chain).unwrap();
        assert_eq!(
            (said.image.clone(), said.layer),
            (format!("host/tenant-{}:1", lazy[0]), remote(&format!("layer {}", lazy[0])).layer.id())
        );
    }
}

#[tokio::test]
async fn a_restart_between_commit_and_verdict_loses_neither() {
    for signal in [Signal::KILL, Signal::TERM] {
        let (daemon, fused) = start().await;
        let (_, chain, _) = chains();
        let evil = labels_of("evil", &chain, "evil/trap:1");
        assert_eq!(code(daemon.prepare_with("extract-1 x", "", evil).await), Code::AlreadyExists);
        let daemon = daemon.restarted(signal).await;
        // Another image still does not get it, and the verdict is asked for without anybody.
        let honest = labels_of("honest", &chain, "host/good:1");
        assert_eq!(daemon.prepare_with("extract-2 x", "", honest).await.unwrap().r#type, "bind");
        fused.hashed("evil", Digest::of(b"another tar stream"));
        wait_for_chains(&daemon, |chains| chains.iter().any(|chain| matches!(chain.truth, Truth::Refused { .. })))
            .await;
        assert_eq!(code(daemon.prepare("container", &chain).await), Code::FailedPrecondition);
    }
}

#[tokio::test]
async fn of_each_chain_it_says_what_is_known_since_when_and_who_waits() {
    let (daemon, fused) = start_strict("").await;
    let (tar, chain, above) = chains();
    let base = labels_of("base", &chain, "host/app:1");
    assert_eq!(code(daemon.prepare_with("extract-1 x", "", base).await), Code::AlreadyExists);
    let upper = labels_of("above", &above, "host/app:1");
    assert_eq!(code(daemon.prepare_with("extract-2 x", &chain, upper).await), Code::AlreadyExists);
    let said = wait_for_chains(&daemon, |chains| chains.len() == 2).await;
    let of = |said: &[ChainStatus], name: &str| said.iter().find(|known| known.chain == name).unwrap().clone();
    assert_eq!((of(&said, &chain).truth, of(&said, &chain).waited_for_since), (Truth::Believed, None));
    assert!(of(&said, &chain).since > 1_600_000_000);
    assert_eq!(code(daemon.prepare("container", &above).await), Code::Unavailable);
    let said = wait_for_chains(&daemon, |chains| chains.iter().all(|known| known.waited_for_since.is_some())).await;
    assert!(of(&said, &above).waited_for_since >= Some(of(&said, &above).since));
    fused.hashed("base", tar);
    fused.hashed("above", tar);
    let said = wait_for_chains(&daemon, |chains| chains.iter().all(|known| known.truth != Truth::Believed)).await;
    assert_eq!((of(&said, &chain).truth, of(&said, &chain).waited_for_since), (Truth::Verified, None));
    let found = Digest::of(format!("{chain} {tar}").as_bytes());
    let reason =
        format!("its tar stream has digest {tar}, which makes chain {found}; the image's config names {above}");
    assert_eq!(of(&said, &above).truth, Truth::Refused { reason });
    // A chain that is gone is not spoken of.
    daemon.remove(&above).await.unwrap();
    wait_for_chains(&daemon, |chains| chains.len() == 1).await;
}

//! The chains of lazy layers, with what is known of them, in a file for `lazuli status`; and who waits for what.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use control::{chains::ChainStatus, root::CHAINS};
use tracing::warn;

use crate::{names::SnapshotKey, not_lazy::replace, records::Snapshot, trust::Truth};

/// A client that has not asked for so long waits no longer: a kubelet asks every five minutes at the least.
const WAITS_FOR: Duration = Duration::from_secs(600);

/// The file, and what does not stand in records. Nothing depends on either after a crash.
#[derive(Debug)]
pub(crate) struct Chains {
    path: PathBuf,
    written: Mutex<Option<Vec<ChainStatus>>>,
    waited_for: Mutex<HashMap<SnapshotKey, Wait>>,
}

#[derive(Debug, Clone, Copy)]
struct Wait {
    /// In seconds since 1970.
    since: i64,
    last: Instant,
}

impl Chains {
    /// Those of a root directory.
    pub(crate) fn new(root: &Path) -> Self {
        Self { path: root.join(CHAINS), written: Mutex::default(), waited_for: Mutex::default() }
    }

    /// Somebody waits for the verification of a chain, at this time in seconds since 1970.
    pub(crate) fn wait_for(&self, chain: &SnapshotKey, now: i64) {
        let last = Instant::now();
        self.waited_for().entry(chain.clone()).and_modify(|wait| wait.last = last).or_insert(Wait { since: now, last });
    }

    /// Writes the file if it says something else than these snapshots do. Blocks.
    pub(crate) fn show(&self, snapshots: &[Snapshot]) {
        let mut waited_for = self.waited_for();
        let is_believed = |key: &SnapshotKey| {
            let mut of_chain = snapshots.iter().filter(|snapshot| snapshot.key == *key);
            of_chain.any(|snapshot| snapshot.lazy.as_ref().is_some_and(|lazy| lazy.truth == Truth::Believed))
        };
        waited_for.retain(|key, wait| wait.last.elapsed() < WAITS_FOR && is_believed(key));
        let chain = |snapshot: &Snapshot| {
            let lazy = snapshot.lazy.as_ref()?;
            Some(ChainStatus {
                chain: snapshot.key.to_string(),
                image: lazy.layer.image.clone(),
                blob: lazy.layer.layer.blob,
                layer: lazy.layer.layer.id(),
                truth: lazy.truth.clone(),
                since: lazy.truth_since.unwrap_or(snapshot.created).seconds,
                waited_for_since: waited_for.get(&snapshot.key).map(|wait| wait.since),
                signed_by: lazy.signers.iter().cloned().collect(),
            })
        };
        let chains: Vec<_> = snapshots.iter().filter_map(chain).collect();
        drop(waited_for);
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if written.as_ref() != Some(&chains) {
            match replace(&self.path, &chains) {
                Ok(()) => *written = Some(chains),
                Err(error) => warn!(path = %self.path.display(), %error, "what is known of chains is not noted"),
            }
        }
    }

    fn waited_for(&self) -> MutexGuard<'_, HashMap<SnapshotKey, Wait>> {
        // Changed by single inserts and removes: a panic elsewhere leaves it whole.
        self.waited_for.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

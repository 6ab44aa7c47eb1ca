//! One answer at a time that is all of a blob where a part was wanted.
//!
//! A cache in front of a registry sends a blob whole as long as it does not have it, and a range when it has. So
//! whoever wants a range of a blob that somebody is just getting whole waits until that is through.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use format_spec::Digest;
use tokio::sync::OwnedMutexGuard;

/// Longest wait for somebody else's answer; then a second one is got beside it.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// Unused gates are thrown away when there are more than this: more layers than a node gets at once.
const GATES_MAX: usize = 1024;

/// Repository (with its registry) and blob.
type Key = (String, Digest);
type Gate = Arc<tokio::sync::Mutex<()>>;

/// The right to get a blob whole, for as long as it is held.
pub(crate) type Permit = OwnedMutexGuard<()>;

/// The gates of a client.
#[derive(Default)]
pub(crate) struct Gates(Mutex<HashMap<Key, Gate>>);

impl Gates {
    /// The right to get the blob, if nobody has it.
    pub(crate) fn try_enter(&self, repository: &str, digest: Digest) -> Option<Permit> {
        self.gate(repository, digest).try_lock_owned().ok()
    }

    /// Waits as long as somebody gets the blob; `None` where nobody does, or for too long.
    pub(crate) async fn wait(&self, repository: &str, digest: Digest) -> Option<Permit> {
        let gate = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&(repository.to_owned(), digest)).cloned();
        let gate = gate.filter(|gate| gate.try_lock().is_err())?;
        tokio::time::timeout(WAIT_MAX, gate.lock_owned()).await.ok()
    }

    fn gate(&self, repository: &str, digest: Digest) -> Gate {
        // A panic elsewhere leaves the map usable: every change to it is a single call.
        let mut gates = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if gates.len() >= GATES_MAX {
            gates.retain(|_, gate| Arc::strong_count(gate) > 1);
        }
        Arc::clone(gates.entry((repository.to_owned(), digest)).or_default())
    }
}

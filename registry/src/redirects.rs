//! Where ranged reads of a blob were redirected to: the next one goes there at once, one round trip less.
//!
//! Such an address mostly carries a signature that expires. Whatever it answers but the bytes, it is forgotten
//! and the registry is asked again.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use format_spec::Digest;
use reqwest::Url;
use tokio::time::Instant;

use crate::endpoint::Endpoint;

/// Longest use of an address: now and then the registry is to decide again who may read what from where.
const LIFE: Duration = Duration::from_secs(600);
/// An address that is refused so soon was for one use only.
const LIFE_MIN: Duration = Duration::from_secs(30);
/// Addresses kept at most: more layers than a node has in use at once.
const ADDRESSES_MAX: usize = 4096;

/// Repository (with its registry) and blob.
type Key = (String, Digest);

/// An address that worked.
#[derive(Clone)]
pub(crate) struct Redirect {
    /// Who named it.
    pub(crate) endpoint: Arc<Endpoint>,
    pub(crate) url: Url,
    learned: Instant,
}

/// The addresses a client knows.
#[derive(Default)]
pub(crate) struct Redirects(Mutex<State>);

#[derive(Default)]
struct State {
    addresses: HashMap<Key, Redirect>,
    /// Names of hosts whose redirects are for one use only.
    fleeting: HashSet<String>,
}

impl Redirects {
    pub(crate) fn find(&self, repository: &str, digest: Digest) -> Option<Redirect> {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = state.addresses.get(&(repository.to_owned(), digest))?;
        (found.learned.elapsed() < LIFE).then(|| found.clone())
    }

    /// Notes that `endpoint` redirects to `url`, which delivered.
    pub(crate) fn learn(&self, repository: &str, digest: Digest, endpoint: &Arc<Endpoint>, url: &Url) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.fleeting.contains(endpoint.name()) {
            return;
        }
        if state.addresses.len() >= ADDRESSES_MAX {
            state.addresses.clear();
        }
        let redirect = Redirect { endpoint: Arc::clone(endpoint), url: url.clone(), learned: Instant::now() };
        state.addresses.insert((repository.to_owned(), digest), redirect);
    }

    /// Notes that `redirect` did not deliver.
    pub(crate) fn refused(&self, repository: &str, digest: Digest, redirect: &Redirect) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if redirect.learned.elapsed() < LIFE_MIN {
            if state.fleeting.len() >= ADDRESSES_MAX {
                state.fleeting.clear();
            }
            state.fleeting.insert(redirect.endpoint.name().to_owned());
        }
        let key = (repository.to_owned(), digest);
        // Another read may have learned a newer one meanwhile.
        if state.addresses.get(&key).is_some_and(|kept| kept.url == redirect.url) {
            state.addresses.remove(&key);
        }
    }

    /// Forgets what these hosts have said.
    pub(crate) fn forget_those_of(&self, endpoints: &[Arc<Endpoint>]) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_of = |redirect: &Redirect| endpoints.iter().any(|gone| Arc::ptr_eq(gone, &redirect.endpoint));
        state.addresses.retain(|_, redirect| !is_of(redirect));
    }

    /// Makes the next read ask the registry.
    pub(crate) fn forget(&self, repository: &str, digest: Digest) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.addresses.remove(&(repository.to_owned(), digest));
    }
}

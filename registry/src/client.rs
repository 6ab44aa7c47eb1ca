//! The client itself: its options, and what it has learned about hosts.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use crate::{
    auth::AuthCache,
    credentials::Credentials,
    endpoint::Endpoint,
    error::Error,
    files::FileThread,
    gates::Gates,
    hosts_dir::{HostSettings, read_hosts},
    options::ClientOptions,
    redirects::Redirects,
    resolver::LookUps,
};

/// Registries that are remembered: each of their hosts has connections and certificates of its own, some 135 KB.
const REGISTRIES_MAX: usize = 64;
/// How long the files of [`ClientOptions::hosts_dir`] are taken as read.
const HOSTS_LIFE: Duration = Duration::from_secs(30);
/// The same after a refusal that other certificates or headers may end.
const HOSTS_LIFE_MIN: Duration = Duration::from_secs(1);

/// A client for any number of registries. Cheap to clone; clones share connections and tokens.
#[derive(Clone)]
pub struct Client(Arc<Inner>);

struct Inner {
    options: ClientOptions,
    files: FileThread,
    look_ups: LookUps,
    credentials: Credentials,
    auth: AuthCache,
    redirects: Redirects,
    /// The registries, with what has been learned of them.
    registries: Mutex<HashMap<String, Registry>>,
    gates: Gates,
    /// Hosts that take blobs in chunks of at most so many bytes only.
    upload_chunks: Mutex<HashMap<String, u64>>,
    /// Counts the uploads under way.
    uploads: Arc<()>,
    /// One list of referrers is changed at a time: each change reads it and writes it back.
    referrers: tokio::sync::Mutex<()>,
}

/// A registry.
#[derive(Clone)]
struct Registry {
    /// The hosts that answer for it, in the order to try them.
    endpoints: Endpoints,
    /// When that was read.
    read_at: Instant,
    used_at: Instant,
    /// Whether it has answered.
    is_reached: bool,
}

/// At least one.
type Endpoints = Arc<[Arc<Endpoint>]>;

impl Client {
    /// A client that behaves as `options` say. Opens no connection and no file yet.
    pub fn new(options: ClientOptions) -> Self {
        Self(Arc::new(Inner {
            files: FileThread::default(),
            look_ups: LookUps::default(),
            credentials: Credentials::new(options.docker_config.clone()),
            options,
            auth: AuthCache::default(),
            redirects: Redirects::default(),
            registries: Mutex::default(),
            gates: Gates::default(),
            upload_chunks: Mutex::default(),
            uploads: Arc::default(),
            referrers: tokio::sync::Mutex::default(),
        }))
    }

    pub(crate) fn options(&self) -> &ClientOptions {
        &self.0.options
    }

    pub(crate) fn files(&self) -> &FileThread {
        &self.0.files
    }

    pub(crate) fn look_ups(&self) -> &LookUps {
        &self.0.look_ups
    }

    pub(crate) fn credentials(&self) -> &Credentials {
        &self.0.credentials
    }

    pub(crate) fn auth_cache(&self) -> &AuthCache {
        &self.0.auth
    }

    pub(crate) fn redirects(&self) -> &Redirects {
        &self.0.redirects
    }

    pub(crate) fn uploads(&self) -> &Arc<()> {
        &self.0.uploads
    }

    pub(crate) fn gates(&self) -> &Gates {
        &self.0.gates
    }

    pub(crate) async fn lock_referrers(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.0.referrers.lock().await
    }

    /// The hosts that answer for `registry`, the registry itself last.
    ///
    /// # Errors
    ///
    /// [`Error::HostsFile`] when its files cannot be read the first time; later what was read before goes on.
    pub(crate) async fn endpoints(&self, registry: &str) -> Result<Endpoints, Error> {
        let kept = lock(&self.0.registries).get_mut(registry).map(|kept| {
            kept.used_at = Instant::now();
            kept.clone()
        });
        let has_files = self.0.options.hosts_dir.is_some();
        match kept {
            Some(kept) if !has_files || kept.read_at.elapsed() < HOSTS_LIFE => Ok(kept.endpoints),
            kept => self.read_endpoints(registry, kept.map(|kept| kept.endpoints)).await,
        }
    }

    /// Reads the files for `registry` again, after its hosts have refused what they say; whether anything in them has
    /// changed: other certificates, other headers.
    pub(crate) async fn have_endpoints_changed(&self, registry: &str) -> bool {
        let kept = lock(&self.0.registries).get(registry).cloned();
        let is_due = self.0.options.hosts_dir.is_some();
        let Some(kept) = kept.filter(|kept| is_due && kept.read_at.elapsed() >= HOSTS_LIFE_MIN) else {
            return false;
        };
        let old = kept.endpoints;
        let new = self.read_endpoints(registry, Some(Arc::clone(&old))).await;
        new.is_ok_and(|new| new.len() != old.len() || new.iter().zip(&*old).any(|(new, old)| !Arc::ptr_eq(new, old)))
    }

    async fn read_endpoints(&self, registry: &str, old: Option<Endpoints>) -> Result<Endpoints, Error> {
        let endpoints = match (self.read_settings(registry).await, old) {
            (Ok(settings), old) => self.make_endpoints(registry, settings, old.as_deref().unwrap_or_default()),
            (Err(error), Some(old)) => {
                tracing::warn!(%error, registry, "hosts stay as they were");
                old
            }
            (Err(error), None) => return Err(error),
        };
        self.keep_endpoints(registry, &endpoints);
        Ok(endpoints)
    }

    /// Of too many registries, the one goes that was not used for longest; requests that are under way keep its hosts.
    fn keep_endpoints(&self, registry: &str, endpoints: &Endpoints) {
        let mut registries = lock(&self.0.registries);
        let is_reached = registries.get(registry).is_some_and(|known| known.is_reached);
        if registries.len() >= REGISTRIES_MAX && !registries.contains_key(registry) {
            let oldest = registries.iter().min_by_key(|(_, known)| known.used_at).map(|(name, _)| name.clone());
            let gone = oldest.and_then(|oldest| registries.remove(&oldest));
            gone.inspect(|gone| self.0.redirects.forget_those_of(&gone.endpoints));
        }
        let now = Instant::now();
        let known = Registry { endpoints: Arc::clone(endpoints), read_at: now, used_at: now, is_reached };
        registries.insert(registry.to_owned(), known);
    }

    async fn read_settings(&self, registry: &str) -> Result<Vec<HostSettings>, Error> {
        let own = || vec![HostSettings::default()];
        let Some(directory) = self.0.options.hosts_dir.clone() else { return Ok(own()) };
        let name = registry.to_owned();
        let path = directory.clone();
        match self.files().run(move || read_hosts(&path, &name)).await {
            Ok(found) => Ok(found?.unwrap_or_else(own)),
            Err(reason) => Err(Error::HostsFile { path: directory, reason }),
        }
    }

    /// Endpoints for `settings`; the `old` ones stay, with their connections, where nothing has changed.
    fn make_endpoints(&self, registry: &str, settings: Vec<HostSettings>, old: &[Arc<Endpoint>]) -> Endpoints {
        let make = |settings| match old.iter().find(|old| *old.settings() == settings) {
            Some(same) => Arc::clone(same),
            None => Arc::new(Endpoint::new(registry, settings, &self.0.options)),
        };
        settings.into_iter().map(make).collect()
    }

    pub(crate) fn is_reached(&self, registry: &str) -> bool {
        lock(&self.0.registries).get(registry).is_some_and(|known| known.is_reached)
    }

    pub(crate) fn note_reached(&self, registry: &str) {
        if let Some(known) = lock(&self.0.registries).get_mut(registry) {
            known.is_reached = true;
        }
    }

    /// The longest chunk to send to `host`; `None` where whole blobs are fine.
    pub(crate) fn upload_chunk_len(&self, host: &str) -> Option<u64> {
        lock(&self.0.upload_chunks).get(host).copied().or(self.0.options.upload_chunk_len)
    }

    pub(crate) fn note_upload_chunk_len(&self, host: &str, len: u64) {
        lock(&self.0.upload_chunks).insert(host.to_owned(), len);
    }
}

/// A panic elsewhere leaves these maps usable: every change to one is a single call.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("options", &self.0.options).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each port of a host was a registry of its own, for ever.
    #[tokio::test]
    async fn registries_that_are_not_used_any_longer_are_forgotten() {
        let client = Client::new(ClientOptions { hosts_dir: None, ..ClientOptions::default() });
        let names = |range: std::ops::Range<usize>| range.map(|port| format!("127.0.0.1:{port}"));
        let own = client.endpoints("r.example").await.unwrap();
        client.note_reached("r.example");
        let mut first = Vec::new();
        for name in names(1000..1400) {
            let endpoints = client.endpoints(&name).await.unwrap();
            let url = "http://store.example/".parse().unwrap();
            client.redirects().learn(&name, format_spec::Digest::of(b""), &endpoints[0], &url);
            first.push(Arc::downgrade(&endpoints[0]));
            // One that is used meanwhile stays.
            assert!(Arc::ptr_eq(&client.endpoints("r.example").await.unwrap()[0], &own[0]));
        }
        assert!(client.is_reached("r.example"));
        assert_eq!(lock(&client.0.registries).len(), REGISTRIES_MAX);
        let alive = first.iter().filter(|endpoint| endpoint.upgrade().is_some()).count();
        assert_eq!(alive, REGISTRIES_MAX - 1);
    }
}

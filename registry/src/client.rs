//! The client itself: its options, and what it has learned about hosts.

use std::{
    collections::{HashMap, HashSet},
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
    /// The hosts that answer for a registry, in the order to try them, and when that was read.
    endpoints: Mutex<HashMap<String, (Instant, Endpoints)>>,
    /// Registries that have answered.
    reached: Mutex<HashSet<String>>,
    gates: Gates,
    /// Hosts that take blobs in chunks of at most so many bytes only.
    upload_chunks: Mutex<HashMap<String, u64>>,
    /// Counts the uploads under way.
    uploads: Arc<()>,
    /// One list of referrers is changed at a time: each change reads it and writes it back.
    referrers: tokio::sync::Mutex<()>,
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
            endpoints: Mutex::default(),
            reached: Mutex::default(),
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
        let kept = lock(&self.0.endpoints).get(registry).cloned();
        let has_files = self.0.options.hosts_dir.is_some();
        match kept {
            Some((read_at, endpoints)) if !has_files || read_at.elapsed() < HOSTS_LIFE => Ok(endpoints),
            kept => self.read_endpoints(registry, kept.map(|(_, endpoints)| endpoints)).await,
        }
    }

    /// Reads the files for `registry` again, after its hosts have refused what they say; whether anything in them has
    /// changed: other certificates, other headers.
    pub(crate) async fn have_endpoints_changed(&self, registry: &str) -> bool {
        let kept = lock(&self.0.endpoints).get(registry).cloned();
        let is_due = self.0.options.hosts_dir.is_some();
        let Some((_, old)) = kept.filter(|(read_at, _)| is_due && read_at.elapsed() >= HOSTS_LIFE_MIN) else {
            return false;
        };
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
        lock(&self.0.endpoints).insert(registry.to_owned(), (Instant::now(), Arc::clone(&endpoints)));
        Ok(endpoints)
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
        lock(&self.0.reached).contains(registry)
    }

    pub(crate) fn note_reached(&self, registry: &str) {
        let mut reached = lock(&self.0.reached);
        if !reached.contains(registry) {
            reached.insert(registry.to_owned());
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

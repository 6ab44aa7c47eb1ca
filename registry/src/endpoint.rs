//! Where requests for a registry go: to itself, or to a host that `hosts.toml` puts in its place.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use reqwest::Url;
use tokio::time::Instant;

use crate::{
    client::Client,
    error::Error,
    hosts::Capability,
    hosts_dir::HostSettings,
    http::{Connections, is_loopback},
    options::ClientOptions,
    resolver::{LookUpsOfHost, Resolver, leads_near},
};

/// How long a mirror that failed is asked last, at least and at most: a dead one must not slow down every read, and
/// one that came back should be used again.
const FAILED_REST: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(600));
/// The same for one that was slow to begin: a cache that gets what it does not have is that, and well again at once.
const SLOW_REST: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));
/// Repositories of which a host remembers that it is asked last for them.
const RESTS_MAX: usize = 256;
/// Docker Hub as references name it, and where it really is.
pub(crate) const DOCKER_HUB: &str = "docker.io";
const DOCKER_HUB_HOST: &str = "registry-1.docker.io";

/// A host that answers for a registry.
pub(crate) struct Endpoint {
    /// The registry, as references name it.
    registry: String,
    /// The host, as errors and docker's `config.json` name it.
    name: String,
    /// Where its API begins, without a slash at the end.
    root: String,
    /// Whether it has to be told which registry it stands in for.
    is_mirror: bool,
    settings: HostSettings,
    connections: Connections,
    look_ups: Arc<LookUpsOfHost>,
    rests: Mutex<Rests>,
    /// Whether its last answer to a range was all of the blob.
    ignores_ranges: AtomicBool,
}

/// A time in which a host is asked last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rest {
    until: Instant,
    len: Duration,
}

/// The times in which a host is asked last.
///
/// A failure in one repository may be that repository's doing: blobs that its mirror does not have, or that are slow,
/// large or broken. So that says nothing about others; only a host that cannot be spoken to rests as a whole.
#[derive(Debug, Default)]
struct Rests {
    whole: Option<Rest>,
    repositories: HashMap<String, Rest>,
}

impl Rest {
    /// The rest from `now` on, between two bounds: the one that goes on, or a new one, twice as long when the last has
    /// ended not long ago. `asked` is how long the host itself wants to be left alone.
    fn next(last: Option<Self>, now: Instant, (min, max): (Duration, Duration), asked: Option<Duration>) -> Self {
        let asked = asked.unwrap_or_default().min(max);
        let len = match last {
            Some(last) if now < last.until && last.len >= min => {
                return Self { until: last.until.max(now + asked), ..last };
            }
            Some(last) if now < last.until + last.len => (last.len * 2).clamp(min, max),
            _ => min,
        };
        Self { until: now + len.max(asked), len }
    }
}

impl Endpoint {
    pub(crate) fn new(registry: &str, settings: HostSettings, options: &ClientOptions) -> Self {
        let root = match &settings.config.root {
            Some(root) => root.as_str().trim_end_matches('/').to_owned(),
            None => own_root(registry, options.plain_http.is_for(registry), settings.has_tls()),
        };
        let root = root.replacen("://docker.io/", "://registry-1.docker.io/", 1);
        let authority = root.split("://").nth(1).and_then(|rest| rest.split('/').next()).unwrap_or(registry);
        let is_mirror = authority != real_host(registry);
        let name = if is_mirror { authority.to_owned() } else { registry.to_owned() };
        Self {
            registry: registry.to_owned(),
            name,
            is_mirror,
            root,
            settings,
            connections: Connections::default(),
            look_ups: Arc::default(),
            rests: Mutex::default(),
            ignores_ranges: AtomicBool::new(false),
        }
    }

    pub(crate) fn registry(&self) -> &str {
        &self.registry
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Tells it from all others that want other credentials.
    pub(crate) fn root(&self) -> &str {
        &self.root
    }

    pub(crate) fn settings(&self) -> &HostSettings {
        &self.settings
    }

    pub(crate) fn can(&self, capability: Capability) -> bool {
        self.settings.config.capabilities.contains(&capability)
    }

    /// Whether it is spoken to without TLS.
    pub(crate) fn is_plain(&self) -> bool {
        self.root.starts_with("http:")
    }

    /// The address of `path` in `repository`. A mirror is told the registry. Source: containerd `docs/hosts.md`.
    pub(crate) fn url(&self, repository: &str, path: &str) -> Result<Url, Error> {
        let text = format!("{}/{repository}/{path}", self.root);
        let mut url = Url::parse(&text).map_err(|error| Error::Setup(format!("{text}: {error}")))?;
        if self.is_mirror {
            url.query_pairs_mut().append_pair("ns", &self.registry);
        }
        Ok(url)
    }

    /// The HTTP client for `url`, the endpoint's own or one that it redirects to.
    ///
    /// # Errors
    ///
    /// [`Error::Redirects`] where a host elsewhere redirects to this machine or its link, or one that is spoken to by
    /// TLS to plain HTTP: whoever is on that way reads what is sent, and says what a tag means.
    pub(crate) fn http(&self, what: &str, url: &Url, client: &Client) -> Result<reqwest::Client, Error> {
        let own = Url::parse(&self.root).ok();
        if own.as_ref().is_some_and(|own| own.scheme() == "https") && url.scheme() == "http" {
            let host = authority(url);
            if !client.options().plain_http.is_for(&host) {
                let reason = format!("to {host} in plain HTTP; --plain-http={host} allows it");
                return Err(Error::Redirects { what: what.to_owned(), host: self.name.clone(), reason });
            }
        }
        let is_own = own.as_ref().is_some_and(|own| own.host_str() == url.host_str());
        let is_far = !is_own && !own.is_some_and(|own| leads_near(&own));
        if is_far && leads_near(url) {
            let reason = format!("to {}, which is this machine or its link", url.host_str().unwrap_or_default());
            return Err(Error::Redirects { what: what.to_owned(), host: self.name.clone(), reason });
        }
        let resolver = Resolver::new(client.look_ups(), &self.look_ups);
        self.connections.to(url, is_far, client.options(), &self.settings, &resolver)
    }

    /// Whether `url` may be sent something: it is the host itself, or one that is named for uploads. A host of plain
    /// HTTP may go on to TLS.
    pub(crate) fn takes_uploads_at(&self, url: &Url, options: &ClientOptions) -> bool {
        options.upload_hosts.contains(&authority(url)) || self.is_own(url)
    }

    /// Whether `url` is of the host itself.
    pub(crate) fn is_own(&self, url: &Url) -> bool {
        let Ok(own) = Url::parse(&self.root) else { return false };
        let is_upgrade = own.scheme() == "http" && url.scheme() == "https" && own.host_str() == url.host_str();
        own.origin() == url.origin() || is_upgrade
    }

    /// Notes that TLS with it has failed.
    pub(crate) fn forget_certificates(&self) {
        self.connections.forget_certificates();
    }

    /// The number of the client certificate in use.
    pub(crate) fn identity(&self) -> usize {
        self.connections.identity()
    }

    /// How many client certificates there are.
    pub(crate) fn identity_count(&self) -> usize {
        self.settings.identities.len()
    }

    /// Goes on to the client certificate after `refused`, behind the last one to the first.
    pub(crate) fn next_identity(&self, refused: usize) {
        self.connections.next_identity(refused, self.identity_count());
    }

    /// Notes that it could not be spoken to.
    pub(crate) fn rest_wholly(&self) {
        let mut rests = self.rests();
        rests.whole = Some(Rest::next(rests.whole, Instant::now(), FAILED_REST, None));
    }

    /// Notes that it failed in a way that may last, asked about a repository; `asked` is how long it wants to be left
    /// alone, if it says so.
    pub(crate) fn rest(&self, repository: &str, asked: Option<Duration>) {
        self.rest_within(repository, FAILED_REST, asked);
    }

    /// Notes that it has not begun to answer when another host had.
    pub(crate) fn rest_briefly(&self, repository: &str) {
        self.rest_within(repository, SLOW_REST, None);
    }

    fn rest_within(&self, repository: &str, bounds: (Duration, Duration), asked: Option<Duration>) {
        let (now, mut rests) = (Instant::now(), self.rests());
        let rest = Rest::next(rests.repositories.get(repository).copied(), now, bounds, asked);
        if rests.repositories.len() >= RESTS_MAX && !rests.repositories.contains_key(repository) {
            rests.repositories.retain(|_, rest| now < rest.until);
            let soonest = rests.repositories.iter().min_by_key(|(_, rest)| rest.until).map(|(name, _)| name.clone());
            soonest.filter(|_| rests.repositories.len() >= RESTS_MAX).map(|name| rests.repositories.remove(&name));
        }
        rests.repositories.insert(repository.to_owned(), rest);
    }

    /// Whether it is asked last for what is in a repository.
    pub(crate) fn is_resting(&self, repository: &str) -> bool {
        let (now, rests) = (Instant::now(), self.rests());
        rests.whole.iter().chain(rests.repositories.get(repository)).any(|rest| now < rest.until)
    }

    fn rests(&self) -> MutexGuard<'_, Rests> {
        self.rests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes whether it has answered a range with one; true where that it has not is new.
    pub(crate) fn note_ranges(&self, is_range: bool) -> bool {
        !self.ignores_ranges.swap(!is_range, Ordering::Relaxed) && !is_range
    }

    /// Whether its last answer to a range was all of the blob.
    pub(crate) fn ignores_ranges(&self) -> bool {
        self.ignores_ranges.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint").field("root", &self.root).field("registry", &self.registry).finish_non_exhaustive()
    }
}

/// Host and port of an address, the port where it is not the usual one.
pub(crate) fn authority(url: &Url) -> String {
    let port = url.port().map_or(String::new(), |port| format!(":{port}"));
    format!("{}{port}", url.host_str().unwrap_or_default())
}

fn real_host(registry: &str) -> &str {
    if registry == DOCKER_HUB { DOCKER_HUB_HOST } else { registry }
}

/// Where the API of a registry begins that no `hosts.toml` gives an address for.
fn own_root(registry: &str, plain_http: bool, has_tls_settings: bool) -> String {
    let is_plain = plain_http || (is_loopback(registry) && !has_tls_settings);
    format!("{}://{}/v2", if is_plain { "http" } else { "https" }, real_host(registry))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{hosts::HostConfig, options::PlainHttp};

    #[test]
    fn rests_grow_for_who_fails_again_soon() {
        let (start, seconds) = (Instant::now(), Duration::from_secs);
        let next = |last, after, asked| Rest::next(last, start + seconds(after), FAILED_REST, asked);
        let first = next(None, 0, None);
        assert_eq!(first, Rest { until: start + seconds(30), len: seconds(30) });
        // Requests that were under way fail too.
        assert_eq!(next(Some(first), 29, None), first);
        let second = next(Some(first), 31, None);
        assert_eq!(second, Rest { until: start + seconds(91), len: seconds(60) });
        assert_eq!(next(Some(second), 92, None).len, seconds(120));
        assert_eq!(next(Some(second), 152, None).len, seconds(30));
        let long = Rest { until: start, len: seconds(600) };
        assert_eq!(next(Some(long), 0, None).len, seconds(600));
        assert_eq!(next(None, 0, Some(seconds(120))).until, start + seconds(120));
        assert_eq!(next(None, 0, Some(seconds(86_400))).until, start + seconds(600));
        // A slow host that then fails rests as long as any that fails.
        let slow = Rest::next(None, start, SLOW_REST, None);
        assert_eq!(slow.len, seconds(5));
        assert_eq!(next(Some(slow), 1, None), Rest { until: start + seconds(31), len: seconds(30) });
        assert_eq!(Rest::next(Some(first), start, SLOW_REST, None), first);
    }

    /// Whoever is on the way would read what is sent, and say what a tag means.
    #[tokio::test]
    async fn no_way_leads_from_tls_to_plain_http_unless_the_host_is_named() {
        let check = |registry: &str, plain_http: PlainHttp, to: &str, is_allowed: bool| {
            let client = Client::new(ClientOptions { plain_http, ..ClientOptions::default() });
            let endpoint = Endpoint::new(registry, HostSettings::default(), client.options());
            let result = endpoint.http("read", &to.parse().unwrap(), &client);
            assert_eq!(result.is_ok(), is_allowed, "{registry} to {to}: {:?}", result.err());
        };
        let named = || PlainHttp::Hosts(["cdn.example:8080".to_owned()].into());
        check("r.example", PlainHttp::Never, "https://cdn.example/blob", true);
        check("r.example", PlainHttp::Never, "http://cdn.example/blob", false);
        check("r.example", PlainHttp::Never, "http://r.example/v2/a/blobs/uploads/1", false);
        check("r.example", named(), "http://cdn.example:8080/blob", true);
        check("r.example", named(), "http://cdn.example/blob", false);
        // A client that speaks plain HTTP with a registry has nothing to lose.
        check("127.0.0.1:5000", PlainHttp::Never, "http://127.0.0.1:5001/blob", true);
    }

    #[test]
    fn plain_http_is_for_loopback_or_on_demand() {
        let check = |plain_http, host: &str, expected: &str| assert_eq!(own_root(host, plain_http, false), expected);
        check(false, "localhost", "http://localhost/v2");
        check(false, "127.3.2.1:5000", "http://127.3.2.1:5000/v2");
        check(false, "[::1]:5000", "http://[::1]:5000/v2");
        check(false, "localhost.example", "https://localhost.example/v2");
        check(false, "128.0.0.1", "https://128.0.0.1/v2");
        check(true, "r.example", "http://r.example/v2");
        let named = PlainHttp::Hosts(["r.example:5000".to_owned()].into());
        assert_eq!(["r.example:5000", "r.example", "docker.io"].map(|host| named.is_for(host)), [true, false, false]);
        check(false, "docker.io", "https://registry-1.docker.io/v2");
        assert_eq!(own_root("127.0.0.1:5000", false, true), "https://127.0.0.1:5000/v2");
    }

    #[test]
    fn a_mirror_is_told_the_registry() {
        let check = |registry: &str, root: &str, name: &str, expected: &str| {
            let config = HostConfig { root: Some(root.parse().unwrap()), ..HostConfig::default() };
            let settings = HostSettings { config, ..HostSettings::default() };
            let endpoint = Endpoint::new(registry, settings, &ClientOptions::default());
            assert_eq!(endpoint.name(), name);
            assert_eq!(endpoint.url("a/b", "blobs/x").unwrap().as_str(), expected);
        };
        check(
            "r.example:5000",
            "http://m.example/v2",
            "m.example",
            "http://m.example/v2/a/b/blobs/x?ns=r.example%3A5000",
        );
        check("r.example:5000", "http://r.example:5000/v2", "r.example:5000", "http://r.example:5000/v2/a/b/blobs/x");
        check(
            "docker.io",
            "https://registry-1.docker.io/v2",
            "docker.io",
            "https://registry-1.docker.io/v2/a/b/blobs/x",
        );
        check("docker.io", "https://docker.io/v2", "docker.io", "https://registry-1.docker.io/v2/a/b/blobs/x");
        check("r.example", "https://m.example/up/", "m.example", "https://m.example/up/a/b/blobs/x?ns=r.example");
    }
}

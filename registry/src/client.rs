//! The client itself: its options, and what it has learned about hosts.

use std::{
    collections::HashSet,
    fmt,
    net::IpAddr,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use reqwest::Url;

use crate::{auth::AuthCache, error::Error, options::ClientOptions, reference::Reference};

/// A client for any number of registries. Cheap to clone; clones share connections and tokens.
#[derive(Clone)]
pub struct Client(Arc<Inner>);

struct Inner {
    options: ClientOptions,
    /// Speaks to loopback hosts, past any proxy of the environment.
    direct: OnceLock<reqwest::Client>,
    /// Speaks to all others.
    remote: OnceLock<reqwest::Client>,
    auth: AuthCache,
    /// Hosts that have answered.
    reached: Mutex<HashSet<String>>,
    /// Hosts that ignore the Range header.
    rangeless: Mutex<HashSet<String>>,
}

impl Client {
    /// A client that behaves as `options` say. Opens no connection yet.
    pub fn new(options: ClientOptions) -> Self {
        Self(Arc::new(Inner {
            options,
            direct: OnceLock::new(),
            remote: OnceLock::new(),
            auth: AuthCache::default(),
            reached: Mutex::default(),
            rangeless: Mutex::default(),
        }))
    }

    pub(crate) fn options(&self) -> &ClientOptions {
        &self.0.options
    }

    pub(crate) fn auth_cache(&self) -> &AuthCache {
        &self.0.auth
    }

    /// Whether `host` is spoken to in plain HTTP.
    pub(crate) fn is_plain(&self, host: &str) -> bool {
        self.0.options.plain_http || is_loopback(host)
    }

    /// The address of `path` (below `/v2/REPOSITORY/`) in the repository of `reference`.
    pub(crate) fn address(&self, reference: &Reference, path: &str) -> Result<Url, Error> {
        let host = match reference.host() {
            "docker.io" => "registry-1.docker.io",
            host => host,
        };
        let scheme = if self.is_plain(host) { "http" } else { "https" };
        let text = format!("{scheme}://{host}/v2/{}/{path}", reference.repository());
        Url::parse(&text).map_err(|error| Error::Setup(format!("{reference}: {error}")))
    }

    /// The HTTP client to use for `url`.
    pub(crate) fn http(&self, url: &Url) -> Result<&reqwest::Client, Error> {
        let is_direct = url.host_str().is_some_and(is_loopback);
        let cell = if is_direct { &self.0.direct } else { &self.0.remote };
        if let Some(client) = cell.get() {
            return Ok(client);
        }
        let built = build(&self.0.options, is_direct)?;
        Ok(cell.get_or_init(|| built))
    }

    pub(crate) fn is_reached(&self, host: &str) -> bool {
        self.0.reached.lock().unwrap_or_else(PoisonError::into_inner).contains(host)
    }

    pub(crate) fn note_reached(&self, host: &str) {
        let mut reached = self.0.reached.lock().unwrap_or_else(PoisonError::into_inner);
        if !reached.contains(host) {
            reached.insert(host.to_owned());
        }
    }

    /// Notes that `host` ignores ranges; true the first time.
    pub(crate) fn note_rangeless(&self, host: &str) -> bool {
        self.0.rangeless.lock().unwrap_or_else(PoisonError::into_inner).insert(host.to_owned())
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("options", &self.0.options).finish_non_exhaustive()
    }
}

fn build(options: &ClientOptions, is_direct: bool) -> Result<reqwest::Client, Error> {
    // Fails when a provider is there already: then that one is used.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let builder = || {
        let builder = reqwest::Client::builder()
            .user_agent(concat!("lazuli/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(options.connect_timeout)
            // An identity token or password in a redirected address must not show up elsewhere.
            .referer(false);
        if is_direct { builder.no_proxy() } else { builder }
    };
    builder().build().or_else(|error| {
        // A node without CA certificates can still speak plain HTTP; TLS then says that it knows no issuer.
        tracing::warn!(%error, "no TLS with the system's CA certificates; install ca-certificates");
        builder().tls_certs_only([]).build().map_err(|error| Error::Setup(error.to_string()))
    })
}

/// Whether `host` (with or without a port) is this machine, as docker decides it.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_http_is_for_loopback_or_on_demand() {
        let check = |plain_http, reference: &str, expected: &str| {
            let client = Client::new(ClientOptions { plain_http, ..ClientOptions::default() });
            let url = client.address(&reference.parse().unwrap(), "blobs/x").unwrap();
            assert_eq!(url.as_str(), expected);
        };
        check(false, "localhost/a", "http://localhost/v2/a/blobs/x");
        check(false, "127.3.2.1:5000/a", "http://127.3.2.1:5000/v2/a/blobs/x");
        check(false, "[::1]:5000/a", "http://[::1]:5000/v2/a/blobs/x");
        check(false, "localhost.example/a", "https://localhost.example/v2/a/blobs/x");
        check(false, "128.0.0.1/a", "https://128.0.0.1/v2/a/blobs/x");
        check(true, "r.example/a", "http://r.example/v2/a/blobs/x");
        check(false, "docker.io/debian", "https://registry-1.docker.io/v2/library/debian/blobs/x");
    }
}

//! The HTTP library, set up for one host: certificates, proxy, connection time limit.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use reqwest::{Certificate, Identity, Proxy, Url, redirect};

use tokio::time::Instant;

use crate::{error::Error, hosts_dir::HostSettings, options::ClientOptions, resolver::Resolver};

/// How long the system's CA certificates count as read after TLS has failed: they may have been replaced.
const CERTIFICATES_LIFE: Duration = Duration::from_secs(10);

/// The settings that make connections of a host differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Kind {
    /// Whether TLS can play a part in them. The system's CA certificates, which take milliseconds to read, are for those.
    may_need_tls: bool,
    /// Whether they go past any proxy of the environment: to loopback hosts.
    is_direct: bool,
    /// Whether they must not lead to this machine or its link.
    is_far: bool,
    /// The number of the client certificate.
    identity: usize,
}

/// The connections to one host, and to where it redirects.
#[derive(Default)]
pub(crate) struct Connections {
    clients: Mutex<HashMap<Kind, (Instant, reqwest::Client)>>,
    /// The client certificate in use.
    identity: AtomicUsize,
}

impl Connections {
    /// The HTTP client for `url`, made on first use; `is_far` forbids it to lead to this machine or its link.
    pub(crate) fn to(
        &self,
        url: &Url,
        is_far: bool,
        options: &ClientOptions,
        settings: &HostSettings,
        resolver: &Resolver,
    ) -> Result<reqwest::Client, Error> {
        let is_direct = url.host_str().is_some_and(is_loopback) && settings.config.proxy.is_none();
        let may_need_tls = may_need_tls(url, is_direct);
        let kind = Kind { may_need_tls, is_direct, is_far, identity: self.identity() };
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, client)) = clients.get(&kind) {
            return Ok(client.clone());
        }
        let built = build(options, settings, kind, resolver)?;
        clients.insert(kind, (Instant::now(), built.clone()));
        Ok(built)
    }

    /// After a failure of TLS: the next connection reads the system's CA certificates anew, unless they were just now.
    pub(crate) fn forget_certificates(&self) {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        clients.retain(|_, (built, _)| built.elapsed() < CERTIFICATES_LIFE);
    }

    /// The number of the client certificate in use.
    pub(crate) fn identity(&self) -> usize {
        self.identity.load(Ordering::Relaxed)
    }

    /// Goes on to the client certificate after `refused`, of `count`, behind the last one to the first.
    pub(crate) fn next_identity(&self, refused: usize, count: usize) {
        // Many requests may be refused at once: the first of them goes on for all.
        let next = (refused + 1) % count.max(1);
        _ = self.identity.compare_exchange(refused, next, Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// Bytes that one answer may send before they are taken: what a link of 1 Gbit/s brings in 16 ms.
const HTTP2_STREAM_WINDOW: u32 = 2 << 20;
/// The same of all answers of a connection: as many as open layers at one source.
const HTTP2_CONNECTION_WINDOW: u32 = 64 * HTTP2_STREAM_WINDOW;

/// Plain HTTP needs TLS too where a proxy may be in the way, which may be spoken to by TLS.
fn may_need_tls(url: &Url, is_direct: bool) -> bool {
    url.scheme() != "http" || !is_direct
}

fn build(
    options: &ClientOptions,
    settings: &HostSettings,
    kind: Kind,
    resolver: &Resolver,
) -> Result<reqwest::Client, Error> {
    // Fails when a provider is there already: then that one is used.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let refuse = |error: reqwest::Error| Error::Setup(error.to_string());
    let mut ca = Vec::new();
    for (pem, file) in settings.ca.iter().zip(&settings.config.ca) {
        let found = Certificate::from_pem_bundle(pem).ok().filter(|found| !found.is_empty());
        ca.extend(found.ok_or_else(|| Error::Setup(format!("{}: no certificate in it", file.display())))?);
    }
    let identity =
        settings.identities.get(kind.identity).map(|pem| Identity::from_pem(pem)).transpose().map_err(refuse)?;
    let proxy = settings.config.proxy.clone().map(Proxy::all).transpose().map_err(refuse)?;
    let builder = || {
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("lazuli/", env!("CARGO_PKG_VERSION")))
            .dns_resolver(resolver.clone().with_far(kind.is_far))
            .connect_timeout(settings.config.dial_timeout.unwrap_or(options.connect_timeout))
            .tls_danger_accept_invalid_certs(settings.config.skip_verify)
            // Hot packs wait for a while, read by nobody: they must not stop what else comes over their connection.
            .http2_initial_stream_window_size(HTTP2_STREAM_WINDOW)
            .http2_initial_connection_window_size(HTTP2_CONNECTION_WINDOW)
            // `transport` follows them: it knows what may be shown to whom.
            .redirect(redirect::Policy::none())
            // An identity token or password in a redirected address must not show up elsewhere.
            .referer(false);
        if kind.is_direct {
            builder = builder.no_proxy();
        }
        if let Some(proxy) = &proxy {
            builder = builder.no_proxy().proxy(proxy.clone());
        }
        if let Some(identity) = &identity {
            builder = builder.identity(identity.clone());
        }
        builder
    };
    if !kind.may_need_tls {
        return builder().tls_certs_only([]).build().map_err(refuse);
    }
    builder().tls_certs_merge(ca.clone()).build().or_else(|error| {
        // A node without CA certificates can still speak plain HTTP; TLS then says that it knows no issuer.
        tracing::warn!(%error, "no TLS with the system's CA certificates; install ca-certificates");
        builder().tls_certs_only(ca).build().map_err(refuse)
    })
}

/// Whether `host` (with or without a port) is this machine, as docker decides it.
pub(crate) fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A registry behind a proxy that is spoken to by TLS could not be reached.
    #[test]
    fn only_plain_http_that_no_proxy_carries_does_without_certificates() {
        let needs = |url: &str, is_direct| may_need_tls(&url.parse().unwrap(), is_direct);
        assert!(!needs("http://127.0.0.1:5000/v2/", true));
        assert!(needs("http://127.0.0.1:5000/v2/", false));
        assert!(needs("http://registry.example/v2/", false));
        assert!(needs("https://127.0.0.1:5000/v2/", true));
    }
}

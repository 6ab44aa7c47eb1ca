//! Where requests for a registry go: to itself, or to a host that `hosts.toml` puts in its place.

use std::{
    fmt,
    sync::{Mutex, PoisonError},
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
};

/// How long a mirror that failed is asked last: a dead one must not slow down every read.
const REST: Duration = Duration::from_secs(30);
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
    rests_until: Mutex<Option<Instant>>,
}

impl Endpoint {
    pub(crate) fn new(registry: &str, settings: HostSettings, options: &ClientOptions) -> Self {
        let root = match &settings.config.root {
            Some(root) => root.as_str().trim_end_matches('/').to_owned(),
            None => own_root(registry, options.plain_http, settings.has_tls()),
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
            rests_until: Mutex::default(),
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
    pub(crate) fn http(&self, url: &Url, client: &Client) -> Result<reqwest::Client, Error> {
        self.connections.to(url, client.options(), &self.settings)
    }

    /// Notes that TLS with it has failed.
    pub(crate) fn forget_certificates(&self) {
        self.connections.forget_certificates();
    }

    /// The number of the client certificate in use.
    pub(crate) fn identity(&self) -> usize {
        self.connections.identity()
    }

    /// Goes on to the client certificate after `refused`; false when there is none.
    pub(crate) fn next_identity(&self, refused: usize) -> bool {
        self.connections.next_identity(refused, self.settings.identities.len())
    }

    /// Notes that it failed in a way that may last.
    pub(crate) fn rest(&self) {
        *self.rests_until.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + REST);
    }

    pub(crate) fn is_resting(&self) -> bool {
        let until = *self.rests_until.lock().unwrap_or_else(PoisonError::into_inner);
        until.is_some_and(|until| Instant::now() < until)
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint").field("root", &self.root).field("registry", &self.registry).finish_non_exhaustive()
    }
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
    use crate::hosts::HostConfig;

    #[test]
    fn plain_http_is_for_loopback_or_on_demand() {
        let check = |plain_http, host: &str, expected: &str| assert_eq!(own_root(host, plain_http, false), expected);
        check(false, "localhost", "http://localhost/v2");
        check(false, "127.3.2.1:5000", "http://127.3.2.1:5000/v2");
        check(false, "[::1]:5000", "http://[::1]:5000/v2");
        check(false, "localhost.example", "https://localhost.example/v2");
        check(false, "128.0.0.1", "https://128.0.0.1/v2");
        check(true, "r.example", "http://r.example/v2");
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

//! Trying the hosts of a registry one after the other: mirrors in the order of `hosts.toml`, then the registry.
//!
//! Every failure moves on to the next host. A host that failed in a way that may last is asked last for a while: for
//! the repository that was asked for, or wholly where it could not be spoken to.

use std::sync::Arc;

use tracing::debug;

use crate::{client::Client, endpoint::Endpoint, error::Error, hosts::Capability, reference::Reference, retry::Retry};

impl Client {
    /// Runs `attempt` with the hosts of a reference's registry that may do `capability`, with retries, until one succeeds.
    pub(crate) async fn with_mirrors<T, F: Future<Output = Result<T, Error>>>(
        &self,
        reference: &Reference,
        capability: Capability,
        attempt: impl Fn(Arc<Endpoint>) -> F,
    ) -> Result<T, Error> {
        let registry = reference.host();
        let mut retry = Retry::new(self, registry);
        loop {
            let mut round = self.round(reference, capability).await?;
            let error = loop {
                let Some(endpoint) = round.next() else { break round.into_error() };
                match attempt(Arc::clone(&endpoint)).await {
                    Ok(value) => return Ok(value),
                    Err(error) => round.failed(&endpoint, error),
                }
            };
            if !self.has_better_hosts(registry, &error).await {
                retry.wait_after(error).await?;
            }
        }
    }

    /// Whether `error` is one that other certificates, headers or hosts may end, and there are such by now.
    pub(crate) async fn has_better_hosts(&self, registry: &str, error: &Error) -> bool {
        error.is_about_settings() && self.have_endpoints_changed(registry).await
    }

    /// The hosts to ask once each.
    pub(crate) async fn round(&self, reference: &Reference, capability: Capability) -> Result<Round, Error> {
        let (registry, repository) = (reference.host(), reference.repository());
        let endpoints = self.endpoints(registry).await?;
        let (mut resting, mut order) = (Vec::new(), Vec::new());
        for (position, endpoint) in endpoints.iter().enumerate().filter(|(_, endpoint)| endpoint.can(capability)) {
            let list = if endpoint.is_resting(repository) { &mut resting } else { &mut order };
            list.push((position, Arc::clone(endpoint)));
        }
        let awake_count = order.len();
        order.append(&mut resting);
        if order.is_empty() {
            return Err(no_host(registry, capability));
        }
        let repository = repository.to_owned();
        Ok(Round { repository, capability, order, awake_count, next: 0, failures: Vec::new() })
    }

    /// The host to store things at.
    pub(crate) async fn push_endpoint(&self, registry: &str) -> Result<Arc<Endpoint>, Error> {
        let endpoints = self.endpoints(registry).await?;
        let found = endpoints.iter().find(|endpoint| endpoint.can(Capability::Push)).cloned();
        found.ok_or_else(|| no_host(registry, Capability::Push))
    }
}

fn no_host(registry: &str, capability: Capability) -> Error {
    let capability = match capability {
        Capability::Pull => "pull",
        Capability::Resolve => "resolve",
        Capability::Push => "push",
    };
    Error::NoHost { host: registry.to_owned(), capability }
}

/// One turn through the hosts of a registry.
pub(crate) struct Round {
    repository: String,
    capability: Capability,
    /// Those that rest come last; the number is the place in `hosts.toml`.
    order: Vec<(usize, Arc<Endpoint>)>,
    awake_count: usize,
    next: usize,
    failures: Vec<(usize, Error)>,
}

impl Round {
    /// The next host to ask.
    pub(crate) fn next(&mut self) -> Option<Arc<Endpoint>> {
        let is_settled = self.next > 0 && self.next >= self.awake_count && self.is_settled();
        let (_, endpoint) = self.order.get(self.next).filter(|_| !is_settled)?;
        self.next += 1;
        Some(Arc::clone(endpoint))
    }

    /// Whether a host that rests could add nothing: what a tag means the registry itself has said.
    fn is_settled(&self) -> bool {
        self.capability != Capability::Pull && self.failures.iter().all(|(_, error)| !error.is_transient())
    }

    /// Notes why a host that [`Self::next`] gave did not help.
    pub(crate) fn failed(&mut self, endpoint: &Endpoint, error: Error) {
        if self.order.len() > 1 {
            debug!(host = endpoint.name(), registry = endpoint.registry(), %error, "asking the next host");
            if error.is_about_connection_to(endpoint.name()) {
                endpoint.rest_wholly();
            } else if error.is_about_host() {
                endpoint.rest(&self.repository, error.retry_after());
            }
        }
        let place = self.order.iter().find(|(_, other)| std::ptr::eq(&**other, endpoint));
        self.failures.push((place.map_or(0, |(position, _)| *position), error));
    }

    /// How many hosts there are to ask.
    pub(crate) fn host_count(&self) -> usize {
        self.order.len()
    }

    /// Whether one of them answers ranges with whole blobs.
    pub(crate) fn ignores_ranges(&self) -> bool {
        self.order.iter().any(|(_, endpoint)| endpoint.ignores_ranges())
    }

    /// What all the failures mean together; at least one host has been asked.
    ///
    /// The word of the registry itself counts, which is the last host. But content that it does not have may be
    /// at a mirror that comes back.
    pub(crate) fn into_error(mut self) -> Error {
        self.failures.sort_by_key(|(position, _)| *position);
        let last = self.failures.len() - 1;
        let may_pass = self.failures.iter().rposition(|(_, error)| error.is_transient());
        let chosen = if self.capability == Capability::Pull { may_pass.unwrap_or(last) } else { last };
        let (_, error) = self.failures.remove(chosen);
        let text = error.to_string();
        let others: Vec<String> = self.failures.iter().map(|(_, other)| without_common_start(other, &text)).collect();
        match others.is_empty() {
            true => error,
            false => Error::Mirrors { last: Box::new(error), mirrors: others.join(", ") },
        }
    }
}

/// The text of an error without the part about what was attempted, which another one has said.
fn without_common_start(error: &Error, other: &str) -> String {
    let text = error.to_string();
    let common: usize = text.chars().zip(other.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
    let start = text[..common].rfind(": ").map_or(0, |position| position + 2);
    text[start..].to_owned()
}

#[cfg(test)]
mod tests {
    use reqwest::StatusCode;

    use super::*;

    fn failed(capability: Capability, statuses: &[u16]) -> Error {
        let status = |(position, status): (usize, &u16)| {
            let status = StatusCode::from_u16(*status).unwrap();
            let host = format!("h{position}");
            (position, Error::from_status("manifest of x:1", &host, &host, status, None, ""))
        };
        let failures = statuses.iter().enumerate().map(status).collect();
        Round { repository: String::new(), capability, order: Vec::new(), awake_count: 0, next: 0, failures }
            .into_error()
    }

    #[test]
    fn the_registrys_own_word_counts_unless_a_mirror_may_come_back() {
        let check = |capability, statuses: &[u16], expected: &str| {
            let error = failed(capability, statuses);
            assert_eq!(error.to_string(), expected);
        };
        check(Capability::Resolve, &[404], "manifest of x:1: not found at h0");
        let missing = "manifest of x:1: not found at h1 (before that: h0 answered 503)";
        check(Capability::Resolve, &[503, 404], missing);
        let busy = "manifest of x:1: h0 answered 503 (before that: not found at h1)";
        check(Capability::Pull, &[503, 404], busy);
        assert!(failed(Capability::Pull, &[503, 404]).is_transient());
        assert!(failed(Capability::Resolve, &[503, 404]).is_not_found());
    }
}

//! Names of hosts become addresses on threads of their own, a few at a time.
//!
//! The system's resolver blocks, for half a minute where no name server answers. On the runtime's threads for what
//! may block, a few such look-ups would stop the decoding of what other registries send.
//!
//! It is also here that a redirect from a registry elsewhere cannot lead to this machine or to its link, where clouds
//! answer with the node's own secrets.

use std::{
    io,
    net::{IpAddr, SocketAddr, ToSocketAddrs as _},
    sync::Arc,
    thread,
};

use reqwest::{
    Url,
    dns::{Addrs, Name, Resolve, Resolving},
};
use tokio::sync::{Semaphore, oneshot};

use crate::http::is_loopback;

/// Look-ups at the same time: each is a thread, and only new connections need one.
const LOOK_UPS_MAX: usize = 8;

/// The right to look up names, shared by all connections of a client.
#[derive(Clone)]
pub(crate) struct LookUps(Arc<Semaphore>);

impl Default for LookUps {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(LOOK_UPS_MAX)))
    }
}

/// Looks up names for the connections to one host, and to where it redirects.
pub(crate) struct Resolver {
    pub(crate) look_ups: LookUps,
    /// Whether addresses of this machine and of its link are no answer.
    pub(crate) is_far: bool,
}

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let (look_ups, is_far) = (self.look_ups.0.clone(), self.is_far);
        Box::pin(async move {
            let permit = look_ups.acquire_owned().await?;
            let (sender, receiver) = oneshot::channel();
            let host = name.as_str().to_owned();
            let look_up = move || {
                let found = (host.as_str(), 0).to_socket_addrs().map(|found| found.collect::<Vec<_>>());
                // Who has given up needs no answer; the thread counts until it ends.
                drop(permit);
                let _ = sender.send(found);
            };
            thread::Builder::new().name("registry-dns".to_owned()).spawn(look_up)?;
            let found = receiver.await.map_err(io::Error::other)??;
            // A proxy of the environment may be this machine by its own name.
            let usable = if is_far && !is_loopback(name.as_str()) { without_near(found)? } else { found };
            Ok(Box::new(usable.into_iter()) as Addrs)
        })
    }
}

/// Whether an address is this machine, or one that only its own link knows.
fn is_near(address: IpAddr) -> bool {
    let address = address.to_canonical();
    let is_link_local = match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    address.is_loopback() || address.is_unspecified() || is_link_local
}

/// The addresses that may be elsewhere.
fn without_near(mut found: Vec<SocketAddr>) -> io::Result<Vec<SocketAddr>> {
    let count = found.len();
    found.retain(|found| !is_near(found.ip()));
    match found.len() < count && found.is_empty() {
        true => Err(io::Error::other("redirects of a registry elsewhere do not lead to this machine or its link")),
        false => Ok(found),
    }
}

/// Whether `url` says itself that it leads to this machine or its link.
pub(crate) fn leads_near(url: &Url) -> bool {
    let Some(host) = url.host_str() else { return false };
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    is_loopback(host) || address.is_ok_and(is_near)
}

#[cfg(test)]
mod tests {
    use std::str::FromStr as _;

    use super::*;

    #[test]
    fn this_machine_and_its_link_are_near() {
        let check = |text: &str, expected| assert_eq!(leads_near(&Url::parse(text).unwrap()), expected, "{text}");
        check("http://169.254.169.254/latest/meta-data", true);
        check("http://[fe80::1]/", true);
        check("http://[::ffff:169.254.169.254]/", true);
        check("http://2852039166/", true);
        check("http://127.0.0.1:9000/x", true);
        check("http://[::1]/", true);
        check("http://0.0.0.0/", true);
        check("http://localhost/", true);
        check("http://10.0.0.1/", false);
        check("https://store.example/", false);
    }

    #[test]
    fn a_name_that_leads_near_only_is_no_answer() {
        let address = |text: &str| SocketAddr::new(text.parse().unwrap(), 0);
        assert_eq!(without_near(vec![address("127.0.0.1"), address("192.0.2.1")]).unwrap(), [address("192.0.2.1")]);
        let error = without_near(vec![address("169.254.169.254")]).unwrap_err().to_string();
        assert_eq!(error, "redirects of a registry elsewhere do not lead to this machine or its link");
        assert!(without_near(Vec::new()).unwrap().is_empty());
    }

    #[tokio::test]
    async fn names_are_looked_up_outside_the_runtimes_threads() {
        let resolver = Resolver { look_ups: LookUps::default(), is_far: false };
        let found = resolver.resolve(Name::from_str("localhost").unwrap()).await.unwrap();
        assert!(found.map(|found| found.ip()).all(|address| address.is_loopback()));
        assert_eq!(resolver.look_ups.0.available_permits(), LOOK_UPS_MAX);
    }
}

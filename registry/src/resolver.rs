//! Names of hosts become addresses on threads of their own, a few at a time for each registry.
//!
//! The system's resolver blocks, for half a minute where no name server answers. On the runtime's threads for what
//! may block, a few such look-ups would stop the decoding of what other registries send. And whoever pushes an image
//! chooses names: a registry's own, and those that it redirects to. So names that nobody answers hold up their own
//! registry, and where others wait for a thread all the same, they use the addresses that they had last.
//!
//! It is also here that a redirect from a registry elsewhere cannot lead to this machine or to its link, where clouds
//! answer with the node's own secrets.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr, ToSocketAddrs as _},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use reqwest::{
    Url,
    dns::{Addrs, Name, Resolve, Resolving},
};
use tokio::{
    sync::{Semaphore, oneshot},
    time::Instant,
};

use crate::http::is_loopback;

/// Look-ups at the same time in all: each is a thread, and only new connections need one.
const LOOK_UPS_MAX: usize = 128;
/// Those for one host of a registry and for where it redirects: its own name and that of its storage.
const LOOK_UPS_OF_HOST_MAX: usize = 2;
/// How long a look-up is waited for where an earlier answer is known.
const KNOWN_AFTER: Duration = Duration::from_secs(1);
/// How long an answer is good for that, as resolvers do that serve stale data (RFC 8767 allows days).
const KNOWN_LIFE: Duration = Duration::from_secs(3600);
/// Names that are remembered for one host.
const KNOWN_MAX: usize = 16;

/// The system's resolver.
type LookUp = fn(&str) -> io::Result<Vec<SocketAddr>>;

/// The right to look up names, shared by all connections of a client.
#[derive(Clone)]
pub(crate) struct LookUps(Arc<Semaphore>);

/// The look-ups for one host, and for where it redirects.
pub(crate) struct LookUpsOfHost {
    permits: Arc<Semaphore>,
    /// The last addresses of names, and when they were found.
    known: Mutex<HashMap<String, (Instant, Vec<SocketAddr>)>>,
}

impl Default for LookUps {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(LOOK_UPS_MAX)))
    }
}

impl Default for LookUpsOfHost {
    fn default() -> Self {
        Self { permits: Arc::new(Semaphore::new(LOOK_UPS_OF_HOST_MAX)), known: Mutex::default() }
    }
}

impl LookUpsOfHost {
    fn known(&self, name: &str) -> Option<Vec<SocketAddr>> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(name).filter(|(since, _)| since.elapsed() < KNOWN_LIFE).map(|(_, found)| found.clone())
    }

    fn note(&self, name: &str, found: &[SocketAddr]) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= KNOWN_MAX && !known.contains_key(name) {
            let oldest = known.iter().min_by_key(|(_, (since, _))| *since).map(|(name, _)| name.clone());
            oldest.map(|oldest| known.remove(&oldest));
        }
        known.insert(name.to_owned(), (Instant::now(), found.to_vec()));
    }
}

/// Looks up names for the connections to one host, and to where it redirects.
#[derive(Clone)]
pub(crate) struct Resolver {
    all: LookUps,
    own: Arc<LookUpsOfHost>,
    /// Whether addresses of this machine and of its link are no answer.
    is_far: bool,
    system: LookUp,
}

impl Resolver {
    /// A resolver that takes every answer of the system.
    pub(crate) fn new(all: &LookUps, own: &Arc<LookUpsOfHost>) -> Self {
        let system = |name: &str| Ok((name, 0).to_socket_addrs()?.collect());
        Self { all: all.clone(), own: Arc::clone(own), is_far: false, system }
    }

    /// The same where addresses of this machine and of its link are no answer.
    pub(crate) fn with_far(self, is_far: bool) -> Self {
        Self { is_far, ..self }
    }

    async fn look_up(&self, name: &str) -> io::Result<Vec<SocketAddr>> {
        let own = Arc::clone(&self.own.permits).acquire_owned().await.map_err(io::Error::other)?;
        let all = Arc::clone(&self.all.0).acquire_owned().await.map_err(io::Error::other)?;
        let (sender, receiver) = oneshot::channel();
        let (resolver, name) = (self.clone(), name.to_owned());
        let look_up = move || {
            let found = (resolver.system)(&name);
            if let Ok(found) = &found {
                resolver.own.note(&name, found);
            }
            // A caller that has given up needs no answer; the thread counts until it ends.
            drop((own, all));
            let _ = sender.send(found);
        };
        thread::Builder::new().name("registry-dns".to_owned()).spawn(look_up)?;
        receiver.await.map_err(io::Error::other)?
    }
}

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let resolver = self.clone();
        Box::pin(async move {
            let name = name.as_str();
            let look_up = resolver.look_up(name);
            let found = match resolver.own.known(name) {
                None => look_up.await?,
                Some(known) => tokio::time::timeout(KNOWN_AFTER, look_up).await.unwrap_or(Ok(known))?,
            };
            // A proxy of the environment may be this machine by its own name.
            let usable = if resolver.is_far && !is_loopback(name) { without_near(found)? } else { found };
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
    use std::{
        str::FromStr as _,
        sync::atomic::{AtomicBool, Ordering},
    };

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
        let resolver = Resolver::new(&LookUps::default(), &Arc::default());
        let found = resolver.resolve(Name::from_str("localhost").unwrap()).await.unwrap();
        assert!(found.map(|found| found.ip()).all(|address| address.is_loopback()));
        assert_eq!(resolver.all.0.available_permits(), LOOK_UPS_MAX);
    }

    /// One registry redirected to names without an answer: no other got a connection for minutes.
    #[tokio::test]
    async fn names_that_nobody_answers_hold_up_their_own_registry_alone() {
        let system = |name: &str| match name.starts_with("silent") {
            true => loop {
                thread::park();
            },
            false => Ok(vec![SocketAddr::from(([192, 0, 2, 1], 0))]),
        };
        let all = LookUps::default();
        let silent = Resolver { system, ..Resolver::new(&all, &Arc::default()) };
        let waiting: Vec<_> = (0..100)
            .map(|number| tokio::spawn(silent.resolve(format!("silent{number}.example").parse().unwrap())))
            .collect();
        while all.0.available_permits() > LOOK_UPS_MAX - LOOK_UPS_OF_HOST_MAX {
            tokio::task::yield_now().await;
        }
        let healthy = Resolver { system, ..Resolver::new(&all, &Arc::default()) };
        let found = healthy.resolve("healthy.example".parse().unwrap()).await.unwrap();
        assert_eq!(found.count(), 1);
        assert!(waiting.iter().all(|waiting| !waiting.is_finished()));
        assert!(all.0.available_permits() >= LOOK_UPS_MAX - LOOK_UPS_OF_HOST_MAX - 1);
    }

    #[tokio::test]
    async fn a_host_whose_name_is_not_answered_is_reached_where_it_was() {
        static IS_SILENT: AtomicBool = AtomicBool::new(false);
        let system = |_: &str| {
            while IS_SILENT.load(Ordering::Relaxed) {
                thread::park();
            }
            Ok(vec![SocketAddr::from(([192, 0, 2, 7], 0))])
        };
        let resolver = Resolver { system, ..Resolver::new(&LookUps::default(), &Arc::default()) };
        let resolve = || resolver.resolve("store.example".parse().unwrap());
        let before: Vec<_> = resolve().await.unwrap().collect();
        IS_SILENT.store(true, Ordering::Relaxed);
        for _ in 0..3 {
            assert_eq!(resolve().await.unwrap().collect::<Vec<_>>(), before);
        }
    }

    #[test]
    fn a_host_has_few_names_remembered() {
        let own = LookUpsOfHost::default();
        (0..100).for_each(|number| own.note(&format!("r{number}"), &[]));
        assert_eq!(own.known.lock().unwrap().len(), KNOWN_MAX);
        assert!(own.known("r99").is_some() && own.known("r0").is_none());
    }
}

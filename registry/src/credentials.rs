//! Credentials for a host, from docker's `config.json` or the helper that it names.
//!
//! They are looked up anew each time: logins and secrets change while a daemon runs. One look-up a host at a time,
//! and everybody who waits meanwhile shares what it finds.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use crate::{
    docker_config::{Configured, Credential, find_configured},
    error::{Error, clean},
    files::FileThread,
    helper::ask_helper,
};

/// Longest `config.json`: logins of thousands of hosts.
const CONFIG_LEN_MAX: u64 = 4 << 20;
/// How long a failure answers for new look-ups too: a helper that fails must not be run in a loop.
const FAILURE_LIFE: Duration = Duration::from_secs(1);
/// Hosts remembered at most: more than any node speaks to.
const HOSTS_MAX: usize = 4096;

/// The credentials that a client can find.
pub(crate) struct Credentials {
    /// docker's `config.json`, if any.
    config: Option<PathBuf>,
    hosts: Mutex<HashMap<String, Arc<Host>>>,
}

#[derive(Default)]
struct Host {
    last: tokio::sync::Mutex<Option<LookUp>>,
    origin: Mutex<Origin>,
}

/// A look-up that has ended.
struct LookUp {
    ended: Instant,
    found: Result<Option<Credential>, String>,
}

/// Where the credentials of a host come from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
enum Origin {
    #[default]
    Nowhere,
    Config,
    /// A helper, by its name.
    Helper(String),
}

impl LookUp {
    /// Whether it answers who has asked at `asked`.
    fn answers(&self, asked: Instant) -> bool {
        self.ended >= asked || (self.found.is_err() && asked - self.ended < FAILURE_LIFE)
    }
}

impl Credentials {
    pub(crate) fn new(config: Option<PathBuf>) -> Self {
        Self { config, hosts: Mutex::default() }
    }

    /// The credentials for `host` as they are now; `None` where there are none.
    pub(crate) async fn find(&self, host: &str, files: &FileThread) -> Result<Option<Credential>, Error> {
        let Some(config) = &self.config else { return Ok(None) };
        let (asked, slot) = (Instant::now(), self.host(host));
        let mut last = slot.last.lock().await;
        let look_up = match last.take().filter(|last| last.answers(asked)) {
            Some(shared) => shared,
            None => {
                let (origin, found) = look_up(config, host, files).await;
                *slot.origin.lock().unwrap_or_else(PoisonError::into_inner) = origin;
                LookUp { ended: Instant::now(), found }
            }
        };
        let found = last.insert(look_up).found.clone();
        found.map_err(|reason| Error::Credentials { host: host.to_owned(), reason })
    }

    /// A hint for where `host` refuses permission.
    pub(crate) fn hint(&self, host: &str) -> String {
        let origin = self.host(host).origin.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let config = self.config.as_deref().unwrap_or(Path::new("config.json")).display();
        match origin {
            Origin::Nowhere => format!("check the name and `docker login {host}`"),
            Origin::Config => format!("check the name, and the login for {host} in {config} (`docker login {host}`)"),
            Origin::Helper(name) => {
                format!("check the name, and what the credential helper docker-credential-{name} has for {host}")
            }
        }
    }

    fn host(&self, host: &str) -> Arc<Host> {
        // A panic elsewhere leaves the map usable: every change to it is a single call.
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        if hosts.len() >= HOSTS_MAX {
            hosts.clear();
        }
        Arc::clone(hosts.entry(host.to_owned()).or_default())
    }
}

async fn look_up(config: &Path, host: &str, files: &FileThread) -> (Origin, Result<Option<Credential>, String>) {
    let (path, name) = (config.to_owned(), host.to_owned());
    let configured = match files.run(move || read_config(&path, &name)).await {
        Ok(Ok(configured)) => configured,
        Ok(Err(reason)) => return (Origin::Config, Err(reason)),
        Err(reason) => return (Origin::Config, Err(format!("{}: {reason}", config.display()))),
    };
    match configured {
        Configured::Nothing => (Origin::Nowhere, Ok(None)),
        Configured::Here(credential) => (Origin::Config, Ok(Some(credential))),
        Configured::Helper { name, key } => match ask_helper(&name, &key).await {
            Ok(None) => (Origin::Nowhere, Ok(None)),
            found => (Origin::Helper(name), found),
        },
    }
}

/// Blocks.
fn read_config(path: &Path, host: &str) -> Result<Configured, String> {
    let refuse = |reason: &dyn std::fmt::Display| clean(&format!("{}: {reason}", path.display()));
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Configured::Nothing),
        Err(error) => return Err(refuse(&error)),
    };
    let mut text = Vec::new();
    file.take(CONFIG_LEN_MAX + 1).read_to_end(&mut text).map_err(|error| refuse(&error))?;
    if text.len() as u64 > CONFIG_LEN_MAX {
        return Err(refuse(&format!("longer than {CONFIG_LEN_MAX} bytes")));
    }
    find_configured(&text, host).map_err(|reason| refuse(&reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn find(text: &str, host: &str) -> Result<Option<Credential>, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        std::fs::write(&path, text).unwrap();
        let found = Credentials::new(Some(path)).find(host, &FileThread::default()).await;
        found.map_err(|error| error.to_string().replace(&directory.path().display().to_string(), "DIR"))
    }

    #[tokio::test]
    async fn no_file_and_no_entry_mean_anonymous() {
        let nowhere = Credentials::new(Some("/nonexistent/config.json".into()));
        assert!(nowhere.find("h.example", &FileThread::default()).await.unwrap().is_none());
        assert!(find("{}", "h.example").await == Ok(None));
    }

    #[tokio::test]
    async fn says_what_is_wrong_with_the_configuration() {
        let check = async |text: &str, expected: &str| {
            let error = find(text, "h.example").await.err().unwrap();
            assert!(error.starts_with(&format!("credentials for h.example: {expected}")), "{error}");
        };
        check("{", "DIR/config.json: no docker config.json").await;
        let helper = r#"{"credHelpers": {"h.example": "of-lazuli-that-nobody-has"}}"#;
        let expected = "the credential helper docker-credential-of-lazuli-that-nobody-has cannot be run: No such file";
        check(helper, expected).await;
    }
}

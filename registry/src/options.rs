//! What a user can say about talking to registries.

use std::{collections::BTreeSet, path::PathBuf, time::Duration};

/// Which hosts are spoken to without TLS, beside those on loopback that have no certificates configured.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum PlainHttp {
    /// No others.
    #[default]
    Never,
    /// These, as they are named in references: with their ports.
    Hosts(BTreeSet<String>),
    /// All.
    Always,
}

impl PlainHttp {
    /// Whether it is for this host.
    pub fn is_for(&self, host: &str) -> bool {
        match self {
            Self::Never => false,
            Self::Hosts(hosts) => hosts.contains(host),
            Self::Always => true,
        }
    }
}

/// How a [`crate::Client`] behaves. A plain struct: the program fills it in once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientOptions {
    /// Which registries without an address in a `hosts.toml` are spoken to in plain HTTP.
    pub plain_http: PlainHttp,
    /// Hosts that a registry may have a client send uploads to, beside itself.
    pub upload_hosts: BTreeSet<String>,
    /// Longest wait for a TCP and TLS connection.
    pub connect_timeout: Duration,
    /// Longest wait for the next few kilobytes of an answer, or for the next byte of an upload to leave.
    pub stall_timeout: Duration,
    /// How long a manifest, a config or a token may take, beside a second for each 32 KiB of it that have come: an
    /// answer that comes a byte at a time never stalls.
    pub document_timeout: Duration,
    /// The same for an answer to a read as long as another host may be faster: then that one is asked for the rest.
    pub slow_timeout: Duration,
    /// How long one host is waited for before the next one is asked for the same part of a blob as well.
    pub hedge_delay: Duration,
    /// How long an operation goes on trying without progress; counted from the first failure. A request that was
    /// refused is not tried again.
    ///
    /// A command leaves all patience to the client. A daemon whose readers wait longer, and for refusals too, decides
    /// that where the readers are: it sets this to a few seconds, looks at the kind and the `retry_after` of each
    /// [`storage::SourceError`], and asks again itself.
    pub patience: Duration,
    /// The same for a host that has not answered anything yet: mostly it is misspelt or down, and a person waits.
    /// A daemon that restarts during an outage sets it to [`Self::patience`].
    pub first_contact_patience: Duration,
    /// First wait between two attempts; doubles with each, with jitter.
    pub retry_delay_min: Duration,
    /// Longest wait between two attempts, unless the registry asks for more.
    pub retry_delay_max: Duration,
    /// docker's `config.json`; `None`, or a file that is not there, means anonymous.
    pub docker_config: Option<PathBuf>,
    /// A directory like containerd's `/etc/containerd/certs.d`: in `HOST_PORT_`, `HOST:PORT`, `HOST` or `_default`
    /// a `hosts.toml`, or docker's `*.crt`, `*.cert`, `*.key`. Changes in it count within half a minute.
    pub hosts_dir: Option<PathBuf>,
    /// Blobs go up in chunks of so many bytes; `None` sends them whole, and in chunks where a registry refuses that.
    pub upload_chunk_len: Option<u64>,
}

impl Default for ClientOptions {
    /// Suits a command that a person waits for; no credentials.
    fn default() -> Self {
        Self {
            plain_http: PlainHttp::default(),
            upload_hosts: BTreeSet::new(),
            connect_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(30),
            document_timeout: Duration::from_secs(60),
            slow_timeout: Duration::from_secs(3),
            hedge_delay: Duration::from_millis(1500),
            patience: Duration::from_secs(60),
            first_contact_patience: Duration::from_secs(3),
            retry_delay_min: Duration::from_millis(200),
            retry_delay_max: Duration::from_secs(10),
            docker_config: None,
            hosts_dir: None,
            upload_chunk_len: None,
        }
    }
}

impl ClientOptions {
    /// The defaults with docker's `config.json` where docker itself looks for it: in `$DOCKER_CONFIG`, else in
    /// `~/.docker`; and `$LAZULI_HOSTS_DIR` as [`Self::hosts_dir`]. For use in `main` only.
    ///
    /// `/etc/containerd/certs.d` is not taken unasked: a containerd that is not configured to use it ignores it too.
    pub fn from_environment() -> Self {
        let directory = std::env::var_os("DOCKER_CONFIG")
            .map(PathBuf::from)
            .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".docker")));
        Self {
            docker_config: directory.map(|directory| directory.join("config.json")),
            hosts_dir: std::env::var_os("LAZULI_HOSTS_DIR").filter(|path| !path.is_empty()).map(PathBuf::from),
            ..Self::default()
        }
    }
}

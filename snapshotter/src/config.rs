//! What the daemon is told: a few values, from flags, a file and defaults, in this order.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use control::{DedupScope, Mode};
use serde::Deserialize;

use crate::{
    snapshotter::Limits,
    trust::{Trust, TrustSettings},
};

/// Where the configuration lies unless a flag says otherwise; it need not exist.
pub const CONFIG_PATH: &str = "/etc/lazuli/config.toml";
const ADDRESS: &str = "/run/lazuli/snapshotter.sock";
const ROOT: &str = "/var/lib/lazuli";
const FUSED: &str = "lazuli-fused";
const LOG: &str = "info";
/// An index that is not there after this is that of a slow or dead registry: a kubelet hears why, and asks again.
/// Longer would be long for all images: containerd holds a lock for which its garbage collection waits, and behind that
/// every other start.
const START_SECONDS: u32 = 10;
/// A registry that takes longer for a few KiB is one from which a lazy start is no gain.
const PROBE_SECONDS: u32 = 2;
/// A busy machine is silent for some seconds; kubelet's next attempt comes after more than this.
const HANG_SECONDS: u32 = 30;

/// What a flag or the file may set.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The socket to serve on.
    pub address: Option<PathBuf>,
    /// The directory that holds everything.
    pub root: Option<PathBuf>,
    /// The program `lazuli-fused`.
    pub fused: Option<PathBuf>,
    /// Whether it is a service of its own, which this daemon does not start.
    pub fused_is_service: Option<bool>,
    /// Whether it speaks plain HTTP to every registry; on loopback it does so anyway.
    pub plain_http: Option<bool>,
    /// How it mounts trees.
    pub mode: Option<Mode>,
    /// What the kernel reads ahead of a sequential reader, in KiB.
    pub read_ahead: Option<u32>,
    /// MiB a second at which the rest of each layer is fetched after start-up, 0 for only what is read.
    pub background_rate: Option<u32>,
    /// How long a read waits for bytes, whatever the registries answer, in seconds.
    pub patience: Option<u32>,
    /// MiB of memory for all indexes that are being opened.
    pub index_memory: Option<u32>,
    /// MiB a second at which cached content is compared with its checksums, 0 for never.
    pub scrub_rate: Option<u32>,
    /// Whether it records what starts read, and fetches that ahead for the next version of an image.
    pub record_starts: Option<bool>,
    /// How long a container waits for its lazy layers, in seconds.
    pub start_timeout: Option<u32>,
    /// How long the first lazy layer of an image waits for a look at its registry, in seconds.
    pub probe_timeout: Option<u32>,
    /// How long `lazuli-fused` may be silent, in seconds; 0 for ever.
    pub hang_timeout: Option<u32>,
    /// Between which layers content is copied.
    pub dedup: Option<DedupScope>,
    /// Whose layers are believed before they are verified.
    pub trust: Option<TrustSettings>,
    /// What both programs log.
    pub log: Option<String>,
}

/// The whole configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The socket to serve on.
    pub address: PathBuf,
    /// The directory that holds everything.
    pub root: PathBuf,
    /// The program `lazuli-fused`.
    pub fused: PathBuf,
    /// Whether it is a service of its own, which this daemon does not start.
    pub fused_is_service: bool,
    /// Whether it speaks plain HTTP to every registry; on loopback it does so anyway.
    pub plain_http: bool,
    /// How it mounts trees.
    pub mode: Mode,
    /// What the kernel reads ahead of a sequential reader, in KiB; `None` for the default of `lazuli-fused`.
    pub read_ahead: Option<u32>,
    /// MiB a second at which the rest of each layer is fetched after start-up; `None` for the default of
    /// `lazuli-fused`.
    pub background_rate: Option<u32>,
    /// How long a read waits for bytes, whatever the registries answer, in seconds; `None` for the default of
    /// `lazuli-fused`.
    pub patience: Option<u32>,
    /// MiB of memory for all indexes that are being opened; `None` for the default of `lazuli-fused`.
    pub index_memory: Option<u32>,
    /// MiB a second at which cached content is compared with its checksums; `None` for the default of `lazuli-fused`.
    pub scrub_rate: Option<u32>,
    /// Whether it records what starts read, and fetches that ahead for the next version of an image; `None` for the default
    /// of `lazuli-fused`.
    pub record_starts: Option<bool>,
    /// How long things may take.
    pub limits: Limits,
    /// Between which layers content is copied; `None` for the default of `lazuli-fused`.
    pub dedup: Option<DedupScope>,
    /// Whose layers are believed before they are verified.
    pub trust: Trust,
    /// What both programs log.
    pub log: String,
}

impl Config {
    /// What `lazuli-fused` is told besides its places.
    pub fn fused_arguments(&self) -> Vec<String> {
        let mut arguments = vec!["--mode".to_owned(), self.mode.to_string(), "--log".to_owned(), self.log.clone()];
        let numbers = [
            ("--read-ahead", self.read_ahead),
            ("--background-rate", self.background_rate),
            ("--patience", self.patience),
            ("--index-memory", self.index_memory),
            ("--scrub-rate", self.scrub_rate),
        ];
        for (flag, number) in numbers {
            arguments.extend(number.into_iter().flat_map(|number| [flag.to_owned(), number.to_string()]));
        }
        arguments.extend(self.record_starts.into_iter().flat_map(|is| ["--record-starts".to_owned(), is.to_string()]));
        arguments.extend(self.dedup.into_iter().flat_map(|scope| ["--dedup".to_owned(), scope.to_string()]));
        arguments.extend(self.plain_http.then(|| "--plain-http".to_owned()));
        arguments
    }
}

fn seconds(seconds: u32) -> Duration {
    Duration::from_secs(seconds.into())
}

/// A configuration file is unusable.
#[derive(Debug, thiserror::Error)]
#[error("configuration: line {line}: {problem}")]
pub struct ConfigError {
    line: usize,
    problem: String,
}

impl Settings {
    /// Parses a configuration file; unknown keys are refused.
    ///
    /// # Errors
    ///
    /// When it is no TOML or has a key or value that makes no sense.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error| {
            let offset = error.span().map_or(0, |span| span.start.min(text.len()));
            let line = 1 + text.as_bytes()[..offset].iter().filter(|byte| **byte == b'\n').count();
            let message = error.message().lines().next().unwrap_or_default();
            // A message about a value does not name its key.
            let key = text.lines().nth(line - 1).and_then(|text| text.split_once('=')).map(|(key, _)| key.trim());
            let is_key =
                |key: &&str| !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
            let key = key.filter(is_key).filter(|key| !message.contains(&format!("`{key}`")));
            let problem = key.map_or_else(|| message.to_owned(), |key| format!("{key}: {message}"));
            ConfigError { line, problem }
        })
    }

    /// The configuration: these settings, else those of `file`, else the defaults.
    ///
    /// `beside` is the directory of the running program, where `lazuli-fused` usually lies; without it,
    /// or when it does not lie there, the search path decides.
    pub fn or(self, file: Self, beside: Option<&Path>) -> Config {
        let fused_beside = || beside.map(|directory| directory.join(FUSED)).filter(|path| path.exists());
        Config {
            address: self.address.or(file.address).unwrap_or_else(|| ADDRESS.into()),
            root: self.root.or(file.root).unwrap_or_else(|| ROOT.into()),
            fused: self.fused.or(file.fused).or_else(fused_beside).unwrap_or_else(|| FUSED.into()),
            fused_is_service: self.fused_is_service.or(file.fused_is_service).unwrap_or_default(),
            plain_http: self.plain_http.or(file.plain_http).unwrap_or_default(),
            mode: self.mode.or(file.mode).unwrap_or_default(),
            read_ahead: self.read_ahead.or(file.read_ahead),
            background_rate: self.background_rate.or(file.background_rate),
            patience: self.patience.or(file.patience),
            index_memory: self.index_memory.or(file.index_memory),
            scrub_rate: self.scrub_rate.or(file.scrub_rate),
            record_starts: self.record_starts.or(file.record_starts),
            limits: Limits {
                start: seconds(self.start_timeout.or(file.start_timeout).unwrap_or(START_SECONDS)),
                probe: seconds(self.probe_timeout.or(file.probe_timeout).unwrap_or(PROBE_SECONDS)),
                hang: Some(self.hang_timeout.or(file.hang_timeout).unwrap_or(HANG_SECONDS))
                    .filter(|seconds| *seconds > 0)
                    .map(seconds),
            },
            dedup: self.dedup.or(file.dedup),
            trust: self.trust.or(file.trust).unwrap_or_default().into(),
            log: self.log.or(file.log).unwrap_or_else(|| LOG.to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_come_before_the_file_and_the_file_before_defaults() {
        let text = "address = '/a.sock'\nroot = '/b'\nplain_http = true\nmode = 'fuse'\nfused_is_service = true\nbackground_rate = 0\npatience = 90\nindex_memory = 32\nscrub_rate = 0\nrecord_starts = false\nhang_timeout = 0\nstart_timeout = 5\ndedup = 'node'\n[trust]\nrepositories = ['host/team']\n";
        let file = Settings::parse(text).unwrap();
        let flags = Settings { root: Some("/c".into()), ..Settings::default() };
        let expected = Config {
            address: "/a.sock".into(),
            root: "/c".into(),
            fused: FUSED.into(),
            fused_is_service: true,
            plain_http: true,
            mode: Mode::Fuse,
            read_ahead: None,
            background_rate: Some(0),
            patience: Some(90),
            index_memory: Some(32),
            scrub_rate: Some(0),
            record_starts: Some(false),
            limits: Limits { start: seconds(5), probe: seconds(PROBE_SECONDS), hang: None },
            dedup: Some(DedupScope::Node),
            trust: TrustSettings { repositories: vec!["host/team".to_owned()], ..TrustSettings::default() }.into(),
            log: LOG.to_owned(),
        };
        let config = flags.or(file, None);
        assert_eq!(config, expected);
        assert_eq!(
            config.fused_arguments(),
            [
                "--mode",
                "fuse",
                "--log",
                "info",
                "--background-rate",
                "0",
                "--patience",
                "90",
                "--index-memory",
                "32",
                "--scrub-rate",
                "0",
                "--record-starts",
                "false",
                "--dedup",
                "node",
                "--plain-http"
            ]
        );
    }

    #[test]
    fn the_other_daemon_is_taken_from_beside_this_one() {
        let directory = tempfile::tempdir().unwrap();
        let config = || Settings::default().or(Settings::default(), Some(directory.path()));
        assert_eq!(config().fused, PathBuf::from(FUSED));
        std::fs::write(directory.path().join(FUSED), "").unwrap();
        assert_eq!(config().fused, directory.path().join(FUSED));
    }

    #[test]
    fn a_typo_is_refused_with_its_line() {
        let error = Settings::parse("address = '/a'\nrooot = '/b'\n").unwrap_err().to_string();
        assert!(error.starts_with("configuration: line 2: unknown field `rooot`"), "{error}");
        let error = Settings::parse("root = '/a'\nbackground_rate = '5'").unwrap_err().to_string();
        assert!(error.starts_with("configuration: line 2: background_rate: invalid type"), "{error}");
        let error = Settings::parse("mode = 'eros'").unwrap_err().to_string();
        assert!(error.starts_with("configuration: line 1: mode: unknown variant `eros`"), "{error}");
    }
}

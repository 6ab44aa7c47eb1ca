//! `hosts.toml`: where containerd's users say which mirrors stand in for a registry, and how each is spoken to.
//!
//! From text to values only; `hosts_dir` finds and reads the files. All keys of containerd are known. Stricter
//! than containerd, which ignores what it does not know: a misspelt `skip_verify` or `ca` must not pass in silence.
//!
//! Source: containerd `docs/hosts.md`, `core/remotes/docker/config/hosts.go`.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use reqwest::{
    Url,
    header::{HeaderName, HeaderValue},
};
use serde::Deserialize;
use toml::Spanned;

/// What a host may be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Capability {
    /// Content by its digest.
    Pull,
    /// What a tag means: needs trust.
    Resolve,
    /// Storing content.
    Push,
}

impl Capability {
    pub(crate) const ALL: [Self; 3] = [Self::Pull, Self::Resolve, Self::Push];
}

/// How one host is spoken to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostConfig {
    /// Where its API begins, without a slash at the end; `None` for the registry that the reference names.
    pub(crate) root: Option<Url>,
    pub(crate) capabilities: Vec<Capability>,
    /// Files of CA certificates, trusted besides the system's.
    pub(crate) ca: Vec<PathBuf>,
    /// Tried one after the other until one is accepted.
    pub(crate) clients: Vec<ClientCertificate>,
    pub(crate) skip_verify: bool,
    pub(crate) headers: Vec<(HeaderName, HeaderValue)>,
    pub(crate) dial_timeout: Option<Duration>,
    pub(crate) proxy: Option<Url>,
}

impl Default for HostConfig {
    /// The registry itself, for everything.
    fn default() -> Self {
        Self {
            root: None,
            capabilities: Capability::ALL.to_vec(),
            ca: Vec::new(),
            clients: Vec::new(),
            skip_verify: false,
            headers: Vec::new(),
            dial_timeout: None,
            proxy: None,
        }
    }
}

/// The files that prove who we are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ClientCertificate {
    pub(crate) certificate: PathBuf,
    /// `None` where the key is in the same file.
    pub(crate) key: Option<PathBuf>,
}

/// Reads a `hosts.toml` of `directory`: the hosts in the order to try them, the server last.
///
/// # Errors
///
/// One line: what is wrong, and at which key or line.
pub(crate) fn parse_hosts(text: &str, directory: &Path) -> Result<Vec<HostConfig>, String> {
    let file: RawFile = toml::from_str(text).map_err(|error| {
        let line = error.span().map(|span| text[..span.start.min(text.len())].lines().count().max(1));
        let place = line.map_or(String::new(), |line| format!("line {line}: "));
        format!("{place}{}", error.message().replace('\n', " "))
    })?;
    let mut listed: Vec<(usize, String, RawHost)> =
        file.host.into_iter().map(|(name, host)| (name.span().start, name.into_inner(), host)).collect();
    // The map has lost the order of the file, which is the order to try them.
    listed.sort_by_key(|(position, ..)| *position);
    let mut hosts = Vec::with_capacity(listed.len() + 1);
    for (_, name, host) in listed {
        let checked = host.check(Some(&name), directory);
        hosts.push(checked.map_err(|reason| format!("host {name:?}: {reason}"))?);
    }
    let server = RawHost {
        capabilities: file.capabilities,
        ca: file.ca,
        client: file.client,
        skip_verify: file.skip_verify,
        header: file.header,
        override_path: file.override_path,
        dial_timeout: file.dial_timeout,
        proxy: file.proxy,
    };
    hosts.push(server.check(file.server.as_deref(), directory)?);
    Ok(hosts)
}

/// The top of the file: the server, and all that a host can have. (serde cannot flatten and refuse unknown keys.)
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFile {
    server: Option<String>,
    #[serde(default)]
    host: BTreeMap<Spanned<String>, RawHost>,
    #[serde(default)]
    capabilities: Vec<Capability>,
    ca: Option<OneOrMore>,
    client: Option<RawClient>,
    #[serde(default)]
    skip_verify: bool,
    #[serde(default)]
    header: BTreeMap<String, OneOrMore>,
    #[serde(default)]
    override_path: bool,
    dial_timeout: Option<String>,
    proxy: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHost {
    #[serde(default)]
    capabilities: Vec<Capability>,
    ca: Option<OneOrMore>,
    client: Option<RawClient>,
    #[serde(default)]
    skip_verify: bool,
    #[serde(default)]
    header: BTreeMap<String, OneOrMore>,
    #[serde(default)]
    override_path: bool,
    dial_timeout: Option<String>,
    proxy: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

impl OneOrMore {
    fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(one) => vec![one],
            Self::More(more) => more,
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "client: expected a path, a list of paths, or a list of [certificate, key]")]
enum RawClient {
    Files(OneOrMore),
    Pairs(Vec<[String; 2]>),
}

impl RawHost {
    fn check(self, address: Option<&str>, directory: &Path) -> Result<HostConfig, String> {
        let capabilities = match (address, self.capabilities.is_empty()) {
            (Some(_), false) => self.capabilities,
            // The registry itself can do everything, whatever stands there: as in containerd.
            _ => Capability::ALL.to_vec(),
        };
        let clients = match self.client {
            None => Vec::new(),
            Some(RawClient::Files(files)) => files.into_vec().into_iter().map(|file| [file, String::new()]).collect(),
            Some(RawClient::Pairs(pairs)) => pairs,
        };
        let mut headers = Vec::new();
        for (name, values) in self.header {
            let checked = HeaderName::from_bytes(name.as_bytes()).map_err(|_| format!("header {name:?} is none"))?;
            for value in values.into_vec() {
                let value = HeaderValue::from_str(&value).map_err(|_| format!("header {name}: no value for one"))?;
                headers.push((checked.clone(), value));
            }
        }
        Ok(HostConfig {
            root: address.map(|address| parse_root(address, self.override_path)).transpose()?,
            capabilities,
            ca: self.ca.map_or(Vec::new(), OneOrMore::into_vec).iter().map(|file| directory.join(file)).collect(),
            clients: clients
                .into_iter()
                .map(|[certificate, key]| ClientCertificate {
                    certificate: directory.join(certificate),
                    key: if key.is_empty() { None } else { Some(directory.join(key)) },
                })
                .collect(),
            skip_verify: self.skip_verify,
            headers,
            dial_timeout: self.dial_timeout.as_deref().map(parse_duration).transpose()?,
            proxy: self.proxy.as_deref().map(parse_proxy).transpose()?,
        })
    }
}

/// Where the API of the host at `address` begins.
fn parse_root(address: &str, override_path: bool) -> Result<Url, String> {
    let refuse = || format!("{address:?} is no address of a registry: expected http(s)://host[:port][/path]");
    let with_scheme = if address.contains("://") { address.to_owned() } else { format!("https://{address}") };
    let mut url = Url::parse(&with_scheme).map_err(|_| refuse())?;
    let is_simple = url.username().is_empty() && url.password().is_none() && url.query().is_none();
    if !is_simple || url.fragment().is_some() || !matches!(url.scheme(), "http" | "https") {
        return Err(refuse());
    }
    let mut path = url.path().trim_end_matches('/').to_owned();
    if !override_path && !path.ends_with("/v2") {
        path.push_str("/v2");
    }
    url.set_path(&path);
    Ok(url)
}

fn parse_proxy(address: &str) -> Result<Url, String> {
    Url::parse(address)
        .ok()
        .filter(|url| matches!(url.scheme(), "http" | "https" | "socks4" | "socks4a" | "socks5" | "socks5h"))
        .filter(|url| url.has_host() && matches!(url.path(), "" | "/"))
        .filter(|url| url.query().is_none() && url.fragment().is_none())
        .ok_or_else(|| format!("proxy: {address:?} is no http://host:port or socks5://host:port"))
}

/// A length of time as Go writes it: `1s`, `500ms`, `1m30s`.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let refuse = || format!("dial_timeout: {text:?} is no time such as \"5s\"");
    let (mut rest, mut total) = (text, Duration::ZERO);
    while !rest.is_empty() {
        let digits = rest.find(|letter: char| !letter.is_ascii_digit()).ok_or_else(refuse)?;
        let count: u32 = rest[..digits].parse().map_err(|_| refuse())?;
        let unit_end =
            rest[digits..].find(|letter: char| letter.is_ascii_digit()).map_or(rest.len(), |end| digits + end);
        let unit = match &rest[digits..unit_end] {
            "ms" => Duration::from_millis(1),
            "s" => Duration::from_secs(1),
            "m" => Duration::from_secs(60),
            "h" => Duration::from_secs(3600),
            _ => return Err(refuse()),
        };
        total = unit.checked_mul(count).and_then(|part| total.checked_add(part)).ok_or_else(refuse)?;
        rest = &rest[unit_end..];
    }
    if total.is_zero() { Err(refuse()) } else { Ok(total) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Vec<HostConfig>, String> {
        parse_hosts(text, Path::new("/d"))
    }

    #[test]
    fn reads_every_key_that_containerd_documents() {
        let text = r#"
            server = "registry.example"
            capabilities = ["pull", "resolve"]
            [header]
              x-top = "1"
            [host."https://zulu.example/us"]
              capabilities = ["pull"]
              ca = ["/abs.pem", "rel.pem"]
              client = [["a.cert", "a.key"]]
              skip_verify = true
              dial_timeout = "1m500ms"
              proxy = "http://proxy.example:3128"
              [host."https://zulu.example/us".header]
                x-two = ["a", "b"]
            [host."http://alfa.example:5000/v2/upstream/"]
              override_path = true
              client = "both.pem"
        "#;
        let header = |name, value| (HeaderName::from_static(name), HeaderValue::from_static(value));
        let certificate = |certificate: &str, key: Option<&str>| {
            vec![ClientCertificate { certificate: certificate.into(), key: key.map(Into::into) }]
        };
        let expected = [
            HostConfig {
                root: Some("https://zulu.example/us/v2".parse().unwrap()),
                capabilities: vec![Capability::Pull],
                ca: vec!["/abs.pem".into(), "/d/rel.pem".into()],
                clients: certificate("/d/a.cert", Some("/d/a.key")),
                skip_verify: true,
                headers: vec![header("x-two", "a"), header("x-two", "b")],
                dial_timeout: Some(Duration::from_millis(60_500)),
                proxy: Some("http://proxy.example:3128".parse().unwrap()),
            },
            HostConfig {
                root: Some("http://alfa.example:5000/v2/upstream".parse().unwrap()),
                clients: certificate("/d/both.pem", None),
                ..HostConfig::default()
            },
            HostConfig {
                root: Some("https://registry.example/v2".parse().unwrap()),
                capabilities: vec![Capability::Pull, Capability::Resolve],
                headers: vec![header("x-top", "1")],
                ..HostConfig::default()
            },
        ];
        assert_eq!(parse(text).unwrap(), expected);
    }

    #[test]
    fn without_a_server_the_registry_itself_comes_last_and_can_do_everything() {
        assert_eq!(parse("capabilities = [\"pull\"]").unwrap(), [HostConfig::default()]);
        let found = parse("[host.\"https://m.example/v2/\"]\n[host.\"https://a.example\"]").unwrap();
        let roots: Vec<Option<&str>> = found.iter().map(|host| host.root.as_ref().map(Url::as_str)).collect();
        assert_eq!(roots, [Some("https://m.example/v2"), Some("https://a.example/v2"), None]);
    }

    #[test]
    fn says_in_one_line_what_is_wrong_and_where() {
        let check = |text: &str, expected: &str| {
            let error = parse(text).unwrap_err();
            assert!(error.contains(expected) && !error.contains('\n'), "{text}: {error}");
        };
        check("sever = \"a\"", "line 1: unknown field `sever`");
        // Inside a table the line is that of its head.
        check("\n[host.\"https://a\"]\nskip-verify = true", "line 2: unknown field `skip-verify`");
        check("[host.\"https://a\"]\n[host.\"https://a\".host.\"https://b\"]", "unknown field `host`");
        check("capabilities = [\"pul\"]", "unknown variant `pul`");
        check("\nca = 1", "line 2: expected a string or a list of strings");
        check("client = [[\"a\"]]", "client: expected a path");
        check("skip_verify = \"yes\"", "expected a boolean");
        check("server = \"ftp://a\"", "\"ftp://a\" is no address of a registry");
        check("[host.\"https://u:p@a\"]", "host \"https://u:p@a\": \"https://u:p@a\" is no address");
        check("[host.\"https://a\"]\n[host.\"https://a\"]", "duplicate key");
        check("[header]\n\"a b\" = \"c\"", "header \"a b\" is none");
        check("[header]\nab = \"c\\nd\"", "header ab: no value for one");
        check("dial_timeout = \"soon\"", "dial_timeout: \"soon\" is no time");
        check("dial_timeout = \"5\"", "dial_timeout: \"5\" is no time");
        check("dial_timeout = \"99999999999999h\"", "is no time");
        check("proxy = \"ftp://a:1\"", "proxy: \"ftp://a:1\" is no http://host:port or socks5://host:port");
        check("= 1", "line 1: ");
    }
}

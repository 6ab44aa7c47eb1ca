//! A directory like containerd's `certs.d`: one folder for each registry, with a `hosts.toml`, or with
//! certificates named as docker names them.
//!
//! Blocks: reads small files.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use crate::{
    error::{Error, clean},
    hosts::{ClientCertificate, HostConfig, parse_hosts},
};

/// Longest file that is read here; a bundle of all public CAs is some 200 kilobytes.
const FILE_LEN_MAX: u64 = 4 << 20;
/// The folder for registries that have none of their own.
const DEFAULT_FOLDER: &str = "_default";

/// A host and the contents of its certificate files.
#[derive(Clone, PartialEq, Eq, Default)]
pub(crate) struct HostSettings {
    pub(crate) config: HostConfig,
    /// PEM files of CA certificates.
    pub(crate) ca: Vec<Vec<u8>>,
    /// Our certificates, each with its key, PEM. Secret.
    pub(crate) identities: Vec<Vec<u8>>,
}

impl HostSettings {
    /// Whether anything in it makes sense for TLS only.
    pub(crate) fn has_tls(&self) -> bool {
        !self.ca.is_empty() || !self.identities.is_empty() || self.config.skip_verify
    }
}

impl fmt::Debug for HostSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostSettings").field("config", &self.config).finish_non_exhaustive()
    }
}

/// The hosts for `registry` by the first folder of `directory` that is for it, in the order to try them; at least
/// one. `None` where no folder is for it.
pub(crate) fn read_hosts(directory: &Path, registry: &str) -> Result<Option<Vec<HostSettings>>, Error> {
    for name in folder_names(registry) {
        let folder = directory.join(name);
        match fs::metadata(&folder) {
            Ok(metadata) if metadata.is_dir() => return read_folder(&folder).map(Some),
            Ok(_) => return Err(refuse(&folder, "no directory")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(refuse(&folder, &error)),
        }
    }
    Ok(None)
}

/// Where to look, best first. Source: containerd `docs/hosts.md`, "Port Handling in Registry Host".
fn folder_names(registry: &str) -> Vec<String> {
    let mut names = vec![registry.to_owned(), DEFAULT_FOLDER.to_owned()];
    if let Some((name, port)) = registry.rsplit_once(':').filter(|(_, port)| port.parse::<u16>().is_ok()) {
        names.insert(0, format!("{name}_{port}_"));
    }
    names
}

fn read_folder(folder: &Path) -> Result<Vec<HostSettings>, Error> {
    let file = folder.join("hosts.toml");
    let text = match read_file(&file) {
        Ok(bytes) => String::from_utf8(bytes).map_err(|_| refuse(&file, "not UTF-8"))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(refuse(&file, error)),
    };
    let hosts = match text.trim().is_empty() {
        true => vec![find_certificates(folder)?],
        false => parse_hosts(&text, folder).map_err(|reason| refuse(&file, reason))?,
    };
    hosts.into_iter().map(read_settings).collect()
}

/// The registry itself, with docker's certificate files: `*.crt` are CAs, `*.cert` ours, `*.key` its key.
fn find_certificates(folder: &Path) -> Result<HostConfig, Error> {
    let entries = fs::read_dir(folder).map_err(|error| refuse(folder, error))?;
    let mut files = Vec::new();
    for entry in entries {
        files.push(entry.map_err(|error| refuse(folder, error))?.path());
    }
    files.sort();
    let with_extension = |wanted: &str| -> Vec<PathBuf> {
        files.iter().filter(|file| file.extension().is_some_and(|found| found == wanted)).cloned().collect()
    };
    let to_client = |certificate: PathBuf| {
        let key = certificate.with_extension("key");
        let key = files.contains(&key).then_some(key);
        ClientCertificate { certificate, key }
    };
    let clients = with_extension("cert").into_iter().map(to_client).collect();
    Ok(HostConfig { ca: with_extension("crt"), clients, ..HostConfig::default() })
}

fn read_settings(config: HostConfig) -> Result<HostSettings, Error> {
    let ca = config.ca.iter().map(|file| read_pem(file)).collect::<Result<_, _>>()?;
    let identities = config.clients.iter().map(read_identity).collect::<Result<_, _>>()?;
    Ok(HostSettings { config, ca, identities })
}

fn read_identity(client: &ClientCertificate) -> Result<Vec<u8>, Error> {
    let ClientCertificate { certificate, key } = client;
    let mut pem = read_pem(certificate)?;
    if let Some(key) = key {
        pem.push(b'\n');
        pem.extend(read_pem(key)?);
    }
    match reqwest::Identity::from_pem(&pem) {
        Ok(_) => Ok(pem),
        Err(_) => Err(refuse(certificate, "no client certificate with its key (PEM)")),
    }
}

fn read_pem(file: &Path) -> Result<Vec<u8>, Error> {
    let bytes = read_file(file).map_err(|error| refuse(file, error))?;
    let has_block = bytes.windows(11).any(|window| window == b"-----BEGIN ");
    if has_block { Ok(bytes) } else { Err(refuse(file, "no certificate or key (PEM) in it")) }
}

fn read_file(file: &Path) -> io::Result<Vec<u8>> {
    match fs::metadata(file)?.len() {
        0..=FILE_LEN_MAX => fs::read(file),
        _ => Err(io::Error::other(format!("longer than {FILE_LEN_MAX} bytes"))),
    }
}

fn refuse(path: &Path, reason: impl fmt::Display) -> Error {
    Error::HostsFile { path: path.to_owned(), reason: clean(&reason.to_string()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_for_a_folder_as_containerd_does() {
        assert_eq!(folder_names("r.example:5000"), ["r.example_5000_", "r.example:5000", "_default"]);
        assert_eq!(folder_names("docker.io"), ["docker.io", "_default"]);
        assert_eq!(folder_names("[::1]:5000"), ["[::1]_5000_", "[::1]:5000", "_default"]);
        assert_eq!(folder_names("[::1]"), ["[::1]", "_default"]);
    }

    #[test]
    fn finds_dockers_certificates_where_there_is_no_hosts_toml() {
        let directory = tempfile::tempdir().unwrap();
        let folder = directory.path().join("r.example");
        assert_eq!(read_hosts(directory.path(), "r.example").unwrap(), None);
        fs::create_dir(&folder).unwrap();
        assert_eq!(read_hosts(directory.path(), "r.example").unwrap(), Some(vec![HostSettings::default()]));
        fs::write(folder.join("ca.crt"), "-----BEGIN CERTIFICATE-----").unwrap();
        let found = read_hosts(directory.path(), "r.example").unwrap().unwrap();
        assert_eq!((found.len(), found[0].ca.len(), found[0].has_tls()), (1, 1, true));
        fs::write(folder.join("hosts.toml"), "server = \"other.example\"").unwrap();
        let found = read_hosts(directory.path(), "r.example").unwrap().unwrap();
        assert_eq!((found.len(), found[0].ca.len(), found[0].has_tls()), (1, 0, false));
    }

    #[test]
    fn names_the_file_that_cannot_be_used() {
        let directory = tempfile::tempdir().unwrap();
        let folder = directory.path().join("_default");
        fs::create_dir(&folder).unwrap();
        let check = |text: &str, expected: &str| {
            fs::write(folder.join("hosts.toml"), text).unwrap();
            let error = read_hosts(directory.path(), "r.example").unwrap_err().to_string();
            let expected = expected.replace("FOLDER", &folder.display().to_string());
            assert!(error.starts_with(&expected) && !error.contains('\n'), "{error}");
        };
        check("skip_verfy = true", "FOLDER/hosts.toml: line 1: unknown field `skip_verfy`");
        check("ca = \"none.pem\"", "FOLDER/none.pem: No such file");
        check("ca = \"hosts.toml\"", "FOLDER/hosts.toml: no certificate or key (PEM) in it");
        fs::write(folder.join("c.pem"), "-----BEGIN CERTIFICATE-----").unwrap();
        check("client = \"c.pem\"", "FOLDER/c.pem: no client certificate with its key (PEM)");
    }
}

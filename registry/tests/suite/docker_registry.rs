//! Debian's `docker-registry` on a free loopback port, with its storage in a temporary directory.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

use registry::Reference;
use tempfile::TempDir;

use crate::certificates::Certificates;

/// bcrypt of "open sesame".
const ALADDIN: &str = "aladdin:$2y$05$abcdefghijklmnopqrstuupx2xBUC4954936wVIjyyPHmUBFu0wCW\n";

/// A running registry; ends with the value.
pub(crate) struct DockerRegistry {
    host: String,
    process: Child,
    storage: TempDir,
    /// Lines below `http:`, and further sections.
    more_config: String,
}

impl DockerRegistry {
    pub(crate) fn start() -> Self {
        Self::start_with("")
    }

    /// Lets in `aladdin` with `open sesame` only.
    pub(crate) fn start_with_password() -> Self {
        Self::start_with("auth: {htpasswd: {realm: cave, path: DIRECTORY/htpasswd}}\n")
    }

    /// Speaks TLS with the server certificate; `wants_client` lets in only who has a certificate of the same CA.
    pub(crate) fn start_with_tls(certificates: &Certificates, wants_client: bool) -> Self {
        let path = certificates.path().display();
        let clients = if wants_client { format!(", clientcas: ['{path}/ca.pem']") } else { String::new() };
        Self::start_with(&format!(
            "  tls: {{certificate: '{path}/server.pem', key: '{path}/server-key.pem'{clients}}}\n"
        ))
    }

    fn start_with(more_config: &str) -> Self {
        let storage = tempfile::tempdir().unwrap();
        std::fs::write(storage.path().join("htpasswd"), ALADDIN).unwrap();
        let more_config = more_config.to_owned();
        let (process, host) = serve(storage.path(), "127.0.0.1:0", &more_config);
        Self { host, process, storage, more_config }
    }

    pub(crate) fn stop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Starts again what was stopped, at the same address and with the same content.
    pub(crate) fn restart(&mut self) {
        self.process = serve(self.storage.path(), &self.host, &self.more_config).0;
    }

    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    /// Uploads into a repository that were begun and neither committed nor ended.
    pub(crate) fn open_uploads(&self, repository: &str) -> usize {
        let path =
            self.storage.path().join("storage/docker/registry/v2/repositories").join(repository).join("_uploads");
        // It leaves states of its hashes behind, but no content.
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        entries.filter(|entry| entry.path().join("data").exists()).count()
    }

    pub(crate) fn reference(&self, name: &str) -> Reference {
        format!("{}/{name}", self.host).parse().unwrap()
    }
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        // Fails only for one that has been stopped already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Starts a registry and waits until it listens; returns where.
fn serve(directory: &Path, address: &str, more_config: &str) -> (Child, String) {
    let config = format!(
        "version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: DIRECTORY/storage}}}}\n\
         http:\n  addr: '{address}'\n{more_config}"
    )
    .replace("DIRECTORY", &directory.display().to_string());
    let config_path = directory.join("config.yml");
    std::fs::write(&config_path, config).unwrap();
    let mut process = Command::new("docker-registry")
        .arg("serve")
        .arg(&config_path)
        .env_clear()
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("docker-registry (Debian package of that name) must be installed");
    let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
    let host = lines
        .by_ref()
        .map_while(Result::ok)
        .find_map(|line| Some(line.split_once("listening on ")?.1.split(['"', ' ', ',']).next()?.to_owned()))
        .expect("docker-registry says where it listens");
    // Its log must go on being read, or it blocks.
    std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
    (process, host)
}

//! A private registry (Debian's `docker-registry`) that tells what it served.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use format_spec::Digest;
use rustix::process::Signal;
use serde_json::Value;

use crate::{
    error::{Context as _, HarnessError, Result},
    process::{Service, command, require_program, run, wait_for},
    registry_log::{Served, parse_line},
    scratch::Scratch,
};

/// User and password of a private registry.
pub const USER: (&str, &str) = ("aladdin", "open sesame");
/// bcrypt of that.
const PASSWORDS: &str = "aladdin:$2y$05$abcdefghijklmnopqrstuupx2xBUC4954936wVIjyyPHmUBFu0wCW\n";

/// A registry on a free port of the loopback interface.
#[derive(Debug)]
pub struct TestRegistry {
    address: String,
    storage: PathBuf,
    log: PathBuf,
    marks: AtomicU64,
    service: Service,
}

impl TestRegistry {
    /// Starts an empty registry in `<scratch>/registry`.
    ///
    /// # Errors
    ///
    /// When `docker-registry` is not installed or does not start.
    pub fn start(scratch: &Scratch) -> Result<Self> {
        Self::start_with(scratch, "")
    }

    /// Starts one that lets nobody in: it asks for a password that nobody has.
    ///
    /// # Errors
    ///
    /// As [`Self::start`].
    pub fn start_closed(scratch: &Scratch) -> Result<Self> {
        let passwords = scratch.join("passwords");
        fs::write(&passwords, "").at("writing", &passwords)?;
        let authentication = "auth:\n  htpasswd:\n    realm: nobody\n    path: ";
        Self::start_with(scratch, &format!("{authentication}{}\n", passwords.display()))
    }

    /// Starts a second one over what this one has, for [`USER`] only.
    ///
    /// # Errors
    ///
    /// As [`Self::start`].
    pub fn start_private_door(&self, scratch: &Scratch) -> Result<Self> {
        let passwords = scratch.join("private.passwords");
        fs::write(&passwords, PASSWORDS).at("writing", &passwords)?;
        let authentication = format!("auth:\n  htpasswd:\n    realm: cave\n    path: {}\n", passwords.display());
        Self::start_in(&scratch.directory("private")?, self.storage.clone(), scratch.log("private"), &authentication)
    }

    /// Starts one that speaks TLS with this certificate and its key.
    ///
    /// # Errors
    ///
    /// As [`Self::start`].
    pub fn start_with_certificate(scratch: &Scratch, certificate: &Path, key: &Path) -> Result<Self> {
        // Goes on with `http`, the last section.
        let tls = format!("  tls:\n    certificate: {}\n    key: {}\n", certificate.display(), key.display());
        Self::start_with(scratch, &tls)
    }

    fn start_with(scratch: &Scratch, more: &str) -> Result<Self> {
        let directory = scratch.directory("registry")?;
        Self::start_in(&directory, directory.join("storage"), scratch.log("registry"), more)
    }

    fn start_in(directory: &Path, storage: PathBuf, log: PathBuf, more: &str) -> Result<Self> {
        require_program("docker-registry")?;
        let address = free_address()?;
        let config = directory.join("config.yml");
        fs::write(&config, configuration(&storage, &address) + more).at("writing", &config)?;
        let mut serve = command("docker-registry", ["serve"]);
        serve.arg(&config);
        let service = Service::start("docker-registry", &mut serve, &log, || TcpStream::connect(&address).is_ok())?;
        Ok(Self { address, storage, log, marks: AtomicU64::new(0), service })
    }

    /// Has it answer nobody until [`Self::resume`]: requests wait.
    pub fn pause(&mut self) {
        self.service.signal(Signal::STOP);
    }

    /// Has it answer again.
    pub fn resume(&mut self) {
        self.service.signal(Signal::CONT);
    }

    /// `host:port`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The full reference of `name`, which is `repository:tag` or `repository@digest`.
    pub fn reference(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    /// Copies an image in a layout (`oci:DIR:tag`) to `name`; returns the full reference.
    ///
    /// # Errors
    ///
    /// When `skopeo` fails.
    pub fn push(&self, layout: &str, name: &str) -> Result<String> {
        push_to(&self.address, layout, name)
    }

    /// The manifest of `name`.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn manifest(&self, name: &str) -> Result<Value> {
        self.inspect(name, "--raw")
    }

    /// The digest of the manifest of `name`.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn digest(&self, name: &str) -> Result<Digest> {
        let inspect = ["inspect", "--tls-verify=false", "--raw"];
        let bytes = run(command("skopeo", inspect).arg(format!("docker://{}", self.reference(name))))?;
        Ok(Digest::of(bytes.as_bytes()))
    }

    /// The image configuration of `name`.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn config(&self, name: &str) -> Result<Value> {
        let manifest = self.manifest(name)?;
        let digest = digest_in(&manifest["config"])?;
        let path = self.blob_file(digest);
        parse_json(&fs::read_to_string(&path).at("reading", &path)?)
    }

    fn inspect(&self, name: &str, form: &str) -> Result<Value> {
        let inspect = ["inspect", "--tls-verify=false", form];
        parse_json(&run(command("skopeo", inspect).arg(format!("docker://{}", self.reference(name))))?)
    }

    /// The file in which the registry keeps a blob; whoever changes it makes the registry lie.
    pub fn blob_file(&self, digest: Digest) -> PathBuf {
        let hex = digest.hex();
        self.storage.join("docker/registry/v2/blobs/sha256").join(&hex[..2]).join(&hex).join("data")
    }

    /// Its process ID.
    pub fn id(&self) -> u32 {
        self.service.id()
    }

    /// The tags of `repository`; empty also when the repository does not exist.
    pub fn tags(&self, repository: &str) -> Vec<String> {
        let tags = self.storage.join("docker/registry/v2/repositories").join(repository).join("_manifests/tags");
        let entries = fs::read_dir(tags).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// Everything answered so far, in the order in which the answers ended.
    ///
    /// An answer that is still being written is not in it.
    ///
    /// # Errors
    ///
    /// When the registry does not answer or its log cannot be read.
    pub fn served(&self) -> Result<Vec<Served>> {
        // Answers are logged after their last byte has left: wait for the line of a request of our own.
        let mark = format!("/v2/?mark={}", self.marks.fetch_add(1, Ordering::Relaxed));
        let request = format!("GET {mark} HTTP/1.0\r\nHost: {}\r\n\r\n", self.address);
        let mut connection = TcpStream::connect(&self.address).context("connecting to the registry")?;
        connection.write_all(request.as_bytes()).context("asking the registry")?;
        connection.read_to_end(&mut Vec::new()).context("reading from the registry")?;
        let log = wait_for("the registry did not log its answers", || {
            let log = fs::read_to_string(&self.log).at("reading", &self.log)?;
            Ok(Some(log).filter(|log| log.contains(&mark)))
        })?;
        let answers = log.lines().filter_map(|line| parse_line(line).filter(|served| !served.path.contains("mark=")));
        Ok(answers.collect())
    }

    /// Bytes of blobs read so far.
    ///
    /// # Errors
    ///
    /// As [`Self::served`].
    pub fn blob_bytes(&self) -> Result<u64> {
        Ok(self.served()?.iter().filter(|served| served.is_blob_read()).map(|served| served.body_bytes).sum())
    }
}

/// Copies an image in a layout (`oci:DIR:tag`) to `name` in the registry at `address`; returns the full reference.
///
/// # Errors
///
/// When `skopeo` fails.
pub fn push_to(address: &str, layout: &str, name: &str) -> Result<String> {
    let reference = format!("{address}/{name}");
    let copy = ["copy", "--quiet", "--dest-tls-verify=false", layout];
    run(command("skopeo", copy).arg(format!("docker://{reference}")))?;
    Ok(reference)
}

/// The digest in a descriptor.
///
/// # Errors
///
/// When there is none.
pub fn digest_in(descriptor: &Value) -> Result<Digest> {
    let digest = descriptor["digest"].as_str().and_then(|text| text.parse().ok());
    digest.ok_or_else(|| HarnessError::Unexpected(format!("no digest in descriptor {descriptor}")))
}

fn parse_json(text: &str) -> Result<Value> {
    serde_json::from_str(text).map_err(|error| HarnessError::Unexpected(format!("no JSON: {error}")))
}

/// A loopback address with a port that nobody uses at this moment.
///
/// # Errors
///
/// When the system has none.
pub fn free_address() -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0").context("looking for a free port")?;
    Ok(listener.local_addr().context("looking for a free port")?.to_string())
}

fn configuration(storage: &Path, address: &str) -> String {
    format!(
        "version: 0.1
log:
  level: info
  formatter: json
  accesslog:
    disabled: true
storage:
  filesystem:
    rootdirectory: {}
  delete:
    enabled: true
http:
  addr: {address}
",
        storage.display()
    )
}

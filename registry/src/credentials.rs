//! Credentials from docker's `config.json`, credential helpers included.

use std::{fs::File, io, path::Path, time::Duration};

use docker_credential::{CredentialRetrievalError, DockerCredential};

use crate::error::{Error, clean};

/// Longest run of a credential helper: it may ask a service over the network, but not a person.
const HELPER_TIMEOUT: Duration = Duration::from_secs(60);
/// The key under which docker keeps the credentials of Docker Hub.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";

/// The credentials configured for `host`; `None` where there are none.
pub(crate) async fn find_credential(config: Option<&Path>, host: &str) -> Result<Option<DockerCredential>, Error> {
    let Some(config) = config.map(Path::to_owned) else { return Ok(None) };
    let refuse = |reason: String| Error::Credentials { host: host.to_owned(), reason };
    let key = if matches!(host, "docker.io" | "registry-1.docker.io") { DOCKER_HUB_KEY } else { host }.to_owned();
    let lookup = tokio::task::spawn_blocking(move || read_credential(&config, &key));
    match tokio::time::timeout(HELPER_TIMEOUT, lookup).await {
        Err(_) => Err(refuse(format!("the credential helper did not answer in {} s", HELPER_TIMEOUT.as_secs()))),
        Ok(Err(error)) => Err(refuse(error.to_string())),
        Ok(Ok(found)) => found.map_err(refuse),
    }
}

/// Blocks: reads the file and may run a helper.
fn read_credential(config: &Path, key: &str) -> Result<Option<DockerCredential>, String> {
    use CredentialRetrievalError as Refused;
    let file = match File::open(config) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("cannot open {}: {error}", config.display())),
    };
    match docker_credential::get_credential_from_reader(io::BufReader::new(file), key) {
        Ok(credential) => Ok(Some(credential)),
        Err(Refused::NoCredentialConfigured | Refused::ConfigNotFound) => Ok(None),
        // The helpers' agreed way to say that they have nothing for this host.
        Err(Refused::HelperFailure { stdout, .. }) if stdout.contains("credentials not found") => Ok(None),
        Err(Refused::HelperFailure { helper, stdout, stderr }) => {
            Err(clean(&format!("helper {helper} failed: {stdout} {stderr}")))
        }
        Err(Refused::HelperCommunicationError) => {
            Err(format!("the credential helper named in {} cannot be run", config.display()))
        }
        Err(Refused::ConfigReadError) => Err(format!("{} is no docker config.json", config.display())),
        Err(error) => Err(clean(&format!("{}: {error}", config.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, key: &str) -> Result<Option<DockerCredential>, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        std::fs::write(&path, text).unwrap();
        read_credential(&path, key).map_err(|error| error.replace(&path.display().to_string(), "FILE"))
    }

    #[test]
    fn finds_what_docker_login_wrote_and_nothing_else() {
        let login = r#"{"auths": {"localhost:5000": {"auth": "YWxhZGRpbjpvcGVuIHNlc2FtZQ=="}}}"#;
        let aladdin = DockerCredential::UsernamePassword("aladdin".into(), "open sesame".into());
        assert_eq!(read(login, "localhost:5000"), Ok(Some(aladdin)));
        assert_eq!(read(login, "localhost:5001"), Ok(None));
        assert_eq!(read("{}", "localhost:5000"), Ok(None));
        assert_eq!(read_credential(Path::new("/nonexistent/config.json"), "localhost:5000"), Ok(None));
    }

    #[test]
    fn says_what_is_wrong_with_the_configuration() {
        assert_eq!(read("{", "h.example"), Err("FILE is no docker config.json".to_owned()));
        let helper = r#"{"credHelpers": {"h.example": "of-lazuli-that-nobody-has"}}"#;
        assert_eq!(read(helper, "h.example"), Err("the credential helper named in FILE cannot be run".to_owned()));
    }
}

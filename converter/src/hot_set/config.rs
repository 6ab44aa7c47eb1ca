//! What an image's config says of its start.

use std::collections::BTreeMap;

use serde::Deserialize;

/// Where programs are looked up if the image's environment does not say (what runc sets).
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Command and environment of an image: what a container has that is told nothing else.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StartConfig {
    /// Program and arguments: entrypoint, then command.
    pub argv: Vec<Vec<u8>>,
    /// Environment, without entries that have no `=`.
    pub env: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Working directory, absolute.
    pub working_directory: Vec<u8>,
    /// User and group as `user` or `user:group`, names or numbers; empty for root.
    pub user: String,
}

/// The config is no JSON object of the right types.
#[derive(Debug, thiserror::Error)]
#[error("image config: {0}")]
pub struct ConfigError(#[from] serde_json::Error);

/// The config document as far as a start depends on it; OCI and Docker name these alike.
#[derive(Deserialize)]
struct Document {
    config: Option<Section>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase")]
struct Section {
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    env: Option<Vec<String>>,
    working_dir: Option<String>,
    user: Option<String>,
}

impl StartConfig {
    /// Reads the config document of an image.
    ///
    /// # Errors
    ///
    /// When it is no JSON, or the members that say how to start have other types.
    pub fn from_json(document: &[u8]) -> Result<Self, ConfigError> {
        let section = serde_json::from_slice::<Document>(document)?.config.unwrap_or_default();
        let argv = section.entrypoint.into_iter().chain(section.cmd).flatten();
        let env = section.env.unwrap_or_default();
        let env = env.iter().filter_map(|entry| entry.split_once('='));
        let working_directory = section.working_dir.filter(|path| path.starts_with('/'));
        Ok(Self {
            argv: argv.map(String::into_bytes).collect(),
            env: env.map(|(name, value)| (name.into(), value.into())).collect(),
            working_directory: working_directory.unwrap_or_else(|| "/".to_owned()).into_bytes(),
            user: section.user.unwrap_or_default(),
        })
    }

    /// A variable of the environment.
    pub(super) fn variable(&self, name: &str) -> Option<&[u8]> {
        self.env.get(name.as_bytes()).map(Vec::as_slice)
    }

    /// The directories where programs are looked up.
    pub(super) fn search_path(&self) -> impl Iterator<Item = &[u8]> {
        let path = self.variable("PATH").unwrap_or(DEFAULT_PATH.as_bytes());
        path.split(|byte| *byte == b':').filter(|directory| !directory.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entrypoint_and_command_follow_each_other() {
        let document = br#"{"config": {"Entrypoint": ["/init"], "Cmd": ["serve", "-v"], "Env": ["A=b=c", "odd"],
            "WorkingDir": "/app"}, "architecture": "amd64"}"#;
        let config = StartConfig::from_json(document).unwrap();
        assert_eq!(config.argv, [b"/init".to_vec(), b"serve".to_vec(), b"-v".to_vec()]);
        assert_eq!(config.variable("A"), Some(b"b=c".as_slice()));
        assert_eq!(config.variable("odd"), None);
        assert_eq!(config.working_directory, b"/app");
    }

    #[test]
    fn members_that_are_null_or_missing_say_nothing() {
        for document in [r#"{}"#, r#"{"config": null}"#, r#"{"config": {"Cmd": null, "Env": null}}"#] {
            let config = StartConfig::from_json(document.as_bytes()).unwrap();
            assert_eq!(config, StartConfig { working_directory: b"/".to_vec(), ..StartConfig::default() });
            assert_eq!(config.search_path().count(), 6);
        }
    }

    #[test]
    fn wrong_types_are_an_error() {
        assert!(StartConfig::from_json(br#"{"config": {"Cmd": "sh"}}"#).is_err());
        assert!(StartConfig::from_json(b"").is_err());
    }
}

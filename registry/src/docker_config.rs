//! Docker's `config.json`: from text to credentials, or to the helper that has them.
//!
//! Deciding only: `credentials` reads the file and runs helpers. Entries for other hosts may be anything.
//!
//! Source: docker/cli `cli/config/credentials/file_store.go` and `cli/config/configfile/file.go`.

use std::collections::BTreeMap;

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use serde::Deserialize;
use serde_json::Value;

/// The key under which docker keeps the credentials of Docker Hub.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";
/// Names of Docker Hub, all of which mean that key.
const DOCKER_HUB_NAMES: [&str; 3] = ["docker.io", "registry-1.docker.io", "index.docker.io"];
/// The user's name that a helper gives with an identity token.
const TOKEN_USER: &str = "<token>";
/// Paths that docker wrote behind a host: they mean the host. Other paths are podman's, for a part of it only.
const API_PATHS: [&str; 3] = ["", "v1", "v2"];

/// The proof of who we are. Not `Debug`: it is secret.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Credential {
    /// To be exchanged for tokens at a token service.
    IdentityToken(String),
    /// As Basic authentication takes it.
    Password { user: String, password: String },
}

/// The entry of a configuration for a host.
#[derive(PartialEq, Eq)]
pub(crate) enum Configured {
    /// In the file itself.
    Here(Credential),
    /// The helper of this name is to be asked, about this key.
    Helper {
        name: String,
        key: String,
    },
    Nothing,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct DockerConfig {
    #[serde(default)]
    auths: Option<BTreeMap<String, Value>>,
    #[serde(default)]
    creds_store: Option<String>,
    #[serde(default)]
    cred_helpers: Option<BTreeMap<String, Value>>,
}

/// An entry of `auths`.
#[derive(Deserialize)]
struct Entry {
    #[serde(default)]
    auth: Option<String>,
    #[serde(default)]
    username: Option<String>,
    #[serde(default)]
    password: Option<String>,
    #[serde(default)]
    identitytoken: Option<String>,
}

/// The answer of a helper.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    username: String,
    secret: String,
}

/// Finds what a `config.json` has for `host`.
///
/// # Errors
///
/// One line: why the file, or the entry for this host, cannot be used. No secret stands in it.
pub(crate) fn find_configured(text: &[u8], host: &str) -> Result<Configured, String> {
    let config: DockerConfig = serde_json::from_slice(text).map_err(|_| "no docker config.json".to_owned())?;
    let key = if DOCKER_HUB_NAMES.contains(&host) { DOCKER_HUB_KEY } else { host };
    let helpers = config.cred_helpers.unwrap_or_default();
    if let Some(name) = entry_for(&helpers, key).and_then(Value::as_str).filter(|name| !name.is_empty()) {
        return Ok(Configured::Helper { name: name.to_owned(), key: key.to_owned() });
    }
    if let Some(entry) = entry_for(config.auths.as_ref().unwrap_or(&BTreeMap::new()), key)
        && let Some(credential) = read_entry(entry).map_err(|reason| format!("the entry for {host} {reason}"))?
    {
        return Ok(Configured::Here(credential));
    }
    Ok(match config.creds_store.filter(|name| !name.is_empty()) {
        Some(name) => Configured::Helper { name, key: key.to_owned() },
        None => Configured::Nothing,
    })
}

/// Reads the answer of a helper; `None` where it is none.
pub(crate) fn parse_helper_answer(bytes: &[u8]) -> Option<Credential> {
    let HelperAnswer { username, secret } = serde_json::from_slice(bytes).ok()?;
    Some(match username.as_str() {
        TOKEN_USER => Credential::IdentityToken(secret),
        _ => Credential::Password { user: username, password: secret },
    })
}

/// The entry for `key`: under just that, or under another way to write the same host.
fn entry_for<'a>(entries: &'a BTreeMap<String, Value>, key: &str) -> Option<&'a Value> {
    let host = host_of(key)?;
    entries.get(key).or_else(|| Some(entries.iter().find(|(other, _)| host_of(other) == Some(host))?.1))
}

/// The host that a key means; `None` where it means a part of one only.
fn host_of(key: &str) -> Option<&str> {
    let rest = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://"));
    let (host, path) = rest.unwrap_or(key).split_once('/').unwrap_or((rest.unwrap_or(key), ""));
    let is_whole = rest.is_some() || API_PATHS.contains(&path.trim_end_matches('/'));
    let host = if DOCKER_HUB_NAMES.contains(&host) { DOCKER_HUB_NAMES[0] } else { host };
    is_whole.then_some(host)
}

/// `None` where docker has left an empty entry because a helper has the credentials.
fn read_entry(entry: &Value) -> Result<Option<Credential>, &'static str> {
    let entry = Entry::deserialize(entry).map_err(|_| "is none that docker writes")?;
    let filled = |text: Option<String>| text.filter(|text| !text.is_empty());
    if let Some(token) = filled(entry.identitytoken) {
        return Ok(Some(Credential::IdentityToken(token)));
    }
    if let Some(auth) = filled(entry.auth) {
        return decode_auth(&auth).map(Some).ok_or("has an auth that is no user and password in base64");
    }
    Ok(filled(entry.username).zip(entry.password).map(|(user, password)| Credential::Password { user, password }))
}

fn decode_auth(text: &str) -> Option<Credential> {
    let lenient = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let decoded = GeneralPurpose::new(&alphabet::STANDARD, lenient).decode(text.trim()).ok()?;
    let decoded = String::from_utf8(decoded).ok()?;
    let (user, password) = decoded.split_once(':')?;
    // Old docker for Windows ends passwords with zero bytes.
    Some(Credential::Password { user: user.to_owned(), password: password.trim_matches('\0').to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn password(user: &str, password: &str) -> Configured {
        Configured::Here(Credential::Password { user: user.to_owned(), password: password.to_owned() })
    }

    fn helper(name: &str, key: &str) -> Configured {
        Configured::Helper { name: name.to_owned(), key: key.to_owned() }
    }

    fn check(text: &str, host: &str, expected: Result<Configured, &str>) {
        assert!(find_configured(text.as_bytes(), host) == expected.map_err(str::to_owned), "{text} for {host}");
    }

    /// "aladdin:open sesame".
    const AUTH: &str = "YWxhZGRpbjpvcGVuIHNlc2FtZQ==";

    #[test]
    fn every_way_to_write_a_host_is_found() {
        for key in
            ["h.example", "h.example/", "h.example/v1/", "h.example/v2/", "https://h.example", "http://h.example/x/"]
        {
            let text = format!(r#"{{"auths": {{"{key}": {{"auth": "{AUTH}"}}}}}}"#);
            check(&text, "h.example", Ok(password("aladdin", "open sesame")));
            check(&text, "h.example:5000", Ok(Configured::Nothing));
        }
        let of_a_team = format!(r#"{{"auths": {{"h.example/team": {{"auth": "{AUTH}"}}}}}}"#);
        check(&of_a_team, "h.example", Ok(Configured::Nothing));
        for key in ["https://index.docker.io/v1/", "docker.io", "registry-1.docker.io/v2/"] {
            let text = format!(r#"{{"auths": {{"{key}": {{"auth": "{AUTH}"}}}}}}"#);
            check(&text, "docker.io", Ok(password("aladdin", "open sesame")));
        }
    }

    #[test]
    fn the_exact_key_comes_before_another_way_to_write_it() {
        let text = format!(
            r#"{{"auths": {{"h.example/": {{"username": "a", "password": "b"}}, "h.example": {{"auth": "{AUTH}"}}}}}}"#
        );
        check(&text, "h.example", Ok(password("aladdin", "open sesame")));
    }

    #[test]
    fn zero_bytes_at_the_end_of_a_password_are_not_sent() {
        check(r#"{"auths": {"h": {"auth": "YTpiAA=="}}}"#, "h", Ok(password("a", "b")));
    }

    #[test]
    fn a_helper_is_asked_where_docker_would_ask_it() {
        check(r#"{"credHelpers": {"h": "x"}, "credsStore": "y"}"#, "h", Ok(helper("x", "h")));
        check(r#"{"auths": {"h": {}}, "credsStore": "y"}"#, "h", Ok(helper("y", "h")));
        check(r#"{"credsStore": "y"}"#, "docker.io", Ok(helper("y", DOCKER_HUB_KEY)));
        check(r#"{"credsStore": ""}"#, "h", Ok(Configured::Nothing));
    }

    #[test]
    fn other_hosts_entries_may_be_anything() {
        let text = format!(
            r#"{{"auths": {{"g": 7, "f": {{"auth": []}}, "h": {{"auth": "{AUTH}"}}}}, "credHelpers": {{"e": 1}}}}"#
        );
        check(&text, "h", Ok(password("aladdin", "open sesame")));
        check(&text, "f", Err("the entry for f is none that docker writes"));
        check(
            r#"{"auths": {"h": {"auth": "?"}}}"#,
            "h",
            Err("the entry for h has an auth that is no user and password in base64"),
        );
        check("{", "h", Err("no docker config.json"));
        check(r#"{"auths": null}"#, "h", Ok(Configured::Nothing));
    }

    #[test]
    fn helpers_answer_with_passwords_or_tokens() {
        let check =
            |text: &str, expected: Option<Credential>| assert!(parse_helper_answer(text.as_bytes()) == expected);
        let password = Credential::Password { user: "a".into(), password: "b".into() };
        check(r#"{"ServerURL": "x", "Username": "a", "Secret": "b"}"#, Some(password));
        check(r#"{"Username": "<token>", "Secret": "b"}"#, Some(Credential::IdentityToken("b".into())));
        check("{}", None);
    }
}

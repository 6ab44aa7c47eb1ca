//! Answers to a registry's challenge: Basic, or Bearer with a token of its token service.
//!
//! One answer is kept for each host and set of scopes. Requests that are refused at the same time wait
//! for one new answer instead of fetching one each. A kept answer that is refused, with 401 or with 403 as registries
//! say whose passwords expire, is forgotten, and credentials are looked up anew: they may have changed.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use http_auth::{ChallengeParser, ChallengeRef};
use reqwest::{Method, RequestBuilder, Url, header};
use serde::Deserialize;
use tokio::time::Instant;

use crate::{
    client::Client,
    docker_config::Credential,
    endpoint::Endpoint,
    error::Error,
    transport::{host_shown, read_bounded, refusal},
};

/// Longest answer of a token service; tokens are some kilobytes.
const TOKEN_ANSWER_LEN_MAX: u64 = 1 << 20;
/// Life of a token that does not say, as in docker's token specification.
const TOKEN_LIFE_DEFAULT: Duration = Duration::from_secs(60);
/// Tokens are given up this long before their end: the request has a way to go.
const TOKEN_MARGIN: Duration = Duration::from_secs(10);
/// How long a refusal stands after an answer was renewed: somebody who may not read something must not have a token
/// service or a credential helper asked with every request.
const RENEWAL_PAUSE: Duration = Duration::from_secs(5);
/// Answers kept at most: more means a great many repositories, and a new token is cheap.
const SLOTS_MAX: usize = 4096;

/// What a request is allowed to do, in the words of docker's token specification; sorted.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Scopes(BTreeSet<String>);

impl Scopes {
    pub(crate) fn pull(repository: &str) -> Self {
        Self([format!("repository:{repository}:pull")].into())
    }

    pub(crate) fn push(repository: &str) -> Self {
        Self([format!("repository:{repository}:pull,push")].into())
    }

    pub(crate) fn and(mut self, other: Self) -> Self {
        self.0.extend(other.0);
        self
    }
}

/// What goes into the `Authorization` header. Not `Debug`: it is secret.
#[derive(Clone, PartialEq)]
pub(crate) enum Authorization {
    Basic { user: String, password: String },
    Bearer(String),
}

impl Authorization {
    pub(crate) fn apply(&self, request: RequestBuilder) -> RequestBuilder {
        match self {
            Self::Basic { user, password } => request.basic_auth(user, Some(password)),
            Self::Bearer(token) => request.bearer_auth(token),
        }
    }
}

/// An answer and when it ends.
pub(crate) struct Kept {
    authorization: Authorization,
    expires: Option<Instant>,
}

/// The answer that is known for a host and a set of scopes.
#[derive(Default)]
struct SlotState {
    kept: Option<Kept>,
    /// The last challenge of the host: a refusal does not always say it again.
    challenge: Option<Challenge>,
    /// When a kept answer was refused and credentials were looked up anew.
    renewed: Option<Instant>,
}

type Slot = Arc<tokio::sync::Mutex<SlotState>>;

/// The answers a client has given so far.
#[derive(Default)]
pub(crate) struct AuthCache(Mutex<HashMap<(String, Scopes), Slot>>);

impl AuthCache {
    fn slot(&self, endpoint: &Endpoint, scopes: &Scopes) -> Slot {
        // A panic elsewhere leaves the map usable: every change to it is a single call.
        let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if slots.len() >= SLOTS_MAX {
            slots.clear();
        }
        slots.entry((endpoint.root().to_owned(), scopes.clone())).or_default().clone()
    }

    /// The answer to use without being asked, if there is one.
    pub(crate) async fn current(&self, endpoint: &Endpoint, scopes: &Scopes) -> Option<Authorization> {
        let slot = self.slot(endpoint, scopes);
        let state = slot.lock().await;
        state.alive().cloned()
    }
}

impl SlotState {
    fn alive(&self) -> Option<&Authorization> {
        self.kept.as_ref().filter(|kept| kept.is_alive()).map(|kept| &kept.authorization)
    }

    /// Forgets the kept answer after `refused` (if any) was not good enough; returns the challenge to answer.
    ///
    /// `None` where the refusal stands: nobody knows what is wanted, or it was renewed just now.
    fn take_challenge(&mut self, found: Option<Challenge>, refused: Option<&Authorization>) -> Option<Challenge> {
        // A registry that challenges a token anew may end tokens as early as it likes.
        if refused.is_some() && !matches!(found, Some(Challenge::Bearer { .. })) {
            if self.renewed.is_some_and(|renewed| renewed.elapsed() < RENEWAL_PAUSE) {
                return None;
            }
            self.renewed = Some(Instant::now());
        }
        self.kept = None;
        self.challenge = found.or(self.challenge.take());
        self.challenge.clone()
    }
}

impl Kept {
    fn is_alive(&self) -> bool {
        self.expires.is_none_or(|expires| Instant::now() < expires)
    }
}

/// A challenge that we can answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

impl Challenge {
    /// The best challenge in an answer: Bearer before Basic; `None` where there is none that we know.
    pub(crate) fn find(headers: &header::HeaderMap) -> Option<Self> {
        let values = headers.get_all(header::WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
        let mut best = None;
        for challenge in values.flat_map(|value| ChallengeParser::new(value).map_while(Result::ok)) {
            if let Some(bearer) = Self::bearer(&challenge) {
                return Some(bearer);
            }
            if challenge.scheme.eq_ignore_ascii_case("basic") {
                best = Some(Self::Basic);
            }
        }
        best
    }

    fn bearer(challenge: &ChallengeRef<'_>) -> Option<Self> {
        let parameter = |name: &str| {
            let found = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name))?;
            Some(found.1.to_unescaped())
        };
        challenge.scheme.eq_ignore_ascii_case("bearer").then_some(())?;
        Some(Self::Bearer { realm: parameter("realm")?, service: parameter("service"), scope: parameter("scope") })
    }
}

impl Client {
    /// A new answer to `challenge` (or to the one before, where there is none now), after `refused` (if any) was not
    /// good enough.
    ///
    /// `None` where the refusal stands: the host wants credentials and none are configured, or the same as before.
    pub(crate) async fn authorize(
        &self,
        what: &str,
        endpoint: &Endpoint,
        scopes: &Scopes,
        challenge: Option<Challenge>,
        refused: Option<&Authorization>,
    ) -> Result<Option<Authorization>, Error> {
        let slot = self.auth_cache().slot(endpoint, scopes);
        let mut state = slot.lock().await;
        if let Some(other) = state.alive().filter(|kept| Some(*kept) != refused) {
            return Ok(Some(other.clone()));
        }
        let Some(challenge) = state.take_challenge(challenge, refused) else { return Ok(None) };
        let new = self.answer_challenge(what, endpoint, scopes, &challenge).await?;
        let authorization = new.as_ref().map(|new| new.authorization.clone());
        state.kept = new;
        Ok(authorization.filter(|new| Some(new) != refused))
    }

    async fn answer_challenge(
        &self,
        what: &str,
        endpoint: &Endpoint,
        scopes: &Scopes,
        challenge: &Challenge,
    ) -> Result<Option<Kept>, Error> {
        let host = endpoint.name();
        let credential = self.credentials().find(host, self.files()).await?;
        Ok(match (challenge, credential) {
            (Challenge::Bearer { realm, service, scope }, credential) => {
                let scopes = match scope {
                    Some(scope) => scopes.clone().and(Scopes(scope.split(' ').map(str::to_owned).collect())),
                    None => scopes.clone(),
                };
                Some(self.fetch_token(what, endpoint, realm, service.as_deref(), &scopes, credential).await?)
            }
            (Challenge::Basic, Some(Credential::Password { user, password })) => {
                Some(Kept { authorization: Authorization::Basic { user, password }, expires: None })
            }
            (Challenge::Basic, Some(Credential::IdentityToken(_))) => {
                let reason = "an identity token is configured, but the registry wants a user and a password";
                return Err(Error::Credentials { host: host.to_owned(), reason: reason.to_owned() });
            }
            (Challenge::Basic, None) => None,
        })
    }

    /// Gets a token from the token service at `realm`.
    ///
    /// Source: docker's "Token Authentication Specification" (GET), and its OAuth2 variant (POST) for identity tokens.
    async fn fetch_token(
        &self,
        what: &str,
        endpoint: &Endpoint,
        realm: &str,
        service: Option<&str>,
        scopes: &Scopes,
        credential: Option<Credential>,
    ) -> Result<Kept, Error> {
        let (what, host) = (format!("token for {what}"), endpoint.name());
        let mut url = Url::parse(realm)
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https") && url.host_str().is_some())
            .ok_or_else(|| Error::malformed(&what, host, "its token service has no usable address"))?;
        if url.scheme() == "http" && !endpoint.is_plain() && credential.is_some() {
            return Err(Error::malformed(&what, host, "its token service would send the credentials unencrypted"));
        }
        let (method, body, basic) = match credential {
            Some(Credential::IdentityToken(token)) => {
                let scope = scopes.0.iter().map(String::as_str).collect::<Vec<_>>().join(" ");
                let mut form = vec![("grant_type", "refresh_token"), ("client_id", "lazuli"), ("scope", &scope)];
                form.extend(service.map(|service| ("service", service)));
                form.push(("refresh_token", &token));
                (Method::POST, Some(encode_form(&form)), None)
            }
            other => {
                let mut query = url.query_pairs_mut();
                query.extend_pairs(service.map(|service| ("service", service)));
                query.extend_pairs(scopes.0.iter().map(|scope| ("scope", scope)));
                drop(query);
                let basic = match other {
                    Some(Credential::Password { user, password }) => Some(Authorization::Basic { user, password }),
                    _ => None,
                };
                (Method::GET, None, basic)
            }
        };
        let token_host = host_shown(endpoint, &url);
        let mut request = endpoint.http(&what, &url, self)?.request(method, url);
        if let Some(form) = body {
            request = request.header(header::CONTENT_TYPE, "application/x-www-form-urlencoded").body(form);
        }
        if let Some(basic) = basic {
            request = basic.apply(request);
        }
        let response = self.answer(&what, &token_host, request).await?;
        if !response.status().is_success() {
            return Err(refusal(self, &what, endpoint, response).await);
        }
        let bytes = read_bounded(self, &what, &token_host, response, TOKEN_ANSWER_LEN_MAX).await?;
        parse_token(&bytes).ok_or_else(|| Error::malformed(&what, &token_host, "no token in it"))
    }
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

pub(crate) fn parse_token(bytes: &[u8]) -> Option<Kept> {
    let answer: TokenAnswer = serde_json::from_slice(bytes).ok()?;
    let token = answer.token.filter(|token| !token.is_empty()).or(answer.access_token)?;
    // A token goes into a header: one with other characters would be refused there, with a worse message.
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return None;
    }
    let life = answer.expires_in.map_or(TOKEN_LIFE_DEFAULT, Duration::from_secs).saturating_sub(TOKEN_MARGIN);
    let expires = Instant::now().checked_add(life);
    Some(Kept { authorization: Authorization::Bearer(token), expires })
}

fn encode_form(pairs: &[(&str, &str)]) -> String {
    let mut url = Url::parse("http://form.invalid/").expect("a constant address");
    url.query_pairs_mut().extend_pairs(pairs);
    url.query().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_best_challenge() {
        let check = |values: &[&'static str], expected| {
            let mut headers = header::HeaderMap::new();
            for value in values {
                headers.append(header::WWW_AUTHENTICATE, header::HeaderValue::from_static(value));
            }
            assert_eq!(Challenge::find(&headers), expected, "{values:?}");
        };
        let bearer = |scope: Option<&str>| Challenge::Bearer {
            realm: "https://t.example/token".into(),
            service: Some("r".into()),
            scope: scope.map(str::to_owned),
        };
        check(&[], None);
        check(&["Negotiate"], None);
        check(&["Basic realm=\"x\""], Some(Challenge::Basic));
        check(&["bearer Realm=\"https://t.example/token\",service=\"r\""], Some(bearer(None)));
        check(
            &["Basic realm=x", "Bearer realm=\"https://t.example/token\",service=\"r\",scope=\"a b\""],
            Some(bearer(Some("a b"))),
        );
        check(&["Bearer service=\"no realm\""], None);
        check(&["\"=,,=\""], None);
    }

    #[test]
    fn reads_both_forms_of_a_token_and_refuses_the_rest() {
        let bearer = |text: &str| match parse_token(text.as_bytes())?.authorization {
            Authorization::Bearer(token) => Some(token),
            Authorization::Basic { .. } => None,
        };
        assert_eq!(bearer(r#"{"token": "a"}"#).as_deref(), Some("a"));
        assert_eq!(
            bearer(r#"{"token": "", "access_token": "b", "expires_in": 18446744073709551615}"#).as_deref(),
            Some("b")
        );
        for text in ["", "{}", "<html>", r#"{"token": "a\nb"}"#, r#"{"token": 1}"#] {
            assert_eq!(bearer(text), None, "{text}");
        }
    }
}

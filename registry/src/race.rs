//! The first to answer: the hosts of a registry are asked one after the other for a part of a blob, and the next one
//! also while the one before takes its time.
//!
//! An answer counts when its first bytes are there: a host that only says that it will deliver has won nothing.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use reqwest::{Method, Response, Url, header};
use tokio::time::Instant;
use tracing::{debug, info};

use crate::{
    auth::Scopes,
    client::Client,
    endpoint::Endpoint,
    error::Error,
    hosts::Capability,
    mirrors::Round,
    pace::{Limit, Pace},
    part::{Head, Part, Verdict, Wanted},
    redirects::Redirect,
    reference::Reference,
    transport::{Request, host_shown, next_piece_within, refusal},
};

/// An answer whose first bytes are there.
pub(crate) struct Answer {
    pub(crate) endpoint: Arc<Endpoint>,
    pub(crate) part: Part,
    /// The sender, as errors name it.
    pub(crate) host: String,
    /// Hosts that could have been asked.
    pub(crate) host_count: usize,
    what: String,
    response: Response,
    /// The piece that was waited for; `None` where the answer has none.
    first: Option<Option<Bytes>>,
    pace: Pace,
}

/// The part that is asked for.
pub(crate) struct Question<'a> {
    pub(crate) client: &'a Client,
    pub(crate) reference: &'a Reference,
    pub(crate) digest: format_spec::Digest,
    /// The operation, as errors name it.
    pub(crate) what: &'a str,
    pub(crate) wanted: &'a Wanted,
}

/// A host that may be asked.
#[derive(Clone)]
enum Candidate {
    /// The address that the last read was redirected to.
    Redirect(Redirect),
    Host(Arc<Endpoint>),
}

impl Answer {
    /// The next bytes of the answer; `None` at its end.
    ///
    /// # Errors
    ///
    /// [`Error::Stalled`] where fewer come than `limit` says.
    pub(crate) async fn next_piece(&mut self, limit: Limit) -> Result<Option<Bytes>, Error> {
        if let Some(first) = self.first.take() {
            return Ok(first);
        }
        let (begun, patience) = (Instant::now(), self.pace.patience(limit));
        let piece = next_piece_within(&self.what, &self.host, &mut self.response, patience, limit.window).await?;
        self.pace.arrived(piece.as_ref().map_or(0, |piece| piece.len() as u64), begun.elapsed(), limit);
        Ok(piece)
    }

    /// Where the bytes come from.
    pub(crate) fn url(&self) -> &Url {
        self.response.url()
    }
}

impl Question<'_> {
    /// The first answer.
    ///
    /// # Errors
    ///
    /// When nobody has one: what all the failures mean together.
    pub(crate) async fn ask(&self) -> Result<Answer, Error> {
        let mut round = self.client.round(self.reference, Capability::Pull).await?;
        let host_count = round.host_count();
        // A second answer that is all of the blob would cost more than the wait.
        let hedge_delay =
            (self.wanted.is_partial() && !round.ignores_ranges()).then_some(self.client.options().hedge_delay);
        let mut redirect = match self.wanted.is_partial() {
            true => self.client.redirects().find(&self.reference.name(), self.digest),
            false => None,
        };
        let mut next = |round: &mut Round| match redirect.take() {
            Some(redirect) => Some(Candidate::Redirect(redirect)),
            None => round.next().map(Candidate::Host),
        };
        let mut under_way: Vec<Candidate> = Vec::new();
        let mut attempts = FuturesUnordered::new();
        let mut has_more = true;
        loop {
            if attempts.is_empty() {
                let Some(candidate) = next(&mut round) else { return Err(round.into_error()) };
                under_way.push(candidate.clone());
                attempts.push(self.attempt(candidate));
            }
            let hedge = hedge_delay.filter(|_| has_more);
            tokio::select! {
                biased;
                Some((candidate, result)) = attempts.next() => {
                    let position = under_way.iter().position(|other| other.is(&candidate)).unwrap_or(0);
                    under_way.remove(position);
                    match result {
                        Ok(answer) => {
                            // Those that were asked before and have not answered are slow.
                            under_way.iter().take(position).for_each(|slow| self.note_slow(slow));
                            return Ok(Answer { host_count, ..answer });
                        }
                        Err(error) => self.note_failed(&mut round, &candidate, error),
                    }
                }
                () = tokio::time::sleep(hedge.unwrap_or(Duration::MAX)), if hedge.is_some() => {
                    match next(&mut round) {
                        Some(candidate) => {
                            debug!(what = self.what, "no answer yet: the next host is asked as well");
                            under_way.push(candidate.clone());
                            attempts.push(self.attempt(candidate));
                        }
                        None => has_more = false,
                    }
                }
            }
        }
    }

    async fn attempt(&self, candidate: Candidate) -> (Candidate, Result<Answer, Error>) {
        let result = match &candidate {
            Candidate::Redirect(redirect) => self.ask_at(&redirect.endpoint, redirect.url.clone(), false).await,
            Candidate::Host(endpoint) => {
                match endpoint.url(self.reference.repository(), &format!("blobs/{}", self.digest)) {
                    Ok(url) => self.ask_at(endpoint, url, true).await,
                    Err(error) => Err(error),
                }
            }
        };
        (candidate, result)
    }

    fn note_failed(&self, round: &mut Round, candidate: &Candidate, error: Error) {
        match candidate {
            Candidate::Host(endpoint) => round.failed(endpoint, error),
            Candidate::Redirect(redirect) => {
                debug!(%error, "asking the registry instead of the address it redirected to");
                self.client.redirects().refused(&self.reference.name(), self.digest, redirect);
            }
        }
    }

    fn note_slow(&self, candidate: &Candidate) {
        match candidate {
            Candidate::Host(endpoint) => {
                debug!(host = endpoint.name(), "slower than the next host");
                endpoint.rest_briefly(self.reference.repository());
            }
            Candidate::Redirect(_) => self.client.redirects().forget(&self.reference.name(), self.digest),
        }
    }

    async fn ask_at(&self, endpoint: &Arc<Endpoint>, url: Url, is_trusted: bool) -> Result<Answer, Error> {
        let what = self.what.to_owned();
        let mut is_ranged = self.wanted.is_partial();
        loop {
            let scopes = Scopes::pull(self.reference.repository());
            let mut request = Request { is_trusted, ..Request::new(&what, endpoint, Method::GET, url.clone(), scopes) };
            if is_ranged {
                request = request.header(header::RANGE, self.wanted.range_header());
            }
            let mut response = self.client.send(&request).await?;
            let host = host_shown(endpoint, response.url());
            let verdict = self.wanted.judge(&Head::of(&response), is_ranged);
            match verdict.map_err(|reason| Error::malformed(&what, &host, reason))? {
                Verdict::Refusal => return Err(refusal(self.client, &what, endpoint, response).await),
                Verdict::AskWhole => is_ranged = false,
                Verdict::Use(part) => {
                    if self.wanted.is_partial() && endpoint.note_ranges(!part.is_whole) {
                        info!(host, "answers ranges with whole blobs: what passes by is kept where possible");
                    }
                    let stall = self.client.options().stall_timeout;
                    let first = next_piece_within(&what, &host, &mut response, stall, stall).await?;
                    let (endpoint, pace) = (Arc::clone(endpoint), Pace::default());
                    return Ok(Answer {
                        endpoint,
                        part,
                        host,
                        host_count: 1,
                        what,
                        response,
                        first: Some(first),
                        pace,
                    });
                }
            }
        }
    }
}

impl Candidate {
    fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Host(one), Self::Host(other)) => Arc::ptr_eq(one, other),
            (Self::Redirect(_), Self::Redirect(_)) => true,
            _ => false,
        }
    }
}

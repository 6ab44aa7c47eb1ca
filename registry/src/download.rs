//! A blob, or a part of one, on its way.
//!
//! A download goes on where it was: when the connection breaks, when an answer is slow and another host may be
//! faster, and when an answer holds less than was asked for. It asks the registry again each time, never the place
//! that it was redirected to, whose address may have expired.

use std::ops::Range;

use bytes::Bytes;
use format_spec::Digest;
use futures_util::stream;
use reqwest::Url;
use storage::{ByteStream, WideStream};
use tracing::debug;

use crate::{
    client::Client,
    error::Error,
    gates::Permit,
    pace::Limit,
    part::Wanted,
    race::{Answer, Question},
    reference::Reference,
    retry::Retry,
};

/// Bytes that an answer must bring in [`crate::ClientOptions::slow_timeout`] while another host may be faster: a
/// fiftieth of a link of 1 Mbit/s.
const SLOW_LEN_MIN: u64 = 8 << 10;
/// The same in [`crate::ClientOptions::stall_timeout`] where there is no other host: some 140 bytes a second, so that
/// the slowest link is used, and a byte now and then is no answer.
const STALL_LEN_MIN: u64 = 4 << 10;
/// Bytes passed by that are worth waiting for somebody else's answer: below, a second answer is cheaper.
const WHOLE_LEN_MIN: u64 = 1 << 20;

/// A blob on its way.
pub(crate) struct Download {
    client: Client,
    reference: Reference,
    digest: Digest,
    what: String,
    wanted: Wanted,
    answer: Option<Answer>,
    /// Hosts that were left because they were slow.
    slow_count: usize,
    /// Held while all of the blob comes where a part was wanted.
    permit: Option<Permit>,
    retry: Retry,
}

impl Download {
    /// A download of `range`, or of all; a `blob_len` that is given is held against the registry's answers.
    pub(crate) fn new(
        client: &Client,
        reference: &Reference,
        digest: Digest,
        range: Option<Range<u64>>,
        blob_len: Option<u64>,
    ) -> Self {
        let (next, end) = range.map_or((0, None), |range| (range.start, Some(range.end.max(range.start))));
        Self {
            client: client.clone(),
            reference: reference.clone(),
            digest,
            what: format!("blob {digest} of {}", reference.name()),
            wanted: Wanted { next, end, blob_len },
            answer: None,
            slow_count: 0,
            permit: None,
            retry: Retry::new(client, reference.host()),
        }
    }

    /// Waits for the first bytes and makes a stream of all.
    pub(crate) async fn into_stream(mut self) -> Result<ByteStream, Error> {
        self.begin().await?;
        Ok(self.stream())
    }

    /// The same; where the registry sends all of the blob instead of a range, all of it is in the stream.
    pub(crate) async fn into_wide_stream(mut self) -> Result<WideStream, Error> {
        self.begin().await?;
        if let Some(answer) = self.answer.as_mut().filter(|answer| answer.part.is_whole) {
            self.wanted.next -= answer.part.skip;
            answer.part.skip = 0;
            self.wanted.end = self.wanted.blob_len.or(self.wanted.end);
        }
        let range = self.wanted.next..self.wanted.end.unwrap_or(u64::MAX);
        Ok(WideStream { range, stream: self.stream() })
    }

    fn stream(self) -> ByteStream {
        Box::pin(stream::unfold(Some(self), |download| async move {
            let mut download = download?;
            match download.next_bytes().await {
                Ok(Some(bytes)) => Some((Ok(bytes), Some(download))),
                Ok(None) => None,
                Err(error) => Some((Err(error.to_source_error()), None)),
            }
        }))
    }

    async fn begin(&mut self) -> Result<(), Error> {
        while self.answer.is_none() && !self.wanted.is_done() {
            match self.open().await {
                Ok(answer) => self.answer = Some(answer),
                Err(error) if self.client.has_better_hosts(self.reference.host(), &error).await => {}
                Err(error) => self.retry.wait_after(error).await?,
            }
        }
        Ok(())
    }

    /// The next bytes, never empty; `None` at the end.
    async fn next_bytes(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            if self.wanted.is_done() {
                return Ok(None);
            }
            match self.try_next_bytes().await {
                Ok(Some(bytes)) => {
                    self.wanted.next += bytes.len() as u64;
                    self.retry.received(bytes.len() as u64);
                    return Ok(Some(bytes));
                }
                Ok(None) => self.wanted.end = Some(self.wanted.next),
                Err(error) => {
                    // A host that promises and does not deliver would be asked again and again.
                    if let Some(answer) = self.answer.take() {
                        answer.endpoint.rest(self.reference.repository(), None);
                        self.slow_count += 1;
                    }
                    self.client.redirects().forget(&self.reference.name(), self.digest);
                    self.retry.wait_after(error).await?;
                }
            }
        }
    }

    /// One attempt at [`Self::next_bytes`]; `None` where a blob of unknown length ends.
    async fn try_next_bytes(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            if self.answer.is_none() {
                self.answer = Some(self.open().await?);
            }
            let limit = self.limit();
            let answer = self.answer.as_mut().expect("opened above");
            let Some(mut bytes) = answer.next_piece(limit).await? else {
                let Some(end) = self.wanted.end else { return Ok(None) };
                if answer.part.end == Some(self.wanted.next) {
                    debug!(what = self.what, at = self.wanted.next, end, "a part that ends early: asking for the rest");
                    self.answer = None;
                    continue;
                }
                let reason = format!("it ended at byte {} of {end}", self.wanted.next);
                return Err(Error::Broken { what: self.what.clone(), host: answer.host.clone(), reason });
            };
            let skipped = (bytes.len() as u64).min(answer.part.skip);
            answer.part.skip -= skipped;
            // Both casts are of lengths that are at most bytes.len().
            let _ = bytes.split_to(usize::try_from(skipped).expect("at most the length of the piece"));
            if let Some(end) = self.wanted.end {
                let wanted = (bytes.len() as u64).min(end - self.wanted.next);
                bytes.truncate(usize::try_from(wanted).expect("at most the length of the piece"));
            }
            if !bytes.is_empty() {
                return Ok(Some(bytes));
            }
        }
    }

    /// How slow the present answer may be: less so as long as a host is left that was not slow.
    fn limit(&self) -> Limit {
        let options = self.client.options();
        let left = self.wanted.end.map_or(u64::MAX, |end| end - self.wanted.next);
        let has_others = self.answer.as_ref().is_some_and(|answer| self.slow_count + 1 < answer.host_count);
        match has_others {
            true => Limit { window: options.slow_timeout, len_min: SLOW_LEN_MIN.min(left) },
            false => Limit { window: options.stall_timeout, len_min: STALL_LEN_MIN.min(left) },
        }
    }

    /// Asks for what is left.
    async fn open(&mut self) -> Result<Answer, Error> {
        let name = self.reference.name();
        if self.permit.is_none() && self.wanted.is_partial() {
            self.permit = self.client.gates().wait(&name, self.digest).await;
        }
        let mut answer = self.ask().await?;
        let is_long = answer.part.is_whole && answer.part.skip >= WHOLE_LEN_MIN;
        if !is_long {
            self.permit = None;
        } else if self.permit.is_none() {
            self.permit = self.client.gates().try_enter(&name, self.digest);
            if self.permit.is_none() {
                // Somebody has begun meanwhile. When he is through, a range may be had.
                drop(answer);
                self.permit = self.client.gates().wait(&name, self.digest).await;
                answer = self.ask().await?;
            }
        }
        self.wanted = answer.part.wanted.clone();
        self.learn_redirect(&answer);
        Ok(answer)
    }

    async fn ask(&self) -> Result<Answer, Error> {
        let Self { client, reference, digest, what, wanted, .. } = self;
        Question { client, reference, digest: *digest, what, wanted }.ask().await
    }

    fn learn_redirect(&self, answer: &Answer) {
        let is_elsewhere = Url::parse(answer.endpoint.root()).is_ok_and(|own| own.origin() != answer.url().origin());
        if is_elsewhere && self.wanted.is_partial() {
            let name = self.reference.name();
            self.client.redirects().learn(&name, self.digest, &answer.endpoint, answer.url());
        }
    }
}

//! When to try again, and when to give up.
//!
//! Deciding is [`next_delay`], a pure function; [`Retry`] counts, waits and reports.

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    time::Duration,
};

use tokio::time::Instant;
use tracing::debug;

use crate::{client::Client, error::Error};

/// Bytes a second that count as progress, failures included: an answer that trickles for half a minute and breaks, again
/// and again, is an outage.
const PROGRESS_RATE: u64 = 4 << 10;

/// The attempts of one operation since it last got anywhere.
pub(crate) struct Retry {
    client: Client,
    /// The registry, as references name it.
    registry: String,
    failures: u32,
    first_failure: Option<Instant>,
    /// Bytes since then.
    received_len: u64,
}

impl Retry {
    pub(crate) fn new(client: &Client, registry: &str) -> Self {
        Self {
            client: client.clone(),
            registry: registry.to_owned(),
            failures: 0,
            first_failure: None,
            received_len: 0,
        }
    }

    /// Forgets the failures so far: something was done.
    pub(crate) fn progressed(&mut self) {
        self.failures = 0;
        self.first_failure = None;
        self.received_len = 0;
    }

    /// Bytes have arrived. Whether that is progress shows at the next failure.
    pub(crate) fn received(&mut self, len: u64) {
        self.received_len += len;
    }

    /// Takes the failure of an attempt; returns when it is time for the next.
    ///
    /// # Errors
    ///
    /// `error` itself when trying again is no use, [`Error::GaveUp`] when patience has run out.
    pub(crate) async fn wait_after(&mut self, error: Error) -> Result<(), Error> {
        if !error.is_transient() {
            return Err(error);
        }
        if self.first_failure.is_some_and(|first| is_progress(self.received_len, first.elapsed())) {
            self.progressed();
        }
        self.failures += 1;
        let elapsed = self.first_failure.get_or_insert_with(Instant::now).elapsed();
        let options = self.client.options();
        let is_reached = self.client.is_reached(&self.registry);
        let patience = if is_reached { options.patience } else { options.first_contact_patience };
        let backoff = options
            .retry_delay_min
            .saturating_mul(1 << (self.failures - 1).min(20))
            .min(options.retry_delay_max)
            .mul_f64(jitter());
        let Some(delay) = next_delay(backoff, error.retry_after(), elapsed, patience) else {
            if self.failures == 1 {
                return Err(error);
            }
            return Err(Error::GaveUp { last: Box::new(error), attempts: self.failures, seconds: elapsed.as_secs() });
        };
        debug!(registry = self.registry, attempt = self.failures, ?delay, %error, "trying again");
        tokio::time::sleep(delay).await;
        Ok(())
    }
}

impl Client {
    /// Runs `attempt` until it succeeds, fails for good, or patience with `registry` runs out.
    pub(crate) async fn with_retries<T, F: Future<Output = Result<T, Error>>>(
        &self,
        registry: &str,
        attempt: impl Fn() -> F,
    ) -> Result<T, Error> {
        let mut retry = Retry::new(self, registry);
        loop {
            match attempt().await {
                Ok(value) => return Ok(value),
                Err(error) => retry.wait_after(error).await?,
            }
        }
    }
}

/// How long to wait before the next attempt; `None` to give up.
///
/// The last attempt is made when patience ends, so that an outage shorter than it is survived. Asked to
/// wait longer than that, nothing is gained by waiting at all.
fn next_delay(
    backoff: Duration,
    retry_after: Option<Duration>,
    elapsed: Duration,
    patience: Duration,
) -> Option<Duration> {
    let left = patience.checked_sub(elapsed).filter(|left| !left.is_zero())?;
    match retry_after {
        Some(asked) if asked > left => None,
        Some(asked) => Some(asked.max(backoff).min(left)),
        None => Some(backoff.min(left)),
    }
}

/// Whether so many bytes since the first failure are enough for patience to begin anew.
fn is_progress(received_len: u64, elapsed: Duration) -> bool {
    received_len > 0 && u128::from(received_len) * 1000 / u128::from(PROGRESS_RATE) >= elapsed.as_millis()
}

/// A random factor from 0.5 to 1: clients that failed together do not come back together.
fn jitter() -> f64 {
    let random = RandomState::new().build_hasher().finish();
    let fraction = f64::from(u16::try_from(random >> 48).expect("16 bits are left")) / f64::from(u16::MAX);
    0.5 + fraction / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_as_asked_within_patience() {
        let seconds = Duration::from_secs;
        let check = |retry_after: Option<u64>, elapsed, expected: Option<u64>| {
            let delay = next_delay(seconds(4), retry_after.map(seconds), seconds(elapsed), seconds(60));
            assert_eq!(delay, expected.map(seconds), "{retry_after:?} after {elapsed}");
        };
        check(None, 0, Some(4));
        check(None, 58, Some(2));
        check(None, 60, None);
        check(Some(30), 0, Some(30));
        check(Some(1), 0, Some(4));
        check(Some(30), 40, None);
        check(Some(3600), 0, None);
    }

    #[test]
    fn bytes_are_progress_when_there_are_enough_for_the_time() {
        let check = |received_len, seconds, expected| {
            assert_eq!(
                is_progress(received_len, Duration::from_secs(seconds)),
                expected,
                "{received_len} in {seconds}"
            );
        };
        check(0, 0, false);
        check(1, 0, true);
        check(64 << 10, 16, true);
        check(64 << 10, 17, false);
        check(4 << 20, 600, true);
        assert!(!is_progress(100, Duration::from_millis(400)));
    }

    #[test]
    fn jitter_never_more_than_halves_a_delay() {
        assert!((0..1000).map(|_| jitter()).all(|factor| (0.5..=1.0).contains(&factor)));
    }
}

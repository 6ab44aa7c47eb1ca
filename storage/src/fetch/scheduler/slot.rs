//! A slot for a request that its holder makes: whoever opens a layer, receives a hot pack, or proves something.

use std::{ops::Range, sync::Arc};

use super::{
    Scheduler,
    machine::{Grant, Outcome},
};
use crate::fetch::{incoming::Incoming, link::Link, places::Place, source::SourceError};

/// A slot for a request that its holder makes at a place. It is given back when this is dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    scheduler: Arc<Scheduler>,
    place: Arc<Place>,
    number: u64,
    link: Arc<Link>,
}

impl Slot {
    pub(super) fn new(scheduler: &Arc<Scheduler>, place: Arc<Place>, grant: Grant) -> Self {
        Self { scheduler: scheduler.clone(), place, number: grant.request, link: grant.link }
    }

    /// Asks for a range.
    pub(crate) async fn open(&self, range: Range<u64>) -> Result<Incoming, SourceError> {
        Incoming::open(&self.place, range, self.link.clone()).await
    }

    /// The bytes that came were right.
    pub(crate) fn works(&self) {
        self.scheduler.stream_works(self.number);
    }

    /// The place that is asked.
    pub(crate) fn place(&self) -> &Place {
        &self.place
    }

    /// Whether another source has got it meanwhile.
    pub(crate) fn is_displaced(&self) -> bool {
        self.link.is_displaced()
    }

    /// Gives the slot back: the request has failed.
    pub(crate) fn fail(self, error: &SourceError) {
        self.scheduler.end(self.number, Outcome::Failed(error.clone()));
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.scheduler.end(self.number, Outcome::Lost);
    }
}

//! The places that a layer comes from: every image that names it is one.
//!
//! Held here is which there are; which of them works is the scheduler's business.

use std::sync::Arc;

use serde_json::Value;

use crate::{
    source::Source,
    sync::{Mutex, lock},
};

/// Places that are remembered of a layer. A base layer may be part of hundreds of images; these are enough to find one
/// that answers, and a request is not sent around for longer than a reader waits.
pub(crate) const PLACES_MAX: usize = 16;

/// One place.
pub(crate) struct Place {
    /// Unique in the process.
    pub(crate) number: u64,
    pub(crate) source: Arc<dyn Source>,
    /// What the caller calls it.
    pub(crate) description: Value,
}

/// A place that a layer comes from, as the scheduler is told of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PlaceRef {
    /// Unique in the process.
    pub(crate) number: u64,
    /// Places with the same key share slots.
    pub(crate) source: Arc<str>,
}

impl Place {
    /// How the scheduler knows it: places without an origin share slots with nobody.
    fn to_ref(&self) -> PlaceRef {
        let source = self.source.origin().unwrap_or_else(|| format!("place {}", self.number));
        PlaceRef { number: self.number, source: source.into() }
    }
}

/// The places of one layer, newest first; never none.
#[derive(Debug)]
pub(crate) struct Places(Mutex<Vec<Arc<Place>>>);

impl Places {
    /// The first one.
    pub(crate) fn new(place: Place) -> Arc<Self> {
        Arc::new(Self(Mutex::new(vec![Arc::new(place)])))
    }

    /// Adds a place as the newest; false if it is known, which has one description only.
    ///
    /// Of too many, the oldest goes.
    pub(crate) fn add(&self, place: Place) -> bool {
        let mut places = lock(&self.0);
        if places.iter().any(|known| known.description == place.description) {
            return false;
        }
        places.insert(0, Arc::new(place));
        places.truncate(PLACES_MAX);
        true
    }

    /// Adds places that were known before the ones that are here.
    pub(crate) fn add_older(&self, older: impl IntoIterator<Item = Place>) {
        let mut places = lock(&self.0);
        for place in older {
            if places.len() < PLACES_MAX && !places.iter().any(|known| known.description == place.description) {
                places.push(Arc::new(place));
            }
        }
    }

    /// Takes a place away, unless it is the only one; whether there is one less.
    pub(crate) fn forget(&self, description: &Value) -> bool {
        let mut places = lock(&self.0);
        let before = places.len();
        if before > 1 {
            places.retain(|place| place.description != *description);
        }
        places.len() < before
    }

    /// How often something that nobody waits for is asked for: once, or twice at each of several places, as a connection
    /// that breaks off says nothing about a place yet.
    pub(crate) fn tries(&self) -> usize {
        match lock(&self.0).len() {
            0 | 1 => 1,
            count => 2 * count,
        }
    }

    /// The place with a number, if it is still there.
    pub(crate) fn get(&self, number: u64) -> Option<Arc<Place>> {
        lock(&self.0).iter().find(|place| place.number == number).cloned()
    }

    /// The newest one.
    pub(crate) fn newest(&self) -> Option<Arc<Place>> {
        lock(&self.0).first().cloned()
    }

    /// What the caller calls them, newest first.
    pub(crate) fn descriptions(&self) -> Vec<Value> {
        lock(&self.0).iter().map(|place| place.description.clone()).collect()
    }

    /// How the scheduler knows them.
    pub(crate) fn to_refs(&self) -> Vec<PlaceRef> {
        lock(&self.0).iter().map(|place| place.to_ref()).collect()
    }
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { number, description, .. } = self;
        f.debug_struct("Place").field("number", number).field("description", description).finish_non_exhaustive()
    }
}

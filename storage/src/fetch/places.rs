//! The places that a layer comes from: every image that names it is one.
//!
//! Images name the same index in blobs of their own, so a place says which blob it has. Held here is which places there
//! are; which of them works is the scheduler's business.
//!
//! Anybody who may pull an image to the node can name a layer, under as many names as he likes. So a place that is
//! *held*, by somebody who goes on using the layer, is not given up for one that is only named, and places of one owner
//! make room for each other first.

use std::sync::Arc;

use format_spec::LazyLayer;
use serde_json::Value;

use crate::{
    fetch::{rate::BestRate, source::Source},
    sync::{Mutex, lock},
};

/// Places that are remembered of a layer beside those that are held. A base layer may be part of hundreds of images;
/// these are enough to find one that answers, and a request is not sent around for longer than a reader waits.
pub(crate) const PLACES_MAX: usize = 16;

/// Places of a layer that are held: about the containers of a node.
pub(crate) const HELD_MAX: usize = 256;

/// One place.
pub(crate) struct Place {
    /// Unique in the process.
    pub(crate) number: u64,
    /// The layer as this place has it: all places of a layer have one index, and not all the same blob.
    pub(crate) layer: LazyLayer,
    pub(crate) source: Arc<dyn Source>,
    /// The caller's description of it.
    pub(crate) description: Value,
    /// Whose it is.
    pub(crate) owner: String,
    /// How fast bytes have come from it.
    pub(crate) best_rate: BestRate,
}

/// A place that a layer comes from, as the scheduler is told of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PlaceRef {
    /// Unique in the process.
    pub(crate) number: u64,
    /// Places with the same key share slots.
    pub(crate) source: Arc<str>,
}

/// A place as a later process is told of it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PlaceRecord {
    /// The layer as this place has it.
    pub(crate) layer: LazyLayer,
    /// The place in the words of the caller.
    pub(crate) description: Value,
    /// Whether somebody goes on using the layer from there.
    pub(crate) is_held: bool,
}

impl Place {
    /// How the scheduler knows it: places without an origin share slots with nobody.
    fn to_ref(&self) -> PlaceRef {
        let source = self.source.origin().unwrap_or_else(|| format!("place {}", self.number));
        PlaceRef { number: self.number, source: source.into() }
    }
}

/// A place that is remembered.
#[derive(Debug)]
struct Known {
    place: Arc<Place>,
    is_held: bool,
}

/// The places of one layer, newest first; never none.
#[derive(Debug)]
pub(crate) struct Places(Mutex<Vec<Known>>);

impl Places {
    /// The first one.
    pub(crate) fn new(place: Place, is_held: bool) -> Arc<Self> {
        Arc::new(Self(Mutex::new(vec![Known { place: Arc::new(place), is_held }])))
    }

    /// Adds a place as the newest, or holds one that is known; whether anything is different now.
    ///
    /// Of too many, the oldest one goes of the owner who has most.
    pub(crate) fn add(&self, place: Place, is_held: bool) -> bool {
        let mut places = lock(&self.0);
        if let Some(known) = find(&mut places, &place) {
            let is_news = is_held && !known.is_held;
            known.is_held |= is_held;
            return is_news;
        }
        places.insert(0, Known { place: Arc::new(place), is_held });
        make_room(&mut places);
        true
    }

    /// Adds places that were known before the ones that are here.
    pub(crate) fn add_older(&self, older: impl IntoIterator<Item = (Place, bool)>) {
        let mut places = lock(&self.0);
        for (place, is_held) in older {
            match find(&mut places, &place) {
                Some(known) => known.is_held |= is_held,
                None => places.push(Known { place: Arc::new(place), is_held }),
            }
            make_room(&mut places);
        }
    }

    /// Takes away what has this description; the last place stays, held by nobody. Whether there are fewer.
    pub(crate) fn forget(&self, description: &Value) -> bool {
        let mut places = lock(&self.0);
        let before = places.len();
        let mut others = before - places.iter().filter(|known| known.place.description == *description).count();
        places.retain_mut(|known| {
            if known.place.description != *description {
                return true;
            }
            known.is_held = false;
            others += 1;
            others == 1
        });
        places.len() < before
    }

    /// How often something that nobody waits for is asked for: once, or twice at each of several places, as a connection
    /// that breaks off says nothing about a place yet.
    pub(crate) fn tries(&self) -> usize {
        match lock(&self.0).len() {
            0 | 1 => 1,
            count => 2 * count.min(PLACES_MAX),
        }
    }

    /// The place with a number, if it is still there.
    pub(crate) fn get(&self, number: u64) -> Option<Arc<Place>> {
        lock(&self.0).iter().find(|known| known.place.number == number).map(|known| known.place.clone())
    }

    /// The newest one.
    pub(crate) fn newest(&self) -> Option<Arc<Place>> {
        lock(&self.0).first().map(|known| known.place.clone())
    }

    /// The best rate at which one request brought bytes from any of them, in bytes a second.
    pub(crate) fn best_rate(&self) -> Option<u64> {
        lock(&self.0).iter().filter_map(|known| known.place.best_rate.bytes_per_second()).max()
    }

    /// The caller's descriptions of them, newest first.
    pub(crate) fn descriptions(&self) -> Vec<Value> {
        lock(&self.0).iter().map(|known| known.place.description.clone()).collect()
    }

    /// The places as a later process is to know them, newest first.
    pub(crate) fn to_records(&self) -> Vec<PlaceRecord> {
        let to_record = |Known { place, is_held }: &Known| {
            let Place { layer, description, .. } = &**place;
            PlaceRecord { layer: *layer, description: description.clone(), is_held: *is_held }
        };
        lock(&self.0).iter().map(to_record).collect()
    }

    /// How the scheduler knows them, in the order to try them: first those that are held.
    pub(crate) fn to_refs(&self) -> Vec<PlaceRef> {
        let places = lock(&self.0);
        let (held, named): (Vec<&Known>, Vec<&Known>) = places.iter().partition(|known| known.is_held);
        held.into_iter().chain(named).map(|known| known.place.to_ref()).collect()
    }
}

fn find<'a>(places: &'a mut [Known], place: &Place) -> Option<&'a mut Known> {
    let is_same = |known: &Place| known.description == place.description && known.layer == place.layer;
    places.iter_mut().find(|known| is_same(&known.place))
}

/// Takes one place away if there are too many.
fn make_room(places: &mut Vec<Known>) {
    let count = |is_held| places.iter().filter(|known| known.is_held == is_held).count();
    let is_held = match (count(false) > PLACES_MAX, count(true) > HELD_MAX) {
        (true, _) => false,
        (_, true) => true,
        _ => return,
    };
    let alike = || places.iter().enumerate().filter(|(_, known)| known.is_held == is_held);
    let count_of = |owner: &str| alike().filter(|(_, known)| known.place.owner == owner).count();
    // The last of those with most.
    if let Some((oldest, _)) = alike().max_by_key(|(_, known)| count_of(&known.place.owner)) {
        places.remove(oldest);
    }
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { number, description, .. } = self;
        f.debug_struct("Place").field("number", number).field("description", description).finish_non_exhaustive()
    }
}

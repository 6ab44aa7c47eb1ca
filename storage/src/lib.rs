//! Frames by digest: fetched once, verified, decompressed, kept.
//!
//! A [`Cache`] is a directory with one subdirectory a [`Layer`]. A layer's *plain address space* holds
//! the content of all its files; the index maps it to *frames* of the layer blob. A read names a range
//! of that space; the frames that hold it are fetched from a [`Source`] unless they are there, each is
//! checked against its digest before anything else looks at it, decompressed, written where it belongs
//! in the layer's sparse file, and its readers are called back.
//!
//! What stays outside: how a registry is spoken to (`registry` implements [`Source`]), what the files of
//! a layer are called (`fusefs` reads the index), and who decides that a layer is no longer needed.
//!
//! `layer_core.rs` is what everything here knows of a layer; `layer.rs` is the way of a read. `bring.rs` decides how
//! what it misses comes: `warm/` is what comes by itself, a hot pack or copies from another layer, and `fetch/` decides
//! what else is requested, when and where, and carries it out; `foresight.rs` has it request what somebody expects to be
//! read. `disk/` keeps it all, in an order of writes that a crash may cut anywhere. `cache/` opens layers and works for
//! them in the background. `threads.rs` checks what threads may do to each other.
//!
//! # Who tries again
//!
//! - A [`Source`] goes on where a connection broke, and asks the mirrors of its registry. On a node it has a second for
//!   that (`fusefs/src/main.rs`); it waits for nobody's sake.
//! - The scheduler's machine does everything else for frames. It asks again for what a reader waits for when a request
//!   failed or was too slow, at the next place of the layer or after the pause of one that failed, until the reader's
//!   patience is over; for wrong bytes twice, or once at each other place; for what nobody is blocked for as long as a
//!   place is not in a pause. Failures are remembered for two seconds: who asks again before that gets the same answer,
//!   and wrong bytes are asked for after it.
//! - Whoever opens a layer (`cache/opening.rs`), receives a hot pack, a dedup section or frames for a proof takes a
//!   slot for each request; the machine chooses the place and keeps the pauses, and they decide how often they come
//!   back. An opening asks again as long as a reader would wait, if the failure may pass; three times in all for an
//!   index that is wrong; and in any case while some place was not asked. The others ask once, or twice for each of
//!   several places.
//! - `layer.rs` begins a read again, three times at most, when content has vanished between arrival and read or the
//!   disk has lost it. `bring.rs` waits twice at most for what is near, then for frames only. `cache/rest.rs` and
//!   `cache/verifying.rs` come back to a layer after pauses of their own, from a minute to an hour.
//!
//! # Locks
//!
//! In this order; who holds one takes only those after it:
//!
//! 1. a layer's writer of places, and the cancellation of an opening; `flushed`, then `writing` of a store; the burial
//!    of a directory; the records of `gaps`;
//! 2. the map of layers of a [`Cache`];
//! 3. read-ahead and `Warm` of a layer;
//! 4. the scheduler's state, in which frames are looked up and waits counted;
//! 5. each with nothing after it: the places of a layer, its log of waits, a stream's state, the parts of a wait, refused
//!    indexes, and of a store its file, its seal, its verdict and the frames that the disk did not take.
//!
//! Those of 1 are held over writes to the disk, and taken only where blocking is allowed. The others are taken by
//! threads of the reactor and of FUSE sessions, and held for a look or a change. Callbacks of readers run under none of
//! them.

mod bring;
pub mod cache;
pub mod disk;
pub mod error;
mod fetch;
mod foresight;
pub mod layer;
mod layer_core;
mod ranges;
mod sync;
#[cfg(all(test, feature = "shuttle"))]
mod threads;
mod touched;
mod verify;
mod waits;
mod warm;

pub use cache::{Cache, CacheOptions, KnownLayer, RestOptions};
pub use disk::create_private_directory;
pub use disk::mapping::LayerIndex;
pub use disk::verdict::Verdict;
pub use error::{CacheError, ReadError};
pub use fetch::scheduler::{Activity, Priority, RequestLimits, RequestOptions};
pub use fetch::source::{
    ByteStream, FetchFuture, FetchWideFuture, Source, SourceError, SourceErrorKind, Sources, WideStream,
};
pub use fetch::wait::WaitingRead;
pub use foresight::Foresight;
pub use layer::Layer;
pub use layer_core::Progress;
pub use touched::Touch;
pub use waits::{PastWait, WaitCause, Waits};

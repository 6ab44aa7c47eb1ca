//! The decision which bytes come next: places, requests and their order, and those who wait.
//!
//! `scheduler/` decides, `transfer.rs` carries a request out, `incoming.rs` and `decode.rs` are its way from the
//! [`source`] to plain bytes, `rate.rs` says how fast they came, `wait.rs` is the reader's end of it.

pub(crate) mod decode;
pub(crate) mod incoming;
pub(crate) mod link;
pub(crate) mod places;
pub(crate) mod rate;
pub(crate) mod read_ahead;
pub(crate) mod scheduler;
pub(crate) mod source;
pub(crate) mod transfer;
pub(crate) mod wait;

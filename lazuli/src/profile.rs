//! Profiles of starts: recorded by running an image or by a node, shown, taken out of images, put together.

mod bundle;
mod container;
pub(crate) mod node;
pub(crate) mod record;

pub(crate) use container::Ready;

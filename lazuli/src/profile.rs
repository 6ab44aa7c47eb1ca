//! Profiles of starts: recorded by running an image, shown, taken out of images, put together.

mod bundle;
mod container;
pub(crate) mod record;

pub(crate) use container::Ready;

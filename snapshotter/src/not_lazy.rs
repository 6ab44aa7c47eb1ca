//! Which images are not lazy although they could be, and why: a file for `lazuli status`.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use control::{NotLazy, root::NOT_LAZY};
use serde::Serialize;
use tracing::warn;

use crate::names::Time;

/// Images that are remembered; older ones are forgotten.
const IMAGES_MAX: usize = 100;

/// The file. Its content is for people: a failure to write it is logged, and no more.
#[derive(Debug)]
pub(crate) struct NotLazyImages {
    path: PathBuf,
    /// Read when it is needed first.
    images: Mutex<Option<Vec<NotLazy>>>,
}

impl NotLazyImages {
    /// That of a root directory.
    pub(crate) fn new(root: &Path) -> Self {
        Self { path: root.join(NOT_LAZY), images: Mutex::default() }
    }

    /// Says why an image is not lazy. Blocks.
    pub(crate) fn add(&self, image: &str, reason: &str, now: Time) {
        self.change(|images| {
            images.retain(|known| known.image != image);
            images.push(NotLazy { image: image.to_owned(), reason: reason.to_owned(), since: now.seconds });
            images.drain(..images.len().saturating_sub(IMAGES_MAX));
        });
    }

    /// The same, unless it is known why: a layer is ordinary because another one below it is. Blocks.
    pub(crate) fn add_unless_known(&self, image: &str, reason: &str, now: Time) {
        self.change(|images| {
            if images.iter().all(|known| known.image != image) {
                images.push(NotLazy { image: image.to_owned(), reason: reason.to_owned(), since: now.seconds });
                images.drain(..images.len().saturating_sub(IMAGES_MAX));
            }
        });
    }

    /// The image is lazy after all. Blocks.
    pub(crate) fn remove(&self, image: &str) {
        self.change(|images| images.retain(|known| known.image != image));
    }

    fn change(&self, change: impl FnOnce(&mut Vec<NotLazy>)) {
        let mut known = self.images.lock().unwrap_or_else(PoisonError::into_inner);
        let images = known.get_or_insert_with(|| NotLazy::read(&self.path).unwrap_or_default());
        let before = images.clone();
        change(images);
        if *images != before
            && let Err(error) = replace(&self.path, images)
        {
            warn!(path = %self.path.display(), %error, "what is not lazy is not noted");
        }
    }
}

/// Writes a file for people: readers see the old one or the new one. Nothing depends on it after a crash.
pub(crate) fn replace(path: &Path, content: &(impl Serialize + ?Sized)) -> io::Result<()> {
    let new = path.with_extension("new");
    fs::write(&new, serde_json::to_vec(content)?)?;
    fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Time = Time { seconds: 7, nanos: 0 };

    #[test]
    fn an_image_is_named_once_and_until_it_is_lazy() {
        let root = tempfile::tempdir().unwrap();
        let read = || -> Vec<(String, String)> {
            let images = NotLazy::read(&root.path().join(NOT_LAZY)).unwrap();
            images.into_iter().map(|known| (known.image, known.reason)).collect()
        };
        let images = NotLazyImages::new(root.path());
        images.add("one", "401", NOW);
        images.add("two", "404", NOW);
        images.add("one", "403", NOW);
        assert_eq!(read(), [("two", "404"), ("one", "403")].map(|(image, why)| (image.to_owned(), why.to_owned())));
        let images = NotLazyImages::new(root.path());
        images.remove("one");
        assert_eq!(read().len(), 1);
        for number in 0..=IMAGES_MAX {
            images.add(&number.to_string(), "x", NOW);
        }
        assert_eq!((read().len(), read().first().unwrap().0.as_str()), (IMAGES_MAX, "1"));
    }
}

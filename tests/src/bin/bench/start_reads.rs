//! The reads of an image's start, for `benches/frames.rs`: `bench start-reads IMAGE`, lines of `start end path`, in
//! bytes.
//!
//! Unpacks the image, drops its files from the page cache, runs its command there until it has ended, and prints which
//! pages of which files the cache holds then: what was read, with the kernel's read-ahead.

use lazuli_tests::{
    Result,
    page_cache::{cached_files, forget_files},
};

use crate::unpacked::RealImage;

pub(crate) fn print(image: &str) -> Result<()> {
    let scratch = crate::scratch("start-reads")?;
    let root = scratch.directory("root")?;
    let image = RealImage::open(image)?;
    image.unpack(&root)?;
    forget_files(&root)?;
    image.start(&root)?;
    for file in cached_files(&root)? {
        let path = file.path.strip_prefix(&root).unwrap_or(&file.path);
        for range in file.ranges()? {
            println!("{} {} {}", range.start, range.end, path.display());
        }
    }
    Ok(())
}

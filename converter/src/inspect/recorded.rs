//! The profile that an image was converted with, read back from its hot packs.

use futures_util::{StreamExt, TryStreamExt, stream};

use format_spec::{Digest, Index, annotation::SOURCE_OPTIONS, paths::Paths, profile::Profile, records::hot_reason};

use super::{InspectError, LAYERS_AT_ONCE, open_index};
use crate::image::{ImageSource, manifest::Descriptor, platform::Platform, resolve::resolve_image};

/// A profile as an image has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordedProfile {
    /// Its files.
    pub profile: Profile,
    /// The name under which the image was converted with it: layers of the next version that are the same are found by
    /// that.
    pub digest: Digest,
}

/// The bytes that recorded starts read of the image for `platform` at `source`; `None` where its hot packs are not recorded, or
/// there are none.
///
/// # Errors
///
/// When manifest, config or an index cannot be read or is damaged.
pub async fn recorded_profile(
    source: &ImageSource,
    platform: Option<&Platform>,
) -> Result<Option<RecordedProfile>, InspectError> {
    let image = resolve_image(source, platform).await?;
    // Most images say here that there is none, before an index is fetched.
    let Some(digest) = image.manifest.layers.iter().rev().find_map(profile_digest) else { return Ok(None) };
    let indexes: Vec<_> = stream::iter(&image.manifest.layers)
        .map(|descriptor| open_index(source, descriptor))
        .buffered(LAYERS_AT_ONCE)
        .try_collect()
        .await?;
    let layers: Vec<_> = indexes.iter().flatten().map(|(.., index)| profile_of(index)).collect();
    let profile = Profile::merge(&layers);
    let has_files = profile.files().next().is_some();
    Ok(has_files.then_some(RecordedProfile { profile, digest }))
}

/// The profile that a layer says it was converted with.
fn profile_digest(descriptor: &Descriptor) -> Option<Digest> {
    let options = descriptor.annotation(SOURCE_OPTIONS)?;
    options.split(' ').find_map(|option| option.strip_prefix("hot=")?.parse().ok())
}

/// The part of a layer's hot pack that is there because a recorded start read it.
fn profile_of<B: AsRef<[u8]>>(index: &Index<B>) -> Profile {
    let paths = Paths::new(index);
    let mut files: Vec<(u32, Vec<std::ops::Range<u64>>)> = Vec::new();
    for piece in index.hot_pieces().iter().filter(|piece| piece.reason.get() == hot_reason::PROFILE) {
        let Some((inode, offset)) = paths.file_at(piece.plain_offset.get()) else { continue };
        let range = offset..offset.saturating_add(piece.len.get().into());
        match files.last_mut() {
            Some((last, ranges)) if *last == inode => ranges.push(range),
            _ => files.push((inode, vec![range])),
        }
    }
    Profile::of_files(files.into_iter().map(|(inode, ranges)| (paths.path_bytes(inode), ranges)))
}

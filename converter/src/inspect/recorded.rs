//! The profile that an image was converted with, read back from its hot packs.

use futures_util::{StreamExt, TryStreamExt, stream};

use format_spec::{Index, paths::Paths, records::hot_reason};

use super::{InspectError, LAYERS_AT_ONCE, open_index};
use crate::{
    hot_set::Profile,
    image::{ImageSource, platform::Platform, resolve::resolve_image},
};

/// What recorded starts read of the image for `platform` at `source`; `None` where its hot packs are not recorded, or
/// there are none.
///
/// # Errors
///
/// When manifest, config or an index cannot be read or is damaged.
pub async fn recorded_profile(
    source: &ImageSource,
    platform: Option<&Platform>,
) -> Result<Option<Profile>, InspectError> {
    let image = resolve_image(source, platform).await?;
    let indexes: Vec<_> = stream::iter(&image.manifest.layers)
        .map(|descriptor| open_index(source, descriptor))
        .buffered(LAYERS_AT_ONCE)
        .try_collect()
        .await?;
    let layers: Vec<_> = indexes.iter().flatten().map(|(.., index)| profile_of(index)).collect();
    let profile = Profile::merge(&layers);
    let has_files = profile.files().next().is_some();
    Ok(has_files.then_some(profile))
}

/// What a layer's hot pack has because a recorded start read it.
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

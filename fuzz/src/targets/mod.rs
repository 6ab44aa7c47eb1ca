//! The targets, one file each.

pub(crate) mod archive;
pub(crate) mod blob_end;
pub(crate) mod cache;
pub(crate) mod index;
pub(crate) mod layer;
pub(crate) mod manifest;
pub(crate) mod names;
pub(crate) mod node;
pub(crate) mod registry;
pub(crate) mod start;
pub(crate) mod tar;
pub(crate) mod trees;

/// Splits a choice off: the first byte says what the rest is taken for.
fn choose(data: &[u8], count: u8) -> Option<(u8, &[u8])> {
    data.split_first().map(|(first, rest)| (first % count, rest))
}

/// Text, whatever the bytes are.
fn text(data: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(data)
}

/// What is shown of an error is one line.
fn one_line(error: &impl std::fmt::Display) {
    let shown = error.to_string();
    assert!(!shown.contains('\n'), "an error of several lines: {shown:?}");
}

//! Whether two images mean the same, found out without the check: every document with what it points to in the place
//! of digests, and of every layer what a reader sees.
//!
//! Differences between two that mean the same are counted under these words:
//!
//! - *formatting of a document*: white space, the order of keys, other escapes for the same letters.
//! - *how frames are compressed and cut*: other zstd frames of the same tar stream; the format leaves both to writers.
//! - *choice of hot pieces*: fewer, others, or in another order, with other reasons. All that are there are true.
//! - *choice of dedup pieces*: fewer of them. All that are there are true.
//! - *arrangement of the index*: strings in another order or that nobody names, another wire form. It says the same.
//! - *what the layer was made from*: annotations that no reader uses, and a converter only to find a layer of which it
//!   then compares everything.

use std::ops::Range;

use format_spec::{Digest, Index, LazyLayer, annotation, dedup, footer::SKIPPABLE_HEADER_LEN, records::WHITEOUT};
use serde_json::{Value, json};

use crate::image::Built;

/// The meaning of an image, and the parts of it that mean nothing.
struct Seen {
    meaning: Value,
    /// Each with its words.
    rest: Vec<(&'static str, Vec<u8>)>,
}

/// The words for that in which two images differ that mean the same.
///
/// # Errors
///
/// In what their meanings differ.
pub(crate) fn difference(pristine: &Built, changed: &Built) -> Result<&'static str, String> {
    let [pristine, changed] = [pristine, changed].map(Seen::of);
    let (pristine, changed) = (pristine?, changed?);
    if let Some(place) = first_difference(&pristine.meaning, &changed.meaning, "") {
        return Err(place);
    }
    let differing = |words: &str| {
        let part = |seen: &Seen| -> Vec<Vec<u8>> {
            seen.rest.iter().filter(|(other, _)| *other == words).map(|(_, bytes)| bytes.clone()).collect()
        };
        part(&pristine) != part(&changed)
    };
    // Each explains those behind it.
    const WORDS: [&str; 6] = [
        "how frames are compressed and cut",
        "choice of hot pieces",
        "choice of dedup pieces",
        "arrangement of the index",
        "what the layer was made from",
        "formatting of a document",
    ];
    WORDS.iter().copied().find(|words| differing(words)).ok_or_else(|| "nothing differs, but some bytes".to_owned())
}

fn first_difference(left: &Value, right: &Value, place: &str) -> Option<String> {
    match (left, right) {
        _ if left == right => None,
        // Not to say it is not missed; to say another one would be a lie.
        _ if place.contains("/origin/") && right.is_null() => None,
        (Value::Object(fields), Value::Object(others)) => fields.keys().chain(others.keys()).find_map(|key| {
            first_difference(
                &fields.get(key).cloned().unwrap_or_default(),
                &others.get(key).cloned().unwrap_or_default(),
                &format!("{place}/{key}"),
            )
        }),
        (Value::Array(list), Value::Array(others)) if list.len() == others.len() => list
            .iter()
            .zip(others)
            .enumerate()
            .find_map(|(number, (left, right))| first_difference(left, right, &format!("{place}/{number}"))),
        _ => Some(format!("{place} means {left}, changed {right}").chars().take(500).collect()),
    }
}

impl Seen {
    fn of(image: &Built) -> Result<Self, String> {
        let mut seen = Self { meaning: Value::Null, rest: Vec::new() };
        let mut list = seen.document(image, image.root)?;
        let entries = list["manifests"].as_array().cloned().unwrap_or_default();
        let digests: Vec<Value> = entries.iter().map(|entry| entry["digest"].clone()).collect();
        for (number, entry) in entries.into_iter().enumerate() {
            let meaning = seen.target(image, entry, Self::manifest)?;
            list["manifests"][number] = meaning;
            // The image that an attestation is about, by its place.
            let about = &mut list["manifests"][number]["annotations"]["vnd.docker.reference.digest"];
            *about = digests.iter().position(|digest| digest == about).into();
        }
        seen.meaning = list;
        Ok(seen)
    }

    fn content<'a>(&self, image: &'a Built, digest: &Digest) -> Result<&'a [u8], String> {
        let content = image.blobs.get(digest).ok_or_else(|| format!("{digest} is not there"))?;
        if Digest::of(content) == *digest { Ok(content) } else { Err(format!("{digest} is damaged")) }
    }

    fn document(&mut self, image: &Built, digest: Digest) -> Result<Value, String> {
        let text = self.content(image, &digest)?;
        let mut value: Value = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        self.rest.push(("formatting of a document", text.to_vec()));
        drop_empty(&mut value);
        Ok(value)
    }

    /// A descriptor with what it points to in the place of digest and length, which have to be right.
    fn target(
        &mut self,
        image: &Built,
        mut descriptor: Value,
        follow: fn(&mut Self, &Built, Digest, &mut Value) -> Result<Value, String>,
    ) -> Result<Value, String> {
        let digest = descriptor["digest"].as_str().and_then(|text| text.parse().ok());
        let digest: Digest = digest.ok_or("a descriptor without a digest")?;
        let content = self.content(image, &digest)?;
        if descriptor["size"] != json!(content.len()) {
            return Err(format!("{digest} has another length"));
        }
        let target = follow(self, image, digest, &mut descriptor)?;
        let fields = descriptor.as_object_mut().unwrap();
        fields.remove("digest");
        fields.remove("size");
        fields.insert("target".to_owned(), target);
        Ok(descriptor)
    }

    fn manifest(&mut self, image: &Built, digest: Digest, _: &mut Value) -> Result<Value, String> {
        let mut manifest = self.document(image, digest)?;
        manifest["config"] = self.target(image, manifest["config"].clone(), Self::blob)?;
        for layer in manifest["layers"].as_array_mut().into_iter().flatten() {
            *layer = self.target(image, layer.clone(), Self::layer)?;
        }
        Ok(manifest)
    }

    fn blob(&mut self, image: &Built, digest: Digest, _: &mut Value) -> Result<Value, String> {
        Ok(self.content(image, &digest)?.escape_ascii().to_string().into())
    }

    fn layer(&mut self, image: &Built, digest: Digest, descriptor: &mut Value) -> Result<Value, String> {
        let notes = descriptor["annotations"].clone();
        let parsed = LazyLayer::from_annotations(|key| notes.get(key)?.as_str());
        let Some(lazy) = parsed.map_err(|error| error.to_string())? else {
            return self.blob(image, digest, descriptor);
        };
        let mut origin = Vec::new();
        if let Some(notes) = descriptor["annotations"].as_object_mut() {
            for key in annotation::ALL {
                notes.remove(key);
            }
            for key in [annotation::SOURCE_DIGEST, annotation::SOURCE_DIFF_ID, annotation::SOURCE_OPTIONS] {
                let said = notes.remove(key).unwrap_or_default();
                self.rest.push(("what the layer was made from", said.to_string().into_bytes()));
                if key != annotation::SOURCE_OPTIONS {
                    origin.push(said);
                }
            }
        }
        descriptor["origin"] = origin.into();
        let blob = self.content(image, &digest)?;
        let hot_end = lazy.hot_range().map_or(lazy.index.range().end, |range| range.end);
        let cut = |range: Range<u64>| -> Result<&[u8], String> {
            let ends = [range.start, range.end].map(|end| usize::try_from(end).unwrap_or(usize::MAX));
            blob.get(ends[0]..ends[1]).ok_or_else(|| "outside the blob".to_owned())
        };
        let index = Index::from_compressed(cut(lazy.index.range())?, &lazy.index).map_err(|error| error.to_string())?;
        let mut tar = Vec::new();
        for frame in index.frames() {
            tar.extend(zstd::decode_all(cut(frame.blob_range())?).map_err(|error| error.to_string())?);
            self.rest.push(("how frames are compressed and cut", frame.digest.to_vec()));
        }
        let space = space(&index, &tar)?;
        self.hints(&lazy, &index, &space, cut, hot_end)?;
        self.rest.push(("arrangement of the index", index.as_bytes().to_vec()));
        self.rest.push(("arrangement of the index", cut(lazy.index.range())?.to_vec()));
        let mut tree = Vec::new();
        walk(&index, &space, 0, "/", &mut tree);
        Ok(
            json!({"tar": Digest::of(&tar), "tree": tree, "all": Digest::of(&zstd::decode_all(blob).map_err(|e| e.to_string())?)}),
        )
    }

    /// Hot pack and dedup section hold nothing but the truth.
    fn hints<'a>(
        &mut self,
        lazy: &LazyLayer,
        index: &Index<Vec<u8>>,
        space: &[u8],
        cut: impl Fn(Range<u64>) -> Result<&'a [u8], String>,
        hot_end: u64,
    ) -> Result<(), String> {
        let of_space =
            |range: Range<u64>| &space[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()];
        let hot = match lazy.hot_range() {
            Some(range) => zstd::decode_all(cut(range)?).map_err(|error| error.to_string())?,
            None => Vec::new(),
        };
        let said: Vec<u8> =
            index.hot_pieces().iter().flat_map(|piece| of_space(piece.plain_range()).to_vec()).collect();
        if said != hot {
            return Err("the hot pack holds something else".to_owned());
        }
        for piece in index.hot_pieces() {
            self.rest.push(("choice of hot pieces", format!("{piece:?}").into_bytes()));
        }
        let Some(section) = index.dedup() else { return Ok(()) };
        let start = hot_end + SKIPPABLE_HEADER_LEN;
        let compressed = cut(start..start.saturating_add(section.compressed_len.get()))?;
        let pieces = dedup::decompress(compressed, section, index.space_len()).map_err(|error| error.to_string())?;
        for piece in pieces {
            if Digest::of(of_space(piece.plain_range())) != piece.digest() {
                return Err("the dedup section lies".to_owned());
            }
            self.rest.push(("choice of dedup pieces", format!("{piece:?}").into_bytes()));
        }
        self.rest.push(("arrangement of the index", compressed.to_vec()));
        Ok(())
    }
}

/// No annotations are the same as an empty map of them, as Go reads it.
fn drop_empty(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            let is_empty = |value: &Value| value.is_null() || value.as_object().is_some_and(serde_json::Map::is_empty);
            if fields.get("annotations").is_some_and(is_empty) {
                fields.remove("annotations");
            }
            fields.values_mut().for_each(drop_empty);
        }
        Value::Array(list) => list.iter_mut().for_each(drop_empty),
        _ => {}
    }
}

/// The plain address space.
fn space(index: &Index<Vec<u8>>, tar: &[u8]) -> Result<Vec<u8>, String> {
    let mut space = vec![0; usize::try_from(index.space_len()).unwrap()];
    for extent in index.extents() {
        let [from, to] = [extent.tar_range(), extent.plain_range()]
            .map(|range| usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap());
        let bytes = tar.get(from).ok_or("an extent outside the tar stream")?;
        space[to].copy_from_slice(bytes);
    }
    Ok(space)
}

/// Collects what a reader sees below a directory.
fn walk(index: &Index<Vec<u8>>, space: &[u8], number: u32, path: &str, seen: &mut Vec<Value>) {
    let Some(inode) = index.inode(number) else { return };
    let content = inode.is_regular().then(|| {
        let range = inode.plain_range();
        Digest::of(&space[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()])
    });
    let text = |bytes: &[u8]| bytes.escape_ascii().to_string();
    let xattrs: Vec<_> = index.xattrs(inode).map(|(name, value)| [text(name), text(value)]).collect();
    let ids = [inode.mode, inode.uid, inode.gid, inode.nlink, inode.flags, inode.mtime_nanoseconds];
    let others = if inode.is_directory() || inode.is_symlink() { 0 } else { inode.payload.get() };
    let len = if inode.is_directory() { 0 } else { inode.size.get() };
    seen.push(json!({
        "path": path, "number": number, "content": content, "target": text(index.symlink_target(inode)),
        "xattrs": xattrs, "ids": ids.map(|id| id.get()), "time": inode.mtime_seconds.get(), "payload": others,
        "len": len, "offset": inode.plain_offset.get(),
    }));
    if !inode.is_directory() {
        return;
    }
    for (name, child) in index.children(inode) {
        let path = format!("{path}{}/", text(name));
        match child {
            WHITEOUT => seen.push(json!({"path": path, "whiteout": true})),
            child => walk(index, space, child, &path, seen),
        }
    }
}

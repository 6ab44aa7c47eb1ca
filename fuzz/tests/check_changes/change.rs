//! One change, at one place.

use std::collections::BTreeMap;

use format_spec::{Digest, HotPiece, dedup::DedupPiece};
use zerocopy::{FromBytes, IntoBytes};

use crate::{container::Container, documents, image::Stage, numbers::Numbers, trees};

/// The targets of changes, with how many layers or documents there are to choose from.
const CHOICES: [(&str, usize); 13] = [
    ("index, bytes with checksums put right", 3),
    ("index, records", 3),
    ("index, tree", 3),
    ("frames with digests put right", 3),
    ("hot pack, pieces with what it holds of them", 1),
    ("hot pack, frames with digests put right", 1),
    ("dedup section, bytes with checksums put right", 1),
    ("dedup section, records", 1),
    ("footer, bytes with checksum put right", 3),
    ("blob, bytes with digests put right", 3),
    ("document, a value", DOCUMENTS.len()),
    ("document, its text", DOCUMENTS.len()),
    ("files of the layout", 1),
];
const DOCUMENTS: [&str; 8] = [
    "manifest",
    "config",
    "list",
    "attestation",
    "statement",
    "other manifest",
    "other config",
    "config of the attestation",
];
/// All targets by name.
pub(crate) const TARGETS: [&str; CHOICES.len()] = {
    let mut names = [""; CHOICES.len()];
    let mut number = 0;
    while number < names.len() {
        names[number] = CHOICES[number].0;
        number += 1;
    }
    names
};

/// Of these there is most to change.
const MOSTLY: [usize; 7] = [0, 0, 1, 2, 2, 10, 10];

pub(crate) struct Change {
    numbers: Numbers,
    target: usize,
    /// Which layer or document.
    number: usize,
    is_made: bool,
    words: String,
}

impl Change {
    pub(crate) fn new(mut numbers: Numbers) -> Self {
        let target = match numbers.below(2) {
            0 => *numbers.pick(&MOSTLY),
            _ => numbers.below(CHOICES.len()),
        };
        // Mostly of the layer and the documents that have most in them.
        let number = if numbers.below(3) == 0 { numbers.below(CHOICES[target].1) } else { numbers.below(2) };
        Self { numbers, target, number: number.min(CHOICES[target].1 - 1), is_made: false, words: String::new() }
    }

    pub(crate) fn target(&self) -> &'static str {
        TARGETS[self.target]
    }

    pub(crate) fn is_made(&self) -> bool {
        self.is_made
    }

    /// The change in words, for who looks at a miss.
    pub(crate) fn words(&self) -> String {
        format!("{} {}: {}", self.target(), self.number, self.words)
    }

    /// Makes the change where it belongs.
    pub(crate) fn at(&mut self, stage: Stage<'_>) {
        let is_mine = |number: usize, target: usize| (number, target) == (self.number, self.target);
        let words = match stage {
            Stage::IndexBytes(number, bytes) if is_mine(number, 0) => self.bytes(bytes),
            Stage::Records(number, index) if is_mine(number, 1) => self.records(index),
            Stage::Tree(number, index) if is_mine(number, 2) => trees::change(index, &mut self.numbers),
            Stage::Frames(number, frames) if is_mine(number, 3) => self.frames(frames),
            Stage::HotPack(number, hot) if is_mine(number, 4) => self.hot_pack(hot),
            Stage::HotFrames(number, frames) if is_mine(number, 5) => self.frames(frames),
            Stage::DedupBytes(number, bytes) if is_mine(number, 6) => self.bytes(bytes),
            Stage::DedupRecords(number, dedup) if is_mine(number, 7) => self.dedup(dedup),
            Stage::Footer(number, bytes) if is_mine(number, 8) => self.bytes(bytes),
            Stage::Blob(number, blob) if is_mine(number, 9) => self.blob(blob),
            Stage::Document(name, value) if self.target == 10 && name == DOCUMENTS[self.number] => {
                documents::change(value, &mut self.numbers).map(|words| format!("{name}: {words}"))
            }
            Stage::Text(name, text) if self.target == 11 && name == DOCUMENTS[self.number] => {
                documents::change_text(text, &mut self.numbers).map(|words| format!("{name}: {words}"))
            }
            Stage::Files(blobs) if self.target == 12 => self.files(blobs),
            _ => return,
        };
        self.is_made |= words.is_some();
        self.words = words.unwrap_or_default();
    }

    fn bytes(&mut self, bytes: &mut [u8]) -> Option<String> {
        let before = bytes.to_vec();
        let at = self.numbers.change_bytes(bytes)?;
        let end = (at + 8).min(bytes.len());
        Some(format!("byte {at}: {:02x?} to {:02x?}", &before[at..end], &bytes[at..end]))
    }

    /// Changes a record, or how many there are.
    fn records(&mut self, index: &mut Container) -> Option<String> {
        let filled: Vec<usize> = (0..index.sections.len()).filter(|n| !index.sections[*n].bytes.is_empty()).collect();
        let number = *self.numbers.pick(&filled);
        let section = &mut index.sections[number];
        let len = section.record_len;
        let count = section.bytes.len() / len;
        let (record, other) = (self.numbers.below(count), self.numbers.below(count));
        let (start, from) = (record * len, other * len);
        let word = self.numbers.below((len / 4).max(1)) * 4;
        let word_len = len.min(4);
        let what = match self.numbers.below(7) {
            0 => {
                section.bytes.copy_within(from + word..from + word + word_len, start + word);
                "a word of another one"
            }
            1 => {
                let up = self.numbers.below(2) == 0;
                let byte = &mut section.bytes[start + word];
                *byte = if up { byte.wrapping_add(1) } else { byte.wrapping_sub(1) };
                "one more or less"
            }
            2 => {
                for byte in 0..len {
                    section.bytes.swap(start + byte, from + byte);
                }
                "exchanged with another one"
            }
            3 => {
                section.bytes.drain(start..start + len);
                "left out"
            }
            4 => {
                let copy = section.bytes[start..start + len].to_vec();
                section.bytes.splice(start..start, copy);
                "there twice"
            }
            5 => {
                let kind = *self.numbers.pick(&[9, 13, 32, 77]);
                if let Some(section) = index.sections.iter_mut().find(|section| section.kind == kind) {
                    section.bytes = vec![7; section.record_len];
                } else {
                    let mut section = index.sections[number].clone();
                    section.kind = kind;
                    index.sections.push(section);
                    index.sections.sort_by_key(|section| section.kind);
                }
                return Some(format!("a section of kind {kind}"));
            }
            _ => {
                section.bytes[start + word..start + word + word_len].fill(0);
                "a word is zero"
            }
        };
        Some(format!("record {record} of section {}, word {}: {what}", section.kind, word / 4))
    }

    /// Changes a frame: its bytes, its content, how it is compressed, or the list of frames.
    fn frames(&mut self, frames: &mut Vec<Vec<u8>>) -> Option<String> {
        let number = self.numbers.below(frames.len());
        let other = self.numbers.below(frames.len());
        let plain = zstd::decode_all(frames.get(number)?.as_slice()).ok()?;
        let what = match self.numbers.below(7) {
            0 | 1 => {
                self.numbers.change_bytes(&mut frames[number])?;
                "bytes"
            }
            2 => {
                let mut plain = plain;
                self.numbers.change_bytes(&mut plain)?;
                frames[number] = zstd::bulk::compress(&plain, 3).unwrap();
                "content"
            }
            3 => {
                frames[number] = zstd::bulk::compress(&plain, 19).unwrap();
                "compressed another way"
            }
            4 => {
                let at = self.numbers.below(plain.len());
                let halves = [&plain[..at], &plain[at..]].map(|part| zstd::bulk::compress(part, 3).unwrap());
                frames.splice(number..=number, halves);
                "cut in two"
            }
            5 => {
                frames.swap(number, other);
                "exchanged"
            }
            _ => {
                frames.remove(number);
                "left out"
            }
        };
        Some(format!("frame {number}: {what}"))
    }

    fn hot_pack(&mut self, hot: &mut Vec<(HotPiece, Vec<u8>)>) -> Option<String> {
        let number = self.numbers.below(hot.len());
        let other = self.numbers.below(hot.len());
        let what = match self.numbers.below(7) {
            0 => {
                self.numbers.change_bytes(&mut hot[number].1)?;
                "content"
            }
            1 => {
                hot.remove(number);
                "left out"
            }
            2 => {
                hot.swap(number, other);
                "exchanged with its content"
            }
            3 => {
                let piece = hot[number].0;
                hot[number].0 = hot[other].0;
                hot[other].0 = piece;
                "exchanged without its content"
            }
            4 => {
                let copy = hot[number].clone();
                hot.insert(other, copy);
                "there twice"
            }
            5 => {
                hot[number].0.reason = u32::from(self.numbers.byte()).into();
                "reason"
            }
            _ => {
                self.numbers.change_bytes(hot[number].0.as_mut_bytes())?;
                "record"
            }
        };
        Some(format!("piece {number}: {what}"))
    }

    fn dedup(&mut self, dedup: &mut Container) -> Option<String> {
        let bytes = &mut dedup.sections[0].bytes;
        let mut pieces = <[DedupPiece]>::ref_from_bytes(bytes).ok()?.to_vec();
        let number = self.numbers.below(pieces.len());
        let other = self.numbers.below(pieces.len());
        let what = match self.numbers.below(6) {
            0 => {
                pieces.remove(number);
                "left out"
            }
            1 => {
                pieces.swap(number, other);
                "exchanged"
            }
            2 => {
                pieces[number].digest = pieces[other].digest;
                "digest of another one"
            }
            3 => {
                pieces[number].len = pieces[other].len;
                "length of another one"
            }
            4 => {
                pieces.insert(number, pieces[number]);
                "there twice"
            }
            _ => {
                self.numbers.change_bytes(pieces[number].as_mut_bytes())?;
                "record"
            }
        };
        *bytes = pieces.as_bytes().to_vec();
        Some(format!("piece {number}: {what}"))
    }

    fn blob(&mut self, blob: &mut Vec<u8>) -> Option<String> {
        let at = self.numbers.below(blob.len());
        match self.numbers.below(6) {
            0 => {
                blob.truncate(at);
                Some(format!("ends at {at}"))
            }
            1 => {
                blob.extend(b"\x50\x2a\x4d\x18\x04\0\0\0more");
                Some("a skippable frame behind it".to_owned())
            }
            2 => {
                blob.insert(at, self.numbers.byte());
                Some(format!("one more byte at {at}"))
            }
            3 => {
                blob.remove(at);
                Some(format!("one byte less at {at}"))
            }
            _ => self.bytes(blob),
        }
    }

    fn files(&mut self, blobs: &mut BTreeMap<Digest, Vec<u8>>) -> Option<String> {
        let digests: Vec<Digest> = blobs.keys().copied().collect();
        let (digest, other) = (*self.numbers.pick(&digests), *self.numbers.pick(&digests));
        let what = match self.numbers.below(5) {
            0 => {
                blobs.remove(&digest);
                "is gone"
            }
            1 => {
                let content = blobs[&other].clone();
                blobs.insert(digest, content);
                "holds another one"
            }
            2 => {
                let content = blobs.get_mut(&digest)?;
                let len = self.numbers.below(content.len());
                content.truncate(len);
                "is cut off"
            }
            3 => {
                blobs.get_mut(&digest)?.push(b'\n');
                "has a byte more"
            }
            _ => {
                self.numbers.change_bytes(blobs.get_mut(&digest)?)?;
                "has other bytes"
            }
        };
        Some(format!("{digest} {what}"))
    }
}

//! Is a layer what its tar stream says? The one place that decides it, and what is kept for the decision.
//!
//! Frames are verified against the index, and the index is a stranger's word. The *proof* of a layer puts its tar
//! stream together from what readers are shown (`data`) and from what is no file content (`gaps.rs`), hashes it, and
//! compares the tree that a walk over it gives with the index. Its result, the [`Verdict`], is kept in the file
//! `verdict` and holds for good. So content that came with the hot pack or from other layers is proven like any other:
//! the stream is made of the very bytes that containers read.
//!
//! Whether the digest of the stream is the one that an image's config names is for whoever knows the config.

use std::{io, sync::PoisonError};

use format_spec::{Digest, DigestHasher};
use tar_index::{
    compare::{TarSide, UnfitStream, compare, read_tree},
    walker::TarInput,
};

use crate::{
    disk::{
        directory::LayerDirectory,
        frame_store::FrameStore,
        gaps::{Gaps, gap_ranges},
        mapping::LayerIndex,
        verdict::{Verdict, VerdictRecord},
    },
    sync::{
        RwLock,
        atomic::{AtomicBool, Ordering},
    },
};

/// Longest reason that is kept, in characters: names of a stranger stand in it.
const REASON_LEN_MAX: usize = 300;
/// Bytes that are looked at at once when they should be zeros.
const ZEROS_LEN: usize = 64 << 10;

/// Knowledge of the truth of one layer. Safe from many threads.
#[derive(Debug)]
pub(crate) struct Proof {
    index_digest: Digest,
    gaps: Gaps,
    verdict: RwLock<Option<Verdict>>,
    is_refused: AtomicBool,
    /// The digest of the tar stream when content was lost after a good verdict: it must be that again.
    earlier: RwLock<Option<Digest>>,
    /// Somebody waits for the verdict.
    pub(crate) is_urgent: AtomicBool,
    /// Somebody is getting it.
    pub(crate) is_under_way: AtomicBool,
    /// It comes by itself, so what depends on it can wait.
    is_expected: AtomicBool,
}

/// Why there is no verdict.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProofError {
    #[error(transparent)]
    Disk(#[from] io::Error),
    /// Something must be fetched first.
    #[error("a part of the tar stream is missing")]
    Missing,
}

impl Proof {
    /// The proof that the directory of a layer keeps. A good verdict of content that is gone is none: other content may
    /// come.
    pub(crate) fn open(
        directory: &LayerDirectory,
        index: &LayerIndex,
        index_digest: Digest,
        is_complete: bool,
    ) -> io::Result<Self> {
        let kept = directory.read_verdict()?.filter(|record| record.index == index_digest);
        let holds = |record: &VerdictRecord| (is_complete && !record.is_doubted) || record.is_refusal();
        let (kept, earlier) = match kept {
            Some(record) if holds(&record) => (Some(record.verdict), None),
            Some(VerdictRecord { verdict: Verdict::Verified { tar }, .. }) => (None, Some(tar)),
            _ => (None, None),
        };
        let proof = Self {
            index_digest,
            gaps: Gaps::open(directory, index, index_digest)?,
            is_refused: AtomicBool::new(matches!(kept, Some(Verdict::Refused { .. }))),
            verdict: RwLock::new(kept),
            earlier: RwLock::new(earlier),
            is_urgent: AtomicBool::new(false),
            is_under_way: AtomicBool::new(false),
            is_expected: AtomicBool::new(false),
        };
        Ok(proof)
    }

    /// The verdict, once there is one.
    pub(crate) fn verdict(&self) -> Option<Verdict> {
        self.verdict.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_verdict(&self, verdict: Option<Verdict>) {
        self.is_refused.store(matches!(verdict, Some(Verdict::Refused { .. })), Ordering::Release);
        *self.verdict.write().unwrap_or_else(PoisonError::into_inner) = verdict;
    }

    /// Why nothing may be shown; costs one load where something may.
    pub(crate) fn refusal(&self) -> Option<String> {
        match self.is_refused.load(Ordering::Acquire).then(|| self.verdict())?? {
            Verdict::Refused { reason } => Some(reason),
            Verdict::Verified { .. } => None,
        }
    }

    /// A verdict will come by itself.
    pub(crate) fn expect(&self) {
        self.is_expected.store(true, Ordering::Release);
    }

    /// Whether content may be handed to the kernel for good: from then on no refusal reaches its readers.
    pub(crate) fn may_leave(&self) -> bool {
        match self.verdict() {
            Some(Verdict::Verified { .. }) => true,
            Some(Verdict::Refused { .. }) => false,
            None => !self.is_expected.load(Ordering::Acquire),
        }
    }

    /// Whether a frame must still be fetched for the bytes that are no content.
    pub(crate) fn wants(&self, index: &LayerIndex, frame: u32) -> bool {
        self.verdict().is_none() && !self.gaps.has(frame) && !gap_ranges(index, frame).is_empty()
    }
}

impl FrameStore {
    /// Compares what is here already of a frame that arrived with it: a difference is a refusal.
    ///
    /// Checksums are compared, as a start waits for the same processors. So what was made to have the same checksums is
    /// refused later, by [`Self::prove`].
    pub(crate) fn compare_frame(&self, frame: u32, content: &[u8]) -> io::Result<()> {
        if self.proof().verdict().is_some() {
            return Ok(());
        }
        match self.first_difference(frame, content)? {
            None => Ok(()),
            Some(offset) => {
                // A disk that has changed a page condemns no layer.
                let damaged = self.find_damaged(&(offset..offset + 1))?;
                if !damaged.is_empty() {
                    return self.heal(&damaged);
                }
                let reason = format!("content at {offset} of the plain address space is not that of frame {frame}");
                self.judge(Verdict::Refused { reason })
            }
        }
    }

    /// Keeps of a frame that arrived what only the proof needs.
    pub(crate) fn keep_gaps(&self, frame: u32, content: &[u8]) -> io::Result<()> {
        if self.proof().verdict().is_some() {
            return Ok(());
        }
        self.proof().gaps.keep(self.index(), frame, content)
    }

    /// Proves the layer: all content must be here. Reads everything; blocks.
    pub(crate) fn prove(&self) -> Result<Verdict, ProofError> {
        if let Some(verdict) = self.proof().verdict() {
            return Ok(verdict);
        }
        if !self.is_complete() {
            return Err(ProofError::Missing);
        }
        let earlier = *self.proof().earlier.read().unwrap_or_else(PoisonError::into_inner);
        let verdict = match self.compare_with_tar() {
            Ok(tar) if earlier.is_some_and(|earlier| earlier != tar) => {
                Verdict::Refused { reason: format!("its tar stream has digest {tar}, and had another one before") }
            }
            Ok(tar) => Verdict::Verified { tar },
            Err(Failure::Differs(reason)) => Verdict::Refused { reason: reason.chars().take(REASON_LEN_MAX).collect() },
            Err(Failure::Cannot(error)) => return Err(error),
        };
        // A disk that has changed a page condemns no layer, and what was hashed is what was written.
        let damaged = self.find_damaged(&(0..self.index().space_len()))?;
        if !damaged.is_empty() {
            self.heal(&damaged)?;
            return Err(ProofError::Missing);
        }
        // Content that counts as missing again while it was read may come otherwise.
        if !self.is_complete() {
            return Err(ProofError::Missing);
        }
        self.judge(verdict.clone())?;
        Ok(verdict)
    }

    /// Content counts as missing again, and may come in another way: a good verdict speaks of it no longer.
    pub(crate) fn doubt(&self) {
        let Some(Verdict::Verified { tar }) = self.proof().verdict() else { return };
        *self.proof().earlier.write().unwrap_or_else(PoisonError::into_inner) = Some(tar);
        self.proof().set_verdict(None);
        let verdict = Verdict::Verified { tar };
        let record = VerdictRecord { index: self.proof().index_digest, verdict, is_doubted: true };
        if let Err(error) = self.directory().write_verdict(&record) {
            tracing::warn!(%error, "an outdated verdict stays on disk");
        }
    }

    /// Makes a verdict durable, and holds to it from now on.
    fn judge(&self, verdict: Verdict) -> io::Result<()> {
        // The content first: a verdict speaks of bytes that are still there after a crash.
        self.flush()?;
        let record = VerdictRecord { index: self.proof().index_digest, verdict, is_doubted: false };
        let kept = self.directory().write_verdict(&record);
        let VerdictRecord { verdict, .. } = record;
        let is_refused = matches!(verdict, Verdict::Refused { .. });
        // A refusal holds here also when the disk does not take it.
        if is_refused || kept.is_ok() {
            self.proof().set_verdict(Some(verdict));
            if let Err(error) = self.proof().gaps.clear() {
                tracing::warn!(%error, "what was kept for the proof stays");
            }
        }
        kept
    }

    fn compare_with_tar(&self) -> Result<Digest, Failure> {
        let mut stream = ProofStream::new(self);
        let tree = match read_tree(&mut stream, ProofStream::skip) {
            Ok(tree) => tree,
            Err(UnfitStream::Refused(reason)) => return Err(Failure::Differs(format!("tar stream: {reason}"))),
            Err(UnfitStream::Unreadable(error)) => return Err(stream.failure(error)),
        };
        if let Err(error) = stream.skip(u64::MAX) {
            return Err(stream.failure(error));
        }
        let (digest, tar_len) = (stream.hasher.finish(), stream.read_len);
        let index = self.index();
        let side = TarSide::new(tree, tar_len, index.frames());
        let side = side.map_err(|error| Failure::Differs(format!("tar stream: {error}")))?;
        let mut differences = Vec::new();
        compare(index, &side, &mut |path, problem| {
            if differences.is_empty() {
                differences.push(format!("{path}: {problem}"));
            }
        });
        differences.pop().map_or(Ok(digest), |difference| Err(Failure::Differs(difference)))
    }

    /// Where content that is here differs from that of a frame.
    fn first_difference(&self, frame: u32, content: &[u8]) -> io::Result<Option<u64>> {
        let mut found = None;
        self.for_each_piece(frame, content, |plain_offset, piece| {
            if found.is_none() {
                found = self.difference_in(plain_offset, piece)?;
            }
            Ok(())
        })?;
        Ok(found)
    }

    fn difference_in(&self, plain_offset: u64, piece: &[u8]) -> io::Result<Option<u64>> {
        for run in self.unlike_runs(plain_offset, piece) {
            let position = |offset: u64| usize::try_from(offset - plain_offset).map_err(io::Error::other);
            let expected = &piece[position(run.start)?..position(run.end)?];
            let mut found = vec![0; expected.len()];
            self.read_content(run.start, &mut found)?;
            if let Some(at) = found.iter().zip(expected).position(|(found, expected)| found != expected) {
                return Ok(Some(run.start + at as u64));
            }
        }
        Ok(None)
    }
}

enum Failure {
    /// The layer is not what it says.
    Differs(String),
    /// It cannot be found out now.
    Cannot(ProofError),
}

/// The tar stream, put together frame by frame.
struct ProofStream<'a> {
    store: &'a FrameStore,
    next_frame: u32,
    content: Vec<u8>,
    consumed: usize,
    read_len: u64,
    hasher: DigestHasher,
    /// Bytes of the plain address space before this one were looked at.
    plain_until: u64,
    failure: Option<Failure>,
}

impl<'a> ProofStream<'a> {
    fn new(store: &'a FrameStore) -> Self {
        Self {
            store,
            next_frame: 0,
            content: Vec::new(),
            consumed: 0,
            read_len: 0,
            hasher: DigestHasher::default(),
            plain_until: 0,
            failure: None,
        }
    }

    /// Why reading failed.
    fn failure(&mut self, error: io::Error) -> Failure {
        self.failure.take().unwrap_or(Failure::Cannot(ProofError::Disk(error)))
    }

    fn fail<T>(&mut self, failure: Failure) -> io::Result<T> {
        self.failure = Some(failure);
        Err(io::Error::other("the stream cannot be put together"))
    }

    /// Makes `len` bytes available, or as many as there are.
    fn fill(&mut self, len: usize) -> io::Result<()> {
        while self.content.len() - self.consumed < len {
            let index = self.store.index();
            let Some(record) = index.frames().get(self.next_frame as usize) else {
                return self.expect_zeros(index.space_len());
            };
            let mut content = vec![0; record.plain_len.get() as usize];
            self.put_gaps(&mut content)?;
            self.put_files(&mut content)?;
            self.next_frame += 1;
            self.hasher.update(&content);
            self.read_len += content.len() as u64;
            self.content.drain(..self.consumed);
            self.consumed = 0;
            self.content.append(&mut content);
        }
        Ok(())
    }

    fn put_gaps(&mut self, content: &mut [u8]) -> io::Result<()> {
        let ranges = gap_ranges(self.store.index(), self.next_frame);
        if ranges.is_empty() {
            return Ok(());
        }
        let Some(gaps) = self.store.proof().gaps.read(self.next_frame)? else {
            return self.fail(Failure::Cannot(ProofError::Missing));
        };
        let mut rest = &gaps[..];
        for range in ranges {
            let Some((part, after)) = rest.split_at_checked(range.len()) else {
                return self.fail(Failure::Cannot(ProofError::Missing));
            };
            rest = after;
            match content.get_mut(range) {
                Some(place) => place.copy_from_slice(part),
                None => return self.fail(Failure::Cannot(ProofError::Missing)),
            }
        }
        Ok(())
    }

    fn put_files(&mut self, content: &mut [u8]) -> io::Result<()> {
        let index = self.store.index();
        let Some(tar) = index.frames().get(self.next_frame as usize).map(|frame| frame.tar_range()) else {
            return Ok(());
        };
        for extent in index.extents_in_tar(&tar).filter_map(|number| index.extents().get(number)) {
            let extent_tar = extent.tar_range();
            let overlap = extent_tar.start.max(tar.start)..extent_tar.end.min(tar.end);
            let plain_start = extent.plain_offset.get().saturating_add(overlap.start - extent_tar.start);
            self.expect_zeros(plain_start)?;
            let position = |offset: u64| usize::try_from(offset - tar.start).map_err(io::Error::other);
            let (start, end) = (position(overlap.start)?, position(overlap.end)?);
            let place = content.get_mut(start..end).ok_or_else(|| io::Error::other("extent outside its frame"))?;
            self.store.read_content(plain_start, place)?;
            self.plain_until = plain_start + (overlap.end - overlap.start);
        }
        Ok(())
    }

    /// Holes, and the space between files, are zeros: no tar stream says anything else of them.
    fn expect_zeros(&mut self, until: u64) -> io::Result<()> {
        while self.plain_until < until {
            let start = self.store.next_stored(self.plain_until)?.min(until);
            let len = usize::try_from((until - start).min(ZEROS_LEN as u64)).map_err(io::Error::other)?;
            let mut bytes = vec![0; len];
            self.store.read_content(start, &mut bytes)?;
            if let Some(at) = bytes.iter().position(|byte| *byte != 0) {
                let offset = start + at as u64;
                let reason = format!("there is content at {offset} of the plain address space, where no file has any");
                return self.fail(Failure::Differs(reason));
            }
            self.plain_until = start + len as u64;
        }
        Ok(())
    }

    /// Consumes `len` bytes, or as many as there are.
    fn skip(&mut self, len: u64) -> io::Result<()> {
        let mut left = len;
        while left > 0 {
            self.fill(1)?;
            let available = self.content.len() - self.consumed;
            let part = available.min(usize::try_from(left).unwrap_or(usize::MAX));
            if part == 0 {
                break;
            }
            self.consumed += part;
            left -= part as u64;
        }
        Ok(())
    }
}

impl TarInput for ProofStream<'_> {
    fn peek(&mut self, len: usize) -> io::Result<&[u8]> {
        self.fill(len)?;
        let end = self.content.len().min(self.consumed + len);
        Ok(&self.content[self.consumed..end])
    }

    fn consume(&mut self, len: usize) -> io::Result<()> {
        self.consumed += len;
        Ok(())
    }

    fn position(&self) -> u64 {
        self.read_len - (self.content.len() - self.consumed) as u64
    }
}

//! Content that another layer of this cache has already: found by the dedup section, copied instead of fetched.
//!
//! The file `dedup` of a layer's directory says what the layer holds: eight bytes of magic number, then the
//! [`DedupPiece`]s of its dedup section. It has no checksum, as it only says where to look: what is copied is hashed
//! first, against the digest that the new layer's own section says. So neither a damaged file nor a layer that is
//! removed or emptied meanwhile can do more than make a copy fail; and then the bytes are fetched.

use std::{
    fs::File,
    io::{self, BufReader, Read},
    ops::Range,
    os::unix::fs::FileExt,
};

use format_spec::{Digest, dedup::DedupPiece, limits::FRAME_PLAIN_LEN_MAX};

use crate::{
    disk::{
        directory::CopySource,
        frame_store::{Epoch, FrameStore},
        mapping::LayerIndex,
    },
    ranges::without,
    sync::atomic::{AtomicU8, Ordering},
};

/// First eight bytes of the file `dedup`.
const MAGIC: [u8; 8] = *b"LAZULIDD";
const PIECE_LEN: usize = size_of::<DedupPiece>();

/// A layer that content may be copied from.
#[derive(Debug)]
pub(crate) struct Peer {
    /// Its file `dedup`.
    pub(crate) dedup: File,
    pub(crate) source: CopySource,
}

/// Pieces of one layer that others have.
#[derive(Debug)]
pub(crate) struct CopyPlan {
    /// By plain offset; they do not overlap.
    pieces: Vec<Planned>,
    sources: Vec<File>,
    /// When the pieces were all still to be written.
    epoch: Epoch,
}

#[derive(Debug)]
struct Planned {
    plain: Range<u64>,
    digest: Digest,
    source: usize,
    source_offset: u64,
    state: AtomicU8,
}

/// Values of [`Planned::state`].
mod state {
    pub(super) const PLANNED: u8 = 0;
    /// Written, but its pages may not say so yet.
    pub(super) const WRITTEN: u8 = 1;
    pub(super) const COPIED: u8 = 2;
    /// The source has other bytes by now, or a disk refused.
    pub(super) const FAILED: u8 = 3;
}

/// The content of the file `dedup`.
pub(crate) fn encode(pieces: &[DedupPiece]) -> Vec<u8> {
    use zerocopy::IntoBytes;
    [&MAGIC[..], pieces.as_bytes()].concat()
}

/// Reads what [`encode`] wrote, piece by piece; ends where something does not fit.
fn read(file: File) -> impl Iterator<Item = DedupPiece> {
    use zerocopy::FromBytes;
    let mut reader = BufReader::with_capacity(1 << 16, file);
    let mut magic = [0; MAGIC.len()];
    let is_ours = reader.read_exact(&mut magic).is_ok() && magic == MAGIC;
    let mut record = [0; PIECE_LEN];
    std::iter::from_fn(move || {
        let is_there = is_ours && reader.read_exact(&mut record).is_ok();
        if is_there { DedupPiece::read_from_bytes(&record).ok() } else { None }
    })
}

impl CopyPlan {
    /// Looks for the pieces that a layer is missing in its peers; `None` if they have none.
    pub(crate) fn find(store: &FrameStore, wanted: &[DedupPiece], peers: impl Iterator<Item = Peer>) -> Option<Self> {
        let is_wanted =
            |piece: &&DedupPiece| piece.len <= u64::from(FRAME_PLAIN_LEN_MAX) && !store.has(&piece.plain_range());
        let epoch = store.epoch();
        let wanted: Vec<&DedupPiece> = inside_files(store.index(), wanted).filter(is_wanted).collect();
        // Numbers sorted by digest: a map would take several times the memory.
        let mut by_digest: Vec<usize> = (0..wanted.len()).collect();
        by_digest.sort_unstable_by_key(|number| wanted[*number].digest);
        let mut places: Vec<Option<(usize, u64)>> = vec![None; wanted.len()];
        let mut left = wanted.len();
        let mut sources = Vec::new();
        for Peer { dedup, source } in peers {
            if left == 0 {
                break;
            }
            let before = left;
            for piece in read(dedup) {
                let first = by_digest.partition_point(|number| wanted[*number].digest < piece.digest);
                let same = by_digest[first..].iter().take_while(|number| wanted[**number].digest == piece.digest);
                let same = same.filter(|number| places[**number].is_none() && wanted[**number].len == piece.len);
                let same: Vec<usize> = same.copied().collect();
                if same.is_empty() || !source.has(&piece.plain_range()) {
                    continue;
                }
                left -= same.len();
                same.into_iter().for_each(|number| places[number] = Some((sources.len(), piece.plain_offset.get())));
            }
            if left < before {
                sources.push(source.data);
            }
        }
        let pieces: Vec<_> = wanted
            .iter()
            .zip(places)
            .filter_map(|(piece, place)| {
                let (source, source_offset) = place?;
                let (plain, digest) = (piece.plain_range(), piece.digest());
                Some(Planned { plain, digest, source, source_offset, state: AtomicU8::new(state::PLANNED) })
            })
            .collect();
        (!pieces.is_empty()).then_some(Self { pieces, sources, epoch })
    }

    /// What this plan brings of `runs`: the pieces to copy, and the runs that it does not bring.
    pub(crate) fn take(&self, runs: &[Range<u64>]) -> (Vec<usize>, Vec<Range<u64>>) {
        let mut numbers = Vec::new();
        for run in runs {
            let first = self.pieces.partition_point(|piece| piece.plain.end <= run.start);
            let first = first.max(numbers.last().map_or(0, |last| last + 1));
            let overlapping = (first..).zip(&self.pieces[first.min(self.pieces.len())..]);
            let overlapping = overlapping.take_while(|(_, piece)| piece.plain.start < run.end);
            // A page may wait for other pieces than the one of it that is copied.
            let coming = overlapping.filter(|(_, piece)| piece.state() != state::FAILED);
            numbers.extend(coming.map(|(number, _)| number));
        }
        let coming: Vec<_> = numbers.iter().map(|number| self.pieces[*number].plain.clone()).collect();
        (numbers, without(runs, &coming))
    }

    /// Whether what it copies may be said to be there: no content was given up since.
    pub(crate) fn is_current(&self, store: &FrameStore) -> bool {
        self.epoch == store.epoch()
    }

    /// Number of pieces.
    pub(crate) fn len(&self) -> usize {
        self.pieces.len()
    }

    /// Length of a piece, in bytes.
    pub(crate) fn piece_len(&self, number: usize) -> u64 {
        let plain = &self.pieces[number].plain;
        plain.end - plain.start
    }

    /// Copies a piece into its layer unless that was done; returns the number of bytes copied. Blocks.
    ///
    /// # Errors
    ///
    /// When the layer's disk refuses. A source that has other bytes than it had is no error, but copies nothing.
    pub(crate) fn copy(&self, store: &FrameStore, number: usize) -> io::Result<u64> {
        let piece = &self.pieces[number];
        match piece.state() {
            state::PLANNED => {}
            state::WRITTEN => {
                self.note_copied(store, piece);
                return Ok(0);
            }
            _ => return Ok(0),
        }
        if store.has(&piece.plain) {
            piece.state.store(state::FAILED, Ordering::SeqCst);
            return Ok(0);
        }
        let len = usize::try_from(self.piece_len(number)).map_err(io::Error::other)?;
        let mut content = vec![0; len];
        let read = self.sources[piece.source].read_exact_at(&mut content, piece.source_offset);
        if read.is_err() || Digest::of(&content) != piece.digest {
            piece.state.store(state::FAILED, Ordering::SeqCst);
            return Ok(0);
        }
        let written = store.write_bytes(piece.plain.start, &content);
        let after = if written.is_ok() { state::WRITTEN } else { state::FAILED };
        let is_first = piece.state.swap(after, Ordering::SeqCst) == state::PLANNED;
        written?;
        self.note_copied(store, piece);
        // A reader and the copier in the background may have met at this piece.
        Ok(if is_first { len as u64 } else { 0 })
    }

    /// Says of a piece that was written that it is there. Whoever needs it may do so.
    fn note_copied(&self, store: &FrameStore, piece: &Planned) {
        // After the state: of two threads that copy two pieces of a page, one sees both.
        store.note_written(self.epoch, &piece.plain, |offset| self.written_until(offset));
        piece.state.store(state::COPIED, Ordering::SeqCst);
    }

    /// Where the piece ends that holds an offset, if it was written.
    fn written_until(&self, offset: u64) -> Option<u64> {
        let number = self.pieces.partition_point(|piece| piece.plain.end <= offset);
        let piece = self.pieces.get(number).filter(|piece| piece.plain.start <= offset)?;
        matches!(piece.state(), state::WRITTEN | state::COPIED).then_some(piece.plain.end)
    }
}

impl Planned {
    fn state(&self) -> u8 {
        self.state.load(Ordering::SeqCst)
    }
}

/// The pieces that are content of one file each: what lies between files must stay zeros.
fn inside_files<'a>(index: &'a LayerIndex, pieces: &'a [DedupPiece]) -> impl Iterator<Item = &'a DedupPiece> {
    let files = index.inodes().iter().filter(|inode| inode.is_regular() && inode.size != 0);
    let mut files = files.map(format_spec::Inode::plain_range).peekable();
    pieces.iter().filter(move |piece| {
        let plain = piece.plain_range();
        while files.next_if(|file| file.end <= plain.start).is_some() {}
        files.peek().is_some_and(|file| file.start <= plain.start && plain.end <= file.end)
    })
}

//! A disk whose writes are held in memory until somebody has time to write them down.
//!
//! redb syncs while it holds the one lock under which records change. Here it does not have to: what it writes is
//! *held*, the sync of a commit only *seals* what is held so far, and [`HeldDisk::write_down`] brings that to the disk
//! while redb changes records on. Sealed writes reach the disk, and are synced, before anything that was written
//! later: so after a crash the disk holds the state of some commit, as if each sync had been made when redb asked for
//! it and the crash had come earlier.

use std::{
    io, mem,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use redb::StorageBackend;

/// The disk. Safe from many threads; one at a time writes down.
#[derive(Debug)]
pub(crate) struct HeldDisk {
    disk: Box<dyn StorageBackend>,
    held: Mutex<Held>,
    /// Something did not reach the disk. The writes that were held are lost, and nothing may reach the disk after it.
    has_failed: AtomicBool,
}

#[derive(Debug)]
struct Held {
    syncs: Syncs,
    /// The length that redb gave the file.
    len: u64,
    /// That of the disk: as long, or longer until what needs no more is on it.
    disk_len: u64,
    /// The disk must know its length before it gets a header that says it.
    has_grown: bool,
    sealed: Sealed,
    /// The writes since.
    open: Vec<Write>,
    /// Bytes in both.
    bytes_len: usize,
}

/// The fate of a sync that redb asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Syncs {
    /// It is made: nobody else uses the database.
    AreMade,
    /// It seals: a commit asks for it, which is written down next.
    Seal,
    /// Nothing: a file that has grown is synced before anything is written down.
    AreLeft,
}

/// The writes that have to be on the disk before later ones.
#[derive(Debug, Clone, Default)]
struct Sealed {
    writes: Arc<Vec<Write>>,
    len: u64,
}

#[derive(Debug, Clone)]
struct Write {
    offset: u64,
    bytes: Vec<u8>,
}

impl HeldDisk {
    /// Holds what is written to `disk` from now on.
    ///
    /// # Errors
    ///
    /// When the disk does not say how long it is.
    pub(crate) fn new(disk: Box<dyn StorageBackend>) -> io::Result<Self> {
        let len = disk.len()?;
        let sealed = Sealed { len, ..Sealed::default() };
        let (syncs, open) = (Syncs::AreMade, Vec::new());
        let held = Held { syncs, len, disk_len: len, has_grown: false, sealed, open, bytes_len: 0 };
        Ok(Self { disk, held: Mutex::new(held), has_failed: AtomicBool::new(false) })
    }

    /// From now on many use the database, and what is written waits for [`Self::write_down`].
    pub(crate) fn hold(&self) {
        self.held().syncs = Syncs::AreLeft;
    }

    /// The database is about to be closed.
    pub(crate) fn release(&self) {
        self.held().syncs = Syncs::AreMade;
    }

    /// Runs `commit`, the only one for the moment, whose sync seals what is held.
    pub(crate) fn sealing<T>(&self, commit: impl FnOnce() -> T) -> T {
        self.held().syncs = Syncs::Seal;
        let done = commit();
        self.held().syncs = Syncs::AreLeft;
        done
    }

    /// Brings to the disk what is sealed, and syncs it. Takes as long as the disk takes, and holds up nobody else.
    ///
    /// # Errors
    ///
    /// Those of the disk; from then on every call fails.
    pub(crate) fn write_down(&self) -> io::Result<()> {
        self.require_no_failure()?;
        let (sealed, has_grown) = {
            let mut held = self.held();
            (held.sealed.clone(), mem::take(&mut held.has_grown))
        };
        if has_grown {
            self.note(self.disk.sync_data())?;
        }
        let written = sealed.writes.iter().try_for_each(|write| self.disk.write(write.offset, &write.bytes));
        self.note(written.and_then(|()| self.disk.sync_data()))?;
        let mut held = self.held();
        held.bytes_len -= mem::take(&mut held.sealed.writes).iter().map(|write| write.bytes.len()).sum::<usize>();
        // The bytes that were cut off since are needed until that is on the disk as well.
        let needed = held.len.max(sealed.len);
        if needed < held.disk_len {
            self.note(self.disk.set_len(needed))?;
            held.disk_len = needed;
        }
        Ok(())
    }

    /// Bytes of memory that are held.
    pub(crate) fn bytes_len(&self) -> usize {
        self.held().bytes_len
    }

    fn note<T>(&self, done: io::Result<T>) -> io::Result<T> {
        done.inspect_err(|_| self.has_failed.store(true, Ordering::Release))
    }

    fn require_no_failure(&self) -> io::Result<()> {
        match self.has_failed.load(Ordering::Acquire) {
            true => Err(io::Error::other("an earlier write failed")),
            false => Ok(()),
        }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        // Writes are added whole, and taken away whole.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The backend that redb gets for a disk that others write down.
#[derive(Debug)]
pub(crate) struct HeldBackend(pub(crate) Arc<HeldDisk>);

impl StorageBackend for HeldBackend {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.held().len)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.require_no_failure()?;
        // Looked at before the disk is read: what is written down meanwhile is then found in either place.
        let (pieces, disk_len) = {
            let held = self.0.held();
            let writes = held.sealed.writes.iter().chain(&held.open);
            (writes.filter_map(|write| write.within(offset, out.len())).collect::<Vec<_>>(), held.disk_len)
        };
        debug_assert!(offset + out.len() as u64 <= disk_len, "redb reads what it has");
        self.0.disk.read(offset, out)?;
        for (start, bytes) in pieces {
            out[start..start + bytes.len()].copy_from_slice(&bytes);
        }
        Ok(())
    }

    /// The file grows at once, so that a full disk shows here; it is cut when nothing on the disk needs what is cut off.
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.require_no_failure()?;
        let mut held = self.0.held();
        if len > held.disk_len {
            self.0.note(self.0.disk.set_len(len))?;
            (held.disk_len, held.has_grown) = (len, true);
        }
        held.len = len;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.require_no_failure()?;
        let syncs = self.0.held().syncs;
        if syncs != Syncs::AreLeft {
            self.0.held().seal();
        }
        if syncs == Syncs::AreMade { self.0.write_down() } else { Ok(()) }
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.require_no_failure()?;
        let mut held = self.0.held();
        held.bytes_len += data.len();
        held.open.push(Write { offset, bytes: data.to_vec() });
        Ok(())
    }

    fn close(&self) -> io::Result<()> {
        self.0.disk.close()
    }
}

impl Held {
    /// The held writes are part of a commit. The file may have grown in the middle of it, which seals too.
    fn seal(&mut self) {
        let open = mem::take(&mut self.open);
        let writes = Arc::make_mut(&mut self.sealed.writes);
        writes.extend(open);
        self.sealed.len = self.len;
    }
}

impl Write {
    /// The part of this that lies in the `len` bytes from `offset` on, and its place there.
    fn within(&self, offset: u64, len: usize) -> Option<(usize, Vec<u8>)> {
        let (start, end) = (self.offset.max(offset), (self.offset + self.bytes.len() as u64).min(offset + len as u64));
        let at = |place: u64, from: u64| usize::try_from(place - from).expect("inside what is in memory");
        (start < end).then(|| {
            let bytes = &self.bytes[at(start, self.offset)..at(end, self.offset)];
            (at(start, offset), bytes.to_vec())
        })
    }
}

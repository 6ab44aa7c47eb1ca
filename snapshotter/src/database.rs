//! The database under the records: opened again after a failure, with room of its own on a full disk, and changes of
//! many callers made durable together.
//!
//! redb answers every call with an error after one failed write, until it is opened anew. So a failure here costs the
//! calls under way, and the next call finds an open database.
//!
//! A change is *committed* in memory first, where readers see it, and is *durable* later: one thread writes down and
//! syncs for all who wait, and nobody who changes records waits for the disk meanwhile (`held.rs`). So a slow disk costs
//! who needs a durable change two syncs at most, however many others there are, and others nothing.
//!
//! Everything here blocks.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
};

use redb::{Builder, Durability, ReadTransaction, ReadableDatabase, StorageBackend, WriteTransaction};
use rustix::fs::FallocateFlags;
use tracing::{info, warn};

use crate::{
    held::{HeldBackend, HeldDisk},
    records::MetadataError,
};

type Result<T, E = MetadataError> = std::result::Result<T, E>;

/// Memory for pages: a few thousand records with their index.
const CACHE_BYTES: usize = 8 << 20;
/// Room that is allocated for the file, as a multiple of its length: redb doubles it when it grows, and a removal that
/// makes it grow must not find the disk full. Without that room nothing is added, so what additions left of it is there
/// for removals.
const RESERVED_LENGTHS: u64 = 2;
/// Memory for what is not on the disk yet; who would add to more than that waits for the disk.
const HELD_BYTES_MAX: usize = 32 << 20;

/// Opens what the database lies in; called again after each failure.
pub(crate) type OpenBackend = Box<dyn Fn() -> io::Result<Box<dyn StorageBackend>> + Send + Sync>;

/// A redb database that heals. Safe from many threads; changes run one after the other.
pub(crate) struct Database {
    open_backend: OpenBackend,
    opened: RwLock<Opened>,
    /// Held from the beginning of a change to its commit.
    changing: Mutex<()>,
    syncing: Mutex<Syncing>,
    /// Something in [`Syncing`] went on.
    went_on: Condvar,
    room: Arc<Room>,
}

/// The files that are open now.
struct Opened {
    /// `None` when it could not be opened again.
    database: Option<OpenDatabase>,
    /// Counts the openings.
    generation: u64,
}

struct OpenDatabase {
    redb: redb::Database,
    disk: Arc<HeldDisk>,
}

impl Drop for OpenDatabase {
    fn drop(&mut self) {
        // Nobody else will write down what redb writes when it is closed.
        self.disk.release();
    }
}

/// Which changes are durable.
#[derive(Default)]
struct Syncing {
    /// Changes begun so far,
    begun: u64,
    /// and ended, in whatever way.
    ended: u64,
    /// Changes committed so far.
    committed: u64,
    /// Of these, how many are on disk.
    durable: u64,
    /// Somebody syncs.
    is_under_way: bool,
    /// Callers who have to hear whether theirs is durable.
    waiting: usize,
    /// Which changes never became so, as long as somebody waits.
    losses: Vec<Loss>,
}

/// Changes that a failure took away.
struct Loss {
    /// All behind this one,
    after: u64,
    /// up to this one.
    up_to: u64,
    kind: io::ErrorKind,
    message: String,
}

impl Database {
    /// Opens the database in a file, making an empty one when there is none.
    ///
    /// # Errors
    ///
    /// When it cannot be read, or is no database.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let room = Arc::new(Room { path: path.to_owned(), is_missing: AtomicBool::new(false) });
        let of_file = Arc::clone(&room);
        let open =
            move || -> io::Result<Box<dyn StorageBackend>> { Ok(Box::new(DatabaseFile::open(of_file.clone())?)) };
        Self::open_with(Box::new(open), room)
    }

    /// Opens the database in what `open_backend` opens.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    #[cfg(test)]
    pub(crate) fn open_on(open_backend: OpenBackend) -> Result<Self> {
        Self::open_with(open_backend, Arc::default())
    }

    fn open_with(open_backend: OpenBackend, room: Arc<Room>) -> Result<Self> {
        let database = Some(open_database(&open_backend)?);
        let opened = RwLock::new(Opened { database, generation: 0 });
        let (changing, syncing) = (Mutex::default(), Mutex::default());
        Ok(Self { open_backend, opened, changing, syncing, went_on: Condvar::new(), room })
    }

    /// Whether there is room left for what removals may need; who adds something asks before.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub(crate) fn require_room(&self) -> Result<()> {
        self.room.require().map_err(io_error)
    }

    /// Calls `look` with a consistent state.
    ///
    /// # Errors
    ///
    /// Those of `look`, and those of the database.
    pub(crate) fn read<T>(&self, look: impl Fn(&ReadTransaction) -> Result<T>) -> Result<T> {
        self.healing(|database| look(&database.redb.begin_read()?))
    }

    /// Calls `change` and keeps what it did if it succeeds; it is durable then. It may be called again.
    ///
    /// # Errors
    ///
    /// Those of `change`, after which nothing has changed, and those of the database.
    pub(crate) fn change<T>(&self, change: impl Fn(&WriteTransaction) -> Result<T>) -> Result<T> {
        let (done, waiting) = self.committed(change)?;
        self.sync(&waiting).map(|()| done)
    }

    /// As [`Self::change`], for what a crash may undo as long as nothing later is durable and nobody has called
    /// [`Self::make_durable`]. Waits for no disk, unless very much is held.
    ///
    /// # Errors
    ///
    /// As [`Self::change`].
    pub(crate) fn change_for_now<T>(&self, change: impl Fn(&WriteTransaction) -> Result<T>) -> Result<T> {
        let (done, waiting) = self.committed(change)?;
        if self.held_bytes() > HELD_BYTES_MAX {
            self.sync(&waiting)?;
        }
        Ok(done)
    }

    /// Returns when no crash undoes any longer what was committed before.
    ///
    /// # Errors
    ///
    /// Those of the database; then what was not durable is undone.
    pub(crate) fn make_durable(&self) -> Result<()> {
        let waiting = Waiting::new(self, &mut self.syncing());
        self.sync(&waiting)
    }

    /// The result of `change`, and the wait for its commit to be durable.
    fn committed<T>(&self, change: impl Fn(&WriteTransaction) -> Result<T>) -> Result<(T, Waiting<'_>)> {
        let _begun = Begun::new(self);
        self.healing(|database| {
            let _alone = self.changing();
            let mut transaction = database.redb.begin_write()?;
            transaction.set_durability(Durability::None).expect("there are no savepoints");
            let done = change(&transaction)?;
            transaction.commit()?;
            let mut syncing = self.syncing();
            syncing.committed += 1;
            Ok((done, Waiting::new(self, &mut syncing)))
        })
    }

    /// Returns when the commit is durable: syncs, or waits for who does.
    fn sync(&self, waiting: &Waiting<'_>) -> Result<()> {
        let number = waiting.number;
        let mut syncing = self.syncing();
        loop {
            if let Some(loss) = syncing.losses.iter().find(|loss| loss.after < number && number <= loss.up_to) {
                return Err(io_error(io::Error::new(loss.kind, loss.message.clone())));
            }
            if syncing.durable >= number {
                return Ok(());
            }
            if syncing.is_under_way {
                syncing = self.went_on.wait(syncing).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            syncing.is_under_way = true;
            // Transactions that have begun are covered too: they change memory only.
            let begun = syncing.begun;
            let is_behind = |syncing: &mut Syncing| syncing.ended < begun;
            syncing = self.went_on.wait_while(syncing, is_behind).unwrap_or_else(PoisonError::into_inner);
            let covered = syncing.committed;
            drop(syncing);
            let synced = self.sync_all();
            syncing = self.syncing();
            syncing.is_under_way = false;
            if synced.is_ok() {
                syncing.durable = syncing.durable.max(covered);
            }
            self.went_on.notify_all();
            synced?;
        }
    }

    /// An empty change that is durable, and with it all before.
    fn sync_all(&self) -> Result<()> {
        let opened = self.opened.read().unwrap_or_else(PoisonError::into_inner);
        let synced = match &opened.database {
            Some(database) => self.seal(database).and_then(|()| database.disk.write_down().map_err(io_error)),
            None => Err(redb::Error::PreviousIo.into()),
        };
        let generation = opened.generation;
        drop(opened);
        synced.inspect_err(|error| self.open_again(generation, error))
    }

    fn seal(&self, database: &OpenDatabase) -> Result<()> {
        let _alone = self.changing();
        let transaction = database.redb.begin_write()?;
        Ok(database.disk.sealing(|| transaction.commit())?)
    }

    fn held_bytes(&self) -> usize {
        let opened = self.opened.read().unwrap_or_else(PoisonError::into_inner);
        opened.database.as_ref().map_or(0, |database| database.disk.bytes_len())
    }

    /// Runs `work`; when the database failed earlier it is opened first, when it fails now it is opened afterwards.
    fn healing<T>(&self, work: impl Fn(&OpenDatabase) -> Result<T>) -> Result<T> {
        let mut is_second = false;
        loop {
            let opened = self.opened.read().unwrap_or_else(PoisonError::into_inner);
            let done = match &opened.database {
                Some(database) => work(database),
                None => Err(redb::Error::PreviousIo.into()),
            };
            let generation = opened.generation;
            drop(opened);
            match done {
                Err(error) if is_failure(&error) => {
                    self.open_again(generation, &error);
                    if is_second || !is_earlier_failure(&error) {
                        return Err(error);
                    }
                    is_second = true;
                }
                done => return done,
            }
        }
    }

    /// Unless somebody has done it already: what is not durable is lost, and the next call finds what is.
    fn open_again(&self, generation: u64, cause: &MetadataError) {
        let mut opened = self.opened.write().unwrap_or_else(PoisonError::into_inner);
        if opened.generation != generation {
            return;
        }
        opened.generation += 1;
        // Closed before it is opened again.
        opened.database = None;
        {
            let mut syncing = self.syncing();
            let (after, up_to) = (syncing.durable, syncing.committed);
            if syncing.waiting > 0 && after < up_to {
                syncing.losses.push(Loss { after, up_to, kind: io_kind(cause), message: cause.to_string() });
            }
            // Lost transactions are not waited for any longer.
            syncing.durable = up_to;
            self.went_on.notify_all();
        }
        match open_database(&self.open_backend) {
            Ok(database) => {
                opened.database = Some(database);
                info!(%cause, "database opened again after a failure");
            }
            Err(error) => warn!(%cause, %error, "database cannot be opened again yet"),
        }
    }

    fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn syncing(&self) -> MutexGuard<'_, Syncing> {
        // Numbers that are changed one by one: a panic elsewhere leaves them whole.
        self.syncing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A change that is not committed yet.
struct Begun<'a>(&'a Database);

impl<'a> Begun<'a> {
    fn new(database: &'a Database) -> Self {
        database.syncing().begun += 1;
        Self(database)
    }
}

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        self.0.syncing().ended += 1;
        self.0.went_on.notify_all();
    }
}

/// Somebody who has to hear whether all up to a commit is durable.
struct Waiting<'a> {
    database: &'a Database,
    number: u64,
}

impl<'a> Waiting<'a> {
    /// For all that is committed.
    fn new(database: &'a Database, syncing: &mut Syncing) -> Self {
        syncing.waiting += 1;
        Self { database, number: syncing.committed }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut syncing = self.database.syncing();
        syncing.waiting -= 1;
        if syncing.waiting == 0 {
            syncing.losses.clear();
        }
    }
}

impl std::fmt::Debug for Database {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Database").finish_non_exhaustive()
    }
}

fn open_database(open_backend: &OpenBackend) -> Result<OpenDatabase> {
    let disk = Arc::new(HeldDisk::new(open_backend().map_err(io_error)?).map_err(io_error)?);
    let backend = HeldBackend(Arc::clone(&disk));
    let redb = Builder::new().set_cache_size(CACHE_BYTES).create_with_backend(backend)?;
    disk.hold();
    Ok(OpenDatabase { redb, disk })
}

fn io_error(error: io::Error) -> MetadataError {
    redb::Error::Io(error).into()
}

/// Whether the database itself failed, so that redb refuses everything from now on.
fn is_failure(error: &MetadataError) -> bool {
    let MetadataError::Database(error) = error else { return false };
    matches!(
        **error,
        redb::Error::Io(_)
            | redb::Error::PreviousIo
            | redb::Error::DatabaseClosed
            | redb::Error::LockPoisoned(_)
            | redb::Error::Corrupted(_)
    )
}

fn is_earlier_failure(error: &MetadataError) -> bool {
    matches!(error, MetadataError::Database(error) if matches!(**error, redb::Error::PreviousIo | redb::Error::DatabaseClosed))
}

fn io_kind(error: &MetadataError) -> io::ErrorKind {
    match error {
        MetadataError::Database(error) => match &**error {
            redb::Error::Io(error) => error.kind(),
            _ => io::ErrorKind::Other,
        },
        _ => io::ErrorKind::Other,
    }
}

/// Room on the disk that is kept for the file: up to its next length.
#[derive(Debug, Default)]
struct Room {
    path: PathBuf,
    is_missing: AtomicBool,
}

impl Room {
    /// Allocates it; not to get it is no error here.
    fn reserve(&self, file: &File) -> io::Result<()> {
        let len = file.metadata()?.len();
        let is_missing = match allocate(file, len * RESERVED_LENGTHS) {
            Err(error) if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => true,
            allocated => allocated.map(|()| false)?,
        };
        if is_missing && !self.is_missing.swap(is_missing, Ordering::Relaxed) {
            warn!(path = %self.path.display(), "the disk is full: nothing is added until there is room again");
        }
        self.is_missing.store(is_missing, Ordering::Relaxed);
        Ok(())
    }

    fn require(&self) -> io::Result<()> {
        if !self.is_missing.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.reserve(&File::options().write(true).open(&self.path)?)?;
        match self.is_missing.load(Ordering::Relaxed) {
            true => Err(io::ErrorKind::StorageFull.into()),
            false => Ok(()),
        }
    }
}

/// Blocks up to `len`, without changing the length; where the file system cannot, they come when they are written.
fn allocate(file: &File, len: u64) -> io::Result<()> {
    match rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, 0, len) {
        Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
        allocated => Ok(allocated?),
    }
}

/// A file whose blocks are all allocated, and more behind its end: writing to it needs no room on the disk. Two
/// processes are kept apart by the lock of the root directory.
#[derive(Debug)]
struct DatabaseFile {
    file: File,
    room: Arc<Room>,
}

impl DatabaseFile {
    fn open(room: Arc<Room>) -> io::Result<Self> {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&room.path)?;
        if file.metadata()?.len() > 0 {
            room.reserve(&file)?;
        }
        Ok(Self { file, room })
    }
}

impl StorageBackend for DatabaseFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(out, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if len > self.len()? {
            // The kept space is used; where that is not enough the file stays as it is.
            allocate(&self.file, len)?;
        }
        self.file.set_len(len)?;
        self.room.reserve(&self.file)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }
}

//! Starts of this node: what each reads is recorded, and fetched ahead when another version of its image is started.
//!
//! A *recording* begins when a tree is made and ends a minute after somebody has read of it first. The files that were
//! touched by then are the *record* of the image's repository (`starts/records.rs`). Trees that an earlier process has
//! shown are not recorded: they have been started.
//!
//! Layers are shared, and a read of one does not say through which tree it came. So a recording counts only what was read
//! of layers that no tree of another repository had meanwhile, and whose places are all of its own: an earlier process may
//! have shown a tree for images that nothing else tells of.

mod foreseen;
mod records;
mod sharing;

use std::{
    collections::{HashMap, HashSet},
    io,
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use control::{TreeId, repository_of};
use format_spec::{
    LayerId,
    profile::{Origin, Profile},
};
use storage::{Foresight, Layer};
use tracing::{debug, warn};

use self::{
    foreseen::{LayerRanges, find_file, foreseen},
    records::{RECORD_LEN_MAX, Records},
    sharing::{Sharing, Window},
};
use crate::{description::owner_of, pool::Pool, recording::touched_in, sync::lock, tree::Tree};

/// Reads of a layer that touch something new and are recorded: a megabyte of memory at most, for a minute.
const TOUCHES_MAX: usize = 1 << 14;
/// How often is looked what recordings have got.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// A start pauses when nobody has asked for anything new for so long: what was read until then is kept.
const QUIET_TIME: Duration = Duration::from_secs(5);
/// A recording ends so long after the first read: what is read later is no start.
const RECORDING_TIME: Duration = Duration::from_secs(60);
/// Most compressed bytes that are fetched ahead for a start: more than a node fetches before a start wants it.
const FORESIGHT_LEN_MAX: u64 = 64 << 20;
/// How often is looked whether hot packs are in, and for how long: then somebody else fetches what is read.
const HOT_PACK_LOOK_INTERVAL: Duration = Duration::from_millis(20);
const HOT_PACK_PATIENCE: Duration = Duration::from_secs(60);

/// Records of starts, and the recordings under way.
#[derive(Debug)]
pub(crate) struct Starts {
    records: Records,
    /// Whether what earlier starts read is fetched ahead.
    fetches_ahead: bool,
    table: Mutex<Table>,
    /// One thread: nobody waits for it.
    pool: Pool,
}

#[derive(Debug, Default)]
struct Table {
    sharing: Sharing,
    /// Trees that an earlier process has shown.
    restored: HashSet<TreeId>,
    /// Nobody knows which those are: nothing is recorded.
    is_restored_unknown: bool,
    recordings: HashMap<TreeId, Recording>,
    /// How many recordings each layer is recorded for.
    recorded: HashMap<LayerId, usize>,
}

/// A start that is recorded.
#[derive(Debug, Clone)]
struct Recording {
    tree: Arc<Tree>,
    repository: String,
    /// Everything that it reads is seen: nothing of its layers was read before, and the kernel reads none by itself.
    is_cold: bool,
    /// For each layer of the tree when its reads count.
    windows: Vec<Option<Window>>,
    progress: Progress,
}

/// How far a recording is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Progress {
    /// Touches so far, and those that were written.
    count: usize,
    written: usize,
    first: Option<Instant>,
    last: Option<Instant>,
}

/// The thing to do about a recording.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Nothing,
    Write,
    End,
}

impl Starts {
    /// Opens the records below `root`, making their directory if needed; `fetches_ahead` says whether they are used too.
    ///
    /// # Errors
    ///
    /// When the disk or the system refuses.
    pub(crate) fn open(root: &Path, fetches_ahead: bool) -> io::Result<Arc<Self>> {
        let (records, pool) = (Records::open(root)?, Pool::new("lazuli-starts", 1)?);
        Ok(Arc::new(Self { records, fetches_ahead, table: Mutex::default(), pool }))
    }

    /// Looks after recordings as long as this is there.
    pub(crate) fn keep_looking(self: &Arc<Self>) {
        let starts = Arc::downgrade(self);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(LOOK_INTERVAL).await;
                let Some(starts) = starts.upgrade() else { return };
                let due = lock(&starts.table).due(Instant::now());
                if !due.is_empty() {
                    let writer = starts.clone();
                    starts.pool.run(move || writer.write_all(due)).await;
                }
            }
        });
    }

    /// These trees, each with its image and layers, were shown by an earlier process, and are going to be made again. To be
    /// called before anything is shown.
    pub(crate) fn note_restored<'i>(&self, trees: impl IntoIterator<Item = (TreeId, &'i str, Vec<LayerId>)>) {
        let mut table = lock(&self.table);
        for (tree, image, layers) in trees {
            table.restored.insert(tree);
            table.sharing.add(tree, repository_of(image), layers);
        }
    }

    /// Trees that an earlier process has shown may be in use, and nobody knows which: nothing is recorded.
    pub(crate) fn note_restored_unknown(&self) {
        lock(&self.table).is_restored_unknown = true;
    }

    /// A tree was made for an image: nobody has read through it yet. Begins to record its start, and to fetch what earlier
    /// starts read; does not wait.
    pub(crate) fn made(self: &Arc<Self>, tree: &Arc<Tree>, image: &str) {
        let repository = repository_of(image).to_owned();
        if !lock(&self.table).begin(tree, &repository, Instant::now()) || !self.fetches_ahead {
            return;
        }
        let (starts, tree) = (self.clone(), tree.clone());
        tokio::spawn(async move { starts.foresee(tree, repository).await });
    }

    /// Another image has named a tree that is there.
    pub(crate) fn named(&self, tree: TreeId, image: &str) {
        lock(&self.table).share(tree, repository_of(image), Instant::now());
    }

    /// A tree was mounted so that the kernel reads some of its layers by itself.
    pub(crate) fn mounted(&self, tree: TreeId, direct_layers: &[LayerId]) {
        if !direct_layers.is_empty()
            && let Some(recording) = lock(&self.table).recordings.get_mut(&tree)
        {
            recording.is_cold = false;
        }
    }

    /// A tree is shown no longer; writes what was recorded of it. Blocks.
    pub(crate) fn released(&self, tree: TreeId) {
        let recording = lock(&self.table).forget(tree);
        if let Some(recording) = recording {
            self.write(&recording);
            lock(&self.table).stop(&recording);
        }
    }

    /// Writes what was recorded so far; blocks.
    pub(crate) fn write_now(&self) {
        let recordings: Vec<_> = lock(&self.table).recordings.values().cloned().collect();
        recordings.iter().for_each(|recording| self.write(recording));
    }

    fn write_all(&self, due: Vec<(Recording, Step)>) {
        for (recording, step) in due {
            self.write(&recording);
            if step == Step::End {
                lock(&self.table).stop(&recording);
            }
        }
    }

    /// Writes a recording down unless that was done; failures are told and passed over.
    fn write(&self, recording: &Recording) {
        let Recording { tree, repository, is_cold, windows, progress } = recording;
        if progress.written == recording.touch_count() {
            return;
        }
        let touched = touched_in(tree, RECORD_LEN_MAX, |layer, at| {
            let window = windows.get(layer as usize).and_then(Option::as_ref);
            window.is_some_and(|window| window.contains(at))
        });
        if touched.is_empty() {
            return;
        }
        let origin = Origin { repository: repository.clone(), tree: tree.id };
        let start = Profile::of_files(touched.into_iter().map(|file| (file.path, file.ranges)));
        let has_file = |path: &[u8]| find_file(&tree.index, path).is_some();
        if let Err(error) = self.records.keep(start.with_origin(Some(origin)), *is_cold, has_file) {
            warn!(directory = %self.records.directory().display(), %error, "start is not recorded");
        }
        tree.release_memory();
    }

    /// Fetches what earlier starts of the repository's images read, behind the hot packs of the tree's layers: they know
    /// better.
    async fn foresee(self: Arc<Self>, tree: Arc<Tree>, repository: String) {
        let (starts, sought) = (self.clone(), tree.clone());
        let find = move || {
            let record = starts.records.load(&repository)?;
            let found = foreseen(&sought.index, &record);
            sought.release_memory();
            Some((repository, found)).filter(|(_, found)| !found.is_empty())
        };
        let Some((repository, found)) = self.pool.run(find).await else { return };
        let are_in = async {
            while tree.layers.iter().any(Layer::is_hot_pack_coming) {
                tokio::time::sleep(HOT_PACK_LOOK_INTERVAL).await;
            }
        };
        if tokio::time::timeout(HOT_PACK_PATIENCE, are_in).await.is_err() {
            debug!(repository, "hot packs are still on their way: nothing is fetched ahead");
            return;
        }
        self.pool.begin(move || {
            let wanted_bytes = want(&tree, &found);
            debug!(repository, tree = %tree.id, wanted_bytes, "earlier starts say what is going to be read");
        });
    }
}

/// Wants what is missing of these ranges; returns the number of compressed bytes.
fn want(tree: &Tree, ranges: &[LayerRanges]) -> u64 {
    let mut foresight = Foresight::new(FORESIGHT_LEN_MAX);
    let layers = ranges.iter().filter_map(|(layer, ranges)| Some((tree.layers.get(*layer as usize)?, ranges)));
    layers.map(|(layer, ranges)| foresight.want(layer, ranges)).sum()
}

/// Whether all images that a layer was named by are of one repository.
fn is_all_of(layer: &Layer, repository: &str) -> bool {
    layer.descriptions().iter().all(|place| owner_of(place) == repository)
}

impl Table {
    /// A tree was made; whether it is the start of an image.
    fn begin(&mut self, tree: &Arc<Tree>, repository: &str, now: Instant) -> bool {
        let was_started = self.restored.remove(&tree.id);
        // It may have been there before, and could not be unmounted: then whoever had it has it still.
        if let Some(recording) = self.recordings.remove(&tree.id) {
            self.stop(&recording);
        }
        let ids: Vec<LayerId> = tree.layers.iter().map(|layer| layer.lazy_layer().id()).collect();
        self.sharing.add(tree.id, repository, ids.clone());
        self.close_windows(&ids, repository, now);
        if was_started || self.is_restored_unknown {
            return false;
        }
        let (mut is_cold, mut windows) = (true, Vec::with_capacity(ids.len()));
        for (layer, id) in tree.layers.iter().zip(&ids) {
            let is_alone = self.sharing.is_alone(*id, repository) && is_all_of(layer, repository);
            let is_recorded = is_alone && !layer.is_complete();
            is_cold &= is_alone && layer.is_fresh() && (is_recorded || layer.index().extents().is_empty());
            if is_recorded {
                let count = self.recorded.entry(*id).or_default();
                if *count == 0 {
                    layer.begin_recording(TOUCHES_MAX);
                }
                *count += 1;
            }
            windows.push(is_recorded.then_some(Window::from(now)));
        }
        let (tree, repository, progress) = (tree.clone(), repository.to_owned(), Progress::default());
        let mut recording = Recording { tree, repository, is_cold, windows, progress };
        // Another recording may have begun before.
        let count = recording.touch_count();
        recording.progress = Progress { count, written: count, ..Progress::default() };
        self.recordings.insert(recording.tree.id, recording);
        true
    }

    /// An image of a repository has named a tree that is there.
    fn share(&mut self, tree: TreeId, repository: &str, now: Instant) {
        if let Some(layers) = self.sharing.share(tree, repository) {
            self.close_windows(&layers, repository, now);
        }
    }

    /// Somebody of a repository may read these layers from now on: what is read of them counts no longer for others.
    fn close_windows(&mut self, layers: &[LayerId], repository: &str, now: Instant) {
        for recording in self.recordings.values_mut().filter(|recording| recording.repository != repository) {
            for (layer, window) in recording.tree.layers.iter().zip(&mut recording.windows) {
                if layers.contains(&layer.lazy_layer().id()) {
                    recording.is_cold = false;
                    window.iter_mut().for_each(|window| window.close(now));
                }
            }
        }
    }

    /// The recordings that something is to be done about; those that end are no longer here.
    fn due(&mut self, now: Instant) -> Vec<(Recording, Step)> {
        let mut due = Vec::new();
        for recording in self.recordings.values_mut() {
            let before = recording.clone();
            match recording.progress.look(before.touch_count(), now) {
                Step::Nothing => {}
                step => due.push((before, step)),
            }
        }
        for (recording, _) in due.iter().filter(|(_, step)| *step == Step::End) {
            self.recordings.remove(&recording.tree.id);
        }
        due
    }

    /// A tree is shown no longer.
    fn forget(&mut self, tree: TreeId) -> Option<Recording> {
        self.sharing.remove(tree);
        self.restored.remove(&tree);
        self.recordings.remove(&tree)
    }

    /// A recording that is no longer here has ended: reads that nobody records are not noted any longer.
    fn stop(&mut self, recording: &Recording) {
        for (layer, _) in recording.layers() {
            let id = layer.lazy_layer().id();
            let Some(count) = self.recorded.get_mut(&id) else { continue };
            *count -= 1;
            if *count == 0 {
                self.recorded.remove(&id);
                layer.end_recording();
            }
        }
    }
}

impl Recording {
    /// The layers that are recorded.
    fn layers(&self) -> impl Iterator<Item = (&Layer, &Window)> {
        self.tree.layers.iter().zip(&self.windows).filter_map(|(layer, window)| Some((layer, window.as_ref()?)))
    }

    fn touch_count(&self) -> usize {
        self.layers().map(|(layer, _)| layer.touch_count()).sum()
    }
}

impl Progress {
    /// Looks at a recording that has so many touches.
    fn look(&mut self, count: usize, now: Instant) -> Step {
        if count > self.count {
            (self.count, self.last) = (count, Some(now));
            self.first.get_or_insert(now);
        }
        let is_over = |since: Option<Instant>, time| since.is_some_and(|since| now.duration_since(since) >= time);
        if is_over(self.first, RECORDING_TIME) {
            return Step::End;
        }
        if self.written == count || !is_over(self.last, QUIET_TIME) {
            return Step::Nothing;
        }
        self.written = count;
        Step::Write
    }
}

#[cfg(test)]
mod tests {
    use format_spec::Digest;

    use super::*;

    #[test]
    fn trees_of_an_earlier_process_share_their_layers_before_they_are_made_again() {
        let directory = tempfile::tempdir().unwrap();
        let starts = Starts::open(directory.path(), true).unwrap();
        let [tree, layer] = [b"tree_", b"layer"].map(|name| Digest::of(name));
        starts.note_restored([(tree, "host/app:1", vec![layer])]);
        let is_alone = |repository| lock(&starts.table).sharing.is_alone(layer, repository);
        assert!(is_alone("host/app") && !is_alone("elsewhere/app"));
        starts.released(tree);
        assert!(is_alone("elsewhere/app"));
    }

    #[test]
    fn a_start_is_written_when_it_pauses_and_ends_a_minute_after_its_first_read() {
        let begin = Instant::now();
        let mut progress = Progress::default();
        let mut look = |seconds: u64, count| progress.look(count, begin + Duration::from_secs(seconds));
        let steps = [
            (0, 0, Step::Nothing),
            (100, 0, Step::Nothing),
            (101, 7, Step::Nothing),
            (105, 7, Step::Nothing),
            (106, 7, Step::Write),
            (107, 7, Step::Nothing),
            (120, 9, Step::Nothing),
            (124, 10, Step::Nothing),
            (129, 10, Step::Write),
            (160, 10, Step::Nothing),
            (161, 10, Step::End),
        ];
        for (seconds, count, expected) in steps {
            assert_eq!(look(seconds, count), expected, "after {seconds} s");
        }
    }
}

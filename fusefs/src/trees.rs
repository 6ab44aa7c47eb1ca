//! Which trees there are: made, being made, or being changed; and which layers are going.
//!
//! One lock for the table, held for map operations only; one for each tree, held while the tree is changed on disk or
//! in the kernel. Whoever waits for one tree waits for nobody who is busy with another one.
//!
//! A tree is made by a task that all who want it wait for. When the last of them has gone, the task goes too, unless it
//! has begun to write.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use control::{RemoteLayer, TreeId};
use format_spec::LayerId;
use tokio::{
    sync::{Mutex as AsyncMutex, OwnedMutexGuard, watch},
    task::AbortHandle,
};

use crate::{error::Error, tree::Tree};

/// Requests that wait for one tree at most: as many as a node can start containers of one image at a time. A request
/// that hangs for one image leaves room for the others.
pub(crate) const WAITING_MAX: usize = 128;

/// How the making of a tree ended.
type Outcome = Result<Arc<Tree>, Arc<Error>>;

/// The table.
#[derive(Debug)]
pub(crate) struct Trees {
    table: Mutex<Table>,
    /// Sent when a layer has gone.
    gone: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Table {
    trees: HashMap<TreeId, Entry>,
    /// Layers that are being removed: no tree begins to use them.
    going: HashSet<LayerId>,
    next_attempt: u64,
}

#[derive(Debug)]
struct Entry {
    layers: Vec<LayerId>,
    /// The images that it was asked for by, each a place of all its layers.
    images: BTreeSet<String>,
    state: State,
    /// Held while the tree is changed on disk or in the kernel.
    change: Arc<AsyncMutex<()>>,
    /// Number of tasks that hold it or wait for it.
    change_count: usize,
}

#[derive(Debug)]
enum State {
    /// It is not there, or about to go.
    Absent,
    Making(Making),
    Made(Arc<Tree>),
}

#[derive(Debug)]
struct Making {
    attempt: u64,
    outcome: watch::Receiver<Option<Outcome>>,
    waiting_count: usize,
    /// `None` as long as the task is not known, and when it must not be ended any longer.
    task: Option<AbortHandle>,
    is_kept: bool,
}

/// The state of a tree that somebody wants.
#[derive(Debug)]
pub(crate) enum Wanted {
    /// All of it.
    Made(Arc<Tree>),
    /// Somebody is making it.
    Coming(Waiting),
    /// Nothing: this attempt is the caller's to make, in a task of its own.
    Absent(Attempt, Waiting),
}

/// The state that a release finds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Released {
    /// The tree is nobody's any longer, and these images are places of these layers no longer: no other tree is of both.
    ///
    /// An image that was pulled and never started loses its place with another tree of its name; it says it again when
    /// it is started.
    Free(Vec<(LayerId, String)>),
    /// Somebody wants it.
    Wanted,
}

impl Default for Trees {
    fn default() -> Self {
        Self { table: Mutex::default(), gone: watch::Sender::new(()) }
    }
}

impl Trees {
    fn table(&self) -> MutexGuard<'_, Table> {
        // It is changed by single inserts and removes: a panic elsewhere leaves it whole.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The present state of a tree; `layers` are its layers.
    ///
    /// # Errors
    ///
    /// [`Error::Crowded`] when too many wait for it.
    pub(crate) fn want(self: &Arc<Self>, id: TreeId, layers: &[RemoteLayer]) -> Result<Wanted, Error> {
        let mut table = self.table();
        let attempt = table.next_attempt;
        let entry = table.trees.entry(id).or_default();
        if !matches!(&entry.state, State::Making(making) if making.waiting_count >= WAITING_MAX) {
            entry.images.extend(layers.iter().map(|place| place.image.clone()));
        }
        let waiting = |attempt, outcome| Waiting { trees: self.clone(), id, attempt, outcome };
        match &mut entry.state {
            State::Made(tree) => Ok(Wanted::Made(tree.clone())),
            State::Making(making) if making.waiting_count >= WAITING_MAX => Err(Error::Crowded(id, WAITING_MAX)),
            State::Making(making) => {
                making.waiting_count += 1;
                Ok(Wanted::Coming(waiting(making.attempt, making.outcome.clone())))
            }
            State::Absent => {
                let (sender, outcome) = watch::channel(None);
                entry.layers = layers.iter().map(|remote| remote.layer.id()).collect();
                entry.state = State::Making(Making {
                    attempt,
                    outcome: outcome.clone(),
                    waiting_count: 1,
                    task: None,
                    is_kept: false,
                });
                table.next_attempt += 1;
                let mine = Attempt { trees: self.clone(), id, number: attempt, sender: Some(sender) };
                Ok(Wanted::Absent(mine, waiting(attempt, outcome)))
            }
        }
    }

    /// Runs under the table's lock if the attempt is still the one under way.
    fn with_attempt<T>(&self, id: TreeId, attempt: u64, change: impl FnOnce(&mut Making) -> T) -> Option<T> {
        match self.table().trees.get_mut(&id).map(|entry| &mut entry.state) {
            Some(State::Making(making)) if making.attempt == attempt => Some(change(making)),
            _ => None,
        }
    }

    /// The attempt ends; the tree is what it made, or nothing.
    fn end_attempt(&self, id: TreeId, attempt: u64, made: Option<Arc<Tree>>) {
        let mut table = self.table();
        let Some(entry) = table.trees.get_mut(&id) else { return };
        if !matches!(&entry.state, State::Making(making) if making.attempt == attempt) {
            return;
        }
        entry.state = made.map_or(State::Absent, State::Made);
        table.forget_unused(id);
    }

    /// Waits for the right to change a tree, known or not.
    pub(crate) async fn change(self: &Arc<Self>, id: TreeId) -> Change {
        let change = {
            let mut table = self.table();
            let entry = table.trees.entry(id).or_default();
            entry.change_count += 1;
            entry.change.clone()
        };
        let claim = Claim { trees: self.clone(), id };
        Change { _held: change.lock_owned().await, _claim: claim }
    }

    /// Waits until the attempt to make a tree that is under way has ended, if there is one; does not keep it going.
    pub(crate) async fn wait_for_attempt(&self, id: TreeId) {
        let outcome = match self.table().trees.get(&id).map(|entry| &entry.state) {
            Some(State::Making(making)) => Some(making.outcome.clone()),
            _ => None,
        };
        if let Some(mut outcome) = outcome {
            // However it ends.
            let _ = outcome.wait_for(Option::is_some).await;
        }
    }

    /// Whether this very tree is the one that is there.
    pub(crate) fn is_there(&self, tree: &Arc<Tree>) -> bool {
        let table = self.table();
        matches!(table.trees.get(&tree.id).map(|entry| &entry.state), Some(State::Made(made)) if Arc::ptr_eq(made, tree))
    }

    /// Nobody gets the tree any longer, unless it is just being made. To be called with its [`Change`].
    pub(crate) fn release(&self, id: TreeId) -> Released {
        let mut table = self.table();
        let Some(entry) = table.trees.get_mut(&id) else { return Released::Free(Vec::new()) };
        if matches!(entry.state, State::Making(_)) {
            return Released::Wanted;
        }
        entry.state = State::Absent;
        let (layers, images) = (std::mem::take(&mut entry.layers), std::mem::take(&mut entry.images));
        let is_kept = |layer: &LayerId, image: &String| {
            table.trees.values().any(|other| other.images.contains(image) && other.layers.contains(layer))
        };
        let places = images.iter().flat_map(|image| layers.iter().map(move |layer| (*layer, image.clone())));
        Released::Free(places.filter(|(layer, image)| !is_kept(layer, image)).collect())
    }

    /// Every tree that is made, sorted.
    pub(crate) fn made(&self) -> Vec<Arc<Tree>> {
        let table = self.table();
        let made = table.trees.values().filter_map(|entry| match &entry.state {
            State::Made(tree) => Some(tree.clone()),
            _ => None,
        });
        let mut made: Vec<_> = made.collect();
        made.sort_unstable_by_key(|tree| tree.id);
        made
    }

    /// Lets no tree begin to use a layer, for as long as what is returned lives; `None` if it is going already.
    ///
    /// # Errors
    ///
    /// [`Error::LayerInUse`] if a tree uses it or is about to.
    pub(crate) fn begin_removal(self: &Arc<Self>, layer: LayerId) -> Result<Option<Removal>, Error> {
        let mut table = self.table();
        let uses = |entry: &Entry| !matches!(entry.state, State::Absent) && entry.layers.contains(&layer);
        if let Some((tree, _)) = table.trees.iter().find(|(_, entry)| uses(entry)) {
            return Err(Error::LayerInUse { layer, tree: *tree });
        }
        let is_new = table.going.insert(layer);
        Ok(is_new.then(|| Removal { trees: self.clone(), layer }))
    }

    /// Waits until none of these layers is being removed.
    pub(crate) async fn wait_for_removals(&self, layers: impl Iterator<Item = LayerId> + Clone) {
        let mut gone = self.gone.subscribe();
        loop {
            if !layers.clone().any(|layer| self.table().going.contains(&layer)) {
                return;
            }
            // The sender lives in here.
            if gone.changed().await.is_err() {
                return;
            }
        }
    }
}

impl Default for Entry {
    fn default() -> Self {
        Self {
            layers: Vec::new(),
            images: BTreeSet::new(),
            state: State::Absent,
            change: Arc::default(),
            change_count: 0,
        }
    }
}

impl Table {
    fn forget_unused(&mut self, id: TreeId) {
        let is_unused = |entry: &Entry| matches!(entry.state, State::Absent) && entry.change_count == 0;
        if self.trees.get(&id).is_some_and(is_unused) {
            self.trees.remove(&id);
        }
    }
}

/// The right and the duty to make a tree. Dropped, the attempt has failed.
#[derive(Debug)]
pub(crate) struct Attempt {
    trees: Arc<Trees>,
    id: TreeId,
    number: u64,
    /// `None` when it has ended.
    sender: Option<watch::Sender<Option<Outcome>>>,
}

impl Attempt {
    /// Has `make` run the attempt in a task, which ends when nobody waits any longer.
    pub(crate) fn run(self, make: impl FnOnce(Self) -> tokio::task::JoinHandle<()>) {
        let (trees, id, number) = (self.trees.clone(), self.id, self.number);
        // Not under the lock: a runtime that is shutting down drops the task, and the attempt with it, at once.
        let task = make(self).abort_handle();
        // It may have got as far as to be kept already.
        trees.with_attempt(id, number, |making| making.task = (!making.is_kept).then_some(task));
    }

    /// From now on the attempt is ended by nobody.
    pub(crate) fn keep(&self) {
        self.trees.with_attempt(self.id, self.number, |making| (making.task, making.is_kept) = (None, true));
    }

    /// Ends the attempt and tells all who wait.
    pub(crate) fn end(mut self, outcome: Result<Arc<Tree>, Error>) {
        let outcome = outcome.map_err(Arc::new);
        // Whoever hears of it finds it so.
        self.trees.end_attempt(self.id, self.number, outcome.as_ref().ok().cloned());
        if let Some(sender) = self.sender.take() {
            sender.send_replace(Some(outcome));
        }
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if self.sender.is_some() {
            self.trees.end_attempt(self.id, self.number, None);
        }
    }
}

/// Somebody who waits for a tree. The last one who goes takes the attempt along.
#[derive(Debug)]
pub(crate) struct Waiting {
    trees: Arc<Trees>,
    id: TreeId,
    attempt: u64,
    outcome: watch::Receiver<Option<Outcome>>,
}

impl Waiting {
    /// How the attempt ends.
    ///
    /// # Errors
    ///
    /// Its own; [`Error::GivenUp`] if it was not made to the end.
    pub(crate) async fn outcome(mut self) -> Result<Arc<Tree>, Error> {
        let id = self.id;
        let outcome = self.outcome.wait_for(Option::is_some).await.ok().and_then(|outcome| outcome.clone());
        outcome.unwrap_or_else(|| Err(Arc::new(Error::GivenUp(id)))).map_err(Error::Shared)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let task = self.trees.with_attempt(self.id, self.attempt, |making| {
            making.waiting_count -= 1;
            if making.waiting_count == 0 { making.task.take() } else { None }
        });
        if let Some(task) = task.flatten() {
            task.abort();
            // The next one who wants the tree need not wait until the task has noticed.
            self.trees.end_attempt(self.id, self.attempt, None);
        }
    }
}

/// The right to change a tree on disk and in the kernel.
#[derive(Debug)]
pub(crate) struct Change {
    // Given back before the claim: the next one takes it over.
    _held: OwnedMutexGuard<()>,
    _claim: Claim,
}

#[derive(Debug)]
struct Claim {
    trees: Arc<Trees>,
    id: TreeId,
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut table = self.trees.table();
        if let Some(entry) = table.trees.get_mut(&self.id) {
            entry.change_count -= 1;
        }
        table.forget_unused(self.id);
    }
}

/// A layer that is being removed.
#[derive(Debug)]
pub(crate) struct Removal {
    trees: Arc<Trees>,
    layer: LayerId,
}

impl Drop for Removal {
    fn drop(&mut self) {
        self.trees.table().going.remove(&self.layer);
        self.trees.gone.send_replace(());
    }
}

#[cfg(test)]
mod tests {
    use format_spec::{Digest, IndexLocation, LazyLayer};
    use tokio::sync::oneshot;

    use super::*;

    fn layer(name: &[u8]) -> RemoteLayer {
        let digest = Digest::of(name);
        let index = IndexLocation { offset: 0, compressed_len: 1, plain_len: 2, digest };
        let layer = LazyLayer { blob: digest, blob_len: 1, index, hot_len: 0 };
        RemoteLayer { layer, image: "host/image:tag".to_owned() }
    }

    fn id_of(remote: &RemoteLayer) -> LayerId {
        remote.layer.id()
    }

    /// An attempt that goes on until `go_on` comes or it is aborted.
    fn begin(attempt: Attempt) -> (oneshot::Sender<Error>, oneshot::Receiver<()>) {
        let (go_on, goes_on) = oneshot::channel();
        let (alive, ended) = oneshot::channel::<()>();
        attempt.run(|attempt| {
            tokio::spawn(async move {
                let _alive = alive;
                if let Ok(error) = goes_on.await {
                    attempt.end(Err(error));
                }
            })
        });
        (go_on, ended)
    }

    #[tokio::test]
    async fn an_attempt_ends_with_the_last_who_waits_and_not_before() {
        let (trees, layers) = (Arc::new(Trees::default()), [layer(b"a")]);
        let id = id_of(&layers[0]);
        let Ok(Wanted::Absent(attempt, first)) = trees.want(id, &layers) else { panic!("nobody makes it") };
        let (go_on, mut ended) = begin(attempt);
        let Ok(Wanted::Coming(second)) = trees.want(id, &layers) else { panic!("somebody makes it") };
        drop(first);
        tokio::task::yield_now().await;
        assert!(ended.try_recv() == Err(oneshot::error::TryRecvError::Empty), "one waits still");
        drop(second);
        assert!(ended.await.is_err(), "the task is dropped");
        assert!(go_on.send(Error::GivenUp(id)).is_err());
        assert!(trees.table().trees.is_empty(), "nothing is left of it");
        assert!(matches!(trees.want(id, &layers), Ok(Wanted::Absent(..))));
    }

    #[tokio::test]
    async fn all_who_wait_hear_of_the_one_failure() {
        let (trees, layers) = (Arc::new(Trees::default()), [layer(b"a")]);
        let id = id_of(&layers[0]);
        let Ok(Wanted::Absent(attempt, first)) = trees.want(id, &layers) else { panic!("nobody makes it") };
        let (go_on, _ended) = begin(attempt);
        let mut waiting = vec![first];
        while waiting.len() < WAITING_MAX {
            let Ok(Wanted::Coming(more)) = trees.want(id, &layers) else { panic!("somebody makes it") };
            waiting.push(more);
        }
        assert!(matches!(trees.want(id, &layers), Err(Error::Crowded(..))));
        assert!(
            matches!(trees.want(Digest::of(b"other"), &[]), Ok(Wanted::Absent(..))),
            "for another one there is room"
        );
        go_on.send(Error::Crowded(id, WAITING_MAX)).unwrap();
        for waiting in waiting {
            let error = waiting.outcome().await.unwrap_err();
            assert!(matches!(error, Error::Shared(error) if matches!(*error, Error::Crowded(..))));
        }
        assert!(matches!(trees.want(id, &layers), Ok(Wanted::Absent(..))), "it can be tried again");
    }

    #[tokio::test]
    async fn an_attempt_that_writes_is_ended_by_nobody() {
        let (trees, layers) = (Arc::new(Trees::default()), [layer(b"a")]);
        let id = id_of(&layers[0]);
        let Ok(Wanted::Absent(attempt, waiting)) = trees.want(id, &layers) else { panic!("nobody makes it") };
        attempt.keep();
        let (go_on, mut ended) = begin(attempt);
        drop(waiting);
        tokio::task::yield_now().await;
        assert!(ended.try_recv() == Err(oneshot::error::TryRecvError::Empty));
        assert!(matches!(trees.want(id, &layers), Ok(Wanted::Coming(_))));
        go_on.send(Error::GivenUp(id)).unwrap();
        assert!(ended.await.is_err());
        assert!(trees.table().trees.is_empty());
    }

    #[tokio::test]
    async fn changes_of_one_tree_wait_for_each_other_and_those_of_two_do_not() {
        let trees = Arc::new(Trees::default());
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let held = trees.change(a).await;
        drop(trees.change(b).await);
        let mut second = Box::pin(trees.change(a));
        assert!(futures_util::FutureExt::now_or_never(&mut second).is_none());
        drop(held);
        drop(second.await);
        assert!(trees.table().trees.is_empty());
    }

    #[tokio::test]
    async fn a_layer_goes_only_where_no_tree_uses_it_and_none_begins_meanwhile() {
        let (trees, layers) = (Arc::new(Trees::default()), [layer(b"a"), layer(b"b")]);
        let removal = trees.begin_removal(id_of(&layers[0])).unwrap().unwrap();
        assert!(trees.begin_removal(id_of(&layers[0])).unwrap().is_none(), "it is going already");
        let ids = || layers.iter().map(id_of);
        let mut waiting = Box::pin(trees.wait_for_removals(ids()));
        assert!(futures_util::FutureExt::now_or_never(&mut waiting).is_none());
        drop(removal);
        waiting.await;
        let id = Digest::of(b"tree");
        let Ok(Wanted::Absent(attempt, _waiting)) = trees.want(id, &layers) else { panic!("nobody makes it") };
        assert!(matches!(trees.begin_removal(id_of(&layers[1])), Err(Error::LayerInUse { tree, .. }) if tree == id));
        drop(attempt);
        assert!(trees.begin_removal(id_of(&layers[1])).unwrap().is_some());
    }
}

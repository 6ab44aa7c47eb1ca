//! Trees of lazy layers: asked for by many, brought once, waited for as long as each caller likes.
//!
//! A container on lazy layers needs their tree, which may wait for a registry, and whoever starts the container gives
//! up and asks again. So bringing a tree is a task of its own, one for all who ask for it, and goes on without them.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    os::unix::fs::MetadataExt,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use control::{RemoteLayer, TreeId, tree_id};
use tokio::sync::{Semaphore, watch};
use tracing::debug;

use crate::fused::{Fused, FusedError};

/// Threads that may look at the session at the same time: where it does not answer, they stay.
const LOOKS_MAX: usize = 16;

/// A tree that can be mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tree {
    /// The directory that shows it.
    pub(crate) path: PathBuf,
    /// User and group of its root directory.
    pub(crate) owner: (u32, u32),
}

/// A tree cannot be had, or not yet.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TreeError {
    /// `lazuli-fused` failed.
    #[error(transparent)]
    Fused(#[from] Arc<FusedError>),
    /// Its root directory cannot be looked at.
    #[error("{0}: {1}")]
    Io(PathBuf, #[source] Arc<io::Error>),
    /// It is on its way still.
    #[error("its lazy layers are not there yet after {0:?}: they are waited for, ask again")]
    Pending(Duration),
    /// Whoever brought it is gone.
    #[error("the task that brought its lazy layers has ended, ask again")]
    Ended,
}

type Brought = Result<Tree, TreeError>;
type Waiting = watch::Receiver<Option<Brought>>;
/// The image too: its name says where layers come from.
type Name = (TreeId, String);

/// All trees that somebody waits for.
#[derive(Debug)]
pub(crate) struct Trees {
    fused: Arc<Fused>,
    under_way: Mutex<HashMap<Name, Waiting>>,
    /// Trees that `lazuli-fused` is told to forget: whoever wants one of them waits for the answer.
    releasing: watch::Sender<HashSet<TreeId>>,
    looks: Arc<Semaphore>,
}

/// A tree that is being forgotten, as long as this lives.
pub(crate) struct Releasing<'a>(&'a Trees, TreeId);

impl Drop for Releasing<'_> {
    fn drop(&mut self) {
        self.0.releasing.send_modify(|releasing| _ = releasing.remove(&self.1));
    }
}

impl Trees {
    pub(crate) fn new(fused: Arc<Fused>) -> Self {
        let looks = Arc::new(Semaphore::new(LOOKS_MAX));
        Self { fused, under_way: Mutex::default(), releasing: watch::Sender::default(), looks }
    }

    /// The tree of `layers`, lowest first, at least one; `others` are the same layers as further images name them.
    ///
    /// # Errors
    ///
    /// When it cannot be had, or not within that time; then it is brought all the same.
    pub(crate) async fn get(
        self: &Arc<Self>,
        layers: Vec<RemoteLayer>,
        others: Vec<Vec<RemoteLayer>>,
        within: Duration,
    ) -> Brought {
        let mut waiting = self.join(layers, others);
        let brought = tokio::time::timeout(within, waiting.wait_for(Option::is_some)).await;
        match brought {
            Err(_) => Err(TreeError::Pending(within)),
            Ok(Err(_)) => Err(TreeError::Ended),
            Ok(Ok(brought)) => brought.clone().unwrap_or(Err(TreeError::Ended)),
        }
    }

    fn join(self: &Arc<Self>, layers: Vec<RemoteLayer>, others: Vec<Vec<RemoteLayer>>) -> Waiting {
        let tree = tree_id(layers.iter().map(|layer| layer.layer.id())).expect("at least one layer");
        let name = (tree, layers.last().map(|top| top.image.clone()).unwrap_or_default());
        let mut under_way = self.under_way();
        // Without its sender the task is gone.
        if let Some(waiting) = under_way.get(&name).filter(|waiting| waiting.has_changed().is_ok()) {
            return waiting.clone();
        }
        let (sender, waiting) = watch::channel(None);
        under_way.insert(name.clone(), waiting.clone());
        let trees = Arc::clone(self);
        tokio::spawn(async move {
            let brought = trees.bring(tree, layers, others).await;
            trees.under_way().remove(&name);
            sender.send_replace(Some(brought));
        });
        waiting
    }

    async fn bring(&self, tree: TreeId, layers: Vec<RemoteLayer>, others: Vec<Vec<RemoteLayer>>) -> Brought {
        let mut releasing = self.releasing.subscribe();
        // It cannot fail: the sender is ours.
        drop(releasing.wait_for(|releasing| !releasing.contains(&tree)).await);
        let path = self.fused.mount_tree(layers).await.map_err(Arc::new)?;
        // containerd does not say of which of the images the container is.
        for layers in others {
            if let Err(error) = self.fused.mount_tree(layers).await {
                debug!(%tree, %error, "a further image of the layers is no place of them");
            }
        }
        let look = path.clone();
        let owner = self.looking(move || fs::metadata(&look).map(|root| (root.uid(), root.gid()))).await;
        match owner {
            Ok(owner) => Ok(Tree { path, owner }),
            Err(error) => Err(TreeError::Io(path, Arc::new(error))),
        }
    }

    /// Runs what may look at the session, in one of few threads for that.
    pub(crate) async fn looking<T: Send + 'static>(&self, look: impl FnOnce() -> T + Send + 'static) -> T {
        let permit = Arc::clone(&self.looks).acquire_owned().await.expect("never closed");
        let look = move || {
            let _permit = permit;
            look()
        };
        tokio::task::spawn_blocking(look).await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
    }

    /// Callers that want the tree wait from now on.
    pub(crate) fn releasing(&self, tree: TreeId) -> Releasing<'_> {
        self.releasing.send_modify(|releasing| _ = releasing.insert(tree));
        Releasing(self, tree)
    }

    fn under_way(&self) -> MutexGuard<'_, HashMap<Name, Waiting>> {
        // Changed by single inserts and removes: a panic elsewhere leaves it whole.
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

//! Keeping `lazuli-fused` there as long as a snapshot needs it.

use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tracing::{error, info, warn};

use crate::{fused::End, records::Kind, snapshotter::Snapshotter};

/// After a failed attempt to bring `lazuli-fused` back; each further pause is twice as long,
const RECOVERY_PAUSE: Duration = Duration::from_millis(10);
/// up to this.
const RECOVERY_PAUSE_MAX: Duration = Duration::from_secs(60);
/// A `lazuli-fused` that ends earlier after its start than this is brought back after this time, a later one at once.
const SHORT_LIFE: Duration = Duration::from_millis(100);
/// After a task of the daemon has ended, which it never should.
const RESTART_AFTER: Duration = Duration::from_secs(1);

impl Snapshotter {
    /// Starts what goes on beside the calls: watching `lazuli-fused`, and deleting what is unused. A task that ends, in
    /// whatever way, is started again.
    pub fn start_tasks(&self) {
        let (watching, directories, lazy) = (self.clone(), self.clone(), self.clone());
        for_ever("watching lazuli-fused", move || {
            let this = watching.clone();
            async move { this.watch_lazy_layers().await }
        });
        let truth = self.clone();
        for_ever("watching what is verified", move || {
            let this = truth.clone();
            async move { this.watch_truth().await }
        });
        for_ever("deleting directories", move || {
            let this = directories.clone();
            async move { this.free_directories().await }
        });
        for_ever("deleting lazy layers", move || {
            let this = lazy.clone();
            async move { this.free_lazy().await }
        });
    }

    /// Keeps the lazy layers available as long as a snapshot needs them: holds the session of `lazuli-fused`, brings
    /// it back at once when it ends, ends it when it hangs, and has the trees in use mounted again. Never returns.
    async fn watch_lazy_layers(&self) {
        let mut pause = RECOVERY_PAUSE;
        loop {
            self.wait_for_lazy_layer().await;
            match self.inner.fused.watch().await {
                Ok(mut watch) => {
                    pause = RECOVERY_PAUSE;
                    let since = Instant::now();
                    // Not waited for: the daemon may end meanwhile.
                    let recovering = tokio::spawn(self.clone().recover());
                    match watch.ended(self.inner.limits.hang).await {
                        // Whoever started it says how it ended, and may have wanted it.
                        End::Ended => info!("lazuli-fused has ended, it is started again"),
                        End::Hangs(within) => {
                            error!(?within, "lazuli-fused does not answer, it is ended and started again");
                            watch.kill();
                        }
                    }
                    recovering.abort();
                    if since.elapsed() < SHORT_LIFE {
                        tokio::time::sleep(SHORT_LIFE).await;
                    }
                }
                Err(error) => {
                    warn!(%error, "lazuli-fused cannot be started");
                    tokio::time::sleep(pause).await;
                    pause = RECOVERY_PAUSE_MAX.min(pause * 2);
                }
            }
        }
    }

    async fn wait_for_lazy_layer(&self) {
        loop {
            match self.list().await {
                Ok(snapshots) if snapshots.iter().all(|snapshot| snapshot.lazy.is_none()) => {}
                Ok(_) => return,
                Err(error) => warn!(%error, "snapshots cannot be read"),
            }
            self.inner.lazy_added.notified().await;
        }
    }

    async fn recover(self) {
        let snapshots = match self.list().await {
            Ok(snapshots) => snapshots,
            Err(error) => return warn!(%error, "snapshots cannot be read"),
        };
        // One that cannot be recovered keeps nobody else from it.
        let mut recovering = JoinSet::new();
        for snapshot in snapshots.into_iter().filter(|snapshot| snapshot.kind != Kind::Committed) {
            let this = self.clone();
            recovering.spawn(async move {
                if let Err(error) = this.mounts(snapshot.key.clone()).await {
                    warn!(snapshot = %snapshot.key, %error, "snapshot cannot be recovered");
                }
            });
        }
        while recovering.join_next().await.is_some() {}
        self.inner.work.search_lazy();
    }
}

/// Runs a task that never ends, and runs it again should it end all the same.
fn for_ever<F: Future<Output = ()> + Send + 'static>(what: &'static str, task: impl Fn() -> F + Send + 'static) {
    tokio::spawn(async move {
        loop {
            let ended = tokio::spawn(task()).await;
            error!(what, ?ended, "a task has ended, it is started again");
            tokio::time::sleep(RESTART_AFTER).await;
        }
    });
}

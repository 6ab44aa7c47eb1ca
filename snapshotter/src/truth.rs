//! Lazy layers and the truth: what `lazuli-fused` finds out about layers, and who has to wait for it.

use std::time::{Duration, Instant};

use control::{RemoteLayer, Verdict};
use tracing::{debug, error, info, warn};

use crate::{
    names::SnapshotKey,
    records::{LazySnapshot, Snapshot},
    service::now,
    snapshotter::{Error, Result, Snapshotter},
    trust::{Asker, Truth, Unverified, objections, truth_under},
};

/// How often a call that waits looks for a verdict.
const LOOK: Duration = Duration::from_millis(25);
/// How often verdicts are asked for that nobody waits for.
const WATCH: Duration = Duration::from_secs(2);
/// How long a change of chains may wait for further ones before it is noted.
const SETTLE: Duration = Duration::from_millis(200);

impl Snapshotter {
    /// Says once what is believed, and notes verdicts as they come, for containers and for people. Never returns.
    pub(crate) async fn watch_truth(&self) {
        let trust = &self.inner.trust;
        match trust.unverified {
            Unverified::Believe => {
                info!(
                    "lazy layers are believed before they are verified: trust in config.toml says whose, docs/TRUST.md why"
                )
            }
            Unverified::Wait => info!("containers wait for the verification of layers that trust does not name"),
        }
        loop {
            let believed = self.blocking(|inner| {
                let snapshots = inner.list()?.snapshots;
                inner.chains.show(&snapshots);
                Ok(snapshots.into_iter().filter(is_believed).collect::<Vec<_>>())
            });
            match believed.await {
                Ok(believed) if believed.is_empty() => {
                    self.inner.truth_changed.notified().await;
                    tokio::time::sleep(SETTLE).await;
                }
                Ok(believed) => {
                    if let Err(error) = self.note_verdicts(believed).await {
                        debug!(%error, "verdicts cannot be asked for");
                    }
                    tokio::time::sleep(WATCH).await;
                }
                Err(error) => {
                    warn!(%error, "snapshots cannot be read");
                    tokio::time::sleep(WATCH).await;
                }
            }
        }
    }

    /// Waits until `asker` may be shown the lazy layers among `parents`.
    ///
    /// # Errors
    ///
    /// [`Error::Untrue`] when one of them is not what its chain ID names, [`Error::Unverified`] when that is not known
    /// in time: it is found out at full speed meanwhile.
    pub(crate) async fn check_truth(&self, key: &SnapshotKey, asker: Asker<'_>, parents: &[Snapshot]) -> Result<()> {
        let trust = &self.inner.trust;
        check_not_refused(key, parents)?;
        let unseen: Vec<Snapshot> = objections(trust, asker, parents).into_iter().cloned().collect();
        let Some(first) = unseen.first() else { return Ok(()) };
        let chain = first.key.clone();
        unseen.iter().for_each(|waited_for| self.inner.chains.wait_for(&waited_for.key, now().seconds));
        let known = self.verify(unseen, trust.wait).await?;
        check_not_refused(key, &known)?;
        if objections(trust, asker, &known).is_empty() {
            return Ok(());
        }
        Err(Error::Unverified { snapshot: key.clone(), chain, wait: trust.wait })
    }

    /// Has lazy snapshots verified at full speed; they are returned as they are known after the wait at the latest.
    pub(crate) async fn verify(&self, mut snapshots: Vec<Snapshot>, wait: Duration) -> Result<Vec<Snapshot>> {
        let until = Instant::now() + wait;
        self.begin_to_verify(layers_of(&snapshots));
        loop {
            snapshots = match tokio::time::timeout_at(until.into(), self.note_verdicts(snapshots.clone())).await {
                Ok(Ok(known)) => known,
                Ok(Err(error)) => {
                    debug!(%error, "verdicts cannot be asked for");
                    snapshots
                }
                Err(_) => return Ok(snapshots),
            };
            if !snapshots.iter().any(is_believed) || Instant::now() + LOOK > until {
                return Ok(snapshots);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Does not wait.
    pub(crate) fn begin_to_verify(&self, layers: Vec<RemoteLayer>) {
        let fused = self.inner.fused.clone();
        tokio::spawn(async move {
            if let Err(error) = fused.verify(layers).await {
                warn!(%error, "layers are not verified");
            }
        });
    }

    /// Asks for verdicts and keeps what follows from them; returns the snapshots as they are known now.
    async fn note_verdicts(&self, mut snapshots: Vec<Snapshot>) -> Result<Vec<Snapshot>> {
        let layers = layers_of(&snapshots);
        let ids = layers.iter().map(|layer| layer.layer.id()).collect();
        let verdicts = self.inner.fused.verdicts(ids).await;
        let verdicts = verdicts.map_err(|error| match snapshots.first() {
            Some(first) => Error::Fused(first.key.clone(), error.into()),
            None => unreachable!("nobody asks about no layer"),
        })?;
        let lazy = snapshots.iter_mut().filter(|snapshot| snapshot.lazy.is_some());
        for (snapshot, verdict) in lazy.zip(verdicts) {
            let truth = match verdict {
                None => continue,
                Some(Verdict::Refused { reason }) => Truth::Refused { reason },
                Some(Verdict::Verified { tar }) => truth_under(&snapshot.key, snapshot.parent.as_ref(), &tar),
            };
            self.note_truth(snapshot, truth).await?;
        }
        Ok(snapshots)
    }

    async fn note_truth(&self, snapshot: &mut Snapshot, truth: Truth) -> Result<()> {
        let Some(lazy) = &mut snapshot.lazy else { return Ok(()) };
        if lazy.truth == truth || !matches!(lazy.truth, Truth::Believed) {
            return Ok(());
        }
        let (key, layer, image) = (snapshot.key.clone(), lazy.layer.layer.id(), lazy.layer.image.clone());
        match &truth {
            Truth::Refused { reason } => {
                error!(snapshot = %key, %layer, image, reason, "snapshot refused: it is not what its chain ID names; remove the image");
            }
            truth => debug!(snapshot = %key, %layer, image, %truth, "snapshot"),
        }
        lazy.truth = truth.clone();
        let since = now();
        lazy.truth_since = Some(since);
        self.blocking(move |inner| Ok(inner.metadata.set_truth(&key, layer, &truth, since)?)).await?;
        self.inner.truth_changed.notify_one();
        Ok(())
    }
}

fn is_believed(snapshot: &Snapshot) -> bool {
    snapshot.lazy.as_ref().is_some_and(|lazy| {
        // A name that is no chain ID stays believed for good.
        lazy.truth == Truth::Believed && snapshot.key.as_str().parse::<format_spec::Digest>().is_ok()
    })
}

fn layers_of(snapshots: &[Snapshot]) -> Vec<RemoteLayer> {
    snapshots.iter().filter_map(|snapshot| snapshot.lazy.as_ref()).map(|lazy| lazy.layer.clone()).collect()
}

fn check_not_refused(key: &SnapshotKey, parents: &[Snapshot]) -> Result<()> {
    for parent in parents {
        if let Some(LazySnapshot { truth: Truth::Refused { reason }, layer, .. }) = &parent.lazy {
            let (snapshot, chain, image) = (key.clone(), parent.key.clone(), layer.image.clone());
            return Err(Error::Untrue { snapshot, chain, image, reason: reason.clone() });
        }
    }
    Ok(())
}

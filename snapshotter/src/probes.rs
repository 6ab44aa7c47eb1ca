//! Can `lazuli-fused` read an image? Found out once an image, before its first layer is committed as lazy.
//!
//! containerd pulls with what a pod's secret or its own mirrors allow, `lazuli-fused` reads with what it was given
//! itself. An image that only containerd can read must be pulled completely.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use control::RemoteLayer;
use tokio::sync::watch;
use tracing::debug;

use crate::fused::{Fused, FusedError};

/// How long an image that could be read is taken for one that can: a pull asks for one layer after the other.
const VALID_FOR: Duration = Duration::from_secs(60);
/// How much longer than `lazuli-fused` may look at the registry its answer is waited for.
const ANSWER_LATER: Duration = Duration::from_millis(100);

type Outcome = Result<(), Arc<FusedError>>;

/// Knowledge about images.
#[derive(Debug)]
pub(crate) struct Probes {
    fused: Arc<Fused>,
    by_image: Mutex<HashMap<String, Probe>>,
}

#[derive(Debug, Clone)]
struct Probe {
    outcome: watch::Receiver<Option<Outcome>>,
    since: Instant,
}

impl Probe {
    /// Whether it answers who asks now: it is under way, or was good a moment ago.
    fn holds(&self) -> bool {
        match &*self.outcome.borrow() {
            None => self.outcome.has_changed().is_ok(),
            Some(outcome) => outcome.is_ok() && self.since.elapsed() < VALID_FOR,
        }
    }
}

impl Probes {
    pub(crate) fn new(fused: Arc<Fused>) -> Self {
        Self { fused, by_image: Mutex::default() }
    }

    /// Whether `lazuli-fused` can read the layer of this image, as far as is found out within that time; it gets to know
    /// the layer by that. Many who ask share one look; after it other layers of the image are not looked for.
    ///
    /// # Errors
    ///
    /// Why not.
    pub(crate) async fn can_read(self: &Arc<Self>, layer: &RemoteLayer, within: Duration) -> Outcome {
        let (mut outcome, is_ours) = self.join(layer, within);
        let answer = outcome.wait_for(Option::is_some).await;
        let answer = answer.ok().and_then(|answer| answer.clone());
        let answer = answer.unwrap_or_else(|| Err(Arc::new(FusedError::Timeout(within))));
        if answer.is_ok() && !is_ours {
            self.announce(layer.clone());
        }
        answer
    }

    /// The look at the image of this layer, and whether it is a look at this very layer.
    fn join(self: &Arc<Self>, layer: &RemoteLayer, within: Duration) -> (watch::Receiver<Option<Outcome>>, bool) {
        let mut by_image = self.by_image();
        by_image.retain(|_, probe| probe.holds());
        if let Some(probe) = by_image.get(&layer.image) {
            return (probe.outcome.clone(), false);
        }
        let (sender, outcome) = watch::channel(None);
        by_image.insert(layer.image.clone(), Probe { outcome: outcome.clone(), since: Instant::now() });
        let (probes, layer) = (Arc::clone(self), layer.clone());
        tokio::spawn(async move {
            let answer = tokio::time::timeout(within + ANSWER_LATER, probes.fused.probe_layer(layer, within)).await;
            let answer = answer.unwrap_or(Err(FusedError::Timeout(within)));
            sender.send_replace(Some(answer.map_err(Arc::new)));
        });
        (outcome, true)
    }

    /// Lets the index come before it is needed; nobody waits for that.
    pub(crate) fn announce(self: &Arc<Self>, layer: RemoteLayer) {
        let probes = Arc::clone(self);
        tokio::spawn(async move {
            if let Err(error) = probes.fused.announce_layer(layer.clone()).await {
                debug!(image = layer.image, blob = %layer.layer.blob, %error, "layer is not announced");
            }
        });
    }

    fn by_image(&self) -> MutexGuard<'_, HashMap<String, Probe>> {
        // Changed by single inserts and removes: a panic elsewhere leaves it whole.
        self.by_image.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

//! An upload that was begun and that somebody waits for. When nobody does any more, the registry is told to forget it:
//! some registries keep for ever what was sent of it.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use reqwest::Url;

use crate::{client::Client, push::UploadPlace, reference::Reference};

/// How often is looked whether uploads have ended.
const LOOK_PAUSE: Duration = Duration::from_millis(20);

/// Ends an upload when it is dropped, unless [`Self::settle`] was called before.
pub(crate) struct BegunUpload {
    client: Client,
    reference: Reference,
    /// Where it goes on.
    location: Mutex<Option<Url>>,
    /// Held as long as something may be sent for it.
    _under_way: Arc<()>,
}

impl BegunUpload {
    pub(crate) fn new(client: &Client, reference: &Reference) -> Self {
        let under_way = Arc::clone(client.uploads());
        Self { client: client.clone(), reference: reference.clone(), location: Mutex::default(), _under_way: under_way }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Url>> {
        self.location.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that an upload is under way, and where it goes on.
    pub(crate) fn goes_on_at(&self, location: &Url) {
        *self.lock() = Some(location.clone());
    }

    /// Leaves the upload alone: it is complete, or has failed and is the business of whoever asked for it.
    pub(crate) fn settle(&self) {
        *self.lock() = None;
    }
}

impl Drop for BegunUpload {
    fn drop(&mut self) {
        let Some(location) = self.lock().take() else { return };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (client, reference, under_way) =
            (self.client.clone(), self.reference.clone(), Arc::clone(self.client.uploads()));
        runtime.spawn(async move {
            if let Ok(endpoint) = client.push_endpoint(reference.host()).await {
                let what = format!("end of an upload to {}", reference.name());
                let place = UploadPlace { client: &client, reference: &reference, endpoint: &endpoint, what: &what };
                place.end(location).await;
            }
            drop(under_way);
        });
    }
}

impl fmt::Debug for BegunUpload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BegunUpload").field("location", &*self.lock()).finish_non_exhaustive()
    }
}

impl Client {
    /// Waits until no upload is under way, or `patience` is over. For who has given up on all of them: each is ended at
    /// its registry.
    pub async fn uploads_have_ended(&self, patience: Duration) {
        let ended = async {
            // One count is that of the client itself.
            while Arc::strong_count(self.uploads()) > 1 {
                tokio::time::sleep(LOOK_PAUSE).await;
            }
        };
        if tokio::time::timeout(patience, ended).await.is_err() {
            tracing::warn!("uploads that were begun may stay at the registry until it drops them");
        }
    }
}

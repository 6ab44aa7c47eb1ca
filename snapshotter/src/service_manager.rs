//! Messages to a service manager: that the daemon serves, and now and then that it still does (sd_notify(3)).

use std::time::Duration;

use sd_notify::NotifyState;
use snapshotter::snapshotter::Snapshotter;
use tokio::time::timeout;
use tracing::{error, warn};

/// Times that it is told within the time that it waits for: one may come late.
const TOLD_OFTEN: u32 = 3;

/// Tells that the socket is open, and from now on, where it asks for that, that calls are answered. Without a service
/// manager nothing happens.
pub(crate) fn tell_that_it_serves(snapshotter: &Snapshotter) {
    tell(&NotifyState::Ready);
    if let Some(within) = sd_notify::watchdog_enabled() {
        tokio::spawn(tell_that_it_answers(snapshotter.clone(), within));
    }
}

/// A daemon that answers nothing is silent, and so started again.
async fn tell_that_it_answers(snapshotter: Snapshotter, within: Duration) {
    loop {
        match timeout(within / TOLD_OFTEN, snapshotter.check()).await {
            Ok(Ok(())) => tell(&NotifyState::Watchdog),
            // It is opened again by the next call: that is no reason to start anew, which would fail.
            Ok(Err(error)) => {
                warn!(%error, "records cannot be read");
                tell(&NotifyState::Watchdog);
            }
            Err(_) => error!("calls are not answered"),
        }
        tokio::time::sleep(within / TOLD_OFTEN).await;
    }
}

fn tell(state: &NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(std::slice::from_ref(state)) {
        warn!(%error, "the service manager cannot be told");
    }
}

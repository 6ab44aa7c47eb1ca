//! Threads for what blocks, a few for each kind of work: one kind that hangs stops no other.
//!
//! A pool is a runtime of which only the blocking threads are used: it has no reactor and no descriptors, makes threads
//! when there is work, and lets them go when there is none.

use std::io;

use tokio::runtime::{Builder, Runtime};

/// Merging trees and writing their images: bounds memory and processors for what may take seconds.
const MERGING_THREADS: usize = 4;
/// Mounting and unmounting: mostly the kernel's work, which waits for the disk now and then.
const MOUNTING_THREADS: usize = 8;
/// Looking at what is there: opening trees that were made, listing, usage.
const LOOKING_THREADS: usize = 8;
/// Telling the kernel what has changed, for which it may have to wait for a lookup.
const TELLING_THREADS: usize = 2;

/// The pools of a service.
#[derive(Debug)]
pub(crate) struct Pools {
    pub(crate) merging: Pool,
    pub(crate) mounting: Pool,
    pub(crate) looking: Pool,
    pub(crate) telling: Pool,
}

impl Pools {
    /// Pools without threads yet.
    ///
    /// # Errors
    ///
    /// When the system refuses.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            merging: Pool::new("lazuli-merging", MERGING_THREADS)?,
            mounting: Pool::new("lazuli-mounting", MOUNTING_THREADS)?,
            looking: Pool::new("lazuli-looking", LOOKING_THREADS)?,
            telling: Pool::new("lazuli-telling", TELLING_THREADS)?,
        })
    }
}

/// Some threads.
#[derive(Debug)]
pub(crate) struct Pool {
    /// `None` while it is dropped.
    runtime: Option<Runtime>,
}

impl Pool {
    /// A pool of at most so many threads.
    ///
    /// # Errors
    ///
    /// When the system refuses.
    pub(crate) fn new(name: &str, threads_max: usize) -> io::Result<Self> {
        let mut builder = Builder::new_current_thread();
        let runtime = builder.thread_name(name).max_blocking_threads(threads_max).build()?;
        Ok(Self { runtime: Some(runtime) })
    }

    /// Runs `work`, which may block. It is begun and ended even if nobody waits for it any longer.
    pub(crate) async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let runtime = self.runtime.as_ref().expect("there until it is dropped");
        let done = runtime.spawn_blocking(work).await;
        done.unwrap_or_else(|error| match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(error) => panic!("work ends before its pool: {error}"),
        })
    }

    /// Runs `work`, which may block, some time.
    pub(crate) fn begin(&self, work: impl FnOnce() + Send + 'static) {
        let runtime = self.runtime.as_ref().expect("there until it is dropped");
        drop(runtime.spawn_blocking(work));
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // Waiting is not allowed everywhere, and what hangs may hang for ever.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn work_that_hangs_holds_up_its_own_kind_only() {
        let pools = Pools::new().unwrap();
        let (release, released) = mpsc::channel::<()>();
        let released = std::sync::Arc::new(std::sync::Mutex::new(released));
        for _ in 0..100 {
            let released = released.clone();
            pools.mounting.begin(move || _ = released.lock().unwrap().recv());
            let released = pools.merging.run(|| 1).await;
            assert_eq!(released, 1);
        }
        assert_eq!(pools.looking.run(|| 2).await, 2);
        drop(release);
        assert_eq!(pools.mounting.run(|| 3).await, 3);
    }
}

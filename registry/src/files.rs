//! A thread for the small files of the configuration: `config.json`, `hosts.toml`, certificates.
//!
//! They may lie on a file system that hangs. Then credentials and mirrors are not found; but nothing else waits, as
//! it would if these reads shared the runtime's threads for what may block.

use std::{
    sync::{
        Mutex, PoisonError,
        mpsc::{SyncSender, TrySendError, sync_channel},
    },
    thread,
    time::Duration,
};

use tokio::sync::oneshot;

/// Longest wait for a few kilobytes of a disk.
const READ_TIMEOUT: Duration = Duration::from_secs(10);
/// Reads that wait at most: one a registry is normal, more of them than a node has images is a disk that hangs.
const JOBS_MAX: usize = 1024;

type Job = Box<dyn FnOnce() + Send>;

/// The thread, begun on first use; ends with the value, or when its file system answers again.
pub(crate) struct FileThread {
    jobs: Mutex<Option<SyncSender<Job>>>,
    timeout: Duration,
}

impl Default for FileThread {
    fn default() -> Self {
        Self { jobs: Mutex::default(), timeout: READ_TIMEOUT }
    }
}

impl FileThread {
    /// Runs `read` on the thread.
    ///
    /// # Errors
    ///
    /// One line, when there is no thread, or no answer in time.
    pub(crate) async fn run<T: Send + 'static>(&self, read: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
        let (sender, receiver) = oneshot::channel();
        let job: Job = Box::new(move || {
            // A caller that has given up needs no answer.
            if !sender.is_closed() {
                let _ = sender.send(read());
            }
        });
        let hangs = || format!("the file system did not answer in {} s", self.timeout.as_secs());
        match self.jobs()?.try_send(job) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => return Err(hangs()),
            Err(TrySendError::Disconnected(_)) => return Err("the thread that reads files has ended".to_owned()),
        }
        match tokio::time::timeout(self.timeout, receiver).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(_)) => Err("the thread that reads files has ended".to_owned()),
            Err(_) => Err(hangs()),
        }
    }

    fn jobs(&self) -> Result<SyncSender<Job>, String> {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(jobs) = &*jobs {
            return Ok(jobs.clone());
        }
        let (sender, receiver) = sync_channel::<Job>(JOBS_MAX);
        let run = move || receiver.iter().for_each(|job| job());
        let thread = thread::Builder::new().name("registry-files".to_owned()).spawn(run);
        thread.map_err(|error| format!("no thread to read files: {error}"))?;
        Ok(jobs.insert(sender).clone())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[tokio::test]
    async fn a_file_system_that_hangs_is_given_up_and_comes_back() {
        let thread = FileThread { timeout: Duration::from_secs(1), ..FileThread::default() };
        let (release, hanging) = channel::<()>();
        let hung = thread.run(move || hanging.recv()).await;
        assert_eq!(hung.unwrap_err(), "the file system did not answer in 1 s");
        let behind = thread.run(|| 7).await;
        assert_eq!(behind.unwrap_err(), "the file system did not answer in 1 s");
        release.send(()).unwrap();
        assert_eq!(thread.run(|| 8).await, Ok(8));
    }
}

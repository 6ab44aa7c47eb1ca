//! A source that does not answer costs those who read from it, and nobody else.

use std::{
    fs::File,
    io::Read as _,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, mpsc},
    time::Duration,
};

use control::{Mode, RemoteLayer, Request, Response};

use crate::support::{
    daemon::{Connection, Running, options},
    *,
};
use fusefs::factory::on_runtime;
use storage::{FetchFuture, FetchWideFuture, Source, SourceError, WideStream};
use tokio::runtime::{Builder, Runtime};

/// Sequential readers of a source that hangs: with 256 requests for all of them, 40 were enough.
const READERS: usize = 300;
/// Long enough to be read ahead.
const FILE_LEN: usize = 256 << 10;
/// How long a read of what is there may take on a busy machine.
const SOON: Duration = Duration::from_secs(15);

fn files(names: impl Iterator<Item = usize>) -> Layer {
    names
        .map(|number| (format!("file{number}"), file(vec![b"abcdefghijklmnopqrstuvwxyz"[number % 26]; FILE_LEN])))
        .collect()
}

/// Lets the registry answer again, so that no reader outlives a test that fails.
struct Held<'a>(&'a Registry);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.set_held(false);
    }
}

/// Reads in a thread of its own, since a read that hangs cannot be ended.
fn read_soon(path: PathBuf) -> Vec<u8> {
    let (sender, content) = mpsc::channel();
    std::thread::spawn(move || sender.send(std::fs::read(path)));
    content.recv_timeout(SOON).expect("the read hangs").unwrap()
}

fn mount(daemon: &Running, registry: &Registry, layer: &Layer) -> (Vec<RemoteLayer>, PathBuf) {
    let layers = vec![registry.push(layer)];
    let path = daemon.mount(&layers);
    (layers, path)
}

fn wait_until_still(registry: &Registry) {
    let mut before = 0;
    while before != registry.requests() || before == 0 {
        before = registry.requests();
        std::thread::sleep(Duration::from_millis(500));
    }
}

fn readers_of_a_source_that_hangs_do_not_stop_those_of_what_is_there(mode: Mode) {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let daemon = Running::start_in(mode, root.path(), &registry);
    let (healthy_layers, healthy) = mount(&daemon, &registry, &files(0..2));
    // Mounted before it is complete, and so read through the session for as long as it is mounted.
    daemon.complete(&healthy_layers);
    let (_, dead) = mount(&daemon, &registry, &files(0..READERS));
    registry.set_held(true);
    std::thread::scope(|scope| {
        let held = Held(&registry);
        let read = |path: &Path| {
            let mut content = Vec::new();
            File::open(path).unwrap().read_to_end(&mut content).unwrap();
            content.len()
        };
        let readers: Vec<_> = (0..READERS)
            .map(|number| {
                let path = dead.join(format!("file{number}"));
                scope.spawn(move || read(&path))
            })
            .collect();
        wait_until_still(&registry);
        for number in 0..2 {
            assert_eq!(read_soon(healthy.join(format!("file{number}"))), vec![b'a' + number; FILE_LEN]);
        }
        assert!(readers.iter().all(|reader| !reader.is_finished()), "they wait still");
        drop(held);
        for reader in readers {
            assert_eq!(reader.join().unwrap(), FILE_LEN);
        }
    });
}

#[test]
fn readers_of_a_source_that_hangs_do_not_stop_those_of_what_is_there_in_portable_mode() {
    readers_of_a_source_that_hangs_do_not_stop_those_of_what_is_there(Mode::Fuse);
}

#[test]
fn readers_of_a_source_that_hangs_do_not_stop_those_of_what_is_there_in_kernel_mode() {
    readers_of_a_source_that_hangs_do_not_stop_those_of_what_is_there(Mode::Erofs);
}

/// A source that needs a thread which may block, as a resolver of names does, and does not get done with it.
#[derive(Default)]
struct Hanging {
    is_released: Mutex<bool>,
    released: Condvar,
}

impl Hanging {
    fn release(&self) {
        *self.is_released.lock().unwrap() = true;
        self.released.notify_all();
    }
}

struct HangingSource(Arc<Hanging>);

impl Source for HangingSource {
    fn origin(&self) -> Option<String> {
        None
    }

    fn fetch(&self, _: Range<u64>) -> FetchFuture<'_> {
        let hanging = self.0.clone();
        Box::pin(async move {
            let hang = move || {
                let released = hanging.is_released.lock().unwrap();
                drop(hanging.released.wait_while(released, |is_released| !*is_released).unwrap());
            };
            tokio::task::spawn_blocking(hang).await.unwrap();
            Err(SourceError::refused("it hung"))
        })
    }

    fn fetch_wide(&self, range: Range<u64>) -> FetchWideFuture<'_> {
        WideStream::exact(range.clone(), self.fetch(range))
    }
}

fn runtime_of_few_threads() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).max_blocking_threads(4).enable_all().build().unwrap()
}

/// Both ends of a credential helper or a resolver that hangs: reads of others go on, and what hung ends.
#[test]
fn sources_that_keep_threads_keep_none_that_others_need() {
    const HANGING: &str = "hanging.example.com/image:tag";
    let (root, registry, hanging) = (tempfile::tempdir().unwrap(), Registry::default(), Arc::new(Hanging::default()));
    let network = runtime_of_few_threads();
    let (healthy, hangs, handle) = (registry.sources(), hanging.clone(), network.handle().clone());
    let sources = move |layer: &RemoteLayer| -> Result<Arc<dyn Source>, SourceError> {
        if layer.image == HANGING {
            return Ok(on_runtime(Arc::new(HangingSource(hangs.clone())), handle.clone()));
        }
        healthy.source(layer)
    };
    let daemon = Running::start_on(runtime_of_few_threads(), options(root.path()), Arc::new(sources));
    let mut waiting: Vec<_> = (0..20)
        .map(|number| {
            let layer = RemoteLayer { image: HANGING.to_owned(), ..registry.push(&files(number..number + 1)) };
            let mut connection = Connection::open(&daemon.address);
            connection.send(&Request::MountTree { layers: vec![layer] });
            connection
        })
        .collect();
    let (_, path) = mount(&daemon, &registry, &files(100..102));
    assert_eq!(read_soon(path.join("file100")), vec![b'a' + 22; FILE_LEN]);
    assert!(matches!(daemon.ask(&Request::Status), Response::Status { .. }));
    assert!(waiting.iter_mut().all(|connection| connection.answer_if_there().is_none()), "they hang still");
    hanging.release();
    drop(waiting);
    drop(daemon);
    network.shutdown_background();
}

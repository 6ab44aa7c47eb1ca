//! A daemon in the process of the test, asked through its socket.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use control::{Mode, RemoteLayer, Request, Response};
use format_spec::Digest;
use fusefs::{Daemon, DaemonOptions, Ended, Error, SessionOptions, SourceFactory};
use storage::CacheOptions;
use tokio::{runtime::Runtime, sync::mpsc, task::JoinHandle};

use super::{Registry, is_mounted};

/// A daemon that runs as long as this lives.
pub struct Running {
    runtime: Runtime,
    pub address: PathBuf,
    pub root: PathBuf,
    stop: Option<mpsc::Sender<()>>,
    ended: Option<JoinHandle<Result<Ended, Error>>>,
}

impl Running {
    /// In portable mode.
    pub fn start(root: &Path, registry: &Registry) -> Self {
        Self::start_in(Mode::Fuse, root, registry)
    }

    pub fn start_in(mode: Mode, root: &Path, registry: &Registry) -> Self {
        Self::start_with(DaemonOptions { mode, ..options(root) }, registry)
    }

    pub fn start_with(options: DaemonOptions, registry: &Registry) -> Self {
        Self::start_on(Runtime::new().unwrap(), options, registry.sources())
    }

    pub fn start_on(runtime: Runtime, options: DaemonOptions, sources: Arc<dyn SourceFactory>) -> Self {
        let (root, address) = (options.root.clone(), options.address.clone());
        let daemon = runtime.block_on(Daemon::start(options, sources)).unwrap();
        let (stop, stopped) = mpsc::channel(1);
        let ended = runtime.spawn(daemon.run(stopped));
        Self { runtime, address, root, stop: Some(stop), ended: Some(ended) }
    }

    /// As a signal does.
    pub fn tell_to_end(&self) {
        self.stop.as_ref().unwrap().blocking_send(()).unwrap();
    }

    /// Whether it ends within a time that a busy machine may need.
    pub fn ends(&self) -> bool {
        let give_up_at = Instant::now() + Duration::from_secs(30);
        while !self.ended.as_ref().unwrap().is_finished() {
            if Instant::now() > give_up_at {
                return false;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        true
    }

    pub fn ask(&self, request: &Request) -> Response {
        Connection::open(&self.address).ask(request)
    }

    pub fn mount(&self, layers: &[RemoteLayer]) -> PathBuf {
        match self.ask(&Request::MountTree { layers: layers.to_vec() }) {
            Response::Tree { path } => path,
            other => panic!("{other:?}"),
        }
    }

    /// Has every layer arrive completely.
    pub fn complete(&self, layers: &[RemoteLayer]) {
        for layer in layers {
            fs::read(self.root.join("mnt/layers").join(layer.layer.id().hex())).unwrap();
        }
    }

    pub fn trees(&self) -> Vec<Digest> {
        match self.ask(&Request::Status) {
            Response::Status { trees, .. } => trees.into_iter().map(|tree| tree.tree).collect(),
            other => panic!("{other:?}"),
        }
    }

    pub fn usage(&self, layer: Digest) -> u64 {
        match self.ask(&Request::LayerUsage { layer }) {
            Response::Usage { bytes } => bytes,
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.stop.take());
        self.runtime.block_on(self.ended.take().unwrap()).unwrap().unwrap();
        assert!(!is_mounted(&self.root.join("mnt")));
        assert!(!self.address.exists());
    }
}

/// Below `root`, in portable mode.
pub fn options(root: &Path) -> DaemonOptions {
    DaemonOptions {
        root: root.join("root"),
        address: root.join("fused.sock"),
        session: SessionOptions::default(),
        mode: Mode::Fuse,
        take_over: None,
        records_starts: true,
        // A failure comes at once.
        cache: CacheOptions { patience: None, ..CacheOptions::default() },
    }
}

pub struct Connection {
    reader: BufReader<UnixStream>,
}

/// How long an answer may take that waits for nobody, on a busy machine.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);

impl Connection {
    pub fn open(address: &Path) -> Self {
        let stream = UnixStream::connect(address).unwrap();
        stream.set_read_timeout(Some(ANSWER_WITHIN)).unwrap();
        Self { reader: BufReader::new(stream) }
    }

    /// Asks and waits for no answer.
    pub fn send(&mut self, request: &Request) {
        let line = serde_json::to_string(request).unwrap();
        self.reader.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// The answer to what was sent, if it is there.
    pub fn answer_if_there(&mut self) -> Option<Response> {
        self.reader.get_mut().set_nonblocking(true).unwrap();
        let mut answer = String::new();
        let is_there = self.reader.read_line(&mut answer).is_ok();
        self.reader.get_mut().set_nonblocking(false).unwrap();
        is_there.then(|| serde_json::from_str(&answer).unwrap())
    }

    pub fn ask(&mut self, request: &Request) -> Response {
        self.ask_raw(&serde_json::to_string(request).unwrap())
    }

    pub fn ask_raw(&mut self, line: &str) -> Response {
        self.reader.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
        let mut answer = String::new();
        self.reader.read_line(&mut answer).expect("an answer in time");
        serde_json::from_str(&answer).unwrap()
    }
}

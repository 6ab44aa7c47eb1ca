//! The daemon with the registry client as `lazuli-fused` has it, and registries on loopback that can be looked into.

use std::{
    collections::HashMap,
    fs,
    io::{self, BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    path::PathBuf,
    sync::{Arc, Condvar, Mutex},
    time::{Duration, Instant},
};

use control::RemoteLayer;

use crate::support::{
    daemon::{Running, options},
    *,
};
use format_spec::{Digest, LazyLayer};
use fusefs::factory::on_runtime;
use registry::{BlobSource, Client, ClientOptions, Reference};
use storage::{Source, SourceError};
use tokio::runtime::Runtime;

/// How long everything may take on a busy machine.
const SOON: Duration = Duration::from_secs(30);

/// A registry that serves blobs and nothing else.
#[derive(Default)]
struct HttpRegistry {
    blobs: HashMap<Digest, Vec<u8>>,
    /// Answers every request with all of the blob.
    ignores_ranges: bool,
    state: Mutex<HttpState>,
    released: Condvar,
}

#[derive(Default)]
struct HttpState {
    requests: usize,
    sent: u64,
    /// Requests for blobs that wait for their answer.
    held: usize,
    is_held: bool,
}

impl HttpRegistry {
    fn start(self) -> (Arc<Self>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let image = format!("{}/some/image:tag", listener.local_addr().unwrap());
        let registry = Arc::new(self);
        let serving = registry.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let registry = serving.clone();
                // A client that goes away ends its connection and nothing else.
                std::thread::spawn(move || drop(registry.serve(client)));
            }
        });
        (registry, image)
    }

    fn serve(&self, mut client: TcpStream) -> io::Result<()> {
        let mut lines = BufReader::new(client.try_clone()?).lines();
        while let Some(first) = lines.next().transpose()? {
            let mut range = None;
            for line in lines.by_ref() {
                let line = line?.to_ascii_lowercase();
                range = line.strip_prefix("range: bytes=").map(str::to_owned).or(range);
                if line.is_empty() {
                    break;
                }
            }
            let name = first.split(' ').nth(1).and_then(|path| path.rsplit_once("/blobs/")).map(|(_, name)| name);
            let blob = name.and_then(|name| self.blobs.get(&name.parse::<Digest>().ok()?));
            let Some(blob) = blob else {
                let status = if first.contains("/blobs/") { "404 Not Found" } else { "200 OK" };
                client.write_all(format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n").as_bytes())?;
                continue;
            };
            let (head, body) = match range.filter(|_| !self.ignores_ranges) {
                None => ("200 OK".to_owned(), &blob[..]),
                Some(range) => {
                    let (start, last) = range.split_once('-').unwrap();
                    let (start, last): (usize, usize) = (start.parse().unwrap(), last.parse().unwrap());
                    let head = format!("206 Partial\r\nContent-Range: bytes {start}-{last}/{}", blob.len());
                    (head, &blob[start..=last])
                }
            };
            self.wait_for_release(body.len());
            client.write_all(format!("HTTP/1.1 {head}\r\nContent-Length: {}\r\n\r\n", body.len()).as_bytes())?;
            client.write_all(body)?;
        }
        Ok(())
    }

    fn wait_for_release(&self, body_len: usize) {
        let mut state = self.state.lock().unwrap();
        state.requests += 1;
        state.sent += body_len as u64;
        state.held += 1;
        state = self.released.wait_while(state, |state| state.is_held).unwrap();
        state.held -= 1;
    }

    fn set_held(&self, is_held: bool) {
        self.state.lock().unwrap().is_held = is_held;
        self.released.notify_all();
    }

    fn look<T>(&self, look: impl FnOnce(&HttpState) -> T) -> T {
        look(&self.state.lock().unwrap())
    }
}

/// A layer with so many files, and its blob.
fn layer_of_files(number: u64, count: u64) -> (LazyLayer, Vec<u8>) {
    let files = (0..count).map(|index| (format!("l{number}f{index}"), file(noise(number * 1000 + index + 1, 60_000))));
    let blob = build(&files.collect());
    (blob.layer, blob.bytes)
}

/// A daemon that fetches as `lazuli-fused` does.
fn daemon(root: &std::path::Path, network: &Runtime) -> Running {
    let (client, network) = (Client::new(ClientOptions::default()), network.handle().clone());
    let sources = move |remote: &RemoteLayer| -> Result<Arc<dyn Source>, SourceError> {
        let reference: Reference = remote.image.parse().map_err(|error| SourceError::refused(format!("{error}")))?;
        let source = BlobSource::new(client.clone(), reference, remote.layer.blob, remote.layer.blob_len);
        Ok(on_runtime(Arc::new(source), network.clone()))
    };
    Running::start_on(Runtime::new().unwrap(), options(root), Arc::new(sources))
}

/// The daemon's wrapper of sources did not say that the registry has no ranges: each read had the blob sent again.
#[test]
fn a_registry_without_ranges_was_sent_one_request_for_each_read_of_the_daemon() {
    let (layer, blob) = layer_of_files(0, 40);
    let (blob_len, blobs) = (layer.blob_len, HashMap::from([(layer.blob, blob)]));
    let (registry, image) = HttpRegistry { blobs, ignores_ranges: true, ..HttpRegistry::default() }.start();
    let (root, network) = (tempfile::tempdir().unwrap(), Runtime::new().unwrap());
    let daemon = daemon(root.path(), &network);
    let path = daemon.mount(&[RemoteLayer { layer, image }]);
    for index in [39, 30, 20, 10, 0, 5, 15, 25, 35] {
        assert_eq!(fs::read(path.join(format!("l0f{index}"))).unwrap(), noise(index + 1, 60_000));
    }
    // Once for the index, and once for the content.
    assert_eq!(registry.look(|state| (state.requests, state.sent)), (2, 2 * blob_len));
}

/// The same wrapper did not say whose the source is: each layer counted as a registry of its own.
#[test]
fn one_registry_of_many_layers_had_more_requests_at_a_time_than_a_registry_may_have() {
    const LAYERS: u64 = 40;
    let (layers, blobs): (Vec<_>, Vec<_>) = (0..LAYERS).map(|number| layer_of_files(number, 1)).unzip();
    let blobs = layers.iter().map(|layer| layer.blob).zip(blobs).collect();
    let (registry, image) = HttpRegistry { blobs, ..HttpRegistry::default() }.start();
    let (root, network) = (tempfile::tempdir().unwrap(), Runtime::new().unwrap());
    let daemon = daemon(root.path(), &network);
    let layers: Vec<_> = layers.into_iter().map(|layer| RemoteLayer { layer, image: image.clone() }).collect();
    let path = daemon.mount(&layers);
    registry.set_held(true);
    let files: Vec<PathBuf> = (0..LAYERS).map(|number| path.join(format!("l{number}f0"))).collect();
    std::thread::scope(|scope| {
        let readers: Vec<_> = files.iter().map(|file| scope.spawn(move || fs::read(file).unwrap().len())).collect();
        let (give_up_at, mut still_since, mut held) = (Instant::now() + SOON, Instant::now(), 0);
        while Instant::now() < give_up_at && (held < 16 || still_since.elapsed() < Duration::from_secs(1)) {
            let now = registry.look(|state| state.held);
            if now != held {
                (held, still_since) = (now, Instant::now());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        registry.set_held(false);
        assert!(readers.into_iter().all(|reader| reader.join().unwrap() == 60_000));
        assert_eq!(held, 16, "those of one registry");
    });
}

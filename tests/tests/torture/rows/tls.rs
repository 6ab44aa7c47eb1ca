//! TLS that fails for a while: a certificate that is being replaced, a proxy that ends connections.

use std::{
    fs, io,
    net::{Shutdown, TcpListener, TcpStream},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use lazuli_tests::{
    Result, Service, SnapshotterOptions, TarLayer, TestRegistry,
    error::Context as _,
    process::{command, run},
    registry_server::free_address,
};

use crate::{
    bench::{Bench, logged},
    images::{SINGLE_LEN, single_content, write_lazy},
};

const BLIP: Duration = Duration::from_secs(3);
const WITHIN: Duration = Duration::from_secs(43);

/// Passes connections on to an address that can be changed; without one it ends them.
struct Relay {
    address: String,
    state: Arc<Mutex<RelayState>>,
}

#[derive(Default)]
struct RelayState {
    target: Option<String>,
    /// A side of each connection that was passed on.
    open: Vec<TcpStream>,
}

impl Relay {
    fn to(target: &str) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").context("opening a port")?;
        let address = listener.local_addr().context("opening a port")?.to_string();
        let state = Arc::new(Mutex::new(RelayState { target: Some(target.to_owned()), open: Vec::new() }));
        let current = Arc::clone(&state);
        // Ends with the process.
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let mut state = current.lock().unwrap_or_else(PoisonError::into_inner);
                let server = state.target.as_ref().and_then(|target| TcpStream::connect(target).ok());
                if let Some(server) = server {
                    state.open.extend(client.try_clone());
                    relay(client, server);
                }
            }
        });
        Ok(Self { address, state })
    }

    /// From now on connections go there; those that are open end, as with a server that is restarted.
    fn set(&self, target: Option<&str>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.target = target.map(str::to_owned);
        for connection in state.open.drain(..) {
            // It may have ended by itself.
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

fn relay(client: TcpStream, server: TcpStream) {
    let clones = (client.try_clone(), server.try_clone());
    let (Ok(client_again), Ok(server_again)) = clones else { return };
    for (mut from, mut to) in [(client, server), (server_again, client_again)] {
        thread::spawn(move || {
            // A side that goes away ends the connection.
            let _ = io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Both);
        });
    }
}

/// A certificate for loopback that nobody has signed, and its key.
fn certificate(directory: &Path, name: &str) -> Result<()> {
    let words = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"];
    let mut request = command("openssl", words);
    request.args(["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"]);
    request.arg("-keyout").arg(directory.join(format!("{name}.key")));
    run(request.arg("-out").arg(directory.join(format!("{name}.crt")))).map(drop)
}

pub(crate) fn tls(bench: &Bench) -> Result<()> {
    let directory = bench.scratch.directory("tls")?;
    certificate(&directory, "right")?;
    certificate(&directory, "other")?;
    let at = |name: &str| directory.join(name);
    let registry = TestRegistry::start_with_certificate(&bench.scratch, &at("right.crt"), &at("right.key"))?;
    let other = free_address()?;
    let mut server = command("openssl", ["s_server", "-quiet", "-accept", &other, "-www"]);
    server.arg("-cert").arg(at("other.crt")).arg("-key").arg(at("other.key"));
    let log = bench.scratch.log("s_server");
    let _server = Service::start("openssl s_server", &mut server, &log, || TcpStream::connect(&other).is_ok())?;
    let relay = Relay::to(registry.address())?;
    let hosts = bench.scratch.directory(format!("hosts/{}", relay.address))?;
    let text = format!(
        "server = \"https://{0}\"\n[host.\"https://{0}\"]\nca = \"{1}\"\n",
        relay.address,
        at("right.crt").display()
    );
    fs::write(hosts.join("hosts.toml"), text).at("writing", &hosts)?;
    let hosts = bench.scratch.join("hosts").to_string_lossy().into_owned();
    let flags = SnapshotterOptions::with_flags(&["--background-rate", "0"]).flags;
    let environment = vec![("LAZULI_HOSTS_DIR".to_owned(), hosts.clone())];
    let node = bench.node_as(SnapshotterOptions { environment, flags, ..SnapshotterOptions::default() })?;
    let faults = [("another certificate", Some(other.as_str())), ("connections that end in the handshake", None)];
    for (number, (words, target)) in (0..).zip(faults) {
        let tar = TarLayer::new().file("data", single_content(number)).finish()?;
        let layout = write_lazy(&bench.scratch, &format!("tls-{number}"), vec![tar])?;
        registry.push(&layout, &format!("tls-{number}:lazy"))?;
        let image = format!("{}/tls-{number}:lazy", relay.address);
        let mut pull = node.lazuli_pull_command(&image)?;
        bench.pull_with(&node, pull.env("LAZULI_HOSTS_DIR", &hosts))?;
        let tree = bench.mounted(&node, &image)?;
        relay.set(target);
        let reader = bench.reader(&tree.join("data"), SINGLE_LEN)?;
        thread::sleep(BLIP);
        relay.set(Some(registry.address()));
        let (seen, expected) = (reader.finish(WITHIN)?, single_content(number));
        bench.line(&format!("TLS: {words}, for 3 s"), seen.words(&expected), logged(&node, &[]), seen.is(&expected));
    }
    Ok(())
}

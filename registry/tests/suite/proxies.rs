//! Registries that only a proxy can reach: for plain HTTP it gets whole addresses, for TLS it makes tunnels.

use std::{
    process::Command,
    sync::{Arc, Mutex},
};

use registry::{Client, ClientOptions, Reference};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

use crate::{
    certificates::Certificates, client, client_with_hosts, docker_registry::DockerRegistry, hosts_dir, options,
    push_image,
};

/// A name that no resolver knows; the proxy does.
const NAME: &str = "registry.test:5000";

/// A proxy that knows [`NAME`] only.
struct HttpProxy {
    address: String,
    /// The first line of each request.
    requests: Arc<Mutex<Vec<String>>>,
    task: JoinHandle<()>,
}

impl HttpProxy {
    async fn start(registry: &DockerRegistry) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::<Mutex<Vec<String>>>::default();
        let (log, target) = (Arc::clone(&requests), registry.host().to_owned());
        let task = tokio::spawn(async move {
            loop {
                let (connection, _) = listener.accept().await.unwrap();
                tokio::spawn(forward(connection, target.clone(), Arc::clone(&log)));
            }
        });
        Self { address, requests, task }
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

impl Drop for HttpProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Serves one connection; an end of either side ends it.
async fn forward(mut connection: TcpStream, target: String, log: Arc<Mutex<Vec<String>>>) -> std::io::Result<()> {
    let mut bytes = Vec::new();
    let head_len = loop {
        if connection.read_buf(&mut bytes).await? == 0 {
            return Ok(());
        }
        if let Some(position) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break position + 4;
        }
    };
    let head = String::from_utf8_lossy(&bytes[..head_len]).into_owned();
    let line = head.lines().next().unwrap().to_owned();
    log.lock().unwrap().push(line.clone());
    let mut upstream = TcpStream::connect(target).await?;
    if line.starts_with(&format!("CONNECT {NAME} ")) {
        connection.write_all(b"HTTP/1.1 200 Connected\r\n\r\n").await?;
        upstream.write_all(&bytes[head_len..]).await?;
    } else if line.contains(&format!(" http://{NAME}/")) {
        // One request a connection, so that the next one is seen as well.
        let head = head.replacen(&format!("http://{NAME}"), "", 1).replacen("\r\n", "\r\nConnection: close\r\n", 1);
        upstream.write_all(&[head.as_bytes(), &bytes[head_len..]].concat()).await?;
    } else {
        return connection.write_all(b"HTTP/1.1 502 Unknown\r\nContent-Length: 0\r\n\r\n").await;
    }
    copy_bidirectional(&mut connection, &mut upstream).await.map(drop)
}

fn by_proxy() -> Reference {
    format!("{NAME}/a:v1").parse().unwrap()
}

/// Runs the test `name` again in a process with `variables`: they belong to a whole process.
async fn run_again(name: &'static str, variables: Vec<(&'static str, String)>) {
    let run = move || {
        let executable = std::env::current_exe().unwrap();
        Command::new(executable)
            .args(["--exact", name])
            .env_remove("NO_PROXY")
            .env_remove("no_proxy")
            .envs(variables)
            .output()
            .unwrap()
    };
    let output = tokio::task::spawn_blocking(run).await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[tokio::test]
async fn plain_http_goes_through_the_proxy_of_the_environment() {
    const INNER: &str = "PLAIN_PROXY_TEST";
    if let Ok(digest) = std::env::var(INNER) {
        let client = Client::new(ClientOptions { plain_http: registry::PlainHttp::Always, ..options() });
        assert_eq!(client.manifest(&by_proxy()).await.unwrap().digest, digest.parse().unwrap());
        return;
    }
    let registry = DockerRegistry::start();
    let (_, digest) = push_image(&client(), &registry.reference("a:v1")).await;
    let proxy = HttpProxy::start(&registry).await;
    let name = "proxies::plain_http_goes_through_the_proxy_of_the_environment";
    run_again(
        name,
        vec![(INNER, digest.to_string()), ("HTTP_PROXY", proxy.address.clone()), ("http_proxy", proxy.address.clone())],
    )
    .await;
    assert_eq!(proxy.requests(), [format!("GET http://{NAME}/v2/a/manifests/v1 HTTP/1.1")]);
}

#[tokio::test]
async fn tls_goes_through_a_tunnel_and_loopback_past_the_proxy() {
    const INNER: &str = "TLS_PROXY_TEST";
    const HOSTS: &str = "TLS_PROXY_TEST_HOSTS";
    if let (Ok(address), Some(hosts)) = (std::env::var(INNER), std::env::var_os(HOSTS)) {
        let client = Client::new(ClientOptions { hosts_dir: Some(hosts.into()), ..options() });
        let (bytes, _) = push_image(&client, &by_proxy()).await;
        let direct = format!("{address}/a:v1").parse().unwrap();
        assert_eq!(client.manifest(&direct).await.unwrap().bytes, bytes);
        return;
    }
    let certificates = Certificates::new();
    let registry = DockerRegistry::start_with_tls(&certificates, false);
    let ca = format!("ca = '{}/ca.pem'", certificates.path().display());
    let direct = format!("server = 'https://{}'\n{ca}", registry.host());
    let hosts = hosts_dir(&[(NAME, &ca), (registry.host(), &direct)]);
    let proxy = HttpProxy::start(&registry).await;
    let name = "proxies::tls_goes_through_a_tunnel_and_loopback_past_the_proxy";
    let variables = vec![
        (INNER, registry.host().to_owned()),
        (HOSTS, hosts.path().display().to_string()),
        ("HTTPS_PROXY", proxy.address.clone()),
        ("https_proxy", proxy.address.clone()),
    ];
    run_again(name, variables).await;
    let requests = proxy.requests();
    assert!(!requests.is_empty());
    assert!(requests.iter().all(|line| *line == format!("CONNECT {NAME} HTTP/1.1")), "{requests:?}");
}

#[tokio::test]
async fn a_proxy_of_hosts_toml_is_used_for_its_host() {
    let registry = DockerRegistry::start();
    let proxy = HttpProxy::start(&registry).await;
    let hosts = hosts_dir(&[(NAME, &format!("server = 'http://{NAME}'\nproxy = '{}'", proxy.address))]);
    let client = client_with_hosts(&hosts);
    let (bytes, _) = push_image(&client, &by_proxy()).await;
    assert_eq!(client.manifest(&by_proxy()).await.unwrap().bytes, bytes);
    assert!(proxy.requests().len() > 3);
}

/// Takes one SOCKS5 connection to [`NAME`] on to `target`. Source: RFC 1928 3 to 6.
async fn serve_socks(listener: &TcpListener, target: &str) {
    let (mut connection, _) = listener.accept().await.unwrap();
    let mut greeting = [0; 2];
    connection.read_exact(&mut greeting).await.unwrap();
    connection.read_exact(&mut vec![0; greeting[1].into()]).await.unwrap();
    connection.write_all(&[5, 0]).await.unwrap();
    let (name, port) = NAME.split_once(':').unwrap();
    let mut asked = [&[5, 1, 0, 3, u8::try_from(name.len()).unwrap()], name.as_bytes()].concat();
    asked.extend(port.parse::<u16>().unwrap().to_be_bytes());
    let mut request = vec![0; asked.len()];
    connection.read_exact(&mut request).await.unwrap();
    assert_eq!(request, asked);
    connection.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0]).await.unwrap();
    let mut upstream = TcpStream::connect(target).await.unwrap();
    let target = target.to_owned();
    tokio::spawn(async move {
        // Either side may end it.
        copy_bidirectional(&mut connection, &mut upstream).await.map_err(|error| format!("{target}: {error}"))
    });
}

#[tokio::test]
async fn a_socks_proxy_resolves_the_name() {
    let registry = DockerRegistry::start();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = format!("socks5h://{}", listener.local_addr().unwrap());
    let target = registry.host().to_owned();
    let task = tokio::spawn(async move {
        loop {
            serve_socks(&listener, &target).await;
        }
    });
    let hosts = hosts_dir(&[(NAME, &format!("server = 'http://{NAME}'\nproxy = '{proxy}'"))]);
    let client = client_with_hosts(&hosts);
    let (bytes, _) = push_image(&client, &by_proxy()).await;
    assert_eq!(client.manifest(&by_proxy()).await.unwrap().bytes, bytes);
    task.abort();
}

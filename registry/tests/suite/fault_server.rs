//! An HTTP/1.1 server that answers as a test tells it to, and remembers what it was asked.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use registry::Reference;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

/// A request as it came in.
#[derive(Debug, Clone)]
pub(crate) struct Received {
    pub(crate) method: String,
    /// Path and query.
    pub(crate) target: String,
    head: String,
    pub(crate) body: Vec<u8>,
}

impl Received {
    /// The value of a header, empty without it.
    pub(crate) fn header(&self, name: &str) -> &str {
        let lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value).next().unwrap_or_default()
    }
}

/// What to answer.
pub(crate) enum Reply {
    /// Status line and headers (without `Content-Length`), then a body with its length.
    Full(String, Vec<u8>),
    /// The same, but the connection ends after so many bytes of the body.
    Cut(String, Vec<u8>, usize),
    /// These bytes, then the connection ends.
    Raw(Vec<u8>),
    /// Nothing, on an open connection.
    Silence,
    /// Status line and headers, then so many bytes of the body, then nothing, on an open connection.
    Stall(String, Vec<u8>, usize),
    /// The same with all of the body, in pieces of a length, each after a pause.
    Slow(String, Vec<u8>, usize, Duration),
}

impl Reply {
    pub(crate) fn status(status: u16) -> Self {
        Self::full(status, &[], b"")
    }

    pub(crate) fn full(status: u16, headers: &[&str], body: &[u8]) -> Self {
        Self::Full(head(status, headers), body.to_vec())
    }

    pub(crate) fn stall(status: u16, headers: &[&str], body: &[u8], len: usize) -> Self {
        Self::Stall(head(status, headers), body.to_vec(), len)
    }

    pub(crate) fn slow(status: u16, headers: &[&str], body: &[u8], piece_len: usize, pause: Duration) -> Self {
        Self::Slow(head(status, headers), body.to_vec(), piece_len, pause)
    }

    pub(crate) fn cut(status: u16, headers: &[&str], body: &[u8], len: usize) -> Self {
        Self::Cut(head(status, headers), body.to_vec(), len)
    }
}

fn head(status: u16, headers: &[&str]) -> String {
    let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    format!("HTTP/1.1 {status} x\r\nConnection: close\r\n{headers}")
}

/// A running server; ends with the value.
pub(crate) struct FaultServer {
    host: String,
    received: Arc<Mutex<Vec<Received>>>,
    sent_len: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl FaultServer {
    /// Answers each request with what `reply` makes of it; requests are counted from 0.
    pub(crate) async fn start(reply: impl Fn(usize, &Received) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let received = Arc::<Mutex<Vec<Received>>>::default();
        let sent_len = Arc::<AtomicU64>::default();
        let (log, sent, reply) = (Arc::clone(&received), Arc::clone(&sent_len), Arc::new(reply));
        let task = tokio::spawn(async move {
            loop {
                let (connection, _) = listener.accept().await.unwrap();
                let (log, sent, reply) = (Arc::clone(&log), Arc::clone(&sent), Arc::clone(&reply));
                tokio::spawn(async move {
                    // A client that goes away ends its connection, not the test.
                    let _ = serve(connection, &log, &sent, &*reply).await;
                });
            }
        });
        Self { host, received, sent_len, task }
    }

    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    pub(crate) fn reference(&self, name: &str) -> Reference {
        format!("{}/{name}", self.host).parse().unwrap()
    }

    /// Bytes of bodies that have been sent in pieces, to clients that took them.
    pub(crate) fn sent_len(&self) -> u64 {
        self.sent_len.load(Ordering::Relaxed)
    }

    pub(crate) fn received(&self) -> Vec<Received> {
        self.received.lock().unwrap().clone()
    }

    /// `METHOD target` of each request.
    pub(crate) fn requests(&self) -> Vec<String> {
        self.received().iter().map(|request| format!("{} {}", request.method, request.target)).collect()
    }

    /// The named header of each request.
    pub(crate) fn headers(&self, name: &str) -> Vec<String> {
        self.received().iter().map(|request| request.header(name).to_owned()).collect()
    }
}

impl Drop for FaultServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(
    mut connection: TcpStream,
    log: &Mutex<Vec<Received>>,
    sent: &AtomicU64,
    reply: &(dyn Fn(usize, &Received) -> Reply + Send + Sync),
) -> std::io::Result<()> {
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
    let mut words = head.split(' ').map(str::to_owned);
    let (method, target) = (words.next().unwrap(), words.next().unwrap());
    let mut request = Received { method, target, head, body: bytes.split_off(head_len) };
    let body_len = request.header("content-length").parse().unwrap_or(0);
    while request.body.len() < body_len {
        if connection.read_buf(&mut request.body).await? == 0 {
            return Ok(());
        }
    }
    let is_head = request.method == "HEAD";
    let answer = {
        let mut log = log.lock().unwrap();
        let answer = reply(log.len(), &request);
        log.push(request);
        answer
    };
    match answer {
        Reply::Full(head, body) => {
            connection.write_all(format!("{head}Content-Length: {}\r\n\r\n", body.len()).as_bytes()).await?;
            connection.write_all(if is_head { b"" } else { &body }).await?;
        }
        Reply::Cut(head, body, len) => {
            connection.write_all(format!("{head}Content-Length: {}\r\n\r\n", body.len()).as_bytes()).await?;
            connection.write_all(&body[..len]).await?;
        }
        Reply::Stall(head, body, len) => {
            connection.write_all(format!("{head}Content-Length: {}\r\n\r\n", body.len()).as_bytes()).await?;
            connection.write_all(&body[..len]).await?;
            connection.read_buf(&mut Vec::new()).await?;
        }
        Reply::Slow(head, body, piece_len, pause) => {
            connection.write_all(format!("{head}Content-Length: {}\r\n\r\n", body.len()).as_bytes()).await?;
            for piece in body.chunks(piece_len) {
                tokio::time::sleep(pause).await;
                connection.write_all(piece).await?;
                sent.fetch_add(piece.len() as u64, Ordering::Relaxed);
            }
        }
        Reply::Raw(bytes) => connection.write_all(&bytes).await?,
        Reply::Silence => {
            // Until the client has enough.
            connection.read_buf(&mut Vec::new()).await?;
        }
    }
    connection.shutdown().await
}

//! A registry with faults: it stands in front of a real one, and each of its repositories can be made to misbehave.
//!
//! It is an origin of its own (`host:port`), so that several of them are several registries with the same content.
//! Faults are set for a repository and hold from the next request on, until others are set. They concern blobs alone;
//! manifests are always answered, unless the repository asks for a password or answers nothing at all.

use std::{
    collections::HashMap,
    io::{self, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use crate::error::{Context as _, Result};

/// Longest head of a request or an answer.
const HEAD_LEN_MAX: usize = 64 << 10;
/// Most bytes that are relayed at a time.
const PIECE_LEN: usize = 64 << 10;
/// Nobody listens there: the port is reserved for a service that no machine of today has.
const DEAD_HOST: &str = "http://127.0.0.1:1/dead";
/// The page of a captive portal.
const PAGE: &str = "<html><body>please log in</body></html>";

/// How blobs of a repository are answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// As the registry behind does.
    None,
    /// After this time as the registry behind does.
    Delay(Duration),
    /// The connection is accepted and nothing is said, for ever.
    Hang,
    /// The head, then a byte each time this has passed.
    Trickle(Duration),
    /// So many bytes of the body, then silence.
    SilentAfter(u64),
    /// Half of the body, then silence.
    SilentInTheMiddle,
    /// Half of the body, then the connection ends.
    CutInTheMiddle,
    /// The connection ends without an answer.
    Close,
    /// A status, and how many seconds `Retry-After` says.
    Status(u16, Option<u32>),
    /// 200 with a page for people, as captive portals do.
    Page,
    /// 206 that says it is another range.
    WrongRange,
    /// 200 with the whole blob, whatever the range.
    IgnoresRange,
    /// 206 that begins at the boundary of a 4 KiB block before.
    Aligned,
    /// 206 with so many bytes at most.
    Clamped(u64),
    /// A redirect to a host that is not there.
    DeadRedirect,
    /// One byte of the body is another.
    WrongByte,
    /// Everything of this repository, manifests too, gets this status.
    AllStatus(u16),
}

/// A request for a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// The repository.
    pub repository: String,
    /// The digest.
    pub blob: String,
    /// The header `Range`, empty without one.
    pub range: String,
    /// The header `Authorization`, empty without one.
    pub authorization: String,
}

#[derive(Debug, Default)]
struct Repository {
    fault: Option<Fault>,
    /// `Authorization` that is asked for.
    authorization: Option<String>,
    bytes: u64,
}

#[derive(Debug)]
struct State {
    upstream: String,
    repositories: Mutex<HashMap<String, Repository>>,
    asked: Mutex<Vec<Asked>>,
}

/// A running faulty registry. Its threads end with the process.
#[derive(Debug, Clone)]
pub struct FaultyRegistry {
    address: String,
    state: Arc<State>,
}

impl FaultyRegistry {
    /// Starts one in front of the registry at `upstream` (`host:port`), without any fault.
    ///
    /// # Errors
    ///
    /// When there is no port for it.
    pub fn before(upstream: &str) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").context("opening a port")?;
        let address = listener.local_addr().context("opening a port")?.to_string();
        let state =
            Arc::new(State { upstream: upstream.to_owned(), repositories: Mutex::default(), asked: Mutex::default() });
        let serving = Arc::clone(&state);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let state = Arc::clone(&serving);
                // A client that goes away ends its connection and nothing else.
                thread::spawn(move || drop(state.serve(client)));
            }
        });
        Ok(Self { address, state })
    }

    /// `host:port`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The full reference of `name`, which is `repository:tag`.
    pub fn reference(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    /// From now on blobs of `repository` are answered so.
    pub fn set(&self, repository: &str, fault: Fault) {
        self.state.repositories().entry(repository.to_owned()).or_default().fault = Some(fault);
    }

    /// From now on `repository` is answered without a fault.
    pub fn heal(&self, repository: &str) {
        self.set(repository, Fault::None);
    }

    /// From now on `repository` asks for this value of `Authorization`; with `None` for nothing.
    pub fn require(&self, repository: &str, authorization: Option<&str>) {
        self.state.repositories().entry(repository.to_owned()).or_default().authorization =
            authorization.map(str::to_owned);
    }

    /// Requests for blobs of `repository` so far.
    pub fn asked(&self, repository: &str) -> Vec<Asked> {
        lock(&self.state.asked).iter().filter(|asked| asked.repository == repository).cloned().collect()
    }

    /// Bytes of blobs of `repository` that were sent so far.
    pub fn bytes(&self, repository: &str) -> u64 {
        self.state.repositories().get(repository).map_or(0, |repository| repository.bytes)
    }
}

/// A request's first line and headers.
struct Head {
    lines: Vec<String>,
}

impl Head {
    /// Reads one; `None` when the connection ends before.
    fn read(connection: &mut TcpStream) -> io::Result<Option<Self>> {
        let mut bytes = Vec::new();
        let mut byte = [0];
        while !bytes.ends_with(b"\r\n\r\n") {
            if bytes.len() > HEAD_LEN_MAX || connection.read(&mut byte)? == 0 {
                return Ok(None);
            }
            bytes.push(byte[0]);
        }
        let text = String::from_utf8_lossy(&bytes);
        let lines = text.trim_end().split("\r\n").map(str::to_owned).collect();
        Ok(Some(Self { lines }))
    }

    fn first(&self) -> &str {
        self.lines.first().map_or("", String::as_str)
    }

    /// The value of a header, empty without it.
    fn header(&self, name: &str) -> &str {
        let headers = self.lines.iter().skip(1).filter_map(|line| line.split_once(':'));
        headers.filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim()).next().unwrap_or("")
    }

    /// Puts a header in the place of those of its name.
    fn replace(&mut self, name: &str, value: &str) {
        let prefix = format!("{}:", name.to_ascii_lowercase());
        self.lines.retain(|line| !line.to_ascii_lowercase().starts_with(&prefix));
        self.lines.push(format!("{name}: {value}"));
    }

    fn to_bytes(&self) -> Vec<u8> {
        (self.lines.join("\r\n") + "\r\n\r\n").into_bytes()
    }
}

impl State {
    fn repositories(&self) -> MutexGuard<'_, HashMap<String, Repository>> {
        lock(&self.repositories)
    }

    /// Answers one request; every connection ends with it.
    fn serve(&self, mut client: TcpStream) -> io::Result<()> {
        let Some(request) = Head::read(&mut client)? else { return Ok(()) };
        let path = request.first().split(' ').nth(1).unwrap_or_default().to_owned();
        let (repository, blob) = repository_and_blob(&path);
        let (fault, authorization) = self.answer_of(&repository);
        if let Fault::AllStatus(status) = fault {
            return answer(&mut client, status, &[], "");
        }
        if let Some(authorization) = authorization.filter(|wanted| request.header("authorization") != wanted) {
            if let Some(blob) = &blob {
                self.note(&repository, blob, &request);
            }
            drop(authorization);
            return answer(&mut client, 401, &["WWW-Authenticate: Basic realm=\"torture\""], "");
        }
        match blob {
            Some(blob) => {
                self.note(&repository, &blob, &request);
                self.answer_blob(client, request, &repository, &fault)
            }
            None => self.relay(&mut client, request, |head, body, client| {
                client.write_all(&head.to_bytes())?;
                io::copy(body, client).map(drop)
            }),
        }
    }

    fn answer_of(&self, repository: &str) -> (Fault, Option<String>) {
        let repositories = self.repositories();
        let found = repositories.get(repository);
        let fault = found.and_then(|found| found.fault.clone()).unwrap_or(Fault::None);
        (fault, found.and_then(|found| found.authorization.clone()))
    }

    fn note(&self, repository: &str, blob: &str, request: &Head) {
        let asked = Asked {
            repository: repository.to_owned(),
            blob: blob.to_owned(),
            range: request.header("range").to_owned(),
            authorization: request.header("authorization").to_owned(),
        };
        lock(&self.asked).push(asked);
    }

    fn answer_blob(&self, mut client: TcpStream, mut request: Head, repository: &str, fault: &Fault) -> io::Result<()> {
        match fault {
            Fault::Hang => return wait_for_end(&mut client),
            Fault::Close => return client.shutdown(Shutdown::Both),
            Fault::Page => return answer(&mut client, 200, &["Content-Type: text/html"], PAGE),
            Fault::DeadRedirect => return answer(&mut client, 307, &[&format!("Location: {DEAD_HOST}")], ""),
            Fault::Status(status, None) => return answer(&mut client, *status, &[], ""),
            Fault::Status(status, Some(seconds)) => {
                return answer(&mut client, *status, &[&format!("Retry-After: {seconds}")], "");
            }
            Fault::Delay(time) => thread::sleep(*time),
            Fault::IgnoresRange => request.lines.retain(|line| !line.to_ascii_lowercase().starts_with("range:")),
            Fault::Aligned => change_range(&mut request, |first, last| (first - first % 4096, last)),
            Fault::Clamped(len) => change_range(&mut request, |first, last| (first, last.min(first + len - 1))),
            _ => {}
        }
        self.relay(&mut client, request, |mut head, body, client| {
            let len: u64 = head.header("content-length").parse().unwrap_or(0);
            if *fault == Fault::WrongRange && head.first().contains(" 206") {
                let range = format!("bytes 1-{len}/{}", len + 1);
                head.replace("Content-Range", &range);
            }
            client.write_all(&head.to_bytes())?;
            let mut to = Counting { state: self, repository, client };
            match fault {
                Fault::Trickle(pause) => trickle(body, &mut to, *pause),
                Fault::SilentAfter(most) => {
                    io::copy(&mut body.take(*most), &mut to)?;
                    wait_for_end(to.client)
                }
                Fault::SilentInTheMiddle => {
                    io::copy(&mut body.take(len / 2), &mut to)?;
                    wait_for_end(to.client)
                }
                Fault::CutInTheMiddle => io::copy(&mut body.take(len / 2), &mut to).map(drop),
                Fault::WrongByte => {
                    let mut first = [0];
                    body.read_exact(&mut first)?;
                    to.write_all(&[first[0] ^ 1])?;
                    io::copy(body, &mut to).map(drop)
                }
                _ => io::copy(body, &mut to).map(drop),
            }
        })
    }

    /// Asks the registry behind; `send` gets the head of its answer and the connection with the body.
    fn relay(
        &self,
        client: &mut TcpStream,
        mut request: Head,
        send: impl FnOnce(Head, &mut TcpStream, &mut TcpStream) -> io::Result<()>,
    ) -> io::Result<()> {
        request.replace("Host", &self.upstream);
        request.replace("Connection", "close");
        request.lines.retain(|line| !line.to_ascii_lowercase().starts_with("authorization:"));
        let mut upstream = TcpStream::connect(&self.upstream)?;
        upstream.write_all(&request.to_bytes())?;
        let Some(mut head) = Head::read(&mut upstream)? else { return Ok(()) };
        head.replace("Connection", "close");
        send(head, &mut upstream, client)?;
        client.shutdown(Shutdown::Both)
    }
}

/// Writes to a client and counts what was written.
struct Counting<'a> {
    state: &'a State,
    repository: &'a str,
    client: &'a mut TcpStream,
}

impl Write for Counting<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = self.client.write(&bytes[..bytes.len().min(PIECE_LEN)])?;
        self.state.repositories().entry(self.repository.to_owned()).or_default().bytes += len as u64;
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.client.flush()
    }
}

fn trickle(body: &mut TcpStream, to: &mut Counting<'_>, pause: Duration) -> io::Result<()> {
    let mut byte = [0];
    while body.read(&mut byte)? == 1 {
        thread::sleep(pause);
        to.write_all(&byte)?;
    }
    Ok(())
}

/// Says nothing until the client has enough.
fn wait_for_end(client: &mut TcpStream) -> io::Result<()> {
    let mut byte = [0];
    while client.read(&mut byte)? > 0 {}
    Ok(())
}

/// An answer of the registry itself, with a body or none.
fn answer(client: &mut TcpStream, status: u16, headers: &[&str], body: &str) -> io::Result<()> {
    let mut head = Head { lines: vec![format!("HTTP/1.1 {status} torture")] };
    head.lines.extend(headers.iter().map(|&header| header.to_owned()));
    head.lines.push(format!("Content-Length: {}", body.len()));
    head.lines.push("Connection: close".to_owned());
    client.write_all(&head.to_bytes())?;
    client.write_all(body.as_bytes())?;
    client.shutdown(Shutdown::Both)
}

/// Asks for another range than the client did, where it asked for one with two ends.
fn change_range(request: &mut Head, change: impl FnOnce(u64, u64) -> (u64, u64)) {
    let range = request.header("range").strip_prefix("bytes=").and_then(|range| range.split_once('-'));
    let ends = range.and_then(|(first, last)| Some((first.parse().ok()?, last.parse().ok()?)));
    if let Some((first, last)) = ends {
        let (first, last) = change(first, last);
        request.replace("Range", &format!("bytes={first}-{last}"));
    }
}

/// The repository of a path, and the blob if it is one's.
fn repository_and_blob(path: &str) -> (String, Option<String>) {
    let path = path.split('?').next().unwrap_or_default();
    let rest = path.strip_prefix("/v2/").unwrap_or_default();
    for (kind, is_blob) in [("/blobs/", true), ("/manifests/", false), ("/referrers/", false), ("/tags/", false)] {
        if let Some((repository, name)) = rest.rsplit_once(kind) {
            return (repository.to_owned(), is_blob.then(|| name.to_owned()));
        }
    }
    (String::new(), None)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_blobs_are_told_from_others() {
        let found = |path| repository_and_blob(path);
        assert_eq!(found("/v2/a/b/blobs/sha256:00"), ("a/b".to_owned(), Some("sha256:00".to_owned())));
        assert_eq!(found("/v2/a/manifests/latest?x=1"), ("a".to_owned(), None));
        assert_eq!(found("/v2/"), (String::new(), None));
    }

    #[test]
    fn ranges_with_two_ends_are_changed_and_others_left() {
        let mut request = Head { lines: ["GET / HTTP/1.1", "Range: bytes=5000-9999"].map(str::to_owned).to_vec() };
        change_range(&mut request, |first, last| (first - first % 4096, last));
        assert_eq!(request.header("range"), "bytes=4096-9999");
        request.replace("Range", "bytes=5000-");
        change_range(&mut request, |_, _| (0, 0));
        assert_eq!(request.header("range"), "bytes=5000-");
    }
}

//! A slow link to a registry: a TCP proxy with a rate that all connections share, and a round-trip time.
//!
//! Kernels without netem delay nothing, so bytes wait here. A new connection costs a round trip, as a handshake does;
//! what is missing beside a real link is slow start, so figures of short transfers are kind to everybody.

use std::{
    io::{self, Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    str::FromStr,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use crate::error::{Context as _, Result};

/// Bytes that travel together.
const PIECE_LEN: usize = 32 << 10;
/// Bytes of a connection that are on their way at most: twice what the link holds, as the window of TCP would be, or
/// this where that is less.
const WINDOW_MIN: u64 = 256 << 10;
/// Whoever sends a little late may catch up: threads wake late.
const CATCH_UP: Duration = Duration::from_millis(2);

/// How fast and how far away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Towards the node; the other way is never full here.
    pub bits_per_second: u64,
    /// There and back.
    pub round_trip: Duration,
}

impl FromStr for Shape {
    type Err = String;

    /// `200mbit,10ms` or `1gbit,1ms`: megabits or gigabits a second, and the round trip in milliseconds.
    fn from_str(text: &str) -> Result<Self, String> {
        let usage = || format!("{text} is no link: say RATEmbit,MILLISECONDSms or RATEgbit, for example 200mbit,10ms");
        let (rate, round_trip) = text.split_once(',').ok_or_else(usage)?;
        let number = |text: &str, unit| text.strip_suffix(unit).and_then(|number| number.parse::<u64>().ok());
        let megabits = number(rate, "mbit").or_else(|| number(rate, "gbit")?.checked_mul(1000));
        let bits_per_second = megabits.and_then(|rate| rate.checked_mul(1_000_000)).filter(|rate| *rate > 0);
        let round_trip = number(round_trip, "ms").ok_or_else(usage)?;
        Ok(Self { bits_per_second: bits_per_second.ok_or_else(usage)?, round_trip: Duration::from_millis(round_trip) })
    }
}

/// A link that is there until the process ends.
#[derive(Debug)]
pub struct ShapedLink {
    address: String,
}

impl ShapedLink {
    /// Opens a link to `target` (`host:port`).
    ///
    /// # Errors
    ///
    /// When there is no free port.
    pub fn open(target: &str, shape: Shape) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").context("opening a link")?;
        let address = listener.local_addr().context("looking at a link")?.to_string();
        let (target, lane) = (target.to_owned(), Arc::new(Lane::new(shape.bits_per_second)));
        thread::spawn(move || {
            for near in listener.incoming().flatten() {
                let Ok(far) = TcpStream::connect(&target) else { continue };
                // A connection that ends early is its clients' business.
                _ = carry(near, far, shape.round_trip, &lane);
            }
        });
        Ok(Self { address })
    }

    /// `host:port` of its near end.
    pub fn address(&self) -> &str {
        &self.address
    }
}

/// When the link is free for the next bytes.
struct Lane {
    bits_per_second: u64,
    is_free_at: Mutex<Instant>,
}

impl Lane {
    fn new(bits_per_second: u64) -> Self {
        Self { bits_per_second, is_free_at: Mutex::new(Instant::now()) }
    }

    /// Takes the link for `len` bytes; returns when they are through.
    fn take(&self, len: usize) -> Instant {
        let time = Duration::from_nanos(len as u64 * 8 * 1_000_000_000 / self.bits_per_second);
        let mut is_free_at = self.is_free_at.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        *is_free_at = now.checked_sub(CATCH_UP).map_or(now, |late| late.max(*is_free_at)) + time;
        *is_free_at
    }
}

fn carry(near: TcpStream, far: TcpStream, round_trip: Duration, lane: &Arc<Lane>) -> io::Result<()> {
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    let opened = Instant::now() + round_trip;
    let up = (near.try_clone()?, far.try_clone()?);
    let lane = lane.clone();
    let held = lane.bits_per_second / 8 * u64::try_from(round_trip.as_micros()).unwrap_or(u64::MAX) / 1_000_000;
    let window = WINDOW_MIN.max(2 * held);
    one_way(up.0, up.1, window, move |_| opened.max(Instant::now()) + round_trip / 2);
    one_way(far, near, window, move |len| {
        let through = lane.take(len);
        sleep_until(through);
        through + round_trip / 2
    });
    Ok(())
}

/// Carries bytes until `from` ends, `window` of them at once; `arrival` says when a piece of this length is at the other end.
fn one_way(mut from: TcpStream, mut to: TcpStream, window: u64, arrival: impl Fn(usize) -> Instant + Send + 'static) {
    let (sender, receiver): (SyncSender<(Instant, Vec<u8>)>, Receiver<_>) =
        sync_channel(usize::try_from(window).unwrap_or(usize::MAX) / PIECE_LEN);
    thread::spawn(move || {
        let mut buffer = vec![0; PIECE_LEN];
        while let Ok(len @ 1..) = from.read(&mut buffer) {
            if sender.send((arrival(len), buffer[..len].to_vec())).is_err() {
                break;
            }
        }
    });
    thread::spawn(move || {
        for (at, bytes) in receiver {
            sleep_until(at);
            if to.write_all(&bytes).is_err() {
                break;
            }
        }
        _ = to.shutdown(Shutdown::Both);
    });
}

fn sleep_until(at: Instant) {
    thread::sleep(at.saturating_duration_since(Instant::now()));
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape { bits_per_second: 80_000_000, round_trip: Duration::from_millis(40) };
    const LEN: usize = 2 << 20;

    #[test]
    fn bytes_take_as_long_as_the_link_says() {
        let target = TcpListener::bind("127.0.0.1:0").unwrap();
        let link = ShapedLink::open(&target.local_addr().unwrap().to_string(), SHAPE).unwrap();
        thread::spawn(move || {
            let (mut stream, _) = target.accept().unwrap();
            stream.read_exact(&mut [0]).unwrap();
            stream.write_all(&vec![7; LEN]).unwrap();
        });
        let clock = Instant::now();
        let mut stream = TcpStream::connect(link.address()).unwrap();
        stream.write_all(b"?").unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        // A handshake, a question and its answer: two round trips; 2 MiB at 10 MB/s. Never faster.
        let least = SHAPE.round_trip * 2 + Duration::from_millis(LEN as u64 / 10_000) - CATCH_UP;
        assert!(clock.elapsed() >= least, "{:?}", clock.elapsed());
        assert!(bytes.len() == LEN && bytes.iter().all(|byte| *byte == 7));
    }

    #[test]
    fn a_link_is_said_in_bits_and_milliseconds() {
        let shape = Shape { bits_per_second: 200_000_000, round_trip: Duration::from_millis(10) };
        assert_eq!("200mbit,10ms".parse(), Ok(shape));
        let near = Shape { bits_per_second: 1_000_000_000, round_trip: Duration::from_millis(1) };
        assert_eq!("1gbit,1ms".parse(), Ok(near));
        for wrong in ["", "200", "0mbit,1ms", "99999999999999gbit,1ms", "200mbit", "200mbit,10", "fast,10ms"] {
            assert!(wrong.parse::<Shape>().unwrap_err().contains("200mbit,10ms"), "{wrong}");
        }
    }
}

//! The words of `bench starts`.

use lazuli_tests::{HarnessError, Result, peers::Peer, real_images, shaped_link::Shape};

use super::order::Order;

/// Samples of each way unless said.
const SAMPLES: usize = 5;
const LOOPBACK: &str = "loopback";
/// The image that has a file to map.
const WEIGHTS: &str = "weights";
/// The word for the second image of the fleet, on a node that has the first one.
const FLEET: &str = "fleet";

/// Reads every file of the image and says how many bytes that were.
const READ_ALL: [&str; 3] = ["sh", "-c", "find / -xdev -type f -exec cat {} + | wc -c"];
/// Reads the four largest files at once, and says what all of that was.
const READ_FOUR: [&str; 3] = [
    "sh",
    "-c",
    "find / -xdev -type f -printf '%s %p\\n' | sort -k 1,1nr -k 2 | head -n 4 | cut -d ' ' -f 2- | \
     xargs -d '\\n' -P 4 -n 1 cksum | sort | cksum",
];
/// Touches every page of the file of weights, in random order, and says how many and what they hold.
const MAP_ALL: [&str; 3] = ["/app/weights", "--map", "1"];

/// A way to bring an image to a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Way {
    /// The original, pulled and unpacked by containerd.
    Full,
    /// Converted with a derived hot set.
    Derived,
    /// Converted with the profile of one start.
    Recorded,
    /// As derived, on a node that records no starts.
    Unrecorded,
    /// Somebody else's; measured only where it is asked for.
    Peer(Peer),
}

impl Way {
    /// Those that are measured unless said.
    const USUAL: [Self; 3] = [Self::Full, Self::Derived, Self::Recorded];

    /// The word for it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Derived => "derived",
            Self::Recorded => "recorded",
            Self::Unrecorded => "unrecorded",
            Self::Peer(peer) => peer.name(),
        }
    }

    /// The tag of the image that it pulls.
    pub(crate) fn tag(self) -> &'static str {
        match self {
            Self::Peer(peer) => peer.tag(),
            Self::Unrecorded => Self::Derived.name(),
            own => own.name(),
        }
    }

    /// Whether it is somebody else's.
    pub(crate) fn is_peer(self) -> bool {
        matches!(self, Self::Peer(_))
    }

    /// Its colour in the page.
    pub(crate) fn colour(self) -> &'static str {
        match self {
            Self::Full => "#8a8f98",
            Self::Derived => "#2a6fb0",
            Self::Recorded => "#1d8a4a",
            Self::Unrecorded => "#8fb8de",
            Self::Peer(_) => "#b0702a",
        }
    }
}

/// A container's work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    /// The image's own command.
    Ready,
    /// It reads every file.
    Whole,
    /// It maps one large file and touches every page; only the image of weights has one.
    Mapped,
    /// Four processes read the four largest files at once.
    Four,
}

impl Work {
    const ALL: [Self; 4] = [Self::Ready, Self::Whole, Self::Mapped, Self::Four];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Whole => "whole",
            Self::Mapped => "mapped",
            Self::Four => "four",
        }
    }

    /// For the head of a plot.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Ready => "until ready",
            Self::Whole => "until every file is read",
            Self::Mapped => "until every page of the largest file is touched, in random order",
            Self::Four => "until the four largest files are read at once",
        }
    }

    /// The program and its arguments, instead of the image's own; none for that. All but `Ready` print numbers that say
    /// which bytes they have read.
    pub(crate) fn command(self) -> &'static [&'static str] {
        match self {
            Self::Ready => &[],
            Self::Whole => &READ_ALL,
            Self::Mapped => &MAP_ALL,
            Self::Four => &READ_FOUR,
        }
    }

    /// Whether the image can do that.
    pub(crate) fn is_for(self, image: &str) -> bool {
        self != Self::Mapped || image == WEIGHTS
    }
}

/// An image that is started, maybe where another one is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Subject {
    /// The word for it.
    pub(crate) name: String,
    /// The image of `tests/images`.
    pub(crate) image: String,
    /// The one that the node has pulled and started before.
    pub(crate) before: Option<String>,
}

impl Subject {
    fn parse(word: String, known: &[String]) -> Result<Self> {
        if word == FLEET {
            return Ok(Self { name: word, image: "fleet1".to_owned(), before: Some("fleet0".to_owned()) });
        }
        if known.contains(&word) {
            return Ok(Self { image: word.clone(), name: word, before: None });
        }
        Err(unknown("image", &word, known.iter().map(String::as_str).chain([FLEET])))
    }
}

/// Everything that is to be measured.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) samples: usize,
    /// With their names; `None` is loopback.
    pub(crate) links: Vec<(String, Option<Shape>)>,
    pub(crate) works: Vec<Work>,
    pub(crate) ways: Vec<Way>,
    pub(crate) json: Option<String>,
    pub(crate) html: Option<String>,
    pub(crate) subjects: Vec<Subject>,
    /// Of the order in which ways take turns.
    pub(crate) seed: u64,
}

impl Options {
    /// # Errors
    ///
    /// A line that says what is wrong.
    pub(crate) fn parse(words: Vec<String>) -> Result<Self> {
        let mut options = Self {
            samples: SAMPLES,
            links: Vec::new(),
            works: Vec::new(),
            ways: Vec::new(),
            json: None,
            html: None,
            subjects: Vec::new(),
            seed: Order::any_seed(),
        };
        let known = real_images::names()?;
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or_else(crate::usage);
            match word.as_str() {
                "--samples" => options.samples = number(&word, &value()?)?,
                "--seed" => options.seed = number(&word, &value()?)?,
                "--link" => options.links.push(link(value()?)?),
                "--work" => options.works.push(find("work", &Work::ALL, Work::name, &value()?)?),
                "--way" => options.ways.push(way(&value()?)?),
                "--json" => options.json = Some(value()?),
                "--html" => options.html = Some(value()?),
                _ if word.starts_with('-') => return Err(crate::usage()),
                _ => options.subjects.push(Subject::parse(word, &known)?),
            }
        }
        if options.subjects.is_empty() || options.samples == 0 {
            return Err(crate::usage());
        }
        let is_for_one = |work: &Work| options.subjects.iter().any(|subject| work.is_for(&subject.image));
        if let Some(work) = options.works.iter().find(|work| !is_for_one(work)) {
            return Err(HarnessError::Unexpected(format!("{} is for the image {WEIGHTS} alone", work.name())));
        }
        or_usual(&mut options.links, || vec![(LOOPBACK.to_owned(), None)]);
        or_usual(&mut options.works, || vec![Work::Ready]);
        or_usual(&mut options.ways, || Way::USUAL.to_vec());
        Ok(options)
    }
}

fn or_usual<T>(chosen: &mut Vec<T>, usual: impl FnOnce() -> Vec<T>) {
    if chosen.is_empty() {
        *chosen = usual();
    }
}

fn link(word: String) -> Result<(String, Option<Shape>)> {
    let shape = if word == LOOPBACK { None } else { Some(word.parse().map_err(HarnessError::Unexpected)?) };
    Ok((word, shape))
}

fn way(word: &str) -> Result<Way> {
    let all: Vec<Way> = Way::USUAL.into_iter().chain([Way::Unrecorded]).chain(Peer::ALL.map(Way::Peer)).collect();
    find("way", &all, Way::name, word)
}

fn find<T: Copy>(kind: &str, all: &[T], name: impl Fn(T) -> &'static str, word: &str) -> Result<T> {
    let found = all.iter().copied().find(|one| name(*one) == word);
    found.ok_or_else(|| unknown(kind, word, all.iter().map(|one| name(*one))))
}

fn unknown<'a>(kind: &str, word: &str, known: impl Iterator<Item = &'a str>) -> HarnessError {
    HarnessError::Unexpected(format!("unknown {kind} {word}: choose from {}", known.collect::<Vec<_>>().join(", ")))
}

fn number<T: std::str::FromStr>(flag: &str, word: &str) -> Result<T> {
    word.parse().map_err(|_| HarnessError::Unexpected(format!("{flag} wants a number, not {word}")))
}

//! The words of `bench starts`.

use lazuli_tests::{HarnessError, Result, shaped_link::Shape};

/// Samples of each way unless said.
const SAMPLES: usize = 5;
const LOOPBACK: &str = "loopback";

/// A way to bring an image to a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Way {
    /// The original, pulled and unpacked by containerd.
    Full,
    /// Converted with a derived hot set.
    Derived,
    /// Converted with the profile of one start.
    Recorded,
}

impl Way {
    const ALL: [Self; 3] = [Self::Full, Self::Derived, Self::Recorded];

    /// The tag of the image, and the word for it.
    pub(crate) fn tag(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Derived => "derived",
            Self::Recorded => "recorded",
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
}

impl Work {
    const ALL: [Self; 2] = [Self::Ready, Self::Whole];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Whole => "whole",
        }
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
    pub(crate) images: Vec<String>,
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
            images: Vec::new(),
        };
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or_else(crate::usage);
            match word.as_str() {
                "--samples" => options.samples = value()?.parse().map_err(|_| crate::usage())?,
                "--link" => options.links.push(link(value()?)?),
                "--work" => options.works.push(find(&Work::ALL, Work::name, &value()?)?),
                "--way" => options.ways.push(find(&Way::ALL, Way::tag, &value()?)?),
                "--json" => options.json = Some(value()?),
                "--html" => options.html = Some(value()?),
                _ if word.starts_with('-') => return Err(crate::usage()),
                _ => options.images.push(word),
            }
        }
        if options.images.is_empty() || options.samples == 0 {
            return Err(crate::usage());
        }
        or_usual(&mut options.links, || vec![(LOOPBACK.to_owned(), None)]);
        or_usual(&mut options.works, || vec![Work::Ready]);
        or_usual(&mut options.ways, || Way::ALL.to_vec());
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

fn find<T: Copy>(all: &[T], name: impl Fn(T) -> &'static str, word: &str) -> Result<T> {
    all.iter().copied().find(|one| name(*one) == word).ok_or_else(crate::usage)
}

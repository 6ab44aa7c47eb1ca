//! Platforms: what somebody wants, and how well an image serves it.
//!
//! The rules are those of containerd's `platforms` package, so that everybody takes the same image of an index: the
//! same words mean the same platform (`Normalize`), and a processor runs code for its own variant, then for lower
//! ones, the highest first, then for the architecture before it (`Only`); never for a higher one.

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::image::one_line;

/// A minor version of arm64's ninth that follows its eighth: v9.0 knows all of v8.5.
const ARM64_V9_KNOWS: usize = 5;
/// The lowest variant of arm that images are made for.
const ARM_LOWEST: usize = 5;

/// The platform in a descriptor, or in a config: as it is written there.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DescriptorPlatform {
    /// Processor architecture, in Go's words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub architecture: Option<String>,
    /// Operating system, in Go's words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub os: Option<String>,
    /// Variant of the architecture.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// Everything else.
    #[serde(flatten)]
    pub rest: BTreeMap<String, Value>,
}

impl DescriptorPlatform {
    /// Whether it says for which processors the image is; without that, only the config does.
    pub fn is_stated(&self) -> bool {
        self.architecture.as_ref().is_some_and(|architecture| !architecture.is_empty())
    }

    /// Whether it is a platform that nothing runs on, as that of attestations.
    pub fn is_unknown(&self) -> bool {
        self.os.as_deref() == Some("unknown")
    }

    /// Whether the image needs features of the operating system that nobody is known to have.
    fn needs_features(&self) -> bool {
        self.rest.get("os.features").and_then(Value::as_array).is_some_and(|features| !features.is_empty())
    }
}

impl fmt::Display for DescriptorPlatform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = [&self.os, &self.architecture, &self.variant].map(|word| word.as_deref().unwrap_or_default());
        let words: Vec<_> = words.into_iter().filter(|word| !word.is_empty()).collect();
        // An image may be the author.
        f.write_str(&if words.is_empty() { "unknown".to_owned() } else { one_line(&words.join("/")) })
    }
}

/// A platform as users name it, `os/architecture[/variant]`, in the words of containerd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    os: String,
    architecture: String,
    /// Empty where the architecture has none, and for amd64/v1 and arm64/v8, which containerd leaves out.
    variant: String,
}

impl Platform {
    /// Linux on the architecture that this program runs on.
    pub fn host() -> Self {
        // Two of Rust's names that are no words of containerd's.
        let architecture = match std::env::consts::ARCH {
            "x86" => "386",
            "powerpc64" => "ppc64le",
            "loongarch64" => "loong64",
            other => other,
        };
        Self::normalized("linux", architecture, "")
    }

    /// The platform that an image is for.
    pub fn of(said: &DescriptorPlatform) -> Self {
        let [os, architecture, variant] =
            [&said.os, &said.architecture, &said.variant].map(|word| word.as_deref().unwrap_or_default());
        Self::normalized(os, architecture, variant)
    }

    /// Source: containerd, platforms/database.go.
    fn normalized(os: &str, architecture: &str, variant: &str) -> Self {
        let [os, architecture, variant] = [os, architecture, variant].map(str::to_lowercase);
        let os = match os.as_str() {
            // Whoever says none means the system that it runs on.
            "" => "linux".to_owned(),
            "macos" => "darwin".to_owned(),
            _ => os,
        };
        let (architecture, variant) = match (architecture.as_str(), variant.as_str()) {
            ("i386", _) => ("386", ""),
            ("x86_64" | "x86-64" | "amd64", "v1") => ("amd64", ""),
            ("x86_64" | "x86-64" | "amd64", variant) => ("amd64", variant),
            ("aarch64" | "arm64", "8" | "v8") => ("arm64", ""),
            ("aarch64" | "arm64", variant) => ("arm64", variant),
            ("armhf", _) => ("arm", "v7"),
            ("armel", _) => ("arm", "v6"),
            ("arm", "" | "7") => ("arm", "v7"),
            ("arm", "5") => ("arm", "v5"),
            ("arm", "6") => ("arm", "v6"),
            ("arm", "8") => ("arm", "v8"),
            (architecture, variant) => (architecture, variant),
        };
        Self { os, architecture: architecture.to_owned(), variant: variant.to_owned() }
    }

    /// How well an image for `found` serves who wants this platform: 0 is best; `None`: not at all.
    ///
    /// Source: containerd, `platformVector` in platforms/compare.go.
    pub fn rank(&self, found: &DescriptorPlatform) -> Option<usize> {
        let found = Self::of(found);
        if found.os != self.os {
            return None;
        }
        if found == *self {
            return Some(0);
        }
        let (wanted_level, found_level) = (self.level(), found.level());
        match (self.architecture.as_str(), found.architecture.as_str()) {
            ("amd64", "amd64") => rank_below(wanted_level?, found_level?, (1, 0)),
            ("amd64", "386") => found.variant.is_empty().then(|| wanted_level.map_or(1, |(level, _)| level)),
            ("arm", "arm") => rank_below(wanted_level?, found_level?, (ARM_LOWEST, 0)),
            ("arm64", "arm64") => rank_arm64(wanted_level?, found_level?),
            ("arm64", "arm") => {
                // All variants of arm64 that the machine runs come before it, and arm/v8 first.
                let before = wanted_level.and_then(|wanted| rank_arm64(wanted, (8, 0))).unwrap_or(0) + 1;
                Some(before + rank_below((8, 0), found_level?, (ARM_LOWEST, 0))?)
            }
            _ => None,
        }
    }

    /// Whether what runs there runs images for the system and architecture of `found`, whatever its variant.
    pub fn runs(&self, found: &DescriptorPlatform) -> bool {
        let found = Self::of(found);
        let pair = (self.architecture.as_str(), found.architecture.as_str());
        found.os == self.os
            && (found.architecture == self.architecture || matches!(pair, ("amd64", "386") | ("arm64", "arm")))
    }

    /// The best of `candidates` and how many serve as well as that one; the first of them where there are several.
    pub fn choose<'a, T>(
        &self,
        candidates: impl IntoIterator<Item = (T, &'a DescriptorPlatform)>,
    ) -> Option<(T, usize)> {
        let mut best: Option<(T, (usize, bool), usize)> = None;
        for (candidate, platform) in candidates {
            let Some(rank) = self.rank(platform) else { continue };
            let rank = (rank, platform.needs_features());
            best = Some(match best {
                Some((first, best_rank, count)) if best_rank <= rank => {
                    (first, best_rank, count + usize::from(best_rank == rank))
                }
                _ => (candidate, rank, 1),
            });
        }
        best.map(|(candidate, _, count)| (candidate, count))
    }

    /// The variant in numbers, as far as it has any: `v8.2` is `(8, 2)`.
    fn level(&self) -> Option<(usize, usize)> {
        let default = match self.architecture.as_str() {
            "amd64" => 1,
            "arm64" => 8,
            _ => 0,
        };
        if self.variant.is_empty() {
            return (default > 0).then_some((default, 0));
        }
        // A byte each: whatever an image says, no sum of these overflows.
        let number = |text: &str| text.parse::<u8>().ok().map(usize::from);
        let digits = self.variant.strip_prefix('v').unwrap_or(&self.variant);
        match digits.split_once('.') {
            Some((major, minor)) => Some((number(major)?, number(minor)?)),
            None => Some((number(digits)?, 0)),
        }
    }
}

/// How many whole steps `found` is below `wanted`, which counts down to `lowest`.
fn rank_below(wanted: (usize, usize), found: (usize, usize), lowest: (usize, usize)) -> Option<usize> {
    let are_whole = wanted.1 == 0 && found.1 == 0;
    (are_whole && lowest <= found && found <= wanted).then(|| wanted.0 - found.0)
}

/// v9.x runs v9.0 to v9.x and v8.0 to v8.(x+5); v8.x runs v8.0 to v8.x.
fn rank_arm64(wanted: (usize, usize), found: (usize, usize)) -> Option<usize> {
    match (wanted, found) {
        ((8, wanted), (8, found)) | ((9, wanted), (9, found)) => wanted.checked_sub(found),
        ((9, wanted), (8, found)) => Some(wanted + 1 + (wanted + ARM64_V9_KNOWS).checked_sub(found)?),
        _ => None,
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if self.variant.is_empty() { Ok(()) } else { write!(f, "/{}", self.variant) }
    }
}

/// A text is no platform.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no platform: expected os/architecture or os/architecture/variant, for instance linux/arm64")]
pub struct ParsePlatformError(String);

impl FromStr for Platform {
    type Err = ParsePlatformError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts: Vec<_> = text.split('/').collect();
        if parts.iter().any(|part| part.is_empty()) {
            return Err(ParsePlatformError(text.to_owned()));
        }
        match parts.as_slice() {
            [os, architecture] => Ok(Self::normalized(os, architecture, "")),
            [os, architecture, variant] => Ok(Self::normalized(os, architecture, variant)),
            _ => Err(ParsePlatformError(text.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> DescriptorPlatform {
        let mut words = text.split('/').map(|word| Some(word.to_owned()));
        let (os, architecture) = (words.next().flatten(), words.next().flatten());
        DescriptorPlatform { architecture, os, variant: words.next().flatten(), rest: BTreeMap::new() }
    }

    /// The platforms that containerd's `Only` accepts, best first, beside those that it never takes.
    #[test]
    fn an_image_is_chosen_as_containerd_chooses_it() {
        let check = |wanted: &str, accepted: &[&str], refused: &[&str]| {
            let platform: Platform = wanted.parse().unwrap();
            let ranks: Vec<_> = accepted.iter().map(|found| platform.rank(&said(found))).collect();
            assert!(ranks.is_sorted() && ranks.iter().all(Option::is_some), "{wanted}: {ranks:?}");
            for found in refused {
                assert_eq!(platform.rank(&said(found)), None, "{wanted}: {found}");
            }
            // Whatever the order of the index.
            let index: Vec<_> = refused.iter().chain(accepted.iter().rev()).map(|found| said(found)).collect();
            let chosen = platform.choose(index.iter().map(|found| (found, found)));
            assert_eq!(platform.rank(chosen.unwrap().0), platform.rank(&said(accepted[0])), "{wanted}");
        };
        check(
            "linux/amd64",
            &["linux/amd64", "linux/386"],
            &["linux/amd64/v2", "linux/amd64/v3", "linux/arm64", "windows/amd64", "linux/"],
        );
        check("linux/amd64", &["linux/amd64/v1", "linux/386"], &["linux/amd64/v2"]);
        check("linux/amd64/v3", &["linux/amd64/v3", "linux/amd64/v2", "linux/amd64", "linux/386"], &["linux/amd64/v4"]);
        check("linux/amd64/odd", &["linux/amd64/odd", "linux/386"], &["linux/amd64"]);
        check("linux/386", &["linux/386"], &["linux/amd64"]);
        check(
            "linux/arm",
            &["linux/arm", "linux/arm/v6", "linux/arm/v5"],
            &["linux/arm/v8", "linux/arm64", "linux/arm/v4"],
        );
        check("linux/arm/v6", &["linux/arm/v6", "linux/arm/v5"], &["linux/arm/v7", "linux/arm"]);
        check("linux/arm/v5", &["linux/arm/v5"], &["linux/arm/v6", "linux/arm/v7"]);
        check(
            "linux/arm64",
            &["linux/arm64/v8", "linux/arm/v8", "linux/arm/v7", "linux/arm/v6", "linux/arm/v5"],
            &["linux/arm64/v8.1", "linux/arm64/v9", "linux/amd64"],
        );
        check(
            "linux/arm64/v8.2",
            &["linux/arm64/v8.2", "linux/arm64/v8.1", "linux/arm64", "linux/arm"],
            &["linux/arm64/v8.3"],
        );
        check(
            "linux/arm64/v9.1",
            &[
                "linux/arm64/v9.1",
                "linux/arm64/v9",
                "linux/arm64/v8.6",
                "linux/arm64/v8.5",
                "linux/arm64",
                "linux/arm/v8",
            ],
            &["linux/arm64/v9.2", "linux/arm64/v8.7"],
        );
        check("linux/riscv64", &["linux/riscv64"], &["linux/riscv64/rva23u64"]);
        check("windows/amd64", &["windows/amd64"], &["linux/amd64"]);
    }

    #[test]
    fn many_words_mean_one_platform() {
        let check = |text: &str, expected: &str| {
            let platform: Platform = text.parse().unwrap();
            assert_eq!(platform.to_string(), expected);
            assert_eq!(platform.rank(&said(text)), Some(0));
            assert_eq!(expected.parse(), Ok(platform));
        };
        check("Linux/AMD64", "linux/amd64");
        check("linux/x86_64", "linux/amd64");
        check("linux/x86-64/v1", "linux/amd64");
        check("linux/amd64/V2", "linux/amd64/v2");
        check("linux/i386", "linux/386");
        check("linux/aarch64", "linux/arm64");
        check("linux/arm64/8", "linux/arm64");
        check("linux/arm64/v8", "linux/arm64");
        check("linux/arm", "linux/arm/v7");
        check("linux/armhf", "linux/arm/v7");
        check("linux/armel", "linux/arm/v6");
        check("linux/arm/6", "linux/arm/v6");
        check("macOS/arm64", "darwin/arm64");
        for text in ["", "linux", "linux/", "linux/arm/v7/x"] {
            assert!(text.parse::<Platform>().is_err(), "{text}");
        }
    }

    #[test]
    fn an_image_that_needs_nothing_comes_before_one_that_needs_features() {
        let platform: Platform = "windows/amd64".parse().unwrap();
        let mut needs = said("windows/amd64");
        needs.rest.insert("os.features".to_owned(), serde_json::json!(["win32k"]));
        let plain = said("windows/amd64");
        assert_eq!(platform.choose([(0, &needs), (1, &plain), (2, &plain)]), Some((1, 2)));
        assert_eq!(platform.choose([(0, &needs)]), Some((0, 1)));
        assert_eq!(platform.choose([(0, &said("linux/amd64"))]), None);
    }

    #[test]
    fn a_config_is_held_against_system_and_architecture_alone() {
        let check = |wanted: &str, found: &str, expected: bool| {
            assert_eq!(wanted.parse::<Platform>().unwrap().runs(&said(found)), expected, "{wanted} {found}");
        };
        check("linux/arm/v6", "linux/arm", true);
        check("linux/amd64/v2", "linux/amd64", true);
        check("linux/amd64", "linux/386", true);
        check("linux/amd64", "linux/arm64", false);
        check("linux/amd64", "windows/amd64", false);
        check("linux/386", "linux/amd64", false);
    }
}

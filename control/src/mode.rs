//! Which of the two modes trees are mounted in, as a program is asked for it.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// The mode that a program is asked to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Kernel mode where it works, else portable mode.
    #[default]
    Auto,
    /// Kernel mode or nothing.
    Erofs,
    /// Portable mode.
    Fuse,
}

/// A word that is no [`Mode`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no mode: give auto, erofs or fuse")]
pub struct UnknownMode(String);

impl FromStr for Mode {
    type Err = UnknownMode;

    fn from_str(word: &str) -> Result<Self, UnknownMode> {
        match word {
            "auto" => Ok(Self::Auto),
            "erofs" => Ok(Self::Erofs),
            "fuse" => Ok(Self::Fuse),
            _ => Err(UnknownMode(word.to_owned())),
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Erofs => "erofs",
            Self::Fuse => "fuse",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mode_is_known_by_its_word() {
        for mode in [Mode::Auto, Mode::Erofs, Mode::Fuse] {
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
        assert_eq!("EROFS".parse::<Mode>(), Err(UnknownMode("EROFS".to_owned())));
    }
}

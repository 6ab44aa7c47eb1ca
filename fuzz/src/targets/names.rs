//! Short texts that name things: image references, locations, platforms, digests.

use std::{fmt::Display, str::FromStr};

use converter::image::{
    location::Location,
    platform::{DescriptorPlatform, Platform},
};
use format_spec::Digest;
use registry::Reference;

use super::{choose, one_line, text};

/// First byte: what the rest is taken for.
pub(crate) fn run(data: &[u8]) {
    let Some((kind, rest)) = choose(data, 4) else { return };
    let text = text(rest);
    match kind {
        0 => {
            let Some(reference) = round_trip::<Reference>(&text) else { return };
            let digest = Digest::of(rest);
            let pinned = reference.with_digest(digest);
            assert_eq!(pinned.to_string().parse(), Ok(pinned.clone()));
            assert_eq!(pinned.digest(), Some(&digest));
        }
        1 => _ = round_trip::<Location>(&text),
        2 => {
            if let Some(platform) = round_trip::<Platform>(&text) {
                let shown = platform.to_string();
                let mut words = shown.split('/').map(str::to_owned);
                let (os, architecture, variant) = (words.next(), words.next(), words.next());
                let said = DescriptorPlatform { os, architecture, variant, ..Default::default() };
                assert_eq!(platform.rank(&said), Some(0), "a platform runs its own images");
            }
        }
        _ => {
            if let Some(digest) = round_trip::<Digest>(&text) {
                assert_eq!(digest.to_string(), text, "a digest has one form");
            }
        }
    }
}

/// What is shown of a value names the same value.
fn round_trip<T: FromStr + Display + PartialEq>(text: &str) -> Option<T>
where
    T::Err: Display,
{
    match text.parse::<T>() {
        Ok(value) => {
            let shown = value.to_string();
            assert!(shown.parse::<T>().is_ok_and(|again| again == value), "{text:?} is shown as {shown:?}");
            Some(value)
        }
        Err(error) => {
            one_line(&error);
            None
        }
    }
}

//! What a registry answers, and the files that say how to speak to it.

use std::path::Path;

use registry::fuzzing as parse;

use super::{choose, text};

/// First byte: what the rest is taken for.
pub(crate) fn run(data: &[u8]) {
    let Some((kind, rest)) = choose(data, 10) else { return };
    let text = text(rest);
    match kind {
        0 => _ = parse::challenge(&rest.split(|byte| *byte == b'\n').collect::<Vec<_>>()),
        1 => _ = parse::token(rest),
        2 => {
            if let Some((range, len)) = parse::content_range(&text) {
                assert!(range.start < range.end && len.is_none_or(|len| range.end <= len));
            }
        }
        3 => _ = parse::upload_range_end(&text),
        4 => {
            if let Err(reason) = parse::hosts_toml(&text, Path::new("/etc/hosts.d")) {
                assert!(!reason.contains('\n'), "{reason:?}");
            }
        }
        5 => {
            _ = parse::helper_answer(rest);
            if let Err(reason) = parse::docker_config(rest, "registry.example:5000") {
                assert!(!reason.contains('\n'), "{reason:?}");
            }
        }
        6 => {
            if let Ok(count) = parse::referrers(rest) {
                assert!(count <= rest.len());
            }
        }
        7 => {
            if let Some(link) = parse::next_link(&text) {
                assert!(text.contains(link));
            }
        }
        8 => _ = parse::retry_after(rest),
        _ => {
            let said = parse::refusal(rest);
            assert!(!said.contains(['\n', '\u{1b}', '\u{202e}']) && said.chars().count() <= 1000, "{said:?}");
            if let Err(reason) = parse::manifest_media_type(rest, "application/json") {
                assert!(!reason.contains('\n'), "{reason:?}");
            }
        }
    }
}

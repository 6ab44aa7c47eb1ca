//! Where a user keeps what can be made again. Source: XDG Base Directory Specification.

use std::{env, path::PathBuf};

/// `name` in the user's cache directory; `None` for a user who has none. Paths that are not absolute are as good as
/// none, or files would lie about in whatever directory the command was run.
pub(crate) fn cache(name: &str) -> Option<PathBuf> {
    let absolute = |variable: &str| env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    Some(base.join(name))
}

//! Which mode follows from what is asked for and what works here.

use control::{Mode, ModeStatus, TreeMode};

use crate::erofs_mount::MountError;

/// Decides; `probe` tries kernel mode and is only run where that matters.
///
/// # Errors
///
/// What `probe` found, where nothing but kernel mode is wanted.
pub(crate) fn choose(asked: Mode, probe: impl FnOnce() -> Result<(), MountError>) -> Result<ModeStatus, MountError> {
    let in_use = |in_use, reason: String| ModeStatus { in_use, reason };
    let by_request = || format!("--mode {asked}");
    match asked {
        Mode::Fuse => Ok(in_use(TreeMode::Fuse, by_request())),
        Mode::Erofs => match probe() {
            // The attempt writes a file. A daemon that cannot come back on a full disk leaves readers without one.
            Err(error) if error.is_disk_full() => {
                Ok(in_use(TreeMode::Erofs, format!("{}; not tried: {error}", by_request())))
            }
            tried => tried.map(|()| in_use(TreeMode::Erofs, by_request())),
        },
        Mode::Auto => Ok(match probe() {
            Ok(()) => in_use(TreeMode::Erofs, "the kernel mounts EROFS over files".to_owned()),
            Err(error) => in_use(TreeMode::Fuse, error.to_string()),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_takes_kernel_mode_where_it_works_and_says_why_it_does_not() {
        let chosen = |asked, probed: Result<(), MountError>| {
            choose(asked, || probed).map(|status| (status.in_use, status.reason)).map_err(|error| error.to_string())
        };
        let refusal = || MountError::Unsupported("this kernel has no EROFS");
        let line = refusal().to_string();
        assert_eq!(chosen(Mode::Auto, Ok(())).unwrap().0, TreeMode::Erofs);
        assert_eq!(chosen(Mode::Auto, Err(refusal())), Ok((TreeMode::Fuse, line.clone())));
        assert_eq!(chosen(Mode::Erofs, Err(refusal())), Err(line));
        assert_eq!(chosen(Mode::Fuse, Err(refusal())), Ok((TreeMode::Fuse, "--mode fuse".to_owned())));
    }

    #[test]
    fn a_full_disk_keeps_no_daemon_from_coming_back_in_the_mode_that_was_asked_for() {
        let full = || MountError::File { path: "probe".into(), error: std::io::ErrorKind::StorageFull.into() };
        let status = choose(Mode::Erofs, || Err(full())).unwrap();
        assert_eq!(status.in_use, TreeMode::Erofs);
        assert_eq!(status.reason, format!("--mode erofs; not tried: {}", full()));
        assert_eq!(choose(Mode::Auto, || Err(full())).unwrap().in_use, TreeMode::Fuse);
    }
}

//! The command's output, where nobody may listen: a closed pipe or a full disk is no reason to panic.
//!
//! The macros take the place of those of the standard library in this program.

use std::{
    fmt::Arguments,
    io::Write,
    sync::atomic::{AtomicBool, Ordering},
};

/// Whether something that was meant for standard output is lost.
static HAS_FAILED: AtomicBool = AtomicBool::new(false);

/// To standard output, which is what the command is for: what cannot be written ends it as an error.
pub(crate) fn result(text: Arguments<'_>) {
    let mut output = std::io::stdout().lock();
    if output.write_fmt(text).and_then(|()| output.flush()).is_err() {
        HAS_FAILED.store(true, Ordering::Relaxed);
    }
}

/// To standard error, where progress is told: what nobody reads is no error.
pub(crate) fn remark(text: Arguments<'_>) {
    let _ = std::io::stderr().lock().write_fmt(text);
}

/// Whether a result could not be written.
pub(crate) fn has_failed() -> bool {
    HAS_FAILED.load(Ordering::Relaxed)
}

/// The line for an error: what it happened to in front, unless the error names it.
pub(crate) fn fail_with(named: &str, error: &dyn std::error::Error) -> String {
    let message = error.to_string();
    if message.contains(named) { message } else { format!("{named}: {message}") }
}

macro_rules! print {
    ($($text:tt)*) => { $crate::output::result(format_args!($($text)*)) };
}

macro_rules! println {
    ($($text:tt)*) => { $crate::output::result(format_args!("{}\n", format_args!($($text)*))) };
}

macro_rules! eprintln {
    ($($text:tt)*) => { $crate::output::remark(format_args!("{}\n", format_args!($($text)*))) };
}

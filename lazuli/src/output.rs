//! The command's output, where nobody may listen: a closed pipe or a full disk is no reason to panic.
//!
//! The macros take the place of those of the standard library in this program.

use std::{
    borrow::Cow,
    fmt::Arguments,
    io::Write,
    sync::atomic::{AtomicBool, Ordering},
};

/// Whether something that was meant for standard output is lost.
static HAS_FAILED: AtomicBool = AtomicBool::new(false);

/// To standard output, which is what the command is for: what cannot be written ends it as an error.
pub(crate) fn result(text: Arguments<'_>) {
    let mut output = std::io::stdout().lock();
    if output.write_all(harmless(text).as_bytes()).and_then(|()| output.flush()).is_err() {
        HAS_FAILED.store(true, Ordering::Relaxed);
    }
}

/// To standard error, where progress is told: what nobody reads is no error.
pub(crate) fn remark(text: Arguments<'_>) {
    let _ = std::io::stderr().lock().write_all(harmless(text).as_bytes());
}

/// Words of an image, a registry or a node as they can be shown within a line: they command no terminal and begin no line
/// of their own.
pub(crate) fn shown(text: &str) -> Cow<'_, str> {
    escaped(text.into(), is_command)
}

/// A text of several lines, which may be JSON, as it can be shown: the net below [`shown`].
fn harmless(text: Arguments<'_>) -> Cow<'static, str> {
    escaped(text.to_string().into(), |letter| is_command(letter) && !matches!(letter, '\n' | '\t'))
}

/// Whether a terminal does something at a character, or shows others elsewhere because of it (Unicode Standard Annex 9).
fn is_command(letter: char) -> bool {
    let turns =
        matches!(letter, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    letter.is_control() || turns
}

/// Writes these characters as JSON does.
fn escaped(text: Cow<'_, str>, is_escaped: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&is_escaped) {
        return text;
    }
    let letter = |letter: char| match letter {
        '\n' if is_escaped(letter) => "\\n".to_owned(),
        _ if is_escaped(letter) => format!("\\u{:04x}", u32::from(letter)),
        _ => letter.to_string(),
    };
    text.chars().map(letter).collect::<String>().into()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_others_command_no_terminal_and_begin_no_line() {
        assert_eq!(shown("host/app:1 \u{fc}\\"), "host/app:1 \u{fc}\\");
        assert_eq!(shown("a\u{1b}[2J\nb\u{9b}\u{202e}\u{7f}"), r"a\u001b[2J\nb\u009b\u202e\u007f");
    }

    #[test]
    fn json_says_the_same_whatever_it_is_shown_on() {
        let text = serde_json::to_string_pretty(&["a\u{1b}[2J\nb\u{9b}\u{202e}\u{7f}", "c"]).unwrap();
        let harmless = harmless(format_args!("{text}\n"));
        assert!(harmless.lines().count() == 4 && !harmless.contains(['\u{9b}', '\u{202e}', '\u{7f}']), "{harmless:?}");
        let [one, other]: [serde_json::Value; 2] = [&text, &*harmless].map(|text| serde_json::from_str(text).unwrap());
        assert_eq!(one, other);
    }
}

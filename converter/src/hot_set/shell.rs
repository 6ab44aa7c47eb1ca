//! Shell commands and scripts, read roughly: which programs and files do their words name?
//!
//! No shell is run. Conditions and loops are taken as if every command in them ran once; words that only
//! a shell could know are left alone. What does not name a file of the image means nothing.

use format_spec::records::hot_reason;

use super::{
    Search,
    files::join,
    program::{self, Command},
};

/// Names of programs that understand shell scripts.
const SHELLS: [&[u8]; 7] = [b"sh", b"bash", b"dash", b"ash", b"zsh", b"ksh", b"mksh"];
/// Longest script that is read.
const SCRIPT_LEN_MAX: u64 = 256 << 10;
/// Words before the one that names a program.
const PREFIXES: [&[u8]; 17] = [
    b"exec", b"command", b"builtin", b"eval", b"time", b"if", b"then", b"else", b"elif", b"do", b"while", b"until",
    b"!", b"{", b"nohup", b"trap", b"case",
];

/// Commands that shells run themselves, although there are programs of the same names.
const BUILT_IN: [&[u8]; 12] =
    [b"[", b"[[", b"test", b"echo", b"printf", b"true", b"false", b"pwd", b"kill", b"set", b"export", b":"];
/// Most words of a command.
const WORD_COUNT_MAX: usize = 1000;
/// Longest word after variables are put in.
const WORD_LEN_MAX: usize = 64 << 10;

/// Whether a program of this name is a shell.
pub(super) fn is_shell(name: &[u8]) -> bool {
    SHELLS.contains(&name)
}

/// Adds what a shell with these arguments runs: `-c TEXT`, or a script.
pub(super) fn run(search: &mut Search<'_>, command: &Command) {
    let arguments = command.arguments();
    let options = arguments.iter().take_while(|word| word.starts_with(b"-") && word.as_slice() != b"--");
    let is_text = options.clone().any(|word| !word.starts_with(b"--") && word.contains(&b'c'));
    let rest = arguments.get(options.count()..).unwrap_or_default();
    let rest = if rest.first().is_some_and(|word| word == b"--") { &rest[1..] } else { rest };
    let Some(first) = rest.first() else { return };
    if is_text {
        // The word behind the text is $0.
        run_text(search, command, first, rest.get(2..).unwrap_or_default());
    } else {
        let path = join(&command.directory, first);
        run_file(search, command, &path, &rest[1..]);
    }
}

fn run_file(search: &mut Search<'_>, command: &Command, path: &[u8], arguments: &[Vec<u8>]) {
    if let Some(text) = search.add_and_read(path, SCRIPT_LEN_MAX, hot_reason::COMMAND) {
        run_text(search, command, &text, arguments);
    }
}

/// Adds what the commands of a script run; then the script's arguments, which it mostly is a wrapper for.
fn run_text(search: &mut Search<'_>, command: &Command, text: &[u8], arguments: &[Vec<u8>]) {
    let mut inner = command.inner(Vec::new(), hot_reason::COMMAND);
    for words in commands(text) {
        let words: Vec<Vec<u8>> =
            words.into_iter().flat_map(|word| expand(search, word, arguments)).take(WORD_COUNT_MAX).collect();
        let words: Vec<Vec<u8>> = words.into_iter().skip_while(is_prefix).collect();
        match words.first().map(Vec::as_slice) {
            None => {}
            Some(name) if BUILT_IN.contains(&name) => {}
            Some(b"cd") => {
                if let Some(directory) = words.get(1) {
                    inner.directory = join(&inner.directory, directory);
                }
            }
            Some(b"." | b"source") if inner.depth < 4 => {
                if let Some(file) = words.get(1) {
                    let path = join(&inner.directory, file);
                    run_file(search, &inner, &path, &words[2..]);
                }
            }
            Some(_) => {
                let runs = Command { argv: words, ..inner.clone() };
                program::run(search, &runs);
            }
        }
    }
    program::run_arguments(search, &inner, arguments);
}

/// Whether a word stands before the program: a reserved word or `NAME=value`.
fn is_prefix(word: &Vec<u8>) -> bool {
    let is_name =
        |name: &[u8]| !name.is_empty() && name.iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'_');
    let equals = word.iter().position(|byte| *byte == b'=');
    PREFIXES.contains(&word.as_slice()) || equals.is_some_and(|equals| is_name(&word[..equals]))
}

/// Replaces `$NAME` and `${NAME}` from the image's environment; `$@` alone becomes the script's arguments.
fn expand(search: &Search<'_>, word: Vec<u8>, arguments: &[Vec<u8>]) -> Vec<Vec<u8>> {
    if word == b"$@" || word == b"$*" {
        return arguments.to_vec();
    }
    if !word.contains(&b'$') {
        return vec![word];
    }
    let mut expanded = Vec::new();
    let mut rest = word.as_slice();
    while let Some(dollar) = rest.iter().position(|byte| *byte == b'$').filter(|_| expanded.len() < WORD_LEN_MAX) {
        expanded.extend_from_slice(&rest[..dollar]);
        rest = &rest[dollar + 1..];
        let is_braced = rest.first() == Some(&b'{');
        let name = if is_braced { &rest[1..] } else { rest };
        let len = name.iter().take_while(|byte| byte.is_ascii_alphanumeric() || **byte == b'_').count();
        let value = std::str::from_utf8(&name[..len]).ok().and_then(|name| search.config.variable(name));
        expanded.extend_from_slice(value.unwrap_or_default());
        rest = &name[len..];
        if is_braced {
            let end = rest.iter().position(|byte| *byte == b'}').map_or(rest.len(), |end| end + 1);
            rest = &rest[end..];
        }
    }
    expanded.extend_from_slice(rest);
    vec![expanded]
}

/// The words of each simple command of a script, quotes removed.
fn commands(text: &[u8]) -> Vec<Vec<Vec<u8>>> {
    let mut commands = Vec::new();
    let mut words = Vec::new();
    let mut word: Option<Vec<u8>> = None;
    let mut quote = None;
    let mut bytes = text.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        match (quote, byte) {
            (Some(end), _) if byte == end => quote = None,
            (Some(b'"') | None, b'\\') => {
                // A line that goes on, or a byte taken as it is.
                if let Some(next) = bytes.next().filter(|next| *next != b'\n') {
                    word.get_or_insert_default().push(next);
                }
            }
            (Some(b'\''), _) => word.get_or_insert_default().push(byte),
            (_, b'`') => end_command(&mut commands, &mut words, &mut word),
            (_, b'$') if bytes.peek() == Some(&b'(') => {
                bytes.next();
                end_command(&mut commands, &mut words, &mut word);
                quote = None;
            }
            (Some(_), _) => word.get_or_insert_default().push(byte),
            (None, b'\'' | b'"') => {
                quote = Some(byte);
                word.get_or_insert_default();
            }
            (None, b'#') if word.is_none() => while bytes.next_if(|next| *next != b'\n').is_some() {},
            (None, b';' | b'&' | b'|' | b'\n' | b'(' | b')') => end_command(&mut commands, &mut words, &mut word),
            (None, b' ' | b'\t' | b'\r' | b'<' | b'>') => words.extend(word.take()),
            (None, _) => word.get_or_insert_default().push(byte),
        }
    }
    end_command(&mut commands, &mut words, &mut word);
    commands
}

fn end_command(commands: &mut Vec<Vec<Vec<u8>>>, words: &mut Vec<Vec<u8>>, word: &mut Option<Vec<u8>>) {
    words.extend(word.take());
    if !words.is_empty() {
        commands.push(std::mem::take(words));
    }
}

//! The modules that a JavaScript source loads by a literal name.
//!
//! Finds `require("x")`, `import … from "x"`, `import "x"` and `export … from "x"` anywhere in the code:
//! bundles and lazy loaders call `require` inside functions that a start runs, and to tell these from others
//! is not possible by looking. `import("x")` is left out, as are comments and strings.

/// Most requests of one source.
const REQUEST_COUNT_MAX: usize = 10_000;
/// Longest specifier.
const SPECIFIER_LEN_MAX: usize = 1024;

/// A module that a source asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Request {
    /// What stands between the quotes.
    pub(super) specifier: Vec<u8>,
    /// Whether this is an `import` or `export`, for which packages may have another file.
    pub(super) is_import: bool,
}

/// What came before, as far as it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Other,
    /// Behind the word `require`, and behind its parenthesis.
    Require,
    RequireCall,
    /// Behind `import` or `export`, before a string or `from`.
    Import,
    From,
}

/// The requests of a source, in order.
pub(super) fn requests(source: &[u8]) -> Vec<Request> {
    let mut requests = Vec::new();
    let mut state = State::Other;
    let mut place = 0;
    while let Some(byte) = source.get(place) {
        let rest = &source[place..];
        match byte {
            _ if byte.is_ascii_whitespace() => place += 1,
            b'/' if rest.starts_with(b"//") => place += line_len(rest),
            b'/' if rest.starts_with(b"/*") => place += block_len(rest),
            b'"' | b'\'' | b'`' => {
                let (text, len) = read_text(rest);
                let is_import = matches!(state, State::Import | State::From);
                let is_closed = state != State::RequireCall || is_closed(&rest[len..]);
                let is_wanted = is_import || state == State::RequireCall;
                if is_wanted && is_closed && !text.is_empty() && text.len() <= SPECIFIER_LEN_MAX && *byte != b'`' {
                    requests.push(Request { specifier: text.to_vec(), is_import });
                    if requests.len() >= REQUEST_COUNT_MAX {
                        return requests;
                    }
                }
                state = State::Other;
                place += len;
            }
            _ if is_word(*byte) => {
                let len = rest.iter().take_while(|byte| is_word(**byte)).count();
                let is_member = place > 0 && source[place - 1] == b'.';
                state = match &rest[..len] {
                    _ if is_member => State::Other,
                    b"require" => State::Require,
                    b"import" | b"export" => State::Import,
                    b"from" if state == State::Import => State::From,
                    // Names and declarations before `from`.
                    _ if state == State::Import => State::Import,
                    _ => State::Other,
                };
                place += len;
            }
            _ => {
                state = match (state, byte) {
                    (State::Require, b'(') => State::RequireCall,
                    (State::Import, b'{' | b'}' | b',' | b'*') => State::Import,
                    _ => State::Other,
                };
                place += 1;
            }
        }
    }
    requests
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'$') || byte >= 0x80
}

fn is_closed(rest: &[u8]) -> bool {
    rest.trim_ascii_start().first() == Some(&b')')
}

fn line_len(rest: &[u8]) -> usize {
    rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len())
}

fn block_len(rest: &[u8]) -> usize {
    rest.windows(2).skip(2).position(|pair| pair == b"*/").map_or(rest.len(), |end| end + 4)
}

/// The text of a string and its length with the quotes. One in `"` or `'` ends with its line at the latest,
/// so that a quote in a regular expression does no harm beyond.
fn read_text(rest: &[u8]) -> (&[u8], usize) {
    let quote = rest[0];
    let mut end = 1;
    while let Some(byte) = rest.get(end) {
        match byte {
            b'\\' => end += 1,
            b'\n' if quote != b'`' => return (&[], end),
            _ if *byte == quote => return (&rest[1..end], end + 1),
            _ => {}
        }
        end += 1;
    }
    (&[], rest.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn specifiers(source: &str) -> Vec<String> {
        let shown = |request: Request| {
            let kind = if request.is_import { "import" } else { "require" };
            format!("{kind} {}", String::from_utf8(request.specifier).unwrap())
        };
        requests(source.as_bytes()).into_iter().map(shown).collect()
    }

    #[test]
    fn every_form_with_a_literal_name_is_found() {
        let source = "const a = require('a'), b = require( \"./b.json\" ).c;\nfunction f() { return require('d') }\n\
            import e from 'e';\nimport * as g from \"g\";\nimport { h, i as j } from './h.js'\nimport 'k';\n\
            export * from 'l';\nexport { m } from 'm';import n,{o}from'n';";
        let expected = [
            "require a",
            "require ./b.json",
            "require d",
            "import e",
            "import g",
            "import ./h.js",
            "import k",
            "import l",
            "import m",
            "import n",
        ];
        assert_eq!(specifiers(source), expected);
    }

    #[test]
    fn what_is_no_request_is_left_out() {
        let source = "// require('a')\n/* import 'b' */ /** @type {import('c')} */\nx = \"require('d')\";\n\
            require('e' + f); require(g); h.require('i'); import('j'); export const k = 'l'; `require('m')`;\n\
            import.meta.url; z = /['\"]/;\nrequire('n');";
        assert_eq!(specifiers(source), ["require n"]);
    }

    #[test]
    fn whatever_the_text_it_ends() {
        for source in ["/*", "'", "\"\\", "`", "require(", "require('", "import", "import {", "\u{e9}"] {
            requests(source.as_bytes());
        }
    }
}

//! Filters of a list request: which snapshots does the caller want?
//!
//! The syntax is containerd's: a *filter* is a comma-separated list of *selectors* that must all hold;
//! of several filters one must hold. A selector is a field path alone (the field is there) or a field
//! path, an operator (`==`, `!=`, `~=`) and a value: `labels."a.b"==c,kind~=active|view`.
//!
//! Source: containerd, `pkg/filters`; `tests/conformance` compares with it.

use std::{iter::Peekable, str::CharIndices};

use regex::Regex;

/// What a filter can look at.
pub trait Fields {
    /// The value of a field, `None` when it is not there.
    fn field(&self, path: &[String]) -> Option<&str>;
}

/// Any number of filters, of which one must hold; no filter at all holds for everything.
#[derive(Debug, Clone, Default)]
pub struct Filters(Vec<Vec<Selector>>);

#[derive(Debug, Clone)]
struct Selector {
    path: Vec<String>,
    condition: Condition,
}

#[derive(Debug, Clone)]
enum Condition {
    Present,
    Equal(String),
    NotEqual(String),
    Matches(Regex),
    Never,
}

/// What a value can stand in: the first always, the others after `~=`.
const QUOTES: [char; 3] = ['"', '/', '|'];

/// A text is no filter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("filter {filter:?}, offset {offset}: {problem}")]
pub struct FilterError {
    filter: String,
    offset: usize,
    problem: String,
}

impl Filters {
    /// Parses filters; an empty one holds for everything.
    ///
    /// # Errors
    ///
    /// When a filter does not follow the syntax.
    pub fn parse<T: AsRef<str>>(filters: &[T]) -> Result<Self, FilterError> {
        filters.iter().map(|filter| Parser::new(filter.as_ref()).selectors()).collect::<Result<_, _>>().map(Self)
    }

    /// Whether one of the filters holds for `fields`.
    pub fn matches(&self, fields: &impl Fields) -> bool {
        self.0.is_empty() || self.0.iter().any(|selectors| selectors.iter().all(|selector| selector.matches(fields)))
    }
}

impl Selector {
    fn matches(&self, fields: &impl Fields) -> bool {
        let value = fields.field(&self.path);
        match &self.condition {
            Condition::Present => value.is_some(),
            Condition::Equal(expected) => value == Some(expected),
            // As in containerd, a field that is not there counts as an empty one here.
            Condition::NotEqual(unexpected) => value.unwrap_or_default() != unexpected,
            Condition::Matches(pattern) => pattern.is_match(value.unwrap_or_default()),
            Condition::Never => false,
        }
    }
}

struct Parser<'a> {
    filter: &'a str,
    rest: Peekable<CharIndices<'a>>,
}

/// White space may stand before a field, an operator and a value, and nowhere else: so containerd has it.
impl<'a> Parser<'a> {
    fn new(filter: &'a str) -> Self {
        Self { filter, rest: filter.char_indices().peekable() }
    }

    fn selectors(mut self) -> Result<Vec<Selector>, FilterError> {
        let mut selectors = Vec::new();
        if self.filter.is_empty() {
            return Ok(selectors);
        }
        loop {
            selectors.push(self.selector()?);
            match self.peek() {
                None => return Ok(selectors),
                Some(',') => _ = self.rest.next(),
                Some(other) => return self.refuse(format!("unexpected {other:?}")),
            }
        }
    }

    fn selector(&mut self) -> Result<Selector, FilterError> {
        let path = self.path()?;
        if matches!(self.peek(), None | Some(',')) {
            return Ok(Selector { path, condition: Condition::Present });
        }
        self.skip_whitespace();
        let operator = self.take_while(is_operator);
        let condition = match operator.as_str() {
            "==" => Condition::Equal(self.value(&['"'])?),
            "!=" => Condition::NotEqual(self.value(&['"'])?),
            // containerd takes what does not compile, and it matches nothing.
            "~=" => Regex::new(&self.value(&QUOTES)?).map_or(Condition::Never, Condition::Matches),
            _ => return self.refuse(r#"expected an operator: "==", "!=" or "~=""#),
        };
        Ok(Selector { path, condition })
    }

    fn path(&mut self) -> Result<Vec<String>, FilterError> {
        let mut path = vec![self.field()?];
        while self.peek() == Some('.') {
            self.rest.next();
            path.push(self.field()?);
        }
        Ok(path)
    }

    fn field(&mut self) -> Result<String, FilterError> {
        self.skip_whitespace();
        if self.peek() == Some('"') {
            return self.quoted('"');
        }
        let field = self.take_while(|next| next.is_ascii_alphanumeric() || next == '_');
        if field.is_empty() { self.refuse("expected a field name") } else { Ok(field) }
    }

    /// A value, in one of the `quotes` or in none.
    fn value(&mut self, quotes: &[char]) -> Result<String, FilterError> {
        self.skip_whitespace();
        match self.peek() {
            Some(quote) if quotes.contains(&quote) => self.quoted(quote),
            Some(quote) if QUOTES.contains(&quote) => self.refuse(format!("only ~= takes a value in {quote}")),
            Some(first) if !matches!(first, ',' | '.') && !is_operator(first) => {
                Ok(self.take_while(|next| next != ',' && !next.is_whitespace() && !next.is_control()))
            }
            _ => self.refuse("expected a value"),
        }
    }

    /// A Go string literal, whatever its quote.
    fn quoted(&mut self, quote: char) -> Result<String, FilterError> {
        self.rest.next();
        // An escape may stand for a part of a character.
        let mut bytes = Vec::new();
        loop {
            match self.rest.next() {
                None | Some((_, '\n')) => return self.refuse("the quote has no end"),
                Some((_, next)) if next == quote => return Ok(String::from_utf8_lossy(&bytes).into_owned()),
                Some((_, '\\')) => self.escaped(quote, &mut bytes)?,
                Some((_, next)) => bytes.extend(next.encode_utf8(&mut [0; 4]).bytes()),
            }
        }
    }

    /// What follows a backslash.
    fn escaped(&mut self, quote: char, bytes: &mut Vec<u8>) -> Result<(), FilterError> {
        let Some((_, kind)) = self.rest.next() else { return self.refuse("the quote has no end") };
        let byte = match kind {
            'a' => 0x07,
            'b' => 0x08,
            'f' => 0x0c,
            'n' => b'\n',
            'r' => b'\r',
            't' => b'\t',
            'v' => 0x0b,
            '\\' => b'\\',
            // The quotes are ASCII.
            _ if kind == quote => u8::try_from(quote).unwrap_or_default(),
            'x' => self.byte(String::new(), 2, 16)?,
            '0'..='7' => self.byte(kind.to_string(), 2, 8)?,
            'u' | 'U' => {
                let number = self.number(String::new(), if kind == 'u' { 4 } else { 8 }, 16)?;
                // As Go has it, half of a surrogate pair is no character but can be written.
                let replaced = (0xd800..0xe000).contains(&number).then_some(char::REPLACEMENT_CHARACTER);
                let Some(character) = replaced.or(char::from_u32(number)) else {
                    return self.refuse(format!("\\{kind} of no character"));
                };
                bytes.extend(character.encode_utf8(&mut [0; 4]).bytes());
                return Ok(());
            }
            _ => return self.refuse(format!("unknown escape \\{kind}")),
        };
        bytes.push(byte);
        Ok(())
    }

    fn byte(&mut self, digits: String, further: usize, radix: u32) -> Result<u8, FilterError> {
        let number = self.number(digits, further, radix)?;
        u8::try_from(number).or_else(|_| self.refuse("an escape of no byte"))
    }

    /// A number of these digits and `further` ones.
    fn number(&mut self, mut digits: String, further: usize, radix: u32) -> Result<u32, FilterError> {
        for _ in 0..further {
            match self.rest.next_if(|(_, next)| next.is_digit(radix)) {
                Some((_, digit)) => digits.push(digit),
                None => return self.refuse("an escape with too few digits"),
            }
        }
        u32::from_str_radix(&digits, radix).or_else(|_| self.refuse("an escape of no number"))
    }

    fn peek(&mut self) -> Option<char> {
        self.rest.peek().map(|(_, next)| *next)
    }

    fn skip_whitespace(&mut self) {
        while self.rest.next_if(|(_, next)| next.is_whitespace()).is_some() {}
    }

    fn take_while(&mut self, wanted: impl Fn(char) -> bool) -> String {
        std::iter::from_fn(|| self.rest.next_if(|(_, next)| wanted(*next)).map(|(_, next)| next)).collect()
    }

    fn refuse<T>(&mut self, problem: impl Into<String>) -> Result<T, FilterError> {
        let offset = self.rest.peek().map_or(self.filter.len(), |(offset, _)| *offset);
        Err(FilterError { filter: self.filter.to_owned(), offset, problem: problem.into() })
    }
}

fn is_operator(character: char) -> bool {
    matches!(character, '=' | '!' | '~')
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Snapshot;

    impl Fields for Snapshot {
        fn field(&self, path: &[String]) -> Option<&str> {
            let (first, rest) = path.split_first()?;
            match (first.as_str(), rest.join(".").as_str()) {
                ("name", "") => Some("default/7/sha256:ab"),
                ("parent", "") => Some(""),
                ("kind", "") => Some("committed"),
                ("labels", "containerd.io/snapshot.ref") => Some("sha256:ab"),
                ("labels", "plain") => Some("a b"),
                _ => None,
            }
        }
    }

    #[test]
    fn selects_as_containerd_does() {
        let cases: &[(&[&str], bool)] = &[
            (&[], true),
            (&[""], true),
            (&["name==default/7/sha256:ab"], true),
            (&["name==x"], false),
            (&["name!=x"], true),
            (&["kind==committed,name==x"], false),
            (&["name==x", "kind==committed"], true),
            (&[r#"labels."containerd.io/snapshot.ref"==sha256:ab,parent=="""#], true),
            (&[r#"labels."containerd.io/snapshot.ref"==sha256:ab,parent=="p""#], false),
            (&["labels.containerd"], false),
            (&["labels.plain"], true),
            (&[r#"labels.plain=="a b""#], true),
            (&[r#"labels.plain=="a\x20\u0062""#], true),
            (&["labels.missing!=x"], true),
            (&["labels.missing==x"], false),
            (&["kind~=^comm"], true),
            (&["kind~=/^(active|view)$/"], false),
            (&["kind~=|itt.d|, name"], true),
            (&[" kind == committed, name"], true),
            (&["kind~=("], false),
            (&[r"name~=/t\/\\d/"], true),
            (&[r#"labels.plain=="a\040b""#], true),
        ];
        for (filters, expected) in cases {
            assert_eq!(Filters::parse(filters).unwrap().matches(&Snapshot), *expected, "{filters:?}");
        }
    }

    #[test]
    fn refuses_what_is_no_filter() {
        for filter in [
            ",",
            "name==",
            "name=x",
            "name==a b",
            r#"name=="a"#,
            "name==/a/",
            "name==a,",
            ".a",
            "a.",
            r#""\q"==a"#,
            "a ,b",
        ] {
            assert!(Filters::parse(&[filter]).is_err(), "{filter}");
        }
    }

    #[test]
    fn error_names_the_place() {
        let error = Filters::parse(&["name=x"]).unwrap_err().to_string();
        assert_eq!(error, r#"filter "name=x", offset 5: expected an operator: "==", "!=" or "~=""#);
    }
}

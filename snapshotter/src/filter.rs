//! Filters of a list request: which snapshots does the caller want?
//!
//! The syntax is containerd's: a *filter* is a comma-separated list of *selectors* that must all hold;
//! of several filters one must hold. A selector is a field path alone (the field is there) or a field
//! path, an operator (`==`, `!=`, `~=`) and a value: `labels."a.b"==c,kind~=active|view`.
//!
//! Source: containerd, `pkg/filters`.

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
}

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
    /// When a filter does not follow the syntax or a regular expression does not compile.
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
        }
    }
}

struct Parser<'a> {
    filter: &'a str,
    rest: Peekable<CharIndices<'a>>,
}

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
            match self.next_visible() {
                None => return Ok(selectors),
                Some(',') => _ = self.rest.next(),
                Some(other) => return self.refuse(format!("unexpected {other:?}")),
            }
        }
    }

    fn selector(&mut self) -> Result<Selector, FilterError> {
        let path = self.path()?;
        let operator = match self.next_visible() {
            None | Some(',') => return Ok(Selector { path, condition: Condition::Present }),
            Some(_) => self.take_while(|next| matches!(next, '=' | '!' | '~')),
        };
        let condition = match operator.as_str() {
            "==" => Condition::Equal(self.value(&['"'])?),
            "!=" => Condition::NotEqual(self.value(&['"'])?),
            "~=" => {
                let pattern = self.value(&['"', '/', '|'])?;
                let pattern =
                    Regex::new(&pattern).or_else(|_| self.refuse(format!("{pattern:?} is no regular expression")));
                Condition::Matches(pattern?)
            }
            _ => return self.refuse(r#"expected an operator: "==", "!=" or "~=""#),
        };
        Ok(Selector { path, condition })
    }

    fn path(&mut self) -> Result<Vec<String>, FilterError> {
        let mut path = vec![self.field()?];
        while self.next_visible() == Some('.') {
            self.rest.next();
            path.push(self.field()?);
        }
        Ok(path)
    }

    fn field(&mut self) -> Result<String, FilterError> {
        if self.next_visible() == Some('"') {
            return self.quoted('"');
        }
        let field = self.take_while(|next| next.is_ascii_alphanumeric() || matches!(next, '_' | '-'));
        if field.is_empty() { self.refuse("expected a field name") } else { Ok(field) }
    }

    fn value(&mut self, quotes: &[char]) -> Result<String, FilterError> {
        if let Some(quote) = self.next_visible().filter(|next| quotes.contains(next)) {
            return self.quoted(quote);
        }
        let value = self.take_while(|next| next != ',' && !next.is_whitespace());
        if value.is_empty() { self.refuse("expected a value") } else { Ok(value) }
    }

    fn quoted(&mut self, quote: char) -> Result<String, FilterError> {
        self.rest.next();
        let mut text = String::new();
        loop {
            match self.rest.next() {
                None => return self.refuse("the quote has no end"),
                Some((_, next)) if next == quote => return Ok(text),
                // A regular expression between slashes or bars keeps its own escapes.
                Some((_, '\\')) if quote != '"' => match self.rest.next() {
                    Some((_, next)) if next == quote => text.push(quote),
                    Some((_, next)) => text.extend(['\\', next]),
                    None => return self.refuse("the quote has no end"),
                },
                Some((_, '\\')) => text.push(self.escaped()?),
                Some((_, next)) => text.push(next),
            }
        }
    }

    /// What follows a backslash in a Go string literal.
    fn escaped(&mut self) -> Result<char, FilterError> {
        let Some((_, kind)) = self.rest.next() else { return self.refuse("the quote has no end") };
        let digits = match kind {
            'a' => return Ok('\u{7}'),
            'b' => return Ok('\u{8}'),
            'f' => return Ok('\u{c}'),
            'n' => return Ok('\n'),
            'r' => return Ok('\r'),
            't' => return Ok('\t'),
            'v' => return Ok('\u{b}'),
            '\\' | '"' => return Ok(kind),
            'x' => 2,
            'u' => 4,
            'U' => 8,
            _ => return self.refuse(format!("unknown escape \\{kind}")),
        };
        let digits: String = self.rest.by_ref().take(digits).map(|(_, digit)| digit).collect();
        match u32::from_str_radix(&digits, 16).ok().and_then(char::from_u32) {
            Some(character) => Ok(character),
            None => self.refuse(format!("\\{kind}{digits} is no character")),
        }
    }

    /// The next character that is no white space, not taken.
    fn next_visible(&mut self) -> Option<char> {
        while self.rest.next_if(|(_, next)| next.is_whitespace()).is_some() {}
        self.rest.peek().map(|(_, next)| *next)
    }

    fn take_while(&mut self, wanted: impl Fn(char) -> bool) -> String {
        std::iter::from_fn(|| self.rest.next_if(|(_, next)| wanted(*next)).map(|(_, next)| next)).collect()
    }

    fn refuse<T>(&mut self, problem: impl Into<String>) -> Result<T, FilterError> {
        let offset = self.rest.peek().map_or(self.filter.len(), |(offset, _)| *offset);
        Err(FilterError { filter: self.filter.to_owned(), offset, problem: problem.into() })
    }
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
            (&[" kind == committed , name "], true),
        ];
        for (filters, expected) in cases {
            assert_eq!(Filters::parse(filters).unwrap().matches(&Snapshot), *expected, "{filters:?}");
        }
    }

    #[test]
    fn refuses_what_is_no_filter() {
        for filter in
            [",", "name==", "name=x", "name==a b", r#"name=="a"#, "kind~=(", "name==a,", ".a", "a.", r#""\q"==a"#]
        {
            assert!(Filters::parse(&[filter]).is_err(), "{filter}");
        }
    }

    #[test]
    fn error_names_the_place() {
        let error = Filters::parse(&["name=x"]).unwrap_err().to_string();
        assert_eq!(error, r#"filter "name=x", offset 5: expected an operator: "==", "!=" or "~=""#);
    }
}

//! The modules that a Python source imports when it is loaded.
//!
//! Reads the `import` statements of the module's own level: those inside functions run later or never, so
//! they are left out, as is what only type checkers see. Unlike Python this knows no syntax errors: text
//! that is no Python gives some names, which then mean no module.

/// Most names that the imports of one source have together: what stands behind them is not looked at.
const NAME_COUNT_MAX: usize = 10_000;
/// Names of functions whose first argument is the name of a module to import.
const IMPORT_FUNCTIONS: [&str; 2] = ["__import__", "import_module"];

/// A module that is imported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Import {
    /// Dots before the name: 0 for absolute names, 1 for those in the package itself.
    pub(super) level: usize,
    /// Name behind the dots, maybe empty.
    pub(super) module: String,
    /// Names taken from the module, which may be modules themselves.
    pub(super) names: Vec<String>,
}

/// Which statements count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    /// Those that run when the module is imported.
    Module,
    /// Also those in functions: a program calls its own.
    Program,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token<'s> {
    Word(&'s str),
    Text(&'s str),
    Mark(char),
}

/// The imports of a source, in order.
pub(super) fn imports(source: &str, scope: Scope) -> Vec<Import> {
    let (mut imports, mut name_count) = (Vec::new(), 0);
    // Indentation of the block that is left out now.
    let mut skipped: Option<usize> = None;
    for line in logical_lines(source) {
        if skipped.is_some_and(|indent| line.indent > indent) {
            continue;
        }
        skipped = is_left_out(&line.tokens, scope).then_some(line.indent);
        if skipped.is_some() {
            continue;
        }
        let is_start = |place: &usize| *place == 0 || matches!(line.tokens[place - 1], Token::Mark(';' | ':'));
        let starts = (0..line.tokens.len()).filter(is_start);
        let found = starts.flat_map(|start| statement(&line.tokens[start..]));
        for import in found.chain(calls(&line.tokens)) {
            name_count += 1 + import.names.len();
            if name_count > NAME_COUNT_MAX {
                return imports;
            }
            imports.push(import);
        }
    }
    imports
}

/// Whether the block that a line starts is left out.
fn is_left_out(tokens: &[Token<'_>], scope: Scope) -> bool {
    let word = |place: usize| match tokens.get(place) {
        Some(Token::Word(word)) => *word,
        _ => "",
    };
    match word(0) {
        "def" => scope == Scope::Module,
        "async" => scope == Scope::Module && word(1) == "def",
        "if" => tokens.iter().any(|token| matches!(token, Token::Word(word) if word.ends_with("TYPE_CHECKING"))),
        _ => false,
    }
}

/// The imports of the statement that starts here; the next one starts where it ends.
fn statement(tokens: &[Token<'_>]) -> Vec<Import> {
    let mut tokens = tokens.iter().copied().take_while(|token| !matches!(token, Token::Mark(';' | ':'))).peekable();
    match tokens.next() {
        Some(Token::Word("import")) => {
            let modules = listed_names(tokens);
            modules.into_iter().map(|module| Import { level: 0, module, names: Vec::new() }).collect()
        }
        Some(Token::Word("from")) => {
            let mut level = 0;
            while tokens.next_if_eq(&Token::Mark('.')).is_some() {
                level += 1;
            }
            let mut module = String::new();
            if let Some(Token::Word(name)) = tokens.next_if(|token| *token != Token::Word("import")) {
                module.push_str(name);
            }
            match tokens.next() {
                Some(Token::Word("import")) => {
                    vec![Import { level, module, names: listed_names(tokens) }]
                }
                _ => Vec::new(),
            }
        }
        _ => Vec::new(),
    }
}

/// The names of a list such as `a.b as c, (d, e)`, without those they are known by.
fn listed_names<'s>(tokens: impl Iterator<Item = Token<'s>>) -> Vec<String> {
    let mut names = Vec::new();
    let mut is_alias = false;
    for token in tokens {
        match token {
            _ if names.len() > NAME_COUNT_MAX => break,
            Token::Word("as") => is_alias = true,
            Token::Word(word) if !is_alias => names.push(word.to_owned()),
            Token::Mark(',') => is_alias = false,
            _ => {}
        }
    }
    names
}

/// Modules that are imported by a call with a literal name.
fn calls(tokens: &[Token<'_>]) -> impl Iterator<Item = Import> {
    tokens.windows(3).filter_map(|window| {
        let [Token::Word(function), Token::Mark('('), Token::Text(module)] = window else { return None };
        let is_import = IMPORT_FUNCTIONS.iter().any(|name| function.rsplit('.').next() == Some(name));
        let level = module.chars().take_while(|char| *char == '.').count();
        is_import.then(|| Import { level, module: module[level..].to_owned(), names: Vec::new() })
    })
}

struct Line<'s> {
    indent: usize,
    tokens: Vec<Token<'s>>,
}

/// Lines as Python counts them: brackets, backslashes and long strings join what newlines part.
fn logical_lines(source: &str) -> impl Iterator<Item = Line<'_>> {
    let mut rest = source;
    let lines = std::iter::from_fn(move || {
        let indent = rest.len() - rest.trim_start_matches([' ', '\t']).len();
        let mut tokens = Vec::new();
        (!rest.is_empty()).then(|| {
            rest = read_line(&rest[indent..], &mut tokens);
            Line { indent, tokens }
        })
    });
    lines.filter(|line| !line.tokens.is_empty())
}

/// Reads one logical line; returns what follows it.
fn read_line<'s>(mut rest: &'s str, tokens: &mut Vec<Token<'s>>) -> &'s str {
    let mut depth = 0_usize;
    while let Some(char) = rest.chars().next() {
        let behind = &rest[char.len_utf8()..];
        match char {
            '\n' if depth == 0 => return behind,
            '#' => rest = &rest[rest.find('\n').unwrap_or(rest.len())..],
            '\\' => rest = behind.strip_prefix("\r\n").or_else(|| behind.strip_prefix('\n')).unwrap_or(behind),
            '\'' | '"' => {
                let (text, behind) = read_text(rest, char);
                tokens.push(Token::Text(text));
                rest = behind;
            }
            _ if char.is_whitespace() => rest = behind,
            _ if is_word(char) => {
                // A name with the dots in it: `a.b`.
                let len = rest.find(|next: char| !is_word(next) && next != '.').unwrap_or(rest.len());
                tokens.push(Token::Word(&rest[..len]));
                rest = &rest[len..];
            }
            _ => {
                match char {
                    '(' | '[' | '{' => depth += 1,
                    ')' | ']' | '}' => depth = depth.saturating_sub(1),
                    _ => {}
                }
                tokens.push(Token::Mark(char));
                rest = behind;
            }
        }
    }
    rest
}

fn is_word(char: char) -> bool {
    char == '_' || char.is_alphanumeric()
}

/// Reads a string that starts with the mark `quote`: its text, and what follows it.
fn read_text(source: &str, quote: char) -> (&str, &str) {
    let long = match quote {
        '"' => "\"\"\"",
        _ => "'''",
    };
    let end = if source.starts_with(long) { long } else { &long[..1] };
    let text = &source[end.len()..];
    let mut place = 0;
    while place < text.len() {
        let rest = &text[place..];
        if let Some(behind) = rest.strip_prefix(end) {
            return (&text[..place], behind);
        }
        match rest.chars().next() {
            // A short string ends with its line, whatever is missing.
            Some('\n') if end.len() == 1 => return (&text[..place], rest),
            Some('\\') => place += 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            Some(char) => place += char.len_utf8(),
            None => break,
        }
    }
    (text, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(source: &str, scope: Scope) -> Vec<String> {
        let shown = |import: Import| {
            let dots = ".".repeat(import.level);
            let names = import.names.join(" ");
            format!("{dots}{} {names}", import.module).trim_end().to_owned()
        };
        imports(source, scope).into_iter().map(shown).collect()
    }

    #[test]
    fn every_form_of_the_statement_is_read() {
        let source = "import a\nimport b.c as d, e; import f\nfrom g import h as i, j\nfrom . import k\n\
            from ..l.m import (n, # comment\n    o as p,\n)\nfrom q import *\nfrom .r \\\n  import s\n\
            try: import t\nexcept ImportError: from u import v\n";
        let expected = ["a", "b.c", "e", "f", "g h j", ". k", "..l.m n o", "q", ".r s", "t", "u v"];
        assert_eq!(names(source, Scope::Module), expected);
    }

    #[test]
    fn functions_and_type_checking_are_left_out() {
        let source = "def f(\n  x,\n):\n    import a\n    if x:\n        import b\nimport c\nclass D:\n    import e\n\
            \x20   async def g(self): import h\n    import i\nif typing.TYPE_CHECKING:\n    import j\nelse:\n    import k\n";
        assert_eq!(names(source, Scope::Module), ["c", "e", "i", "k"]);
        assert_eq!(names(source, Scope::Program), ["a", "b", "c", "e", "h", "i", "k"]);
    }

    #[test]
    fn text_is_no_code() {
        let source = "\"\"\"\nimport a\n\"\"\"\nx = 'import b'\ny = '''\nimport c\n'''; import d\n# import e\nz = \"\\\"\"\nimport f";
        assert_eq!(names(source, Scope::Module), ["d", "f"]);
    }

    #[test]
    fn calls_with_a_literal_name_count() {
        let source = "a = __import__('b.c')\nimportlib.import_module(\"d\")\nimport_module(name)\n";
        assert_eq!(names(source, Scope::Module), ["b.c", "d"]);
    }

    /// Each statement of a line listed the names of all behind it: 54 KB of source took 3 GB.
    #[test]
    fn a_line_of_many_statements_gives_each_name_once() {
        let source = format!("x:{}", "import a:".repeat(3000));
        assert_eq!(imports(&source, Scope::Program).len(), 3000);
        let count = |source: &str| {
            let imports = imports(source, Scope::Program);
            imports.iter().map(|import| 1 + import.names.len()).sum::<usize>()
        };
        for source in
            ["import a;".repeat(50_000), format!("import {}", "a,".repeat(50_000)), "__import__('a')".repeat(50_000)]
        {
            assert_eq!(count(&source), NAME_COUNT_MAX);
        }
        assert_eq!(count(&format!("from a import {}", "b,".repeat(50_000))), 0);
    }

    #[test]
    fn whatever_the_text_it_ends() {
        for source in
            ["'''", "\"\\", "from", "from .", "import", "(((", "\\", "from . from", "import ,", "é = 'ü\\é'\nimport é"]
        {
            imports(source, Scope::Program);
        }
    }
}

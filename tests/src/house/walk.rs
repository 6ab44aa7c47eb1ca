//! Goes through the code of a scope: its functions, the modules that it uses, and how much of it is for tests alone.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use proc_macro2::{TokenStream, TokenTree};
use syn::{
    Block, ImplItem, ImplItemFn, Item, ItemFn, ItemMod, ItemUse, Signature, TraitItemFn, Visibility,
    spanned::Spanned,
    visit::{self, Visit},
};

use super::{
    exempt::is_test_only,
    scopes::{Scopes, attributes_and_name, imports_of},
};

/// A function with a body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    /// Where it is.
    pub file: PathBuf,
    /// The line of its `fn`, from 1.
    pub line: usize,
    /// Its name, without the type that it belongs to.
    pub name: String,
    /// Lines from that of `fn` to that of the closing brace.
    pub line_count: usize,
}

/// Found in one scope.
#[derive(Default)]
pub(super) struct Found {
    pub(super) functions: Vec<Function>,
    /// Lines of code for tests alone.
    pub(super) test_line_count: usize,
    /// The other files whose items are named.
    pub(super) uses: BTreeSet<PathBuf>,
}

/// Goes through all scopes; a file comes once for each scope in it.
pub(super) fn walk<'a>(scopes: &Scopes<'a>) -> impl Iterator<Item = (&'a Path, Found)> {
    scopes.iter().map(|(at, file, items)| {
        let mut walk = Walk { scopes, at, file, found: Found::default() };
        items.iter().for_each(|item| walk.visit_item(item));
        (file, walk.found)
    })
}

struct Walk<'a> {
    scopes: &'a Scopes<'a>,
    at: usize,
    file: &'a Path,
    found: Found,
}

impl Walk<'_> {
    fn add_function(&mut self, signature: &Signature, body: &Block) {
        let line = signature.fn_token.span().start().line;
        let line_count = body.brace_token.span.close().end().line + 1 - line;
        let name = signature.ident.to_string();
        self.found.functions.push(Function { file: self.file.to_owned(), line, name, line_count });
    }

    fn add_use(&mut self, file: &Path) {
        if file != self.file {
            self.found.uses.insert(file.to_owned());
        }
    }

    fn add_path(&mut self, path: &[String]) {
        match self.scopes.target(self.at, path) {
            // A module is neither value nor type: a variable is meant that has its name.
            Some(target) if target.is_module && path.len() == 1 => {}
            Some(target) => self.add_use(target.file),
            None => {}
        }
    }

    fn skip(&mut self, tests: &impl Spanned) {
        let lines = tests.span();
        self.found.test_line_count += lines.end().line + 1 - lines.start().line;
    }
}

impl<'ast> Visit<'ast> for Walk<'_> {
    fn visit_item(&mut self, item: &'ast Item) {
        if is_test_only(attributes_and_name(item).0) {
            self.skip(item);
        } else {
            visit::visit_item(self, item);
        }
    }

    fn visit_impl_item(&mut self, item: &'ast ImplItem) {
        match item {
            ImplItem::Fn(function) if is_test_only(&function.attrs) => self.skip(item),
            _ => visit::visit_impl_item(self, item),
        }
    }

    /// A scope of its own.
    fn visit_item_mod(&mut self, _: &'ast ItemMod) {}

    /// A module that may see an item is not used by it.
    fn visit_visibility(&mut self, _: &'ast Visibility) {}

    fn visit_item_fn(&mut self, function: &'ast ItemFn) {
        self.add_function(&function.sig, &function.block);
        visit::visit_item_fn(self, function);
    }

    fn visit_impl_item_fn(&mut self, function: &'ast ImplItemFn) {
        self.add_function(&function.sig, &function.block);
        visit::visit_impl_item_fn(self, function);
    }

    fn visit_trait_item_fn(&mut self, function: &'ast TraitItemFn) {
        if let Some(body) = &function.default {
            self.add_function(&function.sig, body);
        }
        visit::visit_trait_item_fn(self, function);
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        let is_private = matches!(item.vis, Visibility::Inherited);
        for import in imports_of(item) {
            let Some(target) = self.scopes.target(self.at, &import.path) else { continue };
            // A parent that shows what its children have needs nothing of them.
            if is_private || !target.is_below {
                self.add_use(target.file);
            }
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.leading_colon.is_none() {
            self.add_path(&path.segments.iter().map(|segment| segment.ident.to_string()).collect::<Vec<_>>());
        }
        visit::visit_path(self, path);
    }

    fn visit_token_stream(&mut self, tokens: &'ast TokenStream) {
        paths_in(tokens.clone()).iter().for_each(|path| self.add_path(path));
    }
}

/// The paths of two names at least among the tokens of a macro, which are no code before the macro made it of them.
fn paths_in(tokens: TokenStream) -> Vec<Vec<String>> {
    let mut paths = vec![Vec::new()];
    let mut colon_count = 0;
    for token in tokens {
        match token {
            TokenTree::Ident(name) => {
                match paths.last_mut() {
                    Some(path) if colon_count == 2 => path.push(name.to_string()),
                    _ => paths.push(vec![name.to_string()]),
                }
                colon_count = 0;
            }
            TokenTree::Punct(colon) if colon.as_char() == ':' => colon_count += 1,
            TokenTree::Group(group) => {
                paths.extend(paths_in(group.stream()));
                paths.push(Vec::new());
                colon_count = 0;
            }
            _ => {
                paths.push(Vec::new());
                colon_count = 0;
            }
        }
    }
    paths.retain(|path| path.len() > 1);
    paths
}

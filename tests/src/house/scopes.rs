//! Where the paths of a crate lead: its modules with the names in them, and imports that are followed to their end.
//!
//! Names that macros make and items in bodies of functions are not known here.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use syn::{Attribute, Ident, Item, ItemMod, ItemUse, UseTree};

use super::{
    error::HouseError,
    exempt::{is_test_name, is_test_only},
};

/// How many imports of imports are followed: two modules that import all of each other have no end.
const IMPORTS_MAX: usize = 8;

/// Where a path leads.
pub(super) struct Target<'a> {
    pub(super) file: &'a Path,
    /// Whether that is a module, and not an item in one.
    pub(super) is_module: bool,
    /// Whether it is within the scope that the path stands in.
    pub(super) is_below: bool,
}

/// All scopes of a crate that are not test code: a tree for the library and one for each program.
pub(super) struct Scopes<'a> {
    files: &'a BTreeMap<PathBuf, syn::File>,
    scopes: Vec<Scope<'a>>,
}

impl<'a> Scopes<'a> {
    /// Those of `roots`, which are among `files`, and of all modules below them.
    pub(super) fn below(
        roots: impl Iterator<Item = &'a PathBuf>,
        files: &'a BTreeMap<PathBuf, syn::File>,
    ) -> Result<Self, HouseError> {
        let mut scopes = Self { files, scopes: Vec::new() };
        for root in roots {
            scopes.add_file(root, root.parent().unwrap_or(root), None)?;
        }
        Ok(scopes)
    }

    /// Every scope: its number, its file, and the items in it.
    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, &'a Path, &'a [Item])> {
        self.scopes.iter().enumerate().map(|(at, scope)| (at, scope.file, scope.items))
    }

    /// Where a path leads that stands in a scope; `None`: to another crate, or it is a name of the language.
    pub(super) fn target(&self, from: usize, path: &[String]) -> Option<Target<'a>> {
        let place = self.resolve(from, path, IMPORTS_MAX)?;
        Some(Target {
            file: self.scopes[place.scope()].file,
            is_module: matches!(place, Place::Module(_)),
            is_below: self.ancestors(place.scope()).any(|ancestor| ancestor == from),
        })
    }

    /// Adds a file and all below it; those of its modules that are files lie in `directory`.
    fn add_file(&mut self, file: &'a Path, directory: &Path, parent: Option<usize>) -> Result<usize, HouseError> {
        let items = self.files.get(file).map_or(&[][..], |parsed| &parsed.items);
        self.add(Scope::new(file, parent, items), directory)
    }

    fn add(&mut self, scope: Scope<'a>, directory: &Path) -> Result<usize, HouseError> {
        let (at, items, file) = (self.scopes.len(), scope.items, scope.file);
        self.scopes.push(scope);
        for item in items {
            let Item::Mod(module) = item else { continue };
            if is_test_only(&module.attrs) {
                continue;
            }
            let name = module.ident.to_string();
            let child = match &module.content {
                Some((_, items)) => self.add(Scope::new(file, Some(at), items), &directory.join(&name))?,
                None => match self.file_of(module, file, directory)? {
                    child if is_test_name(child) => continue,
                    // `x.rs` and `x/mod.rs` have their modules in `x`.
                    child => self.add_file(child, &directory.join(&name), Some(at))?,
                },
            };
            self.scopes[at].children.insert(name, child);
        }
        Ok(at)
    }

    fn file_of(&self, module: &ItemMod, file: &Path, directory: &Path) -> Result<&'a Path, HouseError> {
        let name = module.ident.to_string();
        let expected = directory.join(format!("{name}.rs"));
        let found = self
            .files
            .get_key_value(&expected)
            .or_else(|| self.files.get_key_value(&directory.join(&name).join("mod.rs")));
        match found {
            Some((path, _)) => Ok(path),
            None => Err(HouseError::NoFile { file: file.to_owned(), module: name, expected }),
        }
    }

    fn resolve(&self, from: usize, path: &[String], imports_max: usize) -> Option<Place> {
        let mut at = from;
        for (position, segment) in path.iter().enumerate() {
            at = match segment.as_str() {
                "crate" => self.ancestors(at).last()?,
                "self" => at,
                "super" => self.scopes[at].parent?,
                name => match self.look_up(at, name, imports_max) {
                    Some(Place::Module(module)) => module,
                    Some(item) => return Some(item),
                    None if position == 0 => return None,
                    // Made by a macro, or of another crate and named here.
                    None => return Some(Place::Item(at)),
                },
            };
        }
        Some(Place::Module(at))
    }

    fn look_up(&self, at: usize, name: &str, imports_max: usize) -> Option<Place> {
        let imports_max = imports_max.checked_sub(1)?;
        let scope = &self.scopes[at];
        if let Some(child) = scope.children.get(name) {
            return Some(Place::Module(*child));
        }
        if scope.names.contains(name) {
            return Some(Place::Item(at));
        }
        if let Some(import) = scope.imports.iter().find(|import| import.name.as_deref() == Some(name)) {
            return self.resolve(at, &import.path, imports_max);
        }
        let globs = scope.imports.iter().filter(|import| import.name.is_none());
        globs.into_iter().find_map(|import| match self.resolve(at, &import.path, imports_max)? {
            Place::Module(module) => self.look_up(module, name, imports_max),
            Place::Item(_) => None,
        })
    }

    /// The scope and those around it.
    fn ancestors(&self, at: usize) -> impl Iterator<Item = usize> {
        std::iter::successors(Some(at), |at| self.scopes[*at].parent)
    }
}

/// Where a path ends.
#[derive(Clone, Copy)]
enum Place {
    /// At a module, by its scope.
    Module(usize),
    /// At an item in a scope.
    Item(usize),
}

impl Place {
    fn scope(self) -> usize {
        match self {
            Self::Module(scope) | Self::Item(scope) => scope,
        }
    }
}

/// Where a name means something; known by its number, which is its place in [`Scopes::scopes`].
struct Scope<'a> {
    file: &'a Path,
    parent: Option<usize>,
    items: &'a [Item],
    children: BTreeMap<String, usize>,
    /// Names of the items, which are no modules.
    names: BTreeSet<String>,
    imports: Vec<Import>,
}

impl<'a> Scope<'a> {
    fn new(file: &'a Path, parent: Option<usize>, items: &'a [Item]) -> Self {
        let mut scope =
            Self { file, parent, items, children: BTreeMap::new(), names: BTreeSet::new(), imports: Vec::new() };
        for item in items {
            match (item, attributes_and_name(item)) {
                (Item::Mod(_), _) => {}
                (_, (attributes, _)) if is_test_only(attributes) => {}
                (Item::Use(item), _) => scope.imports.extend(imports_of(item)),
                (_, (_, name)) => scope.names.extend(name.map(ToString::to_string)),
            }
        }
        scope
    }
}

/// Attributes of an item, and the name that it defines.
pub(super) fn attributes_and_name(item: &Item) -> (&[Attribute], Option<&Ident>) {
    match item {
        Item::Const(item) => (&item.attrs, Some(&item.ident)),
        Item::Enum(item) => (&item.attrs, Some(&item.ident)),
        Item::ExternCrate(item) => (&item.attrs, None),
        Item::Fn(item) => (&item.attrs, Some(&item.sig.ident)),
        Item::ForeignMod(item) => (&item.attrs, None),
        Item::Impl(item) => (&item.attrs, None),
        Item::Macro(item) => (&item.attrs, item.ident.as_ref()),
        Item::Mod(item) => (&item.attrs, Some(&item.ident)),
        Item::Static(item) => (&item.attrs, Some(&item.ident)),
        Item::Struct(item) => (&item.attrs, Some(&item.ident)),
        Item::Trait(item) => (&item.attrs, Some(&item.ident)),
        Item::TraitAlias(item) => (&item.attrs, Some(&item.ident)),
        Item::Type(item) => (&item.attrs, Some(&item.ident)),
        Item::Union(item) => (&item.attrs, Some(&item.ident)),
        Item::Use(item) => (&item.attrs, None),
        _ => (&[], None),
    }
}

/// One name that a `use` brings.
pub(super) struct Import {
    pub(super) path: Vec<String>,
    /// The name that it has here; `None`: all that is in `path`.
    name: Option<String>,
}

/// The imports of a `use`; none of one that begins with `::`, which is about another crate.
pub(super) fn imports_of(item: &ItemUse) -> Vec<Import> {
    let mut imports = Vec::new();
    if item.leading_colon.is_none() {
        add_imports(&item.tree, Vec::new(), &mut imports);
    }
    imports
}

/// Adds all imports of a `use`, below `path`.
fn add_imports(tree: &UseTree, mut path: Vec<String>, imports: &mut Vec<Import>) {
    match tree {
        UseTree::Path(part) => {
            path.push(part.ident.to_string());
            add_imports(&part.tree, path, imports);
        }
        UseTree::Name(part) if part.ident == "self" => {
            let name = path.last().cloned();
            imports.push(Import { path, name });
        }
        UseTree::Name(part) => {
            path.push(part.ident.to_string());
            imports.push(Import { path, name: Some(part.ident.to_string()) });
        }
        UseTree::Rename(part) => {
            if part.ident != "self" {
                path.push(part.ident.to_string());
            }
            imports.push(Import { path, name: Some(part.rename.to_string()) });
        }
        UseTree::Glob(_) => imports.push(Import { path, name: None }),
        UseTree::Group(group) => group.items.iter().for_each(|part| add_imports(part, path.clone(), imports)),
    }
}

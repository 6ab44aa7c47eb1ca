//! Which code is compiled for tests alone, by its attributes, or is test code by the name of its file.

use std::path::Path;

use syn::{Attribute, Meta, MetaList, Token, punctuated::Punctuated};

/// Whether a file is test code by its name.
pub(super) fn is_test_name(path: &Path) -> bool {
    let name = path.file_stem().and_then(|name| name.to_str()).unwrap_or_default();
    name == "tests" || name.ends_with("_tests") || name.starts_with("test_")
}

/// Whether the attributes leave something to tests.
pub(super) fn is_test_only(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        Meta::List(list) if list.path.is_ident("cfg") => {
            list.parse_args().is_ok_and(|condition| needs_test(&condition))
        }
        meta => meta.path().segments.last().is_some_and(|segment| segment.ident == "test"),
    })
}

/// Whether a condition of `cfg` holds in tests alone.
fn needs_test(condition: &Meta) -> bool {
    let parts = |list: &MetaList| {
        list.parse_args_with(Punctuated::<Meta, Token![,]>::parse_terminated).unwrap_or_default().into_iter()
    };
    match condition {
        Meta::Path(path) => path.is_ident("test"),
        Meta::List(list) if list.path.is_ident("all") => parts(list).any(|part| needs_test(&part)),
        Meta::List(list) if list.path.is_ident("any") => parts(list).all(|part| needs_test(&part)),
        _ => false,
    }
}

//! Where what an earlier start read lies in a tree of another version of its image.

use std::ops::Range;

use format_spec::{Index, Inode, profile::Profile, records::WHITEOUT};

/// Ranges of the plain address space of the layer with this number.
pub(crate) type LayerRanges = (u32, Vec<Range<u64>>);

/// The ranges of a tree that a record names, in its order: neighbours of one layer together.
///
/// Files that the tree has not as regular files are left out, and ranges are cut at the end of theirs.
pub(crate) fn foreseen<B: AsRef<[u8]>>(tree: &Index<B>, record: &Profile) -> Vec<LayerRanges> {
    let mut found: Vec<LayerRanges> = Vec::new();
    for (path, ranges) in record.files() {
        let Some(inode) = find_file(tree, path) else { continue };
        let (plain, layer) = (inode.plain_range(), inode.layer.get());
        let all = [Range { start: 0, end: u64::MAX }];
        for range in ranges.unwrap_or(&all) {
            let at = |offset| plain.start.saturating_add(offset).min(plain.end);
            let run = at(range.start)..at(range.end);
            if run.is_empty() {
                continue;
            }
            match found.last_mut() {
                Some((last, ranges)) if *last == layer => ranges.push(run),
                _ => found.push((layer, vec![run])),
            }
        }
    }
    found
}

/// The regular file under an absolute path. Records are of paths without links, so none is followed.
pub(crate) fn find_file<'t, B: AsRef<[u8]>>(tree: &'t Index<B>, path: &[u8]) -> Option<&'t Inode> {
    let names = path.split(|byte| *byte == b'/').filter(|name| !name.is_empty());
    let mut inode = tree.inode(0)?;
    for name in names {
        let directory = Some(inode).filter(|inode| inode.is_directory())?;
        let number = tree.lookup(directory, name).filter(|number| *number != WHITEOUT)?;
        inode = tree.inode(number)?;
    }
    Some(inode).filter(|inode| inode.is_regular())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recording::tests::tree;

    /// Offset and length of `/d/c`, in layer 1.
    const C: Option<(u64, u64)> = Some((4096, 20_000));

    #[test]
    fn ranges_of_a_record_are_found_by_path_in_its_order_and_cut() {
        let record =
            |files: &str| Profile::parse(format!(r#"{{"version": 1, "files": [{files}]}}"#).as_bytes()).unwrap();
        let found = foreseen(
            &tree(C),
            &record(
                r#"{"path": "/d/c", "ranges": [[0, 4096], [12288, 99999]]}, {"path": "/gone"}, {"path": "/d"},
                   {"path": "/d/b"}, {"path": "/a", "ranges": [[4096, 8192], [8192, 9000]]}, {"path": "/a/b"},
                   {"path": "/d/c", "ranges": [[4096, 8192]]}"#,
            ),
        );
        let runs = |runs: &[(u64, u64)]| runs.iter().map(|(start, end)| *start..*end).collect::<Vec<_>>();
        let expected = [
            (1, runs(&[(4096, 8192), (16_384, 24_096), (0, 10)])),
            (0, runs(&[(8192, 9096)])),
            (1, runs(&[(8192, 12_288)])),
        ];
        assert_eq!(found, expected);
        let hostile = format!(
            r#"{{"path": "/a", "ranges": [[{0}, {1}]]}}, {{"path": "/"}}, {{"path": "/../a"}}, {{"path": "/{2}a"}}"#,
            u64::MAX - 1,
            u64::MAX,
            "x/".repeat(10_000)
        );
        assert_eq!(foreseen(&tree(C), &record(&hostile)), []);
    }
}

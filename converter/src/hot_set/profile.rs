//! The files that a profile names, in an image.

use std::ops::Range;

use format_spec::{Index, Inode, profile::Profile, records::hot_reason};

use super::{HotRange, HotSet, files};

/// The files that a profile names, as far as the image has them; ranges of one file follow each other.
pub fn hot_set_of<B: AsRef<[u8]>>(profile: &Profile, tree: &Index<B>) -> Vec<HotRange> {
    let mut hot = HotSet::default();
    for (path, ranges) in profile.files() {
        let Some((number, inode)) = find(tree, path) else { continue };
        let size = inode.size.get();
        let ranges = ranges.map_or_else(|| vec![Range { start: 0, end: size }], <[_]>::to_vec);
        hot.add(number, size, ranges, hot_reason::PROFILE);
    }
    hot.finish()
}

/// How many files of a profile the image does not have: it may be one of another version.
pub fn unknown_count<B: AsRef<[u8]>>(profile: &Profile, tree: &Index<B>) -> usize {
    profile.files().filter(|(path, _)| find(tree, path).is_none()).count()
}

fn find<'t, B: AsRef<[u8]>>(tree: &'t Index<B>, path: &[u8]) -> Option<(u32, &'t Inode)> {
    let number = files::find(tree, path)?.inode;
    tree.inode(number).filter(|inode| inode.is_regular()).map(|inode| (number, inode))
}

#[cfg(test)]
mod tests {
    use super::{super::test_image::TestImage, *};

    fn hot(image: &TestImage, profile: &str) -> Vec<(String, Range<u64>)> {
        let profile = Profile::parse(profile.as_bytes()).unwrap();
        let ranges = hot_set_of(&profile, &image.tree());
        ranges.into_iter().map(|hot| (image.path(hot.inode), hot.range)).collect()
    }

    #[test]
    fn files_keep_their_order_and_ranges_become_blocks() {
        let image = TestImage::new().file("/a", [0; 100_000]).file("/b", [0; 10]).symlink("/c", "b");
        let profile =
            r#"{"version": 1, "files": [{"path": "/c"}, {"path": "/a", "ranges": [[90000, 95000], [1, 2]]}]}"#;
        let expected = [("/b".to_owned(), 0..10), ("/a".to_owned(), 0..4096), ("/a".to_owned(), 86_016..98_304)];
        assert_eq!(hot(&image, profile), expected);
    }

    #[test]
    fn names_that_are_no_text_are_percent_encoded() {
        let image = TestImage::new().file(b"/\xff%".as_slice(), b"x");
        let profile = r#"{"version": 1, "files": [{"path": "/%ff%25"}]}"#;
        assert_eq!(hot(&image, profile).len(), 1);
    }

    #[test]
    fn files_that_the_image_has_not_are_counted() {
        let image = TestImage::new().file("/d/a", b"x");
        let profile = r#"{"version": 1, "files": [{"path": "/b"}, {"path": "/d"}, {"path": "/d/a"}]}"#;
        assert_eq!(hot(&image, profile), [("/d/a".to_owned(), 0..1)]);
        assert_eq!(unknown_count(&Profile::parse(profile.as_bytes()).unwrap(), &image.tree()), 2);
    }

    #[test]
    fn ranges_behind_the_end_of_a_file_are_cut() {
        let image = TestImage::new().file("/a", [0; 5000]);
        let ranges = format!(r#"[[4999, {}], [8192, 9000]]"#, u64::MAX);
        let profile = format!(r#"{{"version": 1, "files": [{{"path": "/a", "ranges": {ranges}}}]}}"#);
        assert_eq!(hot(&image, &profile), [("/a".to_owned(), 4096..5000)]);
    }
}

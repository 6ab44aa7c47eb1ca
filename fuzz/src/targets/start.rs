//! What a start of an image reads: profiles, and the files that are looked into where there is none.

use std::{io, sync::LazyLock};

use converter::hot_set::{FileContent, HotRange, StartConfig, derive, hot_set_of};
use format_spec::{Digest, Index, Inode, profile::Profile};
use tree::merge::merge;

use super::{
    choose,
    layer::{content, convert},
    one_line,
};

/// Between the parts of an input.
pub(crate) const SEPARATOR: &[u8] = b"\n--part--\n";
/// Where the parts of an input stand in the image, each under all names that its kind of start looks at.
const PATHS: [(&str, &[&str]); 6] = [
    ("bin/app", &["bin/app", "lib/libc.so.6", "etc/ld.so.cache", "lib64/ld-linux-x86-64.so.2"]),
    ("bin/sh bin/app", &["bin/app", "bin/sh", "bin/other", "etc/ld.so.conf"]),
    (
        "usr/bin/python3 app/main.py",
        &["app/main.py", "usr/lib/python3.11/os.py", "app/pkg/__init__.py", "usr/bin/pyvenv.cfg", "usr/bin/python3"],
    ),
    (
        "usr/bin/node app/index.js",
        &[
            "app/index.js",
            "app/package.json",
            "app/node_modules/a/package.json",
            "app/node_modules/a/a.js",
            "usr/bin/node",
        ],
    ),
    ("usr/bin/java -jar app/a.jar", &["app/a.jar", "usr/lib/jvm/lib/modules", "usr/lib/jvm/release", "usr/bin/java"]),
    ("usr/bin/ruby app/a.rb", &["app/a.rb", "usr/lib/ruby/3.1.0/a.rb", "app/Gemfile.lock", "usr/bin/ruby"]),
];

/// A program that is as small as an ELF file can be, where an input has no part for it.
const PROGRAM: &[u8] = b"\x7fELF\x02\x01\x01\0";

/// First byte: a profile, a config, or what starts; then the parts.
pub(crate) fn run(data: &[u8]) {
    match choose(data, 8) {
        Some((kind @ 0..6, rest)) => started(usize::from(kind), rest),
        Some((6, rest)) => match Profile::parse(rest) {
            Ok(profile) => {
                let written = profile.to_json();
                assert_eq!(Profile::parse(written.as_bytes()).ok().as_ref(), Some(&profile), "{written}");
                let once = Profile::merge(std::slice::from_ref(&profile));
                assert_eq!(Profile::merge(&[profile.clone(), profile.clone()]), once, "twice the same is the same");
                let hot = hot_set_of(&profile, &SMALL.tree());
                assert_hot(&SMALL.tree(), &hot);
            }
            Err(error) => one_line(&error),
        },
        Some((_, rest)) => match StartConfig::from_json(rest) {
            Ok(config) => _ = derive(&SMALL.tree(), &mut SMALL.content(), &config),
            Err(error) => one_line(&error),
        },
        None => {}
    }
}

static SMALL: LazyLock<Image> = LazyLock::new(|| Image::new(PATHS[0].1, &[PROGRAM; 4]));

fn started(kind: usize, data: &[u8]) {
    let (command, paths) = PATHS[kind];
    let parts = split(data);
    let image = Image::new(paths, &parts);
    let argv = command.split(' ').map(|word| if word.contains('/') { format!("/{word}") } else { word.to_owned() });
    let argv = argv.map(String::into_bytes).collect();
    let config = StartConfig { argv, working_directory: b"/app".to_vec(), ..StartConfig::default() };
    let hot = derive(&image.tree(), &mut image.content(), &config);
    assert_hot(&image.tree(), &hot);
    assert_eq!(hot, derive(&image.tree(), &mut image.content(), &config), "the same image starts the same way");
}

fn split(mut data: &[u8]) -> Vec<&[u8]> {
    let mut parts = Vec::new();
    while let Some(at) = data.windows(SEPARATOR.len()).position(|window| window == SEPARATOR) {
        parts.push(&data[..at]);
        data = &data[at + SEPARATOR.len()..];
    }
    parts.push(data);
    parts
}

/// What `HotRange` promises.
fn assert_hot<B: AsRef<[u8]>>(tree: &Index<B>, hot: &[HotRange]) {
    for HotRange { inode, range, .. } in hot {
        let inode = tree.inode(*inode).expect("a file of the tree");
        assert!(inode.is_regular() && range.start < range.end && range.end <= inode.size.get());
        assert!(range.start % 4096 == 0 && (range.end % 4096 == 0 || range.end == inode.size.get()));
    }
}

/// A small image: its tar stream, the index of its one layer, its tree.
struct Image {
    tar: Vec<u8>,
    layer: Index<Vec<u8>>,
    tree: Vec<u8>,
}

impl Image {
    fn new(paths: &[&str], parts: &[&[u8]]) -> Self {
        let part = |number| parts.get(number).copied().unwrap_or(PROGRAM);
        let tar = test_kit::tar(paths.iter().enumerate().map(|(number, path)| (path, 0o755, part(number))));
        let (_, layer, blob) = convert(&tar, 1 << 20).expect("a tar stream");
        let range = layer.index.range();
        let at = |offset: u64| usize::try_from(offset).expect("inside the blob");
        let index = Index::from_compressed(&blob[at(range.start)..at(range.end)], &layer.index).expect("an index");
        let tree = merge(&[(Digest::of(b""), &index)]).expect("a tree");
        Self { tar, layer: index, tree }
    }

    fn tree(&self) -> Index<&[u8]> {
        Index::open(self.tree.as_slice()).expect("a tree")
    }

    fn content(&self) -> Content<'_> {
        Content(self)
    }
}

struct Content<'a>(&'a Image);

impl FileContent for Content<'_> {
    fn read_at(&mut self, inode: &Inode, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        assert!(
            offset.checked_add(len as u64).is_some_and(|end| end <= inode.size.get()),
            "reads stay inside the file"
        );
        let start = inode.plain_offset.get() + offset;
        Ok(content(&self.0.layer, &(start..start + len as u64), &self.0.tar))
    }
}

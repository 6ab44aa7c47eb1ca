//! What a start of Java reads: the virtual machine, its archive of loaded classes, the index of its
//! modules, and the application's archives.
//!
//! The layout is that of a JDK since version 9 (JEP 220); version 8 keeps some of it in other places.

use std::iter;

use format_spec::records::hot_reason;

use super::{
    Search,
    files::{Found, base_name, join, parent},
    program::{Command, Process},
};

/// Archives of the application up to this length are hot as a whole.
const ARCHIVE_LEN_MAX: u64 = 64 << 20;
/// Of longer ones the head, and the end, where zip files have their directory.
const ARCHIVE_HEAD_LEN: u64 = 64 << 10;
const ARCHIVE_END_LEN: u64 = 2 << 20;
/// Most archives of a class path.
const ARCHIVE_COUNT_MAX: usize = 1000;
/// Longest other file that is taken.
const FILE_LEN_MAX: u64 = 128 << 20;
/// Header of `lib/modules`: seven words (`imageFile.hpp`), the first of which is this in either byte order.
const MODULES_MAGIC: u32 = 0xCAFE_DADA;
const MODULES_HEADER_LEN: usize = 28;
/// Bytes of the index for each slot of its hash table: one word each for redirection and location.
const MODULES_SLOT_LEN: u64 = 8;
/// Most of the index of `lib/modules` that is hot.
const MODULES_INDEX_LEN_MAX: u64 = 4 << 20;

/// Read by the launcher and the machine at each start, below `lib`.
const LIBRARIES: [&str; 9] = [
    "libjli.so",
    "server/libjvm.so",
    "libjimage.so",
    "libjava.so",
    "libjsvml.so",
    "libzip.so",
    "libnio.so",
    "libnet.so",
    "libverify.so",
];
/// The same of other files, below the home of Java.
const FILES: [&str; 3] = ["lib/jvm.cfg", "lib/server/classes.jsa", "lib/rt.jar"];
/// Options whose value is a word of its own (`java --help`).
const OPTIONS_WITH_VALUE: [&[u8]; 10] = [
    b"-cp",
    b"-classpath",
    b"--class-path",
    b"-p",
    b"--module-path",
    b"--add-modules",
    b"--add-opens",
    b"--add-exports",
    b"--add-reads",
    b"--upgrade-module-path",
];

/// Adds what Java reads that was started with this command.
pub(super) fn run(search: &mut Search<'_>, process: &mut Process, command: &Command) {
    // PROGRAM is HOME/bin/java; Java 8 has HOME/jre and libraries by architecture.
    let home = parent(parent(&process.program.path)).to_vec();
    for file in FILES {
        search.add_path(&join(&home, file.as_bytes()), FILE_LEN_MAX, hot_reason::RUNTIME);
    }
    let library = join(&home, b"lib");
    for directory in [library.clone(), join(&library, b"amd64"), join(&library, b"aarch64")] {
        for name in LIBRARIES {
            if let Some(found) = search.files.find_file(&join(&directory, name.as_bytes())) {
                process.open_module(search, &found, hot_reason::RUNTIME);
            }
        }
    }
    if let Some(modules) = search.files.find_file(&join(&library, b"modules")) {
        add_modules(search, &modules);
    }
    add_application(search, command);
}

/// The index of the modules file; which classes a start reads behind it cannot be known.
fn add_modules(search: &mut Search<'_>, modules: &Found) {
    let Some(head) = search.files.read_at(modules.inode, 0, MODULES_HEADER_LEN) else { return };
    let words: Vec<[u8; 4]> = head.chunks_exact(4).filter_map(|word| word.try_into().ok()).collect();
    let is_little = u32::from_le_bytes(words[0]) == MODULES_MAGIC;
    if !is_little && u32::from_be_bytes(words[0]) != MODULES_MAGIC {
        return;
    }
    let word = |place: usize| {
        u64::from(if is_little { u32::from_le_bytes(words[place]) } else { u32::from_be_bytes(words[place]) })
    };
    // Behind the header: the hash table, locations, strings. Strings are read where a class is looked up.
    let (slot_count, locations_len, strings_len) = (word(4), word(5), word(6));
    let len = MODULES_HEADER_LEN as u64 + slot_count * MODULES_SLOT_LEN + locations_len + strings_len;
    search.add_ranges(modules, iter::once(0..len.min(MODULES_INDEX_LEN_MAX)), hot_reason::RUNTIME);
}

/// The archives that the command names: of `-jar`, or of the class path.
fn add_application(search: &mut Search<'_>, command: &Command) {
    let mut class_path = search.config.variable("CLASSPATH").map(<[u8]>::to_vec);
    let mut words = command.arguments().iter();
    while let Some(word) = words.next() {
        if word == b"-jar" {
            class_path = words.next().cloned();
            break;
        }
        if let Some(value) = word.strip_prefix(b"--class-path=") {
            class_path = Some(value.to_vec());
        } else if OPTIONS_WITH_VALUE.contains(&word.as_slice()) {
            let value = words.next().cloned();
            let is_class_path =
                matches!(word.as_slice(), b"-cp" | b"-classpath" | b"--class-path" | b"-p" | b"--module-path");
            class_path = if is_class_path { value } else { class_path };
        } else if let Some(agent) = word.strip_prefix(b"-javaagent:") {
            let path = agent.split(|byte| *byte == b'=').next().unwrap_or_default();
            add_archive(search, &join(&command.directory, path));
        } else if !word.starts_with(b"-") {
            break;
        }
    }
    let class_path = class_path.unwrap_or_default();
    for path in class_path.split(|byte| *byte == b':').filter(|path| !path.is_empty()).take(ARCHIVE_COUNT_MAX) {
        let path = join(&command.directory, path);
        if base_name(&path) == b"*" {
            add_archives_in(search, parent(&path));
        } else if search.files.find_directory(&path).is_none() {
            add_archive(search, &path);
        }
    }
}

fn add_archives_in(search: &mut Search<'_>, directory: &[u8]) {
    let names = search.files.names(directory).into_iter().filter(|name| name.to_ascii_lowercase().ends_with(b".jar"));
    for name in names.take(ARCHIVE_COUNT_MAX).collect::<Vec<_>>() {
        add_archive(search, &join(directory, &name));
    }
}

fn add_archive(search: &mut Search<'_>, path: &[u8]) {
    let Some(found) = search.files.find_file(path) else { return };
    let size = search.files.size(found.inode);
    if size <= ARCHIVE_LEN_MAX {
        search.add_file(&found, hot_reason::COMMAND);
    } else {
        let ranges = [0..ARCHIVE_HEAD_LEN, size - ARCHIVE_END_LEN..size];
        search.add_ranges(&found, ranges, hot_reason::COMMAND);
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::super::test_image::{TestImage, elf_program};

    fn image() -> TestImage {
        TestImage::new().program("/opt/java/bin/java", elf_program()).symlink("/usr/bin/java", "/opt/java/bin/java")
    }

    /// A modules file whose index is as long as its header says, and content behind it.
    fn modules(slot_count: u32, locations_len: u32, strings_len: u32, is_big: bool) -> Vec<u8> {
        let words = [0xCAFE_DADA, 1, 0, 7, slot_count, locations_len, strings_len];
        let bytes = words.map(|word: u32| if is_big { word.to_be_bytes() } else { word.to_le_bytes() });
        let mut bytes = bytes.concat();
        bytes.resize(1 << 20, 0);
        bytes
    }

    fn ranges(image: &TestImage, argv: &[&str], path: &str) -> Vec<Range<u64>> {
        let hot = image.derive(argv, &[]);
        hot.into_iter().filter(|hot| image.path(hot.inode) == path).map(|hot| hot.range).collect()
    }

    #[test]
    fn the_home_of_java_is_found_through_links() {
        let image = image().file("/etc/jvm.cfg", "-server KNOWN").symlink("/opt/java/lib/jvm.cfg", "/etc/jvm.cfg");
        let image = image.file("/opt/java/lib/server/classes.jsa", "x").file("/app.jar", "PK");
        let hot = image.hot_paths(&["java", "-Xmx1g", "-jar", "/app.jar"], &[]);
        assert_eq!(hot, ["/opt/java/bin/java", "/etc/jvm.cfg", "/opt/java/lib/server/classes.jsa", "/app.jar"]);
    }

    #[test]
    fn of_the_modules_the_index_is_hot() {
        for is_big in [false, true] {
            let image = image().file("/opt/java/lib/modules", modules(1000, 5000, 7000, is_big));
            let len = (28 + 8 * 1000 + 5000 + 7000_u64).next_multiple_of(4096);
            assert_eq!(ranges(&image, &["java"], "/opt/java/lib/modules"), [Range { start: 0, end: len }]);
        }
        let image = image().file("/opt/java/lib/modules", [0; 100]);
        assert_eq!(ranges(&image, &["java"], "/opt/java/lib/modules"), []);
    }

    #[test]
    fn archives_of_the_class_path_are_hot() {
        let image = image().file("/lib/a.jar", "a").file("/lib/b.JAR", "b").file("/lib/c.txt", "c").file("/d.jar", "d");
        let argv = ["java", "--add-opens", "x", "-cp", "/lib/*:/classes:d.jar", "Main", "-jar", "/lib/c.txt"];
        assert_eq!(image.hot_paths(&argv, &[]), ["/opt/java/bin/java", "/lib/a.jar", "/lib/b.JAR", "/d.jar"]);
    }
}

//! Files that the C library reads for most programs: users, name services, locale, time zone.

use std::iter;

use format_spec::records::hot_reason;

use super::{Search, elf::ElfFile, files::join, libraries::Loader};

/// Longest file of these that is taken.
const FILE_LEN_MAX: u64 = 1 << 20;
/// Read by glibc for user names, host names, addresses and times, and by the container runtime for the user.
const FILES: [&str; 5] = ["/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/host.conf", "/etc/localtime"];
/// Read when a locale is set that is not `C` or `POSIX`.
const LOCALE_DIRECTORY: &[u8] = b"/usr/lib/locale";
/// Directories in which Debian and others keep `gconv`.
const LIBRARY_DIRECTORIES: [&[u8]; 3] = [b"/usr/lib", b"/usr/lib64", b"/lib"];
/// Services of `nsswitch.conf` that glibc has built in since 2.34.
const BUILT_IN_SERVICES: [&[u8]; 2] = [b"files", b"dns"];

/// Adds the files that a program with this loader reads.
pub(super) fn add(search: &mut Search<'_>, loader: &mut Loader, program: &ElfFile) {
    for path in FILES {
        search.add_path(path.as_bytes(), FILE_LEN_MAX, hot_reason::SYSTEM);
    }
    let is_musl = program.interpreter.as_ref().is_some_and(|path| path.windows(7).any(|part| part == b"ld-musl"));
    if is_musl {
        return;
    }
    add_locale(search);
    add_name_services(search, loader);
}

/// The locale of `LC_ALL`, `LC_CTYPE` or `LANG`, as `setlocale(3)` looks for it.
fn add_locale(search: &mut Search<'_>) {
    let set = ["LC_ALL", "LC_CTYPE", "LANG"].iter().find_map(|name| search.config.variable(name));
    let Some(locale) = set.filter(|locale| !matches!(*locale, b"" | b"C" | b"POSIX")) else { return };
    let (language, codeset) = match locale.iter().position(|byte| *byte == b'.') {
        Some(dot) => locale.split_at(dot),
        None => (locale, b"".as_slice()),
    };
    // The archive is mapped, and read where the locale is in it: its head has the table.
    let archive = join(LOCALE_DIRECTORY, b"locale-archive");
    if let Some(archive) = search.files.find_file(&archive) {
        search.add_ranges(&archive, iter::once(0..FILE_LEN_MAX), hot_reason::SYSTEM);
    }
    // `UTF-8` is looked for as `utf8`.
    let normalized: Vec<u8> = codeset.iter().filter(|byte| **byte != b'-').map(u8::to_ascii_lowercase).collect();
    for name in [locale.to_vec(), [language, &normalized].concat()] {
        let directory = join(LOCALE_DIRECTORY, &name);
        if search.files.find_directory(&directory).is_some() {
            search.add_path(&join(&directory, b"LC_CTYPE"), FILE_LEN_MAX, hot_reason::SYSTEM);
            break;
        }
    }
    for directory in LIBRARY_DIRECTORIES {
        let names = search.files.names(directory).into_iter().map(|name| join(directory, &name));
        let candidates: Vec<_> = iter::once(directory.to_vec()).chain(names).collect();
        for candidate in candidates {
            search.add_path(&join(&candidate, b"gconv/gconv-modules.cache"), FILE_LEN_MAX, hot_reason::SYSTEM);
        }
    }
}

/// The libraries of services that the image's `nsswitch.conf` names.
fn add_name_services(search: &mut Search<'_>, loader: &mut Loader) {
    let Some(text) = search.add_and_read(b"/etc/nsswitch.conf", FILE_LEN_MAX, hot_reason::SYSTEM) else { return };
    for line in text.split(|byte| *byte == b'\n') {
        let line = line.split(|byte| *byte == b'#').next().unwrap_or_default();
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let words = line[colon + 1..].split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
        for service in words.filter(|word| word.first() != Some(&b'[') && !BUILT_IN_SERVICES.contains(word)) {
            loader.load_name(search, &[b"libnss_", service, b".so.2"].concat());
        }
    }
}

//! The search as a whole: programs, scripts, shells and libraries.

use std::process::Command;

use format_spec::records::hot_reason;

use super::test_image::{TestImage, elf_program};

/// A program with its libraries as `ldd` finds them here, under their own paths.
fn program_of_this_machine(path: &str) -> (TestImage, Vec<String>) {
    let listed = Command::new("ldd").arg(path).output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    let libraries: Vec<_> = listed.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned).collect();
    assert!(libraries.len() >= 2, "{listed}");
    let image = libraries.iter().fold(TestImage::new().host_file(path), |image, library| image.host_file(library));
    (image, libraries)
}

/// Builds a shared object or program from C text with these options.
fn build(name: &str, text: &str, options: &[&str], directory: &std::path::Path) -> Vec<u8> {
    let source = directory.join("source.c");
    std::fs::write(&source, text).unwrap();
    let output = directory.join(name);
    let built =
        Command::new("cc").arg("-nostdlib").arg("-fPIC").arg(&source).arg("-o").arg(&output).args(options).status();
    assert!(built.unwrap().success());
    std::fs::read(output).unwrap()
}

#[test]
fn the_libraries_of_a_program_are_those_of_ldd() {
    let (image, libraries) = program_of_this_machine("/bin/ls");
    for image in [image.clone().host_file("/etc/ld.so.cache"), image] {
        let mut hot = image.hot_paths(&["ls"], &[]);
        hot.retain(|path| path != "/etc/ld.so.cache");
        assert_eq!(hot[0], "/bin/ls");
        let mut expected = libraries.clone();
        expected.sort();
        hot[1..].sort();
        assert_eq!(hot[1..], expected);
    }
}

#[test]
fn of_large_libraries_symbols_and_data_are_hot_but_not_what_debuggers_read() {
    let (image, libraries) = program_of_this_machine("/bin/ls");
    let libc = libraries.iter().find(|path| path.contains("libc.so")).unwrap();
    let hot = image.derive(&["ls"], &[]);
    let len =
        hot.iter().filter(|hot| image.path(hot.inode) == *libc).map(|hot| hot.range.end - hot.range.start).sum::<u64>();
    let size = std::fs::metadata(libc).unwrap().len();
    assert!(len > size / 2 && len < size, "{len} of {size}");
}

#[test]
fn a_program_without_section_headers_is_hot_as_a_whole() {
    let mut bytes = std::fs::read("/bin/ls").unwrap();
    // `e_shoff`, and at the end of the header `e_shnum` and `e_shstrndx` (elf(5)).
    bytes[40..48].fill(0);
    bytes[60..64].fill(0);
    let size = bytes.len() as u64;
    let hot = TestImage::new().program("/bin/ls", bytes).derive(&["ls"], &[]);
    let len: u64 = hot.iter().map(|hot| hot.range.end - hot.range.start).sum();
    // Behind the segments stand section names and headers, which nothing loads.
    assert!(len * 100 > size * 95, "{len} of {size}");
}

#[test]
fn run_paths_and_the_environment_lead_to_libraries() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let leaf = build("libleaf.so", "int leaf(void) { return 1; }", &["-shared"], directory.path());
    let text = "int leaf(void); int middle(void) { return leaf(); }";
    let run_path = "-Wl,--enable-new-dtags,-rpath,$ORIGIN/../deep";
    let middle = build(
        "libmiddle.so",
        text,
        &["-shared", &at("libleaf.so"), run_path, "-Wl,-soname,libmiddle.so"],
        directory.path(),
    );
    let text = "int middle(void); void _start(void) { middle(); }";
    let loader = "-Wl,--dynamic-linker=/lib/ld-test.so";
    let library_options = [
        "-L",
        directory.path().to_str().unwrap(),
        "-lmiddle",
        "-Wl,-rpath-link,.",
        loader,
        "-Wl,--allow-shlib-undefined",
    ];
    let program = build("program", text, &library_options, directory.path());
    // The name that the linker recorded for a library without soname is its path: give it one instead.
    let leaf_path = at("libleaf.so");
    let image = TestImage::new()
        .program("/bin/program", program)
        .file("/lib/ld-test.so", &leaf)
        .file("/opt/lib/libmiddle.so", middle)
        .file(&leaf_path, leaf);
    let hot = image.hot_paths(&["program"], &["LD_LIBRARY_PATH=/nowhere:/opt/lib"]);
    assert_eq!(hot, ["/bin/program", "/lib/ld-test.so", "/opt/lib/libmiddle.so", &leaf_path]);
}

#[test]
fn damaged_programs_never_panic() {
    let bytes = std::fs::read("/bin/ls").unwrap();
    // Headers and the dynamic section: the first bytes and a sample of the others.
    for place in (0..1024).chain((1024..bytes.len()).step_by(4099)) {
        for value in [0, 0x7f, 0xff] {
            let mut damaged = bytes.clone();
            damaged[place] = value;
            TestImage::new().program("/bin/ls", damaged).derive(&["ls"], &[]);
        }
    }
    for len in [0, 3, 16, 63, 64, 100, 1000] {
        TestImage::new().program("/bin/ls", &bytes[..len]).derive(&["ls"], &[]);
    }
}

#[test]
fn a_command_is_found_as_a_runtime_finds_it() {
    let program = elf_program();
    let image = TestImage::new().program("/a/tool", &program).program("/b/tool", &program).file("/a/text", "x");
    assert_eq!(image.hot_paths(&["tool"], &["PATH=/none:/b:/a"]), ["/b/tool"]);
    assert_eq!(image.hot_paths(&["a/tool"], &["PATH=/b"]), ["/a/tool"]);
    assert_eq!(image.hot_paths(&["text"], &["PATH=/a"]), [] as [&str; 0]);
    assert_eq!(image.hot_paths(&["/usr/bin/none"], &[]), [] as [&str; 0]);
    assert_eq!(image.hot_paths(&[], &[]), [] as [&str; 0]);
}

#[test]
fn scripts_bring_their_interpreter() {
    let image = TestImage::new()
        .program("/usr/bin/env", elf_program())
        .program("/usr/bin/tool", elf_program())
        .program("/one", "#! /usr/bin/tool -x\n")
        .program("/two", "#!/usr/bin/env tool\n")
        .program("/three", "#!/usr/bin/env -S A=b tool -u\n");
    assert_eq!(image.hot_paths(&["/one"], &[]), ["/one", "/usr/bin/tool"]);
    for script in ["/two", "/three"] {
        assert_eq!(image.hot_paths(&[script], &[]), [script, "/usr/bin/env", "/usr/bin/tool"]);
    }
    let reasons: Vec<_> = image.derive(&["/one"], &[]).iter().map(|hot| hot.reason).collect();
    assert_eq!(reasons, [hot_reason::COMMAND, hot_reason::INTERPRETER]);
}

#[test]
fn scripts_that_name_each_other_end() {
    let image = TestImage::new().program("/a", "#!/b\n").program("/b", "#!/a\n");
    assert_eq!(image.hot_paths(&["/a"], &[]), ["/a", "/b"]);
}

#[test]
fn wrappers_bring_what_they_wrap() {
    let image = TestImage::new()
        .program("/sbin/tini", elf_program())
        .program("/usr/bin/gosu", elf_program())
        .program("/usr/bin/server", elf_program())
        .file("/etc/server.conf", "x")
        .file("/etc/large.conf", vec![0; 2 << 20]);
    let argv = ["tini", "--", "gosu", "app", "server", "--config=/etc/server.conf", "/etc/large.conf", "/etc"];
    assert_eq!(image.hot_paths(&argv, &[]), ["/sbin/tini", "/usr/bin/gosu", "/usr/bin/server", "/etc/server.conf"]);
}

#[test]
fn commands_in_a_shell_are_followed() {
    let image = TestImage::new()
        .program("/bin/sh", elf_program())
        .program("/usr/bin/one", elf_program())
        .program("/usr/bin/two", elf_program())
        .program("/app/three", elf_program())
        .program("/opt/four", elf_program())
        .file("/app/data.txt", "x");
    let image = image.program("/usr/bin/[", elf_program()).program("/usr/bin/echo", elf_program());
    let text = "set -e; [ -f x ] && echo one; if A=b exec \"one\" && cd /app; then ./three data.txt | $HOME/four > /dev/null; fi # two";
    let expected = ["/bin/sh", "/usr/bin/one", "/app/three", "/app/data.txt", "/opt/four"];
    assert_eq!(image.hot_paths(&["sh", "-ec", text], &["HOME=/opt"]), expected);
}

#[test]
fn an_entrypoint_script_runs_its_arguments() {
    let script = "#!/bin/sh\n. /etc/settings\nif [ \"$(one -u)\" = '0' ]; then\n  echo 'two'\nfi\nexec \"$@\"\n";
    let image = TestImage::new()
        .program("/bin/sh", elf_program())
        .program("/usr/bin/one", elf_program())
        .program("/usr/bin/two", elf_program())
        .program("/usr/bin/server", elf_program())
        .file("/etc/settings", "export A=b\n")
        .program("/entrypoint.sh", script);
    let expected = ["/entrypoint.sh", "/bin/sh", "/etc/settings", "/usr/bin/one", "/usr/bin/server"];
    assert_eq!(image.hot_paths(&["/entrypoint.sh", "server"], &[]), expected);
}

#[test]
fn files_of_the_c_library_are_hot_for_dynamic_programs() {
    let (image, _) = program_of_this_machine("/bin/ls");
    let system = ["/etc/passwd", "/etc/nsswitch.conf", "/usr/lib/locale/C.utf8/LC_CTYPE"];
    let image = system.iter().fold(image, |image, path| image.file(path, "passwd: files\n"));
    let hot = image.hot_paths(&["ls"], &["LANG=C.UTF-8"]);
    for path in system {
        assert!(hot.iter().any(|hot| hot == path), "{path}");
    }
    assert!(!image.hot_paths(&["ls"], &[]).iter().any(|path| path.contains("LC_CTYPE")));
}

#[test]
fn content_that_is_not_to_be_had_leaves_the_rest() {
    struct Nothing;
    impl super::FileContent for Nothing {
        fn read_at(&mut self, _: &format_spec::Inode, _: u64, _: usize) -> std::io::Result<Vec<u8>> {
            Err(std::io::ErrorKind::Unsupported.into())
        }
    }
    let image = TestImage::new().program("/bin/tool", elf_program());
    let config = super::StartConfig { argv: vec![b"/bin/tool".to_vec()], ..Default::default() };
    assert_eq!(super::derive(&image.tree(), &mut Nothing, &config), []);
}

#[test]
fn ranges_of_a_file_become_blocks_and_do_not_overlap() {
    let mut hot = super::HotSet::default();
    hot.add(7, 200_000, [100_000..100_001, 5..6, 8000..9000], 2);
    hot.add(8, 10, std::iter::once(0..u64::MAX), 3);
    hot.add(7, 200_000, [199_999..200_000, 50..60, 300_000..400_000], 4);
    let ranges: Vec<_> = hot.finish().into_iter().map(|hot| (hot.inode, hot.range, hot.reason)).collect();
    let expected = [(7, 0..12_288, 2), (7, 98_304..102_400, 2), (7, 196_608..200_000, 2), (8, 0..10, 3)];
    assert_eq!(ranges, expected);
}

#[test]
fn a_hot_set_has_an_end() {
    let mut hot = super::HotSet::default();
    hot.add(1, 1 << 40, std::iter::once(0..1 << 40), 1);
    hot.add(2, 4096, std::iter::once(0..4096), 1);
    assert_eq!(hot.finish().len(), 1);
}

use super::super::test_image::{TestImage, elf_program};

const TIME: u64 = 1_700_000_000;

/// An installation with the first modules.
fn image() -> TestImage {
    TestImage::new()
        .program("/usr/bin/python3.11", elf_program())
        .symlink("/usr/bin/python3", "python3.11")
        .file("/usr/lib/python3.11/os.py", "import abc\n")
        .file("/usr/lib/python3.11/abc.py", "import _py_abc\n")
        .file("/usr/lib/python3.11/encodings/__init__.py", "import codecs\nfrom . import aliases\n")
        .file("/usr/lib/python3.11/encodings/aliases.py", "\n")
        .file("/usr/lib/python3.11/lib-dynload/_json.cpython-311-x86_64-linux-gnu.so", elf_program())
}

const START: [&str; 3] =
    ["/usr/bin/python3.11", "/usr/lib/python3.11/encodings/__init__.py", "/usr/lib/python3.11/encodings/aliases.py"];

/// The hot files behind those of every start.
fn hot(image: &TestImage, argv: &[&str], env: &[&str]) -> Vec<String> {
    let hot = image.hot_paths(argv, env);
    assert_eq!(hot[..START.len()], START);
    hot[START.len()..].to_vec()
}

/// The compiled form of a source of this time and size.
fn compiled(flags: u32, seconds: u64, size: usize) -> Vec<u8> {
    let words = [0x0a0d_0da7, flags, u32::try_from(seconds).unwrap(), u32::try_from(size).unwrap()];
    words.map(u32::to_le_bytes).concat()
}

#[test]
fn imports_of_the_script_are_followed_in_their_order() {
    let image = image()
        .file("/app/main.py", "import b\ndef f():\n    from c import d\nimport json.decoder\n")
        .file("/app/b.py", "from c import e\nimport a\n")
        .file("/app/a.py", "\n")
        .file("/app/c/__init__.py", "x = 1\n")
        .file("/app/c/e.py", "from .f import g\nfrom .. import nothing\n")
        .file("/app/c/f.py", "import b\n")
        .file("/app/c/d.py", "\n")
        .file("/usr/lib/python3.11/json/__init__.py", "\n")
        .file("/usr/lib/python3.11/json/decoder.py", "import _json, sys\n");
    let expected = [
        "/app/main.py",
        "/app/b.py",
        "/app/c/__init__.py",
        "/app/c/e.py",
        "/app/c/f.py",
        "/app/a.py",
        "/app/c/d.py",
        "/usr/lib/python3.11/json/__init__.py",
        "/usr/lib/python3.11/json/decoder.py",
        "/usr/lib/python3.11/lib-dynload/_json.cpython-311-x86_64-linux-gnu.so",
    ];
    assert_eq!(hot(&image, &["python3", "-u", "/app/main.py"], &[]), expected);
}

#[test]
fn a_valid_compiled_form_takes_the_place_of_the_source() {
    let source = "x = 1\n";
    let with = |head: &[u8]| {
        let image = image()
            .file_of_time("/app/m.py", source, TIME)
            .file("/app/__pycache__/m.cpython-311.pyc", head)
            .file("/app/main.py", "import m");
        hot(&image, &["python3", "/app/main.py"], &[])[1..].to_vec()
    };
    let pyc = "/app/__pycache__/m.cpython-311.pyc";
    assert_eq!(with(&compiled(0, TIME, source.len())), [pyc]);
    assert_eq!(with(&compiled(0, TIME + 1, source.len())), ["/app/m.py"]);
    assert_eq!(with(&compiled(0, TIME, source.len() + 1)), ["/app/m.py"]);
    assert_eq!(with(&compiled(1, 0, 0)), [pyc], "by hash, not checked");
    assert_eq!(with(&compiled(3, 0, 0)), [pyc, "/app/m.py"], "by hash, checked");
    assert_eq!(with(b"short"), ["/app/m.py"]);
}

#[test]
fn virtual_environments_and_pth_files_extend_the_path() {
    let packages = "/venv/lib/python3.11/site-packages";
    let image = image()
        .symlink("/venv/bin/python", "/usr/bin/python3")
        .file("/venv/pyvenv.cfg", "home = /usr/bin\ninclude-system-site-packages = false\n")
        .file(format!("{packages}/added.pth"), "/srv/more\n# comment\nimport hook\n")
        .file(format!("{packages}/hook.py"), "\n")
        .file(format!("{packages}/a.py"), "\n")
        .file("/srv/more/b.py", "\n");
    let env = ["PYTHONPATH=/srv/listed"];
    let image = image.file("/srv/listed/c.py", "\n");
    let hot = image.hot_paths(&["/venv/bin/python", "-c", "import a, b, c"], &env);
    let expected = [
        "/venv/pyvenv.cfg".to_owned(),
        format!("{packages}/added.pth"),
        format!("{packages}/hook.py"),
        format!("{packages}/a.py"),
        "/srv/more/b.py".to_owned(),
        "/srv/listed/c.py".to_owned(),
    ];
    let behind_start: Vec<_> = hot.into_iter().filter(|path| !START.contains(&path.as_str())).collect();
    assert_eq!(behind_start, expected);
}

#[test]
fn a_module_is_run_with_its_package() {
    let image = image()
        .file("/app/serve/__init__.py", "\n")
        .file("/app/serve/__main__.py", "from . import core\n")
        .file("/app/serve/core.py", "\n");
    let expected = ["/app/serve/__init__.py", "/app/serve/__main__.py", "/app/serve/core.py"];
    assert_eq!(hot(&image, &["python3", "-m", "serve"], &["PYTHONPATH=/app"]), expected);
}

#[test]
fn servers_import_the_application_that_their_arguments_name() {
    let image = image()
        .program("/usr/bin/gunicorn", "#!/usr/bin/python3\nimport sys\n")
        .file("/web/__init__.py", "\n")
        .file("/web/wsgi.py", "import shop\n")
        .file("/shop.py", "\n");
    let hot = image.hot_paths(&["gunicorn", "-b", "0.0.0.0:80", "web.wsgi:app"], &[]);
    assert_eq!(hot[0], "/usr/bin/gunicorn");
    assert_eq!(hot[1 + START.len()..], ["/web/__init__.py", "/web/wsgi.py", "/shop.py"]);
}

#[test]
fn imports_that_go_in_circles_or_deep_end() {
    let mut image = image().file("/app/main.py", "import m0\nimport main\n");
    for number in 0..2000 {
        image = image.file(format!("/app/m{number}.py"), format!("import m{}\nimport main\n", number + 1));
    }
    let image = image.file("/app/long.py", format!("import {}x\n", "a.".repeat(100_000)));
    assert_eq!(hot(&image, &["python3", "/app/main.py"], &[]).len(), 2001);
    assert_eq!(hot(&image, &["python3", "/app/long.py"], &[]), ["/app/long.py"]);
}

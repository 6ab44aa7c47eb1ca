use super::super::test_image::{TestImage, elf_program};

fn hot(image: &TestImage, argv: &[&str]) -> Vec<String> {
    image.clone().program("/usr/bin/node", elf_program()).hot_paths(argv, &[])[1..].to_vec()
}

#[test]
fn paths_are_resolved_as_files_then_as_directories() {
    let image = TestImage::new()
        .file(
            "/app/main.js",
            "require('./a'); require('./b'); require('./c.json'); require('../d/'); require('./none')",
        )
        .file("/app/a.js", "require('.')")
        .file("/app/b/package.json", r#"{"main": "lib/b"}"#)
        .file("/app/b/lib/b.js", "\n")
        .file("/app/c.json", "{}")
        .file("/app/index.js", "\n")
        .file("/d/index.js", "\n");
    let expected = [
        "/app/main.js",
        "/app/a.js",
        "/app/index.js",
        "/app/b/package.json",
        "/app/b/lib/b.js",
        "/app/c.json",
        "/d/index.js",
    ];
    assert_eq!(hot(&image, &["node", "--no-warnings", "/app/main"]), expected);
}

#[test]
fn packages_are_looked_up_upwards() {
    let image = TestImage::new()
        .file("/app/src/main.js", "require('a'); require('@s/b/inside'); require('fs'); require('node:net')")
        .file("/app/node_modules/a/index.js", "require('b')")
        .file("/app/node_modules/a/node_modules/b/index.js", "\n")
        .file("/node_modules/@s/b/inside.js", "\n");
    let expected = [
        "/app/src/main.js",
        "/app/node_modules/a/index.js",
        "/app/node_modules/a/node_modules/b/index.js",
        "/node_modules/@s/b/inside.js",
    ];
    assert_eq!(hot(&image, &["node", "/app/src/main.js"]), expected);
}

#[test]
fn exports_decide_by_condition_and_pattern() {
    let exports = r#"{"exports": {
        ".": {"browser": "./browser.js", "import": "./esm.mjs", "require": {"types": "./t.d.ts", "default": "./cjs.js"}},
        "./parts/*": ["./lib/*.js"]}}"#;
    let image = TestImage::new()
        .file("/main.js", "require('p'); require('p/parts/one')")
        .file("/main.mjs", "import p from 'p'")
        .file("/node_modules/p/package.json", exports)
        .file("/node_modules/p/browser.js", "\n")
        .file("/node_modules/p/esm.mjs", "\n")
        .file("/node_modules/p/cjs.js", "\n")
        .file("/node_modules/p/lib/one.js", "\n");
    let package = "/node_modules/p/package.json";
    let expected = ["/main.js", package, "/node_modules/p/cjs.js", "/node_modules/p/lib/one.js"];
    assert_eq!(hot(&image, &["node", "/main.js"]), expected);
    assert_eq!(hot(&image, &["node", "/main.mjs"]), ["/main.mjs", package, "/node_modules/p/esm.mjs"]);
}

#[test]
fn scripts_of_the_package_are_run_by_npm() {
    let image = TestImage::new()
        .symlink("/usr/bin/npm", "/usr/lib/npm/npm-cli.js")
        .program("/usr/lib/npm/npm-cli.js", "#!/usr/bin/env node\n")
        .program("/usr/bin/env", elf_program())
        .program("/bin/sh", elf_program())
        .file("/package.json", r#"{"scripts": {"start": "serve ./dist"}}"#)
        .symlink("/node_modules/.bin/serve", "../serve/cli.js")
        .program("/node_modules/serve/cli.js", "#!/usr/bin/env node\nrequire('./lib')")
        .file("/node_modules/serve/lib.js", "\n");
    let image = image.program("/usr/bin/node", elf_program());
    let expected = [
        "/usr/lib/npm/npm-cli.js",
        "/usr/bin/env",
        "/usr/bin/node",
        "/package.json",
        "/bin/sh",
        "/node_modules/serve/cli.js",
        "/node_modules/serve/lib.js",
    ];
    assert_eq!(image.hot_paths(&["npm", "run", "start"], &[]), expected);
}

#[test]
fn preloaded_modules_come_first() {
    let image = TestImage::new().file("/first.js", "\n").file("/main.js", "\n");
    assert_eq!(hot(&image, &["node", "-r", "./first", "/main.js"]), ["/first.js", "/main.js"]);
}

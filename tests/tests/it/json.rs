//! The JSON output of the command: each is as its schema says, and `docs/JSON.md` explains every name in it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use lazuli_tests::{
    Compression, ImageBuilder, Result, Scratch, TarLayer,
    error::Context as _,
    lazuli,
    process::{command, run},
    programs::lazuli_ok,
    samples::noise,
};
use serde_json::{Value, json};

/// Commands with `--json`, each with a schema of its name.
const COMMANDS: [&str; 5] = ["convert", "check", "inspect", "status", "why"];

/// Reads schema and document from the two files that are named, and fails with a line for each difference.
const VALIDATE: &str = "
import json, sys, jsonschema
schema, document = (json.load(open(path)) for path in sys.argv[1:])
jsonschema.Draft202012Validator.check_schema(schema)
found = list(jsonschema.Draft202012Validator(schema).iter_errors(document))
sys.exit('\\n'.join(f'{error.json_path}: {error.message[:300]}' for error in found) or None)
";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests crate lies in the workspace").to_owned()
}

fn schema(name: &str) -> Value {
    let path = root().join(format!("lazuli/schema/{name}.schema.json"));
    serde_json::from_slice(&fs::read(path).expect("readable")).expect("a schema is JSON")
}

/// Readers are to ignore names that they do not know; here each must be one of the schema.
fn close(schema: &mut Value) {
    match schema {
        Value::Object(members) => {
            members.values_mut().for_each(close);
            if members.get("properties").is_some_and(Value::is_object) {
                members.insert("additionalProperties".to_owned(), json!(false));
            }
        }
        Value::Array(items) => items.iter_mut().for_each(close),
        _ => {}
    }
}

/// Holds the output of a command to its schema, with no names beyond it.
pub(crate) fn check_schema(name: &str, output: &str) -> Result<()> {
    let scratch = Scratch::new("schema")?;
    let mut schema = schema(name);
    close(&mut schema);
    let (schema_path, output_path) = (scratch.join("schema.json"), scratch.join("output.json"));
    fs::write(&schema_path, schema.to_string()).at("writing", &schema_path)?;
    fs::write(&output_path, output).at("writing", &output_path)?;
    run(command("python3", ["-W", "ignore", "-c", VALIDATE]).args([&schema_path, &output_path])).map(drop)
}

/// Every property of a schema with its description.
fn properties(schema: &Value, found: &mut BTreeSet<(String, String)>) {
    if let Some(named) = schema["properties"].as_object() {
        let describe = |property: &Value| property["description"].as_str().unwrap_or("no description").to_owned();
        found.extend(named.iter().map(|(name, property)| (name.clone(), describe(property))));
    }
    let parts = schema.as_object().into_iter().flat_map(|members| members.values());
    parts.for_each(|part| properties(part, found));
}

#[test]
fn the_page_on_json_explains_every_name_once() {
    let mut expected: BTreeMap<String, (String, Vec<&str>)> = BTreeMap::new();
    for command in COMMANDS {
        let mut found = BTreeSet::new();
        properties(&schema(command), &mut found);
        for (name, meaning) in found {
            let (known, commands) = expected.entry(name.clone()).or_insert_with(|| (meaning.clone(), Vec::new()));
            assert_eq!(*known, meaning, "{name} has two meanings");
            commands.push(command);
        }
    }
    let expected = expected
        .iter()
        .map(|(name, (meaning, commands))| format!("| `{name}` | {meaning} | {} |", commands.join(", ")));
    let page = fs::read_to_string(root().join("docs/JSON.md")).expect("readable");
    let rows: Vec<_> = page.lines().filter(|line| line.starts_with("| `")).collect();
    assert_eq!(rows, expected.collect::<Vec<_>>());
}

#[test]
fn a_name_that_is_in_no_schema_is_noticed() -> Result<()> {
    let empty = json!({
        "mode": null, "mode_reason": null, "images": [], "chains": [], "not_lazy": [],
        "total": {
            "layer_count": 0, "present_frame_count": 0, "needed_frame_count": 0, "compressed_len": 0,
            "fetched_bytes": 0, "disk_bytes": 0,
        },
    });
    check_schema("status", &empty.to_string())?;
    let mut with_more = empty;
    with_more["total"]["new"] = json!(1);
    let error = check_schema("status", &with_more.to_string()).expect_err("it has a name more").to_string();
    assert!(error.contains("$.total"), "{error}");
    Ok(())
}

/// That of `status` and `why` is held to its schema in `status.rs` and `why.rs`, by the questions there.
#[test]
fn json_of_images_is_what_its_schemas_say() -> Result<()> {
    let scratch = Scratch::new("json")?;
    let lower = TarLayer::new().file("one", noise(1, 5000)).file("copy-of-one", noise(1, 5000)).finish()?;
    let upper = TarLayer::new().program("bin/start", b"#!/bin/sh\n").file("two", noise(2, 70_000)).finish()?;
    let image = ImageBuilder::new().layer(lower, Compression::Gzip).layer(upper, Compression::Gzip);
    let original = image.write(&scratch, "original")?;
    let other = ImageBuilder::new().layer(TarLayer::new().file("one", noise(3, 50)).finish()?, Compression::Gzip);
    let other = other.write(&scratch, "other")?;
    let path = |name: &str| scratch.join(name).display().to_string();
    let layout = |name: &str| format!("oci:{}:latest", path(name));
    run(&mut command("openssl", ["genpkey", "-algorithm", "ed25519", "-out", &path("key.pem")]))?;
    let lazy = layout("lazy");
    let profile = scratch.join("profile.json");
    let hot = json!({ "version": 1, "files": [{ "path": "/two" }] });
    fs::write(&profile, hot.to_string()).at("writing", &profile)?;

    let profile = profile.display().to_string();
    let convert = ["convert", "--json", "--profile", &profile, "--sign", &path("key.pem"), &original, &lazy];
    check_schema("convert", &lazuli_ok(convert)?)?;
    // Layers that are carried over have no figures of a conversion.
    check_schema("convert", &lazuli_ok(["convert", "--json", &lazy, &layout("again")])?)?;
    for arguments in [&["inspect", "--json", &lazy][..], &["inspect", "--json", "--hot", &lazy]] {
        check_schema("inspect", &lazuli_ok(arguments)?)?;
    }
    check_schema("inspect", &lazuli_ok(["inspect", "--json", &original])?)?;
    check_schema("check", &lazuli_ok(["check", "--json", "--against", &original, &lazy])?)?;
    let found = lazuli(["check", "--json", "--against", &other, &lazy])?;
    assert_eq!(found.code, Some(1), "{found:?}");
    check_schema("check", &found.stdout)
}

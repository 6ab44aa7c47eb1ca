//! `lazuli inspect`: its figures are those of the blobs, and it reads little to find them.

use std::fs;

use format_spec::records::hot_reason;
use lazuli_tests::{
    Compression, ImageBuilder, LazyBlob, Result, Scratch, TarLayer, TestRegistry,
    error::Context as _,
    image::{edit_manifest, extend_image, layout_blob, layout_manifest, replace_layer},
    lazuli,
    programs::lazuli_ok,
    registry_server::digest_in,
    samples::{noise, readable_layers},
};
use serde_json::{Value, json};

fn inspect(image: &str, arguments: &[&str]) -> Result<Value> {
    let text = lazuli_ok([&["inspect", image, "--json"], arguments].concat())?;
    serde_json::from_str(&text).map_err(std::io::Error::from).context("parsing")
}

fn open_layer(layout: &str, number: usize) -> Result<LazyBlob> {
    let path = layout_blob(layout, digest_in(&layout_manifest(layout)?["layers"][number])?);
    LazyBlob::open(&fs::read(&path).at("reading", &path)?)
}

/// Two lazy layers: the lower has one content twice, the upper one of the lower's, replaces a file and deletes one.
fn two_layers(scratch: &Scratch) -> Result<String> {
    let lower = TarLayer::new()
        .file("one", noise(1, 5000))
        .file("copy-of-one", noise(1, 5000))
        .file("replaced", noise(2, 700))
        .file("deleted", noise(3, 60))
        .hard_link("deleted-too", "deleted")
        .file("linked", noise(4, 9))
        .hard_link("kept", "linked");
    let upper = TarLayer::new()
        .file("from-below", noise(2, 700))
        .file("replaced", noise(5, 11))
        .whiteout("", "deleted")
        .whiteout("", "deleted-too")
        .whiteout("", "linked");
    let layers = [lower, upper].map(TarLayer::finish);
    let mut image = ImageBuilder::new();
    for tar in layers {
        image = image.layer(tar?, Compression::Gzip);
    }
    let original = image.write(scratch, "original")?;
    let layout = format!("oci:{}:latest", scratch.join("lazy").display());
    lazuli_ok(["convert", &original, &layout])?;
    Ok(layout)
}

#[test]
fn duplicate_and_hidden_bytes_are_counted_once() -> Result<()> {
    let scratch = Scratch::new("inspect-overlap")?;
    let facts = inspect(&two_layers(&scratch)?, &[])?;
    let layers = &facts["layers"];
    let dedup = |layer: usize| {
        let dedup = &layers[layer]["dedup"];
        [&dedup["piece_count"], &dedup["held_len"], &dedup["duplicate_len"], &dedup["duplicate_of_lower_len"]]
            .map(Value::as_u64)
    };
    assert_eq!(dedup(0), [5, 10_769, 5000, 0].map(Some));
    assert_eq!(dedup(1), [2, 711, 0, 700].map(Some));
    // The file whose first name is deleted is shown under its second one.
    assert_eq!(layers[0]["hidden"], json!({ "file_count": 2, "hidden_len": 760 }));
    assert_eq!(layers[1]["hidden"], json!({ "file_count": 0, "hidden_len": 0 }));
    let total = &facts["total"];
    assert_eq!([&total["duplicate_len"], &total["duplicate_of_lower_len"], &total["hidden_len"]], [5000, 700, 760]);
    Ok(())
}

#[test]
fn sizes_and_frames_are_those_of_the_blob() -> Result<()> {
    let scratch = Scratch::new("inspect-sizes")?;
    let original = readable_layers()?
        .into_iter()
        .fold(ImageBuilder::new(), |image, tar| image.layer(tar, Compression::Gzip))
        .write(&scratch, "original")?;
    let layout = format!("oci:{}:latest", scratch.join("lazy").display());
    lazuli_ok(["convert", &original, &layout])?;
    let facts = inspect(&layout, &[])?;
    for number in 0..3 {
        let (layer, blob) = (&facts["layers"][number], open_layer(&layout, number)?);
        let index = &blob.index;
        assert_eq!(layer["lazy_by"], "annotations");
        assert_eq!(layer["plain_len"], index.tar_len());
        assert_eq!(layer["inode_count"], index.inodes().len());
        let mut plain: Vec<u32> = index.frames().iter().map(|frame| frame.plain_len.get()).collect();
        plain.sort_unstable();
        let (min, median, max) = (plain[0], plain[plain.len() / 2], plain[plain.len() - 1]);
        assert_eq!(layer["frame_count"], plain.len());
        assert_eq!(layer["frame_plain_len"], json!({ "min": min, "median": median, "max": max }));
        let compressed = layer["compressed_len"].as_u64();
        assert_eq!(compressed, layout_manifest(&layout)?["layers"][number]["size"].as_u64());
        let ratio = compressed.unwrap_or(0) as f64 / index.tar_len() as f64;
        assert!(layer["ratio"].as_f64().is_some_and(|found| (found - ratio).abs() < 1e-9));
    }
    Ok(())
}

#[test]
fn hot_pack_is_listed_in_its_order_with_reasons_in_words() -> Result<()> {
    let scratch = Scratch::new("inspect-hot")?;
    let layout = two_layers(&scratch)?;
    let mut lower = open_layer(&layout, 0)?;
    lower.hot.clear();
    lower.add_hot("/replaced", u64::MAX, hot_reason::LIBRARY)?;
    lower.add_hot("/one", 4096, hot_reason::COMMAND)?;
    let (blob, lazy) = lower.assemble(|_, _| {})?;
    replace_layer(&layout, 0, &blob, &lazy)?;
    let facts = inspect(&layout, &["--hot"])?;
    let hot_pack = &facts["layers"][0]["hot_pack"];
    assert_eq!(facts["layers"][0]["hot_pack_len"], lazy.hot_len);
    assert_eq!([&hot_pack["file_count"], &hot_pack["piece_count"], &hot_pack["held_len"]], [2, 2, 4796]);
    let reason = |reason: &str, len: u64| json!({ "hot_reason": reason, "file_count": 1, "held_len": len });
    assert_eq!(hot_pack["reasons"], json!([reason("command", 4096), reason("library", 700)]));
    let entry =
        |path: &str, len: u64, reason: &str| json!({ "path": path, "offset": 0, "len": len, "hot_reason": reason });
    assert_eq!(hot_pack["pieces"], json!([entry("/replaced", 700, "library"), entry("/one", 4096, "command")]));
    assert_eq!(facts["layers"][1]["hot_pack"], Value::Null);
    let text = lazuli_ok(["inspect", &layout, "--hot"])?;
    let line = text.lines().find(|line| line.contains("/replaced")).unwrap_or_default();
    assert_eq!(line.split_whitespace().collect::<Vec<_>>(), ["1", "/replaced", "library", "0", "700"]);
    assert!(text.contains("library: 700 B of 1 files"), "{text}");
    Ok(())
}

#[test]
fn ordinary_layers_and_lost_annotations_are_told_apart() -> Result<()> {
    let scratch = Scratch::new("inspect-kinds")?;
    let layout = two_layers(&scratch)?;
    let top = TarLayer::new().file("top", "top").finish()?;
    let extended = extend_image(&layout, &top, &scratch, "extended")?;
    edit_manifest(&extended, |manifest| {
        manifest["layers"][1].as_object_mut().map(|layer| layer.remove("annotations"));
    })?;
    let facts = inspect(&extended, &[])?;
    let kinds: Vec<_> =
        facts["layers"].as_array().into_iter().flatten().map(|layer| layer["lazy_by"].clone()).collect();
    assert_eq!(kinds, [json!("annotations"), json!("footer"), Value::Null]);
    assert_eq!(facts["total"]["lazy_layer_count"], 2);
    let text = lazuli_ok(["inspect", &extended])?;
    assert!(text.contains("tar+zstd lazy, annotations lost") && text.contains("tar+gzip "), "{text}");
    Ok(())
}

#[test]
fn only_indexes_and_dedup_sections_are_read() -> Result<()> {
    let scratch = Scratch::new("inspect-cheap")?;
    let registry = TestRegistry::start(&scratch)?;
    let layers = readable_layers()?.into_iter();
    let image = layers.fold(ImageBuilder::new(), |image, tar| image.layer(tar, Compression::Gzip));
    let original = registry.push(&image.write(&scratch, "image")?, "sample:original")?;
    let lazy = registry.reference("sample:lazy");
    lazuli_ok(["convert", &original, &lazy])?;
    let before = registry.blob_bytes()?;
    let facts = inspect(&lazy, &[])?;
    let read = registry.blob_bytes()? - before;
    let whole = facts["total"]["compressed_len"].as_u64().unwrap_or(0);
    assert!(whole > 10 << 20 && read < 16 << 10, "{read} of {whole} bytes");
    Ok(())
}

#[test]
fn what_cannot_be_inspected_is_said_in_one_line() -> Result<()> {
    let scratch = Scratch::new("inspect-missing")?;
    let layout = two_layers(&scratch)?;
    let missing = format!("oci:{}:latest", scratch.join("missing").display());
    let digest = digest_in(&layout_manifest(&layout)?["layers"][1])?;
    let path = layout_blob(&layout, digest);
    let mut blob = fs::read(&path).at("reading", &path)?;
    let position = blob.len() - 500;
    blob[position] ^= 1;
    fs::write(&path, blob).at("writing", &path)?;
    let damaged = digest.to_string();
    for (image, word) in [(&missing, "no OCI image layout"), (&layout, damaged.as_str())] {
        let finished = lazuli(["inspect", image])?;
        assert_eq!((finished.code, finished.stdout.as_str()), (Some(1), ""), "{finished:?}");
        assert!(finished.stderr.lines().count() == 1 && finished.stderr.contains(word), "{finished:?}");
    }
    Ok(())
}

//! `lazuli check`: a sound image is sound, and whatever is damaged or lies is found and named.

use std::{collections::BTreeMap, fs, io::Read as _, path::Path};

use format_spec::{Digest, Index, Inode, LazyLayer, records::hot_reason};
use lazuli_tests::{
    Compression, Finished, ImageBuilder, LazyBlob, Result, Scratch, TarLayer, TestRegistry,
    error::Context as _,
    image::{edit_manifest, layout_blob, layout_manifest, put_blob, replace_layer},
    lazuli,
    programs::lazuli_ok,
    registry_server::digest_in,
    samples::{eventful_layers, noise},
    tar_layer::Attributes,
};
use serde_json::{Value, json};

/// A converted image whose only layer has files of several frames, a hot pack and a dedup section.
struct Given {
    scratch: Scratch,
    original: String,
    layout: String,
    blob: LazyBlob,
}

impl Given {
    fn new(name: &str) -> Result<Self> {
        let scratch = Scratch::new(name)?;
        let image = ImageBuilder::new().layer(layer()?, Compression::Gzip);
        let original = image.write(&scratch, "original")?;
        let layout = format!("oci:{}:latest", scratch.join("converted").display());
        lazuli_ok(["convert", &original, &layout])?;
        let mut blob = LazyBlob::open(&read_layer(&layout)?)?;
        blob.hot.clear();
        blob.add_hot("/usr/bin/tool", 8192, hot_reason::COMMAND)?;
        blob.add_hot("/usr/lib/small", u64::MAX, hot_reason::LIBRARY)?;
        let given = Self { scratch, original, layout, blob };
        let (blob, lazy) = given.blob.assemble(|_, _| {})?;
        given.put(&blob, &lazy)?;
        Ok(given)
    }

    /// Makes a blob the only layer of the image, with every digest right.
    fn put(&self, blob: &[u8], lazy: &LazyLayer) -> Result<()> {
        replace_layer(&self.layout, 0, blob, lazy)
    }

    /// Changes the file of the layer's blob, which keeps its name.
    fn damage(&self, position: u64) -> Result<()> {
        let path = layout_blob(&self.layout, digest_in(&layout_manifest(&self.layout)?["layers"][0])?);
        flip(&path, usize::try_from(position).expect("a small blob"))
    }

    /// What `check --json` finds, one line each: part, place, problem.
    fn findings(&self) -> Result<Vec<String>> {
        findings(&self.layout, &[])
    }
}

/// Every kind of entry that has something to lie about; the large file has frames of its own.
fn layer() -> Result<Vec<u8>> {
    let marked = Attributes { xattrs: vec![("user.mark", b"value".to_vec())], ..Attributes::of_mode(0o640) };
    TarLayer::new()
        .directory("etc")
        .file_with("etc/marked", &marked, "marked")
        .whiteout("etc", "gone")
        .program("usr/bin/tool", noise(1, 40_000))
        .file("usr/lib/small", "small")
        .file("usr/lib/large", noise(2, 3 << 20))
        .symlink("usr/lib/link", "small")
        .hard_link("usr/lib/hard", "usr/lib/small")
        .fifo("usr/pipe")
        .finish()
}

fn read_layer(layout: &str) -> Result<Vec<u8>> {
    let path = layout_blob(layout, digest_in(&layout_manifest(layout)?["layers"][0])?);
    fs::read(&path).at("reading", &path)
}

fn flip(path: &Path, position: usize) -> Result<()> {
    let mut bytes = fs::read(path).at("reading", path)?;
    bytes[position] ^= 1;
    fs::write(path, bytes).at("writing", path)
}

/// Runs `lazuli check --json`; the exit code says whether anything was found.
fn report(image: &str, arguments: &[&str]) -> Result<Value> {
    let finished = lazuli([&["check", image, "--json"], arguments].concat())?;
    let report: Value = serde_json::from_str(&finished.stdout).map_err(std::io::Error::from).context("parsing")?;
    let is_sound = report["is_sound"].as_bool();
    assert_eq!(finished.code, Some(if is_sound == Some(true) { 0 } else { 1 }), "{finished:?}");
    Ok(report)
}

fn findings(image: &str, arguments: &[&str]) -> Result<Vec<String>> {
    let report = report(image, arguments)?;
    let images = || report["images"].as_array().into_iter().flatten();
    let layers = images().flat_map(|image| image["layers"].as_array().into_iter().flatten());
    let parts = layers.chain(images()).chain(report["artifacts"].as_array().into_iter().flatten()).chain([&report]);
    let all = parts.flat_map(|part| part["findings"].as_array().cloned().unwrap_or_default());
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Ok(all.map(|one| [&one["part"], &one["place"], &one["problem"]].map(text).join(" | ")).collect())
}

/// Whether one of the findings has all `words`.
fn check_found(found: &[String], words: &[&str]) {
    assert!(found.iter().any(|line| words.iter().all(|word| line.contains(word))), "{words:?} in {found:#?}");
}

fn refusal(finished: &Finished, words: &[&str]) {
    assert_eq!((finished.code, finished.stdout.as_str()), (Some(1), ""), "{finished:?}");
    assert_eq!(finished.stderr.lines().count(), 1, "{finished:?}");
    assert!(words.iter().all(|word| finished.stderr.contains(word)), "{words:?}: {finished:?}");
}

#[test]
fn converted_image_is_sound_and_that_of_the_original() -> Result<()> {
    let scratch = Scratch::new("check-sound")?;
    let registry = TestRegistry::start(&scratch)?;
    let layers = eventful_layers()?.into_iter().zip(Compression::ALL);
    let image = layers.fold(ImageBuilder::new(), |image, (tar, compression)| image.layer(tar, compression));
    let original = registry.push(&image.write(&scratch, "image")?, "sample:original")?;
    let lazy = registry.reference("sample:lazy");
    lazuli_ok(["convert", &original, &lazy])?;
    let report = report(&lazy, &["--against", &original])?;
    assert_eq!((&report["is_sound"], &report["findings"]), (&json!(true), &json!([])));
    for layer in report["images"][0]["layers"].as_array().expect("layers") {
        assert_eq!((&layer["is_lazy"], &layer["tar_digest"]), (&json!(true), &layer["diff_id"]));
        assert!(
            layer["checked_inode_count"].as_u64() > Some(3) && layer["checked_frame_count"].as_u64() > Some(0),
            "{layer}"
        );
        assert_eq!(layer["not_checked"], json!([]));
    }
    assert!(lazuli_ok(["check", &lazy])?.ends_with(" is sound\n"));
    // The original is ordinary: its blobs and diff IDs are checked all the same.
    let ordinary = lazuli_ok(["check", &original])?;
    assert_eq!(ordinary.matches(": sound (ordinary").count(), 3, "{ordinary}");
    Ok(())
}

#[test]
fn hot_pack_and_dedup_section_are_compared_with_the_tar_stream() -> Result<()> {
    let given = Given::new("check-hot")?;
    let report = report(&given.layout, &["--against", &given.original])?;
    assert_eq!(report["is_sound"], json!(true), "{report:#}");
    assert_eq!(report["images"][0]["layers"][0]["checked_hot_piece_count"], json!(2));
    assert_eq!(report["images"][0]["layers"][0]["checked_dedup_piece_count"], json!(given.blob.dedup.len()));
    assert!(given.blob.dedup.len() > 3);
    Ok(())
}

/// One changed byte in each part of a blob: that part is named, and that the blob has another digest.
#[test]
fn each_damaged_part_of_a_blob_is_named() -> Result<()> {
    let given = Given::new("check-damage")?;
    let (blob, lazy) = given.blob.assemble(|_, _| {})?;
    let hot = lazy.hot_range().expect("it has a hot pack");
    let footer = lazy.blob_len - 136;
    let frame = given.blob.index.frames()[1].blob_range();
    let of_frame = format!("frame 1, bytes {}..{} of the blob", frame.start, frame.end);
    let cases: [(&str, u64, &[&str]); 9] = [
        ("frame", frame.start + 30, &["frame | ", &of_frame, "its digest is sha256:"]),
        ("header of the index", lazy.index.offset - 3, &["layout | index", "does not announce"]),
        ("index", lazy.index.offset + 40, &["index | index", "sha256:"]),
        ("header of the hot pack", hot.start - 5, &["layout | hot pack", "does not announce"]),
        ("hot pack", hot.start + 10, &["hot_pack | hot frame 0", "its digest is sha256:"]),
        ("header of the dedup section", hot.end + 1, &["layout | dedup section", "does not announce"]),
        ("dedup section", hot.end + 30, &["dedup | dedup section", "digest"]),
        ("checksum of the footer", lazy.blob_len - 1, &["footer | footer", "CRC-32"]),
        ("magic number of the footer", footer, &["footer | footer", "there is none"]),
    ];
    for (name, position, words) in cases {
        given.put(&blob, &lazy)?;
        given.damage(position)?;
        let found = given.findings()?;
        check_found(&found, words);
        check_found(&found, &["blob | blob", "sha256:"]);
        assert!(found.len() <= 3, "{name}: {found:#?}");
    }
    Ok(())
}

#[test]
fn truncated_and_overlong_blobs_are_named() -> Result<()> {
    let given = Given::new("check-length")?;
    let (blob, lazy) = given.blob.assemble(|_, _| {})?;
    let path = layout_blob(&given.layout, lazy.blob);
    fs::write(&path, &blob[..blob.len() / 2]).at("writing", &path)?;
    check_found(&given.findings()?, &["blob | blob", "ends after"]);
    fs::write(&path, [blob.as_slice(), b"more"].concat()).at("writing", &path)?;
    check_found(&given.findings()?, &["blob | blob", "longer"]);
    fs::remove_file(&path).at("removing", &path)?;
    check_found(&given.findings()?, &["blob | blob", &lazy.blob.hex()]);
    Ok(())
}

#[test]
fn each_changed_annotation_is_named() -> Result<()> {
    let given = Given::new("check-annotations")?;
    let (blob, lazy) = given.blob.assemble(|_, _| {})?;
    for key in lazy.to_annotations().keys() {
        let is_digest = key.ends_with(".digest");
        let other = if is_digest { Digest::of(b"other").to_string() } else { "17".to_owned() };
        for value in [Some(other), Some("no value".to_owned()), None] {
            given.put(&blob, &lazy)?;
            edit_manifest(&given.layout, |manifest| match &value {
                Some(value) => manifest["layers"][0]["annotations"][key] = json!(value),
                None => drop(manifest["layers"][0]["annotations"].as_object_mut().map(|all| all.remove(key))),
            })?;
            let report = report(&given.layout, &[])?;
            check_found(&findings(&given.layout, &[])?, &["annotation | annotation ", key.as_str()]);
            // The footer says where the index is, so the rest is checked all the same.
            assert_eq!(report["images"][0]["layers"][0]["not_checked"], json!([]), "{key} {value:?}");
        }
    }
    Ok(())
}

#[test]
fn damaged_manifest_and_config_are_named() -> Result<()> {
    let given = Given::new("check-manifest")?;
    let index = Path::new(given.layout.trim_start_matches("oci:").trim_end_matches(":latest")).join("index.json");
    let index: Value = serde_json::from_slice(&fs::read(&index).at("reading", &index)?)
        .map_err(std::io::Error::from)
        .context("parsing")?;
    let manifest = digest_in(&index["manifests"][0])?;
    let config = digest_in(&layout_manifest(&given.layout)?["config"])?;
    for digest in [config, manifest] {
        let path = layout_blob(&given.layout, digest);
        flip(&path, 20)?;
        refusal(&lazuli(["check", &given.layout])?, &[&digest.to_string(), "damaged"]);
        flip(&path, 20)?;
    }
    assert_eq!(given.findings()?, [] as [String; 0]);
    Ok(())
}

/// An index with right digests that says something else than the tar stream, field by field.
#[test]
fn index_that_lies_about_a_file_is_named_with_path_and_field() -> Result<()> {
    type Lie = fn(&mut Inode);
    let given = Given::new("check-lies")?;
    let cases: [(&str, &str, Lie); 9] = [
        ("/usr/bin/tool", "mode is 4755 by the index, 0755", |inode| inode.mode = (inode.mode.get() | 0o4000).into()),
        ("/etc/marked", "size is 5 by the index, 6", |inode| inode.size = 5.into()),
        ("/etc/marked", "owner is 1000 by the index, 0", |inode| inode.uid = 1000.into()),
        ("/etc/marked", "group is 7 by the index, 0", |inode| inode.gid = 7.into()),
        ("/etc", "modification time is 5.000000000", |inode| inode.mtime_seconds = 5.into()),
        ("/usr/pipe", "it is a socket by the index, a pipe", |inode| inode.mode = (0o140_600).into()),
        ("/usr/lib/link", "target is smal by the index, small", |inode| inode.size = 4.into()),
        ("/etc/marked", "xattrs is none by the index, user.mark=value", |inode| inode.xattrs = u32::MAX.into()),
        ("/usr", "flags is opaque by the index, implicit", |inode| inode.flags = 2.into()),
    ];
    for (path, problem, lie) in cases {
        let liar = given.blob.inode_at(path)?;
        let (blob, lazy) = given.blob.assemble(|number, inode| {
            if number == liar {
                lie(inode)
            }
        })?;
        given.put(&blob, &lazy)?;
        let found = given.findings()?;
        check_found(&found, &["file | ", &format!("| {path} |"), problem]);
        assert!(found.len() <= 2, "{found:#?}");
    }
    Ok(())
}

/// Two files of one length whose places in the tar stream are exchanged by the index.
#[test]
fn index_that_lies_about_where_content_stands_is_named() -> Result<()> {
    let given = Given::new("check-extents")?;
    let mut blob = given.blob.clone();
    let liar = blob.inode_at("/usr/bin/tool")?;
    let plain = blob.index.inode(liar).map(Inode::plain_range).unwrap_or_default();
    let number = blob.index.extents_in_plain(&plain).start;
    let mut bytes = blob.index.as_bytes().to_vec();
    // The extent moves by one byte of the tar stream, in place, with the checksum of its section made right.
    let extent = blob.index.extents()[number];
    let record: Vec<u8> =
        [extent.tar_offset, extent.plain_offset, extent.len].iter().flat_map(|n| n.to_bytes()).collect();
    let at = bytes.windows(record.len()).position(|window| window == record).expect("the extent is in the index");
    bytes[at..at + 8].copy_from_slice(&(extent.tar_offset.get() - 1).to_le_bytes());
    blob.index = Index::open(bytes).map_err(std::io::Error::other).context("opening")?;
    blob.hot.clear();
    let (bytes, lazy) = blob.assemble(|_, _| {})?;
    given.put(&bytes, &lazy)?;
    let found = given.findings()?;
    check_found(&found, &["file | /usr/bin/tool", "extent 0 is 40000 bytes at 0", "by the tar stream"]);
    Ok(())
}

#[test]
fn hot_pack_and_dedup_section_that_lie_are_named() -> Result<()> {
    let given = Given::new("check-copies")?;
    let mut lying = given.blob.clone();
    lying.hot[0].1[100] ^= 1;
    let (blob, lazy) = lying.assemble(|_, _| {})?;
    given.put(&blob, &lazy)?;
    let found = given.findings()?;
    check_found(&found, &["hot_pack | hot piece 0, bytes 0..8192 of /usr/bin/tool", "not those of the tar stream"]);
    assert_eq!(found.len(), 1, "{found:#?}");

    let mut lying = given.blob.clone();
    lying.dedup[2].digest[0] ^= 1;
    let (blob, lazy) = lying.assemble(|_, _| {})?;
    given.put(&blob, &lazy)?;
    let found = given.findings()?;
    check_found(&found, &["dedup | dedup piece 2, bytes 0..", " of /usr/lib/hard", "that of the tar stream"]);
    assert_eq!(found.len(), 1, "{found:#?}");
    Ok(())
}

#[test]
fn tar_stream_that_the_config_does_not_name_is_found() -> Result<()> {
    let given = Given::new("check-diff-id")?;
    let manifest = layout_manifest(&given.layout)?;
    let path = layout_blob(&given.layout, digest_in(&manifest["config"])?);
    let text = fs::read_to_string(&path).at("reading", &path)?;
    let diff_id = Digest::of(&layer()?).to_string();
    let other = Digest::of(b"other").to_string();
    assert!(text.contains(&diff_id));
    let config = put_blob(&given.layout, text.replace(&diff_id, &other).as_bytes())?;
    edit_manifest(&given.layout, |manifest| {
        manifest["config"]["digest"] = config["digest"].clone();
        manifest["config"]["size"] = config["size"].clone();
    })?;
    check_found(&given.findings()?, &["tar | tar stream", &diff_id, &other]);
    let against = findings(&given.layout, &["--against", &given.original])?;
    check_found(&against, &["config | config", "that of the original"]);
    check_found(&against, &["config | layer 1", "diff ID"]);
    Ok(())
}

#[test]
fn image_that_is_not_that_of_the_original_is_found() -> Result<()> {
    let given = Given::new("check-against")?;
    let more = TarLayer::new().file("more", "more").finish()?;
    let other = ImageBuilder::new().layer(TarLayer::new().file("other", "other").finish()?, Compression::Zstd);
    let other = other.layer(more, Compression::Gzip).write(&given.scratch, "other")?;
    edit_manifest(&other, |manifest| {
        manifest["annotations"] = json!({ "note": "lost" });
        manifest["layers"][0]["annotations"] = json!({ "of the layer": "lost too" });
    })?;
    let found = findings(&given.layout, &["--against", &other])?;
    check_found(&found, &["manifest | manifest", "1 layers, the original 2"]);
    check_found(&found, &["tar | layer 1", "its tar stream has digest"]);
    check_found(&found, &["annotation | manifest, annotation note", "nothing"]);
    check_found(&found, &["annotation | layer 1", "annotation of the layer", "nothing"]);

    let damaged = layout_blob(&given.original, digest_in(&layout_manifest(&given.original)?["layers"][0])?);
    flip(&damaged, 2000)?;
    check_found(&findings(&given.layout, &["--against", &given.original])?, &["blob | layer 1", "of the original"]);
    // Alone it is found as well: ordinary layers are read too.
    check_found(&findings(&given.original, &[])?, &["blob | blob", "sha256:"]);
    Ok(())
}

#[test]
fn image_that_is_not_there_is_said_in_one_line() -> Result<()> {
    let given = Given::new("check-missing")?;
    let missing = format!("oci:{}:latest", given.scratch.join("missing").display());
    refusal(&lazuli(["check", &missing])?, &["missing", "no OCI image layout"]);
    refusal(&lazuli(["check", &given.layout, "--against", &missing])?, &["missing", "no OCI image layout"]);
    refusal(&lazuli(["check", &given.layout, "--platform", "linux/s390x"])?, &["linux/s390x"]);
    Ok(())
}

/// A second opinion on the tree that a check compares with: what the `tar` crate reads of the same stream.
#[test]
fn what_a_check_accepts_is_what_another_tar_reader_says() -> Result<()> {
    let scratch = Scratch::new("check-second-opinion")?;
    let tar = eventful_layers()?.remove(0);
    let image = ImageBuilder::new().layer(tar.clone(), Compression::Gzip).write(&scratch, "image")?;
    let layout = format!("oci:{}:latest", scratch.join("lazy").display());
    lazuli_ok(["convert", &image, &layout])?;
    assert_eq!(findings(&layout, &[])?, [] as [String; 0]);
    let blob = LazyBlob::open(&read_layer(&layout)?)?;
    let mut archive = tar::Archive::new(tar.as_slice());
    let mut compared = 0;
    for entry in archive.entries().context("reading tar")? {
        let mut entry = entry.context("reading tar")?;
        let path = entry.path_bytes().into_owned();
        let Ok(path) = std::str::from_utf8(&path) else { continue };
        let number = blob.inode_at(&format!("/{}", path.trim_start_matches("./")))?;
        let inode = blob.index.inode(number).copied().expect("the inode exists");
        let header = entry.header().clone();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).context("reading tar")?;
        let xattrs: BTreeMap<Vec<u8>, Vec<u8>> = entry
            .pax_extensions()
            .context("reading tar")?
            .into_iter()
            .flatten()
            .filter_map(|extension| extension.ok())
            .filter_map(|extension| {
                let name = extension.key_bytes().strip_prefix(b"SCHILY.xattr.")?;
                Some((name.to_vec(), extension.value_bytes().to_vec()))
            })
            .collect();
        let index_xattrs: BTreeMap<_, _> =
            blob.index.xattrs(&inode).map(|(name, value)| (name.to_vec(), value.to_vec())).collect();
        let kind = header.entry_type();
        if kind.is_hard_link() {
            let target = entry.link_name_bytes().expect("a link has a target").into_owned();
            let target = format!("/{}", String::from_utf8_lossy(&target));
            assert_eq!(blob.inode_at(&target)?, number, "{path}");
            continue;
        }
        let is_symlink = kind.is_symlink();
        let mode = if is_symlink { 0o777 } else { header.mode().context("reading tar")? };
        if !path.trim_start_matches("./").is_empty() {
            assert_eq!(inode.mode.get() & 0o7777, mode, "{path}");
        }
        assert_eq!(u64::from(inode.uid.get()), header.uid().context("reading tar")?, "{path}");
        assert_eq!(u64::from(inode.gid.get()), header.gid().context("reading tar")?, "{path}");
        assert_eq!(inode.mtime_seconds().cast_unsigned(), header.mtime().context("reading tar")?, "{path}");
        assert_eq!(index_xattrs, xattrs, "{path}");
        assert_eq!(inode.is_directory(), kind.is_dir(), "{path}");
        if is_symlink {
            let target = entry.link_name_bytes().expect("a link has a target").into_owned();
            assert_eq!(blob.index.symlink_target(&inode), target, "{path}");
        }
        if kind.is_file() {
            assert_eq!(inode.size, content.len() as u64, "{path}");
            assert!(blob.content(inode.plain_range())? == content, "{path}");
        }
        compared += 1;
    }
    assert!(compared > 40, "{compared}");
    Ok(())
}

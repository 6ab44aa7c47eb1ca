//! What `lazuli convert` puts into the hot packs of an image.

use std::collections::HashMap;

use format_spec::{Digest, Index, LazyLayer, records::hot_reason};
use lazuli_tests::{
    Compression, ImageBuilder, Result, Scratch, TarLayer,
    error::Context as _,
    image::{extend_image, layout_blob, layout_manifest},
    programs::{lazuli, lazuli_ok},
    registry_server::digest_in,
    samples::readable_layers,
};
use serde_json::Value;

const SCRIPT: &[u8] = b"#!/bin/sh\nexec cat /etc/greeting\n";

/// A shell, some files that no start reads, and a script on top that the shell runs.
fn image(scratch: &Scratch) -> Result<String> {
    let script = TarLayer::new().directory("app").program("app/start", SCRIPT).file("app/unused", "unused").finish()?;
    let layers = readable_layers()?.into_iter().chain([script]);
    let image = ImageBuilder::new().command(&["/app/start"]);
    layers.fold(image, |image, tar| image.layer(tar, Compression::Gzip)).write(scratch, "image")
}

fn convert(scratch: &Scratch, source: &str, name: &str, options: &[&str]) -> Result<String> {
    let target = format!("oci:{}:lazy", scratch.join(name).display());
    lazuli_ok([&["convert", source, &target], options].concat())?;
    Ok(target)
}

fn blob_digests(layout: &str) -> Result<Vec<Digest>> {
    layout_manifest(layout)?["layers"].as_array().into_iter().flatten().map(digest_in).collect()
}

/// Path, offset in the file and reason of the hot pieces of each layer. Each pack is compared with the files.
fn hot_files(layout: &str) -> Result<Vec<Vec<(String, u64, u32)>>> {
    let manifest = layout_manifest(layout)?;
    manifest["layers"].as_array().into_iter().flatten().map(|layer| hot_files_of(layout, layer)).collect()
}

fn hot_files_of(layout: &str, descriptor: &Value) -> Result<Vec<(String, u64, u32)>> {
    let lazy = LazyLayer::from_annotations(|key| descriptor["annotations"][key].as_str());
    let lazy = lazy.expect("annotations are well-formed").expect("the layer is lazy");
    let blob = std::fs::read(layout_blob(layout, digest_in(descriptor)?)).context("reading a blob")?;
    let at = |offset: u64| usize::try_from(offset).expect("small");
    let index = &blob[at(lazy.index.offset)..at(lazy.index.range().end)];
    let index = Index::from_compressed(index, &lazy.index).expect("a converter writes valid indexes");
    let tar = zstd::decode_all(blob.as_slice()).context("decompressing a layer")?;
    let mut hot = match lazy.hot_range() {
        Some(range) => zstd::decode_all(&blob[at(range.start)..at(range.end)]).context("decompressing a hot pack")?,
        None => Vec::new(),
    };
    let paths = paths(&index);
    let mut found = Vec::new();
    for piece in index.hot_pieces() {
        let plain = piece.plain_range();
        let (start, path) =
            paths.iter().find(|(file, _)| file.contains(&plain.start)).map(|(f, p)| (f.start, p)).expect("a file");
        let extent = index.extents()[index.extents_in_plain(&plain).start];
        let tar_start = at(extent.tar_offset.get() + plain.start - extent.plain_offset.get());
        let rest = hot.split_off(piece.len.get() as usize);
        assert!(hot == tar[tar_start..][..hot.len()], "{path}");
        hot = rest;
        found.push((path.clone(), plain.start - start, piece.reason.get()));
    }
    assert!(hot.is_empty());
    Ok(found)
}

/// The regular files of a layer: their place in the plain address space and their path.
fn paths(index: &Index<Vec<u8>>) -> Vec<(std::ops::Range<u64>, String)> {
    let mut directories = HashMap::from([(0, String::new())]);
    let mut pending = vec![0];
    let mut files = Vec::new();
    while let Some(number) = pending.pop() {
        let path = directories[&number].clone();
        for (name, child) in index.children(index.inode(number).expect("a directory")) {
            let path = format!("{path}/{}", String::from_utf8_lossy(name));
            match index.inode(child) {
                Some(inode) if inode.is_directory() => {
                    directories.insert(child, path);
                    pending.push(child);
                }
                Some(inode) if inode.is_regular() => files.push((inode.plain_range(), path)),
                _ => {}
            }
        }
    }
    files
}

fn file(path: &str, reason: u32) -> (String, u64, u32) {
    (path.to_owned(), 0, reason)
}

#[test]
fn packs_hold_the_command_and_its_interpreter() -> Result<()> {
    let scratch = Scratch::new("packs-hold-the-command")?;
    let lazy = convert(&scratch, &image(&scratch)?, "lazy", &[])?;
    let packs = hot_files(&lazy)?;
    assert_eq!(packs[3], [file("/app/start", hot_reason::COMMAND)]);
    assert!(
        packs[0].iter().any(|(path, _, reason)| path == "/bin/busybox" && *reason == hot_reason::INTERPRETER),
        "{packs:?}"
    );
    assert!(packs[2].is_empty(), "{packs:?}");
    Ok(())
}

#[test]
fn a_profile_takes_the_place_of_what_is_derived() -> Result<()> {
    let scratch = Scratch::new("a-profile-takes-the-place")?;
    let profile = scratch.join("profile.json");
    let text = r#"{"version": 1, "files": [{"path": "/large/1", "ranges": [[70000, 70001]]}, {"path": "/bin/none"}, {"path": "/large/0", "ranges": [[0, 1]]}]}"#;
    std::fs::write(&profile, text).context("writing a profile")?;
    let lazy = format!("oci:{}:lazy", scratch.join("lazy").display());
    let said = lazuli(["convert", &image(&scratch)?, &lazy, "--profile", profile.to_str().expect("UTF-8")])?.stderr;
    assert!(said.contains("files of the profile that the image does not have: 1"), "{said}");
    let page = |path: &str, offset| (path.to_owned(), offset, hot_reason::PROFILE);
    assert_eq!(hot_files(&lazy)?, [vec![], vec![], vec![page("/large/1", 17 * 4096), page("/large/0", 0)], vec![]]);
    Ok(())
}

#[test]
fn packs_can_be_left_out() -> Result<()> {
    let scratch = Scratch::new("packs-can-be-left-out")?;
    let lazy = convert(&scratch, &image(&scratch)?, "lazy", &["--no-hot-pack"])?;
    assert_eq!(hot_files(&lazy)?, vec![vec![]; 4]);
    Ok(())
}

/// The base of an image was converted before: it stays as it is, and its files are read where they are.
#[test]
fn a_lazy_base_stays_as_it_is() -> Result<()> {
    let scratch = Scratch::new("a-lazy-base-stays")?;
    let base = convert(&scratch, &image(&scratch)?, "base", &[])?;
    let upper = TarLayer::new().directory("app").program("app/start", b"#!/bin/sh\n").finish()?;
    let lazy = convert(&scratch, &extend_image(&base, &upper, &scratch, "extended")?, "lazy", &[])?;
    let (before, after) = (blob_digests(&base)?, blob_digests(&lazy)?);
    assert_eq!(before, after[..before.len()]);
    assert_eq!(hot_files(&lazy)?.last(), Some(&vec![file("/app/start", hot_reason::COMMAND)]));
    Ok(())
}

//! Archives with images in them: `oci-archive:` and `docker-archive:`.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::AsRawFd,
    path::PathBuf,
    sync::Arc,
};

use converter::image::{
    ImageError, archive::Archive, docker_archive::DockerArchive, layout::Layout, location::Selector,
};

use super::one_line;
use crate::seal;

/// First byte: whether checksums are put right, and which image is asked for. The rest: the archive.
pub(crate) fn run(data: &[u8]) {
    let Some((how, rest)) = data.split_first() else { return };
    let mut bytes = rest.to_vec();
    if how & 1 == 1 {
        seal::tar(&mut bytes);
    }
    // A gzip bomb ends when the disk is full, as it does with any program that unpacks; not here.
    let is_skippable = |word: &[u8; 4]| u32::from_le_bytes(*word) & !0xf == 0x184D_2A50;
    if bytes.starts_with(&[0x1f, 0x8b])
        || bytes.starts_with(&[0x28, 0xb5, 0x2f, 0xfd])
        || bytes.first_chunk().is_some_and(is_skippable)
    {
        return;
    }
    let memory = rustix::fs::memfd_create("archive", rustix::fs::MemfdFlags::CLOEXEC).expect("a file in memory");
    let mut file = File::from(memory);
    file.write_all(&bytes).expect("memory");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let archive = match Archive::open(&path, &std::env::temp_dir()) {
        Ok(archive) => Arc::new(archive),
        Err(error) => return one_line(&error),
    };
    let name = (how & 2 == 2).then_some("a:v1");
    if let Err(error) = docker(&archive, name).and_then(|()| layout(&archive, name)) {
        one_line(&error);
    }
    let Ok(Some(content)) = archive.read("manifest.json", 1 << 20) else { return };
    assert!(bytes.windows(content.len().max(1)).any(|window| window == content) || content.is_empty());
}

fn docker(archive: &Arc<Archive>, name: Option<&str>) -> Result<(), ImageError> {
    let image = match DockerArchive::open(Arc::clone(archive), name) {
        Ok(image) => image,
        Err(error) => {
            one_line(&error);
            return Ok(());
        }
    };
    let manifest: converter::image::manifest::ImageManifest =
        serde_json::from_slice(&image.manifest().bytes).expect("a manifest that was made here");
    for layer in &manifest.layers {
        image.blob(&layer.digest)?;
    }
    Ok(())
}

fn layout(archive: &Arc<Archive>, name: Option<&str>) -> Result<(), ImageError> {
    let layout =
        Layout::in_archive(Arc::clone(archive), name.map_or(Selector::Only, |name| Selector::Tag(name.to_owned())));
    let image = layout.image()?;
    layout.blob(&image.digest)?;
    let member = format!("blobs/sha256/{}", image.digest.hex());
    let range = archive.find(&member).expect("it was just found");
    let len = range.end - range.start;
    let mut content = Vec::new();
    let read = archive.reader(range).and_then(|mut reader| reader.read_to_end(&mut content));
    read.map_err(|error| archive.failed(error))?;
    assert_eq!(content.len() as u64, len);
    Ok(())
}

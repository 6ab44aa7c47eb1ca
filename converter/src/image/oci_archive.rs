//! An OCI image layout to write, in an archive.
//!
//! Blobs gather in a layout in a hidden directory beside the file. Publishing packs that into an archive, in an
//! order that depends on its content alone, and renames it: the file appears complete or not at all.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use tempfile::TempDir;

use crate::image::{ImageError, oci_directory::OciDirectoryWriter};

/// Where in the hidden directory the layout is, and where the archive.
const LAYOUT_NAME: &str = "layout";
const PACKED_NAME: &str = "packed";
/// Size of the pieces that the archive is written in.
const PIECE_LEN: usize = 256 << 10;

/// An archive that an image is written to. Dropped unpublished, it leaves nothing behind.
#[derive(Debug)]
pub struct OciArchiveWriter {
    path: PathBuf,
    // Dropped before the directory that holds it.
    pub(crate) layout: OciDirectoryWriter,
    directory: TempDir,
}

impl OciArchiveWriter {
    /// Prepares for an archive at `path`, which is replaced when the image is published.
    ///
    /// # Errors
    ///
    /// When nothing can be written there.
    pub(crate) fn open(path: &Path, tag: Option<&str>) -> Result<Self, ImageError> {
        let refuse = |reason: &str| ImageError::Archive { path: path.to_owned(), reason: reason.to_owned() };
        // Through a link, what it points to is replaced. A device or a pipe must not be.
        let path = match fs::canonicalize(path) {
            Ok(real) if real.is_dir() => return Err(refuse("a directory: write into it as oci:DIR")),
            Ok(real) if real.is_file() => real,
            Ok(_) => return Err(refuse("no regular file: an archive would take its place")),
            Err(_) if path.is_symlink() => return Err(refuse("a link to nothing")),
            Err(_) => path.to_owned(),
        };
        let path = path.as_path();
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let hidden = tempfile::Builder::new().prefix(".lazuli-").tempdir_in(parent);
        let directory = hidden.map_err(|error| ImageError::File { path: path.to_owned(), error })?;
        let layout = OciDirectoryWriter::open(&directory.path().join(LAYOUT_NAME), tag)?;
        Ok(Self { path: path.to_owned(), layout, directory })
    }

    /// The image as users name it.
    pub(crate) fn name(&self) -> String {
        format!("oci-archive:{}:{}", self.path.display(), self.layout.tag())
    }

    /// Writes the manifest and makes the archive appear.
    pub(crate) async fn publish(&self, media_type: &str, bytes: &[u8]) -> Result<(), ImageError> {
        self.layout.publish(media_type, bytes)?;
        let (directory, path) = (self.directory.path().to_owned(), self.path.clone());
        let packed = tokio::task::spawn_blocking(move || {
            let packed = directory.join(PACKED_NAME);
            pack(&directory.join(LAYOUT_NAME), &packed)?;
            fs::rename(packed, path)
        });
        let packed = packed.await.unwrap_or_else(|_| Err(io::Error::other("writing it ended abnormally")));
        packed.map_err(|error| ImageError::File { path: self.path.clone(), error })
    }
}

/// Packs the layout into a new file; blobs go as they are packed, so that they do not take up space twice.
fn pack(layout: &Path, packed: &Path) -> io::Result<()> {
    let mut archive = tar::Builder::new(BufWriter::with_capacity(PIECE_LEN, File::create(packed)?));
    let blobs = Path::new("blobs/sha256");
    append_directory(&mut archive, Path::new("blobs"))?;
    append_directory(&mut archive, blobs)?;
    let mut names = fs::read_dir(layout.join(blobs))?
        .map(|entry| Ok(blobs.join(entry?.file_name())))
        .collect::<io::Result<Vec<_>>>()?;
    names.sort();
    for name in names.iter().map(PathBuf::as_path).chain([Path::new("index.json"), Path::new("oci-layout")]) {
        let path = layout.join(name);
        let file = File::open(&path)?;
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(file.metadata()?.len());
        archive.append_data(&mut header, name, file)?;
        fs::remove_file(path)?;
    }
    archive.into_inner()?.flush()
}

fn append_directory(archive: &mut tar::Builder<impl Write>, name: &Path) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Directory);
    header.set_mode(0o755);
    header.set_size(0);
    archive.append_data(&mut header, name, io::empty())
}

//! Golden vectors say the same to this crate, to `reader.py` and to whoever wrote them down.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::{
    ops::Range,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use format_spec::{
    Digest, Footer, Frame, Index,
    footer::FOOTER_FRAME_LEN,
    index::{WHITEOUT, flag, mode},
};
use serde_json::{Value, json};

const VECTORS: [&str; 1] = ["v1-small"];

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("vectors").join(name)
}

fn latin1(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| char::from(*byte)).collect()
}

fn at(range: &Range<u64>) -> Range<usize> {
    usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()
}

struct Layer {
    blob: Vec<u8>,
    index: Index<Vec<u8>>,
}

impl Layer {
    fn open(blob: Vec<u8>) -> Self {
        let footer = &blob[blob.len() - usize::try_from(FOOTER_FRAME_LEN).unwrap()..];
        let (location, _) = Footer::from_frame(footer, blob.len() as u64).unwrap().unwrap();
        let index = Index::from_compressed(&blob[at(&location.range())], &location).unwrap();
        Self { blob, index }
    }

    fn plain(&self, frame: &Frame) -> Vec<u8> {
        let compressed = &self.blob[at(&frame.blob_range())];
        assert_eq!(Digest::of(compressed), frame.digest());
        zstd::bulk::decompress(compressed, frame.plain_len.get() as usize).unwrap()
    }

    fn content(&self, file: Range<u64>) -> Vec<u8> {
        let mut content = vec![0; usize::try_from(file.end - file.start).unwrap()];
        for extent in &self.index.extents()[self.index.extents_in_plain(&file)] {
            let to_plain = |tar: u64| tar - extent.tar_offset.get() + extent.plain_offset.get();
            for frame in &self.index.frames()[self.index.frames_in_tar(&extent.tar_range())] {
                let (frame_tar, plain) = (frame.tar_range(), self.plain(frame));
                let tar = frame_tar.start.max(extent.tar_range().start)..frame_tar.end.min(extent.tar_range().end);
                let (start, len) = (to_plain(tar.start) - file.start, tar.end - tar.start);
                let from = tar.start - frame_tar.start;
                content[at(&(start..start + len))].copy_from_slice(&plain[at(&(from..from + len))]);
            }
        }
        content
    }

    fn list(&self, path: &[u8], number: u32, lines: &mut Vec<Value>) {
        let name = latin1(if path.is_empty() { b"/" } else { path });
        if number == WHITEOUT {
            return lines.push(json!({"path": name, "type": "whiteout"}));
        }
        let inode = self.index.inode(number).unwrap();
        let mut line = json!({
            "path": name, "mode": format!("0o{:o}", inode.mode.get() & 0o7777),
            "uid": inode.uid.get(), "gid": inode.gid.get(), "nlink": inode.nlink.get(),
            "mtime": [inode.mtime_seconds(), i64::from(inode.mtime_nanoseconds.get())],
        });
        line["type"] = match inode.file_type() {
            mode::REGULAR => "file",
            mode::DIRECTORY => "directory",
            mode::SYMLINK => "symlink",
            mode::BLOCK => "block",
            mode::CHARACTER => "character",
            mode::FIFO => "fifo",
            _ => "socket",
        }
        .into();
        let device = inode.payload.get();
        match inode.file_type() {
            mode::REGULAR => {
                line["size"] = inode.size.get().into();
                line["sha256"] = Digest::of(&self.content(inode.plain_range())).hex().into();
            }
            mode::SYMLINK => line["target"] = latin1(self.index.symlink_target(inode)).into(),
            mode::BLOCK | mode::CHARACTER => {
                line["device"] = json!([device >> 8 & 0xfff, device & 0xff | device >> 12 & 0xf_ff00]);
            }
            _ => {}
        }
        let flags: Vec<_> = [(flag::IMPLICIT, "implicit"), (flag::OPAQUE, "opaque")]
            .into_iter()
            .filter(|(bit, _)| inode.flags.get() & bit != 0)
            .map(|(_, name)| name)
            .collect();
        if !flags.is_empty() {
            line["flags"] = json!(flags);
        }
        for (name, value) in self.index.xattrs(inode) {
            line["xattrs"][latin1(name)] = value.iter().map(|byte| format!("{byte:02x}")).collect::<String>().into();
        }
        lines.push(line);
        for (name, child) in self.index.children(inode) {
            self.list(&[path, b"/", name].concat(), child, lines);
        }
    }
}

#[test]
fn this_crate_reads_the_vectors() {
    for vector in VECTORS {
        let layer = Layer::open(std::fs::read(path(&format!("{vector}.blob"))).unwrap());
        let mut lines = Vec::new();
        layer.list(b"", 0, &mut lines);
        let expected = std::fs::read_to_string(path(&format!("{vector}.list"))).unwrap();
        let expected: Vec<Value> = expected.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines, expected, "{vector}");
    }
}

fn second_reader(blob: &Path) -> Output {
    let reader = Path::new(env!("CARGO_MANIFEST_DIR")).join("reader.py");
    Command::new("python3").arg(reader).arg("list").arg(blob).output().expect("python3 is installed")
}

#[test]
fn a_second_reader_reads_the_vectors() {
    for vector in VECTORS {
        let run = second_reader(&path(&format!("{vector}.blob")));
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        let expected = std::fs::read_to_string(path(&format!("{vector}.list"))).unwrap();
        assert_eq!(String::from_utf8(run.stdout).unwrap(), expected, "{vector}");
    }
}

#[test]
fn the_second_reader_refuses_a_changed_index() {
    let mut blob = std::fs::read(path("v1-small.blob")).unwrap();
    let footer = &blob[blob.len() - usize::try_from(FOOTER_FRAME_LEN).unwrap()..];
    let (location, _) = Footer::from_frame(footer, blob.len() as u64).unwrap().unwrap();
    blob[at(&location.range()).start + 20] ^= 1;
    let changed = std::env::temp_dir().join(format!("lazuli-vector-{}", std::process::id()));
    std::fs::write(&changed, blob).unwrap();
    let run = second_reader(&changed);
    std::fs::remove_file(&changed).unwrap();
    assert!(!run.status.success());
    assert!(String::from_utf8_lossy(&run.stderr).contains("index has a wrong digest"));
}

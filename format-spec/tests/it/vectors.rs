//! Golden vectors say the same to this crate, to `reader.py` and to whoever wrote them down.

use std::{
    ops::Range,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use format_spec::{
    Digest, Footer, Frame, Index, IndexLocation, dedup,
    footer::{EMPTY_FRAME, FOOTER_FRAME_LEN, SKIPPABLE_HEADER_LEN},
    records::{WHITEOUT, flag, mode},
};
use serde_json::{Value, json};

const VECTORS: [&str; 3] = ["v1-small", "v1-hot", "v1-empty"];

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
    location: IndexLocation,
    hot_len: u64,
    index: Index<Vec<u8>>,
}

impl Layer {
    fn open(blob: Vec<u8>) -> Self {
        let footer = &blob[blob.len() - usize::try_from(FOOTER_FRAME_LEN).unwrap()..];
        let (location, hot_len) = Footer::from_frame(footer, blob.len() as u64).unwrap().unwrap();
        let index = Index::from_compressed(&blob[at(&location.range())], &location).unwrap();
        assert_eq!(index.hot_len(), hot_len);
        Self { blob, location, hot_len, index }
    }

    fn hot_start(&self) -> u64 {
        self.location.range().end + SKIPPABLE_HEADER_LEN
    }

    /// The content of the hot pack, piece after piece.
    fn hot_pack(&self) -> Vec<u8> {
        let mut start = self.hot_start();
        let mut content = Vec::new();
        for frame in self.index.hot_frames() {
            let end = start + u64::from(frame.compressed_len.get());
            let compressed = &self.blob[at(&(start..end))];
            assert_eq!(Digest::of(compressed), frame.digest());
            content.extend(zstd::bulk::decompress(compressed, frame.plain_len.get() as usize).unwrap());
            start = end;
        }
        content
    }

    /// Adds a line for every piece of hot pack and dedup section, whose bytes are those of the files.
    fn list_copies(&self, lines: &mut Vec<Value>) {
        let reasons = ["profile", "command", "interpreter", "library", "system", "runtime"];
        let content = self.hot_pack();
        let mut rest = content.as_slice();
        for piece in self.index.hot_pieces() {
            let (bytes, behind) = rest.split_at(piece.len.get() as usize);
            assert_eq!(bytes, self.content(piece.plain_range()));
            lines.push(json!({
                "hot": piece.plain_offset.get(), "len": bytes.len(),
                "reason": reasons[piece.reason.get() as usize - 1], "sha256": Digest::of(bytes).hex(),
            }));
            rest = behind;
        }
        assert_eq!(rest, b"");
        let Some(section) = self.index.dedup() else { return };
        let end = if self.hot_len > 0 { self.hot_start() + self.hot_len } else { self.location.range().end };
        let start = end + SKIPPABLE_HEADER_LEN;
        let compressed = &self.blob[at(&(start..start + section.compressed_len.get()))];
        for piece in dedup::decompress(compressed, section, self.index.space_len()).unwrap() {
            assert_eq!(Digest::of(&self.content(piece.plain_range())), piece.digest());
            let (offset, len) = (piece.plain_offset.get(), piece.len.get());
            lines.push(json!({ "dedup": offset, "len": len, "sha256": piece.digest().hex() }));
        }
    }

    fn plain(&self, frame: &Frame) -> Vec<u8> {
        let compressed = &self.blob[at(&frame.blob_range())];
        assert_eq!(Digest::of(compressed), frame.digest());
        zstd::bulk::decompress(compressed, frame.plain_len.get() as usize).unwrap()
    }

    fn content(&self, wanted: Range<u64>) -> Vec<u8> {
        let mut content = vec![0; usize::try_from(wanted.end - wanted.start).unwrap()];
        for extent in &self.index.extents()[self.index.extents_in_plain(&wanted)] {
            let (start, end) = (extent.plain_range().start.max(wanted.start), extent.plain_range().end.min(wanted.end));
            let to_tar = |plain: u64| plain - extent.plain_offset.get() + extent.tar_offset.get();
            let tar = to_tar(start)..to_tar(end);
            for frame in &self.index.frames()[self.index.frames_in_tar(&tar)] {
                let (frame_tar, plain) = (frame.tar_range(), self.plain(frame));
                let part = frame_tar.start.max(tar.start)..frame_tar.end.min(tar.end);
                let from = part.start - frame_tar.start..part.end - frame_tar.start;
                let to = start - wanted.start + (part.start - tar.start);
                let len = part.end - part.start;
                content[at(&(to..to + len))].copy_from_slice(&plain[at(&from)]);
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
        layer.list_copies(&mut lines);
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

/// Writes a blob to a file for the second reader, which must refuse it with `reason`.
fn check_refusal(name: &str, blob: &[u8], reason: &str) {
    let changed = std::env::temp_dir().join(format!("lazuli-vector-{name}-{}", std::process::id()));
    std::fs::write(&changed, blob).unwrap();
    let run = second_reader(&changed);
    std::fs::remove_file(&changed).unwrap();
    assert!(!run.status.success());
    let printed = String::from_utf8_lossy(&run.stderr).into_owned();
    assert!(printed.contains(reason), "{name}: {printed}");
}

#[test]
fn the_second_reader_refuses_what_is_changed() {
    let Layer { blob, location, hot_len, index } = Layer::open(std::fs::read(path("v1-hot.blob")).unwrap());
    let hot_end = location.range().end + SKIPPABLE_HEADER_LEN + hot_len;
    let cases = [
        ("frame", index.frames()[2].blob_offset.get() + 20, "frame 2 has a wrong digest"),
        ("index", location.offset + 20, "index has a wrong digest"),
        ("hot-pack", hot_end - 20, "hot frame has a wrong digest"),
        ("dedup", hot_end + SKIPPABLE_HEADER_LEN + 20, "dedup section has a wrong digest"),
        ("footer", blob.len() as u64 - 90, "footer has a wrong CRC-32"),
    ];
    for (name, position, reason) in cases {
        let mut changed = blob.clone();
        changed[usize::try_from(position).unwrap()] ^= 1;
        check_refusal(name, &changed, reason);
    }
}

#[test]
fn a_blob_without_a_frame_at_its_start_is_refused() {
    let Layer { blob, location, .. } = Layer::open(std::fs::read(path("v1-empty.blob")).unwrap());
    assert_eq!(blob[..EMPTY_FRAME.len()], EMPTY_FRAME);
    assert_eq!(zstd::decode_all(blob.as_slice()).unwrap(), b"");
    // The same layer as it was written before: the index stands at the start, and everything in its place.
    let moved = IndexLocation { offset: SKIPPABLE_HEADER_LEN, ..location };
    let mut without = blob[EMPTY_FRAME.len()..blob.len() - usize::try_from(FOOTER_FRAME_LEN).unwrap()].to_vec();
    without.extend(Footer::new(&moved, 0, 0).to_frame());
    check_refusal("no-frame", &without, "blob does not begin with a frame");
}

/// The bytes of a block of SPEC.md: lines of an offset and two-digit bytes, and what is said of them.
fn spec_bytes(heading: &str) -> Vec<u8> {
    const SPEC: &str = include_str!("../../SPEC.md");
    let start = SPEC.find(heading).unwrap_or_else(|| panic!("SPEC.md has no heading {heading:?}"));
    let block = SPEC[start..].split("```").nth(1).unwrap();
    let mut bytes = Vec::new();
    for line in block.lines().filter(|line| line.len() > 8 && line.as_bytes()[4] == b' ') {
        assert_eq!(usize::from_str_radix(&line[..4], 16), Ok(bytes.len()), "{line}");
        let digits = line[6..].split("  ").next().unwrap();
        bytes.extend(digits.split(' ').map(|digits| u8::from_str_radix(digits, 16).unwrap()));
    }
    bytes
}

#[test]
fn the_worked_example_of_the_specification_is_a_layer() {
    let blob = spec_bytes("### 12.1");
    let layer = Layer::open(blob.clone());
    assert_eq!(layer.index.as_bytes(), spec_bytes("### 12.2"));
    let mut lines = Vec::new();
    layer.list(b"", 0, &mut lines);
    assert_eq!(lines[1]["path"], "/hello");
    let file = layer.index.inode(1).unwrap();
    assert_eq!(layer.content(file.plain_range()), b"world\n");
    let written = std::env::temp_dir().join(format!("lazuli-example-{}", std::process::id()));
    std::fs::write(&written, blob).unwrap();
    let run = second_reader(&written);
    std::fs::remove_file(&written).unwrap();
    let printed = String::from_utf8(run.stdout).unwrap();
    let printed: Vec<Value> = printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(printed, lines);
}

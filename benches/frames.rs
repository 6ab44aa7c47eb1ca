//! Frame sizes and compression levels side by side: what they cost and what they give, on real images.
//!
//!     cargo bench --workspace --bench frames -- [--reads DIR] [IMAGE...]
//!
//! `IMAGE` names a layout below `target/images`; the default is python, node and jre. Every layer is
//! converted by the code of `lazuli convert`, from a blob in memory to a file, by one compressor thread.
//! `docs/MEASUREMENTS.md` holds a table that this printed and says what the columns mean.
//!
//! `DIR` holds a file for each image as `bench start-reads` prints it: what a start-up reads.

use std::{
    collections::{BTreeSet, HashSet},
    error::Error,
    fs,
    io::Read as _,
    ops::Range,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use converter::{
    blob::{reader::BlobReader, spool::Spool},
    layer::{
        SpooledLayer,
        compress::{Compressor, FrameOptions},
        framer::{FrameSizes, Lengths},
        spool_layer,
    },
};
use flate2::bufread::MultiGzDecoder;
use format_spec::{Digest, Frame, Index};
use serde_json::Value;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const KIB: usize = 1 << 10;
const TAR_BLOCK_LEN: usize = 512;

/// What is compared, each with a name for the table.
fn settings() -> Vec<(String, FrameOptions)> {
    // The longest is twice the average, but for the limit of the format.
    let lengths = |average: usize| Lengths {
        min: average * KIB / 2,
        average: average * KIB,
        max: (2 * average * KIB).min(FrameSizes::default().piece.max),
    };
    let mut settings = Vec::new();
    for (group, piece, levels) in
        [(256, 512, &[3][..]), (512, 512, &[3]), (1024, 1024, &[3, 4, 6]), (1024, 2048, &[3]), (2048, 2048, &[3, 4, 6])]
    {
        let sizes = FrameSizes {
            group: lengths(group),
            large_file_min: (group.min(piece) * KIB / 2) as u64,
            piece: lengths(piece),
        };
        for level in levels {
            settings.push((format!("{group}, {piece}, {level}"), FrameOptions { level: *level, sizes }));
        }
    }
    settings
}

/// A package of an image, by what the paths of its files begin with.
fn package_of(name: &str) -> &'static [u8] {
    match name {
        "python" => b"./usr/local/lib/python3.11/dist-packages/pandas/",
        "node" => b"./app/node_modules/@mui/",
        "jre" => b"./usr/lib/jvm/java-17-openjdk-amd64/lib/server/",
        _ => b"./usr/lib/",
    }
}

fn main() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut reads_directory = None;
    let mut names = Vec::new();
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--reads" => reads_directory = Some(PathBuf::from(arguments.next().ok_or("--reads needs a directory")?)),
            _ => names.push(argument),
        }
    }
    if names.is_empty() {
        names = ["python", "node", "jre"].map(str::to_owned).to_vec();
    }
    println!(
        "| image | group, piece KiB, level | frames | size / gzip | MB/s a core | index B/file | start, MB | new package | new times |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for name in names {
        let image = Image::open(&root.join("target/images").join(&name), package_of(&name))?;
        let reads = reads_directory.as_ref().map(|directory| read_list(&directory.join(&name))).transpose()?;
        for (setting, options) in settings() {
            println!("| {name} | {setting} | {} |", measure(&image, &options, reads.as_deref())?);
        }
    }
    Ok(())
}

/// The layers of an image, the lowest first.
struct Image {
    /// As gzip blobs.
    gzip: Vec<Vec<u8>>,
    /// As tar streams.
    plain: Vec<Vec<u8>>,
    /// The same with other content in one package.
    new_package: Vec<Vec<u8>>,
    /// The same with other content in one package and another time for every file.
    new_times: Vec<Vec<u8>>,
    /// Length of the package's new content, compressed by itself.
    package_len: u64,
}

impl Image {
    fn open(layout: &Path, package: &[u8]) -> Result<Self> {
        let json = |path: PathBuf| -> Result<Value> { Ok(serde_json::from_slice(&fs::read(path)?)?) };
        let blob = |digest: &Value| -> Result<PathBuf> {
            let digest = digest.as_str().ok_or("no digest")?;
            Ok(layout.join("blobs").join(digest.replace(':', "/")))
        };
        let manifest = json(blob(&json(layout.join("index.json"))?["manifests"][0]["digest"])?)?;
        let mut image = Self { gzip: vec![], plain: vec![], new_package: vec![], new_times: vec![], package_len: 0 };
        let mut package_content = Vec::new();
        for layer in manifest["layers"].as_array().ok_or("no layers")? {
            let gzip = fs::read(blob(&layer["digest"])?)?;
            let mut plain = Vec::new();
            MultiGzDecoder::new(gzip.as_slice()).read_to_end(&mut plain)?;
            let mut change = |all_times| next_version(plain.clone(), package, all_times, &mut package_content);
            let (new_package, new_times) = (change(false)?, change(true)?);
            image.gzip.push(gzip);
            image.plain.push(plain);
            image.new_package.push(new_package);
            image.new_times.push(new_times);
        }
        // Both versions have put it there.
        package_content.truncate(package_content.len() / 2);
        image.package_len = zstd::bulk::compress(&package_content, 3)?.len() as u64;
        Ok(image)
    }
}

/// Turns the content of a package's files round, which is new to every reader and compresses about as well.
/// The files whose content changes get another time, or all do. Appends the new content to `changed`.
fn next_version(mut tar: Vec<u8>, package: &[u8], all_times: bool, changed: &mut Vec<u8>) -> Result<Vec<u8>> {
    let mut at = 0;
    while at + TAR_BLOCK_LEN <= tar.len() {
        let (header, rest) = tar[at..].split_at_mut(TAR_BLOCK_LEN);
        if header.iter().all(|byte| *byte == 0) {
            break;
        }
        let len = octal(&header[124..136])?;
        let is_changed = header[156] == b'0' && header.starts_with(package);
        if is_changed {
            rest[..len].reverse();
            changed.extend_from_slice(&rest[..len]);
        }
        if is_changed || (all_times && header[156] != b'x') {
            header[136..148].copy_from_slice(b"14000000000\0");
            header[148..156].fill(b' ');
            let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
            header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
        if all_times && header[156] == b'x' {
            // Fractions of a second stand in records of their own: the last digits differ.
            if let Some(point) = rest[..len].iter().position(|byte| *byte == b'.') {
                let digits = rest[point + 1..len].iter_mut().take_while(|byte| byte.is_ascii_digit());
                digits.for_each(|digit| *digit = b'0' + (*digit - b'0' + 3) % 10);
            }
        }
        at += TAR_BLOCK_LEN + len.next_multiple_of(TAR_BLOCK_LEN);
    }
    Ok(tar)
}

fn octal(field: &[u8]) -> Result<usize> {
    let text = std::str::from_utf8(field)?.trim_matches(['\0', ' ']);
    Ok(usize::from_str_radix(text, 8)?)
}

/// A file, and a range of it in bytes.
type FileRead = (String, Range<u64>);

/// Lines of `start end path`.
fn read_list(path: &Path) -> Result<Vec<FileRead>> {
    let parse = |line: &str| -> Option<FileRead> {
        let mut words = line.splitn(3, ' ');
        let (start, end) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        Some((words.next()?.to_owned(), start..end))
    };
    let text = fs::read_to_string(path)?;
    text.lines().map(|line| parse(line).ok_or_else(|| format!("not a read: {line}").into())).collect()
}

/// Processor seconds that this process has used so far, in hundredths: proc_pid_stat(5), utime and stime.
fn cpu_seconds() -> Result<f64> {
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = fs::read_to_string("/proc/self/stat")?;
    let behind_name = stat.rsplit(')').next().ok_or("no name in /proc/self/stat")?;
    let ticks = behind_name.split_whitespace().skip(11).take(2).map(str::parse::<u64>);
    Ok(ticks.sum::<std::result::Result<u64, _>>()? as f64 / TICKS_PER_SECOND)
}

/// Converts layers in any compression.
fn convert(layers: &[Vec<u8>], compressor: &Compressor) -> Result<Vec<SpooledLayer>> {
    let convert = |blob: &Vec<u8>| -> Result<SpooledLayer> {
        let digest = Digest::of(blob);
        let blob = Bytes::copy_from_slice(blob);
        let len = blob.len();
        let pieces = (0..len).step_by(256 * KIB).map(move |start| Ok(blob.slice(start..len.min(start + 256 * KIB))));
        Ok(spool_layer(BlobReader::new(pieces, digest, len as u64), Spool::new(tempfile::tempfile()?), compressor)?)
    };
    layers.iter().map(convert).collect()
}

/// One row of the table, behind the setting.
fn measure(image: &Image, options: &FrameOptions, reads: Option<&[FileRead]>) -> Result<String> {
    let compressor = Compressor::new(options, 1, 1)?;
    let started = cpu_seconds()?;
    let layers = convert(&image.gzip, &compressor)?;
    let seconds = cpu_seconds()? - started;
    let plain_len: u64 = layers.iter().map(|layer| layer.facts.tar_len).sum();
    let file_count: u64 = layers.iter().map(|layer| layer.facts.inode_count).sum();
    let frame_count: u64 = layers.iter().map(|layer| layer.facts.frame_count).sum();
    let gzip_len: usize = image.gzip.iter().map(Vec::len).sum();
    let start = reads.map_or("-".to_owned(), |reads| format!("{:.1}", frames_read(&layers, reads) as f64 / 1e6));
    let known_frames: HashSet<Digest> = frames(&layers).map(Frame::digest).collect();
    let known_contents: HashSet<Digest> = layers
        .iter()
        .zip(&image.plain)
        .flat_map(|(layer, tar)| contents(&layer.index, tar))
        .map(|(_, digest)| digest)
        .collect();
    let new_package = convert(&image.new_package, &compressor)?;
    let absent = frames(&new_package).filter(|frame| !known_frames.contains(&frame.digest()));
    let absent_len: u64 = absent.map(compressed_len).sum();
    let new_times = convert(&image.new_times, &compressor)?;
    let wanted_len: u64 = new_times
        .iter()
        .zip(&image.new_times)
        .map(|(layer, tar)| {
            let absent = contents(&layer.index, tar).filter(|(_, digest)| !known_contents.contains(digest));
            let wanted: BTreeSet<usize> = absent.map(|(number, _)| number).collect();
            wanted.iter().map(|number| compressed_len(&layer.index.frames()[*number])).sum::<u64>()
        })
        .sum();
    let (mut blob_len, mut index_len) = (0, 0);
    for layer in layers {
        let layer = layer.finish(&[], &compressor)?.layer;
        blob_len += layer.blob_len;
        index_len += layer.index.compressed_len;
    }
    Ok(format!(
        "{frame_count} | {:.3} | {:.0} | {:.1} | {start} | {:.2} | {:.2}",
        blob_len as f64 / gzip_len as f64,
        plain_len as f64 / 1e6 / seconds,
        index_len as f64 / file_count as f64,
        absent_len as f64 / image.package_len as f64,
        wanted_len as f64 / image.package_len as f64,
    ))
}

fn frames(layers: &[SpooledLayer]) -> impl Iterator<Item = &Frame> {
    layers.iter().flat_map(|layer| layer.index.frames())
}

fn compressed_len(frame: &Frame) -> u64 {
    frame.compressed_len.get().into()
}

/// What each frame holds of each file: the number of the frame and the digest of the content.
fn contents<'a>(index: &'a Index<Vec<u8>>, tar: &'a [u8]) -> impl Iterator<Item = (usize, Digest)> + 'a {
    index.extents().iter().flat_map(move |extent| {
        let extent = extent.tar_range();
        index.frames_in_tar(&extent).map(move |number| {
            let frame = index.frames()[number].tar_range();
            let at = |position: u64| usize::try_from(position).expect("it is in memory");
            let content = at(extent.start.max(frame.start))..at(extent.end.min(frame.end));
            (number, Digest::of(&tar[content]))
        })
    })
}

/// Compressed bytes of the frames that hold what is read.
fn frames_read(layers: &[SpooledLayer], reads: &[FileRead]) -> u64 {
    let mut wanted = BTreeSet::new();
    for (path, read) in reads {
        // The uppermost layer that has the file; what the layers hide does not matter to a command that ran.
        let Some((layer, inode)) = layers.iter().enumerate().rev().find_map(|(number, layer)| {
            let mut inode = layer.index.inodes().first()?;
            for name in path.split('/') {
                inode = layer.index.inode(layer.index.lookup(inode, name.as_bytes())?)?;
            }
            Some((number, inode))
        }) else {
            continue;
        };
        let index = &layers[layer].index;
        let file = inode.plain_range();
        let plain = file.start + read.start..(file.start + read.end).min(file.end);
        for number in index.extents_in_plain(&plain) {
            let extent = index.extents()[number];
            let (content, tar) = (extent.plain_range(), extent.tar_range());
            let start = tar.start + plain.start.saturating_sub(content.start);
            let end = tar.start + (plain.end.min(content.end) - content.start);
            wanted.extend(index.frames_in_tar(&(start..end)).map(|frame| (layer, frame)));
        }
    }
    wanted.iter().map(|(layer, frame)| compressed_len(&layers[*layer].index.frames()[*frame])).sum()
}

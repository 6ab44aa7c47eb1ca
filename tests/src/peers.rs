//! Other ways to bring an image to a node, for comparison: containerd 2.4 by itself, and the lazy snapshotters beside it.
//!
//! `tests/peers` builds their programs into `target/peers`. Every peer is set up as its own documentation recommends, says
//! so where that is a choice, and is checked to work as it claims: one that quietly pulls everything is an error.

mod configuration;
mod images;

use std::{
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

use crate::{
    containerd::{Containerd, OVERLAYFS},
    error::{Context as _, HarnessError, Result},
    process::{Service, command},
    programs::target_directory,
    registry_server::TestRegistry,
    scratch::Scratch,
};

/// A way that is not Lazuli's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Peer {
    /// stargz-snapshotter: an eStargz image, optimised for its own command.
    Estargz,
    /// soci-snapshotter: the original layers, and an index bound to the image. Its experimental prefetch of listed files
    /// is off: 0.16.1 finds none in layers whose entries are called `./...`, as those of the images here are.
    Soci,
    /// soci-snapshotter that pulls and unpacks the original in parallel; nothing is lazy.
    SociParallel,
    /// The original with containerd 2.4, which unpacks layers in parallel.
    Overlayfs24,
    /// The original with containerd 2.4, which makes an EROFS image of every layer.
    Erofs24,
}

impl Peer {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Estargz, Self::Soci, Self::SociParallel, Self::Overlayfs24, Self::Erofs24];

    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Estargz => "estargz",
            Self::Soci => "soci",
            Self::SociParallel => "soci-parallel",
            Self::Overlayfs24 => "overlayfs24",
            Self::Erofs24 => "erofs24",
        }
    }

    /// The tag of the image that it pulls, where the original is `full`.
    pub fn tag(self) -> &'static str {
        if self.is_lazy() { self.name() } else { "full" }
    }

    /// Whether containers start before the image is there.
    pub fn is_lazy(self) -> bool {
        matches!(self, Self::Estargz | Self::Soci)
    }

    /// The name of its snapshotter in containerd.
    pub fn snapshotter(self) -> &'static str {
        match self {
            Self::Estargz => "stargz",
            Self::Soci | Self::SociParallel => "soci",
            Self::Overlayfs24 => OVERLAYFS,
            Self::Erofs24 => "erofs",
        }
    }

    /// Makes its form of `<image>:full`, whose layout is given as `oci:DIR:latest`, under [`Self::tag`] in the registry.
    ///
    /// # Errors
    ///
    /// When its tools are not there or fail, with its name.
    pub fn prepare(self, registry: &TestRegistry, scratch: &Scratch, image: &str, layout: &str) -> Result<()> {
        let source = images::Source { registry, scratch, image, layout };
        self.named(match self {
            Self::Estargz => source.to_estargz(),
            Self::Soci => source.to_soci(),
            Self::SociParallel | Self::Overlayfs24 | Self::Erofs24 => Ok(()),
        })
    }

    /// Starts an empty node that pulls in this way.
    ///
    /// # Errors
    ///
    /// When its programs are not there or do not start, with its name.
    pub fn start(self, scratch: &Scratch) -> Result<PeerNode> {
        self.named(PeerNode::start(self, scratch))
    }

    /// The program of its snapshotter; `None` where containerd brings it.
    fn program(self) -> Option<&'static str> {
        match self {
            Self::Estargz => Some("containerd-stargz-grpc"),
            Self::Soci | Self::SociParallel => Some("soci-snapshotter-grpc"),
            Self::Overlayfs24 | Self::Erofs24 => None,
        }
    }

    fn named<T>(self, result: Result<T>) -> Result<T> {
        result.map_err(|error| HarnessError::Unexpected(format!("peer {}: {error}", self.name())))
    }
}

/// A containerd 2.4 that pulls in a peer's way.
#[derive(Debug)]
pub struct PeerNode {
    /// containerd; it ends before its snapshotter.
    pub containerd: Containerd,
    peer: Peer,
    /// Where the snapshotter keeps everything, its own or containerd's.
    root: PathBuf,
    log: PathBuf,
    _service: Option<Service>,
}

impl PeerNode {
    fn start(peer: Peer, scratch: &Scratch) -> Result<Self> {
        let programs = programs()?;
        let (socket, log) = (scratch.join("peer.sock"), scratch.log(peer.name()));
        let own = scratch.directory("peer")?;
        let service = peer.program().map(|program| {
            let config = own.join("config.toml");
            let text = configuration::snapshotter(peer, &scratch.join("containerd.sock"), &programs);
            fs::write(&config, text).at("writing", &config)?;
            let mut serve = command(programs.join(program), ["--address"]);
            serve.arg(&socket).arg("--root").arg(own.join("root")).arg("--config").arg(&config);
            Service::start(program, &mut serve, &log, || UnixStream::connect(&socket).is_ok())
        });
        let service = service.transpose()?;
        let containerd = Containerd::start_with(scratch, &programs, |directory, own_socket| {
            configuration::containerd(peer, directory, own_socket, &socket)
        })?;
        let root = if service.is_some() { own } else { scratch.join("containerd/root") };
        Ok(Self { containerd, peer, root, log, _service: service })
    }

    /// Pulls in the peer's way.
    ///
    /// # Errors
    ///
    /// When `ctr` fails, with the peer's name.
    pub fn pull(&self, reference: &str) -> Result<()> {
        self.peer.named(self.containerd.pull(reference, self.peer.snapshotter()))
    }

    /// Says whether a container whose first line is `line` has started, from what is mounted as the peer claims: by FUSE,
    /// unpacked in parallel, or as EROFS.
    ///
    /// # Errors
    ///
    /// [`HarnessError::Unexpected`] with the peer's name where it is not.
    pub fn check(&self, line: &str) -> Result<()> {
        let wrong = |what: &str| Err(HarnessError::Unexpected(what.to_owned()));
        self.peer.named(match self.peer {
            // Nothing, or what `ctr` logs.
            _ if line.trim().is_empty() || line.starts_with("time=") => {
                wrong(&format!("the container has not started: `{}`", line.trim()))
            }
            Peer::Estargz | Peer::Soci if fuse_mounts_below(&self.root)? == 0 => {
                wrong("it has mounted no layer lazily")
            }
            Peer::SociParallel if !self.has_logged("preparing snapshot with parallel pull/unpack")? => {
                wrong("it has not pulled in parallel")
            }
            Peer::Erofs24 if layers_by_differ(&self.root)? == 0 => wrong("its differ has made no EROFS layer"),
            _ => Ok(()),
        })
    }

    fn has_logged(&self, words: &str) -> Result<bool> {
        Ok(fs::read_to_string(&self.log).at("reading", &self.log)?.contains(words))
    }
}

/// The directory of the programs that `tests/peers` makes.
fn programs() -> Result<PathBuf> {
    let programs = target_directory()?.join("peers/bin");
    match programs.join("containerd").is_file() {
        true => Ok(programs),
        false => {
            Err(HarnessError::Missing("the programs of the peers are not there: run `tests/peers target/peers`".into()))
        }
    }
}

fn fuse_mounts_below(root: &Path) -> Result<usize> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("reading the mount table")?;
    let is_fuse = |line: &&str| {
        let place = line.split(' ').nth(4).is_some_and(|place| Path::new(place).starts_with(root));
        place && line.split_once(" - ").is_some_and(|(_, rest)| rest.starts_with("fuse"))
    };
    Ok(table.lines().filter(is_fuse).count())
}

/// Snapshots whose layer the differ made from the archive: where the snapshotter makes it, files lie beside it.
fn layers_by_differ(root: &Path) -> Result<usize> {
    let snapshots = root.join("io.containerd.snapshotter.v1.erofs/snapshots");
    let entries = fs::read_dir(&snapshots).at("listing", &snapshots)?.flatten().map(|entry| entry.path());
    let is_empty = |path: &Path| fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none());
    Ok(entries.filter(|path| path.join("layer.erofs").is_file() && is_empty(&path.join("fs"))).count())
}

//! The configuration files of peers, as text.

use std::path::Path;

use super::Peer;
use crate::containerd_config::{CRI, SECOND_CRI, head};

/// Of a containerd 2.4 that keeps everything in `directory`, serves on `socket` and knows the snapshotter at `peer_socket`.
pub(super) fn containerd(peer: Peer, directory: &Path, socket: &Path, peer_socket: &Path) -> String {
    let name = peer.snapshotter();
    let rest = match peer {
        // One layer at a time unless said.
        Peer::Overlayfs24 => format!("{PARALLEL}{}", unpack(name, "walking")),
        Peer::Erofs24 => format!("{PARALLEL}{}{EROFS}", unpack(name, "erofs")),
        _ => {
            let proxy = format!(
                r#"[proxy_plugins.{name}]
type = "snapshot"
address = "{address}"
[proxy_plugins.{name}.exports]
enable_remote_snapshot_annotations = "true"
"#,
                address = peer_socket.display()
            );
            unpack(name, "walking") + &proxy
        }
    };
    head(3, directory, socket, &[CRI, SECOND_CRI]) + &rest
}

const PARALLEL: &str = r#"[plugins."io.containerd.transfer.v1.local"]
max_concurrent_unpacks = 4
"#;

/// As containerd's docs/snapshotters/erofs.md says for erofs-utils from 1.8.2 on.
const EROFS: &str = r#"[plugins."io.containerd.differ.v1.erofs"]
mkfs_options = ["-T0", "--mkfs-time", "--sort=none"]
[plugins."io.containerd.service.v1.diff-service"]
default = ["erofs", "walking"]
"#;

fn unpack(snapshotter: &str, differ: &str) -> String {
    format!(
        r#"[[plugins."io.containerd.transfer.v1.local".unpack_config]]
platform = "linux/{architecture}"
snapshotter = "{snapshotter}"
differ = "{differ}"
"#,
        architecture = crate::image::own_architecture(),
    )
}

/// Of a peer's own daemon beside the containerd on `socket`. Both daemons speak plain HTTP to a registry on loopback.
pub(super) fn snapshotter(peer: Peer, socket: &Path, programs: &Path) -> String {
    match peer {
        // docs/config.md recommends the limit. A small layer's manifest is asked for at the address: without it, each waits
        // ten seconds for the usual one.
        Peer::Soci => format!(
            "[content_store]\ncontainerd_address = \"{}\"\n[snapshotter]\nmin_layer_size = 10000000\n",
            socket.display()
        ),
        // The example of docs/parallel-mode.md.
        Peer::SociParallel => format!(
            r#"[content_store]
type = "containerd"
containerd_address = "{socket}"
[pull_modes.parallel_pull_unpack]
enable = true
max_concurrent_downloads = 50
max_concurrent_downloads_per_image = 10
concurrent_download_chunk_size = "8mb"
max_concurrent_unpacks = 20
max_concurrent_unpacks_per_image = 10
discard_unpacked_layers = true
[pull_modes.parallel_pull_unpack.decompress_streams."gzip"]
path = "{programs}/unpigz"
args = ["-d", "-c"]
"#,
            socket = socket.display(),
            programs = programs.display(),
        ),
        // Its defaults: the files that come first in a layer are there before it is mounted, the rest follows.
        _ => String::new(),
    }
}

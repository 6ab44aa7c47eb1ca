//! Readers of the trees of a root: the overlayfs mounts that have one among their layers.
//!
//! The kernel does not say who uses a file system. But a container's root is an overlayfs mount whose options name its
//! layers, and every process shows the mounts of its namespace.

use std::{
    collections::{BTreeSet, HashSet},
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use control::{TreeId, root::ID_MAPPED};

/// Mount points of overlayfs mounts, in whatever mount namespace, that have one of `trees` or an id-mapped mount below
/// `root` as a layer; blocks. Mounts that cannot be looked at are passed over.
pub(crate) fn mounts_in_use(root: &Path, trees: &[TreeId]) -> Vec<PathBuf> {
    let trees: HashSet<String> = trees.iter().map(TreeId::hex).collect();
    // Options may be relative to a directory that is not known, as containerd has them when they are long.
    let id_mapped = format!("{ID_MAPPED}/");
    let is_ours = |layer: &str| {
        layer.split('/').any(|part| trees.contains(part))
            || layer.starts_with(&id_mapped)
            || layer.starts_with(&root.join(&id_mapped).display().to_string())
    };
    let mut found = BTreeSet::new();
    for table in mount_tables() {
        found.extend(table.lines().filter_map(|line| overlay(line, is_ours)));
    }
    found.into_iter().collect()
}

/// Mount points of overlayfs mounts, in whatever mount namespace, that have something below `directory` as a layer;
/// blocks.
pub(crate) fn mounts_over(directory: &Path) -> Vec<PathBuf> {
    // Relative ones begin with its name at the earliest, and stand for another directory at the worst.
    let name = directory.file_name().unwrap_or_default();
    let is_ours = |layer: &str| {
        let layer = Path::new(layer);
        layer.starts_with(directory) || (layer.is_relative() && layer.iter().any(|part| part == name))
    };
    let mut found = BTreeSet::new();
    for table in mount_tables() {
        found.extend(table.lines().filter_map(|line| overlay(line, is_ours)));
    }
    found.into_iter().collect()
}

/// The mount tables of all mount namespaces that some process is in.
fn mount_tables() -> Vec<String> {
    let mut seen: HashSet<OsString> = HashSet::new();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let is_process = |name: &std::ffi::OsStr| name.to_str().is_some_and(|name| name.parse::<u32>().is_ok());
    let processes = processes.filter(|entry| is_process(&entry.file_name()));
    let is_new = |path: &PathBuf| {
        fs::read_link(path.join("ns/mnt")).is_ok_and(|namespace| seen.insert(namespace.into_os_string()))
    };
    let new: Vec<_> = processes.map(|entry| entry.path()).filter(is_new).collect();
    new.iter().filter_map(|process| fs::read_to_string(process.join("mountinfo")).ok()).collect()
}

/// The mount point of a line of a mount table (proc(5)), if it is an overlayfs mount with such a layer.
fn overlay(line: &str, is_ours: impl Fn(&str) -> bool) -> Option<PathBuf> {
    let (mount, file_system) = line.split_once(" - ")?;
    let mut words = file_system.split(' ');
    let (kind, options) = (words.next()?, words.nth(1)?);
    if kind != "overlay" {
        return None;
    }
    let layers = options.split(',').filter_map(|option| option.split_once('=')).filter(|(key, _)| {
        // With a plus sign each layer has an option of its own.
        key.starts_with("lowerdir") || key.starts_with("datadir")
    });
    let is_used = layers.flat_map(|(_, layers)| layers.split(':')).any(is_ours);
    is_used.then(|| mount.split(' ').nth(4).map(PathBuf::from))?
}

#[cfg(test)]
mod tests {
    use format_spec::Digest;

    use super::*;

    fn line(options: &str) -> String {
        format!("512 29 0:61 / /run/rootfs rw,relatime shared:9 - overlay overlay {options}")
    }

    #[test]
    fn an_overlay_is_known_by_its_layers_however_they_are_named() {
        let tree = Digest::of(b"tree").hex();
        let is_ours = |layer: &str| layer.split('/').any(|part| part == tree) || layer.starts_with("id-mapped/");
        let used = |options: &str| overlay(&line(options), is_ours).is_some();
        assert!(used(&format!("rw,lowerdir=/var/lib/lazuli/erofs/{tree},upperdir=/u,workdir=/w")));
        assert!(used(&format!("rw,lowerdir=snapshots/3/fs:erofs/{tree},upperdir=/u,workdir=/w")));
        assert!(used(&format!("ro,lowerdir+=/a,lowerdir+=/var/lib/lazuli/mnt/trees/{tree}")));
        assert!(used("ro,lowerdir=id-mapped/3/tree:/b"));
        assert!(!used("rw,lowerdir=/var/lib/docker/l/AAAA,upperdir=/u,workdir=/w"));
        assert!(!used(&format!("rw,lowerdir=/a,upperdir=/{tree}")));
        assert_eq!(overlay(&line("rw,lowerdir=id-mapped/3/tree"), is_ours), Some("/run/rootfs".into()));
        assert_eq!(overlay("25 1 0:23 / /proc rw - proc proc rw", is_ours), None);
        assert_eq!(overlay("nonsense", is_ours), None);
    }
}

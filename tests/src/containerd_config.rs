//! The configuration file of a private containerd, as text.

use std::path::Path;

use crate::containerd::{ContainerdOptions, CriOptions, LAZULI, OVERLAYFS, Release};

/// containerd's plugins for pods: of the first generation, and what of the second has no other name.
pub(crate) const CRI: &str = "io.containerd.grpc.v1.cri";
pub(crate) const SECOND_CRI: &str = "io.containerd.cri.v1.runtime";

/// Where a containerd keeps everything and serves, without some plugins, in a version of the file's format.
pub(crate) fn head(version: u32, directory: &Path, socket: &Path, disabled: &[&str]) -> String {
    let (path, socket) = (directory.display(), socket.display());
    format!(
        r#"version = {version}
root = "{path}/root"
state = "{path}/state"
disabled_plugins = {disabled:?}
[grpc]
address = "{socket}"
[ttrpc]
address = "{socket}.ttrpc"
[plugins."io.containerd.internal.v1.opt"]
path = "{path}/opt"
"#
    )
}

/// The configuration of a containerd that keeps everything in `directory` and serves on `socket`.
pub(crate) fn configuration(directory: &Path, socket: &Path, options: &ContainerdOptions) -> String {
    let is_second = options.release == Release::V2_1;
    let disabled: &[&str] = match (&options.cri, is_second) {
        (Some(_), _) => &[],
        (None, false) => &[CRI],
        (None, true) => &[CRI, SECOND_CRI],
    };
    let mut text = head(if is_second { 3 } else { 2 }, directory, socket, disabled);
    if let Some(snapshotter) = &options.snapshotter {
        text += &format!(
            r#"[proxy_plugins.{LAZULI}]
type = "snapshot"
address = "{}"
"#,
            snapshotter.display()
        );
        // 1.6 does not know the key, nor asks.
        if options.release != Release::V1_6 {
            text += "capabilities = [\"remap-ids\"]\n";
        }
        if is_second {
            text += &transfer_service();
        }
    }
    match &options.cri {
        Some(cri) if is_second => text + &cri_of_second(directory, cri),
        Some(cri) => text + &cri_of_first(directory, cri),
        None => text,
    }
}

/// Annotations reach the snapshotter through containerd 2's transfer service, which needs to be told twice.
fn transfer_service() -> String {
    let mut text = format!("[proxy_plugins.{LAZULI}.exports]\nenable_remote_snapshot_annotations = \"true\"\n");
    for snapshotter in [LAZULI, OVERLAYFS] {
        text += &format!(
            r#"[[plugins."io.containerd.transfer.v1.local".unpack_config]]
platform = "linux/{architecture}"
snapshotter = "{snapshotter}"
differ = "walking"
"#,
            architecture = crate::image::own_architecture(),
        );
    }
    text
}

/// Without the right to lower an OOM score and without AppArmor, as inside many build machines.
fn cri_of_first(directory: &Path, cri: &CriOptions) -> String {
    format!(
        r#"[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause}"
restrict_oom_score_adj = true
disable_apparmor = true
stream_server_address = "127.0.0.1"
stream_server_port = "0"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{network}"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "{snapshotter}"
disable_snapshot_annotations = false
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "{path}/certs.d"
"#,
        pause = cri.pause_image,
        network = cri.network_configuration.display(),
        snapshotter = cri.snapshotter,
        path = directory.display(),
    )
}

fn cri_of_second(directory: &Path, cri: &CriOptions) -> String {
    format!(
        r#"[plugins."io.containerd.grpc.v1.cri"]
stream_server_address = "127.0.0.1"
stream_server_port = "0"
[plugins."io.containerd.cri.v1.images"]
snapshotter = "{snapshotter}"
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{pause}"
[plugins."io.containerd.cri.v1.images".registry]
config_path = "{path}/certs.d"
[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true
disable_apparmor = true
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["/usr/lib/cni"]
conf_dir = "{network}"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
"#,
        pause = cri.pause_image,
        network = cri.network_configuration.display(),
        snapshotter = cri.snapshotter,
        path = directory.display(),
    )
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use toml::{Table, Value};

    use super::*;

    /// The `toml` blocks of a section of NODE.md, as one table.
    fn documented(heading: &str) -> Table {
        let page = include_str!("../../docs/NODE.md").replace("linux/amd64", &platform());
        let section = page.split_once(&format!("\n### {heading}\n")).expect("the section is there").1;
        let section = section.split("\n### ").next().expect("split gives a part");
        let blocks: String = section.split("```toml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
        blocks.parse().expect("the page shows TOML")
    }

    fn platform() -> String {
        format!("linux/{}", crate::image::own_architecture())
    }

    /// Paths below `said` that `used` lacks, or has with another value.
    fn missing(path: &str, said: &Value, used: Option<&Value>) -> Vec<String> {
        match said {
            Value::Table(table) => table
                .iter()
                .flat_map(|(key, value)| missing(&format!("{path}.{key}"), value, used.and_then(|used| used.get(key))))
                .collect(),
            _ if used == Some(said) => Vec::new(),
            _ => vec![format!("{path} = {said} in NODE.md, {used:?} in tests")],
        }
    }

    #[test]
    fn nodes_of_tests_are_configured_as_the_page_says() {
        for (heading, release) in [("1.6 and 1.7", Release::V1_7), ("2.1", Release::V2_1)] {
            let cri = CriOptions {
                pause_image: "pause".to_owned(),
                network_configuration: "/network".into(),
                snapshotter: LAZULI,
                registry: "127.0.0.1:5000".to_owned(),
            };
            let options =
                ContainerdOptions { release, snapshotter: Some("/run/snapshotter.sock".into()), cri: Some(cri) };
            let used: Value = configuration(Path::new("/node"), Path::new("/node/socket"), &options)
                .parse()
                .map(Value::Table)
                .expect("TOML");
            let said = Value::Table(documented(heading));
            assert_eq!(missing("", &said, Some(&used)), Vec::<String>::new(), "{heading}");
        }
    }
}

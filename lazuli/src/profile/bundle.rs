//! The document that tells runc of a container: the image's command in a root directory, as a node would run it.
//!
//! Source: OCI runtime specification 1.0, config.md and config-linux.md. The network is the host's.

use std::{borrow::Cow, collections::BTreeMap, fs, path::Path};

use converter::hot_set::StartConfig;
use serde_json::{Value, json};

/// The capabilities that docker and containerd leave a container.
const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];
/// The path that runc and containerd set where the image does not.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Longest file of users or groups that is read.
const USERS_LEN_MAX: usize = 1 << 20;

/// Why a container cannot be described.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BundleError {
    /// Nothing says what to run.
    #[error("the image has no command: say one after --")]
    NoCommand,
    /// The image names a user that it does not have.
    #[error("the image runs as {0:?}, which its /etc/passwd and /etc/group do not know")]
    User(String),
}

/// The document `config.json` of a bundle with its root file system at `root`.
///
/// `command` takes the place of the image's.
///
/// # Errors
///
/// When nothing says what to run, or as whom.
pub(crate) fn runtime_config(config: &StartConfig, command: &[String], root: &Path) -> Result<Value, BundleError> {
    let arguments: Vec<_> = match command {
        [] => config.argv.iter().map(|argument| String::from_utf8_lossy(argument)).collect(),
        command => command.iter().map(Cow::from).collect(),
    };
    if arguments.is_empty() {
        return Err(BundleError::NoCommand);
    }
    let (uid, gid) = user(&config.user, root)?;
    let default_path = (!config.env.contains_key(&b"PATH"[..])).then(|| DEFAULT_PATH.to_owned());
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let set = config.env.iter().map(|(name, value)| format!("{}={}", text(name), text(value)));
    let environment: Vec<String> = default_path.into_iter().chain(set).collect();
    let namespaces = ["pid", "ipc", "uts", "mount"].map(|kind| json!({ "type": kind }));
    Ok(json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": { "uid": uid, "gid": gid },
            "args": arguments,
            "env": environment,
            "cwd": text(&config.working_directory),
            "capabilities": { "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES },
        },
        "root": { "path": root, "readonly": false },
        "hostname": "lazuli-profile",
        "mounts": mounts(),
        "linux": {
            "namespaces": namespaces,
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    }))
}

fn mounts() -> Vec<Value> {
    let mount = |destination: &str, kind: &str, source: &str, options: &[&str]| json!({ "destination": destination, "type": kind, "source": source, "options": options });
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount("/dev/pts", "devpts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]),
        mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/sys", "none", "/sys", &["rbind", "nosuid", "noexec", "nodev", "ro"]),
    ];
    // Names are looked up as on the host, whose network it has.
    let names = ["/etc/resolv.conf", "/etc/hosts"].into_iter().filter(|path| Path::new(path).is_file());
    mounts.extend(names.map(|path| mount(path, "bind", path, &["bind", "ro"])));
    mounts
}

/// Numbers of a user as an image's config names it: `user`, `user:group`, each a name or a number.
fn user(named: &str, root: &Path) -> Result<(u32, u32), BundleError> {
    let unknown = || BundleError::User(named.to_owned());
    let (user, group) = named.split_once(':').map_or((named, None), |(user, group)| (user, Some(group)));
    let users = table(&root.join("etc/passwd"));
    let (uid, primary) = match user {
        "" => (0, None),
        user => match (users.get(user), user.parse()) {
            (Some(fields), _) => (number(fields, 1).ok_or_else(unknown)?, number(fields, 2)),
            (None, Ok(uid)) => {
                (uid, users.values().find(|fields| number(fields, 1) == Some(uid)).and_then(|fields| number(fields, 2)))
            }
            (None, Err(_)) => return Err(unknown()),
        },
    };
    let gid = match group {
        None | Some("") => primary.unwrap_or(0),
        Some(group) => match table(&root.join("etc/group")).get(group) {
            Some(fields) => number(fields, 1).ok_or_else(unknown)?,
            None => group.parse().map_err(|_| unknown())?,
        },
    };
    Ok((uid, gid))
}

/// The lines of a file like `/etc/passwd` by their names: the fields behind the name.
fn table(path: &Path) -> BTreeMap<String, Vec<String>> {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(text.get(..USERS_LEN_MAX).unwrap_or(&text)).into_owned();
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    lines.map(|(name, rest)| (name.to_owned(), rest.split(':').map(str::to_owned).collect())).collect()
}

fn number(fields: &[String], place: usize) -> Option<u32> {
    fields.get(place)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        fs::write(root.path().join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001::/:/bin/sh\n")
            .unwrap();
        fs::write(root.path().join("etc/group"), "root:x:0:\nweb:x:33:\n").unwrap();
        root
    }

    #[test]
    fn users_are_names_or_numbers() {
        let root = root();
        let user = |named| user(named, root.path()).ok();
        assert_eq!(user(""), Some((0, 0)));
        assert_eq!(user("app"), Some((1000, 1001)));
        assert_eq!(user("app:web"), Some((1000, 33)));
        assert_eq!(user("1000"), Some((1000, 1001)));
        assert_eq!(user("7:8"), Some((7, 8)));
        assert_eq!([user("nobody"), user("app:none")], [None, None]);
    }

    #[test]
    fn the_command_is_that_of_the_image_unless_one_is_said() {
        let root = root();
        let document = br#"{"config": {"Entrypoint": ["/run"], "Cmd": ["-v"], "Env": ["A=1"], "WorkingDir": "/srv", "User": "app"}}"#;
        let config = StartConfig::from_json(document).unwrap();
        let process = |command: &[String]| runtime_config(&config, command, root.path()).unwrap()["process"].clone();
        assert_eq!(process(&[])["args"], json!(["/run", "-v"]));
        assert_eq!(process(&["/bin/true".to_owned()])["args"], json!(["/bin/true"]));
        assert_eq!(process(&[])["env"], json!([DEFAULT_PATH, "A=1"]));
        assert_eq!((&process(&[])["cwd"], &process(&[])["user"]["uid"]), (&json!("/srv"), &json!(1000)));
        let nothing = runtime_config(&StartConfig::default(), &[], root.path()).unwrap_err();
        assert_eq!(nothing.to_string(), "the image has no command: say one after --");
    }
}

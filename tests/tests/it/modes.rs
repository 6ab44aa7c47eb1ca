//! Kernel mode and portable mode: how one is chosen, and what each promises a container.

use std::{fs, time::Duration};

use lazuli_tests::{
    LazyMount, Node, Result, Scratch,
    containerd::LAZULI,
    error::Context as _,
    process::{command, finish},
    programs::{MODES, program},
    samples::{large_file, publish_sample},
};
use rustix::process::Signal;

/// How long what needs no daemon may take on a busy machine.
const WITHIN: Duration = Duration::from_secs(20);

/// What a shell prints that has to end within [`WITHIN`].
fn shell(script: &str) -> Result<String> {
    let seconds = WITHIN.as_secs().to_string();
    let finished = finish(&mut command("timeout", ["--kill-after=1", &seconds, "sh", "-c", script]))?;
    assert_eq!(finished.code, Some(0), "{script}: {finished:?}");
    Ok(finished.stdout)
}

#[test]
fn containers_run_in_each_mode() -> Result<()> {
    for mode in MODES {
        let scratch = Scratch::new(&format!("containers-{mode}"))?;
        let registry = publish_sample(&scratch)?;
        let node = Node::start_in(mode, &scratch)?;
        let lazy = registry.reference("sample:lazy");
        let pulled = node.lazuli_pull(&lazy)?;
        assert_eq!(pulled.code, Some(0), "{}", pulled.stderr);
        let script = "cat /etc/greeting; rm /large/2; echo new >/etc/greeting; cat /etc/greeting; ls /large";
        for name in ["one", "two"] {
            let finished = node.containerd.run(&lazy, LAZULI, name, &["/bin/sh", "-c", script])?;
            let expected = "good morning\nnew\n0\n1\n3\n4\n5\n";
            assert_eq!((finished.code, finished.stdout.as_str()), (Some(0), expected), "{mode}: {}", finished.stderr);
        }
        let mounted = fs::read_to_string("/proc/self/mountinfo").context("reading the mount table")?;
        let below = node.snapshotter.root().join("erofs");
        let is_kernel = mounted.lines().any(|line| line.contains(&*below.to_string_lossy()));
        assert_eq!(is_kernel, mode == "erofs");
    }
    Ok(())
}

/// A daemon that does nothing at all is not noticed by who looks at what was looked at before, nor by who reads it.
#[test]
fn what_was_seen_once_is_seen_again_without_the_daemon() -> Result<()> {
    let scratch = Scratch::new("seen-once")?;
    let registry = publish_sample(&scratch)?;
    for mode in MODES {
        let mut mount = LazyMount::in_mode(mode, &scratch, mode, &registry.reference("sample:lazy"))?;
        let path = mount.path().display().to_string();
        // Not find: it asks for the type of the file system, which the kernel does not keep.
        let look = format!(
            "cd {path} && ls -1R . && stat -c '%N %f %s %u %Y' bin/sh etc etc/greeting && cat etc/greeting && \
             sha256sum large/1 && ! test -e etc/missing && ! test -e missing/below"
        );
        let before = shell(&look)?;
        mount.service().signal(Signal::STOP);
        // A listing brings attributes along, so these need no question of their own.
        let after = shell(&format!("{look} && stat -c %s large/3 >&2"));
        mount.service().signal(Signal::CONT);
        assert_eq!(after?, before, "{mode}");
        assert!(mount.stop());
    }
    Ok(())
}

#[test]
fn in_kernel_mode_metadata_never_asks_the_daemon() -> Result<()> {
    let scratch = Scratch::new("metadata")?;
    let registry = publish_sample(&scratch)?;
    let mut mount = LazyMount::in_mode("erofs", &scratch, "lazy", &registry.reference("sample:lazy"))?;
    mount.service().signal(Signal::STOP);
    let listed = shell(&format!("cd {} && find . -printf '%p %s %l\\n' | sort", mount.path().display()));
    mount.service().signal(Signal::CONT);
    let listed = listed?;
    assert!(listed.contains("./bin/sh 7 busybox\n"), "{listed}");
    assert!(listed.contains(&format!("./large/3 {} \n", large_file(3).len())), "{listed}");
    Ok(())
}

#[test]
fn kernel_mode_that_cannot_be_had_is_refused_in_one_line() -> Result<()> {
    let scratch = Scratch::new("no-kernel-mode")?;
    let registry = publish_sample(&scratch)?;
    let mount_point = scratch.directory("mount")?;
    let without = ["--inh-caps=-sys_admin", "--bounding-set=-sys_admin"];
    let mut mount = command("setpriv", without);
    mount.arg(program("lazuli")?).args(["mount", "--mode", "erofs", &registry.reference("sample:lazy")]);
    let finished = finish(mount.arg(&mount_point).arg("--cache").arg(scratch.join("cache")))?;
    assert_eq!(finished.code, Some(1), "{finished:?}");
    let told: Vec<&str> = finished.stderr.lines().collect();
    assert!(matches!(*told, [line] if line.contains("--mode erofs") && line.contains("CAP_SYS_ADMIN")), "{told:?}");
    assert_eq!(scratch.mounts(), [] as [std::path::PathBuf; 0]);
    Ok(())
}

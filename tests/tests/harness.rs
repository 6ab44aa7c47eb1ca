//! The harness itself: what it counts, compares and starts is right, with nothing of Lazuli in it.

use std::{fs, os::unix::fs::symlink, path::Path};

use lazuli_tests::{
    Compression, Containerd, ContainerdOptions, HarnessError, ImageBuilder, Result, Scratch, TarLayer, TestRegistry,
    compare_trees,
    containerd::OVERLAYFS,
    diff_trees,
    process::{command, run},
    real_images::busybox,
    registry_server::digest_in,
};

/// Two equal trees, then the one thing changed that `change` changes in the second.
fn differences_after(name: &str, change: impl FnOnce(&Path) -> std::io::Result<()>) -> Result<Vec<String>> {
    let scratch = Scratch::new(name)?;
    let roots = [scratch.directory("original")?, scratch.directory("lazy")?];
    let make = |root: &Path| -> std::io::Result<()> {
        fs::create_dir(root.join("directory"))?;
        fs::write(root.join("directory/file"), "content")?;
        fs::hard_link(root.join("directory/file"), root.join("link"))?;
        fs::write(root.join("other"), "other")?;
        symlink("directory", root.join("symlink"))?;
        for path in ["directory/file", "other", "directory", ""] {
            let time = fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH);
            fs::File::open(root.join(path))?.set_times(time)?;
        }
        rustix::fs::utimensat(
            rustix::fs::CWD,
            root.join("symlink"),
            &rustix::fs::Timestamps {
                last_access: rustix::fs::Timespec { tv_sec: 0, tv_nsec: 0 },
                last_modification: rustix::fs::Timespec { tv_sec: 0, tv_nsec: 0 },
            },
            rustix::fs::AtFlags::SYMLINK_NOFOLLOW,
        )?;
        Ok(())
    };
    for root in &roots {
        make(root).expect("a small tree can be made");
    }
    change(&roots[1]).expect("the change can be made");
    let found = compare_trees(&roots[0], &roots[1])?;
    Ok(found.iter().map(ToString::to_string).collect())
}

#[test]
fn comparison_finds_no_difference_between_equal_trees() -> Result<()> {
    assert_eq!(differences_after("compare-equal", |_| Ok(()))?, Vec::<String>::new());
    Ok(())
}

#[test]
fn comparison_finds_each_kind_of_difference() -> Result<()> {
    type Change = fn(&Path) -> std::io::Result<()>;
    let epoch = || fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH);
    let cases: [(&str, Change); 8] = [
        ("/directory: modification time is", |root| {
            fs::File::open(root.join("directory"))?
                .set_times(fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH + std::time::Duration::new(0, 1)))
        }),
        ("/other: size is 6, in the original 5", |root| fs::write(root.join("other"), "longer")),
        ("/other: content differs at byte 2", |root| fs::write(root.join("other"), "otter")),
        ("/other: owner and group is (7, 8)", |root| std::os::unix::fs::chown(root.join("other"), Some(7), Some(8))),
        ("/other: mode is 600", |root| {
            fs::set_permissions(root.join("other"), std::os::unix::fs::PermissionsExt::from_mode(0o600))
        }),
        ("/other: xattrs is {\"user.a\": [49]}", |root| xattr::set(root.join("other"), "user.a", b"1")),
        ("/new: is a file, not there in the original", |root| fs::write(root.join("new"), "")),
        ("/link: missing, is a file in the original", |root| fs::remove_file(root.join("link"))),
    ];
    for (expected, change) in cases {
        let found = differences_after("compare-change", |root| {
            change(root)?;
            // Changing an entry changes times too: put back those that the case is not about.
            if !expected.contains("modification time") {
                for path in ["other", "", "directory"] {
                    fs::File::open(root.join(path))?.set_times(epoch())?;
                }
            }
            Ok(())
        })?;
        assert!(found.iter().any(|line| line.starts_with(expected)), "{expected}: {found:?}");
    }
    Ok(())
}

#[test]
fn comparison_finds_a_broken_hard_link() -> Result<()> {
    let found = differences_after("compare-links", |root| {
        fs::remove_file(root.join("link"))?;
        fs::copy(root.join("directory/file"), root.join("link"))?;
        fs::File::open(root.join("link"))?.set_times(fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH))?;
        fs::File::open(root)?.set_times(fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH))
    })?;
    assert_eq!(
        found,
        [
            "/directory/file: link count is 1, in the original 2",
            "/link: link count is 1, in the original 2",
            "/directory/file: links [\"directory/file\", \"link\"] are one file only in the original",
        ]
    );
    Ok(())
}

#[test]
fn diff_passes_over_equal_device_nodes_only() -> Result<()> {
    let scratch = Scratch::new("diff-devices")?;
    let roots = [scratch.directory("original")?, scratch.directory("lazy")?];
    for root in &roots {
        run(command("mknod", ["-m", "600"]).arg(root.join("same")).args(["c", "1", "3"]))?;
    }
    assert_eq!(diff_trees(&roots[0], &roots[1])?, Vec::<String>::new());
    run(command("mkfifo", [roots[0].join("other")]).arg(roots[0].join("more")))?;
    fs::write(roots[1].join("other"), "").expect("a file can be written");
    assert_eq!(diff_trees(&roots[0], &roots[1])?.len(), 2);
    Ok(())
}

#[test]
fn registry_counts_the_bytes_it_serves() -> Result<()> {
    let scratch = Scratch::new("registry-counts")?;
    let registry = TestRegistry::start(&scratch)?;
    let layer = TarLayer::new().file("hello", "hello").finish()?;
    let layout = ImageBuilder::new().layer(layer, Compression::Gzip).write(&scratch, "image")?;
    registry.push(&layout, "counted:1")?;
    assert_eq!(registry.blob_bytes()?, 0);
    assert_eq!(registry.tags("counted"), ["1"]);

    let manifest = registry.manifest("counted:1")?;
    let digest = digest_in(&manifest["layers"][0])?;
    let url = format!("http://{}", registry.reference(&format!("v2/counted/blobs/{digest}")));
    let path = format!("/v2/counted/blobs/{digest}");
    run(&mut command("curl", ["--silent", "--range", "10-19", &url]))?;
    let served: Vec<_> = registry.served()?.into_iter().filter(|served| served.path == path).collect();
    let last = served.last().ok_or_else(|| HarnessError::Unexpected("nothing served".to_owned()))?;
    assert_eq!((last.method.as_str(), last.status, last.body_bytes), ("GET", 206, 10));
    assert_eq!(registry.blob_bytes()?, 10);
    Ok(())
}

#[test]
fn plain_containerd_runs_an_image_made_in_memory() -> Result<()> {
    let scratch = Scratch::new("plain-containerd")?;
    let registry = TestRegistry::start(&scratch)?;
    let lower = TarLayer::new().program("bin/busybox", busybox()?).file("gone", "").finish()?;
    let upper = TarLayer::new().file("greeting", "good morning\n").whiteout("", "gone").finish()?;
    let layout = ImageBuilder::new()
        .layer(lower, Compression::Gzip)
        .layer(upper, Compression::Zstd)
        .command(&["/bin/busybox", "cat", "/greeting"])
        .write(&scratch, "image")?;
    let reference = registry.push(&layout, "greeting:1")?;
    let containerd = Containerd::start(&scratch, &ContainerdOptions::default())?;
    containerd.pull(&reference, OVERLAYFS)?;
    let finished = containerd.run(&reference, OVERLAYFS, "greeting", &[])?;
    assert_eq!((finished.code, finished.stdout.as_str()), (Some(0), "good morning\n"), "{}", finished.stderr);
    let view = scratch.directory("view")?;
    containerd.mount_image(&reference, OVERLAYFS, &view)?;
    assert!(view.join("greeting").exists() && !view.join("gone").exists());
    Ok(())
}

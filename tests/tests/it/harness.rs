//! The harness itself: what it counts, compares and starts is right, with nothing of Lazuli in it.

use std::{fs, os::unix::fs::symlink, path::Path};

use lazuli_tests::{
    Compression, Containerd, ContainerdOptions, Fault, FaultyRegistry, HarnessError, ImageBuilder, Result, Scratch,
    TarLayer, TestRegistry, compare_trees,
    containerd::OVERLAYFS,
    diff_trees,
    process::{command, finish, run},
    real_images::busybox,
    registry_server::digest_in,
    samples::noise,
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

/// Status and body of a request for bytes 5000 to 9999 of a blob of a faulty registry.
fn ranged_answer(registry: &FaultyRegistry, path: &str) -> Result<(String, Vec<u8>)> {
    let url = format!("http://{}{path}", registry.address());
    let words =
        ["--silent", "--max-time", "2", "--write-out", "%{http_code}", "--range", "5000-9999", &url, "--output"];
    let file = std::env::temp_dir().join(format!("lazuli-answer-{}", std::process::id()));
    let finished = finish(command("curl", words).arg(&file))?;
    let body = fs::read(&file).unwrap_or_default();
    // There is none where nothing came.
    let _ = fs::remove_file(&file);
    Ok((finished.stdout, body))
}

#[test]
fn a_faulty_registry_answers_with_the_fault_that_was_set() -> Result<()> {
    let scratch = Scratch::new("faulty-registry")?;
    let behind = TestRegistry::start(&scratch)?;
    let layer = TarLayer::new().file("data", noise(1, 100_000)).finish()?;
    let layout = ImageBuilder::new().layer(layer, Compression::None).write(&scratch, "image")?;
    behind.push(&layout, "tried:1")?;
    let digest = digest_in(&behind.manifest("tried:1")?["layers"][0])?;
    let blob = fs::read(behind.blob_file(digest)).expect("readable");
    let registry = FaultyRegistry::before(behind.address())?;
    let path = format!("/v2/tried/blobs/{digest}");
    let right = blob[5000..10_000].to_vec();
    let wrong = [&[right[0] ^ 1], &right[1..]].concat();
    for (fault, status, body) in [
        (Fault::None, "206", right.clone()),
        (Fault::Aligned, "206", blob[4096..10_000].to_vec()),
        (Fault::Clamped(100), "206", blob[5000..5100].to_vec()),
        (Fault::IgnoresRange, "200", blob.clone()),
        (Fault::WrongByte, "206", wrong),
        (Fault::SilentAfter(1000), "206", blob[5000..6000].to_vec()),
        (Fault::CutInTheMiddle, "206", blob[5000..7500].to_vec()),
        (Fault::Status(503, Some(90)), "503", Vec::new()),
        (Fault::AllStatus(404), "404", Vec::new()),
        (Fault::Close, "000", Vec::new()),
        (Fault::Hang, "000", Vec::new()),
    ] {
        registry.set("tried", fault.clone());
        assert_eq!(ranged_answer(&registry, &path)?, (status.to_owned(), body), "{fault:?}");
    }
    registry.heal("tried");
    registry.require("tried", Some("Basic bmFtZTpvbmU="));
    assert_eq!(ranged_answer(&registry, &path)?.0, "401");
    let asked = registry.asked("tried");
    assert!(
        asked.iter().all(|asked| asked.range == "bytes=5000-9999" && asked.blob == digest.to_string()),
        "{asked:?}"
    );
    // Not the one that concerned the whole repository.
    assert_eq!(asked.len(), 11);
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

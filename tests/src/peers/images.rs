//! The forms of an image that peers want, made with their own tools.

use std::{fs, path::PathBuf};

use serde_json::{Deserializer, Value};

use crate::{
    containerd::{Containerd, ContainerdOptions},
    error::{Context as _, HarnessError, Result},
    process::{command, require_program, run},
    registry_server::TestRegistry,
    scratch::Scratch,
};

use super::{Peer, programs, tool};

/// An image that is in the registry as `<image>:full`.
pub(super) struct Source<'a> {
    pub(super) registry: &'a TestRegistry,
    pub(super) scratch: &'a Scratch,
    pub(super) image: &'a str,
    /// `oci:DIR:latest`.
    pub(super) layout: &'a str,
}

impl Source<'_> {
    /// As `ctr-remote image optimize` makes it: the image's own command runs, and the files that it opens come first.
    pub(super) fn to_estargz(&self) -> Result<()> {
        self.optimized().map(drop)
    }

    /// Optimises and pushes; returns the record of opened files.
    fn optimized(&self) -> Result<PathBuf> {
        let record = self.scratch.directory("records")?.join(self.image);
        if record.is_file() {
            return Ok(record);
        }
        require_program("ctr-remote")?;
        let directory = self.scratch.directory("optimize")?;
        let own = Scratch::at(&directory, "optimize")?;
        let containerd = Containerd::start(&own, &ContainerdOptions::default())?;
        let name = |tag| self.registry.reference(&format!("{}:{tag}", self.image));
        let (full, estargz) = (name("full"), name(Peer::Estargz.tag()));
        let made = own.join("record");
        let run_on = |words: &[&str]| {
            let mut ctr = command("ctr-remote", ["--address"]);
            run(ctr.arg(containerd.socket()).arg("images").args(words)).map(drop)
        };
        run_on(&["pull", "--plain-http", &full])?;
        run_on(&["optimize", "--oci", "--record-out", &made.display().to_string(), &full, &estargz])?;
        run_on(&["push", "--plain-http", &estargz])?;
        fs::copy(&made, &record).at("keeping", &record)?;
        drop(containerd);
        drop(own);
        Ok(record)
    }

    /// As `soci convert` makes it with its defaults; with prefetch, of the files that the start opens.
    pub(super) fn to_soci(&self, tag: &str, is_prefetch: bool) -> Result<()> {
        let layout = self.layout.strip_prefix("oci:").and_then(|rest| rest.rsplit_once(':'));
        let (layout, _) =
            layout.ok_or_else(|| HarnessError::Unexpected(format!("{} is no `oci:DIR:TAG`", self.layout)))?;
        let converted = self.scratch.directory("soci")?.join(format!("{}.{tag}", self.image)).display().to_string();
        let mut words = vec!["convert", "--standalone", "--format", "oci-dir"];
        let list = format!("{converted}.prefetch");
        if is_prefetch {
            let files = opened_files(&fs::read_to_string(self.optimized()?).context("reading the record")?)?;
            fs::write(&list, Value::from(files).to_string()).context("writing the prefetch list")?;
            words.extend(["--prefetch-files-json", &list]);
        }
        words.extend([layout, converted.as_str()]);
        tool(programs()?.join("soci"), &words)?;
        let target = format!("docker://{}", self.registry.reference(&format!("{}:{tag}", self.image)));
        let copy = ["copy", "--quiet", "--all", "--dest-tls-verify=false", &format!("oci:{converted}"), &target];
        tool("skopeo", &copy)?;
        fs::remove_dir_all(&converted).context("removing the converted layout")
    }
}

/// The paths of a record, each once, in the order in which they were opened.
fn opened_files(record: &str) -> Result<Vec<String>> {
    let mut files = Vec::new();
    for entry in Deserializer::from_str(record).into_iter::<Value>() {
        let entry = entry.map_err(|error| HarnessError::Unexpected(format!("the record of opened files: {error}")))?;
        let Some(path) = entry["path"].as_str() else { continue };
        let path = format!("/{}", path.trim_start_matches('/'));
        if !files.contains(&path) {
            files.push(path);
        }
    }
    match files.len() {
        0 => Err(HarnessError::Unexpected("the record of opened files is empty".to_owned())),
        _ => Ok(files),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_gives_each_path_once() {
        let record = r#"{"path":"usr/bin/a","layerIndex":1}
{"path":"/etc/b"} {"path":"usr/bin/a"}"#;
        assert_eq!(opened_files(record).unwrap(), ["/usr/bin/a", "/etc/b"]);
        assert!(opened_files("").is_err());
    }
}

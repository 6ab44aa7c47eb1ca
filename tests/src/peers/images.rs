//! The forms of an image that peers want, made with their own tools.

use std::fs;

use crate::{
    containerd::{Containerd, ContainerdOptions},
    error::{Context as _, HarnessError, Result},
    process::{command, require_program, run},
    registry_server::TestRegistry,
    scratch::Scratch,
};

use super::{Peer, programs};

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
        require_program("ctr-remote")?;
        let own = Scratch::at(&self.scratch.directory("optimize")?, "optimize")?;
        let containerd = Containerd::start(&own, &ContainerdOptions::default())?;
        let (full, estargz) = (self.name("full"), self.name(Peer::Estargz.tag()));
        let run_on = |words: &[&str]| {
            let mut ctr = command("ctr-remote", ["--address"]);
            run(ctr.arg(containerd.socket()).arg("images").args(words)).map(drop)
        };
        run_on(&["pull", "--plain-http", &full])?;
        run_on(&["optimize", "--oci", &full, &estargz])?;
        run_on(&["push", "--plain-http", &estargz])
    }

    /// As `soci convert` makes it with its defaults.
    pub(super) fn to_soci(&self) -> Result<()> {
        let layout = self.layout.strip_prefix("oci:").and_then(|rest| rest.rsplit_once(':'));
        let (layout, _) =
            layout.ok_or_else(|| HarnessError::Unexpected(format!("{} is no `oci:DIR:TAG`", self.layout)))?;
        let converted = self.scratch.directory("soci")?.join(self.image);
        let mut convert = command(programs()?.join("soci"), ["convert", "--standalone", "--format", "oci-dir", layout]);
        run(convert.arg(&converted))?;
        let mut copy = command("skopeo", ["copy", "--quiet", "--all", "--dest-tls-verify=false"]);
        copy.arg(format!("oci:{}", converted.display()));
        run(copy.arg(format!("docker://{}", self.name(Peer::Soci.tag()))))?;
        fs::remove_dir_all(&converted).at("removing", &converted)
    }

    fn name(&self, tag: &str) -> String {
        self.registry.reference(&format!("{}:{tag}", self.image))
    }
}

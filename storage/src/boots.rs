//! Whether what a process left behind was all on the disk: the file `boots` of the cache directory.
//!
//! A process that is killed loses nothing that it wrote: the kernel has it. Only a machine that goes down can, and then
//! the next process runs under another boot of the kernel. `boots` names the boots under which a cache was closed in
//! order, newest last; a layer says in `presence` under which it was written.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use format_spec::Digest;

use crate::sync::{Mutex, lock};

/// Where the kernel says which boot this is (random(4)).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Most boots that are remembered: layers that nobody opened for longer are verified.
const BOOTS_MAX: usize = 64;

/// The boots that a cache knows.
#[derive(Debug)]
pub(crate) struct Boots {
    path: PathBuf,
    /// 0 where the kernel does not say it.
    current: u64,
    clean: Mutex<Vec<u64>>,
}

impl Boots {
    /// Those of the cache under `root`, which is open from now on; `id` stands for this boot, else the kernel is asked.
    pub(crate) fn open(root: &Path, id: Option<String>) -> io::Result<Self> {
        let current = id.or_else(|| fs::read_to_string(BOOT_ID).ok()).map_or(0, |id| number_of(&id));
        let path = root.join("boots");
        let known = fs::read(&path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let boots = Self { path, current, clean: Mutex::new(known.unwrap_or_default()) };
        boots.change(|clean| clean.retain(|boot| *boot != current))?;
        Ok(boots)
    }

    /// The one of now.
    pub(crate) fn current(&self) -> u64 {
        self.current
    }

    /// Whether nothing was lost of what was written under a boot.
    pub(crate) fn is_trusted(&self, boot: u64) -> bool {
        boot != 0 && (boot == self.current || lock(&self.clean).contains(&boot))
    }

    /// Everything is durable, and nothing more is written.
    pub(crate) fn note_end(&self) -> io::Result<()> {
        self.change(|clean| {
            clean.push(self.current);
            let spare = clean.len().saturating_sub(BOOTS_MAX);
            clean.drain(..spare);
        })
    }

    fn change(&self, change: impl FnOnce(&mut Vec<u64>)) -> io::Result<()> {
        let mut clean = lock(&self.clean);
        let before = clean.clone();
        change(&mut clean);
        if *clean == before {
            return Ok(());
        }
        let temporary = self.path.with_extension("new");
        fs::write(&temporary, serde_json::to_vec(&*clean)?)?;
        File::open(&temporary)?.sync_all()?;
        fs::rename(&temporary, &self.path)?;
        self.path.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
    }
}

fn number_of(id: &str) -> u64 {
    let digest = Digest::of(id.trim().as_bytes());
    let (first, _) = digest.as_bytes().split_first_chunk().expect("32 bytes");
    u64::from_le_bytes(*first).max(1)
}

//! The initramfs of a kernel with an agent, made once for each pair.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::{KERNEL_FORMAT, Staging, Store, blocking, read_limited, remove_file};
use crate::digest::{Digest, Hasher};
use crate::error::{Error, IoContext, Result};
use crate::files;
use crate::initramfs;

/// Initramfs files of one kernel that are kept: those of the agents that were used last.
const INITRAMFS_KEPT: usize = 4;
/// Largest agent binary.
const MAX_AGENT: u64 = 256 << 20;

/// What changes when a file is replaced or written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileIdentity {
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

impl FileIdentity {
    fn of(meta: &fs::Metadata) -> Self {
        Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.len(),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }
}

impl Store {
    /// The initramfs of a kernel with an agent, made where it is missing.
    pub async fn initramfs(&self, kernel: &Digest, agent: &Path) -> Result<PathBuf> {
        let store = self.clone();
        let kernel = *kernel;
        let agent = agent.to_owned();
        blocking(move || store.initramfs_blocking(&kernel, &agent)).await
    }

    fn initramfs_blocking(&self, kernel: &Digest, agent: &Path) -> Result<PathBuf> {
        let agent_digest = self.agent_digest(agent)?;
        let name = format!(
            "{}-{}-{}.{KERNEL_FORMAT}.cpio",
            kernel.short(),
            agent_digest.short(),
            initramfs::FORMAT
        );
        let path = self.root.join("initramfs").join(name);
        if path.exists() {
            return Ok(path);
        }
        let dir = self.kernel_dir(kernel);
        let info = self.kernel(kernel)?.ok_or(Error::NoKernel(*kernel))?.info;
        let mut modules = BTreeMap::new();
        for name in info.modules.iter().chain(&info.later) {
            let file = format!("{name}.ko");
            let bytes = read_limited(&dir.join("modules").join(&file), MAX_AGENT)?;
            modules.insert(file, bytes);
        }
        let agent_bytes = read_limited(agent, MAX_AGENT)?;
        // Replaced between the two looks: the name must fit the content.
        if Digest::of(&agent_bytes) != agent_digest {
            return Err(Error::Damaged {
                path: agent.to_owned(),
                why: "it changed while it was read".to_owned(),
            });
        }
        let (order, later) = (initramfs::list(&info.modules), initramfs::list(&info.later));
        let archive = initramfs::archive(&initramfs::nodes(
            &agent_bytes,
            &modules,
            &[order.as_bytes(), later.as_bytes()],
        ));
        let staging = Staging::new(&self.root)?;
        let made = staging.path().join("initramfs");
        files::write(&made, &archive)?;
        fs::rename(&made, &path).on("make", &path)?;
        self.forget_initramfs(kernel, &path)?;
        Ok(path)
    }

    /// Digest of an agent binary; computed again only when the file changes.
    fn agent_digest(&self, agent: &Path) -> Result<Digest> {
        let mut file = File::open(agent).on("open the agent", agent)?;
        let identity = FileIdentity::of(&file.metadata().on("read the agent", agent)?);
        if let Ok(known) = self.agents.lock()
            && let Some((of, digest)) = known.get(agent)
            && *of == identity
        {
            return Ok(*digest);
        }
        let mut hasher = Hasher::new();
        let mut buffer = vec![0; 1 << 18];
        loop {
            match file.read(&mut buffer).on("read the agent", agent)? {
                0 => break,
                n => hasher.update(buffer.get(..n).unwrap_or_default()),
            }
        }
        let digest = hasher.finish();
        if let Ok(mut known) = self.agents.lock() {
            known.insert(agent.to_owned(), (identity, digest));
        }
        Ok(digest)
    }

    /// Initramfs files whose names begin so, with their times.
    pub(super) fn initramfs_files(&self, prefix: &str) -> Result<Vec<(PathBuf, SystemTime)>> {
        let dir = self.root.join("initramfs");
        let mut out = Vec::new();
        for entry in fs::read_dir(&dir).on("read the directory", &dir)? {
            let entry = entry.on("read the directory", &dir)?;
            if entry.file_name().to_string_lossy().starts_with(prefix) {
                let made = entry.metadata().and_then(|m| m.modified()).unwrap_or(UNIX_EPOCH);
                out.push((entry.path(), made));
            }
        }
        Ok(out)
    }

    /// Removes the oldest initramfs files of a kernel. Running machines have read theirs long ago.
    fn forget_initramfs(&self, kernel: &Digest, but: &Path) -> Result<()> {
        let mut files = self.initramfs_files(&format!("{}-", kernel.short()))?;
        files.sort_by_key(|(_, made)| std::cmp::Reverse(*made));
        for (path, _) in files.iter().filter(|(path, _)| path != but).skip(INITRAMFS_KEPT - 1) {
            remove_file(path)?;
        }
        Ok(())
    }
}

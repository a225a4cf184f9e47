//! A kernel package into a directory of the store: ELF image, and the modules that machines load.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use super::bzimage;
use super::deb::{self, DebError, Item};
use super::decompress::{self, Compression};
use super::modules::{self, AT_START, LATER, MAX_MODULES, ModuleError, ModuleInfo, Wanted};
use crate::cancel::Cancel;
use crate::digest::Digest;
use crate::error::{Error, IoContext, Result};
use crate::files;
use crate::progress::{Progress, Step};
use crate::tar::{self, Kind, Limits, Reader, policy};

/// Bounds of a kernel package.
const LIMITS: Limits = Limits {
    entries: 100_000,
    file_bytes: 256 << 20,
    total_bytes: 4 << 30,
    extension_bytes: 64 << 10,
};
/// Largest compressed kernel image.
const MAX_IMAGE: u64 = 128 << 20;
/// Largest list of what is built in.
const MAX_LIST: u64 = 4 << 20;
/// Largest module.
const MAX_MODULE: usize = 64 << 20;

/// What was extracted.
#[derive(Debug, Clone)]
pub(crate) struct Extracted {
    pub(crate) release: String,
    pub(crate) digest: Digest,
    /// Modules that every machine loads, in this order.
    pub(crate) order: Vec<String>,
    /// Modules that come along, in the order in which they can be loaded after those.
    pub(crate) later: Vec<String>,
}

/// What is known while the package streams by.
#[derive(Default)]
struct Found {
    image: Option<(String, Vec<u8>)>,
    builtin: BTreeMap<String, BTreeSet<String>>,
    /// Release and name, what the module says of itself, and where it is in the spool.
    modules: BTreeMap<(String, String), (ModuleInfo, u64, u64)>,
}

/// Extracts `package` into `dir`: `vmlinux`, `modules/NAME.ko`.
pub(crate) fn extract(package: &Path, dir: &Path, progress: &Progress, cancel: &Cancel) -> Result<Extracted> {
    progress.begin(Step::ExtractKernel);
    let wrap = |source| Error::Deb {
        path: package.to_owned(),
        source,
    };
    let file = File::open(package).on("open", package)?;
    let tar = deb::data_tar(std::io::BufReader::with_capacity(1 << 18, cancel_file(file, cancel))).map_err(wrap)?;
    // Which modules are needed is known only when all have been seen, so they are spooled.
    let mut spool = tempfile::tempfile_in(dir).on("make a file in", dir)?;
    let found = scan(tar, &mut spool, package, progress)?;
    if cancel.is_set() {
        return Err(Error::Cancelled);
    }

    let (release, image) = found.image.ok_or_else(|| wrap(DebError::NoKernel))?;
    let elf = bzimage::extract(&image).map_err(|source| Error::Kernel {
        name: format!("boot/vmlinuz-{release}"),
        source,
    })?;
    let digest = Digest::of(&elf);
    files::write(&dir.join("vmlinux"), &elf)?;

    let builtin = found.builtin.get(&release).cloned().unwrap_or_default();
    let mut places = BTreeMap::new();
    let mut infos = BTreeMap::new();
    for ((of, name), (info, offset, length)) in found.modules {
        if of == release {
            places.insert(name.clone(), (offset, length));
            infos.insert(name, info);
        }
    }
    let closure = |wanted: &[Wanted]| {
        modules::closure(wanted, &infos, &builtin).map_err(|source| Error::Modules {
            release: release.clone(),
            source,
        })
    };
    let order = closure(AT_START)?;
    let mut later = closure(LATER)?;
    later.retain(|name| !order.contains(name));
    let target = dir.join("modules");
    std::fs::create_dir(&target).on("make the directory", &target)?;
    for name in order.iter().chain(&later) {
        let Some((offset, length)) = places.get(name) else {
            continue;
        };
        let mut bytes = vec![0; usize::try_from(*length).unwrap_or(0)];
        spool
            .seek(SeekFrom::Start(*offset))
            .and_then(|_| spool.read_exact(&mut bytes))
            .doing(|| "read the spooled modules")?;
        files::write(&target.join(format!("{name}.ko")), &bytes)?;
    }
    Ok(Extracted {
        release,
        digest,
        order,
        later,
    })
}

fn cancel_file(file: File, cancel: &Cancel) -> impl Read + Seek + 'static {
    SeekCancel {
        file,
        cancel: cancel.clone(),
    }
}

struct SeekCancel {
    file: File,
    cancel: Cancel,
}

impl Read for SeekCancel {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        self.cancel.reader(&self.file).read(buf)
    }
}

impl Seek for SeekCancel {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        self.file.seek(to)
    }
}

/// Reads the whole package, keeping what may be needed.
fn scan(tar: Box<dyn Read>, spool: &mut File, package: &Path, progress: &Progress) -> Result<Found> {
    let deb_error = |source| Error::Deb {
        path: package.to_owned(),
        source,
    };
    let tar_error = |source: tar::TarError| deb_error(DebError::Tar(source));
    let mut found = Found::default();
    let mut spooled = 0;
    let mut reader = Reader::new(tar, LIMITS);
    let mut seen = 0;
    while let Some(entry) = reader.next_entry().map_err(tar_error)? {
        seen += 1;
        if seen % 100 == 0 {
            progress.items(Step::ExtractKernel, seen, 0);
        }
        if entry.kind != Kind::File {
            continue;
        }
        let path = policy::components(&entry.path).map_err(tar_error)?;
        match deb::classify(&path).map_err(deb_error)? {
            Item::Kernel(release) => {
                if found.image.is_some() {
                    return Err(deb_error(DebError::SeveralKernels));
                }
                found.image = Some((
                    release,
                    content(&mut reader, entry.size, MAX_IMAGE, "the kernel image").map_err(tar_error)?,
                ));
            }
            Item::Builtin(release) => {
                let text =
                    content(&mut reader, entry.size, MAX_LIST, "the list of what is built in").map_err(tar_error)?;
                found
                    .builtin
                    .insert(release, modules::builtin_names(&String::from_utf8_lossy(&text)));
            }
            Item::Module { release, file } => {
                let module = |source| Error::Modules {
                    release: release.clone(),
                    source,
                };
                let bytes = content(&mut reader, entry.size, MAX_MODULE as u64, "a module").map_err(tar_error)?;
                let compression = Compression::detect(&bytes);
                let bytes = if compression == Compression::None {
                    bytes
                } else {
                    decompress::to_vec(compression, &bytes, MAX_MODULE).map_err(|_| {
                        module(ModuleError::Malformed {
                            file: file.clone(),
                            why: "it cannot be decompressed",
                        })
                    })?
                };
                let info = modules::parse(&file, &bytes).map_err(module)?;
                if found.modules.len() >= MAX_MODULES {
                    return Err(module(ModuleError::TooMany { limit: MAX_MODULES }));
                }
                let Some(name) = modules::module_name(&file) else {
                    continue;
                };
                spool.write_all(&bytes).doing(|| "spool the modules")?;
                found
                    .modules
                    .insert((release, name), (info, spooled, bytes.len() as u64));
                spooled += bytes.len() as u64;
            }
            Item::Other => {}
        }
    }
    Ok(found)
}

/// The content of the current entry.
fn content(reader: &mut impl Read, size: u64, limit: u64, what: &'static str) -> Result<Vec<u8>, tar::TarError> {
    if size > limit {
        return Err(tar::TarError::TooLarge { what, limit });
    }
    let mut out = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
    reader.take(size).read_to_end(&mut out)?;
    if out.len() as u64 != size {
        return Err(tar::TarError::Truncated);
    }
    Ok(out)
}

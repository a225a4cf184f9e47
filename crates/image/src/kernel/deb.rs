//! Debian packages: an `ar` archive with a compressed tar of files in it.

use std::io::{self, Read, Seek, SeekFrom};

use super::decompress::{self, Compression};

/// What is wrong with a package.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DebError {
    /// It cannot be read.
    #[error("it cannot be read")]
    Read(#[source] io::Error),
    /// It is no Debian package.
    #[error("it is not a Debian package: {0}")]
    NotAPackage(&'static str),
    /// Its compression is not supported.
    #[error("its member `{0}` is compressed in an unknown way")]
    UnknownCompression(String),
    /// It has no kernel in it.
    #[error("it holds no kernel (no boot/vmlinuz-* in it)")]
    NoKernel,
    /// It has more than one kernel in it.
    #[error("it holds more than one kernel")]
    SeveralKernels,
    /// The kernel's release is no sane name.
    #[error("it holds a kernel with the impossible release `{0}`")]
    BadRelease(String),
    /// Its file archive is malformed.
    #[error("its file archive is malformed")]
    Tar(#[from] crate::tar::TarError),
}

/// Most members before the data.
const MAX_MEMBERS: usize = 16;

/// Finds the file archive of a package and returns a reader of the plain tar.
pub fn data_tar<R: Read + Seek + 'static>(mut package: R) -> Result<Box<dyn Read>, DebError> {
    let mut magic = [0; 8];
    package
        .read_exact(&mut magic)
        .map_err(|_| DebError::NotAPackage("it is too short"))?;
    if &magic != b"!<arch>\n" {
        return Err(DebError::NotAPackage("it does not begin like an archive"));
    }
    for index in 0..MAX_MEMBERS {
        let (name, size) = member(&mut package)?;
        if index == 0 && name != b"debian-binary" {
            return Err(DebError::NotAPackage("its first member is not `debian-binary`"));
        }
        if let Some(suffix) = name.strip_prefix(b"data.tar") {
            let named = match suffix {
                b"" => Compression::None,
                b".gz" => Compression::Gzip,
                b".xz" => Compression::Xz,
                b".zst" => Compression::Zstd,
                b".lzma" => Compression::Lzma,
                _ => {
                    return Err(DebError::UnknownCompression(
                        String::from_utf8_lossy(&name).escape_debug().to_string(),
                    ));
                }
            };
            return decompress::reader(named, package.take(size)).map_err(DebError::Read);
        }
        // Members begin at even offsets.
        let skip = i64::try_from(size + size % 2).map_err(|_| DebError::NotAPackage("a member is too large"))?;
        package.seek(SeekFrom::Current(skip)).map_err(DebError::Read)?;
    }
    Err(DebError::NotAPackage("it has no `data.tar` member"))
}

/// Reads a member's header: its name and size.
fn member(package: &mut impl Read) -> Result<(Vec<u8>, u64), DebError> {
    let mut header = [0; 60];
    package
        .read_exact(&mut header)
        .map_err(|_| DebError::NotAPackage("it has no `data.tar` member"))?;
    if !header.ends_with(b"`\n") {
        return Err(DebError::NotAPackage("a member's header is malformed"));
    }
    let name = header.get(..16).unwrap_or_default().trim_ascii_end();
    let name = name.strip_suffix(b"/").unwrap_or(name).to_vec();
    let size = header
        .get(48..58)
        .and_then(|b| std::str::from_utf8(b.trim_ascii()).ok())
        .and_then(|s| s.parse().ok());
    Ok((name, size.ok_or(DebError::NotAPackage("a member's size is no number"))?))
}

/// What a path in a kernel package is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// The kernel image of this release.
    Kernel(String),
    /// A module of this release, by its path below the release's directory.
    Module {
        /// Kernel release.
        release: String,
        /// Name of the file without its directory.
        file: String,
    },
    /// The list of what is built into the kernel of this release.
    Builtin(String),
    /// Something else.
    Other,
}

/// Says what a path (its names from the root) in a kernel package is.
pub fn classify(path: &[Vec<u8>]) -> Result<Item, DebError> {
    let names: Vec<&[u8]> = path.iter().map(Vec::as_slice).collect();
    let names = match names.as_slice() {
        // Where /lib is a link to /usr/lib, packages hold the latter.
        [b"usr", rest @ ..] => rest,
        all => all,
    };
    match names {
        [b"boot", file] => match file.strip_prefix(b"vmlinuz-") {
            Some(name) => Ok(Item::Kernel(release(name)?)),
            None => Ok(Item::Other),
        },
        [b"lib", b"modules", name, b"modules.builtin"] => Ok(Item::Builtin(release(name)?)),
        [b"lib", b"modules", name, .., file] => match std::str::from_utf8(file) {
            Ok(file) if super::modules::module_name(file).is_some() => Ok(Item::Module {
                release: release(name)?,
                file: file.to_owned(),
            }),
            _ => Ok(Item::Other),
        },
        _ => Ok(Item::Other),
    }
}

/// A kernel release: what `uname -r` says.
fn release(name: &[u8]) -> Result<String, DebError> {
    let sane = !name.is_empty()
        && name.len() <= 64
        && name.first().is_some_and(u8::is_ascii_alphanumeric)
        && name.iter().all(|b| b.is_ascii_alphanumeric() || b"-.+~_".contains(b));
    if sane {
        Ok(String::from_utf8_lossy(name).into_owned())
    } else {
        Err(DebError::BadRelease(
            String::from_utf8_lossy(name).escape_debug().take(100).collect(),
        ))
    }
}

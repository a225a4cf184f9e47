//! The distribution's own kernel package, by the system's package client. Works without root: nothing is installed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Error, IoContext, Result};
use crate::process::{Program, Run, find_program};
use crate::progress::{Progress, Step};

/// Packages that depend on the newest kernel made for virtual machines; the first that apt knows is taken.
const META_PACKAGES: &[&str] = &["linux-image-cloud-amd64", "linux-image-amd64"];

const APT_CACHE: Program = Program {
    name: "apt-cache",
    package: "apt",
    purpose: "find the distribution's kernel package",
};
const APT_GET: Program = Program {
    name: "apt-get",
    package: "apt",
    purpose: "download the distribution's kernel package",
};
const LOOKUP: Duration = Duration::from_secs(60);
const DOWNLOAD: Duration = Duration::from_secs(900);
const OUTPUT: usize = 1 << 20;

/// A package that was downloaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Downloaded {
    /// The file.
    pub path: PathBuf,
    /// What it is: name and version.
    pub source: String,
}

/// Downloads the kernel package into `dir`.
pub async fn download(dir: &Path, progress: &Progress) -> Result<Downloaded> {
    progress.begin(Step::DownloadKernel);
    let package = available().await?;
    let size = match Run::new(APT_CACHE, LOOKUP)?
        .args(["show", "--no-all-versions", &package])
        .output(OUTPUT)
        .await
    {
        Ok(text) => field(&String::from_utf8_lossy(&text), "Size")
            .and_then(|s| s.parse().ok())
            .unwrap_or(0),
        Err(_) => 0,
    };
    progress.bytes(Step::DownloadKernel, 0, size);
    // Root's downloads are made by another user, who has no access here; the file's checksum is verified all the same.
    let run = Run::new(APT_GET, DOWNLOAD)?
        .args(["-q", "-o", "APT::Sandbox::User=root", "download", &package])
        .dir(dir)
        .shown(format!("apt-get download {package}"));
    if let Err(e) = run.output(OUTPUT).await {
        // A kernel that is installed is known without package lists, and then there is nowhere to download it from.
        let lists_missing = lists_missing().await;
        return Err(if lists_missing {
            Error::NoKernelPackage { package, lists_missing }
        } else {
            e
        });
    }
    let path = downloaded(dir, &package)?;
    progress.bytes(Step::DownloadKernel, size, size);
    let version = path
        .file_name()
        .and_then(|n| n.to_str())
        .and_then(|n| n.split('_').nth(1))
        .unwrap_or_default()
        .replace("%3a", ":");
    Ok(Downloaded {
        path,
        source: format!("{package} {version}").trim().to_owned(),
    })
}

/// The package that would be downloaded.
pub(crate) async fn available() -> Result<String> {
    if find_program("apt-get").is_none() || find_program("apt-cache").is_none() {
        return Err(Error::NoApt);
    }
    find_package().await
}

/// The package that the distribution's current kernel is in.
async fn find_package() -> Result<String> {
    for meta in META_PACKAGES {
        // Unknown packages are an error of apt's; whatever it was, the next candidate may do.
        let run = Run::new(APT_CACHE, LOOKUP)?.args(["depends", "--no-recommends", "--no-suggests", meta]);
        match run.output(OUTPUT).await {
            Ok(text) => {
                if let Some(package) = kernel_dependency(&String::from_utf8_lossy(&text)) {
                    return Ok(package);
                }
            }
            Err(Error::ProgramFailed { .. }) => {}
            Err(other) => return Err(other),
        }
    }
    Err(Error::NoKernelPackage {
        package: META_PACKAGES.first().copied().unwrap_or_default().to_owned(),
        lists_missing: lists_missing().await,
    })
}

/// Whether apt has no package lists. Installed packages are known without lists, but then without a file to download.
async fn lists_missing() -> bool {
    let Ok(run) = Run::new(APT_CACHE, LOOKUP) else {
        return false;
    };
    let shown = run
        .args(["show", "--no-all-versions", "base-files"])
        .output(OUTPUT)
        .await;
    !shown.is_ok_and(|text| field(&String::from_utf8_lossy(&text), "Filename").is_some())
}

/// The first real kernel package in what `apt-cache depends` says.
fn kernel_dependency(text: &str) -> Option<String> {
    text.lines()
        .filter_map(|line| line.trim().trim_start_matches('|').strip_prefix("Depends:"))
        .map(str::trim)
        .find(|name| name.starts_with("linux-image-") && is_package_name(name))
        .map(str::to_owned)
}

fn is_package_name(name: &str) -> bool {
    name.len() <= 128
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b))
}

/// A field of the first stanza in what `apt-cache show` says.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines()
        .take_while(|line| !line.is_empty())
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(str::trim)
}

/// The file that apt left in `dir`.
fn downloaded(dir: &Path, package: &str) -> Result<PathBuf> {
    let prefix = format!("{package}_");
    for entry in std::fs::read_dir(dir).on("read the directory", dir)? {
        let entry = entry.on("read the directory", dir)?;
        let name = entry.file_name();
        if name
            .to_str()
            .is_some_and(|n| n.starts_with(&prefix) && n.ends_with(".deb"))
        {
            return Ok(entry.path());
        }
    }
    Err(Error::ProgramFailed {
        program: format!("apt-get download {package}"),
        how: "it left no file".to_owned(),
        last_words: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependency_is_found() {
        let text = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n";
        assert_eq!(
            kernel_dependency(text).as_deref(),
            Some("linux-image-6.1.0-56-cloud-amd64")
        );
        let alternatives =
            "x\n |Depends: foo\n  Depends: <linux-image>\n  PreDepends: linux-image-no\n |Depends: linux-image-6.12\n";
        assert_eq!(kernel_dependency(alternatives).as_deref(), Some("linux-image-6.12"));
        assert_eq!(kernel_dependency("x\n  Depends: linux-image-$(reboot)\n"), None);
        assert_eq!(kernel_dependency(""), None);
    }

    #[test]
    fn fields_of_the_first_stanza() {
        let text = "Package: a\nSize: 12\nFilename: pool/a.deb\n\nPackage: b\nOther: 1\n";
        assert_eq!(field(text, "Size"), Some("12"));
        assert_eq!(field(text, "Other"), None);
        assert_eq!(field(text, "Siz"), None);
    }
}

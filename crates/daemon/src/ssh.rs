//! Keys and known hosts: banger's own, never the user's.
//!
//! `id_ed25519` is the key that machines let in; each machine's host key lies with the machine. `known_hosts` has one line for
//! `<id>.banger` and one for `<name>.vm` per machine, so a host key is never trusted at first sight.

use std::path::{Path, PathBuf};
use std::time::Duration;

use banger_core::id::MachineId;
use banger_proto::error::{ApiError, ErrorCode};
use banger_vmm::space::says_full;
use tokio::process::Command;
use tokio::sync::{Mutex, OnceCell};

use crate::error;
use crate::machine::handles::write_whole;

/// How long the making of a key may take.
const KEYGEN: Duration = Duration::from_secs(20);

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum SshError {
    /// OpenSSH is not installed.
    #[error("`ssh-keygen` is not installed; `banger vm ssh` will not work")]
    Missing,
    /// It failed.
    #[error("`ssh-keygen` failed: {0}")]
    Failed(String),
    /// A file could not be read or written.
    #[error("cannot {what}")]
    Io {
        /// What was being done.
        what: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

/// What a machine gets.
#[derive(Debug, Default)]
pub struct MachineKeys {
    /// Keys that may log in.
    pub authorized_keys: Vec<String>,
    /// Private host key in OpenSSH's format.
    pub host_key: Option<String>,
}

/// Keys and known hosts of a daemon.
#[derive(Debug)]
pub struct Ssh {
    dir: PathBuf,
    user_key: OnceCell<String>,
    known_hosts: Mutex<()>,
}

impl Ssh {
    /// Those below `dir`.
    pub fn new(dir: PathBuf) -> Self {
        Self {
            dir,
            user_key: OnceCell::new(),
            known_hosts: Mutex::new(()),
        }
    }

    /// The private key of banger.
    pub fn key_path(&self) -> PathBuf {
        self.dir.join("id_ed25519")
    }

    /// The known hosts.
    pub fn known_hosts_path(&self) -> PathBuf {
        self.dir.join("known_hosts")
    }

    /// Keys for a machine, made where they are not there yet. Where they can't be made the machine starts without: everything
    /// but `vm ssh` works.
    pub async fn of_machine(&self, dir: &Path, id: &MachineId, name: &str) -> MachineKeys {
        match self.keys(dir, id, name).await {
            Ok(keys) => keys,
            Err(e) => {
                tracing::warn!(machine = %id, error = %error::chain(&e), "the machine gets no SSH keys");
                MachineKeys::default()
            }
        }
    }

    async fn keys(&self, dir: &Path, id: &MachineId, name: &str) -> Result<MachineKeys, SshError> {
        let user = self
            .user_key
            .get_or_try_init(|| async { keypair(&self.key_path(), "banger").await })
            .await?;
        let path = dir.join("ssh_host_ed25519_key");
        let public = keypair(&path, &format!("{id}.banger")).await?;
        let host_key = std::fs::read_to_string(&path).map_err(|source| SshError::Io {
            what: format!("read {}", path.display()),
            source,
        })?;
        self.pin(id, name, Some(&public)).await?;
        Ok(MachineKeys {
            authorized_keys: vec![user.clone()],
            host_key: Some(host_key),
        })
    }

    /// Renames a machine's entry.
    pub async fn rename(&self, dir: &Path, id: &MachineId, name: &str) -> Result<(), ApiError> {
        let public = std::fs::read_to_string(dir.join("ssh_host_ed25519_key.pub")).ok();
        match public {
            Some(public) => self.pin(id, name, Some(public.trim())).await.map_err(told),
            None => Ok(()),
        }
    }

    /// Removes a machine's entries.
    pub async fn forget(&self, id: &MachineId) -> Result<(), ApiError> {
        self.pin(id, "", None).await.map_err(told)
    }

    async fn pin(&self, id: &MachineId, name: &str, public: Option<&str>) -> Result<(), SshError> {
        let path = self.known_hosts_path();
        let failed = |what: &str, source| SshError::Io {
            what: format!("{what} {}", path.display()),
            source,
        };
        let _turn = self.known_hosts.lock().await;
        let old = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(failed("read", e)),
        };
        let new = edit(&old, id, name, public);
        if new == old {
            return Ok(());
        }
        // Each machine's start writes its own lines again.
        match write_whole(&path, new.as_bytes()) {
            // A removal makes space, so it needs none.
            Err(e) if public.is_none() && says_full(&e) => blank(&path, &old, id).map_err(|e| failed("write", e)),
            written => written.map_err(|e| failed("write", e)),
        }
    }
}

fn told(e: SshError) -> ApiError {
    match e {
        SshError::Io { what, source } => error::io(what, source),
        other => ApiError::new(ErrorCode::Internal, error::chain(&other)),
    }
}

fn alias(id: &MachineId) -> String {
    format!("{id}.banger")
}

/// Whether a line of the known hosts is of the machine with this alias.
fn is_of(line: &str, alias: &str) -> bool {
    let mut words = line.split_ascii_whitespace();
    words.next_back() == Some(alias) || line.split_ascii_whitespace().next() == Some(alias)
}

/// Overwrites a machine's lines with empty ones, in place.
fn blank(path: &Path, old: &str, id: &MachineId) -> std::io::Result<()> {
    use std::os::unix::fs::FileExt;
    let alias = alias(id);
    let file = std::fs::OpenOptions::new().write(true).open(path)?;
    let mut at = 0;
    for line in old.split_inclusive('\n') {
        if is_of(line, &alias) {
            file.write_all_at(&vec![b'\n'; line.len()], at)?;
        }
        at += line.len() as u64;
    }
    Ok(())
}

/// The known hosts with a machine's entries replaced, or removed. A line belongs to a machine by its comment.
fn edit(old: &str, id: &MachineId, name: &str, public: Option<&str>) -> String {
    let alias = alias(id);
    let host = format!("{name}.vm");
    let mut lines: Vec<String> = old
        .lines()
        .filter(|line| {
            let hosts = line.split_ascii_whitespace().next().unwrap_or_default();
            // A name that passed to this machine is not another's any more.
            !line.is_empty() && !is_of(line, &alias) && (public.is_none() || hosts != host)
        })
        .map(str::to_owned)
        .collect();
    if let Some(public) = public {
        let key: Vec<&str> = public.split_ascii_whitespace().take(2).collect();
        let key = key.join(" ");
        lines.push(format!("{alias} {key} {alias}"));
        lines.push(format!("{host} {key} {alias}"));
    }
    lines.iter().map(|line| format!("{line}\n")).collect()
}

/// The public part of a key pair, which is made if it is not there.
async fn keypair(path: &Path, comment: &str) -> Result<String, SshError> {
    let public = PathBuf::from(format!("{}.pub", path.display()));
    if path.exists()
        && let Ok(text) = std::fs::read_to_string(&public)
    {
        return Ok(text.trim().to_owned());
    }
    // Half a pair, of a making that was cut off, is made anew.
    let _ = std::fs::remove_file(path);
    let mut keygen = Command::new("ssh-keygen");
    keygen
        .args(["-q", "-t", "ed25519", "-N", "", "-C", comment, "-f"])
        .arg(path);
    keygen.stdin(std::process::Stdio::null()).kill_on_drop(true);
    banger_child::bind(keygen.as_std_mut(), banger_child::End::Killed);
    let output = match tokio::time::timeout(KEYGEN, keygen.output()).await {
        Err(_) => return Err(SshError::Failed(format!("it did not end within {KEYGEN:?}"))),
        Ok(Err(e)) if e.kind() == std::io::ErrorKind::NotFound => return Err(SshError::Missing),
        Ok(Err(source)) => {
            return Err(SshError::Io {
                what: "run ssh-keygen".to_owned(),
                source,
            });
        }
        Ok(Ok(output)) => output,
    };
    if !output.status.success() {
        let words: String = String::from_utf8_lossy(&output.stderr).chars().take(300).collect();
        return Err(SshError::Failed(words.trim().to_owned()));
    }
    let text = std::fs::read_to_string(&public).map_err(|source| SshError::Io {
        what: format!("read {}", public.display()),
        source,
    })?;
    Ok(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(n: u8) -> MachineId {
        MachineId::from_random([n; 8])
    }

    #[test]
    fn a_machine_has_two_lines_and_a_rename_moves_one() {
        let one = edit("", &id(1), "box", Some("ssh-ed25519 AAAA comment"));
        assert_eq!(
            one,
            "0101010101010101.banger ssh-ed25519 AAAA 0101010101010101.banger\nbox.vm ssh-ed25519 AAAA 0101010101010101.banger\n"
        );
        let renamed = edit(&one, &id(1), "other", Some("ssh-ed25519 AAAA comment"));
        assert!(renamed.contains("\nother.vm ") && !renamed.contains("box.vm"));
        assert_eq!(edit(&renamed, &id(1), "", None), "");
    }

    #[test]
    fn lines_are_removed_in_place() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("known_hosts");
        let one = edit("foreign ssh-ed25519 X\n", &id(1), "box", Some("ssh-ed25519 AAAA x"));
        let two = edit(&one, &id(2), "other", Some("ssh-ed25519 BBBB x"));
        std::fs::write(&path, &two).unwrap();
        blank(&path, &two, &id(1)).unwrap();
        let left = std::fs::read_to_string(&path).unwrap();
        assert_eq!(left.len(), two.len());
        let lines: Vec<&str> = left.lines().filter(|line| !line.is_empty()).collect();
        let wanted = edit(&two, &id(1), "", None);
        assert_eq!(lines, wanted.lines().collect::<Vec<_>>());
        // The next change leaves no empty lines.
        assert_eq!(edit(&left, &id(1), "", None), wanted);
    }

    #[test]
    fn a_name_that_was_freed_points_at_its_new_machine_only() {
        let one = edit("", &id(1), "box", Some("ssh-ed25519 AAAA x"));
        let two = edit(&one, &id(2), "box", Some("ssh-ed25519 BBBB x"));
        assert_eq!(two.lines().filter(|l| l.starts_with("box.vm ")).count(), 1);
        assert!(two.contains("box.vm ssh-ed25519 BBBB"));
    }

    proptest! {
        #[test]
        fn other_lines_stay_as_they_are(
            lines in prop::collection::vec("[a-z#]{1,8} [A-Z]{1,6} [a-z]{1,6}", 0..6),
            names in prop::collection::vec("[a-z]{9,12}", 1..4),
        ) {
            let foreign: String = lines.iter().map(|l| format!("{l}\n")).collect();
            let mut text = foreign.clone();
            for (i, name) in names.iter().enumerate() {
                text = edit(&text, &id(i as u8), name, Some("ssh-ed25519 KEY c"));
            }
            for i in 0..names.len() {
                text = edit(&text, &id(i as u8), "", None);
            }
            prop_assert_eq!(text, foreign);
        }
    }

    #[tokio::test]
    async fn keys_are_made_once_and_stay() {
        if !["/usr/bin/ssh-keygen", "/bin/ssh-keygen"]
            .iter()
            .any(|p| Path::new(p).exists())
        {
            eprintln!("skipped: no ssh-keygen");
            return;
        }
        use std::os::unix::fs::MetadataExt;
        let tmp = tempfile::tempdir().unwrap();
        let ssh = Ssh::new(tmp.path().to_owned());
        let dir = tmp.path().join("m");
        std::fs::create_dir(&dir).unwrap();
        let first = ssh.keys(&dir, &id(1), "box").await.unwrap();
        let second = Ssh::new(tmp.path().to_owned()).keys(&dir, &id(1), "box").await.unwrap();
        assert_eq!(first.authorized_keys, second.authorized_keys);
        assert_eq!(first.host_key, second.host_key);
        assert_eq!(
            std::fs::metadata(dir.join("ssh_host_ed25519_key")).unwrap().mode() & 0o777,
            0o600
        );
        assert_eq!(
            std::fs::read_to_string(ssh.known_hosts_path()).unwrap().lines().count(),
            2
        );
    }
}

//! The user's `~/.ssh/config`: one marked block in it includes a file of ours. Everything else in it stays as it is.

use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};
use crate::ssh::{Files, config_word, shell_word};

const BEGIN: &str = "# >>> banger >>> managed by `banger ssh-config`, removed by `banger ssh-config --uninstall`";
const BEGIN_MARK: &str = "# >>> banger >>>";
const END: &str = "# <<< banger <<<";

/// A block that begins and does not end: somebody edited it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Unfinished;

/// The line that includes our file.
pub(crate) fn include_line(ours: &Path) -> Result<String> {
    // Include expands patterns and `~`, not percent signs.
    Ok(format!("Include {}", config_word(ours)?.replace("%%", "%")))
}

/// The text with our block: where one is already, else in front, since ssh takes the first value it finds, and an Include
/// behind a Host line would only hold for that host.
pub(crate) fn install(text: &str, include: &str) -> Result<String, Unfinished> {
    let block = format!("{BEGIN}\n{include}\n{END}\n");
    Ok(match find(text)? {
        Some((start, end)) => format!("{}{block}{}", &text[..start], &text[end..]),
        None => block + text,
    })
}

/// The text without our block.
pub(crate) fn uninstall(text: &str) -> Result<String, Unfinished> {
    Ok(match find(text)? {
        Some((start, end)) => format!("{}{}", &text[..start], &text[end..]),
        None => text.to_owned(),
    })
}

/// Begin and end of the block, the line feed of its last line included.
fn find(text: &str) -> Result<Option<(usize, usize)>, Unfinished> {
    let mut at = 0;
    let mut start = None;
    for line in text.split_inclusive('\n') {
        let bare = line.trim();
        match start {
            None if bare.starts_with(BEGIN_MARK) => start = Some(at),
            Some(start) if bare == END => return Ok(Some((start, at + line.len()))),
            _ => {}
        }
        at += line.len();
    }
    if start.is_some() { Err(Unfinished) } else { Ok(None) }
}

/// The content of our own file.
pub(crate) fn own_file(program: &Path, files: &Files) -> Result<String> {
    Ok(format!(
        "# Written by `banger ssh-config --install`; changes are lost.\n\
         Host *.vm\n\
         \x20   User root\n\
         \x20   ProxyCommand {} internal ssh-proxy '%n'\n\
         \x20   IdentityFile {}\n\
         \x20   IdentitiesOnly yes\n\
         \x20   UserKnownHostsFile {}\n\
         \x20   GlobalKnownHostsFile /dev/null\n\
         \x20   StrictHostKeyChecking yes\n\
         \x20   UpdateHostKeys no\n\
         \x20   CheckHostIP no\n",
        shell_word(program)?,
        config_word(&files.identity)?,
        config_word(&files.known_hosts)?,
    ))
}

/// Changes a file of the user by a function over its text. Goes through a link to the file behind it, keeps the permissions,
/// and replaces the content in one step. Returns whether anything changed.
pub(crate) fn edit(path: &Path, change: impl FnOnce(&str) -> Result<String, Unfinished>) -> Result<bool> {
    let target = match std::fs::symlink_metadata(path) {
        Ok(_) => path.canonicalize().map_err(|e| Error::io("follow", path, e))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => path.to_owned(),
        Err(error) => return Err(Error::io("look at", path, error)),
    };
    let (before, mode) = match std::fs::read_to_string(&target) {
        Ok(text) => {
            let found = std::fs::metadata(&target).map_err(|e| Error::io("look at", &target, e))?;
            (Some(text), found.permissions().mode() & 0o7777)
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => (None, 0o600),
        Err(error) => return Err(Error::io("read", &target, error)),
    };
    let after = change(before.as_deref().unwrap_or_default()).map_err(|Unfinished| {
        Error::new(
            Kind::Failed,
            format!("{} has a banger block without its last line", path.display()),
        )
        .hint(format!("remove the block that begins with `{BEGIN_MARK}` by hand"))
    })?;
    if before.as_deref().unwrap_or_default() == after {
        return Ok(false);
    }
    replace(&target, &after, mode)?;
    Ok(true)
}

/// Writes a file in one step.
pub(crate) fn replace(path: &Path, text: &str, mode: u32) -> Result<()> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    if !dir.is_dir() {
        let mut builder = std::fs::DirBuilder::new();
        builder
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|e| Error::io("make", dir, e))?;
    }
    let temporary = temporary_beside(path);
    let written = (|| {
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.set_permissions(std::fs::Permissions::from_mode(mode))?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    })();
    written.map_err(|error| {
        let _ = std::fs::remove_file(&temporary);
        Error::io("write", path, error)
    })
}

fn temporary_beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".banger-{}", std::process::id()));
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use proptest::prelude::*;

    use super::*;

    const INCLUDE: &str = "Include \"/c/banger/ssh_config\"";

    fn text() -> impl Strategy<Value = String> {
        let line = prop_oneof![
            Just("Host *".to_owned()),
            Just("# <<< banger <<<".to_owned()),
            Just(String::new()),
            "[ -~]{0,20}",
            "\\PC{0,12}\r?",
        ]
        .prop_filter("not our first line", |l| !l.trim().starts_with(BEGIN_MARK));
        (prop::collection::vec(line, 0..8), any::<bool>()).prop_map(|(lines, end)| {
            let mut text = lines.join("\n");
            if end && !text.is_empty() {
                text.push('\n');
            }
            text
        })
    }

    proptest! {
        #[test]
        fn uninstalling_gives_back_what_was(text in text()) {
            let installed = install(&text, INCLUDE).unwrap();
            prop_assert_eq!(uninstall(&installed).unwrap(), text);
        }

        #[test]
        fn installing_again_changes_nothing(text in text()) {
            let once = install(&text, INCLUDE).unwrap();
            prop_assert_eq!(install(&once, INCLUDE).unwrap(), once);
        }
    }

    #[test]
    fn a_block_is_replaced_where_it_stands() {
        let text = format!("Host a\n{BEGIN_MARK} old\nInclude old\n{END}\nHost b\n");
        let new = install(&text, INCLUDE).unwrap();
        assert_eq!(new, format!("Host a\n{BEGIN}\n{INCLUDE}\n{END}\nHost b\n"));
        assert_eq!(uninstall(&new).unwrap(), "Host a\nHost b\n");
        assert_eq!(uninstall(&format!("{BEGIN}\nInclude x\n")), Err(Unfinished));
    }

    #[test]
    fn links_and_permissions_stay() {
        let dir = tempfile::tempdir().unwrap();
        let (real, link) = (dir.path().join("real"), dir.path().join("config"));
        std::fs::write(&real, "Host a\n").unwrap();
        std::fs::set_permissions(&real, std::fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink("real", &link).unwrap();
        assert!(edit(&link, |t| install(t, INCLUDE)).unwrap());
        assert!(
            !edit(&link, |t| install(t, INCLUDE)).unwrap(),
            "the second time is no change"
        );
        assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(std::fs::metadata(&real).unwrap().mode() & 0o7777, 0o640);
        assert!(std::fs::read_to_string(&real).unwrap().ends_with("Host a\n"));
        edit(&link, uninstall).unwrap();
        assert_eq!(std::fs::read_to_string(&real).unwrap(), "Host a\n");
        assert_eq!(
            std::fs::read_dir(dir.path()).unwrap().count(),
            2,
            "nothing is left beside it"
        );
    }

    #[test]
    fn a_missing_file_is_made_private_and_only_when_needed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".ssh/config");
        assert!(!edit(&path, uninstall).unwrap());
        assert!(!path.exists());
        assert!(edit(&path, |t| install(t, INCLUDE)).unwrap());
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(
            std::fs::metadata(dir.path().join(".ssh")).unwrap().mode() & 0o7777,
            0o700
        );
    }

    #[test]
    fn the_own_file_is_for_machines_alone() {
        let files = Files {
            identity: "/s/id".into(),
            known_hosts: "/s/k h".into(),
        };
        let text = own_file(Path::new("/opt/b in/banger"), &files).unwrap();
        assert!(text.contains("Host *.vm\n"));
        assert!(text.contains("ProxyCommand '/opt/b in/banger' internal ssh-proxy '%n'\n"));
        assert!(text.contains("UserKnownHostsFile \"/s/k h\"\n"));
        assert!(text.contains("StrictHostKeyChecking yes\n"));
    }
}

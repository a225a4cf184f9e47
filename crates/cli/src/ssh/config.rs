//! The user's `~/.ssh/config`: one marked block in it includes a file of ours. Everything else in it stays as it is.

use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};
use crate::ssh::forwards::remote_forwards;
use crate::ssh::{Files, config_word, match_word, shell_word};

/// A marked block in the user's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Block {
    /// How its first line begins.
    mark: &'static str,
    /// The rest of its first line.
    remark: &'static str,
    /// Its last line.
    end: &'static str,
}

/// Includes our file.
const FIRST: Block = Block {
    mark: "# >>> banger >>>",
    remark: " managed by `banger ssh-config --install`, removed by `banger ssh-config --uninstall`",
    end: "# <<< banger <<<",
};

/// Clears what only adds up: OpenSSH drops names of variables behind the lines that have added them.
const LAST: Block = Block {
    mark: "# >>> banger: last >>>",
    remark: " variables named above do not go to machines; name others below this block",
    end: "# <<< banger: last <<<",
};

/// At the end of the first line when the line feed before it is ours.
const JOINED: &str = " (added a line feed)";

const CLEARS: &str = "Host *.vm\n    SendEnv -*\nMatch all\n";

/// A block that begins and does not end: somebody edited it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Unfinished {
    /// How its first line begins.
    pub(crate) mark: &'static str,
}

/// The line that includes our file.
pub(crate) fn include_line(ours: &Path) -> Result<String> {
    // Include expands patterns and `~`, not percent signs.
    Ok(format!("Include {}", config_word(ours)?.replace("%%", "%")))
}

impl Block {
    fn text(self, content: &str, joined: bool) -> String {
        let Self { mark, remark, end } = self;
        let joined = if joined { JOINED } else { "" };
        format!("{mark}{remark}{joined}\n{content}{end}\n")
    }

    /// Where it is in a text, the line feed of its last line included, and whether the line feed before it is ours.
    fn find(self, text: &str) -> Result<Option<(usize, usize, bool)>, Unfinished> {
        let mut at = 0;
        let mut start = None;
        for line in text.split_inclusive('\n') {
            let bare = line.trim();
            match start {
                None if bare.starts_with(self.mark) => start = Some((at, bare.ends_with(JOINED))),
                Some((start, joined)) if bare == self.end => return Ok(Some((start, at + line.len(), joined))),
                _ => {}
            }
            at += line.len();
        }
        match start {
            Some(_) => Err(Unfinished { mark: self.mark }),
            None => Ok(None),
        }
    }

    /// The text without it.
    fn removed(self, text: &str) -> Result<String, Unfinished> {
        let Some((start, end, joined)) = self.find(text)? else {
            return Ok(text.to_owned());
        };
        let (before, after) = (&text[..start], &text[end..]);
        let before = if joined && after.is_empty() {
            before.strip_suffix('\n').unwrap_or(before)
        } else {
            before
        };
        Ok(format!("{before}{after}"))
    }
}

/// The text with our blocks, each where one is already. Else one in front, since ssh takes the first value that it finds; and
/// one at the end, for what adds up.
pub(crate) fn install(text: &str, include: &str) -> Result<String, Unfinished> {
    // Lines above may be for one host only, and an Include is of what it stands in.
    let content = format!("Match all\n{include}\n");
    let text = match FIRST.find(text)? {
        Some((start, end, _)) => format!("{}{}{}", &text[..start], FIRST.text(&content, false), &text[end..]),
        None => FIRST.text(&content, false) + text,
    };
    Ok(match LAST.find(&text)? {
        Some((start, end, joined)) => format!("{}{}{}", &text[..start], LAST.text(CLEARS, joined), &text[end..]),
        None => {
            let joined = !text.ends_with('\n');
            let feed = if joined { "\n" } else { "" };
            format!("{text}{feed}{}", LAST.text(CLEARS, joined))
        }
    })
}

/// The text without our blocks.
pub(crate) fn uninstall(text: &str) -> Result<String, Unfinished> {
    FIRST.removed(&LAST.removed(text)?)
}

/// What is pinned for machines, whatever `Host *` says. A machine is hostile: it gets no agent, no display, no variable, and no
/// other way to authenticate to pretend to. A `RemoteForward` cannot be pinned: see [`super::forwards`].
pub(crate) const PINNED: &[(&str, &str)] = &[
    ("ForwardAgent", "no"),
    ("ForwardX11", "no"),
    ("ForwardX11Trusted", "no"),
    ("Tunnel", "no"),
    ("SetEnv", "LANG=C.UTF-8"),
    ("PermitLocalCommand", "no"),
    ("RemoteCommand", "none"),
    ("ControlMaster", "no"),
    ("ControlPath", "none"),
    ("AddKeysToAgent", "no"),
    ("PKCS11Provider", "none"),
    ("PreferredAuthentications", "publickey"),
    ("VerifyHostKeyDNS", "no"),
];

/// The content of our own file.
pub(crate) fn own_file(program: &Path, files: &Files) -> Result<String> {
    let pinned: String = PINNED
        .iter()
        .map(|(key, value)| format!("    {key} {value}\n"))
        .collect();
    Ok(format!(
        "# Written by `banger ssh-config --install`; changes are lost.\n\
         # No machine has such a name, and ssh before 9.6 would hand it to a shell.\n\
         Host \"*'*.vm\"\n\
         \x20   ProxyCommand false\n\
         Host *.vm\n\
         \x20   User root\n\
         \x20   ProxyCommand {} internal ssh-proxy '%n'\n\
         \x20   IdentityFile {}\n\
         \x20   IdentitiesOnly yes\n\
         \x20   UserKnownHostsFile {}\n\
         \x20   GlobalKnownHostsFile /dev/null\n\
         \x20   StrictHostKeyChecking yes\n\
         \x20   UpdateHostKeys no\n\
         \x20   CheckHostIP no\n\
         {pinned}\
         # ssh cannot drop a RemoteForward of `Host *` alone. Cleared unless the program says that there is none.\n\
         Match originalhost *.vm !exec \"exec {} internal ssh-forwards\"\n\
         \x20   ClearAllForwardings yes\n",
        shell_word(program)?,
        config_word(&files.identity)?,
        config_word(&files.known_hosts)?,
        match_word(program)?,
    ))
}

/// Those of the pinned options that a configuration has otherwise, as `ssh -G` shows it, and the variables that it sends: something
/// before or behind our blocks wins.
pub(crate) fn loosened(shown: &str) -> Vec<String> {
    let values = |wanted: &str| {
        let wanted = wanted.to_ascii_lowercase();
        shown.lines().filter_map(move |line| {
            let (key, value) = line.split_once(' ')?;
            (key == wanted).then_some(value)
        })
    };
    let off = |value: &str| matches!(value, "no" | "false" | "none");
    let mut loose: Vec<String> = PINNED
        .iter()
        // What is none is not shown.
        .filter(|(key, pinned)| values(key).any(|value| value != *pinned && !(off(pinned) && off(value))))
        .map(|(key, _)| (*key).to_owned())
        .collect();
    let harmless = |name: &str| name == "LANG" || name.starts_with("LC_");
    loose.extend(
        values("SendEnv")
            .filter(|name| !harmless(name))
            .map(|name| format!("SendEnv {name}")),
    );
    if remote_forwards(shown) {
        loose.push("RemoteForward".to_owned());
    }
    loose
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
    let after = change(before.as_deref().unwrap_or_default()).map_err(|Unfinished { mark }| {
        Error::new(
            Kind::Failed,
            format!("{} has a banger block without its last line", path.display()),
        )
        .hint(format!("remove the block that begins with `{mark}` by hand"))
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
        .prop_filter("not our first line", |l| !l.trim().starts_with("# >>>"));
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
    fn blocks_are_replaced_where_they_stand() {
        let text = "Host a\n# >>> banger >>> old\nInclude old\n# <<< banger <<<\nHost b\n";
        let new = install(text, INCLUDE).unwrap();
        let first = FIRST.text(&format!("Match all\n{INCLUDE}\n"), false);
        assert_eq!(new, format!("Host a\n{first}Host b\n{}", LAST.text(CLEARS, false)));
        assert_eq!(uninstall(&new).unwrap(), "Host a\nHost b\n");
        let behind = format!("{new}Host c\n");
        assert_eq!(
            install(&behind, INCLUDE).unwrap(),
            behind,
            "what is below the last block stays below"
        );
        for block in [FIRST, LAST] {
            let begun = format!("{}\nInclude x\n", block.mark);
            assert_eq!(uninstall(&begun), Err(Unfinished { mark: block.mark }));
            assert_eq!(install(&begun, INCLUDE), Err(Unfinished { mark: block.mark }));
        }
        let open = install("Host a", INCLUDE).unwrap();
        assert_eq!(uninstall(&open).unwrap(), "Host a");
        assert_eq!(uninstall(&format!("{open}Host b\n")).unwrap(), "Host a\nHost b\n");
    }

    #[test]
    fn what_wins_over_a_pin_is_told() {
        let shown = "forwardagent no\nforwardx11 yes\ntunnel false\nremoteforward 9000 [socks]:0\nsetenv LANG=C.UTF-8\n\
                     controlmaster auto\nsendenv LANG\nsendenv LC_*\nsendenv SECRET_*\npreferredauthentications publickey\n";
        assert_eq!(
            loosened(shown),
            ["ForwardX11", "ControlMaster", "SendEnv SECRET_*", "RemoteForward"]
        );
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
        assert!(std::fs::read_to_string(&real).unwrap().contains("\nHost a\n"));
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
        assert!(text.contains("!exec \"exec '/opt/b in/banger' internal ssh-forwards\"\n"));
        assert!(
            text.find("Host \"*'*.vm\"\n    ProxyCommand false\n") < text.find("Host *.vm\n"),
            "a quote in a name gets no shell"
        );
        assert!(text.contains("UserKnownHostsFile \"/s/k h\"\n"));
        assert!(text.contains("StrictHostKeyChecking yes\n"));
    }
}

//! OpenSSH to machines: through the daemon and the guest's agent, so that no guest address is needed, and with a key and
//! known hosts of banger's own, both kept by the daemon below its state directory.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::paths::Places;

pub(crate) mod config;
pub(crate) mod forwards;
pub(crate) mod proxy;

/// The files that ssh needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Files {
    /// Private key of this user for all machines.
    pub(crate) identity: PathBuf,
    /// Host keys of the machines, under `<id>.banger` and `<name>.vm`.
    pub(crate) known_hosts: PathBuf,
}

impl Files {
    /// Where they are.
    pub(crate) fn of(places: &Places) -> Result<Self> {
        let dir = places.state_dir()?.join("ssh");
        Ok(Self {
            identity: dir.join("id_ed25519"),
            known_hosts: dir.join("known_hosts"),
        })
    }
}

/// The path of this program.
pub(crate) fn own_program() -> Result<PathBuf> {
    std::env::current_exe().map_err(|e| Error::failed(format!("cannot tell where this program is: {e}")))
}

/// A word for the shell that ssh runs a proxy command with; percent signs are ssh's own.
pub(crate) fn shell_word(path: &Path) -> Result<String> {
    let text = plain(path)?;
    Ok(format!("'{}'", text.replace('\'', r"'\''").replace('%', "%%")))
}

/// A word for the shell of a `Match exec`, within double quotes. OpenSSH 9.9 reads quotes and backslashes there otherwise than
/// versions before it, so a path has none of them.
pub(crate) fn match_word(path: &Path) -> Result<String> {
    if plain(path)?.contains(['\'', '"', '\\']) {
        return Err(unfit(path));
    }
    shell_word(path)
}

/// A value of ssh's configuration in quotes; percent signs are doubled where ssh expands them.
pub(crate) fn config_word(path: &Path) -> Result<String> {
    let text = plain(path)?;
    if text.contains(['"', '\\']) {
        return Err(unfit(path));
    }
    Ok(format!("\"{}\"", text.replace('%', "%%")))
}

fn plain(path: &Path) -> Result<&str> {
    path.to_str()
        .filter(|p| !p.contains(char::is_control))
        .ok_or_else(|| unfit(path))
}

fn unfit(path: &Path) -> Error {
    Error::failed(format!("ssh's configuration cannot hold the path {}", path.display()))
        .hint("a path with quotes, backslashes or control characters cannot be used here: move what it names")
}

/// Options for the connection to one machine, as `-o` takes them. Nothing of the user's own configuration takes part.
pub(crate) fn options(program: &Path, files: &Files, id: &str) -> Result<Vec<String>> {
    Ok(vec![
        format!("ProxyCommand={} internal ssh-proxy {id}", shell_word(program)?),
        format!("HostKeyAlias={id}.banger"),
        format!("UserKnownHostsFile={}", config_word(&files.known_hosts)?),
        "GlobalKnownHostsFile=/dev/null".to_owned(),
        "StrictHostKeyChecking=yes".to_owned(),
        "UpdateHostKeys=no".to_owned(),
        "CheckHostIP=no".to_owned(),
        format!("IdentityFile={}", config_word(&files.identity)?),
        "IdentitiesOnly=yes".to_owned(),
        "User=root".to_owned(),
        // What is asked for on the command line wins over these.
        "ForwardAgent=no".to_owned(),
        "ForwardX11=no".to_owned(),
        "PreferredAuthentications=publickey".to_owned(),
        "SetEnv=LANG=C.UTF-8".to_owned(),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_for_their_reader() {
        assert_eq!(shell_word(Path::new("/a b/it's/50%")).unwrap(), r"'/a b/it'\''s/50%%'");
        assert_eq!(config_word(Path::new("/a b/50%")).unwrap(), "\"/a b/50%%\"");
        assert!(config_word(Path::new("/a\"b")).is_err());
        assert!(shell_word(Path::new("/a\nb")).is_err());
        assert_eq!(match_word(Path::new("/a b/50%")).unwrap(), "'/a b/50%%'");
        for path in ["/a'b", "/a\"b", "/a\\b"] {
            assert!(match_word(Path::new(path)).is_err(), "{path}");
        }
    }
}

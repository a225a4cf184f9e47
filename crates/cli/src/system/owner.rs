//! Who the owner is: a user of this host by name.

use std::path::Path;
use std::process::{Command, Stdio};

use banger_system::install::Owner;

use crate::error::{Error, Kind, Result};

/// Looks a user up: in the file of users below `root`, then, on the host itself, wherever else it keeps them.
pub(crate) fn find(root: &Path, name: &str) -> Result<Owner> {
    let path = root.join("etc/passwd");
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io("read", &path, e))?;
    let found = parse(&text, name).or_else(|| (root == Path::new("/")).then(|| elsewhere(name)).flatten());
    let owner = found.ok_or_else(|| {
        Error::new(
            Kind::NotFound,
            format!("there is no user `{}` on this host", name.escape_default()),
        )
        .hint("name a user of this host: --owner USER")
    })?;
    if owner.uid == 0 {
        return Err(
            Error::new(Kind::Invalid, "root cannot be the owner: machines would run as root")
                .hint("name the user whose machines they are: --owner USER"),
        );
    }
    Ok(owner)
}

/// The user of this name in the format of `passwd`.
fn parse(text: &str, name: &str) -> Option<Owner> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let user = fields.next()?;
        if user != name || name.is_empty() {
            return None;
        }
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1)?;
        home.starts_with('/').then(|| Owner {
            user: user.to_owned(),
            uid,
            gid,
            home: home.into(),
        })
    })
}

/// Users that come from a directory service are known to the C library only, which a static program has not.
fn elsewhere(name: &str) -> Option<Owner> {
    if name.starts_with('-') {
        return None;
    }
    let asked = Command::new("/usr/bin/getent")
        .args(["passwd", name])
        .env_clear()
        .stdin(Stdio::null())
        .output()
        .ok()?;
    parse(&String::from_utf8_lossy(&asked.stdout), name)
}

/// Whether there is a group of this name in the format of `group`.
pub(crate) fn has_group(text: &str, name: &str) -> bool {
    text.lines().any(|line| line.split(':').next() == Some(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    const USERS: &str = "root:x:0:0:root:/root:/bin/bash\nbroken:x:nine:9::/srv/b:/bin/sh\n\
                         dev:x:1000:1001:Dev,,,:/home/dev:/bin/bash\nnowhere:x:7:7:::/bin/sh\n";

    #[test]
    fn users_are_read_by_name() {
        let dev = parse(USERS, "dev").unwrap();
        assert_eq!((dev.uid, dev.gid, dev.home.to_str()), (1000, 1001, Some("/home/dev")));
        for none in ["", "de", "1000", "broken", "nowhere", "dev:x"] {
            assert_eq!(parse(USERS, none), None, "{none}");
        }
        assert!(has_group("kvm:x:104:\nusers:x:100:dev\n", "kvm") && !has_group("kvmx:x:1:\n", "kvm"));
    }

    #[test]
    fn root_is_no_owner() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::fs::write(dir.path().join("etc/passwd"), USERS).unwrap();
        assert_eq!(find(dir.path(), "dev").unwrap().uid, 1000);
        assert_eq!(find(dir.path(), "root").unwrap_err().kind, Kind::Invalid);
        assert_eq!(find(dir.path(), "nobody\n").unwrap_err().kind, Kind::NotFound);
    }
}

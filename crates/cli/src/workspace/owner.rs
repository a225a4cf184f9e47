//! Who a workspace belongs to in the machine.

use std::io::Read;

use http_body_util::{BodyExt, Limited};

use crate::client::{Client, encode, machine_path};
use crate::error::{Error, Kind, Result};

/// Largest list of users that is read, in bytes: it is the guest's.
const MAX_USERS: usize = 4 * 1024 * 1024;

/// A user of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Owner {
    /// User number.
    pub(crate) uid: u32,
    /// Number of the main group.
    pub(crate) gid: u32,
    /// Home directory, without a slash at its end.
    pub(crate) home: String,
}

/// Whether files of this user are root's, as they are anyway.
pub(crate) fn is_root(user: &str) -> bool {
    user == "root" || user.parse() == Ok(0u32)
}

/// Looks a user of a machine up, by name or number.
pub(crate) async fn find(client: &Client, machine: &str, user: &str) -> Result<Owner> {
    let path = format!("{}/files?path={}", machine_path(machine), encode("/etc/passwd"));
    let body = client.stream(&path).await?;
    let read = Limited::new(body, MAX_USERS).collect().await;
    let bytes = read.map_err(|e| Error::failed(format!("cannot read the users of the machine: {e}")))?;
    let mut text = String::new();
    if let Some(Ok(entry)) = tar::Archive::new(&*bytes.to_bytes())
        .entries()
        .ok()
        .and_then(|mut entries| entries.next())
    {
        let mut raw = Vec::new();
        let _ = entry.take(MAX_USERS as u64).read_to_end(&mut raw);
        text = String::from_utf8_lossy(&raw).into_owned();
    }
    parse(&text, user).ok_or_else(|| {
        Error::new(Kind::NotFound, format!("--user: no user `{user}` in the machine"))
            .hint("leave --user away, or name one of the image's")
    })
}

/// Finds a user in `/etc/passwd`. A name wins over a number; a number needs no line.
fn parse(passwd: &str, user: &str) -> Option<Owner> {
    let number = user.parse::<u32>().ok().filter(|&n| n != u32::MAX);
    let line = |line: &str| {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, uid, gid, ..] = fields.as_slice() else {
            return None;
        };
        let home = fields
            .get(5)
            .copied()
            .filter(|home| home.starts_with('/'))
            .unwrap_or("/");
        let owner = Owner {
            uid: uid.parse().ok()?,
            gid: gid.parse().ok()?,
            home: home.trim_end_matches('/').to_owned(),
        };
        Some(((*name).to_owned(), owner))
    };
    let known: Vec<(String, Owner)> = passwd.lines().filter_map(line).collect();
    known
        .iter()
        .find(|(name, _)| name == user)
        .or_else(|| known.iter().find(|(_, owner)| Some(owner.uid) == number))
        .map(|(_, owner)| owner.clone())
        .or_else(|| {
            number.map(|id| Owner {
                uid: id,
                gid: id,
                home: String::new(),
            })
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_have_numbers_and_homes() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\nbroken:x:no:1\ndev:x:1000:1001:A Dev,,,:/home/dev/:/bin/zsh\n\
                      42:x:7:7::relative:\n";
        let owner = |uid, gid, home: &str| {
            Some(Owner {
                uid,
                gid,
                home: home.to_owned(),
            })
        };
        assert_eq!(parse(passwd, "dev"), owner(1000, 1001, "/home/dev"));
        assert_eq!(parse(passwd, "1000"), owner(1000, 1001, "/home/dev"));
        assert_eq!(parse(passwd, "42"), owner(7, 7, ""), "a name of digits wins");
        assert_eq!(parse(passwd, "4242"), owner(4242, 4242, ""));
        for none in ["nobody", "broken", "", "4294967295"] {
            assert_eq!(parse(passwd, none), None, "{none}");
        }
        assert!(is_root("root") && is_root("0") && !is_root("dev"));
    }
}

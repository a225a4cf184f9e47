//! Who a session runs as: `/etc/passwd` and `/etc/group`, read by our own parser. The agent is static and has no NSS; an
//! image's own users are in these files.

use std::path::Path;

use banger_proto::error::{ApiError, ErrorCode};

/// Files larger than this are not read: they are the image's.
const MAX_FILE: u64 = 4 * 1024 * 1024;

/// A user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Name; the number where there is none.
    pub name: String,
    /// User number.
    pub uid: u32,
    /// Main group.
    pub gid: u32,
    /// All groups, the main one included.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: String,
    /// Login shell, empty where none is named.
    pub shell: String,
}

/// Finds a user by name or number in the texts of the two files.
///
/// `root` is always there, and a number needs no entry: containers' images often have none.
pub fn find(passwd: &str, group: &str, wanted: &str) -> Option<User> {
    let number = wanted.parse::<u32>().ok();
    let mut by_number = None;
    let mut by_name = None;
    for line in passwd.lines() {
        let mut fields = line.split(':');
        let (Some(name), Some(_), Some(uid), Some(gid)) = (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let (Ok(uid), Ok(gid)) = (uid.parse(), gid.parse()) else {
            continue;
        };
        let entry = || User {
            name: name.to_owned(),
            uid,
            gid,
            groups: Vec::new(),
            home: line.split(':').nth(5).unwrap_or_default().to_owned(),
            shell: line.split(':').nth(6).unwrap_or_default().trim_end().to_owned(),
        };
        if name == wanted && by_name.is_none() {
            by_name = Some(entry());
        } else if number == Some(uid) && by_number.is_none() {
            by_number = Some(entry());
        }
    }
    let bare = |name: &str, id: u32, home: &str| User {
        name: name.to_owned(),
        uid: id,
        gid: id,
        groups: Vec::new(),
        home: home.to_owned(),
        shell: String::new(),
    };
    let mut user = by_name.or(by_number).or_else(|| match (wanted, number) {
        ("root", _) | (_, Some(0)) => Some(bare("root", 0, "/root")),
        (_, Some(id)) if id != u32::MAX => Some(bare(wanted, id, "/")),
        _ => None,
    })?;
    if user.home.is_empty() {
        user.home = "/".to_owned();
    }
    user.groups = groups(group, &user.name, user.gid);
    Some(user)
}

fn groups(group: &str, name: &str, main: u32) -> Vec<u32> {
    let mut out = vec![main];
    for line in group.lines() {
        let mut fields = line.split(':');
        let (Some(gid), Some(members)) = (fields.nth(2), fields.next()) else {
            continue;
        };
        let Ok(gid) = gid.parse::<u32>() else { continue };
        // 65536 is the kernel's limit of groups per process.
        if members.trim_end().split(',').any(|m| m == name) && !out.contains(&gid) && out.len() < 1024 {
            out.push(gid);
        }
    }
    out
}

/// Finds a user in the files below `etc`.
pub fn look_up(etc: &Path, wanted: &str) -> Result<User, ApiError> {
    find(&read(&etc.join("passwd")), &read(&etc.join("group")), wanted)
        .ok_or_else(|| ApiError::new(ErrorCode::NotFound, format!("no user `{wanted}` in the guest")))
}

fn read(path: &Path) -> String {
    use std::io::Read;
    let mut text = Vec::new();
    if let Ok(file) = std::fs::File::open(path) {
        let _ = file.take(MAX_FILE).read_to_end(&mut text);
    }
    String::from_utf8_lossy(&text).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\n# comment\nbroken:x:no:1\n\
                          user:x:1000:1000:A User,,,:/home/user:/bin/zsh\n42:x:7:7::/x:\nnohome:x:9:9::\n";
    const GROUP: &str = "root:x:0:\nsudo:x:27:user,other\nuser:x:1000:user\nbad\ndocker:x:998:other,user\n";

    #[test]
    fn by_name_with_groups() {
        let user = find(PASSWD, GROUP, "user").unwrap();
        assert_eq!(
            (user.uid, user.gid, user.groups.as_slice()),
            (1000, 1000, &[1000, 27, 998][..])
        );
        assert_eq!((user.home.as_str(), user.shell.as_str()), ("/home/user", "/bin/zsh"));
    }

    #[test]
    fn a_name_of_digits_wins_over_the_number() {
        assert_eq!(find(PASSWD, GROUP, "42").unwrap().uid, 7);
        assert_eq!(find(PASSWD, GROUP, "1000").unwrap().name, "user");
    }

    #[test]
    fn what_is_not_there() {
        assert_eq!(find(PASSWD, GROUP, "nobody"), None);
        assert_eq!(find("", "", "root").unwrap().home, "/root");
        assert_eq!(find("", "", "0").unwrap().name, "root");
        assert_eq!(find("", "", "1234").unwrap().gid, 1234);
        assert_eq!(find("", "", "4294967295"), None, "the kernel's `no user`");
        assert_eq!(find(PASSWD, GROUP, "nohome").unwrap().home, "/");
        assert_eq!(find(PASSWD, GROUP, ""), None);
    }
}

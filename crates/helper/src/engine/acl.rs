//! Access control lists of directories: one more user may pass through.
//!
//! A group would not do: the owner's primary group may be that of all users of the host, and no other group is certain to have the
//! owner alone in it.

use std::os::fd::AsFd;

use rustix::fs::XattrFlags;

/// Name of the attribute that the kernel keeps the list in.
const NAME: &str = "system.posix_acl_access";
/// Version of its format (`linux/posix_acl_xattr.h`).
const VERSION: u32 = 2;
/// In an entry that names no user or group.
const UNDEFINED: u32 = u32::MAX;

/// Kinds of entries, in the order in which the kernel wants them.
#[derive(Debug, Clone, Copy)]
enum Tag {
    /// Whom the directory belongs to.
    Owner = 0x01,
    /// A named user.
    User = 0x02,
    /// The directory's group.
    Group = 0x04,
    /// The most that named users and groups get.
    Mask = 0x10,
    /// All others.
    Other = 0x20,
}

/// The list: its owner everything, one more user to pass through, others nothing.
fn pass_through(uid: u32) -> Vec<u8> {
    let entries = [
        (Tag::Owner, 7u16, UNDEFINED),
        (Tag::User, 1, uid),
        (Tag::Group, 0, UNDEFINED),
        (Tag::Mask, 1, UNDEFINED),
        (Tag::Other, 0, UNDEFINED),
    ];
    let mut bytes = VERSION.to_le_bytes().to_vec();
    for (tag, rights, id) in entries {
        bytes.extend((tag as u16).to_le_bytes());
        bytes.extend(rights.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

/// Closes a directory to everybody but its owner, and a user who may pass through: reach what is in it by name, but not list or change it.
pub(super) fn admit(directory: impl AsFd, uid: u32) -> rustix::io::Result<()> {
    rustix::fs::fsetxattr(directory, NAME, &pass_through(uid), XattrFlags::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_as_the_kernel_reads_it() {
        let bytes = pass_through(1000);
        assert_eq!(bytes.len(), 4 + 5 * 8);
        assert_eq!(bytes[..12], [2, 0, 0, 0, 1, 0, 7, 0, 255, 255, 255, 255]);
        assert_eq!(bytes[12..20], [2, 0, 1, 0, 0xe8, 3, 0, 0]);
    }
}

//! What listens for TCP in the guest, and which programs that are.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use banger_proto::agent::{MAX_PORTS, Port};
use banger_proto::error::{ApiError, ErrorCode};

/// Most that is read of the kernel's table of sockets.
const MAX_TABLE: u64 = 8 * 1024 * 1024;

/// Most descriptors that are looked at to find out whose a socket is.
const MAX_LOOKS: usize = 100_000;

/// A socket's state, `TCP_LISTEN`.
const LISTEN: &str = "0A";

/// What listens in the guest, by port.
pub(crate) async fn list() -> Result<Vec<Port>, ApiError> {
    let looked = tokio::task::spawn_blocking(|| look(Path::new("/proc"))).await;
    looked.map_err(|e| ApiError::new(ErrorCode::Internal, format!("the ports can't be read: {e}")))
}

fn look(proc: &Path) -> Vec<Port> {
    let mut found = BTreeMap::new();
    for table in ["net/tcp", "net/tcp6"] {
        let mut text = String::new();
        // A kernel without IPv6 has no table for it.
        let read = File::open(proc.join(table)).and_then(|file| file.take(MAX_TABLE).read_to_string(&mut text));
        if read.is_ok() {
            found.extend(
                text.lines()
                    .skip(1)
                    .filter_map(listener)
                    .map(|l| ((l.port, l.address), l.inode)),
            );
        }
    }
    let wanted: BTreeSet<u64> = found.values().copied().filter(|inode| *inode != 0).collect();
    let owners = owners(proc, wanted);
    let port = |((port, address), inode)| Port {
        port,
        address,
        process: owners.get(&inode).cloned(),
    };
    found.into_iter().take(MAX_PORTS).map(port).collect()
}

/// A listening socket.
#[derive(Debug, PartialEq, Eq)]
struct Listener {
    address: IpAddr,
    port: u16,
    inode: u64,
}

/// Reads a line of the table: number, local and remote address, state, five more fields, inode.
fn listener(line: &str) -> Option<Listener> {
    let mut words = line.split_ascii_whitespace();
    let local = words.nth(1)?;
    if words.nth(1)? != LISTEN {
        return None;
    }
    let inode = words.nth(5)?.parse().ok()?;
    let (address, port) = local.split_once(':')?;
    Some(Listener {
        address: ip(address)?,
        port: u16::from_str_radix(port, 16).ok()?,
        inode,
    })
}

/// An address as the table has it: words of 32 bits as they lie in memory.
fn ip(hex: &str) -> Option<IpAddr> {
    if !hex.is_ascii() {
        return None;
    }
    let word = |at: usize| u32::from_str_radix(hex.get(at..at + 8)?, 16).ok().map(u32::to_ne_bytes);
    match hex.len() {
        8 => word(0).map(|bytes| Ipv4Addr::from(bytes).into()),
        32 => {
            let mut bytes = [0; 16];
            for (at, place) in bytes.chunks_mut(4).enumerate() {
                place.copy_from_slice(&word(at * 8)?);
            }
            Some(Ipv6Addr::from(bytes).to_canonical())
        }
        _ => None,
    }
}

/// Names of the processes that have these sockets open, by the sockets' inodes.
fn owners(proc: &Path, mut wanted: BTreeSet<u64>) -> BTreeMap<u64, String> {
    let mut owners = BTreeMap::new();
    let mut looks = 0;
    let Ok(processes) = std::fs::read_dir(proc) else {
        return owners;
    };
    for process in processes.flatten() {
        if wanted.is_empty() || looks > MAX_LOOKS {
            break;
        }
        let is_process = process.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit);
        // One that has ended meanwhile has no descriptors.
        let Some(fds) = is_process
            .then(|| std::fs::read_dir(process.path().join("fd")).ok())
            .flatten()
        else {
            continue;
        };
        for fd in fds.flatten() {
            looks += 1;
            if looks > MAX_LOOKS {
                break;
            }
            let Some(inode) = std::fs::read_link(fd.path())
                .ok()
                .and_then(|link| socket(link.to_str()?))
            else {
                continue;
            };
            if wanted.remove(&inode) {
                let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                owners.insert(inode, name.trim_end_matches('\n').to_owned());
            }
        }
    }
    owners
}

/// The inode in `socket:[4242]`.
fn socket(link: &str) -> Option<u64> {
    link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TCP: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4242 1 0000 100 0 0 10 0
   1: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4243 1 0000 100 0 0 10 0
   2: 0F02000A:0016 0202000A:D2F0 01 00000000:00000000 02:000A7D63 00000000     0        0 4244 2 0000 20 4 30 10 -1
";
    const TCP6: &str = "  sl  local_address                         remote_address                        st
   0: 00000000000000000000000000000000:0016 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4245 1
   1: 0000000000000000FFFF00000100007F:0050 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4246 1
   2: 00000000000000000000000001000000:0051 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 0 1
";

    #[test]
    fn what_listens_and_whose_it_is() {
        let tmp = tempfile::tempdir().unwrap();
        let proc = tmp.path();
        std::fs::create_dir_all(proc.join("net")).unwrap();
        std::fs::write(proc.join("net/tcp"), TCP).unwrap();
        let process = |pid: &str, name: &str, links: &[&str]| {
            let fd = proc.join(pid).join("fd");
            std::fs::create_dir_all(&fd).unwrap();
            std::fs::write(proc.join(pid).join("comm"), format!("{name}\n")).unwrap();
            for (number, link) in links.iter().enumerate() {
                std::os::unix::fs::symlink(link, fd.join(number.to_string())).unwrap();
            }
        };
        process("7", "web", &["/dev/null", "socket:[4242]", "socket:[1]"]);
        process("8", "sshd", &["socket:[4243]", "socket:[4245]", "pipe:[4246]"]);
        process("self", "no", &["socket:[4246]"]);
        let listed = |()| -> Vec<_> {
            look(proc)
                .into_iter()
                .map(|p| (p.port, p.address.to_string(), p.process))
                .collect()
        };
        let some = |name: &str| Some(name.to_owned());
        let mut wanted = vec![
            (22, "0.0.0.0".to_owned(), some("sshd")),
            (8080, "127.0.0.1".to_owned(), some("web")),
        ];
        assert_eq!(listed(()), wanted, "without IPv6");
        std::fs::write(proc.join("net/tcp6"), TCP6).unwrap();
        wanted.insert(1, (22, "::".to_owned(), some("sshd")));
        wanted.insert(2, (80, "127.0.0.1".to_owned(), None));
        wanted.insert(3, (81, "::1".to_owned(), None));
        assert_eq!(listed(()), wanted);
    }

    #[tokio::test]
    async fn a_port_of_this_process_is_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let found = list().await.unwrap();
        let own = found.iter().find(|p| p.port == port).unwrap();
        assert_eq!(own.address.to_string(), "127.0.0.1");
        assert!(own.process.is_some());
    }

    proptest! {
        #[test]
        fn any_line_is_no_harm(line in "[0-9A-F: ]{0,160}", other in "\\PC{0,60}") {
            let _ = (listener(&line), listener(&other), ip(&other));
        }
    }
}

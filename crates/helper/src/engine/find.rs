//! Which process is a machine's jailed engine.
//!
//! The pidfile is in a directory that belongs to the engine's own user, so it is a hint and no more. A process counts when the kernel
//! says all of this of it: it is called just `firecracker`; it runs as the user of this machine's jail, and as nobody else; it lives;
//! and its root directory or its control group is this machine's. Another machine's engine on a number that was used before, a process
//! of the owner's that calls itself so, a pidfile with somebody else's number: none of them pass.
//!
//! Root directories of other users' processes cannot be looked at with the helper's capabilities (`/proc/PID/root` takes
//! `CAP_SYS_PTRACE`), but what is mounted there can be read by everybody.

use std::os::fd::OwnedFd;
use std::path::Path;

use banger_system::id::MachineId;
use banger_system::names;
use banger_system::net::{JAIL_UID_BASE, MAX_SLOT};
use rustix::process::{Pid, PidfdFlags};

use super::dir::Dir;
use super::mounts;
use crate::ctx::Ctx;

/// The longest pidfile.
const PIDFILE: usize = 32;

/// Why there is no engine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Missing {
    /// There is no jail.
    #[error("there is no jail")]
    NoJail,
    /// The jail is nobody's yet: the jailer has not come that far.
    #[error("the jail belongs to user {0}, which is no user of jails")]
    NotJailed(u32),
    /// No pidfile.
    #[error("there is no pidfile in the jail")]
    NoPidfile,
    /// The pidfile has no number.
    #[error("the pidfile has no process id")]
    Garbage,
    /// No such process.
    #[error("process {0} is gone")]
    Dead(u32),
    /// Another program.
    #[error("process {0} is `{1}`")]
    OtherProgram(u32, String),
    /// Another user's.
    #[error("process {0} runs as another user")]
    OtherUser(u32),
    /// Another machine's.
    #[error("process {0} is in no jail or control group of this machine")]
    OtherMachine(u32),
}

/// What the kernel says of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Facts {
    /// Its name.
    pub(super) comm: String,
    /// `R`, `S`, …
    pub(super) state: char,
    /// When it started, in ticks.
    pub(super) start_time: u64,
    /// Real, effective, saved and file system user id.
    pub(super) uids: [u32; 4],
    /// Its control groups.
    pub(super) cgroup: String,
    /// What is mounted for it.
    pub(super) mountinfo: String,
}

impl Facts {
    /// Reads them; none if there is no such process.
    pub(super) fn read(proc: &Path, pid: u32) -> Option<Self> {
        let dir = proc.join(pid.to_string());
        let text = |name: &str| {
            let bytes = std::fs::read(dir.join(name)).ok()?;
            Some(String::from_utf8_lossy(&bytes).into_owned())
        };
        let (state, start_time) = parse_stat(&text("stat")?)?;
        Some(Self {
            comm: text("comm")?.trim_end_matches('\n').to_owned(),
            state,
            start_time,
            uids: parse_uids(&text("status")?)?,
            cgroup: text("cgroup").unwrap_or_default(),
            mountinfo: text("mountinfo").unwrap_or_default(),
        })
    }

    fn lives(&self) -> bool {
        !matches!(self.state, 'Z' | 'X' | 'x')
    }

    /// The machine in whose control group it is.
    fn machine_of_cgroup(&self) -> Option<MachineId> {
        self.cgroup.lines().find_map(|line| {
            let path = line.splitn(3, ':').nth(2)?;
            names::of_scope(path).or_else(|| {
                let (parent, name) = path.rsplit_once('/')?;
                let ours = parent.rsplit('/').next() == Some(super::cgroup::PARENT);
                ours.then(|| MachineId::parse(name).ok()).flatten()
            })
        })
    }

    /// The machine in whose jail it is: what is mounted as its root directory.
    fn machine_of_root(&self) -> Option<MachineId> {
        let root = mounts::parse(&self.mountinfo)
            .into_iter()
            .rfind(|mount| mount.at == Path::new("/"))?
            .root;
        let mut parts = root.iter().rev();
        (parts.next()? == "root").then_some(())?;
        let id = MachineId::parse(parts.next()?.to_str()?).ok()?;
        (parts.next()? == names::FIRECRACKER).then_some(id)
    }

    /// Whose engine it is, if it is a jailed engine of banger's at all.
    pub(super) fn machine(&self) -> Option<MachineId> {
        let jailed = self.comm == names::FIRECRACKER && self.lives() && is_jail_user(self.uids[0]);
        if !jailed {
            return None;
        }
        self.machine_of_root().or_else(|| self.machine_of_cgroup())
    }
}

/// State and start time of a `stat`. The name in it may have blanks and brackets.
pub(super) fn parse_stat(text: &str) -> Option<(char, u64)> {
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?.chars().next()?;
    // Field 22 of all; the state is field 3.
    Some((state, fields.nth(18)?.parse().ok()?))
}

fn parse_uids(status: &str) -> Option<[u32; 4]> {
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    let all: Vec<u32> = line.split_whitespace().map_while(|n| n.parse().ok()).collect();
    all.try_into().ok()
}

/// A user of jails.
pub(super) fn is_jail_user(uid: u32) -> bool {
    (JAIL_UID_BASE..=JAIL_UID_BASE + MAX_SLOT).contains(&uid)
}

/// Whether a process is the engine of a machine whose jail belongs to a user.
fn verify(proc: &Path, pid: u32, machine: &MachineId, uid: u32) -> Result<Facts, Missing> {
    let facts = Facts::read(proc, pid).ok_or(Missing::Dead(pid))?;
    if !facts.lives() {
        return Err(Missing::Dead(pid));
    }
    if facts.comm != names::FIRECRACKER {
        return Err(Missing::OtherProgram(pid, facts.comm.escape_default().to_string()));
    }
    if facts.uids != [uid; 4] {
        return Err(Missing::OtherUser(pid));
    }
    let theirs = [facts.machine_of_root(), facts.machine_of_cgroup()];
    if !theirs.iter().flatten().any(|id| id == machine) {
        return Err(Missing::OtherMachine(pid));
    }
    Ok(facts)
}

/// The number in a pidfile.
fn parse_pid(bytes: &[u8]) -> Result<u32, Missing> {
    let text = std::str::from_utf8(bytes).map_err(|_| Missing::Garbage)?;
    let pid: i32 = text.trim().parse().map_err(|_| Missing::Garbage)?;
    u32::try_from(pid).ok().filter(|pid| *pid > 0).ok_or(Missing::Garbage)
}

fn pidfile(root: &Dir) -> Result<u32, Missing> {
    let Ok(Some((fd, _))) = root.file(names::jail::PID) else {
        return Err(Missing::NoPidfile);
    };
    let mut bytes = [0; PIDFILE];
    let length = rustix::io::read(&fd, &mut bytes).map_err(|_| Missing::NoPidfile)?;
    parse_pid(&bytes[..length])
}

/// All processes.
fn pids(proc: &Path) -> impl Iterator<Item = u32> {
    let entries = std::fs::read_dir(proc).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// All processes of a name: it is one small file to read, and few have it.
fn called(proc: &Path, name: &str) -> impl Iterator<Item = u32> {
    pids(proc).filter(move |pid| {
        let comm = std::fs::read(proc.join(pid.to_string()).join("comm")).unwrap_or_default();
        comm.trim_ascii_end() == name.as_bytes()
    })
}

/// The engine of a machine: the process of the pidfile, or, where that does not lead to it, any other that passes.
fn identify(proc: &Path, root: &Dir, machine: &MachineId) -> Result<(u32, u32), Missing> {
    let uid = root.stat().map_err(|_| Missing::NoJail)?.st_uid;
    if !is_jail_user(uid) {
        return Err(Missing::NotJailed(uid));
    }
    let named = pidfile(root).and_then(|pid| verify(proc, pid, machine, uid).map(|_| pid));
    match named {
        Ok(pid) => Ok((pid, uid)),
        Err(why) => called(proc, names::FIRECRACKER)
            .find(|pid| verify(proc, *pid, machine, uid).is_ok())
            .map(|pid| (pid, uid))
            .ok_or(why),
    }
}

/// A machine's engine, held: the descriptor stays with this process, whatever becomes of its number.
#[derive(Debug)]
pub(super) struct Engine {
    /// The process.
    pub(super) pid: u32,
    /// It, held.
    pub(super) pidfd: OwnedFd,
}

/// Finds a machine's engine and holds it.
pub(super) fn engine(ctx: &Ctx, machine: &MachineId) -> Result<Engine, Missing> {
    let root = root(ctx, machine).ok_or(Missing::NoJail)?;
    let (pid, uid) = identify(&ctx.proc, &root, machine)?;
    let pidfd = hold(pid).ok_or(Missing::Dead(pid))?;
    // What is true of the number now is true of the process that is held, or that process is gone.
    verify(&ctx.proc, pid, machine, uid)?;
    Ok(Engine { pid, pidfd })
}

/// Holds a process.
pub(super) fn hold(pid: u32) -> Option<OwnedFd> {
    let pid = Pid::from_raw(i32::try_from(pid).ok()?)?;
    rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()
}

/// A machine's chroot.
pub(super) fn root(ctx: &Ctx, machine: &MachineId) -> Option<Dir> {
    own(ctx, machine)?.find("root").ok()?
}

/// The directory of root's that a machine's chroot is in.
pub(super) fn own(ctx: &Ctx, machine: &MachineId) -> Option<Dir> {
    let jails = Dir::find_path(&ctx.layout.jails().join(names::FIRECRACKER)).ok()??;
    jails.find(machine.as_str()).ok()?
}

/// A jailer that has not become an engine yet: root's, with the machine in its arguments.
pub(super) fn jailer(proc: &Path, machine: &MachineId) -> Option<u32> {
    called(proc, "jailer").find(|pid| {
        let arguments = std::fs::read(proc.join(pid.to_string()).join("cmdline")).unwrap_or_default();
        let mut arguments = arguments.split(|b| *b == 0);
        let named = arguments.any(|a| a == b"--id") && arguments.next() == Some(machine.as_str().as_bytes());
        named && Facts::read(proc, *pid).is_some_and(|f| f.comm == "jailer" && f.uids == [0; 4] && f.lives())
    })
}

/// All processes that are jailed engines.
pub(super) fn all(proc: &Path) -> Vec<(u32, MachineId)> {
    called(proc, names::FIRECRACKER)
        .filter_map(|pid| Some((pid, Facts::read(proc, pid)?.machine()?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const ID: &str = "00112233aabbccdd";
    const OTHER: &str = "ffeeddccbbaa9988";
    const UID: u32 = JAIL_UID_BASE + 7;

    struct Host {
        _dir: tempfile::TempDir,
        proc: std::path::PathBuf,
        root: Dir,
    }

    struct Fake<'a> {
        comm: &'a str,
        state: char,
        uid: u32,
        cgroup: String,
        root: String,
    }

    fn engine_of(id: &str) -> Fake<'static> {
        Fake {
            comm: "firecracker",
            state: 'S',
            uid: UID,
            cgroup: format!("0::/banger.slice/banger-machine-{id}.scope"),
            root: format!("/var/lib/banger/jail/firecracker/{id}/root"),
        }
    }

    impl Host {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let (proc, root) = (dir.path().join("proc"), dir.path().join("root"));
            std::fs::create_dir(&proc).unwrap();
            std::fs::create_dir(&root).unwrap();
            let root = Dir::find_path(&root).unwrap().unwrap();
            Self { _dir: dir, proc, root }
        }

        fn process(&self, pid: u32, fake: &Fake<'_>) {
            let dir = self.proc.join(pid.to_string());
            std::fs::create_dir_all(&dir).unwrap();
            let put = |name: &str, text: String| std::fs::write(dir.join(name), text).unwrap();
            put("comm", format!("{}\n", fake.comm));
            let rest = "1 ".repeat(18);
            put("stat", format!("{pid} (a) b) {} {rest}4711 0\n", fake.state));
            let u = fake.uid;
            put("status", format!("Name:\tx\nUid:\t{u}\t{u}\t{u}\t{u}\nGid:\t0\n"));
            put("cgroup", format!("{}\n", fake.cgroup));
            put(
                "mountinfo",
                format!("1 2 254:1 {} / rw - ext4 /dev/vda rw\n", fake.root),
            );
        }

        fn pidfile(&self, text: &str) {
            std::fs::write(self.root.path().join("firecracker.pid"), text).unwrap();
        }

        /// As [`identify`] does, for a jail of the user.
        fn look(&self) -> Result<u32, Missing> {
            let id = MachineId::parse(ID).unwrap();
            let named = pidfile(&self.root).and_then(|pid| verify(&self.proc, pid, &id, UID).map(|_| pid));
            named.or_else(|why| {
                pids(&self.proc)
                    .find(|pid| verify(&self.proc, *pid, &id, UID).is_ok())
                    .ok_or(why)
            })
        }
    }

    #[test]
    fn the_engine_of_the_pidfile() {
        let host = Host::new();
        host.process(42, &engine_of(ID));
        for text in ["42", "42\n", "  42 \n"] {
            host.pidfile(text);
            assert_eq!(host.look(), Ok(42));
        }
        assert_eq!(Facts::read(&host.proc, 42).unwrap().start_time, 4711);
        assert_eq!(all(&host.proc), [(42, MachineId::parse(ID).unwrap())]);
    }

    #[test]
    fn no_pidfile_or_one_that_says_nothing() {
        let host = Host::new();
        assert_eq!(host.look(), Err(Missing::NoPidfile));
        for text in ["", " \n", "x", "-1", "0", "99999999999999999999", "42x", "4 2", "1e3"] {
            host.pidfile(text);
            assert_eq!(host.look(), Err(Missing::Garbage), "{text:?}");
        }
    }

    #[test]
    fn a_pidfile_that_is_no_file() {
        let host = Host::new();
        host.process(42, &engine_of(OTHER));
        let elsewhere = host.proc.join("pid");
        std::fs::write(&elsewhere, "42").unwrap();
        symlink(&elsewhere, host.root.path().join("firecracker.pid")).unwrap();
        assert_eq!(host.look(), Err(Missing::NoPidfile), "a link is not followed");
        std::fs::remove_file(host.root.path().join("firecracker.pid")).unwrap();
        std::fs::create_dir(host.root.path().join("firecracker.pid")).unwrap();
        assert_eq!(host.look(), Err(Missing::NoPidfile));
    }

    #[test]
    fn a_pipe_in_place_of_the_pidfile_hangs_nobody() {
        let host = Host::new();
        rustix::fs::mkfifoat(
            host.root.fd(),
            "firecracker.pid",
            rustix::fs::Mode::from_raw_mode(0o600),
        )
        .unwrap();
        assert_eq!(host.look(), Err(Missing::NoPidfile));
    }

    #[test]
    fn a_process_that_is_gone() {
        let host = Host::new();
        host.pidfile("42");
        assert_eq!(host.look(), Err(Missing::Dead(42)));
        host.process(
            42,
            &Fake {
                state: 'Z',
                ..engine_of(ID)
            },
        );
        assert_eq!(
            host.look(),
            Err(Missing::Dead(42)),
            "what is left of it until it is reaped"
        );
    }

    #[test]
    fn a_number_that_is_another_programs_now() {
        let host = Host::new();
        host.pidfile("42");
        for comm in ["sshd", "firecracker2", "Firecracker", "fire", "firecracker "] {
            host.process(42, &Fake { comm, ..engine_of(ID) });
            assert_eq!(host.look(), Err(Missing::OtherProgram(42, comm.into())), "{comm}");
        }
    }

    #[test]
    fn a_number_that_is_another_machines_now() {
        let host = Host::new();
        host.pidfile("42");
        host.process(42, &engine_of(OTHER));
        assert_eq!(host.look(), Err(Missing::OtherMachine(42)));
    }

    #[test]
    fn a_process_of_another_user() {
        let host = Host::new();
        host.pidfile("42");
        for uid in [0, 1000, UID + 1] {
            host.process(42, &Fake { uid, ..engine_of(ID) });
            assert_eq!(host.look(), Err(Missing::OtherUser(42)), "{uid}");
        }
    }

    #[test]
    fn a_jail_or_a_control_group_is_enough() {
        let nowhere = || "0::/system.slice/bangerd-root.service".to_owned();
        let host = Host::new();
        host.pidfile("42");
        host.process(
            42,
            &Fake {
                cgroup: nowhere(),
                ..engine_of(ID)
            },
        );
        assert_eq!(host.look(), Ok(42), "before it is in its scope");
        host.process(
            42,
            &Fake {
                root: "/".into(),
                ..engine_of(ID)
            },
        );
        assert_eq!(host.look(), Ok(42));
        let cgroup = format!("5:pids:/x\n4:memory:/banger/{ID}");
        host.process(
            42,
            &Fake {
                root: "/".into(),
                cgroup,
                ..engine_of(ID)
            },
        );
        assert_eq!(host.look(), Ok(42), "without systemd");
        host.process(
            42,
            &Fake {
                root: "/".into(),
                cgroup: nowhere(),
                ..engine_of(ID)
            },
        );
        assert_eq!(host.look(), Err(Missing::OtherMachine(42)));
    }

    #[test]
    fn a_pidfile_that_lies_hides_nothing() {
        let host = Host::new();
        host.process(
            1,
            &Fake {
                comm: "systemd",
                uid: 0,
                ..engine_of(OTHER)
            },
        );
        host.process(42, &engine_of(ID));
        host.process(43, &engine_of(OTHER));
        for lie in ["1", "43", "4000", "junk"] {
            host.pidfile(lie);
            assert_eq!(host.look(), Ok(42), "{lie}");
        }
    }

    #[test]
    fn a_jail_that_is_nobodys() {
        let host = Host::new();
        let id = MachineId::parse(ID).unwrap();
        let uid = host.root.stat().unwrap().st_uid;
        assert_eq!(identify(&host.proc, &host.root, &id), Err(Missing::NotJailed(uid)));
    }

    #[test]
    fn a_jailer_on_its_way() {
        let host = Host::new();
        let id = MachineId::parse(ID).unwrap();
        host.process(
            9,
            &Fake {
                comm: "jailer",
                uid: 0,
                ..engine_of("x")
            },
        );
        std::fs::write(host.proc.join("9/cmdline"), format!("/x/jailer\0--id\0{ID}\0--uid\0")).unwrap();
        assert_eq!(jailer(&host.proc, &id), Some(9));
        assert_eq!(jailer(&host.proc, &MachineId::parse(OTHER).unwrap()), None);
        host.process(
            9,
            &Fake {
                comm: "jailer",
                uid: 1000,
                ..engine_of("x")
            },
        );
        assert_eq!(jailer(&host.proc, &id), None, "whoever calls himself so");
    }
}

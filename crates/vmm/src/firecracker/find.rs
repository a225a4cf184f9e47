//! Finding a machine's engine again, and being sure that it is the one.
//!
//! An engine outside of a jail was started with the path of its control socket, so its command line names it. One in a jail was
//! started with the path inside, which is the same for every machine: there the control socket in the machine's run directory is
//! a link, its target's directory is the chroot, and in that is a file with the process's number. A number is used again, so the
//! process must also be called `firecracker`, have been started when the kept handles say, bear the machine's id in its command
//! line and control group where those show one, *and* be the one that answers on the machine's socket, with the machine's id.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use banger_core::id::MachineId;
use banger_core::plan::MachinePaths;
use banger_system::names::{self, jail};

use super::api::{ApiError, Client};
use super::{BINARY, ENGINE, Firecracker, config};
use crate::engine::{EngineError, Handles, Liveness};
use crate::host;
use crate::identity::{self, Expected, Mismatch, Process, Stat};
use crate::jail::Jail;
use crate::start::io_error;

/// Why a machine's engine is not there. Each means that there is none, not that it cannot be told.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotFound {
    /// Nothing was started with this socket, and it leads into no jail.
    #[error("no process was started with {0}, and it is no link into a jail")]
    NoLink(PathBuf),
    /// The link leads elsewhere than into this machine's jail.
    #[error("{link} leads to {target}, which is not the jail of this machine", link = .link.display(), target = .target.display())]
    OtherJail {
        /// The control socket.
        link: PathBuf,
        /// Where it leads.
        target: PathBuf,
    },
    /// The jail has no file with a process.
    #[error("there is no {0}")]
    NoPidFile(PathBuf),
    /// It says nothing.
    #[error("{0} is empty")]
    EmptyPidFile(PathBuf),
    /// It says something else.
    #[error("{0} holds no process number")]
    BadPidFile(PathBuf),
    /// It names a process that is not there.
    #[error("there is no process {0}")]
    Dead(u32),
    /// It names a process that is something else by now.
    #[error("process {pid} is `{comm}`, not `{BINARY}`")]
    OtherProgram {
        /// The process.
        pid: u32,
        /// What it is called.
        comm: String,
    },
    /// The number of the machine's engine is another process's by now.
    #[error("process {0} was started at another time than this machine's engine")]
    OtherStart(u32),
    /// It is another machine's engine.
    #[error("process {pid} is the engine of another machine: {why}")]
    OtherMachine {
        /// The process.
        pid: u32,
        /// What says so.
        why: String,
    },
}

/// What came of looking for a process.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Seek {
    /// There is none.
    #[error(transparent)]
    NotFound(#[from] NotFound),
    /// It cannot be told.
    #[error("{0}")]
    Unclear(String),
}

/// Looks for the process of a machine's engine. `control` is the machine's control socket; `chroot` its jail, where machines
/// have one; `kept` pid and start time of the handles that were kept in this boot of the host.
///
/// Where machines have jails, link and file with the number may be lost: then the process is told by the machine's id, which is in
/// its command line. Only where no process bears that there is none.
pub fn seek(
    proc: &Path,
    id: &MachineId,
    control: &Path,
    chroot: Option<&Path>,
    kept: Option<(u32, u64)>,
) -> Result<Stat, Seek> {
    let stat = match by_arguments(proc, id, control).map_err(Seek::Unclear)? {
        Some(stat) => stat,
        None => match in_jail(proc, id, control, chroot) {
            Err(Seek::NotFound(why)) if chroot.is_some() => {
                return by_id(proc, id).map_err(Seek::Unclear)?.ok_or(Seek::NotFound(why));
            }
            found => found?,
        },
    };
    match kept {
        Some((pid, start_time)) if pid == stat.pid && start_time != stat.start_time => {
            // Where the process says whose it is, it is the handles that are wrong.
            let arguments = identity::arguments(proc, pid).unwrap_or_default();
            match machine_of(&arguments).is_some_and(|found| found == id.as_str()) {
                true => Ok(stat),
                false => Err(NotFound::OtherStart(pid).into()),
            }
        }
        _ => Ok(stat),
    }
}

/// The process that was started with a machine's control socket.
pub(super) fn by_arguments(proc: &Path, id: &MachineId, control: &Path) -> Result<Option<Stat>, String> {
    let uid = rustix::process::getuid().as_raw();
    let all = identity::processes(proc, uid).map_err(|e| format!("cannot list {}: {e}", proc.display()))?;
    let mut found = Vec::new();
    for pid in all {
        let Ok(Some(stat)) = Stat::read(proc, pid) else {
            continue;
        };
        let names = |arguments: Vec<Vec<u8>>| names_control(&arguments, control) && names_machine(&arguments, id);
        if !stat.ended() && stat.comm.starts_with(BINARY) && identity::arguments(proc, pid).is_some_and(names) {
            found.push(stat);
        }
    }
    only(found)
}

/// The process of any user that is called `firecracker`, was started in a jail with the machine's id, and is in no other machine's
/// control group.
fn by_id(proc: &Path, id: &MachineId) -> Result<Option<Stat>, String> {
    let all = identity::all_processes(proc).map_err(|e| format!("cannot list {}: {e}", proc.display()))?;
    let named = all.into_iter().filter(|pid| {
        let arguments = identity::arguments(proc, *pid);
        arguments.is_some_and(|arguments| is_jailed(&arguments) && names_machine(&arguments, id))
    });
    only(named.filter_map(|pid| in_this_jail(proc, id, pid).ok()).collect())
}

/// Whether a process was started with the API socket that every engine in a jail has.
fn is_jailed(arguments: &[Vec<u8>]) -> bool {
    value(arguments, "--api-sock").is_some_and(|path| path.strip_prefix(b"/").unwrap_or(path) == jail::API.as_bytes())
}

/// The only one of them.
fn only(mut found: Vec<Stat>) -> Result<Option<Stat>, String> {
    if found.len() > 1 {
        let pids: Vec<String> = found.iter().map(|s| s.pid.to_string()).collect();
        return Err(format!(
            "several processes were started for this machine: {}",
            pids.join(", ")
        ));
    }
    Ok(found.pop())
}

/// The process in the jail that a machine's control socket leads into.
fn in_jail(proc: &Path, id: &MachineId, control: &Path, chroot: Option<&Path>) -> Result<Stat, Seek> {
    let target = match (fs::read_link(control), chroot) {
        (Ok(target), _) => target,
        // Lost; where it led is known.
        (Err(e), Some(chroot)) if e.kind() == io::ErrorKind::NotFound => chroot.join(jail::API),
        // Something else than a link, or nothing.
        (Err(e), _) if matches!(e.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::NotFound) => {
            return Err(NotFound::NoLink(control.to_owned()).into());
        }
        (Err(e), _) => {
            return Err(Seek::Unclear(format!(
                "cannot read the link {}: {e}",
                control.display()
            )));
        }
    };
    let dir = match target.parent() {
        Some(dir) if target.is_absolute() && chroot.is_none_or(|chroot| chroot == dir) => dir,
        _ => {
            return Err(NotFound::OtherJail {
                link: control.to_owned(),
                target,
            }
            .into());
        }
    };
    let pid = pid_file(&dir.join(jail::PID))?;
    in_this_jail(proc, id, pid)
}

/// The process that a file names.
fn pid_file(path: &Path) -> Result<u32, Seek> {
    let mut text = Vec::new();
    match File::open(path).and_then(|f| f.take(64).read_to_end(&mut text)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(NotFound::NoPidFile(path.to_owned()).into()),
        Err(e) => return Err(Seek::Unclear(format!("cannot read {}: {e}", path.display()))),
        Ok(_) => {}
    }
    let text = text.trim_ascii();
    if text.is_empty() {
        return Err(NotFound::EmptyPidFile(path.to_owned()).into());
    }
    let number = std::str::from_utf8(text)
        .ok()
        .filter(|t| t.bytes().all(|b| b.is_ascii_digit()));
    let pid = number
        .and_then(|t| t.parse::<i32>().ok())
        .and_then(|n| u32::try_from(n).ok());
    match pid {
        Some(pid) if pid > 0 => Ok(pid),
        _ => Err(NotFound::BadPidFile(path.to_owned()).into()),
    }
}

/// Makes sure that a process is the engine in this machine's jail, as far as it shows.
fn in_this_jail(proc: &Path, id: &MachineId, pid: u32) -> Result<Stat, Seek> {
    if proc.join("self").symlink_metadata().is_err() {
        return Err(Seek::Unclear(format!("{} is not mounted", proc.display())));
    }
    let dir = proc.join(pid.to_string());
    let unclear = |e: io::Error| Seek::Unclear(format!("cannot look at process {pid}: {e}"));
    let stat = Stat::read(proc, pid).map_err(unclear)?;
    let Some(stat) = stat.filter(|stat| !stat.ended()) else {
        return Err(NotFound::Dead(pid).into());
    };
    let comm = identity::read_file(&dir.join("comm"), 64).map_err(unclear)?;
    let Some(comm) = comm else {
        return Err(NotFound::Dead(pid).into());
    };
    if comm.strip_suffix(b"\n").unwrap_or(&comm) != names::FIRECRACKER.as_bytes() {
        let comm = String::from_utf8_lossy(comm.trim_ascii_end())
            .escape_default()
            .to_string();
        return Err(NotFound::OtherProgram { pid, comm }.into());
    }
    let other = |why: String| Err(Seek::NotFound(NotFound::OtherMachine { pid, why }));
    if let Some(found) = identity::arguments(proc, pid).as_deref().and_then(machine_of)
        && found != id.as_str()
    {
        return other(format!("it was started with the id {}", found.escape_default()));
    }
    // Without a control group that tells a machine there is nothing to compare.
    if let Ok(Some(text)) = identity::read_file(&dir.join("cgroup"), 16 << 10) {
        let text = String::from_utf8_lossy(&text);
        if let Some(found) = text.lines().find_map(cgroup_machine).filter(|found| found != id) {
            return other(format!("its control group is that of {found}"));
        }
    }
    Ok(stat)
}

/// The machine of a line in `/proc/PID/cgroup`: a scope of banger's, or a group of the jailer's.
fn cgroup_machine(line: &str) -> Option<MachineId> {
    let path = line.splitn(3, ':').nth(2)?;
    path.split('/')
        .rev()
        .find_map(|name| names::of_scope(name).or_else(|| MachineId::parse(name).ok()))
}

/// Whether a process was started with this control socket.
fn names_control(arguments: &[Vec<u8>], control: &Path) -> bool {
    use std::os::unix::ffi::OsStrExt;
    value(arguments, "--api-sock").is_some_and(|path| path == control.as_os_str().as_bytes())
}

fn names_machine(arguments: &[Vec<u8>], id: &MachineId) -> bool {
    value(arguments, "--id").is_some_and(|found| found == id.as_str().as_bytes())
}

/// The id that a process was started with.
fn machine_of(arguments: &[Vec<u8>]) -> Option<String> {
    value(arguments, "--id").map(|id| String::from_utf8_lossy(id).into_owned())
}

/// The value of an option, in either form.
fn value<'a>(arguments: &'a [Vec<u8>], option: &str) -> Option<&'a [u8]> {
    arguments.iter().enumerate().find_map(|(at, word)| {
        let rest = word.strip_prefix(option.as_bytes())?;
        match rest {
            [] => arguments.get(at + 1).map(Vec::as_slice),
            [b'=', value @ ..] => Some(value),
            _ => None,
        }
    })
}

/// Opens the process that the handles name and verifies that it is that machine's engine.
pub(super) fn open(proc: &Path, handles: &Handles) -> Result<Process, Mismatch> {
    if host::boot_id(proc).map_err(Mismatch::Unclear)? != handles.host_boot_id {
        return Err(Mismatch::Gone("the host has been restarted since".to_owned()));
    }
    let expected = Expected {
        pid: handles.pid,
        start_time: handles.start_time,
        comm_prefix: BINARY.to_owned(),
    };
    let process = Process::open(proc, &expected)?;
    let arguments = identity::arguments(proc, handles.pid).unwrap_or_default();
    // In a jail, pid and start time are followed by the id.
    let wanted = machine(handles);
    let found = machine_of(&arguments);
    if names_control(&arguments, &handles.control) || wanted.is_none() || found == wanted.map(String::from) {
        return Ok(process);
    }
    // It may have ended between two looks.
    identity::verify(proc, &expected)?;
    Err(Mismatch::Unclear(format!(
        "process {} was not started for this machine",
        handles.pid
    )))
}

/// The same, as an error of the interface.
pub(super) fn open_or_refuse(proc: &Path, handles: &Handles) -> Result<Process, EngineError> {
    open(proc, handles).map_err(|mismatch| EngineError::NotOurs {
        pid: handles.pid,
        why: mismatch.why().to_owned(),
    })
}

/// The chroot that a control socket leads into.
fn chroot(control: &Path) -> Option<PathBuf> {
    fs::read_link(control).ok()?.parent().map(Path::to_owned)
}

/// The machine of handles: the jail is named after it, and so is its run directory.
fn machine(handles: &Handles) -> Option<MachineId> {
    let parse = |dir: &Path| MachineId::parse(dir.file_name()?.to_str()?).ok();
    match chroot(&handles.control) {
        Some(chroot) => parse(chroot.parent()?),
        None => parse(handles.control.parent()?),
    }
}

/// Whoever has the key to a machine's jail, and the machine.
pub(super) type Key = (Arc<dyn Jail>, MachineId);

/// The jail of a machine, if it is in one.
pub(super) fn jail_of(firecracker: &Firecracker, handles: &Handles) -> Result<Option<Key>, EngineError> {
    let arguments = identity::arguments(firecracker.proc(), handles.pid).unwrap_or_default();
    if names_control(&arguments, &handles.control) {
        return Ok(None);
    }
    let refused = |why: String| EngineError::NotOurs { pid: handles.pid, why };
    let (Some(jail), Some(id)) = (&firecracker.options.jail, machine(handles)) else {
        return match chroot(&handles.control) {
            Some(chroot) => Err(refused(format!(
                "it is in the jail {}, to which only root has a key",
                chroot.display()
            ))),
            None => Ok(None),
        };
    };
    match chroot(&handles.control).filter(|chroot| *chroot != jail.chroot(&id)) {
        Some(chroot) => Err(refused(format!(
            "it is in {}, which is no jail of banger's",
            chroot.display()
        ))),
        None => Ok(Some((jail.clone(), id))),
    }
}

/// Files as an engine names them, on the host.
pub(super) fn resolve(
    firecracker: &Firecracker,
    handles: &Handles,
    told: impl Iterator<Item = String>,
) -> Result<Vec<PathBuf>, EngineError> {
    let root = root(firecracker, handles)?;
    let on_host = |path: String| {
        let path = root.join(path.trim_start_matches('/'));
        fs::read_link(&path).unwrap_or(path)
    };
    // The engine names them in an order of its own, another one each time.
    let mut files: Vec<PathBuf> = told.map(on_host).collect();
    files.sort();
    Ok(files)
}

/// The directory from which an engine names its files.
fn root(firecracker: &Firecracker, handles: &Handles) -> Result<PathBuf, EngineError> {
    if let Some((jail, id)) = jail_of(firecracker, handles)? {
        return Ok(jail.chroot(&id));
    }
    let cwd = firecracker.proc().join(handles.pid.to_string()).join("cwd");
    fs::read_link(&cwd).map_err(|e| io_error(format!("read {}", cwd.display()), e))
}

/// Whether a machine goes on from what was saved: then its memory is there under the name by which the engine was told. Firecracker
/// itself does not say: it saves from what kernel a machine has booted, and shows that again.
pub(super) fn goes_on(firecracker: &Firecracker, handles: &Handles) -> Result<bool, EngineError> {
    let jailed = jail_of(firecracker, handles)?.is_some();
    let root = root(firecracker, handles)?;
    let dir = if jailed { root } else { root.join(config::LINKS) };
    // Without the directory nothing could be told.
    fs::symlink_metadata(&dir).map_err(|e| io_error(format!("look at {}", dir.display()), e))?;
    let memory = dir.join(jail::MEMORY);
    match fs::symlink_metadata(&memory) {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(io_error(format!("look at {}", memory.display()), e)),
    }
}

/// Finds a machine's engine.
pub(super) async fn find(
    firecracker: &Firecracker,
    id: &MachineId,
    paths: &MachinePaths,
    handles: Option<&Handles>,
) -> Liveness {
    let proc = firecracker.proc();
    let mut gone = None;
    if let Some(handles) = handles {
        match open(proc, handles) {
            Ok(_) => return answer(firecracker, id, paths, handles).await,
            Err(Mismatch::Unclear(why)) => return Liveness::Unclear(why),
            // The handles may be older than the machine's last start.
            Err(Mismatch::Gone(why)) => gone = Some(why),
        }
    }
    let boot_id = match host::boot_id(proc) {
        Ok(boot_id) => boot_id,
        Err(why) => return Liveness::Unclear(why),
    };
    let kept = handles
        .filter(|h| h.host_boot_id == boot_id)
        .map(|h| (h.pid, h.start_time));
    let (control, jail) = (paths.control_socket(), &firecracker.options.jail);
    let chroot = jail.as_ref().map(|jail| jail.chroot(id));
    match seek(proc, id, &control, chroot.as_deref(), kept) {
        Err(Seek::Unclear(why)) => Liveness::Unclear(why),
        Err(Seek::NotFound(why)) => Liveness::Gone(gone.unwrap_or_else(|| why.to_string())),
        Ok(stat) => {
            let found = Handles {
                engine: ENGINE.to_owned(),
                pid: stat.pid,
                start_time: stat.start_time,
                host_boot_id: boot_id,
                control,
                agent: paths.agent_socket(),
            };
            answer(firecracker, id, paths, &found).await
        }
    }
}

/// Makes the links into a machine's jail again, where they are lost: both ends are known without them. Others stay as they are.
fn mend_links(paths: &MachinePaths, chroot: &Path) -> io::Result<()> {
    if !chroot.is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&paths.run)?;
    for (link, name) in [(paths.control_socket(), jail::API), (paths.agent_socket(), jail::AGENT)] {
        match symlink(chroot.join(name), &link) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            Err(_) => {}
            Ok(()) => tracing::warn!(link = %link.display(), "a link into a jail was lost: made again"),
        }
    }
    Ok(())
}

/// Asks a process that fits whether it is the machine.
async fn answer(firecracker: &Firecracker, id: &MachineId, paths: &MachinePaths, handles: &Handles) -> Liveness {
    if let Some(jail) = &firecracker.options.jail
        && let Err(e) = mend_links(paths, &jail.chroot(id))
    {
        tracing::warn!(machine = %id, error = %e, "the links into the jail are not made again");
    }
    let why = match verified_client(firecracker, handles, Some(id)).await {
        Ok(_) => return Liveness::Alive(handles.clone()),
        Err(why) => why,
    };
    match open(firecracker.proc(), handles) {
        Err(Mismatch::Gone(why)) => Liveness::Gone(why),
        // What answers there, on this machine's own socket, is not this machine.
        _ if matches!(why, ControlFault::Id(_)) => {
            let (pid, why) = (handles.pid, why.to_string());
            Liveness::Gone(NotFound::OtherMachine { pid, why }.to_string())
        }
        Ok(_) if matches!(why, ControlFault::Api(_)) => Liveness::Silent {
            handles: handles.clone(),
            why: format!("process {}: {why}", handles.pid),
        },
        _ => Liveness::Unclear(format!("process {}: {why}", handles.pid)),
    }
}

/// What is wrong with a control connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum ControlFault {
    #[error("{}", chain(.0))]
    Api(#[from] ApiError),
    #[error("the API socket belongs to process {0}")]
    Peer(u32),
    #[error("the API answers as {0:?}")]
    Id(String),
}

fn chain(error: &ApiError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        source = error.source();
    }
    text
}

/// Connects to the API and makes sure who is behind it.
pub(super) async fn verified_client(
    firecracker: &Firecracker,
    handles: &Handles,
    id: Option<&MachineId>,
) -> Result<Client, ControlFault> {
    let mut client = Client::connect(&handles.control, firecracker.options.answer_timeout).await?;
    check(&mut client, handles.pid, id).await?;
    Ok(client)
}

/// Whether the other side is this process, and the machine of this id.
pub(super) async fn check(client: &mut Client, pid: u32, id: Option<&MachineId>) -> Result<(), ControlFault> {
    if let Some(peer) = client.peer().filter(|peer| *peer != pid) {
        return Err(ControlFault::Peer(peer));
    }
    if let Some(id) = id {
        let found = client.info().await?.id;
        if found != id.as_str() {
            return Err(ControlFault::Id(found));
        }
    }
    Ok(())
}

/// Connects for a command.
pub(super) async fn command_client(firecracker: &Firecracker, handles: &Handles) -> Result<Client, EngineError> {
    open_or_refuse(firecracker.proc(), handles)?;
    let client = verified_client(firecracker, handles, None).await;
    client.map_err(|fault| match fault {
        ControlFault::Api(error) => firecracker.fault(handles, error),
        other => EngineError::NotOurs {
            pid: handles.pid,
            why: other.to_string(),
        },
    })
}

/// Whether memory was saved here before and left behind: nobody may add to it.
pub(super) fn leftover(chroot: &Path) -> bool {
    // What cannot be seen may be there.
    !matches!(fs::symlink_metadata(chroot.join(jail::NEW_MEMORY)), Err(e) if e.kind() == io::ErrorKind::NotFound)
}

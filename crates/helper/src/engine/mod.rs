//! Jailed engines, and scopes.
//!
//! * [`program`]: firecracker and jailer are root's alone,
//! * [`jail`]: the directory, before and after; [`dir`], [`tree`], [`mounts`]: how root moves in directories,
//! * [`spawn`]: the jailer is started, and reaped,
//! * [`find`]: which process is a machine's engine,
//! * [`collect`]: what it has saved leaves the jail,
//! * [`cgroup`], [`scope`] (by way of [`dbus`]): what it may use.
//!
//! **Where an engine lives.** Where systemd runs, each is in a scope of its own (`banger.slice/banger-machine-<id>.scope`), so that
//! nothing that happens to a unit of banger's concerns it: not its restart, not its limits, and not a unit that was changed by hand and
//! lost its `KillMode`. The scope is made right after the start, before there is a guest. Elsewhere the jailer makes a control group,
//! where there are any.

mod acl;
mod cgroup;
#[cfg(test)]
mod closed_tests;
mod collect;
mod dbus;
pub(crate) mod dir;
mod find;
mod jail;
mod mounts;
mod program;
mod scope;
mod spawn;
#[cfg(test)]
pub(crate) mod tests;
mod tree;

use std::os::fd::OwnedFd;
use std::process::Child;
use std::time::{Duration, Instant};

use banger_system::helper::{DiskRole, EngineEnd, HelperCode, HelperError, HostObject, JailFile, ObjectKind, Signal};
use banger_system::id::MachineId;
use banger_system::names;
use banger_system::net::jail_uid;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, OFlags, inotify};

use crate::ctx::{Ctx, error, failed};
use cgroup::{Kind, Limits};
use dir::Dir;
use find::{Facts, Missing};

/// How long an engine may take until its API socket is there.
const START: Duration = Duration::from_secs(10);
/// How long a killed one may take to be gone.
const END: Duration = Duration::from_secs(10);
/// Most processes that are killed for one machine: there is one, unless somebody broke out.
const KILLS: usize = 64;
/// MiB that an engine may write to one file beyond the size of its memory: the limit is there for a hostile engine, and must not be what
/// another version of an honest one runs into.
const SPARE_FILE_MIB: u64 = 64;
/// What an engine of the owner's is called: `banger-` and the beginning of the machine's id.
const OWNERS: &str = "banger-";

/// What is launched.
#[derive(Debug)]
pub(crate) struct Launch {
    /// The machine.
    pub(crate) machine: MachineId,
    /// Its slot.
    pub(crate) slot: u32,
    /// Virtual CPUs.
    pub(crate) vcpu: u32,
    /// Memory in MiB.
    pub(crate) memory_mib: u64,
    /// What the descriptors behind the first are.
    pub(crate) files: Vec<JailFile>,
    /// Disks.
    pub(crate) disks: Vec<DiskRole>,
}

/// Starts a jailed engine: pid and start time. The first descriptor is where its output goes.
pub(crate) fn launch(ctx: &Ctx, launch: &Launch, fds: Vec<OwnedFd>) -> Result<(u32, u64), HelperError> {
    let mut fds = fds.into_iter();
    let output = fds
        .next()
        .ok_or_else(|| error(HelperCode::BadRequest, "an engine's output has to go somewhere"))?;
    check_output(&output)?;
    if let Some(pid) = process(ctx, &launch.machine) {
        let text = format!("machine {} has an engine already: process {pid}", launch.machine);
        return Err(error(HelperCode::Conflict, text));
    }
    let programs = &ctx.record.firecracker;
    program::check(&programs.firecracker)?;
    program::check(&programs.jailer)?;
    if programs.firecracker.file_name() != Some(names::FIRECRACKER.as_ref()) {
        let text = format!(
            "{} has to be called `firecracker`: the jailer names the jail after it",
            programs.firecracker.display()
        );
        return Err(error(HelperCode::Unsupported, text));
    }
    let started = started(ctx, launch, &output, fds.collect());
    if started.is_err() {
        // What it has left behind says nothing that the error does not.
        let _ = end(ctx, &launch.machine);
        let _ = remove_jail(ctx, &launch.machine);
    }
    started
}

/// The output is a pipe, open for writing.
fn check_output(fd: &OwnedFd) -> Result<(), HelperError> {
    let denied = |why: &str| {
        Err(error(
            HelperCode::Denied,
            format!("the engine's output is refused: {why}"),
        ))
    };
    let stat = rustix::fs::fstat(fd).map_err(|e| failed("look at the engine's output", e))?;
    let flags = rustix::fs::fcntl_getfl(fd).map_err(|e| failed("look at the engine's output", e))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Fifo {
        return denied("it is not a pipe");
    }
    if flags.contains(OFlags::PATH) || flags & OFlags::ACCMODE != OFlags::WRONLY {
        return denied("it is not open for writing alone");
    }
    Ok(())
}

fn started(ctx: &Ctx, launch: &Launch, output: &OwnedFd, files: Vec<OwnedFd>) -> Result<(u32, u64), HelperError> {
    let root = jail::prepare(ctx, launch, files)?;
    let systemd = scope::available();
    let limits = Limits::jailed(launch.vcpu, launch.memory_mib);
    let cgroup = if systemd {
        Vec::new()
    } else {
        cgroup::arguments(ctx, limits)
    };
    let watch = watch(&root)?;
    let jailer = &ctx.record.firecracker.jailer;
    let mut child = spawn::start(jailer, &arguments(ctx, launch, cgroup), output)
        .map_err(|e| failed(format!("start {}", jailer.display()), e))?;
    let pid = child.id();
    let ready = scoped(ctx, systemd, launch, pid, limits)
        .and_then(|()| wait(&root, &watch, &mut child))
        .and_then(|()| jail::let_in(&root))
        .and_then(|()| jail::open(ctx, &root));
    let facts = Facts::read(&ctx.proc, pid);
    match (ready, facts) {
        (Ok(()), Some(facts)) => {
            spawn::adopt(child, launch.machine.clone());
            Ok((pid, facts.start_time))
        }
        (ready, _) => {
            // It is this process's child and not reaped yet, so the number is still its own.
            let _ = child.kill();
            let _ = child.wait();
            if systemd {
                let _ = scope::end(ctx, &launch.machine);
            }
            ready?;
            Err(error(HelperCode::Failed, "the engine ended as soon as it was ready"))
        }
    }
}

fn scoped(ctx: &Ctx, systemd: bool, launch: &Launch, pid: u32, limits: Limits) -> Result<(), HelperError> {
    if systemd {
        scope::start(ctx, &launch.machine, Kind::Engine, pid, limits, &|| Ok(()))?;
    }
    Ok(())
}

/// The jailer's arguments.
fn arguments(ctx: &Ctx, launch: &Launch, cgroup: Vec<String>) -> Vec<String> {
    let uid = jail_uid(launch.slot).to_string();
    let text = |path: &std::path::Path| path.display().to_string();
    let mut all = vec!["--id".to_owned(), launch.machine.to_string()];
    all.extend(["--exec-file".to_owned(), text(&ctx.record.firecracker.firecracker)]);
    all.extend(["--uid".to_owned(), uid.clone(), "--gid".to_owned(), uid]);
    all.extend(["--chroot-base-dir".to_owned(), text(&ctx.layout.jails())]);
    all.extend([
        "--resource-limit".to_owned(),
        format!("fsize={}", file_limit(launch.memory_mib)),
    ]);
    all.extend(cgroup);
    // What follows is the engine's. Its default is to log every request; what is worth a word is kept.
    let engine = ["--", "--api-sock", &format!("/{}", names::jail::API), "--level", "Warn"];
    all.extend(engine.map(str::to_owned));
    all
}

/// The longest file that an engine may write, in bytes: its memory is the longest that it has to, and some more. Disks are block devices,
/// which the limit does not concern, its console and its metrics are pipes.
fn file_limit(memory_mib: u64) -> u64 {
    memory_mib.saturating_add(SPARE_FILE_MIB).saturating_mul(1 << 20)
}

/// Is told of what appears in the jail.
fn watch(root: &Dir) -> Result<OwnedFd, HelperError> {
    let what = |e| failed(format!("watch {}", root.path().display()), e);
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK).map_err(what)?;
    let events = inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO | inotify::WatchFlags::ONLYDIR;
    inotify::add_watch(&watch, root.path(), events).map_err(what)?;
    Ok(watch)
}

/// Waits until the API socket is there, or the engine is not.
fn wait(root: &Dir, watch: &OwnedFd, child: &mut Child) -> Result<(), HelperError> {
    let deadline = Instant::now() + START;
    let pidfd = find::hold(child.id()).ok_or_else(|| error(HelperCode::Failed, "the engine is gone already"))?;
    loop {
        let stat = root.stat_of(names::jail::API)?;
        if stat.is_some_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Socket) {
            return Ok(());
        }
        if let Ok(Some(status)) = child.try_wait() {
            let text = format!("the engine ended before its API socket was there ({status}); its output says why");
            return Err(error(HelperCode::Failed, text));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let text = format!("the engine's API socket was not there within {} s", START.as_secs());
            return Err(error(HelperCode::Failed, text));
        }
        wait_for(&[watch, &pidfd], left);
        let mut events = [0u8; 4096];
        let _ = rustix::io::read(watch, &mut events);
    }
}

/// Waits until one of some descriptors has something to say, or time is over.
fn wait_for(fds: &[&OwnedFd], time: Duration) {
    let mut fds: Vec<PollFd<'_>> = fds.iter().map(|fd| PollFd::new(*fd, PollFlags::IN)).collect();
    let time = Timespec::try_from(time).ok();
    // Interrupted or not: the caller looks at what it waits for, and at the time.
    let _ = poll(&mut fds, time.as_ref());
}

fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

/// Sends a signal to a machine's jailed engine.
pub(crate) fn signal(ctx: &Ctx, machine: &MachineId, signal: Signal) -> Result<(), HelperError> {
    use rustix::process::Signal as Number;
    let number = match signal {
        Signal::Term => Number::TERM,
        Signal::Kill => Number::KILL,
        Signal::Int => Number::INT,
        Signal::Hup => Number::HUP,
        Signal::Quit => Number::QUIT,
        Signal::Usr1 => Number::USR1,
        Signal::Usr2 => Number::USR2,
        Signal::Abrt => Number::ABORT,
    };
    match find::engine(ctx, machine) {
        Ok(engine) => send(&engine.pidfd, engine.pid, number),
        Err(_) => Ok(()),
    }
}

fn send(pidfd: &OwnedFd, pid: u32, number: rustix::process::Signal) -> Result<(), HelperError> {
    match rustix::process::pidfd_send_signal(pidfd, number) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(e) => Err(failed(format!("signal process {pid}"), e)),
    }
}

/// How a machine's jailed engine ended, where this process has started it and seen its end.
pub(crate) fn ended(machine: &MachineId) -> Option<EngineEnd> {
    spawn::ended(machine)
}

/// Opens a jail's sockets to the owner.
pub(crate) fn open(ctx: &Ctx, machine: &MachineId) -> Result<(), HelperError> {
    let none = |why: Missing| error(HelperCode::NotFound, format!("machine {machine} has no engine: {why}"));
    find::engine(ctx, machine).map_err(none)?;
    let root = find::root(ctx, machine).ok_or_else(|| none(Missing::NoJail))?;
    jail::open(ctx, &root)
}

/// Moves saved state out of a jail.
pub(crate) fn collect(ctx: &Ctx, machine: &MachineId, fds: Vec<OwnedFd>) -> Result<(), HelperError> {
    let into = fds.into_iter().next();
    let into = into.ok_or_else(|| error(HelperCode::BadRequest, "a directory is needed"))?;
    collect::collect(ctx, machine, into)
}

/// A process of the owner's, as the daemon names it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Theirs {
    /// Its number.
    pub(crate) pid: u32,
    /// When it started, in ticks.
    pub(crate) start_time: u64,
}

/// Puts an engine of the daemon's into a scope.
pub(crate) fn scope(
    ctx: &Ctx,
    machine: &MachineId,
    process: Theirs,
    memory_mib: u64,
) -> Result<Option<String>, HelperError> {
    let limits = Limits::owners(memory_mib);
    own_scope(ctx, machine, Kind::Engine, process, limits, |facts| {
        check_engine(facts, machine)
    })
}

/// Puts the shim of an engine into a scope. It is the owner's; what it is called the owner decides.
pub(crate) fn shim_scope(ctx: &Ctx, machine: &MachineId, process: Theirs) -> Result<Option<String>, HelperError> {
    own_scope(ctx, machine, Kind::Shim, process, Limits::SHIM, |_| Ok(()))
}

fn own_scope(
    ctx: &Ctx,
    machine: &MachineId,
    kind: Kind,
    process: Theirs,
    limits: Limits,
    check: impl Fn(&Facts) -> Result<(), &'static str>,
) -> Result<Option<String>, HelperError> {
    let pid = process.pid;
    let gone = || error(HelperCode::NotFound, format!("process {pid} is gone"));
    // Held before it is looked at. As long as it has not ended, its number is its own.
    let held = find::hold(pid).ok_or_else(gone)?;
    let still = || {
        let facts = Facts::read(&ctx.proc, pid).ok_or_else(gone)?;
        check_owners(&facts, ctx.record.owner.uid, process.start_time)
            .and_then(|()| check(&facts))
            .map_err(|why| error(HelperCode::Denied, format!("process {pid} is refused: {why}")))?;
        if has_ended(&held) { Err(gone()) } else { Ok(()) }
    };
    still()?;
    if !scope::available() {
        return Ok(None);
    }
    let made = scope::start(ctx, machine, kind, pid, limits, &still)?;
    if has_ended(&held) {
        // systemd takes a number. If it was another process's by then, that one is in the scope now, and would be ended with it.
        if made {
            scope::take_back(ctx, machine, kind)?;
        }
        return Err(gone());
    }
    Ok(Some(kind.unit(machine)))
}

/// Whether a process is the owner's, and the one that is meant.
fn check_owners(facts: &Facts, owner: u32, start_time: u64) -> Result<(), &'static str> {
    if facts.start_time != start_time {
        Err("it did not start at that time")
    } else if facts.uids != [owner; 4] {
        Err("it is not the owner's")
    } else {
        Ok(())
    }
}

/// Whether a process of the owner's is called as this machine's engine is.
fn check_engine(facts: &Facts, machine: &MachineId) -> Result<(), &'static str> {
    if facts.comm == format!("{OWNERS}{}", machine.short()) {
        Ok(())
    } else {
        Err("it is not this machine's engine")
    }
}

/// Kills a machine's jailed engine and waits until it is gone. None there is fine.
pub(crate) fn end(ctx: &Ctx, machine: &MachineId) -> Result<(), HelperError> {
    let deadline = Instant::now() + END;
    for _ in 0..KILLS {
        let (pid, pidfd) = match find::engine(ctx, machine) {
            Ok(engine) => (engine.pid, engine.pidfd),
            // On its way to becoming one. Its arguments are root's word, so the number is enough.
            Err(_) => match find::jailer(&ctx.proc, machine).and_then(|pid| Some((pid, find::hold(pid)?))) {
                Some(jailer) => jailer,
                None => return Ok(()),
            },
        };
        send(&pidfd, pid, rustix::process::Signal::KILL)?;
        let left = deadline.saturating_duration_since(Instant::now());
        wait_for(&[&pidfd], left);
        if Instant::now() >= deadline {
            let text = format!(
                "the engine (process {pid}) is still there {} s after it was killed",
                END.as_secs()
            );
            return Err(error(HelperCode::Failed, text));
        }
    }
    Err(error(
        HelperCode::Failed,
        format!("machine {machine} still has an engine after {KILLS} were killed"),
    ))
}

/// Closes the jails that an older helper has left open.
pub(crate) fn close_jails(ctx: &Ctx) -> Result<(), HelperError> {
    jail::close(ctx)
}

/// Refuses while an engine of a machine's runs, or a jail of it is there: its nodes lead to the machine's disks, opened or not yet.
pub(crate) fn check_none(ctx: &Ctx, machine: &MachineId) -> Result<(), HelperError> {
    let conflict = |text: String| Err(error(HelperCode::Conflict, text));
    match process(ctx, machine) {
        Some(pid) => conflict(format!(
            "the engine of machine {machine} (process {pid}) is still there"
        )),
        None if jail::all(ctx)?.contains(machine) => conflict(format!(
            "machine {machine} has a jail, with nodes of its disks; machine_remove removes both"
        )),
        None => Ok(()),
    }
}

/// The process that is a machine's jailed engine, or is on its way to becoming it.
fn process(ctx: &Ctx, machine: &MachineId) -> Option<u32> {
    match find::engine(ctx, machine) {
        Ok(engine) => Some(engine.pid),
        // The jail is made before the jailer is started.
        Err(Missing::NoJail) => None,
        Err(_) => find::jailer(&ctx.proc, machine),
    }
}

/// Removes a machine's scope with what runs in it. None there is fine.
pub(crate) fn end_scope(ctx: &Ctx, machine: &MachineId) -> Result<(), HelperError> {
    if scope::available() {
        scope::end(ctx, machine)
    } else {
        Ok(())
    }
}

/// Removes a machine's jail: directory and control group. None there is fine. The caller has seen that its engine has ended.
pub(crate) fn remove_jail(ctx: &Ctx, machine: &MachineId) -> Result<(), HelperError> {
    let mut failures = jail::remove(ctx, machine).err().unwrap_or_default();
    if !scope::available() {
        failures.extend(cgroup::remove(ctx, machine).err());
    }
    crate::dispatch::collected(format!("cannot remove the whole jail of machine {machine}"), failures)
}

/// Processes, jails, mounts, control groups and scopes that are banger's.
pub(crate) fn inventory(ctx: &Ctx) -> Result<Vec<HostObject>, HelperError> {
    let object = |kind, name: String, machine| HostObject { kind, name, machine };
    let mut objects = Vec::new();
    for (pid, machine) in find::all(&ctx.proc) {
        objects.push(object(
            ObjectKind::Process,
            format!("{} {pid}", names::FIRECRACKER),
            Some(machine),
        ));
    }
    for (path, machine) in cgroup::all(ctx) {
        objects.push(object(ObjectKind::Cgroup, path.display().to_string(), Some(machine)));
    }
    let jails = ctx.layout.jails();
    for machine in jail::all(ctx)? {
        let path = jails.join(names::FIRECRACKER).join(machine.as_str());
        objects.push(object(ObjectKind::Jail, path.display().to_string(), Some(machine)));
    }
    for path in jail::mounted(ctx, &jails.join(names::FIRECRACKER)) {
        let machine = path
            .strip_prefix(jails.join(names::FIRECRACKER))
            .ok()
            .and_then(|rest| MachineId::parse(rest.iter().next()?.to_str()?).ok());
        objects.push(object(ObjectKind::Mount, path.display().to_string(), machine));
    }
    Ok(objects)
}

//! Scopes of systemd: a machine's engine outside of every unit of banger's, with limits of its own.
//!
//! systemd is spoken to directly, by the socket that `systemctl` uses when root calls it: no bus daemon, no program in between, and the
//! answer comes when the scope is there.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use banger_system::helper::{HelperCode, HelperError};
use banger_system::id::MachineId;
use banger_system::names;

use super::cgroup::{self, Kind, Limits};
use super::dbus::{self, Message, Value, Writer};
use crate::ctx::{Ctx, error, failed};

/// Is there where systemd runs (`sd_booted`).
const BOOTED: &str = "/run/systemd/system";
const SOCKET: &str = "/run/systemd/private";
/// How long systemd may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a shim may take to end after its engine.
const LAST_SHIM: Duration = Duration::from_secs(3);
/// Between two tries while an old scope of the same name goes.
const BETWEEN: Duration = Duration::from_millis(20);

/// Whether systemd runs here.
pub(super) fn available() -> bool {
    Path::new(BOOTED).is_dir() && Path::new(SOCKET).exists()
}

/// What systemd said instead of yes.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    /// An error by its name.
    #[error("systemd refuses: {1} ({0})")]
    Named(String, String),
    /// The job did not succeed.
    #[error("systemd could not do it: {0}")]
    Job(String),
    /// The conversation.
    #[error("systemd does not answer: {0}")]
    Io(#[from] std::io::Error),
    /// It makes no sense.
    #[error("systemd answers what makes no sense")]
    Form,
}

struct Manager {
    stream: UnixStream,
    serial: u32,
    deadline: Instant,
}

impl Manager {
    fn connect() -> Result<Self, Refusal> {
        let stream = UnixStream::connect(SOCKET)?;
        let mut manager = Self {
            stream,
            serial: 0,
            deadline: Instant::now() + PATIENCE,
        };
        manager.patience()?;
        let user = rustix::process::geteuid().as_raw().to_string();
        let user: String = user.bytes().map(|b| format!("{b:02x}")).collect();
        manager
            .stream
            .write_all(format!("\0AUTH EXTERNAL {user}\r\n").as_bytes())?;
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") && line.len() < 256 {
            let mut byte = [0];
            manager.stream.read_exact(&mut byte)?;
            line.push(byte[0]);
        }
        if !line.starts_with(b"OK ") {
            return Err(Refusal::Form);
        }
        manager.stream.write_all(b"BEGIN\r\n")?;
        Ok(manager)
    }

    fn patience(&mut self) -> Result<(), Refusal> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into());
        }
        self.stream.set_read_timeout(Some(left))?;
        self.stream.set_write_timeout(Some(left))?;
        Ok(())
    }

    fn read(&mut self) -> Result<Message, Refusal> {
        self.patience()?;
        let mut fixed = [0; dbus::FIXED];
        self.stream.read_exact(&mut fixed)?;
        let rest = dbus::rest(&fixed).ok_or(Refusal::Form)?;
        let mut bytes = fixed.to_vec();
        bytes.resize(dbus::FIXED + rest, 0);
        self.stream.read_exact(&mut bytes[dbus::FIXED..])?;
        dbus::parse(&bytes).ok_or(Refusal::Form)
    }

    /// A call; then, where its answer is a job, that job's end.
    fn call(&mut self, member: &str, signature: &str, body: Writer, job: bool) -> Result<(), Refusal> {
        self.serial += 1;
        self.patience()?;
        self.stream
            .write_all(&dbus::call(self.serial, member, signature, body))?;
        let mut wanted: Option<String> = None;
        let mut over: Vec<(String, String)> = Vec::new();
        loop {
            let message = self.read()?;
            match message.kind {
                dbus::ERROR if message.reply_to == self.serial => {
                    let text = message.body.into_iter().next().unwrap_or_default();
                    return Err(Refusal::Named(message.error, text.chars().take(200).collect()));
                }
                dbus::RETURN if message.reply_to == self.serial => {
                    if !job {
                        return Ok(());
                    }
                    wanted = Some(message.body.into_iter().next().ok_or(Refusal::Form)?);
                }
                dbus::SIGNAL if message.member == "JobRemoved" => {
                    if let [_, path, _, result] = &message.body[..] {
                        over.push((path.clone(), result.clone()));
                    }
                }
                _ => {}
            }
            if let Some(path) = &wanted
                && let Some((_, result)) = over.iter().find(|(job, _)| job == path)
            {
                return match result.as_str() {
                    "done" => Ok(()),
                    other => Err(Refusal::Job(other.chars().take(40).collect())),
                };
            }
        }
    }
}

/// Puts a process into one of a machine's scopes; true if the scope was made now. One that is in it already stays there; one in which
/// something else runs is not touched. `still` says, before every try, whether the number is still the process that is meant.
pub(super) fn start(
    ctx: &Ctx,
    machine: &MachineId,
    kind: Kind,
    pid: u32,
    limits: Limits,
    still: &dyn Fn() -> Result<(), HelperError>,
) -> Result<bool, HelperError> {
    let unit = kind.unit(machine);
    let mut inside = cgroup::processes(ctx, machine, kind);
    if inside.contains(&pid) {
        return Ok(false);
    }
    // The shim of the machine's engine before this one is writing down how that ended.
    let deadline = Instant::now() + LAST_SHIM;
    while kind == Kind::Shim && !inside.is_empty() && Instant::now() < deadline {
        std::thread::sleep(BETWEEN);
        inside = cgroup::processes(ctx, machine, kind);
    }
    if !inside.is_empty() {
        return Err(error(
            HelperCode::Conflict,
            format!("something runs in the scope {unit}: {inside:?}"),
        ));
    }
    let deadline = Instant::now() + PATIENCE;
    loop {
        still()?;
        match start_once(machine, kind, pid, limits) {
            Ok(()) => return Ok(true),
            // One of a process that has ended, and so empty: it is cleared away, which systemd does in its own time.
            Err(Refusal::Named(name, _)) if name.ends_with(".UnitExists") && Instant::now() < deadline => {
                if cgroup::processes(ctx, machine, kind).is_empty() {
                    let stopped = Manager::connect().and_then(|mut manager| stop(&mut manager, &unit));
                    stopped.map_err(|e| failed(format!("end the old scope {unit}"), e))?;
                }
                std::thread::sleep(BETWEEN);
            }
            Err(Refusal::Named(name, _)) if name.ends_with(".UnitExists") => {
                return Err(error(
                    HelperCode::Conflict,
                    format!("the old scope {unit} is still there after {} s", PATIENCE.as_secs()),
                ));
            }
            Err(e) => return Err(failed(format!("make the scope {unit}"), e)),
        }
    }
}

fn start_once(machine: &MachineId, kind: Kind, pid: u32, limits: Limits) -> Result<(), Refusal> {
    let description = match kind {
        Kind::Engine => format!("banger, machine {machine}"),
        Kind::Shim => format!("banger, console of machine {machine}"),
    };
    let pids = [pid];
    let properties = [
        ("Description", Value::Text(&description)),
        ("Slice", Value::Text(names::SLICE)),
        ("PIDs", Value::Processes(&pids)),
        // Nothing is left of it when the process has ended, however that was.
        ("CollectMode", Value::Text("inactive-or-failed")),
        ("MemoryMax", Value::Number(limits.memory)),
        ("TasksMax", Value::Number(limits.tasks)),
        ("CPUWeight", Value::Number(limits.weight)),
    ];
    let mut body = Writer::default();
    body.string(&kind.unit(machine));
    body.string("fail");
    body.array(8, |w| {
        for (name, value) in &properties {
            w.structure();
            w.string(name);
            w.variant(value);
        }
    });
    body.array(8, |_| {});
    Manager::connect()?.call("StartTransientUnit", "ssa(sv)a(sa(sv))", body, true)
}

/// Kills what is in a scope, and ends it. None there is fine.
fn clear(unit: &str) -> Result<(), Refusal> {
    let mut manager = Manager::connect()?;
    let mut body = Writer::default();
    body.string(unit);
    body.string("all");
    body.u32(libc::SIGKILL as u32);
    let killed = manager.call("KillUnit", "ssi", body, false);
    if is_gone(&killed) {
        return Ok(());
    }
    stop(&mut manager, unit)
}

fn stop(manager: &mut Manager, unit: &str) -> Result<(), Refusal> {
    let mut body = Writer::default();
    body.string(unit);
    body.string("replace");
    let stopped = manager.call("StopUnit", "ss", body, true);
    if is_gone(&stopped) { Ok(()) } else { stopped }
}

fn is_gone(result: &Result<(), Refusal>) -> bool {
    matches!(result, Err(Refusal::Named(name, _)) if name.ends_with(".NoSuchUnit"))
}

/// Undoes a scope whose process had ended before it was there: what is in it instead goes back among its parent's processes, unharmed,
/// and the scope, empty, is ended.
pub(super) fn take_back(ctx: &Ctx, machine: &MachineId, kind: Kind) -> Result<(), HelperError> {
    let unit = kind.unit(machine);
    let inside = cgroup::processes(ctx, machine, kind);
    cgroup::give_back(ctx, &inside).map_err(|e| failed(format!("empty the scope {unit}"), e))?;
    let stopped = Manager::connect().and_then(|mut manager| stop(&mut manager, &unit));
    stopped.map_err(|e| failed(format!("end the scope {unit}"), e))
}

/// Ends a machine's scope with everything in it. None there is fine. Processes of others than the owner and the users of jails are no
/// engines: they are moved out, not ended.
pub(super) fn end(ctx: &Ctx, machine: &MachineId) -> Result<(), HelperError> {
    let unit = names::scope(machine);
    let foreign = cgroup::foreign(ctx, machine);
    cgroup::give_back(ctx, &foreign).map_err(|e| failed(format!("empty the scope {unit}"), e))?;
    clear(&unit).map_err(|e| failed(format!("end the scope {unit}"), e))
}

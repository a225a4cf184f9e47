//! Finding a machine's engine again, and being sure that it is the one.
//!
//! A process is a machine's engine when it is the one that the handles name (pid, start time, boot of the host) or the only one
//! of this user whose arguments name both the machine and its control socket, *and* the control socket belongs to it and
//! answers with the machine's id. Socket paths lie below a daemon's own directory, so daemons never take each other's.

use std::path::Path;

use banger_core::id::MachineId;
use banger_core::plan::MachinePaths;

use super::args::{self, PROCESS_PREFIX};
use super::{ENGINE, Qemu, control_error};
use crate::engine::{EngineError, Handles, Liveness};
use crate::host;
use crate::identity::{self, Expected, Mismatch, Process, Stat};
use crate::qmp::{Client, QmpError};

/// Whether a process was started as this machine's engine.
pub(super) fn names_machine(arguments: &[Vec<u8>], id: &MachineId, control: &Path) -> bool {
    has(arguments, "-name", &args::name_argument(id)) && names_control(arguments, control)
}

fn names_control(arguments: &[Vec<u8>], control: &Path) -> bool {
    args::control_argument(control).is_ok_and(|value| has(arguments, "-chardev", &value))
}

fn has(arguments: &[Vec<u8>], flag: &str, value: &str) -> bool {
    arguments
        .windows(2)
        .any(|w| w[0] == flag.as_bytes() && w[1] == value.as_bytes())
}

/// What [`Expected`] is for handles.
fn expected(handles: &Handles) -> Expected {
    Expected {
        pid: handles.pid,
        start_time: handles.start_time,
        comm_prefix: PROCESS_PREFIX.to_owned(),
    }
}

/// Opens the process that the handles name and verifies that it is that machine's engine.
pub(super) fn open(proc: &Path, handles: &Handles) -> Result<Process, Mismatch> {
    if host::boot_id(proc).map_err(Mismatch::Unclear)? != handles.host_boot_id {
        return Err(Mismatch::Gone("the host has been restarted since".to_owned()));
    }
    let process = Process::open(proc, &expected(handles))?;
    let arguments = identity::arguments(proc, handles.pid).unwrap_or_default();
    if names_control(&arguments, &handles.control) {
        return Ok(process);
    }
    // It may have ended between two looks.
    identity::verify(proc, &expected(handles))?;
    Err(Mismatch::Unclear(format!(
        "process {} was not started with {}",
        handles.pid,
        handles.control.display()
    )))
}

/// The same, as an error of the interface.
pub(super) fn open_or_refuse(proc: &Path, handles: &Handles) -> Result<Process, EngineError> {
    open(proc, handles).map_err(|mismatch| EngineError::NotOurs {
        pid: handles.pid,
        why: mismatch.why().to_owned(),
    })
}

/// Finds a machine's engine.
pub(super) async fn find(qemu: &Qemu, id: &MachineId, paths: &MachinePaths, handles: Option<&Handles>) -> Liveness {
    let proc = &qemu.options.roots.proc;
    let mut gone = None;
    if let Some(handles) = handles {
        match open(proc, handles) {
            Ok(_) => return answer(qemu, id, handles).await,
            Err(Mismatch::Unclear(why)) => return Liveness::Unclear(why),
            // The handles may be older than the machine's last start.
            Err(Mismatch::Gone(why)) => gone = Some(why),
        }
    }
    match search(proc, id, paths) {
        Err(why) => Liveness::Unclear(why),
        Ok(None) => Liveness::Gone(gone.unwrap_or_else(|| "no process of this machine was found".to_owned())),
        Ok(Some(found)) => answer(qemu, id, &found).await,
    }
}

/// Looks through the processes of this user.
pub(super) fn search(proc: &Path, id: &MachineId, paths: &MachinePaths) -> Result<Option<Handles>, String> {
    let control = paths.control_socket();
    let uid = rustix::process::getuid().as_raw();
    let all = identity::processes(proc, uid).map_err(|e| format!("cannot list {}: {e}", proc.display()))?;
    let mut found = Vec::new();
    for pid in all {
        let Ok(Some(stat)) = Stat::read(proc, pid) else {
            continue;
        };
        let matches = identity::arguments(proc, pid).is_some_and(|a| names_machine(&a, id, &control));
        if matches && !stat.ended() {
            found.push(stat);
        }
    }
    match found.as_slice() {
        [] => Ok(None),
        [stat] => Ok(Some(Handles {
            engine: ENGINE.to_owned(),
            pid: stat.pid,
            start_time: stat.start_time,
            host_boot_id: host::boot_id(proc)?,
            control,
            agent: paths.agent_socket(),
        })),
        several => {
            let pids: Vec<String> = several.iter().map(|s| s.pid.to_string()).collect();
            Err(format!(
                "several processes were started for this machine: {}",
                pids.join(", ")
            ))
        }
    }
}

/// Asks a process that fits whether it is the machine.
async fn answer(qemu: &Qemu, id: &MachineId, handles: &Handles) -> Liveness {
    let proc = &qemu.options.roots.proc;
    match verified_client(qemu, handles, Some(id)).await {
        Ok(_) => Liveness::Alive(handles.clone()),
        Err(fault) => match open(proc, handles) {
            Err(Mismatch::Gone(why)) => Liveness::Gone(why),
            Ok(_) if matches!(fault, ControlFault::Qmp(_)) => Liveness::Silent {
                handles: handles.clone(),
                why: format!("process {}: {fault}", handles.pid),
            },
            _ => Liveness::Unclear(format!("process {}: {fault}", handles.pid)),
        },
    }
}

/// What is wrong with a control connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum ControlFault {
    #[error("{}", chain(.0))]
    Qmp(#[from] QmpError),
    #[error("the control socket belongs to process {0}")]
    Peer(u32),
    #[error("the control socket answers as {0:?}")]
    Name(Option<String>),
}

fn chain(error: &QmpError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// Connects to the control socket and makes sure who is behind it.
pub(super) async fn verified_client(
    qemu: &Qemu,
    handles: &Handles,
    id: Option<&MachineId>,
) -> Result<Client, ControlFault> {
    let mut client = Client::connect(&handles.control, qemu.options.answer_timeout).await?;
    check(&mut client, handles.pid, id).await?;
    Ok(client)
}

/// Whether the other side is this process, and the machine of this id.
pub(super) async fn check(client: &mut Client, pid: u32, id: Option<&MachineId>) -> Result<(), ControlFault> {
    if let Some(peer) = client.peer().filter(|peer| *peer != pid) {
        return Err(ControlFault::Peer(peer));
    }
    if let Some(id) = id {
        let name = client.name().await?;
        if name.as_deref() != Some(&args::guest_name(id)) {
            return Err(ControlFault::Name(name));
        }
    }
    Ok(())
}

/// Connects for a command.
pub(super) async fn command_client(qemu: &Qemu, handles: &Handles) -> Result<Client, EngineError> {
    open_or_refuse(&qemu.options.roots.proc, handles)?;
    verified_client(qemu, handles, None).await.map_err(|fault| match fault {
        ControlFault::Qmp(error) => control_error(qemu, handles, error),
        other => EngineError::NotOurs {
            pid: handles.pid,
            why: other.to_string(),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(list: &[&str]) -> Vec<Vec<u8>> {
        list.iter().map(|w| w.as_bytes().to_vec()).collect()
    }

    #[test]
    fn machine_and_socket_must_both_be_named_exactly() {
        let id = MachineId::parse("0123456789abcdef").unwrap();
        let control = Path::new("/run/a/m/0123456789abcdef/control.sock");
        let name = args::name_argument(&id);
        let socket = args::control_argument(control).unwrap();
        assert!(names_machine(
            &words(&["qemu", "-name", &name, "-chardev", &socket]),
            &id,
            control
        ));
        for other in [
            words(&["qemu", "-name", &name]),
            words(&["qemu", "-chardev", &socket]),
            words(&["grep", &name, &socket]),
            words(&["qemu", "-name", &format!("{name}0"), "-chardev", &socket]),
            words(&["qemu", "-name", &name, "-chardev", &format!("{socket},x=y")]),
            Vec::new(),
        ] {
            assert!(!names_machine(&other, &id, control), "{other:?}");
        }
        // Another daemon's machine of the same id, below another directory.
        let elsewhere = Path::new("/run/b/m/0123456789abcdef/control.sock");
        assert!(!names_machine(
            &words(&["qemu", "-name", &name, "-chardev", &socket]),
            &id,
            elsewhere
        ));
    }
}

//! Engines and their shims leave the daemon's own unit: each gets a systemd scope, made by the root helper.

use std::io;
use std::path::Path;

use banger_core::id::MachineId;
use banger_system::helper::{Answer, Request};
use banger_vmm::Handles;
use banger_vmm::identity::{Stat, arguments, processes};

use super::Host;
use crate::blocking::blocking;
use crate::error;

impl Host {
    /// Moves the shim of a machine's engine out of the daemon's own unit: else a restart of the unit would find it left over, and what is
    /// sent to all of the unit's processes would end the console of every machine.
    pub async fn scope_shim(&self, id: &MachineId) {
        let Some(system) = self.get() else { return };
        let name = id.clone();
        let found = blocking(move || {
            find_shim(Path::new("/proc"), &name)
                .map_err(|e| error::io(format_args!("look for the shim of machine {name}"), e))
        })
        .await;
        let (pid, start_time) = match found {
            Ok(Some(found)) => found,
            // It has ended with its engine.
            Ok(None) => return,
            Err(e) => {
                tracing::warn!(machine = %id, error = %e.message, "the shim has no scope of its own");
                return;
            }
        };
        let request = Request::ShimScope {
            machine: id.clone(),
            pid,
            start_time,
        };
        match system.client.call(request).await {
            Ok(answer) => tracing::debug!(machine = %id, ?answer, "scope of the shim"),
            Err(e) => tracing::warn!(machine = %id, error = %e, "the shim has no scope of its own"),
        }
    }

    /// Moves an engine that the daemon started out of the daemon's own unit. That it could not be moved harms nobody but a limit.
    pub async fn scope(&self, id: &MachineId, handles: &Handles, memory_mib: u64) {
        let Some(system) = self.get() else { return };
        let request = Request::EngineScope {
            machine: id.clone(),
            pid: handles.pid,
            start_time: handles.start_time,
            memory_mib,
        };
        match system.client.call(request).await {
            Ok(Answer::Scope { unit }) => tracing::debug!(machine = %id, ?unit, "scope"),
            Ok(other) => tracing::warn!(machine = %id, ?other, "the root helper answered something else"),
            Err(e) => tracing::warn!(machine = %id, error = %e, "the engine has no scope of its own"),
        }
    }
}

/// Process and start time of the shim that keeps a machine's engine. It has the machine in its arguments.
fn find_shim(proc: &Path, id: &MachineId) -> io::Result<Option<(u32, u64)>> {
    let tag = format!("banger-{id}");
    let is_it = |pid: &u32| {
        arguments(proc, *pid).is_some_and(|words| {
            matches!(&words[..], [program, stage, machine] if program == b"banger-shim"
                && (stage == b"monitor" || stage == b"keep") && machine == tag.as_bytes())
        })
    };
    let all = processes(proc, rustix::process::getuid().as_raw())?;
    let Some(pid) = all.into_iter().find(is_it) else {
        return Ok(None);
    };
    Ok(Stat::read(proc, pid)?.map(|stat| (pid, stat.start_time)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shim_is_found_by_its_machine() {
        let tmp = tempfile::tempdir().unwrap();
        let id = MachineId::from_random([7; 8]);
        let process = |pid: u32, words: &[&str]| {
            let dir = tmp.path().join(pid.to_string());
            std::fs::create_dir(&dir).unwrap();
            std::fs::write(dir.join("cmdline"), format!("{}\0", words.join("\0"))).unwrap();
            let rest = "1 ".repeat(18);
            std::fs::write(dir.join("stat"), format!("{pid} (exe) S {rest}4711 0\n")).unwrap();
        };
        let tag = format!("banger-{id}");
        let other = format!("banger-{}", MachineId::from_random([8; 8]));
        process(40, &["banger-shim", "monitor", &other]);
        process(41, &["banger-shim", "exec", "/usr/bin/qemu", &tag]);
        process(42, &["/usr/bin/qemu", "-name", &tag]);
        assert_eq!(find_shim(tmp.path(), &id).unwrap(), None);
        process(43, &["banger-shim", "keep", &tag]);
        assert_eq!(find_shim(tmp.path(), &id).unwrap(), Some((43, 4711)));
    }
}

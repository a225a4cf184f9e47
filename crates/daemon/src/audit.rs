//! What banger has left on the host, against what its database says.
//!
//! Everything that belongs to a machine is marked with its id: engines by their arguments, sockets and files by the names of their
//! directories, and what root has made by the marks that the helper reads back. What is marked with an id that no row has, or is of a
//! kind that a machine in its state has not, is nobody's.
//!
//! Rows are read before and after looking: what was made or removed meanwhile is no orphan.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use banger_child::Worker;
use banger_core::id::MachineId;
use banger_core::state;
use banger_proto::api::{Audit, AuditMissing, AuditObject, MachineState};
use banger_proto::error::{ApiError, ErrorCode};
use banger_system::helper::ObjectKind;
use banger_vmm::{Liveness, identity};

use crate::blocking::blocking;
use crate::machine::adopt;
use crate::machine::live::Live;
use crate::machine::record::Presence;
use crate::machine::start::remove_dir;
use crate::machine::stop;
use crate::recover;
use crate::services::Services;

/// Something on the host that is banger's.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Found {
    kind: Kind,
    name: String,
    machine: Option<MachineId>,
}

/// Where it is, and so how it is removed.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    /// Root made it, or can tell; it goes by the machine's id.
    Host(ObjectKind),
    /// An engine of this user's.
    Engine,
    /// A directory of sockets.
    Sockets(PathBuf),
    /// A directory of lasting files. A machine at rest has one.
    Files(PathBuf),
    /// What was begun and not ended, whose making is told by something else than rows.
    Staging(PathBuf),
    /// A program that a daemon started for a while: it copies a disk, builds an image.
    Worker(Worker),
}

impl Kind {
    fn word(&self) -> &'static str {
        match self {
            Self::Host(kind) => kind.as_str(),
            Self::Engine | Self::Worker(_) => "process",
            Self::Sockets(_) => "socket",
            Self::Files(_) | Self::Staging(_) => "file",
        }
    }
}

/// What is known of machines.
type Known = BTreeMap<MachineId, MachineState>;

fn known(services: &Services) -> Known {
    services.machines().iter().map(|m| (m.id.clone(), m.state())).collect()
}

/// Why an object is nobody's, if it is: from what the rows said before and after it was seen.
///
/// `spared`: a machine without a row is made just now, or can be taken back.
fn judge(found: &Found, before: Option<MachineState>, after: Option<MachineState>, spared: bool) -> Option<String> {
    if let Kind::Worker(worker) = &found.kind {
        return (!worker.owned).then(|| "the daemon that started it has ended".to_owned());
    }
    let id = found.machine.as_ref()?;
    if spared || matches!(found.kind, Kind::Staging(_)) && (before.is_some() || after.is_some()) {
        return None;
    }
    let states = [before, after];
    if states == [None, None] {
        return Some(format!("there is no machine {id}"));
    }
    let may_have = |state: Option<MachineState>| match (&found.kind, state) {
        (Kind::Files(_), Some(_)) => true,
        (_, Some(state)) => state::may_have_engine(state) || state == MachineState::Creating,
        (_, None) => false,
    };
    if states.into_iter().any(may_have) {
        return None;
    }
    let state = after.or(before).map_or("gone", MachineState::as_str);
    Some(format!("machine {id} is {state}"))
}

/// Looks.
pub async fn look(services: &Services) -> Audit {
    let before = known(services);
    let mut blind = Vec::new();
    let found = collect(services, &mut blind).await;
    let missing = missing(services, Path::new("/sys"));
    let after = known(services);
    let spared = recover::spared(services);
    let objects: Vec<AuditObject> = found
        .into_iter()
        .map(|found| {
            let id = found.machine.as_ref();
            let state = |rows: &Known| id.and_then(|id| rows.get(id)).copied();
            let lent = id.is_some_and(|id| services.templates.is_building(id));
            let note = id.and_then(|id| spared.get(id)).cloned();
            AuditObject {
                kind: found.kind.word().to_owned(),
                orphan: judge(&found, state(&before), state(&after), lent || note.is_some()),
                note: note.or_else(|| doubt(services, &found)),
                machine: found.machine.as_ref().map(ToString::to_string),
                name: found.name,
                failed: None,
                removed: false,
            }
        })
        .collect();
    Audit {
        orphans: count(&objects),
        objects,
        missing,
        blind,
    }
}

/// What is to be said of an engine that does not answer.
fn doubt(services: &Services, found: &Found) -> Option<String> {
    let process = matches!(found.kind, Kind::Engine | Kind::Host(ObjectKind::Process));
    let m = services
        .machines()
        .into_iter()
        .find(|m| process && Some(&m.id) == found.machine.as_ref())?;
    match m.presence() {
        Presence::Doubtful { why, identified: true } => Some(format!(
            "the engine of `{0}` does not answer ({why}); to end it: banger vm kill --force {0}",
            m.name()
        )),
        Presence::Doubtful { why, .. } => Some(format!("the engine of `{}` cannot be verified: {why}", m.name())),
        _ => None,
    }
}

/// Taps that machines have been given and that somebody has removed: the engine holds one that leads nowhere, and only another start
/// gives it another.
pub fn missing(services: &Services, sys: &Path) -> Vec<AuditMissing> {
    if services.hosting.get().is_none() {
        return Vec::new();
    }
    let mut missing = Vec::new();
    for m in services.machines() {
        let row = m.row();
        let (Some(slot), "bridge") = (row.slot, row.spec.network.as_str()) else {
            continue;
        };
        let name = banger_system::net::tap(slot);
        let gone = || !sys.join("class/net").join(&name).exists();
        let runs = || matches!(m.state(), MachineState::Running | MachineState::Paused);
        // It may have been stopped while it was looked at.
        if runs() && gone() && runs() {
            missing.push(AuditMissing {
                kind: ObjectKind::Interface.as_str().to_owned(),
                name,
                machine: m.id.to_string(),
                why: format!("machine `{}` has no network", m.name()),
                hint: format!("banger vm restart {}", m.name()),
            });
        }
    }
    missing
}

fn count(objects: &[AuditObject]) -> u32 {
    let orphans = objects.iter().filter(|o| o.orphan.is_some() && !o.removed).count();
    u32::try_from(orphans).unwrap_or(u32::MAX)
}

async fn collect(services: &Services, blind: &mut Vec<String>) -> Vec<Found> {
    let mut found = Vec::new();
    if let Some(system) = services.hosting.get() {
        match system.inventory().await {
            Ok(objects) => found.extend(objects.into_iter().map(|object| Found {
                kind: Kind::Host(object.kind),
                name: object.name,
                machine: object.machine,
            })),
            Err(e) => blind.push(format!("what root has made: {}", e.message)),
        }
    }
    let (sockets, machines, templates) = (
        services.paths.machines_run(),
        services.paths.machines(),
        services.paths.templates(),
    );
    let state = services.paths.state.clone();
    let looked = blocking(move || {
        let mut found = Vec::new();
        let mut blind = Vec::new();
        match engines(Path::new("/proc"), &sockets) {
            Ok(engines) => found.extend(engines),
            Err(e) => blind.push(format!("processes: {e}")),
        }
        match banger_child::workers(Path::new("/proc"), &state) {
            Ok(workers) => found.extend(workers.into_iter().map(|worker| Found {
                name: format!("{} {}", worker.comm, worker.pid),
                machine: None,
                kind: Kind::Worker(worker),
            })),
            Err(e) => blind.push(format!("processes: {e}")),
        }
        found.extend(directories(&sockets, Kind::Sockets));
        found.extend(directories(&machines, Kind::Files));
        found.extend(staging(&templates));
        Ok::<_, ApiError>((found, blind))
    });
    match looked.await {
        Ok((more, failed)) => {
            found.extend(more);
            blind.extend(failed);
        }
        Err(e) => blind.push(e.message),
    }
    found
}

/// This user's processes that were started with a socket of a machine.
fn engines(proc: &Path, sockets: &Path) -> std::io::Result<Vec<Found>> {
    let uid = rustix::process::getuid().as_raw();
    let mut found = Vec::new();
    for pid in identity::processes(proc, uid)? {
        let Ok(Some(stat)) = identity::Stat::read(proc, pid) else {
            continue;
        };
        if stat.ended() {
            continue;
        }
        let arguments = identity::arguments(proc, pid).unwrap_or_default();
        if let Some(machine) = arguments.iter().find_map(|argument| machine_of(argument, sockets)) {
            found.push(Found {
                kind: Kind::Engine,
                name: format!("{} {}", stat.comm.escape_default(), pid),
                machine: Some(machine),
            });
        }
    }
    Ok(found)
}

/// The machine whose socket an argument names.
fn machine_of(argument: &[u8], sockets: &Path) -> Option<MachineId> {
    let text = std::str::from_utf8(argument).ok()?;
    let mark = format!("{}/", sockets.display());
    let at = text.find(&mark)? + mark.len();
    let id = text.get(at..at + 16)?;
    let ends = matches!(text.as_bytes().get(at + 16), None | Some(b'/' | b','));
    MachineId::parse(id).ok().filter(|_| ends)
}

fn directories(dir: &Path, kind: fn(PathBuf) -> Kind) -> Vec<Found> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let found = entries.map(|entry| Found {
        // What bears no id is not a machine's, and nothing here removes it.
        machine: entry.file_name().to_str().and_then(|n| MachineId::parse(n).ok()),
        name: entry.path().display().to_string(),
        kind: kind(entry.path()),
    });
    found.collect()
}

/// Templates that are being made, each with the id of the machine that boots for it.
fn staging(dir: &Path) -> Vec<Found> {
    let all = directories(dir, Kind::Staging).into_iter();
    let found = all.filter_map(|mut found| {
        let name = Path::new(&found.name).file_name()?.to_str()?;
        let rest = name.strip_prefix(".new-")?;
        found.machine = rest.rsplit_once('-').and_then(|(_, id)| MachineId::parse(id).ok());
        Some(found)
    });
    found.collect()
}

/// Looks, and removes what is nobody's.
pub async fn fix(services: &Arc<Services>) -> Audit {
    let before = look(services).await;
    // What is missing is not made: a machine's engine would not take it.
    if before.orphans == 0 {
        return before;
    }
    let mut failures: BTreeMap<String, String> = BTreeMap::new();
    let orphans = before.objects.iter().filter(|o| o.orphan.is_some());
    let mut machines: Vec<MachineId> = orphans
        .filter_map(|o| MachineId::parse(o.machine.as_deref()?).ok())
        .collect();
    machines.sort();
    machines.dedup();
    end_workers(&services.paths.state);
    for id in &machines {
        if let Err(e) = remove(services, id).await {
            tracing::error!(machine = %id, error = %e.message, details = ?e.details, "what is nobody's is not wholly removed");
            let details = e.details.iter().fold(e.message, |all, one| format!("{all}; {one}"));
            failures.insert(id.to_string(), details);
        }
    }
    let after = look(services).await;
    let still = |object: &AuditObject| {
        let same = |o: &&AuditObject| (&o.kind, &o.name, &o.machine) == (&object.kind, &object.name, &object.machine);
        after.objects.iter().find(same).is_some_and(|o| o.orphan.is_some())
    };
    let mut audit = before;
    for object in &mut audit.objects {
        if object.orphan.is_none() {
            continue;
        }
        if still(object) {
            let why = object.machine.as_ref().and_then(|id| failures.get(id)).cloned();
            object.failed = Some(why.unwrap_or_else(|| "it is still there".to_owned()));
        } else {
            object.removed = true;
        }
    }
    audit.orphans = count(&audit.objects);
    audit.blind = after.blind;
    audit.missing = after.missing;
    audit
}

/// Ends the programs that an earlier daemon started for this state and left behind.
pub fn end_workers(state: &Path) {
    let workers = banger_child::workers(Path::new("/proc"), state).unwrap_or_else(|error| {
        tracing::warn!(%error, "whether an earlier daemon left programs behind is not known");
        Vec::new()
    });
    for worker in workers.iter().filter(|worker| !worker.owned) {
        tracing::warn!(
            pid = worker.pid,
            comm = worker.comm,
            "a program that an earlier daemon left behind: ended"
        );
        if let Err(error) = banger_child::end(worker) {
            tracing::warn!(pid = worker.pid, %error, "it is not ended");
        }
    }
}

/// Removes what is left of a machine that is none, or that has no engine: engine, what root has, files.
async fn remove(services: &Arc<Services>, id: &MachineId) -> Result<(), ApiError> {
    let row = services.machines().into_iter().find(|m| m.id == *id);
    let idle = || {
        let m = services.machines().into_iter().find(|m| m.id == *id);
        let busy = |m: &Arc<crate::machine::Machine>| {
            state::may_have_engine(m.state()) || m.state() == MachineState::Creating || m.live().is_some()
        };
        !m.as_ref().is_some_and(busy)
            && !services.templates.is_building(id)
            && !recover::spared(services).contains_key(id)
    };
    if !idle() {
        return Ok(());
    }
    tracing::warn!(machine = %id, known = row.is_some(), "removing what is nobody's");
    let paths = services.paths.machine(id);
    match adopt::find(services, id, &paths, None, None).await {
        Liveness::Gone(_) => {}
        Liveness::Alive(handles) => {
            let engine = services.engine(&handles.engine).await?;
            stop::kill_now(&Live::new(id, engine, handles)).await?;
        }
        Liveness::Unclear(why) | Liveness::Silent { why, .. } => return Err(ApiError::new(ErrorCode::Engine, why)),
    }
    let released = match services.hosting.get() {
        Some(system) => system.remove_if(id, idle).await.map(drop),
        None => Ok(()),
    };
    if !idle() {
        return Ok(());
    }
    let mut removed = remove_dir(&paths.run);
    if row.is_none() {
        for staging in staging(&services.paths.templates()) {
            if let (Kind::Staging(path), true) = (&staging.kind, staging.machine.as_ref() == Some(id)) {
                removed = removed.and(remove_dir(path));
            }
        }
        let state = paths.state.clone();
        removed = removed.and(blocking(move || remove_dir(&state)).await);
    }
    released.and(removed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id() -> MachineId {
        MachineId::parse("00112233aabbccdd").unwrap()
    }

    fn found(kind: Kind) -> Found {
        Found {
            kind,
            name: "x".to_owned(),
            machine: Some(id()),
        }
    }

    #[test]
    fn what_no_row_knows_or_no_such_machine_has_is_nobodys() {
        use MachineState::{Creating, Running, Stopped, Stopping, Suspended};
        let tap = found(Kind::Host(ObjectKind::Interface));
        let files = found(Kind::Files("/m".into()));
        let orphan = |found: &Found, before, after| judge(found, before, after, false).is_some();
        assert!(orphan(&tap, None, None) && orphan(&files, None, None));
        assert!(orphan(&tap, Some(Stopped), Some(Stopped)) && orphan(&tap, Some(Suspended), Some(Suspended)));
        assert!(!orphan(&files, Some(Stopped), Some(Stopped)));
        // What changed while it was looked at is somebody's.
        for (before, after) in [
            (None, Some(Creating)),
            (Some(Stopping), Some(Stopped)),
            (Some(Stopping), None),
            (Some(Stopped), Some(Running)),
        ] {
            assert!(!orphan(&tap, before, after), "{before:?} {after:?}");
            assert!(!orphan(&files, before, after), "{before:?} {after:?}");
        }
        // A machine without a row, for as long as a template is made of it.
        assert_eq!(judge(&tap, None, None, true), None);
        // A program works for a daemon, or is left.
        let worker = |owned| Found {
            kind: Kind::Worker(Worker {
                pid: 1,
                start_time: 2,
                comm: "qemu".to_owned(),
                owned,
            }),
            name: "qemu 1".to_owned(),
            machine: None,
        };
        assert!(!orphan(&worker(true), None, None) && orphan(&worker(false), None, None));
        // What belongs to no machine belongs to the installation.
        let bridge = Found { machine: None, ..tap };
        assert_eq!(judge(&bridge, None, None, false), None);
    }

    #[test]
    fn an_engine_is_told_by_its_sockets() {
        let sockets = Path::new("/run/banger/m");
        let of = |text: &str| machine_of(text.as_bytes(), sockets);
        let socket = "socket,id=control,path=/run/banger/m/00112233aabbccdd/control.sock,server=on";
        assert_eq!(of(socket), Some(id()));
        assert_eq!(of("/run/banger/m/00112233aabbccdd/control.sock"), Some(id()));
        for foreign in [
            "/run/other/banger/m/x",
            "/run/banger/m/00112233aabbccddee/control.sock",
            "/run/banger/m/../x/control.sock",
            "/run/bangerx/m/00112233aabbccdd/control.sock",
            "",
        ] {
            assert_eq!(of(foreign), None, "{foreign}");
        }
    }
}

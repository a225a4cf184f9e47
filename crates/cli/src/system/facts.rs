//! What there is on this host, as far as an installation is concerned. Only looks.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use banger_core::config::Config;
use banger_system::install::{Firecracker, Installed, Owner, RECORD_VERSION, Record};
use banger_system::names::ALIAS_BRIDGE;
use banger_system::net::{DEFAULT_BRIDGE, Network};
use banger_system::overlap::{self, Block};
use banger_system::units::{self, KVM_GROUP, Setting, Unit};

use crate::error::{Error, Result};
use crate::system::files::{self, Content, Rights, look};
use crate::system::ground::Ground;
use crate::system::manager::{Manager, UnitState};
use crate::system::owner;

/// What is wanted.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wanted {
    /// `--owner`
    pub(crate) owner: Option<String>,
    /// Who called sudo.
    pub(crate) sudo_user: Option<String>,
    /// `--firecracker`
    pub(crate) firecracker: Option<PathBuf>,
    /// `--jailer`
    pub(crate) jailer: Option<PathBuf>,
    /// `--network`, address and prefix.
    pub(crate) network: Option<String>,
    /// When, of which version and commit.
    pub(crate) installed: Option<Installed>,
}

/// What there is.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    /// systemd runs this host.
    pub(crate) systemd: bool,
    /// It has control groups of version 2.
    pub(crate) cgroup2: bool,
    /// The record that is installed.
    pub(crate) record: Option<Record>,
    /// Why a record that is there cannot be read.
    pub(crate) broken_record: Option<String>,
    /// Why the configuration that is there cannot be read.
    pub(crate) broken_config: Option<String>,
    /// The record as it is to be.
    pub(crate) wanted: Record,
    /// Directories, outer ones first.
    pub(crate) dirs: Vec<DirFact>,
    /// Files, in the order in which they are written.
    pub(crate) files: Vec<FileFact>,
    /// Services.
    pub(crate) units: Vec<(Unit, UnitState)>,
    /// Units of the same name that a package brought.
    pub(crate) packaged: Vec<PathBuf>,
    /// The bridge is there and somebody else's.
    pub(crate) foreign_bridge: Option<String>,
    /// Why the network of the machines cannot be what it is to be.
    pub(crate) network_fault: Option<NetworkFault>,
    /// What is wrong with the programs of Firecracker that were named.
    pub(crate) engine_faults: Vec<String>,
    /// Socket of the owner's own daemon, if one listens.
    pub(crate) own_daemon: Option<PathBuf>,
}

/// Why the network of the machines cannot be what it is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NetworkFault {
    /// `--network` is no network.
    Wrong(String),
    /// `--network` and the configuration name different ones.
    Differs(String),
    /// It overlaps what the host has.
    Overlaps(String),
    /// None that an installation tries is free.
    NoneFree,
}

/// A directory.
#[derive(Debug, Clone)]
pub(crate) struct DirFact {
    /// Which.
    pub(crate) path: PathBuf,
    /// As it has to be.
    pub(crate) rights: Rights,
    /// As it is.
    pub(crate) found: Found,
}

/// What a file is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// A program, by name.
    Program(&'static str),
    /// The record.
    Record,
    /// A unit.
    Unit(Unit),
}

/// A file.
#[derive(Debug, Clone)]
pub(crate) struct FileFact {
    /// Which.
    pub(crate) path: PathBuf,
    /// As it has to be.
    pub(crate) rights: Rights,
    /// What it has to hold.
    pub(crate) content: Content,
    /// What it is for.
    pub(crate) role: Role,
    /// As it is.
    pub(crate) found: Found,
    /// What is there was put there by an installation.
    pub(crate) ours: bool,
}

/// How something is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Found {
    /// Not there.
    Absent,
    /// As it has to be.
    Same,
    /// There, with other content or rights.
    Differs(Rights),
    /// Something else has its name.
    Other(&'static str),
}

/// Looks.
pub(crate) fn read(ground: &Ground, wanted: &Wanted, manager: &dyn Manager) -> Result<Facts> {
    let layout = &ground.layout;
    let (record, broken_record) = match read_text(&layout.record())?.as_deref().map(Record::parse) {
        None => (None, None),
        Some(Ok(record)) => (Some(record), None),
        Some(Err(error)) => (None, Some(error.to_string())),
    };
    let owner = choose_owner(ground, wanted, record.as_ref())?;
    let firecracker = choose_engine(wanted, record.as_ref());
    let text = read_text(&layout.config())?.unwrap_or_default();
    let (configured, broken_config) = match Config::parse(&text) {
        Ok(config) => (config.network.net, None),
        Err(error) => (None, Some(error.to_string())),
    };
    let (network, network_fault) = choose_network(ground, wanted, configured, record.as_ref());
    let groups = read_text(&ground.host("etc/group"))?.unwrap_or_default();
    let setting = Setting {
        layout,
        owner: &owner,
        kvm_group: owner::has_group(&groups, KVM_GROUP),
    };
    let mut files = program_files(ground, record.is_some())?;
    let programs_differ = files.iter().any(|f| f.found != Found::Same);
    let installed = wanted.installed.clone().unwrap_or_else(|| Installed {
        at: String::new(),
        version: String::new(),
        commit: String::new(),
    });
    let fresh = Record {
        version: RECORD_VERSION,
        owner: owner.clone(),
        installed,
        network: network.clone(),
        firecracker,
    };
    // A record that says the same but for the time stays, unless programs are replaced.
    let wanted_record = match &record {
        Some(old) if !programs_differ && same(old, &fresh) => old.clone(),
        _ => fresh,
    };
    files.push(file(
        layout.record(),
        ground.root,
        0o644,
        Content::Text(wanted_record.text()),
        Role::Record,
        |_| true,
    )?);
    for unit in Unit::ALL {
        let content = Content::Text(unit.text(&setting));
        let ours = |path: &Path| read_text(path).ok().flatten().is_some_and(|t| units::is_ours(&t));
        files.push(file(
            unit.path(layout),
            ground.root,
            0o644,
            content,
            Role::Unit(unit),
            ours,
        )?);
    }
    let systemd = ground.host("run/systemd/system").is_dir();
    // Without systemd there is nobody to ask; that it is not there is told with everything else that is in the way.
    let state = |unit| {
        if systemd {
            manager.state(unit)
        } else {
            Ok(UnitState::default())
        }
    };
    let states = Unit::STARTED.map(|unit| Ok((unit, state(unit)?)));
    Ok(Facts {
        systemd,
        cgroup2: ground.host("sys/fs/cgroup/cgroup.controllers").is_file(),
        broken_record,
        broken_config,
        dirs: directories(ground, &owner)?,
        files,
        units: states.into_iter().collect::<Result<_>>()?,
        packaged: packaged(ground),
        foreign_bridge: foreign_bridge(ground, network.bridge()),
        network_fault,
        engine_faults: engine_faults(ground, wanted),
        own_daemon: own_daemon(ground, owner.uid),
        wanted: wanted_record,
        record,
    })
}

/// Who the owner is: who is named, else who it was, else who called sudo.
fn choose_owner(ground: &Ground, wanted: &Wanted, record: Option<&Record>) -> Result<Owner> {
    if wanted.owner.is_none()
        && let Some(record) = record
    {
        return Ok(record.owner.clone());
    }
    let name = wanted
        .owner
        .as_deref()
        .or(wanted.sudo_user.as_deref().filter(|u| *u != "root"))
        .ok_or_else(|| {
            Error::usage("whose machines shall they be? Nobody was named, and nobody called sudo")
                .hint("name the owner: banger system install --owner USER")
        })?;
    owner::find(ground.layout.root(), name)
}

/// The network of the machines: the one that is named, else the one that there is, else the first that overlaps nothing.
fn choose_network(
    ground: &Ground,
    wanted: &Wanted,
    configured: Option<Network>,
    record: Option<&Record>,
) -> (Network, Option<NetworkFault>) {
    let old = record.map(|record| &record.network);
    let bridge = configured.as_ref().or(old).map_or(DEFAULT_BRIDGE, Network::bridge);
    let named = match wanted.network.as_deref().map(|text| Network::parse(bridge, text)) {
        None => None,
        Some(Ok(named)) => Some(named),
        Some(Err(error)) => return (Network::default(), Some(NetworkFault::Wrong(error.to_string()))),
    };
    if let (Some(named), Some(configured)) = (&named, &configured)
        && named != configured
    {
        let fault = NetworkFault::Differs(configured.text());
        return (named.clone(), Some(fault));
    }
    let tables = std::fs::read_to_string(ground.host("proc").join(overlap::TABLES)).unwrap_or_default();
    // Where the bridge is there, what it has is banger's.
    let own = old.filter(|old| bridge_alias(ground, old.bridge()).as_deref() == Some(ALIAS_BRIDGE));
    let blocks: Vec<Block> = own.iter().map(|own| own.block()).collect();
    let Some(chosen) = named.or(configured).or_else(|| old.cloned()) else {
        return match overlap::choose(DEFAULT_BRIDGE, &tables, &blocks) {
            Some(free) => (free, None),
            None => (Network::default(), Some(NetworkFault::NoneFree)),
        };
    };
    if own == Some(&chosen) {
        return (chosen, None);
    }
    let fault = overlap::find(&chosen, &tables, &blocks).map(|why| {
        NetworkFault::Overlaps(format!(
            "the network {} of the machines cannot be: {why}",
            chosen.cidr()
        ))
    });
    (chosen, fault)
}

fn choose_engine(wanted: &Wanted, record: Option<&Record>) -> Firecracker {
    let kept = record.map(|r| r.firecracker.clone()).unwrap_or_default();
    Firecracker {
        firecracker: wanted.firecracker.clone().unwrap_or(kept.firecracker),
        jailer: wanted.jailer.clone().unwrap_or(kept.jailer),
    }
}

fn same(a: &Record, b: &Record) -> bool {
    a.owner == b.owner
        && a.network == b.network
        && a.firecracker == b.firecracker
        && a.installed.version == b.installed.version
        && a.installed.commit == b.installed.commit
}

fn read_text(path: &Path) -> Result<Option<String>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error)
            if matches!(
                error.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(None)
        }
        // What cannot be read is looked at as a file, and refused as such.
        Err(error) if error.kind() == std::io::ErrorKind::IsADirectory => Ok(None),
        Err(error) => Err(Error::io("read", path, error)),
    }
}

fn program_files(ground: &Ground, installed: bool) -> Result<Vec<FileFact>> {
    ground
        .programs
        .iter()
        .map(|program| {
            file(
                program.path(&ground.layout),
                ground.root,
                0o755,
                Content::Copy(program.source.clone()),
                Role::Program(program.name),
                |_| installed,
            )
        })
        .collect()
}

fn file(
    path: PathBuf,
    (uid, gid): (u32, u32),
    mode: u32,
    content: Content,
    role: Role,
    ours: impl Fn(&Path) -> bool,
) -> Result<FileFact> {
    let rights = Rights { mode, uid, gid };
    let (found, ours) = match look(&path)? {
        None => (Found::Absent, true),
        Some(there) if !there.is_file() => (Found::Other(kind(&there)), false),
        Some(there) => {
            let is = Rights::of(&there);
            if files::holds(&path, &content)? {
                // Identical is not foreign, whoever put it there.
                (if is == rights { Found::Same } else { Found::Differs(is) }, true)
            } else {
                (Found::Differs(is), ours(&path))
            }
        }
    };
    Ok(FileFact {
        path,
        rights,
        content,
        role,
        found,
        ours,
    })
}

fn kind(found: &Metadata) -> &'static str {
    if found.is_dir() {
        "a directory"
    } else if found.is_symlink() {
        "a symbolic link"
    } else if found.is_file() {
        "a file"
    } else {
        "a special file"
    }
}

fn directories(ground: &Ground, owner: &Owner) -> Result<Vec<DirFact>> {
    let layout = &ground.layout;
    let (root, owners) = (ground.root, (owner.uid, owner.gid));
    let all = [
        (layout.units(), 0o755, root, true),
        (layout.bin(), 0o755, root, true),
        (layout.libexec(), 0o755, root, false),
        (layout.etc(), 0o755, root, false),
        (layout.lib(), 0o711, root, false),
        (layout.state(), 0o700, owners, false),
        (layout.jails(), 0o711, root, false),
    ];
    let mut facts: Vec<DirFact> = Vec::new();
    for (path, mode, (uid, gid), shared) in all {
        // What is above and missing is made like any directory of the system.
        let mut above: Vec<&Path> = path.ancestors().skip(1).take_while(|p| !p.exists()).collect();
        above.reverse();
        for path in above {
            if facts.iter().all(|f| f.path != path) {
                facts.push(DirFact {
                    path: path.to_owned(),
                    rights: Rights {
                        mode: 0o755,
                        uid: root.0,
                        gid: root.1,
                    },
                    found: Found::Absent,
                });
            }
        }
        let rights = Rights { mode, uid, gid };
        let found = match look(&path)? {
            None => Found::Absent,
            // A shared one may be a link, as /bin is.
            Some(_) if shared && path.is_dir() => Found::Same,
            Some(there) if !there.is_dir() => Found::Other(kind(&there)),
            Some(there) if Rights::of(&there) == rights => Found::Same,
            Some(there) => Found::Differs(Rights::of(&there)),
        };
        facts.push(DirFact { path, rights, found });
    }
    Ok(facts)
}

fn packaged(ground: &Ground) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    for dir in ["usr/lib/systemd/system", "lib/systemd/system", "run/systemd/system"] {
        for unit in Unit::ALL {
            let path = ground.host(dir).join(unit.name());
            if path.is_file() && !found.iter().any(|p| p.canonicalize().ok() == path.canonicalize().ok()) {
                found.push(path);
            }
        }
    }
    found
}

fn foreign_bridge(ground: &Ground, bridge: &str) -> Option<String> {
    bridge_alias(ground, bridge)
        .filter(|alias| alias != ALIAS_BRIDGE)
        .map(|_| bridge.to_owned())
}

/// The alias of an interface; none where there is no such interface.
fn bridge_alias(ground: &Ground, name: &str) -> Option<String> {
    let dir = ground.host("sys/class/net").join(name);
    let alias = || std::fs::read_to_string(dir.join("ifalias")).unwrap_or_default();
    dir.exists().then(|| alias().trim().to_owned())
}

/// Root starts these programs: nobody else may be able to change them, nor to exchange them.
fn engine_faults(ground: &Ground, wanted: &Wanted) -> Vec<String> {
    [&wanted.firecracker, &wanted.jailer]
        .into_iter()
        .flatten()
        .filter_map(|path| engine_fault(path, ground.root.0).map(|why| format!("{} {why}", path.display())))
        .collect()
}

fn engine_fault(path: &Path, root: u32) -> Option<String> {
    if !path.is_absolute() {
        return Some("is not absolute".to_owned());
    }
    for hidden in ["/home", "/root", "/run/user"] {
        if path.starts_with(hidden) {
            return Some(format!("is below {hidden}, which the helper does not see"));
        }
    }
    let Ok(Some(found)) = look(path) else {
        return Some("is not there".to_owned());
    };
    if !found.is_file() {
        return Some(format!("is {}, not a file", kind(&found)));
    }
    if found.mode() & 0o111 == 0 {
        return Some("is not executable".to_owned());
    }
    path.ancestors().find_map(|part| {
        let found = look(part).ok().flatten()?;
        let whose = if part == path {
            String::new()
        } else {
            format!("is in {}, which ", part.display())
        };
        // A directory like /tmp lets nobody exchange what belongs to others.
        let sticky = found.is_dir() && found.mode() & 0o1000 != 0;
        if found.uid() != root && found.uid() != 0 {
            Some(format!("{whose}belongs to user {}, not to root", found.uid()))
        } else if found.mode() & 0o022 != 0 && !sticky && !found.is_symlink() {
            Some(format!("{whose}can be written to by others than root"))
        } else {
            None
        }
    })
}

fn own_daemon(ground: &Ground, uid: u32) -> Option<PathBuf> {
    [
        format!("run/user/{uid}/banger/bangerd.sock"),
        format!("tmp/banger-runtime-{uid}/bangerd.sock"),
    ]
    .iter()
    .map(|path| ground.host(path))
    .find(|path| std::os::unix::net::UnixStream::connect(path).is_ok())
}

//! An installation below a directory of its own, with a systemd that only remembers what it was told.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use banger_system::helper::{Answer, HostObject, ObjectKind, Request};
use banger_system::id::MachineId;
use banger_system::install::{Installed, Layout, Record};
use banger_system::net::Network;
use banger_system::units::Unit;

use crate::error::{Error, Kind, Result};
use crate::system::apply::carry_out;
use crate::system::facts::{self, Facts, Wanted};
use crate::system::ground::{Ground, PROGRAMS, Program};
use crate::system::manager::{Manager, UnitState};
use crate::system::plan::{Refusal, Step, plan};
use crate::system::remove::{self, Outcome};

#[derive(Default)]
struct Fake {
    active: RefCell<BTreeMap<&'static str, bool>>,
    enabled: RefCell<BTreeMap<&'static str, bool>>,
    heard: RefCell<Vec<String>>,
    /// What fails when it is asked for.
    broken: RefCell<Option<String>>,
    objects: RefCell<Vec<HostObject>>,
}

impl Fake {
    fn hear(&self, what: String) -> Result<()> {
        self.heard.borrow_mut().push(what.clone());
        if self.broken.borrow().as_deref() == Some(what.as_str()) {
            return Err(Error::failed(format!("`{what}` failed")));
        }
        Ok(())
    }

    fn take_heard(&self) -> Vec<String> {
        self.heard.take()
    }
}

impl Manager for Fake {
    fn state(&self, unit: Unit) -> Result<UnitState> {
        if self.broken.borrow().as_deref() == Some("state") {
            return Err(Error::failed("there is no systemctl"));
        }
        let is = |map: &RefCell<BTreeMap<&'static str, bool>>| map.borrow().get(unit.name()).copied().unwrap_or(false);
        Ok(UnitState {
            active: is(&self.active),
            enabled: is(&self.enabled),
            ..UnitState::default()
        })
    }
    fn reload(&self) -> Result<()> {
        self.hear("reload".to_owned())
    }
    fn enable(&self, unit: Unit) -> Result<()> {
        self.hear(format!("enable {}", unit.name()))?;
        self.enabled.borrow_mut().insert(unit.name(), true);
        Ok(())
    }
    fn disable(&self, unit: Unit) -> Result<()> {
        self.enabled.borrow_mut().insert(unit.name(), false);
        self.hear(format!("disable {}", unit.name()))
    }
    fn start(&self, unit: Unit) -> Result<()> {
        self.hear(format!("start {}", unit.name()))?;
        self.active.borrow_mut().insert(unit.name(), true);
        Ok(())
    }
    fn stop(&self, unit: Unit) -> Result<()> {
        self.active.borrow_mut().insert(unit.name(), false);
        self.hear(format!("stop {}", unit.name()))
    }
    fn restart(&self, unit: Unit) -> Result<()> {
        self.hear(format!("restart {}", unit.name()))
    }
    fn forget(&self, _unit: Unit) {}
    fn version(&self, _unit: Unit) -> Result<String, String> {
        Ok("1".to_owned())
    }
    fn helper(&self, request: Request) -> Result<Answer, String> {
        self.hear(request.name().to_owned()).map_err(|e| e.message)?;
        Ok(match request {
            Request::Inventory => Answer::Inventory {
                objects: self.objects.borrow().clone(),
            },
            _ => Answer::Done,
        })
    }
    fn log(&self, _unit: Unit) -> Vec<String> {
        Vec::new()
    }
}

/// A host of its own.
struct Host {
    dir: tempfile::TempDir,
    ground: Ground,
    fake: Fake,
    wanted: Wanted,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        // As root another user can be the owner; as anybody else only ourselves can own anything.
        let owner = if uid == 0 { (1000, 1000) } else { (uid, gid) };
        let host = Self {
            ground: Ground {
                layout: Layout::below(dir.path()),
                root: (uid, gid),
                programs: PROGRAMS
                    .into_iter()
                    .map(|(name, internal)| Program {
                        name,
                        internal,
                        source: dir.path().join("build").join(name),
                    })
                    .collect(),
            },
            fake: Fake::default(),
            wanted: Wanted {
                owner: Some("dev".into()),
                installed: Some(Installed {
                    at: "2026-11-22T10:00:00Z".into(),
                    version: "0.1.0".into(),
                    commit: "c1".into(),
                }),
                ..Wanted::default()
            },
            dir,
        };
        host.write(
            "etc/passwd",
            &format!(
                "root:x:0:0::/root:/bin/sh\ndev:x:{}:{}::/home/dev:/bin/sh\nother:x:4321:4321::/srv/other:/bin/sh\n",
                owner.0, owner.1
            ),
        );
        host.write("etc/group", "kvm:x:104:\n");
        host.write("sys/fs/cgroup/cgroup.controllers", "memory");
        for dir in ["run/systemd/system", "etc/systemd/system", "usr/local", "var/lib"] {
            std::fs::create_dir_all(host.path(dir)).unwrap();
        }
        for (name, _) in PROGRAMS {
            host.write(&format!("build/{name}"), &format!("program {name}"));
        }
        host
    }

    fn path(&self, below: &str) -> PathBuf {
        self.dir.path().join(below)
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn facts(&self) -> Result<Facts> {
        facts::read(&self.ground, &self.wanted, &self.fake)
    }

    fn plan(&self) -> Result<Vec<Step>, Vec<Refusal>> {
        plan(&self.facts().unwrap())
    }

    fn install(&self) -> Result<Vec<Step>> {
        let steps = self.plan().map_err(crate::system::plan::refused)?;
        carry_out(&self.ground.layout, &steps, &self.fake, |_| Ok(()))?;
        Ok(steps)
    }

    /// What is in the way.
    fn refused(&self) -> Vec<String> {
        self.plan()
            .err()
            .unwrap_or_default()
            .into_iter()
            .map(|r| r.what.replace(self.dir.path().to_str().unwrap(), ""))
            .collect()
    }

    /// Everything there is, with rights and content.
    fn tree(&self) -> Vec<String> {
        let mut all = Vec::new();
        walk(self.dir.path(), self.dir.path(), &mut all);
        all.sort();
        all
    }
}

fn walk(root: &Path, dir: &Path, all: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        let found = path.symlink_metadata().unwrap();
        let content = if found.is_file() {
            std::fs::read_to_string(&path).unwrap()
        } else {
            String::new()
        };
        let name = path.strip_prefix(root).unwrap().display().to_string();
        all.push(format!(
            "{name} {:o} {}:{} {content}",
            found.mode(),
            found.uid(),
            found.gid()
        ));
        if found.is_dir() {
            walk(root, &path, all);
        }
    }
}

fn words(steps: &[Step]) -> Vec<String> {
    steps
        .iter()
        .map(|s| {
            let words = s.words();
            let object = words.object.split(" (").next().unwrap();
            let name = object.rsplit('/').next().unwrap();
            format!("{} {name}", words.action)
        })
        .collect()
}

#[test]
fn a_fresh_host_gets_everything_and_a_second_run_changes_nothing() {
    let host = Host::new();
    let steps = host.install().unwrap();
    assert_eq!(
        words(&steps),
        [
            "create bin",
            "create lib",
            "create banger",
            "create banger",
            "create banger",
            "create state",
            "create jail",
            "create banger",
            "create bangerd",
            "create banger-helper",
            "create banger-shim",
            "create banger-agent",
            "create install.toml",
            "create banger.slice",
            "create banger-build@.service",
            "create banger-build.socket",
            "create bangerd-root.service",
            "create bangerd.service",
            "reload units of systemd",
            "enable bangerd-root.service",
            "enable banger-build.socket",
            "enable bangerd.service",
            "start bangerd-root.service",
            "start banger-build.socket",
            "start bangerd.service",
        ]
    );
    assert_eq!(
        host.fake.take_heard(),
        [
            "reload",
            "enable bangerd-root.service",
            "enable banger-build.socket",
            "enable bangerd.service",
            "start bangerd-root.service",
            "start banger-build.socket",
            "start bangerd.service",
        ]
    );
    let layout = &host.ground.layout;
    for (path, mode) in [
        (layout.etc(), 0o755),
        (layout.record(), 0o644),
        (layout.lib(), 0o711),
        (layout.state(), 0o700),
        (layout.jails(), 0o711),
        (layout.libexec().join("banger-helper"), 0o755),
        (layout.bin().join("bangerd"), 0o755),
        (Unit::Daemon.path(layout), 0o644),
    ] {
        let found = path.metadata().unwrap();
        assert_eq!(found.mode() & 0o7777, mode, "{}", path.display());
        let owner = if path == layout.state() {
            host.facts().unwrap().wanted.owner.uid
        } else {
            host.ground.root.0
        };
        assert_eq!(found.uid(), owner, "{}", path.display());
    }
    let record = Record::parse(&std::fs::read_to_string(layout.record()).unwrap()).unwrap();
    assert_eq!(
        (record.owner.user.as_str(), record.installed.commit.as_str()),
        ("dev", "c1")
    );
    assert!(
        std::fs::read_to_string(Unit::Daemon.path(layout))
            .unwrap()
            .contains("SupplementaryGroups=kvm")
    );

    // Again, at another time, by somebody who only called sudo.
    let before = host.tree();
    let mut again = host;
    again.wanted.owner = None;
    again.wanted.installed.as_mut().unwrap().at = "2027-01-01T00:00:00Z".into();
    assert_eq!(again.install().unwrap(), []);
    assert_eq!(again.tree(), before);
    assert_eq!(again.fake.take_heard(), [""; 0]);
}

#[test]
fn only_what_differs_is_changed_and_only_what_it_concerns_restarted() {
    type Change = fn(&mut Host);
    let cases: [(&str, Change, &[&str]); 11] = [
        (
            "the command line alone",
            |h| h.write("build/banger", "new"),
            &["replace banger", "replace install.toml"],
        ),
        (
            "the helper",
            |h| h.write("build/banger-helper", "new"),
            &[
                "replace banger-helper",
                "replace install.toml",
                "restart bangerd-root.service",
            ],
        ),
        (
            "the agent",
            |h| h.write("build/banger-agent", "new"),
            &[
                "replace banger-agent",
                "replace install.toml",
                "restart bangerd.service",
            ],
        ),
        (
            "a unit that was edited",
            |h| {
                let path = Unit::Helper.path(&h.ground.layout);
                let text = std::fs::read_to_string(&path).unwrap();
                std::fs::write(&path, text.replace("KillMode=process", "KillMode=mixed")).unwrap();
            },
            &[
                "replace bangerd-root.service",
                "reload units of systemd",
                "restart bangerd-root.service",
            ],
        ),
        (
            "a unit that is gone",
            |h| std::fs::remove_file(Unit::Slice.path(&h.ground.layout)).unwrap(),
            &["create banger.slice", "reload units of systemd"],
        ),
        (
            "rights of a directory",
            |h| std::fs::set_permissions(h.ground.layout.state(), PermissionsExt::from_mode(0o755)).unwrap(),
            &["set rights state"],
        ),
        (
            "rights of a program",
            |h| {
                let path = h.ground.layout.libexec().join("banger-helper");
                std::fs::set_permissions(path, PermissionsExt::from_mode(0o777)).unwrap();
            },
            &[
                "replace banger-helper",
                "replace install.toml",
                "restart bangerd-root.service",
            ],
        ),
        (
            "where Firecracker is",
            |h| {
                h.write("opt/fc", "engine");
                std::fs::set_permissions(h.path("opt/fc"), PermissionsExt::from_mode(0o755)).unwrap();
                h.wanted.firecracker = Some("/opt/fc".into());
            },
            &[],
        ),
        (
            "a version without other programs",
            |h| h.wanted.installed.as_mut().unwrap().commit = "c2".into(),
            &["replace install.toml"],
        ),
        (
            "a service that ended",
            |h| {
                h.fake.active.borrow_mut().insert(Unit::Daemon.name(), false);
            },
            &["start bangerd.service"],
        ),
        (
            "a service that was disabled",
            |h| {
                h.fake.enabled.borrow_mut().insert(Unit::Helper.name(), false);
            },
            &["enable bangerd-root.service"],
        ),
    ];
    for (name, change, expected) in cases {
        let mut host = Host::new();
        host.install().unwrap();
        host.wanted.installed.as_mut().unwrap().at = "later".into();
        change(&mut host);
        if expected.is_empty() {
            // It is looked for on the host itself, where it is not.
            assert_eq!(host.refused(), ["/opt/fc is not there"], "{name}");
            continue;
        }
        assert_eq!(words(&host.install().unwrap()), expected, "{name}");
        assert_eq!(host.install().unwrap(), [], "{name}: once");
    }
}

#[test]
fn without_systemd_nobody_is_asked_how_units_are() {
    let host = Host::new();
    std::fs::remove_dir_all(host.path("run/systemd")).unwrap();
    host.fake.broken.replace(Some("state".to_owned()));
    assert_eq!(host.refused(), ["systemd does not run this host"]);
}

#[test]
fn what_is_in_the_way_is_named_and_left_alone() {
    type Change = fn(&mut Host);
    let cases: [(Change, &str, Kind); 19] = [
        (
            |h| std::fs::remove_dir_all(h.path("run/systemd")).unwrap(),
            "systemd does not run",
            Kind::Unsupported,
        ),
        (
            |h| std::fs::remove_dir_all(h.path("sys/fs")).unwrap(),
            "control groups",
            Kind::Unsupported,
        ),
        (
            |h| h.write("etc/systemd/system/bangerd.service", "[Service]\nExecStart=/bin/true\n"),
            "/etc/systemd/system/bangerd.service is there and was not put",
            Kind::Conflict,
        ),
        (
            |h| h.write("usr/lib/systemd/system/bangerd.service", "[Service]\n"),
            "/usr/lib/systemd/system/bangerd.service is a unit",
            Kind::Conflict,
        ),
        (
            |h| h.write("usr/local/bin/banger", "another"),
            "/usr/local/bin/banger is there",
            Kind::Conflict,
        ),
        (
            |h| {
                std::fs::create_dir_all(h.path("usr/local/bin")).unwrap();
                symlink("/bin/true", h.path("usr/local/bin/bangerd")).unwrap();
            },
            "/usr/local/bin/bangerd is a symbolic link",
            Kind::Conflict,
        ),
        (
            |h| h.write("var/lib/banger", "a file"),
            "/var/lib/banger is a file, not a directory",
            Kind::Conflict,
        ),
        (
            |h| symlink(h.path("usr"), h.path("etc/banger")).unwrap(),
            "/etc/banger is a symbolic link, not a directory",
            Kind::Conflict,
        ),
        (
            |h| h.write("etc/banger/install.toml", "version = 9"),
            "install.toml, is not usable",
            Kind::Conflict,
        ),
        (
            |h| h.write("etc/banger/config.toml", "x = 1"),
            "configuration of the daemon is wrong",
            Kind::Invalid,
        ),
        (
            |h| h.write("sys/class/net/br-fc/ifalias", "\n"),
            "interface br-fc that is not banger's",
            Kind::Conflict,
        ),
        (
            |h| {
                h.write("etc/banger/config.toml", "[network]\nbridge = 'br-fc-2'");
                h.write("sys/class/net/br-fc-2/address", "x");
            },
            "interface br-fc-2",
            Kind::Conflict,
        ),
        (
            |h| h.wanted.network = Some("10.0.0.1/8".into()),
            "a prefix of /8 is not possible",
            Kind::Usage,
        ),
        (
            |h| {
                h.write("etc/banger/config.toml", "[network]\naddress = '10.9.0.1/24'");
                h.wanted.network = Some("10.8.0.1/24".into());
            },
            "not what /etc/banger/config.toml says: 10.9.0.1/24",
            Kind::Usage,
        ),
        (
            |h| {
                h.write("proc/net/fib_trie", LAN);
                h.wanted.network = Some("192.168.1.10/29".into());
            },
            "it overlaps 192.168.1.0/24",
            Kind::Conflict,
        ),
        (
            |h| h.write("etc/banger/config.toml", "[network]\naddress = '172.17.9.1/24'"),
            "which Docker takes by default",
            Kind::Conflict,
        ),
        (
            |h| h.write("proc/net/fib_trie", PRIVATE),
            "no network for the machines is free",
            Kind::Conflict,
        ),
        (
            |h| h.wanted.jailer = Some("jailer".into()),
            "jailer is not absolute",
            Kind::Invalid,
        ),
        (
            |h| h.wanted.jailer = Some("/home/x/jailer".into()),
            "below /home",
            Kind::Invalid,
        ),
    ];
    for (change, expected, kind) in cases {
        let mut host = Host::new();
        change(&mut host);
        let before = host.tree();
        let refused = host.refused();
        assert!(refused.iter().any(|r| r.contains(expected)), "{expected}: {refused:?}");
        assert_eq!(host.install().unwrap_err().kind, kind, "{expected}");
        assert_eq!(host.tree(), before, "{expected}");
        assert_eq!(host.fake.take_heard(), [""; 0], "{expected}");
    }
}

#[test]
fn several_things_in_the_way_are_told_at_once() {
    let host = Host::new();
    host.write("usr/local/bin/banger", "another");
    host.write("usr/local/bin/bangerd", "another");
    let error = host.install().unwrap_err();
    assert!(
        error.message.contains("2 things") && error.details.len() == 2,
        "{error:?}"
    );
    // What is identical is in nobody's way, whoever put it there.
    host.write("usr/local/bin/banger", "program banger");
    host.write("usr/local/bin/bangerd", "program bangerd");
    assert!(host.install().is_ok());
    // And what was our own bridge is one.
    host.write("sys/class/net/br-fc/ifalias", "banger:bridge\n");
    assert_eq!(host.refused(), [""; 0]);
}

#[test]
fn the_owner_is_who_was_named_or_called_sudo() {
    let mut host = Host::new();
    let owner = |host: &Host| host.facts().map(|f| f.wanted.owner.user);
    host.wanted.owner = None;
    assert_eq!(owner(&host).unwrap_err().kind, Kind::Usage);
    host.wanted.sudo_user = Some("root".into());
    assert!(owner(&host).unwrap_err().hint.unwrap().contains("--owner"));
    host.wanted.sudo_user = Some("dev".into());
    assert_eq!(owner(&host).unwrap(), "dev");
    host.wanted.owner = Some("root".into());
    assert!(owner(&host).unwrap_err().message.contains("root cannot"));
    host.wanted.owner = Some("nobody-of-that-name".into());
    assert_eq!(owner(&host).unwrap_err().kind, Kind::NotFound);
    host.wanted.owner = Some("dev".into());
    host.install().unwrap();
    // Another admin's sudo does not make it another's.
    host.wanted = Wanted {
        owner: None,
        sudo_user: Some("other".into()),
        ..host.wanted
    };
    assert_eq!(owner(&host).unwrap(), "dev");
    host.wanted.owner = Some("other".into());
    let refused = host.refused();
    assert!(
        refused.iter().any(|r| r.contains("installed for dev already")),
        "{refused:?}"
    );
}

/// Whatever fails, the host is as it was: files, rights, units, and services run as they did.
#[test]
fn a_step_that_fails_takes_back_all_before_it() {
    let fresh = Host::new;
    let updated = || {
        let mut host = Host::new();
        host.install().unwrap();
        for (name, _) in PROGRAMS {
            host.write(&format!("build/{name}"), "newer");
        }
        std::fs::remove_file(Unit::Slice.path(&host.ground.layout)).unwrap();
        std::fs::set_permissions(host.ground.layout.state(), PermissionsExt::from_mode(0o750)).unwrap();
        host.wanted.installed.as_mut().unwrap().commit = "c2".into();
        host
    };
    for (name, make) in [("fresh", &fresh as &dyn Fn() -> Host), ("updated", &updated)] {
        let count = make().plan().unwrap().len();
        assert!(count >= 9, "{name} {count}");
        for at in 0..count {
            let host = make();
            host.fake.take_heard();
            let before = host.tree();
            let states = |host: &Host| Unit::STARTED.map(|u| host.fake.state(u).unwrap());
            let services = states(&host);
            let steps = host.plan().unwrap();
            let mut step = 0;
            let error = carry_out(&host.ground.layout, &steps, &host.fake, |_| {
                step += 1;
                if step > at {
                    Err(Error::failed("the test says no"))
                } else {
                    Ok(())
                }
            })
            .unwrap_err();
            assert_eq!(error.message, "the test says no");
            assert_eq!(error.details.is_empty(), at == 0, "{name} {at}: {:?}", error.details);
            assert!(
                !error.details.iter().any(|d| d.contains("could not")),
                "{name} {at}: {:?}",
                error.details
            );
            assert_eq!(host.tree(), before, "{name}, step {at}");
            assert_eq!(states(&host), services, "{name}, step {at}");
        }
    }
}

#[test]
fn services_that_do_not_come_up_run_their_old_programs_again() {
    let host = Host::new();
    host.install().unwrap();
    let before = host.tree();
    host.fake.take_heard();
    host.write("build/banger-helper", "newer");
    host.write("build/bangerd", "newer");
    *host.fake.broken.borrow_mut() = Some("restart bangerd.service".to_owned());
    let error = host.install().unwrap_err();
    assert!(error.message.contains("restart bangerd.service"), "{error}");
    // It still fails when it is taken back, which is told, and does not keep the rest from being taken back.
    assert!(
        error.details.iter().any(|d| d.contains("could not take back")),
        "{error:?}"
    );
    let installed = |host: &Host| {
        let mut tree = host.tree();
        tree.retain(|line| !line.starts_with("build"));
        tree
    };
    let before: Vec<String> = before.into_iter().filter(|line| !line.starts_with("build")).collect();
    assert_eq!(installed(&host), before);
    let heard = host.fake.take_heard();
    assert_eq!(
        heard,
        [
            "restart bangerd-root.service",
            "restart bangerd.service",
            "restart bangerd-root.service",
            "restart bangerd.service",
        ]
    );
}

fn leftovers(host: &Host) -> Vec<String> {
    let mut tree = host.tree();
    tree.retain(|line| {
        [
            "etc/banger",
            "etc/systemd/system/",
            "usr/local/",
            "var/lib/",
            "run/banger",
            "dev/",
        ]
        .iter()
        .any(|p| line.starts_with(p))
    });
    tree.iter()
        .map(|line| line.split(' ').next().unwrap().to_owned())
        .collect()
}

fn uninstall(host: &Host, purge: bool) -> Outcome {
    let net = Network::default();
    let mut outcome = remove::clear_host(&host.ground, &host.fake, &net);
    remove::remove(&host.ground, &host.fake, purge, &mut outcome);
    outcome
}

#[test]
fn nothing_is_left_but_what_is_said() {
    for purge in [false, true] {
        let host = Host::new();
        host.install().unwrap();
        for path in [
            "var/lib/banger/state/banger.db",
            "run/banger/bangerd.sock",
            "run/banger-root/x",
            "dev/banger/x/root",
        ] {
            host.write(path, "x");
        }
        host.write("etc/banger/config.toml", "log_level = 'debug'");
        host.write("etc/systemd/system/bangerd.service.d/own.conf", "[Service]\n");
        let left = MachineId::parse("00112233aabbccdd").unwrap();
        host.fake.objects.borrow_mut().push(HostObject {
            kind: ObjectKind::Dm,
            name: "fc-x".into(),
            machine: Some(left),
        });
        host.fake.take_heard();
        let outcome = uninstall(&host, purge);
        assert_eq!(outcome.failed, [""; 0]);
        assert_eq!(
            host.fake.take_heard(),
            [
                "stop bangerd.service",
                "inventory",
                "machine_remove",
                "resolver_clear",
                "network_remove",
                "disable bangerd.service",
                "stop banger-build.socket",
                "disable banger-build.socket",
                "stop bangerd-root.service",
                "disable bangerd-root.service",
                "stop banger-build@.service",
                "stop banger.slice",
                "reload",
            ]
        );
        let mut expected = vec![
            "etc/systemd/system/bangerd.service.d",
            "etc/systemd/system/bangerd.service.d/own.conf",
            "usr/local/bin",
            "usr/local/lib",
        ];
        if !purge {
            expected.extend([
                "etc/banger",
                "etc/banger/config.toml",
                "var/lib/banger",
                "var/lib/banger/state",
            ]);
            expected.push("var/lib/banger/state/banger.db");
        }
        expected.sort_unstable();
        assert_eq!(leftovers(&host), expected);
        assert_eq!(outcome.kept.len(), if purge { 1 } else { 3 }, "{:?}", outcome.kept);
        // Once more: there is nothing to do.
        let again = uninstall(&host, purge);
        assert!(again.done.is_empty() && again.failed.is_empty(), "{again:?}");
    }
}

#[test]
fn what_cannot_be_removed_is_told_and_can_be_tried_again() {
    let host = Host::new();
    host.install().unwrap();
    *host.fake.broken.borrow_mut() = Some("network_remove".to_owned());
    let outcome = remove::clear_host(&host.ground, &host.fake, &Network::default());
    assert!(outcome.failed[0].contains("network br-fc"), "{outcome:?}");
    let error = remove::unfinished(&outcome).unwrap();
    assert!(error.details.len() == 1 && error.hint.is_some());
    // By force: the rest goes, the record stays until all has worked.
    let mut outcome = outcome;
    remove::remove(&host.ground, &host.fake, true, &mut outcome);
    assert!(host.ground.layout.record().exists() && !host.ground.layout.state().exists());
    *host.fake.broken.borrow_mut() = None;
    assert_eq!(uninstall(&host, true).failed, [""; 0]);
    assert_eq!(leftovers(&host), ["usr/local/bin", "usr/local/lib"]);
}

#[test]
fn a_unit_that_became_somebody_elses_stays() {
    let host = Host::new();
    host.install().unwrap();
    std::fs::write(Unit::Slice.path(&host.ground.layout), "[Unit]\n").unwrap();
    let outcome = uninstall(&host, true);
    assert!(outcome.kept[0].contains("banger.slice"), "{:?}", outcome.kept);
    assert!(Unit::Slice.path(&host.ground.layout).exists() && !host.ground.layout.record().exists());
}

#[test]
fn running_machines_are_seen_through_the_helper() {
    let host = Host::new();
    let id = |text: &str| MachineId::parse(text).unwrap();
    for (kind, machine) in [
        (ObjectKind::Process, Some(id("00112233aabbccdd"))),
        (ObjectKind::Dm, Some(id("ffffffffaabbccdd"))),
        (ObjectKind::Interface, None),
    ] {
        host.fake.objects.borrow_mut().push(HostObject {
            kind,
            name: "x".into(),
            machine,
        });
    }
    let running = remove::running(&host.fake).unwrap();
    assert_eq!(running, [id("00112233aabbccdd")]);
}

/// The host's own network.
const LAN: &str = "Main:\n     |-- 192.168.1.0\n        /24 link UNICAST\n";
/// A host that has a way to every private address.
const PRIVATE: &str = "Main:\n     |-- 10.0.0.0\n        /8 universe UNICAST\n     |-- 172.16.0.0\n        /12 universe UNICAST\n     \
                       |-- 192.168.0.0\n        /16 universe UNICAST\n";

#[test]
fn the_network_is_chosen_once_and_kept() {
    let network = |host: &Host| {
        let text = std::fs::read_to_string(host.ground.layout.record()).unwrap();
        Record::parse(&text).unwrap().network.text()
    };
    // A host that has the first one already.
    let mut host = Host::new();
    host.write(
        "proc/net/fib_trie",
        "Main:\n     |-- 172.16.0.0\n        /17 link UNICAST\n",
    );
    host.install().unwrap();
    assert_eq!(network(&host), "172.16.200.1/24");
    // With the bridge there, its own addresses are not in the way; nor is a network that the host joins later.
    host.write("sys/class/net/br-fc/ifalias", "banger:bridge\n");
    host.write(
        "proc/net/fib_trie",
        "Main:\n     |-- 172.16.200.0\n        /24 link UNICAST\n     |-- 172.16.0.0\n        /12 universe UNICAST\n",
    );
    assert_eq!(host.install().unwrap(), []);
    // Another one, named: both services read it.
    host.fake.take_heard();
    host.wanted.network = Some("10.77.0.1/20".into());
    host.install().unwrap();
    assert_eq!(network(&host), "10.77.0.1/20");
    let heard = host.fake.take_heard();
    assert!(
        heard.contains(&"restart bangerd-root.service".to_owned())
            && heard.contains(&"restart bangerd.service".to_owned()),
        "{heard:?}"
    );
    // The configuration is what counts from then on.
    host.wanted.network = None;
    host.write("etc/banger/config.toml", "[network]\naddress = '10.78.0.1/24'");
    host.install().unwrap();
    assert_eq!(network(&host), "10.78.0.1/24");
}

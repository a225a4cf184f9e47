//! Engines in a jail, with a jail of the test's own: what root would do, without root.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use banger_core::plan::Saved;
use banger_system::helper::{JailFile, Signal};
use banger_system::id::MachineId;
use banger_system::names::jail;
use banger_vmm::engine::BoxFuture;
use banger_vmm::firecracker::Firecracker;
use banger_vmm::identity::Stat;
use banger_vmm::jail::{Jail, JailLaunch};
use banger_vmm::{Engine, EngineError, EngineExit, Liveness, Steps, Still, VcpuState, console_tail, exit_record};
use rustix::fs::{CWD, FileType, Mode, mknodat, renameat};

use crate::bed::{Bed, KILL, driver, saved, skip, tests, until};
use crate::fake::{self, Fault, Script};
use crate::life::{ask, calls, plan};

tests!(from_launch_to_end, what_fails_leaves_nothing, without_a_key);

#[derive(Debug)]
struct Cells {
    dir: PathBuf,
    program: PathBuf,
    engines: Mutex<BTreeMap<String, Child>>,
    refuse: Mutex<bool>,
}

impl Jail for Cells {
    fn chroot(&self, id: &MachineId) -> PathBuf {
        self.dir.join("firecracker").join(id.as_str()).join("root")
    }

    fn launch(&self, launch: JailLaunch) -> BoxFuture<'_, Result<(u32, u64), EngineError>> {
        Box::pin(async move {
            if *self.refuse.lock().unwrap() {
                return Err(EngineError::Silent { engine: "jail" });
            }
            let chroot = self.chroot(&launch.id);
            fs::create_dir_all(&chroot).unwrap();
            for (kind, mut file) in launch.files {
                let name = match kind {
                    JailFile::Kernel => jail::KERNEL,
                    JailFile::Initrd => jail::INITRD,
                    JailFile::Memory => jail::MEMORY,
                    JailFile::State => jail::STATE,
                };
                std::io::copy(&mut file, &mut File::create(chroot.join(name)).unwrap()).unwrap();
            }
            for role in launch.disks {
                fs::write(chroot.join(jail::disk(role)), [0; 4096]).unwrap();
            }
            let mode = Mode::from_raw_mode(0o600);
            mknodat(CWD, chroot.join(jail::METRICS), FileType::Fifo, mode, 0).unwrap();
            let child = Command::new(&self.program)
                .args(["--id", launch.id.as_str(), "--api-sock", jail::API])
                .current_dir(&chroot)
                .stdin(Stdio::null())
                .stderr(launch.console.try_clone().unwrap())
                .stdout(launch.console)
                .spawn()
                .unwrap();
            let pid = child.id();
            fs::write(chroot.join(jail::PID), pid.to_string()).unwrap();
            self.engines.lock().unwrap().insert(launch.id.to_string(), child);
            until("the engine's name", || {
                Stat::read(Path::new("/proc"), pid)
                    .unwrap()
                    .is_none_or(|s| s.comm == "firecracker")
            })
            .await;
            let stat = Stat::read(Path::new("/proc"), pid).unwrap().unwrap();
            Ok((pid, stat.start_time))
        })
    }

    fn open<'a>(&'a self, id: &'a MachineId) -> BoxFuture<'a, Result<(), EngineError>> {
        Box::pin(async move {
            assert!(
                self.chroot(id).join(jail::AGENT).exists(),
                "it is opened when it is there"
            );
            Ok(())
        })
    }

    fn signal<'a>(&'a self, id: &'a MachineId, signal: Signal) -> BoxFuture<'a, Result<(), EngineError>> {
        Box::pin(async move {
            assert_eq!(signal, Signal::Kill);
            if let Some(child) = self.engines.lock().unwrap().get_mut(id.as_str()) {
                let _ = child.kill();
                child.wait().unwrap();
            }
            Ok(())
        })
    }

    fn ended<'a>(&'a self, id: &'a MachineId) -> BoxFuture<'a, Result<Option<EngineExit>, EngineError>> {
        Box::pin(async move {
            let mut engines = self.engines.lock().unwrap();
            let status = engines.get_mut(id.as_str()).and_then(|child| child.wait().ok());
            Ok(status.map(|status| EngineExit {
                code: status.code(),
                signal: status.signal(),
            }))
        })
    }

    fn collect<'a>(&'a self, id: &'a MachineId, into: File) -> BoxFuture<'a, Result<(), EngineError>> {
        Box::pin(async move {
            let chroot = self.chroot(id);
            for (from, to) in [(jail::NEW_MEMORY, "memory"), (jail::NEW_STATE, "state")] {
                renameat(CWD, chroot.join(from), into.as_fd(), to).unwrap();
            }
            Ok(())
        })
    }
}

impl Drop for Cells {
    fn drop(&mut self) {
        for child in self.engines.lock().unwrap().values_mut() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A driver that puts engines into jails. Its binary is one that root could start, so it must be root's.
fn cells(dir: &Path) -> Option<(Firecracker, Arc<Cells>)> {
    if !rustix::process::getuid().is_root() {
        skip("only root can make a file that is root's");
    }
    let programs = dir.join("bin");
    fs::create_dir(&programs).unwrap();
    fs::create_dir(programs.join("own")).unwrap();
    let cells = Arc::new(Cells {
        dir: dir.join("jail"),
        program: fake::install(&programs),
        engines: Mutex::default(),
        refuse: Mutex::default(),
    });
    let own = programs.join("own/firecracker");
    fs::copy(std::env::current_exe().unwrap(), &own).unwrap();
    let driver = driver(&own, |options| options.jail = Some(cells.clone()));
    Some((driver, cells))
}

async fn from_launch_to_end() {
    let dir = tempfile::tempdir().unwrap();
    let Some((driver, cells)) = cells(dir.path()) else {
        return;
    };
    let bed = Bed::new();
    let (id, paths) = (&bed.plan.id, &bed.plan.paths);
    let handles = bed.launch(&driver).await;
    let chroot = cells.chroot(id);
    assert_eq!(
        fs::read_link(paths.control_socket()).unwrap(),
        chroot.join("firecracker.socket")
    );
    assert!(paths.control_socket().as_os_str().len() < 107);
    for kept in [Some(&handles), None] {
        assert_eq!(driver.find(id, paths, kept).await, Liveness::Alive(handles.clone()));
    }
    // Links whose ends are known are made again.
    for kept in [Some(&handles), None] {
        fs::remove_dir_all(&paths.run).unwrap();
        assert_eq!(driver.find(id, paths, kept).await, Liveness::Alive(handles.clone()));
        assert!(paths.agent_socket().symlink_metadata().is_ok());
    }
    until("the console", || bed.console().contains("the guest's console")).await;
    assert_eq!(ask(&driver, &handles, &[b'p', 1, 11]).await, b'P');
    let metrics = driver.metrics(&handles, paths).await.unwrap().unwrap();
    assert_eq!(metrics["vmm"]["panic_count"], 0);
    assert_eq!(
        driver.writes_to(&handles).await.unwrap(),
        [chroot.join("root"), chroot.join("work")]
    );

    // What is saved comes out of the jail, and goes into another.
    let other_names = Saved {
        memory: dir.path().join("m"),
        state: dir.path().join("s"),
    };
    let error = driver
        .save(&handles, &plan(&other_names, None), Steps::none())
        .await
        .unwrap_err();
    assert!(matches!(error, EngineError::Unsupported { .. }), "{error:?}");
    let first = saved(dir.path(), "first");
    driver.save(&handles, &plan(&first, None), Steps::none()).await.unwrap();
    assert_eq!(driver.vcpu_state(&handles).await.unwrap(), VcpuState::Running);
    assert!(!chroot.join(jail::NEW_MEMORY).exists());
    let copy = Bed::of(&first);
    let second = copy.launch(&driver).await;
    assert_eq!(driver.vcpu_state(&second).await.unwrap(), VcpuState::Paused);
    driver.resume(&second, Still::Loaded).await.unwrap();
    assert_eq!(ask(&driver, &second, &[b'g', 1]).await, 11);
    ask(&driver, &second, &[b'p', 2, 22]).await;
    let again = saved(dir.path(), "again");
    driver
        .save(&second, &plan(&again, Some(&first)), Steps::none())
        .await
        .unwrap();
    let memory = fs::read(&again.memory).unwrap();
    assert_eq!((memory[4096], memory[8192], memory[12288]), (11, 22, 0));

    // Only what root passes on.
    assert!(
        driver
            .signal(&handles, rustix::process::Signal::STOP.as_raw())
            .await
            .is_err()
    );
    driver.signal(&handles, KILL).await.unwrap();
    driver.wait_exit(&handles).await;
    until("the exit record", || exit_record(paths).is_some()).await;
    let record = exit_record(paths).unwrap();
    assert_eq!((record.code, record.signal), (None, None));
    let killed = EngineExit {
        code: None,
        signal: Some(9),
    };
    assert_eq!(driver.ended(id).await, Some(killed));
    assert_eq!(console_tail(paths, 1), ["the guest's console"]);
    for kept in [Some(&handles), None] {
        assert!(matches!(driver.find(id, paths, kept).await, Liveness::Gone(_)));
    }
    until("the shim to go", || bed.processes().is_empty()).await;
    // The other is not touched.
    assert_eq!(ask(&driver, &second, b"x").await, b'x');
    driver.signal(&second, KILL).await.unwrap();
}

async fn what_fails_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let Some((driver, cells)) = cells(dir.path()) else {
        return;
    };
    let fails = async |bed: &Bed| {
        let error = driver.launch(&bed.plan).await.map(|h| panic!("{h:?}")).unwrap_err();
        bed.assert_nothing_left().await;
        error
    };
    let mut bed = Bed::new();
    bed.plan.slot = None;
    assert!(matches!(fails(&bed).await, EngineError::Unsupported { .. }));
    bed.plan.slot = Some(1);
    *cells.refuse.lock().unwrap() = true;
    assert!(matches!(fails(&bed).await, EngineError::Silent { engine: "jail" }));
    *cells.refuse.lock().unwrap() = false;
    for fault in [Fault::Refuse(400, "no".to_owned()), Fault::Crash, Fault::HangUp] {
        let bed = Bed::new();
        let chroot = cells.chroot(&bed.plan.id);
        fs::create_dir_all(&chroot).unwrap();
        let script = Script::with("PUT /vsock", fault.clone());
        fs::write(chroot.join("fake.json"), serde_json::to_vec(&script).unwrap()).unwrap();
        let error = fails(&bed).await;
        let fits = match fault {
            Fault::Crash => matches!(&error, EngineError::Died { how, .. } if how == "signal 6"),
            Fault::HangUp => matches!(error, EngineError::Io { .. }),
            _ => matches!(error, EngineError::Refused { .. }),
        };
        assert!(fits, "{fault:?}: {error:?}");
    }
    assert!(calls(&bed).is_empty());
}

async fn without_a_key() {
    let dir = tempfile::tempdir().unwrap();
    let Some((inside, _cells)) = cells(dir.path()) else {
        return;
    };
    let bed = Bed::new();
    let handles = bed.launch(&inside).await;
    // A driver without jails finds it, and leaves it alone.
    let other = dir.path().join("other");
    fs::create_dir(&other).unwrap();
    let outside = driver(&fake::install(&other), |_| {});
    let found = outside.find(&bed.plan.id, &bed.plan.paths, None).await;
    assert_eq!(found, Liveness::Alive(handles.clone()));
    let error = outside.signal(&handles, KILL).await.unwrap_err();
    assert!(matches!(error, EngineError::NotOurs { .. }), "{error:?}");
    inside.signal(&handles, KILL).await.unwrap();
}

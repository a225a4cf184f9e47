//! Machines for the tests of this driver: directories of their own, nothing left behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use banger_core::host::Accel;
use banger_core::id::MachineId;
use banger_core::plan::{BootPlan, Disk, DiskFormat, DiskRole, MachinePaths, Saved};
use banger_vmm::firecracker::{Firecracker, Options};
use banger_vmm::identity::{self, Expected, Process};
use banger_vmm::{Engine, Handles};
use libtest_mimic::{Completion, Failed};

pub const KILL: i32 = 9;

/// The shim beside the test binary, or where `BANGER_TEST_BIN` says.
pub fn shim() -> PathBuf {
    if let Some(dir) = std::env::var_os("BANGER_TEST_BIN") {
        return Path::new(&dir).join("banger-shim");
    }
    let me = std::env::current_exe().unwrap();
    me.parent().unwrap().parent().unwrap().join("banger-shim")
}

/// What a test ends with that cannot run here.
struct Skip(String);

/// Ends the test as skipped: it is counted so, with the reason.
pub fn skip(reason: &str) -> ! {
    std::panic::resume_unwind(Box::new(Skip(reason.to_owned())))
}

/// Runs a test that may skip itself.
pub fn completion(test: impl FnOnce()) -> Result<Completion, Failed> {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(test)) {
        Ok(()) => Ok(Completion::Completed),
        Err(panic) => match panic.downcast::<Skip>() {
            Ok(skip) => Ok(Completion::ignored_with(skip.0)),
            Err(panic) => std::panic::resume_unwind(panic),
        },
    }
}

/// A driver for a Firecracker.
pub fn driver(binary: &Path, change: impl FnOnce(&mut Options)) -> Firecracker {
    let mut options = Options::new(shim());
    options.binary = Some(binary.to_owned());
    change(&mut options);
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        match Firecracker::detect(options.clone()) {
            Ok(driver) => return driver,
            // A child of another test still holds a file that was just written.
            Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(20)),
            Err(e) => panic!("{e:?}"),
        }
    }
}

static COUNT: AtomicU64 = AtomicU64::new(1);

/// Directories and plan of one machine. What was launched in them ends with it.
pub struct Bed {
    pub dir: tempfile::TempDir,
    pub plan: BootPlan,
}

impl Bed {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let number = COUNT.fetch_add(1, Ordering::Relaxed) << 32 | u64::from(std::process::id());
        let id = MachineId::from_random(number.to_be_bytes());
        let paths = MachinePaths {
            state: dir.path().join("state"),
            run: dir.path().join("m").join(id.as_str()),
        };
        fs::create_dir_all(paths.disks()).unwrap();
        for name in ["kernel", "initrd"] {
            fs::write(dir.path().join(name), name).unwrap();
        }
        let plan = BootPlan {
            accel: Accel::Kvm,
            vcpu: 1,
            memory_mib: 2,
            kernel: dir.path().join("kernel"),
            initrd: dir.path().join("initrd"),
            cmdline: "console=ttyS0".to_owned(),
            disks: Vec::new(),
            network: None,
            slot: Some(3),
            resume: None,
            paths,
            id,
        };
        let mut bed = Self { dir, plan };
        for role in [DiskRole::Root, DiskRole::Work] {
            let path = bed.plan.paths.disks().join(format!("{}.raw", role.as_str()));
            fs::write(&path, [0; 4096]).unwrap();
            bed.plan.disks.push(raw(role, path));
        }
        bed
    }

    /// A machine that goes on with what was saved.
    pub fn of(saved: &Saved) -> Self {
        let mut bed = Self::new();
        bed.plan.memory_mib = fs::metadata(&saved.memory).unwrap().len() >> 20;
        bed.plan.resume = Some(saved.clone());
        bed
    }

    /// What its fake Firecracker does differently.
    pub fn script(&self, script: crate::fake::Script) {
        let text = serde_json::to_vec(&script).unwrap();
        fs::write(self.plan.paths.state.join("fake.json"), text).unwrap();
    }

    pub async fn launch(&self, driver: &Firecracker) -> Handles {
        driver.launch(&self.plan).await.unwrap_or_else(|e| panic!("{e:?}"))
    }

    /// Processes that were started for this machine: engines and shims.
    pub fn processes(&self) -> Vec<u32> {
        let proc = Path::new("/proc");
        let names = |arg: &Vec<u8>| String::from_utf8_lossy(arg).contains(self.plan.id.as_str());
        let all = identity::processes(proc, rustix::process::getuid().as_raw()).unwrap();
        all.into_iter()
            .filter(|pid| identity::arguments(proc, *pid).is_some_and(|a| a.iter().any(names)))
            .collect()
    }

    /// Nothing runs and nothing is there that reaches it.
    pub async fn assert_nothing_left(&self) {
        until("all processes of the machine to be gone", || {
            self.processes().is_empty()
        })
        .await;
        for path in [
            self.plan.paths.control_socket(),
            self.plan.paths.agent_socket(),
            self.plan.paths.state.join("engine"),
        ] {
            assert!(path.symlink_metadata().is_err(), "{} is left", path.display());
        }
    }

    pub fn console(&self) -> String {
        let bytes = fs::read(self.plan.paths.console_log()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let proc = Path::new("/proc");
        for pid in self.processes() {
            if let Ok(Some(stat)) = identity::Stat::read(proc, pid) {
                let expected = Expected {
                    pid,
                    start_time: stat.start_time,
                    comm_prefix: String::new(),
                };
                if let Ok(process) = Process::open(proc, &expected) {
                    let _ = process.signal(KILL);
                }
            }
        }
    }
}

/// A raw disk.
pub fn raw(serial: DiskRole, path: PathBuf) -> Disk {
    Disk {
        serial,
        path,
        format: DiskFormat::Raw,
        layers: Vec::new(),
        base: None,
    }
}

/// Where a machine is saved to: a directory of its own.
pub fn saved(dir: &Path, name: &str) -> Saved {
    let dir = dir.join(name);
    fs::create_dir(&dir).unwrap();
    Saved {
        memory: dir.join("memory"),
        state: dir.join("state"),
    }
}

/// Waits for a condition; fails naming it.
pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < end, "waited 60 s in vain for {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Runs every test that is asked for, as any other test program does.
pub fn run(args: &[String], tests: Vec<libtest_mimic::Trial>) -> std::process::ExitCode {
    let arguments = libtest_mimic::Arguments::from_iter(args);
    libtest_mimic::run(&arguments, tests).exit_code()
}

/// Asynchronous tests of a module, by name.
macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        pub fn tests() -> Vec<libtest_mimic::Trial> {
            vec![$(
                libtest_mimic::Trial::ignorable_test(concat!(module_path!(), "::", stringify!($name)), || {
                    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
                    crate::bed::completion(|| runtime.block_on($name()))
                }),
            )*]
        }
    };
}
pub(crate) use tests;

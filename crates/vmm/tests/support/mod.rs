//! Machines for the driver's tests: a kernel of a few bytes, directories of their own, nothing left behind.
#![allow(missing_docs, unreachable_pub, dead_code)]

pub mod guest;

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use banger_core::host::Accel;
use banger_core::id::MachineId;
use banger_core::plan::{BootPlan, Disk, DiskFormat, DiskRole, MachinePaths, NetworkKind, NetworkPlan};
use banger_vmm::identity::{self, Expected, Process};
use banger_vmm::qemu::{Options, Qemu};
use banger_vmm::{Engine, Handles};

pub const KILL: i32 = 9;

/// The driver, or `None` with a printed reason. Under `CI=true` a reason is a failure.
pub fn qemu() -> Option<Qemu> {
    qemu_that_answers_within(Options::new("").answer_timeout)
}

/// The same, with another limit for answers.
pub fn qemu_that_answers_within(limit: Duration) -> Option<Qemu> {
    let skip = |reason: String| {
        assert!(
            std::env::var_os("CI").is_none_or(|v| v != "true"),
            "under CI=true nothing may lack: {reason}"
        );
        eprintln!("skipped: {reason}");
        None
    };
    let shim = shim();
    if !shim.is_file() {
        return skip(format!(
            "{} has not been built (cargo build --release -p banger-shim)",
            shim.display()
        ));
    }
    let mut options = Options::new(shim);
    options.launch_timeout = Duration::from_secs(60);
    options.answer_timeout = limit;
    match Qemu::detect(options) {
        Ok(qemu) => Some(qemu),
        Err(e) => skip(e.to_string()),
    }
}

/// The driver with a program of the test's instead of QEMU.
pub fn impostor(dir: &Path, script: &str, limit: Duration) -> Qemu {
    let path = dir.join("impostor");
    let version = "case $1 in --version) echo QEMU emulator version 7.2.0; exit;; -L) exit;; esac";
    fs::write(&path, format!("#!/bin/sh\n{version}\n{script}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        let mut options = Options::new(shim());
        options.binary = Some(path.clone());
        options.launch_timeout = limit;
        match Qemu::detect(options) {
            Ok(qemu) => return qemu,
            // A child of another test still holds the file that was just written.
            Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(20)),
            Err(e) => panic!("{e}"),
        }
    }
}

/// The shim beside the test binary, or where `BANGER_TEST_BIN` says.
pub fn shim() -> PathBuf {
    if let Some(dir) = std::env::var_os("BANGER_TEST_BIN") {
        return Path::new(&dir).join("banger-shim");
    }
    let me = std::env::current_exe().unwrap();
    me.parent().unwrap().parent().unwrap().join("banger-shim")
}

/// A kernel: 32-bit code behind a PVH entry note, in the smallest ELF file that QEMU starts.
fn kernel(code: &[u8]) -> Vec<u8> {
    const BASE: u32 = 0x10_0000;
    const OFFSET: u32 = 0x1000;
    let words = |list: &[u32]| list.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
    let size = u32::try_from(code.len()).unwrap();
    let mut elf = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    elf.extend([2, 0, 3, 0]);
    elf.extend(words(&[1, BASE, 52, 0, 0]));
    elf.extend([52, 0, 32, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    elf.extend(words(&[1, OFFSET, BASE, BASE, size, size, 5, 0x1000]));
    elf.extend(words(&[4, 116, 0, 0, 20, 20, 4, 4]));
    elf.extend(words(&[4, 4, 18]));
    elf.extend(b"Xen\0");
    elf.extend(words(&[BASE]));
    elf.resize(OFFSET as usize, 0);
    elf.extend(code);
    elf
}

/// Code that prints a text on the serial port.
fn print(text: &str) -> Vec<u8> {
    let mut code = vec![0x66, 0xba, 0xf8, 0x03];
    for byte in text.bytes() {
        code.extend([0xb0, byte, 0xee]);
    }
    code
}

/// Prints a text and sleeps.
pub fn speaking_kernel(text: &str) -> Vec<u8> {
    let mut code = print(text);
    code.extend([0xf4, 0xeb, 0xfd]);
    kernel(&code)
}

/// Prints a text and resets the machine.
pub fn dying_kernel(text: &str) -> Vec<u8> {
    let mut code = print(text);
    // An empty interrupt table, then a breakpoint: a triple fault.
    code.extend([0x6a, 0, 0x6a, 0, 0x0f, 0x01, 0x1c, 0x24, 0xcc]);
    kernel(&code)
}

/// Prints `flood` lines without end.
pub fn flooding_kernel() -> Vec<u8> {
    let mut code = print("flood\n");
    let body = code.len() - 4;
    // A short jump back reaches 128 bytes.
    code.extend([0xeb, u8::try_from(256 - (body + 2)).unwrap()]);
    kernel(&code)
}

/// Answers on the guest channel: see [`guest`].
pub fn answering_kernel() -> Vec<u8> {
    kernel(&guest::code())
}

/// Sends a request to an answering guest and waits for as many bytes as its answer has.
pub async fn ask(qemu: &Qemu, handles: &Handles, request: &[u8], length: usize) -> Vec<u8> {
    let asking = async {
        let mut stream = qemu.connect_agent(handles).await.unwrap();
        exchange(&mut stream, request, length).await
    };
    match tokio::time::timeout(Duration::from_secs(30), asking).await {
        Ok(answer) => answer,
        Err(_) => panic!("no answer to {:?}", String::from_utf8_lossy(&request[..1])),
    }
}

/// The same over a connection that is there.
pub async fn exchange(stream: &mut tokio::net::UnixStream, request: &[u8], length: usize) -> Vec<u8> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    stream.write_all(request).await.unwrap();
    let mut answer = vec![0; length];
    stream.read_exact(&mut answer).await.unwrap();
    answer
}

/// An empty qcow2 file over a file that it names.
pub fn qcow2(below: &Path, size: u64) -> Vec<u8> {
    const CLUSTER: usize = 65536;
    let name = below.to_str().unwrap().as_bytes();
    let mut file = vec![0; 4 * CLUSTER];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb\0\0\0\x02");
    put(8, &104_u64.to_be_bytes());
    put(16, &u32::try_from(name.len()).unwrap().to_be_bytes());
    put(20, &16_u32.to_be_bytes());
    put(24, &size.to_be_bytes());
    put(36, &1_u32.to_be_bytes());
    put(40, &(3 * CLUSTER as u64).to_be_bytes());
    put(48, &(CLUSTER as u64).to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(104, name);
    put(CLUSTER, &(2 * CLUSTER as u64).to_be_bytes());
    put(2 * CLUSTER, &[0, 1, 0, 1, 0, 1, 0, 1]);
    file
}

/// A disk that writes to a new file in a directory, over layers and an image.
pub fn disk(serial: DiskRole, path: PathBuf, layers: &[&Path], base: &Path) -> Disk {
    let size = fs::metadata(base).unwrap().len();
    let mut file = fs::File::create_new(&path).unwrap();
    file.write_all(&qcow2(Path::new("/nonexistent/below"), size)).unwrap();
    Disk {
        serial,
        path,
        format: DiskFormat::Qcow2,
        layers: layers.iter().map(|p| p.to_path_buf()).collect(),
        base: Some(base.to_owned()),
    }
}

static COUNT: AtomicU64 = AtomicU64::new(0);

/// Directories and plan of one machine. What was launched in them ends with it.
pub struct Bed {
    pub dir: tempfile::TempDir,
    pub plan: BootPlan,
}

impl Bed {
    pub fn new(kernel: &[u8]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (file, initrd) = (dir.path().join("kernel"), dir.path().join("initrd"));
        fs::write(&file, kernel).unwrap();
        fs::write(&initrd, b"none").unwrap();
        let number = COUNT.fetch_add(1, Ordering::Relaxed) << 32 | u64::from(std::process::id());
        let id = MachineId::from_random(number.to_be_bytes());
        let paths = MachinePaths {
            state: dir.path().join("state"),
            run: dir.path().join("run"),
        };
        fs::create_dir(&paths.state).unwrap();
        let plan = BootPlan {
            accel: Accel::Tcg,
            vcpu: 1,
            memory_mib: 64,
            kernel: file,
            initrd,
            cmdline: "console=ttyS0".to_owned(),
            disks: Vec::new(),
            network: Some(NetworkPlan {
                kind: NetworkKind::User,
                mac: id.mac(),
            }),
            slot: None,
            resume: None,
            paths,
            id,
        };
        Self { dir, plan }
    }

    pub fn with_disk(mut self, disk: Disk) -> Self {
        self.plan.disks.push(disk);
        self
    }

    pub async fn launch(&self, qemu: &Qemu) -> Handles {
        qemu.launch(&self.plan).await.unwrap_or_else(|e| panic!("{e:?}"))
    }

    /// Processes that were started for this machine: engines and shims.
    pub fn processes(&self) -> Vec<u32> {
        let proc = Path::new("/proc");
        let name = banger_vmm::qemu::args::guest_name(&self.plan.id);
        let names = |arg: &Vec<u8>| String::from_utf8_lossy(arg).contains(&name);
        let all = identity::processes(proc, rustix::process::getuid().as_raw()).unwrap();
        all.into_iter()
            .filter(|pid| identity::arguments(proc, *pid).is_some_and(|a| a.iter().any(names)))
            .collect()
    }

    /// Nothing runs and no socket is there.
    pub async fn assert_nothing_left(&self) {
        until("all processes of the machine to be gone", || {
            self.processes().is_empty()
        })
        .await;
        assert!(!self.plan.paths.control_socket().exists());
        assert!(!self.plan.paths.agent_socket().exists());
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

/// Waits for a condition; fails naming it.
pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < end, "waited 60 s in vain for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

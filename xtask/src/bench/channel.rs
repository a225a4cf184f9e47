//! What the bare guest channel carries: the limit that throughput is held against.
//!
//! The engine is started with the very arguments of a real machine, but for its first process: that is this program, which is
//! linked statically. In the guest it loads the modules of the initramfs, opens the port of the agent and moves bytes, without
//! any protocol.
//!
//! ```text
//!   guest: BYTES zeros ────────▶ host      timed from the first byte to the last
//!   guest ◀──────── BYTES zeros: host      timed from the first byte to the answer
//!   guest: one byte ───────────▶ host
//! ```

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use banger_testkit::{TestEnv, processes};
use rustix::mount::{MountFlags, mount};

use super::Effort;
use super::engine::{self, Engine};
use super::figures::{Figure, Report, Unit};

/// Name of this program in the guest, by which it knows where it is.
const NAME: &str = "bench-init";
/// Bytes each way.
const BYTES: usize = 200_000_000;
/// Bytes of one call: as much as the agent sends at once.
const PIECE: usize = 64 * 1024;

/// Whether this process is the first of a guest.
pub(crate) fn is_guest() -> bool {
    std::process::id() == 1 && std::env::args().next().is_some_and(|a| a.ends_with(NAME))
}

/// The guest's side. Ends with the machine.
pub(crate) fn guest() -> io::Result<()> {
    mount("none", "/dev", "devtmpfs", MountFlags::empty(), None)?;
    mount("none", "/sys", "sysfs", MountFlags::empty(), None)?;
    for name in std::fs::read_to_string("/modules/order")?.lines() {
        let module = File::open(Path::new("/modules").join(name))?;
        // One that is there already, or is not for this machine, is no loss.
        let _ = rustix::system::finit_module(module, c"", 0);
    }
    let find = || {
        std::fs::read_dir("/sys/class/virtio-ports")
            .ok()?
            .flatten()
            .next()
            .map(|e| e.file_name())
    };
    let mut found = None;
    processes::until("the port", Duration::from_secs(20), || {
        found = find();
        found.is_some()
    });
    let path = Path::new("/dev").join(found.unwrap_or_default());
    let mut port = File::options().read(true).write(true).open(path)?;
    let mut piece = vec![0; PIECE];
    for _ in 0..BYTES / PIECE {
        port.write_all(&piece)?;
    }
    let mut left = BYTES / PIECE * PIECE;
    while left > 0 {
        let most = left.min(PIECE);
        left -= port.read(&mut piece[..most])?;
    }
    port.write_all(b"k")?;
    std::thread::sleep(Duration::from_secs(60));
    Ok(())
}

/// The host's side.
pub(super) fn run(effort: Effort, report: &mut Report) {
    let env = TestEnv::new("bench-channel");
    env.banger(["vm", "create", "--cold", "--name", "m"]).deadline(180).ok();
    let words = engine::words(&env, "m");
    // Its disks are free, its sockets gone.
    env.ok("vm kill m");
    let id = env.machine("m")["id"].as_str().unwrap_or_default().to_owned();
    let sockets = env.runtime().join("bench");
    std::fs::create_dir(&sockets).expect("a directory for sockets");
    let (mut out, mut back) = (Vec::new(), Vec::new());
    for _ in 0..effort.samples(3, 1) {
        let (a, b) = measure(&env, &words, &id, &sockets).expect("the channel");
        let rate = |t: Duration| (BYTES / PIECE * PIECE) as f64 / 1e6 / t.as_secs_f64();
        out.push(rate(a));
        back.push(rate(b));
    }
    let figures = [
        ("bare channel, guest to host", "guest to host, standard output", out),
        ("bare channel, host to guest", "host to guest, standard input", back),
    ];
    for (name, through_sessions, samples) in figures {
        let figure = Figure::new(name, Unit::MegabytesPerSecond, samples);
        report.add(match report.find(through_sessions) {
            Some(other) => figure.against(other),
            None => figure,
        });
    }
    std::fs::remove_dir_all(&sockets).expect("the directory of sockets goes");
    env.close();
}

fn measure(env: &TestEnv, words: &[String], id: &str, sockets: &Path) -> io::Result<(Duration, Duration)> {
    let old = env.runtime().join("m").join(id);
    let initrd = env.work().join("initrd");
    let mut args: Vec<String> = words
        .iter()
        .map(|w| w.replace(&*old.to_string_lossy(), &sockets.to_string_lossy()))
        .collect();
    let at = |flag: &str| {
        words
            .iter()
            .position(|w| w == flag)
            .map(|i| i + 1)
            .ok_or(io::ErrorKind::NotFound)
    };
    let archive = at("-initrd")?;
    let mut content = std::fs::read(&words[archive])?;
    append(&mut content, NAME, &std::fs::read("/proc/self/exe")?);
    std::fs::write(&initrd, content)?;
    args[archive] = initrd.display().to_string();
    let kernel_line = at("-append")?;
    args[kernel_line] = words[kernel_line].replace("rdinit=/init", &format!("rdinit=/{NAME}"));
    let agent = sockets.join("agent.sock");
    for name in ["agent.sock", "control.sock"] {
        let _ = std::fs::remove_file(sockets.join(name));
    }
    let console = File::create(env.work().join("console"))?;
    let mut command = Command::new(&args[0]);
    command
        .args(&args[1..])
        .stdin(Stdio::null())
        .stdout(console.try_clone()?)
        .stderr(console);
    let _engine = Engine(command.spawn()?);
    let mut connected = None;
    let connect = || {
        connected = UnixStream::connect(&agent).ok();
        connected.is_some()
    };
    if !processes::reached(Duration::from_secs(10), connect) {
        return Err(io::Error::other(std::fs::read_to_string(env.work().join("console"))?));
    }
    let mut stream = connected.ok_or(io::ErrorKind::NotConnected)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut piece = vec![0; 4 * PIECE];
    let mut left = BYTES / PIECE * PIECE;
    let mut begun = None;
    while left > 0 {
        let read = stream.read(&mut piece)?;
        begun.get_or_insert_with(Instant::now);
        if read == 0 || read > left {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        left -= read;
    }
    let out = begun.map(|b| b.elapsed()).unwrap_or_default();
    let begun = Instant::now();
    for _ in 0..BYTES / PIECE {
        stream.write_all(&piece[..PIECE])?;
    }
    stream.read_exact(&mut piece[..1])?;
    Ok((out, begun.elapsed()))
}

/// Appends an archive with one program to an uncompressed initramfs. The kernel unpacks one after the other.
fn append(archive: &mut Vec<u8>, name: &str, content: &[u8]) {
    archive.resize(archive.len().next_multiple_of(512), 0);
    for (name, mode, content) in [(name, 0o100_755, content), ("TRAILER!!!", 0, &[] as &[u8])] {
        let fields = [1, mode, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0];
        archive.extend_from_slice(b"070701");
        archive.extend(fields.iter().flat_map(|f| format!("{f:08x}").into_bytes()));
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(content);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
}

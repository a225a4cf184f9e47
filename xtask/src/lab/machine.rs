//! The emulator that the lab runs in, and the conversation with its guest.
//!
//! Nothing of a running lab has a name in the file system: its sockets are pairs, what it writes to its disks goes to a file that
//! QEMU has removed already, and the kernel ends it with its parent.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use banger_testkit::command::Stream;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::json;

use super::root::{Root, Saved};
use crate::bench::qmp::Qmp;

/// Raised when a saved lab does not fit the arguments below any more.
const FORM: u32 = 1;
const PROGRAM: &str = "qemu-system-x86_64";
/// AMD's virtualisation is what TCG emulates. Without the "fast string" bits, kernel and C library copy with vector registers, which
/// are emulated better.
const CPU: &str = "max,+svm,-erms,-fsrm";
const MEMORY: &str = "4096M";
/// The payload's disk has one size, so that a saved lab finds the one it knows.
pub(super) const PAYLOAD_SIZE: u64 = 8 << 30;

/// Time for a boot.
const BOOT: Duration = Duration::from_secs(180);
/// Time for an answer of the guest that is a matter of a moment.
const ANSWER: Duration = Duration::from_secs(60);
/// Time for saving memory and devices.
const SAVE: Duration = Duration::from_secs(120);

/// Where the guest's console goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Console {
    Collected,
    Terminal,
}

/// Where the guest's memory is.
enum Memory<'a> {
    Anonymous,
    /// In a file that keeps what is written.
    Kept(&'a Path),
    /// In a file that stays as it is.
    Private(&'a Path),
}

/// A running lab. It ends when this is dropped.
pub(super) struct Machine {
    child: Child,
    qmp: Qmp,
    port: Port,
    console: Option<Stream>,
    errors: Stream,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a saved lab has to fit: emulator, arguments, and the processor whose counter the guest reads.
pub(super) fn fits() -> Result<String, String> {
    let version = banger_testkit::Cmd::new(PROGRAM).arg("--version").run();
    if version.status != 0 {
        return Err(format!("{PROGRAM} tells no version: {}", version.err()));
    }
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo
        .lines()
        .find(|l| l.starts_with("model name"))
        .unwrap_or_default();
    Ok(format!(
        "{FORM}\n{}\n{model}\n{CPU}\n{MEMORY}\n{}\n",
        version.out().lines().next().unwrap_or_default(),
        cmdline()
    ))
}

/// The kernel line. Calibrating the counter hangs at random under emulation, so its rate is told; the rest is what costs an emulated
/// kernel most, see `banger_core::plan::cmdline`.
fn cmdline() -> String {
    let mut line = "console=ttyS0 root=/dev/vda rw panic=-1 net.ifnames=0 loglevel=4 mitigations=off norandmaps \
                    cryptomgr.notests lsm=landlock,yama,apparmor psi=0 i8042.noaux"
        .to_owned();
    if let Some(khz) = tsc_khz() {
        line.push_str(&format!(" tsc_early_khz={khz} tsc=reliable"));
    }
    line
}

/// Rate of the host's time stamp counter, from the kernel's statement of the processor's. That need not be the same on every machine:
/// none is told then, which is a matter of luck.
fn tsc_khz() -> Option<u64> {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let named = cpuinfo.lines().find(|l| l.starts_with("model name"))?;
    if let Some(ghz) = named.rsplit_once("@ ").and_then(|(_, g)| g.strip_suffix("GHz")) {
        return ghz.trim().parse::<f64>().ok().map(|g| (g * 1e6) as u64);
    }
    let mhz = cpuinfo.lines().find_map(|l| l.strip_prefix("cpu MHz"))?;
    let mhz: f64 = mhz.split_once(':')?.1.trim().parse().ok()?;
    Some((mhz * 1e3) as u64)
}

/// Arguments, but for the channels, whose descriptors are not known yet.
fn args(root: &Root, disk: &Path, keep: bool, payload: &Path, memory: &Memory<'_>) -> Vec<String> {
    let text = |path: &Path| path.display().to_string().replace(',', ",,");
    let drive = |id: &str, file: &Path, rest: &str| {
        let file = text(file);
        format!("id={id},if=none,format=raw,file={file},cache=unsafe,{rest}")
    };
    let memory = match memory {
        Memory::Anonymous => format!("memory-backend-ram,id=memory,size={MEMORY}"),
        Memory::Kept(file) => format!(
            "memory-backend-file,id=memory,size={MEMORY},share=on,mem-path={}",
            text(file)
        ),
        Memory::Private(file) => format!(
            "memory-backend-file,id=memory,size={MEMORY},share=off,mem-path={}",
            text(file)
        ),
    };
    let mut args: Vec<String> = ["-nodefaults", "-no-user-config", "-display", "none"]
        .map(str::to_owned)
        .into();
    for (option, value) in [
        ("-machine", "q35,memory-backend=memory,dump-guest-core=off".to_owned()),
        ("-accel", "tcg,thread=multi,tb-size=1024".to_owned()),
        ("-cpu", CPU.to_owned()),
        ("-smp", "2".to_owned()),
        ("-m", MEMORY.to_owned()),
        ("-object", memory),
        ("-kernel", root.kernel().display().to_string()),
        ("-initrd", root.initrd().display().to_string()),
        ("-append", cmdline()),
        (
            "-drive",
            drive("root", disk, if keep { "snapshot=off" } else { "snapshot=on" }),
        ),
        ("-device", "virtio-blk-pci,drive=root".to_owned()),
        ("-drive", drive("payload", payload, "readonly=on")),
        ("-device", "virtio-blk-pci,drive=payload".to_owned()),
        // A way out that leads nowhere.
        ("-netdev", "user,id=uplink,restrict=on,ipv6=off".to_owned()),
        ("-device", "virtio-net-pci,netdev=uplink".to_owned()),
        ("-object", "rng-random,id=entropy,filename=/dev/urandom".to_owned()),
        ("-device", "virtio-rng-pci,rng=entropy".to_owned()),
        ("-device", "virtio-serial-pci".to_owned()),
    ] {
        args.extend([option.to_owned(), value]);
    }
    args
}

/// A pair of sockets of which the child gets one.
struct Pair {
    ours: UnixStream,
    theirs: UnixStream,
}

impl Pair {
    fn new() -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty())?;
        Ok(Self { ours, theirs })
    }

    fn chardev(&self, id: &str) -> String {
        format!("socket,id={id},fd={}", self.theirs.as_raw_fd())
    }
}

impl Machine {
    /// Starts the emulator; the guest does not run yet when it is told to wait.
    fn spawn(mut args: Vec<String>, console: Console, scratch: &Path) -> io::Result<Self> {
        let (monitor, control, output, serial) = (Pair::new()?, Pair::new()?, Pair::new()?, Pair::new()?);
        let mut pair = |option: &str, value: &str| args.extend([option.to_owned(), value.to_owned()]);
        pair("-chardev", &monitor.chardev("monitor"));
        pair("-mon", "chardev=monitor,mode=control");
        for (port, name) in [(&control, "control"), (&output, "output")] {
            pair("-chardev", &port.chardev(name));
            pair(
                "-device",
                &format!("virtserialport,chardev={name},name=banger.lab.{name}"),
            );
        }
        match console {
            Console::Collected => pair("-chardev", &serial.chardev("serial")),
            Console::Terminal => pair("-chardev", "stdio,id=serial,mux=on,signal=off"),
        }
        pair("-serial", "chardev:serial");
        // Whatever ends this process, its lab goes with it.
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "--", PROGRAM])
            .args(args)
            .env("TMPDIR", scratch)
            .stderr(Stdio::piped());
        if console == Console::Collected {
            command.stdin(Stdio::null()).stdout(Stdio::null());
        }
        let mut child = command.spawn()?;
        let errors = Stream::read(child.stderr.take().ok_or(io::ErrorKind::BrokenPipe)?);
        drop((monitor.theirs, control.theirs, output.theirs, serial.theirs));
        let console = (console == Console::Collected).then(|| Stream::read(serial.ours));
        match Qmp::over(monitor.ours) {
            Ok(qmp) => Ok(Self {
                child,
                qmp,
                port: Port::new(control.ours, output.ours),
                console,
                errors,
            }),
            Err(e) => {
                let _ = child.kill();
                let _ = child.wait();
                errors.ended(Duration::from_secs(5));
                Err(io::Error::other(format!("{PROGRAM}: {e}\n{}", errors.text())))
            }
        }
    }

    /// Boots a lab.
    pub(super) fn boot(root: &Root, payload: &Path, console: Console, scratch: &Path) -> Result<Self, String> {
        let args = args(root, &root.disk(), false, payload, &Memory::Anonymous);
        let mut machine = Self::spawn(args, console, scratch).map_err(|e| e.to_string())?;
        machine.hello(BOOT, "the lab to boot")?;
        Ok(machine)
    }

    /// Boots a lab and saves it, disk and all.
    pub(super) fn save(root: &Root, saved: &Saved, scratch: &Path) -> Result<(), String> {
        let failed = |e: io::Error| format!("the booted lab could not be saved: {e}");
        let payload = scratch.join("no-payload.img");
        std::fs::File::create(&payload)
            .and_then(|f| f.set_len(PAYLOAD_SIZE))
            .map_err(failed)?;
        let args = args(root, &saved.disk(), true, &payload, &Memory::Kept(&saved.memory()));
        let mut machine = Self::spawn(args, Console::Collected, scratch).map_err(failed)?;
        machine.hello(BOOT, "the lab to boot")?;
        let mut save = || {
            machine.qmp.ignore_shared()?;
            machine.qmp.execute("stop", json!({}))?;
            machine.qmp.save(&saved.state(), SAVE)?;
            // What the disk was told is in its file.
            machine.qmp.execute("quit", json!({}))
        };
        save().map_err(failed)?;
        machine.child.wait().map_err(failed)?;
        Ok(())
    }

    /// Goes on with a lab that was saved.
    pub(super) fn restore(
        root: &Root,
        saved: &Saved,
        payload: &Path,
        console: Console,
        scratch: &Path,
    ) -> Result<Self, String> {
        let mut args = args(root, &saved.disk(), false, payload, &Memory::Private(&saved.memory()));
        args.extend(["-S", "-incoming", "defer"].map(str::to_owned));
        let mut machine = Self::spawn(args, console, scratch).map_err(|e| e.to_string())?;
        let load = |qmp: &mut Qmp| {
            qmp.ignore_shared()?;
            qmp.load(&saved.state())?;
            qmp.execute("cont", json!({}))
        };
        load(&mut machine.qmp).map_err(|e| format!("the saved lab does not load: {e}\n{}", machine.errors.text()))?;
        machine.hello(ANSWER, "the restored lab to answer")?;
        Ok(machine)
    }

    /// Tells the time and waits for the answer.
    fn hello(&mut self, time: Duration, what: &str) -> Result<(), String> {
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let answer = self.port.ask(
            &format!("hello {}", now.as_secs()),
            Instant::now() + time,
            what,
            &mut |_| {},
        );
        match answer {
            Ok(line) if line == "ready" => Ok(()),
            Ok(line) => Err(format!("the lab greets with `{line}`")),
            Err(e) => Err(format!("{e}\n{}", self.last_words())),
        }
    }

    /// Runs the payload's test program; returns its exit status.
    pub(super) fn run(&mut self, words: &str, time: Duration, output: &mut dyn FnMut(&[u8])) -> Result<u8, String> {
        let begun = self.port.ask(
            &format!("run {words}"),
            Instant::now() + ANSWER,
            "the lab to take the payload",
            output,
        )?;
        if begun != "begun" {
            return Err(format!("the lab does not begin: {begun}"));
        }
        let end = Instant::now() + time;
        let what = format!("the scenarios to be done ({} s)", time.as_secs());
        let status = self.port.line(end, &what, output)?;
        self.port.rest(end, output)?;
        status
            .strip_prefix("exit ")
            .and_then(|s| s.parse().ok())
            .ok_or_else(|| format!("the lab ends a run with `{status}`"))
    }

    /// An archive of what the guest collects.
    pub(super) fn logs(&mut self, time: Duration) -> Result<Vec<u8>, String> {
        let end = Instant::now() + time;
        let mut answer = self.port.ask("logs", end, "the lab's logs", &mut |_| {})?;
        if answer.starts_with("exit ") {
            // Of a run that hung, and has been ended.
            self.port.rest(end, &mut |_| {})?;
            answer = self.port.line(end, "the lab's logs", &mut |_| {})?;
        }
        let size = answer
            .strip_prefix("logs ")
            .and_then(|s| s.parse().ok())
            .ok_or_else(|| format!("the lab gives logs with `{answer}`"))?;
        // All that came before has been read: what comes now is the archive.
        self.port.say("send")?;
        self.port.bytes(size, end)
    }

    /// Puts a shell on the console.
    pub(super) fn shell(&mut self) -> Result<(), String> {
        let answer = self
            .port
            .ask("shell", Instant::now() + ANSWER, "a shell", &mut |_| {})?;
        (answer == "begun")
            .then_some(())
            .ok_or(format!("the lab gives no shell: {answer}"))
    }

    /// Waits for the lab's end.
    pub(super) fn wait(&mut self) -> Result<u8, String> {
        let status = self.child.wait().map_err(|e| e.to_string())?;
        Ok(u8::from(!status.success()))
    }

    /// The console so far.
    pub(super) fn console(&self) -> Vec<u8> {
        self.console.as_ref().map(Stream::bytes).unwrap_or_default()
    }

    /// The end of the console, and what the emulator said.
    pub(super) fn last_words(&self) -> String {
        let console = self.console();
        let console = String::from_utf8_lossy(&console[console.len().saturating_sub(4000)..]).into_owned();
        let errors = self.errors.text();
        let errors: Vec<&str> = errors
            .lines()
            .filter(|l| !l.contains("TCG doesn't support requested feature"))
            .collect();
        format!(
            "--- end of the lab's console\n{console}\n--- {PROGRAM}\n{}",
            errors.join("\n")
        )
    }
}

/// The two ports of the runner in the guest.
struct Port {
    control: UnixStream,
    output: UnixStream,
    /// Of the control port, without an end of line yet.
    partial: Vec<u8>,
    /// Of the output port, not handed out yet.
    pending: VecDeque<u8>,
}

impl Port {
    fn new(control: UnixStream, output: UnixStream) -> Self {
        Self {
            control,
            output,
            partial: Vec::new(),
            pending: VecDeque::new(),
        }
    }

    fn ask(&mut self, line: &str, end: Instant, what: &str, output: &mut dyn FnMut(&[u8])) -> Result<String, String> {
        self.say(line)?;
        self.line(end, what, output)
    }

    fn say(&mut self, line: &str) -> Result<(), String> {
        self.control
            .write_all(format!("{line}\n").as_bytes())
            .map_err(|e| format!("the lab is gone: {e}"))
    }

    /// The next line of the control port. What arrives at the output port meanwhile is handed over.
    fn line(&mut self, end: Instant, what: &str, output: &mut dyn FnMut(&[u8])) -> Result<String, String> {
        loop {
            if let Some(at) = self.partial.iter().position(|&b| b == b'\n') {
                let line: Vec<u8> = self.partial.drain(..=at).collect();
                return Ok(String::from_utf8_lossy(&line[..at]).trim_end().to_owned());
            }
            self.receive(end, what)?;
            self.hand_over(output);
        }
    }

    /// What is left of a run's output: to the NUL that ends it.
    fn rest(&mut self, end: Instant, output: &mut dyn FnMut(&[u8])) -> Result<(), String> {
        loop {
            self.hand_over(output);
            if self.pending.pop_back().is_some() {
                return Ok(());
            }
            self.receive(end, "the end of the scenarios' output")?;
        }
    }

    /// So many bytes of the output port.
    fn bytes(&mut self, count: usize, end: Instant) -> Result<Vec<u8>, String> {
        while self.pending.len() < count {
            self.receive(end, "the whole archive of logs")?;
        }
        Ok(self.pending.drain(..count).collect())
    }

    /// Hands over what has arrived, but for a NUL at its end.
    fn hand_over(&mut self, output: &mut dyn FnMut(&[u8])) {
        let last = self.pending.back() == Some(&0);
        let mut bytes: Vec<u8> = self.pending.drain(..).collect();
        if last {
            bytes.pop();
            self.pending.push_back(0);
        }
        if !bytes.is_empty() {
            output(&bytes);
        }
    }

    /// Waits for something to arrive at either port.
    fn receive(&mut self, end: Instant, what: &str) -> Result<(), String> {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(|e| e.to_string())?;
        let (control, output) = {
            let mut ports = [
                PollFd::from_borrowed_fd(self.control.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.output.as_fd(), PollFlags::IN),
            ];
            match poll(&mut ports, Some(&timeout)) {
                Ok(0) => return Err(format!("waited in vain for {what}")),
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => return Ok(()),
                Err(e) => return Err(e.to_string()),
            }
            (!ports[0].revents().is_empty(), !ports[1].revents().is_empty())
        };
        let mut buffer = vec![0; 64 * 1024];
        let gone = |n: io::Result<usize>| match n {
            Ok(n) if n > 0 => Ok(n),
            _ => Err(format!("the lab ended while it was waited for {what}")),
        };
        if output {
            let n = gone(self.output.read(&mut buffer))?;
            self.pending.extend(&buffer[..n]);
        }
        if control {
            let n = gone(self.control.read(&mut buffer))?;
            self.partial.extend_from_slice(&buffer[..n]);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port() -> (Port, UnixStream, UnixStream) {
        let (control, guest_control) = UnixStream::pair().unwrap();
        let (output, guest_output) = UnixStream::pair().unwrap();
        (Port::new(control, output), guest_control, guest_output)
    }

    #[test]
    fn a_run_ends_with_all_of_its_output() {
        let (mut port, mut control, mut output) = port();
        let mut seen = Vec::new();
        let end = Instant::now() + Duration::from_secs(10);
        output.write_all(b"one\n").unwrap();
        control.write_all(b"ex").unwrap();
        control.write_all(b"it 3\n").unwrap();
        let line = port.line(end, "x", &mut |b| seen.extend_from_slice(b)).unwrap();
        assert_eq!(line, "exit 3");
        output.write_all(b"two\n\0").unwrap();
        port.rest(end, &mut |b| seen.extend_from_slice(b)).unwrap();
        assert_eq!(seen, b"one\ntwo\n");
        output.write_all(b"archive").unwrap();
        assert_eq!(port.bytes(7, end).unwrap(), b"archive");
    }

    #[test]
    fn what_does_not_come_is_named() {
        let (mut port, control, output) = port();
        let soon = Instant::now() + Duration::from_millis(20);
        assert_eq!(
            port.line(soon, "a word", &mut |_| {}).unwrap_err(),
            "waited in vain for a word"
        );
        drop((control, output));
        let end = Instant::now() + Duration::from_secs(10);
        assert_eq!(
            port.line(end, "a word", &mut |_| {}).unwrap_err(),
            "the lab ended while it was waited for a word"
        );
    }
}

//! A helper under a root directory of its own in a network namespace of its own, and a client for it.
#![allow(unsafe_code)]

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use banger_system::helper::{
    Answer, Call, EngineUser, HelperCode, HelperError, HostObject, Reply, Request, TapRules, VERSION,
};
use banger_system::id::MachineId;
use banger_system::net::Network;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};

/// The owner of the tests' installations.
pub(crate) const OWNER: u32 = 61_234;

/// What this host lacks for these tests.
fn lacking() -> Option<&'static str> {
    let program = |name: &str| {
        ["/usr/sbin", "/sbin", "/usr/bin"]
            .iter()
            .any(|d| Path::new(d).join(name).is_file())
    };
    if !rustix::process::geteuid().is_root() {
        Some("not root")
    } else if !Path::new("/dev/net/tun").exists() {
        Some("no /dev/net/tun")
    } else if !program("nft") {
        Some("no nft")
    } else if !program("setpriv") {
        Some("no setpriv")
    } else if !program("ip") {
        Some("no ip")
    } else {
        None
    }
}

/// Runs a test in a network namespace of its own, or skips it.
pub(crate) fn in_namespace(test: fn()) {
    if let Some(reason) = lacking() {
        crate::harness::skip(reason);
    }
    let run = move || {
        unshare_network();
        ip("link set lo up");
        test();
    };
    if let Err(panic) = std::thread::spawn(run).join() {
        std::panic::resume_unwind(panic);
    }
}

/// Puts this thread into a network namespace of its own; programs that it starts are in it too.
pub(crate) fn unshare_network() {
    // SAFETY: no pointers; only this thread changes its namespace.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(result, 0, "unshare: {}", std::io::Error::last_os_error());
}

/// Runs `ip`.
pub(crate) fn ip(arguments: &str) {
    tool("ip", arguments, "");
}

/// Runs `nft -f -`.
pub(crate) fn nft(rules: &str) {
    tool("nft", "-f -", rules);
}

/// Runs a program of the system's with arguments and input; what it says.
pub(crate) fn tool(program: &str, arguments: &str, input: &str) -> String {
    let mut child = Command::new(program)
        .args(arguments.split_whitespace())
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let done = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success(), "{program} {arguments}: {said}");
    String::from_utf8(done.stdout).unwrap()
}

/// Runs something as another user: this thread alone changes its user.
pub(crate) fn as_user<T: Send>(uid: u32, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                // SAFETY: the bare system calls, unlike the C library's functions, concern this thread alone.
                let results = unsafe {
                    (
                        libc::syscall(libc::SYS_setgroups, 0, 0),
                        libc::syscall(libc::SYS_setresgid, uid, uid, uid),
                        libc::syscall(libc::SYS_setresuid, uid, uid, uid),
                    )
                };
                assert_eq!(results, (0, 0, 0));
                work()
            })
            .join()
            .unwrap()
    })
}

/// A root directory with a record in it.
#[derive(Debug)]
pub(crate) struct Root(tempfile::TempDir);

impl Root {
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("bh").tempdir_in("/tmp").unwrap();
        let root = Self(dir);
        let etc = root.path("etc/banger");
        std::fs::create_dir_all(&etc).unwrap();
        for dir in [root.path(""), root.path("etc"), etc] {
            std::fs::set_permissions(dir, PermissionsExt::from_mode(0o755)).unwrap();
        }
        let record = format!(
            "version = 1\n[owner]\nuser = \"dev\"\nuid = {OWNER}\ngid = {OWNER}\nhome = \"/home/dev\"\n\
             [installed]\nat = \"2026-11-22T10:00:00Z\"\nversion = \"0.1.0\"\ncommit = \"unknown\"\n"
        );
        std::fs::write(root.record(), record).unwrap();
        std::fs::set_permissions(root.record(), PermissionsExt::from_mode(0o644)).unwrap();
        root
    }

    /// Has the record name another network.
    pub(crate) fn network(&mut self, bridge: &str, address: &str) {
        let record = std::fs::read_to_string(self.record()).unwrap();
        let record = record.split("[network]").next().unwrap();
        let (address, prefix) = address.split_once('/').unwrap();
        let network = format!("[network]\nbridge = \"{bridge}\"\naddress = \"{address}\"\nprefix = {prefix}\n");
        std::fs::write(self.record(), format!("{record}{network}")).unwrap();
    }

    pub(crate) fn path(&self, below: &str) -> PathBuf {
        self.0.path().join(below)
    }

    pub(crate) fn record(&self) -> PathBuf {
        self.path("etc/banger/install.toml")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("run/banger-root/bangerd-root.sock")
    }

    /// The helper, with the capabilities that its unit leaves it.
    pub(crate) fn command(&self) -> Command {
        let kept: Vec<String> = banger_system::units::CAPABILITIES
            .iter()
            .map(|name| format!("+{}", name.trim_start_matches("CAP_").to_lowercase()))
            .collect();
        let mut command = Command::new("/usr/bin/setpriv");
        command.arg(format!("--bounding-set=-all,{}", kept.join(",")));
        command.args([
            "--inh-caps=-all",
            "--no-new-privs",
            "--",
            env!("CARGO_BIN_EXE_banger-helper"),
        ]);
        let log = std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(self.path("log"))
            .unwrap();
        command
            .arg("--root")
            .arg(self.path(""))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        command
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }
}

/// A helper that serves.
#[derive(Debug)]
pub(crate) struct Helper {
    pub(crate) root: Root,
    child: Child,
}

impl Helper {
    /// Starts one and waits until it says that it is ready.
    pub(crate) fn start() -> Self {
        Self::start_in(Root::new())
    }

    pub(crate) fn start_in(root: Root) -> Self {
        let path = root.path("notify");
        let _ = std::fs::remove_file(&path);
        let notify = UnixDatagram::bind(&path).unwrap();
        notify.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let child = root.command().env("NOTIFY_SOCKET", &path).spawn().unwrap();
        let helper = Self { root, child };
        let mut buffer = [0; 64];
        let count = notify
            .recv(&mut buffer)
            .unwrap_or_else(|e| panic!("not ready: {e}: {}", helper.root.log()));
        assert_eq!(&buffer[..count], b"READY=1\n");
        helper
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal and waits for its end.
    pub(crate) fn end(mut self, signal: i32) -> (Root, std::process::ExitStatus) {
        // SAFETY: a child that has not been waited for keeps its pid.
        assert_eq!(unsafe { libc::kill(self.child.id().cast_signed(), signal) }, 0);
        let status = self.child.wait().unwrap();
        let root = std::mem::replace(&mut self.root, Root(tempfile::tempdir().unwrap()));
        (root, status)
    }

    pub(crate) fn connect(&self) -> Client {
        Client::to(&self.root.socket())
    }

    pub(crate) fn call(&self, request: Request) -> Result<Answer, HelperError> {
        self.connect().call(request)
    }

    /// A call that has to work.
    pub(crate) fn ok(&self, request: Request) -> Answer {
        let name = request.name();
        self.call(request)
            .unwrap_or_else(|e| panic!("{name}: {e} {:?}\n{}", e.details, self.root.log()))
    }

    /// A call that has to be refused so.
    pub(crate) fn refused(&self, request: Request, code: HelperCode) -> String {
        let text = format!("{request:?}");
        let e = self.call(request).expect_err(&text);
        assert_eq!(e.code, code, "{text}: {e}");
        e.message
    }

    pub(crate) fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    pub(crate) fn inventory(&self) -> Vec<HostObject> {
        match self.ok(Request::Inventory) {
            // What the machine that runs the tests has besides is not this test's.
            Answer::Inventory { objects } => objects
                .into_iter()
                .filter(|o| matches!(o.kind.as_str(), "interface" | "rule"))
                .collect(),
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Client(pub(crate) UnixStream);

impl Client {
    pub(crate) fn to(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        Self(stream)
    }

    pub(crate) fn call(&mut self, request: Request) -> Result<Answer, HelperError> {
        let call = Call {
            version: VERSION,
            op: Some("op-0123abcd".to_owned()),
            request,
        };
        self.raw(&serde_json::to_vec(&call).unwrap(), &[])
    }

    /// Sends any bytes as a frame, with descriptors.
    pub(crate) fn raw(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Answer, HelperError> {
        let head = u32::try_from(bytes.len()).unwrap().to_be_bytes();
        let frame = [&head[..], bytes].concat();
        let mut space = [MaybeUninit::<u8>::uninit(); 16 + 4 * 253 + 16];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let flags = SendFlags::NOSIGNAL;
        let sent = rustix::net::sendmsg(&self.0, &[IoSlice::new(&frame)], &mut control, flags).unwrap();
        self.0.write_all(&frame[sent..]).unwrap();
        self.reply()
    }

    /// A call whose answer has descriptors.
    pub(crate) fn call_for(&mut self, request: Request) -> Result<(Answer, Vec<OwnedFd>), HelperError> {
        let call = Call {
            version: VERSION,
            op: None,
            request,
        };
        let bytes = serde_json::to_vec(&call).unwrap();
        let length = u32::try_from(bytes.len()).unwrap().to_be_bytes();
        self.0.write_all(&[&length[..], &bytes].concat()).unwrap();
        let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(6))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut head = [0; 4];
        let buffers = &mut [IoSliceMut::new(&mut head)];
        let message = rustix::net::recvmsg(&self.0, buffers, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
        assert_eq!(message.bytes, 4);
        let mut fds = Vec::new();
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = part {
                fds.extend(rights);
            }
        }
        self.body(head).map(|answer| (answer, fds))
    }

    pub(crate) fn reply(&mut self) -> Result<Answer, HelperError> {
        let mut head = [0; 4];
        self.0.read_exact(&mut head).unwrap();
        self.body(head)
    }

    fn body(&mut self, head: [u8; 4]) -> Result<Answer, HelperError> {
        let mut bytes = vec![0; u32::from_be_bytes(head) as usize];
        self.0.read_exact(&mut bytes).unwrap();
        match serde_json::from_slice(&bytes).unwrap() {
            Reply::Ok(answer) => Ok(answer),
            Reply::Error(e) => Err(e),
        }
    }

    /// Whether the helper has closed the connection.
    pub(crate) fn closed(&mut self) -> bool {
        matches!(self.0.read(&mut [0]), Ok(0)) || self.0.take_error().is_ok_and(|e| e.is_some())
    }
}

/// The network of the tests: their namespaces keep them apart.
pub(crate) fn net() -> Network {
    Network::default()
}

pub(crate) fn machine(number: u64) -> MachineId {
    MachineId::from_random(number.to_be_bytes())
}

pub(crate) fn rules(slot: u32, nat: bool, peers: &[u32]) -> TapRules {
    TapRules {
        slot,
        nat,
        peers: peers.to_vec(),
    }
}

pub(crate) fn setup(taps: Vec<TapRules>) -> Request {
    Request::NetworkSetup { taps }
}

pub(crate) fn warm(slots: impl IntoIterator<Item = u32>) -> Request {
    Request::TapsWarm {
        slots: slots.into_iter().collect(),
    }
}

/// The machine of a slot has its number.
pub(crate) fn take(rules: TapRules) -> Request {
    Request::TapTake {
        machine: machine(rules.slot.into()),
        user: EngineUser::Owner,
        rules,
    }
}

pub(crate) fn change(rules: TapRules) -> Request {
    Request::TapChange {
        machine: machine(rules.slot.into()),
        rules,
    }
}

pub(crate) fn release(slot: u32) -> Request {
    Request::TapDrop {
        machine: machine(slot.into()),
        slot,
    }
}

/// Opens a tap, as an engine does.
pub(crate) fn open_tap(name: &str) -> std::io::Result<OwnedFd> {
    // SAFETY: the path ends with a zero; what is opened is owned by nobody else; an all-zero `ifreq` is valid and lives until the
    // call returns.
    unsafe {
        let fd = libc::open(
            c"/dev/net/tun".as_ptr(),
            libc::O_RDWR | libc::O_NONBLOCK | libc::O_CLOEXEC,
        );
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        let fd = OwnedFd::from_raw_fd(fd);
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_TAP | libc::IFF_NO_PI).unwrap();
        if libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) < 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(fd)
    }
}

/// The number of this thread, by which others name its namespace.
pub(crate) fn thread_number() -> u32 {
    // SAFETY: no arguments.
    let number = unsafe { libc::syscall(libc::SYS_gettid) };
    u32::try_from(number).unwrap()
}

//! The few system calls that have no safe wrapper: what a child does between fork and exec, signals by number, and the
//! kernel's entropy pool.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::net::{AddressFamily, SocketAddrAny, addr};
use rustix::process::{Gid, Pid, Signal, Uid};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// What a child does to itself before it becomes the program.
#[derive(Debug, Clone, Default)]
pub(crate) struct ChildSetup {
    /// Make standard input, a terminal, the controlling terminal of a session of its own.
    pub(crate) tty: bool,
    /// Become this user.
    pub(crate) user: Option<ChildUser>,
}

/// A user as the kernel sees it.
#[derive(Debug, Clone)]
pub(crate) struct ChildUser {
    /// User.
    pub(crate) uid: u32,
    /// Group.
    pub(crate) gid: u32,
    /// Supplementary groups.
    pub(crate) groups: Vec<u32>,
}

/// Has `command` do `setup` in the child. Without need for it the command is left alone, because any such hook makes the
/// standard library fork where it could have used the cheaper `posix_spawn`.
pub(crate) fn prepare(command: &mut Command, setup: ChildSetup) {
    if !setup.tty && setup.user.is_none() {
        return;
    }
    let user = setup.user.map(|u| {
        let groups: Vec<Gid> = u.groups.iter().map(|&g| Gid::from_raw(g)).collect();
        (Uid::from_raw(u.uid), Gid::from_raw(u.gid), groups)
    });
    let hook = move || -> io::Result<()> {
        if setup.tty {
            rustix::process::setsid()?;
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
            take_keys();
        }
        if let Some((uid, gid, groups)) = &user {
            rustix::thread::set_thread_groups(groups)?;
            rustix::thread::set_thread_gid(*gid)?;
            rustix::thread::set_thread_uid(*uid)?;
        }
        Ok(())
    };
    // SAFETY: the hook makes plain system calls only (rustix's Linux backend calls the kernel directly): it allocates
    // nothing and takes no lock, so it may run between fork and exec.
    unsafe {
        command.pre_exec(hook);
    }
}

/// The signals of a terminal's keys do what they do after a login, whoever ignored them before: a shell cannot undo that itself.
fn take_keys() {
    for signal in [libc::SIGINT, libc::SIGQUIT, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU] {
        // SAFETY: `signal` takes two integers; it may be called between fork and exec. That it refuses is not possible for these.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// Sends signal `number` to process `pid`.
pub(crate) fn kill(pid: Pid, number: i32) -> io::Result<()> {
    Ok(rustix::process::kill_process(pid, signal(number)?)?)
}

/// Sends signal `number` to the process group `group`.
pub(crate) fn kill_group(group: Pid, number: i32) -> io::Result<()> {
    Ok(rustix::process::kill_process_group(group, signal(number)?)?)
}

/// Sends signal `number` to every process but this one and process 1.
pub(crate) fn kill_all(number: i32) -> io::Result<()> {
    signal(number)?;
    // SAFETY: `kill` takes two integers and touches no memory of this process.
    match unsafe { libc::kill(-1, number) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn signal(number: i32) -> io::Result<Signal> {
    if !(1..=64).contains(&number) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("no such signal: {number}"),
        ));
    }
    // SAFETY: the number is in the range of Linux signals and is only handed to `kill`; no handler is installed for it.
    Ok(unsafe { Signal::from_raw_unchecked(number) })
}

/// Whether the kernel takes its clock for one that is kept right.
pub(crate) fn clock_is_synchronised() -> bool {
    // SAFETY: any bytes are a `struct timex`, zeros too: they ask for no change.
    let mut asked: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: `adjtimex` reads and writes the one structure, which lives until it returns.
    let state = unsafe { libc::adjtimex(&mut asked) };
    (0..libc::TIME_ERROR).contains(&state) && asked.status & libc::STA_UNSYNC == 0
}

/// Has the kernel make good so many microseconds bit by bit.
pub(crate) fn slew_clock(by_us: i64) -> io::Result<()> {
    // SAFETY: as above.
    let mut wanted: libc::timex = unsafe { std::mem::zeroed() };
    wanted.modes = libc::ADJ_OFFSET_SINGLESHOT;
    wanted.offset = by_us;
    adjust(&mut wanted)
}

/// Sets the clock by so many nanoseconds in one step.
pub(crate) fn step_clock(by_ns: i64) -> io::Result<()> {
    // SAFETY: as above.
    let mut wanted: libc::timex = unsafe { std::mem::zeroed() };
    wanted.modes = libc::ADJ_SETOFFSET | libc::ADJ_NANO;
    wanted.time.tv_sec = by_ns.div_euclid(1_000_000_000);
    // With that mode these are nanoseconds.
    wanted.time.tv_usec = by_ns.rem_euclid(1_000_000_000);
    adjust(&mut wanted)
}

fn adjust(wanted: &mut libc::timex) -> io::Result<()> {
    // SAFETY: `adjtimex` reads and writes the one structure, which lives until it returns.
    match unsafe { libc::adjtimex(wanted) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[repr(C)]
struct PoolInfo {
    entropy_bits: i32,
    size: i32,
    bytes: [u8; 64],
}

const RNDADDENTROPY: rustix::ioctl::Opcode = rustix::ioctl::opcode::write::<[i32; 2]>(b'R', 0x03);
const RNDRESEEDCRNG: rustix::ioctl::Opcode = rustix::ioctl::opcode::none(b'R', 0x07);

/// Adds `bytes` to the kernel's pool, counts them as entropy, and has the generator take them up at once.
pub(crate) fn add_entropy(device: impl AsFd, bytes: [u8; 64]) -> io::Result<()> {
    let info = PoolInfo {
        entropy_bits: 512,
        size: 64,
        bytes,
    };
    // SAFETY: RNDADDENTROPY reads a `struct rand_pool_info`: two ints and `size` bytes, which is what `PoolInfo` is.
    unsafe { rustix::ioctl::ioctl(&device, rustix::ioctl::Setter::<RNDADDENTROPY, PoolInfo>::new(info))? };
    // SAFETY: RNDRESEEDCRNG takes no argument.
    unsafe { rustix::ioctl::ioctl(&device, rustix::ioctl::NoArg::<RNDRESEEDCRNG>::new())? };
    Ok(())
}

/// `struct ifreq` with a hardware address.
#[repr(C)]
struct HardwareAddress {
    name: [u8; 16],
    family: u16,
    address: [u8; 14],
    rest: [u8; 8],
}

const SIOCSIFHWADDR: rustix::ioctl::Opcode = 0x8924;

/// `ARPHRD_ETHER`
const ETHERNET: u16 = 1;

/// Gives the interface `name` the MAC address `mac`.
pub(crate) fn set_hardware_address(name: &str, mac: [u8; 6]) -> io::Result<()> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType};
    let mut wanted = HardwareAddress {
        name: [0; 16],
        family: ETHERNET,
        address: [0; 14],
        rest: [0; 8],
    };
    // The kernel wants a zero behind the name.
    match wanted.name[..15].get_mut(..name.len()) {
        Some(place) => place.copy_from_slice(name.as_bytes()),
        None => return Err(io::Error::from(io::ErrorKind::InvalidInput)),
    }
    wanted.address[..6].copy_from_slice(&mac);
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    // SAFETY: SIOCSIFHWADDR reads a `struct ifreq` of 40 bytes: a name of 16 bytes and a `struct sockaddr`, which is what
    // `HardwareAddress` is.
    unsafe {
        rustix::ioctl::ioctl(
            &socket,
            rustix::ioctl::Setter::<SIOCSIFHWADDR, HardwareAddress>::new(wanted),
        )?
    };
    Ok(())
}

/// The standard library starts programs by `posix_spawn`, which copies nothing of the agent, only if this function is there,
/// and in a static program only what is referred to is there. Without it each program that is to run in some directory costs
/// a fork.
#[used]
static POSIX_SPAWN_IN_A_DIRECTORY: unsafe extern "C" fn(
    *mut libc::posix_spawn_file_actions_t,
    *const libc::c_char,
) -> libc::c_int = libc::posix_spawn_file_actions_addchdir_np;

const EXT4_IOC_RESIZE_FS: rustix::ioctl::Opcode = rustix::ioctl::opcode::write::<u64>(b'f', 16);

/// Grows the mounted ext4 file system that `on` lies in to so many blocks.
pub(crate) fn resize_ext4(on: impl AsFd, blocks: u64) -> io::Result<()> {
    // SAFETY: EXT4_IOC_RESIZE_FS reads one u64, the number of blocks.
    unsafe { rustix::ioctl::ioctl(on, rustix::ioctl::Setter::<EXT4_IOC_RESIZE_FS, u64>::new(blocks))? };
    Ok(())
}

/// Has the runtime watch a descriptor.
pub(crate) fn watched(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` names the same open descriptor for as long as it lives, and `AsyncFd` keeps it until it has
    // taken back the registration.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// An address of a vsock socket, `struct sockaddr_vm`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct VsockAddress {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    rest: [u8; 4],
}

impl VsockAddress {
    /// The port `port` of whatever address this guest has.
    pub(crate) fn any(port: u32) -> Self {
        Self {
            family: AddressFamily::VSOCK.as_raw(),
            reserved: 0,
            port,
            cid: u32::MAX,
            rest: [0; 4],
        }
    }
}

// SAFETY: `f` gets a pointer to a `struct sockaddr_vm` that lives until it returns, and its length.
unsafe impl addr::SocketAddrArg for VsockAddress {
    unsafe fn with_sockaddr<R>(&self, f: impl FnOnce(*const addr::SocketAddrOpaque, addr::SocketAddrLen) -> R) -> R {
        f(
            std::ptr::from_ref(self).cast(),
            size_of::<Self>() as addr::SocketAddrLen,
        )
    }
}

/// The machine that a vsock address names; none if it is no such address.
pub(crate) fn vsock_cid(address: &SocketAddrAny) -> Option<u32> {
    let fits = address.address_family() == AddressFamily::VSOCK
        && usize::try_from(address.addr_len()).is_ok_and(|n| n >= size_of::<VsockAddress>());
    // SAFETY: so many bytes were written there, and any bytes are a `VsockAddress`; it need not be aligned for one.
    fits.then(|| unsafe { address.as_ptr().cast::<VsockAddress>().read_unaligned() }.cid)
}

//! Taps, as `/dev/net/tun` makes them and gives them away.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

/// Device of all taps. The same under every test's root: it is the kernel's.
const DEVICE: &str = "/dev/net/tun";
/// With `TUNSETIFF`: an interface that is there is an error.
const EXCLUSIVE: libc::c_int = 0x8000;

/// A tap that is held open.
#[derive(Debug)]
pub(crate) struct Tap(OwnedFd);

impl Tap {
    /// Makes a tap that ends with this descriptor until [`Tap::keep`]. One of that name is an error.
    pub(crate) fn make(name: &str) -> io::Result<Self> {
        Self::attach(name, EXCLUSIVE)
    }

    /// Opens a tap that is there (nobody else may have it open).
    pub(crate) fn open(name: &str) -> io::Result<Self> {
        Self::attach(name, 0)
    }

    fn attach(name: &str, more: libc::c_int) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = rustix::fs::open(DEVICE, flags, Mode::empty())?;
        if name.len() >= libc::IFNAMSIZ {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: an all-zero `ifreq` is a valid one.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | more;
        // The constant EXCLUSIVE takes the highest of the sixteen bits.
        request.ifr_ifru.ifru_flags = flags.to_ne_bytes()[..2].try_into().map_or(0, i16::from_ne_bytes);
        // SAFETY: TUNSETIFF takes an `ifreq`, which lives until the call returns.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
        check(result).map(|()| Self(fd))
    }

    /// Says who may open it besides those with CAP_NET_ADMIN.
    pub(crate) fn give(&self, uid: u32) -> io::Result<()> {
        self.set(libc::TUNSETOWNER as _, uid.into())
    }

    /// Has it outlive the descriptor.
    pub(crate) fn keep(self) -> io::Result<()> {
        self.set(libc::TUNSETPERSIST as _, 1)
    }

    fn set(&self, what: libc::Ioctl, value: libc::c_ulong) -> io::Result<()> {
        // SAFETY: these requests take a number, no pointer.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), what, value) })
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

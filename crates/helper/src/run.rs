//! The few programs that root's part starts: found in fixed places, fixed arguments, empty environment, bounded output, a deadline.

use std::io::Write;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use banger_system::helper::{HelperCode, HelperError};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, SeekFrom, memfd_create, seek};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::ctx::{error, failed};

/// Most bytes that are kept of what a program says on its standard error.
const SAID: usize = 4096;

/// The first of these files that is there.
pub(crate) fn find(places: &[&'static str]) -> Option<&'static str> {
    places
        .iter()
        .copied()
        .find(|place| std::path::Path::new(place).is_file())
}

/// Runs a program with input to its end. Anything but success is an error, with what it said.
///
/// # Errors
/// [`HelperCode::Unsupported`] when it is in none of the places.
pub(crate) fn run(
    places: &[&'static str],
    arguments: &[&str],
    input: &[u8],
    limit: Duration,
) -> Result<(), HelperError> {
    let name = places.first().and_then(|place| place.rsplit('/').next()).unwrap_or("");
    let Some(program) = find(places) else {
        return Err(error(
            HelperCode::Unsupported,
            format!("the program `{name}` is not there"),
        ));
    };
    let cannot = |e: std::io::Error| failed(format_args!("run `{program}`"), e);
    let memory = memfd_create("input", MemfdFlags::CLOEXEC).map_err(|e| cannot(e.into()))?;
    let mut file = std::fs::File::from(memory);
    file.write_all(input).map_err(cannot)?;
    seek(&file, SeekFrom::Start(0)).map_err(|e| cannot(e.into()))?;
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .current_dir("/")
        .stdin(file)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(cannot)?;
    let ended = wait(&mut child, limit);
    if !matches!(ended, Ok((true, _))) {
        let _ = child.kill();
    }
    let status = child.wait().map_err(cannot)?;
    let (in_time, said) = ended.map_err(cannot)?;
    if !in_time {
        let text = format!("`{program}` did not end within {} s", limit.as_secs());
        return Err(error(HelperCode::Failed, text));
    }
    if status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&said);
    let said: String = said.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    Err(error(
        HelperCode::Failed,
        format!("`{program}` ended with {status}: {}", said.trim()),
    ))
}

/// Waits for the end, taking what is said meanwhile. False: it was too late.
fn wait(child: &mut std::process::Child, limit: Duration) -> std::io::Result<(bool, Vec<u8>)> {
    let deadline = Instant::now() + limit;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or(std::io::ErrorKind::InvalidData)?;
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    let Some(pipe) = child.stderr.take() else {
        return Err(std::io::ErrorKind::InvalidData.into());
    };
    rustix::io::ioctl_fionbio(&pipe, true)?;
    let mut said = Vec::new();
    let mut open = true;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = rustix::time::Timespec::try_from(left).map_err(|_| std::io::ErrorKind::InvalidInput)?;
        let mut fds = vec![PollFd::new(&process, PollFlags::IN)];
        if open {
            fds.push(PollFd::from_borrowed_fd(pipe.as_fd(), PollFlags::IN));
        }
        match poll(&mut fds, Some(&left)) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        let ended = !fds[0].revents().is_empty();
        open = open && drain(&pipe, &mut said);
        if ended {
            return Ok((true, said));
        }
        if Instant::now() >= deadline {
            return Ok((false, said));
        }
    }
}

/// Takes what is in the pipe; keeps the first bytes. False: it is closed.
fn drain(pipe: &impl AsFd, said: &mut Vec<u8>) -> bool {
    let mut buffer = [0u8; 1024];
    // What never ends saying something is cut off: the deadline is checked between rounds.
    for _ in 0..64 {
        match rustix::io::read(pipe, &mut buffer) {
            Ok(0) => return false,
            Ok(count) => {
                let room = SAID.saturating_sub(said.len());
                said.extend_from_slice(&buffer[..count.min(room)]);
            }
            Err(_) => return true,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    const SH: &[&str] = &["/bin/sh"];

    #[test]
    fn its_end_is_told() {
        let limit = Duration::from_secs(20);
        run(SH, &["-c", "read line; test \"$line\" = hello"], b"hello\n", limit).unwrap();
        let e = run(SH, &["-c", "echo no >&2; exit 3"], b"", limit).unwrap_err();
        assert!(e.message.contains("exit status: 3") && e.message.contains("no"), "{e}");
        run(SH, &["-c", "test -z \"$HOME$CARGO\""], b"", limit).unwrap();
        let e = run(&["/nonexistent/x"], &[], b"", limit).unwrap_err();
        assert_eq!(e.code, HelperCode::Unsupported);
    }

    #[test]
    fn it_neither_floods_nor_hangs() {
        let e = run(SH, &["-c", "yes >&2"], b"", Duration::from_millis(300)).unwrap_err();
        assert!(e.message.contains("did not end"), "{e}");
        let e = run(
            SH,
            &["-c", "head -c 100000 /dev/zero | tr '\\0' x >&2; exit 1"],
            b"",
            Duration::from_secs(20),
        );
        assert!(e.unwrap_err().message.len() < SAID + 200);
    }
}

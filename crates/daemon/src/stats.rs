//! Figures of processes and machines.

use std::path::Path;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use banger_proto::api::MachineStats;
use banger_proto::error::{ApiError, ErrorCode};

use crate::machine::Machine;

/// How long the guest may take to say its part; without it the host's figures are given alone.
const GUEST: Duration = Duration::from_secs(2);

/// Clock ticks of `/proc` in a second: part of Linux's interface, whatever the kernel ticks at.
const USER_HZ: u64 = 100;

/// Resident memory of a process in bytes.
pub fn resident_bytes(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

/// CPU time of a process in milliseconds, from the text of `/proc/PID/stat`.
fn cpu_ms(stat: &str, ticks_per_second: u64) -> Option<u64> {
    // The name may contain anything; the fields begin behind its last parenthesis.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some((user + system) * 1000 / ticks_per_second.max(1))
}

/// CPU time of a process in milliseconds.
pub fn cpu_of(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    cpu_ms(&stat, USER_HZ)
}

/// Bytes that a file really takes on the host.
pub fn allocated(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).map_or(0, |m| m.blocks() * 512)
}

/// Figures of a running machine.
pub async fn read(m: &Machine) -> Result<MachineStats, ApiError> {
    let gone = || ApiError::new(ErrorCode::WrongState, format!("machine `{}` is not running", m.name()));
    let live = m.live().ok_or_else(gone)?;
    let pid = live.handles.pid;
    let cpu = cpu_of(pid).ok_or_else(gone)?;
    let now = Instant::now();
    let percent = {
        let mut last = m.last_cpu.lock().unwrap_or_else(PoisonError::into_inner);
        let old = last.replace((now, cpu));
        old.and_then(|(then, before)| {
            let wall = now.duration_since(then).as_millis() as f64;
            (wall >= 100.0 && cpu >= before).then(|| ((cpu - before) as f64 / wall * 1000.0).round() / 10.0)
        })
    };
    let guest = live.link.stats(GUEST).await.ok();
    Ok(MachineStats {
        id: m.id.to_string(),
        name: m.name(),
        cpu_ms: cpu,
        cpu_percent: percent,
        resident_bytes: resident_bytes(pid).unwrap_or(0),
        disk_allocated_bytes: crate::machine::disks::allocated(&m.paths.disks()).0,
        guest_memory_used_bytes: guest.as_ref().map(|g| g.memory_used_bytes),
        guest_uptime_ms: guest.as_ref().map(|g| g.uptime_ms),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_read_behind_any_name() {
        let stat = "12 (a) b (c)) S 1 2 3 4 5 6 7 8 9 10 250 50 0 0 20 0 1 0 99";
        assert_eq!(cpu_ms(stat, 100), Some(3000));
        assert_eq!(cpu_ms("12 (x", 100), None);
        assert!(resident_bytes(std::process::id()).unwrap() > 0);
    }
}

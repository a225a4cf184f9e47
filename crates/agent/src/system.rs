//! The guest as a system: how it does, how far its init has come, and how it goes down.

use std::fs::read_to_string;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use banger_proto::agent::{GuestStats, Health, Shutdown};
use banger_proto::error::{ApiError, ErrorCode};
use tokio::net::UnixDatagram;
use tokio::sync::watch;

use crate::agent::Agent;
use crate::{console, handover, power};

/// Where the image's init says that its start-up is finished: systemd's `NOTIFY_SOCKET`, which it serves as process 1 too.
/// So nothing has to ask it over and over, each time with a program of its own.
pub(crate) const NOTIFY_SOCKET: &str = "/run/banger/notify";

/// How long `systemctl` may take to tell `running` from `degraded`.
const ASK: Duration = Duration::from_secs(20);

/// Start-up of the image's init.
pub(crate) struct System {
    socket: Option<PathBuf>,
    state: watch::Sender<String>,
    /// What it is, once there is one.
    init: Mutex<Option<String>>,
}

const NONE: &str = "none";
const STARTING: &str = "starting";

impl System {
    /// One whose init will report to `socket`.
    pub(crate) fn new(socket: PathBuf) -> Self {
        Self {
            socket: Some(socket),
            state: watch::Sender::new(NONE.to_owned()),
            init: Mutex::default(),
        }
    }

    /// One that never has an init.
    pub(crate) fn none() -> Self {
        Self {
            socket: None,
            state: watch::Sender::new(NONE.to_owned()),
            init: Mutex::default(),
        }
    }

    /// The init is about to be started, or has turned out not to be.
    pub(crate) fn expect(self: &Arc<Self>, init: Option<&str>) {
        *lock(&self.init) = init.map(str::to_owned);
        let Some(init) = init else {
            self.state.send_replace(NONE.to_owned());
            return;
        };
        if !handover::is_systemd(init) {
            // It tells nobody when it has finished.
            self.state.send_replace("running".to_owned());
            return;
        }
        self.state.send_replace(STARTING.to_owned());
        let Some(path) = &self.socket else { return };
        let _ = std::fs::remove_file(path);
        match UnixDatagram::bind(path) {
            Ok(socket) => drop(tokio::spawn(self.clone().listen(socket))),
            Err(e) => {
                console::say(&format!("can't listen at {}: {e}", path.display()));
                self.state.send_replace("unknown".to_owned());
            }
        }
    }

    async fn listen(self: Arc<Self>, socket: UnixDatagram) {
        let mut message = vec![0; 4096];
        while let Ok(n) = socket.recv(&mut message).await {
            let text = String::from_utf8_lossy(&message[..n]);
            if text.lines().any(|line| line == "READY=1") {
                let state = ask_systemd().await;
                self.state.send_replace(state);
            } else if text.lines().any(|line| line == "STOPPING=1") {
                self.state.send_replace("stopping".to_owned());
            }
        }
    }

    /// Whether the image's own init was started.
    pub(crate) fn has_init(&self) -> bool {
        lock(&self.init).is_some()
    }

    /// Whether it is systemd.
    pub(crate) fn is_systemd(&self) -> bool {
        lock(&self.init).as_deref().is_some_and(handover::is_systemd)
    }

    /// Whether it has not finished its start-up.
    pub(crate) fn is_starting(&self) -> bool {
        *self.state.borrow() == STARTING
    }

    fn word(&self) -> String {
        self.state.borrow().clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `running` or `degraded`.
async fn ask_systemd() -> String {
    let mut command = tokio::process::Command::new("systemctl");
    command
        .arg("is-system-running")
        .env("PATH", crate::session::PATH)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let output = tokio::time::timeout(ASK, command.output()).await;
    let Ok(Ok(output)) = output else {
        return "running".to_owned();
    };
    let word: String = String::from_utf8_lossy(&output.stdout)
        .trim()
        .chars()
        .filter(char::is_ascii_lowercase)
        .take(32)
        .collect();
    // It has said itself that it is ready: what is in its queue now was added since.
    if word.is_empty() || word == STARTING {
        "running".to_owned()
    } else {
        word
    }
}

/// Waits until the image's init has finished its start-up.
pub(crate) async fn settled(agent: &Agent) {
    let mut state = agent.system.state.subscribe();
    // The sender lives as long as the agent.
    let _ = state.wait_for(|word| word != STARTING).await;
}

/// How the guest does.
pub(crate) fn health(agent: &Agent) -> Health {
    Health {
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        machine_id: agent.machine_id(),
        boot_id: crate::agent::lock(&agent.boot_id)
            .get_or_insert_with(crate::boot_id::read)
            .clone(),
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        uptime_ms: uptime_ms(),
        system: agent.system.word(),
        frozen: agent.is_frozen(),
    }
}

fn uptime_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let ms = now.tv_sec.saturating_mul(1000).saturating_add(now.tv_nsec / 1_000_000);
    u64::try_from(ms).unwrap_or_default()
}

/// Figures from inside the guest.
pub(crate) fn stats() -> Result<GuestStats, ApiError> {
    let read = |path: &str| {
        read_to_string(path)
            .map_err(|e| ApiError::new(ErrorCode::Guest, format!("can't read {path} in the guest: {e}")))
    };
    let (total, available) = memory(&read("/proc/meminfo")?);
    Ok(GuestStats {
        memory_used_bytes: total.saturating_sub(available),
        memory_total_bytes: total,
        uptime_ms: uptime_ms(),
        load1_centi: load_centi(&read("/proc/loadavg")?),
    })
}

/// Total and available memory in bytes, from the text of `/proc/meminfo`.
fn memory(meminfo: &str) -> (u64, u64) {
    let field = |name: &str| {
        let line = meminfo
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
        kib.unwrap_or(0).saturating_mul(1024)
    };
    (field("MemTotal"), field("MemAvailable"))
}

/// The first load average times 100, from the text of `/proc/loadavg`.
fn load_centi(loadavg: &str) -> u64 {
    let first = loadavg.split_whitespace().next().unwrap_or_default();
    let (whole, part) = first.split_once('.').unwrap_or((first, "0"));
    let part = format!("{part:0<2}");
    let whole: u64 = whole.parse().unwrap_or(0);
    whole
        .saturating_mul(100)
        .saturating_add(part.get(..2).and_then(|p| p.parse().ok()).unwrap_or(0))
}

/// Takes the guest down. Comes back at once; the answer has a head start.
pub(crate) fn shut_down(agent: &Agent, wanted: &Shutdown) -> Result<(), ApiError> {
    if !agent.in_guest() {
        return Err(ApiError::new(
            ErrorCode::Unsupported,
            "this agent does not run in a guest",
        ));
    }
    if wanted.graceful && agent.is_frozen() {
        return Err(crate::agent::frozen("nothing in it can end by itself"));
    }
    let init = if wanted.graceful {
        lock(&agent.system.init).clone()
    } else {
        None
    };
    let graceful = wanted.graceful;
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(20)).await;
        std::thread::spawn(move || match init {
            Some(init) => power::through_init(&init),
            None => power::down(graceful),
        })
    });
    Ok(())
}

/// What is left until `deadline`.
pub(crate) fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures() {
        let meminfo = "MemTotal:        1000 kB\nMemFree: 1 kB\nMemAvailable:     400 kB\n";
        assert_eq!(memory(meminfo), (1_024_000, 409_600));
        assert_eq!(memory("MemTotal: lots"), (0, 0));
        assert_eq!(load_centi("1.25 0.1 0.0 1/2 3"), 125);
        assert_eq!(load_centi("0.5"), 50);
        assert_eq!(load_centi(""), 0);
        assert_eq!(load_centi("99999999999999999999.99"), 99);
    }
}

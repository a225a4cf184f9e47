//! The bare engine: what restoring a guest and running a command in it costs without banger.
//!
//! No daemon, no database, no command line, no shim, no checks, no disks to make or to remove. One thread does, with everything
//! prepared:
//!
//! ```text
//!   spawn the engine ─▶ load the state ─▶ go on, greet ─▶ renew ─▶ one session of `true`, to its exit ─▶ kill, end
//! ```
//!
//! The engine has the very arguments of a machine that banger started from the same template, but for fresh disks and sockets of
//! its own. What is asked of the guest is what banger asks of it, with the same identity.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use banger_proto::agent::{GuestNetwork, Personalize, Renew};
use banger_proto::frame::{Decoder, Exit, Frame, Kind, Open};
use banger_testkit::TestEnv;
use serde_json::Value;

use super::agent::{self, Agent};
use super::engine::{self, Engine};
use super::figures::Parts;
use super::qmp::{self, Qmp};

/// Bytes of a cluster of the disks that banger makes.
const CLUSTER: usize = 64 << 10;
/// Files that a machine writes to.
const DISKS: [&str; 2] = ["root.qcow2", "work.qcow2"];

/// Everything to restore a guest again and again.
pub(super) struct Bare {
    words: Vec<String>,
    /// Sockets.
    sockets: PathBuf,
    /// Disks by their files, and how they begin: everything else of an empty one follows from that.
    disks: Vec<(PathBuf, Vec<u8>)>,
    state: PathBuf,
    /// The machine whose memory it is.
    whose: String,
    identity: Personalize,
}

impl Bare {
    /// Takes what it needs of a machine that runs and was started from a template. The machine is ended, and must not be deleted
    /// before the last measurement: layers of its disks are used.
    pub(super) fn of(env: &TestEnv, name: &str) -> io::Result<Self> {
        let machine = env.machine(name);
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (id, how, template) = (
            text(&machine["id"]),
            text(&machine["boot"]["how"]),
            text(&machine["boot"]["from"]),
        );
        if how != "template" {
            return Err(io::Error::other(format!(
                "the machine was not started from a template but by `{how}`"
            )));
        }
        let words = engine::words(env, name);
        let from = env.state().join("templates").join(template);
        let manifest: Value = serde_json::from_slice(&std::fs::read(from.join("manifest.json"))?)?;
        let own = env.state().join("machines").join(&id);
        let work = env.work().join(format!("bare-{name}"));
        let sockets = env.runtime().join(format!("bare-{name}"));
        std::fs::create_dir_all(&work)?;
        std::fs::create_dir_all(&sockets)?;

        let read = |path: PathBuf| std::fs::read_to_string(path).ok();
        let network = words
            .iter()
            .find_map(|w| w.strip_prefix("virtio-net-device,")?.split_once("mac="))
            .map(|(_, mac)| GuestNetwork {
                address: "10.0.2.15".to_owned(),
                prefix: 24,
                gateway: "10.0.2.2".to_owned(),
                dns: vec!["10.0.2.3".to_owned()],
                mac: Some(mac.split(',').next().unwrap_or(mac).to_owned()),
            });
        let identity = Personalize {
            machine_id: id.clone(),
            hostname: name.to_owned(),
            time_ns: 0,
            entropy: entropy(),
            network,
            authorized_keys: read(env.state().join("ssh/id_ed25519.pub"))
                .map(|k| k.trim().to_owned())
                .into_iter()
                .collect(),
            ssh_host_key: read(own.join("ssh_host_ed25519_key")),
            init: Default::default(),
            mask_units: Vec::new(),
        };
        let mut disks = Vec::new();
        let mut replaced = vec![
            (env.runtime().join("m").join(&id), sockets.clone()),
            (own.join("memory"), from.join("memory")),
        ];
        for file in DISKS {
            let path = own.join("disks").join(file);
            disks.push((work.join(file), header(&path)?));
            replaced.push((path, work.join(file)));
        }
        let words = replace(words, &replaced)?;
        env.ok(&format!("vm kill {name}"));
        Ok(Self {
            words,
            sockets,
            disks,
            state: from.join("state"),
            whose: text(&manifest["machine_id"]),
            identity,
        })
    }

    /// Makes fresh disks. Not measured.
    fn prepare(&self) -> io::Result<()> {
        for (path, header) in &self.disks {
            std::fs::write(path, header)?;
            let file = std::fs::File::options().write(true).open(path)?;
            file.set_len(4 * CLUSTER as u64)?;
            // Header, table of reference counts, reference counts, first-level table.
            file.write_all_at(&(2 * CLUSTER as u64).to_be_bytes(), CLUSTER as u64)?;
            file.write_all_at(&[0, 1, 0, 1, 0, 1, 0, 1], 2 * CLUSTER as u64)?;
        }
        for name in ["agent.sock", "control.sock"] {
            let _ = std::fs::remove_file(self.sockets.join(name));
        }
        Ok(())
    }

    /// From spawning the engine to its end, a command having run in between.
    pub(super) fn run(&self, parts: &mut Parts) -> io::Result<Duration> {
        self.prepare()?;
        let begun = Instant::now();
        let mut last = begun;
        let mut lap = |stage: &str| {
            parts.add(stage, last.elapsed().as_secs_f64() * 1e3);
            last = Instant::now();
        };
        let mut command = Command::new(&self.words[0]);
        command.args(&self.words[1..]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let engine = Engine(command.spawn()?);
        let mut control = Qmp::open(&self.sockets.join("control.sock"))?;
        lap("engine listens");
        control.load(&self.state)?;
        lap("state loaded");
        let mut stream = qmp::connect(&self.sockets.join("agent.sock"))?;
        let mut nonce = [0; 16];
        rustix::rand::getrandom(&mut nonce, rustix::rand::GetRandomFlags::empty())?;
        agent::call(&mut stream, nonce)?;
        control.execute("cont", Value::Object(Default::default()))?;
        let mut agent = Agent::greet(stream, nonce)?;
        lap("agent answers");
        self.renew(&mut agent)?;
        lap("renewed");
        session(&mut agent)?;
        lap("command ran");
        drop(engine);
        lap("engine ended");
        Ok(begun.elapsed())
    }

    fn renew(&self, agent: &mut Agent) -> io::Result<()> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let time_ns = now
            .ok()
            .and_then(|n| u64::try_from(n.as_nanos()).ok())
            .unwrap_or_default();
        let renew = Renew {
            machine_id: self.whose.clone(),
            time_ns,
            entropy: entropy(),
            identity: Some(Personalize {
                time_ns,
                ..self.identity.clone()
            }),
        };
        let answer = agent.post("/v1/renew", &serde_json::to_vec(&renew)?, |_| false)?;
        if answer.ok {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        Err(io::Error::other(format!("the guest was not renewed: {text}")))
    }
}

/// Runs `true` and waits for its exit. The request to go is sent along with that to open: nothing is gained by waiting.
fn session(agent: &mut Agent) -> io::Result<()> {
    let open = Open {
        command: vec!["true".to_owned()],
        ..Open::default()
    };
    let mut body = Frame::json(Kind::Open, &open).encode();
    body.extend(Frame::new(Kind::Go, Vec::new()).encode());
    let answer = agent.post("/v1/sessions/bench", &body, |body| exit(body).is_some())?;
    match exit(&answer.body) {
        Some(Exit { code: 0 }) => Ok(()),
        other => {
            let text = String::from_utf8_lossy(&answer.body).into_owned();
            Err(io::Error::other(format!("the command ended with {other:?}: {text}")))
        }
    }
}

/// The exit among frames, if it is there.
fn exit(bytes: &[u8]) -> Option<Exit> {
    let mut decoder = Decoder::new();
    decoder.push(bytes);
    while let Ok(Some(frame)) = decoder.next_frame() {
        if frame.kind == Kind::Exit {
            return frame.parse().ok();
        }
    }
    None
}

/// 64 random bytes in hexadecimal.
fn entropy() -> String {
    let mut bytes = [0; 64];
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The first cluster of a disk whose tables lie where banger puts them.
fn header(path: &Path) -> io::Result<Vec<u8>> {
    let mut header = vec![0; CLUSTER];
    std::fs::File::open(path)?.read_exact_at(&mut header, 0)?;
    let number = |at: usize| header[at..at + 8].iter().fold(0, |n, &b| n << 8 | usize::from(b));
    let as_expected = header.starts_with(b"QFI\xfb") && (number(40), number(48)) == (3 * CLUSTER, CLUSTER);
    if as_expected {
        return Ok(header);
    }
    Err(io::Error::other(format!(
        "{} is not laid out as a disk of banger",
        path.display()
    )))
}

/// Other paths in the arguments. Each has to be there.
fn replace(words: Vec<String>, paths: &[(PathBuf, PathBuf)]) -> io::Result<Vec<String>> {
    let mut words = words;
    for (old, new) in paths {
        let (old, new) = (old.display().to_string(), new.display().to_string());
        if !words.iter().any(|w| w.contains(&old)) {
            return Err(io::Error::other(format!("the engine's arguments do not name {old}")));
        }
        for word in &mut words {
            *word = word.replace(&old, &new);
        }
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_is_found_behind_other_frames() {
        let mut bytes = Frame::new(Kind::Stdout, b"x".to_vec()).encode();
        assert_eq!(exit(&bytes), None);
        bytes.extend(Frame::json(Kind::Exit, &Exit { code: 3 }).encode());
        assert_eq!(exit(&bytes[..bytes.len() - 1]), None);
        assert_eq!(exit(&bytes), Some(Exit { code: 3 }));
    }

    #[test]
    fn what_is_not_named_is_not_replaced_in_silence() {
        let paths = [(PathBuf::from("/a/b"), PathBuf::from("/c"))];
        let words = replace(vec!["path=/a/b/x,server=on".to_owned()], &paths).unwrap();
        assert_eq!(words, ["path=/c/x,server=on"]);
        assert!(replace(vec!["path=/a".to_owned()], &paths).is_err());
    }
}

//! A Firecracker that behaves like the documented one, as far as a driver can see, and fails where it is told to.
//!
//! It is this test program itself, started under the name `firecracker`. What it does differently is in `fake.json` in its working
//! directory, in [`Script`]. It keeps its states, refuses in the documented words what is out of order, opens the files that it is
//! told of, maps saved memory privately, makes its sockets, and writes saves in both ways. As 1.16 does, it delivers nothing to the
//! guest after a resume before a reset of the guest channel was acknowledged, which only a save sends. Its guest is a few bytes of memory and
//! answers on the guest channel: `p` N V fills page N with V, `g` N says what is in page N, everything else is said back.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::memory::{Memory, PAGE};

/// What it does differently.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Script {
    /// The id that it says it has.
    pub id: Option<String>,
    /// The version that it says it has, and behaves as; 1.16.1 when absent.
    pub version: Option<String>,
    /// It dies before it listens, having said this.
    pub stillborn: Option<String>,
    /// How long it takes until it listens, in milliseconds.
    pub listens_after: u64,
    /// The guest takes this many calls less than it gets, and a negative number: none.
    pub silent_calls: i64,
    /// And holds so many before that without an answer, as while the guest's kernel has no device yet.
    pub held_calls: i64,
    /// What a call meets, by method and path.
    pub faults: BTreeMap<String, Fault>,
}

impl Script {
    fn version(&self) -> &str {
        self.version.as_deref().unwrap_or("1.16.1")
    }

    /// One call meets something.
    pub fn with(call: &str, fault: Fault) -> Self {
        Self {
            faults: BTreeMap::from([(call.to_owned(), fault)]),
            ..Self::default()
        }
    }
}

/// What a call meets.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Fault {
    /// A refusal.
    Refuse(u16, String),
    /// Death, before the call was carried out.
    Crash,
    /// Death, after it was.
    CrashAfter,
    /// A connection that is closed without an answer; the call was carried out.
    HangUp,
    /// Milliseconds before it is carried out.
    Delay(u64),
    /// Silence for ever.
    Hang,
    /// An answer that is none.
    Garbage,
}

/// Whether this program is to be a Firecracker.
pub fn is_meant(args: &[String]) -> bool {
    args.iter().any(|a| a == "--api-sock") || args.get(1).is_some_and(|a| a == "--version")
}

/// Puts a program into a directory that is this fake.
pub fn install(dir: &Path) -> PathBuf {
    let path = dir.join("firecracker");
    std::os::unix::fs::symlink(std::env::current_exe().unwrap(), &path).unwrap();
    path
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    NotStarted,
    Running,
    Paused,
}

struct Machine {
    id: String,
    script: Script,
    state: State,
    configured: bool,
    restored: bool,
    kernel: Option<Value>,
    drives: BTreeMap<String, Value>,
    memory_mib: u64,
    memory: Option<Memory>,
    uds: Option<String>,
    metrics: Option<File>,
    calls: i64,
    channel: Channel,
}

/// What vsock's device keeps of the guest channel.
#[derive(Default)]
struct Channel {
    /// A reset was sent that the guest has not seen yet.
    reset: bool,
    /// Nothing is delivered to the guest.
    muted: bool,
    /// Resets that the guest has seen: each closes all connections.
    seen: u64,
}

impl Channel {
    fn resumed(&mut self, version: &str) {
        self.muted = version.starts_with("1.16.");
        if std::mem::take(&mut self.reset) {
            self.seen += 1;
            self.muted = false;
        }
    }
}

type Shared = Arc<Mutex<Machine>>;

/// Is a Firecracker.
pub fn main(args: &[String]) -> ExitCode {
    let value = |option: &str| {
        args.iter()
            .position(|a| a == option)
            .and_then(|at| args.get(at + 1))
            .cloned()
    };
    let (Some(socket), Some(id)) = (value("--api-sock"), value("--id")) else {
        println!("Firecracker v1.16.1\n\nSupported snapshot data format versions: v8.0.0");
        return ExitCode::SUCCESS;
    };
    let script: Script =
        fs::read("fake.json").map_or_else(|_| Script::default(), |text| serde_json::from_slice(&text).unwrap());
    if let Some(words) = &script.stillborn {
        eprintln!("{words}");
        return ExitCode::from(1);
    }
    std::thread::sleep(Duration::from_millis(script.listens_after));
    let listener = match UnixListener::bind(&socket) {
        Ok(listener) => listener,
        Err(e) => {
            eprintln!("cannot listen on {socket}: {e}");
            return ExitCode::from(1);
        }
    };
    let machine = Arc::new(Mutex::new(Machine {
        id: script.id.clone().unwrap_or(id),
        channel: Channel::default(),
        script,
        state: State::NotStarted,
        configured: false,
        restored: false,
        kernel: None,
        drives: BTreeMap::new(),
        memory_mib: 1,
        memory: None,
        uds: None,
        metrics: None,
        calls: 0,
    }));
    for stream in listener.incoming().flatten() {
        let machine = machine.clone();
        std::thread::spawn(move || serve(stream, &machine));
    }
    ExitCode::SUCCESS
}

/// One connection to the API.
fn serve(mut stream: UnixStream, machine: &Shared) {
    while let Some((call, body)) = request(&mut stream) {
        let log = OpenOptions::new().append(true).create(true).open("calls.log");
        let _ = log.and_then(|mut log| writeln!(log, "{call} {body}"));
        let fault = machine.lock().unwrap().script.faults.get(&call).cloned();
        if call == "PUT /snapshot/create" {
            // It comes before anything that can fail.
            let machine = &mut *machine.lock().unwrap();
            machine.channel.reset |= machine.state == State::Paused;
        }
        match &fault {
            Some(Fault::Refuse(status, words)) => {
                answer(&mut stream, *status, Some(&json!({ "fault_message": words })));
                continue;
            }
            Some(Fault::Crash) => std::process::abort(),
            Some(Fault::Delay(ms)) => std::thread::sleep(Duration::from_millis(*ms)),
            Some(Fault::Hang) => loop {
                std::thread::park();
            },
            Some(Fault::Garbage) => {
                let _ = stream.write_all(b"220 smtp ready\r\n\r\n");
                return;
            }
            _ => {}
        }
        let outcome = perform(machine, &call, &body);
        match fault {
            Some(Fault::CrashAfter) => std::process::abort(),
            Some(Fault::HangUp) => return,
            _ => {}
        }
        match outcome {
            Ok(None) => answer(&mut stream, 204, None),
            Ok(Some(value)) => answer(&mut stream, 200, Some(&value)),
            Err(words) => answer(&mut stream, 400, Some(&json!({ "fault_message": words }))),
        }
    }
}

fn request(stream: &mut UnixStream) -> Option<(String, Value)> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).ok()?;
    let length = head
        .lines()
        .find_map(|l| l.strip_prefix("Content-Length: "))
        .map_or(0, |n| n.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).ok()?;
    let mut words = head.split(' ');
    let call = format!("{} {}", words.next()?, words.next()?);
    let body = match length {
        0 => Value::Null,
        _ => serde_json::from_slice(&body).ok()?,
    };
    Some((call, body))
}

fn answer(stream: &mut UnixStream, status: u16, body: Option<&Value>) {
    let body = body.map(Value::to_string).unwrap_or_default();
    let mut head = format!("HTTP/1.1 {status} \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n");
    if !body.is_empty() {
        head.push_str(&format!(
            "Content-Type: application/json\r\nContent-Length: {}\r\n",
            body.len()
        ));
    }
    let _ = stream.write_all(format!("{head}\r\n{body}").as_bytes());
}

fn text<'a>(body: &'a Value, key: &str) -> Result<&'a str, String> {
    body[key].as_str().ok_or(format!("missing field `{key}`"))
}

fn perform(shared: &Shared, call: &str, body: &Value) -> Result<Option<Value>, String> {
    let machine = &mut *shared.lock().unwrap();
    let (method, path) = call.split_once(' ').unwrap();
    let started = machine.state != State::NotStarted;
    let before = |what: &str| match started {
        true => Err(format!(
            "The requested operation is not supported after starting the microVM: {what}."
        )),
        false => Ok(()),
    };
    let after = || match started {
        true => Ok(()),
        false => Err("The requested operation is not supported before starting the microVM.".to_owned()),
    };
    match (method, path) {
        ("GET", "/") => {
            let state = match machine.state {
                State::NotStarted => "Not started",
                State::Running => "Running",
                State::Paused => "Paused",
            };
            return Ok(Some(
                json!({ "app_name": "Firecracker", "id": machine.id, "state": state, "vmm_version": machine.script.version() }),
            ));
        }
        ("GET", "/vm/config") => {
            let kernel = machine.kernel.clone().unwrap_or(json!({ "kernel_image_path": "" }));
            let drives: Vec<&Value> = machine.drives.values().collect();
            return Ok(Some(json!({ "boot-source": kernel, "drives": drives })));
        }
        ("PUT", "/logger") => {
            text(body, "level")?;
        }
        ("PUT", "/metrics") => {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .open(text(body, "metrics_path")?);
            machine.metrics =
                Some(file.map_err(|e| format!("Cannot initialize the metrics system due to bad user input: {e}"))?);
        }
        ("PUT", "/boot-source") => {
            before("boot source")?;
            for key in ["kernel_image_path", "initrd_path"] {
                File::open(text(body, key)?).map_err(|e| format!("The {key} file cannot be opened: {e}"))?;
            }
            (machine.kernel, machine.configured) = (Some(body.clone()), true);
        }
        ("PUT", "/machine-config") => {
            before("machine configuration")?;
            (machine.memory_mib, machine.configured) = (body["mem_size_mib"].as_u64().ok_or("no memory")?, true);
        }
        ("PUT", "/entropy") => {
            before("entropy")?;
            machine.configured = true;
        }
        ("PUT", "/vsock") => {
            before("vsock")?;
            machine.configured = true;
            channel(shared, machine, text(body, "uds_path")?)?;
        }
        ("PUT", "/actions") => match text(body, "action_type")? {
            "InstanceStart" => {
                before("start")?;
                if machine.kernel.is_none() {
                    return Err("Cannot start microvm without kernel configuration.".to_owned());
                }
                machine.memory = Some(Memory::new((machine.memory_mib << 20) as usize, None));
                machine.state = State::Running;
                println!("the guest's console");
            }
            "FlushMetrics" => {
                if let Some(file) = &mut machine.metrics {
                    file.write_all(b"{\"vmm\":{\"panic_count\":0}}\n")
                        .map_err(|e| e.to_string())?;
                }
            }
            _ => after()?,
        },
        ("PATCH", "/vm") => {
            after()?;
            machine.state = match text(body, "state")? {
                "Paused" => State::Paused,
                _ => {
                    machine.channel.resumed(machine.script.version());
                    State::Running
                }
            };
        }
        ("PUT", "/snapshot/create") => {
            after()?;
            if machine.state != State::Paused {
                return Err("Create snapshot error: the microVM is not paused".to_owned());
            }
            create(machine, body).map_err(|e| format!("Create snapshot error: {e}"))?;
        }
        ("PUT", "/snapshot/load") => {
            if started || machine.configured {
                return Err(
                    "Loading a microVM snapshot not allowed after configuring boot-specific resources.".to_owned(),
                );
            }
            load(shared, machine, body).map_err(|e| format!("Load snapshot error: {e}"))?;
        }
        ("PUT", path) if path.starts_with("/drives/") => {
            before("drive")?;
            let file = text(body, "path_on_host")?;
            let opened = OpenOptions::new().read(true).write(true).open(file);
            opened.map_err(|e| {
                format!("Unable to create the block device: Error manipulating the backing file: {e} {file}")
            })?;
            machine.drives.insert(text(body, "drive_id")?.to_owned(), body.clone());
            machine.configured = true;
        }
        ("PUT", path) if path.starts_with("/network-interfaces/") => before("network")?,
        _ => return Err(format!("Invalid request method and/or path: {method} {path}.")),
    }
    Ok(None)
}

/// State is a line of JSON; memory is written as the real one writes it.
fn create(machine: &mut Machine, body: &Value) -> Result<(), String> {
    let told = |e: io::Error| e.to_string();
    let state = json!({ "memory_mib": machine.memory_mib, "uds": machine.uds, "drives": machine.drives, "kernel": machine.kernel });
    fs::write(text(body, "snapshot_path")?, state.to_string()).map_err(told)?;
    let path = text(body, "mem_file_path")?;
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(told)?;
    let size = machine.memory_mib << 20;
    if file.metadata().map_err(told)?.len() != size {
        file.set_len(0).map_err(told)?;
    }
    file.set_len(size).map_err(told)?;
    let memory = machine.memory.as_mut().ok_or("no memory")?;
    let all = text(body, "snapshot_type")? == "Full";
    for number in 0..memory.length / PAGE {
        if all || memory.touched[number] {
            file.write_all_at(memory.page(number), (number * PAGE) as u64)
                .map_err(told)?;
        }
    }
    Ok(())
}

fn load(shared: &Shared, machine: &mut Machine, body: &Value) -> Result<(), String> {
    let told = |e: io::Error| e.to_string();
    let state = fs::read(text(body, "snapshot_path")?).map_err(told)?;
    let state: Value = serde_json::from_slice(&state).map_err(|_| "the state is damaged")?;
    let file = File::open(text(&body["mem_backend"], "backend_path")?).map_err(told)?;
    machine.memory_mib = state["memory_mib"].as_u64().ok_or("the state has no memory")?;
    if file.metadata().map_err(told)?.len() != machine.memory_mib << 20 {
        return Err("the memory file has another size".to_owned());
    }
    for (name, drive) in state["drives"].as_object().ok_or("the state has no drives")? {
        let path = text(drive, "path_on_host")?;
        let opened = OpenOptions::new().read(true).write(true).open(path);
        opened.map_err(|e| format!("{path}: {e}"))?;
        machine.drives.insert(name.clone(), drive.clone());
    }
    // As the real one, whatever its documentation says of it.
    machine.kernel = Some(state["kernel"].clone());
    machine.memory = Some(Memory::new((machine.memory_mib << 20) as usize, Some(&file)));
    (machine.state, machine.restored) = (State::Paused, true);
    // It was sent when this was saved.
    machine.channel.reset = true;
    channel(shared, machine, text(&state, "uds")?)
}

/// Opens the guest channel.
fn channel(shared: &Shared, machine: &mut Machine, path: &str) -> Result<(), String> {
    let listener = UnixListener::bind(path).map_err(|e| format!("Error binding to the host-side Unix socket: {e}"))?;
    machine.uds = Some(path.to_owned());
    let shared = shared.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let shared = shared.clone();
            std::thread::spawn(move || guest(stream, &shared));
        }
    });
    Ok(())
}

/// Waits until the guest runs and is reached: one that is paused or muted does nothing. Which resets it has seen by then.
fn reached(shared: &Shared) -> u64 {
    loop {
        let machine = shared.lock().unwrap();
        if machine.state == State::Running && !machine.channel.muted {
            return machine.channel.seen;
        }
        drop(machine);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// One connection to the guest.
fn guest(mut stream: UnixStream, shared: &Shared) -> Option<()> {
    let mut line = Vec::new();
    let mut byte = [0];
    while byte[0] != b'\n' {
        stream.read_exact(&mut byte).ok()?;
        line.push(byte[0]);
    }
    {
        let mut machine = shared.lock().unwrap();
        machine.calls += 1;
        let (held, silent) = (machine.script.held_calls, machine.script.silent_calls);
        if machine.calls <= held {
            drop(machine);
            // Until the caller gives up.
            let _ = stream.read(&mut byte);
            return None;
        }
        if line != b"CONNECT 1024\n" || silent < 0 || machine.calls <= held + silent {
            return None;
        }
    }
    let seen = reached(shared);
    stream.write_all(b"OK 1073741824\n").ok()?;
    loop {
        stream.read_exact(&mut byte).ok()?;
        if reached(shared) != seen {
            return None;
        }
        let mut more = |count: usize| {
            let mut bytes = vec![0; count];
            stream.read_exact(&mut bytes).ok().map(|()| bytes)
        };
        let said = match byte[0] {
            b'p' => {
                let what = more(2)?;
                let mut machine = shared.lock().unwrap();
                let memory = machine.memory.as_mut()?;
                memory.page(what[0].into()).fill(what[1]);
                memory.touched[usize::from(what[0])] = true;
                b'P'
            }
            b'g' => {
                let what = more(1)?;
                shared.lock().unwrap().memory.as_mut()?.page(what[0].into())[PAGE - 1]
            }
            other => other,
        };
        stream.write_all(&[said]).ok()?;
    }
}

//! What several commands on machines share: options, references, and doing the same to many at once.

use std::collections::HashSet;
use std::io::BufRead;
use std::time::Duration;

use banger_core::{forward, name, reference, signal, size, spec};
use banger_proto::api::{CreateMachine, Forward, Machine, OnPanic, WaitFor};
use clap::{Args, ValueEnum};
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};

use crate::cli::{Context, OutputArgs, versioned};
use crate::client::Client;
use crate::completion;
use crate::error::{Error, Kind, Result};

/// Options that decide what a machine is made of.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct SpecArgs {
    /// Name of the machine; one is made up otherwise
    #[arg(long, value_parser = machine_name)]
    pub(crate) name: Option<String>,
    /// Image to start from
    #[arg(long, add = completion::images())]
    pub(crate) image: Option<String>,
    /// Kernel to boot
    #[arg(long, add = completion::kernels())]
    pub(crate) kernel: Option<String>,
    /// Virtual processors
    #[arg(long, value_name = "N", value_parser = vcpu)]
    pub(crate) vcpu: Option<u32>,
    /// Memory, like 512M or 2G
    #[arg(long, value_name = "SIZE", value_parser = memory)]
    pub(crate) memory: Option<u64>,
    /// Size of the root disk, like 8G; the default is 8G, or the size of the image where that is larger
    #[arg(long, value_name = "SIZE", value_parser = disk)]
    pub(crate) disk_size: Option<u64>,
    /// Engine: auto, qemu or firecracker
    #[arg(long, value_parser = engine)]
    pub(crate) engine: Option<String>,
    /// Network: bridge (system mode: an address of its own), user (out through the host, nothing comes in) or none
    #[arg(long, value_parser = network)]
    pub(crate) network: Option<String>,
    #[command(flatten)]
    pub(crate) nat: NatArgs,
    /// With a bridge: reach the other machines of this group, and be reached by them
    #[arg(long, value_name = "NAME", value_parser = machine_name)]
    pub(crate) net_group: Option<String>,
    /// Port of this host that leads to one of the machine: 8080:80, 127.0.0.2:8080:80, or 80 on any free port; may be repeated
    #[arg(short, long, value_name = "[IP:]HOST:GUEST", value_parser = publish)]
    pub(crate) publish: Vec<Forward>,
    /// Suspend the machine when it was not used for this long, like 30m; 0 is never
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) idle_suspend_after: Option<Duration>,
    /// When the guest's kernel has panicked: stop the machine (the default), or restart it from its disks
    #[arg(long, value_enum, value_name = "WHAT")]
    pub(crate) on_panic: Option<Panicked>,
    /// Boot, though there is a template to start from
    #[arg(long)]
    pub(crate) cold: bool,
}

/// See [`OnPanic`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Panicked {
    /// The machine is stopped
    Stop,
    /// It is started again, from its disks
    Restart,
}

impl From<Panicked> for OnPanic {
    fn from(panicked: Panicked) -> Self {
        match panicked {
            Panicked::Stop => Self::Stop,
            Panicked::Restart => Self::Restart,
        }
    }
}

/// Whether machines with a bridge reach what is outside.
#[derive(Debug, Clone, Copy, Default, Args)]
pub(crate) struct NatArgs {
    /// With a bridge: reach what is outside through this host (the default)
    #[arg(long, overrides_with = "no_nat")]
    nat: bool,
    /// With a bridge: reach nothing outside
    #[arg(long, overrides_with = "nat")]
    no_nat: bool,
}

impl NatArgs {
    /// For the API: absent where nothing was said.
    pub(crate) fn wanted(self) -> Option<bool> {
        match (self.nat, self.no_nat) {
            (true, _) => Some(true),
            (_, true) => Some(false),
            _ => None,
        }
    }
}

/// Options that decide when a start is done.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct WaitArgs {
    /// When the machine counts as started: agent (takes commands) or system (its init is through, the default)
    #[arg(long, value_enum, value_name = "WHAT", hide_possible_values = true)]
    pub(crate) wait: Option<Wait>,
    /// Longest time for the start, like 90s or 5m
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) timeout: Option<Duration>,
}

/// See [`WaitFor`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Wait {
    /// The agent takes commands
    Agent,
    /// The init system is through with its start-up
    System,
}

impl WaitArgs {
    /// For the API.
    pub(crate) fn wait_for(&self) -> WaitFor {
        match self.wait {
            Some(Wait::Agent) => WaitFor::Agent,
            Some(Wait::System) | None => WaitFor::System,
        }
    }

    /// For the API.
    pub(crate) fn timeout_ms(&self) -> Option<u64> {
        self.timeout.map(milliseconds)
    }
}

impl SpecArgs {
    /// The request that these options make.
    pub(crate) fn request(self, positional_image: Option<String>, wait: &WaitArgs) -> Result<CreateMachine> {
        if let (Some(one), Some(other)) = (&positional_image, &self.image) {
            return Err(Error::usage(format!("two images given: `{one}` and `{other}`")).hint("leave one of them out"));
        }
        Ok(CreateMachine {
            name: self.name,
            image: positional_image.or(self.image),
            kernel: self.kernel,
            vcpu: self.vcpu,
            memory_mib: self.memory,
            disk_bytes: self.disk_size,
            engine: self.engine,
            network: self.network,
            nat: self.nat.wanted(),
            net_group: self.net_group,
            forwards: self.publish,
            wait: wait.wait_for(),
            timeout_ms: wait.timeout_ms(),
            cold: self.cold,
            idle_suspend_after_ms: self.idle_suspend_after.map(milliseconds),
            on_panic: self.on_panic.map(OnPanic::from),
            ..CreateMachine::default()
        })
    }
}

/// A duration for the API.
pub(crate) fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Reads a machine's name.
pub(crate) fn machine_name(text: &str) -> Result<String, String> {
    name::MachineName::parse(text)
        .map(|n| n.as_str().to_owned())
        .map_err(|e| e.to_string())
}

/// Reads a number of processors.
pub(crate) fn vcpu(text: &str) -> Result<u32, String> {
    let number = text.parse().map_err(|_| "not a whole number".to_owned())?;
    spec::check_vcpu(number).map_err(|e| e.to_string())?;
    Ok(number)
}

fn bytes(text: &str) -> Result<u64, String> {
    size::parse(text).map_err(|e| format!("{e}; {}", e.hint()))
}

/// Reads an amount of memory, in MiB.
pub(crate) fn memory(text: &str) -> Result<u64, String> {
    let bytes = bytes(text)?;
    if !bytes.is_multiple_of(size::MIB) {
        return Err("not a whole number of MiB".to_owned());
    }
    let mib = bytes / size::MIB;
    spec::check_memory(mib).map_err(|e| e.to_string())?;
    Ok(mib)
}

/// Reads the size of a disk, in bytes.
pub(crate) fn disk(text: &str) -> Result<u64, String> {
    let bytes = bytes(text)?;
    spec::check_disk(bytes).map_err(|e| e.to_string())?;
    Ok(bytes)
}

fn engine(text: &str) -> Result<String, String> {
    spec::check_engine(text).map_err(|e| e.to_string())?;
    Ok(text.to_owned())
}

/// Reads the kind of a network.
pub(crate) fn network(text: &str) -> Result<String, String> {
    spec::check_network(text).map_err(|e| e.to_string())?;
    Ok(text.to_owned())
}

/// Reads a forwarded port.
pub(crate) fn publish(text: &str) -> Result<Forward, String> {
    forward::parse(text).map_err(|e| format!("{e}; {}", e.hint()))
}

/// The forwarded ports of a machine in one line.
pub(crate) fn forwards(machine: &Machine) -> String {
    let shown: Vec<String> = machine.forwards.iter().map(forward::show).collect();
    shown.join(", ")
}

/// Reads a duration.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    banger_core::config::parse_duration(text)
}

#[derive(Deserialize)]
struct Machines {
    machines: Vec<Machine>,
    #[serde(default)]
    recoverable: usize,
}

/// Reads the name of a signal for an engine.
pub(crate) fn signal(text: &str) -> Result<String, String> {
    match signal::number(text) {
        Some(_) => Ok(text.to_owned()),
        None => Err(format!("not a signal that is sent; possible: {}", signal::names())),
    }
}

/// All machines, in the daemon's order.
pub(crate) async fn machines(client: &Client) -> Result<Vec<Machine>> {
    Ok(client.get::<Machines>("machines").await?.machines)
}

/// The same, with how many machines have files and are not in the database.
pub(crate) async fn machines_and_lost(client: &Client) -> Result<(Vec<Machine>, usize)> {
    let found: Machines = client.get("machines").await?;
    Ok((found.machines, found.recoverable))
}

/// The machines that references mean, looked up in one snapshot; one that is meant twice comes once, where it came first.
///
/// What is to be lost has to be named as [`reference::find_exact`] asks for.
pub(crate) fn resolve(references: &[String], machines: &[Machine], meant: Meant) -> Vec<Result<Machine>> {
    let mut seen = HashSet::new();
    let find = |wanted: &str| match meant {
        Meant::Loosely => reference::find(wanted, machines.iter().map(candidate)),
        Meant::Exactly => reference::find_exact(wanted, machines.iter().map(candidate)),
    };
    references
        .iter()
        .filter_map(|wanted| match find(wanted) {
            Ok(index) => seen.insert(index).then(|| Ok(machines[index].clone())),
            Err(error) => Some(Err(unresolved(&error))),
        })
        .collect()
}

/// How a machine has to be named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Meant {
    /// By a beginning of its name or id that fits no other.
    Loosely,
    /// By its name, or four characters or more of its id: something is lost.
    Exactly,
}

fn candidate(m: &Machine) -> reference::Candidate<'_> {
    reference::Candidate {
        id: &m.id,
        name: &m.name,
        address: m.address.as_deref(),
    }
}

fn unresolved(error: &reference::ReferenceError) -> Error {
    let found = Error::new(Kind::NotFound, error.to_string());
    match error {
        reference::ReferenceError::NotFound {
            similar: Some(name), ..
        } => found.hint(format!("did you mean `{name}`?")),
        reference::ReferenceError::NotFound { similar: None, .. } => found.hint("`banger vm list` shows all machines"),
        reference::ReferenceError::Ambiguous { .. } => found.hint("write more of the name, or the id"),
        reference::ReferenceError::Inexact { .. } => found.hint(reference::EXACT_HINT),
    }
}

/// Asks before something is lost, with `--quiet` too. Nothing but a yes is one.
pub(crate) fn confirmed(context: &Context, question: &str) -> Result<bool> {
    context.printer.report(format!("{question} [y/N]"))?;
    let mut answer = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut answer)
        .map_err(|e| Error::failed(format!("cannot read the answer: {e}")))?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// What was done to a machine.
#[derive(Debug, Serialize)]
pub(crate) struct Done {
    id: String,
    name: String,
    result: &'static str,
    /// What the machine was already, for people.
    #[serde(skip)]
    already: Option<&'static str>,
}

/// What is said of a machine to which nothing had to be done.
const UNCHANGED: &str = "unchanged";

impl Done {
    /// This was done to the machine.
    pub(crate) fn new(machine: &Machine, result: &'static str) -> Self {
        Self {
            id: machine.id.clone(),
            name: machine.name.clone(),
            result,
            already: None,
        }
    }

    /// Nothing was done to the machine: it is so already, as in `is stopped already`.
    pub(crate) fn nothing(machine: &Machine, already: &'static str) -> Self {
        Self {
            already: Some(already),
            ..Self::new(machine, UNCHANGED)
        }
    }
}

/// Does the same to several machines at once. The good ones are done whatever becomes of the others; what is printed is in the
/// order of the references, and the status is that of the first failure.
pub(crate) async fn for_each<F, Fut>(
    context: &Context,
    client: &Client,
    (references, meant): (&[String], Meant),
    output: OutputArgs,
    act: F,
) -> Result<u8>
where
    F: Fn(Client, Machine) -> Fut,
    Fut: Future<Output = Result<Done>>,
{
    let resolved = resolve(references, &machines(client).await?, meant);
    for_all(context, client, resolved, output, act).await
}

/// Fails unless one of the references is the machine's whole name or id: what is done by force is not done to what only begins so.
pub(crate) fn named_in_full(machine: &Machine, references: &[String]) -> Result<()> {
    if references.iter().any(|r| *r == machine.name || *r == machine.id) {
        return Ok(());
    }
    let message = format!(
        "--force needs the whole name or id of a machine; this is `{}`",
        machine.name
    );
    Err(Error::new(Kind::Usage, message).hint(format!("name it: --force {}", machine.name)))
}

/// The same for machines that are known already.
pub(crate) async fn for_all<F, Fut>(
    context: &Context,
    client: &Client,
    resolved: Vec<Result<Machine>>,
    output: OutputArgs,
    act: F,
) -> Result<u8>
where
    F: Fn(Client, Machine) -> Fut,
    Fut: Future<Output = Result<Done>>,
{
    let acts = resolved.into_iter().map(|machine| async {
        match machine {
            Ok(machine) => act(client.sibling(), machine).await,
            Err(error) => Err(error),
        }
    });
    let results = join_all(acts).await;
    let (mut done, mut failures) = (Vec::new(), Vec::new());
    for result in results {
        match result {
            Ok(one) => done.push(one),
            Err(error) => failures.push(error),
        }
    }
    if output.json() {
        context
            .printer
            .json(&done.into_iter().map(versioned).collect::<Vec<_>>())?;
    } else {
        for one in done {
            context.printer.line(&one.name)?;
            if let Some(already) = one.already {
                context.printer.note(format!("{} {already}", one.name));
            }
        }
    }
    let Some(last) = failures.pop() else { return Ok(0) };
    match failures.first().map(|e| e.kind) {
        // One failure is shown by the one who called us.
        None => Err(last),
        Some(kind) => {
            failures
                .iter()
                .chain([&last])
                .for_each(|error| context.printer.error(error));
            Ok(kind.status())
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use banger_proto::api::{MachineSpec, MachineState};

    use super::*;

    pub(crate) fn machine(id: &str, name: &str) -> Machine {
        Machine {
            id: id.into(),
            name: name.into(),
            state: MachineState::Running,
            cause: None,
            stalled: None,
            spec: MachineSpec {
                image: "debian".into(),
                image_digest: "sha256:00".into(),
                kernel: "default".into(),
                kernel_digest: "sha256:11".into(),
                engine: "qemu".into(),
                accel: "tcg".into(),
                vcpu: 2,
                memory_mib: 1024,
                disk_bytes: 8 << 30,
                network: "user".into(),
                nat: true,
                net_group: None,
            },
            created_at: "2026-11-22T10:00:00Z".into(),
            started_at: None,
            pid: None,
            guest: None,
            workspace: None,
            boot: None,
            auto_remove: false,
            idle_suspend_after_ms: 0,
            on_panic: OnPanic::Stop,
            address: None,
            forwards: Vec::new(),
        }
    }

    #[test]
    fn references_resolve_in_order_without_duplicates() {
        let all = [machine("aaaa000000000000", "one"), machine("bbbb000000000000", "two")];
        let references = ["two".into(), "bbbb".into(), "nope".into(), "aa".into()];
        let exactly: Vec<_> = resolve(&references, &all, Meant::Exactly)
            .iter()
            .map(|r| r.as_ref().map(|m| m.name.clone()).map_err(|e| e.kind))
            .collect();
        assert_eq!(
            exactly,
            [Ok("two".to_owned()), Err(Kind::NotFound), Err(Kind::NotFound)]
        );
        let found = resolve(&references, &all, Meant::Loosely);
        let names: Vec<_> = found
            .iter()
            .map(|r| r.as_ref().map(|m| m.name.as_str()).map_err(|e| e.kind))
            .collect();
        assert_eq!(names, [Ok("two"), Err(Kind::NotFound), Ok("one")]);
    }

    #[test]
    fn sizes_need_a_unit_and_a_range() {
        assert_eq!(memory("2G"), Ok(2048));
        for bad in ["2", "1K", "64M", "999999G", "x"] {
            assert!(memory(bad).is_err(), "{bad}");
        }
        assert!(disk("1M").is_err());
        assert!(vcpu("0").is_err());
        assert!(machine_name("Not_A_Name").is_err());
    }

    #[test]
    fn the_last_word_on_nat_counts() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            nat: NatArgs,
        }
        use clap::Parser;
        for (line, wanted) in [
            ("x", None),
            ("x --nat", Some(true)),
            ("x --no-nat", Some(false)),
            ("x --nat --no-nat", Some(false)),
            ("x --no-nat --nat", Some(true)),
        ] {
            let line = Line::try_parse_from(line.split(' ')).unwrap_or_else(|e| panic!("{line}: {e}"));
            assert_eq!(line.nat.wanted(), wanted);
        }
    }
}

//! Copies of running machines, suspended machines, and many machines at once.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use banger_testkit::processes::{self, Process};
use banger_testkit::{Cmd, Done, TestEnv};

use super::Effort;
use super::figures::{Figure, Parts, Report, Target, Unit};
use super::templates::{IMAGES, environment};

const MIB: f64 = 1024.0 * 1024.0;
/// Copies of one machine.
const FORKS: u32 = 8;
/// Commands that run side by side where there are many.
const WIDTH: usize = 8;

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Runs commands, so many side by side, and gives back how each ended, in their order.
fn side_by_side(width: usize, commands: Vec<Cmd>) -> Vec<Done> {
    let queue = Mutex::new(commands.into_iter().enumerate().collect::<VecDeque<_>>());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    let mut done = std::thread::scope(|scope| {
        let worker = || {
            let mut done = Vec::new();
            while let Some((i, command)) = next() {
                done.push((i, command.run()));
            }
            done
        };
        let workers: Vec<_> = (0..width).map(|_| scope.spawn(worker)).collect();
        let finished = workers
            .into_iter()
            .flat_map(|w| w.join().unwrap_or_else(|p| std::panic::resume_unwind(p)));
        finished.collect::<Vec<_>>()
    });
    done.sort_by_key(|(i, _)| *i);
    done.into_iter().map(|(_, done)| done).collect()
}

/// Copies of a running machine, until a command has run in each.
pub(super) fn fork(effort: Effort, report: &mut Report) {
    let env = environment("bench-fork", &IMAGES);
    for image in IMAGES {
        env.banger(["vm", "create", "--name", "src", "--image", image])
            .deadline(180)
            .ok();
        env.ok("vm exec src -- true");
        let (mut answered, mut forked, mut paused) = (Vec::new(), Vec::new(), Vec::new());
        let mut parts = Parts::default();
        for _ in 0..effort.samples(5, 1) {
            let names: Vec<String> = (1..=FORKS).map(|i| format!("copy-{i}")).collect();
            let begun = Instant::now();
            env.banger(["vm", "fork", "src", "--name", "copy", "-n", &FORKS.to_string()])
                .deadline(180)
                .ok();
            forked.push(milliseconds(begun.elapsed()));
            let execs = names.iter().map(|n| env.banger(["vm", "exec", n, "--", "true"]));
            for done in side_by_side(names.len(), execs.collect()) {
                done.code(0);
            }
            answered.push(begun.elapsed().as_secs_f64());
            for (i, name) in names.iter().enumerate() {
                let boot = &env.machine(name)["boot"];
                if i == 0 {
                    paused.extend(boot["source_paused_ms"].as_f64());
                }
                parts.add_json(&boot["stages"]);
            }
            env.banger(["vm", "delete", "--force"]).args(&names).ok();
        }
        env.ok("vm delete --force src");
        let name = format!("{FORKS} forks of {image}");
        report.add(Figure::new(format!("{name}, all answering"), Unit::Seconds, answered).target(3.0));
        report.add(Figure::new(format!("{name}, vm fork alone"), Unit::Ms, forked));
        report.add(Figure::new(format!("{name}, source paused"), Unit::Ms, paused).target(300.0));
        report.parts(&format!("{name}, each"), parts);
    }
    env.close();
}

/// Suspending a machine with memory in use, and waking it by using it.
pub(super) fn suspend(effort: Effort, report: &mut Report) {
    /// What the guest is made to use. It does not compress, and no page is like another.
    const FILL: &str = "mkdir -p /dev/shm && { mountpoint -q /dev/shm || mount -t tmpfs tmpfs /dev/shm; } && \
        head -c 150000000 /dev/urandom >/dev/shm/fill && cksum </dev/shm/fill && free -m | sed -n 's/^Mem: *[0-9]* *\\([0-9]*\\).*/\\1/p'";
    let env = environment("bench-suspend", &["debian-slim"]);
    let (mut down, mut up, mut down_again, mut up_again) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut parts = Parts::default();
    let mut sizes = Vec::new();
    for i in 0..effort.samples(10, 1) {
        env.ok(&format!("vm create --name m{i}"));
        env.sh(&format!("m{i}"), FILL).code(0);
        let suspend = || milliseconds(env.ok(&format!("vm suspend m{i}")).took);
        let wake = || milliseconds(env.ok(&format!("vm exec m{i} -- true")).took);
        down.push(suspend());
        let id = env.machine(&format!("m{i}"))["id"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        sizes.push(allocated(&env.state().join("machines").join(id).join("suspended")) / MIB);
        up.push(wake());
        parts.add_json(&env.machine(&format!("m{i}"))["boot"]["stages"]);
        // What was saved once and not changed is in a file already.
        down_again.push(suspend());
        up_again.push(wake());
        env.ok(&format!("vm delete --force m{i}"));
    }
    let of = "512 MiB, 150 MB in use";
    report.add(Figure::new(format!("vm suspend, {of}"), Unit::Ms, down).target(1000.0));
    report.add(Figure::new(format!("vm suspend once more, {of}"), Unit::Ms, down_again));
    report.add(Figure::new("a suspended machine's memory on disk", Unit::MiB, sizes));
    let wake = format!("vm exec that wakes, {of}");
    report.add(Figure::new(&wake, Unit::Ms, up).target(300.0));
    report.parts(&wake, parts);
    report.add(Figure::new(
        format!("vm exec that wakes once more, {of}"),
        Unit::Ms,
        up_again,
    ));
    env.close();
}

/// Many machines at once: what each costs, whether all answer, whether anything is lost, and what is left of them.
pub(super) fn copies(effort: Effort, report: &mut Report) {
    let env = environment("bench-copies", &["debian-slim"]);
    let count = effort.samples(50, 8);
    let names: Vec<String> = (0..count).map(|i| format!("m{i}")).collect();
    let all = |command: &dyn Fn(&str) -> Cmd| {
        let begun = Instant::now();
        let done = side_by_side(WIDTH, names.iter().map(|n| command(n).deadline(300)).collect());
        (begun.elapsed().as_secs_f64(), done)
    };
    // The daemon is up and the template's files are in the page cache.
    env.ok("vm run --rm -- true");
    let (creating, created) = all(&|n| env.banger(["vm", "create", "--name", n]));
    let (answering, answers) = all(&|n| {
        let script = "hostname; echo \"$0\" >/root/mark && sync";
        env.banger(["vm", "exec", n, "--", "sh", "-c", script, n])
    });
    std::thread::sleep(Duration::from_secs(effort.samples(20, 3) as u64));
    let engines = env.engines();
    let memory: Vec<Memory> = engines.iter().filter_map(|p| Memory::of(p.pid)).collect();
    // A shim is the parent of its engine, and names no directory.
    let shims: Vec<Process> = engines
        .iter()
        .filter_map(|p| parent(p.pid))
        .filter(|p| p.program == "banger-shim")
        .collect();
    let shim_memory = shims
        .iter()
        .filter_map(|p| Memory::of(p.pid))
        .map(|m| m.dirty)
        .collect();
    let (_, kept) = all(&|n| env.banger(["vm", "exec", n, "--", "cat", "/root/mark"]));

    let said = |done: &[Done]| {
        let right = |(d, n): &(&Done, &String)| d.status == 0 && d.stdout.trim_ascii() == n.as_bytes();
        done.iter().zip(&names).filter(right).count() as f64
    };
    let (started, answered, kept) = (
        created.iter().filter(|d| d.status == 0).count() as f64,
        said(&answers),
        said(&kept),
    );
    let delete = env.banger(["vm", "delete", "--force"]).args(&names).deadline(300).run();
    let left = left(&env, &shims);
    left.iter().for_each(|l| eprintln!("  left: {l}"));

    let of = format!("{count} copies of debian-slim");
    let dirty = Figure::new(
        "an idle copy, Private_Dirty",
        Unit::MiB,
        memory.iter().map(|m| m.dirty).collect(),
    );
    report.add(dirty.target(60.0));
    let clean = memory.iter().map(|m| m.clean).collect();
    report.add(Figure::new("an idle copy, Private_Clean", Unit::MiB, clean));
    let pss = memory.iter().map(|m| m.pss).collect();
    report.add(Figure::new("an idle copy, Pss", Unit::MiB, pss));
    report.add(Figure::new("its shim, Private_Dirty", Unit::MiB, shim_memory));
    report.add(Figure::new(
        format!("{of}, created {WIDTH} at a time"),
        Unit::Seconds,
        vec![creating],
    ));
    report.add(Figure::new(
        format!("{of}, a command in each, {WIDTH} at a time"),
        Unit::Seconds,
        vec![answering],
    ));
    report.add(Figure::new(
        format!("{of}, deleted"),
        Unit::Seconds,
        vec![delete.took.as_secs_f64()],
    ));
    let whole = count as f64;
    for (what, number) in [("run", started), ("answer", answered), ("have what they wrote", kept)] {
        report.judge(Target::at_least(
            format!("{of}: that {what}"),
            Unit::Count,
            whole,
            Ok(number),
        ));
    }
    let what = format!("{of}: left after delete (processes, files, sockets)");
    report.judge(Target::at_most(what, Unit::Count, 0.0, Ok(left.len() as f64)));
    env.close();
}

/// The process that started another one.
fn parent(pid: i32) -> Option<Process> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let parent = status.lines().find_map(|l| l.strip_prefix("PPid:"))?;
    processes::read(parent.trim().parse().ok()?)
}

/// What is there of machines though all were deleted.
fn left(env: &TestEnv, shims: &[Process]) -> Vec<String> {
    let running = || -> Vec<Process> {
        let shims = shims.iter().filter(|p| processes::alive(p)).cloned();
        env.machinery().into_iter().chain(shims).collect()
    };
    // A shim outlives its engine by a moment.
    processes::reached(Duration::from_secs(2), || running().is_empty());
    let processes = running().into_iter().map(|p| format!("process {} ({})", p.pid, p.name));
    let directories = [env.state().join("machines"), env.runtime().join("m")];
    let entries = directories
        .iter()
        .filter_map(|d| std::fs::read_dir(d).ok())
        .flat_map(|entries| entries.flatten().map(|e| e.path().display().to_string()));
    let rows = env.machine_names().into_iter().map(|n| format!("machine {n}"));
    processes.chain(entries).chain(rows).collect()
}

/// Memory of a process in MiB.
struct Memory {
    /// Pages of its own that are nowhere else: what one more process costs.
    dirty: f64,
    /// Pages of files that nobody else maps now. They are the page cache's, and go when memory is short.
    clean: f64,
    /// Its pages, each divided by the number of its users.
    pss: f64,
}

impl Memory {
    fn of(pid: i32) -> Option<Self> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
        let field = |key: &str| {
            let line = text.lines().find_map(|l| l.strip_prefix(key))?;
            let kib: f64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
            Some(kib / 1024.0)
        };
        Some(Self {
            dirty: field("Private_Dirty:")?,
            clean: field("Private_Clean:")?,
            pss: field("Pss:")?,
        })
    }
}

/// Bytes that the files of a directory take on the disk.
fn allocated(dir: &Path) -> f64 {
    use std::os::unix::fs::MetadataExt;
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    files
        .filter_map(|e| e.metadata().ok())
        .map(|m| m.blocks() * 512)
        .sum::<u64>() as f64
}

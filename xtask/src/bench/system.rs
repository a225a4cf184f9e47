//! System mode in a network namespace of its own: calls of the root helper, adoption of many machines, and what many rounds leave.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use banger_system::helper::{Answer, Call, EngineUser, Reply, Request, TapRules, VERSION};
use banger_system::id::MachineId;
use banger_system::install::Layout;
use banger_testkit::{SystemEnv, binaries, processes};
use rustix::process::Signal;

use super::Effort;
use super::figures::{Figure, Report, Target, Unit};

const MIB: f64 = 1024.0 * 1024.0;
/// Machines that a restarted daemon finds again.
const ADOPTED: usize = 20;
/// A slot that the daemon does not give out in these benchmarks.
const SLOT: u32 = 200;

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// A connection to the helper.
struct Helper(UnixStream);

impl Helper {
    fn connect(env: &SystemEnv) -> Self {
        let path = Layout::below(env.root()).helper_socket();
        Self(UnixStream::connect(path).expect("the helper's socket"))
    }

    /// One call, and how long it took.
    fn call(&mut self, request: Request) -> (Answer, f64) {
        let call = Call {
            version: VERSION,
            op: None,
            request,
        };
        let body = serde_json::to_vec(&call).expect("a call");
        let mut frame = u32::try_from(body.len()).expect("a short call").to_be_bytes().to_vec();
        frame.extend(body);
        let begun = Instant::now();
        self.0.write_all(&frame).expect("the call is sent");
        let mut length = [0; 4];
        self.0.read_exact(&mut length).expect("an answer");
        let mut body = vec![0; u32::from_be_bytes(length) as usize];
        self.0.read_exact(&mut body).expect("the whole answer");
        let took = milliseconds(begun.elapsed());
        let reply: Reply = serde_json::from_slice(&body).expect("an answer");
        let answer = match reply {
            Reply::Ok(answer) => Ok(answer),
            Reply::Error(e) => Err(e),
        };
        (answer.expect("the helper does it"), took)
    }
}

/// Calls of the root helper.
pub(super) fn helper(effort: Effort, report: &mut Report) {
    let env = SystemEnv::new("bench-helper");
    let mut helper = Helper::connect(&env);
    let pings = (0..effort.samples(2000, 200))
        .map(|_| helper.call(Request::Ping).1)
        .collect();
    let ping = Figure::new("helper: a call that does nothing", Unit::Ms, pings);
    report.judge(Target::at_most(
        "helper: a call that does nothing, p50",
        Unit::Ms,
        1.0,
        Ok(ping.median()),
    ));
    report.add(ping.target(1.0));

    let machine = MachineId::from_random([7; 8]);
    let (mut pooled, mut made) = (Vec::new(), Vec::new());
    for round in 0..effort.samples(60, 10) {
        let ahead = round % 2 == 0;
        if ahead {
            helper.call(Request::TapsWarm { slots: vec![SLOT] });
        }
        let rules = TapRules {
            slot: SLOT,
            nat: true,
            peers: Vec::new(),
        };
        let (answer, took) = helper.call(Request::TapTake {
            machine: machine.clone(),
            user: EngineUser::Owner,
            rules,
        });
        match answer {
            Answer::Tap { pooled: true, .. } => pooled.push(took),
            _ => made.push(took),
        }
        helper.call(Request::TapDrop {
            machine: machine.clone(),
            slot: SLOT,
        });
    }
    let made = Figure::new("helper: a tap that is not in the pool", Unit::Ms, made);
    let pooled = Figure::new("helper: a tap from the pool", Unit::Ms, pooled).against(&made);
    report.judge(Target::at_most(
        "helper: a tap from the pool, p50",
        Unit::Ms,
        2.0,
        Ok(pooled.median()),
    ));
    report.add(pooled.target(2.0));
    report.add(made);

    let size = std::fs::metadata(binaries::program("banger-helper")).map_or(0, |m| m.len());
    let resident = processes::resident(env.helper_pid()).unwrap_or(0);
    for (what, bytes, bound) in [
        ("helper: size of the binary", size, 3.0),
        ("helper: resident memory", resident, 4.0),
    ] {
        report.judge(Target::at_most(what, Unit::MiB, bound, Ok(bytes as f64 / MIB)));
        report.add(Figure::new(what, Unit::MiB, vec![bytes as f64 / MIB]).target(bound));
    }
    env.close();
}

/// A daemon that is started anew beside running machines.
pub(super) fn adoption(effort: Effort, report: &mut Report) {
    let env = SystemEnv::new("bench-adopt");
    for i in 0..ADOPTED {
        env.create(&format!("m{i}"), &[]);
    }
    let mut took = Vec::new();
    for _ in 0..effort.samples(5, 2) {
        let engines: Vec<i32> = env.engines().iter().map(|p| p.pid).collect();
        env.end_daemon(Signal::KILL);
        env.start_daemon();
        took.extend(reconciled(&env.daemon_log()));
        let now: Vec<i32> = env.engines().iter().map(|p| p.pid).collect();
        assert_eq!((engines.len(), engines), (ADOPTED, now), "the same engines as before");
    }
    let name = format!("daemon: {ADOPTED} machines found again, in all");
    let figure = Figure::new(name.clone(), Unit::Seconds, took);
    report.judge(Target::at_most(name, Unit::Seconds, 1.0, Ok(figure.median())));
    report.add(figure.target(1.0));
    env.close();
}

/// From the daemon's first line to the one that says that all machines are known again, by its own log.
fn reconciled(log: &str) -> Option<f64> {
    let lines: Vec<serde_json::Value> = log.lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
    let last = |message: &str| {
        let line = lines.iter().rev().find(|l| l["message"] == message)?;
        seconds(line["timestamp"].as_str()?)
    };
    Some(last("reconciled")? - last("daemon starts")?)
}

/// Seconds of the day of a timestamp, `…T10:11:12.123456Z`.
fn seconds(timestamp: &str) -> Option<f64> {
    let time = timestamp.split('T').nth(1)?.strip_suffix('Z')?;
    time.split(':')
        .try_fold(0.0, |sum, part| Some(sum * 60.0 + part.parse::<f64>().ok()?))
}

/// Machines that come and go.
pub(super) fn rounds(effort: Effort, report: &mut Report) {
    let env = SystemEnv::new("bench-rounds");
    let open = |pid: i32| std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count) as f64;
    let round = |name: &str| {
        env.create(name, &[]);
        env.ok(&format!("vm delete --force {name}"));
    };
    round("warm");
    let before = [open(env.daemon_pid()), open(env.helper_pid())];
    let rounds = effort.samples(200, 10);
    let mut took = Vec::new();
    for i in 0..rounds {
        let begun = Instant::now();
        round(&format!("r{i}"));
        took.push(milliseconds(begun.elapsed()));
    }
    report.add(Figure::new("a machine made, started and removed", Unit::Ms, took));
    let what = format!("objects that {rounds} rounds leave");
    report.judge(Target::at_most(what, Unit::Count, 0.0, Ok(env.audit().len() as f64)));
    for (who, pid, before) in [
        ("daemon", env.daemon_pid(), before[0]),
        ("helper", env.helper_pid(), before[1]),
    ] {
        let what = format!("descriptors more in the {who} after {rounds} rounds");
        report.judge(Target::at_most(what, Unit::Count, 2.0, Ok(open(pid) - before)));
    }
    env.close();
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_log_tells_how_long_it_took() {
        let log = "{\"timestamp\":\"2026-11-22T10:59:59.500000Z\",\"message\":\"daemon starts\"}\nnoise\n\
                   {\"timestamp\":\"2026-11-22T11:00:00.250000Z\",\"message\":\"reconciled\"}\n";
        assert_eq!(super::reconciled(log), Some(0.75));
        assert_eq!(super::reconciled(""), None);
    }
}

//! What is measured through the real programs.

use std::time::{Duration, Instant};

use banger_testkit::{Repository, TestEnv, binaries, processes};

use super::Effort;
use super::figures::{Figure, Parts, Report, Unit};

const MIB: f64 = 1024.0 * 1024.0;

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Runs something some times; what the first run alone has to do is not counted.
fn repeat(samples: usize, mut once: impl FnMut() -> Duration) -> Vec<Duration> {
    once();
    (0..samples).map(|_| once()).collect()
}

fn in_ms(times: &[Duration]) -> Vec<f64> {
    times.iter().copied().map(ms).collect()
}

/// How long the command line takes to do nothing.
pub(super) fn cli(effort: Effort, report: &mut Report) {
    let env = TestEnv::bare("bench-cli");
    let n = effort.samples(50, 10);
    let nothing = repeat(n, || env.program("/bin/true").ok().took);
    let nothing = Figure::new("/bin/true", Unit::Ms, in_ms(&nothing));
    let version = repeat(n, || env.banger(["--version"]).ok().took);
    report.add(
        Figure::new("banger --version", Unit::Ms, in_ms(&version))
            .target(10.0)
            .against(&nothing),
    );
    report.add(nothing);
    env.close();
}

/// `vm list` with 20 machines.
pub(super) fn list(effort: Effort, report: &mut Report) {
    let env = TestEnv::new("bench-list");
    for i in 0..20 {
        env.ok(&format!("vm create --name m{i} --no-start"));
    }
    let times = repeat(effort.samples(50, 10), || env.ok("vm list").took);
    report.add(Figure::new("vm list, 20 machines", Unit::Ms, in_ms(&times)).target(20.0));
    env.close();
}

/// Resident memory of the daemon.
pub(super) fn memory(effort: Effort, report: &mut Report) {
    let env = TestEnv::new("bench-memory");
    env.ok("vm list");
    let rss = || processes::resident(env.daemon().expect("a daemon runs").pid).unwrap_or(0) as f64 / MIB;
    let idle = rss();
    report.add(Figure::new("daemon, idle", Unit::MiB, vec![idle]).target(20.0));
    let count = effort.samples(4, 2);
    let mut last = idle;
    let mut steps = Vec::new();
    for i in 0..count {
        env.banger(["vm", "create", "--name", &format!("m{i}")])
            .deadline(120)
            .ok();
        env.ok(&format!("vm exec m{i} -- true"));
        let now = rss();
        steps.push(now - last);
        last = now;
    }
    // The first start fills the allocator's pools once; what a machine costs is seen on the others.
    report.add(Figure::new("daemon, first machine", Unit::MiB, steps[..1].to_vec()));
    report.add(Figure::new("daemon, each further machine", Unit::MiB, steps[1..].to_vec()).target(1.0));
    env.close();
}

/// From nothing to a machine in which a command has run.
pub(super) fn start(effort: Effort, report: &mut Report) {
    let env = TestEnv::new("bench-start");
    for (image, target, samples) in [
        ("debian-slim", 5.0, effort.samples(5, 1)),
        ("debian", 15.0, effort.samples(3, 1)),
    ] {
        let mut ready = Vec::new();
        let mut parts = Parts::default();
        for i in 0..samples {
            let name = format!("m{i}");
            let begun = Instant::now();
            env.banger(["vm", "create", "--cold", "--name", &name, "--image", image])
                .deadline(180)
                .ok();
            env.ok(&format!("vm exec {name} -- true"));
            ready.push(begun.elapsed().as_secs_f64());
            let machine = env.machine(&name);
            parts.add_json(&machine["boot"]["stages"]);
            env.ok(&format!("vm delete {name}"));
        }
        let cold = Figure::new(format!("cold start, {image}"), Unit::Seconds, ready).target(target);
        report.add(cold);
        report.parts(&format!("cold start, {image}"), parts);
    }
    env.close();
}

/// A command in a running machine.
pub(super) fn exec(effort: Effort, report: &mut Report) {
    let env = TestEnv::new("bench-exec");
    let n = effort.samples(50, 10);
    for image in ["debian-slim", "debian"] {
        env.banger(["vm", "create", "--name", "m", "--image", image])
            .deadline(180)
            .ok();
        let times = repeat(n, || env.ok("vm exec m -- true").took);
        report.add(Figure::new(format!("vm exec -- true, {image}"), Unit::Ms, in_ms(&times)).target(30.0));
        env.ok("vm delete m");
    }
    env.close();
}

/// Bytes through a command's standard streams.
pub(super) fn throughput(effort: Effort, report: &mut Report) {
    let env = TestEnv::new("bench-throughput");
    env.banger(["vm", "create", "--name", "m"]).deadline(180).ok();
    let megabytes = 300_u32;
    let count = format!("{megabytes}000000");
    let n = effort.samples(5, 2);
    let rate = |times: &[Duration]| times.iter().map(|t| f64::from(megabytes) / t.as_secs_f64()).collect();
    let null = || {
        std::fs::OpenOptions::new()
            .write(true)
            .open("/dev/null")
            .expect("/dev/null")
    };
    let out = repeat(n, || {
        env.banger(["vm", "exec", "m", "--", "head", "-c", &count, "/dev/zero"])
            .stdout_file(null())
            .ok()
            .took
    });
    report.add(Figure::new("guest to host, standard output", Unit::MegabytesPerSecond, rate(&out)).target(50.0));
    let file = env.work().join("zero");
    std::fs::File::create(&file)
        .and_then(|f| f.set_len(u64::from(megabytes) * 1_000_000))
        .expect("a sparse file");
    let sent = repeat(n, || {
        let input = std::fs::File::open(&file).expect("the file");
        env.banger(["vm", "exec", "m", "--", "sh", "-c", "cat >/dev/null"])
            .stdin_file(input)
            .ok()
            .took
    });
    report.add(Figure::new(
        "host to guest, standard input",
        Unit::MegabytesPerSecond,
        rate(&sent),
    ));
    // What the guest alone takes to make these bytes, so that the share of the channel can be told.
    let inside = repeat(n, || {
        env.sh("m", &format!("head -c {count} /dev/zero | cat >/dev/null"))
            .code(0)
            .took
    });
    report.add(Figure::new(
        "inside the guest, through a pipe",
        Unit::MegabytesPerSecond,
        rate(&inside),
    ));
    env.close();
}

/// 100 MB of workspace into a machine.
pub(super) fn upload(effort: Effort, report: &mut Report) {
    let env = TestEnv::new("bench-upload");
    let repository = Repository::empty(env.work().join("repo"));
    let mut noise = Noise(1);
    for i in 0..100 {
        repository.write(&format!("file{i}"), noise.bytes(1_000_000));
    }
    repository.commit("a hundred megabytes");
    let n = effort.samples(5, 1);
    let job = |args: &[&str]| {
        env.banger(["vm", "run", "--rm"])
            .args(args)
            .args(["--", "true"])
            .cwd(repository.path())
            .deadline(300)
            .ok()
            .took
    };
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for _ in 0..n {
        without.push(job(&[]).as_secs_f64());
        with.push(job(&["."]).as_secs_f64());
    }
    let bare = Figure::new("vm run --rm -- true", Unit::Seconds, without);
    report.add(Figure::new("vm run --rm . -- true, 100 MB", Unit::Seconds, with).against(&bare));
    report.add(bare);

    env.banger(["vm", "create", "--name", "m"]).deadline(120).ok();
    let tree = env.work().join("tree");
    std::fs::create_dir(&tree).expect("a directory");
    for i in 0..100 {
        std::fs::write(tree.join(format!("file{i}")), noise.bytes(1_000_000)).expect("a file");
    }
    let rate = |times: &[Duration]| times.iter().map(|t| 100.0 / t.as_secs_f64()).collect();
    let up = repeat(n, || {
        env.banger(["vm", "cp", "tree", "m:/tmp/in"]).deadline(120).ok().took
    });
    report.add(Figure::new(
        "vm cp into the guest, 100 MB",
        Unit::MegabytesPerSecond,
        rate(&up),
    ));
    let down = repeat(n, || {
        let _ = std::fs::remove_dir_all(env.work().join("out"));
        env.banger(["vm", "cp", "m:/tmp/in", "out"]).deadline(120).ok().took
    });
    report.add(Figure::new(
        "vm cp out of the guest, 100 MB",
        Unit::MegabytesPerSecond,
        rate(&down),
    ));
    env.close();
}

/// What a first start prepares.
pub(super) fn build(effort: Effort, report: &mut Report) {
    let mut kernel = Vec::new();
    let mut images = [Vec::new(), Vec::new()];
    for _ in 0..effort.samples(2, 1) {
        let env = TestEnv::bare("bench-build");
        kernel.push(env.banger(["kernel", "import"]).deadline(900).ok().took.as_secs_f64());
        for (times, image) in images.iter_mut().zip(["debian-slim", "debian"]) {
            times.push(
                env.banger(["image", "build", image])
                    .deadline(1800)
                    .ok()
                    .took
                    .as_secs_f64(),
            );
        }
        env.close();
    }
    report.add(Figure::new("kernel import", Unit::Seconds, kernel));
    let [slim, debian] = images;
    report.add(Figure::new("image build debian-slim", Unit::Seconds, slim));
    report.add(Figure::new("image build debian", Unit::Seconds, debian));
    let sizes = binaries::PROGRAMS.map(|p| {
        (
            p,
            std::fs::metadata(binaries::program(p)).map_or(0, |m| m.len()) as f64 / MIB,
        )
    });
    for (program, size) in sizes {
        report.add(Figure::new(format!("size of {program}"), Unit::MiB, vec![size]));
    }
}

/// Bytes that do not compress, the same in every run.
struct Noise(u64);

impl Noise {
    fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(count + 8);
        while bytes.len() < count {
            // xorshift64: fast, and good enough to defeat compression.
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            bytes.extend_from_slice(&self.0.to_le_bytes());
        }
        bytes.truncate(count);
        bytes
    }
}

//! Starting machines from templates: one, many at once, and how that compares.

use std::time::{Duration, Instant};

use banger_testkit::TestEnv;

use super::Effort;
use super::bare::Bare;
use super::figures::{Figure, Parts, Report, Target, Unit};
use super::podman::{self, Podman};

/// Two processors, unlike the machines of the tests.
const CONFIG: &str =
    "default_image_name = \"debian-slim\"\n\n[vm_defaults]\nvcpu = 2\nmemory_mib = 512\ndisk_size = \"4G\"\n";

/// Images that are measured.
pub(super) const IMAGES: [&str; 2] = ["debian-slim", "debian"];

/// An environment whose machines have two processors and 512 MiB, with a template for each image.
pub(super) fn environment(name: &str, images: &[&str]) -> TestEnv {
    let env = TestEnv::new(name);
    env.config(CONFIG);
    for image in images {
        env.banger(["template", "build", image]).deadline(300).ok();
    }
    env
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// `vm run --rm IMAGE -- true`, whole process.
fn once(env: &TestEnv, image: &str, flags: &[&str]) -> Duration {
    env.banger(["vm", "run", "--rm"])
        .args(flags)
        .args([image, "--", "true"])
        .deadline(180)
        .ok()
        .took
}

/// Something to compare with, which may not work here.
struct Rival<T> {
    with: Result<T, String>,
    samples: Vec<f64>,
}

impl<T> Rival<T> {
    /// One that has been tried once.
    fn new(with: Result<T, String>) -> Self {
        if let Err(why) = &with {
            eprintln!("  {why}");
        }
        Self {
            with,
            samples: Vec::new(),
        }
    }

    fn sample(&mut self, run: impl FnOnce(&mut T) -> Result<Duration, String>) {
        if let Ok(with) = &mut self.with {
            match run(with) {
                Ok(time) => self.samples.push(milliseconds(time)),
                Err(why) => *self = Self::new(Err(why)),
            }
        }
    }

    fn figure(&self, name: String) -> Result<Figure, String> {
        match &self.with {
            Ok(_) => Ok(Figure::new(name, Unit::Ms, self.samples.clone())),
            Err(why) => Err(why.clone()),
        }
    }
}

/// A run from a template, beside a cold one, the bare engine and podman.
pub(super) fn run(effort: Effort, report: &mut Report) {
    let env = environment("bench-run", &IMAGES);
    let mut shell = match podman::missing() {
        None => Podman::start(&env),
        Some(why) => Err(why),
    };
    for image in IMAGES {
        compare(&env, image, effort, report, &mut shell);
    }
    drop(shell);
    env.close();
}

fn compare(env: &TestEnv, image: &str, effort: Effort, report: &mut Report, shell: &mut Result<Podman, String>) {
    let name = format!("src-{image}");
    env.banger(["vm", "create", "--name", &name, "--image", image])
        .deadline(180)
        .ok();
    let mut container = Rival::new(match shell {
        Ok(shell) => shell.image_of(env, &name).and_then(|image| {
            shell.run(&image)?;
            Ok((shell, image))
        }),
        Err(why) => Err(why.clone()),
    });
    let mut bare_parts = Parts::default();
    let bare = Bare::of(env, &name).and_then(|bare| {
        bare.run(&mut Parts::default())?;
        Ok(bare)
    });
    let mut bare = Rival::new(bare.map_err(|e| format!("the bare engine does not run here: {e}")));
    once(env, image, &[]);

    // One after the other in turns: what slows this host for a while slows all of them.
    let (n, every) = (effort.samples(40, 3), effort.samples(8, 3));
    let (mut warm, mut cold) = (Vec::new(), Vec::new());
    for i in 0..n {
        warm.push(milliseconds(once(env, image, &[])));
        bare.sample(|bare| {
            bare.run(&mut bare_parts)
                .map_err(|e| format!("the bare engine failed: {e}"))
        });
        container.sample(|(shell, image)| shell.run(image));
        if i % every == 0 {
            cold.push(milliseconds(once(env, image, &["--cold"])));
        }
    }
    let mut parts = Parts::default();
    for _ in 0..effort.samples(10, 2) {
        let done = env
            .banger(["vm", "run", "--rm", "--timings", "--json", image, "--", "true"])
            .ok();
        let last = done.err().lines().last().map(serde_json::from_str::<serde_json::Value>);
        if let Some(Ok(timings)) = last {
            parts.add_json(&timings["stages"]);
        }
    }
    env.ok(&format!("vm delete --force {name}"));

    let cold = Figure::new(format!("vm run --rm --cold {image} -- true"), Unit::Ms, cold);
    let bare = bare.figure(format!("bare engine, {image}"));
    let container = container.figure(format!("podman run --rm {image} true"));
    let mut warm = Figure::new(format!("vm run --rm {image} -- true"), Unit::Ms, warm).against_as("cold", &cold);
    for (name, other) in [("bare engine", &bare), ("podman", &container)] {
        if let Ok(other) = other {
            warm = warm.against_as(name, other);
        }
    }
    let what = warm.name().to_owned();
    let over =
        |other: &Result<Figure, String>| other.as_ref().map(|f| warm.median() / f.median()).map_err(Clone::clone);
    let of = |which: &str| format!("{what}, {which}");
    let enough = if n >= 20 {
        Ok(warm.percentile(95))
    } else {
        Err(format!("{n} samples"))
    };
    let mut targets = vec![
        Target::at_most(of("p50"), Unit::Ms, 250.0, Ok(warm.median())),
        Target::at_most(of("p95"), Unit::Ms, 400.0, enough),
        Target::at_most(of("this ÷ bare engine"), Unit::Times, 1.6, over(&bare)),
        Target::at_most(of("this ÷ podman"), Unit::Times, 0.7, over(&container)),
    ];
    if image == "debian" {
        // A guest without an init boots in a fraction of the time: there is less to gain.
        let times = Ok(cold.median() / warm.median());
        targets.push(Target::at_least(of("cold ÷ this"), Unit::Times, 20.0, times));
    }
    report.add(warm);
    report.parts(&what, parts);
    report.add(cold);
    if let Ok(bare) = bare {
        let name = bare.name().to_owned();
        report.add(bare);
        report.parts(&name, bare_parts);
    }
    if let Ok(container) = container {
        report.add(container);
    }
    targets.into_iter().for_each(|target| report.judge(target));
}

/// Twenty at once.
pub(super) fn burst(effort: Effort, report: &mut Report) {
    const AT_ONCE: usize = 20;
    let env = environment("bench-burst", &IMAGES);
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as f64;
    for image in IMAGES {
        once(&env, image, &[]);
        let (mut single, mut total) = (Vec::new(), Vec::new());
        for _ in 0..effort.samples(5, 1) {
            single.extend((0..effort.samples(4, 3)).map(|_| milliseconds(once(&env, image, &[]))));
            let begun = Instant::now();
            let all: Vec<_> = (0..AT_ONCE)
                .map(|_| {
                    env.banger(["vm", "run", "--rm", image, "--", "true"])
                        .deadline(180)
                        .spawn()
                })
                .collect();
            for one in all {
                one.wait().code(0);
            }
            total.push(milliseconds(begun.elapsed()));
        }
        let single = Figure::new(format!("one vm run of {image}"), Unit::Ms, single);
        let bound = AT_ONCE as f64 * single.median() / cores * 1.3;
        let name = format!("{AT_ONCE} vm run of {image} at once, all done");
        report.add(Figure::new(name, Unit::Ms, total).target(bound).against(&single));
        report.add(single);
    }
    env.close();
}

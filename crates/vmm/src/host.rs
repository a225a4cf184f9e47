//! What this host can do: processor, KVM, memory, clock, boot id.
//!
//! Everything is read from roots that are parameters, so a test hands over a tree of its own. Nothing fails: what cannot be
//! read is said in [`HostFacts::doubts`].

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use banger_core::host::{AccelChoice, KvmDevice, Virtualisation, choose_accel};
use rustix::time::{ClockId, clock_gettime};

use crate::sys;

/// Where the kernel's own file systems are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roots {
    /// `/proc`.
    pub proc: PathBuf,
    /// `/dev`.
    pub dev: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Self {
            proc: "/proc".into(),
            dev: "/dev".into(),
        }
    }
}

/// Where the frequency of the time stamp counter comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TscSource {
    /// The processor states it; it could not be measured.
    Stated,
    /// Measured against the monotonic clock.
    Measured,
}

/// Frequency of the host's time stamp counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tsc {
    /// In kHz.
    pub khz: u64,
    /// Where it comes from.
    pub source: TscSource,
}

/// Facts of the host that decide how machines run here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFacts {
    /// Name of the processor.
    pub cpu_model: Option<String>,
    /// Virtualisation extension that it shows.
    pub virtualisation: Option<Virtualisation>,
    /// What `/dev/kvm` said.
    pub kvm: KvmDevice,
    /// Processors that are online.
    pub cpus: u32,
    /// Processors that this process may use (affinity, control group); never more than `cpus`.
    pub usable_cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Memory in MiB that could be had now.
    pub available_mib: u64,
    /// Time stamp counter, where it is fit for use.
    pub tsc: Option<Tsc>,
    /// Identifier of this boot of the host.
    pub boot_id: String,
    /// How guests run here, and why.
    pub accel: AccelChoice,
    /// What could not be read, for `doctor`.
    pub doubts: Vec<String>,
}

impl HostFacts {
    /// Reads them. Takes some 25 ms, nearly all of it for the clock: read once and keep.
    pub fn read(roots: &Roots) -> Self {
        let mut doubts = Vec::new();
        let cpuinfo = slurp(&roots.proc.join("cpuinfo"), &mut doubts);
        let meminfo = slurp(&roots.proc.join("meminfo"), &mut doubts);
        let virtualisation = Virtualisation::from_cpuinfo(&cpuinfo);
        let kvm = kvm_device(&roots.dev.join("kvm"));
        let cpus = field_values(&cpuinfo, "processor").count().max(1) as u32;
        let parallelism = std::thread::available_parallelism().map_or(cpus, |n| n.get() as u32);
        let boot_id = boot_id(&roots.proc).unwrap_or_else(|why| {
            doubts.push(why);
            String::new()
        });
        let tsc = tsc();
        if tsc.is_none() {
            doubts.push("the time stamp counter runs unevenly: emulated guests may hang at boot".to_owned());
        }
        Self {
            cpu_model: field_values(&cpuinfo, "model name").next().map(|m| m.trim().to_owned()),
            virtualisation,
            accel: choose_accel(virtualisation, &kvm),
            kvm,
            cpus,
            usable_cpus: parallelism.min(cpus),
            memory_mib: kib(&meminfo, "MemTotal") / 1024,
            available_mib: kib(&meminfo, "MemAvailable") / 1024,
            tsc,
            boot_id,
            doubts,
        }
    }

    /// Frequency of the time stamp counter for the kernel line.
    pub fn tsc_khz(&self) -> Option<u64> {
        self.tsc.map(|t| t.khz)
    }
}

/// Reads the identifier of this boot.
pub fn boot_id(proc: &Path) -> Result<String, String> {
    let path = proc.join("sys/kernel/random/boot_id");
    let text = read_bounded(&path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
    let id = text.trim();
    let fits = id.len() == 36 && id.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
    if fits {
        Ok(id.to_owned())
    } else {
        Err(format!("{} is not a boot id", path.display()))
    }
}

/// Frequency of the time stamp counter. Blocks for some 25 ms, longer where the first readings disagree.
///
/// It is measured, because a guest's clock goes by it for days: a reading is good to a few millionths, what the processor
/// states is a round figure, and in a virtual machine perhaps another processor's.
pub fn tsc() -> Option<Tsc> {
    let measured = [25, 50, 100].iter().find_map(|ms| steady(Duration::from_millis(*ms)));
    let (khz, source) = match measured {
        Some(khz) => (khz, TscSource::Measured),
        None => (sys::stated_tsc_khz()?, TscSource::Stated),
    };
    Some(Tsc { khz, source })
}

/// Two halves of a window that must agree within 1/2000.
fn steady(window: Duration) -> Option<u64> {
    let a = paired()?;
    std::thread::sleep(window / 2);
    let b = paired()?;
    std::thread::sleep(window / 2);
    let c = paired()?;
    let (first, second, whole) = (rate(a, b)?, rate(b, c)?, rate(a, c)?);
    near(first, second, 2000).then_some(whole)
}

/// Whether two figures differ by less than one part in `parts`.
fn near(a: u64, b: u64, parts: u64) -> bool {
    a.abs_diff(b).saturating_mul(parts) < a.max(b)
}

/// Counter and clock (ns) of one moment: of several tries the one that took the counter the shortest.
fn paired() -> Option<(u64, u64)> {
    let mut best: Option<(u64, u64, u64)> = None;
    for _ in 0..16 {
        let before = sys::time_stamp()?;
        let now = clock_gettime(ClockId::Monotonic);
        let after = sys::time_stamp()?;
        let gap = after.checked_sub(before)?;
        if best.is_none_or(|(least, ..)| gap < least) {
            let ns = u64::try_from(now.tv_sec).ok()? * 1_000_000_000 + u64::try_from(now.tv_nsec).ok()?;
            best = Some((gap, before + gap / 2, ns));
        }
    }
    best.map(|(_, ticks, ns)| (ticks, ns))
}

/// Ticks per millisecond between two moments.
fn rate((ticks_a, ns_a): (u64, u64), (ticks_b, ns_b): (u64, u64)) -> Option<u64> {
    let ticks = u128::from(ticks_b.checked_sub(ticks_a)?);
    let ns = u128::from(ns_b.checked_sub(ns_a)?);
    if ns == 0 {
        return None;
    }
    let khz = u64::try_from((ticks * 1_000_000 + ns / 2) / ns).ok()?;
    (khz > 0).then_some(khz)
}

fn kvm_device(path: &Path) -> KvmDevice {
    let file = match File::options().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return KvmDevice::Missing,
        Err(e) => return KvmDevice::Unusable(e.to_string()),
    };
    match sys::kvm_api_version(&file) {
        Ok(version) => KvmDevice::Answers(version),
        Err(e) => KvmDevice::Unusable(std::io::Error::from(e).to_string()),
    }
}

/// Values of all lines `key : value`.
fn field_values<'a>(text: &'a str, key: &'a str) -> impl Iterator<Item = &'a str> {
    text.lines().filter_map(move |line| {
        let (k, v) = line.split_once(':')?;
        (k.trim_end() == key).then_some(v)
    })
}

fn kib(meminfo: &str, key: &str) -> u64 {
    field_values(meminfo, key)
        .next()
        .and_then(|v| v.split_ascii_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

fn slurp(path: &Path, doubts: &mut Vec<String>) -> String {
    read_bounded(path).unwrap_or_else(|e| {
        doubts.push(format!("cannot read {}: {e}", path.display()));
        String::new()
    })
}

fn read_bounded(path: &Path) -> std::io::Result<String> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(8 << 20).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use banger_core::host::Accel;

    use super::*;

    const BOOT: &str = "6b4db22b-3ca2-4fa1-af1d-b71352e1e73c";

    fn tree(flags: &str, kvm: bool) -> (tempfile::TempDir, Roots) {
        let dir = tempfile::tempdir().unwrap();
        let roots = Roots {
            proc: dir.path().join("proc"),
            dev: dir.path().join("dev"),
        };
        fs::create_dir_all(roots.proc.join("sys/kernel/random")).unwrap();
        fs::create_dir_all(&roots.dev).unwrap();
        let cpu = |n| format!("processor\t: {n}\nmodel name\t: Some CPU\nflags\t\t: fpu {flags} tsc\n\n");
        fs::write(roots.proc.join("cpuinfo"), format!("{}{}{}", cpu(0), cpu(1), cpu(2))).unwrap();
        fs::write(
            roots.proc.join("meminfo"),
            "MemTotal:       2097152 kB\nMemAvailable:   1048576 kB\n",
        )
        .unwrap();
        fs::write(roots.proc.join("sys/kernel/random/boot_id"), format!("{BOOT}\n")).unwrap();
        if kvm {
            fs::write(roots.dev.join("kvm"), "").unwrap();
        }
        (dir, roots)
    }

    #[test]
    fn facts_come_from_the_tree_that_is_handed_over() {
        let (_dir, roots) = tree("svm", false);
        let facts = HostFacts::read(&roots);
        assert_eq!(facts.cpu_model.as_deref(), Some("Some CPU"));
        assert_eq!((facts.cpus, facts.memory_mib, facts.available_mib), (3, 2048, 1024));
        assert!((1..=3).contains(&facts.usable_cpus));
        assert_eq!(
            (facts.virtualisation, &facts.kvm),
            (Some(Virtualisation::Svm), &KvmDevice::Missing)
        );
        assert_eq!((facts.accel.accel, facts.boot_id.as_str()), (Accel::Tcg, BOOT));
    }

    #[test]
    fn a_file_in_place_of_the_device_is_unusable() {
        let (_dir, roots) = tree("vmx", true);
        let facts = HostFacts::read(&roots);
        assert!(matches!(&facts.kvm, KvmDevice::Unusable(_)), "{:?}", facts.kvm);
        assert!(facts.accel.reason.contains("cannot be used"));
    }

    #[test]
    fn without_anything_there_are_facts_and_doubts() {
        let (dir, mut roots) = tree("", false);
        roots.proc = dir.path().join("none");
        let facts = HostFacts::read(&roots);
        assert_eq!((facts.cpus, facts.memory_mib, facts.boot_id.as_str()), (1, 0, ""));
        assert!(facts.doubts.iter().any(|d| d.contains("cpuinfo")), "{:?}", facts.doubts);
        assert!(facts.doubts.iter().any(|d| d.contains("boot_id")), "{:?}", facts.doubts);
    }

    #[test]
    fn a_boot_id_is_no_other_text() {
        let (_dir, roots) = tree("", false);
        assert_eq!(boot_id(&roots.proc).as_deref(), Ok(BOOT));
        for text in ["", "x", "6b4db22b-3ca2-4fa1-af1d-b71352e1e73g", &BOOT[1..]] {
            fs::write(roots.proc.join("sys/kernel/random/boot_id"), text).unwrap();
            assert!(boot_id(&roots.proc).is_err(), "{text}");
        }
    }

    #[test]
    fn a_rate_is_ticks_by_milliseconds() {
        assert_eq!(rate((0, 0), (2_700_000_000, 1_000_000_000)), Some(2_700_000));
        assert_eq!(rate((100, 5), (100 + 67_500_000, 5 + 25_000_000)), Some(2_700_000));
        for (a, b) in [
            ((5, 0), (4, 10)),
            ((0, 10), (5, 9)),
            ((0, 5), (10, 5)),
            ((0, 0), (0, 10)),
        ] {
            assert_eq!(rate(a, b), None, "{a:?} {b:?}");
        }
        assert!(near(1_000_000, 1_000_499, 2000) && !near(1_000_000, 1_000_501, 2000));
        assert_eq!(rate((0, 0), (u64::MAX, 1)), None);
    }

    #[test]
    fn two_readings_of_the_clock_agree() {
        let (Some(a), Some(b)) = (tsc(), tsc()) else { return };
        assert!(near(a.khz, b.khz, 1000), "{a:?} {b:?}");
    }
}

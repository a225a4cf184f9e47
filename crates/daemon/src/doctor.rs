//! What banger needs and how it is. Looks only: nothing is made, migrated or repaired.

use banger_core::host::Accel;
use banger_proto::api::{Check, CheckLevel};

use crate::error::chain;
use crate::services::Services;

/// Room below which a warning is due.
const LOW: u64 = 5 << 30;
/// Room below which a first machine, with its image and its disk, does not fit.
const SCARCE: u64 = 1 << 30;

/// One line of it.
pub fn check(name: &str, level: CheckLevel, message: impl Into<String>, hint: Option<String>) -> Check {
    Check {
        name: name.to_owned(),
        level,
        message: message.into(),
        hint,
    }
}

/// All checks.
pub async fn run(services: &Services) -> Vec<Check> {
    let mut checks = vec![architecture()];
    checks.push(engine(services).await);
    checks.extend(accel(services).await);
    checks.extend(crate::host::checks::run(services).await);
    checks.push(database(services).await);
    checks.push(space(services));
    checks.extend(libexec(services));
    checks.extend(directories(services));
    checks.push(tool("ssh-keygen", "keys for `banger vm ssh`", "openssh-client"));
    checks.push(tool("ssh", "`banger vm ssh`", "openssh-client"));
    checks.push(tool("git", "workspaces (`banger run ./repo`)", "git"));
    checks.extend(crate::stock::checks(services).await);
    checks.extend(orphans(services));
    checks
}

fn architecture() -> Check {
    let arch = std::env::consts::ARCH;
    if arch == "x86_64" {
        check("architecture", CheckLevel::Pass, arch, None)
    } else {
        check(
            "architecture",
            CheckLevel::Fail,
            format!("{arch} is not supported yet"),
            None,
        )
    }
}

async fn engine(services: &Services) -> Check {
    let network = if services.hosting.get().is_some() {
        "bridge"
    } else {
        "user"
    };
    let choice = crate::engines::auto(services, network).await;
    match services.engine(choice.engine).await {
        Ok(engine) => {
            let c = engine.capabilities();
            let text = format!("{} {}: {}", c.engine, c.version, choice.why);
            check("engine", CheckLevel::Pass, text, None)
        }
        Err(e) => check("engine", CheckLevel::Fail, e.message, e.hint),
    }
}

async fn accel(services: &Services) -> Vec<Check> {
    let host = services.host().await;
    let level = if host.accel.accel == Accel::Kvm {
        CheckLevel::Pass
    } else {
        CheckLevel::Warn
    };
    let text = format!("{}: {}", host.accel.accel.as_str(), host.accel.reason);
    let mut checks = vec![check("acceleration", level, text, host.accel.hint.clone())];
    for doubt in &host.doubts {
        checks.push(check("host", CheckLevel::Warn, doubt.clone(), None));
    }
    checks.push(check(
        "size",
        CheckLevel::Pass,
        format!(
            "{} CPUs, {} MiB of memory ({} MiB free)",
            host.usable_cpus, host.memory_mib, host.available_mib
        ),
        None,
    ));
    checks
}

async fn database(services: &Services) -> Check {
    let path = services.paths.database();
    if !path.exists() {
        return check(
            "database",
            CheckLevel::Fail,
            "the file is gone while the daemon runs",
            Some("restart the daemon".to_owned()),
        );
    }
    match services.db.version().await {
        Ok(version) => check("database", CheckLevel::Pass, format!("schema {version}"), None),
        Err(e) => check("database", CheckLevel::Fail, chain(&e), e.hint()),
    }
}

fn space(services: &Services) -> Check {
    let path = &services.paths.state;
    match rustix::fs::statvfs(path) {
        Ok(fs) => {
            let free = fs.f_bavail.saturating_mul(fs.f_frsize);
            let text = format!(
                "{} free in {}",
                banger_core::size::format(free >> 20 << 20),
                path.display()
            );
            if free < LOW {
                let level = if free < SCARCE {
                    CheckLevel::Fail
                } else {
                    CheckLevel::Warn
                };
                check(
                    "disk space",
                    level,
                    text,
                    Some("delete images and machines that are not needed".to_owned()),
                )
            } else {
                check("disk space", CheckLevel::Pass, text, None)
            }
        }
        Err(e) => check("disk space", CheckLevel::Warn, format!("cannot tell: {e}"), None),
    }
}

fn libexec(services: &Services) -> Vec<Check> {
    ["banger-shim", "banger-agent"]
        .iter()
        .map(|name| {
            let path = services.libexec.join(name);
            if path.is_file() {
                check(name, CheckLevel::Pass, path.display().to_string(), None)
            } else {
                let hint = "install banger anew, or set BANGER_LIBEXEC to the directory that has it";
                check(
                    name,
                    CheckLevel::Fail,
                    format!("{} is not there", path.display()),
                    Some(hint.to_owned()),
                )
            }
        })
        .collect()
}

/// Whether the directories that machines are made in can be written to.
fn directories(services: &Services) -> Vec<Check> {
    let temporary = std::env::temp_dir();
    [
        ("state directory", services.paths.state.as_path()),
        ("runtime directory", services.paths.runtime.as_path()),
        ("temporary directory", temporary.as_path()),
    ]
    .into_iter()
    .map(|(name, path)| directory(name, path))
    .collect()
}

fn directory(name: &str, path: &std::path::Path) -> Check {
    use rustix::fs::Access;
    let shown = path.display().to_string();
    match rustix::fs::access(path, Access::WRITE_OK | Access::EXEC_OK) {
        Ok(()) => check(name, CheckLevel::Pass, shown, None),
        Err(e) => check(
            name,
            CheckLevel::Fail,
            format!("{shown} cannot be written to: {e}"),
            Some("machines need it; look at its owner, its mode and its file system".to_owned()),
        ),
    }
}

/// Whether a program is there.
pub fn tool(program: &str, purpose: &str, package: &str) -> Check {
    let path = std::env::var_os("PATH").unwrap_or_default();
    match std::env::split_paths(&path)
        .map(|d| d.join(program))
        .find(|p| p.is_file())
    {
        Some(found) => check(program, CheckLevel::Pass, found.display().to_string(), None),
        None => check(
            program,
            CheckLevel::Warn,
            format!("not installed; it is needed for {purpose}"),
            Some(format!("apt-get install {package}")),
        ),
    }
}

fn orphans(services: &Services) -> Vec<Check> {
    let known: Vec<String> = services.machines().iter().map(|m| m.id.to_string()).collect();
    let entries = std::fs::read_dir(services.paths.machines())
        .into_iter()
        .flatten()
        .flatten();
    let orphans: Vec<String> = entries
        .filter(|e| e.file_name().to_str().is_none_or(|n| !known.iter().any(|k| k == n)))
        .map(|e| e.path().display().to_string())
        .take(10)
        .collect();
    if orphans.is_empty() {
        return Vec::new();
    }
    let hint = format!(
        "they hold disks of machines that the database does not know; if nobody misses them: rm -r {}",
        orphans.join(" ")
    );
    vec![check(
        "orphans",
        CheckLevel::Warn,
        format!("{} directories without a machine", orphans.len()),
        Some(hint),
    )]
}

//! Starting Firecracker, detached, outside of a jail or in one, letting it load what was saved, and undoing a failed start.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use banger_core::plan::{BootPlan, DiskRole};
use banger_proto::shim::{ExitRecord, LogJob, Metrics, ShimJob, ShimReport};
use banger_system::helper::{JailFile, Signal};
use banger_system::names::jail;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::time::{Instant, sleep, timeout};

use super::api::{Action, ApiError, Client};
use super::config::{self, Names};
use super::http::HttpError;
use super::{BINARY, ENGINE, Firecracker, fault, find, metrics};
use crate::engine::{Engine, EngineError, Handles};
use crate::host;
use crate::identity::{Expected, Process};
use crate::jail::{Jail, JailLaunch};
use crate::records::CONSOLE_LIMIT;
use crate::start::{
    self, DIAL, KILLED, Reports, Start, died, end, end_process, io_error, remove, remove_sockets, timed_out,
};

/// Starts a machine.
pub(super) async fn launch(firecracker: &Firecracker, plan: &BootPlan) -> Result<Handles, EngineError> {
    let work = Work {
        firecracker: firecracker.clone(),
        plan: plan.clone(),
    };
    start::attended(ENGINE, work).await
}

struct Work {
    firecracker: Firecracker,
    plan: BootPlan,
}

/// An engine that runs and has not answered yet.
struct Begun {
    handles: Handles,
    process: Process,
    reports: Reports,
    names: Names,
}

impl Start for Work {
    type Begun = Begun;

    async fn start(&self) -> Result<Begun, EngineError> {
        let (plan, proc) = (&self.plan, self.firecracker.proc());
        let boot_id =
            host::boot_id(proc).map_err(|why| io_error("tell this boot of the host", io::Error::other(why)))?;
        let control = start::socket(ENGINE, plan.paths.control_socket())?;
        let agent = start::socket(ENGINE, plan.paths.agent_socket())?;
        config::check(plan)?;
        start::check_saved(plan)?;
        start::prepare(ENGINE, &plan.paths, &control, &agent).await?;
        let started = match &self.firecracker.options.jail {
            None => self.direct(&control).await,
            Some(jail) => self.jailed(jail).await,
        };
        let (process, start_time, reports, names) = started?;
        Ok(Begun {
            handles: Handles {
                engine: ENGINE.to_owned(),
                pid: process.pid(),
                start_time,
                host_boot_id: boot_id,
                control,
                agent,
            },
            process,
            reports,
            names,
        })
    }

    async fn ready(&self, begun: &mut Begun) -> Result<(), EngineError> {
        let limit = self.firecracker.options.launch_timeout;
        let error = tokio::select! {
            biased;
            ended = start::report(&mut begun.reports) => {
                let ended = match ended {
                    Ok(ShimReport::Ended(record)) => Ok(ShimReport::Ended(self.seen(record).await)),
                    other => other,
                };
                return Err(start::ended_early(ENGINE, &self.plan.paths, ended));
            }
            set_up = self.set_up(&begun.handles, &begun.names, Instant::now() + limit) => match set_up {
                Ok(()) => return Ok(()),
                Err(error) => error,
            },
        };
        Err(match error {
            Fault::Api(error) => {
                // An engine that gives up closes its socket first.
                let gone = |source: &HttpError| matches!(source, HttpError::Closed | HttpError::Io(_));
                if matches!(&error, ApiError::Http { source, .. } if gone(source))
                    && let Some(record) = end(&mut begun.reports).await
                {
                    let record = self.seen(record).await;
                    return Err(died(ENGINE, &self.plan.paths, Some(&record)));
                }
                match error {
                    error if error.is_unreachable() => timed_out(ENGINE, "answer on its API socket", limit),
                    error => fault(&begun.handles.control, limit, error),
                }
            }
            Fault::Identity(why) => EngineError::NotOurs {
                pid: begun.handles.pid,
                why,
            },
            Fault::Engine(error) => error,
        })
    }

    async fn undo(&self, begun: Begun) {
        let id = &self.plan.id;
        match &self.firecracker.options.jail {
            None => end_process(id.as_str(), begun.process).await,
            Some(jail) => {
                let pid = begun.process.pid();
                if let Err(error) = jail.signal(id, Signal::Kill).await {
                    tracing::warn!(machine = %id, pid, %error, "cannot end an engine");
                }
                if timeout(KILLED, begun.process.ended()).await.is_err() {
                    tracing::warn!(machine = %id, pid, "a killed engine is still there");
                }
            }
        }
        self.clear();
    }

    fn handles(begun: &Begun) -> &Handles {
        &begun.handles
    }
}

/// An engine's process, when it started, who keeps its console, and its files as it names them.
type Started = (Process, u64, Reports, Names);

/// What is wrong with an engine that was started.
enum Fault {
    Api(ApiError),
    Identity(String),
    Engine(EngineError),
}

impl From<ApiError> for Fault {
    fn from(error: ApiError) -> Self {
        Self::Api(error)
    }
}

impl From<EngineError> for Fault {
    fn from(error: EngineError) -> Self {
        Self::Engine(error)
    }
}

impl Work {
    /// The record of an end with what only root has seen of it.
    async fn seen(&self, mut record: ExitRecord) -> ExitRecord {
        if record.code.is_none()
            && record.signal.is_none()
            && let Some(end) = self.firecracker.ended(&self.plan.id).await
        {
            (record.code, record.signal) = (end.code, end.signal);
        }
        record
    }

    /// Starts the engine as this user.
    async fn direct(&self, control: &Path) -> Result<Started, EngineError> {
        let (plan, options) = (&self.plan, &self.firecracker.options);
        let names = Names::direct(plan)?;
        let job = ShimJob {
            engine: self.firecracker.binary.clone(),
            args: config::args(plan, control)?,
            console_log: plan.paths.console_log(),
            log_limit: CONSOLE_LIMIT,
            exit_record: plan.paths.exit_record(),
            cwd: Some(plan.paths.state.clone()),
            metrics: Some(self.metrics(config::metrics_pipe(&plan.paths))),
        };
        link(plan).map_err(|e| io_error(format!("make links in {}", config::links(&plan.paths).display()), e))?;
        let mut reports = start::shim(ENGINE, &options.shim, &tag(plan), &job).await?;
        match start::hear(ENGINE, &options.roots.proc, &plan.paths, &mut reports).await {
            Ok((process, start_time)) => Ok((process, start_time, reports, names)),
            Err(error) => {
                // Before a shim reports an engine nobody else knows of it. Should the shim have been killed in between, the
                // engine is found by what it was started with.
                drop(reports);
                if let Ok(Some(stat)) = find::by_arguments(&options.roots.proc, &plan.id, control) {
                    let expected = Expected {
                        pid: stat.pid,
                        start_time: stat.start_time,
                        comm_prefix: String::new(),
                    };
                    if let Ok(process) = Process::open(&options.roots.proc, &expected) {
                        end_process(plan.id.as_str(), process).await;
                    }
                }
                self.clear();
                Err(error)
            }
        }
    }

    /// Has the engine started in a jail.
    async fn jailed(&self, jail: &Arc<dyn Jail>) -> Result<Started, EngineError> {
        let started = self.in_jail(jail).await;
        if started.is_err() {
            self.clear();
        }
        started
    }

    async fn in_jail(&self, jail: &Arc<dyn Jail>) -> Result<Started, EngineError> {
        let (plan, options) = (&self.plan, &self.firecracker.options);
        let Some(slot) = plan.slot else {
            return Err(config::unsupported("give a machine without a slot a jail"));
        };
        let chroot = jail.chroot(&plan.id);
        // From now on the engine can be found again by them, whoever dies.
        for (link, name) in [
            (plan.paths.control_socket(), jail::API),
            (plan.paths.agent_socket(), jail::AGENT),
        ] {
            symlink(chroot.join(name), &link).map_err(|e| io_error(format!("make the link {}", link.display()), e))?;
        }
        let files = files(plan)?;
        let job = LogJob {
            console_log: plan.paths.console_log(),
            log_limit: CONSOLE_LIMIT,
            exit_record: plan.paths.exit_record(),
            metrics: Some(self.metrics(chroot.join(jail::METRICS))),
        };
        let (output, console) = console(&job).map_err(|e| io_error("make a pipe for the console", e))?;
        let mut reports = start::log_shim(ENGINE, &options.shim, &tag(plan), output).await?;
        let launch = JailLaunch {
            id: plan.id.clone(),
            slot,
            vcpu: plan.vcpu,
            memory_mib: plan.memory_mib,
            console,
            files,
            disks: plan.disks.iter().map(|disk| disk.serial).collect::<Vec<DiskRole>>(),
        };
        let (pid, start_time) = match jail.launch(launch).await {
            Ok(launched) => launched,
            Err(error) => {
                // What it said is in the log when the shim has seen the end of it.
                let _ = end(&mut reports).await;
                return Err(error);
            }
        };
        let expected = Expected {
            pid,
            start_time,
            comm_prefix: BINARY.to_owned(),
        };
        let process = match Process::open(&options.roots.proc, &expected) {
            Ok(process) => process,
            Err(mismatch) => {
                let ended = jail.signal(&plan.id, Signal::Kill).await;
                if let Err(error) = ended {
                    tracing::warn!(machine = %plan.id, pid, %error, "cannot end an engine");
                }
                return Err(EngineError::NotOurs {
                    pid,
                    why: mismatch.why().to_owned(),
                });
            }
        };
        let pipe = fs::symlink_metadata(chroot.join(jail::METRICS));
        let names = Names::jailed(plan, pipe.is_ok_and(|m| m.file_type().is_fifo()));
        Ok((process, start_time, reports, names))
    }

    fn metrics(&self, pipe: PathBuf) -> Metrics {
        Metrics {
            pipe,
            file: config::metrics_file(&self.plan.paths),
            limit: metrics::LIMIT,
        }
    }

    /// Waits until the API answers as this machine, and makes it the machine that was planned.
    async fn set_up(&self, handles: &Handles, names: &Names, deadline: Instant) -> Result<(), Fault> {
        let mut client = connect(&handles.control, deadline).await?;
        find::check(&mut client, handles.pid, Some(&self.plan.id))
            .await
            .map_err(|fault| match fault {
                find::ControlFault::Api(error) => Fault::Api(error),
                other => Fault::Identity(other.to_string()),
            })?;
        for put in config::first(names)? {
            client.put(&put.path, &put.body).await?;
        }
        match config::load(&self.plan, names) {
            Some(load) => client.load_snapshot(&load).await?,
            None => {
                for put in config::boot(&self.plan, names)? {
                    client.put(&put.path, &put.body).await?;
                }
                client.action(Action::InstanceStart).await?;
            }
        }
        // The engine has made its socket of the guest channel by now.
        if let Some(jail) = &self.firecracker.options.jail {
            jail.open(&self.plan.id).await?;
        }
        Ok(())
    }

    /// Removes what a machine's engine is reached by.
    fn clear(&self) {
        remove_sockets(&self.plan.paths);
        let links = config::links(&self.plan.paths);
        match fs::remove_dir_all(&links) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %links.display(), error = %e, "cannot remove links");
            }
            _ => {}
        }
    }
}

/// Connects as soon as somebody listens.
async fn connect(control: &Path, deadline: Instant) -> Result<Client, ApiError> {
    let mut pause = DIAL[0];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match Client::connect(control, left).await {
            // Not there yet, or bound but not listening yet.
            Err(error) if error.is_unreachable() && !left.is_zero() => {}
            other => return other,
        }
        sleep(pause).await;
        pause = (pause * 9 / 8).min(DIAL[1]);
    }
}

/// Name of the shim in the process list.
fn tag(plan: &BootPlan) -> String {
    format!("banger-{}", plan.id)
}

/// Makes the names that an engine outside of a jail has for its files: see [`config`].
fn link(plan: &BootPlan) -> io::Result<()> {
    let dir = config::links(&plan.paths);
    match fs::remove_dir_all(&dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    DirBuilder::new().mode(0o700).create(&dir)?;
    symlink(&plan.paths.run, dir.join("run"))?;
    for disk in &plan.disks {
        symlink(&disk.path, dir.join(jail::disk(disk.serial)))?;
    }
    // By which a save tells what the machine was started with.
    if let Some(saved) = &plan.resume {
        symlink(&saved.memory, dir.join(jail::MEMORY))?;
    }
    let pipe = config::metrics_pipe(&plan.paths);
    remove(&pipe)?;
    mknodat(CWD, &pipe, FileType::Fifo, Mode::from_raw_mode(0o600), 0)?;
    Ok(())
}

/// What a jail is given to read.
fn files(plan: &BootPlan) -> Result<Vec<(JailFile, File)>, EngineError> {
    let wanted = match &plan.resume {
        Some(saved) => [(JailFile::Memory, &saved.memory), (JailFile::State, &saved.state)],
        None => [(JailFile::Kernel, &plan.kernel), (JailFile::Initrd, &plan.initrd)],
    };
    let open = |(kind, path): (JailFile, &PathBuf)| match File::open(path) {
        Ok(file) => Ok((kind, file)),
        Err(e) => Err(io_error(format!("read {}", path.display()), e)),
    };
    wanted.into_iter().map(open).collect()
}

/// A pipe whose first line is the job of whoever reads it.
fn console(job: &LogJob) -> io::Result<(OwnedFd, OwnedFd)> {
    let (output, console) = pipe_with(PipeFlags::CLOEXEC)?;
    let mut text = serde_json::to_vec(job)?;
    text.push(b'\n');
    let mut console = File::from(console);
    console.write_all(&text)?;
    Ok((output, console.into()))
}

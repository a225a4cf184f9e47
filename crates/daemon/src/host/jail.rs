//! The root helper as a driver of jailed engines sees it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use banger_system::helper::{Answer, Request, Signal};
use banger_system::id::MachineId;
use banger_system::install::Layout;
use banger_vmm::engine::BoxFuture;
use banger_vmm::jail::{Jail, JailLaunch};
use banger_vmm::{EngineError, EngineExit};

use super::client::{CallError, Client};

/// Jails that the root helper makes.
#[derive(Debug)]
pub(super) struct HelperJail {
    client: Arc<Client>,
    layout: Layout,
}

impl HelperJail {
    /// Jails in a layout.
    pub(super) fn new(client: Arc<Client>, layout: Layout) -> Self {
        Self { client, layout }
    }

    fn done<'a>(
        &'a self,
        what: &'static str,
        id: &'a MachineId,
        request: Request,
        files: Vec<OwnedFd>,
    ) -> BoxFuture<'a, Result<(), EngineError>> {
        Box::pin(async move {
            let answer = self.client.call_with(request, files).await;
            answer.map(drop).map_err(|e| failed(what, id, e))
        })
    }
}

fn failed(what: &str, id: &MachineId, e: CallError) -> EngineError {
    let details = match &e {
        CallError::Refused { error, .. } if !error.details.is_empty() => format!(" ({})", error.details.join("; ")),
        _ => String::new(),
    };
    EngineError::Io {
        what: format!("{what} of machine {id}"),
        source: io::Error::other(format!("{e}{details}")),
    }
}

impl Jail for HelperJail {
    fn chroot(&self, id: &MachineId) -> PathBuf {
        self.layout.chroot(id)
    }

    fn launch(&self, launch: JailLaunch) -> BoxFuture<'_, Result<(u32, u64), EngineError>> {
        Box::pin(async move {
            let id = launch.id.clone();
            let (kinds, open): (Vec<_>, Vec<_>) = launch.files.into_iter().unzip();
            let request = Request::EngineLaunch {
                machine: launch.id,
                slot: launch.slot,
                vcpu: launch.vcpu,
                memory_mib: launch.memory_mib,
                files: kinds,
                disks: launch.disks,
            };
            let mut files = vec![launch.console];
            files.extend(open.into_iter().map(OwnedFd::from));
            match self.client.call_with(request, files).await {
                Ok(Answer::Engine { pid, start_time }) => Ok((pid, start_time)),
                Ok(other) => {
                    let source = io::Error::other(format!("the root helper answered {other:?}"));
                    let what = format!("start the engine of machine {id}");
                    Err(EngineError::Io { what, source })
                }
                Err(e) => Err(failed("start the engine", &id, e)),
            }
        })
    }

    fn open<'a>(&'a self, id: &'a MachineId) -> BoxFuture<'a, Result<(), EngineError>> {
        self.done(
            "open the sockets",
            id,
            Request::EngineOpen { machine: id.clone() },
            Vec::new(),
        )
    }

    fn signal<'a>(&'a self, id: &'a MachineId, signal: Signal) -> BoxFuture<'a, Result<(), EngineError>> {
        let request = Request::EngineSignal {
            machine: id.clone(),
            signal,
        };
        self.done("signal the engine", id, request, Vec::new())
    }

    fn ended<'a>(&'a self, id: &'a MachineId) -> BoxFuture<'a, Result<Option<EngineExit>, EngineError>> {
        Box::pin(async move {
            let request = Request::EngineEnded { machine: id.clone() };
            match self.client.call_with(request, Vec::new()).await {
                Ok(Answer::Ended { end }) => Ok(end.map(|end| EngineExit {
                    code: end.code,
                    signal: end.signal,
                })),
                Ok(_) => Ok(None),
                Err(e) => Err(failed("ask for the end of the engine", id, e)),
            }
        })
    }

    fn collect<'a>(&'a self, id: &'a MachineId, into: File) -> BoxFuture<'a, Result<(), EngineError>> {
        let request = Request::EngineCollect { machine: id.clone() };
        self.done("collect the saved memory", id, request, vec![into.into()])
    }
}

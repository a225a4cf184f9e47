//! The engine drivers, by name: looked for when they are needed, kept when they are there.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use banger_core::host::Accel;
use banger_proto::error::{ApiError, ErrorCode};
use banger_vmm::Engine;
use banger_vmm::firecracker::{self, Firecracker};
use banger_vmm::qemu::{self, Qemu};
use tokio::sync::Mutex;

use crate::error::IntoApi;
use crate::services::Services;

/// Name of QEMU's driver.
pub const QEMU: &str = "qemu";
/// Name of Firecracker's driver.
pub const FIRECRACKER: &str = "firecracker";
/// All of them.
pub const ALL: [&str; 2] = [QEMU, FIRECRACKER];

/// The drivers that were found.
#[derive(Default)]
pub struct Engines {
    qemu: OnceLock<Arc<dyn Engine>>,
    firecracker: OnceLock<Arc<dyn Engine>>,
    warning: OnceLock<String>,
    looking: Mutex<()>,
}

impl Engines {
    /// What is to be said about Firecracker's version, once it was found.
    pub fn warning(&self) -> Option<&str> {
        self.warning.get().map(String::as_str)
    }

    /// The driver of a name. One that is not installed is looked for again at every request.
    pub async fn get(&self, name: &str, services: &Services) -> Result<Arc<dyn Engine>, ApiError> {
        let place = match name {
            QEMU => &self.qemu,
            FIRECRACKER => &self.firecracker,
            _ => {
                return Err(ApiError::new(
                    ErrorCode::Unsupported,
                    format!("there is no engine `{name}`"),
                ));
            }
        };
        if let Some(engine) = place.get() {
            return Ok(engine.clone());
        }
        let _alone = self.looking.lock().await;
        if let Some(engine) = place.get() {
            return Ok(engine.clone());
        }
        let engine = if name == QEMU {
            detect_qemu(services).await?
        } else {
            let found = detect_firecracker(services).await?;
            if let Some(warning) = found.warning() {
                tracing::warn!(warning, "firecracker");
                let _ = self.warning.set(warning.to_owned());
            }
            Arc::new(found)
        };
        Ok(place.get_or_init(|| engine).clone())
    }
}

fn shim(libexec: &Path) -> PathBuf {
    libexec.join("banger-shim")
}

async fn detect_qemu(services: &Services) -> Result<Arc<dyn Engine>, ApiError> {
    let mut options = qemu::Options::new(shim(&services.libexec));
    options.binary = services.config.qemu_bin.as_ref().map(PathBuf::from);
    let detected = tokio::task::spawn_blocking(move || Qemu::detect(options)).await;
    let detected = detected.map_err(stopping)?;
    Ok(Arc::new(detected.map_err(IntoApi::into_api)?))
}

async fn detect_firecracker(services: &Services) -> Result<Firecracker, ApiError> {
    let mut options = firecracker::Options::new(shim(&services.libexec));
    match services.hosting.get() {
        // Root starts it, so only root says which.
        Some(system) => {
            options.binary = Some(system.record.firecracker.firecracker.clone());
            options.jail = Some(system.jail());
        }
        None => options.binary = services.config.firecracker_bin.as_ref().map(PathBuf::from),
    }
    let detected = tokio::task::spawn_blocking(move || Firecracker::detect(options)).await;
    detected.map_err(stopping)?.map_err(IntoApi::into_api)
}

fn stopping(e: tokio::task::JoinError) -> ApiError {
    ApiError::new(ErrorCode::Unavailable, format!("the daemon is stopping: {e}"))
}

/// What `auto` stands for, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// Name of the engine.
    pub engine: &'static str,
    /// Why that one.
    pub why: String,
}

/// Chooses between the engines for a machine with this network. `firecracker` says why it cannot be used, if it cannot.
pub fn choose(accel: Accel, network: &str, firecracker: Result<(), String>) -> Choice {
    let qemu = |why: String| Choice { engine: QEMU, why };
    if accel != Accel::Kvm {
        return qemu("firecracker needs KVM, which this host does not offer".to_owned());
    }
    if network == "user" {
        return qemu("only qemu has a user-mode network".to_owned());
    }
    match firecracker {
        Ok(()) => Choice {
            engine: FIRECRACKER,
            why: "KVM is there and so is firecracker".to_owned(),
        },
        Err(why) => qemu(why),
    }
}

/// What `auto` stands for on this host.
pub async fn auto(services: &Services, network: &str) -> Choice {
    let accel = services.host().await.accel.accel;
    let firecracker = match accel {
        Accel::Kvm if network != "user" => services.engine(FIRECRACKER).await.map(drop).map_err(|e| e.message),
        _ => Ok(()),
    };
    choose(accel, network, firecracker)
}

/// The engine of a new machine: the one that was asked for, if it can be, or the one that fits.
pub async fn resolve(services: &Services, wanted: &str, network: &str) -> Result<&'static str, ApiError> {
    let Some(name) = ALL.into_iter().find(|name| *name == wanted) else {
        let choice = auto(services, network).await;
        services.engine(choice.engine).await?;
        return Ok(choice.engine);
    };
    let engine = services.engine(name).await?;
    if name == FIRECRACKER {
        let accel = &services.host().await.accel;
        if accel.accel != Accel::Kvm {
            let message = format!("firecracker needs KVM: {}", accel.reason);
            let mut error = ApiError::new(ErrorCode::Unsupported, message);
            error.hint = accel.hint.clone().or_else(|| Some("use --engine qemu".to_owned()));
            return Err(error);
        }
    }
    if network == "user" && !engine.capabilities().user_network {
        let message = format!("{name} has no user-mode network");
        let hint = "use --network none, or --network bridge in system mode, or --engine qemu";
        return Err(ApiError::new(ErrorCode::Unsupported, message).hint(hint));
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn firecracker_where_it_can_run() {
        let engine =
            |accel, network, there: Result<(), &str>| choose(accel, network, there.map_err(str::to_owned)).engine;
        assert_eq!(engine(Accel::Kvm, "bridge", Ok(())), FIRECRACKER);
        assert_eq!(engine(Accel::Kvm, "none", Ok(())), FIRECRACKER);
        assert_eq!(engine(Accel::Kvm, "user", Ok(())), QEMU);
        assert_eq!(engine(Accel::Tcg, "bridge", Ok(())), QEMU);
        assert_eq!(engine(Accel::Kvm, "bridge", Err("too old")), QEMU);
        assert_eq!(choose(Accel::Kvm, "bridge", Err("too old".to_owned())).why, "too old");
    }
}

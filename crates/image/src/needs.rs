//! What the host has to have for the default image to be built and the distribution's kernel to be imported, one by one. Looks only.

use std::path::{Path, PathBuf};

use crate::build::{APT_GET, MMDEBSTRAP, NEWGIDMAP, NEWUIDMAP, UNSHARE, check_subordinate_ids};
use crate::error::{Error, Result};
use crate::process::Program;

/// Something that is needed.
#[derive(Debug)]
pub struct Need {
    /// What it is.
    pub name: &'static str,
    /// Where it is or how it is, or why the work would fail.
    pub found: Result<String>,
}

/// What building an image needs. In system mode root's unit builds it.
pub fn of_images() -> Vec<Need> {
    let root = rustix::process::geteuid().is_root() || crate::builder::socket().is_some();
    let ids = || check_subordinate_ids().map(|()| "65536 or more".to_owned());
    let namespaces = || user_namespaces(setting).map(|()| "allowed to ordinary users".to_owned());
    image_needs(root, Program::find, ids, namespaces)
}

fn image_needs(
    root: bool,
    find: impl Fn(&Program) -> Result<PathBuf>,
    ids: impl FnOnce() -> Result<String>,
    namespaces: impl FnOnce() -> Result<String>,
) -> Vec<Need> {
    let program = |program: &Program| Need {
        name: program.name,
        found: find(program).map(|path| path.display().to_string()),
    };
    let mut needs = vec![program(&MMDEBSTRAP), program(&APT_GET)];
    if root {
        needs.push(program(&UNSHARE));
        return needs;
    }
    needs.extend([program(&NEWUIDMAP), program(&NEWGIDMAP)]);
    needs.push(Need {
        name: "subordinate ids",
        found: ids(),
    });
    needs.push(Need {
        name: "user namespaces",
        found: namespaces(),
    });
    needs
}

/// What importing the distribution's kernel needs.
pub async fn of_kernels() -> Vec<Need> {
    vec![Need {
        name: "kernel package",
        found: crate::kernel::fetch::available().await,
    }]
}

/// A setting of the kernel, by its name with dots. `None` where the kernel does not have it.
pub(crate) fn setting(name: &str) -> Option<String> {
    let path = Path::new("/proc/sys").join(name.replace('.', "/"));
    Some(std::fs::read_to_string(path).ok()?.trim().to_owned())
}

/// Whether an ordinary user may make user namespaces in which it has rights.
pub(crate) fn user_namespaces(setting: impl Fn(&str) -> Option<String>) -> Result<()> {
    let profile = Path::new("/etc/apparmor.d").join(MMDEBSTRAP.name).exists();
    let forbid = |name: &'static str, forbidding: &str| match setting(name) {
        Some(value) if value == forbidding => Err(Error::NoUserNamespaces { setting: name, value }),
        _ => Ok(()),
    };
    forbid("user.max_user_namespaces", "0")?;
    forbid("kernel.unprivileged_userns_clone", "0")?;
    if profile {
        return Ok(());
    }
    forbid("kernel.apparmor_restrict_unprivileged_userns", "1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_lack_is_a_need_of_its_own() {
        let lacks = |name: &'static str| {
            move |program: &Program| {
                if program.name == name {
                    return Err(Error::ProgramMissing {
                        program: program.name.to_owned(),
                        purpose: program.purpose,
                        package: program.package,
                    });
                }
                Ok(PathBuf::from("/usr/bin").join(program.name))
            }
        };
        let fine = || Ok("fine".to_owned());
        let failing = |needs: Vec<Need>| -> Vec<(&'static str, String)> {
            needs
                .into_iter()
                .filter_map(|need| Some((need.name, need.found.err()?.hint()?)))
                .collect()
        };
        for name in ["mmdebstrap", "apt-get", "newuidmap", "newgidmap"] {
            let lacking = failing(image_needs(false, lacks(name), fine, fine));
            assert_eq!(lacking.len(), 1, "{name}: {lacking:?}");
            assert_eq!(lacking[0].0, name);
            assert!(lacking[0].1.contains("apt-get install"), "{lacking:?}");
        }
        let user = || "dev".to_owned();
        let ids = || Err(Error::NoSubordinateIds { user: user() });
        let lacking = failing(image_needs(false, lacks(""), ids, fine));
        assert!(lacking.len() == 1 && lacking[0].1.contains("usermod"), "{lacking:?}");
        assert!(
            failing(image_needs(true, lacks("newuidmap"), ids, fine)).is_empty(),
            "root needs none of it"
        );
    }

    #[test]
    fn settings_forbid_user_namespaces() {
        let with = |known: &'static str, value: &'static str| {
            user_namespaces(move |name| (name == known).then(|| value.to_owned()))
        };
        assert!(
            user_namespaces(|_| None).is_ok(),
            "what the kernel does not have forbids nothing"
        );
        for (name, value) in [
            ("user.max_user_namespaces", "0"),
            ("kernel.unprivileged_userns_clone", "0"),
        ] {
            let error = with(name, value).unwrap_err();
            assert!(error.hint().unwrap().contains(name), "{error}");
        }
        assert!(with("user.max_user_namespaces", "100").is_ok());
        assert!(with("kernel.unprivileged_userns_clone", "1").is_ok());
    }
}

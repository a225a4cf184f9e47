//! Kernel modules of the initramfs, in the order they were laid out in.

use std::fs::{File, read_to_string};
use std::path::Path;

use rustix::io::Errno;

use super::{BootError, doing};
use crate::console::say;

/// The last module that a vsock device needs. What it needs itself stands before it.
pub(super) const VSOCK: &str = "vmw_vsock_virtio_transport.ko";

/// Loads what `order` in `directory` lists. A module that can't be loaded is told and passed over: what then misses it says
/// so by its own name.
pub(super) fn load(directory: &Path) -> Result<(), BootError> {
    let list = list(directory, "order")?;
    load_each(directory, names(&list));
    Ok(())
}

/// Loads what `later` lists up to `last`.
pub(super) fn load_later(directory: &Path, last: &str) -> Result<(), BootError> {
    let list = list(directory, "later")?;
    load_each(directory, up_to(&list, last));
    Ok(())
}

/// A list of modules; empty with a kernel that has everything built in.
fn list(directory: &Path, name: &str) -> Result<String, BootError> {
    let path = directory.join(name);
    if !path.exists() {
        return Ok(String::new());
    }
    doing(format!("read {}", path.display()), read_to_string(path))
}

fn load_each<'a>(directory: &Path, names: impl Iterator<Item = &'a str>) {
    for name in names {
        let loaded = File::open(directory.join(name))
            .map_err(|e| e.to_string())
            .and_then(|file| match rustix::system::finit_module(file, c"", 0) {
                Ok(()) | Err(Errno::EXIST) => Ok(()),
                Err(e) => Err(e.to_string()),
            });
        if let Err(e) = loaded {
            say(&format!("can't load module {name}: {e}"));
        }
    }
}

/// The names of a list up to `last`; none if it is not there.
fn up_to<'a>(list: &'a str, last: &str) -> impl Iterator<Item = &'a str> {
    let count = names(list).position(|name| name == last).map_or(0, |at| at + 1);
    names(list).take(count)
}

fn names(order: &str) -> impl Iterator<Item = &str> {
    order
        .lines()
        .map(str::trim)
        .filter(|name| !name.is_empty() && !name.contains('/'))
}

#[cfg(test)]
mod tests {
    #[test]
    fn one_a_line() {
        assert_eq!(
            super::names("a.ko\n\n b.ko \n../c.ko\n").collect::<Vec<_>>(),
            ["a.ko", "b.ko"]
        );
    }

    #[test]
    fn what_comes_later_is_loaded_as_far_as_it_is_wanted() {
        let list = "a.ko\nb.ko\nc.ko\n";
        assert_eq!(super::up_to(list, "b.ko").collect::<Vec<_>>(), ["a.ko", "b.ko"]);
        assert_eq!(super::up_to(list, "d.ko").count(), 0);
    }
}

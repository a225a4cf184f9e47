//! Kernel modules of the initramfs, in the order they were laid out in.

use std::fs::{File, read_to_string};
use std::path::Path;

use rustix::io::Errno;

use super::{BootError, doing};
use crate::console::say;

/// Loads what `order` in `directory` lists. A module that can't be loaded is told and passed over: what then misses it says
/// so by its own name.
pub(super) fn load(directory: &Path) -> Result<(), BootError> {
    let order = directory.join("order");
    if !order.exists() {
        // A kernel that has everything built in.
        return Ok(());
    }
    let order = doing(format!("read {}", order.display()), read_to_string(order))?;
    for name in names(&order) {
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
    Ok(())
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
}

//! Giving up what an engine may do beyond what its user's files allow.
//!
//! Where the daemon runs as root, its engines would have all of root's capabilities, and a guest that breaks out of one with them. An
//! engine needs none: every file that it opens is its user's.

use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set, remove_capability_from_bounding_set,
    set_capabilities, set_no_new_privs,
};

/// Drops all capabilities of this process for good: neither it nor a program that it becomes has one again.
///
/// The last call alone would let root have them again with the next program, the one before it alone would be undone by it; together
/// they hold where the bounding set cannot be emptied as well.
pub(crate) fn give_up() -> Result<(), String> {
    let failed = |e: Errno| format!("cannot give up its capabilities: {e}");
    clear_ambient_capability_set().map_err(failed)?;
    if capabilities(None)
        .map_err(failed)?
        .effective
        .contains(CapabilitySet::SETPCAP)
    {
        empty_bounding_set().map_err(failed)?;
    }
    let none = CapabilitySet::empty();
    set_capabilities(
        None,
        CapabilitySets {
            effective: none,
            permitted: none,
            inheritable: none,
        },
    )
    .map_err(failed)?;
    set_no_new_privs(true).map_err(failed)
}

fn empty_bounding_set() -> Result<(), Errno> {
    for bit in 0..u64::BITS {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << bit)) {
            Ok(()) => {}
            // Behind the last one that this kernel knows.
            Err(Errno::INVAL) if bit > 0 => break,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

//! Which modules a machine needs, and in what order they are loaded. Pure.

use std::collections::{BTreeMap, BTreeSet};

/// What is wrong with modules.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ModuleError {
    /// A module file cannot be read.
    #[error("the module file `{file}` is malformed: {why}")]
    Malformed {
        /// The file.
        file: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A module that machines cannot do without is neither there nor built in.
    #[error("the module `{name}` is neither in the package nor built into the kernel")]
    Missing {
        /// The module.
        name: String,
    },
    /// Modules depend on each other in a circle.
    #[error("the module `{name}` depends on itself")]
    Circle {
        /// One of them.
        name: String,
    },
    /// There are too many modules.
    #[error("there are more than {limit} modules")]
    TooMany {
        /// The limit.
        limit: usize,
    },
}

/// A module that machines load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Its name.
    pub name: &'static str,
    /// A machine cannot do without it.
    pub required: bool,
}

const fn required(name: &'static str) -> Wanted {
    Wanted { name, required: true }
}

const fn optional(name: &'static str) -> Wanted {
    Wanted { name, required: false }
}

/// What every machine loads at its start, in this order: first what it takes to reach the agent, then the disks, then the rest.
pub const AT_START: &[Wanted] = &[
    required("virtio_mmio"),
    required("virtio_console"),
    required("virtio_blk"),
    required("ext4"),
    required("virtio_net"),
    optional("virtio_rng"),
];

/// What comes along for those who want it: loading it costs an emulated guest a tenth of a second.
pub const LATER: &[Wanted] = &[optional("vmw_vsock_virtio_transport"), optional("overlay")];

/// Most modules of a kernel.
pub const MAX_MODULES: usize = 20_000;
/// Most dependencies of a module.
const MAX_DEPENDS: usize = 256;

/// What a module says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ModuleInfo {
    /// Modules it needs.
    pub depends: Vec<String>,
    /// Modules that are to be loaded before it where they are there.
    pub soft_before: Vec<String>,
}

/// Name of the module in a file: without suffixes, `-` as `_`. None if the file is no module.
pub fn module_name(file: &str) -> Option<String> {
    let file = [".xz", ".zst", ".gz"]
        .iter()
        .find_map(|suffix| file.strip_suffix(suffix))
        .unwrap_or(file);
    canonical(file.strip_suffix(".ko")?)
}

/// A module's name as the kernel writes it. None for what cannot be one.
fn canonical(name: &str) -> Option<String> {
    let sane = !name.is_empty()
        && name.len() <= 64
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    sane.then(|| name.replace('-', "_"))
}

/// Names in `modules.builtin`, one path a line.
pub fn builtin_names(text: &str) -> BTreeSet<String> {
    text.lines()
        .filter_map(|line| module_name(line.rsplit('/').next()?))
        .collect()
}

/// Reads what a module says of itself out of its ELF file.
pub fn parse(file: &str, elf: &[u8]) -> Result<ModuleInfo, ModuleError> {
    let bad = |why| ModuleError::Malformed {
        file: file.chars().take(100).collect(),
        why,
    };
    let section = modinfo_section(elf).map_err(bad)?;
    let mut info = ModuleInfo::default();
    for record in section.split(|b| *b == 0) {
        let Ok(text) = std::str::from_utf8(record) else {
            continue;
        };
        if let Some(list) = text.strip_prefix("depends=") {
            for name in list.split(',').filter(|n| !n.is_empty()) {
                info.depends
                    .push(canonical(name).ok_or_else(|| bad("it depends on an impossible name"))?);
            }
        } else if let Some(list) = text.strip_prefix("softdep=") {
            let mut before = false;
            for word in list.split_ascii_whitespace() {
                match word {
                    "pre:" => before = true,
                    "post:" => before = false,
                    name if before => info.soft_before.extend(canonical(name)),
                    _ => {}
                }
            }
        }
        if info.depends.len() + info.soft_before.len() > MAX_DEPENDS {
            return Err(bad("it depends on too many modules"));
        }
    }
    Ok(info)
}

/// The `.modinfo` section of an ELF file.
fn modinfo_section(elf: &[u8]) -> Result<&[u8], &'static str> {
    let u16_at = |at: usize| {
        elf.get(at..at + 2)
            .map(|b| usize::from(u16::from_le_bytes([b[0], b[1]])))
    };
    let u32_at = |at: usize| match elf.get(at..at.checked_add(4)?) {
        Some([a, b, c, d]) => usize::try_from(u32::from_le_bytes([*a, *b, *c, *d])).ok(),
        _ => None,
    };
    let u64_at = |at: usize| {
        let bytes = elf.get(at..at.checked_add(8)?)?;
        usize::try_from(u64::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    if !elf.starts_with(b"\x7fELF\x02\x01") || elf.len() < 64 {
        return Err("it is no 64-bit ELF file");
    }
    let broken = "its section table is broken";
    let (table, size, count, names) = (
        u64_at(0x28).ok_or(broken)?,
        u16_at(0x3a).ok_or(broken)?,
        u16_at(0x3c).ok_or(broken)?,
        u16_at(0x3e).ok_or(broken)?,
    );
    if size < 64 {
        return Err(broken);
    }
    let header = |index: usize| {
        index
            .checked_mul(size)
            .and_then(|o| table.checked_add(o))
            .filter(|at| at.checked_add(64).is_some_and(|end| end <= elf.len()))
    };
    let bytes = |index: usize| {
        let at = header(index)?;
        let (offset, length) = (u64_at(at + 0x18)?, u64_at(at + 0x20)?);
        elf.get(offset..offset.checked_add(length)?)
    };
    let strings = bytes(names).ok_or(broken)?;
    for index in 0..count {
        let at = header(index).ok_or(broken)?;
        let name = u32_at(at).and_then(|o| strings.get(o..)).ok_or(broken)?;
        if name.starts_with(b".modinfo\0") {
            return bytes(index).ok_or(broken);
        }
    }
    Err("it has no .modinfo section")
}

/// The modules to load for `wanted`, dependencies first. What is built in needs no loading; what is optional and not there is
/// left out.
pub fn closure(
    wanted: &[Wanted],
    modules: &BTreeMap<String, ModuleInfo>,
    builtin: &BTreeSet<String>,
) -> Result<Vec<String>, ModuleError> {
    let mut order = Vec::new();
    let mut state: BTreeMap<&str, bool> = BTreeMap::new();
    for want in wanted {
        if !builtin.contains(want.name) && !modules.contains_key(want.name) {
            if want.required {
                return Err(ModuleError::Missing {
                    name: want.name.to_owned(),
                });
            }
            continue;
        }
        match visit(want.name, modules, builtin, &mut state, &mut order, 0) {
            // An optional module with something missing below it is left out; what it brought along does no harm.
            Err(ModuleError::Missing { .. }) if !want.required => {}
            other => other?,
        }
    }
    Ok(order)
}

/// Depth of dependencies that is still believed.
const MAX_DEPTH: usize = 64;

fn visit<'a>(
    name: &'a str,
    modules: &'a BTreeMap<String, ModuleInfo>,
    builtin: &BTreeSet<String>,
    state: &mut BTreeMap<&'a str, bool>,
    order: &mut Vec<String>,
    depth: usize,
) -> Result<(), ModuleError> {
    if builtin.contains(name) {
        return Ok(());
    }
    match state.get(name) {
        Some(true) => return Ok(()),
        Some(false) => return Err(ModuleError::Circle { name: name.to_owned() }),
        None => {}
    }
    let missing = || ModuleError::Missing { name: name.to_owned() };
    let info = modules.get(name).ok_or_else(missing)?;
    if depth > MAX_DEPTH {
        return Err(ModuleError::Circle { name: name.to_owned() });
    }
    state.insert(name, false);
    let mut result = Ok(());
    for before in info.soft_before.iter().filter(|n| modules.contains_key(*n)) {
        // Soft dependencies may well point in circles: what cannot be loaded before is not.
        let _ = visit(before, modules, builtin, state, order, depth + 1);
    }
    // The package does not promise an order of `depends`; sorting makes ours the same every time.
    let mut depends: Vec<&String> = info.depends.iter().collect();
    depends.sort();
    for need in depends {
        result = visit(need, modules, builtin, state, order, depth + 1);
        if result.is_err() {
            break;
        }
    }
    if result.is_err() {
        state.remove(name);
        return result;
    }
    state.insert(name, true);
    order.push(name.to_owned());
    Ok(())
}

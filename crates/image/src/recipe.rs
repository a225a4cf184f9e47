//! The images that banger makes itself, as data.

/// How an image is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recipe {
    /// Name of the recipe and of the image made of it.
    pub name: &'static str,
    /// Raised whenever the recipe changes what it makes.
    pub version: u32,
    /// One sentence for users.
    pub summary: &'static str,
    /// Release of Debian.
    pub suite: &'static str,
    /// Bootstrap variant: the set of packages to begin with.
    pub variant: &'static str,
    /// Packages on top of it.
    pub packages: &'static [&'static str],
    /// Options of dpkg, for the installation and for those made in the machine later.
    pub dpkg_options: &'static [&'static str],
    /// Locales to generate, as `locales` names them in its configuration. `C.UTF-8` is always there.
    pub locales: &'static [&'static str],
    /// Programs of ours that the image holds.
    pub scripts: &'static [Script],
}

/// A program of ours in an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Script {
    /// Absolute path in the image; its directory is there already.
    pub path: &'static str,
    /// What it consists of.
    pub text: &'static str,
}

/// What replaces the manual pages that [`DPKG_OPTIONS`] leave out: the way to get them.
const MANUALS: &[Script] = &[
    Script {
        path: "/usr/local/sbin/unminimize",
        text: include_str!("recipe/unminimize"),
    },
    Script {
        path: "/usr/local/bin/man",
        text: include_str!("recipe/man"),
    },
];

/// Manual pages, translations and documents that nobody reads in a short-lived machine. Licences stay, and so do the
/// directories of manual pages, whose absence breaks some packages' scripts. And no file is brought to the disk one by one: an
/// installation that is cut short is started again from nothing, and so is such a machine.
const DPKG_OPTIONS: &[&str] = &[
    "force-unsafe-io",
    "path-exclude=/usr/share/man/*",
    "path-include=/usr/share/man/man[1-9]",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-include=/usr/share/locale/locale.alias",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
];

/// All recipes.
pub const RECIPES: &[Recipe] = &[
    Recipe {
        name: "debian",
        version: 2,
        summary: "Debian 12 with systemd, sshd, git, a compiler, Python and the usual tools",
        suite: "bookworm",
        variant: "minbase",
        packages: &[
            "bzip2",
            "ca-certificates",
            "cron",
            "curl",
            "dbus",
            "file",
            "g++",
            "gcc",
            "git",
            "iproute2",
            "iputils-ping",
            "jq",
            "kitty-terminfo",
            "kmod",
            "less",
            "libc6-dev",
            "libpam-systemd",
            "locales",
            "make",
            "nano",
            "ncurses-term",
            "netbase",
            "openssh-server",
            "patch",
            "pkg-config",
            "procps",
            "python3",
            "python3-pip",
            "python3-venv",
            "rsync",
            "sudo",
            "systemd",
            "systemd-sysv",
            "unzip",
            "vim-tiny",
            "wget",
            "xz-utils",
            "zip",
        ],
        dpkg_options: DPKG_OPTIONS,
        locales: &["en_US.UTF-8 UTF-8"],
        scripts: MANUALS,
    },
    Recipe {
        name: "debian-slim",
        version: 1,
        summary: "Debian 12, the smallest set of packages, without an init system",
        suite: "bookworm",
        variant: "minbase",
        packages: &["ca-certificates"],
        dpkg_options: DPKG_OPTIONS,
        locales: &[],
        scripts: &[],
    },
];

/// Finds a recipe by name.
pub fn find(name: &str) -> Option<&'static Recipe> {
    RECIPES.iter().find(|recipe| recipe.name == name)
}

/// Names of all recipes.
pub fn names() -> Vec<&'static str> {
    RECIPES.iter().map(|recipe| recipe.name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recipes_are_well_formed() {
        for recipe in RECIPES {
            assert_eq!(find(recipe.name), Some(recipe));
            assert!(
                recipe.packages.iter().all(|p| p
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b))),
                "{}",
                recipe.name
            );
            assert!(recipe.locales.iter().all(|l| !l.contains(['\'', ',', '\n'])));
            assert!(recipe.locales.is_empty() || recipe.packages.contains(&"locales"));
            for script in recipe.scripts {
                let (dir, name) = script.path.rsplit_once('/').unwrap();
                assert!(dir.starts_with("/usr/local/") && !name.is_empty(), "{}", script.path);
                assert!(script.text.starts_with("#!/bin/sh\n"), "{}", script.path);
            }
            assert!(
                recipe
                    .dpkg_options
                    .iter()
                    .all(|o| o.bytes().all(|b| b.is_ascii_graphic()) && !o.starts_with('-'))
            );
        }
        assert_eq!(find("../debian"), None);
    }
}

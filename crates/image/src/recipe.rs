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
}

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
        version: 1,
        summary: "Debian 12 with systemd, sshd, git, a compiler and the usual tools",
        suite: "bookworm",
        variant: "minbase",
        packages: &[
            "systemd",
            "systemd-sysv",
            "dbus",
            "libpam-systemd",
            "openssh-server",
            "sudo",
            "ca-certificates",
            "curl",
            "git",
            "gcc",
            "g++",
            "make",
            "libc6-dev",
            "patch",
            "pkg-config",
            "python3-minimal",
            "iproute2",
            "iputils-ping",
            "procps",
            "less",
            "vim-tiny",
            "xz-utils",
            "bzip2",
            "file",
            "kmod",
            "netbase",
        ],
        dpkg_options: DPKG_OPTIONS,
    },
    Recipe {
        name: "debian-slim",
        version: 1,
        summary: "Debian 12, the smallest set of packages, without an init system",
        suite: "bookworm",
        variant: "minbase",
        packages: &["ca-certificates"],
        dpkg_options: DPKG_OPTIONS,
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

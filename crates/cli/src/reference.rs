//! The reference of the command line, `docs/cli.md`, generated from the command tree.

use std::fmt::Write as _;

use crate::cli;
use crate::error::STATUSES;

const INTRODUCTION: &str = "\
# Command line reference

Generated from the program; a test holds the two together (`make docs` writes it anew).

## Conventions

- Data goes to standard output, everything else to standard error. `--quiet` leaves data and errors; lists then print ids alone.
- On a terminal long work shows a bar, elsewhere each stage is a line.
- Colours are used on a terminal; `--color`, `NO_COLOR` and `TERM=dumb` are obeyed.
- Machines are named by name, id or a prefix that fits only one, templates by id or such a prefix. Verbs that take several do all
  they can, print in the order given, and exit with the status of the first failure.
- Output that cannot be written, to a full disk for example, is a failure. A reader that went away is none: the status is then 141,
  or that of the command in the machine.
- Sizes that are shown of images, kernels, snapshots and templates are what is allocated on the host.
- Sizes need a unit and are powers of 1024: `512M`, `2G`, `4GiB`. Times are `500ms`, `90s`, `10m`, `1h30m`.

## JSON

Every command that prints data takes `--format json`, or `--json` for short. A list is an array, `[]` when empty. A single thing is
an object. Every object at the top, alone or in a list, carries `schema_version` (now 1). The schema only grows: fields are added,
none is renamed, removed or given another meaning under the same version. Fields that do not apply are left out or `null`.

| Command | Prints |
|---|---|
| `vm list`, `ps` | array of machines |
| `vm show`, `vm create`, `vm rename`, `vm wait`, `vm snapshot restore` | machine |
| `vm fork` | array of machines |
| `vm start`, `stop`, `restart`, `kill`, `pause`, `resume`, `suspend`, `delete`, `prune`, `set` | array of `{id, name, result}`; the result is `unchanged` where there was nothing to do |
| `vm snapshot list` / `show`, `create` | array of snapshots / snapshot |
| `vm commit` | image |
| `vm stats` | array of figures |
| `vm sessions` | array of sessions |
| `vm cp` | `{entries, bytes, skipped}` |
| `vm run --timings` | on standard error, in one line: `{stages: [{stage, ms, parts}], total_ms}` |
| `vm run --dry-run` | workspace: `{source, guest_path, head, branch, mode, files, skipped_untracked}` |
| `image list` / `show`, `build` | array of images / image |
| `kernel list` / `show`, `import` | array of kernels / kernel |
| `template list` / `show`, `build` | array of templates / template |
| `template prune` | `{removed, freed_bytes}` |
| `daemon start`, `status` | `{running, pid, …}` |
| `doctor`, `system status` | array of `{name, level, message, hint}` |
| `system install` | `{owner, version, dry_run, steps: [{action, object}], notes}` |
| `system uninstall` | `{steps: [{action, object}], kept}` |
| `audit` | `{objects: [{kind, name, machine, orphan, removed, failed}], orphans, blind}` |
| `version` | `{version, commit, api_version, daemon}` |

Machines, snapshots, images, kernels, templates, sessions and figures are those of the daemon's API (`GET /v1/openapi.json`).

## Files and environment

| | |
|---|---|
| `$XDG_RUNTIME_DIR/banger/bangerd.sock` | the daemon's socket; without the variable `/tmp/banger-runtime-<uid>/bangerd.sock` |
| `$XDG_STATE_HOME/banger` | machines, images, kernels, `daemon.log`, `ssh/` (default `~/.local/state`) |
| `$XDG_CONFIG_HOME/banger` | `config.toml` and the `ssh_config` of `banger ssh-config` (default `~/.config`) |
| `/etc/banger/install.toml` | an installation of system mode: for its owner socket and state are `/run/banger/bangerd.sock` and `/var/lib/banger/state` |
| `BANGER_MODE` | `user`: a daemon of your own although you own the installation; `system`: the installation's, or an error |
| `BANGER_ROOT` | root directory below which an installation is looked for; `/` when absent |
| `NO_COLOR`, `TERM` | colours; `TERM` is also handed to programs with a terminal |

";

/// The reference as Markdown.
pub fn markdown() -> String {
    let mut text = INTRODUCTION.to_owned();
    text.push_str("## Exit status\n\n| Status | Meaning |\n|---|---|\n");
    for (status, meaning) in STATUSES {
        let _ = writeln!(text, "| {status} | {meaning} |");
    }
    text.push_str(
        "\nIn `run`, `exec`, `shell` and `attach` the status is that of the command in the guest, 128 + n when signal n ended it.\n\
         \n## Commands\n",
    );
    let mut tree = cli::tree().term_width(100);
    tree.build();
    describe(&mut tree, "banger", &mut text);
    text
}

fn describe(command: &mut clap::Command, path: &str, text: &mut String) {
    let help = if path == "banger" {
        command.render_help()
    } else {
        command.render_long_help()
    };
    let help = help.to_string();
    let help: Vec<&str> = help.lines().map(str::trim_end).collect();
    let _ = write!(text, "\n### {path}\n\n```text\n{}\n```\n", help.join("\n").trim_end());
    for sub in command.get_subcommands_mut() {
        if sub.is_hide_set() || sub.get_name() == "help" {
            continue;
        }
        let path = format!("{path} {}", sub.get_name());
        describe(sub, &path, text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_reference_is_current() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/cli.md");
        let now = markdown();
        if std::env::var_os("BLESS").is_some() {
            std::fs::write(file, &now).unwrap();
        }
        let kept = std::fs::read_to_string(file).unwrap_or_default();
        assert!(kept == now, "docs/cli.md is out of date; `make docs` writes it anew");
    }

    #[test]
    fn the_description_of_the_api_has_its_version() {
        let text = include_str!("../../../docs/api.md");
        let version = format!(
            "{{\"version\":\"{}\",\"commit\":\"…\",\"api_version\":{}}}",
            env!("CARGO_PKG_VERSION"),
            banger_proto::API_VERSION
        );
        assert!(text.contains(&version), "docs/api.md lacks {version}");
    }

    /// Commands without JSON, since they print no data of banger's.
    const WITHOUT_JSON: &[(&str, &str)] = &[
        ("banger vm exec", "the output is the command's"),
        ("banger vm shell", "the output is the shell's"),
        ("banger vm attach", "the output is the command's"),
        ("banger vm ssh", "the output is ssh's"),
        ("banger vm logs", "the output is the guest's console"),
        ("banger vm cp", "prints nothing, or the file"),
        ("banger daemon logs", "the output is the daemon's log"),
        ("banger daemon stop", "prints nothing"),
        ("banger system restart", "prints nothing"),
        ("banger ssh-config", "prints a line for ssh's configuration"),
        ("banger completion", "a script for a shell"),
        ("banger man", "pages for man"),
    ];

    #[test]
    fn what_prints_data_takes_json() {
        fn check(command: &clap::Command, path: &str, lacking: &mut Vec<String>) {
            let subs: Vec<_> = command
                .get_subcommands()
                .filter(|s| !s.is_hide_set() && s.get_name() != "help")
                .collect();
            if subs.is_empty() && !command.get_arguments().any(|a| a.get_id() == "json") {
                lacking.push(path.to_owned());
            }
            for sub in subs {
                check(sub, &format!("{path} {}", sub.get_name()), lacking);
            }
        }
        let mut lacking = Vec::new();
        check(&cli::tree(), "banger", &mut lacking);
        lacking.retain(|path| !WITHOUT_JSON.iter().any(|(known, _)| known == path));
        assert!(lacking.is_empty(), "{lacking:?}");
    }

    #[test]
    fn every_command_has_an_example() {
        fn check(command: &clap::Command, path: &str) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Example"), "{path} has no example");
            assert!(command.get_about().is_some(), "{path} says nothing");
            for sub in command
                .get_subcommands()
                .filter(|s| !s.is_hide_set() && s.get_name() != "help")
            {
                check(sub, &format!("{path} {}", sub.get_name()));
            }
        }
        check(&cli::tree(), "banger");
    }
}

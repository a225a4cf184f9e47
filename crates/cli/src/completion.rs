//! Completion: the shells' scripts ask this program, and it asks the daemon, if there is one.

use std::time::Duration;

use banger_proto::api::{Image, Kernel, Snapshot, Template};
use clap_complete::engine::{ArgValueCandidates, CompletionCandidate};
use clap_complete::env::{CompleteEnv, Shells};
use serde::Deserialize;

use crate::cli;
use crate::client::Client;
use crate::commands::vm::common::machines as all_machines;
use crate::commands::vm::{recover, snapshot};
use crate::commands::{image, kernel, stock, template};
use crate::error::{Error, Result};
use crate::paths::Places;

/// The variable by which the scripts ask.
const VARIABLE: &str = "BANGER_COMPLETE";

/// Nobody waits longer for a completion.
const DEADLINE: Duration = Duration::from_millis(500);

/// Answers a shell's script, if one asks. Silent on every error.
pub(crate) fn answer() -> bool {
    if std::env::var_os(VARIABLE).is_none() {
        return false;
    }
    let here = std::env::current_dir().ok();
    CompleteEnv::with_factory(cli::tree)
        .var(VARIABLE)
        .try_complete(std::env::args_os(), here.as_deref())
        .unwrap_or(true)
}

/// The script for a shell.
pub(crate) fn registration(shell: &str) -> Result<Vec<u8>> {
    let unknown = || Error::usage(format!("no completion for shell `{shell}`"));
    let shells = Shells::builtins();
    let shell = shells.completer(shell).ok_or_else(unknown)?;
    let mut script = Vec::new();
    shell
        .write_registration(VARIABLE, "banger", "banger", "banger", &mut script)
        .map_err(|e| Error::failed(format!("cannot write the script: {e}")))?;
    Ok(script)
}

/// Names of machines.
pub(crate) fn machines() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        ask(async |client| {
            let machines = all_machines(&client).await?;
            Ok(machines
                .into_iter()
                .map(|m| (m.name, Some(format!("{}, {}", m.state.as_str(), m.spec.image))))
                .collect())
        })
    })
}

/// Names of machines that are not in the database and can be taken back.
pub(crate) fn recoverable() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        ask(async |client| {
            let lost = recover::all(&client).await?;
            Ok(lost.into_iter().map(|m| (m.name, Some(m.image))).collect())
        })
    })
}

/// Names of images.
pub(crate) fn images() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        ask(async |client| {
            Ok(stock::all::<Image>(&client, image::PATH)
                .await?
                .into_iter()
                .map(|i| (i.name, Some(i.source)))
                .collect())
        })
    })
}

/// Names of kernels.
pub(crate) fn kernels() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        ask(async |client| {
            Ok(stock::all::<Kernel>(&client, kernel::PATH)
                .await?
                .into_iter()
                .map(|k| (k.name, Some(k.release)))
                .collect())
        })
    })
}

/// Ids of templates.
pub(crate) fn templates() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        ask(async |client| {
            Ok(stock::all::<Template>(&client, template::PATH)
                .await?
                .into_iter()
                .map(|t| {
                    let what = format!("{}, {} vcpu, {} MiB", t.image, t.spec.vcpu, t.spec.memory_mib);
                    (t.id, Some(what))
                })
                .collect())
        })
    })
}

/// Names of snapshots of the machine that stands on the line already.
pub(crate) fn snapshots() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        let words: Vec<String> = std::env::args().skip_while(|word| word != "--").collect();
        let Some(machine) = machine_on_line(&words) else {
            return Vec::new();
        };
        ask(async |client| {
            Ok(stock::all::<Snapshot>(&client, &snapshot::path(machine))
                .await?
                .into_iter()
                .map(|s| (s.name, Some(s.created_at)))
                .collect())
        })
    })
}

/// The machine of a line that also takes the name of a snapshot: the first argument of `vm snapshot VERB` or `vm commit`.
fn machine_on_line(words: &[String]) -> Option<&str> {
    let mut words = words
        .iter()
        .map(String::as_str)
        .filter(|word| !word.starts_with('-'))
        .skip_while(|word| !matches!(*word, "snapshot" | "commit"));
    if words.next()? == "snapshot" {
        words.next()?;
    }
    words.next()
}

/// Names of recipes for images.
pub(crate) fn recipes() -> ArgValueCandidates {
    #[derive(Deserialize)]
    struct Recipes {
        recipes: Vec<Recipe>,
    }
    #[derive(Deserialize)]
    struct Recipe {
        name: String,
        description: String,
    }
    ArgValueCandidates::new(|| {
        let known = ask(async |client| {
            let recipes = client.get::<Recipes>("recipes").await?.recipes;
            Ok(recipes.into_iter().map(|r| (r.name, Some(r.description))).collect())
        });
        if known.is_empty() {
            ["debian", "debian-slim"].map(CompletionCandidate::new).into()
        } else {
            known
        }
    })
}

/// Asks a daemon that is there already; none, or one that does not answer in time, knows nothing.
fn ask(question: impl AsyncFnOnce(Client) -> Result<Vec<(String, Option<String>)>>) -> Vec<CompletionCandidate> {
    let Ok(client) = Client::passive(&Places::of_process()) else {
        return Vec::new();
    };
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return Vec::new();
    };
    let answer = runtime.block_on(async { tokio::time::timeout(DEADLINE, question(client)).await });
    let Ok(Ok(found)) = answer else { return Vec::new() };
    found
        .into_iter()
        .map(|(name, help)| CompletionCandidate::new(name).help(help.map(Into::into)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_of_a_snapshot_is_found_on_the_line() {
        let of = |line: &str| {
            let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
            machine_on_line(&words).map(str::to_owned)
        };
        assert_eq!(of("-- banger vm snapshot restore build x").as_deref(), Some("build"));
        assert_eq!(of("-- banger vm snapshot delete -q build").as_deref(), Some("build"));
        assert_eq!(of("-- banger vm commit build img --snapshot").as_deref(), Some("build"));
        assert_eq!(of("-- banger vm snapshot"), None);
        assert_eq!(of("-- banger vm show"), None);
    }

    #[test]
    fn every_shell_has_a_script() {
        for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
            let script = String::from_utf8(registration(shell).unwrap()).unwrap();
            assert!(script.contains(VARIABLE), "{shell}");
        }
        assert!(registration("tcsh").is_err());
    }
}

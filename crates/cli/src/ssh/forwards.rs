//! `banger internal ssh-forwards`: whether ssh would take a `RemoteForward` of the user's configuration to a machine.
//!
//! The machine could reach what such a forwarding leads to. ssh has no option that drops it: `ClearAllForwardings` also drops
//! `-L`, `-R` and `-D` of the command line, which editors use. So our block sets it unless this command succeeds: where the
//! question fails, for whatever reason, everything is cleared. The command evaluates what ssh itself evaluates: it takes the
//! arguments of the ssh that called it and adds `-G`. No token of ssh's is part of the command, so no name reaches a shell.

use std::process::Stdio;
use std::time::Duration;

use crate::cli::Context;
use crate::error::Result;

/// Set in the environment of the evaluation, which contains our block too: it asks nothing again. The variable opens nothing: with
/// it the command fails, and the evaluation does not depend on the answer.
const EVALUATING: &str = "BANGER_SSH_FORWARDS";

/// How long the evaluation may take. Commands of the user's own `Match exec` are part of it.
const DEADLINE: Duration = Duration::from_secs(5);

/// Options of ssh that take a value, up to OpenSSH 10.
const WITH_VALUE: &str = "BbcDEeFIiJLlmOopPQRSWw";

/// Options of ssh that take none.
const BARE: &str = "1246AaCfGgKkMNnqsTtVvXxYy";

/// 0 if no `RemoteForward` comes out, 1 otherwise.
pub(crate) fn run(context: &Context) -> Result<u8> {
    if std::env::var_os(EVALUATING).is_some() {
        return Ok(1);
    }
    let Some(arguments) = callers_arguments().as_deref().and_then(evaluation) else {
        return Ok(1);
    };
    let shown = context.block_on(async { Ok(evaluated(&arguments).await) })?;
    Ok(u8::from(shown.is_none_or(|shown| remote_forwards(&shown))))
}

/// Whether `ssh -G` shows a forwarding that the other end listens for.
pub(crate) fn remote_forwards(shown: &str) -> bool {
    shown.lines().any(|line| line.starts_with("remoteforward "))
}

/// The command line of the program that started this one, without its name.
fn callers_arguments() -> Option<Vec<String>> {
    let line = std::fs::read(format!("/proc/{}/cmdline", std::os::unix::process::parent_id())).ok()?;
    let line = String::from_utf8(line).ok()?;
    let words = line.strip_suffix('\0')?.split('\0').skip(1);
    Some(words.map(str::to_owned).collect())
}

/// What `ssh -G` says with these arguments; nothing if it fails or does not end in time.
async fn evaluated(arguments: &[String]) -> Option<String> {
    let asked = tokio::process::Command::new("ssh")
        .args(arguments)
        .env(EVALUATING, "1")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(DEADLINE, asked).await.ok()?.ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The arguments that show the configuration of an ssh with these arguments, without the remote forwardings that they ask for
/// themselves. Nothing if they are not those of an ssh to a machine.
fn evaluation(arguments: &[String]) -> Option<Vec<String>> {
    let mut kept = ["-G", "-o", "ClearAllForwardings=no"].map(str::to_owned).to_vec();
    let mut rest = arguments.iter();
    let mut host = None;
    while let Some(word) = rest.next() {
        let Some(letters) = word.strip_prefix('-').filter(|letters| !letters.is_empty()) else {
            kept.push(word.clone());
            if host.is_some() {
                // The command.
                kept.extend(rest.by_ref().cloned());
            } else {
                host = Some(word);
            }
            continue;
        };
        if letters == "-" {
            kept.push(word.clone());
            // ssh takes no options behind it: the host, unless it was there, and the command.
            host = host.or(rest.as_slice().first());
            kept.extend(rest.by_ref().cloned());
            continue;
        }
        for (at, letter) in letters.char_indices() {
            if BARE.contains(letter) {
                // No log of the evaluation.
                if !matches!(letter, 'v' | 'y') {
                    kept.push(format!("-{letter}"));
                }
                continue;
            }
            if !WITH_VALUE.contains(letter) {
                return None;
            }
            let joined = &letters[at + letter.len_utf8()..];
            let value = if joined.is_empty() {
                rest.next()?.as_str()
            } else {
                joined
            };
            let dropped = matches!(letter, 'E' | 'R') || letter == 'o' && is_remote_forward(value);
            if !dropped {
                kept.extend([format!("-{letter}"), value.to_owned()]);
            }
            break;
        }
    }
    is_machine(host?).then_some(kept)
}

/// Whether the value of an `-o` is a remote forwarding.
fn is_remote_forward(option: &str) -> bool {
    option
        .trim_start()
        .split(|c: char| c == '=' || c.is_ascii_whitespace())
        .next()
        .is_some_and(|key| key.eq_ignore_ascii_case("RemoteForward"))
}

/// Whether a destination, with user or as an URI, is one that our block is for.
fn is_machine(destination: &str) -> bool {
    let (address, uri) = match destination.strip_prefix("ssh://") {
        Some(address) => (address.trim_end_matches('/'), true),
        None => (destination, false),
    };
    let host = address.rsplit_once('@').map_or(address, |(_, host)| host);
    let host = match host.split_once(':') {
        Some((host, _)) if uri => host,
        _ => host,
    };
    host.ends_with(".vm")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str) -> Option<String> {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let kept = evaluation(&words)?.join(" ");
        Some(kept.strip_prefix("-G -o ClearAllForwardings=no ").unwrap().to_owned())
    }

    #[test]
    fn an_ssh_to_a_machine_is_evaluated_as_it_is() {
        for (line, kept) in [
            ("web.vm", "web.vm"),
            ("-vNTF /f -p22 -lbob web.vm", "-N -T -F /f -p 22 -l bob web.vm"),
            ("bob@web.vm -L 1:a:2 -R 3:b:4 ls -R", "bob@web.vm -L 1:a:2 ls -R"),
            ("-NR3:b:4 -E log -y web.vm", "-N web.vm"),
            (
                "-o remoteforward=1 -oRemoteForward=2 -o Port=3 web.vm",
                "-o Port=3 web.vm",
            ),
            ("-l bob -- web.vm -R 1", "-l bob -- web.vm -R 1"),
            ("web.vm -- -R 1", "web.vm -- -R 1"),
            ("ssh://bob@web.vm:22/", "ssh://bob@web.vm:22/"),
        ] {
            assert_eq!(of(line).as_deref(), Some(kept), "{line}");
        }
    }

    #[test]
    fn what_is_no_ssh_to_a_machine_is_not_evaluated() {
        for line in [
            "",
            "-G",
            "-p",
            "work",
            "-l web.vm",
            "--long web.vm",
            "-z web.vm",
            "-",
            "a@web.vm:22",
            "-p 22 -- work web.vm",
        ] {
            assert_eq!(of(line), None, "{line}");
        }
    }

    #[test]
    fn a_remote_forwarding_is_seen() {
        assert!(remote_forwards("port 22\nremoteforward 9000 [socks]:0\n"));
        assert!(!remote_forwards(
            "localforward 9001 [remoteforward ]:22\nclearallforwardings no\n"
        ));
    }
}

//! Starting the program of a session: what to run is decided in pure code, the rest is pipes or a terminal.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use banger_proto::error::{ApiError, ErrorCode};
use banger_proto::frame::{Open, Resize};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::pty::OpenptFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::users::{self, User};
use crate::sys;

/// Where programs are looked for unless the client says otherwise.
pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Size of the output pipes. Larger than the kernel's default, so that a program under emulation is not switched out for
/// every 64 KiB.
const PIPE: usize = 256 * 1024;

/// A program that was started.
pub(super) struct Spawned {
    /// What its user has to know beforehand, as a line.
    pub(super) note: Option<String>,
    pub(super) child: tokio::process::Child,
    /// The terminal's master, where there is one. It is standard input and output at once.
    pub(super) pty: Option<std::sync::Arc<AsyncFd<OwnedFd>>>,
    pub(super) stdin: Option<AsyncFd<OwnedFd>>,
    pub(super) stdout: Option<AsyncFd<OwnedFd>>,
    pub(super) stderr: Option<AsyncFd<OwnedFd>>,
}

/// Why a program was not started.
#[derive(Debug)]
pub(super) enum SpawnFailure {
    /// The request can't be carried out: no such user or directory.
    Refused(ApiError),
    /// As a shell would put it: a line for standard error, and 126 or 127.
    Exit(String, i32),
}

/// What is to be executed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Target {
    program: PathBuf,
    argv0: String,
    args: Vec<String>,
}

/// The locale where image and user name none. Every C library has it.
const LOCALE: &str = "C.UTF-8";

/// Where an image names its locale: Debian's file, systemd's, and that of PAM. All hold lines like `LANG="de_DE.UTF-8"`.
const LOCALES: [&str; 3] = ["default/locale", "locale.conf", "environment"];

/// The locale that the image names.
fn locale(etc: &Path) -> Option<String> {
    let read = |name: &&str| {
        let mut text = String::new();
        let file = std::fs::File::open(etc.join(name)).ok()?;
        file.take(64 * 1024).read_to_string(&mut text).ok()?;
        named_locale(&text)
    };
    LOCALES.iter().find_map(read)
}

/// The last value of `LANG` in a file of assignments.
fn named_locale(text: &str) -> Option<String> {
    let value = |line: &str| {
        let line = line.trim();
        let value = line
            .strip_prefix("export ")
            .unwrap_or(line)
            .trim_start()
            .strip_prefix("LANG=")?;
        Some(value.trim().trim_matches(['"', '\'']).to_owned())
    };
    let value = text.lines().filter_map(value).next_back()?;
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '@');
    ((1..=64).contains(&value.len()) && value.chars().all(fits)).then_some(value)
}

/// The environment of a session.
pub(super) fn environment(
    user: &User,
    shell: &str,
    lang: &str,
    tty: bool,
    own: &BTreeMap<String, String>,
) -> BTreeMap<String, String> {
    let mut env: BTreeMap<String, String> = [
        ("HOME", user.home.as_str()),
        ("LANG", lang),
        ("LOGNAME", &user.name),
        ("PATH", PATH),
        ("SHELL", shell),
        ("USER", &user.name),
    ]
    .map(|(k, v)| (k.to_owned(), v.to_owned()))
    .into();
    if tty {
        env.insert("TERM".to_owned(), "xterm-256color".to_owned());
    }
    let fit = |(k, v): &(&String, &String)| !k.is_empty() && !k.contains(['=', '\0']) && !v.contains('\0');
    env.extend(own.iter().filter(fit).map(|(k, v)| (k.clone(), v.clone())));
    env
}

/// Finds the program as a shell would. `is_program` tells whether a path is an executable file (`Some(true)`), something else
/// (`Some(false)`) or nothing.
pub(super) fn resolve(
    command: &[String],
    shell: &str,
    path: &str,
    workdir: &Path,
    is_program: impl Fn(&Path) -> Option<bool>,
) -> Result<Target, SpawnFailure> {
    let Some((name, args)) = command.split_first() else {
        let base = shell.rsplit('/').next().unwrap_or(shell);
        return Ok(Target {
            program: shell.into(),
            argv0: format!("-{base}"),
            args: Vec::new(),
        });
    };
    let found = |program| {
        Ok(Target {
            program,
            argv0: name.clone(),
            args: args.to_vec(),
        })
    };
    let mut refused = false;
    if name.contains('/') {
        let program = workdir.join(name);
        match is_program(&program) {
            Some(true) => return found(program),
            Some(false) => refused = true,
            None => {}
        }
    } else if !name.is_empty() {
        for directory in path.split(':') {
            let program = workdir.join(directory).join(name);
            match is_program(&program) {
                Some(true) => return found(program),
                Some(false) => refused = true,
                None => {}
            }
        }
    }
    Err(match (refused, name.contains('/')) {
        (true, _) => SpawnFailure::Exit(format!("banger: {name}: not an executable file\n"), 126),
        (false, true) => SpawnFailure::Exit(format!("banger: {name}: no such file or directory\n"), 127),
        (false, false) => SpawnFailure::Exit(format!("banger: {name}: command not found\n"), 127),
    })
}

fn is_program(path: &Path) -> Option<bool> {
    let meta = std::fs::metadata(path).ok()?;
    Some(meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Starts what `open` asks for.
pub(super) fn spawn(etc: &Path, open: &Open) -> Result<Spawned, SpawnFailure> {
    let user = users::look_up(etc, open.user.as_deref().unwrap_or("root")).map_err(SpawnFailure::Refused)?;
    let shell = [user.shell.as_str(), "/bin/bash", "/bin/sh"].into_iter();
    let shell = shell
        .filter(|s| !s.is_empty())
        .find(|s| is_program(Path::new(s)) == Some(true))
        .unwrap_or("/bin/sh");
    let lang = locale(etc);
    let lang = lang.as_deref().unwrap_or(LOCALE);
    let env = environment(&user, shell, lang, open.tty, &open.env);
    let (workdir, note) = workdir(&user, open.workdir.as_deref(), open.workdir_or_home)?;
    let path = env.get("PATH").map_or(PATH, String::as_str);
    let target = resolve(&open.command, shell, path, &workdir, is_program)?;

    let mut command = Command::new(&target.program);
    command
        .arg0(&target.argv0)
        .args(&target.args)
        .current_dir(&workdir)
        .env_clear()
        .envs(&env);
    let me = rustix::process::geteuid().as_raw();
    let change = (user.uid != me).then(|| sys::ChildUser {
        uid: user.uid,
        gid: user.gid,
        groups: user.groups.clone(),
    });
    if !open.tty {
        command.process_group(0);
    }
    sys::prepare(
        &mut command,
        sys::ChildSetup {
            tty: open.tty,
            user: change,
        },
    );
    let spawned = if open.tty {
        on_terminal(command, open, &user)
    } else {
        on_pipes(command, open.stdin)
    };
    let noted = spawned.map(|spawned| Spawned { note, ..spawned });
    noted.map_err(|e| {
        let name = open.command.first().map_or(shell, String::as_str);
        match e.raw_os_error().map(Errno::from_raw_os_error) {
            // The program is there, so what is missing is its interpreter or loader.
            Some(Errno::NOENT) => SpawnFailure::Exit(format!("banger: {name}: its interpreter is missing\n"), 127),
            _ => SpawnFailure::Exit(format!("banger: {name}: {}\n", message(&e)), 126),
        }
    })
}

/// The system's words for an error, without the number that the standard library adds.
fn message(e: &io::Error) -> String {
    let text = e.to_string();
    text.split(" (os error").next().unwrap_or(&text).to_lowercase()
}

/// The directory to run in, and what to say about it.
fn workdir(user: &User, asked: Option<&str>, or_home: bool) -> Result<(PathBuf, Option<String>), SpawnFailure> {
    let home = || {
        let home = Path::new(&user.home);
        if home.is_dir() {
            home.to_path_buf()
        } else {
            PathBuf::from("/")
        }
    };
    let Some(asked) = asked else {
        return Ok((home(), None));
    };
    let directory = Path::new(&user.home).join(asked);
    match std::fs::metadata(&directory) {
        Ok(meta) if meta.is_dir() => Ok((directory, None)),
        _ if or_home => {
            let home = home();
            let note = format!(
                "banger: there is no directory {} any more; this runs in {}\n",
                directory.display(),
                home.display()
            );
            Ok((home, Some(note)))
        }
        Ok(_) => Err(SpawnFailure::Refused(ApiError::new(
            ErrorCode::InvalidSpec,
            format!("working directory `{asked}` is not a directory"),
        ))),
        Err(_) => Err(SpawnFailure::Refused(
            ApiError::new(
                ErrorCode::NotFound,
                format!("working directory `{asked}` does not exist in the guest"),
            )
            .hint("--workdir names a directory inside the machine"),
        )),
    }
}

fn on_pipes(mut command: Command, with_stdin: bool) -> io::Result<Spawned> {
    let (out, out_child) = pipe_with(PipeFlags::CLOEXEC)?;
    let (err, err_child) = pipe_with(PipeFlags::CLOEXEC)?;
    let _ = rustix::pipe::fcntl_setpipe_size(&out, PIPE);
    command.stdout(out_child).stderr(err_child);
    let stdin = if with_stdin {
        let (child, ours) = pipe_with(PipeFlags::CLOEXEC)?;
        command.stdin(child);
        Some(sys::watched(nonblocking(ours)?, Interest::WRITABLE)?)
    } else {
        command.stdin(Stdio::null());
        None
    };
    let child = tokio::process::Command::from(command).spawn()?;
    Ok(Spawned {
        note: None,
        child,
        pty: None,
        stdin,
        stdout: Some(sys::watched(nonblocking(out)?, Interest::READABLE)?),
        stderr: Some(sys::watched(nonblocking(err)?, Interest::READABLE)?),
    })
}

fn on_terminal(mut command: Command, open: &Open, user: &User) -> io::Result<Spawned> {
    let master = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    rustix::pty::grantpt(&master)?;
    rustix::pty::unlockpt(&master)?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags).or_else(|_| {
        let name = rustix::pty::ptsname(&master, Vec::new())?;
        rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())
    })?;
    if user.uid != rustix::process::geteuid().as_raw() {
        rustix::fs::fchown(&slave, Some(rustix::fs::Uid::from_raw(user.uid)), None)?;
    }
    resize(&slave, open.size.unwrap_or(Resize { rows: 24, cols: 80 }))?;
    let master = sys::watched(nonblocking(master)?, Interest::READABLE | Interest::WRITABLE)?;
    command
        .stdin(slave.try_clone()?)
        .stdout(slave.try_clone()?)
        .stderr(slave);
    let child = tokio::process::Command::from(command).spawn()?;
    Ok(Spawned {
        note: None,
        child,
        pty: Some(std::sync::Arc::new(master)),
        stdin: None,
        stdout: None,
        stderr: None,
    })
}

/// Sets the size of a terminal.
pub(super) fn resize(terminal: impl AsFd, size: Resize) -> io::Result<()> {
    let size = rustix::termios::Winsize {
        ws_row: size.rows,
        ws_col: size.cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    Ok(rustix::termios::tcsetwinsize(terminal, size)?)
}

fn nonblocking(fd: OwnedFd) -> io::Result<OwnedFd> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|&w| w.to_owned()).collect()
    }

    fn guest(path: &Path) -> Option<bool> {
        let is = |names: &[&str]| names.iter().any(|n| Path::new(n) == path);
        if is(&["/usr/bin/git", "/srv/run.sh", "/root/bin/tool"]) {
            return Some(true);
        }
        is(&["/usr/bin/notes", "/srv/dir"]).then_some(false)
    }

    fn resolved(command: &[&str], path: &str) -> Result<String, i32> {
        match resolve(&words(command), "/bin/bash", path, Path::new("/srv"), guest) {
            Ok(target) => Ok(target.program.to_str().unwrap().to_owned()),
            Err(SpawnFailure::Exit(_, code)) => Err(code),
            Err(SpawnFailure::Refused(e)) => panic!("{e}"),
        }
    }

    #[test]
    fn programs_are_found_like_in_a_shell() {
        assert_eq!(resolved(&["git", "log"], PATH), Ok("/usr/bin/git".into()));
        assert_eq!(resolved(&["./run.sh"], PATH), Ok("/srv/./run.sh".into()));
        assert_eq!(resolved(&["/usr/bin/git"], ""), Ok("/usr/bin/git".into()));
        assert_eq!(resolved(&["tool"], "/root/bin:/bin"), Ok("/root/bin/tool".into()));
        assert_eq!(resolved(&["notes"], PATH), Err(126));
        assert_eq!(resolved(&["/srv/dir"], PATH), Err(126));
        assert_eq!(resolved(&["nope"], PATH), Err(127));
        assert_eq!(resolved(&["./nope"], PATH), Err(127));
        assert_eq!(resolved(&[""], PATH), Err(127));
    }

    #[test]
    fn no_command_is_a_login_shell() {
        let target = resolve(&[], "/bin/bash", PATH, Path::new("/"), guest).unwrap_or_else(|e| panic!("{e:?}"));
        assert_eq!(
            target,
            Target {
                program: "/bin/bash".into(),
                argv0: "-bash".into(),
                args: vec![]
            }
        );
    }

    #[test]
    fn the_clients_environment_wins() {
        let user = users::find("", "", "root").unwrap();
        let own = [("TERM", "vt100"), ("A", "b"), ("", "x"), ("B=", "x")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into();
        let env = environment(&user, "/bin/sh", LOCALE, true, &own);
        assert_eq!(env["TERM"], "vt100");
        assert_eq!(
            (env["HOME"].as_str(), env["USER"].as_str(), env["SHELL"].as_str()),
            ("/root", "root", "/bin/sh")
        );
        assert_eq!(env["A"], "b");
        assert!(!env.contains_key("") && !env.contains_key("B="));
        let plain = environment(&user, "/bin/sh", "de_DE.UTF-8", false, &BTreeMap::new());
        assert!(!plain.contains_key("TERM"));
        assert_eq!(plain["LANG"], "de_DE.UTF-8");
    }

    #[test]
    fn the_image_may_name_its_locale() {
        for (text, locale) in [
            ("LANG=de_DE.UTF-8\n", Some("de_DE.UTF-8")),
            ("# x\nLC_ALL=C\n export LANG=\"C\"\nLANGUAGE=de\n", Some("C")),
            ("LANG=a\nLANG='fr_FR@euro'\n", Some("fr_FR@euro")),
            ("LANG=\n", None),
            ("LANG=$(reboot)\n", None),
            ("#LANG=C\n", None),
            ("", None),
        ] {
            assert_eq!(named_locale(text).as_deref(), locale, "{text:?}");
        }
        let etc = tempfile::tempdir().unwrap();
        assert_eq!(locale(etc.path()), None);
        std::fs::write(etc.path().join("environment"), "PATH=/bin\nLANG=en_US.UTF-8\n").unwrap();
        assert_eq!(locale(etc.path()).as_deref(), Some("en_US.UTF-8"));
        std::fs::write(etc.path().join("locale.conf"), "LANG=pl_PL.UTF-8\n").unwrap();
        assert_eq!(locale(etc.path()).as_deref(), Some("pl_PL.UTF-8"));
    }

    #[test]
    fn a_directory_that_is_gone_is_the_home_where_no_one_named_it() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().display().to_string();
        let user = User {
            home: path.clone(),
            ..users::find("", "", "root").unwrap()
        };
        let (directory, note) = workdir(&user, Some("gone"), true).unwrap_or_else(|e| panic!("{e:?}"));
        assert_eq!(directory, home.path());
        assert_eq!(
            note,
            Some(format!(
                "banger: there is no directory {path}/gone any more; this runs in {path}\n"
            ))
        );
        assert!(matches!(
            workdir(&user, Some("gone"), false),
            Err(SpawnFailure::Refused(_))
        ));
        std::fs::create_dir(home.path().join("there")).unwrap();
        let (directory, note) = workdir(&user, Some("there"), true).unwrap_or_else(|e| panic!("{e:?}"));
        assert_eq!((directory, note), (home.path().join("there"), None));
    }
}

//! SSH through the agent: `vm ssh`, and `ssh NAME.vm`.

use std::os::unix::fs::PermissionsExt;
use std::sync::{Mutex, PoisonError};

use banger_testkit::{Need, TestEnv};

use crate::harness::{create, debian, tests};

tests! { &[Need::Base, Need::Ssh];
    vm_ssh,
    plain_ssh_through_the_users_configuration,
    the_users_file_is_touched_in_one_block,
    keys_follow_the_machine,
    an_image_without_sshd,
}

/// The home of the shared environment is looked at by one test at a time.
static HOME: Mutex<()> = Mutex::new(());

fn vm_ssh() {
    let (env, m) = debian();
    let _alone = HOME.lock().unwrap_or_else(PoisonError::into_inner);
    let done = env
        .banger([
            "vm",
            "ssh",
            m,
            "--",
            "sh",
            "-c",
            "'hostname; id -un; echo problem >&2; exit 42'",
        ])
        .deadline(60)
        .run()
        .code(42);
    assert_eq!(done.out(), format!("{m}\nroot\n"));
    assert!(done.err().contains("problem"));
    // No question was asked and no pin of the user's was made.
    assert!(!env.home().join(".ssh").exists(), "something was written to ~/.ssh");
}

fn plain_ssh_through_the_users_configuration() {
    let (env, m) = debian();
    let _alone = HOME.lock().unwrap_or_else(PoisonError::into_inner);
    let user = TestHome::of(env);
    env.ok("ssh-config --install");
    let config = std::fs::read_to_string(user.config()).unwrap();
    assert!(config.contains("Include") || config.contains("Host *.vm"), "{config}");
    // As a remote editor would: only OpenSSH, from a directory of its own.
    let done = env
        .program("ssh")
        .arg("-F")
        .arg(user.config())
        .args([&format!("{m}.vm"), "hostname"])
        .cwd("/")
        .deadline(60)
        .run();
    assert_eq!(done.code(0).out(), format!("{m}\n"));
    // UTF-8 is the default, also for who comes this way; what the user sets wins.
    for (options, lang) in [(&[][..], "C.UTF-8"), (&["-o", "SetEnv=LANG=C"][..], "C")] {
        let ssh = env.program("ssh").arg("-F").arg(user.config()).args(options);
        let done = ssh.args([&format!("{m}.vm"), "echo $LANG"]).deadline(60).run();
        assert_eq!(done.code(0).out(), format!("{lang}\n"));
    }
    let done = env
        .program("ssh")
        .arg("-F")
        .arg(user.config())
        .args(["-o", "ConnectTimeout=10", "nosuch.vm", "true"])
        .cwd("/")
        .deadline(60)
        .run();
    done.code(255).says(&["nosuch"]);
    env.ok("ssh-config --uninstall");
    assert!(
        !std::fs::read_to_string(user.config())
            .unwrap_or_default()
            .contains("banger")
    );
}

/// `~/.ssh` of an environment, removed at the end because many tests share it.
struct TestHome<'a>(&'a TestEnv);

impl<'a> TestHome<'a> {
    fn of(env: &'a TestEnv) -> Self {
        std::fs::create_dir_all(env.home().join(".ssh")).unwrap();
        std::fs::set_permissions(env.home().join(".ssh"), std::fs::Permissions::from_mode(0o700)).unwrap();
        Self(env)
    }

    fn config(&self) -> std::path::PathBuf {
        self.0.home().join(".ssh/config")
    }
}

impl Drop for TestHome<'_> {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(self.0.home().join(".ssh"));
    }
}

// B25: the daemon edited the user's ssh configuration by itself.
fn the_users_file_is_touched_in_one_block() {
    let env = TestEnv::bare("ssh-config");
    env.ok("vm list");
    assert!(
        !env.home().join(".ssh").exists(),
        "~/.ssh was made without being asked for"
    );
    let shown = env.ok("ssh-config");
    assert!(
        shown.out().contains("Include") || shown.out().contains("Host"),
        "{}",
        shown.out()
    );
    assert!(!env.home().join(".ssh").exists());

    let file = env.home().join(".ssh/config");
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    let foreign = "# mine\nHost work\n\tUser me\n";
    std::fs::write(&file, foreign).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    env.ok("ssh-config --install");
    let once = std::fs::read_to_string(&file).unwrap();
    assert!(
        once.contains(foreign.trim_end()) && once.len() > foreign.len(),
        "{once}"
    );
    env.ok("ssh-config --install");
    assert_eq!(
        std::fs::read_to_string(&file).unwrap(),
        once,
        "a second install changes the file"
    );
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    // What the user wrote around it stays.
    std::fs::write(&file, format!("{once}\nHost later\n\tUser me\n")).unwrap();
    env.ok("ssh-config --uninstall");
    let left = std::fs::read_to_string(&file).unwrap();
    assert!(
        left.contains("Host work") && left.contains("Host later") && !left.contains("banger"),
        "{left}"
    );
    env.ok("ssh-config --uninstall");
    env.close();
}

// B32: a pin of a machine long gone made the next of its name unreachable.
fn keys_follow_the_machine() {
    let env = TestEnv::new("ssh-keys");
    for _ in 0..2 {
        create(&env, "same", "debian");
        let done = env.banger(["vm", "ssh", "same", "--", "true"]).deadline(60).run();
        assert_eq!(done.status, 0, "{}", done.err());
        env.banger(["vm", "delete", "same", "--force"]).deadline(60).ok();
        let known = std::fs::read_to_string(env.state().join("ssh/known_hosts")).unwrap_or_default();
        assert!(!known.contains("same"), "a pin of a deleted machine is left: {known}");
    }
    env.close();
}

fn an_image_without_sshd() {
    let (env, m) = crate::harness::slim();
    let done = env.banger(["vm", "ssh", m, "--", "true"]).deadline(60).run().fails();
    assert!(
        done.err().contains("sshd") || done.err().contains("vm shell"),
        "{}",
        done.err()
    );
}

//! `ssh NAME.vm` and `banger vm ssh` with a real ssh and a configuration of the user's.

#![allow(clippy::unwrap_used, reason = "a test may end this way")]

use std::path::Path;

use support::{Home, MACHINE, PROGRAM};

mod support;

#[test]
fn ssh_config_comes_and_goes() {
    let home = Home::new();
    std::fs::create_dir(home.path(".ssh")).unwrap();
    let foreign = "Host work\n    User me\n";
    std::fs::write(home.path(".ssh/config"), foreign).unwrap();
    let ran = home.run(&["ssh-config"]);
    assert!(
        ran.stdout.starts_with("Include \"") && ran.stderr.contains("--install"),
        "{ran:?}"
    );
    assert_eq!(std::fs::read_to_string(home.path(".ssh/config")).unwrap(), foreign);
    home.run(&["ssh-config", "--install"]);
    home.run(&["ssh-config", "--install"]);
    let text = std::fs::read_to_string(home.path(".ssh/config")).unwrap();
    assert_eq!(text.matches("Include").count(), 1);
    assert!(text.contains(foreign));
    assert!(home.path(".config/banger/ssh_config").exists());
    if let Ok(output) = home
        .command(Path::new("ssh"))
        .arg("-F")
        .arg(home.path(".ssh/config"))
        .args(["-G", "build.vm"])
        .output()
    {
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(
            text.contains("internal ssh-proxy '%n'") && text.contains("stricthostkeychecking true"),
            "{text}"
        );
        assert!(text.contains(".local/state/banger/ssh/known_hosts"), "{text}");
    }
    home.run(&["ssh-config", "--uninstall"]);
    home.run(&["ssh-config", "--uninstall"]);
    assert_eq!(std::fs::read_to_string(home.path(".ssh/config")).unwrap(), foreign);
    assert!(!home.path(".config/banger/ssh_config").exists());
}

/// What a user may have for the hosts that are trusted, all of it for every host.
const TRUSTING: &str = "Host *\n  ForwardAgent yes\n  ForwardX11 yes\n  ForwardX11Trusted yes\n  RemoteForward 9000 localhost:22\n\
    LocalForward 9001 localhost:22\n  DynamicForward 9002\n  SendEnv SECRET_* LANG\n  SetEnv TOKEN=x\n  Tunnel yes\n\
    PermitLocalCommand yes\n  LocalCommand touch ran\n  RemoteCommand tmux\n  ControlMaster auto\n  ControlPath ~/.ssh/c-%C\n\
    ControlPersist yes\n  AddKeysToAgent yes\n  PKCS11Provider /lib/x.so\n  GSSAPIAuthentication yes\n  VerifyHostKeyDNS yes\n\
    PreferredAuthentications gssapi-with-mic,publickey,password\n";

/// What `ssh -G` shows of a host, without the lines that say that something is off.
fn in_force(home: &Home, arguments: &[&str]) -> Vec<String> {
    let shown = home
        .command(Path::new("ssh"))
        .arg("-F")
        .arg(home.path(".ssh/config"))
        .arg("-G")
        .args(arguments)
        .output()
        .unwrap();
    assert!(shown.status.success(), "{}", String::from_utf8_lossy(&shown.stderr));
    let keys = [
        "forwardagent",
        "forwardx11",
        "forwardx11trusted",
        "remoteforward",
        "localforward",
        "dynamicforward",
        "sendenv",
        "setenv",
        "tunnel",
        "permitlocalcommand",
        "remotecommand",
        "controlmaster",
        "controlpath",
        "addkeystoagent",
        "pkcs11provider",
        "verifyhostkeydns",
        "preferredauthentications",
    ];
    String::from_utf8(shown.stdout)
        .unwrap()
        .lines()
        .filter(|line| {
            let (key, value) = line.split_once(' ').unwrap_or((line, ""));
            keys.contains(&key) && !matches!(value, "no" | "false" | "none")
        })
        .map(str::to_owned)
        .collect()
}

const PINNED: [&str; 2] = ["preferredauthentications publickey", "setenv LANG=C.UTF-8"];

#[test]
fn nothing_of_the_users_ssh_reaches_a_machine_unless_it_is_named() {
    let home = Home::new();
    if home.command(Path::new("ssh")).arg("-V").output().is_err() {
        return;
    }
    std::fs::create_dir(home.path(".ssh")).unwrap();
    let config = home.path(".ssh/config");
    std::fs::write(&config, TRUSTING).unwrap();
    assert!(in_force(&home, &["build.vm"]).len() > 15, "the test can tell");
    let ran = home.run(&["ssh-config", "--install"]);
    assert!(!ran.stderr.contains("warning"), "{ran:?}");
    let sorted = |mut lines: Vec<String>| {
        lines.sort();
        lines
    };
    assert_eq!(sorted(in_force(&home, &["build.vm"])), PINNED);
    assert!(in_force(&home, &["work"]).len() > 15, "other hosts keep what they had");
    // On the command line, and for a machine that is named.
    let asked = [
        "-o",
        "ClearAllForwardings=no",
        "-A",
        "-L",
        "8080:localhost:80",
        "build.vm",
    ];
    let asked = in_force(&home, &asked);
    assert!(asked.contains(&"forwardagent yes".to_owned()), "{asked:?}");
    assert!(
        asked.contains(&"localforward 8080 [localhost]:80".to_owned()),
        "{asked:?}"
    );
    let text = std::fs::read_to_string(&config).unwrap();
    let named = format!("Host build.vm\n  ForwardAgent yes\n{text}Host build.vm\n  SendEnv WANTED\n");
    std::fs::write(&config, &named).unwrap();
    let ran = home.run(&["ssh-config", "--install"]);
    assert!(
        !ran.stderr.contains("warning"),
        "what is said for one machine is meant: {ran:?}"
    );
    let mut allowed = PINNED.map(str::to_owned).to_vec();
    allowed.extend(["forwardagent yes".to_owned(), "sendenv WANTED".to_owned()]);
    assert_eq!(sorted(in_force(&home, &["build.vm"])), sorted(allowed));
    assert_eq!(sorted(in_force(&home, &["other.vm"])), PINNED);
    // What stands before and behind the blocks wins for all machines, and that is said.
    std::fs::write(&config, format!("ControlMaster auto\n{text}SendEnv MORE\n")).unwrap();
    let ran = home.run(&["ssh-config", "--install"]);
    assert!(
        ran.status == Some(0) && ran.stderr.contains("warning") && ran.stderr.contains("ControlMaster, SendEnv MORE"),
        "{ran:?}"
    );
    assert_eq!(home.run(&["ssh-config", "--uninstall"]).status, Some(0));
    let left = std::fs::read_to_string(&config).unwrap();
    assert_eq!(left, format!("ControlMaster auto\n{TRUSTING}SendEnv MORE\n"));
}

#[test]
fn vm_ssh_takes_nothing_from_the_users_ssh() {
    let home = Home::new();
    if home.command(Path::new("ssh")).arg("-V").output().is_err() {
        return;
    }
    std::fs::create_dir(home.path(".ssh")).unwrap();
    std::fs::write(home.path(".ssh/config"), TRUSTING).unwrap();
    home.serve(&[("GET /v1/machines/build", 200, MACHINE)]);
    let ran = home.run(&["vm", "ssh", "build", "--", "-G"]);
    for part in [
        "forwardagent no",
        "forwardx11 no",
        "setenv LANG=C.UTF-8",
        "preferredauthentications publickey",
        "tunnel false",
    ] {
        assert!(ran.stdout.lines().any(|line| line == part), "{part}: {ran:?}");
    }
    for part in [
        "sendenv",
        "remoteforward",
        "dynamicforward",
        "remotecommand",
        "controlpath",
    ] {
        assert!(!ran.stdout.contains(part), "{part}: {ran:?}");
    }
    let ran = home.run(&["vm", "ssh", "build", "--", "-A", "-L", "8080:localhost:80", "-G"]);
    assert!(
        ran.stdout.contains("forwardagent yes") && ran.stdout.contains("localforward 8080"),
        "{ran:?}"
    );
}

/// A home with this configuration of ssh and our blocks in it; none where there is no ssh.
fn installed(text: &str) -> Option<Home> {
    let home = Home::new();
    home.command(Path::new("ssh")).arg("-V").output().ok()?;
    std::fs::create_dir(home.path(".ssh")).unwrap();
    std::fs::write(home.path(".ssh/config"), text).unwrap();
    assert_eq!(home.run(&["ssh-config", "--install"]).status, Some(0));
    Some(home)
}

/// What `ssh -G` shows of forwardings.
fn forwards(home: &Home, arguments: &[&str]) -> Vec<String> {
    let mut shown = in_force(home, arguments);
    shown.retain(|line| line.contains("eforward ") || line.contains("lforward ") || line.contains("cforward "));
    shown
}

const REMOTE: &str = "remoteforward 9000 [localhost]:22";

#[test]
fn forwardings_of_the_command_line_reach_machines() {
    let Some(home) = installed("Host *\n  LocalForward 9001 localhost:22\n  ForwardAgent yes\n") else {
        return;
    };
    let asked = [
        "-L",
        "8080:localhost:80",
        "-D",
        "1080",
        "-R",
        "7000:localhost:70",
        "web.vm",
    ];
    let all = [
        "localforward 8080 [localhost]:80",
        "localforward 9001 [localhost]:22",
        "dynamicforward 1080",
        "remoteforward 7000 [localhost]:70",
    ];
    let mut shown = forwards(&home, &asked);
    shown.sort();
    let mut all = all.map(str::to_owned).to_vec();
    all.sort();
    assert_eq!(shown, all);
    // As editors call it: options joined, the host in between, a command behind.
    let editor = [
        "-vTD",
        "1080",
        "web.vm",
        "-oRemoteForward=7000 localhost:70",
        "bash",
        "-R",
        "x",
    ];
    let shown = forwards(&home, &editor);
    assert!(
        shown.contains(&all[0]) && shown.contains(&"remoteforward 7000 [localhost]:70".to_owned()),
        "{shown:?}"
    );
}

#[test]
fn a_remote_forwarding_of_the_configuration_is_cleared_for_machines() {
    for remote in ["9000 localhost:22", "9000", "/tmp/a /tmp/b"] {
        let text = format!("Host *\n  LocalForward 9001 localhost:22\n  RemoteForward {remote}\n");
        let Some(home) = installed(&text) else { return };
        assert_eq!(
            forwards(&home, &["-D", "1080", "web.vm"]),
            Vec::<String>::new(),
            "{remote}"
        );
        assert_eq!(
            forwards(&home, &["work"]).len(),
            2,
            "other hosts keep what they had: {remote}"
        );
        // Named, in the file or on the command line.
        assert_eq!(
            forwards(&home, &["-o", "ClearAllForwardings=no", "web.vm"]).len(),
            2,
            "{remote}"
        );
        let config = home.path(".ssh/config");
        let text = std::fs::read_to_string(&config).unwrap();
        std::fs::write(&config, format!("Host web.vm\n  ClearAllForwardings no\n{text}")).unwrap();
        assert_eq!(forwards(&home, &["-D", "1080", "web.vm"]).len(), 3, "{remote}");
        assert_eq!(forwards(&home, &["other.vm"]).len(), 0, "{remote}");
    }
}

#[test]
fn the_configuration_is_evaluated_as_the_command_line_has_it() {
    let text = "Match user bob\n  RemoteForward 9000 localhost:22\nMatch exec \"test %p = 2222\"\n  \
        RemoteForward 9000 localhost:22\n";
    let Some(home) = installed(text) else { return };
    let local = ["localforward 8080 [localhost]:80"];
    for cleared in [
        &["bob@web.vm"][..],
        &["ssh://bob@web.vm:22"],
        &["-l", "bob", "web.vm"],
        &["web.vm", "-lbob"],
        &["-o", "User=bob", "--", "web.vm"],
        &["-p2222", "web.vm"],
    ] {
        let arguments = [&["-L", "8080:localhost:80"][..], cleared].concat();
        assert_eq!(forwards(&home, &arguments), Vec::<String>::new(), "{cleared:?}");
        let kept = [&["-o", "ClearAllForwardings=no"][..], &arguments].concat();
        assert_eq!(
            forwards(&home, &kept),
            [local[0], REMOTE].map(str::to_owned),
            "the test can tell: {cleared:?}"
        );
    }
    for kept in [&["web.vm"][..], &["alice@web.vm", "bob"]] {
        let arguments = [&["-L", "8080:localhost:80"][..], kept].concat();
        assert_eq!(forwards(&home, &arguments), local, "{kept:?}");
    }
}

#[test]
fn the_evaluation_ends_and_closes_where_it_fails() {
    let text = "Match exec \"echo x >> $HOME/evaluated; test ! -e $HOME/hang || test -z $BANGER_SSH_FORWARDS || sleep 60\"\n  \
        Port 22\n";
    let Some(home) = installed(text) else { return };
    let asked = ["-L", "8080:localhost:80", "web.vm"];
    let evaluated = || std::fs::read_to_string(home.path("evaluated")).map_or(0, |text| text.lines().count());
    let before = evaluated();
    assert_eq!(forwards(&home, &asked).len(), 1);
    assert_eq!(evaluated() - before, 2, "once by ssh and once for the question");
    // Hangs, and says so by its deadline.
    std::fs::write(home.path("hang"), "").unwrap();
    let begun = std::time::Instant::now();
    assert_eq!(forwards(&home, &asked).len(), 0);
    assert!(
        begun.elapsed() < std::time::Duration::from_secs(40),
        "{:?}",
        begun.elapsed()
    );
    std::fs::remove_file(home.path("hang")).unwrap();
    // The mark of the question in the environment opens nothing.
    let shown = home
        .command(Path::new("ssh"))
        .env("BANGER_SSH_FORWARDS", "1")
        .arg("-F")
        .arg(home.path(".ssh/config"))
        .arg("-G")
        .args(asked)
        .output()
        .unwrap();
    assert!(
        !String::from_utf8_lossy(&shown.stdout).contains("localforward"),
        "{shown:?}"
    );
    // Nor does a program that is gone.
    let ours = home.path(".config/banger/ssh_config");
    let text = std::fs::read_to_string(&ours).unwrap();
    std::fs::write(&ours, text.replace(PROGRAM, "/nowhere/banger")).unwrap();
    assert_eq!(forwards(&home, &asked).len(), 0);
}

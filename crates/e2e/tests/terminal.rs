//! Interactive shells on a terminal.

use rustix::process::Signal;

use crate::harness::{MACHINES, slim, tests};

tests! { MACHINES;
    a_shell,
    the_size_follows_the_window,
    control_keys_go_to_the_guest,
    the_terminal_comes_back_as_it_was,
    a_terminal_only_where_both_ends_are,
    shell_in_a_new_machine,
}

fn a_shell() {
    let (env, m) = slim();
    let mut shell = env.terminal(["vm", "shell", m]);
    shell.until_raw();
    shell.send("tty; echo $TERM; cat /etc/hostname; hostname\r");
    shell.expect("/dev/pts/");
    shell.expect("xterm");
    shell.expect(m);
    shell.send("exit 5\r");
    assert_eq!(shell.wait(), 5);
}

fn the_size_follows_the_window() {
    let (env, m) = slim();
    let mut shell = env.terminal(["vm", "shell", m]);
    shell.until_raw();
    shell.send("stty size; echo first\r");
    shell.expect("24 80");
    shell.resize(50, 132);
    // The new size is on its way while this is typed; the guest's kernel tells the program.
    shell.send("for i in 1 2 3 4 5 6 7 8 9; do stty size | grep 132 && break; sleep 0.2; done\r");
    shell.expect("50 132");
    shell.send("exit\r");
    assert_eq!(shell.wait(), 0);
}

fn control_keys_go_to_the_guest() {
    let (env, m) = slim();
    let mut terminal = env.terminal([
        "vm",
        "exec",
        "-t",
        m,
        "--",
        "sh",
        "-c",
        "trap 'echo caught; exit 9' INT; echo re''ady; while :; do :; done",
    ]);
    terminal.expect("ready");
    terminal.until_raw();
    terminal.send([3]);
    terminal.expect("caught");
    assert_eq!(terminal.wait(), 9);
    // End of file.
    let mut terminal = env.terminal(["vm", "exec", "-t", m, "--", "cat"]);
    terminal.until_raw();
    terminal.send("word\r");
    terminal.expect("word");
    terminal.send([4]);
    assert_eq!(terminal.wait(), 0);
}

fn the_terminal_comes_back_as_it_was() {
    let (env, m) = slim();
    let mut terminal = env.terminal(["vm", "exec", "-t", m, "--", "sh", "-c", "echo re''ady; exec sleep 60"]);
    terminal.expect("ready");
    terminal.until_raw();
    terminal.signal(Signal::TERM);
    let status = terminal.wait();
    assert!(status == 143 || status == 129, "status {status}");
    assert!(!terminal.is_raw(), "the terminal is left in raw mode");
}

fn a_terminal_only_where_both_ends_are() {
    let (env, m) = slim();
    // Not a terminal here: none there, streams apart.
    env.banger(["vm", "exec", m, "--", "sh", "-c", "test -t 0 || test -t 1 || echo none"])
        .run()
        .code(0)
        .prints("none\n");
    let mut terminal = env.terminal([
        "vm",
        "exec",
        m,
        "--",
        "sh",
        "-c",
        "test -t 0 && test -t 1 && echo bo''th",
    ]);
    terminal.expect("both");
    assert_eq!(terminal.wait(), 0);
    let done = env
        .banger(["vm", "shell", m])
        .stdin("echo from a pipe; exit 4\n")
        .run()
        .code(4);
    assert!(done.out().contains("from a pipe"), "{}", done.out());
}

fn shell_in_a_new_machine() {
    let env = crate::harness::shared();
    let repository = banger_testkit::Repository::typical(env.work().join("shell-repo"));
    let mut terminal = env.terminal(["vm", "run", "--name", "newshell", "./shell-repo"]);
    terminal.until_raw();
    terminal.send("pwd; cat README; exit 3\r");
    terminal.expect("/root/repo");
    terminal.expect("hello");
    assert_eq!(terminal.wait(), 3);
    assert_eq!(repository.status(), "");
    // Still there, and it says so.
    assert_eq!(env.machine_state("newshell"), "running");
    assert!(
        terminal.screen.text().contains("newshell"),
        "{}",
        terminal.screen.text()
    );
    env.ok("vm delete newshell");
}

//! Ports: those that lead to machines, and what listens in them.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use banger_testkit::env::CONFIG;
use banger_testkit::{TestEnv, processes};
use serde_json::Value;

use crate::harness::{MACHINES, noise, tests};

tests! { MACHINES;
    connections_reach_the_guest,
    they_come_and_go_with_the_machine,
    a_connection_wakes_the_machine,
    what_listens_is_shown,
    what_is_refused_leaves_nothing,
}

/// Servers in the guest: HTTP on 80, an echo that counts on 7 (loopback only), and on 9 one that speaks first and never listens.
const SERVERS: &str = r#"cat >/root/serve.pl <<'END'
use Socket;
$SIG{CHLD} = $SIG{PIPE} = "IGNORE";
sub serve {
    my ($ip, $port, $do) = @_;
    socket(my $l, PF_INET, SOCK_STREAM, 0) || die $!;
    setsockopt($l, SOL_SOCKET, SO_REUSEADDR, 1);
    bind($l, sockaddr_in($port, inet_aton($ip))) || die $!;
    listen($l, 128) || die $!;
    return if fork;
    while (accept(my $c, $l)) { next if fork; $do->($c); shutdown($c, 1); exit }
}
serve("0.0.0.0", 80, sub { my $c = shift; while (<$c>) { last if /^\r?$/ } syswrite $c, "HTTP/1.0 200 OK\r\n\r\nhello from 80\n" });
serve("127.0.0.1", 7, sub { my ($c, $b, $n) = shift; while (my $r = sysread $c, $b, 65536) { $n += $r; my $o = 0; $o += syswrite $c, $b, $r - $o, $o while $o < $r } syswrite $c, "end $n" });
serve("0.0.0.0", 9, sub { my $c = shift; syswrite $c, "SSH-2.0-x\r\n"; sleep 1000 });
END
perl /root/serve.pl >/dev/null 2>&1 </dev/null"#;

/// A machine `m` with these options whose servers run.
#[track_caller]
fn serving(test: &str, options: &[&str]) -> TestEnv {
    serving_in(TestEnv::new(test), options)
}

#[track_caller]
fn serving_in(env: TestEnv, options: &[&str]) -> TestEnv {
    let made = env
        .banger(["vm", "create", "--name", "m", "--image", "debian-slim"])
        .args(options)
        .deadline(180)
        .ok();
    if !options.is_empty() {
        made.says(&["ports: 127.0.0.1:"]);
    }
    env.sh("m", SERVERS).code(0);
    env
}

/// Where a port of machine `m` is reached.
#[track_caller]
fn reached(env: &TestEnv, guest: u16) -> SocketAddr {
    let shown = env.json("vm show m");
    let forwards = shown["forwards"].as_array().cloned().unwrap_or_default();
    let found = forwards.iter().find(|f| f["guest_port"] == guest);
    let found = found.unwrap_or_else(|| panic!("no port leads to {guest}: {shown}"));
    let text = format!("{}:{}", found["host_ip"].as_str().unwrap(), found["host_port"]);
    text.parse().unwrap()
}

fn connect(to: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect(to)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    stream.set_write_timeout(Some(Duration::from_secs(60)))?;
    Ok(stream)
}

/// What the guest's HTTP server says.
fn http(to: SocketAddr) -> std::io::Result<String> {
    let mut stream = connect(to)?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

#[track_caller]
fn serves(to: SocketAddr) {
    let text = http(to).unwrap_or_else(|e| panic!("{to}: {e}"));
    assert!(text.ends_with("hello from 80\n"), "{text:?}");
}

#[track_caller]
fn closed(to: SocketAddr) {
    let error = TcpStream::connect(to).expect_err("somebody listens");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
}

fn connections_reach_the_guest() {
    let env = serving("forward", &["-p", "80", "-p", "0:7", "-p", "127.0.0.1:0:1"]);
    serves(reached(&env, 80));

    // Each direction ends by itself, and what comes after the end of the other one arrives.
    let echo = reached(&env, 7);
    let data = noise(3_000_000);
    let stream = connect(echo).unwrap();
    let mut writing = stream.try_clone().unwrap();
    let sent = data.clone();
    let writer = std::thread::spawn(move || {
        writing.write_all(&sent).unwrap();
        writing.shutdown(Shutdown::Write).unwrap();
    });
    let mut back = Vec::new();
    (&stream).read_to_end(&mut back).unwrap();
    writer.join().unwrap();
    let tail = back.split_off(data.len());
    assert!(back == data, "what came back is not what was sent");
    assert_eq!(String::from_utf8_lossy(&tail), "end 3000000");

    // More than are relayed at once: the others wait their turn.
    let many: Vec<_> = (0..70)
        .map(|number: u32| {
            let mut stream = connect(echo).unwrap();
            stream.write_all(format!("{number} ").as_bytes()).unwrap();
            stream
        })
        .collect();
    for (number, mut stream) in many.into_iter().enumerate() {
        stream.shutdown(Shutdown::Write).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert!(text.starts_with(&format!("{number} end")), "{number}: {text:?}");
    }

    // Nothing listens in the guest: no orderly end.
    let began = Instant::now();
    let mut refused = connect(reached(&env, 1)).unwrap();
    let outcome = refused.read(&mut [0; 1]);
    assert!(
        outcome
            .as_ref()
            .is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset),
        "{outcome:?}"
    );
    assert!(began.elapsed() < Duration::from_secs(10));

    // A client that goes away takes its connection in the guest with it.
    let established = || {
        let counted = env.sh("m", "cat /proc/net/tcp | awk '$4 == \"01\"' | wc -l").code(0);
        counted.out().trim().parse::<u32>().unwrap()
    };
    let silent = connect(echo).unwrap();
    processes::until("the connection to be there", Duration::from_secs(20), || {
        established() > 0
    });
    drop(silent);
    processes::until("the connection to be gone", Duration::from_secs(20), || {
        established() == 0
    });
    env.close();
}

fn they_come_and_go_with_the_machine() {
    let env = serving("forward-life", &["-p", "80"]);
    let first = reached(&env, 80);
    serves(first);
    // A daemon that dies is no end.
    env.kill_daemon();
    assert!(env.ok("vm list").out().contains(&first.to_string()));
    assert_eq!(reached(&env, 80), first);
    serves(first);

    env.ok("vm stop m");
    closed(first);
    assert_eq!(reached(&env, 80), first, "a stopped machine keeps its ports");
    env.ok("vm start m");
    env.sh("m", SERVERS).code(0);
    serves(first);
    env.ok("vm restart m");
    env.sh("m", SERVERS).code(0);
    serves(first);

    // Changed while it runs: to another guest port on the same one of the host, to others, to none.
    env.ok(&format!("vm set m -p {}:9 -p 0:80", first.port()));
    let mut banner = [0; 9];
    connect(first).unwrap().read_exact(&mut banner).unwrap();
    assert_eq!(&banner, b"SSH-2.0-x");
    let second = reached(&env, 80);
    serves(second);
    env.ok(&format!("vm set m -p {}:80", first.port()));
    closed(second);
    serves(first);
    env.ok("vm set m --no-publish");
    closed(first);
    assert_eq!(env.json("vm show m")["forwards"], Value::Array(vec![]));

    env.ok(&format!("vm set m -p {}:80", first.port()));
    serves(first);
    env.ok("vm delete -f m");
    closed(first);
    env.close();
}

fn a_connection_wakes_the_machine() {
    let env = TestEnv::new("forward-wake");
    env.config(&format!("{CONFIG}\n[daemon]\nidle_exit = \"1s\"\n"));
    let env = serving_in(env, &["-p", "80"]);
    let port = reached(&env, 80);
    env.ok("vm suspend m");
    // Also when another daemon is there by then. It stays for whoever connects, though it has nothing else to do.
    env.kill_daemon();
    env.ok("vm list");
    assert!(env.machinery().is_empty());
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(env.machine_state("m"), "suspended");
    serves(port);
    assert_eq!(env.machine_state("m"), "running");
    // A copy has ports of its own, or none.
    env.ok("vm fork m --name n");
    assert_eq!(env.json("vm show n")["forwards"], Value::Array(vec![]));
    serves(port);
    env.ok("vm delete -f m n");
    closed(port);
    env.close();
}

fn what_listens_is_shown() {
    let env = serving("listening", &["-p", "80", "-p", "9"]);
    let listed = env.json("vm ports m");
    let listed = listed.as_array().unwrap();
    let of = |port: u16| {
        listed
            .iter()
            .find(|p| p["port"] == port)
            .unwrap_or_else(|| panic!("{port}: {listed:?}"))
    };
    let web = reached(&env, 80).to_string();
    assert_eq!(of(80)["endpoint"], web.as_str());
    assert_eq!(of(80)["url"], format!("http://{web}/"));
    assert_eq!(of(80)["process"], "perl");
    assert_eq!(
        (&of(7)["address"], &of(7)["endpoint"]),
        (&"127.0.0.1".into(), &Value::Null)
    );
    assert_eq!(of(9)["endpoint"], reached(&env, 9).to_string().as_str());
    assert_eq!(of(9)["url"], Value::Null, "it speaks, but not HTTP");
    let table = env.ok("vm ports").out();
    assert!(
        table
            .lines()
            .any(|l| l.starts_with("m ") && l.ends_with(&format!("http://{web}/"))),
        "{table}"
    );
    assert_eq!(env.ok("vm ports -q").out().lines().count(), 2);
    env.ok("vm stop m");
    env.run("vm ports m").fails().says(&["not running", "hint:"]);
    env.ok("vm ports --json").prints("[]\n");
    env.close();
}

fn what_is_refused_leaves_nothing() {
    let env = serving("forward-refused", &["-p", "80"]);
    let own = reached(&env, 80).port();
    let foreign = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = foreign.local_addr().unwrap().port();
    for (option, why) in [
        (format!("{taken}:80"), "another program listens there"),
        (format!("{own}:80"), "it leads to machine `m`"),
        ("192.0.2.1:8080:80".to_owned(), "does not have that address"),
    ] {
        env.run(&format!("vm create --name n -p {option}"))
            .fails()
            .says(&[&option[..option.len() - 3], why, "hint:"]);
        // All or none.
        env.run(&format!("vm set m -p 0:7 -p {option}").replace(&format!("{own}:80"), &format!("{taken}:80")))
            .fails();
    }
    for bad in ["x", "80:", "1:2:3:4", "0:0", "300.1.1.1:80:80", "65536"] {
        env.run(&format!("vm create --name n -p {bad}"))
            .fails()
            .says(&["127.0.0.1:8080"]);
    }
    env.run("vm set m -p 80 --no-publish").fails();
    env.run("vm create --name n -p 4000:1 -p 4000:2")
        .fails()
        .says(&["given twice"]);
    assert_eq!(env.machine_names(), ["m"]);
    // What was had is still there.
    serves(reached(&env, 80));
    // The port of a machine that is stopped may be taken by another; then its start says so.
    env.ok("vm stop m");
    let held = TcpListener::bind(("127.0.0.1", own)).unwrap();
    env.run("vm start m").fails().says(&[&own.to_string(), "hint:"]);
    assert_eq!(env.machine_state("m"), "stopped");
    drop(held);
    env.ok("vm start m");
    env.close();
}

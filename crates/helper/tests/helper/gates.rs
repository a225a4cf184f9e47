//! Who gets in, with what, and what is refused: a hostile owner's daemon gets nowhere.

use std::io::{ErrorKind, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::time::{Duration, Instant};

use banger_system::helper::{Answer, EngineUser, HelperCode, MAX_REQUEST, Request};

use crate::support::*;

crate::tests! {
    the_network_is_the_records_and_nothing_of_the_hosts,
    root_and_the_owner_are_let_in_by_number,
    the_socket_is_never_anybodys,
    it_serves_only_as_root_and_alone_for_a_record_of_roots,
    garbage_is_answered_and_costs_nothing,
    descriptors_are_counted,
    what_is_not_bangers_is_left_alone,
    numbers_have_their_bounds,
    a_tap_is_its_users_alone,
    who_goes_away_leaves_nothing_half,
}

fn root_and_the_owner_are_let_in_by_number() {
    in_namespace(|| {
        let helper = Helper::start();
        let socket = helper.root.socket();
        let metadata = std::fs::metadata(&socket).unwrap();
        assert_eq!((metadata.mode() & 0o7777, metadata.uid()), (0o600, OWNER));
        let parent = std::fs::metadata(socket.parent().unwrap()).unwrap();
        assert_eq!((parent.mode() & 0o7777, parent.uid()), (0o711, 0));
        assert!(matches!(helper.ok(Request::Ping), Answer::Pong { .. }));
        let pong = as_user(OWNER, || Client::to(&socket).call(Request::Ping));
        assert!(matches!(pong, Ok(Answer::Pong { .. })));
        let refused = as_user(OWNER + 1, || UnixStream::connect(&socket).unwrap_err().kind());
        assert_eq!(refused, ErrorKind::PermissionDenied);
        // Even where the file let everybody in.
        std::fs::set_permissions(&socket, PermissionsExt::from_mode(0o666)).unwrap();
        assert!(as_user(OWNER + 1, || Client::to(&socket).closed()));
        assert!(helper.root.log().contains("helper refused a caller"));
        helper.ok(Request::Ping);
    });
}

fn the_socket_is_never_anybodys() {
    in_namespace(|| {
        let mut root = Root::new();
        let socket = root.socket();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let watch = || {
                let mut seen = 0;
                while !done.load(std::sync::atomic::Ordering::SeqCst) {
                    if let Ok(metadata) = std::fs::symlink_metadata(&socket) {
                        assert_eq!((metadata.mode() & 0o7777, metadata.uid()), (0o600, OWNER));
                        seen += 1;
                    }
                    let refused = std::fs::symlink_metadata(socket.with_file_name(".new"));
                    assert!(refused.is_err() || refused.is_ok_and(|m| m.mode() & 0o077 == 0));
                }
                seen
            };
            let watcher = scope.spawn(watch);
            for _ in 0..20 {
                let helper = Helper::start_in(root);
                helper.ok(Request::Ping);
                root = helper.end(libc::SIGTERM).0;
            }
            done.store(true, std::sync::atomic::Ordering::SeqCst);
            assert!(watcher.join().unwrap() > 0);
        });
    });
}

fn it_serves_only_as_root_and_alone_for_a_record_of_roots() {
    in_namespace(|| {
        let fails = |root: &Root, text: &str| {
            let mut child = root.command().spawn().unwrap();
            assert!(!child.wait().unwrap().success());
            assert!(root.log().contains(text), "{text}: {}", root.log());
        };
        let root = Root::new();
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_banger-helper"));
        let log = std::fs::File::create(root.path("log")).unwrap();
        assert!(!command.uid(OWNER).stderr(log).status().unwrap().success());
        assert!(root.log().contains("root's part"), "{}", root.log());
        std::fs::set_permissions(root.record(), PermissionsExt::from_mode(0o666)).unwrap();
        fails(&root, "only root can write");
        std::fs::remove_file(root.record()).unwrap();
        fails(&root, "cannot open");
        let helper = Helper::start();
        fails(&helper.root, "another helper serves");
        helper.ok(Request::Ping);
        // A directory that others may write is none for the socket.
        let root = Root::new();
        let run = root.path("run/banger-root");
        std::fs::create_dir_all(&run).unwrap();
        std::fs::set_permissions(&run, PermissionsExt::from_mode(0o777)).unwrap();
        fails(&root, "only root can write");
    });
}

fn garbage_is_answered_and_costs_nothing() {
    in_namespace(|| {
        let helper = Helper::start();
        let descriptors = helper.descriptors();
        let bad = |bytes: &[u8]| helper.connect().raw(bytes, &[]).unwrap_err().code;
        for bytes in [
            &b"x"[..],
            b"{}",
            b"null",
            &[0xff; 1000],
            b"{\"version\":2,\"request\":{\"method\":\"sh\"}}",
        ] {
            assert_eq!(bad(bytes), HelperCode::BadRequest);
        }
        assert_eq!(
            bad(br#"{"version":7,"request":{"method":"ping"}}"#),
            HelperCode::BadVersion
        );
        assert_eq!(
            bad(br#"{"version":7,"request":{"method":"of later"}}"#),
            HelperCode::BadVersion
        );
        let bridge = br#"{"version":2,"request":{"method":"network_setup","params":{"net":{"bridge":"docker0","address":"172.16.0.1","prefix":24},"taps":[]}}}"#;
        assert_eq!(bad(bridge), HelperCode::BadRequest);
        // Too long, or without length: the connection ends with an answer.
        for head in [MAX_REQUEST + 1, u32::MAX, 0] {
            let mut client = helper.connect();
            client.0.write_all(&head.to_be_bytes()).unwrap();
            assert_eq!(client.reply().unwrap_err().code, HelperCode::BadRequest);
            assert!(client.closed());
        }
        // A connection goes on after a call that could be read but not carried out.
        let mut client = helper.connect();
        assert!(client.raw(b"{}", &[]).is_err());
        client.call(Request::Ping).unwrap();
        // Those who go away in the middle.
        for length in [1, 3, 4, 20] {
            let mut client = helper.connect();
            client
                .0
                .write_all(&[0, 0, 0, 90, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6][..length])
                .unwrap();
        }
        // Or answer never: more than there is room for, and yet there is room.
        let idle: Vec<Client> = (0..200).map(|_| helper.connect()).collect();
        helper.ok(Request::Ping);
        drop((idle, client));
        let deadline = Instant::now() + Duration::from_secs(10);
        while helper.descriptors() > descriptors + 2 {
            assert!(Instant::now() < deadline, "{} descriptors", helper.descriptors());
            std::thread::sleep(Duration::from_millis(10));
        }
        // Half a call has its time.
        let mut slow = helper.connect();
        slow.0.write_all(&[0, 0, 0, 9, b'{']).unwrap();
        let begun = Instant::now();
        assert_eq!(slow.reply().unwrap_err().code, HelperCode::BadRequest);
        assert!(begun.elapsed() < Duration::from_secs(20));
    });
}

fn descriptors_are_counted() {
    in_namespace(|| {
        let helper = Helper::start();
        let before = helper.descriptors();
        let file = std::fs::File::open("/dev/null").unwrap();
        let with = |call: &[u8], count: usize| helper.connect().raw(call, &vec![file.as_fd(); count]);
        let ping = br#"{"version":2,"request":{"method":"ping"}}"#;
        assert!(with(ping, 0).is_ok());
        for count in [1, 6, 7, 100, 253] {
            assert_eq!(with(ping, count).unwrap_err().code, HelperCode::BadRequest, "{count}");
        }
        let attach = br#"{"version":2,"request":{"method":"disk_attach","params":{"machine":"00112233aabbccdd","role":"root","bytes":512,"user":"owner"}}}"#;
        for count in [0, 1, 3] {
            assert_eq!(with(attach, count).unwrap_err().code, HelperCode::BadRequest, "{count}");
        }
        let launch = br#"{"version":2,"request":{"method":"engine_launch","params":{"machine":"00112233aabbccdd","slot":1,"vcpu":1,"memory_mib":64,"files":["kernel","kernel"],"disks":[]}}}"#;
        assert_eq!(with(launch, 3).unwrap_err().code, HelperCode::BadRequest);
        let deadline = Instant::now() + Duration::from_secs(10);
        while helper.descriptors() > before + 2 {
            assert!(Instant::now() < deadline, "{} descriptors", helper.descriptors());
            std::thread::sleep(Duration::from_millis(10));
        }
    });
}

fn what_is_not_bangers_is_left_alone() {
    in_namespace(|| {
        let helper = Helper::start();
        // A bridge of that name, but not ours.
        ip("link add br-fc type bridge");
        // Without what comes and goes with the carrier.
        let links = || {
            let line = |line: &str| {
                let (name, rest) = line.split_once('<').unwrap();
                let master = rest.split_once("master ").map_or("", |(_, rest)| rest);
                format!(
                    "{name} {} {}\n",
                    master.split(' ').next().unwrap(),
                    rest.split_once('\\').unwrap().1
                )
            };
            tool("ip", "-o link", "").lines().map(line).collect::<String>()
        };
        let before = links();
        for request in [
            setup(Vec::new()),
            Request::NetworkRemove,
            warm([1]),
            take(rules(1, true, &[])),
            Request::ResolverSet { port: 42069 },
        ] {
            helper.refused(request, HelperCode::Denied);
        }
        assert_eq!(links(), before);
        ip("link del br-fc");
        ip("tuntap add br-fc mode tap");
        helper.refused(setup(Vec::new()), HelperCode::Denied);
        ip("link del br-fc");
        helper.ok(setup(Vec::new()));
        // Taps of that name, but not ours; or ours, but another machine's.
        ip("tuntap add tap-fc-3 mode tap");
        ip("link add tap-fc-4 type bridge");
        ip("link set tap-fc-4 alias banger:pool");
        helper.ok(take(rules(5, true, &[])));
        let before = links();
        for slot in [3, 4] {
            helper.refused(take(rules(slot, true, &[])), HelperCode::Denied);
            helper.refused(change(rules(slot, true, &[])), HelperCode::Denied);
            helper.refused(release(slot), HelperCode::Denied);
        }
        helper.ok(warm([3, 4]));
        let mut other = take(rules(5, true, &[]));
        let Request::TapTake { machine, .. } = &mut other else {
            unreachable!()
        };
        *machine = crate::support::machine(99);
        helper.refused(other, HelperCode::Conflict);
        let machine = crate::support::machine(99);
        let drop = Request::TapDrop {
            machine: machine.clone(),
            slot: 5,
        };
        helper.refused(drop, HelperCode::Denied);
        let change = Request::TapChange {
            machine: machine.clone(),
            rules: rules(5, false, &[]),
        };
        helper.refused(change, HelperCode::NotFound);
        helper.ok(Request::MachineRemove { machine });
        helper.refused(Request::NetworkRemove, HelperCode::Conflict);
        assert_eq!(links(), before);
        helper.ok(release(5));
    });
}

fn the_network_is_the_records_and_nothing_of_the_hosts() {
    in_namespace(|| {
        ip("link add lan type bridge");
        ip("addr add 192.168.1.5/24 dev lan");
        ip("link set lan up");
        ip("route add 10.8.0.0/16 via 192.168.1.1");
        let mut root = Root::new();
        for (address, why) in [
            ("192.168.1.10/29", "192.168.1.0/24, an address or a route"),
            ("192.168.0.1/16", "192.168.1.0/24, an address or a route"),
            ("10.8.3.1/24", "10.8.0.0/16, an address or a route"),
            ("172.17.4.1/24", "172.17.0.0/16, which Docker takes"),
        ] {
            root.network("br-fc", address);
            let helper = Helper::start_in(root);
            let said = helper.refused(setup(Vec::new()), HelperCode::Conflict);
            assert!(said.contains(why), "{address}: {said}");
            assert_eq!(helper.inventory(), [], "nothing was made");
            root = helper.end(libc::SIGTERM).0;
        }
        root.network("br-fc", "172.16.0.1/24");
        let helper = Helper::start_in(root);
        helper.ok(setup(Vec::new()));
        helper.ok(take(rules(5, true, &[])));
        // The host joins a network that overlaps: what runs goes on, and is kept as it has to be.
        ip("addr add 172.16.0.200/16 dev lan");
        helper.ok(setup(vec![rules(5, true, &[])]));
        ip("addr del 172.16.0.200/16 dev lan");
        // Another record, while a machine is on the network of the old one.
        let mut root = helper.end(libc::SIGTERM).0;
        for bridge in ["br-fc", "br-fc-new"] {
            root.network(bridge, "10.9.0.1/24");
            let helper = Helper::start_in(root);
            let said = helper.refused(setup(Vec::new()), HelperCode::Conflict);
            assert!(said.contains("tap-fc-5"), "{said}");
            root = helper.end(libc::SIGTERM).0;
        }
        let helper = Helper::start_in(root);
        helper.ok(Request::MachineRemove { machine: machine(5) });
        helper.ok(setup(Vec::new()));
        let links = tool("ip", "-o -4 addr", "");
        assert!(
            links.contains("br-fc-new    inet 10.9.0.1/24") && !links.contains("172.16"),
            "{links}"
        );
    });
}

fn numbers_have_their_bounds() {
    in_namespace(|| {
        let helper = Helper::start();
        helper.ok(setup(Vec::new()));
        let bad = |request| helper.refused(request, HelperCode::BadRequest);
        bad(take(rules(253, true, &[])));
        bad(take(rules(u32::MAX, true, &[])));
        bad(take(rules(1, true, &[1])));
        bad(take(rules(1, true, &[253])));
        bad(take(rules(
            1,
            true,
            &(2..1200).map(|n| n % 200 + 2).collect::<Vec<_>>(),
        )));
        bad(warm([253]));
        bad(warm((0..2000).map(|n| n % 100)));
        bad(setup(vec![rules(300, true, &[])]));
        bad(Request::ResolverSet { port: 0 });
        let mut jail = take(rules(1, true, &[]));
        let Request::TapTake { user, .. } = &mut jail else {
            unreachable!()
        };
        *user = EngineUser::Jail(2);
        bad(jail);
        assert_eq!(helper.inventory().len(), 3, "bridge and tables");
    });
}

fn a_tap_is_its_users_alone() {
    in_namespace(|| {
        let helper = Helper::start();
        helper.ok(setup(Vec::new()));
        helper.ok(warm([0, 1]));
        // `/dev/net/tun` itself may be closed to others here: then it is not the tap that refuses.
        let open = |uid, name: &'static str| as_user(uid, move || open_tap(name).map(drop).map_err(|e| e.kind()));
        helper.ok(take(rules(0, true, &[])));
        if open(OWNER, "tap-fc-0") != Err(ErrorKind::PermissionDenied) {
            assert_eq!(open(OWNER, "tap-fc-0"), Ok(()));
            assert!(open(OWNER + 1, "tap-fc-0").is_err());
        }
        assert!(open(OWNER, "tap-fc-1").is_err(), "an idle tap is nobody's");
        let owner = |name: &str| tool("ip", &format!("-d -o link show {name}"), "");
        assert!(
            owner("tap-fc-0").contains(&format!("user {OWNER}")),
            "{}",
            owner("tap-fc-0")
        );
        // Taken again, it is the same; by an engine in a jail, the jail's.
        let mut again = take(rules(0, true, &[]));
        let Request::TapTake { user, .. } = &mut again else {
            unreachable!()
        };
        *user = EngineUser::Jail(0);
        assert!(matches!(helper.ok(again), Answer::Tap { pooled: false, .. }));
        let jail = banger_system::net::jail_uid(0);
        assert!(
            owner("tap-fc-0").contains(&format!("user {jail}")),
            "{}",
            owner("tap-fc-0")
        );
    });
}

fn who_goes_away_leaves_nothing_half() {
    in_namespace(|| {
        let helper = Helper::start();
        helper.ok(setup(Vec::new()));
        for slot in 0..20 {
            let call = banger_system::helper::Call {
                version: 1,
                op: None,
                request: take(rules(slot, true, &[])),
            };
            let bytes = serde_json::to_vec(&call).unwrap();
            let mut client = helper.connect();
            let length = u32::try_from(bytes.len()).unwrap().to_be_bytes();
            client.0.write_all(&[&length[..], &bytes].concat()).unwrap();
        }
        // An end lets what was begun come to its end; what had not begun is not there at all.
        let (root, status) = helper.end(libc::SIGTERM);
        assert!(status.success(), "{status}: {}", root.log());
        let helper = Helper::start_in(root);
        let objects = helper.inventory();
        for slot in 0..20 {
            let tap = banger_system::net::tap(slot);
            let count = objects
                .iter()
                .filter(|o| o.name.split(' ').any(|word| word == tap))
                .count();
            assert!(count == 0 || count == 3, "{tap}: {objects:?}");
        }
        assert!(helper.root.log().contains("\"msg\":\"helper call\""));
    });
}

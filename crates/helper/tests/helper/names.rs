//! The port of the name server: the daemon's for as long as it lives, and nobody else's when it has gone.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use banger_system::helper::{Answer, HelperCode, HelperError, Request};
use banger_system::net::DNS_PORT;

use crate::support::*;

crate::tests! {
    nobody_answers_in_the_place_of_a_daemon_that_has_gone,
}

fn sockets(helper: &Helper) -> Result<(UdpSocket, TcpListener), HelperError> {
    let (answer, fds) = helper.connect().call_for(Request::NameSockets)?;
    assert_eq!(answer, Answer::NameSockets);
    let [datagrams, connections]: [OwnedFd; 2] = fds.try_into().unwrap();
    Ok((datagrams.into(), connections.into()))
}

/// The same when nobody has them any more: what another test starts just now may hold copies for a moment.
fn free_sockets(helper: &Helper) -> (UdpSocket, TcpListener) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match sockets(helper) {
            Ok(sockets) => return sockets,
            Err(e) => assert!(e.code == HelperCode::Conflict && Instant::now() < deadline, "{e}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What a user of the host gets who wants the port, of this address or of all.
fn takes(uid: u32) -> Vec<Result<(), ErrorKind>> {
    as_user(uid, || {
        let mut all = Vec::new();
        for address in [Ipv4Addr::LOCALHOST, Ipv4Addr::UNSPECIFIED] {
            all.push(UdpSocket::bind((address, DNS_PORT)).map(drop).map_err(|e| e.kind()));
            all.push(TcpListener::bind((address, DNS_PORT)).map(drop).map_err(|e| e.kind()));
        }
        all
    })
}

fn nobody_answers_in_the_place_of_a_daemon_that_has_gone() {
    in_namespace(|| {
        let helper = Helper::start();
        let refused = vec![Err(ErrorKind::PermissionDenied); 4];
        for round in 0..3 {
            let (datagrams, connections) = free_sockets(&helper);
            let own = (Ipv4Addr::LOCALHOST, DNS_PORT).into();
            assert_eq!(
                (datagrams.local_addr().unwrap(), connections.local_addr().unwrap()),
                (own, own)
            );
            // Open to whoever asks, and only once.
            let asker = UdpSocket::bind("127.0.0.1:0").unwrap();
            asker.send_to(b"question", own).unwrap();
            let mut buffer = [0; 64];
            assert_eq!(datagrams.recv_from(&mut buffer).unwrap().0, 8);
            let stream = TcpStream::connect(own).unwrap();
            drop(connections.accept().unwrap());
            drop(stream);
            assert_eq!(sockets(&helper).unwrap_err().code, HelperCode::Conflict);
            // The owner is a user like others.
            for uid in [OWNER, OWNER + 1] {
                assert_eq!(takes(uid), refused, "while it is served, round {round}");
            }
            drop((datagrams, connections));
            for uid in [OWNER, OWNER + 1] {
                assert_eq!(takes(uid), refused, "when the daemon has gone, round {round}");
            }
        }
        // The helper holds nothing: another one goes on, and the daemon's sockets outlive it.
        let held = free_sockets(&helper);
        let (root, _) = helper.end(libc::SIGKILL);
        assert_eq!(takes(OWNER + 1), refused);
        let helper = Helper::start_in(root);
        assert_eq!(sockets(&helper).unwrap_err().code, HelperCode::Conflict);
        drop(held);
        free_sockets(&helper);
    });
}

//! A few words with the root helper, over its socket: one call a connection, synchronous.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use banger_system::helper::{Answer, Call, MAX_REPLY, Reply, Request, VERSION};

use crate::error::reason;

/// How long the helper may take for one call.
const DEADLINE: Duration = Duration::from_secs(60);

/// Asks the helper behind this socket, which has to be the user `server`. Errors are words.
pub(crate) fn ask(socket: &Path, server: u32, request: Request) -> Result<Answer, String> {
    let method = request.name();
    let failed = |e: std::io::Error| format!("{}: {}", socket.display(), reason(&e));
    let mut stream = UnixStream::connect(socket).map_err(failed)?;
    let peer = rustix::net::sockopt::socket_peercred(&stream).map_err(|e| failed(e.into()))?;
    if peer.uid.as_raw() != server {
        return Err(format!("{} is served by user {}", socket.display(), peer.uid.as_raw()));
    }
    stream
        .set_read_timeout(Some(DEADLINE))
        .and_then(|()| stream.set_write_timeout(Some(DEADLINE)))
        .map_err(failed)?;
    let call = Call {
        version: VERSION,
        op: None,
        request,
    };
    let body = serde_json::to_vec(&call).map_err(|e| e.to_string())?;
    let length = u32::try_from(body.len()).map_err(|e| e.to_string())?;
    let frame = [&length.to_be_bytes(), body.as_slice()].concat();
    stream.write_all(&frame).map_err(failed)?;
    let mut length = [0; 4];
    stream.read_exact(&mut length).map_err(failed)?;
    let length = u32::from_be_bytes(length);
    if length > MAX_REPLY {
        return Err(format!("its answer to {method} is {length} bytes long"));
    }
    let mut body = vec![0; length as usize];
    stream.read_exact(&mut body).map_err(failed)?;
    match serde_json::from_slice(&body) {
        Ok(Reply::Ok(answer)) => Ok(answer),
        Ok(Reply::Error(error)) => Err(std::iter::once(error.message)
            .chain(error.details)
            .collect::<Vec<_>>()
            .join("; ")),
        Err(error) => Err(format!("its answer to {method} was not understood: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// What is answered by a helper that says this.
    fn said(reply: Vec<u8>) -> Result<Answer, String> {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut length = [0; 4];
            stream.read_exact(&mut length).unwrap();
            let mut body = vec![0; u32::from_be_bytes(length) as usize];
            stream.read_exact(&mut body).unwrap();
            let call: Call = serde_json::from_slice(&body).unwrap();
            assert_eq!((call.version, call.request), (VERSION, Request::Ping));
            stream.write_all(&reply).unwrap();
        });
        let answer = ask(&socket, rustix::process::getuid().as_raw(), Request::Ping);
        server.join().unwrap();
        answer
    }

    fn framed(text: &str) -> Vec<u8> {
        [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat()
    }

    #[test]
    fn answers_and_refusals() {
        let pong = Reply::Ok(Answer::Pong {
            version: "1".into(),
            pid: 7,
        });
        let answer = said(framed(&serde_json::to_string(&pong).unwrap())).unwrap();
        assert_eq!(
            answer,
            Answer::Pong {
                version: "1".into(),
                pid: 7
            }
        );
        let refusal = r#"{"error":{"code":"failed","message":"not all","details":["tap","rule"]}}"#;
        assert_eq!(said(framed(refusal)).unwrap_err(), "not all; tap; rule");
        assert!(said(framed("{}")).unwrap_err().contains("not understood"));
        assert!(
            said(u32::MAX.to_be_bytes().to_vec())
                .unwrap_err()
                .contains("bytes long")
        );
        assert!(said(Vec::new()).is_err());
    }

    #[test]
    fn somebody_elses_socket_is_not_talked_to() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let _listener = UnixListener::bind(&socket).unwrap();
        let other = rustix::process::getuid().as_raw() + 1;
        assert!(
            ask(&socket, other, Request::Ping)
                .unwrap_err()
                .contains("served by user")
        );
        assert!(ask(&dir.path().join("none"), other, Request::Ping).is_err());
    }
}

//! From bytes to a call. Pure: the fuzz target has this file too.

use banger_system::helper::{Call, HelperCode, HelperError, MAX_REQUEST};

/// Length of a frame from its first four bytes, if it may be that long.
pub(crate) fn length(head: [u8; 4]) -> Result<usize, HelperError> {
    let length = u32::from_be_bytes(head);
    if length == 0 || length > MAX_REQUEST {
        return Err(bad(format!(
            "a call of {length} bytes; 1 to {MAX_REQUEST} are possible"
        )));
    }
    Ok(length as usize)
}

/// Reads a call. What is wrong with it is told without repeating what it said.
pub(crate) fn parse(bytes: &[u8]) -> Result<Call, HelperError> {
    let version = |bytes| serde_json::from_slice::<Version>(bytes).ok().map(|v| v.version);
    let call: Call = match serde_json::from_slice(bytes) {
        Ok(call) => call,
        // A call of another version need not be readable, but its version is what is to be told.
        Err(_) if version(bytes).is_some_and(|v| v != banger_system::helper::VERSION) => {
            let text = format!("the helper speaks version {}", banger_system::helper::VERSION);
            return Err(error(HelperCode::BadVersion, text));
        }
        Err(e) => {
            let text = e.to_string();
            let short: String = text.chars().filter(|c| !c.is_control()).take(200).collect();
            return Err(bad(format!("the call cannot be read: {short}")));
        }
    };
    if call.op.as_deref().is_some_and(|op| !is_op(op)) {
        return Err(bad("an operation is `op-` and eight hexadecimal digits".to_owned()));
    }
    Ok(call)
}

/// All that is read of a call of another version.
#[derive(serde::Deserialize)]
struct Version {
    version: u32,
}

/// `op-` and eight hexadecimal digits.
fn is_op(op: &str) -> bool {
    op.strip_prefix("op-")
        .is_some_and(|digits| digits.len() == 8 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
}

fn bad(message: String) -> HelperError {
    error(HelperCode::BadRequest, message)
}

fn error(code: HelperCode, message: String) -> HelperError {
    HelperError {
        code,
        message,
        details: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A call of every method that has parameters of another kind.
    const CALLS: [&str; 7] = [
        r#"{"version":2,"request":{"method":"ping"}}"#,
        r#"{"version":2,"op":"op-00112233","request":{"method":"tap_take","params":{"machine":"00112233aabbccdd","user":"owner","rules":{"slot":1,"nat":true,"peers":[2,3]}}}}"#,
        r#"{"version":2,"request":{"method":"tap_drop","params":{"machine":"00112233aabbccdd","slot":7}}}"#,
        r#"{"version":2,"request":{"method":"disk_attach","params":{"machine":"00112233aabbccdd","role":"root","bytes":1048576,"user":{"jail":3}}}}"#,
        r#"{"version":2,"request":{"method":"engine_launch","params":{"machine":"00112233aabbccdd","slot":1,"vcpu":2,"memory_mib":512,"files":["kernel","initrd"],"disks":["root","work"]}}}"#,
        r#"{"version":2,"request":{"method":"engine_signal","params":{"machine":"00112233aabbccdd","signal":"KILL"}}}"#,
        r#"{"version":2,"request":{"method":"network_setup","params":{"taps":[{"slot":0,"nat":true}]}}}"#,
    ];

    #[test]
    fn valid_calls_are_read() {
        for text in CALLS {
            parse(text.as_bytes()).unwrap();
        }
    }

    #[test]
    fn what_is_no_call_is_refused_by_kind() {
        let code = |text: &str| parse(text.as_bytes()).unwrap_err().code;
        for bad in [
            "",
            "{",
            "null",
            "[]",
            "{}",
            r#"{"version":2}"#,
            r#"{"version":2,"request":{"method":"run"}}"#,
            r#"{"version":2,"op":"op-1; rm -rf /","request":{"method":"ping"}}"#,
            r#"{"version":2,"request":{"method":"ping"},"extra":1}"#,
            r#"{"version":2,"request":{"method":"ping"}} {}"#,
            // The network is not the caller's to choose.
            r#"{"version":2,"request":{"method":"network_setup","params":{"net":{"bridge":"br-fc","address":"172.16.0.1","prefix":24},"taps":[]}}}"#,
            r#"{"version":2,"request":{"method":"tap_drop","params":{"net":{"bridge":"br-fc","address":"172.16.0.1","prefix":24},"machine":"00112233aabbccdd","slot":7}}}"#,
            r#"{"version":2,"request":{"method":"tap_drop","params":{"machine":"../../../../etc","slot":7}}}"#,
            r#"{"version":2,"request":{"method":"tap_drop","params":{"machine":"00112233aabbccdd","slot":-1}}}"#,
        ] {
            assert_eq!(code(bad), HelperCode::BadRequest, "{bad}");
        }
        assert_eq!(
            code(r#"{"version":3,"request":{"method":"newer","x":1}}"#),
            HelperCode::BadVersion
        );
        assert!(length([0, 0, 0, 0]).is_err() && length([0xff; 4]).is_err());
        assert_eq!(length([0, 1, 0, 0]).unwrap(), 65_536);
    }

    #[test]
    fn deep_nesting_ends_in_an_error() {
        let deep = format!(r#"{{"version":2,"request":{}"#, "[".repeat(60_000));
        assert_eq!(parse(deep.as_bytes()).unwrap_err().code, HelperCode::BadRequest);
    }

    proptest! {
        #[test]
        fn any_bytes_give_an_answer(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn a_changed_call_is_read_as_one_or_refused(which in 0..CALLS.len(), changes in proptest::collection::vec((any::<u16>(), any::<u8>()), 1..8), cut in any::<u16>()) {
            let mut bytes = CALLS[which].as_bytes().to_vec();
            for (at, byte) in changes {
                let at = at as usize % bytes.len();
                bytes[at] = byte;
            }
            bytes.truncate(1 + cut as usize % bytes.len());
            // What is read is of the closed list and survives its own wire form.
            if let Ok(call) = parse(&bytes) {
                let text = serde_json::to_vec(&call).unwrap();
                prop_assert_eq!(parse(&text).unwrap(), call);
            }
        }
    }
}

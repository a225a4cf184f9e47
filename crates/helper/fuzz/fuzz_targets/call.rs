//! Whatever the daemon sends is read as a call of the closed list or refused. What is read survives its own wire form.
#![no_main]

#[path = "../../src/call.rs"]
mod call;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Some((head, rest)) = bytes.split_first_chunk::<4>() {
        if let Ok(length) = call::length(*head) {
            assert!(length > 0 && length <= banger_system::helper::MAX_REQUEST as usize);
        }
        let _ = call::parse(rest);
    }
    if let Ok(read) = call::parse(bytes) {
        let text = serde_json::to_vec(&read).expect("a call can be written");
        assert_eq!(call::parse(&text).expect("and read again"), read);
    }
});

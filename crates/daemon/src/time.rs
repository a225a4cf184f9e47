//! Points in time as the API writes them.

use banger_proto::api::Timestamp;

/// Now, to the millisecond.
pub fn now() -> Timestamp {
    format!("{:.3}", jiff::Timestamp::now())
}

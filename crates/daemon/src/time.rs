//! Points in time as the API writes them.

use banger_proto::api::Timestamp;

/// Now, to the millisecond.
pub fn now() -> Timestamp {
    text(jiff::Timestamp::now())
}

/// A point in time, to the millisecond.
pub fn text(at: jiff::Timestamp) -> Timestamp {
    format!("{at:.3}")
}

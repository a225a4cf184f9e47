//! The guest's wall clock, kept right by the host: a guest need not reach a time server, or have a program that asks one.

use banger_proto::agent::Clock;
use banger_proto::error::{ApiError, ErrorCode};
use rustix::time::ClockId;

use crate::sys;

/// Up to this difference, in nanoseconds, the kernel runs the clock faster or slower until it is gone, by half a millisecond in a
/// second. Above, the clock is set.
const SLEW: u64 = 100_000_000;

/// What the clock says.
pub(crate) fn read() -> Clock {
    let now = rustix::time::clock_gettime(ClockId::Realtime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    Clock {
        time_ns: seconds
            .saturating_mul(1_000_000_000)
            .saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0)),
        synchronised: sys::clock_is_synchronised(),
    }
}

/// Changes it by so many nanoseconds, unless the guest keeps it right by itself.
pub(crate) fn adjust(by_ns: i64) -> Result<Clock, ApiError> {
    let now = read();
    if now.synchronised {
        return Ok(now);
    }
    let changed = if by_ns.unsigned_abs() <= SLEW {
        sys::slew_clock(by_ns / 1000)
    } else {
        sys::step_clock(by_ns)
    };
    changed.map_err(|e| ApiError::new(ErrorCode::Guest, format!("can't correct the clock: {e}")))?;
    Ok(read())
}

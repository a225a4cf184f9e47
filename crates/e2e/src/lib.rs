//! Tests of banger on real machines, through the real programs. Everything is in `tests/`.

//! Whether a process is the one that was meant.

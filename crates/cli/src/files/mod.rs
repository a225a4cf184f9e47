//! Copying files both ways.

#![doc = "placeholder"]
fn main() {}

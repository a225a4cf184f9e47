//! Links the helper without symbols: it is root's, and small. Where it fails, its log says what failed, not where.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-link-arg-bins=-Wl,--strip-all");
}

//! User mode with hardware virtualisation, which development machines lack.

use std::path::Path;

use crate::harness::scenarios;
use crate::lab;

scenarios! {
    a_machine_starts_on_kvm: 240,
}

fn a_machine_starts_on_kvm() {
    lab::seed_store(Path::new("/home/dev/.local/state/banger"));
    lab::root(["chown", "dev:", "/home/dev/.local", "/home/dev/.local/state"]).ok();
    let doctor = lab::banger("doctor").run();
    assert!(doctor.out().contains("kvm: the processor has svm"), "{}", doctor.out());
    let done = lab::banger("vm run --rm --cold --image debian-slim -- uname -s").ok();
    assert_eq!(done.out(), "Linux\n");
    eprintln!("cold start on KVM: {:.1} s", done.took.as_secs_f32());
    lab::banger("daemon stop").ok();
    lab::root(["rm", "-rf", "/home/dev/.local"]).ok();
}

//! A full disk of the host, to its last block: what is to end ends.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use banger_testkit::processes;

use crate::harness::scenarios;
use crate::installed::Installed;
use crate::lab;

scenarios! {
    machines_end_on_a_full_disk: 900,
}

/// Takes what is left, what is kept for root too.
fn fill() {
    lab::sh(
        "dir=/var/lib/banger
         fallocate -l $(df --output=avail -B1 $dir | tail -1) $dir/filler.$$ || true
         cat /dev/zero >>$dir/filler.$$ 2>/dev/null || true
         sync -f $dir",
    )
    .code(0);
}

fn machines_end_on_a_full_disk() {
    let installed = Installed::new();
    for name in ["m", "n"] {
        lab::banger(&format!("vm create --name {name} --image debian-slim"))
            .deadline(240)
            .ok();
    }
    fill();
    lab::banger("vm stop m").ok();
    assert_eq!(lab::json("vm show m")["state"], "stopped");
    fill();
    lab::root(["systemctl", "restart", "bangerd.service"]).deadline(60).ok();
    assert_eq!(lab::json("vm show m")["state"], "stopped");
    fill();
    lab::banger("vm create --name o --no-start").run().code(8);
    lab::banger("vm delete -f m").ok();
    fill();
    lab::banger("vm delete -f n").ok();
    assert_eq!(lab::banger("vm list --quiet").ok().out(), "");
    lab::sh("rm /var/lib/banger/filler.*").code(0);
    // Space is held again, without a restart.
    let reserve = Path::new(lab::STATE).join("banger.reserve");
    processes::until("space to be held again", Duration::from_secs(20), || {
        std::fs::metadata(&reserve).is_ok_and(|m| m.blocks() * 512 >= 1 << 20)
    });
    installed.close();
}

//! What the lab promises to all other scenarios.

use crate::harness::scenarios;
use crate::lab;

scenarios! {
    lab_has_what_it_promises: 120,
}

fn lab_has_what_it_promises() {
    assert_eq!(std::fs::read_to_string("/proc/1/comm").unwrap().trim(), "systemd");
    let state = lab::root(["systemctl", "is-system-running", "--wait"]).run();
    assert_eq!(
        state.out().trim(),
        "running",
        "{}",
        lab::sh("systemctl --failed --no-pager").out()
    );

    // Hardware virtualisation that its user may use.
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    assert!(cpuinfo.lines().any(|l| l.starts_with("flags") && l.contains(" svm")));
    lab::sh("modprobe kvm_amd").code(0);
    lab::dev(["sh", "-c", "exec 3<>/dev/kvm"]).ok();
    lab::user(lab::STRANGER, ["sh", "-c", "exec 3<>/dev/kvm"]).run().fails();

    // Storage.
    lab::sh("modprobe dm_snapshot && dmsetup targets | grep -q '^snapshot '").code(0);
    lab::sh(
        "cd /tmp && truncate -s 16M base cow && base=$(losetup --find --show --read-only base) && cow=$(losetup --find --show cow)
         dmsetup create lab-promise --table \"0 32768 snapshot $base $cow N 8\"
         echo hello >/dev/mapper/lab-promise
         test \"$(head -c 5 /dev/mapper/lab-promise)\" = hello
         dmsetup remove lab-promise && losetup --detach $base $cow && rm base cow",
    )
    .code(0);

    // Network: bridge, tap, nftables in a namespace of its own, names.
    lab::sh(
        "ip link add br-promise type bridge && ip tuntap add tap-promise mode tap user dev
         ip link set tap-promise master br-promise && ip link delete tap-promise && ip link delete br-promise",
    )
    .code(0);
    lab::sh("nft add table ip promise && nft list table ip promise && nft delete table ip promise").code(0);
    lab::sh("resolvectl status >/dev/null && resolvectl query --legend=no localhost").code(0);
    lab::sh("ip route get 10.0.2.2").code(0);
}

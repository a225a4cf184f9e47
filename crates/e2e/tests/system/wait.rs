//! Commands that come while the services are being started again.

use crate::harness::scenarios;
use crate::installed::Installed;
use crate::lab;

scenarios! {
    commands_wait_for_both_services: 600,
}

/// After both were killed the daemon's unit waits for the helper's, `inactive` with a job: that is coming, too.
fn commands_wait_for_both_services() {
    let installed = Installed::new();
    for round in 0..8 {
        // systemd gives up on what is started too often.
        lab::root(["systemctl", "reset-failed", "bangerd.service", "bangerd-root.service"]).ok();
        let (helper, daemon) = (lab::main_pid("bangerd-root.service"), lab::main_pid("bangerd.service"));
        lab::root(["kill", "-KILL", &helper.to_string(), &daemon.to_string()]).ok();
        for command in ["vm list", "vm stats", "image list"] {
            let done = lab::banger(command).run();
            assert_eq!(done.status, 0, "round {round}: {command}: {done:?}");
        }
        lab::wait_unit("bangerd-root.service", "active");
        assert_ne!(lab::main_pid("bangerd.service"), daemon);
    }
    installed.close();
}

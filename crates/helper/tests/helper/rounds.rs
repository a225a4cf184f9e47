//! What stays behind after many machines, and how long it takes.

use std::time::{Duration, Instant};

use banger_system::helper::{Answer, Request};

use crate::support::*;

crate::tests! {
    two_hundred_machines_leave_nothing,
    a_tap_is_taken_while_others_come_and_go;
    ignored: figures
}

fn middle(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn two_hundred_machines_leave_nothing() {
    in_namespace(|| {
        let helper = Helper::start();
        helper.ok(setup(Vec::new()));
        let mut client = helper.connect();
        let mut round = |n: u32| {
            let slot = n % 7;
            let rules = rules(
                slot,
                !n.is_multiple_of(3),
                if n.is_multiple_of(5) { &[100, 101] } else { &[] },
            );
            client.call(take(rules)).unwrap();
            let machine = machine(slot.into());
            match n % 2 {
                0 => client.call(release(slot)).unwrap(),
                _ => client.call(Request::MachineRemove { machine }).unwrap(),
            };
        };
        (0..8).for_each(&mut round);
        let (objects, descriptors) = (helper.inventory(), helper.descriptors());
        assert_eq!(objects.iter().filter(|o| o.name.contains("tap-fc")).count(), 0);
        (0..200).for_each(&mut round);
        assert_eq!(helper.inventory(), objects);
        assert!(helper.descriptors().abs_diff(descriptors) <= 2);
        helper.ok(Request::NetworkRemove);
        assert_eq!(helper.inventory(), []);
    });
}

/// Prints figures, and wants the machine for itself: `cargo test --release -p banger-helper --test helper figures -- --ignored --nocapture`.
fn figures() {
    in_namespace(|| {
        let helper = Helper::start();
        helper.ok(setup(Vec::new()));
        let mut client = helper.connect();
        let mut timed = |request: Request| {
            let begun = Instant::now();
            let answer = client.call(request).unwrap();
            (begun.elapsed(), answer)
        };
        let mut pings: Vec<Duration> = (0..2000).map(|_| timed(Request::Ping).0).collect();
        pings.sort();
        let (mut pooled, mut owned, mut fresh, mut dropped) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut warmed = Vec::new();
        for _ in 0..10 {
            warmed.push(timed(warm(0..4)).0 / 4);
            for slot in 0..4 {
                let mut request = take(rules(slot, true, &[]));
                let Request::TapTake { user, .. } = &mut request else {
                    unreachable!()
                };
                let times = if slot % 2 == 0 {
                    *user = banger_system::helper::EngineUser::Jail(slot);
                    &mut pooled
                } else {
                    &mut owned
                };
                let (time, answer) = timed(request);
                assert!(matches!(answer, Answer::Tap { pooled: true, .. }), "{answer:?}");
                times.push(time);
                dropped.push(timed(release(slot)).0);
            }
            fresh.push(timed(take(rules(9, true, &[]))).0);
            dropped.push(timed(release(9)).0);
        }
        let status = std::fs::read_to_string(format!("/proc/{}/status", helper.pid())).unwrap();
        let resident = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
        println!(
            "ping p50 {:?}, p99 {:?}",
            pings[pings.len() / 2],
            pings[pings.len() * 99 / 100]
        );
        println!(
            "tap from the pool: for a jail {:?}, for the owner {:?}",
            middle(pooled),
            middle(owned)
        );
        println!(
            "tap not from the pool {:?}; dropped {:?}; warmed {:?} each",
            middle(fresh),
            middle(dropped),
            middle(warmed)
        );
        println!("{resident}");
    });
}

fn a_tap_is_taken_while_others_come_and_go() {
    in_namespace(|| {
        let helper = Helper::start();
        helper.ok(setup(Vec::new()));
        std::thread::scope(|scope| {
            for worker in 0..6u32 {
                let helper = &helper;
                scope.spawn(move || {
                    let mut client = helper.connect();
                    for n in 0..12 {
                        let slot = worker * 20 + n % 3;
                        let peer = (worker + 1) % 6 * 20;
                        if n % 2 == 0 {
                            client.call(warm([slot, slot + 1, slot + 2])).unwrap();
                        }
                        client.call(take(rules(slot, true, &[peer + 3]))).unwrap();
                        client.call(change(rules(slot, false, &[]))).unwrap();
                        client.call(release(slot)).unwrap();
                        if n == 6 {
                            client.call(setup(Vec::new())).unwrap();
                        }
                    }
                });
            }
        });
        // What is left is idle taps, each with its two elements, and nothing of machines.
        let objects = helper.inventory();
        assert!(objects.iter().all(|o| o.machine.is_none()), "{objects:?}");
        let count = |start: &str| objects.iter().filter(|o| o.name.starts_with(start)).count();
        let taps = count("tap-fc-");
        assert_eq!(
            (count("guests "), count("nat "), count("pairs ")),
            (taps, taps, 0),
            "{objects:?}"
        );
        helper.ok(Request::NetworkRemove);
        assert_eq!(helper.inventory(), []);
    });
}

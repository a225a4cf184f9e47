//! The guest agent of banger.
//!
//! One static program with three lives: process 1 of the initramfs ([`boot`]: modules, disks, mounts), then process 1 of the
//! guest until the image's init takes its place or for good ([`pid1`]), and the agent proper ([`serve`]), which answers the
//! host over the guest channel for as long as the guest runs.
//!
//! The host trusts nothing that comes from here; the agent in turn takes the image's files for hostile only to itself: they
//! must not make it crash or write where it was not meant to.

pub mod agent;
pub mod boot;
mod boot_id;
pub mod channel;
mod clock;
mod connect;
mod console;
mod files;
pub mod freezer;
pub mod handover;
pub mod personalize;
pub mod pid1;
mod ports;
mod power;
pub mod rehearsal;
mod renew;
mod reply;
pub mod serve;
pub mod server;
mod services;
pub mod session;
mod sys;
mod system;

//! What each command does, one file each or one for those that are alike.

pub(crate) mod audit;
pub(crate) mod completion;
pub(crate) mod daemon;
pub(crate) mod doctor;
pub(crate) mod image;
pub(crate) mod internal;
pub(crate) mod kernel;
pub(crate) mod man;
pub(crate) mod ssh_config;
pub(crate) mod stock;
pub(crate) mod system;
pub(crate) mod template;
pub(crate) mod version;
pub(crate) mod vm;

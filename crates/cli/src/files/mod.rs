//! Files on their way in and out: opened beneath a directory without following any link, packed into and taken out of tar
//! streams.

pub(crate) mod beneath;
pub(crate) mod extract;
pub(crate) mod pack;
pub(crate) mod place;
pub(crate) mod tree;
pub(crate) mod upload;

//! Images, kernels and disks of machines.
//!
//! * [`store`]: the content-addressed store, and everything that puts something into it,
//! * [`kernel`]: Debian kernel packages: archive, compressed kernel, modules, the distribution's own package,
//! * [`initramfs`]: the archive that starts a machine,
//! * [`recipe`] and [`build`]: the images that banger makes itself,
//! * [`ingest`](mod@ingest): a tar stream into an image,
//! * [`tar`]: a bounded reader of tar streams and the policy of what may enter an image,
//! * [`ext4`]: a writer of ext4 file systems, without root and without unpacking anything onto the host,
//! * [`disk`]: root and work disks of machines, and layers over them,
//! * [`seal`](mod@seal): whether a file that was put away is still what it was,
//! * [`needs`]: what the host has to have for that,
//! * [`process`]: how programs are run,
//! * [`error`], [`progress`], [`digest`]: what all of them share.
//!
//! Archives, packages and images are hostile input here: every length is bounded and nothing panics on them.

pub mod build;
pub mod builder;
pub mod digest;
pub mod disk;
pub mod error;
pub mod ext4;
pub mod ingest;
pub mod initramfs;
pub mod kernel;
pub mod needs;
pub mod process;
pub mod progress;
pub mod recipe;
pub mod seal;
pub mod store;
pub mod tar;

mod cancel;
mod files;

pub use digest::Digest;
pub use error::{Error, Result};
pub use progress::{Progress, Stage, Step, Unit};
pub use recipe::Recipe;
pub use seal::{Seal, SealError};
pub use store::{Draft, ImageFiles, ImageInfo, KernelFiles, KernelInfo, Store};

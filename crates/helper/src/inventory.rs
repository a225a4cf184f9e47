//! Every host object that carries banger's mark.

use banger_system::helper::{HelperError, HostObject};
use banger_system::net::Network;

use crate::ctx::Ctx;
use crate::{disk, engine, net};

/// All of them.
pub(crate) fn all(ctx: &Ctx, net: &Network) -> Result<Vec<HostObject>, HelperError> {
    let mut objects = net::inventory(net)?;
    objects.extend(disk::inventory(ctx)?);
    objects.extend(engine::inventory(ctx)?);
    Ok(objects)
}

//! Bridge, taps and rules of machines, in the network namespace that the helper runs in.

use banger_system::helper::{Answer, EngineUser, HelperCode, HelperError, HostObject, TapRules};
use banger_system::id::MachineId;
use banger_system::net::Network;

use crate::ctx::{Ctx, error};

pub(crate) fn setup(_ctx: &Ctx, _net: &Network, _taps: &[TapRules]) -> Result<(), HelperError> {
    Err(error(HelperCode::Unsupported, "not here yet"))
}
pub(crate) fn remove(_ctx: &Ctx, _net: &Network) -> Result<(), HelperError> {
    Err(error(HelperCode::Unsupported, "not here yet"))
}
pub(crate) fn warm(_ctx: &Ctx, _net: &Network, _slots: &[u32]) -> Result<(), HelperError> {
    Err(error(HelperCode::Unsupported, "not here yet"))
}
pub(crate) fn take(
    _ctx: &Ctx,
    _net: &Network,
    _machine: &MachineId,
    _user: EngineUser,
    _rules: &TapRules,
) -> Result<Answer, HelperError> {
    Err(error(HelperCode::Unsupported, "not here yet"))
}
pub(crate) fn change(_ctx: &Ctx, _net: &Network, _machine: &MachineId, _rules: &TapRules) -> Result<(), HelperError> {
    Err(error(HelperCode::Unsupported, "not here yet"))
}
pub(crate) fn drop(_ctx: &Ctx, _net: &Network, _machine: &MachineId, _slot: u32) -> Result<(), HelperError> {
    Ok(())
}
pub(crate) fn drop_all(_ctx: &Ctx, _net: &Network, _machine: &MachineId) -> Result<(), HelperError> {
    Ok(())
}
pub(crate) fn resolver_set(_ctx: &Ctx, _net: &Network, _port: u16) -> Result<bool, HelperError> {
    Ok(false)
}
pub(crate) fn resolver_clear(_ctx: &Ctx, _net: &Network) -> Result<(), HelperError> {
    Ok(())
}
pub(crate) fn inventory(_net: &Network) -> Result<Vec<HostObject>, HelperError> {
    Ok(Vec::new())
}

//! The bridge: made, addressed, repaired, removed. One that is not banger's is left alone.

use std::io;
use std::path::Path;

use banger_system::helper::{HelperCode, HelperError};
use banger_system::names::{ALIAS_BRIDGE, ALIAS_POOL, of_alias};
use banger_system::net::{Network, tap_slot};
use banger_system::overlap::{self, Block};

use super::links::{Link, Links};
use crate::ctx::{Ctx, error, failed};

/// The bridge, if it is there. It must be banger's: what it is and its alias say so, or, where the alias was not reached, its MAC.
pub(crate) fn find(links: &mut Links, net: &Network) -> Result<Option<Link>, HelperError> {
    let found = links
        .named(net.bridge())
        .map_err(|e| failed("look at the interfaces", e))?;
    let Some(link) = found else { return Ok(None) };
    let ours = link.alias == ALIAS_BRIDGE || (link.alias.is_empty() && link.mac == mac(net));
    if link.kind == "bridge" && ours {
        return Ok(Some(link));
    }
    let text = format!("the interface `{}` is not banger's", net.bridge());
    Err(error(HelperCode::Denied, text))
}

/// The bridge, which has to be there.
pub(crate) fn there(links: &mut Links, net: &Network) -> Result<Link, HelperError> {
    find(links, net)?.ok_or_else(|| {
        let text = format!("the bridge `{}` is not there; network_setup makes it", net.bridge());
        error(HelperCode::NotFound, text)
    })
}

/// Refuses a network that overlaps an address or a route of the host: machines, and the owner, would take what is sent to another network.
/// One that the bridge has already is not looked at again, so that a laptop that joins another network leaves its machines as they are.
pub(crate) fn check_network(ctx: &Ctx, links: &mut Links, net: &Network) -> Result<(), HelperError> {
    let cannot = |e: io::Error| failed("look at the addresses of this host", e);
    let all = links.all().map_err(cannot)?;
    let addresses = links.addresses().map_err(cannot)?;
    let ours = |index: u32| {
        all.iter()
            .find(|link| link.index == index && link.alias == ALIAS_BRIDGE)
    };
    let has = |(index, address, prefix): &(u32, std::net::Ipv4Addr, u8)| {
        ours(*index).is_some_and(|link| link.name == net.bridge())
            && (*address, *prefix) == (net.gateway(), net.prefix())
    };
    if addresses.iter().any(has) {
        return Ok(());
    }
    let own: Vec<Block> = addresses
        .iter()
        .filter(|(index, ..)| ours(*index).is_some())
        .map(|(_, address, prefix)| Block {
            address: *address,
            prefix: *prefix,
        })
        .collect();
    let machines = |link: &&Link| tap_slot(&link.name).is_some() && of_alias(&link.alias).is_some();
    if let (Some(link), Some(old)) = (all.iter().find(machines), own.first()) {
        let text = format!(
            "`{}` is still on the network {old}; the record of the installation has {}",
            link.name,
            net.cidr()
        );
        return Err(error(HelperCode::Conflict, text));
    }
    let tables = std::fs::read_to_string(ctx.proc.join(overlap::TABLES)).map_err(cannot)?;
    match overlap::find(net, &tables, &own) {
        None => Ok(()),
        Some(why) => Err(error(
            HelperCode::Conflict,
            format!("the network {} of the machines is refused: {why}", net.cidr()),
        )),
    }
}

/// Makes the bridge as it has to be. Its number.
pub(crate) fn ensure(ctx: &Ctx, links: &mut Links, net: &Network) -> Result<u32, HelperError> {
    let name = net.bridge();
    let cannot = |e: io::Error| failed(format_args!("make the bridge `{name}`"), e);
    let link = match find(links, net)? {
        Some(link) => link,
        None => {
            links.make_bridge(name, &mac(net)).map_err(cannot)?;
            there(links, net)?
        }
    };
    // Machines have no IPv6 and may not make the host believe that they do.
    optional(sysctl(ctx, &format!("ipv6/conf/{name}/disable_ipv6"), "1")).map_err(cannot)?;
    links.put_up(link.index, ALIAS_BRIDGE, None).map_err(cannot)?;
    links
        .set_address(link.index, net.gateway(), net.prefix())
        .map_err(cannot)?;
    // What comes from it comes from its network; nobody is told of shorter ways past the rules; it speaks for no other address. Last,
    // when rules and address are right: what comes from it is forwarded.
    for (setting, value) in [
        ("rp_filter", "1"),
        ("send_redirects", "0"),
        ("accept_redirects", "0"),
        ("arp_ignore", "1"),
        ("forwarding", "1"),
    ] {
        sysctl(ctx, &format!("ipv4/conf/{name}/{setting}"), value).map_err(cannot)?;
    }
    Ok(link.index)
}

/// Removes bridges of banger's that another configuration had, with their idle taps. Refused while machines are on one.
pub(crate) fn remove_others(links: &mut Links, net: &Network) -> Result<(), HelperError> {
    let cannot = |e: io::Error| failed("remove an old bridge", e);
    let all = links.all().map_err(cannot)?;
    let old = |link: &&Link| link.kind == "bridge" && link.alias == ALIAS_BRIDGE && link.name != net.bridge();
    for bridge in all.iter().filter(old) {
        let ports: Vec<&Link> = all.iter().filter(|link| link.master == Some(bridge.index)).collect();
        if let Some(port) = ports.iter().find(|port| port.alias != ALIAS_POOL) {
            let text = format!("`{}` is still on the bridge `{}`", port.name, bridge.name);
            return Err(error(HelperCode::Conflict, text));
        }
        for link in ports.iter().copied().chain([bridge]) {
            gone(links.delete(link.index)).map_err(cannot)?;
        }
    }
    Ok(())
}

/// Refuses while something that is not banger's idle tap is on the bridge, or a machine's tap is anywhere.
pub(crate) fn check_unused(all: &[Link], bridge: Option<&Link>) -> Result<(), HelperError> {
    let machines = |link: &&Link| tap_slot(&link.name).is_some() && of_alias(&link.alias).is_some();
    let port = |link: &&Link| bridge.is_some_and(|b| link.master == Some(b.index)) && link.alias != ALIAS_POOL;
    match all.iter().find(|link| machines(link) || port(link)) {
        Some(link) => Err(error(HelperCode::Conflict, format!("`{}` is still there", link.name))),
        None => Ok(()),
    }
}

/// MAC of the bridge: `02:fc:` and its address, so that it does not change with its ports.
fn mac(net: &Network) -> Vec<u8> {
    [&[0x02, 0xfc][..], &net.gateway().octets()].concat()
}

/// Sets a value below `/proc/sys/net`; one that is right is not written.
pub(crate) fn sysctl(ctx: &Ctx, name: &str, value: &str) -> io::Result<()> {
    let path = ctx.proc.join("sys/net").join(name);
    let named = |e: io::Error| io::Error::new(e.kind(), format!("`{}`: {e}", shown(&path)));
    if std::fs::read_to_string(&path).map_err(named)?.trim() != value {
        std::fs::write(&path, value).map_err(named)?;
    }
    Ok(())
}

fn shown(path: &Path) -> std::path::Display<'_> {
    path.display()
}

/// What is not there is fine.
pub(crate) fn optional(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// An interface that has gone is fine.
pub(crate) fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if super::netlink::absent(&e) => Ok(()),
        other => other,
    }
}

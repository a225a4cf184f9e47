//! Ports of the host that lead to a machine: how users write them, and which go together.

use std::net::{IpAddr, Ipv4Addr};

use banger_proto::api::Forward;

/// Where a forward listens when nothing else was said.
pub const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Most forwards of one machine.
pub const MOST: usize = 64;

/// Why a forward is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ForwardError {
    /// It is not of the form.
    #[error("`{0}` is not of the form [IP:]HOST:GUEST or GUEST")]
    Form(String),
    /// A port that is none.
    #[error("`{text}` is not a port; {range} are")]
    Port {
        /// What was written.
        text: String,
        /// What is possible.
        range: &'static str,
    },
    /// An address that is none.
    #[error("`{0}` is not an IP address of this host")]
    Address(String),
    /// Two on one port of the host.
    #[error("{0} is given twice")]
    Twice(String),
    /// More than a machine may have.
    #[error("a machine has {MOST} forwarded ports at most, not {0}")]
    TooMany(usize),
}

impl ForwardError {
    /// What to write instead.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Twice(_) | Self::TooMany(_) => "leave some of them out",
            _ => {
                "write 8080:80 for port 80 of the machine on 127.0.0.1:8080, 80 for any free port, 0.0.0.0:8080:80 to be \
                 reached from elsewhere, [::1]:8080:80 for IPv6"
            }
        }
    }
}

/// Reads `8080:80`, `80`, `127.0.0.2:8080:80`, `[::1]:8080:80`. Host port 0, or none, is any that is free.
pub fn parse(text: &str) -> Result<Forward, ForwardError> {
    let form = || ForwardError::Form(text.escape_default().to_string());
    let (ip, ports) = match text.strip_prefix('[') {
        Some(rest) => {
            let (ip, ports) = rest.split_once("]:").ok_or_else(form)?;
            if !ip.contains(':') {
                return Err(ForwardError::Address(ip.escape_default().to_string()));
            }
            (Some(ip), ports)
        }
        None => match text.matches(':').count() {
            0 | 1 => (None, text),
            2 => text
                .split_once(':')
                .map(|(ip, ports)| (Some(ip), ports))
                .ok_or_else(form)?,
            _ => return Err(form()),
        },
    };
    let host_ip = ip.map_or(Ok(LOOPBACK), address)?;
    let (host_port, guest_port) = match ports.split_once(':') {
        Some((_, guest)) if guest.contains(':') => return Err(form()),
        Some((host, guest)) => (port(host, 0)?, port(guest, 1)?),
        None if ip.is_some() => return Err(form()),
        None => (0, port(ports, 1)?),
    };
    Ok(Forward {
        host_ip: host_ip.to_string(),
        host_port,
        guest_port,
    })
}

fn address(text: &str) -> Result<IpAddr, ForwardError> {
    let wrong = || ForwardError::Address(text.escape_default().to_string());
    let ip: IpAddr = text.parse().map_err(|_| wrong())?;
    let broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast());
    if ip.is_multicast() || broadcast {
        Err(wrong())
    } else {
        Ok(ip)
    }
}

fn port(text: &str, least: u16) -> Result<u16, ForwardError> {
    let range = if least == 0 { "0 to 65535" } else { "1 to 65535" };
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    digits
        .then(|| text.parse().ok())
        .flatten()
        .filter(|port| *port >= least)
        .ok_or_else(|| ForwardError::Port {
            text: text.escape_default().to_string(),
            range,
        })
}

/// The address of a forward, checked together with its ports: for those that came over the API.
pub fn host_ip(forward: &Forward) -> Result<IpAddr, ForwardError> {
    if forward.guest_port == 0 {
        return Err(ForwardError::Port {
            text: "0".to_owned(),
            range: "1 to 65535",
        });
    }
    address(&forward.host_ip)
}

/// Checks all forwards of a machine, and writes their addresses in one way.
pub fn check(forwards: &[Forward]) -> Result<Vec<Forward>, ForwardError> {
    if forwards.len() > MOST {
        return Err(ForwardError::TooMany(forwards.len()));
    }
    let mut checked: Vec<Forward> = Vec::with_capacity(forwards.len());
    for forward in forwards {
        let one = Forward {
            host_ip: host_ip(forward)?.to_string(),
            ..forward.clone()
        };
        let same = |other: &Forward| one.host_port != 0 && socket(other) == socket(&one);
        if checked.iter().any(same) {
            return Err(ForwardError::Twice(socket(&one)));
        }
        checked.push(one);
    }
    Ok(checked)
}

/// Where a forward is reached: `127.0.0.1:8080`, `[::1]:8080`.
pub fn socket(forward: &Forward) -> String {
    match forward.host_ip.parse() {
        Ok(IpAddr::V6(ip)) => format!("[{ip}]:{}", forward.host_port),
        _ => format!("{}:{}", forward.host_ip, forward.host_port),
    }
}

/// Where this host itself reaches it: an address that stands for all is loopback.
pub fn endpoint(forward: &Forward) -> String {
    let ip = match forward.host_ip.parse() {
        Ok(IpAddr::V4(ip)) if ip.is_unspecified() => LOOPBACK.to_string(),
        Ok(IpAddr::V6(ip)) if ip.is_unspecified() => "::1".to_owned(),
        _ => forward.host_ip.clone(),
    };
    socket(&Forward {
        host_ip: ip,
        ..forward.clone()
    })
}

/// A forward for people: `127.0.0.1:8080->80`.
pub fn show(forward: &Forward) -> String {
    format!("{}->{}", socket(forward), forward.guest_port)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn forward(host_ip: &str, host_port: u16, guest_port: u16) -> Forward {
        Forward {
            host_ip: host_ip.to_owned(),
            host_port,
            guest_port,
        }
    }

    #[test]
    fn what_users_write() {
        for (text, wanted) in [
            ("80", forward("127.0.0.1", 0, 80)),
            ("8080:80", forward("127.0.0.1", 8080, 80)),
            ("0:80", forward("127.0.0.1", 0, 80)),
            ("0.0.0.0:8080:80", forward("0.0.0.0", 8080, 80)),
            ("[::1]:8080:80", forward("::1", 8080, 80)),
            ("[0:0::1]:0:80", forward("::1", 0, 80)),
        ] {
            assert_eq!(parse(text), Ok(wanted), "{text}");
        }
        let form = |t: &str| matches!(parse(t), Err(ForwardError::Form(_)));
        let port = |t: &str| matches!(parse(t), Err(ForwardError::Port { .. }));
        let address = |t: &str| matches!(parse(t), Err(ForwardError::Address(_)));
        for bad in ["::1:80:80", "[::1]80", "[::1", "[::1]:80", "1:2:3:4", "[::1]:1:2:3"] {
            assert!(form(bad), "{bad}: {:?}", parse(bad));
        }
        for bad in [
            "", ":", "80:", ":80", "0", "80:0", "65536", "+80", "80:x", "8080/tcp", " 80",
        ] {
            assert!(port(bad), "{bad}: {:?}", parse(bad));
        }
        for bad in [
            "localhost:80:80",
            ":80:80",
            "[1.2.3.4]:80:80",
            "224.0.0.1:1:1",
            "[ff02::1]:1:1",
        ] {
            assert!(address(bad), "{bad}: {:?}", parse(bad));
        }
    }

    #[test]
    fn forwards_of_one_machine() {
        let two = [forward("127.0.0.1", 80, 80), forward("127.0.0.1", 80, 81)];
        assert_eq!(check(&two), Err(ForwardError::Twice("127.0.0.1:80".into())));
        let any = [forward("127.0.0.1", 0, 80), forward("127.0.0.1", 0, 80)];
        assert!(check(&any).is_ok());
        assert!(check(&[forward("::", 1, 0)]).is_err());
        assert!(matches!(
            check(&vec![forward("::", 0, 1); MOST + 1]),
            Err(ForwardError::TooMany(_))
        ));
        assert_eq!(check(&[forward("0::1", 1, 1)]).unwrap()[0].host_ip, "::1");
    }

    #[test]
    fn where_they_are_reached() {
        assert_eq!(endpoint(&forward("0.0.0.0", 80, 1)), "127.0.0.1:80");
        assert_eq!(endpoint(&forward("::", 80, 1)), "[::1]:80");
        assert_eq!(show(&forward("::1", 80, 1)), "[::1]:80->1");
    }

    proptest! {
        #[test]
        fn every_forward_is_read_back(ip: IpAddr, host: u16, guest in 1u16..) {
            let one = forward(&ip.to_string(), host, guest);
            let text = format!("{}:{guest}", socket(&one));
            prop_assert_eq!(parse(&text).ok(), address(&ip.to_string()).is_ok().then_some(one));
        }

        #[test]
        fn any_text_is_no_harm(text in "\\PC{0,40}") {
            let _ = parse(&text);
        }

        #[test]
        fn what_is_read_is_good(text in "[0-9.:\\[\\]a-f]{0,24}") {
            if let Ok(one) = parse(&text) {
                prop_assert_eq!(check(std::slice::from_ref(&one)), Ok(vec![one]));
            }
        }
    }
}

//! The configuration file, `config.toml`. All keys are optional; an unknown key is an error with its place.

use std::net::Ipv4Addr;
use std::time::Duration;

use banger_system::net::{DEFAULT_ADDRESS, DEFAULT_BRIDGE, DNS_PORT, FIRST_OPEN_PORT, Network};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _};

use crate::{size, spec};

/// The whole file.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Log level of the daemon; `BANGER_LOG_LEVEL` wins over it.
    pub log_level: LogLevel,
    /// Image of a machine for which none is named; `debian` when absent.
    pub default_image_name: Option<String>,
    /// Engine: `auto`, `qemu` or `firecracker`.
    #[serde(deserialize_with = "engine")]
    pub engine: Option<String>,
    /// The QEMU binary, absolute; the first `qemu-system-*` on `PATH` when absent.
    #[serde(deserialize_with = "absolute")]
    pub qemu_bin: Option<String>,
    /// The Firecracker binary of user mode, absolute; the first `firecracker` on `PATH` when absent. In system mode the record of the
    /// installation says which.
    #[serde(deserialize_with = "absolute")]
    pub firecracker_bin: Option<String>,
    /// Sizes of a machine for which none are given.
    pub vm_defaults: VmDefaults,
    /// Templates, from which machines start.
    pub templates: TemplatesConfig,
    /// A machine that was not used for this long is suspended; a use wakes it. 0, the default, is never. A machine's own setting
    /// wins.
    pub idle_suspend_after: Span,
    /// A running machine that was not used for this long is stopped. 0, the default, is never.
    pub auto_stop_stale_after: Span,
    /// The daemon itself.
    pub daemon: DaemonConfig,
    /// The network of system mode.
    pub network: NetworkConfig,
}

/// `[network]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "RawNetworkConfig")]
pub struct NetworkConfig {
    /// Bridge and addresses, where one of them is named. It is `system install` that goes by it, and writes it into the record of the
    /// installation.
    pub net: Option<Network>,
    /// Name servers of the guests; those of the host when absent.
    pub dns: Option<Vec<Ipv4Addr>>,
    /// Idle taps that are made ahead.
    pub tap_pool: u32,
    /// Port of the name server for `.vm` on 127.0.0.1: [`DNS_PORT`], which the root helper binds, or from [`FIRST_OPEN_PORT`] on.
    pub dns_port: u16,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            net: None,
            dns: None,
            tap_pool: 4,
            dns_port: DNS_PORT,
        }
    }
}

/// `[network]` as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawNetworkConfig {
    bridge: Option<String>,
    address: Option<String>,
    dns: Option<Vec<Ipv4Addr>>,
    tap_pool: Option<u32>,
    dns_port: Option<u16>,
}

/// Most idle taps that are made ahead.
const MAX_POOL: u32 = 64;

impl TryFrom<RawNetworkConfig> for NetworkConfig {
    type Error = String;

    fn try_from(raw: RawNetworkConfig) -> Result<Self, String> {
        let bridge = raw.bridge.as_deref().unwrap_or(DEFAULT_BRIDGE);
        let net = match (&raw.address, &raw.bridge) {
            (Some(address), _) => Network::parse(bridge, address).map(Some),
            (None, Some(_)) => Network::new(bridge, DEFAULT_ADDRESS.0, DEFAULT_ADDRESS.1).map(Some),
            (None, None) => Ok(None),
        };
        let default = Self::default();
        let config = Self {
            net: net.map_err(|e| e.to_string())?,
            dns: raw.dns,
            tap_pool: raw.tap_pool.unwrap_or(default.tap_pool),
            dns_port: raw.dns_port.unwrap_or(default.dns_port),
        };
        if config.tap_pool > MAX_POOL {
            return Err(format!("at most {MAX_POOL} idle taps are possible"));
        }
        if config.dns_port == 0 {
            return Err("the name server needs a port".to_owned());
        }
        if config.dns_port != DNS_PORT && config.dns_port < FIRST_OPEN_PORT {
            return Err(format!(
                "the name server's port is {DNS_PORT}, or one from {FIRST_OPEN_PORT} on, not {}",
                config.dns_port
            ));
        }
        Ok(config)
    }
}

/// `[templates]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TemplatesConfig {
    /// Whether new machines start from templates.
    pub enabled: bool,
    /// Space on the host that templates may take; beyond it the least recently used ones are removed.
    pub budget: Size,
}

impl Default for TemplatesConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            budget: Size(4 * size::GIB),
        }
    }
}

/// `[vm_defaults]`
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VmDefaults {
    /// Virtual CPUs.
    #[serde(deserialize_with = "vcpu")]
    pub vcpu: Option<u32>,
    /// Memory in MiB.
    #[serde(deserialize_with = "memory")]
    pub memory_mib: Option<u64>,
    /// Root disk, as a size with a unit.
    #[serde(deserialize_with = "disk")]
    pub disk_size: Option<Size>,
}

/// `[daemon]`
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DaemonConfig {
    /// The daemon ends when it had nothing to do for this long; machines go on. 0, the default, is never.
    pub idle_exit: Span,
}

/// How much the daemon logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Everything.
    Debug,
    /// The course of operations.
    #[default]
    Info,
    /// What is odd.
    Warn,
    /// What failed.
    Error,
}

impl LogLevel {
    /// The word in the file.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Debug => "debug",
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
        }
    }
}

/// A size in the file: `"8G"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Size(pub u64);

impl TryFrom<String> for Size {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        size::parse(&text).map(Self).map_err(|e| format!("{e}; {}", e.hint()))
    }
}

/// A duration in the file: `"90s"`, `"10m"`, `"1h30m"`, `"0"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(try_from = "String")]
pub struct Span(pub Duration);

impl TryFrom<String> for Span {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        parse_duration(&text).map(Self)
    }
}

/// Reads a duration: whole numbers with `ms`, `s`, `m`, `h` or `d`, largest first, or `0`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let fail = || {
        format!(
            "duration `{}` is not of the form 90s, 10m, 1h30m",
            text.escape_default()
        )
    };
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let mut rest = text;
    let mut total: u64 = 0;
    let mut last = u64::MAX;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, tail) = rest.split_at(digits);
        let letters = tail.bytes().take_while(u8::is_ascii_alphabetic).count();
        let (unit, tail) = tail.split_at(letters);
        let factor: u64 = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(fail()),
        };
        if factor >= last {
            return Err(fail());
        }
        last = factor;
        let number: u64 = number.parse().map_err(|_| fail())?;
        total = number
            .checked_mul(factor)
            .and_then(|n| total.checked_add(n))
            .ok_or_else(fail)?;
        rest = tail;
    }
    if text.is_empty() {
        Err(fail())
    } else {
        Ok(Duration::from_millis(total))
    }
}

/// Why a configuration is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {message}")]
pub struct ConfigError {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// What is wrong.
    pub message: String,
}

impl Config {
    /// Reads and checks a configuration.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|e| {
            let (line, column) = place(text, e.span().map_or(0, |s| s.start));
            ConfigError {
                line,
                column,
                message: e.message().replace('\n', " "),
            }
        })
    }
}

/// Reads an optional value that has to pass a check; the parser adds the place to what the check says.
fn checked<'de, D, T, E>(deserializer: D, check: impl FnOnce(&T) -> Result<(), E>) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
    E: std::fmt::Display,
{
    let value = T::deserialize(deserializer)?;
    check(&value).map_err(D::Error::custom)?;
    Ok(Some(value))
}

fn vcpu<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    checked(deserializer, |&vcpu| spec::check_vcpu(vcpu))
}

fn memory<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    checked(deserializer, |&mib| spec::check_memory(mib))
}

fn disk<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Size>, D::Error> {
    checked(deserializer, |size: &Size| spec::check_disk(size.0))
}

fn engine<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    checked(deserializer, |engine: &String| spec::check_engine(engine))
}

fn absolute<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    checked(deserializer, |path: &String| {
        if path.starts_with('/') {
            Ok(())
        } else {
            Err("the path is not absolute")
        }
    })
}

/// Line and column of a byte offset, both from 1.
fn place(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |i| i + 1);
    (
        before.matches('\n').count() + 1,
        before[line_start..].chars().count() + 1,
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::size::GIB;

    #[test]
    fn nothing_is_a_configuration() {
        assert_eq!(Config::parse("").unwrap(), Config::default());
    }

    #[test]
    fn every_key_is_read() {
        let config = Config::parse(
            "log_level = 'debug'\ndefault_image_name = 'debian-slim'\nengine = 'qemu'\nqemu_bin = '/opt/qemu'\n\
             [vm_defaults]\nvcpu = 2\nmemory_mib = 1024\ndisk_size = '8G'\n[daemon]\nidle_exit = '1h30m'\n\
             [network]\nbridge = 'br-fc-x'\naddress = '10.9.0.1/20'\ndns = ['9.9.9.9']\ntap_pool = 2\ndns_port = 5300\n",
        )
        .unwrap();
        assert_eq!(config.network.net.unwrap().cidr(), "10.9.0.0/20");
        assert_eq!((config.network.tap_pool, config.network.dns_port), (2, 5300));
        assert_eq!(config.log_level, LogLevel::Debug);
        assert_eq!(
            config.vm_defaults,
            VmDefaults {
                vcpu: Some(2),
                memory_mib: Some(1024),
                disk_size: Some(Size(8 * GIB))
            }
        );
        assert_eq!(config.daemon.idle_exit, Span(Duration::from_secs(5400)));
    }

    #[test]
    fn errors_name_their_place() {
        for (text, line, part) in [
            ("\nlog_levle = 'info'\n", 2, "log_levle"),
            ("[vm_defaults]\nvcpu = 0\n", 2, "virtual CPUs"),
            ("[vm_defaults]\ndisk_size = '8'\n", 2, "unit"),
            ("[vm_defaults]\nmemory_mib = 1\n", 2, "memory"),
            ("[daemon]\n\nidle_exit = 'soon'\n", 3, "duration"),
            ("engine = 'xen'\n", 1, "xen"),
            ("[network]\nbridge = 'docker0'\n", 1, "docker0"),
            ("[network]\naddress = '8.8.8.8/24'\n", 1, "8.8.8.8"),
            ("[network]\ntap_pool = 1000\n", 1, "idle taps"),
            ("qemu_bin = 'qemu'\n", 1, "absolute"),
            ("log_level = \n", 1, ""),
        ] {
            let error = Config::parse(text).unwrap_err();
            assert_eq!(error.line, line, "{text:?}: {error}");
            assert!(error.message.contains(part), "{text:?}: {error}");
        }
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration("1h30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse_duration("0"), Ok(Duration::ZERO));
        for bad in ["", "5", "m", "1m1h", "1s1s", "-1s", "1.5h", "99999999999999999d"] {
            assert!(parse_duration(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in "\\PC{0,80}") {
            let _ = Config::parse(&text);
            let _ = parse_duration(&text);
        }
    }
}

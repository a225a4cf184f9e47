//! Identifiers.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Identifier of a machine: sixteen lower-case hexadecimal digits. It names the machine's directories and marks every host
/// object that belongs to it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MachineId(String);

/// Why a text is not an identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a machine id is sixteen lower-case hexadecimal digits")]
pub struct IdError;

impl MachineId {
    /// An identifier from random bytes.
    pub fn from_random(bytes: [u8; 8]) -> Self {
        Self(hex(&bytes))
    }

    /// Reads one back.
    pub fn parse(text: &str) -> Result<Self, IdError> {
        let fits = text.len() == 16 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if fits { Ok(Self(text.to_owned())) } else { Err(IdError) }
    }

    /// The whole identifier.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The first eight digits, for tables.
    pub fn short(&self) -> &str {
        &self.0[..8]
    }

    /// MAC address of the machine's first interface: locally administered, the rest from the identifier.
    pub fn mac(&self) -> String {
        let pairs: Vec<&str> = (0..5).map(|i| &self.0[i * 2..i * 2 + 2]).collect();
        format!("02:{}", pairs.join(":"))
    }
}

impl TryFrom<String> for MachineId {
    type Error = IdError;

    fn try_from(text: String) -> Result<Self, IdError> {
        Self::parse(&text)
    }
}

impl From<MachineId> for String {
    fn from(id: MachineId) -> Self {
        id.0
    }
}

impl fmt::Display for MachineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Bytes as lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sixteen_lower_case_digits() {
        let id = MachineId::from_random([0, 1, 2, 0xab, 4, 5, 6, 0xff]);
        assert_eq!(id.as_str(), "000102ab040506ff");
        assert_eq!(id.short(), "000102ab");
        assert_eq!(id.mac(), "02:00:01:02:ab:04");
        assert_eq!(MachineId::parse(id.as_str()), Ok(id));
        for bad in [
            "",
            "000102AB040506ff",
            "000102ab040506f",
            "../../etc/passwd",
            "000102ab040506ff0",
        ] {
            assert_eq!(MachineId::parse(bad), Err(IdError));
        }
    }
}

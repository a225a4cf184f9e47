//! The ELF image inside a compressed kernel (`bzImage`).
//!
//! The setup header of the boot protocol says where the compressed payload is. Starting from the ELF image saves the guest the
//! decompression, and engines that take ELF images only need it anyway.

use super::decompress::{self, Compression};

/// What is wrong with a kernel image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BzImageError {
    /// It has no setup header.
    #[error("it is no bzImage")]
    NotBzImage,
    /// Its boot protocol is from before 2007.
    #[error("its boot protocol {major}.{minor} does not say where the kernel is")]
    TooOld {
        /// Protocol version.
        major: u8,
        /// Protocol version.
        minor: u8,
    },
    /// The payload lies outside of it.
    #[error("its payload lies outside of it")]
    OutOfBounds,
    /// The payload is compressed in a way that is not supported.
    #[error("its payload begins with {0:02x?}, which is no known compression")]
    UnknownCompression(Vec<u8>),
    /// The payload cannot be decompressed.
    #[error("its payload cannot be decompressed")]
    Decompress(#[source] std::io::Error),
    /// The payload is no ELF image for this architecture.
    #[error("its payload is not a 64-bit x86 ELF image")]
    NotElf,
}

/// Largest ELF image.
const MAX_ELF: usize = 512 << 20;

/// Takes the ELF image out of a bzImage. An image that is ELF already is returned as it is.
pub fn extract(image: &[u8]) -> Result<Vec<u8>, BzImageError> {
    if image.starts_with(b"\x7fELF") {
        check_elf(image)?;
        return Ok(image.to_vec());
    }
    let payload = payload(image)?;
    let compression = Compression::detect(payload);
    if compression == Compression::None {
        if payload.starts_with(b"\x7fELF") {
            check_elf(payload)?;
            return Ok(payload.to_vec());
        }
        return Err(BzImageError::UnknownCompression(
            payload.iter().take(6).copied().collect(),
        ));
    }
    let elf = decompress::to_vec(compression, payload, MAX_ELF).map_err(BzImageError::Decompress)?;
    check_elf(&elf)?;
    Ok(elf)
}

/// The compressed payload.
pub fn payload(image: &[u8]) -> Result<&[u8], BzImageError> {
    if image.get(0x202..0x206) != Some(b"HdrS") {
        return Err(BzImageError::NotBzImage);
    }
    let byte = |at: usize| image.get(at).copied().ok_or(BzImageError::NotBzImage);
    let (major, minor) = (byte(0x207)?, byte(0x206)?);
    if (major, minor) < (2, 8) {
        return Err(BzImageError::TooOld { major, minor });
    }
    let word = |at: usize| match image.get(at..at + 4) {
        Some([a, b, c, d]) => Ok(u64::from(u32::from_le_bytes([*a, *b, *c, *d]))),
        _ => Err(BzImageError::NotBzImage),
    };
    // 0 stands for 4 since the first version of the protocol.
    let setup_sectors = match byte(0x1f1)? {
        0 => 4,
        n => u64::from(n),
    };
    let start = (setup_sectors + 1) * 512 + word(0x248)?;
    let end = start + word(0x24c)?;
    let range = usize::try_from(start).ok().zip(usize::try_from(end).ok());
    range
        .and_then(|(start, end)| image.get(start..end))
        .ok_or(BzImageError::OutOfBounds)
}

/// 64 bits, little endian, executable or shared, x86-64.
fn check_elf(elf: &[u8]) -> Result<(), BzImageError> {
    let head = elf.get(..64).ok_or(BzImageError::NotElf)?;
    let half = |at: usize| head.get(at..at + 2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    let fits = head.starts_with(b"\x7fELF\x02\x01") && matches!(half(16), Some(2 | 3)) && half(18) == Some(62);
    if fits { Ok(()) } else { Err(BzImageError::NotElf) }
}

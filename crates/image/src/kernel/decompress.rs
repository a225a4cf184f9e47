//! Bounded decompression.

use std::io::{self, Read};

/// Memory that a stream may ask its decoder for.
const MEMORY_LIMIT: u64 = 256 << 20;

/// A compression.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// None.
    None,
    /// gzip.
    Gzip,
    /// xz.
    Xz,
    /// The older LZMA container.
    Lzma,
    /// Zstandard.
    Zstd,
    /// The legacy LZ4 container, which the kernel uses.
    Lz4Legacy,
}

impl Compression {
    /// Recognises a compression by its first bytes.
    pub fn detect(start: &[u8]) -> Self {
        let is = |magic: &[u8]| start.starts_with(magic);
        if is(b"\x1f\x8b") {
            Self::Gzip
        } else if is(b"\xfd7zXZ\0") {
            Self::Xz
        } else if is(b"\x28\xb5\x2f\xfd") {
            Self::Zstd
        } else if is(b"\x02\x21\x4c\x18") {
            Self::Lz4Legacy
        } else if is(b"\x5d\0\0") {
            Self::Lzma
        } else {
            Self::None
        }
    }
}

/// A reader of what `inner` holds compressed.
pub fn reader<'a, R: Read + 'a>(compression: Compression, inner: R) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match compression {
        Compression::None => Box::new(inner),
        Compression::Gzip => Box::new(flate2::read::GzDecoder::new(inner)),
        Compression::Xz => {
            let stream = liblzma::stream::Stream::new_stream_decoder(MEMORY_LIMIT, liblzma::stream::CONCATENATED)
                .map_err(io::Error::other)?;
            Box::new(liblzma::read::XzDecoder::new_stream(inner, stream))
        }
        Compression::Lzma => {
            let stream = liblzma::stream::Stream::new_lzma_decoder(MEMORY_LIMIT).map_err(io::Error::other)?;
            Box::new(liblzma::read::XzDecoder::new_stream(inner, stream))
        }
        Compression::Zstd => {
            let decoder = ruzstd::decoding::StreamingDecoder::new_with_max_window_size(inner, MEMORY_LIMIT)
                .map_err(|e| io::Error::other(e.to_string()))?;
            Box::new(decoder)
        }
        Compression::Lz4Legacy => Box::new(Lz4Legacy::new(inner)),
    })
}

/// Decompresses `bytes` in memory, at most `limit` bytes. Bytes after the end of the compressed stream are ignored, as the
/// kernel's build appends the size there.
pub fn to_vec(compression: Compression, bytes: &[u8], limit: usize) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    let cap = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
    match compression {
        // A second stream would be an error here: what follows is no stream.
        Compression::Xz => {
            let stream = liblzma::stream::Stream::new_stream_decoder(MEMORY_LIMIT, 0).map_err(io::Error::other)?;
            liblzma::read::XzDecoder::new_stream(bytes, stream)
                .take(cap)
                .read_to_end(&mut out)?;
        }
        _ => {
            reader(compression, bytes)?.take(cap).read_to_end(&mut out)?;
        }
    }
    if out.len() > limit {
        return Err(io::Error::other(format!("it is larger than {limit} bytes")));
    }
    Ok(out)
}

/// The legacy LZ4 container: a magic number, then blocks with their compressed length before them, each of 8 MiB at most.
struct Lz4Legacy<R> {
    inner: R,
    started: bool,
    block: Vec<u8>,
    at: usize,
}

const LZ4_BLOCK: usize = 8 << 20;

impl<R: Read> Lz4Legacy<R> {
    fn new(inner: R) -> Self {
        Self {
            inner,
            started: false,
            block: Vec::new(),
            at: 0,
        }
    }

    /// Reads the next block; false at the end.
    fn next_block(&mut self) -> io::Result<bool> {
        let mut word = [0; 4];
        if !self.started {
            self.inner.read_exact(&mut word)?;
            self.started = true;
        }
        let mut compressed = Vec::new();
        let n = (&mut self.inner).take(4).read_to_end(&mut compressed)?;
        let Ok(word) = <[u8; 4]>::try_from(compressed.as_slice()) else {
            return if n == 0 {
                Ok(false)
            } else {
                Err(io::ErrorKind::UnexpectedEof.into())
            };
        };
        let length = u32::from_le_bytes(word);
        compressed.clear();
        // LZ4 grows what it cannot compress by 1/255 at most. Checked below: the size at the very end is no block.
        let most = LZ4_BLOCK + LZ4_BLOCK / 255 + 16;
        let cap = u64::from(length).min(most as u64);
        (&mut self.inner).take(cap).read_to_end(&mut compressed)?;
        if compressed.is_empty() {
            return Ok(false);
        }
        if compressed.len() != usize::try_from(length).unwrap_or(usize::MAX) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "an LZ4 block is cut off or too long",
            ));
        }
        self.block.resize(LZ4_BLOCK, 0);
        let n = lz4_flex::block::decompress_into(&compressed, &mut self.block)
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()))?;
        self.block.truncate(n);
        self.at = 0;
        Ok(n > 0)
    }
}

impl<R: Read> Read for Lz4Legacy<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        if self.at >= self.block.len() && !self.next_block()? {
            return Ok(0);
        }
        let rest = self.block.get(self.at..).unwrap_or_default();
        let n = rest.len().min(buf.len());
        if let (Some(to), Some(from)) = (buf.get_mut(..n), rest.get(..n)) {
            to.copy_from_slice(from);
        }
        self.at += n;
        Ok(n)
    }
}

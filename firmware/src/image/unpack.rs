//! Unpacks what a kernel is packed in: gzip, zstd or lz4, told by the first bytes, into memory of a bounded size.

use std::borrow::Cow;
use std::io::{self, Read};

use flate2::read::GzDecoder;
use ruzstd::decoding::StreamingDecoder;

use super::lz4;

/// Most bytes that a file may unpack to. Linux kernels have a tenth of it.
pub const MAX_UNPACKED: u64 = 512 << 20;

const GZIP: &[u8] = &[0x1F, 0x8B];
const ZSTD: &[u8] = &[0x28, 0xB5, 0x2F, 0xFD];

/// Why a packed file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The packed data are broken.
    #[error("unpacking it as {format}: {source}")]
    Broken {
        /// gzip, zstd or lz4.
        format: &'static str,
        /// Why.
        source: io::Error,
    },
    /// It does not end.
    #[error("it unpacks to more than {limit} bytes", limit = MAX_UNPACKED)]
    TooLarge,
}

/// The contents of `file`: what is packed in it, or the file itself.
///
/// # Errors
/// [`UnpackError`].
pub fn unpack(file: &[u8]) -> Result<Cow<'_, [u8]>, UnpackError> {
    if file.starts_with(GZIP) {
        return read("gzip", GzDecoder::new(file)).map(Cow::Owned);
    }
    if file.starts_with(ZSTD) {
        return zstd(file).map(Cow::Owned);
    }
    if file.starts_with(lz4::MAGIC) {
        let format = "lz4";
        let unpacked = lz4::unpack(file, MAX_UNPACKED).map_err(|source| UnpackError::Broken { format, source })?;
        return within_limit(unpacked).map(Cow::Owned);
    }
    Ok(Cow::Borrowed(file))
}

fn zstd(file: &[u8]) -> Result<Vec<u8>, UnpackError> {
    let head = zstd_head(file);
    let rest = file.get(head.len()..).unwrap_or_default();
    let mut packed = head.as_slice().chain(rest);
    let decoder = StreamingDecoder::new(&mut packed).map_err(|error| UnpackError::Broken {
        format: "zstd",
        source: io::Error::other(error.to_string()),
    })?;
    read("zstd", decoder)
}

/// The first bytes of a frame, with a window that the decoder takes (RFC 8878 3.1.1.1). Linux is packed with a window of
/// 128 MiB and the decoder takes 100: a window only says how far back references go, and in a shorter output they cannot go
/// farther than its start. Where they do go farther, decoding fails.
fn zstd_head(file: &[u8]) -> Vec<u8> {
    /// 96 MiB: 2^(10 + 16) and four eighths of it.
    const WINDOW: u8 = 16 << 3 | 4;
    const SINGLE_SEGMENT: u8 = 1 << 5;
    let mut head = file.get(..6).unwrap_or(file).to_vec();
    if let [_, _, _, _, descriptor, window] = head.as_mut_slice()
        && *descriptor & SINGLE_SEGMENT == 0
    {
        *window = (*window).min(WINDOW);
    }
    head
}

fn read(format: &'static str, decoder: impl Read) -> Result<Vec<u8>, UnpackError> {
    let mut unpacked = Vec::new();
    decoder
        .take(MAX_UNPACKED + 1)
        .read_to_end(&mut unpacked)
        .map_err(|source| UnpackError::Broken { format, source })?;
    within_limit(unpacked)
}

fn within_limit(unpacked: Vec<u8>) -> Result<Vec<u8>, UnpackError> {
    if unpacked.len() as u64 > MAX_UNPACKED {
        return Err(UnpackError::TooLarge);
    }
    Ok(unpacked)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    pub(super) fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd_of(data: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(data, ruzstd::encoding::CompressionLevel::Fastest)
    }

    #[test]
    fn packed_files_are_unpacked() {
        let data: Vec<u8> = (0..300_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        assert_eq!(*unpack(&gzip(&data)).unwrap(), data);
        assert_eq!(*unpack(&zstd_of(&data)).unwrap(), data);
        assert!(matches!(unpack(&data).unwrap(), Cow::Borrowed(same) if same == data));
    }

    #[test]
    fn a_bomb_ends_at_the_limit() {
        // 600 MiB of zeros are half a megabyte.
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        let zeros = vec![0; 1 << 20];
        for _ in 0..=MAX_UNPACKED >> 20 {
            encoder.write_all(&zeros).unwrap();
        }
        assert!(matches!(unpack(&encoder.finish().unwrap()), Err(UnpackError::TooLarge)));
    }

    #[test]
    fn a_window_larger_than_the_decoder_takes_is_narrowed() {
        let mut packed = zstd_of(b"window");
        if packed[4] & 1 << 5 == 0 {
            packed[5] = 17 << 3;
            assert_eq!(*unpack(&packed).unwrap(), *b"window");
        }
        assert_eq!(
            zstd_head(&[0x28, 0xB5, 0x2F, 0xFD, 4, 0x88, 9]),
            [0x28, 0xB5, 0x2F, 0xFD, 4, 0x84]
        );
        assert_eq!(
            zstd_head(&[0x28, 0xB5, 0x2F, 0xFD, 0x24, 0x88]),
            [0x28, 0xB5, 0x2F, 0xFD, 0x24, 0x88]
        );
    }

    proptest! {
        #[test]
        fn broken_files_are_errors(mut data in proptest::collection::vec(any::<u8>(), 0..400), zstd in any::<bool>(), at in any::<prop::sample::Index>(), to in any::<u8>(), cut in any::<prop::sample::Index>()) {
            data.extend_from_slice(&[7; 64]);
            let mut packed = if zstd { zstd_of(&data) } else { gzip(&data) };
            let at = at.index(packed.len());
            packed[at] = to;
            packed.truncate(cut.index(packed.len() + 1));
            // Whatever it is, it ends.
            let _ = unpack(&packed);
        }
    }
}

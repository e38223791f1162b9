//! Unpacks LZ4's legacy frames, which Linux is packed in with CONFIG_KERNEL_LZ4 (lz4 doc/lz4_Frame_format.md, "Legacy frame";
//! doc/lz4_Block_format.md): blocks of up to 8 MiB, each with its packed length before it, up to the end of the data.

use std::io;

/// First bytes of a frame.
pub(super) const MAGIC: &[u8] = &[0x02, 0x21, 0x4C, 0x18];
const BLOCK: usize = 8 << 20;
const LEAST_MATCH: usize = 4;

/// The contents of `frame`, at most `limit` bytes and a block.
pub(super) fn unpack(frame: &[u8], limit: u64) -> io::Result<Vec<u8>> {
    let mut rest = frame.strip_prefix(MAGIC).ok_or_else(|| broken("no legacy frame"))?;
    let mut out = Vec::new();
    while let Some((len, after)) = rest.split_first_chunk::<4>() {
        if len == MAGIC {
            rest = after;
            continue;
        }
        let len = usize::try_from(u32::from_le_bytes(*len)).unwrap_or(usize::MAX);
        let packed = after.get(..len).ok_or_else(|| broken("a block ends behind the data"))?;
        block(packed, &mut out)?;
        if out.len() as u64 > limit {
            break;
        }
        rest = after.get(len..).unwrap_or_default();
    }
    Ok(out)
}

fn broken(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Appends what is packed in `input`.
fn block(mut input: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
    let start = out.len();
    let room = |out: &Vec<u8>, more: usize| {
        let fits = (out.len() - start).checked_add(more).is_some_and(|len| len <= BLOCK);
        fits.then_some(()).ok_or_else(|| broken("a block of more than 8 MiB"))
    };
    while let Some((token, after)) = input.split_first() {
        input = after;
        let literals = length(usize::from(token >> 4), &mut input)?;
        room(out, literals)?;
        let copied = input
            .get(..literals)
            .ok_or_else(|| broken("literals end behind their block"))?;
        out.extend_from_slice(copied);
        input = input.get(literals..).unwrap_or_default();
        let Some((offset, after)) = input.split_first_chunk::<2>() else {
            // The last sequence has literals only.
            return if input.is_empty() {
                Ok(())
            } else {
                Err(broken("half an offset"))
            };
        };
        input = after;
        let back = usize::from(u16::from_le_bytes(*offset));
        let mut len = length(usize::from(token & 15), &mut input)? + LEAST_MATCH;
        room(out, len)?;
        let mut from = out.len().checked_sub(back).filter(|from| back > 0 && *from >= start);
        // What is repeated may reach into what it makes.
        while len > 0 {
            let at = from.ok_or_else(|| broken("an offset before the block"))?;
            let part = len.min(out.len() - at);
            out.extend_from_within(at..at + part);
            len -= part;
            from = Some(at + part);
        }
    }
    Ok(())
}

/// A length whose first four bits are `first`; 15 says that bytes follow, up to one that is not 255.
fn length(first: usize, input: &mut &[u8]) -> io::Result<usize> {
    let mut len = first;
    if first < 15 {
        return Ok(len);
    }
    loop {
        let (byte, after) = input.split_first().ok_or_else(|| broken("half a length"))?;
        *input = after;
        len = len.saturating_add(usize::from(*byte));
        if *byte != 255 {
            return Ok(len);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_frame_is_unpacked() {
        let want = "podvisor ".repeat(50) + "end";
        // 9 literals, a match of 4 + 15 + 255 + 167 = 441 bytes, 3 more literals.
        let block = [b"\x9Fpodvisor \x09\x00\xFF\xA7", &b"\x30end"[..]].concat();
        let packed = [MAGIC, &u32::try_from(block.len()).unwrap().to_le_bytes(), &block].concat();
        assert_eq!(unpack(&packed, 1 << 20).unwrap(), want.as_bytes());
        // Two frames one after the other.
        assert_eq!(
            unpack(&[&packed[..], &packed[..]].concat(), 1 << 20).unwrap().len(),
            2 * want.len()
        );
    }

    #[test]
    fn broken_frames_are_refused() {
        let frame = |block: &[u8]| [MAGIC, &u32::try_from(block.len()).unwrap().to_le_bytes(), block].concat();
        for (block, what) in [
            (&[0x40, 1, 2][..], "literals"),
            (&[0x10, 1, 2], "half an offset"),
            (&[0x10, 1, 2, 0, 0], "before the block"),
            (&[0x10, 1, 0, 0, 0], "before the block"),
            (&[0xF0], "half a length"),
            (&[0x1F, 1, 1, 0, 255], "half a length"),
        ] {
            let error = unpack(&frame(block), 1 << 20).unwrap_err().to_string();
            assert!(error.contains(what), "{block:x?}: {error}");
        }
        let mut long = vec![0x1F, 1, 1, 0];
        long.extend_from_slice(&[255; 40_000]);
        long.push(0);
        assert!(
            unpack(&frame(&long), 1 << 20)
                .unwrap_err()
                .to_string()
                .contains("8 MiB")
        );
        assert!(unpack(&[MAGIC, &[9, 0, 0, 0, 1]].concat(), 9).is_err());
    }

    proptest! {
        #[test]
        fn any_frame_ends(block in proptest::collection::vec(any::<u8>(), 0..300)) {
            let len = u32::try_from(block.len()).unwrap().to_le_bytes();
            let _ = unpack(&[MAGIC, &len, &block].concat(), 1 << 20);
        }
    }
}

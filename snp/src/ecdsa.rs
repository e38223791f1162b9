//! AMD's form of P-384 numbers (72 bytes, little-endian) and the big-endian form that the crypto library takes.

/// Bytes of a P-384 number.
const LEN: usize = 48;

/// Big-endian `LEN` bytes of a little-endian 72-byte number; None when it is too large.
fn big_endian(number: &[u8; 72]) -> Option<[u8; LEN]> {
    let (low, high) = number.split_at(LEN);
    if high.iter().any(|byte| *byte != 0) {
        return None;
    }
    let mut out = [0; LEN];
    for (to, from) in out.iter_mut().zip(low.iter().rev()) {
        *to = *from;
    }
    Some(out)
}

/// The reverse of [`big_endian`]; bytes past `LEN` are not looked at.
fn little_endian(number: &[u8]) -> [u8; 72] {
    let mut out = [0; 72];
    for (to, from) in out.iter_mut().zip(number.iter().take(LEN).rev()) {
        *to = *from;
    }
    out
}

/// The uncompressed point of AMD's X and Y.
pub(crate) fn point(qx: &[u8; 72], qy: &[u8; 72]) -> Option<[u8; 1 + 2 * LEN]> {
    let mut out = [4; 1 + 2 * LEN];
    let (x, y) = out.split_first_mut()?.1.split_at_mut(LEN);
    x.copy_from_slice(&big_endian(qx)?);
    y.copy_from_slice(&big_endian(qy)?);
    Some(out)
}

/// AMD's X and Y of an uncompressed point.
pub(crate) fn coordinates(point: &[u8]) -> ([u8; 72], [u8; 72]) {
    let xy = point.get(1..).unwrap_or(&[]);
    (little_endian(xy), little_endian(xy.get(LEN..).unwrap_or(&[])))
}

/// `r || s`, big-endian, of AMD's signature.
pub(crate) fn fixed_signature(signature: &[u8; 144]) -> Option<[u8; 2 * LEN]> {
    let mut out = [0; 2 * LEN];
    let (r, s) = out.split_at_mut(LEN);
    r.copy_from_slice(&big_endian(signature.first_chunk()?)?);
    s.copy_from_slice(&big_endian(signature.last_chunk()?)?);
    Some(out)
}

/// AMD's R and S of `r || s`.
pub(crate) fn amd_signature(fixed: &[u8]) -> ([u8; 72], [u8; 72]) {
    (little_endian(fixed), little_endian(fixed.get(LEN..).unwrap_or(&[])))
}

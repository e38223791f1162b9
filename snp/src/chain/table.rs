//! The certificate table of extended guest requests (AMD 56421 4.1.8.1): entries of GUID, offset and length, ended by
//! a zero entry, then the certificates. GUIDs are in RFC 4122 (big-endian) order.

/// A GUID in the order of its text form.
pub type Guid = [u8; 16];

const fn guid(value: u128) -> Guid {
    value.to_be_bytes()
}

/// VCEK.
pub const VCEK: Guid = guid(0x63da758d_e664_4564_adc5_f4b93be8accd);
/// ASK.
pub const ASK: Guid = guid(0x4ab7b379_bbac_4fe4_a02f_05aef327c782);
/// ARK.
pub const ARK: Guid = guid(0xc0b406a4_a803_4952_9743_3fb6014cd0ae);

const ENTRY: usize = 24;
/// Most entries that are looked at.
const MAX_ENTRIES: usize = 16;

/// The table of `certificates`.
#[must_use]
pub fn build(certificates: &[(Guid, &[u8])]) -> Vec<u8> {
    let mut offset = ENTRY * (certificates.len() + 1);
    let mut table = Vec::new();
    for (guid, bytes) in certificates {
        table.extend_from_slice(guid);
        for number in [offset, bytes.len()] {
            table.extend_from_slice(&u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes());
        }
        offset += bytes.len();
    }
    table.extend_from_slice(&[0; ENTRY]);
    for (_, bytes) in certificates {
        table.extend_from_slice(bytes);
    }
    table
}

/// A table that is cut short or points outside itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("certificate table: entry {0} is cut short, points outside the table, or is one too many")]
pub struct TableError(pub usize);

/// The certificates of `table`, in order. An empty table has none.
///
/// # Errors
/// [`TableError`] names the entry.
pub fn parse(table: &[u8]) -> Result<Vec<(Guid, &[u8])>, TableError> {
    let mut found = Vec::new();
    for index in 0..=MAX_ENTRIES {
        if table.is_empty() {
            return Ok(found);
        }
        let error = TableError(index);
        let entry: &[u8; ENTRY] = table
            .get(index * ENTRY..)
            .and_then(|rest| rest.first_chunk())
            .ok_or(error)?;
        let (guid, numbers) = entry.split_first_chunk::<16>().ok_or(error)?;
        if *guid == [0; 16] {
            return Ok(found);
        }
        let number = |bytes: Option<&[u8; 4]>| bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes) as usize);
        let (offset, len) = (number(numbers.first_chunk()), number(numbers.last_chunk()));
        let bytes = table.get(offset..).and_then(|rest| rest.get(..len)).ok_or(error)?;
        found.push((*guid, bytes));
    }
    Err(TableError(MAX_ENTRIES))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_reads_back_and_a_bad_one_is_refused() {
        let certificates: [(Guid, &[u8]); 2] = [(VCEK, b"one"), (ARK, b"three")];
        let table = build(&certificates);
        assert_eq!(parse(&table).unwrap(), certificates);
        assert_eq!(table[..4], [0x63, 0xda, 0x75, 0x8d]);
        assert_eq!(parse(&[]).unwrap(), []);
        assert_eq!(parse(&table[..table.len() - 1]), Err(TableError(1)));
        assert_eq!(parse(&table[..30]), Err(TableError(0)));
        assert_eq!(parse(&[1; 24 * 40]), Err(TableError(0)));
        let many = build(&[(VCEK, b"".as_slice()); 17]);
        assert_eq!(parse(&many), Err(TableError(16)));
    }
}

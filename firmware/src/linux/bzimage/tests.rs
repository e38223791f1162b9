//! bzImages made for the tests, one field at a time.

use proptest::prelude::*;

use super::*;

/// A bzImage of two setup sectors and `code` whose fields are those of a Debian kernel.
pub(crate) fn bzimage(code: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 3 * SECTOR];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"MZ");
    put(0x1F1, &[2]);
    put(0x1F4, &u32::try_from(code.len().div_ceil(16)).unwrap().to_le_bytes());
    put(0x1FE, &[0x55, 0xAA, 0xEB, 0x6A]);
    put(0x202, b"HdrS");
    put(0x206, &0x020Fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22C, &0x7FFF_FFFFu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1, 21]);
    put(0x236, &0x7Fu16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x30_0000u32.to_le_bytes());
    file.extend_from_slice(code);
    file
}

fn changed(at: usize, bytes: &[u8]) -> BzImageError {
    let mut file = bzimage(&[0x90; 0x400]);
    file[at..at + bytes.len()].copy_from_slice(bytes);
    BzImage::read(&file).unwrap_err()
}

#[test]
fn the_fields_are_those_of_the_file() {
    let mut code = vec![7; 0x3F8];
    code[0x200] = 9;
    let file = bzimage(&code);
    let image = BzImage::read(&file).unwrap();
    assert_eq!(image.code, code, "the last paragraph may be short");
    assert_eq!(image.setup_header, &file[0x1F1..0x26C]);
    assert_eq!(
        (image.version, image.xloadflags, image.relocatable),
        (0x20F, 0x7F, true)
    );
    assert_eq!(
        (image.pref_address, image.init_size, image.end()),
        (0x100_0000, 0x30_0000, 0x130_0000)
    );
    assert_eq!(
        (image.alignment, image.cmdline_size, image.initrd_addr_max),
        (0x20_0000, 2047, 0x7FFF_FFFF)
    );
    let mut signed = file.clone();
    signed.resize(file.len() + 100, 0xEE);
    let signed = BzImage::read(&signed).unwrap();
    assert!(
        !signed.code.contains(&0xEE) || signed.code.len() <= 0x400,
        "what follows is not the kernel's"
    );
    let mut four = bzimage(&[0x90; 0x400]);
    four[0x1F1] = 0;
    four.resize(5 * SECTOR + 0x400, 3);
    assert_eq!(
        BzImage::read(&four).unwrap().code,
        &four[5 * SECTOR..],
        "no setup sectors are four"
    );
}

#[test]
fn what_cannot_boot_is_told_by_name() {
    let refused = |at, bytes: &[u8], words: &str| {
        let error = changed(at, bytes).to_string();
        assert!(error.contains(words), "{error}");
    };
    refused(0x1FE, &[0], "at 0x1fe it lacks the boot flag");
    refused(0x203, b"X", "magic HdrS");
    refused(4, b"zimg", "EFI zboot");
    refused(0x206, &[0x0B, 2], "protocol is 2.11; 2.12");
    refused(0x236, &[0x7E], "XLF_KERNEL_64");
    refused(0x211, &[0], "LOADED_HIGH");
    refused(0x1F4, &[0, 1], "kernel (syssize) ends at 0x1600, the file at 0xa00");
    refused(0x1F4, &[0xFF; 4], "truncated");
    refused(0x1F4, &[0x20, 0], "behind the 64-bit entry");
    refused(0x201, &[0x61], "jump is 0x61");
    refused(0x201, &[0x8F], "jump is 0x8f");
    refused(0x230, &[1], "kernel_alignment is 0x200001");
    refused(0x258, &[0, 0x10], "pref_address is 0x1001000");
    refused(0x258, &[0; 4], "at or above 1 MiB");
    refused(0x260, &[0xFF, 3, 0], "init_size is 0x3ff");
    let whole = bzimage(&[0x90; 0x400]);
    for len in 0..whole.len() - 15 {
        BzImage::read(&whole[..len]).unwrap_err();
    }
}

proptest! {
    /// Whatever the header says: refused, or all that is handed out lies in the file and keeps the rules.
    #[test]
    fn any_header_is_refused_or_sound(
        changes in prop::collection::vec((0usize..0x290, any::<u8>()), 0..12),
        len in 0usize..0xC00,
    ) {
        let mut file = bzimage(&[0x90; 0x600]);
        for (at, value) in changes {
            file[at] = value;
        }
        file.truncate(len.max(0x300));
        if let Ok(image) = BzImage::read(&file) {
            let bounds = file.as_ptr_range();
            for slice in [image.setup_header, image.code] {
                let range = slice.as_ptr_range();
                prop_assert!(bounds.start <= range.start && range.end <= bounds.end);
            }
            prop_assert!(image.setup_header.len() <= SETUP_HEADER_END - SETUP_HEADER_OFFSET);
            prop_assert!(image.code.len() as u64 > ENTRY_64 && image.code.len() as u64 <= image.init_size);
            prop_assert!(image.alignment.is_power_of_two() && image.pref_address % image.alignment == 0);
            prop_assert!(image.pref_address >= 1 << 20);
        }
    }
}

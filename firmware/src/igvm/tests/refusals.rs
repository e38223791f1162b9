//! Each rule of the reader has a file that breaks it; the error must name the header, its offset and the rule.

use igvm_defs::IgvmVariableHeaderType as Vht;
use zerocopy::IntoBytes;

use super::samples::{RawFile, platform, seal};
use crate::igvm::headers::type_name;
use crate::igvm::{IgvmError, PlanOptions, Reason, plan};
use crate::plan::Platform;

fn refusal(file: &RawFile) -> IgvmError {
    plan(&file.file(), &PlanOptions::default()).unwrap_err()
}

/// `last` is refused, by name, index and offset; returns the reason as text.
fn refused(file: RawFile, typ: Vht, content: &[u8]) -> String {
    let file = file.with(typ.0, content);
    let error = refusal(&file);
    assert_eq!(error.header, type_name(typ));
    assert_eq!(error.index, Some(file.offsets.len() - 1), "{error}");
    assert_eq!(error.offset, *file.offsets.last().unwrap(), "{error}");
    assert!(error.to_string().contains(&format!("file offset {:#x}", error.offset)));
    error.reason.to_string()
}

fn page(gpa: u64, mask: u32, file_offset: u32, flags: u32, data_type: u16, reserved: u16) -> Vec<u8> {
    let mut content = gpa.to_le_bytes().to_vec();
    content.extend_from_slice([mask, file_offset, flags].as_bytes());
    content.extend_from_slice([data_type, reserved].as_bytes());
    content
}

fn u64_and(first: u64, rest: &[u32]) -> Vec<u8> {
    let mut content = first.to_le_bytes().to_vec();
    content.extend_from_slice(rest.as_bytes());
    content
}

fn area(len: u64, index: u32, file_offset: u32) -> Vec<u8> {
    u64_and(len, &[index, file_offset])
}

fn vp(gpa: u64, mask: u32, file_offset: u32, index: u16, reserved: u16) -> Vec<u8> {
    let mut content = u64_and(gpa, &[mask, file_offset]);
    content.extend_from_slice([index, reserved].as_bytes());
    content
}

/// A file with three pages of data at [`RawFile::DATA`].
fn with_data() -> RawFile {
    let mut file = RawFile::snp();
    file.data = vec![0; 3 * 4096];
    file
}

const DATA: u32 = RawFile::DATA;

#[test]
fn types_that_are_not_done_are_named() {
    let words = |n: usize| vec![1u32; n].as_bytes().to_vec();
    for (typ, content, says) in [
        (Vht::IGVM_VHT_RELOCATABLE_REGION, words(10), "relocation"),
        (
            Vht::IGVM_VHT_PAGE_TABLE_RELOCATION_REGION,
            words(8),
            "page table relocation",
        ),
        (Vht::IGVM_VHT_CCA_POLICY, words(8), "CCA"),
        (Vht::IGVM_VHT_VBS_MEASUREMENT, words(8), "VSM isolation"),
        (Vht::IGVM_VHT_DEVICE_TREE, words(2), "device tree"),
        (Vht::RESERVED_DO_NOT_USE, words(2), "reserved"),
        (Vht(0x108), words(2), "unknown header type 0x108"),
        (Vht(0x314), words(2), "unknown header type 0x314"),
        (Vht(0x2FF), words(2), "unknown header type 0x2ff"),
    ] {
        let reason = refused(RawFile::snp(), typ, &content);
        assert!(reason.contains(says), "{typ:?}: {reason}");
        // Marked optional it is passed over.
        let optional = RawFile::snp()
            .with(typ.0 | 1 << 31, &content)
            .with(0x305, &u64_and(0, &[1, 0, 0, 0]));
        assert!(plan(&optional.file(), &PlanOptions::default()).is_ok(), "{typ:?}");
    }
    // What is for another platform does not concern this one.
    let other = |typ: Vht| {
        let mut content = words(8);
        content[0] = 2;
        plan(&RawFile::snp().with(typ.0, &content).file(), &PlanOptions::default()).is_ok()
    };
    for typ in [
        Vht::IGVM_VHT_RELOCATABLE_REGION,
        Vht::IGVM_VHT_PAGE_TABLE_RELOCATION_REGION,
        Vht::IGVM_VHT_CCA_POLICY,
        Vht::IGVM_VHT_VBS_MEASUREMENT,
    ] {
        assert!(other(typ), "{typ:?}");
    }
    let vbs_context = with_data().with(0x304, &vp(0, 2, DATA, 0, 0));
    assert!(
        plan(&vbs_context.file(), &PlanOptions::default())
            .unwrap()
            .vps
            .is_empty()
    );
}

#[test]
fn what_a_launch_ignores_is_still_checked() {
    let corim = |mask: u32, offset: u32, len: u32, reserved: u32| [mask, offset, len, reserved].as_bytes().to_vec();
    let good = with_data()
        .with(0x104, &corim(1, DATA, 100, 0))
        .with(0x105, &corim(1, DATA, 100, 0))
        .with(0x107, b"v1.2");
    assert!(plan(&good.file(), &PlanOptions::default()).is_ok());
    for typ in [Vht(0x104), Vht(0x105)] {
        assert!(refused(with_data(), typ, &corim(1, DATA, 0x4000, 0)).contains("file data"));
        assert!(refused(with_data(), typ, &corim(4, DATA, 1, 0)).contains("compatibility_mask"));
        assert!(refused(with_data(), typ, &corim(1, DATA, 1, 9)).contains("reserved"));
    }
    assert!(refused(RawFile::snp(), Vht::IGVM_VHT_VERSION_STRING, b"ab\xFF").contains("UTF-8"));
    assert!(refused(good, Vht::IGVM_VHT_VERSION_STRING, b"again").contains("already"));
}

#[test]
fn pages() {
    let typ = Vht::IGVM_VHT_PAGE_DATA;
    for (content, says) in [
        (page(0x1001, 1, 0, 0, 0, 0), "gpa is 0x1001"),
        (page(1 << 52, 1, 0, 0, 0, 0), "2^52"),
        (page(u64::MAX - 4095, 1, 0, 0, 0, 0), "2^52"),
        (page(0x1000, 1, 0, 1, 0, 0), "2 MiB pages"),
        (page(0x1000, 1, 0, 8, 0, 0), "flags is 0x8"),
        (page(0x1000, 1, 0, 0, 4, 0), "data_type is 0x4"),
        (page(0x1000, 1, 0, 4, 1, 0), "data_type is 0x1"),
        (page(0x1000, 1, 0, 0, 0, 1), "reserved is 0x1"),
        (page(0x1000, 0, 0, 0, 0, 0), "compatibility_mask is 0x0"),
        (page(0x1000, 5, 0, 0, 0, 0), "compatibility_mask is 0x5"),
        (page(0x1000, 1, 8, 0, 0, 0), "file data 0x8+0x1000"),
        (page(0x1000, 1, DATA + 0x2001, 0, 0, 0), "file data"),
        (page(0x1000, 1, u32::MAX, 0, 0, 0), "file data"),
        (vec![0; 16], "the content has 16 bytes; the type has 24"),
    ] {
        let reason = refused(with_data(), typ, &content);
        assert!(reason.contains(says), "{reason}");
    }
}

#[test]
fn overlaps() {
    let first = with_data()
        .with(0x302, &page(0x5000, 1, 0, 0, 0, 0))
        .with(0x301, &area(0x2000, 3, 0));
    let index = 2;
    let says = |reason: String| assert!(reason.contains(&format!("overlaps that of header {index}")), "{reason}");
    says(refused(
        first.clone(),
        Vht::IGVM_VHT_PAGE_DATA,
        &page(0x5000, 3, 0, 0, 0, 0),
    ));
    says(refused(
        first.clone(),
        Vht::IGVM_VHT_PARAMETER_INSERT,
        &u64_and(0x4000, &[1, 3]),
    ));
    says(refused(
        first.clone(),
        Vht::IGVM_VHT_ERROR_RANGE,
        &u64_and(0x5000, &[1, 0x1000]),
    ));
    says(refused(
        first.clone(),
        Vht::IGVM_VHT_VP_CONTEXT,
        &vp(0x5000, 1, DATA, 0, 0),
    ));
    // Not with another platform's page.
    let other = first.with(0x302, &page(0x5000, 2, 0, 0, 0, 0));
    assert!(plan(&other.file(), &PlanOptions::default()).is_ok());
}

#[test]
fn parameters() {
    let areas = || RawFile::snp().with(0x301, &area(0x1000, 5, 0));
    let parameter = |index: u32, offset: u32| [index, offset].as_bytes().to_vec();
    for (content, says) in [
        (area(0, 1, 0), "number_of_bytes"),
        (area(0x1001, 1, 0), "number_of_bytes"),
        (area(1 << 40, 1, 0), "number_of_bytes is 0x10000000000"),
        (area(0x1000, 5, 0), "parameter area 0x5 was already given"),
        (area(0x1000, 1, 8), "file data"),
    ] {
        let reason = refused(areas(), Vht::IGVM_VHT_PARAMETER_AREA, &content);
        assert!(reason.contains(says), "{reason}");
    }
    for (typ, size) in [
        (0x307, 4),
        (0x308, 36),
        (0x309, 36),
        (0x30A, 32),
        (0x30C, 24),
        (0x30E, 1),
        (0x30F, 36),
        (0x310, 36),
        (0x313, 4),
    ] {
        let fits = areas().with(typ, &parameter(5, 0x1000 - size));
        assert!(plan(&fits.file(), &PlanOptions::default()).is_ok());
        assert!(refused(areas(), Vht(typ), &parameter(5, 0x1001 - size)).contains("does not fit"));
        assert!(refused(areas(), Vht(typ), &parameter(5, u32::MAX)).contains("does not fit"));
        assert!(refused(areas(), Vht(typ), &parameter(6, 0)).contains("parameter area 6 was not declared"));
        let inserted = areas().with(0x303, &u64_and(0x1000, &[1, 5]));
        assert!(refused(inserted, Vht(typ), &parameter(5, 0)).contains("already inserted"));
    }
    let insert = Vht::IGVM_VHT_PARAMETER_INSERT;
    assert!(refused(areas(), insert, &u64_and(0x1000, &[1, 6])).contains("not declared"));
    assert!(refused(areas(), insert, &u64_and(0x1001, &[1, 5])).contains("gpa is 0x1001"));
    let inserted = areas().with(0x303, &u64_and(0x1000, &[1, 5]));
    assert!(refused(inserted, insert, &u64_and(0x9000, &[1, 5])).contains("already inserted"));
    let many = (0..1024).fold(areas(), |file, _| file.with(0x307, &parameter(5, 0)));
    assert!(refused(many, Vht(0x307), &parameter(5, 0)).contains("at most 1024"));
}

#[test]
fn contexts_policies_ranges_and_id_blocks() {
    let typ = Vht::IGVM_VHT_VP_CONTEXT;
    assert!(refused(with_data(), typ, &vp(0, 1, 0, 0, 0)).contains("needs file data"));
    assert!(refused(with_data(), typ, &vp(0, 1, DATA + 0x2800, 0, 0)).contains("file data"));
    assert!(refused(with_data(), typ, &vp(7, 1, DATA, 0, 0)).contains("gpa is 0x7"));
    assert!(refused(with_data(), typ, &vp(0, 1, DATA, 0, 1)).contains("reserved"));
    let once = with_data().with(0x304, &vp(0xFFFF_FFFF_F000, 1, DATA, 3, 0));
    assert!(refused(once, typ, &vp(0xFFFF_FFFF_F000, 1, DATA, 3, 0)).contains("vp_index 0x3 was already given"));

    let policy = Vht::IGVM_VHT_GUEST_POLICY;
    assert!(refused(RawFile::snp(), policy, &u64_and(0x3_0000, &[1, 1])).contains("reserved"));
    let once = RawFile::snp().with(0x101, &u64_and(0x3_0000, &[1, 0]));
    assert!(refused(once, policy, &u64_and(0x3_0000, &[3, 0])).contains("guest policy 0x30000 was already given"));

    let required = Vht::IGVM_VHT_REQUIRED_MEMORY;
    assert!(refused(RawFile::snp(), required, &u64_and(0, &[1, 0x1001, 0, 0])).contains("number_of_bytes"));
    assert!(refused(RawFile::snp(), required, &u64_and(0, &[1, 0x1000, 1, 0])).contains("VTL 2"));
    assert!(refused(RawFile::snp(), required, &u64_and(0, &[1, 0x1000, 2, 0])).contains("flags"));
    assert!(refused(RawFile::snp(), required, &u64_and(0, &[1, 0x1000, 0, 1])).contains("reserved"));
    assert!(refused(RawFile::snp(), Vht::IGVM_VHT_ERROR_RANGE, &u64_and(0, &[1, 1])).contains("size_bytes"));

    let id = |at: usize, value: u8| {
        let mut content = vec![0; 696];
        content[0] = 1;
        content[at] = value;
        content
    };
    let typ = Vht::IGVM_VHT_SNP_ID_BLOCK;
    assert!(refused(RawFile::snp(), typ, &id(4, 2)).contains("author_key_enabled"));
    assert!(refused(RawFile::snp(), typ, &id(6, 2)).contains("reserved"));
    assert!(refused(RawFile::snp(), typ, &id(252, 1)).contains("public key reserved"));
    assert!(refused(RawFile::snp().with(0x30B, &id(0, 1)), typ, &id(0, 1)).contains("already given"));
}

#[test]
fn native_contexts() {
    let mut file = RawFile {
        data: vec![0; 4096],
        ..RawFile::default()
    }
    .with(1, &platform(1, 0));
    file.data[4095] = 1;
    assert!(refused(file, Vht::IGVM_VHT_VP_CONTEXT, &vp(0, 1, DATA, 0, 0)).contains("context padding"));
}

#[test]
fn platform_headers() {
    let typ = Vht::IGVM_VHT_SUPPORTED_PLATFORM;
    let raw = |mask: u32, vtl: u8, platform_type: u8, version: u16, boundary: u64| {
        let mut content = mask.to_le_bytes().to_vec();
        content.extend_from_slice(&[vtl, platform_type]);
        content.extend_from_slice(&version.to_le_bytes());
        content.extend_from_slice(&boundary.to_le_bytes());
        content
    };
    let none = RawFile::default;
    assert!(refused(none(), typ, &raw(3, 0, 2, 1, 0)).contains("exactly one bit"));
    assert!(refused(none(), typ, &raw(0, 0, 2, 1, 0)).contains("exactly one bit"));
    assert!(refused(none(), typ, &raw(1, 2, 2, 1, 0)).contains("highest_vtl"));
    assert!(refused(none(), typ, &raw(1, 0, 2, 2, 0)).contains("platform_version"));
    assert!(refused(none(), typ, &raw(1, 0, 2, 1, 1 << 46)).contains("shared_gpa_boundary"));
    assert!(refused(RawFile::snp(), typ, &raw(2, 0, 3, 1, 0)).contains("compatibility_mask 0x2 was already given"));
    assert!(refused(RawFile::snp(), typ, &raw(4, 0, 2, 1, 0)).contains("platform_type 0x2 was already given"));

    let tdx = none().with(1, &platform(1, 3));
    assert_eq!(
        refusal(&tdx).reason,
        Reason::NoPlatform {
            wanted: "SEV_SNP or NATIVE",
            has: "TDX".into()
        },
    );
    let native = PlanOptions {
        platform: Some(Platform::Native),
        ..PlanOptions::default()
    };
    let reason = plan(&RawFile::snp().file(), &native).unwrap_err().reason;
    assert_eq!(
        reason,
        Reason::NoPlatform {
            wanted: "NATIVE",
            has: "SEV_SNP, VSM_ISOLATION".into()
        }
    );
}

#[test]
fn sections_keep_their_order() {
    let directive = RawFile::snp().with(0x305, &u64_and(0, &[1, 0, 0, 0]));
    assert!(
        refused(directive.clone(), Vht::IGVM_VHT_GUEST_POLICY, &u64_and(0, &[1, 0])).contains("initialization headers")
    );
    assert!(refused(directive, Vht::IGVM_VHT_SUPPORTED_PLATFORM, &platform(4, 3)).contains("platform headers"));
}

#[test]
fn framing() {
    // Padding that is not zero.
    let mut file = RawFile::snp()
        .with(0x107, b"abc")
        .with(0x305, &u64_and(0, &[1, 0, 0, 0]));
    let at = file.offsets[2] as usize - 24 + 8 + 3;
    file.headers[at] = 7;
    let error = refusal(&file);
    assert_eq!(
        (error.header, error.offset),
        ("IGVM_VHT_VERSION_STRING", file.offsets[2])
    );
    assert!(error.to_string().contains("padding is 0x7"));
    // A length that runs out of the section.
    let mut file = RawFile::snp();
    let at = file.headers.len() - 16 - 4;
    file.headers[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
    let error = refusal(&file);
    assert_eq!((error.index, error.offset), (Some(1), file.offsets[1]));
    assert!(matches!(
        error.reason,
        Reason::Truncated {
            what: "content",
            needed: 0x1_0000_0007,
            have: 24
        }
    ));
    // Half a header at the end.
    let mut file = RawFile::snp();
    file.headers.extend_from_slice(&[1, 0, 0, 0]);
    assert!(matches!(
        refusal(&file).reason,
        Reason::Truncated {
            what: "type and length",
            ..
        }
    ));
}

#[test]
fn fixed_header() {
    let good = with_data().file();
    let reason = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut file = good.clone();
        change(&mut file);
        let error = plan(&file, &PlanOptions::default()).unwrap_err();
        assert_eq!((error.header, error.index, error.offset), ("fixed header", None, 0));
        error.reason.to_string()
    };
    assert!(reason(&|f| f.truncate(23)).contains("needs 24 bytes, 23 are left"));
    assert!(reason(&|f| f.clear()).contains("0 are left"));
    assert!(reason(&|f| f[0] = b'X').contains("magic"));
    assert!(reason(&|f| f[4] = 3).contains("format_version is 0x3"));
    assert!(reason(&|f| f.push(0)).contains("total_file_size"));
    assert!(reason(&|f| f[8] = 16).contains("variable_header_offset"));
    assert!(reason(&|f| f[8] = 28).contains("variable_header_offset"));
    assert!(reason(&|f| f[15] = 0xFF).contains("variable_header_size"));
    assert!(reason(&|f| f[30] ^= 1).contains("checksum"));
    assert!(reason(&|f| f[20] ^= 1).contains("checksum"));

    let mut v2 = RawFile {
        v2: true,
        ..RawFile::default()
    }
    .with(1, &platform(1, 2))
    .file();
    assert!(plan(&v2, &PlanOptions::default()).is_ok());
    v2[24] = 1;
    seal(&mut v2);
    assert!(
        plan(&v2, &PlanOptions::default())
            .unwrap_err()
            .to_string()
            .contains("AARCH64")
    );
    v2[24] = 0;
    v2[29] = 0x40;
    seal(&mut v2);
    assert!(
        plan(&v2, &PlanOptions::default())
            .unwrap_err()
            .to_string()
            .contains("page_size is 0x4000")
    );
}

#[test]
fn headers_beyond_count_are_refused() {
    let mut file = RawFile::snp();
    let optional = [0x8000_0FFFu32, 0].as_bytes().repeat(crate::igvm::MAX_HEADERS - 2);
    file.headers.extend_from_slice(&optional);
    assert!(plan(&file.file(), &PlanOptions::default()).is_ok());
    file.headers.extend_from_slice(&optional[..8]);
    assert!(refusal(&file).to_string().contains("at most 2097152"));
}

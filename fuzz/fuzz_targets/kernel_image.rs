//! Any bytes as a kernel: unpacked, read as bzImage or ELF, put into an image; what is accepted reads back from the image.
#![no_main]
use libfuzzer_sys::fuzz_target;
use podvisor_firmware::image::read::{Payloads, read};
use podvisor_firmware::image::{ImageMachine, ImageOptions, Kernel, LinuxImage, Shim, Unpacking, unpack};
use podvisor_firmware::plan::Platform;
use podvisor_firmware::stage0::abi;

fn sum(bytes: &[u8]) -> [u8; 32] {
    let mut digest = [0u8; 32];
    for (at, byte) in bytes.iter().enumerate() {
        digest[at % 32] = digest[at % 32].wrapping_mul(31).wrapping_add(*byte);
    }
    digest
}

fuzz_target!(|data: &[u8]| {
    let Ok(file) = unpack(data) else { return };
    for unpacking in [Unpacking::ByGuest, Unpacking::Now] {
        let Ok(kernel) = Kernel::read(&file, unpacking) else { continue };
        let options = ImageOptions {
            shim: Shim { image: &[0xF4; 100], entry: abi::STAGE0_START, memory_end: abi::STAGE0_START + 0x1000 },
            command_line: "quiet",
            machine: ImageMachine { max_vcpus: 1, segments: 1, memory_slots: None },
            policy: 0x3_0000,
            measure_all: false,
        };
        let Ok(image) = LinuxImage::new(&kernel, b"initrd", options, &sum) else { continue };
        for platform in [Platform::Native, Platform::SevSnp] {
            let plan = image.plan(platform).expect("what was placed for SNP has a plan");
            let found = read(&plan, &sum).expect("the manifest is whole").expect("it is there");
            assert_eq!(found.payloads, Payloads::Match);
        }
    }
});

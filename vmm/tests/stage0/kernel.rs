//! A "kernel" of a few instructions for stage0 to boot: it writes what it was given to the serial port, byte by byte, wakes
//! the other processors, and powers off. `Told` reads what it wrote.
#![expect(unsafe_code, reason = "the kernel's bytes lie between two symbols")]

use std::arch::global_asm;

// `rep outsb` of RCX bytes at RSI is all of its I/O. Position-independent: the code is data here.
global_asm!(
    ".section .rodata.kernel, \"a\"",
    ".globl tiny_kernel, tiny_kernel_end",
    "tiny_kernel:",
    ".fill 0x200, 1, 0xCC",
    "mov rbx, rsi", // boot_params
    "mov rsp, rsi", // nothing below it is needed any more
    "cld",
    "mov edx, 0x3F8",
    "mov ecx, 4096",
    "rep outsb",
    "mov rsi, [rbx + 0x70]", // RSDP
    "mov rdi, rsi",
    "mov ecx, 36",
    "rep outsb",
    "mov rsi, [rdi + 24]", // XSDT
    "mov rdi, rsi",
    "mov ecx, [rsi + 4]",
    "rep outsb",
    "lea rbp, [rdi + 36]", // its three tables
    "mov r8d, 3",
    "2: mov rsi, [rbp]",
    "mov rdi, rsi",
    "mov ecx, [rsi + 4]",
    "rep outsb",
    "cmp dword ptr [rdi], 0x50434146", // of a FADT the DSDT too
    "jne 3f",
    "mov rsi, [rdi + 140]",
    "mov ecx, [rsi + 4]",
    "rep outsb",
    "3: add rbp, 8",
    "dec r8d",
    "jnz 2b",
    "mov esi, [rbx + 0x218]", // initrd
    "mov ecx, [rbx + 0x21C]",
    "rep outsb",
    "mov esi, [rbx + 0x228]", // command line, with its NUL
    "4: mov al, [rsi]",
    "out dx, al",
    "inc rsi",
    "test al, al",
    "jnz 4b",
    // With a command line that begins with 'S': SEV_STATUS.
    "mov esi, [rbx + 0x228]",
    "cmp byte ptr [rsi], 'S'",
    "jne 5f",
    "mov ecx, 0xC0010131",
    "rdmsr",
    "mov edx, 0x3F8",
    "out dx, al",
    // The others, as many as the second byte of the command line says: each adds one to a byte.
    "5: movzx r8d, byte ptr [rsi + 1]",
    "sub r8d, '0'",
    "jz 8f",
    "lea rsi, [rip + 7f]",
    "mov edi, 0x7000",
    "mov ecx, 32",
    "rep movsb",
    "mov byte ptr [0x7800], 0",
    "mov ecx, 0xFEE00300",
    "mov dword ptr [rcx], 0xC4500",
    "mov dword ptr [rcx], 0xC4607",
    "6: pause",
    "cmp byte ptr [0x7800], r8b",
    "jb 6b",
    "8: mov edx, 0x3F8",
    "mov al, '.'",
    "out dx, al",
    "mov edx, 0x600",
    "mov al, 0x34",
    "out dx, al",
    "9: hlt",
    "jmp 9b",
    // Real mode at 0700:0000: lock inc byte ptr cs:[0x800]; hlt.
    "7: .byte 0x2E, 0xF0, 0xFE, 0x06, 0x00, 0x08",
    ".byte 0xFA, 0xF4, 0xEB, 0xFD",
    ".fill 32, 1, 0",
    "tiny_kernel_end:",
    ".text",
);

unsafe extern "C" {
    static tiny_kernel: u8;
    static tiny_kernel_end: u8;
}

/// The kernel as the payload of an image; its entry point is at 0x200.
pub(crate) fn kernel() -> Vec<u8> {
    let (start, end) = (&raw const tiny_kernel, &raw const tiny_kernel_end);
    // SAFETY: both symbols are of one object in read-only memory.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }.to_vec()
}

/// What the kernel wrote.
pub(crate) struct Told {
    pub(crate) boot_params: Vec<u8>,
    pub(crate) rsdp: Vec<u8>,
    /// XSDT, FADT, DSDT, MADT, MCFG.
    pub(crate) tables: Vec<Vec<u8>>,
    pub(crate) initrd: Vec<u8>,
    pub(crate) command_line: String,
    /// What came behind the command line.
    pub(crate) rest: Vec<u8>,
}

pub(crate) fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub(crate) fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

impl Told {
    pub(crate) fn read(serial: &[u8]) -> Self {
        let mut left = serial;
        let mut take = |len: usize| {
            assert!(
                left.len() >= len,
                "the kernel wrote {} bytes: {:?}",
                serial.len(),
                String::from_utf8_lossy(&serial[..serial.len().min(200)])
            );
            let (taken, rest) = left.split_at(len);
            left = rest;
            taken.to_vec()
        };
        let boot_params = take(4096);
        let rsdp = take(36);
        let mut tables = Vec::new();
        for _ in 0..5 {
            let mut table = take(8);
            table.extend(take(word(&table, 4) as usize - 8));
            tables.push(table);
        }
        let initrd = take(word(&boot_params, 0x21C) as usize);
        let end = left.iter().position(|byte| *byte == 0).unwrap();
        Self {
            boot_params,
            rsdp,
            tables,
            initrd,
            command_line: String::from_utf8(left[..end].to_vec()).unwrap(),
            rest: left[end + 1..].to_vec(),
        }
    }

    /// The E820 table: start, end, type.
    pub(crate) fn e820(&self) -> Vec<(u64, u64, u32)> {
        (0..usize::from(self.boot_params[0x1E8]))
            .map(|index| 0x2D0 + index * 20)
            .map(|at| {
                let start = long(&self.boot_params, at);
                (
                    start,
                    start + long(&self.boot_params, at + 8),
                    word(&self.boot_params, at + 16),
                )
            })
            .collect()
    }
}

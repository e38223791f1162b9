# The ring-0 part of the pod guest. Entry is 32-bit protected mode, paging off, EBX = platform (0 native, 1 SEV-SNP).
# It is short because ring 0 may be interpreted instruction by instruction; the body runs in ring 3 with IOPL 3.
# Everything here is at known offsets of boot_start = 0x200000, so descriptors are assembled, not computed.

    .section .boot, "awx"
    .balign 4096
    .set BASE, 0x200000
    .set CPUID_PAGE, 0x100000
boot_start:

    .code32
    .globl _start
_start:
    lock btsl $0, started           # a second processor that gets here waits for ever
    jc park
    xorl %edi, %edi                 # EDI: C-bit position, 0 when there is none
    xorl %esi, %esi                 # ESI: 1 when the processor is emulated
    testl %ebx, %ebx
    jz 3f
    movl CPUID_PAGE, %ecx           # the CPUID page is checked by the firmware; still never trust the count
    cmpl $64, %ecx
    ja park
    movl $(CPUID_PAGE + 16), %ebp
1:  subl $1, %ecx
    jb 2f
    movl (%ebp), %eax
    movl 28(%ebp), %edx
    addl $48, %ebp
    cmpl $0x40000100, %eax
    je 5f
    cmpl $0x8000001F, %eax
    jne 1b
    movl %edx, %edi
    andl $63, %edi
    jmp 1b
5:  cmpl $0x76646F50, %edx          # "Podv": emulated, it has no C-bit
    jne 1b
    incl %esi
    jmp 1b
2:  testl %esi, %esi
    jz 6f
    xorl %edi, %edi
    jmp 3f
6:  leal -32(%edi), %ecx            # hardware: put the C-bit into every leaf
    cmpl $31, %ecx
    ja park
    xorl %edx, %edx
    btsl %ecx, %edx
    movl $pages, %ebp
7:  orl %edx, 4(%ebp)
    addl $8, %ebp
    cmpl $pages_end, %ebp
    jb 7b
    orl %edx, pml4 + 4
    orl %edx, pdpt + 4

3:  movl %cr4, %eax
    orl $0x620, %eax                # PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $pml4, %eax
    movl %eax, %cr3
    movl $0xC0000080, %ecx
    rdmsr
    orl $0x100, %eax                # EFER.LME
    wrmsr
    movl %cr0, %eax
    andl $0xFFFFFFF3, %eax          # EM, TS off
    orl $0x80010022, %eax           # PG, WP, NE, MP
    movl %eax, %cr0
    lgdt gdt_pointer
    ljmp $8, $long_mode

park:
    hlt
    jmp park

    .code64
long_mode:
    lidt idt_pointer
    movw $0x28, %ax
    ltr %ax
    movl $ring0_stack_end - 40, %esp
    movl %edi, %edx
    movl %ebx, %edi
    iretq                           # into ring3_start(platform, emulated, c_bit)

# What ring 3 asks of ring 0 (src/ring0.rs): INT3 with the service in EAX. (INT n and SYSCALL of ring 3 are not reliable
# on hypervisors that interpret ring 0; exceptions are.)
service:
    jmpq *services(,%rax,8)
service_rdmsr:                      # ECX -> EDX:EAX
    rdmsr
    iretq
service_wrmsr:                      # ECX, EDX:ESI
    movl %esi, %eax
    wrmsr
    iretq
service_ghcb_emulated:              # ECX = the GHCB MSR, EDX:ESI -> EDX:EAX
    movl %esi, %eax
    wrmsr
    rdmsr
    iretq
service_ghcb:                       # the same on hardware
    movl %esi, %eax
    wrmsr
    rep vmmcall
    rdmsr
    iretq
service_halt:                       # sleeps until an interrupt
    sti
    hlt
    cli
    iretq
service_pvalidate:                  # RDI, ECX = size, EDX = validate -> EAX, EDX = carry
    movq %rdi, %rax
    .byte 0xF2, 0x0F, 0x01, 0xFF
    setc %dl
    movzbl %dl, %edx
    iretq
service_flush:                      # after page table changes
    movq %cr3, %rax
    movq %rax, %cr3
    iretq

interrupt:                          # the one message-signalled vector, taken in service_halt only: end of interrupt
    pushq %rax
    movl $0xFEE000B0, %eax
    movl $0, (%rax)
    popq %rax
    iretq
spurious:
    iretq

# Exceptions 0..31 end here: ring3_exception(vector, three words of the frame, CR2) on a fresh stack.
    .balign 8
exceptions:
    .set vector, 0
    .rept 32
    .balign 8
    pushq $vector
    jmp exception
    .set vector, vector + 1
    .endr
    .balign 8
exception:
    popq %rdi
    popq %rsi
    popq %rdx
    popq %rcx
    movq %cr2, %r8
    movl $exception_frame, %esp
    iretq

    .globl ring3_entry
ring3_entry:
    xorl %ebp, %ebp
    call ring3_start
    ud2
exception_entry:
    call ring3_exception
    ud2

    .balign 16
gdt:
    .quad 0
    .quad 0x00209A0000000000        # 0x08 ring-0 code, 64-bit
    .quad 0x0000920000000000        # 0x10 ring-0 data
    .quad 0x0000F20000000000        # 0x18 ring-3 data
    .quad 0x0020FA0000000000        # 0x20 ring-3 code, 64-bit
    .set TSS, BASE + (tss - boot_start)
    .word tss_end - tss - 1, TSS & 0xFFFF   # 0x28 TSS
    .byte (TSS >> 16) & 0xFF, 0x89, 0, TSS >> 24
    .quad 0
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
    .balign 8
idt_pointer:
    .word 0x5F * 16 - 1
    .quad idt

    .balign 16
tss:
    .long 0
    .quad ring0_stack_end
    .fill 90, 1, 0
    .word 104
    .fill 256, 1, 0                 # I/O ports 0..0x7FF are ring 3's
    .byte 0xFF
tss_end:

    .balign 8
services:
    .quad service_rdmsr, service_wrmsr, service_ghcb_emulated, service_ghcb, service_halt, service_pvalidate
    .quad service_flush

    .macro gate target, dpl
    .set G, BASE + (\target - boot_start)
    .word G & 0xFFFF, 8
    .byte 0, 0x8E | (\dpl << 5)
    .word G >> 16
    .quad 0
    .endm

    .balign 16
idt:
    .set vector, 0
    .rept 32
    .if vector == 3
    .set G, BASE + (service - boot_start)
    .else
    .set G, BASE + (exceptions - boot_start) + vector * 8
    .endif
    .word G & 0xFFFF, 8
    .byte 0, 0x8E | ((vector == 3) & 0x60)
    .word G >> 16
    .quad 0
    .set vector, vector + 1
    .endr
    .fill 0x30 * 16, 1, 0
    gate interrupt, 0               # 0x50
    .fill 13 * 16, 1, 0
    gate spurious, 0                # 0x5E

    .balign 16
exception_frame:
    .quad exception_entry, 0x23, 0x3002, ring3_stack_end, 0x1B
started:
    .long 0
    .balign 16
    .fill 472, 1, 0
    .quad ring3_entry, 0x23, 0x3002, ring3_stack_end, 0x1B   # the frame of the first iretq
ring0_stack_end:

# Identity map of the first GiB in 2 MiB pages, user accessible. Ring 3 adds what else it needs (src/paging.rs).
    .balign 4096
    .globl pml4
pml4:
    .quad pdpt + 0x27
    .fill 511, 8, 0
pdpt:
    .quad pages + 0x27
    .fill 511, 8, 0
    .globl pages
pages:
    .set frame, 0
    .rept 512
    .quad (frame << 21) | 0xE7
    .set frame, frame + 1
    .endr
pages_end:

    .section .bss.stack, "aw", @nobits
    .balign 4096
ring3_stack:
    .skip 0x8000
ring3_stack_end:

# Entry and ring-0 tables of stage0. Entry is 32-bit protected mode, paging off, EBX = platform (0 native, 1 SEV-SNP): on
# an encrypted guest every access without paging is to private memory. Nothing here trusts what the host gave but the CPUID
# page's leaf 0x8000001F, which the firmware checks.

    .section .boot, "awx"
    .set CPUID_PAGE, 0x100000
    .set PAGES, 0x1000

    .code32
    .globl _start
_start:
    cli
    cld
    xorl %edi, %edi                 # EDI: mask of the C-bit in the high half of an entry
    xorl %esi, %esi                 # ESI: 0 native, 1 emulated, 2 hardware
    testl %ebx, %ebx
    jz 3f
    movl $2, %esi
    movl CPUID_PAGE, %ecx
    cmpl $64, %ecx
    ja refuse_cpuid
    movl $(CPUID_PAGE + 16), %ebp
1:  subl $1, %ecx
    jb 2f
    movl (%ebp), %eax
    movl 28(%ebp), %edx             # EBX of the leaf
    addl $48, %ebp
    cmpl $0x40000100, %eax
    je 4f
    cmpl $0x8000001F, %eax
    jne 1b
    movl %edx, %edi
    jmp 1b
4:  cmpl $0x76646F50, %edx          # "Podv": says that it is emulated; probed below
    jne 1b
    movl $1, %esi
    jmp 1b
2:  cmpl $1, %esi
    je 6f
    andl $63, %edi
    leal -32(%edi), %ecx
    cmpl $19, %ecx                  # bits 32 to 51 of an address
    ja refuse_cpuid
    xorl %edi, %edi
    btsl %ecx, %edi
    jmp 7f

6:  xorl %edi, %edi                 # emulated: no C-bit; the validation MSR takes 2^order pages
    movl $file_end, %ebp
8:  movl $accepted_end, %eax
    subl %ebp, %eax
    jz 3f
    shrl $12, %eax
    bsrl %eax, %ecx                 # largest order that fits
    movl $PAGES, %edx
    shll %cl, %edx
    leal 1(,%ecx,2), %eax
    orl %ebp, %eax
    addl %edx, %ebp
    xorl %edx, %edx
    movl $0x504F4456, %ecx
    wrmsr
    rdmsr
    testl $0x1FF, %eax
    jnz refuse_accept
    jmp 8b

7:  movl $file_end, %ebp            # hardware: PVALIDATE of each page
9:  cmpl $accepted_end, %ebp
    jae 3f
    movl %ebp, %eax
    xorl %ecx, %ecx
    movl $1, %edx
    .byte 0xF2, 0x0F, 0x01, 0xFF
    jc refuse_accept                # valid already: the host mapped it twice
    testl %eax, %eax
    jnz refuse_accept
    addl $PAGES, %ebp
    jmp 9b

3:  movl %edi, %edx                 # EDX: mask of the C-bit
    movl $file_end, %edi
    movl $bss_end, %ecx
    subl %edi, %ecx
    shrl $2, %ecx
    xorl %eax, %eax
    rep stosl

    # Identity map of the first 4 GiB in 2 MiB pages.
    movl $(pdpt + 3), pml4
    movl %edx, pml4 + 4
    movl $pdpt, %edi
    movl $(pages + 3), %eax
    movl $4, %ecx
5:  movl %eax, (%edi)
    movl %edx, 4(%edi)
    addl $PAGES, %eax
    addl $8, %edi
    loop 5b
    movl $pages, %edi
    movl $0x83, %eax
    movl $2048, %ecx
5:  movl %eax, (%edi)
    movl %edx, 4(%edi)
    addl $0x200000, %eax
    addl $8, %edi
    loop 5b
    movl %edx, c_bit + 4

    movl %cr4, %eax
    orl $0x620, %eax                # PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $pml4, %eax
    movl %eax, %cr3
    movl $0xC0000080, %ecx
    rdmsr
    orl $0x100, %eax                # EFER.LME
    wrmsr
    lgdt gdt_pointer
    movl %cr0, %eax
    andl $0xFFFFFFF3, %eax          # EM, TS off
    orl $0x80010022, %eax           # PG, WP, NE, MP
    movl %eax, %cr0

    # The host may claim an emulation on real hardware, to have stage0 read memory without the C-bit, that is: what the host
    # put there. An encrypted guest fetches instructions from private memory, whatever the tables say, so an instruction that
    # is changed without the C-bit stays as it was. No data is read before this is known.
    cmpl $1, %esi
    jne 1f
    movl $0x656E6F6E, probe + 1
    movl %cr3, %eax
    movl %eax, %cr3
    jmp probe
probe:
    movl $0, %eax
    cmpl $0x656E6F6E, %eax
    jne refuse_cpuid
1:  ljmp $0x10, $long_mode

refuse_cpuid:
    movl $(1 << 16 | 2 << 12 | 0x100), %eax
    jmp 1f
refuse_accept:
    movl $(2 << 16 | 2 << 12 | 0x100), %eax
1:  xorl %edx, %edx                 # GHCB MSR protocol: termination, reason set 2
    movl $0xC0010130, %ecx
    wrmsr
    .byte 0xF3, 0x0F, 0x01, 0xD9    # VMGEXIT; the emulation ended the guest at the WRMSR
2:  hlt
    jmp 2b

    .code64
long_mode:
    lidt idt_pointer
    movl $0x18, %eax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $stack_end, %esp
    movl %esi, %edi
    xorl %ebp, %ebp
    call stage0_start
    ud2

# Another processor, started by INIT and SIPI: real mode, at the page that this is copied to.
    .globl trampoline, trampoline_end
    .code16
trampoline:
    cli
    cld
    lgdtl %cs:(trampoline_gdt - trampoline)
    movl $0x620, %eax
    movl %eax, %cr4
    movl $pml4, %eax
    movl %eax, %cr3
    movl $0xC0000080, %ecx
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl $0x80010033, %eax          # PG, WP, NE, ET, MP, PE
    movl %eax, %cr0
    ljmpl $0x10, $ap_long_mode
    .balign 4
trampoline_gdt:
    .word gdt_end - gdt - 1
    .long gdt
trampoline_end:

    .code64
ap_long_mode:
    lidt idt_pointer
    movl $0x18, %eax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $1, %edi
    lock xaddl %edi, ap_ticket      # EDI: a number of this processor's own, from 0 on
    cmpl $AP_STACKS, %edi
    jae 2f
    leal 1(%rdi), %esp
    shll $AP_STACK_SHIFT, %esp
    addl $ap_stacks, %esp
    xorl %ebp, %ebp
    call stage0_helper
2:  hlt
    jmp 2b

# enter_kernel(entry, boot_params): the 64-bit boot protocol.
    .globl enter_kernel
enter_kernel:
    cli
    movq %rdi, %rax
    xorl %edi, %edi
    xorl %ebp, %ebp
    xorl %ebx, %ebx
    jmpq *%rax

# Exceptions end here: stage0_exception(vector, three words of the frame, CR2).
    .balign 8
exceptions:
    .set vector, 0
    .rept 32
    .balign 8
    pushq $vector
    jmp exception
    .set vector, vector + 1
    .endr
exception:
    popq %rdi
    popq %rsi
    popq %rdx
    popq %rcx
    movq %cr2, %r8
    andq $-16, %rsp
    call stage0_exception
    ud2

    .balign 8
gdt:
    .quad 0
    .quad 0x00CF9A000000FFFF        # 0x08 code, 32-bit
    .quad 0x00AF9A000000FFFF        # 0x10 code, 64-bit: Linux's __BOOT_CS
    .quad 0x00CF92000000FFFF        # 0x18 data: Linux's __BOOT_DS
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
    .balign 8
idt_pointer:
    .word 32 * 16 - 1
    .quad idt

    .macro gate target
    .set G, 0x120000 + (\target - _start)
    .word G & 0xFFFF, 0x10
    .byte 0, 0x8E
    .word G >> 16
    .quad 0
    .endm
    .balign 16
idt:
    .set vector, 0
    .rept 32
    gate (exceptions + vector * 8)
    .set vector, vector + 1
    .endr

    .globl ap_ticket, c_bit
    .balign 8
c_bit:
    .quad 0
ap_ticket:
    .long 0

    .section .page_tables, "aw", @nobits
    .balign 4096
    .globl pml4
pml4:
    .skip 4096
pdpt:
    .skip 4096
pages:
    .skip 4 * 4096

    .section .noinit, "aw", @nobits
    .balign 4096
    .set AP_STACKS, 15
    .set AP_STACK_SHIFT, 13
ap_stacks:
    .skip AP_STACKS << AP_STACK_SHIFT
    .skip 0x4000
stack_end:
    .globl more_tables, chunk_digests
more_tables:
    .skip 7 * 4096
chunk_digests:
    .skip 0x8000
    .section .ghcb, "aw", @nobits
    .balign 4096
    .globl ghcb_page
ghcb_page:
    .skip 4096

/* The smallest pod: a PVH guest that prints OK on COM1 and powers off through the ACPI sleep register (port 0x600). */
.section .note.Xen, "a", @note
.align 4
.long 4, 4, 18          /* name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY */
.asciz "Xen"
.long _start

.text
.code32
.globl _start
_start:
    movw $0x3f8, %dx
    movb $'O', %al
    outb %al, %dx
    movb $'K', %al
    outb %al, %dx
    movb $'\n', %al
    outb %al, %dx
    movw $0x600, %dx
    movb $0x34, %al     /* S5: SLP_TYP 5 << 2 | SLP_EN 1 << 5 */
    outb %al, %dx
1:  hlt
    jmp 1b

/* A pod that does nothing: a PVH guest that halts for ever. */
.section .note.Xen, "a", @note
.align 4
.long 4, 4, 18          /* name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY */
.asciz "Xen"
.long _start

.text
.code32
.globl _start
_start:
1:  hlt
    jmp 1b

/* A PVH guest for snapshots: writes to every page of RAM from 4 MiB up to END, then prints one letter after another on
   COM1 for ever. */
.section .note.Xen, "a", @note
.align 4
.long 4, 4, 18          /* name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY */
.asciz "Xen"
.long _start

.text
.code32
.globl _start
_start:
    movl $0x400000, %edi
1:  movl %edi, (%edi)
    addl $0x1000, %edi
    cmpl $END, %edi
    jb 1b
    movw $0x3f8, %dx
    movb $'f', %al
2:  outb %al, %dx
    movb $'x', %al
    movl $0x10, %ecx
3:  loop 3b
    jmp 2b

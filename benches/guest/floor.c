/*
 * The floor: what KVM itself costs. Makes only the calls that any monitor must make to run the hello guest with
 * 2 GiB of RAM (the guest's code is copied from the ELF file given), prints its serial output, exits when it powers
 * off. No error messages, no devices: this is a yardstick, not a monitor.
 */
#include <elf.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	if (argc < 2)
		return 2;
	size_t ram = 2UL << 30;
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), elf = open(argv[1], O_RDONLY);
	struct stat st;
	if (kvm < 0 || elf < 0 || fstat(elf, &st) || ioctl(kvm, KVM_GET_API_VERSION, 0) != 12)
		return 2;
	int vm = ioctl(kvm, KVM_CREATE_VM, 0);
	char *mem = mmap(0, ram, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	struct kvm_userspace_memory_region slot = { 0, 0, 0, ram, (unsigned long)mem };
	if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot))
		return 3;
	char *image = mmap(0, st.st_size, PROT_READ, MAP_PRIVATE, elf, 0);
	Elf64_Ehdr *eh = (Elf64_Ehdr *)image;
	Elf64_Phdr *ph = (Elf64_Phdr *)(image + eh->e_phoff);
	for (int i = 0; i < eh->e_phnum; i++)
		if (ph[i].p_type == PT_LOAD)
			memcpy(mem + ph[i].p_paddr, image + ph[i].p_offset, ph[i].p_filesz);
	int cpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	size_t len = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	struct kvm_run *run = mmap(0, len, PROT_READ | PROT_WRITE, MAP_SHARED, cpu, 0);
	struct kvm_sregs s;
	ioctl(cpu, KVM_GET_SREGS, &s);
	s.cr0 = 0x11;
	s.cs.base = s.ds.base = s.es.base = s.ss.base = 0;
	s.cs.limit = s.ds.limit = s.es.limit = s.ss.limit = 0xffffffff;
	s.cs.g = s.ds.g = s.es.g = s.ss.g = s.cs.db = s.ds.db = s.es.db = s.ss.db = 1;
	s.cs.type = 0xb;
	s.ds.type = s.es.type = s.ss.type = 3;
	s.cs.selector = 8;
	s.ds.selector = s.es.selector = s.ss.selector = 16;
	struct kvm_regs r = { .rip = eh->e_entry, .rflags = 2 };
	if (ioctl(cpu, KVM_SET_SREGS, &s) || ioctl(cpu, KVM_SET_REGS, &r))
		return 3;
	for (;;) {
		if (ioctl(cpu, KVM_RUN, 0) || run->exit_reason != KVM_EXIT_IO)
			return 4;
		char *data = (char *)run + run->io.data_offset;
		if (run->io.port == 0x3f8)
			(void)!write(1, data, 1);
		else if (run->io.port == 0x600 && *data == 0x34)
			return 0;
	}
}

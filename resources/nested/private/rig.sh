# The cases that need private memory: what they run beside podvisor. Sourced by ../run.sh.
program=$target/release/examples/private_memory
[ -x "$program" ] || wrong "no $program: cargo build --release -p podvisor-snp --example private_memory"
host_items+=("program=/bin/private-memory:$program")
cc -O2 -static -o "$work/search" "$here/private/search.c"
host_items+=("file=/bin/search:$work/search")

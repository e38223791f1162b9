#!/usr/bin/env bash
# Runs the cases under private/, whose host needs KVM_X86_SW_PROTECTED_VM, on a host kernel that is built for it (build.sh).
#   bash resources/nested/private.sh [--podvisor PATH] [-v] [--list] [CASE...]
# Options, output and exit code are run.sh's.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../setup.sh"
. "$here/packages.sh"
. "$here/build.sh"
need_nested
built_kernel
exec bash "$here/run.sh" --host-kernel "$kernel_dir" --cases "$here/private" "$@"

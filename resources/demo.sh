#!/usr/bin/env bash
# Builds podvisor and runs its main job once: an IGVM image becomes a running, attested pod. Where there is no /dev/kvm, a
# Linux pod runs in an emulated host instead (docs/nested-rig.md).
# Arguments go to `podvisor demo` (see `podvisor demo --help`).
set -euo pipefail
cd "$(dirname "$0")/.."
. resources/setup.sh
need_build
cargo build --release --locked
case " $* " in
    *" --nested "* | *" --native "* | *" --save-image"* | *" --help "*) ;;
    *)
        if [ ! -w /dev/kvm ]; then
            echo "note: /dev/kvm is missing or not writable: a host that has it is emulated (about half a minute)" >&2
            set -- --nested "$@"
        fi ;;
esac
exec "${CARGO_TARGET_DIR:-target}/release/podvisor" demo "$@"

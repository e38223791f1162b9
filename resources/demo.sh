#!/usr/bin/env bash
# Builds podvisor and runs its main job once: an IGVM image becomes a running, attested pod.
# Arguments go to `podvisor demo` (see `podvisor demo --help`).
set -euo pipefail
cd "$(dirname "$0")/.."
. resources/setup.sh
need_build
cargo build --release --locked
exec "${CARGO_TARGET_DIR:-target}/release/podvisor" demo "$@"

#!/usr/bin/env bash
# All of podvisor's tests, with what they need installed first. Ends with one line "N passed, N failed, N skipped".
#   FUZZ_SECONDS=N   how long each fuzz target runs (default 10)
set -euo pipefail
cd "$(dirname "$0")/.."
. resources/setup.sh
need_tests

passed=0 failed=0 skipped=0
# step NAME COMMAND...: runs one check; a failure is counted and the rest still runs.
step() {
    local name=$1 start=$SECONDS; shift
    say "$name"
    if "$@"; then passed=$((passed + 1)); echo "-- $name: passed ($((SECONDS - start)) s)"
    else failed=$((failed + 1)); echo "-- $name: FAILED ($((SECONDS - start)) s)"; fi
}
skip() { skipped=$((skipped + 1)); printf '\n== %s\n-- skipped: %s\n' "$1" "$2"; }

unit_and_integration_tests() {
    local log; log=$(mktemp)
    PODVISOR_IGVM_MUTATIONS=1000000 cargo nextest run --workspace --locked --no-fail-fast --success-output final --failure-output final >"$log" 2>&1 && local rc=0 || local rc=$?
    grep -E '^ *(FAIL|SIGABRT|SIGSEGV|TIMEOUT|SLOW|Summary)|panicked|skipped: ' "$log" || true
    [ $rc = 0 ] || tail -n 200 "$log"
    rm -f "$log"
    return $rc
}

# fuzz TARGET: a short run over the kept corpus; new finds go to a scratch folder.
fuzz() {
    local scratch; scratch=$(mktemp -d)
    local log=$scratch/log
    mkdir "$scratch/new"
    if (cd fuzz && cargo +nightly fuzz run "$1" "$scratch/new" "corpus/$1" -- \
            -max_total_time="${FUZZ_SECONDS:-10}" -rss_limit_mb=1024 -timeout=10 -artifact_prefix="$scratch/") >"$log" 2>&1; then
        grep -E 'Done [0-9]+ runs' "$log" || tail -n 3 "$log"
        rm -rf "$scratch"
    else
        tail -n 60 "$log"
        return 1
    fi
}

demo() {
    local podvisor=${CARGO_TARGET_DIR:-target}/release/podvisor
    "$podvisor" demo --json && "$podvisor" demo --native
}

# Two builds of the pod image give the same bytes.
pod_image() {
    local made status=0; made=$(mktemp -d)
    bash resources/pod-image/build.sh --output "$made/one" && (umask 077; bash resources/pod-image/build.sh --output "$made/two") &&
        diff -r "$made/one" "$made/two" || status=1
    rm -rf "$made"
    return $status
}

# nested_pods: all cases with a PVH kernel, and what the other ways to boot change; all in one boot of the host.
nested_pods() {
    local cases=(all) name
    for name in boot reset resize shim; do cases+=("$name@igvm-6.1"); done
    cases+=(boot@igvm-snp-6.1)
    for name in boot smp fs blk vsock net power; do cases+=("$name@igvm-snp-6.12"); done
    for name in boot devices blk; do cases+=("$name@bzimage-6.12"); done
    for name in boot hotplug; do cases+=("$name@pvh-6.12"); done
    bash resources/nested/run.sh "${cases[@]}"
}

[ -w /dev/kvm ] || echo "note: /dev/kvm is missing or not writable: the tests that boot a pod will say that they are skipped"
step "rustfmt" cargo fmt --all --check
step "rustfmt of the pod guest" cargo fmt --manifest-path resources/guest/Cargo.toml --check
step "clippy" cargo clippy --workspace --all-targets --locked --quiet -- -D warnings
step "clippy of the pod guest" cargo clippy --manifest-path resources/guest/Cargo.toml --lib --bins --locked --quiet -- -D warnings
step "unit tests of the pod guest" cargo test --manifest-path resources/guest/Cargo.toml --lib --locked --quiet
step "rustfmt of stage0" cargo fmt --manifest-path firmware/stage0/Cargo.toml --check
step "clippy of stage0" cargo clippy --manifest-path firmware/stage0/Cargo.toml --lib --bins --locked --quiet -- -D warnings
step "unit tests of stage0" cargo test --manifest-path firmware/stage0/Cargo.toml --lib --locked --quiet
step "build" cargo build --release --locked --quiet
step "unit and integration tests" unit_and_integration_tests
step "doc tests" cargo test --workspace --doc --locked --quiet
step "podvisor-api as a package of its own" cargo package -p podvisor-api --no-verify --allow-dirty --offline --quiet
step "licences, sources, duplicates (the advisory database is not reachable from here and is not checked)" \
    cargo deny --log-level error check licenses bans sources
if [ -w /dev/kvm ]; then step "demo" demo; else skip "demo" "no /dev/kvm"; fi
step "demo in an emulated host" "${CARGO_TARGET_DIR:-target}/release/podvisor" demo --nested --json
step "Linux pods in an emulated host" nested_pods
case $(bash resources/oracles/digests.sh fetch >&2; echo $?) in
    77) skip "OVMF's launch digests, beside sev-snp-measure" "no network to fetch Debian's OVMF and sev-snp-measure" ;;
    *) step "OVMF's launch digests, beside sev-snp-measure" \
        bash resources/oracles/digests.sh compare "${CARGO_TARGET_DIR:-target}/release/podvisor" ;;
esac
step "the pod image, twice" pod_image
step "pods of the pod image in an emulated host" bash resources/nested/run.sh --cases resources/pod-image/cases \
    all container@igvm-6.12 container@igvm-snp-6.1
step "build of what shows private memory" cargo build --release -p podvisor-snp --example private_memory --locked --quiet
step "private memory in an emulated host" bash resources/nested/private.sh
if cargo +nightly --version >/dev/null 2>&1; then
    for target in $(cd fuzz && cargo +nightly fuzz list); do step "fuzz $target" fuzz "$target"; done
else
    skip "fuzz targets" "no nightly toolchain"
fi

printf '\n%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
[ "$failed" = 0 ]

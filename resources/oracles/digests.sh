#!/usr/bin/env bash
# Compares `podvisor measure OVMF.fd` and `podvisor id-block sign` with sev-snp-measure 0.0.13, on Debian's OVMF.amdsev.fd.
#   digests.sh fetch             fetches both, into a cache outside the tree; status 77 and the reason if there is no network
#   digests.sh compare PODVISOR  compares; what is recorded below is compared too while the file is the one it was recorded of
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../setup.sh"
. "$here/../nested/packages.sh"
cache=${XDG_CACHE_HOME:-$HOME/.cache}/podvisor/oracles
suites=(forky)
tool=$cache/python/sev-snp-measure-0.0.13

# no_network LOG: whether LOG says that a server could not be reached
no_network() { grep -qiE 'could not (resolve|connect)|temporary failure|unreachable|timed out|connection (refused|failed)|NewConnectionError|no such host' "$1"; }

fetch_tool() {
    [ ! -e "$tool/bin/sev-snp-measure" ] || return 0
    local into; mkdir -p "$cache/python"; into=$(mktemp -d "$cache/python/make.XXXXXX")
    # Moved as a whole when it is complete; its commands are run through its python, which may be moved.
    if python3 -m venv "$into" && "$into/bin/python3" -m pip install -q sev-snp-measure==0.0.13; then
        mv "$into" "$tool"
    else
        rm -rf "$into"; return 1
    fi
}
# have: sets $ovmf and makes sure that both are there
have() { fetch_tool && unpacked ovmf-amdsev forky && ovmf=$package_dir/usr/share/ovmf/OVMF.amdsev.fd && [ -f "$ovmf" ]; }

fetch_both() {
    local log; mkdir -p "$cache"; log=$(mktemp)
    if have >"$log" 2>&1; then rm -f "$log"; return; fi
    [ ! -e "$cache/apt/log" ] || cat "$cache/apt/log" >>"$log"
    tail -n 3 "$log"
    if no_network "$log"; then rm -f "$log"; return 77; fi
    rm -f "$log"; return 1
}

# Arguments as sev-snp-measure has them, and podvisor with those of them that it calls otherwise.
reference() { "$tool/bin/python3" -m sevsnpmeasure.cli --mode snp --ovmf "$ovmf" "$@"; }
ours() {
    local args=() arg
    for arg; do
        case $arg in
            --vcpu-type | --vcpu-sig) arg=--cpu ;;
            --append) arg=--cmdline ;;
            QEMU) arg=qemu ;;
        esac
        args+=("$arg")
    done
    "$podvisor" measure "$ovmf" "${args[@]}"
}

# check [RECORDED] -- ARGUMENTS: both tools say the same, which is RECORDED if the file is the known one
check() {
    local recorded=
    [ "$1" = -- ] || { recorded=$1; shift; }
    shift
    local want got
    want=$(reference "$@") got=$(ours "$@")
    if [ "$want" != "$got" ]; then echo "$*: podvisor has $got, sev-snp-measure has $want"; failed=1; fi
    if [ -n "$recorded" ] && $known && [ "$recorded" != "$got" ]; then echo "$*: $got is not as recorded ($recorded)"; failed=1; fi
    compared=$((compared + 1))
}

# id_block DIR: the block, and all of its authentication but the signatures, which are random; the digests of the keys
id_block() {
    local keys=$here/../../snp/tests/data digest
    digest=$(printf '%096d' 7)
    "$podvisor" id-block sign --id-key "$keys/p384-pkcs8.pem" --author-key "$keys/p384-sec1.pem" --digest "$digest" \
        --block "$1/block" --auth "$1/auth" >"$1/said"
    "$tool/bin/python3" -c 'import sys; from sevsnpmeasure.id_block import main; sys.exit(main())' \
        --idkey "$keys/p384-pkcs8.pem" --authorkey "$keys/p384-sec1.pem" \
        --measurement "$(python3 -c 'import base64, sys; print(base64.b64encode(bytes.fromhex(sys.argv[1])).decode())' "$digest")" >"$1/theirs"
    python3 - "$1" <<'PYTHON'
import base64, json, re, sys
read = lambda name: open(f"{sys.argv[1]}/{name}", "rb").read()
theirs = dict(re.findall(r"([a-z_-]+)[=:] ?([A-Za-z0-9+/=]+?)(?:,|\n|$)", read("theirs").decode()))
theirs = {name: base64.b64decode(value) for name, value in theirs.items()}
said, auth = json.loads(read("said")), read("auth")
unsigned = lambda auth: auth[:0x40] + auth[0x240:0x680] + auth[0x880:]
pairs = [
    ("block", read("block"), theirs["id-block"]),
    ("authentication", unsigned(auth), unsigned(theirs["id-auth"])),
    ("id_key_digest", bytes.fromhex(said["id_key_digest"]), theirs["id_key_hash"]),
    ("author_key_digest", bytes.fromhex(said["author_key_digest"]), theirs["author_key"]),
]
wrong = [name for name, ours, other in pairs if ours != other]
sys.exit(f"ID block: not as snp-create-id-block has it: {wrong}" if wrong else 0)
PYTHON
}

compare() {
    podvisor=$1 failed=0 compared=0 known=true
    have
    if ! sha256sum --check --status <<<"3e4fd0b3fe3b2dbe481c3d9e99418a034174f26cbe1f55aa212b0f18c12d2d6f  $ovmf"; then
        known=false
        echo "note: Debian has a newer OVMF than the one with recorded digests; it is compared with sev-snp-measure alone"
    fi
    local dir; dir=$(mktemp -d)
    printf 'A%.0s' $(seq 8192) >"$dir/kernel"; printf initrd >"$dir/initrd"
    check d74bd3ea40b240c3228edc5177ce6193561ebff633dbd0be76d6c143b876d65102425c0e2e8a930857c48daa5eacda58 -- --vcpus 1 --vcpu-type EPYC-v4
    check a3c946257b3cef8f1e25dd03cb84f9f01313ae9135c32acc7e01f4204aa447aaa196530d5999be0f114462d2546cd02d -- --vcpus 2 --vcpu-type EPYC-v4
    check 13a6ae9fbaa31c91ade309c36bd5214729438abac318e01176e02a97b8bec11a4bce86b4d2b1fba2ec0481dd24ff525f -- --vcpus 4 --vcpu-type EPYC-v4
    check 5fafce19a1da9324827756044f6a922becd7fb7a5f80f1cd803366eeb7add5a129d0ca53b184313c9f9036e869371a88 -- --vcpus 1 --vcpu-type EPYC-v4 --guest-features 0x21
    check 54a8c0dd731ffacb4980b3bf926adcbfef705146fdf443ca2a03c3104610a8add28b31c86df235618a610a94797f056d -- --vcpus 2 --vcpu-type EPYC-Milan
    check d32daa514f1f9f2380e00592ecaebac0f426148ba867b919b70737bbb4a406f6e508b30a083d10dad444b4b4648f4dd2 -- --vcpus 1 --vcpu-type EPYC-v4 --vmm-type ec2
    check 892954bc3aaf8680d84e6150978bf5c30e57b4fcf4ba5705a9b02942b3e8301841b933eca82abe82546b103ecd469506 -- --vcpus 1 --vcpu-type EPYC-v4 --vmm-type gce
    check ff19952a72763c580ad9abf6c187ffcd167b03475237f2f319c9b47be2db4e877f4dfc0baf2b11e87161fdbc02d1e8d0 -- --vcpus 1 --vcpu-type EPYC-v4 --kernel "$dir/kernel" --initrd "$dir/initrd" --append console=ttyS0
    local cpu
    for cpu in EPYC-Rome EPYC-Genoa EPYC-Turin; do check -- --vcpus 3 --vcpu-type $cpu; done
    check -- --vcpus 64 --vcpu-type EPYC-Genoa-v1
    check -- --vcpus 1 --vcpu-sig 0xa00f11 --vmm-type QEMU
    check -- --vcpus 2 --vcpu-type EPYC-v4 --vmm-type ec2
    check -- --vcpus 2 --vcpu-type EPYC-v4 --vmm-type gce
    check -- --vcpus 1 --vcpu-type EPYC-Milan --kernel "$dir/kernel"
    check -- --vcpus 1 --vcpu-type EPYC-Milan --kernel "$dir/kernel" --append 'a b'
    check -- --vcpus 1 --vcpu-type EPYC-Milan --kernel "$dir/kernel" --initrd "$dir/initrd"
    local volume want
    want=$("$tool/bin/python3" -m sevsnpmeasure.cli --mode snp:ovmf-hash --ovmf "$ovmf")
    volume=$("$podvisor" measure "$ovmf" --cpu EPYC --json | sed -n 's/.*"volume_digest":"\([0-9a-f]*\)".*/\1/p')
    if [ "$volume" != "$want" ]; then echo "the volume alone: podvisor has $volume, sev-snp-measure has $want"; failed=1; fi
    compared=$((compared + 1))
    id_block "$dir" || failed=1
    rm -rf "$dir"
    echo "$compared digests and an ID block compared with sev-snp-measure"
    [ $failed = 0 ]
}

case ${1:-} in
    fetch) fetch_both ;;
    compare) compare "$(realpath "$2")" ;;
    *) sed -n '2,4s/^# \?//p' "$0" >&2; exit 2 ;;
esac

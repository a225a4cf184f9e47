#!/bin/sh
# Installs what banger needs on this host and lacks. Says what and why first; does nothing when all is there.
#
#   scripts/setup.sh            ask the system's package manager for what is missing
#   scripts/setup.sh --check    only say what is missing; exit status 1 if something is
#   scripts/setup.sh --bench    also what benchmarks compare banger with; together with --check, too
set -eu

only_check='' with_bench=''
for option in "$@"; do
    case $option in
    --check) only_check=1 ;;
    --bench) with_bench=1 ;;
    *)
        printf 'error: unknown option %s; there are --check and --bench\n' "$option" >&2
        exit 2
        ;;
    esac
done

missing=''
# need PACKAGE 'REASON' PROGRAM|FILE…: notes the package unless one of the programs or files is there.
need() {
    package=$1 reason=$2
    shift 2
    for thing in "$@"; do
        case $thing in
        /*) [ -e "$thing" ] && return 0 ;;
        *) PATH=$PATH:/usr/sbin:/sbin command -v "$thing" >/dev/null 2>&1 && return 0 ;;
        esac
    done
    missing="$missing $package"
    printf '  %-18s %s\n' "$package" "$reason" >&2
}

check() {
    need gcc 'compiles the bundled SQLite and liblzma' cc gcc
    need libc6-dev 'static C library for the guest agent' /usr/lib/x86_64-linux-gnu/libc.a /usr/lib/aarch64-linux-gnu/libc.a /usr/lib64/libc.a
    need git 'reads the repositories that go into machines' git
    need qemu-system-x86 'runs the machines' qemu-system-x86_64 qemu-kvm
    need mmdebstrap 'bootstraps the default images' mmdebstrap
    need e2fsprogs 'makes and checks file systems in the tests' e2fsck
    need nftables 'rules of system mode, and their tests' nft
    need iproute2 'network namespaces of the tests' ip
    need openssh-client 'vm ssh, and the keys for it' ssh-keygen
    [ "$(id -u)" = 0 ] || need uidmap 'lets mmdebstrap work without root' newuidmap
    [ -z "$with_bench" ] || check_bench
}

# Nothing of banger uses these: they are what it is measured against (docs/performance.md).
check_bench() {
    need podman 'a container engine, to compare a start with' podman
    need crun 'its runtime' crun
    need iptables 'its default network' iptables
}

report=$(check 2>&1 >/dev/null)
[ -n "$report" ] || exit 0
check 2>/dev/null

if [ -n "$only_check" ]; then
    printf 'missing on this host:\n%s\n' "$report" >&2
    exit 1
fi
if ! command -v apt-get >/dev/null 2>&1; then
    printf 'error: this host lacks programs and has no apt-get to install them with:\n%s\n\n' "$report" >&2
    printf 'hint: install the equivalents of these Debian packages with your package manager\n' >&2
    exit 1
fi
if [ "$(id -u)" = 0 ]; then
    root=''
elif command -v sudo >/dev/null 2>&1; then
    root=sudo
else
    printf 'error: these packages are missing, and there is neither root nor sudo to install them:\n%s\n\n' "$report" >&2
    printf 'hint: as root, run: apt-get install --no-install-recommends%s\n' "$missing" >&2
    exit 1
fi

printf 'banger needs packages that this host does not have:\n%s\n' "$report" >&2
printf 'installing them with: %s apt-get install --no-install-recommends%s\n' "$root" "$missing" >&2
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086 # the list is meant to be split, $root may be empty
{
    $root apt-get update -qq
    $root apt-get install -y -qq --no-install-recommends $missing >/dev/null
}

#!/bin/bash
# The package on an emulated board: an arm64 Debian 12 under qemu-user, where pip installs the wheel and `board.py`
# holds every command of the device, and the daemon, against this machine. Started by `make test-arm64`.
#
# Rules enforced here:
#
# * where this cannot run, SKIPPED and why is printed, and the exit code is 0; it is 1 where a check fails;
# * kept are the root and pip's downloads in it, in ${EDGEGUARD_CACHE:-~/.cache/edgeguard}/arm64; a root without its
#   marker, which is written last, is made anew. All else lies in a temporary folder. Nothing else is written;
# * mounts are made in a mount namespace, so that they end with this script however it ends; its temporary folder, what
#   it started, and its entry with the kernel's binfmt_misc go when it is interrupted too.
set -euo pipefail

python=$1
PATH=$PATH:/usr/sbin:/sbin
MADE="bookworm arm64 python3 python3-venv"
BINFMT=/proc/sys/fs/binfmt_misc
ENTRY=$BINFMT/edgeguard-arm64-$$
# The first 20 bytes of an executable or shared 64-bit little-endian ELF file for AArch64 (machine 183), and which of
# their bits count.
MAGIC='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
MASK='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'

skipped() {
    echo "SKIPPED: $1"
    exit 0
}

failed() {  # what, and a log to show the end of
    [ -z "${2:-}" ] || tail -n 20 "$2"
    echo "FAILED: $1"
    exit 1
}

# In the background, because the shell acts on a signal only once what runs in its foreground has ended; in a session
# of its own, so that it can be ended with all that it started.
step() {
    setsid "$@" </dev/null &
    job=$!
    local code=0
    wait "$job" || code=$?
    job=
    return $code
}

undo() {
    trap '' INT TERM HUP
    if [ -n "$job" ]; then
        kill -KILL -- "-$job" 2>/dev/null || true
        wait "$job" 2>/dev/null || true
    fi
    [ ! -e "$ENTRY" ] || echo -1 >"$ENTRY"
    [ -z "$work" ] || rm -rf --one-file-system "$work"
}

[ "$(uname -sm)" = "Linux x86_64" ] || skipped "the board is held against Linux on x86-64, this is $(uname -sm)"
[ "$EUID" = 0 ] || skipped "not root, who alone may make another system's root and mount in it"
for program in debootstrap qemu-aarch64-static mosquitto; do
    command -v $program >/dev/null ||
        skipped "no $program: apt-get install debootstrap qemu-user-static mosquitto"
done
if [ "${2:-}" != apart ]; then
    why=$(unshare --mount true 2>&1) || skipped "no mounts may be made here: $why"
    exec unshare --mount --propagation private bash "$0" "$python" apart
fi

job= work=
trap undo EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

cd "$(dirname "$0")/../.."
cache=${EDGEGUARD_CACHE:-$HOME/.cache/edgeguard}/arm64
root=$cache/root
mkdir -p "$cache"
exec 9>"$cache/lock"
flock --nonblock 9 || failed "another run is at work in $cache"

if [ ! -e $BINFMT/register ]; then
    why=$(mount -t binfmt_misc binfmt_misc $BINFMT 2>&1) || skipped "no binfmt_misc, and it cannot be mounted: $why"
fi
# F: the kernel opens qemu now, so that it need not lie within the root.
why=$( (printf %s ":${ENTRY##*/}:M::$MAGIC:$MASK:$(command -v qemu-aarch64-static):F" >$BINFMT/register) 2>&1) ||
    skipped "binfmt_misc takes no entry: $why"

grep -q $'^[^\t]*\t00000000\t' /proc/net/route || skipped "no network: no default route"

work=$(mktemp --directory --tmpdir edgeguard-arm64.XXXXXX)
if [ "$(cat "$cache/made" 2>/dev/null)" = "$MADE" ]; then
    echo "root: $root, made earlier"
else
    echo "root: making $root, for some minutes"
    rm -rf --one-file-system "$root" "$cache/made"
    step debootstrap --arch=arm64 --variant=minbase --include=python3,python3-venv --force-check-gpg \
        bookworm "$root" >"$work/debootstrap.log" 2>&1 || {
        ! grep -q 'Failed getting release file' "$work/debootstrap.log" || skipped "no network: no Debian mirror answers"
        failed "debootstrap" "$work/debootstrap.log"
    }
    echo "$MADE" >"$cache/made"
fi
cp --dereference /etc/resolv.conf "$root/etc/resolv.conf"

# The four processors of a Raspberry Pi 4. Told of this machine's, LiteRT takes them for Arm's and crashes; and its
# kernels for SME, which qemu's default processor has and no such board, compute wrong outputs under qemu 7.2.
cpus=$work/sys/devices/system/cpu
mkdir -p "$cpus"
echo 0-3 | tee "$cpus/possible" >"$cpus/present"
for n in 0 1 2 3; do
    printf '%s\t: %s\n' processor $n Features 'fp asimd evtstrm crc32 cpuid' 'CPU implementer' 0x41 \
        'CPU architecture' 8 'CPU variant' 0x0 'CPU part' 0xd08 'CPU revision' 3
    echo
done >"$work/cpuinfo"
mount -t proc proc "$root/proc"
mount --bind "$work/cpuinfo" "$root/proc/cpuinfo"
mount --bind "$work/sys" "$root/sys"
mount --bind "$work" "$root/mnt"
inside=$work/inside
cat >"$inside" <<END
#!/bin/sh
exec chroot "$root" /usr/bin/env -i -C /mnt QEMU_CPU=cortex-a72 HOME=/root LANG=C.UTF-8 \\
    PATH=/mnt/venv/bin:/usr/sbin:/usr/bin "\$@"
END
chmod +x "$inside"
machine=$("$inside" uname -m) || failed "the root does not run"
echo "board: Debian $(cat "$root/etc/debian_version") on $machine, $(qemu-aarch64-static --version | head -n 1)"

# From a copy: a build leaves files beside what it builds.
mkdir "$work/source"
cp -r edgeguard converters firmware_bridge setup.cfg pyproject.toml README.md LICENSE "$work/source"
step "$python" -m build --outdir "$work" "$work/source" >"$work/build.log" 2>&1 || failed "the build" "$work/build.log"
wheel=$(basename "$work"/edgeguard-*.whl)

# The root trusts whom this machine trusts, and goes the same way.
authorities=${PIP_CERT:-${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}}
[ ! -f "$authorities" ] || cp "$authorities" "$work/authorities.pem"
mapfile -t way < <(env | grep -E '^(https?_proxy|no_proxy|HTTPS?_PROXY|NO_PROXY|PIP_INDEX_URL)=' || true)
[ ! -f "$work/authorities.pem" ] || way+=(PIP_CERT=/mnt/authorities.pem)
step "$inside" python3 -m venv venv || failed "the board's venv"
step "$inside" "${way[@]}" pip install --quiet "/mnt/$wheel[device]" || failed "pip install '$wheel[device]'"
step "$inside" pip check || failed "pip check"
"$inside" pip list --format=freeze 2>/dev/null | grep -E '^(edgeguard|numpy|ai-edge-litert)=' | tr '\n' ' '
echo "installed"

step env PYTHONDONTWRITEBYTECODE=1 "$python" -m tests.arm64.board "$work"

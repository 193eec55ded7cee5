#!/bin/bash
# Compiles the protocol's library for each target that its README names, and runs its unit tests on those that can be
# emulated here. `.ci/run` calls it, after `tests/deps.sh targets`.
#   targets.sh list   the targets: `check` or `run`, and the name
#   targets.sh        checks them all, and runs the tests
set -euo pipefail
cd "$(dirname "$0")/.."

# Those that are run are one each of: another processor (aarch64), 32 bits (armv7), big-endian (s390x), another system
# (windows), no threads (wasip1).
list() {
	cat <<-END
		check x86_64-unknown-linux-gnu
		check x86_64-unknown-linux-musl
		run aarch64-unknown-linux-gnu
		check aarch64-unknown-linux-musl
		run armv7-unknown-linux-gnueabihf
		check riscv64gc-unknown-linux-gnu
		run s390x-unknown-linux-gnu
		check aarch64-linux-android
		check x86_64-apple-darwin
		check aarch64-apple-darwin
		check aarch64-apple-ios
		check x86_64-unknown-freebsd
		run x86_64-pc-windows-gnu
		check wasm32-unknown-unknown
		run wasm32-wasip1
	END
}

if [ "${1:-}" = list ]; then
	list
	exit
fi

# cargo and cc name a target in their variables in two ways.
variable() { echo "$1" | tr a-z- A-Z_; }

directory=$(realpath --canonicalize-missing "${CARGO_TARGET_DIR:-target}")

# ring takes no more of a C library than these, so that clang compiles it for a target whose headers are not here.
headers=$directory/headers
mkdir -p "$headers"
echo '#define assert(condition) ((void)0)' >"$headers/assert.h"
cat >"$headers/string.h" <<END
#include <stddef.h>
void *memcpy(void *, const void *, size_t);
void *memset(void *, int, size_t);
END
: >"$headers/stdlib.h"
: >"$headers/TargetConditionals.h"

host=$(rustc --version --verbose | sed -n 's/^host: //p')
for target in $(list | cut -d ' ' -f 2); do
	checked+=(--target "$target")
	case $target in
	"$host" | wasm32-*) ;;
	*)
		export "CC_${target//-/_}=clang" "AR_${target//-/_}=ar"
		export "CFLAGS_${target//-/_}=-ffreestanding -nostdlibinc -isystem $headers"
		;;
	esac
done
# cc asks Xcode otherwise.
export SDKROOT=$headers

echo "with ring and without:"
cargo check --locked -p wgsep-proto "${checked[@]}"
cargo check --locked -p wgsep-proto --no-default-features "${checked[@]}"

# Those that know of a system. ring is the same as above.
echo "and what embeds it:"
systems=(aarch64-linux-android aarch64-apple-darwin x86_64-unknown-freebsd x86_64-pc-windows-gnu)
cargo check --locked -p wgsep-tokio -p wgsep-proto-c --no-default-features --lib --examples "${systems[@]/#/--target=}"

# run TARGET RUNNER [LINKER]: the unit tests, by an emulator.
run() {
	echo
	echo "on $1:"
	export "CARGO_TARGET_$(variable "$1")_RUNNER=$2"
	[ -z "${3:-}" ] || export "CARGO_TARGET_$(variable "$1")_LINKER=$3"
	cargo test --locked --lib -p wgsep-proto --target "$1"
}

run aarch64-unknown-linux-gnu "qemu-aarch64-static -L /usr/aarch64-linux-gnu" aarch64-linux-gnu-gcc
run armv7-unknown-linux-gnueabihf "qemu-arm-static -L /usr/arm-linux-gnueabihf" arm-linux-gnueabihf-gcc
run s390x-unknown-linux-gnu "qemu-s390x-static -L /usr/s390x-linux-gnu" s390x-linux-gnu-gcc
run wasm32-wasip1 "$PWD/tests/wasi.mjs"

export WINEPREFIX=$directory/wine WINEDEBUG=-all
wine=/usr/lib/wine
trap '"$wine/wineserver64" -k && "$wine/wineserver64" -w; rm -rf --one-file-system "$WINEPREFIX"' EXIT
# Beside the programs, where Windows looks for it first.
mkdir -p "$directory/x86_64-pc-windows-gnu/debug/deps"
x86_64-w64-mingw32-gcc -shared -o "$directory/x86_64-pc-windows-gnu/debug/deps/bcryptprimitives.dll" \
	tests/bcryptprimitives.c -ladvapi32
run x86_64-pc-windows-gnu "$wine/wine64" x86_64-w64-mingw32-gcc

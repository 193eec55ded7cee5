#!/bin/bash
# Builds both programs and the package from nothing once more, from a copy of this tree in another directory, with
# cargo's home at another path, another time zone, language and umask, and compares all three
# with those that `make deb` has made here. Called by `make reproducible`.
set -euo pipefail
cd "$(dirname "$0")/.."

target=${CARGO_TARGET_DIR:-$PWD/target}
elsewhere=$target/reproducible/of/a/longer/path
rm -rf --one-file-system "$target/reproducible"
mkdir -p "$elsewhere/tree"
git ls-files -z | xargs -0 cp --parents --target-directory "$elsewhere/tree"
ln -s "${CARGO_HOME:-$HOME/.cargo}" "$elsewhere/cargo"

# The copy has no repository to read these from.
version=$(cat "$target/release/wgsep.version")
date=${SOURCE_DATE_EPOCH:-$(bin/dist/version date)}
(
	cd "$elsewhere/tree"
	umask 077
	env --unset MAKEFLAGS --unset WGSEP_BIN_DIR CARGO_HOME="$elsewhere/cargo" CARGO_TARGET_DIR="$elsewhere/out" \
		TZ=Asia/Tokyo LANG=C.UTF-8 LC_ALL=C.UTF-8 \
		make --no-print-directory deb WGSEP_VERSION="$version" SOURCE_DATE_EPOCH="$date"
)

failed=0
for file in release/wgsep release/wgsep-dataplane "$(basename "$target"/wgsep_*_"$(dpkg --print-architecture)".deb)"; do
	if cmp "$target/$file" "$elsewhere/out/$file"; then
		echo "the same bytes: $(sha256sum "$target/$file" | cut -d ' ' -f 1)  ${file##*/}"
	else
		failed=1
	fi
done
# What differs is left to be looked at.
[ "$failed" = 1 ] || rm -rf --one-file-system "$target/reproducible"
exit "$failed"

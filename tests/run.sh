#!/bin/bash
# Runs every test of the workspace and prints what passed, failed and was skipped.
# Called by `make test`, which builds the programs first.
set -euo pipefail
cd "$(dirname "$0")/.."

output=$(mktemp)
WGSEP_SKIP_FILE=$(mktemp)
export WGSEP_SKIP_FILE
trap 'rm -f "$output" "$WGSEP_SKIP_FILE"' EXIT

# System tests mostly wait for each other's processes. Two at a time keep two cores busy; more
# would make timings of one the load of another.
threads=2

failed=0
test_packages() {
	cargo test --locked --no-fail-fast "$@" 2>&1 | tee -a "$output" || failed=1
}
test_packages --workspace --exclude wgsep-tests
# Without optimisation the compiler copies rows of a batch to the stack, and what ships is optimised.
test_packages --release -p wgsep-aead --test erasure
test_packages -p wgsep-tests -- --test-threads="$threads"

# A daemon that was started with less than root has is attacked as well.
attacks_on_a_daemon=$(make --no-print-directory -s print-attacks-on-a-daemon)
for way in file-capability container; do
	echo
	echo "== started as: $way"
	# shellcheck disable=SC2086
	tests/attacks_as.sh "$way" cargo test --locked --no-fail-fast -p wgsep-tests $attacks_on_a_daemon \
		--test-threads="$threads" 2>&1 | tee -a "$output" || failed=1
done

# With musl both programs make other system calls. What confines them is tried with that pair as well, as
# `make other-targets` built it.
musl=x86_64-unknown-linux-musl
musl_bin=${CARGO_TARGET_DIR:-target}/$musl/release
if [ -x "$musl_bin/hostile-dataplane" ]; then
	echo
	echo "== with musl"
	test_packages --target $musl -p wgsep-policy -p wgsep-ipc
	musl_bin=$(realpath "$musl_bin")
	# But for the table of the calls of a start, which is glibc's.
	WGSEP_BIN_DIR=$musl_bin test_packages -p wgsep-tests --test attacks -- --test-threads="$threads" \
		--skip whichever_call_is_refused --skip every_call_of_a_start
	WGSEP_BIN_DIR=$musl_bin test_packages -p wgsep-tests --test system --test meta -- --test-threads="$threads" \
		audit:: programs::
else
	echo "musl::sandbox: $musl_bin is missing: run \`make other-targets\`" >>"$WGSEP_SKIP_FILE"
fi

echo
awk -v skipped="$(wc -l <"$WGSEP_SKIP_FILE")" '/^test result:/ { passed += $4; failed += $6 }
	END { printf "%d passed, %d failed, %d skipped\n", passed, failed, skipped }' "$output"

# Again, because each may be thousands of lines above: which tests failed, and the beginning of what each said.
if [ "$failed" = 1 ]; then
	awk '/^---- .* stdout ----$/ { print ""; lines = 40 }
		/^failures:$/ { lines = 0 }
		lines > 0 { print; lines-- }' "$output"
fi

# In CI a skip must be one that is known and accepted; anywhere else it is only printed.
while IFS= read -r skip; do
	echo "skipped: $skip"
	if [ "${CI:-}" = true ] && ! grep -qxF "${skip%%: *}" tests/skips.allow; then
		echo "  which tests/skips.allow does not accept" >&2
		failed=1
	fi
done <"$WGSEP_SKIP_FILE"
exit "$failed"

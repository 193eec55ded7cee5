#!/bin/sh
# Installs what building and testing need:
#   deps.sh system      Debian packages; and says how to get Rust where it is missing
#   deps.sh peers       the implementations the tests talk to, from crates.io and Debian's sid
#   deps.sh kernel      qemu, and the kernel that it boots as a peer
#   deps.sh arm64       qemu for aarch64, and what Debian's arm64 kernel boots there
#   deps.sh target T    what building for T takes, which is a target of rustc's; also deps.sh emulator
#   deps.sh targets     what tests/targets.sh takes: targets of rustc's, compilers and emulators
#   deps.sh debian      two Debians to install the package into, 12 and 13; what checks the package and manual pages
#   deps.sh prometheus  Prometheus, which reads what wgsep writes for it
#   deps.sh rosenpass   rosenpass, which sets preshared keys
#   deps.sh kubernetes  kubernetes-validate, which knows what a recipe for Kubernetes may say
#   deps.sh deny        cargo-deny
#   deps.sh cbindgen    cbindgen, which writes the header for C
#   deps.sh semver      cargo-semver-checks, which compares the libraries with the last release
#   deps.sh where NAME  the cache entry of that name: boringtun-cli, gotatun-cli, wireguard-go, cargo-deny, cbindgen,
#                       cargo-semver-checks, kernel, arm64, debian, debian-13, prometheus, rosenpass, kubernetes-validate
set -eu

packages="gcc libc6-dev make binutils git ca-certificates iproute2 iputils-ping iperf3 ethtool nftables
	procps util-linux libcap2-bin locales wireguard-tools wireguard-go jq valgrind"

# Outside the tree, so that neither `make clean` nor a fresh clone costs the build again.
cache="${XDG_CACHE_HOME:-$HOME/.cache}/wgsep"

recipes="$(dirname "$0")/deps"

say() { echo "deps: $*" >&2; }
fail() { say "$*"; exit 1; }

# Only for the machine in which the kernel's WireGuard runs.
machine_packages="qemu-system-x86 busybox-static cpio kmod libc-bin"

# Of `targets` only: clang compiles what is checked, the others link and run what is run.
target_packages="clang qemu-user-static gcc-aarch64-linux-gnu libc6-dev-arm64-cross gcc-arm-linux-gnueabihf
	libc6-dev-armhf-cross gcc-s390x-linux-gnu libc6-dev-s390x-cross gcc-mingw-w64-x86-64 wine64"

# Of `debian` only.
packaging_packages="dpkg-dev debootstrap systemd-container mandoc man-db libcap2-bin zsh fish lintian"

missing_packages() {
	for package in $packages; do
		status=$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null) || status=
		[ "$status" = "install ok installed" ] || echo "$package"
	done
}

# apt-get, waiting for another one to finish, and asking nothing.
apt_get() { DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600 "$@" </dev/null; }

install_packages() {
	if ! command -v apt-get >/dev/null; then
		say "this is no Debian: see to it that these are installed: $(echo $packages)"
		return
	fi
	missing=$(missing_packages)
	[ -n "$missing" ] || return 0
	missing=$(echo $missing)
	[ "$(id -u)" = 0 ] || fail "as root, run: apt-get install --no-install-recommends $missing"
	say "installing $missing"
	# wireguard-tools recommends a whole kernel; nothing here needs one.
	apt_get install -y --no-install-recommends $missing >/dev/null 2>&1 && return
	# The package lists are missing or old.
	apt_get update || fail "apt-get update failed: is there a network?"
	apt_get install -y --no-install-recommends $missing >/dev/null || fail "cannot install $missing"
}

install_rust() {
	if ! command -v cargo >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null &&
		apt-cache show rustup >/dev/null 2>&1; then
		say "installing rustup and a Rust toolchain"
		apt_get install -y --no-install-recommends rustup >/dev/null
		rustup toolchain install stable --profile minimal -c clippy -c rustfmt
	fi
	"$recipes"/../../bin/dist/check-tools rust
}

# A cache entry is made by a recipe, a program in tests/deps, and its directory is named after all
# that it is made of: NAME-RECIPE-INPUTS, where RECIPE is a hash of the recipe and its arguments, and
# INPUTS one of what the recipe says it depends on. The symbolic link NAME-RECIPE, which is what
# `deps.sh where` prints, leads to the current one. So a change of a recipe, of a version in it or of an
# input makes a new entry, and trees with different recipes share a cache without a clash.
entries="boringtun-cli gotatun-cli wireguard-go cargo-deny cbindgen cargo-semver-checks kernel arm64 debian debian-13
	prometheus rosenpass kubernetes-validate"

recipe_of() {
	case "$1" in
	boringtun-cli) echo crate boringtun-cli 0.7.1 ;;
	gotatun-cli) echo crate gotatun-cli 0.10.2 ;;
	cargo-deny) echo crate cargo-deny 0.20.2 ;;
	wireguard-go | kernel | arm64 | prometheus | kubernetes-validate) echo "$1" ;;
	cbindgen) echo crate cbindgen 0.29.4 ;;
	cargo-semver-checks) echo crate cargo-semver-checks 0.51.0 ;;
	debian) echo debian bookworm ;;
	rosenpass) echo rosenpass 0.2.3 ;;
	# needrestart is not in the other: it is one of many programs that a Debian may have.
	debian-13) echo debian trixie needrestart ;;
	*) fail "unknown cache entry $1; known: $entries" ;;
	esac
}

hash() { sha256sum | cut -c 1-12; }

# where NAME: the entry's link, whether or not the entry exists.
where() {
	recipe=$(recipe_of "$1")
	program=$recipes/${recipe%% *}
	echo "$cache/$1-$({ echo "$recipe"; cat "$program"; } | hash)"
}

# obtain NAME: makes the entry where it is missing. One process at a time; an entry gets its name
# when it is complete, and what an interrupted run left is removed.
obtain() {
	mkdir -p "$cache"
	(
		flock --nonblock 9 || {
			say "waiting for another run that fills $cache"
			flock 9
		}
		make_entry "$1"
	) 9>"$cache/lock"
}

make_entry() {
	recipe=$(recipe_of "$1")
	arguments=$(echo "$recipe" | cut -s -d ' ' -f 2-)
	recipe=$recipes/${recipe%% *}
	link=$(where "$1")
	inputs=$("$recipe" $arguments --inputs 2>/dev/null) || return 1
	entry=$link-$(echo "$inputs" | hash)
	rm -rf --one-file-system "$cache"/*.new
	if [ ! -d "$entry" ]; then
		say "making $1 in $entry (once)"
		if ! "$recipe" $arguments "$entry.new" >"$entry.log" 2>&1 9>&-; then
			say "cannot make $1: the end of $entry.log:"
			tail -n 5 "$entry.log" >&2
			return 1
		fi
		mv "$entry.new" "$entry" || return 1
	fi
	# Replaced in one step: another run may be looking it up.
	ln -s "$(basename "$entry")" "$link.new" && mv -T "$link.new" "$link" || return 1
	remove_superseded
}

# Removes what no recipe of this tree makes any more. Not at once: another tree, of another version,
# may be running its tests with it.
remove_superseded() {
	for name in $entries; do
		link=$(where "$name")
		if [ -L "$link" ]; then
			touch --no-dereference "$link"
			touch "$(readlink -f "$link")"
		fi
	done
	find "$cache" -mindepth 1 -maxdepth 1 ! -name lock -mmin +1440 \
		-exec rm -rf --one-file-system {} +
}

# install_libraries TARGET...: rustc's library for each.
install_libraries() {
	"$recipes"/../../bin/dist/check-tools rust
	for target; do
		[ ! -d "$(rustc --print target-libdir --target "$target" 2>/dev/null)" ] || continue
		command -v rustup >/dev/null ||
			fail "rustc has no library for $target: install Rust with rustup, or that library"
		say "installing rustc's library for $target"
		rustup target add "$target" || fail "rustup has no library for $target: is there a network?"
	done
}

# install_target TARGET: rustc's library for it, and a C compiler for it, which also links.
install_target() {
	install_libraries "$1"
	case "$1" in
	aarch64-*-gnu)
		compiler=aarch64-linux-gnu-gcc
		packages="gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
		;;
	*-musl)
		compiler=musl-gcc
		packages=musl-tools
		;;
	*)
		return
		;;
	esac
	# Where that machine is this one, or another distribution, they may have another name.
	if [ "${1%%-*}" != "$(uname -m)" ] || [ "$compiler" = musl-gcc ]; then
		command -v "$compiler" >/dev/null || install_packages
	fi
}

case "${1:-}" in
system)
	install_packages
	install_rust
	;;
peers)
	# A peer that cannot be built is a skipped test, named there, and no reason to run none.
	obtain boringtun-cli || say "boringtun-cli cannot be built here"
	obtain gotatun-cli || say "gotatun-cli cannot be built here"
	obtain wireguard-go || say "Debian's newest wireguard-go cannot be had here"
	;;
kernel)
	# A kernel that cannot be had or booted is a skipped test too.
	command -v apt-get >/dev/null || exit 0
	packages="$machine_packages"
	(install_packages) || say "qemu cannot be installed here"
	# The package lists may be missing or old.
	obtain kernel || { apt_get update && obtain kernel; } || say "Debian's kernel cannot be unpacked here"
	;;
arm64)
	command -v apt-get >/dev/null || exit 0
	packages="$machine_packages qemu-system-arm"
	(install_packages) || say "qemu cannot be installed here"
	obtain arm64 || say "Debian's arm64 kernel cannot be had here"
	;;
target)
	install_target "${2:?deps.sh target TARGET}"
	;;
targets)
	install_libraries $("$recipes"/../targets.sh list | cut -d ' ' -f 2)
	packages=$target_packages
	install_packages
	# Debian's own nodejs, or another that is there.
	command -v node >/dev/null || { packages=nodejs && install_packages; }
	;;
emulator)
	packages="qemu-user-static"
	install_packages
	;;
debian)
	# Where this is impossible the tests that want it are skipped, and say so.
	packages=$packaging_packages
	(install_packages) || exit 0
	if [ "$(id -u)" = 0 ] && command -v debootstrap >/dev/null; then
		obtain debian || say "cannot bootstrap a Debian 12 here"
		obtain debian-13 || say "cannot bootstrap a Debian 13 here"
	fi
	;;
prometheus)
	command -v apt-get >/dev/null || exit 0
	# The package lists may be missing or old.
	obtain prometheus || { apt_get update && obtain prometheus; } || say "Debian's Prometheus cannot be had here"
	;;
rosenpass)
	command -v apt-get >/dev/null || exit 0
	packages="cmake g++ libclang-dev libsodium-dev pkg-config"
	(install_packages) || say "what rosenpass is built with cannot be installed here"
	obtain rosenpass || say "rosenpass cannot be built here"
	;;
kubernetes)
	command -v apt-get >/dev/null || exit 0
	packages="python3 python3-venv"
	(install_packages) || say "Python cannot be installed here"
	obtain kubernetes-validate || say "kubernetes-validate cannot be had here"
	;;
deny)
	obtain cargo-deny
	;;
cbindgen)
	obtain cbindgen || say "cbindgen cannot be built here"
	;;
semver)
	obtain cargo-semver-checks
	;;
where)
	where "${2:-}"
	;;
*)
	fail "usage: deps.sh system|peers|kernel|arm64|debian|prometheus|rosenpass|kubernetes|deny|cbindgen|semver|emulator|target TARGET|targets|where NAME"
	;;
esac

#!/bin/sh
# Installs what building and testing need:
#   deps.sh system   Debian packages; and says how to get Rust where it is missing
#   deps.sh peers    the implementations the tests talk to, from crates.io, into a cache
#   deps.sh kernel   qemu, and the kernel that it boots as a peer, unpacked into the same cache
#   deps.sh debian   a Debian to install the package into, into the same cache; who checks manual pages
#   deps.sh deny     cargo-deny, into the same cache
set -eu

packages="gcc libc6-dev make binutils ca-certificates iproute2 iputils-ping iperf3 ethtool nftables procps
	util-linux libcap2-bin wireguard-tools wireguard-go jq"

# The oldest Rust that builds the workspace: rust-version in Cargo.toml.
rust_minor=95

# Outside the tree, so that neither `make clean` nor a fresh clone costs the build again.
cache="${XDG_CACHE_HOME:-$HOME/.cache}/wgsep"

say() { echo "deps: $*" >&2; }
fail() { say "$*"; exit 1; }

# Only for the machine in which the kernel's WireGuard runs.
machine_packages="qemu-system-x86 busybox-static cpio kmod libc-bin"

# Of `debian` only.
packaging_packages="debootstrap systemd-container mandoc man-db libcap2-bin"

missing_packages() {
	for package in $packages; do
		status=$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null) || status=
		[ "$status" = "install ok installed" ] || echo "$package"
	done
}

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
	install="env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends"
	$install $missing >/dev/null 2>&1 && return
	# The package lists are missing or old.
	apt-get update -qq || fail "apt-get update failed: is there a network?"
	$install $missing >/dev/null || fail "cannot install $missing"
}

check_rust() {
	if ! command -v cargo >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null &&
		apt-cache show rustup >/dev/null 2>&1; then
		say "installing rustup and a Rust toolchain"
		apt-get install -qq -y --no-install-recommends rustup >/dev/null
		rustup toolchain install stable --profile minimal -c clippy -c rustfmt
	fi
	get="install Rust 1.$rust_minor or newer with rustup (https://rustup.rs), then run this again"
	command -v cargo >/dev/null || fail "there is no cargo: $get"
	version=$(cargo --version)
	minor=$(echo "$version" | sed -n 's/^cargo 1\.\([0-9]*\)\..*/\1/p')
	[ "${minor:-0}" -ge "$rust_minor" ] || fail "$version is too old: $get"
}

# cargo_install CRATE VERSION: nothing to do where that very version is there already.
cargo_install() {
	root="$cache/peers"
	if cargo install --list --root "$root" 2>/dev/null | grep -q "^$1 v$2:"; then
		return
	fi
	say "building $1 $2 into $root (once)"
	cargo install --quiet --locked --root "$root" --target-dir "$root/target" "$1@$2"
	rm -rf "$root/target"
}

# Debian's kernel: unpacked, never installed. Not the one for virtual machines, which has no driver
# (vmgenid) for learning that its machine was copied.
fetch_kernel() {
	[ ! -d "$cache/kernel/boot" ] || return 0
	[ "$(dpkg --print-architecture)" = amd64 ] || return 1
	package=$(apt-cache depends linux-image-amd64 |
		sed -n 's/^ *Depends: \(linux-image-.*\)/\1/p' | head -n 1)
	[ -n "$package" ] || return 1
	say "fetching $package into $cache/kernel (once)"
	work=$(mktemp -d)
	# apt leaves root's rights behind to download, and must be able to write here.
	chmod 755 "$work"
	(cd "$work" && apt-get download -qq -o APT::Sandbox::User=root "$package" >/dev/null 2>&1) &&
		mkdir -p "$cache" && dpkg-deb -x "$work"/linux-image-*.deb "$work/kernel" &&
		rm -rf "$cache/kernel" && mv "$work/kernel" "$cache/kernel"
	status=$?
	rm -rf "$work"
	return "$status"
}

case "${1:-}" in
system)
	install_packages
	check_rust
	;;
peers)
	# A peer that cannot be built is a skipped test, named there, and no reason to run none.
	cargo_install boringtun-cli 0.7.1 || say "boringtun-cli cannot be built here"
	cargo_install gotatun-cli 0.10.2 || say "gotatun-cli cannot be built here"
	;;
kernel)
	# A kernel that cannot be had or booted is a skipped test too.
	command -v apt-get >/dev/null || exit 0
	packages="$machine_packages"
	(install_packages) || say "qemu cannot be installed here"
	# The package lists may be missing or old.
	fetch_kernel || { apt-get update -qq && fetch_kernel; } ||
		say "Debian's kernel cannot be had here"
	;;
debian)
	# Where this is impossible the tests that want it are skipped, and say so.
	packages=$packaging_packages
	(install_packages) || exit 0
	root="${XDG_CACHE_HOME:-$HOME/.cache}/wgsep/debian"
	if [ ! -d "$root" ] && [ "$(id -u)" = 0 ] && command -v debootstrap >/dev/null; then
		say "bootstrapping a Debian into $root (once)"
		rm -rf "$root.new"
		debootstrap --variant=minbase \
			--include=systemd,systemd-sysv,wireguard-tools,iproute2,iputils-ping,libcap2-bin \
			bookworm "$root.new" >"$root.log" 2>&1 && mv "$root.new" "$root" ||
			say "cannot bootstrap a Debian here: see $root.log"
	fi
	;;
deny)
	cargo_install cargo-deny 0.20.2
	;;
*)
	fail "usage: deps.sh system|peers|kernel|debian|deny"
	;;
esac

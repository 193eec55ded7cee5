#!/bin/sh
# Runs the tests of attacks with wgsep started in one way: root, file-capability or container.
# usage: attacks_as.sh WAY COMMAND [ARGUMENT...]
set -eu
way=$1; shift
programs=${WGSEP_BIN_DIR:-$PWD/target/release}
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
chmod 755 "$directory"
install -m 755 "$programs/wgsep" "$programs/hostile-dataplane" "$directory"
install -m 711 "$programs/wgsep-dataplane" "$directory"
if [ "$way" = file-capability ]; then
	setcap cap_net_admin+ep "$directory/wgsep"
fi
# A socket directory that users may write, and a TUN device that they may open, for this run only.
unshare --mount --propagation private sh -eu -c '
	mkdir -p /run/wireguard
	mount -t tmpfs -o mode=1777 none /run/wireguard
	mount -t tmpfs -o mode=755 none /dev/net
	mknod -m 666 /dev/net/tun c 10 200
	exec "$@"
' sh env WGSEP_ATTACKS_AS="$way" WGSEP_BIN_DIR="$directory" "$@"

#!/bin/bash
# A tunnel between two network namespaces, with a wgsep in each, shown step by step.
# Called by `make demo`. Exits 0 only if every step worked; leaves nothing behind either way.
set -euo pipefail

programs=${WGSEP_BIN_DIR:-$(dirname "$0")/../target/release}
wgsep=$(realpath "$programs/wgsep")

# Both ends, by number. The process id keeps two demos apart.
netns=([1]="wgsep-demo-$$-1" [2]="wgsep-demo-$$-2")
interface=([1]="wgdemo${$}a" [2]="wgdemo${$}b")
helper=()
keys=$(mktemp -d)

step() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
fail() { echo "demo: $*" >&2; exit 1; }

clean_up() {
	for end in 1 2; do
		if [ -n "${helper[$end]:-}" ]; then
			kill "${helper[$end]}" 2>/dev/null || true
		fi
		ip netns del "${netns[$end]}" 2>/dev/null || true
	done
	rm -rf "$keys"
}
trap clean_up EXIT

in_netns() {
	local end=$1
	shift
	ip netns exec "${netns[$end]}" "$@"
}

other() { echo $((3 - $1)); }

make_network() {
	ip netns add "${netns[1]}"
	ip netns add "${netns[2]}"
	ip -n "${netns[1]}" link add veth0 type veth peer name veth0 netns "${netns[2]}"
	for end in 1 2; do
		ip -n "${netns[$end]}" addr add "10.77.0.$end/24" dev veth0
		ip -n "${netns[$end]}" link set veth0 up
	done
	echo "10.77.0.1 <-> 10.77.0.2"
}

# Without -f the command returns once the interface exists and wg(8) can talk to it.
start_daemons() {
	for end in 1 2; do
		in_netns "$end" "$wgsep" "${interface[$end]}"
		helper[end]=$(ip netns pids "${netns[$end]}" | head -n 1)
		[ -n "${helper[$end]}" ] || fail "no process serves ${interface[$end]}"
		echo "wgsep ${interface[$end]}: helper ${helper[$end]}, dataplane $(dataplane "$end")"
	done
}

dataplane() { pgrep -P "${helper[$1]}" || fail "the helper ${helper[$1]} has no child"; }

configure() {
	umask 077
	wg genpsk >"$keys/psk"
	for end in 1 2; do
		wg genkey >"$keys/$end"
		wg pubkey <"$keys/$end" >"$keys/$end.public"
	done
	for end in 1 2; do
		local peer
		peer=$(other "$end")
		wg set "${interface[$end]}" private-key "$keys/$end" listen-port 51820 \
			peer "$(cat "$keys/$peer.public")" preshared-key "$keys/psk" \
			endpoint "10.77.0.$peer:51820" allowed-ips "192.168.77.$peer/32"
		ip -n "${netns[$end]}" addr add "192.168.77.$end/24" dev "${interface[$end]}"
		ip -n "${netns[$end]}" link set "${interface[$end]}" up
	done
	echo "keys, a preshared key, endpoints, 192.168.77.1 <-> 192.168.77.2"
}

# field FIELD PID: the value in /proc/PID/task/*/status, once if all threads agree.
field() { awk -F '\t' -v name="$1:" '$1 == name { print $2 }' /proc/"$2"/task/*/status | sort -u; }

# check NAME PID FIELD EXPECTED: prints the field and fails where the kernel says otherwise.
check() {
	local found
	found=$(field "$3" "$2")
	[ "$found" = "$4" ] || fail "$1 ($2): $3 is '$found', not '$4'"
	printf '  %-12s %s\n' "$3" "$found"
}

show_sandbox() {
	local none=0000000000000000
	# CAP_NET_ADMIN (bit 12) and CAP_KILL (bit 5).
	local two=0000000000001020
	for end in 1 2; do
		local pid=${helper[$end]}
		echo "helper $pid, $(ls "/proc/$pid/task" | wc -l) thread"
		check helper "$pid" CapEff $two
		check helper "$pid" CapBnd $none
		check helper "$pid" NoNewPrivs 1
		check helper "$pid" Seccomp 2

		pid=$(dataplane "$end")
		echo "dataplane $pid, $(ls "/proc/$pid/task" | wc -l) threads, every one:"
		for set in CapInh CapPrm CapEff CapBnd CapAmb; do
			check dataplane "$pid" "$set" $none
		done
		check dataplane "$pid" NoNewPrivs 1
		check dataplane "$pid" Seccomp 2
		local uid
		uid=$(awk '$1 == "Uid:" { print $2 }' "/proc/$pid/status")
		[ "$uid" != 0 ] || fail "the dataplane $pid runs as root"
		[ -z "$(ls -A "/proc/$pid/root/")" ] || fail "the dataplane $pid sees files"
		for kind in net mnt ipc uts; do
			[ "$(readlink "/proc/$pid/ns/$kind")" != "$(readlink "/proc/${helper[$end]}/ns/$kind")" ] ||
				fail "the dataplane $pid shares the helper's $kind namespace"
		done
		echo "  uid $uid, empty root, own net, mnt, ipc and uts namespaces"
	done
}

measure() {
	in_netns 2 iperf3 -s -1 -D --logfile "$keys/server"
	local listening=
	for _ in $(seq 100); do
		[ -z "$(in_netns 2 ss -H -t -l -n 'sport = :5201')" ] || { listening=yes; break; }
		sleep 0.05
	done
	[ -n "$listening" ] || fail "the iperf3 server does not listen"
	# One line a second, as it goes.
	in_netns 1 iperf3 -c 192.168.77.2 -t 5 -i 1 --forceflush -f g |
		awk '$NF == "receiver" { print "  received:", $7, $8; seen = 1 }
			/sec/ && !/sender|receiver/ { print "  second " ++second ":", $7, $8; fflush() }
			END { exit !seen }' || fail "iperf3 did not finish"
}

# A zombie has ended, however late its parent notices.
is_running() { [ -d "/proc/$1" ] && ! grep -q '^State:[[:space:]]*Z' "/proc/$1/status" 2>/dev/null; }

end_all() {
	for end in 1 2; do
		kill "${helper[$end]}"
		for _ in $(seq 100); do
			is_running "${helper[$end]}" || break
			sleep 0.01
		done
		! is_running "${helper[$end]}" || fail "wgsep ${interface[$end]} has not ended within a second"
		[ ! -e "/var/run/wireguard/${interface[$end]}.sock" ] || fail "its socket is left behind"
		! ip -n "${netns[$end]}" link show "${interface[$end]}" >/dev/null 2>&1 ||
			fail "its interface is left behind"
	done
	echo "processes, sockets and interfaces are gone"
}

[ "$(id -u)" = 0 ] || fail "needs root, to make network namespaces"
[ -x "$wgsep" ] || fail "$wgsep is missing: run \`make\` first"

step "Two network namespaces joined by a veth pair"
make_network
step "A wgsep in each"
start_daemons
step "Configured with wg(8)"
configure
step "Ping through the tunnel"
in_netns 1 ping -n -c 3 -i 0.2 -W 5 192.168.77.2
step "wg show"
for end in 1 2; do wg show "${interface[$end]}"; done
step "The sandbox of all four processes, read from /proc"
show_sandbox
step "Five seconds of TCP"
measure
step "End"
end_all
echo
echo "demo: all of it worked"

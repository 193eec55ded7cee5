# bash completion for wgsep(8)                                             -*- shell-script -*-

# _wgsep_names DIRECTORY SUFFIX: the names of its files, without the suffix.
_wgsep_names() {
	local file
	for file in "$1"/*"$2"; do
		[ -e "$file" ] || continue
		file=${file##*/}
		echo "${file%"$2"}"
	done
}

# The files that have a daemon to start: those of /etc/wireguard without a socket.
_wgsep_startable() {
	local name
	for name in $(_wgsep_names /etc/wireguard .conf); do
		[ -e "/var/run/wireguard/$name.sock" ] || echo "$name"
	done
}

_wgsep() {
	local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} command='' word words
	# `--option=value` comes as three words.
	[ "$cur" != = ] || cur=''
	[ "$prev" != = ] || prev=${COMP_WORDS[COMP_CWORD - 2]}
	for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
		case $word in audit | stats | upgrade | watch) command=$word ;; esac
	done
	case $prev in
	--user) words=$(compgen -u) ;;
	--status-group | --psk-group) words=$(compgen -g) ;;
	--sandbox) words='strict report' ;;
	--log-level) words='silent error info debug' ;;
	--log-format) words='text json' ;;
	--without) words='vnet-hdr tso uso flow-queues udp-gso udp-gro avx512' ;;
	--socket-netns | --tun-netns) words=$(_wgsep_names /run/netns '') ;;
	--bind-device) words=$(_wgsep_names /sys/class/net '') ;;
	--log-file)
		mapfile -t COMPREPLY < <(compgen -f -- "$cur")
		return
		;;
	--listen-port | --listen-address | --fwmark | --workers | --status-mode) return ;;
	*)
		case $command:$cur in
		upgrade:-*) words='--help' ;;
		stats:-*) words='--json --prometheus --watch --help' ;;
		?*:-*) words='--json --help' ;;
		?*:*) words=$(_wgsep_names /var/run/wireguard .sock) ;;
		:-*)
			words='--foreground --user --sandbox --listen-port --listen-address --bind-device --fwmark
				--allow-low-ports --socket-netns --tun-netns --workers --without --status-group --status-mode --psk-group
				--log-level --log-format --log-file --help --version'
			;;
		*) words="audit stats upgrade watch $(_wgsep_startable)" ;;
		esac
		;;
	esac
	mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
}

complete -F _wgsep wgsep

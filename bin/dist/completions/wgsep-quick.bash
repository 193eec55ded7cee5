# bash completion for wgsep-quick(8)                                       -*- shell-script -*-

# _wgsep_quick_names DIRECTORY SUFFIX: the names of its files, without the suffix.
_wgsep_quick_names() {
	local file
	for file in "$1"/*"$2"; do
		[ -e "$file" ] || continue
		file=${file##*/}
		echo "${file%"$2"}"
	done
}

_wgsep_quick() {
	local cur=${COMP_WORDS[COMP_CWORD]} words name
	case $COMP_CWORD:$cur in
	1:*) words='up down reload resolve save strip' ;;
	2:*/*)
		mapfile -t COMPREPLY < <(compgen -f -X '!*.conf' -- "$cur")
		return
		;;
	2:*)
		words=$(_wgsep_quick_names /etc/wireguard .conf)
		case ${COMP_WORDS[1]} in
		up)
			words=$(for name in $words; do
				[ -e "/run/wireguard/$name.sock" ] || echo "$name"
			done)
			;;
		down) words=$(_wgsep_quick_names /run/wireguard .sock; _wgsep_quick_names /run/wgsep-quick .conf) ;;
		reload | resolve | save) words=$(_wgsep_quick_names /run/wireguard .sock) ;;
		esac
		;;
	*) return ;;
	esac
	mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
}

complete -o filenames -F _wgsep_quick wgsep-quick

# fish completion for wgsep-quick(8)

# __wgsep_quick_names DIRECTORY SUFFIX: the names of its files, without the suffix.
function __wgsep_quick_names
    for file in $argv[1]/*$argv[2]
        string replace --regex '\.[^.]*$' '' (string replace --regex '.*/' '' $file)
    end
end

# The files of which nothing runs.
function __wgsep_quick_startable
    for name in (__wgsep_quick_names /etc/wireguard .conf)
        test -e /run/wireguard/$name.sock; or echo $name
    end
end

complete -c wgsep-quick -f
complete -c wgsep-quick -n 'not __fish_seen_subcommand_from up down reload resolve save strip' -a 'up down reload resolve save strip'
complete -c wgsep-quick -n '__fish_seen_subcommand_from up' -a '(__wgsep_quick_startable)'
complete -c wgsep-quick -n '__fish_seen_subcommand_from down reload resolve save' -a '(__wgsep_quick_names /run/wireguard .sock)'
complete -c wgsep-quick -n '__fish_seen_subcommand_from down' -a '(__wgsep_quick_names /run/wgsep-quick .conf)'
complete -c wgsep-quick -n '__fish_seen_subcommand_from strip' -a '(__wgsep_quick_names /etc/wireguard .conf)'

# fish completion for wgsep(8)

# __wgsep_names DIRECTORY SUFFIX: the names of its files, without the suffix.
function __wgsep_names
    for file in $argv[1]/*$argv[2]
        string replace --regex '\.[^.]*$' '' (string replace --regex '.*/' '' $file)
    end
end

# The files that have a daemon to start: those of /etc/wireguard without a socket.
function __wgsep_startable
    for name in (__wgsep_names /etc/wireguard .conf)
        test -e /var/run/wireguard/$name.sock; or echo $name
    end
end

function __wgsep_is_question
    __fish_seen_subcommand_from audit stats upgrade watch
end

complete -c wgsep -f
complete -c wgsep -n 'not __wgsep_is_question' -a 'audit stats upgrade watch (__wgsep_startable)'
complete -c wgsep -n __wgsep_is_question -a '(__wgsep_names /var/run/wireguard .sock)'
complete -c wgsep -n '__fish_seen_subcommand_from audit stats watch' -l json -d 'As JSON instead of text'
complete -c wgsep -n '__fish_seen_subcommand_from stats' -l prometheus -d 'As Prometheus reads it'
complete -c wgsep -n '__fish_seen_subcommand_from stats' -l watch -d 'Again and again'
complete -c wgsep -s h -l help -d 'Print help'

complete -c wgsep -n 'not __wgsep_is_question' -s f -l foreground -d 'Stay in the foreground'
complete -c wgsep -n 'not __wgsep_is_question' -l user -x -a '(__fish_complete_users)' -d 'Account of the dataplane'
complete -c wgsep -n 'not __wgsep_is_question' -l sandbox -x -a 'strict report' -d 'Refuse a degraded layer'
complete -c wgsep -n 'not __wgsep_is_question' -l listen-port -x -d 'The only UDP port'
complete -c wgsep -n 'not __wgsep_is_question' -l fwmark -x -d 'The only marks'
complete -c wgsep -n 'not __wgsep_is_question' -l listen-address -x -d 'Addresses to listen on'
complete -c wgsep -n 'not __wgsep_is_question' -l bind-device -x -a '(path basename /sys/class/net/*)' -d 'Interface of the UDP sockets'
complete -c wgsep -n 'not __wgsep_is_question' -l allow-low-ports -d 'Let wg(8) choose a port below 1024'
complete -c wgsep -n 'not __wgsep_is_question' -l socket-netns -x -a '(path basename /run/netns/*)' -d 'Namespace of the UDP sockets'
complete -c wgsep -n 'not __wgsep_is_question' -l tun-netns -x -a '(path basename /run/netns/*)' -d 'Namespace of the interface'
complete -c wgsep -n 'not __wgsep_is_question' -l workers -x -d 'Worker threads'
complete -c wgsep -n 'not __wgsep_is_question' -l without -x -a 'vnet-hdr tso uso flow-queues udp-gso udp-gro avx512' -d 'Do without an offload'
complete -c wgsep -n 'not __wgsep_is_question' -l status-group -x -a '(__fish_complete_groups)' -d 'Whose members may read the status'
complete -c wgsep -n 'not __wgsep_is_question' -l status-mode -x -d 'Mode of the status socket'
complete -c wgsep -n 'not __wgsep_is_question' -l psk-group -x -a '(__fish_complete_groups)' -d 'Whose members may set preshared keys alone'
complete -c wgsep -n 'not __wgsep_is_question' -l log-level -x -a 'silent error info debug' -d 'How much is logged'
complete -c wgsep -n 'not __wgsep_is_question' -l log-format -x -a 'text json' -d 'How lines look'
complete -c wgsep -n 'not __wgsep_is_question' -l log-file -r -F -d 'Append the log to a file'
complete -c wgsep -n 'not __wgsep_is_question' -s V -l version -d 'Print version'

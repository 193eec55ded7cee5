//! The TUN device for tests that start daemons as a normal user.

/// Shell that gives `/dev/net/tun` the mode that udev gives it, in private mounts with a file system in
/// memory at `/run/wireguard`. A container or a virtual machine without udev mostly has it for root only;
/// nothing has to be done, and nothing can, where the caller is root of a user namespace only.
pub const OPEN_TO_EVERY_USER: &str = "if mknod -m 666 /run/wireguard/tun c 10 200 2>/dev/null; \
    then mount --bind /run/wireguard/tun /dev/net/tun; rm /run/wireguard/tun; fi";

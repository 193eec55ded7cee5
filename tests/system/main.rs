//! Daemons in network namespaces: what a tunnel does, and how it is configured and operated.
//!
//! `cargo test -p wgsep-tests --test system logs::` runs one file. Tests of several files run at the same time in one
//! process: what is set for a process, such as its directory, its limits and the descriptors that its children
//! inherit, is set in the child that needs it.

mod audit;
mod bad_input;
mod bursts;
mod counters;
mod cryptokey_routing;
mod descriptor_store;
mod floods;
mod flows;
mod fwmark;
mod hardened_host;
mod hostile_datagrams;
mod icmp;
mod inotify_limit;
mod key_change;
mod keys;
mod large_configurations;
mod lifecycle;
mod listen_address;
mod listen_port;
mod logs;
mod namespaces;
mod nat;
mod nesting;
mod netlink_overrun;
mod offload;
mod padding;
mod paths;
mod policy_routing;
mod port_in_use;
mod preshared_keys;
mod prometheus;
mod quiet;
mod rekey;
mod roaming;
mod scopes;
mod staging;
mod stats;
mod status;
mod sticky_source;
mod tun_fd;
mod uapi;
mod upgrade;
mod upgrade_container;
mod vm_generation;
mod wg_quick;

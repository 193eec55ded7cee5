//! What the kernel would do by itself on the interface, switched off as its own WireGuard does
//! (drivers/net/wireguard/device.c): generate addresses, solicit routers and accept their advertisements, report
//! multicast groups, send ICMP redirects.
//!
//! A move to another network namespace undoes all of it but the missing MULTICAST flag, and this process
//! cannot follow the interface there. There the link type still keeps the kernel from generating an address
//! ([`LINK_TYPE`]), and the dataplane drops router advertisements, solicitations and redirects.

use crate::netlink::{attribute, clear_flags, set_link};
use nix::errno::Errno;
use nix::libc;
use std::fmt::Display;
use std::fs;
use std::path::Path;

/// Link type of the interfaces made here: of a tunnel that carries IP packets without a header, as
/// ARPHRD_NONE is too. But on this one the kernel (net/ipv6/addrconf.c) generates no IPv6 address where an
/// EUI-64 is asked for, which is the default of every network namespace, and solicits no router.
pub const LINK_TYPE: u16 = libc::ARPHRD_TUNNEL;

const IFLA_AF_SPEC: u16 = 26;
const IFLA_INET_CONF: u16 = 1;
const IPV4_DEVCONF_SEND_REDIRECTS: u16 = 6;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;

/// Sets what can be set of an interface of this process's network namespace, which should be down;
/// returns a line about what cannot, for the log at `debug`: the dataplane drops what would come of it.
pub fn switch_off(name: &str, ifindex: u32) -> Option<String> {
    let family = |family: i32, settings: &[u8]| {
        set_link(ifindex, &[(IFLA_AF_SPEC, &attribute(family as u16, settings))])
    };
    let send_redirects = attribute(IPV4_DEVCONF_SEND_REDIRECTS, &0u32.to_ne_bytes());
    let attributes = [
        ("multicast", clear_flags(ifindex, libc::IFF_MULTICAST)),
        (
            "addr_gen_mode",
            family(libc::AF_INET6, &attribute(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE])),
        ),
        ("send_redirects", family(libc::AF_INET, &attribute(IFLA_INET_CONF, &send_redirects))),
    ];
    // A machine may lack a family, and IPv6 an interface.
    let is_refused = |errno: &Errno| *errno != Errno::EAFNOSUPPORT;
    let attributes = attributes.into_iter().filter_map(|(setting, set)| {
        set.err().filter(is_refused).map(|errno| refusal(setting, errno.desc()))
    });
    let refused: Vec<_> = attributes.chain(clear_sysctls(name)).collect();
    (!refused.is_empty()).then(|| {
        format!(
            "{name}: the kernel's own settings stay: {}; the dataplane drops router advertisements, \
             solicitations and redirects all the same",
            refused.join(", ")
        )
    })
}

/// Those settings that rtnetlink does not reach. As with the kernel's WireGuard, `all` is among them: the
/// kernel sends redirects if that or the interface's own is set.
fn clear_sysctls(name: &str) -> impl Iterator<Item = String> {
    const ROOT: &str = "/proc/sys/net";
    let settings = [
        "ipv4/conf/all/send_redirects".to_owned(),
        format!("ipv6/conf/{name}/accept_ra"),
        format!("ipv6/conf/{name}/autoconf"),
    ];
    let exists = |path: &str| Path::new(path).exists();
    // Where this is all that is missing, there is no IPv6.
    let is_absent = move |setting: &str| {
        setting.starts_with("ipv6") && !exists(&format!("{ROOT}/ipv6")) && exists(ROOT)
    };
    settings.into_iter().filter_map(move |setting| {
        let file = format!("{ROOT}/{setting}");
        let error = fs::write(&file, "0").err()?;
        let is_clear = fs::read_to_string(&file).is_ok_and(|value| value.trim_end() == "0");
        (!is_clear && !is_absent(&setting)).then(|| refusal(&format!("net/{setting}"), error))
    })
}

fn refusal(setting: &str, error: impl Display) -> String {
    format!("{setting} ({error})")
}

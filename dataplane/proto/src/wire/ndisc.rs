//! Messages by which the hosts and routers of one link configure each other (RFC 4861, RFC 792): a
//! tunnel carries none that the kernel would send or act on by itself.
//!
//! The kernel's WireGuard relies on settings of its interface, which the helper makes as well. But the
//! kernel resets those of a TUN device when it is moved to another network namespace, or when its MTU
//! was below 1280, and they cannot always be made. What is dropped here is dropped everywhere.
#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

use crate::wire::ip::UpperLayer;

/// What the kernel requires of these messages: that no router has forwarded them.
const HOP_LIMIT: u8 = 255;
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
pub(crate) const ICMPV6_REDIRECT: u8 = 137;

const ICMP: u8 = 1;
const ICMP_REDIRECT: u8 = 5;

/// Whether a packet that a peer sent is a router advertisement that the kernel would take: it would
/// install addresses and a default route. So is one whose headers hide what it carries.
pub(crate) fn is_router_advertisement(packet: &[u8]) -> bool {
    let is_link_local = || matches!(packet.get(8..10), Some([0xfe, low]) if low & 0xc0 == 0x80);
    is_unforwarded_v6(packet)
        && is_link_local()
        && matches!(
            UpperLayer::of_v6(packet),
            UpperLayer::Icmpv6(ROUTER_ADVERTISEMENT) | UpperLayer::Unreadable
        )
}

/// Whether a packet that leaves by the interface is a router solicitation, which the kernel sends
/// without any traffic, or an ICMP redirect, which it sends to each of two peers that talk through it.
pub(crate) fn is_solicitation_or_redirect(packet: &[u8]) -> bool {
    match packet.first().map(|first| first >> 4) {
        Some(4) => is_redirect_v4(packet) == Some(true),
        _ => {
            is_unforwarded_v6(packet)
                && matches!(
                    UpperLayer::of_v6(packet),
                    UpperLayer::Icmpv6(ROUTER_SOLICITATION | ICMPV6_REDIRECT)
                )
        }
    }
}

fn is_unforwarded_v6(packet: &[u8]) -> bool {
    packet.get(7) == Some(&HOP_LIMIT) && packet.first().is_some_and(|first| first >> 4 == 6)
}

fn is_redirect_v4(packet: &[u8]) -> Option<bool> {
    if *packet.get(9)? != ICMP {
        return Some(false);
    }
    let is_first = u16::from_be_bytes([*packet.get(6)?, *packet.get(7)?]) & 0x1fff == 0;
    let header_len = usize::from(packet.first()? & 0xf).saturating_mul(4);
    Some(is_first && *packet.get(header_len)? == ICMP_REDIRECT)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod tests {
    use super::*;

    fn v6(source: [u8; 2], hop_limit: u8, next_header: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0, 0, 0, next_header, hop_limit];
        packet[4..6].copy_from_slice(&u16::try_from(payload.len()).unwrap().to_be_bytes());
        packet.extend_from_slice(&source);
        packet.resize(40, 0);
        packet.extend_from_slice(payload);
        packet
    }

    fn v4(protocol: u8, kind: u8, offset: u8) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 24, 0, 7, 0, offset, 64, protocol];
        packet.resize(20, 0);
        packet.extend_from_slice(&[kind, 0, 0, 0]);
        packet
    }

    const LINK_LOCAL: [u8; 2] = [0xfe, 0x80];

    #[test]
    fn an_advertisement_is_found_behind_extension_headers_and_in_a_first_fragment() {
        let options = [58, 0, 1, 4, 0, 0, 0, 0, 134, 0];
        let first_fragment = [58, 0, 0, 1, 0, 0, 0, 9, 134, 0];
        for (next_header, payload) in [
            (58, &[134, 0][..]),
            (0, &options),
            (43, &options),
            (60, &options),
            (44, &first_fragment),
        ] {
            assert!(is_router_advertisement(&v6(LINK_LOCAL, 255, next_header, payload)));
            assert!(is_router_advertisement(&v6([0xfe, 0xbf], 255, next_header, payload)));
            // The kernel takes neither of these.
            assert!(!is_router_advertisement(&v6(LINK_LOCAL, 254, next_header, payload)));
            assert!(!is_router_advertisement(&v6([0xfd, 0], 255, next_header, payload)));
        }
        // What its headers hide could be one.
        assert!(is_router_advertisement(&v6(LINK_LOCAL, 255, 60, &[58, 9, 0, 0])));
        assert!(is_router_advertisement(&v6(
            LINK_LOCAL,
            255,
            60,
            &[60, 0, 1, 4, 0, 0, 0, 0].repeat(9)
        )));
    }

    #[test]
    fn other_neighbour_discovery_and_traffic_of_link_local_addresses_passes() {
        for kind in [128, 129, 133, 135, 136, 137, 143] {
            assert!(!is_router_advertisement(&v6(LINK_LOCAL, 255, 58, &[kind, 0])), "{kind}");
        }
        assert!(!is_router_advertisement(&v6(LINK_LOCAL, 255, 17, &[134; 8])));
        let later_fragment = [58, 0, 0, 8, 0, 0, 0, 9, 134, 0];
        assert!(!is_router_advertisement(&v6(LINK_LOCAL, 255, 44, &later_fragment)));
    }

    #[test]
    fn what_the_kernel_sends_to_its_link_unasked_stays_here() {
        for source in [LINK_LOCAL, [0, 0]] {
            for kind in [133, 137] {
                assert!(is_solicitation_or_redirect(&v6(source, 255, 58, &[kind, 0])), "{kind}");
                assert!(!is_solicitation_or_redirect(&v6(source, 64, 58, &[kind, 0])), "{kind}");
            }
            for kind in [128, 129, 134, 135, 136, 143] {
                assert!(!is_solicitation_or_redirect(&v6(source, 255, 58, &[kind, 0])), "{kind}");
            }
        }
        assert!(is_solicitation_or_redirect(&v4(1, 5, 0)));
        assert!(!is_solicitation_or_redirect(&v4(1, 5, 1)), "a later fragment has no type");
        assert!(!is_solicitation_or_redirect(&v4(17, 5, 0)));
        for kind in [0, 3, 8, 11] {
            assert!(!is_solicitation_or_redirect(&v4(1, kind, 0)), "{kind}");
        }
    }

    #[test]
    fn packets_that_are_cut_short_are_no_such_messages() {
        for (packet, kind_at) in [(v4(1, 5, 0), 20), (v6([0, 0], 255, 58, &[133]), 40)] {
            assert!(is_solicitation_or_redirect(&packet));
            for len in 0..=kind_at {
                assert!(!is_solicitation_or_redirect(&packet[..len]));
                assert!(!is_router_advertisement(&packet[..len]));
            }
        }
    }
}

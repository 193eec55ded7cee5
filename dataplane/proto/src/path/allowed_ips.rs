//! Cryptokey routing: the longest allowed IP that contains an address selects the peer.
//!
//! A path-compressed binary trie for each family. Nodes are shared between copies: cloning the whole
//! structure is cheap, and a change copies only nodes that another copy still uses. The control thread
//! edits its own copy and replaces the shared one by a clone, and workers look up without a lock.

use crate::config::AllowedIp;
use core::net::IpAddr;
use std::sync::Arc;

/// The bits of one family's addresses, the first bit of an address being the highest.
trait Bits: Copy + Eq {
    const LEN: u8;
    fn bit(self, at: u8) -> bool;
    fn common_prefix(self, other: Self) -> u8;
    fn masked(self, len: u8) -> Self;
}

macro_rules! impl_bits {
    ($($word:ty),*) => {$(
        impl Bits for $word {
            const LEN: u8 = <$word>::BITS as u8;

            fn bit(self, at: u8) -> bool {
                (self << at) >> (Self::LEN - 1) != 0
            }

            fn common_prefix(self, other: Self) -> u8 {
                (self ^ other).leading_zeros() as u8
            }

            fn masked(self, len: u8) -> Self {
                let host_bits = u32::from(Self::LEN - len);
                self & <$word>::MAX.checked_shl(host_bits).unwrap_or(0)
            }
        }
    )*};
}
impl_bits!(u32, u128);

#[derive(Clone)]
struct Node<B, T> {
    prefix: B,
    len: u8,
    value: Option<T>,
    children: [Link<B, T>; 2],
}

type Link<B, T> = Option<Arc<Node<B, T>>>;

impl<B: Bits, T: Clone> Node<B, T> {
    fn leaf(prefix: B, len: u8, value: T) -> Arc<Self> {
        Arc::new(Self { prefix, len, value: Some(value), children: [None, None] })
    }

    fn contains(&self, address: B) -> bool {
        self.prefix.common_prefix(address) >= self.len
    }

    /// The side of this node on which a longer prefix lies.
    fn side(&self, prefix: B) -> usize {
        usize::from(prefix.bit(self.len))
    }
}

fn lookup<B: Bits, T: Clone>(root: &Link<B, T>, address: B) -> Option<&T> {
    let (mut link, mut found) = (root, None);
    while let Some(node) = link.as_deref().filter(|node| node.contains(address)) {
        found = node.value.as_ref().or(found);
        if node.len == B::LEN {
            break;
        }
        link = &node.children[node.side(address)];
    }
    found
}

/// Sets the value of a prefix; returns the one it had.
fn insert<B: Bits, T: Clone>(link: &mut Link<B, T>, prefix: B, len: u8, value: T) -> Option<T> {
    let Some(shared) = link else {
        *link = Some(Node::leaf(prefix, len, value));
        return None;
    };
    let common = shared.prefix.common_prefix(prefix).min(shared.len).min(len);
    if common < shared.len {
        split(link, prefix, len, common, value);
        return None;
    }
    let node = Arc::make_mut(shared);
    if len == node.len {
        return node.value.replace(value);
    }
    let side = node.side(prefix);
    insert(&mut node.children[side], prefix, len, value)
}

/// Puts a prefix above, or beside, a node that it shares only `common` bits with.
fn split<B: Bits, T: Clone>(link: &mut Link<B, T>, prefix: B, len: u8, common: u8, value: T) {
    let below = link.take();
    let mut parent =
        Node { prefix: prefix.masked(common), len: common, value: None, children: [None, None] };
    let side = below.as_ref().map_or(0, |below| parent.side(below.prefix));
    parent.children[side] = below;
    if len == common {
        parent.value = Some(value);
    } else {
        parent.children[parent.side(prefix)] = Some(Node::leaf(prefix, len, value));
    }
    *link = Some(Arc::new(parent));
}

/// Removes the value of a prefix if it is the `expected` one, and the nodes that have no use any more.
fn remove<B: Bits, T: Clone>(
    link: &mut Link<B, T>,
    prefix: B,
    len: u8,
    expected: &dyn Fn(&T) -> bool,
) -> Option<T> {
    let node = link.as_mut().filter(|node| node.len <= len && node.contains(prefix))?;
    let removed = if node.len == len {
        node.value.as_ref().filter(|value| expected(value))?;
        Arc::make_mut(node).value.take()
    } else {
        let side = node.side(prefix);
        remove(&mut Arc::make_mut(node).children[side], prefix, len, expected)
    };
    if node.value.is_none() && node.children.iter().flatten().count() < 2 {
        let children = &mut Arc::make_mut(node).children;
        *link = children[0].take().or(children[1].take());
    }
    removed
}

/// Allowed IPs of all peers, with what each maps to.
#[derive(Clone)]
pub struct AllowedIps<T> {
    v4: Link<u32, T>,
    v6: Link<u128, T>,
}

impl<T> Default for AllowedIps<T> {
    fn default() -> Self {
        Self { v4: None, v6: None }
    }
}

impl<T: Clone> AllowedIps<T> {
    /// The value of the longest prefix that contains `address`.
    #[must_use]
    pub fn lookup(&self, address: IpAddr) -> Option<&T> {
        match address {
            IpAddr::V4(v4) => lookup(&self.v4, v4.to_bits()),
            IpAddr::V6(v6) => lookup(&self.v6, v6.to_bits()),
        }
    }

    /// Sets the value of a prefix; returns the previous one.
    pub fn insert(&mut self, allowed_ip: AllowedIp, value: T) -> Option<T> {
        let len = allowed_ip.cidr();
        match allowed_ip.address() {
            IpAddr::V4(v4) => insert(&mut self.v4, v4.to_bits(), len, value),
            IpAddr::V6(v6) => insert(&mut self.v6, v6.to_bits(), len, value),
        }
    }

    /// Removes a prefix if its value is the `expected` one.
    pub fn remove(&mut self, allowed_ip: AllowedIp, expected: impl Fn(&T) -> bool) -> Option<T> {
        let len = allowed_ip.cidr();
        match allowed_ip.address() {
            IpAddr::V4(v4) => remove(&mut self.v4, v4.to_bits(), len, &expected),
            IpAddr::V6(v6) => remove(&mut self.v6, v6.to_bits(), len, &expected),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn ip(text: &str) -> AllowedIp {
        let (address, cidr) = text.split_once('/').unwrap();
        AllowedIp::new(address.parse().unwrap(), cidr.parse().unwrap()).unwrap()
    }

    fn at(table: &AllowedIps<u32>, address: &str) -> Option<u32> {
        table.lookup(address.parse().unwrap()).copied()
    }

    #[test]
    fn the_longest_prefix_wins() {
        let mut table = AllowedIps::default();
        for (value, prefix) in [
            (0, "0.0.0.0/0"),
            (1, "10.0.0.0/8"),
            (2, "10.1.0.0/16"),
            (3, "10.1.1.1/32"),
            (6, "::/0"),
        ] {
            assert_eq!(table.insert(ip(prefix), value), None);
        }
        assert_eq!(at(&table, "192.0.2.1"), Some(0));
        assert_eq!(at(&table, "10.2.0.1"), Some(1));
        assert_eq!(at(&table, "10.1.0.1"), Some(2));
        assert_eq!(at(&table, "10.1.1.1"), Some(3));
        assert_eq!(at(&table, "2001:db8::1"), Some(6));
        assert_eq!(table.insert(ip("10.1.0.0/16"), 9), Some(2));
        assert_eq!(at(&table, "10.1.0.1"), Some(9));
    }

    #[test]
    fn removing_needs_the_owner_and_uncovers_the_shorter_prefix() {
        let mut table = AllowedIps::default();
        table.insert(ip("fd00::/8"), 1);
        table.insert(ip("fd00::/64"), 2);
        assert_eq!(table.remove(ip("fd00::/64"), |owner| *owner == 1), None);
        assert_eq!(table.remove(ip("fd00::/65"), |_| true), None);
        assert_eq!(table.remove(ip("fd00::/64"), |owner| *owner == 2), Some(2));
        assert_eq!(at(&table, "fd00::1"), Some(1));
        assert_eq!(table.remove(ip("fd00::/8"), |_| true), Some(1));
        assert!(table.v6.is_none());
    }

    #[test]
    fn a_clone_does_not_see_later_changes() {
        let mut table = AllowedIps::default();
        table.insert(ip("10.0.0.0/8"), 1);
        let published = table.clone();
        table.insert(ip("10.0.0.0/24"), 2);
        table.remove(ip("10.0.0.0/8"), |_| true);
        assert_eq!(at(&published, "10.0.0.1"), Some(1));
        assert_eq!(at(&table, "10.0.0.1"), Some(2));
        assert_eq!(at(&table, "10.0.1.1"), None);
    }

    /// Every family against a list searched from end to end, over random prefixes.
    #[test]
    fn agrees_with_a_linear_search() {
        let mut random = 0x2545_f491_4f6c_dd1du64;
        let mut next = move || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        };
        let address = |a: u64, b: u64, v6: bool| {
            // Few distinct values in the high bits, so that prefixes nest.
            if v6 {
                IpAddr::V6((u128::from(a & 0x0303_0000_0000_0003) << 64 | u128::from(b & 3)).into())
            } else {
                IpAddr::V4(((a as u32) & 0x0303_0303).into())
            }
        };
        let mut table = AllowedIps::default();
        let mut list: HashMap<AllowedIp, u32> = HashMap::new();
        for round in 0..6000u32 {
            let v6 = next() & 1 == 0;
            let cidr = u8::try_from(next() % if v6 { 129 } else { 33 }).unwrap();
            let prefix = AllowedIp::new(address(next(), next(), v6), cidr).unwrap();
            if next() % 3 == 0 {
                let owner = list.keys().copied().nth((next() % 7) as usize).unwrap_or(prefix);
                assert_eq!(table.remove(owner, |_| true), list.remove(&owner));
            } else {
                assert_eq!(table.insert(prefix, round), list.insert(prefix, round));
            }
            let target = address(next(), next(), v6);
            let expected = list
                .iter()
                .filter(|(p, _)| AllowedIp::new(target, p.cidr()).is_some_and(|t| t == **p))
                .max_by_key(|(p, _)| p.cidr())
                .map(|(_, value)| *value);
            assert_eq!(table.lookup(target).copied(), expected);
        }
        for prefix in list.keys() {
            assert!(table.remove(*prefix, |_| true).is_some());
        }
        assert!(table.v4.is_none() && table.v6.is_none());
    }
}

//! Keys, peers and their allowed IPs.

use wgsep_simulation::dice::Dice;
use wgsep_tests::link::{Family, Side};
use wgsep_tests::wg::{self, KeyPair};

use super::{Outcome, side};
use crate::underlay::opposite;
use crate::world::{AbsentPeer, World, inner_prefixes};

/// Peers that a node may have at most, besides the other node.
const MOST_ABSENT_PEERS: usize = 1000;

/// A node gets another key, and the other node another peer in place of the one it had.
pub(super) fn private_key(world: &mut World, dice: &mut Dice) -> Outcome {
    let side = side(dice);
    let other = opposite(side);
    let key_first = dice.chance(500);
    let key = KeyPair::generate();
    let old = std::mem::replace(&mut world.node_mut(side).key, key);
    let set_key = |world: &World| {
        let node = world.node(side);
        node.daemon().set_private_key(&node.key.private);
    };
    if key_first {
        set_key(world);
    }
    world.node(other).daemon().wg_set(format!("peer {} remove", old.public));
    introduce(world, other);
    if !key_first {
        set_key(world);
    }
    Ok(format!("{side:?}, {} first", if key_first { "its own" } else { "the other's peer" }))
}

/// Adds the other node as a peer, with all that it has.
fn introduce(world: &World, side: Side) {
    let other = opposite(side);
    let arguments = format!(
        "endpoint {} allowed-ips {} persistent-keepalive {}",
        world.endpoint(other),
        inner_prefixes(other).replace(' ', ""),
        world.node(side).keepalive
    );
    match &world.preshared {
        Some(key) => world.set_peer(side, &format!("{arguments} preshared-key /dev/stdin"), key),
        None => world.set_peer(side, &arguments, ""),
    }
}

/// The session continues; the next handshake uses it. To see that, a link may go down and up.
fn change_preshared_key(world: &mut World, dice: &mut Dice, key: Option<String>) -> Outcome {
    let (first, handshake) = (side(dice), dice.chance(500));
    world.preshared = key;
    for side in [first, opposite(first)] {
        match &world.preshared {
            Some(key) => world.set_peer(side, "preshared-key /dev/stdin", key),
            None => world.set_peer(side, "preshared-key /dev/null", ""),
        }
    }
    if handshake {
        world.node(first).link("down");
        world.node(first).take_up();
    }
    let then = if handshake { ", then a handshake" } else { "" };
    Ok(format!("{first:?} first{then}"))
}

pub(super) fn preshared_key(world: &mut World, dice: &mut Dice) -> Outcome {
    change_preshared_key(world, dice, Some(wg::preshared_key()))
}

pub(super) fn no_preshared_key(world: &mut World, dice: &mut Dice) -> Outcome {
    change_preshared_key(world, dice, None)
}

/// Peers that do not exist, by the hundred.
fn absent_peers(world: &World, side: Side, dice: &mut Dice) -> Vec<AbsentPeer> {
    let (count, first) = (100 * (1 + dice.below(4)), dice.below(1 << 15));
    let room = MOST_ABSENT_PEERS.saturating_sub(world.node(side).absent_peers.len());
    (0..count).map(|number| AbsentPeer::new(first + number, dice)).take(room).collect()
}

pub(super) fn add(world: &mut World, dice: &mut Dice) -> Outcome {
    let side = side(dice);
    let absent_peers = absent_peers(world, side, dice);
    let count = absent_peers.len();
    world.node_mut(side).add_absent_peers(absent_peers);
    Ok(format!("{side:?} {count}"))
}

pub(super) fn remove(world: &mut World, dice: &mut Dice) -> Outcome {
    let side = side(dice);
    let count = world.node(side).absent_peers.len();
    world.node_mut(side).remove_absent_peers();
    Ok(format!("{side:?} {count}"))
}

/// The other node's addresses go to an absent peer and come back.
pub(super) fn move_allowed_ips(world: &mut World, dice: &mut Dice) -> Outcome {
    let side = side(dice);
    let prefixes = inner_prefixes(opposite(side)).replace(' ', "");
    let absent_peer = AbsentPeer::new(0xffff, dice).public;
    let count = 1 + dice.below(5);
    let node = world.node(side);
    for _ in 0..count {
        node.daemon().wg_set(format!("peer {absent_peer} allowed-ips {prefixes}"));
        world.set_peer(side, &format!("allowed-ips {prefixes}"), "");
    }
    let left = node.daemon().wg("show", "allowed-ips");
    let is_bare = |line: &str| line.starts_with(&absent_peer) && line.ends_with("(none)");
    assert!(left.lines().any(is_bare), "the addresses moved back: {left}");
    node.daemon().wg_set(format!("peer {absent_peer} remove"));
    Ok(format!("{side:?} {count} times"))
}

/// The other node's allowed IPs grow by hundreds and shrink again, never without those in use.
pub(super) fn churn_allowed_ips(world: &mut World, dice: &mut Dice) -> Outcome {
    let (side, count) = (side(dice), 100 * (1 + dice.below(5)));
    let prefixes = inner_prefixes(opposite(side)).replace(' ', "");
    let more: String =
        (0..count).map(|number| format!(",10.201.{}.{}/32", number / 256, number % 256)).collect();
    world.set_peer(side, &format!("allowed-ips {prefixes}{more}"), "");
    world.set_peer(side, &format!("allowed-ips {prefixes}"), "");
    Ok(format!("{side:?} {count}"))
}

/// The whole configuration with other absent_peers than before; the session continues.
pub(super) fn syncconf(world: &mut World, dice: &mut Dice) -> Outcome {
    let side = side(dice);
    let keep = dice.below(200) as usize;
    world.node_mut(side).absent_peers.truncate(keep);
    let new = absent_peers(world, side, dice);
    world.node_mut(side).absent_peers.extend(new);
    world.configure(side, "syncconf");
    let count = world.node(side).absent_peers.len();
    let peers = world.node(side).daemon().wg("show", "peers").lines().count();
    assert_eq!(peers, count + 1, "the peers are those of the file");
    Ok(format!("{side:?}, {count} absent_peers"))
}

/// Removes all peers and adds them anew.
pub(super) fn setconf(world: &mut World, dice: &mut Dice) -> Outcome {
    let side = side(dice);
    world.configure(side, "setconf");
    Ok(format!("{side:?}, {} absent_peers", world.node(side).absent_peers.len()))
}

pub(super) fn remove_and_add(world: &mut World, dice: &mut Dice) -> Outcome {
    let side = side(dice);
    world.set_peer(side, "remove", "");
    introduce(world, side);
    Ok(format!("{side:?}"))
}

/// Each node finds the other by the other family from now on.
pub(super) fn endpoint_family(world: &mut World, dice: &mut Dice) -> Outcome {
    let first = side(dice);
    world.outer = if world.outer == Family::V4 { Family::V6 } else { Family::V4 };
    for side in [first, opposite(first)] {
        let endpoint = world.endpoint(opposite(side));
        world.set_peer(side, &format!("endpoint {endpoint}"), "");
    }
    Ok(format!("{:?}, {first:?} first", world.outer))
}

//! What `ip link` and `wg set` change of the interface itself.

use std::net::{Ipv6Addr, UdpSocket};
use std::time::Duration;

use wgsep_simulation::dice::Dice;
use wgsep_tests::link::{Family, Side};
use wgsep_tests::netns::Netns;
use wgsep_tests::traffic::answers_at_once;
use wgsep_tests::wait;

use super::{HANDSHAKE, Outcome, hold, milliseconds, side};
use crate::patience;
use crate::underlay::{FAMILIES, Path, opposite, option};
use crate::world::World;

/// Ports for a node to move to: below those that the kernel picks by itself.
const PORTS: u64 = 20_700;
/// How long a port may stay open after the link is down.
const FREE_LIMIT: Duration = Duration::from_secs(3);
/// The routing table of packets with a mark.
const MARKED: u32 = 300;

/// A port of a node's own, so that both are never the same in the log.
fn port(side: Side, dice: &mut Dice) -> u16 {
    (PORTS + 2 * dice.below(100)) as u16 + side as u16
}

pub(super) fn down_up(world: &mut World, dice: &mut Dice) -> Outcome {
    let both = dice.chance(250);
    let sides = if both { vec![Side::Left, Side::Right] } else { vec![side(dice)] };
    let time = milliseconds(dice, 0, 1500);
    for side in &sides {
        world.node(*side).link("down");
    }
    hold(time);
    for side in &sides {
        world.node(*side).take_up();
    }
    Ok(format!("{sides:?} for {time:?}"))
}

pub(super) fn flaps(world: &mut World, dice: &mut Dice) -> Outcome {
    let (side, count) = (side(dice), 2 + dice.below(20));
    let node = world.node(side);
    for _ in 0..count {
        node.link("down");
        node.link("up");
    }
    node.take_up();
    Ok(format!("{side:?} {count} times"))
}

pub(super) fn mtu(world: &mut World, dice: &mut Dice) -> Outcome {
    for node in &mut world.nodes {
        node.mtu = (1280 + dice.below(9000 - 1280 + 1)) as u16;
        node.link(&format!("mtu {}", node.mtu));
    }
    Ok(format!("{:?}", [world.nodes[0].mtu, world.nodes[1].mtu]))
}

pub(super) fn listen_port(world: &mut World, dice: &mut Dice) -> Outcome {
    let side = side(dice);
    let node = world.node_mut(side);
    let (old, new) = (node.port, port(side, dice));
    node.port = new;
    node.daemon().wg_set(format!("listen-port {new}"));
    Ok(format!("{side:?} from {old} to {new}"))
}

pub(super) fn any_listen_port(world: &mut World, dice: &mut Dice) -> Outcome {
    let side = side(dice);
    let node = world.node_mut(side);
    node.daemon().wg_set("listen-port 0");
    node.port = node.daemon().listen_port();
    assert_ne!(node.port, 0, "no port after listen-port 0");
    // Which one is the kernel's choice.
    Ok(format!("{side:?}, which got {}", node.port))
}

/// The port is refused with an error for wg(8), and the old one stays in use.
pub(super) fn taken_listen_port(world: &mut World, dice: &mut Dice) -> Outcome {
    let side = side(dice);
    let taken = port(side, dice) + 200;
    let node = world.node(side);
    let socket = node.netns().inside(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, taken)));
    assert!(socket.is_ok(), "port {taken}: {socket:?}");
    let refused = node.daemon().try_wg_set(format!("listen-port {taken}"));
    assert!(!refused.status.success(), "a port in use was accepted");
    assert_eq!(node.daemon().listen_port(), node.port, "the old port stays in use");
    Ok(format!("{side:?}, port {taken}"))
}

/// The interface comes up while another program has its port, which is free again some time later.
pub(super) fn taken_at_up(world: &mut World, dice: &mut Dice) -> Outcome {
    let (side, time) = (side(dice), milliseconds(dice, 100, 2500));
    let node = world.node(side);
    node.link("down");
    // The port is closed a moment after the command returns.
    let bind = || UdpSocket::bind((Ipv6Addr::UNSPECIFIED, node.port)).ok();
    let socket = node.netns().inside(|| wait::poll(FREE_LIMIT, bind));
    assert!(socket.is_some(), "port {} is still open after link down", node.port);
    node.take_up();
    hold(time);
    drop(socket);
    Ok(format!("{side:?}, port {} taken for {time:?}", node.port))
}

pub(super) fn listen_port_back_and_forth(world: &mut World, dice: &mut Dice) -> Outcome {
    let side = side(dice);
    let (node, other) = (world.node(side), port(side, dice));
    let count = 1 + dice.below(10);
    for _ in 0..count {
        node.daemon().wg_set(format!("listen-port {other}"));
        node.daemon().wg_set(format!("listen-port {}", node.port));
    }
    Ok(format!("{side:?} {count} times to {other} and back"))
}

/// With a mark, the datagrams are routed by a table of its own, which leads the same way.
pub(super) fn mark(world: &mut World, dice: &mut Dice) -> Outcome {
    let side = side(dice);
    let mark = if dice.chance(300) { 0 } else { 1 + dice.below(u64::from(u32::MAX)) as u32 };
    let with_rule = mark != 0 && dice.chance(500);
    let node = world.node_mut(side);
    let netns = node.netns().clone();
    if with_rule {
        for family in FAMILIES {
            node.site.route(Path::Main, family, &format!("table {MARKED}"));
            netns.run(format!("ip {} rule add fwmark {mark} table {MARKED}", option(family)));
        }
    }
    node.mark = mark;
    node.daemon().wg_set(format!("fwmark {mark}"));
    if with_rule {
        hold(Duration::from_millis(300));
        for family in FAMILIES {
            let ip = option(family);
            netns.run(format!("ip {ip} rule del fwmark {mark} table {MARKED}"));
            netns.run(format!("ip {ip} route flush table {MARKED}"));
        }
    }
    let rule = if with_rule { " with a rule" } else { "" };
    Ok(format!("{side:?} {mark}{rule}"))
}

pub(super) fn keepalive(world: &mut World, dice: &mut Dice) -> Outcome {
    let side = side(dice);
    let seconds = dice.below(3) as u16;
    world.node_mut(side).keepalive = seconds;
    world.set_peer(side, &format!("persistent-keepalive {seconds}"), "");
    Ok(format!("{side:?} {seconds} s"))
}

/// There the tunnel works, the sockets being where they were; and back.
pub(super) fn move_namespace(world: &mut World, dice: &mut Dice) -> Outcome {
    let side = side(dice);
    let (home, away) = (world.node(side).netns().clone(), Netns::new());
    world.node_mut(side).daemon_mut().move_interface(&away);
    world.node(side).take_up_in(&away);
    let to = opposite(side).inner(Family::V4);
    patience::expect(
        "the tunnel works from another namespace",
        &world.processes(),
        HANDSHAKE.limit,
        || answers_at_once(&away, to),
    );
    world.node_mut(side).daemon_mut().move_interface(&home);
    world.node(side).take_up();
    Ok(format!("{side:?}"))
}

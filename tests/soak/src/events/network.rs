//! What happens to the network below the tunnel, and to the host's routing.

use std::fmt::Write as _;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use wgsep_simulation::dice::Dice;
use wgsep_tests::link::Family;
use wgsep_tests::process::stop;
use wgsep_tests::traffic::answers_at_once;

use super::{NEXT_PACKET, Outcome, hold, milliseconds, side};
use crate::patience;
use crate::underlay::{FAMILIES, MAIN, MTU, Path, SPARE, opposite, option};
use crate::witness;
use crate::world::{World, ip_batch, run_words};

/// A routing table of the events' own.
const TABLE: u32 = 301;

/// The narrowest path that IPv6 allows.
const NARROWEST: u64 = 1280;

pub(super) fn down_up(world: &mut World, dice: &mut Dice) -> Outcome {
    let (side, time) = (side(dice), milliseconds(dice, 0, 2000));
    let site = &world.node(side).site;
    site.netns.run(format!("ip link set {MAIN} down"));
    hold(time);
    site.restore();
    Ok(format!("{side:?} for {time:?}"))
}

/// The other node learns the new address from the first packet.
pub(super) fn renumber(world: &mut World, dice: &mut Dice) -> Outcome {
    let side = side(dice);
    let host = 1 + dice.below(250) as u8;
    let site = &mut world.node_mut(side).site;
    let old = site.host;
    site.renumber(host);
    Ok(format!("{side:?} from .{old} to .{host}"))
}

/// The families of a second path. Without IPv6 its end is announced by fewer messages of the kernel.
fn families(dice: &mut Dice) -> &'static [Family] {
    if dice.chance(500) { &FAMILIES } else { &[Family::V4] }
}

/// The better path appears, carries the traffic for a while, and is deleted.
pub(super) fn second_path(world: &mut World, dice: &mut Dice) -> Outcome {
    let (side, time, families) = (side(dice), milliseconds(dice, 0, 1500), families(dice));
    let site = &world.node(side).site;
    site.prefer_spare(families);
    hold(time);
    site.netns.run(format!("ip link del {SPARE}"));
    Ok(format!("{side:?} by {families:?} for {time:?}"))
}

/// The better path goes down while it is in use, or its routes are deleted; its device stays until the
/// tunnel works by the other one.
pub(super) fn second_path_down(world: &mut World, dice: &mut Dice) -> Outcome {
    let (side, down, families) = (side(dice), dice.chance(500), families(dice));
    let site = &world.node(side).site;
    site.prefer_spare(families);
    hold(Duration::from_millis(500));
    if down {
        site.netns.run(format!("ip link set {SPARE} down"));
    } else {
        for family in families {
            let (to, ip) = (Path::Main.prefix(opposite(side), *family), option(*family));
            site.netns.run(format!("ip {ip} route del {to} dev {SPARE}"));
        }
    }
    let to = opposite(side).inner(Family::V4);
    patience::expect(
        "the tunnel works by the other path",
        &world.processes(),
        NEXT_PACKET.limit,
        || answers_at_once(&site.netns, to),
    );
    site.netns.run(format!("ip link del {SPARE}"));
    let how = if down { "link down" } else { "route del" };
    Ok(format!("{side:?} with {families:?} by {how}"))
}

/// For the one node it is its own link, for the other a hop on the way.
pub(super) fn narrow(world: &mut World, dice: &mut Dice) -> Outcome {
    let (side, mtu) = (side(dice), narrower(dice));
    world.node_mut(side).site.set_mtu(mtu);
    Ok(format!("{side:?} {mtu}"))
}

pub(super) fn narrow_for_a_while(world: &mut World, dice: &mut Dice) -> Outcome {
    let (side, mtu, time) = (side(dice), narrower(dice), milliseconds(dice, 500, 2000));
    let site = &mut world.node_mut(side).site;
    site.set_mtu(mtu);
    hold(time);
    site.set_mtu(MTU);
    Ok(format!("{side:?} {mtu} for {time:?}"))
}

fn narrower(dice: &mut Dice) -> u16 {
    (NARROWEST + dice.below(u64::from(MTU) - NARROWEST + 1)) as u16
}

/// Lines for `ip -batch` that add or delete this many routes, none of which is anyone's way.
fn route_lines(action: &str, count: u64) -> String {
    let mut lines = String::new();
    for number in 0..count {
        let (high, low) = (number / 256, number % 256);
        let _infallible = writeln!(lines, "route {action} 100.{high}.{low}.0/24 dev {MAIN}");
    }
    lines
}

pub(super) fn routes(world: &mut World, dice: &mut Dice) -> Outcome {
    let (side, count) = (side(dice), 1000 * (1 + dice.below(4)));
    let netns = world.node(side).netns();
    ip_batch(netns, Family::V4, &route_lines("add", count));
    ip_batch(netns, Family::V4, &route_lines("del", count));
    Ok(format!("{side:?} {count}"))
}

/// Rules of several kinds that all lead the same way.
pub(super) fn rules(world: &mut World, dice: &mut Dice) -> Outcome {
    let (side, time) = (side(dice), milliseconds(dice, 0, 500));
    let other = opposite(side);
    let node = world.node(side);
    let selector = match dice.below(4) {
        0 => "to PREFIX".to_owned(),
        1 => format!("ipproto udp sport {}", node.port),
        2 => format!("ipproto udp dport {}", world.node(other).port),
        _ => "from all".to_owned(),
    };
    for family in FAMILIES {
        node.site.route(Path::Main, family, &format!("table {TABLE}"));
    }
    let change = |action: &str| {
        for family in FAMILIES {
            let selector = selector.replace("PREFIX", &Path::Main.prefix(other, family));
            let ip = option(family);
            node.netns().run(format!("ip {ip} rule {action} {selector} table {TABLE} priority 99"));
        }
    };
    change("add");
    hold(time);
    change("del");
    for family in FAMILIES {
        node.netns().run(format!("ip {} route flush table {TABLE}", option(family)));
    }
    Ok(format!("{side:?} {selector} for {time:?}"))
}

/// Takes all IPv6 addresses away, those inside the tunnel too, and gives them back.
pub(super) fn ipv6_off_and_on(world: &mut World, dice: &mut Dice) -> Outcome {
    let (side, time) = (side(dice), milliseconds(dice, 0, 1000));
    let node = world.node(side);
    let disable = |value: u8| {
        node.netns().run(format!("sysctl -qw net.ipv6.conf.all.disable_ipv6={value}"));
    };
    disable(1);
    hold(time);
    disable(0);
    node.site.restore();
    node.take_up();
    let guard =
        ["ip", "-6", "route", "replace", "unreachable", "fd77::/64", "metric", "4294967295"];
    run_words(node.netns(), &guard);
    Ok(format!("{side:?} for {time:?}"))
}

/// The router drops everything for less time than a session lives.
pub(super) fn blackout(world: &mut World, dice: &mut Dice) -> Outcome {
    let time = milliseconds(dice, 500, 4000);
    with_forward_rule(world, &["drop"], || hold(time));
    Ok(format!("{time:?}"))
}

/// Runs `work` while the router has a rule for what it forwards.
fn with_forward_rule(world: &World, rule: &[&str], work: impl FnOnce()) {
    let router = &world.router;
    router.run("nft add table inet faults");
    router.run("nft add chain inet faults forward { type filter hook forward priority 0 ; }");
    run_words(router, &[&["nft", "add", "rule", "inet", "faults", "forward"], rule].concat());
    work();
    router.run("nft delete table inet faults");
}

/// A twentieth of the datagrams is lost, a tenth comes twice, and some of them late.
pub(super) fn loss_and_duplicates(world: &mut World, dice: &mut Dice) -> Outcome {
    let time = milliseconds(dice, 1000, 3000);
    let (lost, one_in) = (1 + dice.below(20), 2 + dice.below(20) as usize);
    let _repeating = witness::repeat(&world.router, one_in);
    let percent = lost.to_string();
    let rule = ["numgen", "random", "mod", "100", "<", &percent, "drop"];
    with_forward_rule(world, &rule, || hold(time));
    Ok(format!("{lost} % lost and one in {one_in} repeated for {time:?}"))
}

/// Link state and MTU change while the dataplane does not run and its netlink socket is full.
pub(super) fn netlink_overrun(world: &mut World, dice: &mut Dice) -> Outcome {
    let (side, count) = (side(dice), 1000 * (1 + dice.below(4)));
    let down = dice.chance(500);
    let node = world.node_mut(side);
    node.mtu = (1280 + dice.below(200)) as u16;
    if !down {
        node.link("down");
    }
    stop(node.dataplane());
    ip_batch(node.netns(), Family::V4, &route_lines("add", count));
    if down {
        node.link("down");
    }
    node.take_up();
    ip_batch(node.netns(), Family::V4, &route_lines("del", count));
    let _gone_is_seen_later = kill(node.dataplane(), Signal::SIGCONT);
    let what = if down { "down and up" } else { "up" };
    Ok(format!("{side:?} {what}, {count} routes, MTU {}", node.mtu))
}

//! What happens to the two processes of a daemon.

use std::path::Path;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use wgsep_simulation::dice::Dice;
use wgsep_tests::daemon::socket_path;
use wgsep_tests::link::Side;
use wgsep_tests::process::stop;
use wgsep_tests::procfs::namespace;

use super::{Outcome, hold, milliseconds, side};
use crate::world::World;

/// How long a process may be stopped. Less than the 15 s after which the other end would begin a
/// handshake for want of an answer.
const LONGEST_STOP: u64 = 4000;

fn go_on(process: Pid) {
    // One that is gone is noticed after the event.
    let _ = kill(process, Signal::SIGCONT);
}

pub(super) fn stop_dataplane(world: &mut World, dice: &mut Dice) -> Outcome {
    let (side, time) = (side(dice), milliseconds(dice, 10, LONGEST_STOP));
    let process = world.node(side).dataplane();
    stop(process);
    hold(time);
    go_on(process);
    Ok(format!("{side:?} for {time:?}"))
}

pub(super) fn stop_helper(world: &mut World, dice: &mut Dice) -> Outcome {
    let (side, time) = (side(dice), milliseconds(dice, 10, LONGEST_STOP));
    let process = world.node(side).helper();
    stop(process);
    hold(time);
    go_on(process);
    Ok(format!("{side:?} for {time:?}"))
}

pub(super) fn stop_both(world: &mut World, dice: &mut Dice) -> Outcome {
    let (side, time) = (side(dice), milliseconds(dice, 10, LONGEST_STOP));
    let processes = [world.node(side).helper(), world.node(side).dataplane()];
    processes.into_iter().for_each(stop);
    hold(time);
    processes.into_iter().for_each(go_on);
    Ok(format!("{side:?} for {time:?}"))
}

/// The dataplane has the processor for a tenth of the time, as with a quota.
pub(super) fn starve(world: &mut World, dice: &mut Dice) -> Outcome {
    let (side, periods) = (side(dice), 5 + dice.below(20));
    let process = world.node(side).dataplane();
    for _ in 0..periods {
        stop(process);
        hold(Duration::from_millis(90));
        go_on(process);
        hold(Duration::from_millis(10));
    }
    Ok(format!("{side:?} for {periods} periods of 100 ms"))
}

pub(super) fn kill_helper(world: &mut World, dice: &mut Dice) -> Outcome {
    let side = side(dice);
    kill_and_restart(world, side, world.node(side).helper())
}

pub(super) fn kill_dataplane(world: &mut World, dice: &mut Dice) -> Outcome {
    let side = side(dice);
    kill_and_restart(world, side, world.node(side).dataplane())
}

fn kill_and_restart(world: &mut World, side: Side, process: Pid) -> Outcome {
    let killed = kill(process, Signal::SIGKILL);
    assert!(killed.is_ok(), "cannot kill {process}: {killed:?}");
    let (code, took) = world.node_mut(side).complete_end("SIGKILL of one");
    assert_ne!(code, Some(0), "a killed daemon says that all is well");
    world.start(side);
    Ok(format!("{side:?}, gone after {took:.1?}"))
}

/// Ends a daemon in one of the ways that are no failure, and compares first what it holds.
fn end(world: &mut World, side: Side, dice: &mut Dice) -> String {
    // Its clients would count as descriptors.
    world.hung.clear();
    let node = world.node_mut(side);
    if let Err(difference) = node.compare_with_start() {
        panic!("not as at the start: {difference}");
    }
    let way = match dice.below(4) {
        0 => {
            node.daemon().process.signal(Signal::SIGTERM);
            "SIGTERM"
        }
        1 => {
            node.daemon().process.signal(Signal::SIGINT);
            "SIGINT"
        }
        2 => {
            node.netns().run(format!("ip link del {}", node.interface));
            "link del"
        }
        _ => {
            let removed = std::fs::remove_file(socket_path(&node.interface));
            assert!(removed.is_ok(), "cannot remove the socket: {removed:?}");
            "removal of the socket"
        }
    };
    let (code, took) = node.complete_end(way);
    assert_eq!(code, Some(0), "after {way}");
    format!("{way}, gone after {took:.1?}")
}

pub(super) fn restart(world: &mut World, dice: &mut Dice) -> Outcome {
    let side = side(dice);
    let way = end(world, side, dice);
    world.start(side);
    Ok(format!("{side:?} by {way}"))
}

pub(super) fn restart_both(world: &mut World, dice: &mut Dice) -> Outcome {
    let ways = [Side::Left, Side::Right].map(|side| end(world, side, dice));
    for side in [Side::Left, Side::Right] {
        world.start(side);
    }
    Ok(format!("by {ways:?}"))
}

/// The new daemon sees a machine that was booted long ago. The clock of a process that runs cannot
/// be changed: a time namespace has its offset from its first process on.
pub(super) fn restart_after_uptime(world: &mut World, dice: &mut Dice) -> Outcome {
    let side = side(dice);
    // 50 days are more milliseconds than 32 bits hold.
    let days = [1, 50, 3650][dice.below(3) as usize];
    if !Path::new("/proc/self/ns/time").exists() {
        return Err("the kernel has no time namespaces".to_owned());
    }
    let way = end(world, side, dice);
    let netns = world.node(side).netns().clone();
    world.start_with(side, |command| {
        let mut later = netns.command("unshare");
        later.args(["--time", "--boottime", &(days * 24 * 60 * 60).to_string(), "--"]);
        later.arg(command.get_program()).args(command.get_args());
        *command = later;
    });
    let [ours, its] =
        [Pid::this(), world.node(side).helper()].map(|process| namespace(process, "time"));
    // Before Linux 6.3 only a child enters it.
    let entered = if ours == its { ", which this kernel does not do on execve" } else { "" };
    Ok(format!("{side:?} by {way}, up for {days} days{entered}"))
}

/// SIGHUP turns level debug on, and off the next time.
pub(super) fn toggle_debug(world: &mut World, dice: &mut Dice) -> Outcome {
    let (side, count) = (side(dice), 1 + dice.below(2));
    for _ in 0..count {
        world.node(side).daemon().process.signal(Signal::SIGHUP);
        hold(Duration::from_millis(300));
    }
    Ok(format!("{side:?} {count} times"))
}

//! Unknown senders on the underlay, and clients of the UAPI that misbehave.

use std::net::UdpSocket;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use wgsep_proto::Instant as BootTime;
use wgsep_proto::noise::cookie::CookieGenerator;
use wgsep_proto::wire::messages::INITIATION_LEN;
use wgsep_proto::{PublicKey, Random};
use wgsep_simulation::dice::Dice;
use wgsep_tests::uapi::{Uapi, errno};
use wgsep_tests::wg::hex;

use super::{Outcome, hold, milliseconds, side};
use crate::world::World;

/// Datagrams between two pauses of a flood.
const BURST: usize = 20;
const PAUSE: Duration = Duration::from_millis(2);
/// Different initiations of a flood.
const INITIATIONS: usize = 256;

/// Sends from the router to a node for some time, in bursts; gives how many.
fn flood(
    world: &World,
    side: wgsep_tests::link::Side,
    time: Duration,
    mut datagram: impl FnMut() -> Vec<u8>,
) -> usize {
    let to = world.endpoint(side);
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = match world.router.inside(|| UdpSocket::bind(any)) {
        Ok(socket) => socket,
        Err(error) => panic!("cannot make a socket in the router: {error}"),
    };
    let (begin, mut sent) = (Instant::now(), 0);
    while begin.elapsed() < time {
        for _ in 0..BURST {
            // A full queue is the flood's aim.
            sent += usize::from(socket.send_to(&datagram(), to).is_ok());
        }
        hold(PAUSE);
    }
    sent
}

/// Bytes of any length, some of which begin as a message does.
pub(super) fn garbage(world: &mut World, dice: &mut Dice) -> Outcome {
    let (side, time) = (side(dice), milliseconds(dice, 200, 2000));
    let mut bytes = dice.clone();
    let sent = flood(world, side, time, || {
        let lengths = [0, 1, 31, 32, 64, 92, 148, 1400, 9000];
        let mut datagram = vec![0; lengths[bytes.below(lengths.len() as u64) as usize]];
        bytes.fill(&mut datagram);
        if bytes.chance(700) {
            let header = [1 + bytes.below(4) as u8, 0, 0, 0];
            datagram.iter_mut().zip(header).for_each(|(byte, value)| *byte = value);
        }
        datagram
    });
    Ok(format!("{side:?} for {time:?}, {}", if sent > 0 { "sent" } else { "none sent" }))
}

/// Initiations with a mac1 that is right, as all can make who know the public key.
pub(super) fn initiation_flood(world: &mut World, dice: &mut Dice) -> Outcome {
    let (side, time) = (side(dice), milliseconds(dice, 200, 2000));
    let mut macs = CookieGenerator::new(&public_key(&world.node(side).key.public));
    let mut initiation = || {
        let mut datagram = dice.bytes::<INITIATION_LEN>().to_vec();
        datagram[..4].copy_from_slice(&[1, 0, 0, 0]);
        macs.add_macs(&mut datagram, BootTime::from_nanos(0));
        datagram
    };
    let initiations: Vec<_> = (0..INITIATIONS).map(|_| initiation()).collect();
    let mut next = initiations.iter().cycle();
    let sent = flood(world, side, time, || next.next().cloned().unwrap_or_default());
    Ok(format!("{side:?} for {time:?}, {}", if sent > 0 { "sent" } else { "none sent" }))
}

fn public_key(base64: &str) -> PublicKey {
    let hex = hex(base64);
    let mut bytes = [0; 32];
    for (place, byte) in bytes.iter_mut().enumerate() {
        let digits = hex.get(2 * place..2 * place + 2).unwrap_or_default();
        *byte = u8::from_str_radix(digits, 16).unwrap_or(0);
    }
    PublicKey::from_bytes(bytes)
}

#[track_caller]
fn connect(world: &World, side: wgsep_tests::link::Side) -> Uapi {
    match Uapi::connect(&world.node(side).interface) {
        Ok(uapi) => uapi,
        Err(error) => panic!("cannot connect to the UAPI of {side:?}: {error}"),
    }
}

/// A client that stops in the middle of a request, and stays for some events.
pub(super) fn hang(world: &mut World, dice: &mut Dice) -> Outcome {
    let side = side(dice);
    let begun =
        ["", "get=1", "get=1\n", "set=1\n", "set=1\nprivate_key=00", "set=1\nlisten_port=7\n"];
    let begun = begun[dice.below(begun.len() as u64) as usize];
    let mut uapi = connect(world, side);
    let sent = uapi.send(begun.as_bytes());
    assert!(sent.is_ok(), "cannot send {begun:?}: {sent:?}");
    world.hung.push(uapi);
    Ok(format!("{side:?} after {begun:?}"))
}

/// Bytes that are no request; the daemon answers with an error or hangs up.
pub(super) fn uapi_garbage(world: &mut World, dice: &mut Dice) -> Outcome {
    let (side, count) = (side(dice), 1 + dice.below(20));
    for _ in 0..count {
        let mut garbage = vec![0; dice.below(100_000) as usize];
        dice.fill(&mut garbage);
        // Else a line of it, by chance, is the empty one that ends a request.
        garbage.retain(|byte| *byte != b'\n');
        garbage.extend(b"\n\n");
        let mut uapi = connect(world, side);
        let answer = uapi.send(&garbage).and_then(|()| uapi.receive());
        let refused = answer.as_ref().map_or(true, |answer| errno(answer) != Some(0));
        assert!(refused, "garbage was accepted: {answer:?}");
    }
    Ok(format!("{side:?} {count} times"))
}

/// Clients that close while their answer is written, or before.
pub(super) fn close_midway(world: &mut World, dice: &mut Dice) -> Outcome {
    let (side, count) = (side(dice), 1 + dice.below(50));
    for number in 0..count {
        let request: &[u8] = if number % 2 == 0 { b"get=1\n\n" } else { b"set=1\nfwmark=7\n" };
        let mut uapi = connect(world, side);
        let sent = uapi.send(request);
        assert!(sent.is_ok(), "cannot send a request: {sent:?}");
    }
    let node = world.node(side);
    let mark = node.daemon().wg("show", "fwmark");
    let expected = if node.mark == 0 { "off".to_owned() } else { format!("{:#x}", node.mark) };
    assert_eq!(mark.trim(), expected, "a request without an end was applied");
    Ok(format!("{side:?} {count} times"))
}

/// Many readers at once.
pub(super) fn show_burst(world: &mut World, dice: &mut Dice) -> Outcome {
    let (side, count) = (side(dice), 2 + dice.below(20));
    let node = world.node(side);
    let show = |_| {
        let mut command = node.netns().command("wg");
        command.args(["show", &node.interface, "dump"]).stdout(Stdio::null());
        command.spawn()
    };
    let shows: Vec<_> = (0..count).map(show).collect();
    for show in shows {
        let status = show.and_then(|mut child| child.wait());
        let Ok(status) = status else { panic!("wg show cannot run: {status:?}") };
        assert!(status.success(), "wg show: {status}, signal {:?}", status.signal());
    }
    Ok(format!("{side:?} {count} at once"))
}

//! Two namespaces joined by a veth pair, and a contender's tunnel between them.

use std::env;
use std::net::{IpAddr, SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use wgsep_tests::daemon::{Daemon, unique_interface};
use wgsep_tests::link::{self, DEVICE, Family, Side};
use wgsep_tests::netns::Netns;
use wgsep_tests::process::Process;
use wgsep_tests::traffic::until_ping;
use wgsep_tests::tunnel::{End, PORT};
use wgsep_tests::wait;
use wgsep_tests::wg::KeyPair;

use crate::contender::Contender;

/// The word that makes this program a forwarder.
pub(crate) const FORWARD: &str = "forward";
/// As wgsep sets it on its own interface.
const MTU: u16 = 1420;
/// How long a forwarder may take to make its interface.
const START_LIMIT: Duration = Duration::from_secs(10);

/// What the network cards between the ends can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VethOffload {
    /// A veth pair as it is: super-packets cross it whole.
    Default,
    /// The sender splits, the receiver joins: as on a wire between two good cards.
    Wire,
    /// Neither: every packet by itself.
    Off,
}

impl VethOffload {
    /// What `VETH=` calls each.
    pub(crate) const ALL: [(&'static str, Self); 3] =
        [("default", Self::Default), ("wire", Self::Wire), ("off", Self::Off)];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL.into_iter().find(|(_, offload)| *offload == self).map_or("", |(name, _)| name)
    }

    #[track_caller]
    fn set(self, netns: &Netns) {
        let gro = match self {
            Self::Default => return,
            Self::Wire => "on",
            Self::Off => "off",
        };
        netns.run(format!("ethtool -K {DEVICE} tx off tso off gso off gro {gro}"));
        netns.run(format!("ethtool -K {DEVICE} tx-udp-segmentation off"));
    }
}

/// One end of the tunnel.
#[derive(Debug)]
pub struct Place {
    /// The namespace that interface and sockets are in.
    pub netns: Arc<Netns>,
    /// The tunnel's interface.
    pub interface: String,
    /// The program; what it has started counts as its own.
    pub program: Pid,
    /// Its address in the tunnel.
    pub inner: IpAddr,
}

/// A tunnel that works.
#[derive(Debug)]
pub struct Bed {
    /// The end that begins.
    pub left: Place,
    /// The other.
    pub right: Place,
    running: Running,
}

/// What ends with the bed.
#[derive(Debug)]
enum Running {
    Forwarders { _processes: [Process; 2] },
    Daemons { _left: Box<End>, right: Box<End> },
}

impl Bed {
    /// Starts a contender at both ends. The right end of a daemon has `key`.
    ///
    /// # Panics
    ///
    /// When it does not start or no ping goes through.
    #[track_caller]
    #[must_use]
    pub fn new(contender: Contender, veth: VethOffload, key: &KeyPair) -> Self {
        match contender {
            Contender::Forwarder => Self::of_forwarders(veth),
            Contender::Daemon(implementation) => {
                Self::of_daemons(veth, key, |netns| Daemon::start(implementation, netns))
            }
        }
    }

    /// A tunnel between two daemons that `start` starts in their namespaces.
    #[track_caller]
    pub(crate) fn of_daemons(
        veth: VethOffload,
        key: &KeyPair,
        start: impl Fn(&Arc<Netns>) -> Daemon,
    ) -> Self {
        let (left, right) = joined(veth);
        let left = Box::new(End::new(Side::Left, start(&left)));
        let mut right = Box::new(End::new(Side::Right, start(&right)));
        right.key = key.clone();
        for (end, other) in [(&left, &right), (&right, &left)] {
            end.configure(&other.key.public, Some(other.endpoint(Family::V4)), None);
        }
        let place = |end: &End| Place {
            netns: Arc::clone(&end.daemon.netns),
            interface: end.daemon.interface.clone(),
            program: end.daemon.process.pid(),
            inner: end.side.inner(Family::V4),
        };
        Self {
            left: place(&left),
            right: place(&right),
            running: Running::Daemons { _left: left, right },
        }
        .answering()
    }

    #[track_caller]
    fn of_forwarders(veth: VethOffload) -> Self {
        let (left, right) = joined(veth);
        let start = |netns: &Arc<Netns>, side: Side, other: Side| {
            let interface = unique_interface();
            let Ok(program) = env::current_exe() else { panic!("this program is not to be found") };
            let mut command = netns.command(program);
            let [local, peer] = [side, other].map(|side| endpoint(side).to_string());
            command.args([FORWARD, &interface, &local, &peer]);
            let mut process = Process::spawn(command, format!("forwarder on {interface}"));
            wait::until("the forwarder has made its interface", START_LIMIT, || {
                let ended = process.try_exit();
                assert!(ended.is_none(), "the forwarder ended: {ended:?}\n{}", process.log());
                netns.output(format!("ip link show {interface}")).status.success()
            });
            let inner = side.inner(Family::V4);
            netns.run(format!("ip addr add {inner}/24 dev {interface}"));
            netns.run(format!("ip link set {interface} mtu {MTU} up"));
            let netns = Arc::clone(netns);
            (Place { netns, interface, program: process.pid(), inner }, process)
        };
        let (left, left_process) = start(&left, Side::Left, Side::Right);
        let (right, right_process) = start(&right, Side::Right, Side::Left);
        let running = Running::Forwarders { _processes: [left_process, right_process] };
        Self { left, right, running }.answering()
    }

    #[track_caller]
    fn answering(self) -> Self {
        until_ping(&self.left.netns, self.right.inner);
        self
    }

    /// Both ends.
    #[must_use]
    pub const fn places(&self) -> [&Place; 2] {
        [&self.left, &self.right]
    }

    /// Where the right end's port is, seen from the left one.
    #[must_use]
    pub fn right_endpoint(&self) -> SocketAddr {
        endpoint(Side::Right).into()
    }

    /// The right end's daemon; a forwarder has none.
    #[must_use]
    pub fn right_end(&self) -> Option<&End> {
        match &self.running {
            Running::Daemons { right, .. } => Some(right),
            Running::Forwarders { .. } => None,
        }
    }
}

fn joined(veth: VethOffload) -> (Arc<Netns>, Arc<Netns>) {
    let (left, right) = link::joined();
    veth.set(&left);
    veth.set(&right);
    (left, right)
}

fn endpoint(side: Side) -> SocketAddrV4 {
    match side.outer(Family::V4) {
        IpAddr::V4(address) => SocketAddrV4::new(address, PORT),
        IpAddr::V6(_) => unreachable!("an IPv4 address was asked for"),
    }
}

//! Hosts, the datagrams between them, and the clock they share.

use crate::dice::Dice;
use crate::host::{Host, HostId};
use crate::link::{Datagram, Kind, Link};
use crate::packet;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;
use wgsep_proto::device::control_plane::{ControlPlane, Restore};
use wgsep_proto::saved::{self, Refused};
use wgsep_proto::{
    Configuration, Device, Ecn, Endpoint, Instant, Now, PeerConfiguration, PeerStatus,
    ReceivedPacket, Source,
};

/// The UDP port of every host, until a NAT gives it another.
pub const PORT: u16 = 51_820;

/// Time on the boot clock when a simulation starts: not 0, so that nothing mistakes 0 for a time.
const START: Duration = Duration::from_secs(1000);
/// Time of day when a simulation starts.
const START_WALL: Duration = Duration::from_secs(1_800_000_000);

/// Decides whether a datagram is delivered.
pub type Filter = Box<dyn FnMut(&Datagram) -> bool>;

/// A network of hosts.
pub struct Simulation {
    /// What datagrams meet on their way.
    pub link: Link,
    /// Every datagram that any host sent, lost ones included.
    pub sent: Vec<Datagram>,
    elapsed: Duration,
    hosts: Vec<Host>,
    under_way: BTreeMap<(Instant, u64), Datagram>,
    sequence: u64,
    filter: Filter,
    dice: Dice,
}

impl Simulation {
    /// No hosts yet.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            link: Link::default(),
            sent: Vec::new(),
            elapsed: Duration::ZERO,
            hosts: Vec::new(),
            under_way: BTreeMap::new(),
            sequence: 0,
            filter: Box::new(|_| true),
            dice: Dice::new(seed),
        }
    }

    /// Two hosts, each the other's peer with its endpoint.
    #[must_use]
    pub fn pair(seed: u64) -> (Self, HostId, HostId) {
        let mut simulation = Self::new(seed);
        let (a, b) = (simulation.add_host(), simulation.add_host());
        simulation.introduce(a, b);
        simulation.introduce(b, a);
        (simulation, a, b)
    }

    /// Adds a host that is up and has a key.
    pub fn add_host(&mut self) -> HostId {
        let number = self.hosts.len();
        let [.., high, low] = (number + 1).to_be_bytes();
        let address = SocketAddr::from((Ipv4Addr::new(192, 0, high, low), PORT));
        let now = self.now();
        self.hosts.push(Host::new(number, address, &mut self.dice, now));
        HostId(number)
    }

    /// Makes `peer` a peer of `host`.
    pub fn introduce(&mut self, host: HostId, peer: HostId) {
        let peer = self.host(peer).as_peer();
        self.configure_peer(host, peer);
    }

    // ------------------------------------------------------------ looking

    /// Both clocks.
    #[must_use]
    pub fn now(&self) -> Now {
        let nanoseconds = u64::try_from((START + self.elapsed).as_nanos()).unwrap_or(u64::MAX);
        Now { instant: Instant::from_nanos(nanoseconds), wall: START_WALL + self.elapsed }
    }

    /// A host.
    #[must_use]
    pub fn host(&self, id: HostId) -> &Host {
        &self.hosts[id.0]
    }

    /// Mutable access to a host. [`Self::flush`] then sends what its device has queued.
    #[must_use]
    pub fn host_mut(&mut self, id: HostId) -> &mut Host {
        &mut self.hosts[id.0]
    }

    /// The state of `peer` at `host`.
    #[must_use]
    pub fn peer(&self, host: HostId, peer: HostId) -> PeerStatus {
        self.host(host).peer(&self.host(peer).public_key)
    }

    /// The datagrams that `host` sent from its present address.
    pub fn sent_by(&self, host: HostId) -> impl Iterator<Item = &Datagram> {
        let from = self.host(host).address;
        self.sent.iter().filter(move |datagram| datagram.from == from)
    }

    /// How many of a kind it sent.
    #[must_use]
    pub fn count(&self, host: HostId, kind: Kind) -> usize {
        self.sent_by(host).filter(|datagram| datagram.kind() == kind).count()
    }

    /// When it sent those of a kind.
    #[must_use]
    pub fn times(&self, host: HostId, kind: Kind) -> Vec<Instant> {
        let of_kind = self.sent_by(host).filter(|datagram| datagram.kind() == kind);
        of_kind.map(|datagram| datagram.at).collect()
    }

    /// The last datagram of a kind it sent.
    ///
    /// # Panics
    /// If it sent none.
    #[must_use]
    pub fn last(&self, host: HostId, kind: Kind) -> Datagram {
        let last = self.sent_by(host).filter(|datagram| datagram.kind() == kind).last();
        let Some(last) = last else { panic!("no {kind:?} was sent") };
        last.clone()
    }

    // ------------------------------------------------------------ acting

    /// Applies a `set` to a host.
    pub fn configure(&mut self, host: HostId, configuration: Configuration) {
        let now = self.now();
        self.host_mut(host).device.configure(configuration, now);
        self.flush(host);
    }

    /// Applies changes to one peer of a host.
    pub fn configure_peer(&mut self, host: HostId, peer: PeerConfiguration) {
        self.configure(host, Configuration { peers: vec![peer], ..Configuration::default() });
    }

    /// Changes what `host` has configured of `peer`.
    pub fn change_peer(
        &mut self,
        host: HostId,
        peer: HostId,
        change: impl FnOnce(&mut PeerConfiguration),
    ) {
        let mut configuration = PeerConfiguration::new(self.host(peer).public_key);
        change(&mut configuration);
        self.configure_peer(host, configuration);
    }

    /// Sets the interface of a host up or down.
    pub fn set_up(&mut self, host: HostId, up: bool) {
        let now = self.now();
        self.host_mut(host).device.set_up(up, now);
        self.flush(host);
    }

    /// Has a host find itself in a copy of its virtual machine, whose kernel has reseeded its generator.
    pub fn clone_virtual_machine(&mut self, host: HostId, seed: u64) {
        let now = self.now();
        let host_state = self.host_mut(host);
        host_state.dice.reseed(seed);
        host_state.device.vm_notification(now);
        self.flush(host);
    }

    /// Replaces the device of a host by one with the state that it has saved.
    ///
    /// # Panics
    /// If the state cannot be encoded, is refused, or is not the same afterwards.
    pub fn hand_over(&mut self, host: HostId) {
        let records = self.save(host);
        let restored = self.restore(host, &records);
        assert_eq!(restored, Ok(true), "a device's own state");
        assert!(self.save(host) == records, "something of the state is lost");
    }

    /// The encoded records of the state of a host's device.
    ///
    /// # Panics
    /// If they cannot be encoded.
    pub fn save(&mut self, host: HostId) -> Vec<Vec<u8>> {
        self.flush(host);
        let mut records = Vec::new();
        let mut buffer = vec![0; saved::MAX_RECORD_LEN];
        let saved = self.host(host).device.control_plane().save([], |record| {
            let len = saved::encode(&record, &mut buffer)?;
            records.push(buffer[..len].to_vec());
            Ok::<(), Refused>(())
        });
        assert_eq!(saved, Ok(()), "a device's own state");
        records
    }

    /// Replaces the device of a host by one with the state of these records, if they are all of one; if not, the host
    /// keeps its device.
    ///
    /// # Errors
    /// Why no device has such a state.
    pub fn restore(&mut self, host: HostId, records: &[Vec<u8>]) -> Result<bool, Refused> {
        let host = self.host_mut(host);
        let mut control = ControlPlane::new(Box::new(host.dice.clone()));
        let mut restore = Restore::new(&mut control);
        for record in records {
            if restore.add_record(saved::decode(record)?)? {
                host.device = Device::with_control_plane(control);
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Sends a packet into the tunnel of a host.
    pub fn send(&mut self, host: HostId, packet: &[u8]) {
        let now = self.now();
        // What is dropped is counted.
        let _counted = self.host_mut(host).device.encapsulate(packet, now);
        self.flush(host);
    }

    /// Sends an echo request of ping's length from one host to another; returns its tag.
    pub fn ping(&mut self, from: HostId, to: HostId) -> u64 {
        let tag = self.dice.roll();
        let (source, destination) = (self.host(from).inner_v4(), self.host(to).inner_v4());
        self.send(from, &packet::request(source, destination, packet::PING_LEN, 0, tag));
        tag
    }

    /// Pings and waits a second for the answer.
    #[must_use]
    pub fn reaches(&mut self, from: HostId, to: HostId) -> bool {
        let tag = self.ping(from, to);
        self.run_for(Duration::from_secs(1));
        self.host(from).replies().contains(&tag)
    }

    /// Gives a host another address, as a NAT does that forgot the one it had.
    pub fn rebind(&mut self, host: HostId, address: SocketAddr) {
        self.host_mut(host).address = address;
    }

    /// Lets only those datagrams go on their way that `filter` likes.
    pub fn set_filter(&mut self, filter: impl FnMut(&Datagram) -> bool + 'static) {
        self.filter = Box::new(filter);
    }

    /// Loses every datagram of these kinds.
    pub fn lose(&mut self, kinds: &'static [Kind]) {
        self.set_filter(move |datagram| !kinds.contains(&datagram.kind()));
    }

    /// Loses nothing any more.
    pub fn heal(&mut self) {
        self.set_filter(|_| true);
    }

    /// Hands a datagram to a host at once, as if it came from `from`.
    pub fn inject(&mut self, from: SocketAddr, to: HostId, payload: &[u8]) {
        let datagram = Datagram {
            at: self.now().instant,
            from,
            to: self.host(to).address,
            traffic_class: 0,
            payload: payload.to_vec(),
        };
        self.arrive(to, datagram);
    }

    // ------------------------------------------------------------ time

    /// Runs for a time.
    pub fn run_for(&mut self, duration: Duration) {
        let end = self.elapsed + duration;
        while let Some(at) = self.next_happening() {
            let at = self.elapsed + at.since(self.now().instant);
            if at > end {
                break;
            }
            self.elapsed = at;
            self.step();
        }
        self.elapsed = end;
    }

    /// Stops everything for a time, as a suspended machine does: datagrams under way are lost, and
    /// what was due meanwhile is due afterwards.
    pub fn suspend(&mut self, duration: Duration) {
        self.under_way.clear();
        self.elapsed += duration;
        self.step();
    }

    fn next_happening(&self) -> Option<Instant> {
        let arrival = self.under_way.keys().next().map(|(at, _)| *at);
        let timers = self.hosts.iter().filter_map(|host| host.device.next_timeout());
        timers.chain(arrival).min()
    }

    /// Does all that is due now.
    fn step(&mut self) {
        let now = self.now();
        for id in (0..self.hosts.len()).map(HostId) {
            let device = &mut self.host_mut(id).device;
            if device.next_timeout().is_some_and(|at| at <= now.instant) {
                device.handle_timeout(now);
                self.flush(id);
            }
        }
        while let Some(entry) = self.under_way.first_entry().filter(|e| e.key().0 <= now.instant) {
            let datagram = entry.remove();
            let receiver = self.hosts.iter().position(|host| host.address == datagram.to);
            if let Some(receiver) = receiver.map(HostId) {
                self.arrive(receiver, datagram);
            }
        }
    }

    fn arrive(&mut self, id: HostId, mut datagram: Datagram) {
        let now = self.now();
        let host = &mut self.hosts[id.0];
        let address = datagram.to.ip();
        let source = Some(Source { address, interface: 1 });
        let source = Endpoint { source, ..Endpoint::new(datagram.from) };
        let ecn = Ecn::of_traffic_class(datagram.traffic_class);
        host.device.set_backlog(host.waiting);
        let mut answer = None;
        let received = host.device.decapsulate(source, ecn, &mut datagram.payload, now);
        if let Ok(Some(ReceivedPacket { packet, .. })) = received {
            answer = packet::reply(packet).filter(|_| host.answers);
            host.received.push((now.instant, packet.to_vec()));
        }
        self.flush(id);
        if let Some(answer) = answer {
            self.send(id, &answer);
        }
    }

    /// Sends the datagrams and records the events that the device of a host has queued.
    pub fn flush(&mut self, id: HostId) {
        let now = self.now();
        let host = &mut self.hosts[id.0];
        host.device.flush(now);
        while let Some(event) = host.device.poll_event() {
            host.events.push((now.instant, event));
        }
        let from = host.address;
        while let Some(transmit) = self.hosts[id.0].device.poll_transmit() {
            let datagram = Datagram {
                at: now.instant,
                from,
                to: transmit.endpoint.destination,
                traffic_class: transmit.traffic_class,
                payload: transmit.datagram.to_vec(),
            };
            self.post(&datagram);
            self.sent.push(datagram);
        }
    }

    fn post(&mut self, datagram: &Datagram) {
        if !(self.filter)(datagram) {
            return;
        }
        for delay in self.link.fates(&mut self.dice) {
            self.sequence += 1;
            let arrival = datagram.at.after(delay);
            self.under_way.insert((arrival, self.sequence), datagram.clone());
        }
    }
}

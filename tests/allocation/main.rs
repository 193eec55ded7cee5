//! A packet on its way costs no allocation, in either direction: counted.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::time::Duration;
use wgsep_dataplane::offload::{Coalesce, Coalescer, GsoType, Segments, VNET_HDR_LEN, VnetHeader};
use wgsep_proto::path::inbound::{InboundBatch, Receive};
use wgsep_proto::path::outbound::{OutboundBatch, Segmentation as _, Whole};
use wgsep_proto::{Ecn, Endpoint, Instant, MAX_OVERHEAD, Now, PrivateKey, Tunnel};
use wgsep_simulation::dice::Dice;
use wgsep_simulation::packet;
use wgsep_simulation::simulation::Simulation;
use wgsep_tests::counting::{Counting, allocations};

/// Packets of a batch: more than are sealed at once.
const PACKETS: usize = 40;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn the_counter_counts() {
    assert_eq!(allocations(|| drop(std::hint::black_box(Box::new(1)))), 1);
    assert_eq!(allocations(|| ()), 0);
}

#[test]
fn routing_sealing_opening_and_accepting_allocate_nothing() {
    let (mut simulation, a, b) = Simulation::pair(1);
    assert!(simulation.reaches(a, b));
    let (from, to) = (simulation.host(a), simulation.host(b));
    let now = simulation.now().instant;
    let plain = packet::request(from.inner_v4(), to.inner_v4(), 1420, 0, 0);
    let (outward, inward) = (from.device.data_path(), to.device.data_path());
    let (allowed_ips, back) = (outward.allowed_ips.reader(), inward.allowed_ips.reader());
    let packets = plain.repeat(PACKETS);
    let mut datagrams = vec![0; 0x10000];
    let mut outbound = OutboundBatch::with_capacity(PACKETS, PACKETS);
    let mut inbound = InboundBatch::with_capacity(1, PACKETS);
    let mut arrived = 0;
    let counted = allocations(|| {
        for _ in 0..100 {
            let len = plain.len();
            let read = (0..PACKETS).map(|number| (number * len..(number + 1) * len, Whole::new));
            let answer = |_: &[u8]| panic!("each packet has a peer");
            outbound.route(outward, allowed_ips.value(), &packets, read, now, answer);
            outbound.reserve_nonces(outward, &packets, &mut datagrams, now);
            assert!(outbound.seal(outward, &packets, &mut datagrams));
            for run in outbound.sealed_runs() {
                let [first, .., last] = run.datagrams else { panic!("several datagrams") };
                let receive = Receive {
                    bytes: first.bytes.start..last.bytes.end,
                    segment_len: first.bytes.len(),
                    endpoint: Endpoint::new(from.address),
                    ecn: Ecn::NOT_CAPABLE,
                };
                inbound.parse(inward, &datagrams, &[receive], |_, _| panic!("no handshake"));
            }
            outbound.clear();
            inbound.open(inward, &mut datagrams, now);
            inbound.accept(inward, back.value(), &mut datagrams, now);
            arrived +=
                inbound.accepted().filter(|packet| datagrams[packet.clone()] == plain).count();
            inbound.clear();
        }
    });
    assert_eq!((arrived, counted), (100 * PACKETS, 0));
}

/// As a library, too, once its memory has grown to what is sent at once.
#[test]
fn a_device_allocates_nothing_for_a_packet() {
    let (mut simulation, a, b) = Simulation::pair(1);
    assert!(simulation.reaches(a, b));
    let (now, address) = (simulation.now(), simulation.host(a).address);
    let (source, destination) = (simulation.host(a).inner_v4(), simulation.host(b).inner_v4());
    let plain = packet::request(source, destination, 1420, 0, 0);
    let mut wire = vec![0; 2048];
    let mut carry = |simulation: &mut Simulation| {
        simulation.host_mut(a).device.encapsulate(&plain, now).unwrap();
        let device = &mut simulation.host_mut(a).device;
        let transmit = device.poll_transmit().unwrap();
        let len = transmit.datagram.len();
        wire[..len].copy_from_slice(transmit.datagram);
        let device = &mut simulation.host_mut(b).device;
        let from = Endpoint::new(address);
        let received = device.decapsulate(from, Ecn::NOT_CAPABLE, &mut wire[..len], now);
        assert_eq!(received.unwrap().unwrap().packet, &plain[..]);
    };
    carry(&mut simulation);
    assert_eq!(allocations(|| (0..100).for_each(|_| carry(&mut simulation))), 0);
}

/// A tunnel, in both directions, one packet and a batch at a time.
#[test]
fn tunnels_allocate_nothing_for_a_packet_in_buffers_of_the_caller() {
    let now = |milliseconds: u64| Now {
        instant: Instant::from_nanos(1_000_000 * (1 + milliseconds)),
        wall: Duration::from_secs(1_800_000_000) + Duration::from_millis(milliseconds),
    };
    let keys = [1, 2].map(|byte| PrivateKey::from_bytes([byte; 32]).unwrap());
    let publics = [keys[1].public_key(), keys[0].public_key()];
    let address = |number: u8| SocketAddr::from(([192, 0, 2, number], 51820));
    let mut number = 0;
    let [mut a, mut b] = keys.map(|key| {
        number += 1;
        let (peer, random) = (publics[usize::from(number) - 1], Box::new(Dice::new(number.into())));
        Tunnel::new(key, peer, None, Some(address(3 - number)), random).unwrap()
    });
    a.start_handshake(now(0)).unwrap();
    let mut initiation = a.poll_transmit().unwrap().datagram.to_vec();
    b.decapsulate(address(1), &mut initiation, now(0)).unwrap();
    let mut response = b.poll_transmit().unwrap().datagram.to_vec();
    a.decapsulate(address(2), &mut response, now(0)).unwrap();
    let mut keepalive = a.poll_transmit().unwrap().datagram.to_vec();
    b.decapsulate(address(1), &mut keepalive, now(0)).unwrap();

    let mut plain = vec![0; 1420];
    plain[..4].copy_from_slice(&[0x45, 0, 0x05, 0x8c]);
    let packets = plain.repeat(PACKETS);
    let ranges: Vec<_> = (0..PACKETS).map(|number| number * 1420..(number + 1) * 1420).collect();
    let mut datagrams = vec![0; PACKETS * (1420 + MAX_OVERHEAD)];
    let mut receives = Vec::with_capacity(PACKETS);
    let mut round = |a: &mut Tunnel, b: &mut Tunnel, source, now| {
        let sealed = a.encapsulate_into(&plain, &mut datagrams, now).unwrap().unwrap();
        assert_eq!(b.decapsulate(source, sealed.datagram, now).unwrap().unwrap(), &plain);
        receives.clear();
        let mut end = 0;
        for sealed in a.encapsulate_batch(&packets, &ranges, &mut datagrams, now).unwrap() {
            let start = end;
            end += sealed.datagram.len();
            receives.push(Receive::new(start..end, source));
        }
        let received = b.decapsulate_batch(&mut datagrams, &receives, now).unwrap();
        assert_eq!(received.filter(|one| one.packet == plain).count(), PACKETS);
        assert!(a.poll_transmit().is_none() && b.poll_transmit().is_none());
    };
    let mut rounds = |from: u64| {
        for milliseconds in from..from + 100 {
            round(&mut a, &mut b, address(1), now(milliseconds));
            round(&mut b, &mut a, address(2), now(milliseconds));
        }
    };
    rounds(1);
    assert_eq!(allocations(|| rounds(101)), 0);
}

#[test]
fn splitting_and_coalescing_allocate_nothing() {
    // UDP over IPv6, whose checksum is that of the pseudo-header until it is split.
    let mut whole = vec![0x60, 0, 0, 0, 0, 0, 17, 64];
    whole.resize(40, 1);
    whole.extend([0, 1, 0, 2, 0, 0, 0, 0]);
    whole.resize(48 + 40_000, 7);
    let l4_len = (whole.len() - 40) as u16;
    whole[4..6].copy_from_slice(&l4_len.to_be_bytes());
    // 32 ones are 16 words of 0x0101.
    let pseudo = 16 * 0x0101 + 17 + u32::from(l4_len);
    let pseudo = (pseudo & 0xffff) + (pseudo >> 16);
    whole[46..48].copy_from_slice(&(pseudo as u16).to_be_bytes());
    let gso = Some((GsoType::Udp, 1000));
    let header = VnetHeader { checksum: Some((40, 6)), gso, header_len: 48 };
    let mut coalescer = Coalescer::new(Coalesce { tcp_v4: true, tcp_v6: true, udp: true });
    let mut frame = vec![0; VNET_HDR_LEN + 1048];
    let (mut frames, mut packets) = (0, 0);
    let counted = allocations(|| {
        for _ in 0..50 {
            let segments = Segments::new(&header, &whole).unwrap();
            for number in 0..segments.count() {
                segments.write(&whole, number, &mut frame[VNET_HDR_LEN..]).unwrap();
                coalescer.push(&mut frame, |_, of| (frames, packets) = (frames + 1, packets + of));
            }
            coalescer.flush(|_, of| (frames, packets) = (frames + 1, packets + of));
        }
    });
    assert_eq!((frames, packets, counted), (50, 2000, 0));
}

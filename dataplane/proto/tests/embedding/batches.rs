//! Packets in memory of the caller, one and many at a time.

use crate::dice::Dice;
use crate::network::{Pair, address, at, packet, sent, tunnel};
use crate::state::{connect, packet_of, server};
use std::ops::Range;
use wgsep_proto::{
    BatchError, Device, DropCause, Ecn, EncapsulateError, Endpoint, MAX_OVERHEAD, Receive,
    ReceivedPacket, SessionState,
};

/// Packets of these lengths, one behind the other, and where they are.
fn packets(lens: &[usize]) -> (Vec<u8>, Vec<Range<usize>>) {
    let (mut memory, mut ranges) = (Vec::new(), Vec::new());
    for len in lens {
        let start = memory.len();
        memory.extend(packet(*len));
        ranges.push(start..memory.len());
    }
    (memory, ranges)
}

/// Lengths of all kinds, more than are sealed at once.
fn many() -> Vec<usize> {
    (0..300).map(|number| 20 + number * 37 % 1401).collect()
}

#[test]
fn a_packet_is_sealed_into_the_buffer_it_is_given_and_opened_where_it_arrives() {
    let mut pair = Pair::established();
    let now = pair.now();
    let plain = packet(1400);
    let mut buffer = vec![0xee; plain.len() + MAX_OVERHEAD];
    let transmit = pair.a.encapsulate_into(&plain, &mut buffer, now).unwrap().unwrap();
    assert_eq!((transmit.endpoint.destination, transmit.datagram.len()), (address(2), 1408 + 32));
    let packet = pair.b.decapsulate(address(1), transmit.datagram, now).unwrap().unwrap();
    assert_eq!(packet, &plain);
    assert!(sent(&mut pair.a).is_empty());
    assert_eq!(pair.a.report(now.instant).tx_packets, 3);
}

#[test]
fn a_packet_that_waits_for_a_handshake_comes_out_of_the_queue() {
    let mut pair = Pair::new();
    let mut buffer = [0; 256];
    assert_eq!(pair.a.encapsulate_into(&packet(40), &mut buffer, pair.now()), Ok(None));
    let (memory, ranges) = packets(&[41, 42]);
    let mut datagrams = [0; 256];
    let sealed = pair.a.encapsulate_batch(&memory, &ranges, &mut datagrams, pair.now()).unwrap();
    assert_eq!(sealed.count(), 0);
    assert_eq!(pair.deliver(), [packet(40), packet(41), packet(42)]);
}

#[test]
fn a_buffer_that_is_too_short_and_a_range_outside_of_it_change_nothing() {
    let mut pair = Pair::established();
    let now = pair.now();
    let mut buffer = [0; 100 + MAX_OVERHEAD - 1];
    let needed = 100 + MAX_OVERHEAD;
    let refused = pair.a.encapsulate_into(&packet(100), &mut buffer, now);
    assert_eq!(refused, Err(EncapsulateError::BufferTooShort { needed }));
    let refused = pair.a.encapsulate_into(b"no packet", &mut buffer, now);
    assert_eq!(refused, Err(EncapsulateError::Dropped(DropCause::OutboundMalformed)));

    let (memory, ranges) = packets(&[100, 50]);
    let mut datagrams = [0; 1000];
    let batch = |ranges: &[Range<usize>], pair: &mut Pair, datagrams: &mut [u8]| {
        pair.a.encapsulate_batch(&memory, ranges, datagrams, now).err()
    };
    let too_short = BatchError::BufferTooShort { needed: 150 + 2 * MAX_OVERHEAD };
    assert_eq!(batch(&ranges, &mut pair, &mut [0; 200]), Some(too_short));
    for (ranges, number) in [
        (vec![0..100, 100..151], 1),
        (vec![0..100, 99..150], 1),
        (vec![Range { start: 9, end: 8 }], 0),
        (vec![usize::MAX..usize::MAX, 0..1], 0),
    ] {
        let refused = batch(&ranges, &mut pair, &mut datagrams);
        assert_eq!(refused, Some(BatchError::InvalidRange { number }), "{ranges:?}");
        let receives: Vec<_> =
            ranges.iter().map(|range| Receive::new(range.clone(), address(1))).collect();
        let refused = pair.b.decapsulate_batch(&mut memory.clone(), &receives, now).err();
        assert_eq!(refused, Some(BatchError::InvalidRange { number }), "{ranges:?}");
    }
    assert_eq!(pair.a.report(now.instant).tx_packets, 2);
    assert_eq!(batch(&ranges, &mut pair, &mut datagrams), None);
    assert_eq!(pair.a.report(now.instant).tx_packets, 4);
}

#[test]
fn a_batch_of_any_lengths_arrives_whole_and_in_order() {
    let mut pair = Pair::established();
    let (now, lens) = (pair.now(), many());
    let (memory, ranges) = packets(&lens);
    let mut datagrams = vec![0; memory.len() + lens.len() * MAX_OVERHEAD];
    let sealed = pair.a.encapsulate_batch(&memory, &ranges, &mut datagrams, now).unwrap();
    assert_eq!(sealed.len(), lens.len());
    let (mut receives, mut end) = (Vec::new(), 0);
    for transmit in sealed {
        assert_eq!(transmit.endpoint.destination, address(2));
        receives.push(Receive::new(end..end + transmit.datagram.len(), address(1)));
        end += transmit.datagram.len();
    }
    let received = pair.b.decapsulate_batch(&mut datagrams, &receives, now).unwrap();
    let received: Vec<_> = received.map(|ReceivedPacket { packet, .. }| packet.to_vec()).collect();
    assert_eq!(received, lens.iter().map(|len| packet(*len)).collect::<Vec<_>>());
    let replayed = pair.b.decapsulate_batch(&mut datagrams, &receives, now).unwrap();
    assert_eq!(replayed.count(), 0);
    assert!(pair.b.drops().count(DropCause::Unauthentic) > 0, "the batch was opened in place");
}

#[test]
fn datagrams_that_the_kernel_coalesced_are_opened_each() {
    let mut pair = Pair::established();
    let now = pair.now();
    let (memory, ranges) = packets(&[112, 112, 112, 16 + 20]);
    let mut datagrams = vec![0; 1000];
    let sealed = pair.a.encapsulate_batch(&memory, &ranges, &mut datagrams, now).unwrap();
    let len = sealed.map(|transmit| transmit.datagram.len()).sum();
    let receive = Receive { segment_len: 112 + 32, ..Receive::new(0..len, address(1)) };
    let received = pair.b.decapsulate_batch(&mut datagrams, &[receive], now).unwrap();
    assert_eq!(received.map(|one| one.packet.len()).collect::<Vec<_>>(), [112, 112, 112, 36]);
}

#[test]
fn a_batch_may_hold_a_handshake_and_packets_of_many_peers() {
    let mut device = server(&[1, 2]);
    let mut clients = [1, 2].map(|number| tunnel(number, 99, Some(address(99))));
    let [first, second] = &mut clients;
    connect(&mut device, first, 1);
    second.start_handshake(at(0)).unwrap();
    let (mut memory, mut receives) = (Vec::new(), Vec::new());
    let mut add = |number: u8, datagram: &[u8]| {
        let start = memory.len();
        memory.extend_from_slice(datagram);
        receives.push(Receive::new(start..memory.len(), address(number)));
    };
    let mut buffer = [0; 200];
    for len in [60, 70] {
        let transmit = first.encapsulate_into(&packet_of(1, len), &mut buffer, at(0));
        add(1, transmit.unwrap().unwrap().datagram);
    }
    add(2, &sent(second).pop_front().unwrap().1);
    add(1, b"garbage");
    add(
        1,
        first.encapsulate_into(&packet_of(1, 80), &mut buffer, at(0)).unwrap().unwrap().datagram,
    );
    let peer = device.peer_id(second.peer()).is_none().then(|| {
        let key = crate::network::private_key(1).public_key();
        device.peer_id(&key).unwrap()
    });
    let received = device.decapsulate_batch(&mut memory, &receives, at(0)).unwrap();
    let received: Vec<_> = received.map(|one| (Some(one.peer), one.packet.len())).collect();
    assert_eq!(received, [(peer, 60), (peer, 70), (peer, 80)]);
    assert_eq!(device.drops().count(DropCause::InboundMalformed), 1);
    let response = device.poll_transmit().unwrap();
    assert_eq!(response.endpoint.destination, address(2));
    second.decapsulate(address(99), response.datagram, at(0)).unwrap();
    assert_eq!(second.report(at(0).instant).state, SessionState::Established);
}

/// A datagram, from where it comes, and the ECN bits of its outer header.
struct Arrival {
    source: Endpoint,
    ecn: Ecn,
    datagram: Vec<u8>,
}

/// A device, and what arrives there from two peers, of which the second begins to use another keypair in the middle:
/// packets, keepalives, sources of others, bytes that changed, replays, and peers that move.
fn disorder(seed: u64) -> (Device, Vec<Arrival>) {
    let mut dice = Dice::new(seed);
    let mut device = server(&[1, 2]);
    let mut clients = [1, 2].map(|number| tunnel(number, 99, Some(address(99))));
    for (client, number) in clients.iter_mut().zip(1..) {
        connect(&mut device, client, number);
    }
    let [_, second] = &mut clients;
    let (mut from, mut datagrams): (u8, Vec<Vec<u8>>) = (1, Vec::new());
    let mut buffer = [0; 2000];
    let mut arrivals = Vec::new();
    let new_keypair = dice.below(40);
    second.start_handshake(at(6000)).unwrap();
    let (_, mut initiation) = sent(second).pop_front().unwrap();
    let received =
        device.decapsulate(address(2).into(), Ecn::NOT_CAPABLE, &mut initiation, at(6000));
    assert_eq!(received, Ok(None));
    let mut response = device.poll_transmit().unwrap().datagram.to_vec();
    for number in 0..=dice.below(40) {
        if dice.chance(200) {
            from = 3 - from;
        }
        let client = &mut clients[usize::from(from) - 1];
        let len = 20 + dice.below(1400) as usize;
        let inner = packet_of(if dice.chance(100) { 3 - from } else { from }, len);
        let sealed = client.encapsulate_into(&inner, &mut buffer, at(6000)).unwrap().unwrap();
        let mut datagram = sealed.datagram.to_vec();
        if number == new_keypair {
            // The answer is a keepalive, with the new keypair.
            from = 2;
            let client = &mut clients[1];
            client.decapsulate(address(99), &mut response, at(6000)).unwrap();
            (_, datagram) = sent(client).pop_front().unwrap();
        }
        match dice.below(10) {
            0 => {
                let at = dice.below(datagram.len() as u64) as usize;
                datagram[at] ^= 1 << dice.below(8);
            }
            1 if !datagrams.is_empty() => {
                datagram = datagrams[dice.below(datagrams.len() as u64) as usize].clone();
            }
            _ => {}
        }
        datagrams.push(datagram.clone());
        let host = if dice.chance(100) { 10 + from } else { from };
        let ecn = Ecn::of_traffic_class(dice.below(4) as u8);
        arrivals.push(Arrival { source: address(host).into(), ecn, datagram });
    }
    (device, arrivals)
}

/// All that can be seen of a device, but for the order of its events: a batch tells of all moves at once.
fn state(device: &mut Device) -> String {
    let events = std::iter::from_fn(|| device.poll_event());
    let mut events: Vec<_> = events.map(|event| format!("{event:?}")).collect();
    events.sort();
    let mut transmits = Vec::new();
    while let Some(transmit) = device.poll_transmit() {
        transmits.push(format!("{transmit:?}"));
    }
    let drops: Vec<_> = device.drops().counts().collect();
    let reports: Vec<_> = device.reports(at(6000).instant).collect();
    format!("{events:?} {transmits:?} {drops:?} {reports:?} {:?}", device.next_timeout())
}

#[test]
fn a_batch_has_the_effects_of_its_datagrams_one_by_one() {
    let mut replayed = 0;
    for seed in 0..300 {
        let ((mut device, arrivals), (mut twin, _)) = (disorder(seed), disorder(seed));
        let mut one_by_one = Vec::new();
        for Arrival { source, ecn, datagram } in &arrivals {
            let mut datagram = datagram.clone();
            let received = twin.decapsulate(*source, *ecn, &mut datagram, at(6000));
            let received = received.ok().flatten();
            one_by_one.extend(received.map(|one| (one.peer, one.packet.to_vec())));
        }
        let (mut memory, mut receives) = (Vec::new(), Vec::new());
        for Arrival { source, ecn, datagram } in &arrivals {
            let bytes = memory.len()..memory.len() + datagram.len();
            let receive = Receive::new(bytes, source.destination);
            receives.push(Receive { ecn: *ecn, ..receive });
            memory.extend(datagram);
        }
        let received = device.decapsulate_batch(&mut memory, &receives, at(6000)).unwrap();
        let received: Vec<_> = received.map(|one| (one.peer, one.packet.to_vec())).collect();
        assert_eq!(received, one_by_one, "seed {seed}");
        replayed += device.drops().count(DropCause::Replayed);
        assert_eq!(state(&mut device), state(&mut twin), "seed {seed}");
    }
    assert!(replayed > 150, "{replayed}");
}

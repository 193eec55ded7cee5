//! A packet on its way costs no allocation, in either direction: counted.
#![allow(clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use wgsep_dataplane::offload::{Coalesce, Coalescer, GsoType, Segments, VNET_HDR_LEN, VnetHeader};
use wgsep_proto::ip::Ecn;
use wgsep_proto::messages::{Message, TAG_LEN, TRANSPORT_HEADER_LEN};
use wgsep_proto::peer::Endpoint;
use wgsep_proto::receive::Received;
use wgsep_proto::send::{datagram_len, seal};
use wgsep_tests::sim::packet;
use wgsep_tests::sim::simulation::Simulation;

/// The system's allocator, which counts for each thread.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

fn count() {
    // Past its thread's end nothing is counted.
    let _ended = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
}

// SAFETY: every call is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract, which is the same.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract, which is the same.
        unsafe { System.realloc(pointer, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of this thread during `work`.
fn allocations(work: impl FnOnce()) -> usize {
    let before = ALLOCATIONS.get();
    work();
    ALLOCATIONS.get() - before
}

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
    let mut datagram = vec![0; datagram_len(plain.len(), 1420)];
    let endpoint = Endpoint::new(from.address);
    let mut arrived = 0;
    let counted = allocations(|| {
        for _ in 0..1000 {
            let (peer, inner) = outward.route(allowed_ips.value(), &plain).unwrap();
            let reservation =
                outward.reserve_nonces(peer, 1, now, |_| panic!("there is a keypair")).unwrap();
            let end = TRANSPORT_HEADER_LEN + inner.len;
            datagram[TRANSPORT_HEADER_LEN..end].copy_from_slice(&plain);
            assert!(seal(
                &reservation.keypair,
                reservation.first_counter,
                &mut datagram,
                inner.len
            ));
            let Some(Message::Transport(header)) = Message::parse(&datagram) else { panic!() };
            let index = header.receiver_index;
            let (peer, keypair) = inward.index_table.lookup_keypair(index).unwrap();
            let sealed = &mut datagram[TRANSPORT_HEADER_LEN..];
            keypair.open(header.counter, sealed, now).unwrap();
            let (peer, keypair, counter) = (&peer, &keypair, header.counter);
            let received = Received { peer, keypair, counter, endpoint, ecn: Ecn::NOT_CAPABLE };
            let plaintext = sealed.len() - TAG_LEN;
            let accepted = inward.accept(&received, back.value(), &mut sealed[..plaintext], now);
            arrived += usize::from(accepted.is_some());
        }
    });
    assert_eq!((arrived, counted), (1000, 0));
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

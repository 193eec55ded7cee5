//! What the steps of a packet's path cost on one core, each by itself: `make bench-steps`.
//!
//! Only ratios within one run mean something on a machine that does other things too.
#![allow(clippy::unwrap_used, missing_docs)]

use chacha20poly1305::aead::AeadInOut;
use chacha20poly1305::aead::inout::InOutBuf;
use chacha20poly1305::{ChaCha20Poly1305, KeyInit};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, UnboundKey};
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;
use wgsep_dataplane::offload::{Coalesce, Coalescer, GsoType, Segments, VNET_HDR_LEN, VnetHeader};
use wgsep_proto::noise::handshake::{Handshake, IncomingInitiation, StaticIdentity};
use wgsep_proto::noise::tai64n::Tai64n;
use wgsep_proto::path::allowed_ips::AllowedIps;
use wgsep_proto::path::outbound::Segmentation as _;
use wgsep_proto::session::keypair::{OpenJob, SealJob, open_batch, seal_batch};
use wgsep_proto::session::replay::ReplayWindow;
use wgsep_proto::wire::messages::TRANSPORT_HEADER_LEN;
use wgsep_proto::{AllowedIp, Instant, PrivateKey};
use wgsep_simulation::packet;
use wgsep_simulation::simulation::Simulation;

/// Lengths of inner packets: the shortest of TCP's, a usual one, the longest.
const LENGTHS: [usize; 3] = [64, 512, 1420];

fn crypto(criterion: &mut Criterion) {
    let (mut simulation, a, b) = Simulation::pair(1);
    assert!(simulation.reaches(a, b));
    let now = simulation.now().instant;
    let (from, to) = (simulation.host(a), simulation.host(b));
    let plain = packet::request(from.inner_v4(), to.inner_v4(), 100, 0, 0);
    let outward = from.device.data_path();
    let allowed_ips = outward.allowed_ips.reader();
    let (peer, _) = outward.route(allowed_ips.value(), &plain).unwrap();
    let reservation = outward.reserve_nonces(peer, 1, now, |_| 0).unwrap();
    for len in LENGTHS {
        let mut group = criterion.benchmark_group("seal");
        group.throughput(Throughput::Bytes(len as u64));
        let mut datagram = vec![7; len + 32];
        let mut seal = || {
            seal_batch(
                None,
                [SealJob {
                    keypair: &reservation.keypair,
                    counter: reservation.first_counter,
                    datagram: &mut datagram,
                    is_sealed: &mut false,
                }],
            );
        };
        // Also where only other benchmarks were asked for.
        seal();
        group.bench_function(BenchmarkId::from_parameter(len), |bencher| bencher.iter(&mut seal));
        group.finish();

        let index = u32::from_le_bytes(*datagram[4..].first_chunk().unwrap());
        let (_, keypair) = to.device.data_path().index_table.lookup_keypair(index).unwrap();
        let mut group = criterion.benchmark_group("open");
        group.throughput(Throughput::Bytes(len as u64));
        let mut arrived = datagram.clone();
        group.bench_function(BenchmarkId::from_parameter(len), |bencher| {
            bencher.iter(|| {
                arrived.copy_from_slice(&datagram);
                let sealed = &mut arrived[TRANSPORT_HEADER_LEN..];
                open_batch(
                    None,
                    [OpenJob {
                        keypair: &keypair,
                        counter: reservation.first_counter,
                        sealed,
                        is_authentic: &mut false,
                    }],
                );
            });
        });
        group.finish();
    }
}

/// Both ciphers that transport messages can be sealed with, without what wgsep does around them.
fn ciphers(criterion: &mut Criterion) {
    let ring = LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, &[7; 32]).unwrap());
    let plain = ChaCha20Poly1305::new(&[7; 32].into());
    for len in LENGTHS {
        let mut group = criterion.benchmark_group(format!("cipher/{len}"));
        group.throughput(Throughput::Bytes(len as u64));
        let nonce = || ring::aead::Nonce::assume_unique_for_key([1; 12]);
        let mut buffer = vec![7; len];
        group.bench_function("ring seals", |bencher| {
            bencher.iter(|| {
                ring.seal_in_place_separate_tag(nonce(), Aad::empty(), &mut buffer).unwrap()
            });
        });
        group.bench_function("chacha20poly1305 seals", |bencher| {
            bencher.iter(|| {
                let buffer = InOutBuf::from(&mut *buffer);
                plain.encrypt_inout_detached(&[1; 12].into(), &[], buffer).unwrap()
            });
        });
        let tag = ring.seal_in_place_separate_tag(nonce(), Aad::empty(), &mut buffer).unwrap();
        let sealed = [&buffer, tag.as_ref()].concat();
        let mut arrived = sealed.clone();
        group.bench_function("ring opens", |bencher| {
            bencher.iter(|| {
                arrived.copy_from_slice(&sealed);
                ring.open_in_place(nonce(), Aad::empty(), &mut arrived).unwrap();
            });
        });
        let tag = chacha20poly1305::Tag::try_from(tag.as_ref()).unwrap();
        group.bench_function("chacha20poly1305 opens", |bencher| {
            bencher.iter(|| {
                arrived.copy_from_slice(&sealed);
                let body = InOutBuf::from(&mut arrived[..len]);
                plain.decrypt_inout_detached(&[1; 12].into(), &[], body, &tag).unwrap();
            });
        });
        group.finish();
    }
}

/// Packets of one key in a batch of ours, beside ring with one after the other.
fn batches(criterion: &mut Criterion) {
    let ring = LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, &[7; 32]).unwrap());
    let key = wgsep_aead::Key::new(&[7; 32]);
    for len in [64, 96, 512, 1424] {
        for count in [1, 4, 5, 8, 16, 45] {
            let mut group = criterion.benchmark_group(format!("batch/{count} of {len}"));
            group.throughput(Throughput::Elements(count as u64));
            // As far apart as the datagrams of a batch are.
            let mut memory = vec![7; count * (len + 32)];
            let (mut tags, mut done) = ([[0; 16]; 45], [false; 45]);
            group.bench_function("ring seals", |bencher| {
                bencher.iter(|| {
                    for text in memory.chunks_exact_mut(len + 32) {
                        let nonce = ring::aead::Nonce::assume_unique_for_key([1; 12]);
                        let text = &mut text[..len];
                        let tag = ring.seal_in_place_separate_tag(nonce, Aad::empty(), text);
                        black_box(tag.unwrap().as_ref());
                    }
                });
            });
            let mut run = |batch: fn(&mut dyn Iterator<Item = wgsep_aead::Packet<'_>>)| {
                let texts = memory.chunks_exact_mut(len + 32).zip(&mut tags).zip(&mut done);
                batch(&mut texts.map(|((text, tag), done)| wgsep_aead::Packet {
                    key: &key,
                    nonce: [1; 12],
                    text: &mut text[..len],
                    tag,
                    done,
                }));
            };
            group.bench_function("we seal", |bencher| {
                bencher.iter(|| run(|packets| wgsep_aead::seal_batch(packets)));
            });
            // A wrong tag costs no more than a right one but the zeros.
            group.bench_function("we open", |bencher| {
                bencher.iter(|| run(|packets| wgsep_aead::open_batch(packets)));
            });
            group.finish();
        }
    }
}

fn replay(criterion: &mut Criterion) {
    let mut window = ReplayWindow::default();
    let mut counter = 0;
    criterion.bench_function("replay/in order", |bencher| {
        bencher.iter(|| {
            counter += 1;
            window.validate(black_box(counter))
        });
    });
    criterion.bench_function("replay/seen before", |bencher| {
        bencher.iter(|| window.validate(black_box(counter)));
    });
}

/// Scatters small numbers over all 32 bits.
const fn scatter(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(number.wrapping_mul(0x9e37_79b1))
}

/// The address with this number, far from that of the next.
fn address_v4(number: u32) -> (IpAddr, u8) {
    (scatter(number).into(), 32)
}

/// As [`address_v4`], of a host in a network of its own.
fn address_v6(number: u32) -> (IpAddr, u8) {
    let network = u128::from(scatter(number).to_bits()) << 64;
    (Ipv6Addr::from_bits(0xfd00 << 112 | network | 1).into(), 128)
}

fn allowed_ips(criterion: &mut Criterion) {
    for (family, address) in [("IPv4", address_v4 as fn(u32) -> _), ("IPv6", address_v6)] {
        let mut group = criterion.benchmark_group(format!("allowed IPs/{family}"));
        for entries in [10, 1_000, 10_000, 100_000, 1_000_000] {
            let mut table = AllowedIps::default();
            for number in 0..entries {
                let (address, length) = address(number);
                table.insert(AllowedIp::new(address, length).unwrap(), number);
            }
            let mut number = 0;
            group.bench_function(BenchmarkId::from_parameter(entries), |bencher| {
                bencher.iter(|| {
                    // Another entry each time, far from the last.
                    number = (number + 7919) % entries;
                    table.lookup(black_box(address(number).0)).copied()
                });
            });
        }
        group.finish();
    }
}

/// A UDP super-packet of IPv4 with 40 payloads of 1,392 bytes, as the kernel hands it over.
fn super_packet() -> (VnetHeader, Vec<u8>) {
    const PAYLOAD: u16 = 1392;
    let len = 28 + 40 * PAYLOAD;
    let [high, low] = len.to_be_bytes();
    let mut whole = vec![0x45, 0, high, low, 0, 0, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
    whole.extend([0, 1, 0, 2, 0, 0]);
    let pseudo = 2 * 0x0a00 + 1 + 2 + 17 + u32::from(len - 20);
    let pseudo = (pseudo & 0xffff) + (pseudo >> 16);
    whole.extend((pseudo as u16).to_be_bytes());
    whole.resize(usize::from(len), 7);
    let gso = Some((GsoType::Udp, PAYLOAD));
    (VnetHeader { checksum: Some((20, 6)), gso, header_len: 28 }, whole)
}

fn offload(criterion: &mut Criterion) {
    let (header, whole) = super_packet();
    let mut frames = vec![vec![0; VNET_HDR_LEN + 1420]; 40];
    let split = |frames: &mut Vec<Vec<u8>>| {
        let segments = Segments::new(&header, &whole).unwrap();
        for (number, frame) in frames.iter_mut().enumerate() {
            segments.write(&whole, number, &mut frame[VNET_HDR_LEN..]).unwrap();
        }
    };
    let mut group = criterion.benchmark_group("offload");
    group.throughput(Throughput::Bytes(whole.len() as u64));
    group.bench_function("split", |bencher| bencher.iter(|| split(&mut frames)));
    let mut coalescer = Coalescer::new(Coalesce { tcp_v4: true, tcp_v6: true, udp: true });
    group.bench_function("coalesce", |bencher| {
        bencher.iter(|| {
            let mut written = 0;
            for frame in &mut frames {
                coalescer.push(frame, |_, _| written += 1);
            }
            coalescer.flush(|_, _| written += 1);
            assert_eq!(written, 1);
        });
    });
    group.finish();
}

/// What answering an initiation takes, by its halves: what opens it, and what writes the response.
fn handshakes(criterion: &mut Criterion) {
    let private = |byte| PrivateKey::from_bytes([byte; 32]).unwrap();
    let (responder, initiator) = (private(1), private(2));
    let (identity, remote) = (StaticIdentity::new(&responder), StaticIdentity::new(&initiator));
    let mut handshake = Handshake::new(*identity.public_key());
    let stamp = Tai64n::from_wall(Duration::from_secs(1));
    let initiation = handshake.create_initiation(&remote, &[3; 32], stamp, 1).unwrap();
    let mut group = criterion.benchmark_group("handshake");
    group.bench_function("open an initiation", |bencher| {
        bencher.iter(|| IncomingInitiation::open_static(&identity, black_box(&initiation)).is_ok());
    });
    let mut peer = Handshake::new(*remote.public_key());
    let incoming = IncomingInitiation::open_static(&identity, &initiation).unwrap();
    let now = Instant::from_nanos(1_000_000_000);
    let (draft, _) = peer.consume_initiation(&identity, incoming, now).unwrap();
    group.bench_function("write a response", |bencher| {
        bencher.iter(|| draft.write(black_box(&[4; 32]), 2).is_ok());
    });
    group.finish();
}

criterion_group!(benches, crypto, ciphers, batches, replay, allowed_ips, offload, handshakes);
criterion_main!(benches);

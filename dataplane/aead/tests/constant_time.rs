//! Neither the instructions that are executed for a batch, a single packet or several whose keystream is computed ahead nor their
//! time depend on keys, texts or tags.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::print_stdout, clippy::unwrap_used)]

mod dice;

use core::hint::black_box;
use core::sync::atomic::{Ordering, fence};
use dice::Dice;
use nix::sys::ptrace;
use nix::sys::signal::{Signal, raise};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use std::time::Instant;
use wgsep_aead::{
    KEY_LEN, Key, KeystreamCache, Packet, TAG_LEN, open_batch, seal_batch, uses_vectors,
};

type Batch = fn(&mut Vec<Packet<'_>>);

/// How packets of these lengths are sealed and opened.
struct Way {
    lengths: &'static [usize],
    seal: Batch,
    open: Batch,
}

impl Way {
    const fn batch(lengths: &'static [usize]) -> Self {
        Self { lengths, seal, open }
    }

    const fn ahead(lengths: &'static [usize]) -> Self {
        Self { lengths, seal: seal_ahead, open: open_ahead }
    }
}

/// A group; single packets, for Poly1305 in scalar registers and in lanes, and for two and for four passes; and packets of one
/// key, some with keystream that was computed ahead.
const WAYS: [Way; 7] = [
    Way::batch(&[0, 1, 64, 100, 128, 300, 300, 320]),
    Way::batch(&[72]),
    Way::batch(&[520]),
    Way::batch(&[1500]),
    Way::batch(&[4700]),
    Way::ahead(&[72; 4]),
    Way::ahead(&[520; 4]),
];

fn seal(packets: &mut Vec<Packet<'_>>) {
    seal_batch(packets.drain(..));
}

fn open(packets: &mut Vec<Packet<'_>>) {
    open_batch(packets.drain(..));
}

fn seal_ahead(packets: &mut Vec<Packet<'_>>) {
    let mut cache = KeystreamCache::default();
    packets.drain(..).for_each(|packet| cache.seal_batch([packet]));
}

fn open_ahead(packets: &mut Vec<Packet<'_>>) {
    let mut cache = KeystreamCache::default();
    packets.drain(..).for_each(|packet| cache.open_batch([packet]));
}

/// Packets with nonces that count up, which all batch functions take alike. If their lengths are the same, so are their keys.
#[derive(Clone)]
struct Group {
    lengths: &'static [usize],
    keys: Vec<[u8; KEY_LEN]>,
    texts: Vec<Vec<u8>>,
    tags: Vec<[u8; TAG_LEN]>,
    done: Vec<bool>,
}

impl Group {
    fn new(lengths: &'static [usize], dice: &mut Dice) -> Self {
        let mut group = Self::zero(lengths);
        group.keys.iter_mut().for_each(|key| *key = dice.bytes());
        if lengths.iter().all(|len| *len == lengths[0]) {
            let first = group.keys[0];
            group.keys.fill(first);
        }
        group.texts.iter_mut().flatten().for_each(|byte| *byte = dice.roll() as u8);
        group
    }

    fn zero(lengths: &'static [usize]) -> Self {
        Self {
            lengths,
            keys: vec![[0; KEY_LEN]; lengths.len()],
            texts: lengths.iter().map(|len| vec![0; *len]).collect(),
            tags: vec![[0; TAG_LEN]; lengths.len()],
            done: vec![false; lengths.len()],
        }
    }

    fn sealed(mut self) -> Self {
        let keys = self.keys();
        seal(&mut self.packets(&keys));
        self
    }

    /// Copies one of two, having read both: where they lie makes no difference to the time of what follows.
    fn select(&mut self, classes: [&Self; 2], class: usize) {
        let mask = black_box([0, 0xff][class]);
        let Self { keys, texts, tags, .. } = self;
        let bytes = keys
            .iter_mut()
            .flatten()
            .chain(texts.iter_mut().flatten())
            .chain(tags.iter_mut().flatten());
        let [one, other] = classes.map(|Self { keys, texts, tags, .. }| {
            keys.iter().flatten().chain(texts.iter().flatten()).chain(tags.iter().flatten())
        });
        for ((byte, one), other) in bytes.zip(one).zip(other) {
            *byte = one ^ ((one ^ other) & mask);
        }
    }

    fn keys(&self) -> Vec<Key> {
        self.keys.iter().map(Key::new).collect()
    }

    fn packets<'p>(&'p mut self, keys: &'p [Key]) -> Vec<Packet<'p>> {
        let Self { texts, tags, done, .. } = self;
        let parts = keys.iter().zip(texts).zip(tags).zip(done).enumerate();
        let packet = |(number, (((key, text), tag), done))| {
            let text: &mut Vec<u8> = text;
            let mut nonce = [7; 12];
            nonce[4] += number as u8;
            Packet { key, nonce, text, tag, done }
        };
        parts.map(packet).collect()
    }
}

fn can_run() -> bool {
    if !uses_vectors() {
        println!("skipped: this processor has no AVX-512 IFMA");
    }
    uses_vectors()
}

/// The addresses of all instructions that a child executes for a batch.
fn trace(mut group: Group, batch: Batch) -> Vec<u64> {
    let keys = group.keys();
    let mut packets = group.packets(&keys);
    // SAFETY: the child calls no function that another thread's lock could stop: it allocates nothing.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            let _ = ptrace::traceme();
            let _ = raise(Signal::SIGSTOP);
            batch(&mut packets);
            let _ = raise(Signal::SIGSTOP);
            // SAFETY: ends the process at once.
            unsafe { nix::libc::_exit(0) }
        }
        ForkResult::Parent { child } => step_through(child),
    }
}

fn step_through(child: Pid) -> Vec<u64> {
    let stopped = |signal| WaitStatus::Stopped(child, signal);
    assert_eq!(waitpid(child, None), Ok(stopped(Signal::SIGSTOP)));
    let mut addresses = Vec::new();
    loop {
        ptrace::step(child, None).unwrap();
        let status = waitpid(child, None).unwrap();
        if status == stopped(Signal::SIGSTOP) {
            break;
        }
        assert_eq!(status, stopped(Signal::SIGTRAP));
        addresses.push(ptrace::getregs(child).unwrap().rip);
        assert!(addresses.len() < 1_000_000);
    }
    ptrace::kill(child).unwrap();
    waitpid(child, None).unwrap();
    addresses
}

#[test]
fn the_instructions_executed_are_the_same_for_all_secrets() {
    if !can_run() {
        return;
    }
    for Way { lengths, seal, open } in WAYS {
        let mut dice = Dice(1);
        let expected = trace(Group::zero(lengths), seal);
        assert!(expected.len() > 500, "{lengths:?}");
        let opened = trace(Group::zero(lengths).sealed(), open);
        for _ in 0..3 {
            let group = Group::new(lengths, &mut dice);
            let same = trace(group.clone(), seal) == expected;
            assert!(same, "sealing depends on secrets: {lengths:?}");
            let same = trace(group.sealed(), open) == opened;
            assert!(same, "opening depends on secrets: {lengths:?}");
        }
    }
}

/// Where the tag differs makes no difference.
#[test]
fn the_instructions_executed_are_the_same_for_all_wrong_tags() {
    if !can_run() {
        return;
    }
    for Way { lengths, open, .. } in WAYS {
        let with_wrong = |bit: usize| {
            let mut group = Group::new(lengths, &mut Dice(2)).sealed();
            group.tags.iter_mut().for_each(|tag| tag[bit / 8] ^= 1 << (bit % 8));
            group
        };
        let expected = trace(with_wrong(0), open);
        for bit in [1, 7, 63, 64, 127] {
            assert!(trace(with_wrong(bit), open) == expected, "{lengths:?}, bit {bit}");
        }
    }
}

/// Welch's t of the times of two classes, measured in random order in the same memory, without the slowest tenth,
/// which other programs disturbed (Reparaz, Balasch, Verbauwhede, "Dude, is my code constant time?", 2017).
fn t_of(classes: [&Group; 2], batch: Batch) -> f64 {
    const SAMPLES: usize = 20_000;
    let mut dice = Dice(3);
    let mut times = [Vec::with_capacity(SAMPLES), Vec::with_capacity(SAMPLES)];
    let (mut work, mut keys) = (classes[0].clone(), classes[0].keys());
    for _ in 0..SAMPLES {
        let class = (dice.roll() & 1) as usize;
        work.select(classes, class);
        for (key, bytes) in keys.iter_mut().zip(&work.keys) {
            *key = Key::new(bytes);
        }
        let mut packets = work.packets(&keys);
        // What was copied is no part of the time.
        fence(Ordering::SeqCst);
        let start = Instant::now();
        batch(&mut packets);
        times[class].push(start.elapsed().as_nanos() as f64);
        drop(packets);
        black_box(&work.texts);
    }
    let mut all: Vec<f64> = times.iter().flatten().copied().collect();
    all.sort_by(f64::total_cmp);
    let slowest = all[all.len() * 9 / 10];
    let moments = times.map(|mut times| {
        times.retain(|time| *time <= slowest);
        let count = times.len() as f64;
        let mean = times.iter().sum::<f64>() / count;
        let variance = times.iter().map(|time| (time - mean).powi(2)).sum::<f64>() / (count - 1.0);
        (mean, variance / count)
    });
    let [(mean, variance), (other_mean, other_variance)] = moments;
    (mean - other_mean) / (variance + other_variance).sqrt()
}

/// Fails only if each of four measurements finds the same class slower: what other programs do changes from one
/// to the next.
#[track_caller]
fn assert_same_time(classes: [&Group; 2], batch: Batch) {
    let lengths = classes[0].lengths;
    let measured = [(); 4].map(|()| t_of(classes, batch));
    let is_slower = |sign: f64| measured.iter().all(|t| t * sign > 4.5);
    assert!(!is_slower(1.0) && !is_slower(-1.0), "{lengths:?}: t = {measured:?}");
}

#[test]
fn the_time_is_the_same_for_all_secrets_and_wrong_tags() {
    if !can_run() {
        return;
    }
    for Way { lengths, seal, open } in WAYS {
        let classes = [Group::zero(lengths), Group::new(lengths, &mut Dice(4))];
        assert_same_time(classes.each_ref(), seal);
        let sealed = classes.map(Group::sealed);
        assert_same_time(sealed.each_ref(), open);
        let wrong = [0, TAG_LEN - 1].map(|at| {
            let mut group = sealed[1].clone();
            group.tags.iter_mut().for_each(|tag| tag[at] ^= 1);
            group
        });
        assert_same_time(wrong.each_ref(), open);
    }
}

//! Neither the instructions that a batch executes nor its time depend on keys, texts or tags.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::print_stdout, clippy::unwrap_used)]

mod dice;

use core::hint::black_box;
use dice::Dice;
use nix::sys::ptrace;
use nix::sys::signal::{Signal, raise};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use std::time::Instant;
use wgsep_aead::{KEY_LEN, Key, Packet, TAG_LEN, open_batch, seal_batch, uses_vectors};

/// Lengths of the packets of a group.
const LENGTHS: [usize; 8] = [0, 1, 64, 100, 128, 300, 300, 320];
const LONGEST: usize = 320;

type Batch = fn(&mut Vec<Packet<'_>>);

fn seal(packets: &mut Vec<Packet<'_>>) {
    seal_batch(packets.drain(..));
}

fn open(packets: &mut Vec<Packet<'_>>) {
    open_batch(packets.drain(..));
}

/// A group of packets, which all batch functions take alike.
#[derive(Clone)]
struct Group {
    keys: Vec<[u8; KEY_LEN]>,
    texts: Vec<[u8; LONGEST]>,
    tags: Vec<[u8; TAG_LEN]>,
    done: Vec<bool>,
}

impl Group {
    fn new(dice: &mut Dice) -> Self {
        Self {
            keys: LENGTHS.map(|_| dice.bytes()).to_vec(),
            texts: LENGTHS.map(|_| dice.bytes()).to_vec(),
            tags: vec![[0; TAG_LEN]; LENGTHS.len()],
            done: vec![false; LENGTHS.len()],
        }
    }

    fn zero() -> Self {
        Self {
            keys: vec![[0; KEY_LEN]; LENGTHS.len()],
            texts: vec![[0; LONGEST]; LENGTHS.len()],
            tags: vec![[0; TAG_LEN]; LENGTHS.len()],
            done: vec![false; LENGTHS.len()],
        }
    }

    fn sealed(mut self) -> Self {
        let keys = self.keys();
        seal(&mut self.packets(&keys));
        self
    }

    fn keys(&self) -> Vec<Key> {
        self.keys.iter().map(Key::new).collect()
    }

    fn packets<'p>(&'p mut self, keys: &'p [Key]) -> Vec<Packet<'p>> {
        let Self { texts, tags, done, .. } = self;
        let parts = keys.iter().zip(texts).zip(LENGTHS).zip(tags).zip(done);
        let packet = |((((key, text), len), tag), done)| {
            let text: &mut [u8; LONGEST] = text;
            Packet { key, nonce: [7; 12], text: &mut text[..len], tag, done }
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
    let mut dice = Dice(1);
    let expected = trace(Group::zero(), seal);
    assert!(expected.len() > 1000);
    for _ in 0..3 {
        let group = Group::new(&mut dice);
        assert!(trace(group.clone(), seal) == expected, "sealing depends on secrets");
        let opened = trace(Group::zero().sealed(), open);
        let sealed = group.sealed();
        assert!(trace(sealed, open) == opened, "opening depends on secrets");
    }
}

/// Where the tag differs makes no difference.
#[test]
fn the_instructions_executed_are_the_same_for_all_wrong_tags() {
    if !can_run() {
        return;
    }
    let with_wrong = |bit: usize| {
        let mut group = Group::new(&mut Dice(2)).sealed();
        group.tags.iter_mut().for_each(|tag| tag[bit / 8] ^= 1 << (bit % 8));
        group
    };
    let expected = trace(with_wrong(0), open);
    for bit in [1, 7, 63, 64, 127] {
        assert!(trace(with_wrong(bit), open) == expected, "bit {bit}");
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
        let Group { keys: bytes, texts, tags, .. } = classes[class];
        work.texts.copy_from_slice(texts);
        work.tags.copy_from_slice(tags);
        for (key, bytes) in keys.iter_mut().zip(bytes) {
            *key = Key::new(bytes);
        }
        let mut packets = work.packets(&keys);
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
    let measured = [(); 4].map(|()| t_of(classes, batch));
    let is_slower = |sign: f64| measured.iter().all(|t| t * sign > 4.5);
    assert!(!is_slower(1.0) && !is_slower(-1.0), "t = {measured:?}");
}

#[test]
fn the_time_is_the_same_for_all_secrets_and_wrong_tags() {
    if !can_run() {
        return;
    }
    let classes = [Group::zero(), Group::new(&mut Dice(4))];
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

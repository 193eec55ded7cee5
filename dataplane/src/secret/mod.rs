//! Memory for secrets, which neither root nor a core file can read.
//!
//! # The rule
//!
//! The thread that allocates, not the type of the value, decides which memory a value is in:
//!
//! - Everything that the control thread allocates is in the arena, except within
//!   [`in_ordinary_memory`](wgsep_proto::secret::in_ordinary_memory). There the protocol allocates what holds no key:
//!   peers, allowed IPs, replay windows, indices. In the arena are the keys of peers and keypairs, the text of the UAPI,
//!   incomplete handshakes, and the copies that a growing `Vec` leaves behind.
//! - When the arena is full, the control thread's blocks are in a second pool of locked memory, and when that is full in
//!   ordinary memory; the log says when that happens.
//! - What a worker allocates is in ordinary memory. A worker may use key material that the control thread allocated,
//!   and may have key material on its stack, because the stacks of all threads that use keys are in the arena. It
//!   must not allocate key material, nor let a container of it grow.
//!
//! The allocator cannot see whether a block will hold a key. The types can: key material is in a
//! [`Secret`](wgsep_proto::secret::Secret), or in a type that calls [`check`](wgsep_proto::secret::check), which a test of
//! the source verifies. With debug assertions these check their address whenever they are used or dropped, and [`reserve`]
//! sets the check: on a thread of the arena, key material at an address outside the arena is a panic. The tests
//! below show that a worker that allocates any kind of key material fails. Copying a key out of its type is beyond the check; a
//! search of the shipped program's memory, one of the tests of attacks, finds that. The program that ships
//! contains none of the checks.
//!
//! The packet path neither allocates nor takes a lock here.
//!
//! # Stacks
//!
//! Ciphers leave copies of keys on the stacks. [`wipe_stack`] erases them after each batch of handshake
//! messages, and on every thread after a keypair was released: by link down, the removal of a peer, a new
//! handshake or its expiry. Packets of a live keypair wipe nothing.
//!
//! Outside the arena are registers, which the kernel saves when a thread is stopped, and a UAPI client's
//! text in the kernel's buffers.

mod arena;
#[cfg(test)]
mod capacity;
#[cfg(debug_assertions)]
mod check;
mod heap;
mod pool;
mod thread;

pub use heap::Heap;
pub(crate) use heap::overflowed;
pub(crate) use thread::{Allocates, Stacks, USUAL_DEPTH, WHOLE_STACK, spawn, wipe_stack};

use arena::Mapping;
use nix::libc;
use std::ops::Range;
use wgsep_policy::State;
use wgsep_policy::limits::{self, LOCKED_MEMORY, SECRET_MEMORY};

/// Least heap, in bytes: the control thread's own needs, and a few peers.
const MIN_HEAP: usize = 256 * 1024;

/// The reserved memory.
pub(crate) struct Reserved {
    /// The state of the layer for the report.
    pub(crate) state: State,
    /// The warning for the operator, if it is not secret memory.
    pub(crate) shortfall: Option<String>,
    /// Stacks for all threads that use keys.
    pub(crate) stacks: Stacks,
    /// Length of the heap, in bytes.
    pub(crate) heap_len: usize,
    /// The mappings, which are permanent.
    pub(crate) mapped: Vec<Range<usize>>,
}

/// Reserves the arena: `stacks_len` bytes for stacks, and as much heap as RLIMIT_MEMLOCK leaves. It is
/// called once, before any thread is started and before the lock-down, after which the arena cannot grow.
/// Where the kernel refuses secret memory, the arena is locked memory; where it refuses that too,
/// ordinary memory.
///
/// # Errors
/// If not even ordinary memory can be had.
pub(crate) fn reserve(stacks_len: usize) -> nix::Result<Reserved> {
    // With too low a limit this requests more than it allows, so that the kernel returns the error.
    let len = limits::locked_memory().min(SECRET_MEMORY).max(stacks_len + MIN_HEAP);
    let (mut arena, state, shortfall) = best(len & !(page() - 1))?;
    let mut mapped = vec![arena.range()];
    let stacks = Stacks(arena.take(stacks_len).ok_or(nix::Error::ENOMEM)?);
    let heap_len = arena.len;
    heap::ARENA.take_over(&arena);
    // The next best: locked if the limit is high enough, or else at least excluded from core files.
    let overflow = arena::locked(LOCKED_MEMORY).or_else(|_| arena::undumpable(LOCKED_MEMORY));
    if let Ok(overflow) = overflow {
        heap::OVERFLOW.take_over(&overflow);
        mapped.push(overflow.range());
    }
    wgsep_proto::secret::set_switch(heap::switch);
    #[cfg(debug_assertions)]
    check::set(&mapped);
    if shortfall.is_some() {
        heap::set_reported();
    }
    Ok(Reserved { state, shortfall, stacks, heap_len, mapped })
}

/// The best memory that the kernel grants, with the state for the report and the operator's warning.
fn best(len: usize) -> nix::Result<(Mapping, State, Option<String>)> {
    let refused = match arena::secret(len) {
        Ok(arena) => return Ok((arena, State::Applied, None)),
        Err(refused) => refused,
    };
    match arena::locked(len) {
        Ok(arena) => {
            let state = match refused {
                nix::Error::ENOSYS => State::Unsupported,
                errno => State::degraded(errno),
            };
            let line = format!(
                "no secret memory (memfd_secret: {}): keys are in locked memory, which root can read",
                refused.desc()
            );
            Ok((arena, state, Some(line)))
        }
        Err(errno) => {
            let line = format!(
                "no secret memory (memfd_secret: {}; mlock: {}): keys are in ordinary memory, which \
                 root can read and the kernel may swap; raise RLIMIT_MEMLOCK",
                refused.desc(),
                errno.desc()
            );
            Ok((arena::undumpable(len)?, State::degraded(errno), Some(line)))
        }
    }
}

/// Bytes of a page.
fn page() -> usize {
    nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .and_then(|page: libc::c_long| usize::try_from(page).ok())
        .unwrap_or(4096)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::uapi::SecretText;
    use std::cell::Cell;
    use std::hint::black_box;
    use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
    use std::sync::{Arc, Mutex, Once, OnceLock, mpsc};
    use wgsep_proto::noise::cookie::{CookieChecker, CookieGenerator};
    use wgsep_proto::noise::handshake::{Handshake, StaticIdentity};
    use wgsep_proto::noise::symmetric::SymmetricState;
    use wgsep_proto::secret::{Secret, in_ordinary_memory};
    use wgsep_proto::session::keypair::{Keypair, KeypairParts, SealJob, seal_batch};
    use wgsep_proto::{
        Configuration, Instant, PeerConfiguration, PresharedKey, PrivateKey, PublicKey,
    };

    /// What a thread of these tests uses of its stack, without optimisation.
    const STACK: usize = 256 * 1024;
    const THREADS: usize = 100;

    thread_local! {
        /// A panic of this thread is a result, which is not printed.
        static PANICS_QUIETLY: Cell<bool> = const { Cell::new(false) };
    }

    fn panic_quietly() {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let print = take_hook();
            set_hook(Box::new(move |info| {
                if !PANICS_QUIETLY.get() {
                    print(info);
                }
            }));
        });
        PANICS_QUIETLY.set(true);
    }

    /// Starts a thread on a stack of the arena, as the program does. What `body` returns, or the message of its
    /// panic, is sent to the receiver.
    pub(crate) fn start<T: Send + 'static>(
        allocates: Allocates,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> mpsc::Receiver<Result<T, String>> {
        static STACKS: OnceLock<Mutex<Stacks>> = OnceLock::new();
        let stacks = STACKS
            .get_or_init(|| Mutex::new(reserve(THREADS * Stacks::len_for(STACK)).unwrap().stacks));
        let stack = stacks.lock().unwrap().take(STACK).unwrap();
        let (sender, receiver) = mpsc::channel();
        let body = move || {
            panic_quietly();
            let outcome = catch_unwind(AssertUnwindSafe(body)).map_err(|panic| {
                panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "panic".to_owned())
            });
            let _nobody_waits = sender.send(outcome);
        };
        spawn(c"test", stack, allocates, body).unwrap();
        receiver
    }

    const NOW: Instant = Instant::from_nanos(1);

    fn private_key() -> PrivateKey {
        PrivateKey::from_bytes([7; 32]).unwrap()
    }

    fn parts() -> KeypairParts {
        let [sending, receiving] = [1, 2].map(|byte| Secret::new([byte; 32]));
        KeypairParts { sending, receiving, sender_index: 1, receiver_index: 2, initiator: true }
    }

    /// Allocates a value and drops it.
    fn allocate<T>(value: T) {
        drop(black_box(Box::new(value)));
    }

    /// Every kind of key material, with a function that allocates one and drops it.
    const KINDS: [(&str, fn()); 13] = [
        ("private key", || allocate(private_key())),
        ("preshared key", || allocate(PresharedKey::from_bytes([7; 32]))),
        ("secret", || allocate(Secret::new([7_u8; 32]))),
        ("identity", || allocate(StaticIdentity::new(&private_key()))),
        ("handshake", || allocate(Handshake::new(PublicKey::from_bytes([7; 32])))),
        ("symmetric state", || allocate(SymmetricState::new(&[7; 32]))),
        ("result of a handshake", || allocate(parts())),
        ("cipher", || allocate(Secret::new(wgsep_aead::Key::new(&[7; 32])))),
        ("keypair", || drop(black_box(Arc::new(Keypair::new(&parts(), NOW))))),
        ("secret of cookies", || allocate(CookieChecker::new(&PublicKey::from_bytes([7; 32])))),
        ("cookie", || allocate(CookieGenerator::new(&PublicKey::from_bytes([7; 32])))),
        ("text of the UAPI", || drop(black_box(SecretText::with_capacity(100)))),
        ("configuration", || {
            let mut peer = PeerConfiguration::new(PublicKey::from_bytes([7; 32]));
            peer.preshared_key = Some(PresharedKey::from_bytes([7; 32]));
            drop(black_box(Configuration { peers: vec![peer], ..Configuration::default() }));
        }),
    ];

    /// What each kind gives on a thread of its own.
    fn allocated_by(thread: Allocates) -> impl Iterator<Item = (&'static str, Result<(), String>)> {
        KINDS
            .into_iter()
            .map(move |(kind, allocate)| (kind, start(thread, allocate).recv().unwrap()))
    }

    #[test]
    fn a_worker_that_allocates_any_kind_of_key_material_panics() {
        for (kind, outcome) in allocated_by(Allocates::Packets) {
            let message = outcome.expect_err(kind);
            assert!(message.starts_with("key material outside secret memory"), "{kind}: {message}");
        }
    }

    #[test]
    fn the_control_thread_may_allocate_each() {
        for (kind, outcome) in allocated_by(Allocates::Secrets) {
            assert_eq!(outcome, Ok(()), "{kind}");
        }
    }

    #[test]
    fn the_control_thread_must_not_allocate_key_material_with_the_system_allocator() {
        let body = || in_ordinary_memory(|| allocate(private_key()));
        assert!(start(Allocates::Secrets, body).recv().unwrap().is_err());
    }

    #[test]
    fn a_worker_may_have_key_material_on_its_stack_and_use_and_free_that_of_the_control_thread() {
        let keypair = start(Allocates::Secrets, || Arc::new(Keypair::new(&parts(), NOW)));
        let keypair = keypair.recv().unwrap().unwrap();
        let body = move || {
            let identity = black_box(StaticIdentity::new(&private_key()));
            drop(identity);
            let (datagram, is_sealed) = (&mut [0; 48], &mut false);
            seal_batch(None, [SealJob { keypair: &keypair, counter: 1, datagram, is_sealed }]);
            *is_sealed
        };
        assert_eq!(start(Allocates::Packets, body).recv().unwrap(), Ok(true));
    }
}

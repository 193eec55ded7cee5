//! The 32-bit indices by which messages name a handshake or a keypair (kernel peerlookup.c).
//!
//! The table is split into shards, so that a worker's lookup rarely waits for a handshake.

use crate::secret::in_ordinary_memory;
use crate::session::keypair::Keypair;
use crate::session::peer::{Peer, PeerId};
use crate::wire::messages::{ReceiverIndex, SenderIndex};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

const SHARDS: usize = 64;

/// The owner of an index.
#[derive(Clone)]
pub enum Entry {
    /// The present handshake with a peer.
    Handshake(PeerId),
    /// A keypair and its peer.
    Keypair(Arc<Peer>, Arc<Keypair>),
}

type Shard = HashMap<SenderIndex, Entry>;

/// All indices of a device.
pub struct IndexTable {
    shards: [RwLock<Shard>; SHARDS],
    keypair_released: AtomicBool,
    releases: AtomicU64,
}

impl Default for IndexTable {
    fn default() -> Self {
        Self {
            shards: core::array::from_fn(|_| RwLock::default()),
            keypair_released: AtomicBool::new(false),
            releases: AtomicU64::new(0),
        }
    }
}

impl IndexTable {
    /// Indices are random, so their low bits spread them evenly.
    fn shard(&self, index: SenderIndex) -> &RwLock<Shard> {
        &self.shards[index as usize % SHARDS]
    }

    fn read(&self, index: SenderIndex) -> RwLockReadGuard<'_, Shard> {
        self.shard(index).read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, index: SenderIndex) -> RwLockWriteGuard<'_, Shard> {
        self.shard(index).write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a handshake of `peer` under the first unused index that `random` gives.
    pub fn allocate(&self, peer: PeerId, mut random: impl FnMut() -> u32) -> SenderIndex {
        loop {
            let index = random();
            let mut shard = self.write(index);
            let is_vacant = in_ordinary_memory(|| match shard.entry(index) {
                Slot::Vacant(slot) => {
                    slot.insert(Entry::Handshake(peer));
                    true
                }
                Slot::Occupied(_) => false,
            });
            if is_vacant {
                return index;
            }
        }
    }

    /// Registers an index that another process has allocated; false if it is in use.
    #[cfg(feature = "internals")]
    pub(crate) fn restore(&self, index: SenderIndex, entry: Entry) -> bool {
        let mut shard = self.write(index);
        in_ordinary_memory(|| match shard.entry(index) {
            Slot::Vacant(slot) => {
                slot.insert(entry);
                true
            }
            Slot::Occupied(_) => false,
        })
    }

    /// Transfers the index of a finished handshake to its keypair.
    pub fn swap_handshake_for_keypair(&self, peer: Arc<Peer>, keypair: Arc<Keypair>) {
        let index = keypair.sender_index();
        let mut shard = self.write(index);
        in_ordinary_memory(|| shard.insert(index, Entry::Keypair(peer, keypair)));
    }

    /// Frees an index.
    pub fn release(&self, index: SenderIndex) {
        let released = self.write(index).remove(&index);
        if let Some(Entry::Keypair(..)) = released {
            self.releases.fetch_add(1, Ordering::SeqCst);
            drop(released);
            self.keypair_released.store(true, Ordering::SeqCst);
        }
    }

    /// How many keypairs were released so far: what was looked up is still in the table while the number is the same.
    pub(crate) fn releases(&self) -> u64 {
        self.releases.load(Ordering::SeqCst)
    }

    /// True, once, after a keypair was released: it is no longer used, and its copies on the stacks of the
    /// threads that used it must be erased.
    pub fn take_keypair_released(&self) -> bool {
        // Mostly there is none, and a mere load keeps the cache line shared.
        self.keypair_released.load(Ordering::SeqCst)
            && self.keypair_released.swap(false, Ordering::SeqCst)
    }

    /// The owner of a message's index.
    #[must_use]
    pub fn lookup(&self, index: ReceiverIndex) -> Option<Entry> {
        self.read(index).get(&index).cloned()
    }

    /// The keypair a transport message names.
    #[must_use]
    pub fn lookup_keypair(&self, index: ReceiverIndex) -> Option<(Arc<Peer>, Arc<Keypair>)> {
        match self.read(index).get(&index)? {
            Entry::Keypair(peer, keypair) => Some((Arc::clone(peer), Arc::clone(keypair))),
            Entry::Handshake(_) => None,
        }
    }

    /// Indices in use.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shards
            .iter()
            .map(|shard| shard.read().unwrap_or_else(PoisonError::into_inner).len())
            .sum()
    }

    /// True if none is in use.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allocate_skips_indices_in_use_and_release_frees_them() {
        let table = IndexTable::default();
        let peer = PeerId::default();
        let mut numbers = [5, 5, 5, 6].into_iter();
        let mut random = || numbers.next().unwrap();
        assert_eq!(table.allocate(peer, &mut random), 5);
        assert_eq!(table.allocate(peer, &mut random), 6);
        assert_eq!(table.len(), 2);
        assert!(table.lookup_keypair(5).is_none());
        table.release(5);
        table.release(6);
        assert!(table.is_empty());
    }

    #[test]
    fn that_a_keypair_was_released_is_reported_once_and_of_a_handshake_never() {
        let table = IndexTable::default();
        let (id, keypair) = (PeerId::default(), crate::session::keypair::tests::keypair(5, true));
        let peer = Arc::new(Peer::new(id, crate::keys::PublicKey::from_bytes([1; 32])));
        assert_eq!(table.allocate(id, || 6), 6);
        table.release(6);
        assert!(!table.take_keypair_released());
        table.swap_handshake_for_keypair(peer, keypair);
        assert!(!table.take_keypair_released());
        assert_eq!(table.releases(), 0);
        table.release(5);
        assert!(table.take_keypair_released());
        table.release(5);
        assert!(!table.take_keypair_released());
        assert_eq!(table.releases(), 1);
    }
}

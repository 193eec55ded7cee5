//! Packet counters in a namespace's own nftables: a witness outside the daemons.

use std::sync::Arc;

use crate::netns::Netns;

/// The table all counters of a namespace are in.
const TABLE: &str = "inet wgsep";

/// A counter of the packets that match a rule.
#[derive(Debug)]
pub struct Counter {
    netns: Arc<Netns>,
    name: String,
}

impl Counter {
    /// Counts packets at `hook` (`input` or `output`) that match an nft expression, from now on.
    #[track_caller]
    #[must_use]
    pub fn new(netns: &Arc<Netns>, name: &str, hook: &str, expression: &str) -> Self {
        netns.run(format!("nft add table {TABLE}"));
        netns.run(format!("nft add counter {TABLE} {name}"));
        netns.run(format!(
            "nft add chain {TABLE} {hook} {{ type filter hook {hook} priority 0 ; }}"
        ));
        netns.run(format!("nft add rule {TABLE} {hook} {expression} counter name {name}"));
        Self { netns: Arc::clone(netns), name: name.to_owned() }
    }

    /// Packets that matched so far.
    ///
    /// # Panics
    ///
    /// When nft does not list the counter.
    #[track_caller]
    #[must_use]
    pub fn packets(&self) -> u64 {
        let listing = self.netns.run(format!("nft list counter {TABLE} {}", self.name));
        let mut words = listing.split_whitespace().skip_while(|word| *word != "packets").skip(1);
        match words.next().and_then(|number| number.parse().ok()) {
            Some(packets) => packets,
            None => panic!("nft list counter printed {listing:?}"),
        }
    }
}

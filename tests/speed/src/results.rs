//! What a run found, as it is kept.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::bed::VethOffload;
use crate::machine::Machine;
use crate::quantity::Quantity;
use crate::statistics::Spread;

/// One value.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Sample {
    pub(crate) contender: String,
    pub(crate) round: u32,
    pub(crate) quantity: Quantity,
    pub(crate) value: f64,
    /// The share of the machine that others used meanwhile, from 0 to 1.
    pub(crate) disturbance: f64,
}

/// Something that could not be measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Failure {
    pub(crate) contender: String,
    pub(crate) round: u32,
    pub(crate) measure: String,
    pub(crate) reason: String,
}

/// How many small datagrams arrived of how many.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Load {
    pub(crate) contender: String,
    /// A second.
    pub(crate) offered: f64,
    /// A second.
    pub(crate) delivered: f64,
}

/// A whole run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Results {
    /// When it began, in UTC.
    pub(crate) date: String,
    /// What was typed.
    pub(crate) command: String,
    /// Of the source.
    pub(crate) commit: String,
    pub(crate) machine: Machine,
    pub(crate) veth: VethOffload,
    pub(crate) rounds: u32,
    /// Names and versions, in the order of tables.
    pub(crate) contenders: Vec<(String, String)>,
    pub(crate) samples: Vec<Sample>,
    pub(crate) loads: Vec<Load>,
    pub(crate) failures: Vec<Failure>,
}

impl Results {
    /// All values of a quantity, by round.
    pub(crate) fn values(&self, contender: &str, quantity: Quantity) -> BTreeMap<u32, f64> {
        let wanted =
            |sample: &&Sample| sample.contender == contender && sample.quantity == quantity;
        self.samples.iter().filter(wanted).map(|sample| (sample.round, sample.value)).collect()
    }

    /// Their spread.
    pub(crate) fn spread(&self, contender: &str, quantity: Quantity) -> Option<Spread> {
        let values: Vec<f64> = self.values(contender, quantity).into_values().collect();
        Spread::of(&values)
    }

    /// The spread of one contender's values over another's of the same round.
    pub(crate) fn ratio(&self, contender: &str, to: &str, quantity: Quantity) -> Option<Spread> {
        let (ours, theirs) = (self.values(contender, quantity), self.values(to, quantity));
        let ratios = ours.iter().filter_map(|(round, ours)| {
            let theirs = theirs.get(round).filter(|theirs| **theirs > 0.0)?;
            Some(ours / theirs)
        });
        Spread::of(&ratios.collect::<Vec<f64>>())
    }

    /// The peers: daemons that are not wgsep.
    pub(crate) fn peers(&self) -> impl Iterator<Item = &str> {
        let names = self.contenders.iter().map(|(name, _version)| name.as_str());
        names.filter(|name| !matches!(*name, "wgsep" | "forwarder"))
    }

    /// The share of the machine that others had during what counts, in percent.
    pub(crate) fn disturbance(&self) -> Option<Spread> {
        let shares: Vec<f64> =
            self.samples.iter().map(|sample| sample.disturbance * 100.0).collect();
        Spread::of(&shares)
    }
}

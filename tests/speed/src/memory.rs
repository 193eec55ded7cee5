//! Memory that the processes of one end have resident.

use std::fs;

use nix::unistd::Pid;
use wgsep_tests::procfs;

use crate::bed::{Bed, Place};
use crate::quantity::Quantity;
use crate::round::Measured;

/// The most that either end ever had, its processes together.
pub(crate) fn measure(bed: &Bed) -> Vec<Measured> {
    let peaks = bed.places().map(|place| resident(place, "VmHWM"));
    let most = f64::max(peaks[0], peaks[1]);
    vec![Measured::new(Quantity::Memory, most / f64::from(1 << 20), 0.0)]
}

/// Bytes of a field of proc_pid_status(5), summed over a program and its children.
pub(crate) fn resident(place: &Place, field: &str) -> f64 {
    let children = procfs::children(place.program);
    children.iter().chain([&place.program]).map(|pid| status_bytes(*pid, field)).sum()
}

fn status_bytes(pid: Pid, field: &str) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let value = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let kibibytes = value.and_then(|value| value.split_whitespace().next()?.parse::<f64>().ok());
    kibibytes.unwrap_or(0.0) * 1024.0
}

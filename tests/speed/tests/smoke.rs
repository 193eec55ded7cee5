//! The suite runs, measures all that it should of wgsep, and keeps what can be read again. What it
//! measures in so short a time means nothing.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;

use serde_json::Value;
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::require;
use wgsep_tests::scratch::Scratch;

#[test]
fn a_brief_run_measures_everything_of_wgsep_and_keeps_it() {
    require!(Wgsep);
    let kept = Scratch::new();
    let out = kept.join("bench");
    let words = ["suite", "--pace", "brief", "--peers", "wgsep", "--out"].map(Into::into);
    wgsep_speed::run(words.into_iter().chain([out.clone().into_os_string()]));

    let latest = out.join("latest");
    let results = fs::read_to_string(latest.join("results.json")).unwrap();
    let results: Value = serde_json::from_str(&results).unwrap();
    assert_eq!(results["failures"], Value::Array(Vec::new()));
    let samples = results["samples"].as_array().unwrap();
    let found: BTreeSet<_> = samples.iter().map(|s| s["quantity"].as_str().unwrap()).collect();
    let expected = [
        "daemon_cpu",
        "flood_kept",
        "handshake_rate",
        "handshakes",
        "large_overload",
        "machine_cpu",
        "memory",
        "peer_memory",
        "ping_idle",
        "ping_idle_tail",
        "ping_loaded",
        "ping_loaded_tail",
        "sandbox_cost",
        "scale_cost",
        "small_kept",
        "small_lossless",
        "small_overload",
        "tcp_back",
        "tcp_forth",
        "tcp_four",
    ];
    assert!(found.iter().eq(&expected), "{found:?}");
    assert!(!results["loads"].as_array().unwrap().is_empty());

    let table = fs::read_to_string(latest.join("table.md")).unwrap();
    assert!(table.contains("| memory of one end, peak"), "{table}");
    for chart in ["tcp.svg", "udp.svg", "overload.svg"] {
        let chart = fs::read_to_string(latest.join(chart)).unwrap();
        assert!(chart.starts_with("<svg ") && chart.ends_with("</svg>\n"), "{chart}");
    }
}

//! Thousands of peers that do not answer: their timers all expire at once, and the daemon serves everything else
//! meanwhile.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use wgsep_tests::cgroup::CpuCgroup;
use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::netns::Netns;
use wgsep_tests::uapi::{Uapi, errno};
use wgsep_tests::{require, skip};

const PEERS: u32 = 9000;
/// Of a processor: all initiations take more than four seconds.
const PERCENT: u32 = 30;
/// Several hundred times what a round takes without the limit.
const LONGEST_ANSWER: Duration = Duration::from_secs(3);

/// The link goes up, which sends a keepalive to every peer, and five seconds later each initiation is repeated.
#[test]
fn answers_do_not_wait_for_the_timers_of_nine_thousand_peers() {
    require!(Wgsep);
    let cgroup = match CpuCgroup::new() {
        Ok(cgroup) => cgroup,
        Err(reason) => return skip::skip(&reason),
    };
    let daemon = Daemon::start_with(Wgsep, &Netns::new(), |command| cgroup.enter(command));
    let mut uapi = Uapi::connect(&daemon.interface).unwrap();
    let mut request = format!("set=1\nprivate_key={:064x}\n", 1);
    for number in 1..=PEERS {
        let peer = format!("public_key={:064x}\nendpoint=127.0.0.1:9\n", number + 8);
        request.push_str(&format!("{peer}persistent_keepalive_interval=25\n"));
    }
    assert_eq!(errno(&uapi.transact(&format!("{request}\n")).unwrap()), Some(0));
    cgroup.limit_to_percent(PERCENT);
    daemon.netns.run(format!("ip link set {} up", daemon.interface));

    let start = Instant::now();
    let (mut answers, mut longest) = (0, [Duration::ZERO; 3]);
    // The answer to the last has two megabytes, and may take as long as the test's client waits for any.
    let requests = ["get=statistics\n\n", "set=1\nfwmark=0\n\n", "get=1\n\n"];
    while start.elapsed() < Duration::from_secs(12) {
        for (request, longest) in requests.iter().zip(&mut longest) {
            let asked = Instant::now();
            assert_eq!(errno(&uapi.transact(request).unwrap()), Some(0));
            *longest = asked.elapsed().max(*longest);
            answers += 1;
        }
    }
    let state = uapi.transact("get=1\n\n").unwrap();
    let sent = state.lines().filter_map(|line| line.strip_prefix("tx_bytes="));
    let initiations = sent.map(|bytes| bytes.parse::<u64>().unwrap() / 148).sum::<u64>();
    println!("{answers} answers, the longest after {longest:?}; {initiations} initiations");
    assert!(longest[..2].iter().all(|longest| *longest < LONGEST_ANSWER), "{longest:?}");
    assert!(initiations > u64::from(PEERS), "the timers expire as well: {initiations}");
}

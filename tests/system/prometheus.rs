//! What `wgsep stats --prometheus` writes: checked by promtool, scraped by a real Prometheus, and shown by the dashboard.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use serde_json::Value;
use wgsep_tests::cache;
use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::link::Family;
use wgsep_tests::netns::Netns;
use wgsep_tests::process::{Process, run};
use wgsep_tests::scratch::Scratch;
use wgsep_tests::skip::skip;
use wgsep_tests::traffic::until_ping;
use wgsep_tests::tunnel::{Plan, Tunnel};
use wgsep_tests::wg::KeyPair;
use wgsep_tests::{repository, require, wait};

const LIMIT: Duration = Duration::from_secs(60);

/// A program of the Prometheus that `make deps` has unpacked.
fn program(name: &str) -> Result<PathBuf, String> {
    cache::entry("prometheus").map(|entry| entry.join("usr/bin").join(name))
}

fn exposition(netns: &Netns, interface: &str) -> String {
    run(netns.command(wgsep_program("wgsep")).args(["stats", "--prometheus", interface]))
}

/// A tunnel that has carried something, with a second peer that never answered.
fn tunnel() -> Tunnel {
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    until_ping(&tunnel.left.daemon.netns, tunnel.right.side.inner(Family::V4));
    let key = KeyPair::generate().public;
    tunnel.left.daemon.wg_set(format!("peer {key} allowed-ips 10.99.0.0/16,fd99::/64"));
    tunnel
}

#[test]
fn promtool_has_nothing_to_say() {
    require!(Wgsep);
    let promtool = match program("promtool") {
        Ok(promtool) => promtool,
        Err(reason) => return skip(&reason),
    };
    let Daemon { netns, interface, .. } = &tunnel().left.daemon;
    let text = exposition(netns, interface);
    let check = |text: &str| {
        let mut command = Command::new(&promtool);
        command.args(["check", "metrics"]).stdin(Stdio::piped());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    };
    let checked = check(&text);
    let said = [checked.stdout, checked.stderr].concat();
    assert!(checked.status.success() && said.is_empty(), "{}", String::from_utf8_lossy(&said));
    // It would say something.
    assert!(
        !check(&text.replace("# TYPE wgsep_up gauge", "# TYPE wgsep_up meter")).status.success()
    );
    assert!(
        !check(&text.replace("wireguard_sent_bytes_total", "wireguard_sent_bytes"))
            .status
            .success()
    );
}

/// Answers each connection in a namespace with the present exposition.
fn serve(netns: &Arc<Netns>, interface: &str) -> SocketAddr {
    let listener = netns.inside(|| TcpListener::bind("127.0.0.1:0").unwrap());
    let address = listener.local_addr().unwrap();
    let (netns, interface) = (Arc::clone(netns), interface.to_owned());
    thread::spawn(move || {
        for client in listener.incoming() {
            let mut client = client.unwrap();
            let mut lines = BufReader::new(client.try_clone().unwrap()).lines();
            if !lines.any(|line| line.is_ok_and(|line| line.is_empty())) {
                continue;
            }
            let mut command = netns.command(wgsep_program("wgsep"));
            // After the end of the test there is nothing to ask.
            let Ok(said) = command.args(["stats", "--prometheus", &interface]).output() else {
                return;
            };
            let head = "HTTP/1.0 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\n\r\n";
            let _gone = client.write_all(&[head.as_bytes(), &said.stdout].concat());
        }
    });
    address
}

/// The values that a Prometheus has for a query now, with their labels.
fn query(netns: &Netns, prometheus: SocketAddr, expression: &str) -> Vec<(Value, f64)> {
    let encoded: String = expression.bytes().map(|byte| format!("%{byte:02x}")).collect();
    let answer = netns.inside(|| {
        let mut client = TcpStream::connect(prometheus).ok()?;
        let request = format!("GET /api/v1/query?query={encoded} HTTP/1.0\r\n\r\n");
        client.write_all(request.as_bytes()).ok()?;
        let mut answer = String::new();
        client.read_to_string(&mut answer).ok()?;
        Some(answer)
    });
    let Some(answer) = answer else { return Vec::new() };
    let Some((_, body)) = answer.split_once("\r\n\r\n") else { return Vec::new() };
    let Ok(body) = serde_json::from_str::<Value>(body) else { return Vec::new() };
    assert!(
        body["status"] == "success" || body["errorType"] == "unavailable",
        "{expression}: {body}"
    );
    let results = body["data"]["result"].as_array().cloned().unwrap_or_default();
    let value = |result: &Value| result["value"][1].as_str().unwrap().parse().unwrap();
    results.iter().map(|result| (result["metric"].clone(), value(result))).collect()
}

/// The queries of the dashboard, with its variables for everything.
fn dashboard_queries() -> Vec<String> {
    let path = repository().join("bin/dist/grafana-dashboard.json");
    let dashboard: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap());
    let queries = targets.map(|target| target["expr"].as_str().unwrap());
    let all = |query: &str| query.replace("$interface", ".*").replace("$peer", ".*");
    queries.map(|query| all(query).replace("$__rate_interval", "1m")).collect()
}

#[test]
fn the_dashboard_asks_for_each_series_and_no_other() {
    require!(Wgsep);
    let Daemon { netns, interface, .. } = &tunnel().left.daemon;
    let text = exposition(netns, interface);
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    let written: BTreeSet<_> = types.map(str::to_owned).collect();
    let words = |query: String| {
        let words = query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        words.map(str::to_owned).collect::<Vec<_>>()
    };
    let asked = dashboard_queries().into_iter().flat_map(words);
    let asked: BTreeSet<_> =
        asked.filter(|word| word.starts_with("wgsep_") || word.starts_with("wireguard_")).collect();
    assert_eq!(asked, written);
}

#[test]
fn a_real_prometheus_scrapes_each_peer() {
    require!(Wgsep);
    let program = match program("prometheus") {
        Ok(program) => program,
        Err(reason) => return skip(&reason),
    };
    let tunnel = tunnel();
    let Daemon { netns, interface, .. } = &tunnel.left.daemon;
    let exporter = serve(netns, interface);
    let scratch = Scratch::new();
    let configuration = format!(
        "global: {{scrape_interval: 1s}}\nscrape_configs:\n- job_name: wgsep\n  static_configs: [{{targets: ['{exporter}']}}]\n"
    );
    fs::write(scratch.join("prometheus.yml"), configuration).unwrap();
    let address: SocketAddr = "127.0.0.1:9090".parse().unwrap();
    let mut command = netns.command(program);
    command.arg(format!("--config.file={}", scratch.join("prometheus.yml").display()));
    command.arg(format!("--storage.tsdb.path={}", scratch.join("data").display()));
    command.arg(format!("--web.listen-address={address}"));
    let mut prometheus = Process::spawn(command, "Prometheus");
    let ask = |expression: &str| query(netns, address, expression);
    wait::until("Prometheus has scraped both peers", LIMIT, || {
        let ended = prometheus.try_exit();
        assert!(ended.is_none(), "{ended:?}: {}", prometheus.log());
        ask("wireguard_received_bytes_total").len() == 2
    });
    let key = &tunnel.right.key.public;
    let peer = format!("{{interface=\"{interface}\",public_key=\"{key}\"}}");
    let [(labels, received)] = &ask(&format!("wireguard_received_bytes_total{peer}"))[..] else {
        panic!("more than one series of a peer")
    };
    assert!(*received >= 148.0, "{received}");
    let shown = tunnel.left.daemon.peers();
    let known = shown.iter().find(|peer| peer.public_key == *key).unwrap();
    assert_eq!(labels["allowed_ips"], known.allowed_ips.replace(' ', ""));
    assert!(ask(&format!("wireguard_sent_bytes_total{peer}"))[0].1 >= 148.0);
    let handshake = ask(&format!("wireguard_latest_handshake_seconds{peer}"))[0].1;
    assert!((handshake - known.latest_handshake as f64).abs() < 1.0, "{handshake}");
    let states = ask("wgsep_peer_state == 1");
    let states: BTreeSet<_> = states.iter().map(|(labels, _)| labels["state"].as_str()).collect();
    assert_eq!(states, BTreeSet::from([Some("established"), Some("idle")]));
    // Each query of the dashboard is one of Prometheus's language, and nearly each has an answer.
    let queries = dashboard_queries();
    let without = || queries.iter().filter(|query| ask(query).is_empty()).count();
    // Nothing failed, and nothing was dropped in the last minute, perhaps.
    wait::until("the dashboard has something to show", LIMIT, || without() <= 2);
}

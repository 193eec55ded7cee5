//! The programs for aarch64, on Debian's arm64 kernel in a virtual machine, with the programs of this
//! machine at the other end of the tunnel.

use std::path::PathBuf;

use serde_json::Value;
use wgsep_tests::daemon::Daemon;
use wgsep_tests::guest::{self, Guest};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::implementation::built_for;
use wgsep_tests::link::{Family, Side};
use wgsep_tests::skip::skip;
use wgsep_tests::traffic::until_ping;
use wgsep_tests::tunnel::{End, PORT};
use wgsep_tests::wg::KeyPair;
use wgsep_tests::{cache, require};

const QEMU: &str = "qemu-system-aarch64";

/// Of the packages that `make deps` unpacked, and where the machine has them.
const PACKAGED: [(&str, &str); 5] = [
    ("bin/busybox", "bin/busybox"),
    ("usr/bin/wg", "bin/wg"),
    ("lib/aarch64-linux-gnu/ld-linux-aarch64.so.1", "lib/ld-linux-aarch64.so.1"),
    ("lib/aarch64-linux-gnu/libc.so.6", "lib/libc.so.6"),
    ("lib/aarch64-linux-gnu/libgcc_s.so.1", "lib/libgcc_s.so.1"),
];

/// Of the programs that `make other-targets` built, in the machine's `/bin`.
const BUILT: [&str; 3] = ["wgsep", "wgsep-dataplane", "attacks_filters"];

fn machine() -> Result<guest::Plan, String> {
    guest::has_programs(QEMU)?;
    let package = cache::entry("arm64")?;
    let packaged = PACKAGED.map(|(from, to)| Ok((package.join(from), to.to_owned())));
    let built = BUILT.map(|program| {
        Ok((built_for("aarch64-unknown-linux-gnu", program)?, format!("bin/{program}")))
    });
    Ok(guest::Plan {
        qemu: QEMU,
        machine: &["-M", "virt", "-cpu", "cortex-a76", "-smp", "2", "-m", "768"],
        has_generation_id: false,
        shell: &["-device", "virtio-serial-pci", "-device", "virtconsole,chardev=shell"],
        // Debian's 6.1 wants to be asked for secret memory; kernels from 6.5 on have it by default.
        append: "console=ttyAMA0 quiet panic=-1 secretmem.enable=1",
        files: packaged.into_iter().chain(built).collect::<Result<Vec<(PathBuf, _)>, String>>()?,
        package,
        modules: &["virtio_pci", "virtio_net", "virtio_console", "tun"],
        port: "/dev/hvc0",
    })
}

/// The layers of `wgsep audit --json` that are not in force.
fn not_in_force(report: &str) -> Vec<String> {
    let report: Value = serde_json::from_str(report).unwrap();
    let findings = report["findings"].as_array().unwrap();
    assert!(findings.len() > 20, "{report}");
    let in_force = |finding: &&Value| matches!(&finding["state"], Value::String(state) if state == "applied" || state == "shown");
    // Debian's kernel is older than mseal(2), which came with Linux 6.10.
    let others = findings.iter().filter(|finding| finding["layer"] != "sealed-memory");
    others.filter(|finding| !in_force(finding)).map(Value::to_string).collect()
}

/// Where the dataplane that serves an interface was loaded.
fn load_address(guest: &mut Guest, interface: &str) -> String {
    guest.run(format!("wgsep {interface}"));
    let maps = guest.run("cat /proc/$(pidof wgsep-dataplane | cut -d ' ' -f 1)/maps");
    maps.split('-').next().unwrap().to_owned()
}

/// One boot for all of it, for it takes most of the time.
#[test]
fn on_an_arm64_kernel_it_serves_with_every_layer_in_force_and_its_filters_hold() {
    require!(Wgsep);
    let plan = match machine() {
        Ok(plan) => plan,
        Err(reason) => return skip(&reason),
    };
    let mut guest = Guest::boot(plan);
    assert_eq!(guest.run("uname -m"), "aarch64");

    guest.run("wgsep wg0");
    let report = guest.run("wgsep audit wg0 --json; test $? -le 1");
    assert_eq!(not_in_force(&report), [""; 0]);

    // A handshake that the other end begins, and pings both ways.
    let key = KeyPair::generate();
    let other = End::new(Side::Left, Daemon::start(Wgsep, &guest.netns));
    let (ours, theirs) = (Side::Right.inner(Family::V4), Side::Left.inner(Family::V4));
    guest.run(format!("echo {} >/tmp/key", key.private));
    guest.run(format!("wg set wg0 private-key /tmp/key listen-port {PORT}"));
    guest.run(format!("wg set wg0 peer {} allowed-ips {theirs}/32", other.key.public));
    guest.run(format!("ip addr add {ours}/24 dev wg0; ip link set wg0 up"));
    let endpoint = (Side::Right.outer(Family::V4), PORT).into();
    other.configure(&key.public, Some(endpoint), None);
    until_ping(&guest.netns, ours);
    guest.until_ping(theirs);
    let handshake = guest.run("wg show wg0 latest-handshakes");
    assert!(!handshake.ends_with("\t0"), "{handshake}");

    guest.run("ip link del wg0");
    guest.run("for i in $(seq 100); do pidof wgsep || exit 0; sleep 0.1; done; exit 1");
    let log = guest.run("cat /var/log/wgsep-wg0.log");
    assert!(!log.contains("ERROR"), "{log}");

    // The dataplane is at another address each time.
    let first = load_address(&mut guest, "wg1");
    guest.run("ip link del wg1; for i in $(seq 100); do pidof wgsep || exit 0; sleep 0.1; done");
    assert_ne!(first, load_address(&mut guest, "wg2"));

    // Attack 1, for real on this architecture.
    let filters = guest.run("attacks_filters --test-threads=2 kernel::");
    assert!(filters.contains("2 passed; 0 failed"), "{filters}");
}

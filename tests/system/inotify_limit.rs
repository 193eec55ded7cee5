//! A host whose inotify limits are reached: a start fails with a reason, and daemons that run go on.
#![allow(clippy::unwrap_used)]

use std::process::Command;

use wgsep_tests::daemon::unique_interface;
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::process::output;
use wgsep_tests::require;

/// In a user namespace, which has limits of its own. What is advised is above the limit that is reached.
#[test]
fn at_the_inotify_limit_a_start_is_refused_with_the_setting_and_a_running_daemon_serves() {
    require!(Wgsep);
    for (limit, setting) in [
        ("max_inotify_instances", "sysctl user.max_inotify_instances=1024"),
        ("max_inotify_watches", "sysctl user.max_inotify_watches=65536"),
    ] {
        let (first, second) = (unique_interface(), unique_interface());
        let script = format!(
            "mkdir -p /run/wireguard; mount -t tmpfs -o mode=755 none /run/wireguard
            echo 1 >/proc/sys/user/{limit}; : >/run/wireguard/log
            \"$1\" -f {first} 2>/run/wireguard/log & daemon=$!
            until grep -q started: /run/wireguard/log; do kill -0 $daemon; sleep 0.02; done
            timeout 10 \"$1\" -f {second} && exit 9
            wg show {first} >/dev/null; ! ip link show {second} 2>/dev/null
            ! test -e /run/wireguard/{second}.sock; ip link del {first}; wait $daemon"
        );
        let mut command = Command::new("timeout");
        command.args([
            "30",
            "unshare",
            "--user",
            "--map-root-user",
            "--net",
            "--mount",
            "sh",
            "-ec",
        ]);
        let done = output(command.arg(script).arg("sh").arg(wgsep_program("wgsep")));
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(done.status.success(), "{limit}: {done:?}");
        assert_eq!(said.lines().count(), 1, "{limit}: {said}");
        assert!(said.contains("of this host are in use") && said.contains(setting), "{said}");
    }
}

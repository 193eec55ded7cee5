//! The recipes for containers and Kubernetes, run as a pod runs them: one network namespace, and for each container a root
//! of its own that cannot be written, with the recipe's command as process 1 and the recipe's capabilities.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use wgsep_tests::daemon::{Daemon, unique_interface};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::link::{self, DEVICE, Family, Side};
use wgsep_tests::netns::Netns;
use wgsep_tests::nft::Counter;
use wgsep_tests::process::{Process, output, run, stop};
use wgsep_tests::procfs::children;
use wgsep_tests::scratch::Scratch;
use wgsep_tests::skip::skip;
use wgsep_tests::traffic::until_ping;
use wgsep_tests::tunnel::End;
use wgsep_tests::wg::KeyPair;
use wgsep_tests::{cache, repository, require, wait};

const LIMIT: Duration = Duration::from_secs(20);
/// An address beyond the peer, to which only a default route leads.
const BEYOND: &str = "203.0.113.9";
/// One of IPv6, which the tunnel does not carry.
const BEYOND_V6: &str = "2001:db8::9";
/// A machine of the cluster that is not on the pod's link, as the kubelet is where the pod has no other route than its
/// default one.
const KUBELET: &str = "198.51.100.7";
/// The mark of kill-switch.nft.
const MARK: &str = "51820";

/// Becomes a container: its root is this machine's with the files of an image above it, and cannot be written. Each
/// volume is SOURCE:TARGET.
const RUNTIME: &str = r#"
set -e
image=$1 root=$2 capabilities=$3; shift 3
mount -t tmpfs none "$root"
mkdir "$root/image" "$root/root"
cp -a "$image/." "$root/image"
mount -t overlay none -o "lowerdir=$root/image:/" "$root/root"
root=$root/root
mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount --rbind /dev "$root/dev"
mount -t tmpfs none "$root/run"
mkdir "$root/run/wireguard" "$root/run/wgsep-quick"
while [ "$1" != -- ]; do
	mount --bind "${1%%:*}" "$root/${1#*:}"
	shift
done
shift
mount -o remount,bind,ro "$root/run"
cd "$root"
pivot_root . .
umount -l .
exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
	setpriv --bounding-set="$capabilities" --inh-caps=-all --no-new-privs "$@"
"#;

/// Counts the runs of wgsep-quick(8) before it becomes that.
const COUNTING: &str =
    "#!/bin/sh\necho \"$1\" >>/run/wgsep-quick/runs\nexec bash /usr/sbin/wgsep-quick.bash \"$@\"\n";

fn container_file(name: &str) -> PathBuf {
    repository().join("bin/dist/container").join(name)
}

/// The part of a recipe that is one of its containers.
struct Recipe(String);

impl Recipe {
    fn of(recipe: &str, container: &str) -> Self {
        let text = fs::read_to_string(container_file(recipe)).unwrap();
        let name = format!("- name: {container}");
        let mut lines = text.lines().skip_while(|line| line.trim() != name);
        let first = lines.next().unwrap_or_else(|| panic!("{recipe} has no {container}"));
        let depth = first.len() - first.trim_start().len();
        let is_inside = |line: &&str| line.len() - line.trim_start().len() > depth;
        let rest: Vec<_> = lines.take_while(is_inside).collect();
        Self(rest.join("\n"))
    }

    /// The elements of a list behind `key`, which may be part of a line.
    fn list(&self, key: &str) -> Option<Vec<String>> {
        let rest = self.0.split_once(key)?.1.strip_prefix(": [")?;
        let words = rest.split_once(']')?.0.split(", ");
        Some(words.map(|word| word.trim_matches('"').to_owned()).collect())
    }

    /// The command of a container of this image, with the recipe's arguments.
    fn command(&self) -> Vec<String> {
        if let Some(command) = self.list("\n      command") {
            return command;
        }
        let is_configure = self.0.contains("image: registry.example/wgsep-configure");
        let mut command = entrypoint(if is_configure { "configure" } else { "wgsep" });
        let arguments = self.list(" args").unwrap_or_else(|| vec!["wg0".to_owned()]);
        command.extend(arguments);
        command
    }

    fn capabilities(&self) -> String {
        let added = self.list("add").unwrap();
        format!("-all,+{}", added.join(",+").to_lowercase())
    }

    /// The command of a probe or hook.
    fn probe(&self, name: &str) -> Vec<String> {
        let rest = self.0.split_once(name).unwrap_or_else(|| panic!("no {name}")).1;
        Self(rest.to_owned()).list("command").unwrap()
    }
}

/// What an image of the Dockerfile runs.
fn entrypoint(image: &str) -> Vec<String> {
    let text = fs::read_to_string(container_file("Dockerfile")).unwrap();
    let stage = text.split_once(&format!(" AS {image}\n")).unwrap().1;
    let line = stage.split_once("ENTRYPOINT [").unwrap().1;
    let words = line.split_once(']').unwrap().0.split(", ");
    words.map(|word| word.trim_matches('"').to_owned()).collect()
}

/// A container that runs.
struct Container {
    /// unshare(1), which ends as process 1 does.
    runtime: Process,
}

impl Container {
    fn first(&self) -> Pid {
        let found = wait::poll(LIMIT, || children(self.runtime.pid()).first().copied());
        found.unwrap_or_else(|| panic!("{}", self.runtime.log()))
    }

    /// Kills every process of it, as the kernel does with process 1.
    fn kill(mut self) {
        kill(self.first(), Signal::SIGKILL).unwrap();
        self.runtime.exit_within(LIMIT);
    }

    #[track_caller]
    fn terminates_at_once(mut self) {
        kill(self.first(), Signal::SIGTERM).unwrap();
        let status = self.runtime.exit_within(Duration::from_secs(1));
        assert_eq!(status.code(), Some(0), "{}", self.runtime.log());
    }
}

/// The sandbox of a pod, its volumes, and the peer beyond its network.
struct Pod {
    netns: Arc<Netns>,
    other: End,
    key: KeyPair,
    /// The files of both images.
    image: Scratch,
    root: Scratch,
    sockets: Scratch,
    state: Scratch,
    keys: Scratch,
    /// Packets from the pod that reach the peer's machine in clear, other than those of [`KUBELET`].
    leaks: [Counter; 2],
}

impl Pod {
    fn new() -> Self {
        let (netns, right) = link::joined();
        let [v4, v6] = [Family::V4, Family::V6].map(|family| Side::Right.outer(family));
        netns.run(format!("ip route add default via {v4} dev {DEVICE}"));
        netns.run(format!("ip -6 route add default via {v6} dev {DEVICE}"));
        for address in [BEYOND, KUBELET] {
            right.run(format!("ip addr add {address}/32 dev lo"));
        }
        right.run(format!("ip addr add {BEYOND_V6}/128 dev lo nodad"));
        // The tunnel's own datagrams are for the address on the link.
        let leak = format!("iifname {DEVICE} ip daddr != {{ {KUBELET}, {v4} }}");
        let leak_v6 = format!("iifname {DEVICE} ip6 daddr {BEYOND_V6}");
        let leaks = [("leaks", leak), ("leaks_v6", leak_v6)]
            .map(|(name, leak)| Counter::new(&right, name, "prerouting", &leak));
        let other = End::new(Side::Right, Daemon::start(Wgsep, &right));
        let key = KeyPair::generate();
        other.configure(&key.public, None, None);
        let pod = Self {
            netns,
            other,
            key,
            image: Scratch::new(),
            root: Scratch::new(),
            sockets: Scratch::new(),
            state: Scratch::new(),
            keys: Scratch::new(),
            leaks,
        };
        pod.make_image();
        pod
    }

    /// Both images in one: what they share are directories.
    fn make_image(&self) {
        for directory in ["usr/sbin", "etc/wgsep", "etc/wireguard", "keys"] {
            fs::create_dir_all(self.image.join(directory)).unwrap();
        }
        for program in ["wgsep", "wgsep-dataplane"] {
            self.image.install(program, &format!("usr/sbin/{program}"));
        }
        let copy = |from: &Path, to: &str| {
            run(Command::new("cp").arg("-p").arg(from).arg(self.image.join(to)));
        };
        copy(&container_file("configure"), "usr/sbin/configure");
        copy(&container_file("kill-switch.nft"), "etc/wgsep/kill-switch.nft");
        copy(&repository().join("bin/dist/wgsep-quick"), "usr/sbin/wgsep-quick.bash");
        self.image.write_script("usr/sbin/wgsep-quick", COUNTING);
        fs::write(self.image.join("etc/wireguard/wg0.conf"), "").unwrap();
    }

    fn volumes(&self) -> Vec<String> {
        [(&self.sockets, "run/wireguard"), (&self.state, "run/wgsep-quick")]
            .map(|(volume, at)| format!("{}:{at}", volume.display()))
            .to_vec()
    }

    fn command(&self, volumes: &[String], capabilities: &str, words: &[String]) -> Command {
        let mut command = self.netns.command("unshare");
        command.args([
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "bash",
            "-c",
            RUNTIME,
            "runtime",
        ]);
        command.args([self.image.display().to_string(), self.root.display().to_string()]);
        command.arg(capabilities).args(volumes).arg("--").args(words);
        command
    }

    fn start(&self, recipe: &Recipe) -> Container {
        let mut volumes = self.volumes();
        if recipe.0.contains("subPathExpr: $(NODE_NAME).conf") {
            volumes.push(format!("{}/node-1.conf:etc/wireguard/wg0.conf", self.keys.display()));
        } else {
            volumes.push(format!("{}:etc/wireguard", self.keys.display()));
        }
        let command = recipe.command();
        let what = command.join(" ");
        let command = self.command(&volumes, &recipe.capabilities(), &command);
        Container { runtime: Process::spawn(command, what) }
    }

    fn daemon(&self) -> Container {
        let recipe = Recipe::of("sidecar.yaml", "wgsep");
        let daemon = self.start(&recipe);
        let probe = recipe.probe("startupProbe:");
        wait::until("the daemon is started", LIMIT, || {
            output(&mut self.command(&self.volumes(), "-all", &probe)).status.success()
        });
        daemon
    }

    fn configure(&self) -> Container {
        self.start(&Recipe::of("sidecar.yaml", "configure"))
    }

    fn load_kill_switch(&self) {
        let recipe = Recipe::of("sidecar.yaml", "kill-switch");
        run(&mut self.command(&[], &recipe.capabilities(), &recipe.command()));
    }

    /// Whether the probe of `configure` succeeds.
    fn is_ready(&self) -> bool {
        let recipe = Recipe::of("sidecar.yaml", "configure");
        let probe = recipe.probe("readinessProbe:");
        assert_eq!(probe, recipe.probe("startupProbe:"));
        let [test, exists, file] = &probe[..] else { panic!("{probe:?}") };
        assert_eq!([test.as_str(), exists], ["test", "-e"]);
        self.state.join(file.strip_prefix("/run/wgsep-quick/").unwrap()).exists()
    }

    #[track_caller]
    fn until_ready(&self, configure: &Container) {
        let is_ready = wait::poll(LIMIT, || self.is_ready().then_some(()));
        assert!(is_ready.is_some(), "{}", configure.runtime.log());
    }

    /// The runs of wgsep-quick(8) so far.
    fn runs(&self) -> Vec<String> {
        let text = fs::read_to_string(self.state.join("runs")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// A file with a default route into the tunnel, as at the head of sidecar.yaml.
    fn text(&self) -> String {
        format!(
            "[Interface]\nPrivateKey = {}\nAddress = {}/24\nFwMark = {MARK}\n\n[Peer]\nPublicKey = {}\n\
             Endpoint = {}\nAllowedIPs = 0.0.0.0/0\n",
            self.key.private,
            Side::Left.inner(Family::V4),
            self.other.key.public,
            self.other.endpoint(Family::V4),
        )
    }

    /// Puts a file into the volume as the kubelet does: a new directory, and a symbolic link that is replaced.
    fn publish(&self, text: &str) {
        let version = format!("..{}", unique_interface());
        fs::create_dir(self.keys.join(&version)).unwrap();
        write_private(&self.keys.join(&version).join("wg0.conf"), text);
        symlink(&version, self.keys.join("..data_tmp")).unwrap();
        fs::rename(self.keys.join("..data_tmp"), self.keys.join("..data")).unwrap();
        let _exists = symlink("..data/wg0.conf", self.keys.join("wg0.conf"));
    }

    fn leaked(&self) -> [u64; 2] {
        self.leaks.each_ref().map(Counter::packets)
    }

    /// Packets that the kill switch has dropped.
    fn dropped(&self) -> u64 {
        let listing = self.netns.run("nft list chain inet wgsep_kill_switch output");
        let mut words = listing.split_whitespace().skip_while(|word| *word != "packets");
        words.nth(1).and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("{listing}"))
    }

    fn pings(&self, address: &str) -> bool {
        self.netns.output(format!("ping -n -c 2 -i 0.1 -W 1 {address}")).status.success()
    }

    /// Whether the kubelet's request to the pod's own address is answered.
    fn answers_the_kubelet(&self) -> bool {
        let pod = Side::Left.outer(Family::V4);
        let probe = format!("ping -n -c 1 -W 1 -I {KUBELET} {pod}");
        self.other.daemon.netns.output(probe).status.success()
    }
}

fn write_private(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o400)).unwrap();
}

fn tunnelled() -> IpAddr {
    BEYOND.parse().unwrap()
}

#[test]
fn nothing_of_a_pod_leaves_but_through_the_tunnel_from_the_first_packet_on() {
    require!(Wgsep);
    let pod = Pod::new();
    assert!(pod.pings(BEYOND) && pod.pings(BEYOND_V6));
    let before = pod.leaked();
    assert!(before.iter().all(|packets| *packets > 0), "the test cannot see a leak");
    let nothing_leaked = || {
        assert!(!pod.pings(BEYOND_V6));
        assert_eq!(pod.leaked(), before);
    };

    pod.load_kill_switch();
    assert!(!pod.pings(BEYOND), "before the daemon");
    nothing_leaked();
    assert!(pod.answers_the_kubelet(), "before the daemon");
    let daemon = pod.daemon();
    let configure = pod.configure();
    assert!(!pod.pings(BEYOND) && !pod.is_ready(), "before the configuration");
    nothing_leaked();
    pod.publish(&pod.text());
    pod.until_ready(&configure);
    until_ping(&pod.netns, tunnelled());
    assert!(pod.answers_the_kubelet(), "through the tunnel");
    pod.load_kill_switch();
    until_ping(&pod.netns, tunnelled());
    nothing_leaked();

    daemon.kill();
    assert!(!pod.pings(BEYOND), "without the daemon");
    wait::until("the pod is not ready", LIMIT, || !pod.is_ready());
    assert!(pod.answers_the_kubelet(), "without the daemon");
    nothing_leaked();
    let _daemon = pod.daemon();
    pod.until_ready(&configure);
    until_ping(&pod.netns, tunnelled());
    nothing_leaked();
    assert!(configure.runtime.log().contains("waiting for the daemon of wg0"));
}

/// A reply to what came in through the tunnel is the tunnel's, too.
#[test]
fn a_connection_from_beyond_the_tunnel_does_not_go_on_beside_it() {
    require!(Wgsep);
    let pod = Pod::new();
    pod.load_kill_switch();
    let daemon = pod.daemon();
    let configure = pod.configure();
    pod.publish(&pod.text());
    pod.until_ready(&configure);
    until_ping(&pod.netns, tunnelled());
    // Of an address that goes with the interface the kernel itself sends nothing any more.
    let stays = SocketAddr::new([192, 0, 2, 5].into(), 8080);
    pod.netns.run(format!("ip addr add {}/32 dev lo", stays.ip()));
    let right = &pod.other.daemon;
    right.wg_set(format!(
        "peer {} allowed-ips {}/24,{}/32",
        pod.key.public,
        Side::Left.inner(Family::V4),
        stays.ip()
    ));
    right.netns.run(format!("ip route add {} dev {}", stays.ip(), right.interface));
    let listener = pod.netns.inside(|| TcpListener::bind(stays).unwrap());
    let mut client = right.netns.inside(|| TcpStream::connect(stays).unwrap());
    let (mut server, _) = listener.accept().unwrap();
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        server.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                let _congested = server.write(&[0; 100]);
                thread::sleep(Duration::from_millis(10));
            }
        });
        let received = client.read_exact(&mut [0; 1000]);
        let before = pod.dropped();
        daemon.kill();
        let dropped = wait::poll(LIMIT, || (pod.dropped() > before).then_some(()));
        is_over.store(true, Ordering::Relaxed);
        assert!(received.is_ok() && dropped.is_some(), "{received:?}");
    });
    assert_eq!(pod.leaked(), [0, 0]);
}

#[test]
fn a_changed_secret_is_reloaded_and_one_that_cannot_be_applied_makes_the_pod_not_ready() {
    require!(Wgsep);
    let pod = Pod::new();
    pod.netns
        .run("sysctl -q -w net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1");
    let _daemon = pod.daemon();
    let with_v6 = pod.text().replace("/24\n", "/24, fd77::1/64\n");
    pod.publish(&with_v6);
    let configure = pod.configure();
    let refusals = || pod.runs().len();
    wait::until("it is tried again", LIMIT, || refusals() > 2);
    assert!(!pod.is_ready());
    let log = configure.runtime.log();
    assert_eq!(log.matches("disable_ipv6").count(), 1, "logged once: {log}");
    assert_eq!(log.matches("trying again").count(), 1, "{log}");

    pod.publish(&pod.text());
    pod.until_ready(&configure);
    until_ping(&pod.netns, tunnelled());
    let before = pod.runs().len();
    pod.publish(&pod.text().replace("/24\n", "/24, 10.1.2.3/32\n"));
    wait::until("the new address is there", LIMIT, || {
        pod.netns.run("ip -4 -o address show dev wg0").contains("10.1.2.3/32")
    });
    assert_eq!(pod.runs()[before..], ["reload"]);
    pod.publish(&pod.text().replace("FwMark", "FvMark"));
    wait::until("the pod is not ready", LIMIT, || !pod.is_ready());
    assert!(configure.runtime.log().contains("FvMark"), "{}", configure.runtime.log());
    assert!(pod.pings(BEYOND), "what was in force stays");
    pod.publish(&pod.text());
    pod.until_ready(&configure);
    assert!(pod.pings(BEYOND));
    let before = pod.runs().len();
    fs::remove_file(pod.keys.join("wg0.conf")).unwrap();
    wait::until("the pod is not ready", LIMIT, || !pod.is_ready());
    pod.publish(&pod.text());
    pod.until_ready(&configure);
    assert!(pod.runs()[before..].iter().all(|run| run == "reload"), "{:?}", pod.runs());
}

#[test]
fn a_daemon_that_was_only_slow_is_not_configured_again() {
    require!(Wgsep);
    let pod = Pod::new();
    let daemon = pod.daemon();
    pod.publish(&pod.text());
    let configure = pod.configure();
    pod.until_ready(&configure);
    let first = daemon.first();
    let dataplane = children(first)[0];
    stop(first);
    stop(dataplane);
    wait::until("the pod is not ready", LIMIT, || !pod.is_ready());
    for pid in [dataplane, first] {
        kill(pid, Signal::SIGCONT).unwrap();
    }
    pod.until_ready(&configure);
    until_ping(&pod.netns, tunnelled());
    assert_eq!(pod.runs(), ["apply"]);
}

/// As where the Secret has no such file: the kubelet makes a directory of that name.
#[test]
fn what_is_no_configuration_is_refused_with_the_reason_until_there_is_one() {
    require!(Wgsep);
    let pod = Pod::new();
    let _daemon = pod.daemon();
    let path = pod.keys.join("wg0.conf");
    let configure = pod.configure();
    let says = |reason: &str| {
        let said = wait::poll(LIMIT, || configure.runtime.log().contains(reason).then_some(()));
        assert!(said.is_some(), "{reason}: {}", configure.runtime.log());
        assert!(!pod.is_ready(), "{reason}");
    };
    says("there is no /etc/wireguard/wg0.conf");
    fs::create_dir(&path).unwrap();
    says("/etc/wireguard/wg0.conf is not a regular file");
    fs::remove_dir(&path).unwrap();
    mkfifo(&path, Mode::S_IRUSR).unwrap();
    let before = pod.runs().len();
    wait::until("it is tried again", LIMIT, || pod.runs().len() > before);
    fs::remove_file(&path).unwrap();
    fs::write(&path, vec![0xA5; 1 << 20]).unwrap();
    says("refuses it");
    let log = configure.runtime.log();
    assert!(log.len() < 8192, "{} bytes of log", log.len());
    fs::remove_file(&path).unwrap();
    pod.publish(&pod.text());
    pod.until_ready(&configure);
    until_ping(&pod.netns, tunnelled());
}

/// A file of a directory that is mounted as it is may be read while an editor writes it.
#[test]
fn a_file_is_read_once_it_no_longer_changes() {
    require!(Wgsep);
    let pod = Pod::new();
    let _daemon = pod.daemon();
    let path = pod.keys.join("wg0.conf");
    write_private(&path, &pod.text());
    let configure = pod.configure();
    pod.until_ready(&configure);
    let mut file = fs::File::create(&path).unwrap();
    let text = format!("{}# {}\n", pod.text(), "x".repeat(100));
    for byte in text.as_bytes() {
        file.write_all(&[*byte]).unwrap();
        thread::sleep(Duration::from_millis(10));
    }
    wait::until("it is reloaded", LIMIT, || pod.runs().contains(&"reload".to_owned()));
    pod.until_ready(&configure);
    assert_eq!(pod.runs(), ["apply", "reload"]);
    assert!(!configure.runtime.log().contains("cannot"), "{}", configure.runtime.log());
}

#[test]
fn names_of_the_file_are_looked_up_again() {
    require!(Wgsep);
    let pod = Pod::new();
    let endpoint = pod.other.endpoint(Family::V4).to_string();
    let host = endpoint.split_once(':').unwrap().0;
    fs::write(pod.image.join("etc/hosts"), format!("{host} vpn.example\n")).unwrap();
    let _daemon = pod.daemon();
    pod.publish(&pod.text().replace(host, "vpn.example"));
    let configure = pod.configure();
    pod.until_ready(&configure);
    wait::until("they are", LIMIT, || pod.runs().contains(&"resolve".to_owned()));
    until_ping(&pod.netns, tunnelled());
}

#[test]
fn process_1_of_both_images_ends_at_once_on_sigterm() {
    require!(Wgsep);
    let pod = Pod::new();
    let waiting = pod.configure();
    wait::until("it waits", LIMIT, || waiting.runtime.log().contains("waiting for the daemon"));
    waiting.terminates_at_once();

    let daemon = pod.daemon();
    // A name that no server answers for keeps wgsep-quick(8) busy.
    fs::write(pod.image.join("etc/resolv.conf"), format!("nameserver {BEYOND}\n")).unwrap();
    pod.publish(&pod.text().replace("Endpoint = ", "Endpoint = vpn.example:5 # "));
    let busy = pod.configure();
    wait::until("it applies the file", LIMIT, || pod.runs() == ["apply"]);
    busy.terminates_at_once();

    pod.publish(&pod.text());
    let configured = pod.configure();
    pod.until_ready(&configured);
    configured.terminates_at_once();
    assert!(!pod.is_ready());
    until_ping(&pod.netns, tunnelled());
    for is_state_lost in [false, true] {
        if is_state_lost {
            fs::remove_file(pod.state.join("wg0.conf")).unwrap();
        }
        let before = pod.runs().len();
        let again = pod.configure();
        pod.until_ready(&again);
        assert!(pod.pings(BEYOND));
        assert_eq!(pod.runs()[before..], ["reload"], "sessions continue");
        again.terminates_at_once();
    }
    daemon.terminates_at_once();
}

#[test]
fn a_gateway_has_the_file_of_its_node_and_leaves_nothing_behind() {
    require!(Wgsep);
    let pod = Pod::new();
    let inner = Side::Right.inner(Family::V4);
    let text = pod.text().replace("0.0.0.0/0", &format!("{inner}/32, 10.50.0.0/16"));
    let text = text.replace(&format!("FwMark = {MARK}"), "ListenPort = 29820");
    let hook = "PostUp = ip rule add priority 77 to 10.60.0.0/16 unreachable\nPostDown = ip rule del priority 77\n\n[Peer]";
    write_private(&pod.keys.join("node-1.conf"), &text.replace("[Peer]", hook));
    let daemon = pod.start(&Recipe::of("gateway.yaml", "wgsep"));
    let recipe = Recipe::of("gateway.yaml", "configure");
    let configure = pod.start(&recipe);
    pod.until_ready(&configure);
    until_ping(&pod.netns, inner);
    assert!(pod.netns.run("ip route show 10.50.0.0/16").contains("dev wg0"));
    assert!(pod.netns.run("ss -uln").contains(":29820 "));
    assert!(pod.netns.run("ip rule").contains("10.60.0.0/16"));
    let hook = recipe.probe("preStop:");
    let mut volumes = pod.volumes();
    volumes.push(format!("{}/node-1.conf:etc/wireguard/wg0.conf", pod.keys.display()));
    run(&mut pod.command(&volumes, &recipe.capabilities(), &hook));
    assert!(!pod.netns.run("ip rule").contains("10.60.0.0/16"));
    assert!(!pod.netns.output("ip link show wg0").status.success());
    configure.terminates_at_once();
    drop(daemon);
}

/// With the whole Secret mounted, and the file of the node as an argument.
#[test]
fn configure_follows_a_file_that_is_its_argument() {
    require!(Wgsep);
    let pod = Pod::new();
    let _daemon = pod.daemon();
    pod.publish(&pod.text());
    let directory = Scratch::new();
    let mut volumes = pod.volumes();
    volumes.push(format!("{}:keys", pod.keys.display()));
    volumes.push(format!("{}:etc/wireguard", directory.display()));
    let recipe = Recipe::of("gateway.yaml", "configure");
    let mut words = entrypoint("configure");
    words.extend(["wg0", "/keys/wg0.conf"].map(str::to_owned));
    let command = pod.command(&volumes, &recipe.capabilities(), &words);
    let configure = Container { runtime: Process::spawn(command, "configure") };
    pod.until_ready(&configure);
    pod.publish(&pod.text().replace("/24\n", "/24, 10.1.2.3/32\n"));
    wait::until("the new address is there", LIMIT, || {
        pod.netns.run("ip -4 -o address show dev wg0").contains("10.1.2.3/32")
    });
}

/// A pod's /proc/sys is read-only.
#[test]
fn a_strict_reverse_path_filter_that_a_default_route_cannot_pass_is_refused() {
    require!(Wgsep);
    let pod = Pod::new();
    pod.netns.run(format!("sysctl -q -w net.ipv4.conf.{DEVICE}.rp_filter=1"));
    let _daemon = pod.daemon();
    pod.publish(&pod.text());
    let configure = pod.configure();
    wait::until("it says so", LIMIT, || {
        configure.runtime.log().contains(&format!("and {DEVICE} filters by strict reverse path"))
    });
    assert!(!pod.is_ready());
    pod.netns.run("sysctl -q -w net.ipv4.conf.all.src_valid_mark=1");
    pod.until_ready(&configure);
    until_ping(&pod.netns, tunnelled());
}

/// What kilo's manifest passes stays in force under the patch.
#[test]
fn the_patch_for_kilo_serves_with_net_admin_alone() {
    require!(Wgsep);
    let pod = Pod::new();
    let recipe = Recipe::of("kilo.yaml", "boringtun");
    assert_eq!(recipe.capabilities(), "-all,+net_admin");
    let probe = recipe.probe("livenessProbe:");
    // As in the manifest for k3s, and as in that for kubeadm.
    for option in ["--disable-drop-privileges=true", "--disable-drop-privileges"] {
        let mut words = entrypoint("wgsep");
        words.extend([option, "--foreground", "kilo0"].map(str::to_owned));
        let command = pod.command(&pod.volumes(), &recipe.capabilities(), &words);
        let daemon = Container { runtime: Process::spawn(command, "kilo") };
        wait::until("it answers", LIMIT, || {
            output(&mut pod.command(&pod.volumes(), "-all", &probe)).status.success()
        });
        daemon.terminates_at_once();
    }
}

#[test]
fn kubernetes_takes_the_recipes() {
    let entry = match cache::entry("kubernetes-validate") {
        Ok(entry) => entry,
        Err(reason) => return skip(&reason),
    };
    let validate = |path: &Path| {
        let mut validate = Command::new(entry.join("bin/python3"));
        output(validate.args(["-m", "kubernetes_validate", "--strict"]).arg(path))
    };
    for recipe in ["sidecar.yaml", "gateway.yaml"] {
        let path = container_file(recipe);
        let done = validate(&path);
        let printed = [done.stdout, done.stderr].concat();
        assert!(done.status.success(), "{recipe}: {}", String::from_utf8_lossy(&printed));
        // It would say something.
        let scratch = Scratch::new();
        let wrong = fs::read_to_string(path).unwrap().replace("livenessProbe:", "aliveProbe:");
        fs::write(scratch.join(recipe), wrong).unwrap();
        assert!(!validate(&scratch.join(recipe)).status.success(), "{recipe}");
    }
}

/// An unqualified name is that of another image with another registry first in the list; and a context with a `target` of
/// gigabytes is sent to the daemon, or makes a build depend on it.
#[test]
fn images_are_built_of_qualified_names_and_of_what_git_has() {
    let dockerfile = fs::read_to_string(container_file("Dockerfile")).unwrap();
    let images = dockerfile.lines().filter_map(|line| line.strip_prefix("FROM "));
    for image in images {
        assert!(
            image.starts_with("docker.io/library/") || image.starts_with("scratch "),
            "{image}"
        );
        assert!(!image.contains("--platform"), "{image}: each platform builds its own");
    }
    let ignored = fs::read_to_string(repository().join(".dockerignore")).unwrap();
    let mut ignored: Vec<_> = ignored.lines().filter(|line| !line.starts_with('#')).collect();
    let of_git = fs::read_to_string(repository().join(".gitignore")).unwrap();
    let of_git = of_git.lines().map(|line| line.trim_matches('/'));
    ignored.retain(|pattern| *pattern != "**/target");
    let others: Vec<_> = of_git.filter(|line| !line.ends_with("target")).collect();
    assert_eq!(
        ignored, others,
        "a tracked file that is left out makes the version one with changes"
    );
}

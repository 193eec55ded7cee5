//! What `make install` and `make deb` lay out, and a server that runs from it.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::link::{self, Family, Side};
use wgsep_tests::machine::{self, Machine, write_configuration};
use wgsep_tests::netns::Netns;
use wgsep_tests::process::{output, run};
use wgsep_tests::scratch::Scratch;
use wgsep_tests::skip::skip;
use wgsep_tests::traffic::until_ping;
use wgsep_tests::tunnel::{End, PORT};
use wgsep_tests::wg::KeyPair;
use wgsep_tests::{readme, repository, require, require_root, uapi, wait};

/// How long a service may take to start, to stop, or to be started again.
const SERVICE_LIMIT: Duration = Duration::from_secs(20);

/// Runs make on the programs as they are built; `--old-file` keeps it from building them.
fn make(arguments: &[&str]) {
    let built = wgsep_program("wgsep");
    let target = built.ancestors().nth(2).unwrap();
    run(Command::new("make")
        .current_dir(repository())
        .args(["--no-print-directory", "--old-file=build"])
        .args(arguments)
        .env("CARGO_TARGET_DIR", target)
        .env_remove("MAKEFLAGS"));
}

/// Every file below a directory, with its permissions.
fn files_below(directory: &Path) -> Vec<(String, u32)> {
    let listing =
        run(Command::new("find").arg(directory).args(["-type", "f", "-printf", "%P %m\n"]));
    let mut files: Vec<_> = listing
        .lines()
        .map(|line| line.rsplit_once(' ').unwrap())
        .map(|(file, mode)| (file.to_owned(), u32::from_str_radix(mode, 8).unwrap()))
        .collect();
    files.sort();
    files
}

#[test]
fn make_install_keeps_to_destdir_and_prefix_and_runs_from_there() {
    require!(Wgsep);
    let scratch = Scratch::new();
    let destdir = scratch.join("stage");
    make(&["install", "PREFIX=/opt/wg", &format!("DESTDIR={}", destdir.display())]);
    let mut expected = [
        ("lib/systemd/system/wgsep-resolve@.service", 0o644),
        ("lib/systemd/system/wgsep-resolve@.timer", 0o644),
        ("lib/systemd/system/wgsep@.service", 0o644),
        ("lib/sysusers.d/wgsep.conf", 0o644),
        ("libexec/wgsep/prometheus", 0o755),
        ("libexec/wgsep/wgsep-dataplane", 0o711),
        ("sbin/wgsep", 0o755),
        ("sbin/wgsep-quick", 0o755),
        ("share/bash-completion/completions/wgsep", 0o644),
        ("share/bash-completion/completions/wgsep-quick", 0o644),
        ("share/doc/wgsep/CHANGELOG.md", 0o644),
        ("share/doc/wgsep/LICENCES-OF-CRATES", 0o644),
        ("share/doc/wgsep/LICENSE", 0o644),
        ("share/doc/wgsep/README.md", 0o644),
        ("share/doc/wgsep/SECURITY.md", 0o644),
        ("share/doc/wgsep/grafana-dashboard.json", 0o644),
        ("share/doc/wgsep/grafana-dashboard.png", 0o644),
        ("share/doc/wgsep/wgsep.cdx.json", 0o644),
        ("share/fish/vendor_completions.d/wgsep-quick.fish", 0o644),
        ("share/fish/vendor_completions.d/wgsep.fish", 0o644),
        ("share/man/man7/wgsep-sandbox.7", 0o644),
        ("share/man/man8/wgsep-quick.8", 0o644),
        ("share/man/man8/wgsep.8", 0o644),
        ("share/zsh/site-functions/_wgsep", 0o644),
    ]
    .map(|(file, mode)| (format!("opt/wg/{file}"), mode));
    expected.sort();
    assert_eq!(files_below(&destdir), expected);
    let installed = destdir.join("opt/wg");
    let unit = fs::read_to_string(installed.join("lib/systemd/system/wgsep@.service")).unwrap();
    assert!(
        unit.contains("ExecStart=/opt/wg/sbin/wgsep-quick serve %i /opt/wg/sbin/wgsep ")
            && !unit.contains('@'.to_string().repeat(2).as_str())
    );
    assert!(unit.contains("ExecStartPost=+/opt/wg/sbin/wgsep-quick apply %i"), "{unit}");

    // No place of the package's is left in what is installed elsewhere.
    for (file, _) in &expected {
        let text = fs::read(destdir.join(file)).unwrap();
        let Ok(text) = String::from_utf8(text) else { continue };
        for place in ["/usr/sbin/wgsep", "/usr/libexec", "/usr/share/doc/wgsep", "DIR@"] {
            assert!(!text.contains(place), "{file} names {place}");
        }
    }
    let page = fs::read_to_string(installed.join("share/man/man8/wgsep.8")).unwrap();
    assert!(page.contains("setcap cap_net_admin+ep /opt/wg/sbin/wgsep"), "{page}");
    assert!(page.contains(".Pa /opt/wg/libexec/wgsep/prometheus"), "{page}");

    // The helper finds its dataplane from where it is itself, wherever that is.
    let netns = Netns::new();
    let interface = wgsep_tests::daemon::unique_interface();
    netns.run(format!("{} {interface}", installed.join("sbin/wgsep").display()));
    assert!(uapi::is_answering(&interface));
    netns.run(format!("ip link del {interface}"));
    wait::until("its socket is gone", SERVICE_LIMIT, || !uapi::is_answering(&interface));
}

#[test]
fn completions_know_every_option() {
    let scratch = Scratch::new();
    make(&["install", &format!("DESTDIR={}", scratch.display()), "PREFIX=/p"]);
    let help = run(Command::new(wgsep_program("wgsep")).arg("--help"));
    let options: Vec<_> = help
        .lines()
        .filter(|line| line.starts_with(' ') && line.contains("  "))
        .flat_map(str::split_whitespace)
        .filter(|word| word.starts_with("--") && word.len() > 2)
        .map(|word| word.trim_start_matches('-').trim_end_matches(','))
        .collect();
    assert!(options.len() > 10, "{options:?}");
    for file in [
        "p/share/bash-completion/completions/wgsep",
        "p/share/zsh/site-functions/_wgsep",
        "p/share/fish/vendor_completions.d/wgsep.fish",
    ] {
        let text = fs::read_to_string(scratch.join(file)).unwrap();
        for option in &options {
            assert!(text.contains(option), "{file} does not know --{option}");
        }
    }
    run(Command::new("bash")
        .arg("-n")
        .arg(scratch.join("p/share/bash-completion/completions/wgsep")));
}

#[test]
fn manual_pages_know_every_option_and_are_clean() {
    let pages = ["wgsep.8", "wgsep-sandbox.7", "wgsep-quick.8"]
        .map(|page| repository().join("bin/dist").join(page));
    let help = run(Command::new(wgsep_program("wgsep")).arg("--help"));
    let page = fs::read_to_string(&pages[0]).unwrap();
    for word in help.split_whitespace().filter_map(|word| word.strip_prefix("--")) {
        let flag = format!("Fl -{}", word.trim_end_matches(|end: char| !end.is_alphanumeric()));
        assert!(word.is_empty() || page.contains(&flag), "wgsep(8) does not have {flag}");
    }
    if Command::new("mandoc").arg("-V").output().is_err() {
        return skip("mandoc is missing: run `make deps`");
    }
    for page in pages {
        let lint = output(Command::new("mandoc").args(["-T", "lint", "-W", "warning"]).arg(&page));
        assert!(lint.status.success(), "{}", String::from_utf8_lossy(&lint.stdout));
        let mut man = Command::new("man");
        man.args(["--warnings", "-E", "UTF-8", "-l"]).arg(&page).env("MANWIDTH", "80");
        let rendered = output(&mut man);
        assert!(rendered.status.success(), "{rendered:?}");
        assert!(rendered.stderr.is_empty(), "{}", String::from_utf8_lossy(&rendered.stderr));
    }
}

/// systemd's own judgement of the unit, against SECURITY.md.
#[test]
fn the_unit_is_clean_and_as_little_exposed_as_security_says() {
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        return skip("systemd-analyze is missing");
    }
    let scratch = Scratch::new();
    make(&["install", &format!("DESTDIR={}", scratch.display()), "PREFIX=/usr"]);
    let unit = scratch.join("usr/lib/systemd/system/wgsep@.service");
    // Commands of the system, of which the staged tree has none.
    for command in ["/usr/bin/mkdir", "/bin/sh"] {
        let staged = scratch.join(&command[1..]);
        run(Command::new("install").arg("-D").args([Path::new(command), &staged]));
    }
    let root = format!("--root={}", scratch.display());
    // The targets that it names are systemd's, of which the staged tree has none.
    let checked = output(Command::new("systemd-analyze").args([
        "verify",
        "--man=no",
        "--recursive-errors=no",
        &root,
        "wgsep@wg0.service",
        "wgsep-resolve@wg0.service",
        "wgsep-resolve@wg0.timer",
    ]));
    let complaints = String::from_utf8_lossy(&checked.stderr).into_owned();
    assert!(checked.status.success() && complaints.is_empty(), "{complaints}");

    let mut judge = Command::new("systemd-analyze");
    let judged = output(judge.args(["security", "--offline=true", "--no-pager"]).arg(&unit));
    let judged = String::from_utf8_lossy(&judged.stdout).into_owned();
    let exposure =
        judged.lines().last().unwrap().split_whitespace().find_map(|word| word.parse::<f32>().ok());
    let security = fs::read_to_string(repository().join("SECURITY.md")).unwrap();
    let reported = security.lines().find(|line| line.starts_with("| `wgsep@.service` |"));
    let reported = reported.unwrap().split('|').find_map(|cell| cell.trim().parse::<f32>().ok());
    assert_eq!(exposure, reported, "{judged}");

    // Each point that remains has its reason in SECURITY.md, and nothing else has one.
    let crosses = judged.lines().filter_map(|line| line.strip_prefix("✗ "));
    let mut remaining: Vec<_> =
        crosses.filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect();
    remaining.sort_unstable();
    let (_, table) = security.split_once("| What it counts | Why the unit leaves it |").unwrap();
    let rows = table.lines().skip(2).take_while(|line| line.starts_with("| `"));
    let counted = rows.map(|row| row.replace("\\|", "\0"));
    let counted = counted.map(|row| row.split('|').nth(1).unwrap().replace('\0', "|"));
    let mut reasoned: Vec<_> = counted
        .flat_map(|names| {
            names
                .split(',')
                .map(|name| name.trim().trim_matches('`').to_owned())
                .collect::<Vec<_>>()
        })
        .collect();
    reasoned.sort_unstable();
    assert_eq!(remaining, reasoned);
}

/// The crates of a package, as `cargo tree` has them for a program of it.
fn crates_of(package: &str) -> Vec<String> {
    let mut tree = Command::new("cargo");
    tree.current_dir(repository()).args(["tree", "--locked", "--package", package]);
    let tree = run(tree.args(["--edges", "normal", "--prefix", "none", "--format", "{p}"]));
    let named = tree.lines().filter_map(|line| {
        let mut words = line.split(' ');
        Some(format!("{} {}", words.next()?, words.next()?.trim_start_matches('v')))
    });
    named.collect()
}

#[test]
fn the_bill_of_materials_has_each_crate_of_both_programs_and_no_other() {
    let scratch = Scratch::new();
    make(&["install", &format!("DESTDIR={}", scratch.display()), "PREFIX=/p"]);
    let text = fs::read_to_string(scratch.join("p/share/doc/wgsep/wgsep.cdx.json")).unwrap();
    let bill: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(bill["bomFormat"], "CycloneDX");
    let version = fs::read_to_string(wgsep_program("wgsep").with_file_name("wgsep.version"));
    assert_eq!(bill["metadata"]["component"]["version"], version.unwrap().trim_end());
    let word = |component: &serde_json::Value, key: &str| {
        component[key].as_str().unwrap_or_default().to_owned()
    };
    let components = bill["components"].as_array().unwrap();
    let mut listed: Vec<_> = components
        .iter()
        .map(|component| format!("{} {}", word(component, "name"), word(component, "version")))
        .filter(|listed| !["rust-std ", "glibc "].iter().any(|other| listed.starts_with(other)))
        .collect();
    listed.sort_unstable();
    let mut expected = [crates_of("wgsep"), crates_of("wgsep-dataplane-bin")].concat();
    expected.sort_unstable();
    expected.dedup();
    assert_eq!(listed, expected);
    // What scanners go by, of what comes from crates.io.
    for component in components.iter().filter(|component| !component["hashes"].is_null()) {
        let purl = format!("pkg:cargo/{}@{}", word(component, "name"), word(component, "version"));
        assert_eq!(word(component, "purl"), purl);
    }
    let references: Vec<_> =
        components.iter().map(|component| word(component, "bom-ref")).collect();
    for dependency in bill["dependencies"].as_array().unwrap() {
        for below in dependency["dependsOn"].as_array().unwrap() {
            assert!(references.iter().any(|known| below == known), "{below} is in no component");
        }
    }
}

/// Made at another time, under another umask and in another time zone.
#[test]
fn a_package_of_the_same_programs_has_the_same_bytes() {
    let _stage = machine::stage();
    let scratch = Scratch::new();
    let built = wgsep_program("wgsep");
    let target = built.ancestors().nth(2).unwrap();
    let packages = ["022 UTC", "077 Asia/Tokyo"].map(|surroundings| {
        let (umask, zone) = surroundings.split_once(' ').unwrap();
        let directory = scratch.join(umask);
        let mut make = Command::new("sh");
        make.current_dir(repository()).env("CARGO_TARGET_DIR", target).env_remove("MAKEFLAGS");
        make.env("TZ", zone).arg("-c").arg(format!(
            "umask {umask} && make --no-print-directory --old-file=build deb DEBDIR={}",
            directory.display()
        ));
        run(&mut make);
        // The files of one package must not be as old as those of the other by chance.
        let started = Instant::now();
        wait::until("another second", SERVICE_LIMIT, || started.elapsed().as_secs() > 1);
        let mut files = fs::read_dir(directory).unwrap().map(|file| file.unwrap().path());
        fs::read(files.next().unwrap()).unwrap()
    });
    assert!(packages[0] == packages[1], "they differ; see: make reproducible");
}

/// What it is overruled in has its reason in `bin/dist/deb/lintian-overrides`.
#[test]
fn lintian_finds_no_error_and_no_warning() {
    if Command::new("lintian").arg("--version").output().is_err() {
        return skip("lintian is missing: run `make deps`");
    }
    let scratch = Scratch::new();
    let package = machine::package(&scratch);
    let mut lintian = Command::new("lintian");
    let judged = output(lintian.args(["--allow-root", "--fail-on", "error,warning"]).arg(package));
    assert!(judged.status.success() && judged.stdout.is_empty(), "{judged:?}");
}

/// `wgsep-quick serve` starts what stands behind it, with what the file has to be the only choice.
#[test]
fn the_unit_pins_the_port_and_the_mark_of_its_file() {
    require_root!();
    let script = repository().join("bin/dist/wgsep-quick");
    let line = "mount -t tmpfs none /etc/wireguard && printf %b \"$1\" >/etc/wireguard/wg0.conf && \
                exec \"$2\" serve wg0 /usr/bin/env echo wgsep -f";
    for (interface, arguments) in [
        ("", "--fwmark 0 wg0"),
        ("ListenPort = 0\\nFwMark = off", "--fwmark 0 wg0"),
        ("FwMark = OFF", "--fwmark 0 wg0"),
        ("listenport=51820 # ours", "--listen-port 51820 --fwmark 0 wg0"),
        (
            "ListenPort = 1\\nFwMark = 0xca6c\\nListenPort = 2",
            "--listen-port 2 --fwmark 0xca6c wg0",
        ),
        ("[Peer]\\nAllowedIPs = ::/0", "--fwmark 0xca00/0xffffff00 wg0"),
        ("FwMark = 7\\n[Peer]\\nAllowedIPs = ::/0", "--fwmark 7 wg0"),
        ("Table = 7\\n[Peer]\\nAllowedIPs = ::/0", "--fwmark 0 wg0"),
    ] {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", line, "sh"]);
        let file = format!("[Interface]\\n{interface}\\n[Peer]\\nAllowedIPs = 10.0.0.0/8\\n");
        let started = output(command.arg(file).arg(&script));
        let said = String::from_utf8_lossy(&started.stdout);
        assert_eq!(said.trim(), format!("wgsep -f {arguments}"), "{interface}: {started:?}");
    }
}

/// The other end of the tunnel: a wgsep of this build, outside of the machine.
fn other_end(netns: &Arc<Netns>, key: &KeyPair) -> End {
    let end = End::new(Side::Right, Daemon::start(Wgsep, netns));
    let endpoint = format!("{}:{PORT}", Side::Left.outer(Family::V4)).parse().unwrap();
    end.configure(&key.public, Some(endpoint), None);
    end
}

/// The commands of README that build, install and start.
fn readme_install() -> [String; 3] {
    let commands = readme::block("A server on Debian, in three commands");
    let commands: [String; 3] = commands.try_into().unwrap();
    assert_eq!(commands[0], "make deb");
    commands
}

/// The packages that a line of apt would install, without installing any.
fn would_install(machine: &Machine, line: &str) -> Vec<String> {
    let simulated = machine.run(&line.replacen("apt install", "apt-get install --simulate", 1));
    let packages = simulated.lines().filter_map(|line| line.strip_prefix("Inst "));
    packages.map(|rest| rest.split(' ').next().unwrap().to_owned()).collect()
}

fn is_of_a_kernel(package: &String) -> bool {
    package.starts_with("linux-image") || ["initramfs-tools", "dkms"].contains(&&**package)
}

/// wireguard-tools recommends a kernel with WireGuard, and a container has no package of one.
#[test]
fn a_debian_without_a_kernel_package_gets_none() {
    let Some(image) = Machine::image_or_skips() else { return };
    let (scratch, netns) = (Scratch::new(), Netns::new());
    let package = machine::package(&scratch.join("built"));
    let machine = Machine::boot(&image, &netns, &[(&package, "/mnt/target/wgsep_0_test.deb")]);
    machine.run("dpkg --purge wireguard-tools");
    let control = would_install(&machine, "apt install wireguard-tools");
    assert!(control.iter().any(is_of_a_kernel), "apt knows no kernel: {control:?}");

    let [_, documented, _] = readme_install();
    let plain = documented.replace("--no-install-recommends ", "");
    for line in [documented, plain] {
        let packages = would_install(&machine, &format!("cd /mnt && {line}"));
        for wanted in ["wgsep", "wireguard-tools"] {
            assert!(packages.iter().any(|package| package == wanted), "{line}: {packages:?}");
        }
        assert!(!packages.iter().any(is_of_a_kernel), "{line}: {packages:?}");
    }
}

/// What `git pull`, `make deb` and README's line are to do, from the first packages on, all of which
/// called themselves 0.1.0.
#[test]
fn apt_installs_a_package_of_a_later_commit_over_an_earlier_one() {
    let Some(image) = Machine::image_or_skips() else { return };
    let (scratch, packages, netns) = (Scratch::new(), Scratch::new(), Netns::new());
    // An older one is where the new one goes.
    let built = scratch.join("built");
    fs::create_dir(&built).unwrap();
    let arch = run(Command::new("dpkg").arg("--print-architecture"));
    fs::write(built.join(format!("wgsep_0.1.0_{}.deb", arch.trim_end())), "").unwrap();
    let package = machine::package(&built);

    let earlier = format!("{}~git20200101.093000.fffffff", env!("CARGO_PKG_VERSION"));
    for version in ["0.1.0", &earlier] {
        let tree = scratch.join(version);
        run(Command::new("dpkg-deb").arg("--raw-extract").arg(&package).arg(&tree));
        let edit = format!("s/^Version: .*/Version: {version}/");
        run(Command::new("sed").args(["-i", &edit]).arg(tree.join("DEBIAN/control")));
        let build = ["-Znone", "--build"];
        run(Command::new("dpkg-deb").args(build).arg(&tree).arg(packages.join(version)));
    }
    fs::copy(&package, packages.join("current")).unwrap();

    let machine = Machine::boot(&image, &netns, &[(&packages, "/mnt/packages")]);
    let [_, documented, _] = readme_install();
    let install = |package: &str| {
        // What `make deb` leaves: this package and no other.
        let place = format!("cp /mnt/packages/{package} /mnt/target/wgsep_{package}_test.deb");
        machine.run(&format!("mkdir -p /mnt/target && rm -f /mnt/target/* && {place}"));
        machine.run(&format!("cd /mnt && {documented}"));
        machine.run("dpkg-query --show --showformat '${Version}' wgsep")
    };
    assert_eq!(install("0.1.0"), "0.1.0");
    assert_eq!(install(&earlier), earlier);
    let current = install("current");
    assert_eq!(format!("wgsep {current}"), machine.run("wgsep --version").trim_end());
}

/// The three commands of README on a Debian of its own, and what an operator does after them.
#[test]
fn a_debian_installs_the_package_and_systemd_runs_a_server_of_it() {
    let Some(image) = Machine::image_or_skips() else { return };
    let scratch = Scratch::new();
    let package = machine::package(&scratch.join("built"));
    let (key, (left, right)) = (KeyPair::generate(), link::joined());
    let other = other_end(&right, &key);
    let (inner, theirs) = (Side::Left.inner(Family::V4), Side::Right.inner(Family::V4));
    let configuration = format!(
        "[Interface]\nPrivateKey = {} # ours\nListenPort = {PORT}\nAddress = {inner}/32, fd77::1/128\nMTU = 1400\n\
         \n[Peer]\nPublicKey = {}\nAllowedIPs = {theirs}/32\nEndpoint = {}\n",
        key.private,
        other.key.public,
        other.endpoint(Family::V4)
    );
    let (served, refused) = (scratch.join("wg0.conf"), scratch.join("wg1.conf"));
    write_configuration(&served, &configuration);
    write_configuration(&refused, &format!("{configuration}\n[Interface]\nPostUp = exit 3\n"));
    let files = [
        (&*package, "/mnt/target/wgsep_0_test.deb"),
        (&served, "/etc/wireguard/wg0.conf"),
        (&refused, "/etc/wireguard/wg1.conf"),
    ];
    let machine = Machine::boot(&image, &left, &files);

    let [_, install, enable] = readme_install();
    // Nothing is typed in answer: all that the package depends on is there, and apt adds nothing to it.
    machine.run(&format!("cd /mnt && {install}"));
    assert!(machine.run("getent passwd wgsep").contains("/nologin"));
    machine.run(&enable);
    until_ping(&left, theirs);
    let show =
        |what: &str| machine.run(&format!("systemctl show --value --property {what} wgsep@wg0"));
    assert_eq!(show("StatusText").trim(), "serving wg0");
    assert!(machine.run("ip link show wg0").contains("mtu 1400"));
    let log = machine.run("journalctl --quiet --no-pager --unit wgsep@wg0");
    let version = machine.run("dpkg-query --show --showformat '${Version}' wgsep");
    assert!(log.contains(&format!("started: version {version}, ")), "{version}: {log}");
    // The machine's systemd is older than mseal(2), and its filters refuse what they do not know.
    let known = log.replace("'s sealed-memory degraded(EPERM)", "");
    let known = known.replace("'s sealed-memory unsupported", "");
    assert!(log.contains("; sandbox: "), "{log}");
    assert!(!known.contains("degraded") && !known.contains("unsupported"), "{log}");
    assert!(!log.contains(&key.private), "a key in the log");

    // A member of the group that the package makes sees every peer, without root and without a key.
    let monitored = |occasion: &str| {
        let member = "setpriv --reuid=nobody --regid=wgsep --clear-groups";
        let said = machine.run(&format!("{member} wgsep stats wg0"));
        let peer = format!("peer {}: established", other.key.public);
        assert!(said.contains(&peer) && !said.contains(&key.private), "{occasion}: {said}");
        let file = machine.run("stat -c '%U:%G %a' /run/wireguard/wg0.status");
        assert_eq!(file.trim(), "root:wgsep 660", "{occasion}");
        assert!(!machine.output(&format!("{member} wg show wg0")).status.success());
    };
    monitored("after the start");

    // A peer more, without a restart.
    let added = KeyPair::generate().public;
    write_configuration(
        &served,
        &format!("{configuration}\n[Peer]\nPublicKey = {added}\nAllowedIPs = 198.51.100.0/24\n"),
    );
    machine.run("systemctl reload wgsep@wg0");
    assert!(machine.run("wg show wg0 peers").contains(&added));
    assert!(machine.run("ip route get 198.51.100.1").contains("dev wg0"));
    until_ping(&left, theirs);
    assert_eq!(show("NRestarts").trim(), "0");
    monitored("after a reload");

    // The file's port and mark, and no others.
    for pinned in ["listen-port 51821", "fwmark 7"] {
        let refused = machine.output(&format!("wg set wg0 {pinned}"));
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && said.contains("not permitted"), "{pinned}: {said}");
    }
    machine.run(&format!("wg set wg0 listen-port {PORT} fwmark 0"));
    let log = machine.run("journalctl --quiet --no-pager --output json --unit wgsep@wg0");
    let line = log.lines().find(|line| line.contains("started: version")).unwrap();
    assert!(line.contains(r#""SYSLOG_IDENTIFIER":"wgsep""#), "{line}");

    // Another port is the matter of a restart.
    write_configuration(
        &served,
        &configuration.replace(&format!("ListenPort = {PORT}"), "ListenPort = 51821"),
    );
    assert!(!machine.output("systemctl reload wgsep@wg0").status.success());
    let log = machine.run("journalctl --quiet --no-pager --unit wgsep@wg0");
    assert!(log.contains("takes effect by: systemctl restart wgsep@wg0"), "{log}");
    write_configuration(&served, &configuration);
    until_ping(&left, theirs);

    // A death: systemd begins anew, and the keys come from the file again. systemctl(1) may warn of a process that
    // has ended meanwhile.
    machine.output("systemctl kill --signal KILL wgsep@wg0");
    wait::until("systemd starts it again", SERVICE_LIMIT, || {
        show("NRestarts").trim() == "1" && show("ActiveState").trim() == "active"
    });
    until_ping(&left, theirs);

    // A helper that hangs is noticed, and so is a dataplane.
    machine.run(
        "mkdir -p /run/systemd/system/wgsep@.service.d && printf '[Service]\\nWatchdogSec=1\\n' \
         >/run/systemd/system/wgsep@.service.d/short.conf && systemctl daemon-reload && \
         systemctl restart wgsep@wg0",
    );
    let dataplane =
        "cat /proc/$(systemctl show --value --property MainPID wgsep@wg0)/task/*/children";
    let hang = [
        "systemctl kill --kill-whom main --signal STOP wgsep@wg0".to_owned(),
        format!("kill -STOP $({dataplane})"),
    ];
    for (number, hang) in hang.iter().enumerate() {
        machine.run(hang);
        wait::until("systemd notices that it hangs", SERVICE_LIMIT, || {
            let log = machine.run("journalctl --quiet --no-pager --unit wgsep@wg0");
            log.matches("Watchdog timeout").count() > number
                && show("ActiveState").trim() == "active"
        });
        until_ping(&left, theirs);
    }

    // A death by the filter is no reason for another try.
    let restarts = show("NRestarts");
    machine.run(&format!("kill -SYS $({dataplane})"));
    wait::until("the unit has failed", SERVICE_LIMIT, || show("ActiveState").trim() == "failed");
    assert_eq!((show("ExecMainStatus").trim(), show("NRestarts")), ("76", restarts));
    machine.run("systemctl start wgsep@wg0");
    until_ping(&left, theirs);

    machine.run("systemctl stop wgsep@wg0");
    assert!(!machine.output("ip link show wg0").status.success(), "the interface is still there");
    assert!(!machine.output("test -e /run/wireguard/wg0.sock").status.success());

    // By hand, from the same file.
    let commands = readme::block("With wg(8), by hand:");
    let (end, begin) = commands.split_last().unwrap();
    for command in begin {
        machine.run(command);
    }
    assert!(machine.run("wg show wg0").contains(&other.key.public));
    assert!(machine.run("ip -o link show wg0").contains("UP"));
    machine.run(end);
    wait::until("its socket is gone", SERVICE_LIMIT, || {
        !machine.output("test -e /run/wireguard/wg0.sock").status.success()
    });

    // What cannot be done is not done by half.
    assert!(!machine.output("systemctl start wgsep@wg1").status.success());
    let log =
        machine.run("journalctl --quiet --no-pager --unit wgsep@wg1; systemctl stop wgsep@wg1");
    assert!(log.contains("line 13: PostUp = exit 3: the hook ended with status 3"), "{log}");
    assert!(!machine.output("ip link show wg1").status.success());

    machine.run("dpkg --remove wgsep");
    assert!(!machine.output("test -e /usr/sbin/wgsep").status.success());
}

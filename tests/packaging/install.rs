//! What `make install` leaves under the umask of a careful administrator, and that it runs where cron does.

use std::fs;
use std::path::Path;
use std::process::Command;

use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::netns::Netns;
use wgsep_tests::process::run;
use wgsep_tests::scratch::Scratch;
use wgsep_tests::{manual, repository, require};

/// Installs the programs as they are under a prefix, without building them.
fn install(umask: &str, prefix: &Path) {
    let built = wgsep_program("wgsep");
    let mut make = Command::new("sh");
    make.current_dir(repository()).arg("-c").arg(format!(
        "umask {umask} && exec make --no-print-directory --old-file=build install PREFIX={}",
        prefix.display()
    ));
    make.env("CARGO_TARGET_DIR", built.ancestors().nth(2).unwrap());
    run(make.env("WGSEP_BIN_DIR", built.parent().unwrap()).env_remove("MAKEFLAGS"));
}

/// Every file and directory of an installation, with its permissions.
fn modes(prefix: &Path) -> Vec<String> {
    let listing =
        run(Command::new("find").arg(prefix).args(["-mindepth", "1", "-printf", "%P %m\n"]));
    let mut modes: Vec<_> = listing.lines().map(str::to_owned).collect();
    modes.sort();
    modes
}

#[test]
fn the_modes_of_what_is_installed_do_not_depend_on_the_umask() {
    require!(Wgsep);
    let scratch = Scratch::new();
    let [usual, strict] = ["usual", "strict"].map(|name| scratch.join(name));
    install("022", &usual);
    let expected = modes(&usual);
    assert!(expected.contains(&"lib/systemd/system/wgsep@.service 644".to_owned()), "{expected:?}");
    assert!(
        expected.contains(&"share/doc/wgsep/LICENCES-OF-CRATES 644".to_owned()),
        "{expected:?}"
    );
    install("077", &strict);
    assert_eq!(modes(&strict), expected);
    // Over an installation that was spoilt.
    run(Command::new("find").arg(&strict).args(["-type", "f", "-exec", "chmod", "600", "{}", "+"]));
    install("022", &strict);
    assert_eq!(modes(&strict), expected);
}

/// sudo(8) drops the variable from the environment, so that a line for a shell has it behind `sudo`.
#[test]
fn wherever_a_command_has_the_variable_of_wg_quick_it_follows_sudo() {
    require!(Wgsep);
    let repository = repository();
    let documents = ["README.md", "SECURITY.md", "bin/dist/wgsep.8"];
    let read = |name: &str| fs::read_to_string(repository.join(name)).unwrap();
    let mut texts: Vec<_> = documents.iter().map(|name| read(name)).collect();
    texts.push(run(Command::new(wgsep_program("wgsep")).arg("--help")));
    let command = "WG_QUICK_USERSPACE_IMPLEMENTATION=wgsep wg-quick";
    for line in texts.iter().flat_map(|text| text.lines()).filter(|line| line.contains(command)) {
        assert!(line.contains(&format!("sudo {command} up wg0")), "{line}");
    }
    assert_eq!(texts.iter().filter(|text| text.contains(command)).count(), 2);
}

/// wgsep(8)'s line, as cron runs it: with neither sbin nor anything else of a shell's environment.
#[test]
fn the_line_of_the_manual_for_cron_writes_samples() {
    require!(Wgsep);
    let (scratch, netns) = (Scratch::new(), Netns::new());
    install("022", &scratch);
    let daemon = Daemon::start(Wgsep, &netns);
    let block = manual::block("/etc/cron.d/wgsep");
    let [line] = &block[..] else { panic!("{block:?}") };
    let line = line.strip_prefix("* * * * * root ").unwrap();
    let line = line
        .replace("/usr/libexec", &scratch.join("libexec").display().to_string())
        .replace("/var/lib/prometheus/node-exporter", &scratch.display().to_string())
        .replace("wg0", &daemon.interface);
    let mut cron = netns.command("/bin/sh");
    cron.current_dir("/root").arg("-c").arg(line).env_clear();
    run(cron.env("PATH", "/usr/bin:/bin").env("HOME", "/root").env("SHELL", "/bin/sh"));
    let text = fs::read_to_string(scratch.join("wgsep.prom")).unwrap();
    let up = format!("wgsep_up{{interface=\"{}\"}} 1", daemon.interface);
    assert!(text.lines().any(|line| line == up), "{text}");
}

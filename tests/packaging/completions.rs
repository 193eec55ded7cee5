//! What TAB offers, in the shells themselves.

use std::path::PathBuf;
use std::process::Command;

use wgsep_tests::process::run;
use wgsep_tests::repository;
use wgsep_tests::require_root;
use wgsep_tests::scratch::Scratch;
use wgsep_tests::skip::skip;

/// A daemon that runs, one that does not, and a namespace, where the completions look.
const FILES: &str = "mount -t tmpfs none /run; mkdir -p /run/wireguard /run/netns /etc/wireguard
    mount -t tmpfs none /etc/wireguard
    mkdir /run/wgsep-quick; touch /run/wgsep-quick/lan9.conf
    touch /run/wireguard/wg7.sock /run/netns/blue /etc/wireguard/wg7.conf /etc/wireguard/wg8.conf";

/// Ends of lines, what is offered there, and what is not.
const LINES: [(&str, &[&str], &[&str]); 11] = [
    ("wgsep ", &["audit", "stats", "watch", "wg8"], &["wg7"]),
    ("wgsep audit ", &["wg7"], &["wg8", "stats"]),
    ("wgsep stats --", &["--json", "--prometheus", "--watch"], &["--foreground"]),
    ("wgsep watch ", &["wg7"], &["wg8", "audit"]),
    (
        "wgsep --",
        &["--foreground", "--listen-port", "--log-level", "--without", "--status-group"],
        &["--disable-drop-privileges", "--tun-fd", "--uapi-fd", "--json", "--threads"],
    ),
    ("wgsep --tun-netns ", &["blue"], &[]),
    ("wgsep --sandbox=", &["strict", "report"], &[]),
    ("wgsep-quick ", &["up", "down", "reload", "save", "strip"], &["serve", "apply", "wg7"]),
    ("wgsep-quick up ", &["wg8"], &["wg7", "down"]),
    ("wgsep-quick down ", &["wg7", "lan9"], &["wg8", "up"]),
    ("wgsep-quick reload ", &["wg7"], &["wg8", "lan9"]),
];

fn completions() -> PathBuf {
    repository().join("bin/dist/completions")
}

/// Runs a program of a shell on each line and looks at what it prints.
fn check(shell: &str, program: &str) {
    if Command::new(shell).arg("-c").arg("true").output().is_err() {
        return skip(&format!("{shell} is missing: run `make deps`"));
    }
    let scratch = Scratch::new();
    for (line, offered, kept) in LINES {
        let script = format!("{FILES}\nexec {shell} -c \"$1\" \"$2\" \"$3\"");
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-ec", &script, "sh"]);
        let program = program.replace("DIR", &completions().display().to_string());
        command.args([&program, shell, line]).env("HOME", &*scratch).env("LINE", line);
        command.env("OFFERED", offered.join(" "));
        let said = run(command.env("TERM", "dumb"));
        let words: Vec<_> = said.split(|c: char| c.is_whitespace() || c.is_control()).collect();
        for word in offered {
            assert!(words.contains(word), "{shell}: {line:?} does not offer {word}: {said}");
        }
        for word in kept {
            assert!(!words.contains(word), "{shell}: {line:?} offers {word}: {said}");
        }
    }
}

#[test]
fn bash_offers_interfaces_and_the_options_of_the_help() {
    require_root!();
    // As readline splits a line, which is at `=` too.
    check(
        "bash",
        r#". DIR/wgsep.bash; . DIR/wgsep-quick.bash; read -ra COMP_WORDS <<<"${LINE//=/ = }"
        [[ $LINE != *[\ =] ]] || COMP_WORDS+=('')
        COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); $(complete -p ${COMP_WORDS[0]} | grep -o '_wgsep[a-z_]*'); printf '%s\n' "${COMPREPLY[@]}""#,
    );
}

#[test]
fn fish_offers_interfaces_and_the_options_of_the_help() {
    require_root!();
    // It answers with whole words, of which an option's value is the end.
    check(
        "fish",
        r#"source DIR/wgsep.fish; source DIR/wgsep-quick.fish; complete -C "$LINE" | cut -f1 | string replace -r '^--sandbox=' ''; true"#,
    );
}

/// zsh completes only what is typed, so it is typed into a terminal.
#[test]
fn zsh_offers_interfaces_and_the_options_of_the_help() {
    require_root!();
    check(
        "zsh",
        r#"zmodload zsh/zpty; zpty shell zsh -f -i
        zpty -w shell "PS1= RPS1=; stty cols 500; fpath=(DIR \$fpath); autoload -Uz compinit; compinit -D -u; LISTMAX=0; echo is-ready"
        zpty -r -m shell shown '*is-ready*is-ready*'
        zpty -w -n shell "$LINE"$'\t\t'
        for try in {1..100}; do
            while zpty -r -t shell part; do print -rn -- "$part"; shown+=$part; done
            is_shown=1; for word in ${=OFFERED}; do [[ ${shown#*is-ready*is-ready} == *$word* ]] || is_shown=0; done
            (( is_shown )) && break; sleep 0.1
        done"#,
    );
}

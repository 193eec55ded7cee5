//! Every error line of both programs names the cause and, behind a semicolon, the remedy.
//!
//! The source is searched for the texts that become errors or warnings. A text that names a step of the
//! start gets the kernel's reason and a remedy by its errno; every other has its own, or is part of a line
//! that has, and then it is in the table of parts.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use syn::punctuated::Punctuated;
use syn::visit::Visit;
use syn::{Attribute, Expr, Lit, Macro, Token};
use wgsep_tests::process::run;
use wgsep_tests::repository;

/// Whose errors an operator reads.
const CRATES: [&str; 9] = [
    "bin/wgsep",
    "bin/wgsep-dataplane",
    "privileged/monitor",
    "privileged/launch",
    "privileged/host",
    "privileged/journal",
    "policy",
    "ipc",
    "dataplane",
];

/// Calls and methods that make an error of their arguments,
const CALLS: [&str; 5] = ["Err", "Error::new", "End::Failed", "print_error", "violation"];
const METHODS: [&str; 3] = ["ok_or", "ok_or_else", "map_err"];
/// and those that are given the name of a step. (`advise` is given one and lines.)
const STEPS: [&str; 6] = ["required", "step", "Refused", "refused", "no_thread", "with_reason"];

/// Lines that have a part of elsewhere.
const UAPI: &str = "dataplane's `UAPI line N: …; nothing changed`: it says what the line has to be";
const BREACH: &str = "helper's `the dataplane broke the contract and was killed: …`";
const AUDIT: &str = "the audit's table, where a finding has a remedy of its own";

/// What stands in a line of another place, which has the remedy; and where that is.
const PARTS: [(&str, &str); 43] = [
    ("--listen-address {address} {wrong}", "each of the reasons that stand for `wrong`"),
    (
        "receive from the other dataplane: {}",
        "why a hand-over failed, before `; going on with it` or `; the old daemon goes on …`",
    ),
    (
        "send to the other dataplane: {}",
        "why a hand-over failed, before `; going on with it` or `; the old daemon goes on …`",
    ),
    (
        "the other dataplane is gone",
        "why a hand-over failed, before `; going on with it` or `; the old daemon goes on …`",
    ),
    (
        "the other dataplane reads nothing",
        "why a hand-over failed, before `; going on with it` or `; the old daemon goes on …`",
    ),
    (
        "the other dataplane says nothing",
        "why a hand-over failed, before `; going on with it` or `; the old daemon goes on …`",
    ),
    (
        "the other dataplane says something else than expected",
        "why a hand-over failed, before `; going on with it` or `; the old daemon goes on …`",
    ),
    (", ", "between the members of a list"),
    ("{line}", "the line of an error, as it is"),
    (
        "allow this user to open the device: its mode, a mount without nodev, DeviceAllow= of a unit, --device of a container",
        "helper's `no permission to open …; …`",
    ),
    (
        "{text:?} is not a 32-bit number, such as 51820 or 0xca6c",
        "clap's line about an option, which ends with `wgsep --help`",
    ),
    (
        "UAPI set refused, nothing changed: {line}",
        "before the line of control/port.rs, which has the remedy",
    ),
    ("instances", "part of a name, in the line of `inotify_limit`"),
    ("watches", "part of a name, in the line of `inotify_limit`"),
    ("a flood of requests", BREACH),
    ("Pong without a ping", BREACH),
    ("a second LockedDown", BREACH),
    ("it closed its channel or its log", BREACH),
    ("it does not read its replies", BREACH),
    ("{} is not permitted now", BREACH),
    ("a get takes no more lines", UAPI),
    ("a transaction starts with get=1, get=statistics or set=1", UAPI),
    ("a transaction starts with set=1", UAPI),
    ("a peer without preshared_key", UAPI),
    ("no public_key before it", UAPI),
    ("only preshared keys of peers are set here", UAPI),
    ("fwmark is a 32-bit number", UAPI),
    ("listen_port is 0 to 65535", UAPI),
    ("no interface has the endpoint's scope", UAPI),
    ("no such key for a peer", UAPI),
    ("no such key for the device", UAPI),
    ("not of the form key=value", UAPI),
    ("not text", UAPI),
    ("persistent_keepalive_interval is 0 to 65535", UAPI),
    ("the only protocol_version is 1", UAPI),
    ("the only value is true", UAPI),
    ("cannot be determined for a process of root's", AUDIT),
    ("{path}: {reason}", AUDIT),
    ("longer than {MAX_LEN} bytes", AUDIT),
    ("no regular file", AUDIT),
    ("uid {owner}'s", AUDIT),
    ("{}: {error}", AUDIT),
    ("{}: {}", AUDIT),
];

/// What a text becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// An error.
    Line,
    /// The step that an error names.
    Step,
}

/// The texts of errors in one file.
#[derive(Default)]
struct Texts {
    found: BTreeSet<(Kind, String)>,
    /// What the innermost call around this place makes.
    inside: Option<Kind>,
}

impl Texts {
    fn within(&mut self, kind: Kind, visit: impl FnOnce(&mut Self)) {
        let before = self.inside.replace(kind);
        visit(self);
        self.inside = before;
    }
}

fn kind(name: &str, lines: &[&str]) -> Option<Kind> {
    if STEPS.contains(&name) {
        Some(Kind::Step)
    } else {
        lines.contains(&name).then_some(Kind::Line)
    }
}

fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|one| {
        one.path().is_ident("cfg")
            && one.parse_args::<syn::Ident>().is_ok_and(|word| word == "test")
    })
}

/// The last two words of a path, as in `Error::new`; one if there is one.
fn words(path: &syn::Path) -> String {
    let words: Vec<_> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
    words[words.len().saturating_sub(2)..].join("::")
}

impl<'ast> Visit<'ast> for Texts {
    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        if !is_test(&module.attrs) {
            syn::visit::visit_item_mod(self, module);
        }
    }

    fn visit_attribute(&mut self, _: &'ast Attribute) {}

    fn visit_lit(&mut self, literal: &'ast Lit) {
        if let (Lit::Str(text), Some(kind)) = (literal, self.inside) {
            self.found.insert((kind, text.value()));
        }
    }

    fn visit_expr_call(&mut self, call: &'ast syn::ExprCall) {
        let kind = match &*call.func {
            Expr::Path(path) => kind(&words(&path.path), &CALLS),
            _ => None,
        };
        match kind {
            Some(kind) => self.within(kind, |texts| syn::visit::visit_expr_call(texts, call)),
            None => syn::visit::visit_expr_call(self, call),
        }
    }

    fn visit_expr_method_call(&mut self, call: &'ast syn::ExprMethodCall) {
        self.visit_expr(&call.receiver);
        if call.method == "advise" {
            let kinds = [Kind::Step, Kind::Line];
            for (kind, argument) in kinds.into_iter().zip(&call.args) {
                self.within(kind, |texts| texts.visit_expr(argument));
            }
            return;
        }
        let visit = |texts: &mut Self| call.args.iter().for_each(|one| texts.visit_expr(one));
        match kind(&call.method.to_string(), &METHODS) {
            Some(kind) => self.within(kind, visit),
            None => visit(self),
        }
    }

    fn visit_expr_struct(&mut self, made: &'ast syn::ExprStruct) {
        match kind(&words(&made.path), &[]) {
            Some(kind) => self.within(kind, |texts| syn::visit::visit_expr_struct(texts, made)),
            None => syn::visit::visit_expr_struct(self, made),
        }
    }

    fn visit_macro(&mut self, called: &'ast Macro) {
        let parsed = called.parse_body_with(Punctuated::<Expr, Token![,]>::parse_terminated);
        let Ok(arguments) = parsed else { return };
        let visit = |texts: &mut Self| arguments.iter().for_each(|one| texts.visit_expr(one));
        match kind(&words(&called.path), &["tracing::error", "tracing::warn"]) {
            Some(kind) => self.within(kind, visit),
            None => visit(self),
        }
    }
}

/// Every text, by kind.
fn texts() -> BTreeSet<(Kind, String)> {
    let mut texts = Texts::default();
    for directory in CRATES {
        let directory = repository().join(directory).join("src");
        let sources = run(Command::new("find").arg(&directory).args(["-name", "*.rs"]));
        for source in sources.lines().filter(|source| !source.ends_with("/tests.rs")) {
            texts.visit_file(&syn::parse_file(&fs::read_to_string(source).unwrap()).unwrap());
        }
    }
    texts.found
}

#[test]
fn every_error_line_names_a_remedy() {
    let texts = texts();
    assert!(texts.len() > 150, "only {} texts were found: the search is blind", texts.len());
    let parts: BTreeSet<_> = PARTS.iter().map(|(part, _)| *part).collect();
    let lines = || texts.iter().filter(|(kind, _)| *kind == Kind::Line).map(|(_, text)| &**text);
    let bare: Vec<_> =
        lines().filter(|line| !line.contains("; ") && !parts.contains(line)).collect();
    assert!(
        bare.is_empty(),
        "these say what is wrong, but not what to do about it; add that behind a semicolon, or if another \
         line has it add them to PARTS: {bare:#?}"
    );
    let stale: Vec<_> = parts.iter().filter(|part| !lines().any(|line| line == **part)).collect();
    assert!(stale.is_empty(), "no source has these any more: {stale:#?}");
}

#[test]
fn the_search_finds_texts_wherever_they_become_errors() {
    let mut texts = Texts::default();
    texts.visit_file(
        &syn::parse_file(
            r#"
            fn f() {
                let _ = call().step("a");
                let _ = call().advise("f", &[(known, &format!("g"))]);
                return Err(Error::new(format!("b {}", c)));
                tracing::error!("c {d}");
                x.map_err(|e| format!("d {e}"));
                let _ = format!("not this");
                Refused { step: "e", reason }
            }
            #[cfg(test)]
            mod tests { fn g() { Err("nor this") } }
            "#,
        )
        .unwrap(),
    );
    let found: Vec<_> = texts.found.iter().map(|(kind, text)| (*kind, &**text)).collect();
    let (line, step) = (Kind::Line, Kind::Step);
    assert_eq!(
        found,
        [
            (line, "b {}"),
            (line, "c {d}"),
            (line, "d {e}"),
            (line, "g"),
            (step, "a"),
            (step, "e"),
            (step, "f")
        ]
    );
}

//! Every field that holds key material is of a type that checks where it is (see `wgsep_proto::secret`).

use std::fs;
use std::process::Command;

use syn::visit::{self, Visit};
use syn::{Field, ItemEnum, ItemMod, ItemStruct, Type};
use wgsep_tests::process::run;
use wgsep_tests::repository;

/// Types of other crates that hold key material and do not check where it is.
const RAW: [&str; 9] = [
    "Zeroizing",
    "StaticSecret",
    "EphemeralSecret",
    "SharedSecret",
    "LessSafeKey",
    "UnboundKey",
    "ChaCha20Poly1305",
    "XChaCha20Poly1305",
    // The crate of the AEAD, whose only type of that kind is its key.
    "wgsep_aead",
];

/// Fields with 32 bytes that are no secret, or whose owner checks where they are.
const EXCEPTIONS: [(&str, &str); 7] = [
    ("PublicKey", "a public key"),
    ("RemotePoint", "a public key"),
    ("Initiation", "a message on the wire"),
    ("Response", "a message on the wire"),
    ("CookieChecker", "mac1_key and cookie_key, which are hashes of a public key"),
    ("CookieGenerator", "mac1_key and cookie_key, which are hashes of a public key"),
    ("Secret", "checks where it is"),
];

/// Finds the types of a file that have key material in a field that does not check it.
#[derive(Default)]
struct Finder {
    owner: String,
    unchecked: Vec<String>,
}

impl<'ast> Visit<'ast> for Finder {
    fn visit_item_mod(&mut self, module: &'ast ItemMod) {
        if module.ident != "tests" {
            visit::visit_item_mod(self, module);
        }
    }

    fn visit_item_struct(&mut self, item: &'ast ItemStruct) {
        self.owner = item.ident.to_string();
        visit::visit_item_struct(self, item);
    }

    fn visit_item_enum(&mut self, item: &'ast ItemEnum) {
        self.owner = item.ident.to_string();
        visit::visit_item_enum(self, item);
    }

    fn visit_field(&mut self, field: &'ast Field) {
        if !EXCEPTIONS.iter().any(|(owner, _)| *owner == self.owner) && is_unchecked(&field.ty) {
            self.unchecked.push(self.owner.clone());
        }
    }
}

/// Whether a type has key material, or 32 bytes that may be, outside a `Secret`.
fn is_unchecked(written: &Type) -> bool {
    struct Types(bool);
    impl<'ast> Visit<'ast> for Types {
        fn visit_path_segment(&mut self, segment: &'ast syn::PathSegment) {
            if segment.ident == "Secret" {
                return;
            }
            self.0 |= RAW.iter().any(|raw| segment.ident == raw);
            visit::visit_path_segment(self, segment);
        }

        fn visit_type_array(&mut self, array: &'ast syn::TypeArray) {
            let len = match &array.len {
                syn::Expr::Lit(literal) => {
                    matches!(&literal.lit, syn::Lit::Int(int) if int.base10_digits() == "32")
                }
                syn::Expr::Path(path) => {
                    ["KEY_LEN", "HASH_LEN"].iter().any(|name| path.path.is_ident(name))
                }
                _ => false,
            };
            self.0 |= len;
        }
    }
    let mut types = Types(false);
    types.visit_type(written);
    types.0
}

fn unchecked_in(source: &str) -> Vec<String> {
    let mut finder = Finder::default();
    finder.visit_file(&syn::parse_file(source).unwrap());
    finder.unchecked
}

#[test]
fn every_field_with_key_material_checks_where_it_is() {
    let mut list = Command::new("git");
    list.current_dir(repository()).args([
        "ls-files",
        "dataplane/src/*.rs",
        "dataplane/proto/src/*.rs",
    ]);
    let files = run(&mut list);
    assert!(files.lines().count() > 60, "{files}");
    for file in files.lines() {
        // Removed, and not yet committed.
        let Ok(source) = fs::read_to_string(repository().join(file)) else { continue };
        let unchecked = unchecked_in(&source);
        assert!(
            unchecked.is_empty(),
            "{file}: {unchecked:?}: put key material in a wgsep_proto::secret::Secret"
        );
    }
}

#[test]
fn a_field_that_does_not_check_is_found_in_each_form() {
    for field in [
        "key: [u8; 32]",
        "key: Option<[u8; KEY_LEN]>",
        "text: Zeroizing<Vec<u8>>",
        "private: x25519_dalek::StaticSecret",
        "keys: Vec<LessSafeKey>",
        "sending: wgsep_aead::Key",
    ] {
        assert_eq!(unchecked_in(&format!("struct Holder {{ {field} }}")), ["Holder"], "{field}");
        let (_, written) = field.split_once(": ").unwrap();
        assert_eq!(
            unchecked_in(&format!("enum Holder {{ One({written}) }}")),
            ["Holder"],
            "{field}"
        );
    }
    for field in [
        "key: Secret<[u8; 32]>",
        "key: Secret",
        "sending: Secret<wgsep_aead::Key>",
        "cookie: [u8; 16]",
        "text: Vec<u8>",
    ] {
        assert_eq!(unchecked_in(&format!("struct Holder {{ {field} }}")), [""; 0], "{field}");
    }
}

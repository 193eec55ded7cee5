//! The public interface of wgsep-proto, which is what its version promises: every public item, without
//! its body, as it was when somebody last looked at it and found the version right.
//!
//! cargo-semver-checks and cargo-public-api need a nightly rustdoc; this needs the source. It sees the
//! types that are written, not those that are inferred, and no automatic traits.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use syn::{Attribute, Fields, ImplItem, Item, Type, UseTree, Visibility};
use wgsep_tests::repository;

/// Set to write the listing anew.
const ACCEPT: &str = "WGSEP_ACCEPT_API";

fn library() -> PathBuf {
    repository().join("dataplane/proto")
}

const fn is_public(visibility: &Visibility) -> bool {
    matches!(visibility, Visibility::Public(_))
}

/// Attributes that a user of the item notices.
fn keep_noticed(attributes: &mut Vec<Attribute>) {
    let noticed = ["cfg_attr", "derive", "must_use", "non_exhaustive", "repr"];
    attributes.retain(|one| noticed.iter().any(|name| one.path().is_ident(name)));
}

fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|one| {
        one.path().is_ident("cfg")
            && one.parse_args::<syn::Ident>().is_ok_and(|word| word == "test")
    })
}

/// Whether an item is there only with a feature.
fn is_of_a_feature(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|one| {
        one.path().is_ident("cfg")
            && one
                .parse_args::<syn::MetaNameValue>()
                .is_ok_and(|condition| condition.path.is_ident("feature"))
    })
}

fn keep_public_fields(fields: &mut Fields) {
    match fields {
        Fields::Named(named) => {
            let kept = named.named.iter().filter(|field| is_public(&field.vis)).cloned();
            named.named = kept.collect();
            for field in &mut named.named {
                keep_noticed(&mut field.attrs);
            }
        }
        // A private field keeps its place, as its type is part of nothing.
        Fields::Unnamed(unnamed) => {
            for field in &mut unnamed.unnamed {
                if !is_public(&field.vis) {
                    field.ty = syn::parse_str("_").unwrap();
                }
            }
        }
        Fields::Unit => {}
    }
}

/// The public part of an item, without bodies; `None` if there is none.
fn public_part(mut item: Item) -> Option<Item> {
    let nothing = || syn::parse_str("{}").unwrap();
    match &mut item {
        Item::Fn(one) if is_public(&one.vis) => {
            keep_noticed(&mut one.attrs);
            *one.block = nothing();
        }
        Item::Struct(one) if is_public(&one.vis) => {
            keep_noticed(&mut one.attrs);
            keep_public_fields(&mut one.fields);
        }
        Item::Enum(one) if is_public(&one.vis) => {
            keep_noticed(&mut one.attrs);
            for variant in &mut one.variants {
                keep_noticed(&mut variant.attrs);
                if let Fields::Named(named) = &mut variant.fields {
                    named.named.iter_mut().for_each(|field| keep_noticed(&mut field.attrs));
                }
            }
        }
        Item::Trait(one) if is_public(&one.vis) => {
            keep_noticed(&mut one.attrs);
            for item in &mut one.items {
                if let syn::TraitItem::Fn(function) = item {
                    keep_noticed(&mut function.attrs);
                    function.default = function.default.as_ref().map(|_| nothing());
                }
            }
        }
        Item::Const(one) if is_public(&one.vis) => keep_noticed(&mut one.attrs),
        Item::Type(one) if is_public(&one.vis) => keep_noticed(&mut one.attrs),
        Item::Use(one) if is_public(&one.vis) => keep_noticed(&mut one.attrs),
        Item::Impl(one) if one.trait_.is_some() => {
            one.attrs.clear();
            one.items.retain(|item| matches!(item, ImplItem::Type(_)));
        }
        Item::Impl(one) => {
            one.attrs.clear();
            one.items.retain_mut(|item| match item {
                ImplItem::Fn(function) if is_of_a_feature(&function.attrs) => false,
                ImplItem::Fn(function) if is_public(&function.vis) => {
                    keep_noticed(&mut function.attrs);
                    function.block = nothing();
                    true
                }
                ImplItem::Const(constant) => {
                    keep_noticed(&mut constant.attrs);
                    is_public(&constant.vis)
                }
                _ => false,
            });
            if one.items.is_empty() {
                return None;
            }
        }
        _ => return None,
    }
    Some(item)
}

fn printed(items: Vec<Item>) -> String {
    let mut file = syn::parse_file("").unwrap();
    file.items = items;
    prettyplease::unparse(&file)
}

/// The name of what an item defines, or implements something for.
fn name(item: &Item) -> Option<String> {
    let identifier = match item {
        Item::Fn(one) => &one.sig.ident,
        Item::Struct(one) => &one.ident,
        Item::Enum(one) => &one.ident,
        Item::Trait(one) => &one.ident,
        Item::Const(one) => &one.ident,
        Item::Type(one) => &one.ident,
        Item::Impl(one) => match &*one.self_ty {
            Type::Path(path) => &path.path.segments.last()?.ident,
            _ => return None,
        },
        _ => return None,
    };
    Some(identifier.to_string())
}

fn used_names(tree: &UseTree, names: &mut BTreeSet<String>) {
    match tree {
        UseTree::Path(path) => used_names(&path.tree, names),
        UseTree::Name(one) => {
            names.insert(one.ident.to_string());
        }
        UseTree::Rename(one) => {
            names.insert(one.ident.to_string());
        }
        UseTree::Group(group) => group.items.iter().for_each(|one| used_names(one, names)),
        UseTree::Glob(_) => {}
    }
}

/// Reads a module and those below it into `listing`. Of a private one what counts is that which it
/// implements for its parent's types, and what its parent exports.
fn list(file: &Path, path: &str, of_parent: Option<&BTreeSet<String>>, listing: &mut String) {
    let parsed = syn::parse_file(&fs::read_to_string(file).unwrap()).unwrap();
    let mut known: BTreeSet<_> = parsed.items.iter().filter_map(name).collect();
    for item in &parsed.items {
        if let Item::Use(one) = item {
            used_names(&one.tree, &mut known);
        }
    }
    let mut modules = Vec::new();
    let mut items = Vec::new();
    for item in parsed.items {
        match item {
            // Public with a feature whose parts any release may change.
            Item::Mod(module) if is_of_a_feature(&module.attrs) => {}
            Item::Mod(module) if module.content.is_none() && !is_test(&module.attrs) => {
                modules.push((module.ident.to_string(), is_public(&module.vis)));
            }
            item => {
                let counts = |item: &Item| match of_parent {
                    Some(known) => name(item).is_some_and(|name| known.contains(&name)),
                    None => true,
                };
                items.extend(public_part(item).filter(counts));
            }
        }
    }
    if !items.is_empty() {
        listing.push_str(&format!("// {path}\n{}\n", printed(items)));
    }
    let stem = file.file_stem().unwrap().to_string_lossy().into_owned();
    let directory = file.parent().unwrap();
    let below =
        if stem == "lib" || stem == "mod" { directory.into() } else { directory.join(stem) };
    let known = match of_parent {
        Some(outer) => known.intersection(outer).cloned().collect(),
        None => known,
    };
    for (module, public) in modules {
        let file = [format!("{module}.rs"), format!("{module}/mod.rs")]
            .map(|candidate| below.join(candidate))
            .into_iter()
            .find(|candidate| candidate.exists())
            .unwrap();
        let of_parent = if public { of_parent } else { Some(&known) };
        list(&file, &format!("{path}::{module}"), of_parent, listing);
    }
}

#[test]
fn the_public_interface_is_the_one_that_the_version_promises() {
    let mut listing =
        "// Every public item of wgsep-proto, written by tests/meta/api.rs.\n\n".to_owned();
    list(&library().join("src/lib.rs"), "wgsep_proto", None, &mut listing);
    let place = library().join("api.txt");
    if std::env::var_os(ACCEPT).is_some() {
        fs::write(&place, &listing).unwrap();
    }
    let promised = fs::read_to_string(&place).unwrap_or_default();
    let [is, was] = [&listing, &promised].map(|text| text.lines().collect::<BTreeSet<_>>());
    let gone: Vec<_> = was.difference(&is).collect();
    let new: Vec<_> = is.difference(&was).collect();
    assert!(
        listing == promised,
        "wgsep-proto's public interface changed. What is gone or different breaks its users, and \
         takes a new major version (before 1.0, a new minor one); see to CHANGELOG.md and the version, then: \
         {ACCEPT}=1 cargo test -p wgsep-tests --test meta api::\ngone: {gone:#?}\nnew: {new:#?}"
    );
}

#[test]
fn the_listing_sees_what_is_public_and_nothing_else() {
    let part = |text: &str| {
        let item = public_part(syn::parse_str(text).unwrap())?;
        Some(printed(vec![item]))
    };
    assert_eq!(part("pub fn f(x: u8) -> u8 { x + 1 }").unwrap(), "pub fn f(x: u8) -> u8 {}\n");
    assert_eq!(part("pub(crate) fn f() {}"), None);
    assert_eq!(part("impl S { fn f() {} }"), None);
    assert_eq!(
        part("#[derive(Clone)] #[allow(x)] pub struct S { pub a: u8, b: u8 }").unwrap(),
        "#[derive(Clone)]\npub struct S {\n    pub a: u8,\n}\n"
    );
    assert_eq!(part("pub struct S(u8);").unwrap(), "pub struct S(_);\n");
    assert_eq!(
        part("impl S { pub const A: u8 = 1; pub fn f(&self) { loop {} } fn g() {} }").unwrap(),
        "impl S {\n    pub const A: u8 = 1;\n    pub fn f(&self) {}\n}\n"
    );
}

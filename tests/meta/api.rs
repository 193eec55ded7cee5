//! The public interface of wgsep-proto, which is what its version promises: every public item, without
//! its body, as it was when somebody last looked at it and found the version right.
//!
//! cargo-semver-checks and cargo-public-api read the JSON of rustdoc, whose format changes with the compiler; this needs the
//! source. It sees the types that are written, not those that are inferred. Of a macro that defines public items it
//! has the definition and what it is called with. What it cannot see in the source, the automatic traits, the compiler says.

use std::collections::BTreeSet;
use std::fs;
use std::marker::PhantomData;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::path::{Path, PathBuf};
use std::process::Command;

use proc_macro2::{Group, TokenStream, TokenTree};
use syn::{Attribute, Fields, ImplItem, Item, Type, UseTree, Visibility};
use wgsep_proto as api;
use wgsep_tests::process::output;
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

/// Tokens without documentation.
fn undocumented(tokens: TokenStream) -> TokenStream {
    let mut kept: Vec<TokenTree> = Vec::new();
    for token in tokens {
        let is_doc = |group: &Group| matches!(group.stream().into_iter().next(), Some(TokenTree::Ident(one)) if one == "doc");
        match token {
            TokenTree::Group(group)
                if is_doc(&group)
                    && matches!(kept.last(), Some(TokenTree::Punct(one)) if one.as_char() == '#') =>
            {
                kept.pop();
            }
            TokenTree::Group(group) => {
                let inside = undocumented(group.stream());
                kept.push(Group::new(group.delimiter(), inside).into());
            }
            token => kept.push(token),
        }
    }
    kept.into_iter().collect()
}

/// Whether tokens have a `pub` that no parenthesis follows.
fn defines_public_items(tokens: TokenStream) -> bool {
    let tokens: Vec<_> = tokens.into_iter().collect();
    let is_public = |pair: &[TokenTree]| match pair {
        [TokenTree::Ident(word), TokenTree::Ident(_)] => word == "pub",
        _ => false,
    };
    tokens.windows(2).any(is_public)
        || tokens.into_iter().any(|token| match token {
            TokenTree::Group(group) => defines_public_items(group.stream()),
            _ => false,
        })
}

/// The definition of each macro that defines public items, and a line for each row that it is called with: what is between
/// two commas.
fn of_macros(items: &[Item]) -> (Vec<Item>, String) {
    let (mut definitions, mut names, mut rows) = (Vec::new(), BTreeSet::new(), String::new());
    for item in items {
        let Item::Macro(one) = item else { continue };
        let tokens = undocumented(one.mac.tokens.clone());
        if let Some(name) = &one.ident {
            if defines_public_items(tokens.clone()) {
                names.insert(name.to_string());
                let mut one = one.clone();
                one.attrs.clear();
                one.mac.tokens = tokens;
                definitions.push(Item::Macro(one));
            }
            continue;
        }
        let Some(name) = one.mac.path.get_ident().filter(|one| names.contains(&one.to_string()))
        else {
            continue;
        };
        let tokens: Vec<_> = tokens.into_iter().collect();
        let is_comma =
            |token: &TokenTree| matches!(token, TokenTree::Punct(one) if one.as_char() == ',');
        for row in tokens.split(is_comma).filter(|row| !row.is_empty()) {
            let row: TokenStream = row.iter().cloned().collect();
            rows.push_str(&format!("// {name}! {row}\n"));
        }
    }
    (definitions, rows)
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
    let (mut items, rows) = of_macros(&parsed.items);
    let mut modules = Vec::new();
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
        listing.push_str(&format!("// {path}\n{rows}{}\n", printed(items)));
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

/// What the compiler knows of a type.
struct Automatic<T: ?Sized>(PhantomData<T>);

/// What holds of every type, unless an associated constant of the type itself takes its place.
#[allow(dead_code, reason = "some hold of every type")]
trait Otherwise {
    const SEND: bool = false;
    const SYNC: bool = false;
    const UNPIN: bool = false;
    const UNWIND_SAFE: bool = false;
    const REF_UNWIND_SAFE: bool = false;
}

impl<T: ?Sized> Otherwise for Automatic<T> {}

impl<T: ?Sized + Send> Automatic<T> {
    const SEND: bool = true;
}
impl<T: ?Sized + Sync> Automatic<T> {
    const SYNC: bool = true;
}
impl<T: ?Sized + Unpin> Automatic<T> {
    const UNPIN: bool = true;
}
impl<T: ?Sized + UnwindSafe> Automatic<T> {
    const UNWIND_SAFE: bool = true;
}
impl<T: ?Sized + RefUnwindSafe> Automatic<T> {
    const REF_UNWIND_SAFE: bool = true;
}

/// Names of types, and of the automatic traits that each has.
macro_rules! traits_of {
    ($($type:ident $(<$($lifetime:lifetime),*>)?)*) => {
        [$({
            type Of = Automatic<api::$type $(<$($lifetime),*>)?>;
            let traits = [
                ("Send", Of::SEND),
                ("Sync", Of::SYNC),
                ("Unpin", Of::UNPIN),
                ("UnwindSafe", Of::UNWIND_SAFE),
                ("RefUnwindSafe", Of::REF_UNWIND_SAFE),
            ];
            (stringify!($type), traits)
        }),*]
    };
}

/// Every type that is exported, with its automatic traits.
fn automatic_traits() -> Vec<(&'static str, String)> {
    let types = traits_of! {
        AllowedIp
        AllowedIpChange
        AllowedIpError
        BatchError
        Configuration
        Device
        DeviceStatus
        DropCause
        DropCounters
        Ecn
        EncapsulateError
        Endpoint
        Event
        HandshakeCounters
        HandshakeFailure
        Instant
        KeyError
        KeyText
        Now
        PeerConfiguration
        PeerId
        PeerReport
        PeerStatus
        PresharedKey
        PrivateKey
        PublicKey
        Receive
        ReceivedPacket<'static>
        ReceivedPackets<'static,'static>
        SessionState
        Source
        StartHandshakeError
        SystemRandom
        TimerError
        TimerParameters
        Transmit<'static>
        Transmits<'static,'static>
        Tunnel
        TunnelError
    };
    let had = types.map(|(name, traits)| {
        let had = traits.into_iter().filter(|(_, has)| *has).map(|(one, _)| one);
        (name, had.collect::<Vec<_>>().join(" "))
    });
    had.into()
}

/// The names that the crate's root exports.
fn exported() -> BTreeSet<String> {
    let root = fs::read_to_string(library().join("src/lib.rs")).unwrap();
    let mut names = BTreeSet::new();
    for item in syn::parse_file(&root).unwrap().items {
        if let Item::Use(one) = item
            && is_public(&one.vis)
        {
            used_names(&one.tree, &mut names);
        }
    }
    names
}

fn listing() -> String {
    let mut listing =
        "// Every public item of wgsep-proto, written by tests/meta/api.rs.\n\n".to_owned();
    list(&library().join("src/lib.rs"), "wgsep_proto", None, &mut listing);
    listing.push_str("// automatic traits\n");
    for (name, traits) in automatic_traits() {
        listing.push_str(&format!("// {name}: {traits}\n"));
    }
    listing
}

#[test]
fn the_public_interface_is_the_one_that_the_version_promises() {
    let listing = listing();
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
fn the_listing_defines_every_name_that_the_crate_exports() {
    let listing = listing();
    let words: Vec<_> = listing
        .split(|c: char| !c.is_alphanumeric() && c != '_')
        .filter(|w| !w.is_empty())
        .collect();
    let defined = |kinds: &[&str]| {
        let pairs = words.windows(2).filter(|pair| kinds.contains(&pair[0]));
        pairs.map(|pair| pair[1].to_owned()).collect::<BTreeSet<_>>()
    };
    let missing: Vec<_> = { exported() }
        .difference(&defined(&["const", "enum", "fn", "struct", "trait", "type"]))
        .cloned()
        .collect();
    assert_eq!(missing, [""; 0], "exported, and defined by nothing that the listing has");
    let types: BTreeSet<_> =
        { defined(&["enum", "struct"]) }.intersection(&exported()).cloned().collect();
    let with_traits: BTreeSet<_> =
        automatic_traits().into_iter().map(|(name, _)| name.to_owned()).collect();
    assert_eq!(with_traits, types, "`automatic_traits` is to have every type that is exported");
}

/// What a user of an interface may rely on, one by one: items, and members of those that may get more.
fn promises(listing: &str) -> BTreeSet<String> {
    let mut promises = BTreeSet::new();
    for item in syn::parse_file(listing).unwrap().items {
        for part in parts(item) {
            promises.insert(printed(vec![part]));
        }
    }
    let comments = listing.lines().filter_map(|line| line.strip_prefix("// "));
    let (rows, others): (Vec<_>, Vec<_>) = comments.partition(|line| line.contains("! "));
    promises.extend(rows.into_iter().map(str::to_owned));
    let automatic = others.into_iter().filter_map(|line| line.split_once(": "));
    for (name, traits) in automatic {
        promises.extend(traits.split(' ').map(|one| format!("{name}: {one}")));
    }
    promises
}

/// An item with each of its members alone, if it may get more of them.
fn parts(item: Item) -> Vec<Item> {
    let is_open = |attributes: &[Attribute]| {
        attributes.iter().any(|one| {
            one.path().is_ident("non_exhaustive")
                || one.path().is_ident("cfg_attr")
                    && matches!(&one.meta, syn::Meta::List(list)
                        if list.tokens.to_string().contains("non_exhaustive"))
        })
    };
    match item {
        Item::Impl(one) if one.trait_.is_none() => {
            let alone = |member: &ImplItem| {
                Item::Impl(syn::ItemImpl { items: vec![member.clone()], ..one.clone() })
            };
            one.items.iter().map(alone).collect()
        }
        Item::Enum(one) if is_open(&one.attrs) => {
            let alone = |variant: &syn::Variant| {
                let variants = [variant.clone()].into_iter().collect();
                Item::Enum(syn::ItemEnum { variants, ..one.clone() })
            };
            one.variants.iter().map(alone).collect()
        }
        Item::Struct(one) if is_open(&one.attrs) && matches!(one.fields, Fields::Named(_)) => {
            let alone = |field: &syn::Field| {
                let mut one = one.clone();
                if let Fields::Named(named) = &mut one.fields {
                    named.named = [field.clone()].into_iter().collect();
                }
                Item::Struct(one)
            };
            one.fields.iter().map(alone).collect()
        }
        Item::Use(one) => {
            let mut names = BTreeSet::new();
            used_names(&one.tree, &mut names);
            // Where it is defined is its crate's own affair.
            let alone = |name: String| syn::parse_str(&format!("pub use {name};")).unwrap();
            names.into_iter().map(alone).collect()
        }
        item => vec![item],
    }
}

/// Whether Cargo takes one version for another that was asked for.
fn is_compatible(version: &str, with: &str) -> bool {
    let significant = |version: &str| {
        let mut numbers = version.split('.').map(str::to_owned);
        let major = numbers.next().unwrap();
        if major == "0" { format!("0.{}", numbers.next().unwrap()) } else { major }
    };
    significant(version) == significant(with)
}

/// What breaks users of the last release, if this version says that it does not.
fn broken(version: &str, is: &str, of_release: &str, was: &str) -> Vec<String> {
    if !is_compatible(version, of_release) {
        return Vec::new();
    }
    promises(was).difference(&promises(is)).cloned().collect()
}

#[test]
fn nothing_that_the_last_release_promised_is_gone_without_a_version_that_says_so() {
    let git = |arguments: &[&str]| {
        let output = output(Command::new("git").current_dir(repository()).args(arguments));
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
    };
    // Before the first release there is no tag, and nothing was promised.
    let tag = git(&["describe", "--tags", "--abbrev=0", "--match", "v[0-9]*"]);
    let Some(tag) = tag else { return };
    let Some(was) = git(&["show", &format!("{}:dataplane/proto/api.txt", tag.trim())]) else {
        return;
    };
    let of_release = tag.trim().trim_start_matches('v');
    let gone = broken(env!("CARGO_PKG_VERSION"), &listing(), of_release, &was);
    assert_eq!(gone, [""; 0], "what {} promised takes a version that breaks users", tag.trim());
}

#[test]
fn a_new_version_may_add_but_not_take_away_or_change() {
    let was = "#[non_exhaustive] pub enum E { A, B } pub struct S { pub a: u8 } \
               impl S { pub fn f(&self) {} } pub use a::b::S;\n// S: Send Sync\n\
               // rows! One = \"one\"\n";
    let gone = |is: &str| broken("0.2.5", is, "0.2.0", was).len();
    let changed = |from: &str, to: &str| {
        assert!(was.contains(from), "{from}");
        was.replace(from, to)
    };
    assert_eq!(gone(was), 0);
    assert_eq!(gone(&changed("B }", "B, C }")), 0);
    assert_eq!(gone(&changed("{} }", "{} pub fn g(&self) {} }")), 0);
    assert_eq!(gone(&changed("a::b::S", "c::S")), 0);
    assert_eq!(gone(&changed("// S:", "// rows! Other = \"other\"\n// S:")), 0);
    assert_eq!(gone(&changed("One", "Other")), 1);
    assert_eq!(gone(&changed("A, B", "A")), 1);
    assert_eq!(gone(&changed("a: u8", "a: u16")), 1);
    // A program that writes `S { a }` does not compile with a second field.
    assert_eq!(gone(&changed("a: u8", "a: u8, pub b: u8")), 1);
    assert_eq!(gone(&changed("&self", "&mut self")), 1);
    assert_eq!(gone(&changed("Send Sync", "Send")), 1);
    assert_eq!(gone(&changed("pub use a::b::S;", "")), 1);
    for (version, of_release, is_said) in [
        ("0.3.0", "0.2.0", true),
        ("1.0.0", "0.2.0", true),
        ("2.0.0", "1.4.0", true),
        ("1.5.0", "1.4.0", false),
    ] {
        assert_eq!(broken(version, "", of_release, was).is_empty(), is_said, "{version}");
    }
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

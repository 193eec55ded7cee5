//! The source, the documents and the built programs, read by tests. No daemon is started.
//!
//! `cargo test -p wgsep-tests --test meta errors::` runs one file.
#![allow(clippy::unwrap_used)]

mod api;
mod c_library;
mod dependencies;
mod deps_cache;
mod errors;
mod fuzz_corpus;
mod key_material;
mod library;
mod programs;
mod security_document;

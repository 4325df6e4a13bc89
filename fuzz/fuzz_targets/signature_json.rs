//! Definitions in JSON: no text makes the parsers panic or hang, and each error can be shown.
#![no_main]

use hotcell::{ARGS_MAX, parse_json, parse_json_one, parse_symbols};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    match parse_json(text) {
        Ok(symbols) => assert!(symbols.iter().all(|symbol| symbol.signature.args.len() <= ARGS_MAX)),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    let _ = parse_json_one(text).map_err(|error| error.to_string());
    let _ = parse_symbols(text).map_err(|error| error.to_string());
});

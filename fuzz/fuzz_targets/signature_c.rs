//! C prototypes: no text makes the parsers panic or hang, and each error can be shown.
#![no_main]

use hotcell::{ARGS_MAX, parse_c, parse_c_list, parse_symbols};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    match parse_c(text) {
        Ok((name, signature)) => {
            assert!(!name.is_empty() && signature.args.len() <= ARGS_MAX);
            assert_eq!(parse_c_list(text), Ok(vec![(name, signature)]), "one prototype is a list of one");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    let _ = parse_c_list(text).map_err(|error| error.to_string());
    let _ = parse_symbols(text).map_err(|error| error.to_string());
});

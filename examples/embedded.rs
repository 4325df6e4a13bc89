//! A shared library with hotcell in it, for a program that is not Rust: a plug-in, or an extension of an interpreter.
//!
//! Such a program cannot be started again as a worker: that would run its own `main`. So the lean program `hotcell-worker` has to be installed, and named by
//! the environment variable `HOTCELL_WORKER` (or in the configuration).
//!
//! ```text
//! cargo build --example embedded && cargo build -p hotcell-worker
//! HOTCELL_WORKER=target/debug/hotcell-worker \
//!     python3 -c 'import ctypes; print(ctypes.CDLL("target/debug/examples/libembedded.so").isolated_power(2, 10))'
//! ```
#![allow(unsafe_code)] // an unmangled name may clash with another; here none of that name is linked

use hotcell::{Error, Worker};

fn power(base: i32, exponent: i32) -> Result<f64, Error> {
    let session = Worker::spawn()?.session()?;
    let pow = session.load("libm.so.6")?.function::<fn(f64, f64) -> f64>("pow")?;
    Ok(pow.call(base.into(), exponent.into())?)
}

/// Computes a power in a worker; -1 if that fails, with the reason on standard error.
#[unsafe(no_mangle)]
pub extern "C" fn isolated_power(base: i32, exponent: i32) -> i32 {
    match power(base, exponent) {
        #[allow(clippy::cast_possible_truncation)] // a small power of small numbers
        Ok(result) => result as i32,
        Err(error) => {
            eprintln!("{error}");
            -1
        }
    }
}

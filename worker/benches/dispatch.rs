#![allow(unsafe_code, missing_docs)]
//! What the worker's part of a call costs in process, without the other side: words in a slot to a C function and its result back, once by the fixed shape that
//! functions with register arguments are called through, once by libffi's prepared call interface, which every other function needs.
//!
//! ```text
//! cargo bench -p hotcell-worker --bench dispatch
//! ```
//!
//! **Law.** The addresses given below are those of functions of this file, with the signatures that stand beside them.

use criterion::{Criterion, criterion_group, criterion_main};
use hotcell_channel::signature::{Signature, Type};
use hotcell_worker::InProcess;
use std::hint::black_box;

extern "C" fn add(a: i32, b: i32) -> i32 {
    a.wrapping_add(b)
}

extern "C" fn six(a: u64, b: u64, c: u64, d: u64, e: u64, f: u64) -> u64 {
    a + b + c + d + e + f
}

#[allow(clippy::too_many_arguments)]
extern "C" fn eight(a: f64, b: f64, c: f64, d: f64, e: f64, f: f64, g: f64, h: f64) -> f64 {
    a + b + c + d + e + f + g + h
}

extern "C" fn mixed(a: i64, x: f64, b: i64, y: f64) -> f64 {
    (a - b) as f64 + x * y
}

fn dispatch(c: &mut Criterion) {
    let doubles = [1.0f64, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0].map(f64::to_bits);
    // Integer words first, then float words.
    let both = [9, 4, 2.5f64.to_bits(), 2.0f64.to_bits()];
    let rows: [(&str, *const (), Signature, &[u64], u64); 4] = [
        ("two i32", add as *const (), Signature::new([Type::I32; 2], Type::I32), &[2, 3], 5),
        ("six u64", six as *const (), Signature::new([Type::U64; 6], Type::U64), &[1, 2, 3, 4, 5, 6], 21),
        (
            "eight f64",
            eight as *const (),
            Signature::new([Type::F64; 8], Type::F64),
            &doubles,
            36.0f64.to_bits(),
        ),
        (
            "i64, f64, i64, f64",
            mixed as *const (),
            Signature::new([Type::I64, Type::F64, Type::I64, Type::F64], Type::F64),
            &both,
            10.0f64.to_bits(),
        ),
    ];
    for (name, address, signature, words, result) in rows {
        let mut group = c.benchmark_group(name);
        for (way, prepared) in [("fixed shape", false), ("libffi, prepared", true)] {
            // SAFETY: the law of this file; the functions touch nothing but their arguments.
            let function = unsafe { InProcess::new(address, &signature, prepared) };
            let mut function = function.expect("a signature that libffi knows");
            let mask = if signature.returns == Type::I32 { u64::from(u32::MAX) } else { u64::MAX };
            assert_eq!(function.call(words) & mask, result);
            group.bench_function(way, |b| b.iter(|| function.call(black_box(words))));
        }
        group.finish();
    }
}

criterion_group!(benches, dispatch);
criterion_main!(benches);

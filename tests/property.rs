//! Random calls, compared with the naive truth: the same compiled function called in this process.
#![allow(unsafe_code, reason = "the in-process calls that the worker's are compared with")]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "test values are cut out of random bits on purpose"
)]

mod common;

use hotcell::{Arg, Block, DynFunction, In, InOut, Module, Out, RemotePtr, Signature, Type, Value, Worker};
use libffi::middle::{self, Cif, CodePtr};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use std::ffi::{CStr, CString, c_char};
use std::fmt::Write as _;
use std::path::PathBuf;

const KIB: usize = 1 << 10;
const PAYLOAD_MAX: usize = 300 * KIB;
const SIGNATURES: usize = 300;

fn runner(cases: u32) -> TestRunner {
    TestRunner::new(Config { cases, failure_persistence: None, max_shrink_time: 30_000, ..Config::default() })
}

/// Splitmix64.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut x = *state;
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

// Numbers.

const NUMBERS: [Type; 15] = [
    Type::Bool,
    Type::Char,
    Type::I8,
    Type::I16,
    Type::I32,
    Type::I64,
    Type::U8,
    Type::U16,
    Type::U32,
    Type::U64,
    Type::F32,
    Type::F64,
    Type::Ptr,
    Type::I64Fast,
    Type::U64Fast,
];
/// What may stand behind the `...`.
const PROMOTED: [Type; 6] = [Type::I32, Type::U32, Type::I64, Type::U64, Type::F64, Type::Ptr];

fn c_type(t: Type) -> &'static str {
    match t {
        Type::Void => "void",
        Type::Bool => "_Bool",
        Type::Char => "char",
        Type::I8 => "int8_t",
        Type::I16 => "int16_t",
        Type::I32 => "int32_t",
        Type::I64 | Type::I64Fast => "int64_t",
        Type::U8 => "uint8_t",
        Type::U16 => "uint16_t",
        Type::U32 => "uint32_t",
        Type::U64 | Type::U64Fast => "uint64_t",
        Type::F32 => "float",
        Type::F64 => "double",
        _ => "void *",
    }
}

fn ffi_type(t: Type) -> middle::Type {
    match t {
        Type::Void => middle::Type::void(),
        Type::Bool | Type::U8 => middle::Type::u8(),
        Type::Char | Type::I8 => middle::Type::i8(),
        Type::I16 => middle::Type::i16(),
        Type::I32 => middle::Type::i32(),
        Type::I64 | Type::I64Fast => middle::Type::i64(),
        Type::U16 => middle::Type::u16(),
        Type::U32 => middle::Type::u32(),
        Type::U64 | Type::U64Fast => middle::Type::u64(),
        Type::F32 => middle::Type::f32(),
        Type::F64 => middle::Type::f64(),
        _ => middle::Type::pointer(),
    }
}

/// Random signatures, the same in every run: short and long ones, of all types or mostly of one class, one in five variadic.
fn signatures() -> Vec<Signature> {
    let mut state = 2024;
    let mut below = |bound: usize| (random(&mut state) % bound as u64) as usize;
    (0..SIGNATURES)
        .map(|which| {
            let count = if which % 3 == 0 { below(65) } else { below(18) };
            let mut args: Vec<Type> = (0..count)
                .map(|_| match which % 4 {
                    0 => NUMBERS[below(10)],
                    1 => NUMBERS[10 + below(2)],
                    _ => NUMBERS[below(NUMBERS.len())],
                })
                .collect();
            let returns = if which % 16 == 0 { Type::Void } else { NUMBERS[below(NUMBERS.len())] };
            let mut variadic_after = None;
            if which % 5 == 0 && count > 0 {
                let fixed = 1 + below(count);
                // The last one before the `...` must not be of a type that C promotes.
                args[fixed - 1] = Type::I64;
                args[fixed..].fill_with(|| PROMOTED[below(PROMOTED.len())]);
                variadic_after = u8::try_from(fixed).ok();
            }
            Signature { variadic_after, ..Signature::new(args, returns) }
        })
        .collect()
}

const C_PRELUDE: &str = r#"
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static uint64_t last_checksum;
uint64_t checksum(void) { return last_checksum; }
static uint64_t mix(uint64_t h, uint64_t x) { h = (h ^ x) * 0x9e3779b97f4a7c15ull; return h ^ (h >> 29); }
static uint64_t of_f32(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }
static uint64_t of_f64(double x) { uint64_t b; memcpy(&b, &x, 8); return b; }
static float to_f32(uint64_t h) { uint32_t b = h; float x; memcpy(&x, &b, 4); return x; }
static double to_f64(uint64_t h) { double x; memcpy(&x, &h, 8); return x; }
"#;

fn numbers_source(signatures: &[Signature]) -> String {
    let mut c = C_PRELUDE.to_owned();
    for (which, signature) in signatures.iter().enumerate() {
        let fixed = signature.variadic_after.map_or(signature.args.len(), usize::from);
        let mut args: Vec<_> =
            signature.args[..fixed].iter().enumerate().map(|(i, t)| format!("{} a{i}", c_type(*t))).collect();
        if signature.variadic_after.is_some() {
            args.push("...".into());
        }
        let args = if args.is_empty() { "void".to_owned() } else { args.join(", ") };
        let _ = write!(c, "{} f{which}({args}) {{ uint64_t h = {which};", c_type(signature.returns));
        if signature.variadic_after.is_some() {
            let _ = write!(c, " va_list list; va_start(list, a{});", fixed - 1);
        }
        for (i, t) in signature.args.iter().enumerate() {
            let value = if i < fixed { format!("a{i}") } else { format!("va_arg(list, {})", c_type(*t)) };
            let bits = match t {
                Type::F32 => format!("of_f32({value})"),
                Type::F64 => format!("of_f64({value})"),
                Type::Ptr => format!("(uintptr_t)({value})"),
                _ => format!("(uint64_t)({value})"),
            };
            let _ = write!(c, " h = mix(h, {bits});");
        }
        let result = match signature.returns {
            Type::Void => "",
            Type::F32 => "return to_f32(h);",
            Type::F64 => "return to_f64(h);",
            Type::Ptr => "return (void *)h;",
            Type::Bool => "return h & 1;",
            other => &format!("return ({})h;", c_type(other)),
        };
        let _ = writeln!(c, " last_checksum = h; {result} }}");
    }
    c
}

/// One number, as bits of its type's width.
fn cut(t: Type, bits: u64) -> u64 {
    match t {
        Type::Bool => bits & 1,
        Type::Char | Type::I8 | Type::U8 => bits & 0xff,
        Type::I16 | Type::U16 => bits & 0xffff,
        Type::I32 | Type::U32 => bits & 0xffff_ffff,
        // A call by name carries an f32 as an f64, on whose way a signalling NaN becomes quiet: the others only.
        Type::F32 => {
            let bits = bits & 0xffff_ffff;
            if f32::from_bits(bits as u32).is_nan() { bits | 0x0040_0000 } else { bits }
        }
        _ => bits,
    }
}

fn arg(t: Type, bits: u64, base: RemotePtr) -> Arg<'static> {
    match t {
        Type::Bool => Arg::Bool(bits != 0),
        Type::Char | Type::I8 => Arg::Signed(i64::from(bits as i8)),
        Type::I16 => Arg::Signed(i64::from(bits as i16)),
        Type::I32 => Arg::Signed(i64::from(bits as i32)),
        Type::I64 | Type::I64Fast => Arg::Signed(bits as i64),
        Type::F32 => Arg::from(f32::from_bits(bits as u32)),
        Type::F64 => Arg::from(f64::from_bits(bits)),
        Type::Ptr => Arg::Ptr(base.offset(bits.wrapping_sub(base.address()))),
        _ => Arg::Unsigned(bits),
    }
}

/// A result as bits, so that NaNs compare too.
fn bits_of(value: &Value) -> u64 {
    match value {
        Value::Void => 0,
        Value::Bool(b) => u64::from(*b),
        Value::Signed(n) => n.cast_unsigned(),
        Value::Unsigned(n) => *n,
        Value::F32(x) => u64::from(x.to_bits()),
        Value::F64(x) => x.to_bits(),
        Value::Ptr(p) => p.address(),
        other => panic!("{other:?}"),
    }
}

/// The function in this process, called through libffi.
struct Oracle {
    cif: Cif,
    code: CodePtr,
    signature: Signature,
}

impl Oracle {
    fn new(library: &libloading::Library, symbol: &str, signature: &Signature) -> Oracle {
        // SAFETY: the symbol is only used as an address here.
        let address = unsafe { library.get::<unsafe extern "C" fn()>(symbol) }.unwrap();
        let code = CodePtr::from_fun(*address);
        let args = signature.args.iter().map(|t| ffi_type(*t));
        let returns = ffi_type(signature.returns);
        let cif = match signature.variadic_after {
            Some(fixed) => Cif::new_variadic(args, fixed.into(), returns),
            None => Cif::new(args, returns),
        };
        Oracle { cif, code, signature: signature.clone() }
    }

    fn call(&self, words: &[u64]) -> u64 {
        let args: Vec<_> = words.iter().map(middle::arg).collect();
        macro_rules! call {
            ($t:ty) => {{
                // SAFETY: the interface was made for the signature from which the function was generated, as was this arm's type; each argument
                // points to eight bytes, of which libffi reads the first, as many as the type has.
                unsafe { self.cif.call::<$t>(self.code, &args) }
            }};
        }
        match self.signature.returns {
            Type::Void => {
                call!(());
                0
            }
            Type::Bool => u64::from(call!(u8) != 0),
            Type::Char | Type::I8 => i64::from(call!(i8)).cast_unsigned(),
            Type::I16 => i64::from(call!(i16)).cast_unsigned(),
            Type::I32 => i64::from(call!(i32)).cast_unsigned(),
            Type::U8 => call!(u8).into(),
            Type::U16 => call!(u16).into(),
            Type::U32 => call!(u32).into(),
            Type::F32 => u64::from(call!(f32).to_bits()),
            Type::F64 => call!(f64).to_bits(),
            _ => call!(u64),
        }
    }
}

fn load(name: &str, source: &str) -> (PathBuf, Module, libloading::Library) {
    let path = common::compile(name, source, &[]);
    let module = Worker::spawn().unwrap().session().unwrap().load(path.clone()).unwrap();
    // SAFETY: the fixture was just compiled from the source above and has no constructors.
    let library = unsafe { libloading::Library::new(&path) }.unwrap();
    (path, module, library)
}

#[test]
fn random_signatures_compute_what_they_compute_in_process() {
    let _dog = common::watchdog(300);
    let signatures = signatures();
    let (_, module, library) = load("numbers", &numbers_source(&signatures));
    let functions: Vec<(DynFunction, Oracle)> = signatures
        .iter()
        .enumerate()
        .map(|(which, signature)| {
            let symbol = format!("f{which}");
            (module.dynamic(&symbol, signature.clone()).unwrap(), Oracle::new(&library, &symbol, signature))
        })
        .collect();
    let base = module.session().alloc(1).unwrap();
    let checksum = module.function::<fn() -> u64>("checksum").unwrap();
    let oracle_checksum = Oracle::new(&library, "checksum", &Signature::new([], Type::U64));
    // Bits that are a number's ends more often than chance makes them.
    let word = prop_oneof![
        any::<u64>(),
        Just(0),
        Just(u64::MAX),
        Just(0x7fff_ffff_7fff_7f7f),
        Just(0x8000_0000_8000_8080),
        (0u32..64).prop_map(|bit| 1 << bit),
        any::<f64>().prop_map(f64::to_bits),
        any::<f32>().prop_map(|x| x.to_bits().into()),
    ];
    let strategy = (0..SIGNATURES, prop::collection::vec(word, 64));
    runner(2500)
        .run(&strategy, |(which, words)| {
            let (function, oracle) = &functions[which];
            let types = &signatures[which].args;
            let words: Vec<u64> = types.iter().zip(&words).map(|(t, bits)| cut(*t, *bits)).collect();
            let args: Vec<_> = types.iter().zip(&words).map(|(t, bits)| arg(*t, *bits, base)).collect();
            let given = function.call(args).map_err(|e| TestCaseError::fail(e.to_string()))?;
            let expected = oracle.call(&words);
            prop_assert_eq!(bits_of(&given), expected, "{}", function.signature());
            prop_assert_eq!(checksum.call().unwrap(), oracle_checksum.call(&[]), "{}", function.signature());
            Ok(())
        })
        .unwrap();
}

// Strings and bytes.

const BYTES_SOURCE: &str = r#"
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

// Reads all of `in`, steps all of `both`, fills all of `out` from the two.
uint64_t work(const uint8_t *in, size_t in_n, uint8_t *both, size_t both_n, uint8_t *out, size_t out_n) {
    uint64_t h = in_n * 31 + both_n * 37 + out_n;
    for (size_t i = 0; i < in_n; i++) h = (h ^ in[i]) * 0x100000001b3ull;
    for (size_t i = 0; i < both_n; i++) { h = (h ^ both[i]) * 0x100000001b3ull; both[i] = (uint8_t)(both[i] * 3 + i); }
    for (size_t i = 0; i < out_n; i++) { h = h * 6364136223846793005ull + 1; out[i] = h >> 56; }
    return h;
}

// The text backwards, with every byte stepped by `by` among those that are not NUL.
const char *backwards(const char *text, uint32_t by) {
    static char *kept;
    if (!text) return 0;
    size_t n = strlen(text);
    kept = realloc(kept, n + 1);
    for (size_t i = 0; i < n; i++) kept[i] = ((uint8_t)text[n - 1 - i] - 1 + by % 255) % 255 + 1;
    kept[n] = 0;
    return kept;
}
"#;

type Work = unsafe extern "C" fn(*const u8, usize, *mut u8, usize, *mut u8, usize) -> u64;
type Backwards = unsafe extern "C" fn(*const c_char, u32) -> *const c_char;

/// Sizes of all orders, and those around the scratch limit (64 KiB) and the reply's room for strings (1 KiB).
fn size() -> impl Strategy<Value = usize> {
    prop_oneof![
        0usize..100,
        900usize..1100,
        0usize..5000,
        65_400usize..65_600,
        0..=PAYLOAD_MAX,
        Just(PAYLOAD_MAX)
    ]
}

fn bytes(count: usize, mut seed: u64) -> Vec<u8> {
    (0..count).map(|_| (random(&mut seed) >> 56) as u8).collect()
}

#[test]
fn random_bytes_come_back_as_in_process() {
    let _dog = common::watchdog(300);
    let (_, module, library) = load("bytes", BYTES_SOURCE);
    // SAFETY: the type is that of the fixture's function.
    let oracle = unsafe { library.get::<Work>("work") }.unwrap();
    let typed =
        module.function::<fn(In<[u8]>, usize, InOut<[u8]>, usize, Out<[u8]>, usize) -> u64>("work").unwrap();
    let by_name = module
        .prototype("uint64_t work(const uint8_t *, size_t, uint8_t *, size_t, uint8_t *, size_t)")
        .unwrap();
    let blocks = module.function::<fn(Block, usize, Block, usize, Block, usize) -> u64>("work").unwrap();
    runner(60)
        .run(&(size(), size(), size(), any::<u64>(), 0..4), |(n, m, k, seed, how)| {
            let (input, mut both, mut out) = (bytes(n, seed), bytes(m, !seed), vec![0xee; k]);
            let (mut both_expected, mut out_expected) = (both.clone(), out.clone());
            // SAFETY: each pointer is to as many live bytes as the number behind it says, and the function stays inside.
            let expected = unsafe {
                oracle(input.as_ptr(), n, both_expected.as_mut_ptr(), m, out_expected.as_mut_ptr(), k)
            };
            let given = match how {
                0 => typed.call(&input, n, &mut both, m, &mut out, k).unwrap(),
                1 => typed.submit(&input, n, &mut both, m, &mut out, k).unwrap().wait().unwrap(),
                2 => {
                    let args = (&input, n, &mut both, m, hotcell::out(&mut out), k);
                    bits_of(&by_name.call(args).unwrap())
                }
                _ => {
                    let session = module.session();
                    let block = |n: usize| session.block(n as u64).unwrap();
                    let (a, b, c) = (block(n), block(m), block(k));
                    prop_assert!(a.write(0, &input) && b.write(0, &both));
                    let given = blocks.call(&a, n, &b, m, &c, k).unwrap();
                    prop_assert!(b.read(0, &mut both) && c.read(0, &mut out));
                    given
                }
            };
            prop_assert_eq!(given, expected);
            prop_assert!(both == both_expected, "in-out bytes differ");
            prop_assert!(out == out_expected, "out bytes differ");
            prop_assert!(input == bytes(n, seed), "input was changed");
            Ok(())
        })
        .unwrap();
}

#[test]
fn random_strings_come_back_as_in_process() {
    let _dog = common::watchdog(300);
    let (_, module, library) = load("bytes", BYTES_SOURCE);
    // SAFETY: the type is that of the fixture's function.
    let oracle = unsafe { library.get::<Backwards>("backwards") }.unwrap();
    let typed = module.function::<fn(In<CStr>, u32) -> CString>("backwards").unwrap();
    let by_name = module.prototype("const char *backwards(const char *, unsigned)").unwrap();
    runner(80)
        .run(&(size(), any::<u64>(), any::<u32>(), 0..3), |(n, seed, by, how)| {
            let text = bytes(n.min(PAYLOAD_MAX - 1), seed).into_iter().map(|b| b.max(1)).collect::<Vec<_>>();
            let text = CString::new(text).unwrap();
            // SAFETY: a live string; the function returns one of its own.
            let expected = unsafe { oracle(text.as_ptr(), by) };
            // SAFETY: a string that stays until the next call, and this test alone calls the function in this process.
            let expected = unsafe { CStr::from_ptr(expected) };
            let given = match how {
                0 => typed.call(&text, by).unwrap(),
                1 => typed.submit(&text, by).unwrap().wait().unwrap(),
                _ => by_name.call((&text, by)).unwrap().try_into().unwrap(),
            };
            prop_assert!(given.as_c_str() == expected, "{} bytes differ", n);
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_block_behaves_like_a_vector() {
    let _dog = common::watchdog(300);
    let (_, module, _library) = load("bytes", BYTES_SOURCE);
    let session = module.session();
    let size = 5000;
    let block = session.block(size as u64).unwrap();
    let mut model = bytes(size, 1);
    assert!(block.write(0, &model));
    // At all alignments of offset, length and source.
    let strategy = (0..size + 20, prop_oneof![0usize..70, 0..size], 0usize..8, any::<u64>());
    let model = std::cell::RefCell::new(&mut model);
    runner(1500)
        .run(&strategy, |(offset, length, shift, seed)| {
            let model = &mut **model.borrow_mut();
            let source = bytes(length + shift, seed);
            let fits = offset + length <= size;
            prop_assert_eq!(block.write(offset as u64, &source[shift..]), fits);
            if fits {
                model[offset..offset + length].copy_from_slice(&source[shift..]);
            }
            let mut back = vec![0; length + shift];
            prop_assert_eq!(block.read(offset as u64, &mut back[shift..]), fits);
            if fits {
                prop_assert!(back[shift..] == model[offset..offset + length]);
            }
            let mut whole = vec![0; size];
            prop_assert!(block.read(0, &mut whole));
            prop_assert!(whole == *model);
            // The worker sees the same bytes.
            session.read(block.pointer(), &mut whole).unwrap();
            prop_assert!(whole == *model);
            Ok(())
        })
        .unwrap();
}

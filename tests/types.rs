//! Every type in every position: each call's checksum over what the function received, and the value it gave back, are compared with what was passed.
//!
//! The functions are generated here and compiled when the test runs. Three paths lead into a function and all are covered: registers alone
//! (at most 6 integers and 8 floats), the stack, and words that do not fit the slot (more than 15).
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "test values are cut out of random bits on purpose"
)]

mod common;

use hotcell::{
    Arg, CallError, DynFunction, In, LoadError, Module, Nullable, Out, RemotePtr, Session, Signature, Type,
    Value, Worker, parse_c, parse_json_one,
};
use std::ffi::{CStr, CString};
use std::fmt::Write as _;

/// The scalar types of an argument, in the order of `hotcell::Type`.
const TYPES: [Type; 17] = [
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
    Type::CString,
    Type::Buffer,
    Type::I64Fast,
    Type::U64Fast,
];

/// Bytes that a generated function reads behind a `buffer`.
const BUFFER_BYTES: usize = 7;

/// Splitmix64: the same values in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).unwrap()
    }
}

/// The type as the generated C declares it.
fn c_type(t: Type) -> &'static str {
    match t {
        Type::Void => "void",
        Type::Bool => "_Bool",
        Type::Char => "char",
        Type::I8 => "signed char",
        Type::I16 => "short",
        Type::I32 => "int",
        Type::I64 | Type::I64Fast => "long",
        Type::U8 => "unsigned char",
        Type::U16 => "unsigned short",
        Type::U32 => "unsigned int",
        Type::U64 | Type::U64Fast => "unsigned long",
        Type::F32 => "float",
        Type::F64 => "double",
        Type::Ptr => "void *",
        Type::CString => "const char *",
        Type::Buffer => "unsigned char *",
        other => panic!("{other} is not a scalar"),
    }
}

/// The type in a prototype for hotcell: C's own words, where they tell the type apart from others.
fn prototype_type(t: Type) -> &'static str {
    match t {
        Type::Buffer | Type::I64Fast | Type::U64Fast => t.name(),
        other => c_type(other),
    }
}

const C_PRELUDE: &str = r#"
#include <stdint.h>
#include <stdarg.h>
#include <string.h>

static uint64_t last_checksum;
uint64_t checksum(void) { return last_checksum; }

static uint64_t mix(uint64_t h, uint64_t x) { h = (h ^ x) * 0x9e3779b97f4a7c15ull; return h ^ (h >> 29); }
static uint64_t bytes_of(const unsigned char *p, size_t n) {
    uint64_t h = 7;
    if (!p) return 0;
    for (size_t i = 0; i < n; i++) h = mix(h, p[i]);
    return h;
}
static uint64_t of_int(int64_t x) { return (uint64_t)x; }
static uint64_t of_uint(uint64_t x) { return x; }
static uint64_t of_f32(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static uint64_t of_f64(double x) { uint64_t bits; memcpy(&bits, &x, 8); return bits; }
static uint64_t of_ptr(const void *x) { return (uintptr_t)x; }
static uint64_t of_text(const char *x) { return x ? bytes_of((const unsigned char *)x, strlen(x)) : 0; }
static uint64_t of_buffer(const unsigned char *x) { return bytes_of(x, 7); }
"#;

fn c_bits(t: Type) -> &'static str {
    match t {
        Type::Char | Type::I8 | Type::I16 | Type::I32 | Type::I64 | Type::I64Fast => "of_int",
        Type::Bool | Type::U8 | Type::U16 | Type::U32 | Type::U64 | Type::U64Fast => "of_uint",
        Type::F32 => "of_f32",
        Type::F64 => "of_f64",
        Type::Ptr => "of_ptr",
        Type::CString => "of_text",
        Type::Buffer => "of_buffer",
        other => panic!("{other} is not a scalar"),
    }
}

fn mix(h: u64, x: u64) -> u64 {
    let h = (h ^ x).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    h ^ (h >> 29)
}

fn bytes_of(bytes: &[u8]) -> u64 {
    bytes.iter().fold(7, |h, b| mix(h, u64::from(*b)))
}

/// A value of one of the types, as the function is to see it.
#[derive(Clone, Debug)]
enum Sample {
    Bool(bool),
    Signed(i64),
    Unsigned(u64),
    F32(f32),
    F64(f64),
    Ptr(RemotePtr),
    Text(Option<CString>),
    Bytes(Option<[u8; BUFFER_BYTES]>),
}

impl Sample {
    /// One of the type's extremes or a random value.
    fn pick(t: Type, random: &mut Random, base: RemotePtr) -> Sample {
        let r = random.next();
        let signed = |bits: u32| {
            let shift = 64 - bits;
            let random = (r.cast_signed() << shift) >> shift;
            Sample::Signed(match r >> 60 {
                0 | 1 => i64::MIN >> shift,
                2 | 3 => i64::MAX >> shift,
                4 => -1,
                5 => 0,
                6 => 1,
                _ => random,
            })
        };
        let unsigned = |bits: u32| {
            let shift = 64 - bits;
            Sample::Unsigned(match r >> 60 {
                0..=2 => u64::MAX >> shift,
                3 => 0,
                // the sign bit alone
                4 | 5 => (1 << 63) >> shift,
                _ => (r << shift) >> shift,
            })
        };
        match t {
            Type::Bool => Sample::Bool(r & 1 == 1),
            Type::Char | Type::I8 => signed(8),
            Type::I16 => signed(16),
            Type::I32 => signed(32),
            Type::I64 | Type::I64Fast => signed(64),
            Type::U8 => unsigned(8),
            Type::U16 => unsigned(16),
            Type::U32 => unsigned(32),
            Type::U64 | Type::U64Fast => unsigned(64),
            Type::F32 => Sample::F32(match r >> 60 {
                0 => -0.0,
                1 => f32::INFINITY,
                2 => f32::NEG_INFINITY,
                // a quiet NaN with a payload
                3 => f32::from_bits(0xffc1_2345),
                4 => f32::from_bits(1),
                5 => f32::MAX,
                6 => f32::MIN_POSITIVE,
                _ => (r as i32 as f32) * 1.5e-3,
            }),
            Type::F64 => Sample::F64(match r >> 60 {
                0 => -0.0,
                1 => f64::INFINITY,
                2 => f64::NEG_INFINITY,
                // a signalling NaN with a payload
                3 => f64::from_bits(0xfff4_dead_beef_0001),
                4 => f64::from_bits(1),
                5 => f64::MIN,
                6 => f64::MIN_POSITIVE,
                _ => (r.cast_signed() as f64) * 1.5e-3,
            }),
            Type::Ptr => Sample::Ptr(if r.is_multiple_of(8) { RemotePtr::NULL } else { base.offset(r >> 8) }),
            Type::CString => Sample::Text((!r.is_multiple_of(8)).then(|| {
                let length = usize::try_from((r >> 8) % 40).unwrap();
                CString::new((0..length).map(|i| (r >> (i % 56)) as u8 | 1).collect::<Vec<u8>>()).unwrap()
            })),
            Type::Buffer => {
                Sample::Bytes((!r.is_multiple_of(8)).then(|| std::array::from_fn(|i| (r >> (i * 8)) as u8)))
            }
            other => panic!("{other} is not a scalar"),
        }
    }

    fn bits(&self) -> u64 {
        match self {
            Sample::Bool(b) => u64::from(*b),
            Sample::Signed(n) => n.cast_unsigned(),
            Sample::Unsigned(n) => *n,
            Sample::F32(x) => u64::from(x.to_bits()),
            Sample::F64(x) => x.to_bits(),
            Sample::Ptr(p) => p.address(),
            Sample::Text(text) => text.as_ref().map_or(0, |text| bytes_of(text.as_bytes())),
            Sample::Bytes(bytes) => bytes.as_ref().map_or(0, |bytes| bytes_of(bytes)),
        }
    }

    fn arg(&self) -> Arg<'_> {
        match self {
            Sample::Bool(b) => (*b).into(),
            Sample::Signed(n) => (*n).into(),
            Sample::Unsigned(n) => (*n).into(),
            Sample::F32(x) => (*x).into(),
            Sample::F64(x) => (*x).into(),
            Sample::Ptr(p) => (*p).into(),
            Sample::Text(text) => text.as_ref().into(),
            Sample::Bytes(bytes) => bytes.as_ref().into(),
        }
    }

    /// Whether a call's result is this value, to the last bit.
    fn is(&self, value: &Value) -> bool {
        match (self, value) {
            (Sample::Bool(a), Value::Bool(b)) => a == b,
            (Sample::Signed(a), Value::Signed(b)) => a == b,
            (Sample::Unsigned(a), Value::Unsigned(b)) => a == b,
            (Sample::F32(a), Value::F32(b)) => a.to_bits() == b.to_bits(),
            (Sample::F64(a), Value::F64(b)) => a.to_bits() == b.to_bits(),
            (Sample::Ptr(a), Value::Ptr(b)) => a == b,
            (Sample::Text(Some(a)), Value::CString(b)) => a == b,
            (Sample::Text(None), Value::Null) => true,
            // Lent bytes come back as an address inside the call's payload, whatever that is.
            (Sample::Bytes(bytes), Value::Ptr(p)) => p.is_null() == bytes.is_none(),
            _ => false,
        }
    }
}

/// A generated function: it stores a checksum of all its arguments and returns one of them.
struct Echo {
    name: String,
    args: Vec<Type>,
    echoed: usize,
}

impl Echo {
    fn signature(&self) -> Signature {
        Signature::new(self.args.clone(), self.args[self.echoed])
    }

    fn source(&self) -> String {
        let mut c = format!("{} {}(", c_type(self.args[self.echoed]), self.name);
        for (i, t) in self.args.iter().enumerate() {
            let _ = write!(c, "{}{} a{i}", if i > 0 { ", " } else { "" }, c_type(*t));
        }
        c.push_str(") { uint64_t h = 1;");
        for (i, t) in self.args.iter().enumerate() {
            let _ = write!(c, " h = mix(h, {}(a{i}));", c_bits(*t));
        }
        let _ = writeln!(c, " last_checksum = h; return a{}; }}", self.echoed);
        c
    }

    fn prototype(&self) -> String {
        let args: Vec<_> = self.args.iter().map(|t| prototype_type(*t)).collect();
        format!("{} {}({})", prototype_type(self.args[self.echoed]), self.name, args.join(", "))
    }

    fn json(&self) -> String {
        let args: Vec<_> = self.args.iter().map(|t| format!("{:?}", t.name())).collect();
        format!(r#"{{"args":[{}],"returns":"{}"}}"#, args.join(","), self.args[self.echoed].name())
    }
}

/// What may stand beside the argument in question.
const INTEGER_NEIGHBOURS: [Type; 7] =
    [Type::I64, Type::I8, Type::U16, Type::Bool, Type::U32, Type::CString, Type::I16];
const FLOAT_NEIGHBOURS: [Type; 3] = [Type::F64, Type::F32, Type::F64];
const MIXED_NEIGHBOURS: [Type; 9] =
    [Type::F64, Type::I32, Type::F32, Type::U8, Type::CString, Type::F64, Type::Buffer, Type::I16, Type::U64];

/// Every type at every position from 1 to 20, among integers, among floats and among both; and signatures of up to 64 random types.
fn echoes() -> Vec<Echo> {
    let mut list = Vec::new();
    for (which, t) in TYPES.into_iter().enumerate() {
        for position in 0..20 {
            let neighbourhoods: [(&str, &[Type]); 3] =
                [("i", &INTEGER_NEIGHBOURS), ("f", &FLOAT_NEIGHBOURS), ("m", &MIXED_NEIGHBOURS)];
            for (letter, neighbours) in neighbourhoods {
                let count = position + 1 + (position * 7 + which * 3) % 5;
                let mut args: Vec<_> = neighbours.iter().copied().cycle().skip(which).take(count).collect();
                args[position] = t;
                let name = format!("echo_{letter}_{t}_{}", position + 1);
                list.push(Echo { name, args, echoed: position });
            }
        }
    }
    let mut random = Random(20);
    for count in 1..=64 {
        let args: Vec<_> = (0..count).map(|_| TYPES[random.below(TYPES.len())]).collect();
        let echoed = random.below(count);
        list.push(Echo { name: format!("echo_wide_{count}"), args, echoed });
    }
    // The last ones that fit the registers and the slot, and the first ones that do not.
    for (integers, floats) in
        [(6, 8), (7, 8), (6, 9), (6, 0), (7, 0), (0, 8), (0, 9), (15, 0), (16, 0), (0, 16)]
    {
        for echoed in [0, integers + floats - 1] {
            let mut args = vec![Type::I32; integers];
            args.extend(vec![Type::F32; floats]);
            list.push(Echo { name: format!("echo_edge_{integers}_{floats}_{echoed}"), args, echoed });
        }
    }
    list
}

fn echo_library() -> std::path::PathBuf {
    let source = echoes().iter().fold(C_PRELUDE.to_owned(), |source, echo| source + &echo.source());
    common::compile("echoes", &source, &[])
}

fn session() -> Session {
    Worker::spawn().unwrap().session().unwrap()
}

fn check_echo(
    echo: &Echo,
    function: &DynFunction,
    checksum: &hotcell::Function<fn() -> u64>,
    random: &mut Random,
    base: RemotePtr,
) {
    let samples: Vec<_> = echo.args.iter().map(|t| Sample::pick(*t, random, base)).collect();
    let result = function.call(samples.iter().map(Sample::arg).collect::<Vec<_>>()).unwrap();
    let expected = samples.iter().fold(1, |h, sample| mix(h, sample.bits()));
    assert_eq!(
        checksum.call().unwrap(),
        expected,
        "{} received something else than {samples:?}",
        echo.prototype()
    );
    let echoed = &samples[echo.echoed];
    assert!(echoed.is(&result), "{} returned {result:?} for {echoed:?}", echo.prototype());
}

#[test]
fn every_type_arrives_and_returns_in_every_position() {
    let _dog = common::watchdog(120);
    let module = session().load(echo_library()).unwrap();
    let base = module.session().alloc(16).unwrap();
    let checksum = module.function::<fn() -> u64>("checksum").unwrap();
    let mut random = Random(1);
    for echo in echoes() {
        let function = module.dynamic(&echo.name, echo.signature()).unwrap();
        assert_eq!(*function.signature(), echo.signature());
        for _ in 0..8 {
            check_echo(&echo, &function, &checksum, &mut random, base);
        }
    }
}

#[test]
fn text_declares_the_same_functions() {
    let _dog = common::watchdog(120);
    let module = session().load(echo_library()).unwrap();
    let base = module.session().alloc(16).unwrap();
    let checksum = module.function::<fn() -> u64>("checksum").unwrap();
    let echoes = echoes();
    for echo in &echoes {
        assert_eq!(parse_c(&echo.prototype()), Ok((echo.name.clone(), echo.signature())));
        assert_eq!(parse_json_one(&echo.json()), Ok(echo.signature()));
    }
    let c = echoes.iter().map(Echo::prototype).collect::<Vec<_>>().join(";\n");
    let json =
        echoes.iter().map(|echo| format!("{:?}:{}", echo.name, echo.json())).collect::<Vec<_>>().join(",");
    let mut random = Random(2);
    for text in [c, format!("{{{json}}}")] {
        let functions = module.declare(&text).unwrap();
        assert_eq!(functions.len(), echoes.len());
        for (echo, (name, function)) in echoes.iter().zip(&functions) {
            assert_eq!((name, function.signature()), (&echo.name, &echo.signature()));
            check_echo(echo, function, &checksum, &mut random, base);
        }
    }
}

#[test]
fn concurrent_callers_get_their_own_results() {
    let _dog = common::watchdog(120);
    // Through the ring as well as through the direct slot; the checksum is not asked for, since it is one for all.
    let module = session().load(echo_library()).unwrap();
    let base = module.session().alloc(16).unwrap();
    let echoes: Vec<_> = echoes().into_iter().step_by(7).collect();
    let functions: Vec<_> =
        echoes.iter().map(|echo| module.dynamic(&echo.name, echo.signature()).unwrap()).collect();
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let (echoes, functions) = (&echoes, &functions);
            scope.spawn(move || {
                let mut random = Random(100 + seed);
                for _ in 0..2000 {
                    let at = random.below(echoes.len());
                    let echo = &echoes[at];
                    let samples: Vec<_> =
                        echo.args.iter().map(|t| Sample::pick(*t, &mut random, base)).collect();
                    let result = functions[at].call(samples.iter().map(Sample::arg).collect::<Vec<_>>());
                    let result = result.unwrap();
                    let echoed = &samples[echo.echoed];
                    assert!(echoed.is(&result), "{} returned {result:?} for {echoed:?}", echo.prototype());
                }
            });
        }
    });
}

// Results.

/// Arguments in front of a result: none, a few, all registers, the stack, more than a slot holds.
///
/// With 6 and 8 all registers are in use, and a returned string makes two words more than the slot has: such a call once went the fast way
/// all the same, and the function received words that were never written.
const SHAPES: [(usize, usize); 9] =
    [(0, 0), (1, 0), (0, 1), (6, 7), (6, 8), (7, 0), (0, 9), (7, 7), (40, 24)];

fn result_library() -> std::path::PathBuf {
    let mut c = C_PRELUDE.to_owned();
    c.push_str(
        r#"
static uint64_t word;
static const char *text;
static char room[64];
void set_word(uint64_t w) { word = w; }
void set_text(const char *t) { text = 0; if (t) { strncpy(room, t, 63); text = room; } }
"#,
    );
    for (integers, floats) in SHAPES {
        let list = |c: &str, kind: &str, count: usize| {
            (0..count).map(|i| format!("{kind} {c}{i}")).collect::<Vec<_>>()
        };
        let mut args = list("i", "int", integers);
        args.extend(list("f", "double", floats));
        let args = if args.is_empty() { "void".to_owned() } else { args.join(", ") };
        let sum = (0..integers).map(|i| format!(" + i{i}")).collect::<String>()
            + &(0..floats).map(|i| format!(" + f{i}")).collect::<String>();
        // The whole register is set, whatever the declared type: the bits above it are what a compiler may leave there.
        let _ = writeln!(
            c,
            r"
uint64_t word_{integers}_{floats}({args}) {{ last_checksum = (uint64_t)(0.0 {sum}); return word; }}
double float_{integers}_{floats}({args}) {{ double d; last_checksum = (uint64_t)(0.0 {sum}); memcpy(&d, &word, 8); return d; }}
const char *text_{integers}_{floats}({args}) {{ last_checksum = (uint64_t)(0.0 {sum}); return text; }}
void void_{integers}_{floats}({args}) {{ last_checksum = (uint64_t)(0.0 {sum}); }}
"
        );
    }
    // What a callee that trusts nothing but the low 32 bits may look at.
    c.push_str("uint64_t raw_register(uint64_t x) { return x; }\n");
    c.push_str(
        "uint64_t raw_stack(long a, long b, long c, long d, long e, long f, uint64_t x) { return x; }\n",
    );
    common::compile("results", &c, &[])
}

fn shape_args(integers: usize, floats: usize) -> (Vec<Type>, Vec<Arg<'static>>, u64) {
    let types: Vec<_> = [vec![Type::I32; integers], vec![Type::F64; floats]].concat();
    let args = (1..=integers + floats)
        .map(|n| if n <= integers { Arg::Signed(n as i64) } else { Arg::Float(n as f64) })
        .collect();
    let n = (integers + floats) as u64;
    (types, args, n * (n + 1) / 2)
}

#[test]
fn results_of_every_type_ignore_the_bits_above_them() {
    let _dog = common::watchdog(120);
    let module = session().load(result_library()).unwrap();
    let checksum = module.function::<fn() -> u64>("checksum").unwrap();
    let set_word = module.function::<fn(u64)>("set_word").unwrap();
    let set_text = module.function::<fn(Option<In<CStr>>)>("set_text").unwrap();
    let base = module.session().alloc(16).unwrap();
    let mut random = Random(3);
    for (integers, floats) in SHAPES {
        for t in TYPES {
            let kind = match t {
                Type::F32 | Type::F64 => "float",
                Type::CString => "text",
                _ => "word",
            };
            let bits = match t {
                Type::Bool | Type::Char | Type::I8 | Type::U8 => 8,
                Type::I16 | Type::U16 => 16,
                Type::I32 | Type::U32 | Type::F32 => 32,
                _ => 64,
            };
            let (types, _, sum) = shape_args(integers, floats);
            let function =
                module.dynamic(&format!("{kind}_{integers}_{floats}"), Signature::new(types, t)).unwrap();
            for round in 0..24 {
                let sample = match t {
                    // The address of lent bytes is another one than of a result; as a result, `buffer` is an address.
                    Type::Buffer => Sample::pick(Type::Ptr, &mut random, base),
                    other => Sample::pick(other, &mut random, base),
                };
                let garbage = if round % 3 == 0 { u64::MAX } else { random.next() };
                match &sample {
                    Sample::Text(text) => set_text.call(text.as_deref()).unwrap(),
                    other => {
                        let above = if bits == 64 { 0 } else { garbage << bits };
                        let below = if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
                        set_word.call(above | (other.bits() & below)).unwrap();
                    }
                }
                let (_, args, _) = shape_args(integers, floats);
                let result = function.call(args).unwrap();
                assert!(sample.is(&result), "{t} after {integers}+{floats}: {result:?} for {sample:?}");
                assert_eq!(checksum.call().unwrap(), sum);
            }
        }
        let (types, args, sum) = shape_args(integers, floats);
        let function =
            module.dynamic(&format!("void_{integers}_{floats}"), Signature::new(types, Type::Void)).unwrap();
        set_word.call(u64::MAX).unwrap();
        assert_eq!(function.call(args).unwrap(), Value::Void);
        assert_eq!(checksum.call().unwrap(), sum);
    }
}

#[test]
fn errno_comes_with_results_of_every_shape() {
    let _dog = common::watchdog(120);
    let module = session().load(result_library()).unwrap();
    let set_text = module.function::<fn(Option<In<CStr>>)>("set_text").unwrap();
    set_text.call(Some(c"some text")).unwrap();
    for (integers, floats) in SHAPES {
        let (types, args, _) = shape_args(integers, floats);
        let function = module
            .dynamic(&format!("text_{integers}_{floats}"), Signature::new(types, Type::CString))
            .unwrap();
        let (value, errno) = function.call_errno(args).unwrap();
        assert_eq!((value, errno.0), (Value::CString(c"some text".into()), 0), "{integers}+{floats}");
    }
}

#[test]
fn typed_results_ignore_the_bits_above_them() {
    let _dog = common::watchdog(120);
    let module = session().load(result_library()).unwrap();
    let set_word = module.function::<fn(u64)>("set_word").unwrap();
    let set_text = module.function::<fn(Option<In<str>>)>("set_text").unwrap();
    macro_rules! check {
        ($kind:literal, $t:ty, $($value:expr),+) => {$({
            let value: $t = $value;
            let mut bytes = [0xa5u8; 8];
            bytes[..size_of::<$t>()].copy_from_slice(&value.to_le_bytes());
            set_word.call(u64::from_le_bytes(bytes)).unwrap();
            let none = module.function::<fn() -> $t>(concat!($kind, "_0_0")).unwrap().call().unwrap();
            let integer = module.function::<fn(i32) -> $t>(concat!($kind, "_1_0")).unwrap().call(1).unwrap();
            let float = module.function::<fn(f64) -> $t>(concat!($kind, "_0_1")).unwrap().call(1.0).unwrap();
            let stack = module.function::<fn(i32, i32, i32, i32, i32, i32, i32) -> $t>(concat!($kind, "_7_0")).unwrap();
            let stack = stack.call(1, 2, 3, 4, 5, 6, 7).unwrap();
            for given in [none, integer, float, stack] {
                assert_eq!(given.to_le_bytes(), value.to_le_bytes(), "{}", stringify!($t));
            }
        })+};
    }
    check!("word", i8, 0, 1, -1, i8::MIN, i8::MAX);
    check!("word", i16, 0, 1, -1, i16::MIN, i16::MAX);
    check!("word", i32, 0, 1, -1, i32::MIN, i32::MAX);
    check!("word", i64, 0, 1, -1, i64::MIN, i64::MAX);
    check!("word", isize, 0, 1, -1, isize::MIN, isize::MAX);
    check!("word", u8, 0, 1, 0x80, u8::MAX);
    check!("word", u16, 0, 1, 0x8000, u16::MAX);
    check!("word", u32, 0, 1, 0x8000_0000, u32::MAX);
    check!("word", u64, 0, 1, 1 << 63, u64::MAX);
    check!("word", usize, 0, 1, 1 << 63, usize::MAX);
    let signalling = (f32::from_bits(0x7f81_2345), f64::from_bits(0x7ff0_0000_dead_beef));
    check!("float", f32, 0.0, -0.0, f32::NEG_INFINITY, f32::MAX, f32::from_bits(1), signalling.0);
    check!("float", f64, 0.0, -0.0, f64::NEG_INFINITY, f64::MAX, f64::from_bits(1), signalling.1);

    let bool_result = module.function::<fn() -> bool>("word_0_0").unwrap();
    for (word, expected) in [(0, false), (1, true), (!0 << 8, false), ((!0 << 8) | 1, true)] {
        set_word.call(word).unwrap();
        assert_eq!(bool_result.call().unwrap(), expected, "{word:#x}");
    }
    set_word.call(u64::MAX).unwrap();
    module.function::<fn()>("void_0_0").unwrap().call().unwrap();
    let pointer = module.function::<fn() -> RemotePtr>("word_0_0").unwrap();
    assert_eq!(pointer.call().unwrap().address(), u64::MAX);
    set_word.call(0).unwrap();
    assert_eq!(pointer.call().unwrap(), RemotePtr::NULL);

    set_text.call(Some("text")).unwrap();
    assert_eq!(module.function::<fn() -> CString>("text_0_0").unwrap().call().unwrap().as_c_str(), c"text");
    let nullable = module.function::<fn() -> Nullable<CString>>("text_0_0").unwrap();
    assert_eq!(nullable.call().unwrap(), Some(c"text".into()));
    set_text.call(None).unwrap();
    assert_eq!(nullable.call().unwrap(), None);
}

#[test]
fn narrow_arguments_are_extended_as_compilers_expect() {
    let _dog = common::watchdog(120);
    // A caller compiled from C extends them to 32 bits, also on the stack, and some callees rely on it; the ABI's text leaves it open.
    let module = session().load(result_library()).unwrap();
    for (t, given, expected) in [
        (Type::I8, Arg::Signed(-1), 0xffff_ffff_u64),
        (Type::Char, Arg::Signed(-128), 0xffff_ff80),
        (Type::I16, Arg::Signed(-2), 0xffff_fffe),
        (Type::I32, Arg::Signed(-3), 0xffff_fffd),
        (Type::U8, Arg::Unsigned(0xff), 0xff),
        (Type::U16, Arg::Unsigned(0xffff), 0xffff),
        (Type::U32, Arg::Unsigned(0xffff_ffff), 0xffff_ffff),
        (Type::Bool, Arg::Bool(true), 1),
    ] {
        let register = module.dynamic("raw_register", Signature::new([t], Type::U32)).unwrap();
        assert_eq!(
            register.call([&to_value(&given)]).unwrap(),
            Value::Unsigned(expected),
            "{t} in a register"
        );
        let mut types = vec![Type::I64; 6];
        types.push(t);
        let stack = module.dynamic("raw_stack", Signature::new(types, Type::U32)).unwrap();
        let mut args: Vec<Arg<'_>> = (0..6).map(|_| Arg::Signed(-1)).collect();
        args.push(given);
        assert_eq!(stack.call(args).unwrap(), Value::Unsigned(expected), "{t} on the stack");
    }
}

fn to_value(arg: &Arg<'_>) -> Value {
    match arg {
        Arg::Bool(b) => Value::Bool(*b),
        Arg::Signed(n) => Value::Signed(*n),
        Arg::Unsigned(n) => Value::Unsigned(*n),
        other => panic!("{other}"),
    }
}

// Typed functions.

/// A Rust type, its C type, its values, and what a checksum becomes as a result of this type.
trait Scalar: Copy + PartialEq + std::fmt::Debug + 'static {
    const C: &'static str;
    const MIXED_BY: &'static str;
    fn bits(self) -> u64;
    fn sample(random: &mut Random) -> Self;
    fn from_checksum(h: u64) -> Self;
}

macro_rules! integer_scalars {
    ($($t:ident $c:literal $bits:literal),+) => {$(
        impl Scalar for $t {
            const C: &'static str = $c;
            const MIXED_BY: &'static str = $bits;
            fn bits(self) -> u64 {
                self as i64 as u64
            }
            fn sample(random: &mut Random) -> $t {
                match random.below(6) {
                    0 => $t::MIN,
                    1 => $t::MAX,
                    _ => random.next() as $t,
                }
            }
            fn from_checksum(h: u64) -> $t {
                h as $t
            }
        }
    )+};
}
integer_scalars! {
    i8 "signed char" "of_int", i16 "short" "of_int", i32 "int" "of_int", i64 "long" "of_int", isize "long" "of_int",
    u8 "unsigned char" "of_uint", u16 "unsigned short" "of_uint", u32 "unsigned" "of_uint",
    u64 "unsigned long" "of_uint", usize "size_t" "of_uint"
}

impl Scalar for bool {
    const C: &'static str = "_Bool";
    const MIXED_BY: &'static str = "of_uint";
    fn bits(self) -> u64 {
        self.into()
    }
    fn sample(random: &mut Random) -> bool {
        random.next() & 1 == 1
    }
    fn from_checksum(h: u64) -> bool {
        h != 0
    }
}

macro_rules! float_scalars {
    ($($t:ident $c:literal $bits:literal),+) => {$(
        impl Scalar for $t {
            const C: &'static str = $c;
            const MIXED_BY: &'static str = $bits;
            fn bits(self) -> u64 {
                self.to_bits().into()
            }
            fn sample(random: &mut Random) -> $t {
                // Any bits: NaNs of both kinds, denormals and infinities among them.
                match random.below(6) {
                    0 => -0.0,
                    1 => $t::from_bits(1),
                    2 => $t::NEG_INFINITY,
                    3 => $t::from_bits(($t::INFINITY.to_bits()) | 0x1234),
                    _ => $t::from_bits(random.next() as _),
                }
            }
            fn from_checksum(h: u64) -> $t {
                h as $t
            }
        }
    )+};
}
float_scalars! { f32 "float" "of_f32", f64 "double" "of_f64" }

macro_rules! typed {
    ($($name:ident: fn($($a:ident $t:ty),*) -> $r:ty;)+) => {
        fn typed_library() -> std::path::PathBuf {
            let mut c = C_PRELUDE.to_owned();
            $({
                let args: Vec<String> = vec![$(format!("{} {}", <$t>::C, stringify!($a))),*];
                let args = if args.is_empty() { "void".to_owned() } else { args.join(", ") };
                let mixed: Vec<String> =
                    vec![$(format!("h = mix(h, {}({}));", <$t>::MIXED_BY, stringify!($a))),*];
                let _ = writeln!(
                    c,
                    "{r} {}({args}) {{ uint64_t h = 1; {} last_checksum = h; return ({r})h; }}",
                    stringify!($name), mixed.join(" "), r = <$r>::C
                );
            })+
            common::compile("typed", &c, &[])
        }

        fn check_typed(module: &Module, random: &mut Random, rounds: usize) {
            let checksum = module.function::<fn() -> u64>("checksum").unwrap();
            $({
                let function = module.function::<fn($($t),*) -> $r>(stringify!($name)).unwrap();
                for _ in 0..rounds {
                    $(let $a = <$t>::sample(random);)*
                    #[allow(unused_mut)]
                    let mut h = 1;
                    $(h = mix(h, $a.bits());)*
                    let result = function.call($($a),*).unwrap();
                    assert_eq!(checksum.call().unwrap(), h, "{}{:?}", stringify!($name), ($($a,)*));
                    assert_eq!(result, <$r>::from_checksum(h), "{}{:?}", stringify!($name), ($($a,)*));
                    // The same call as a ticket goes through the ring.
                    let ticket = function.submit($($a),*).unwrap();
                    assert_eq!(ticket.wait().unwrap(), <$r>::from_checksum(h), "{}", stringify!($name));
                }
            })+
        }
    };
}
typed! {
    t0_u64: fn() -> u64;
    t0_i8: fn() -> i8;
    t0_f32: fn() -> f32;
    t1_bool: fn(a bool) -> bool;
    t1_i8: fn(a i8) -> u8;
    t1_i16: fn(a i16) -> u16;
    t1_i32: fn(a i32) -> u32;
    t1_i64: fn(a i64) -> u64;
    t1_isize: fn(a isize) -> usize;
    t1_u8: fn(a u8) -> i8;
    t1_u16: fn(a u16) -> i16;
    t1_u32: fn(a u32) -> i32;
    t1_u64: fn(a u64) -> i64;
    t1_usize: fn(a usize) -> isize;
    t1_f32: fn(a f32) -> f32;
    t1_f64: fn(a f64) -> f64;
    t2_fi: fn(a f32, b i8) -> i16;
    t2_if: fn(a u16, b f64) -> f64;
    t3: fn(a f64, b bool, c f32) -> u8;
    t4: fn(a i8, b u16, c f32, d i64) -> i8;
    t5: fn(a f64, b f32, c u8, d i16, e f64) -> f32;
    t6_i: fn(a i8, b i16, c i32, d i64, e u8, f u16) -> u32;
    t6_f: fn(a f32, b f64, c f32, d f64, e f32, f f64) -> f64;
    t7_i: fn(a u64, b i8, c u8, d i16, e bool, f u32, g i8) -> i64;
    t7_m: fn(a f32, b i8, c f64, d i16, e f32, f u32, g i64) -> bool;
    t8_f: fn(a f32, b f64, c f32, d f64, e f32, f f64, g f32, h_ f64) -> f32;
    t8_m: fn(a i8, b f64, c i16, d f64, e u8, f f32, g u16, h_ f32) -> i8;
    t9_f: fn(a f32, b f64, c f32, d f64, e f32, f f64, g f32, h_ f64, i f32) -> f64;
    t9_i: fn(a i8, b u8, c i16, d u16, e i32, f u32, g i64, h_ u64, i bool) -> u16;
    t10: fn(a i8, b f32, c u8, d f64, e i16, f f32, g u16, h_ f64, i i32, j f32) -> i16;
    t11: fn(a f64, b i64, c f64, d i64, e f64, f i64, g f64, h_ i64, i f64, j i64, k i8) -> i32;
    t12_i: fn(a i8, b u8, c i16, d u16, e i32, f u32, g i8, h_ u8, i i16, j u16, k bool, l isize) -> u8;
    t12_f: fn(a f32, b f64, c f32, d f64, e f32, f f64, g f32, h_ f64, i f32, j f64, k f32, l f64) -> f32;
    t12_m: fn(a f32, b i8, c f64, d u8, e f32, f i16, g f64, h_ u16, i f32, j i32, k f64, l u64) -> f64;
    t12_r: fn(a f32, b i8, c f64, d u8, e f32, f i16, g f64, h_ u16, i f32, j i32, k f64, l f32) -> u64;
}

#[test]
fn typed_functions_pass_every_type_up_to_twelve_arguments() {
    let _dog = common::watchdog(120);
    let module = session().load(typed_library()).unwrap();
    check_typed(&module, &mut Random(5), 40);
}

// Variadic functions.

const VARIADIC: &str = r#"
static uint64_t of_kinds(uint64_t h, const char *kinds, va_list list) {
    for (; *kinds; kinds++) {
        switch (*kinds) {
        case 'i': h = mix(h, of_int(va_arg(list, int))); break;
        case 'u': h = mix(h, of_uint(va_arg(list, unsigned))); break;
        case 'l': h = mix(h, of_int(va_arg(list, long))); break;
        case 'z': h = mix(h, of_uint(va_arg(list, size_t))); break;
        case 'd': h = mix(h, of_f64(va_arg(list, double))); break;
        case 'p': h = mix(h, of_ptr(va_arg(list, void *))); break;
        case 's': h = mix(h, of_text(va_arg(list, const char *))); break;
        case 'b': h = mix(h, of_buffer(va_arg(list, unsigned char *))); break;
        default: return 0;
        }
    }
    return h;
}
uint64_t sum_one(const char *kinds, ...) {
    va_list list;
    va_start(list, kinds);
    uint64_t h = of_kinds(1, kinds, list);
    va_end(list);
    return h;
}
double sum_three(float x, signed char y, const char *kinds, ...) {
    va_list list;
    va_start(list, kinds);
    uint64_t h = of_kinds(mix(mix(1, of_f32(x)), of_int(y)), kinds, list);
    va_end(list);
    double d;
    memcpy(&d, &h, 8);
    return d;
}
"#;

const KINDS: [(char, Type); 8] = [
    ('i', Type::I32),
    ('d', Type::F64),
    ('s', Type::CString),
    ('p', Type::Ptr),
    ('l', Type::I64),
    ('u', Type::U32),
    ('z', Type::U64),
    ('b', Type::Buffer),
];

fn variadic_module() -> Module {
    let source = format!("{C_PRELUDE}{VARIADIC}");
    session().load(common::compile("variadic", &source, &[])).unwrap()
}

fn check_variadic(module: &Module, kinds: &str, random: &mut Random, base: RemotePtr) {
    let types: Vec<_> =
        kinds.chars().map(|k| KINDS.iter().find(|(letter, _)| *letter == k).unwrap().1).collect();
    let samples: Vec<_> = types.iter().map(|t| Sample::pick(*t, random, base)).collect();
    let kinds_c = CString::new(kinds).unwrap();
    let tail = |h| samples.iter().fold(h, |h, sample| mix(h, sample.bits()));

    let mut signature = Signature::new([vec![Type::CString], types.clone()].concat(), Type::U64);
    signature.variadic_after = Some(1);
    let function = module.dynamic("sum_one", signature).unwrap();
    let mut args = vec![Arg::CStr(&kinds_c)];
    args.extend(samples.iter().map(Sample::arg));
    assert_eq!(function.call(args).unwrap(), Value::Unsigned(tail(1)), "{kinds} {samples:?}");

    let fixed = vec![Type::F32, Type::I8, Type::CString];
    let mut signature = Signature::new([fixed, types].concat(), Type::F64);
    signature.variadic_after = Some(3);
    let function = module.dynamic("sum_three", signature).unwrap();
    let (x, y) = (f32::MIN_POSITIVE, -7i8);
    let mut args = vec![x.into(), y.into(), Arg::CStr(&kinds_c)];
    args.extend(samples.iter().map(Sample::arg));
    let h = tail(mix(mix(1, x.to_bits().into()), i64::from(y).cast_unsigned()));
    let given = f64::try_from(function.call(args).unwrap()).unwrap();
    assert_eq!(given.to_bits(), h, "{kinds} {samples:?}");
}

#[test]
fn variadic_functions_get_every_mix_of_types() {
    let _dog = common::watchdog(120);
    let module = variadic_module();
    let base = module.session().alloc(16).unwrap();
    let mut random = Random(6);
    // Every mix of int, double, string and pointer of up to four arguments.
    for count in 0..=4 {
        for which in 0..4usize.pow(count) {
            let kinds: String = (0..count).map(|i| KINDS[which / 4usize.pow(i) % 4].0).collect();
            check_variadic(&module, &kinds, &mut random, base);
        }
    }
    // Longer ones by chance, up to the limit of 64 arguments.
    for count in (5..=61).chain([61]) {
        let kinds: String = (0..count).map(|_| KINDS[random.below(KINDS.len())].0).collect();
        check_variadic(&module, &kinds, &mut random, base);
    }
}

#[test]
fn snprintf_formats_what_it_is_given() {
    let _dog = common::watchdog(120);
    let libc = session().load("libc.so.6").unwrap();
    let snprintf = libc
        .variadic_function::<fn(Out<[u8]>, usize, In<CStr>, i32, f64, In<str>, RemotePtr, i64, u64) -> i32>(
            "snprintf", 3,
        )
        .unwrap();
    let mut text = [0u8; 200];
    let pointer = libc.session().alloc(1).unwrap();
    let length = snprintf
        .call(&mut text, 200, c"%d|%.3f|%s|%p|%ld|%lu", i32::MIN, -0.5, "text", pointer, i64::MIN, u64::MAX)
        .unwrap();
    let expected = format!("{}|-0.500|text|{pointer}|{}|{}", i32::MIN, i64::MIN, u64::MAX);
    assert_eq!(text[..usize::try_from(length).unwrap()], *expected.as_bytes());

    let snprintf = libc
        .prototype("int snprintf(buffer, size_t, const char *, ..., double, double, double, double, double, double, double, double, double, int)")
        .unwrap();
    let mut text = [0u8; 200];
    let length = snprintf
        .call(vec![
            Arg::from(&mut text),
            200.into(),
            c"%g %g %g %g %g %g %g %g %g %d".into(),
            1.5.into(),
            2.5.into(),
            3.5.into(),
            4.5.into(),
            5.5.into(),
            6.5.into(),
            7.5.into(),
            8.5.into(),
            9.5.into(),
            (-10).into(),
        ])
        .unwrap();
    let expected = "1.5 2.5 3.5 4.5 5.5 6.5 7.5 8.5 9.5 -10";
    assert_eq!(length, Value::Signed(expected.len() as i64));
    assert_eq!(text[..expected.len()], *expected.as_bytes());
}

#[test]
fn unpromoted_variadic_arguments_are_refused() {
    let _dog = common::watchdog(120);
    let module = variadic_module();
    let name = module.name().to_owned();
    let refused = |error: LoadError, words: &[&str]| {
        assert!(matches!(error, LoadError::BadSignature { .. }), "{error:?}");
        let text = error.to_string();
        for word in [name.as_str(), "sum_one"].iter().chain(words) {
            assert!(text.contains(word), "{word:?} is not in {text:?}");
        }
    };
    for (t, promoted) in [
        (Type::F32, "f64"),
        (Type::Bool, "i32"),
        (Type::Char, "i32"),
        (Type::I8, "i32"),
        (Type::I16, "i32"),
        (Type::U8, "i32"),
        (Type::U16, "i32"),
    ] {
        let mut signature = Signature::new([Type::CString, Type::I32, t], Type::U64);
        signature.variadic_after = Some(1);
        let error = module.dynamic("sum_one", signature.clone()).unwrap_err();
        refused(error, &["argument 3", t.name(), promoted]);
        // As a fixed argument it is fine.
        signature.variadic_after = Some(3);
        module.dynamic("sum_one", signature).unwrap();

        let text = format!("uint64_t sum_one(const char *, ..., int, {})", t.name());
        let error = module.prototype(&text).unwrap_err();
        assert!(matches!(error, LoadError::Signature { .. }), "{error:?}");
        let source = std::error::Error::source(&error).unwrap().to_string();
        for word in ["argument 3", "sum_one", t.name(), promoted] {
            assert!(source.contains(word), "{word:?} is not in {source:?}");
        }
        let json =
            format!(r#"{{"sum_one":{{"args":["cstring","i32","{t}"],"returns":"u64","variadic":1}}}}"#);
        assert!(matches!(module.declare(&json), Err(LoadError::Signature { .. })));
    }
    refused(module.variadic_function::<fn(In<CStr>, f32) -> u64>("sum_one", 1).unwrap_err(), &["f32", "f64"]);
    refused(module.variadic_function::<fn(In<CStr>, u8) -> u64>("sum_one", 1).unwrap_err(), &["u8", "i32"]);
    refused(module.variadic_function::<fn(In<CStr>) -> u64>("sum_one", 2).unwrap_err(), &["2 fixed", "of 1"]);
}

#[test]
fn impossible_signatures_are_refused_by_name() {
    let _dog = common::watchdog(120);
    let module = variadic_module();
    for (signature, words) in [
        (Signature::new([Type::I32, Type::Void], Type::U64), ["argument 2", "void"]),
        (Signature::new([Type::I32; 65], Type::U64), ["65", "64"]),
        (Signature::new([Type::I32; 300], Type::U64), ["300", "64"]),
    ] {
        let error = module.dynamic("sum_one", signature).unwrap_err();
        assert!(matches!(error, LoadError::BadSignature { .. }), "{error:?}");
        let text = error.to_string();
        for word in [module.name(), "sum_one"].into_iter().chain(words) {
            assert!(text.contains(word), "{word:?} is not in {text:?}");
        }
    }
    let too_many = module.function::<fn() -> u64>("checksum").unwrap();
    assert_eq!(too_many.call().unwrap(), 0);
}

#[test]
fn calls_by_name_check_kind_and_range() {
    let _dog = common::watchdog(120);
    let module = session().load(echo_library()).unwrap();
    for (t, bad) in [
        (Type::Bool, vec![Arg::Signed(2), Arg::Null, Arg::Str("x"), Arg::Float(0.5)]),
        (Type::Char, vec![Arg::Signed(128), Arg::Signed(-129), Arg::Float(1.5), Arg::Null]),
        (Type::I8, vec![Arg::Signed(128), Arg::Unsigned(128), Arg::Float(f64::NAN)]),
        (Type::I16, vec![Arg::Signed(32768), Arg::Signed(-32769), Arg::Str("1")]),
        (Type::I32, vec![Arg::Signed(1 << 31), Arg::Signed(-(1 << 31) - 1), Arg::Bytes(b"1")]),
        (Type::I64, vec![Arg::Unsigned(1 << 63), Arg::Float(9.3e18), Arg::Float(-9.3e18)]),
        (Type::U8, vec![Arg::Signed(-1), Arg::Unsigned(256)]),
        (Type::U16, vec![Arg::Signed(-1), Arg::Unsigned(65536)]),
        (Type::U32, vec![Arg::Signed(-1), Arg::Unsigned(1 << 32)]),
        (Type::U64, vec![Arg::Signed(-1), Arg::Float(2f64.powi(64)), Arg::Float(f64::INFINITY)]),
        (Type::F32, vec![Arg::Bool(true), Arg::Str("1.0"), Arg::Null]),
        (Type::F64, vec![Arg::Bool(true), Arg::Ptr(RemotePtr::NULL), Arg::Null]),
        (Type::Ptr, vec![Arg::Signed(1), Arg::Float(0.0), Arg::Bool(false)]),
        (Type::CString, vec![Arg::Signed(0), Arg::Bytes(b"no nul"), Arg::Bytes(b"")]),
        (Type::Buffer, vec![Arg::Unsigned(0), Arg::Float(0.0)]),
        (Type::I64Fast, vec![Arg::Unsigned(1 << 63), Arg::Null]),
        (Type::U64Fast, vec![Arg::Signed(-1), Arg::Null]),
    ] {
        let symbol = format!("echo_i_{t}_1");
        let function = module.dynamic(&symbol, Signature::new([t], t)).unwrap();
        for arg in bad {
            let given = arg.to_string();
            let error = function.call([arg]).unwrap_err();
            assert!(matches!(error, CallError::WrongArgument { index: 1, expected, .. } if expected == t));
            assert!(!error.may_have_run() && error.session_usable());
            let text = error.to_string();
            for word in ["argument 1", symbol.as_str(), module.name(), t.name(), given.as_str()] {
                assert!(text.contains(word), "{word:?} is not in {text:?}");
            }
        }
    }
}

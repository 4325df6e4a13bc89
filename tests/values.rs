//! Strings, bytes, structs, pointers and blocks: what crosses, what is refused and how the refusal reads.
#![allow(unsafe_code, reason = "plain structs are declared as such by hand")]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "test values are cut to size on purpose"
)]

mod common;
#[path = "common/in_time.rs"]
mod in_time;

use hotcell::bytemuck::{Pod, Zeroable};
use hotcell::{
    Arg, Block, CallError, Callback, In, InOut, Module, Nullable, OnDeadline, Out, RemotePtr, Session,
    SessionBuilder, Signature, Type, Value, WithErrno, Worker,
};
use in_time::{in_time, prepared};
use std::ffi::{CStr, CString};
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
/// Room in the reply for a returned string; a longer one takes a second round.
const STRING_ROOM: usize = 1024;
/// Payload that the direct slot keeps for itself; a larger one takes a block of the arena.
const SCRATCH: usize = 64 * KIB;

const FIXTURE: &str = r#"
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

uint64_t text_length(const char *t) { return t ? strlen(t) : UINT64_MAX; }
uint64_t bytes_sum(const unsigned char *p, size_t n) { uint64_t h = n; for (size_t i = 0; i < n; i++) h = h * 31 + p[i]; return h; }
int is_null(const void *p) { return p == 0; }
uint64_t address(const void *p) { return (uintptr_t)p; }

static char *kept;
// A string of n bytes that count up from 'a'.
const char *text_of(size_t n) {
    free(kept);
    kept = malloc(n + 1);
    for (size_t i = 0; i < n; i++) kept[i] = 'a' + i % 26;
    kept[n] = 0;
    return kept;
}
const char *no_text(void) { errno = ENOENT; return 0; }
const char *latin1(void) { return "caf\xe9"; }
const char *wild_text(void) { return (const char *)16; }

#define SLICES(T, N) \
    T sum_##N(const T *p, size_t n) { T s = 0; for (size_t i = 0; i < n; i++) s += p[i]; return s; } \
    void fill_##N(T *p, size_t n, T first) { for (size_t i = 0; i < n; i++) p[i] = first + (T)i; } \
    void double_##N(T *p, size_t n) { for (size_t i = 0; i < n; i++) p[i] = p[i] + p[i]; }
SLICES(uint8_t, u8) SLICES(int8_t, i8) SLICES(uint16_t, u16) SLICES(int16_t, i16) SLICES(uint32_t, u32)
SLICES(int32_t, i32) SLICES(uint64_t, u64) SLICES(int64_t, i64) SLICES(float, f32) SLICES(double, f64)

void copy_bytes(void *to, const void *from, size_t n) { memcpy(to, from, n); }
void fill(void *to, int byte, size_t n) { memset(to, byte, n); }
void touch_nothing(void *p) { (void)p; }

struct padded { uint8_t tag; uint32_t number; double real; uint16_t tail; };
uint64_t padded_size(void) { return sizeof(struct padded); }
double padded_sum(const struct padded *p) { return p->tag + p->number + p->real + p->tail; }
void padded_make(struct padded *p) { p->tag = 1; p->number = 0xdeadbeef; p->real = -0.5; p->tail = 0xabcd; }
void padded_step(struct padded *p) { p->tag++; p->number++; p->real *= 2; p->tail++; }

struct span { unsigned char *data; uint64_t length; };
uint64_t span_sum(const struct span *s) { return bytes_sum(s->data, s->length); }
void span_fill(const struct span *s, int byte) { memset(s->data, byte, s->length); }

struct counter { int value; };
int counter_new(struct counter **out) { *out = malloc(sizeof **out); (*out)->value = 0; return 0; }
int counter_add(struct counter *c, int by) { return c->value += by; }
int counter_none(struct counter **out) { (void)out; return -1; }
void counter_free(struct counter *c) { free(c); }

static unsigned char *stored;
void store(unsigned char *p) { stored = p; }
int stored_byte(size_t i) { return stored[i]; }
void stored_set(size_t i, int byte) { stored[i] = byte; }
const void *stored_pointer(void) { return stored; }

int open_missing(const char *path) { return open(path, O_RDONLY); }
int leave_errno_alone(int x) { return x; }
const char *text_and_errno(void) { errno = EAGAIN; return "text"; }
double many_and_errno(double a, int b, int c, int d, int e, int f, int g, int h) { errno = ERANGE; return a + b + c + d + e + f + g + h; }

int apply(int (*f)(int), int x) { return f(x); }
void sleep_ms(int ms) { usleep(ms * 1000); }
int add(int a, int b) { return a + b; }
"#;

fn fixture() -> std::path::PathBuf {
    common::compile("values", FIXTURE, &[])
}

fn module_in(session: &Session) -> Module {
    session.load(fixture()).unwrap()
}

fn module() -> Module {
    module_in(&Worker::spawn().unwrap().session().unwrap())
}

fn module_with(options: SessionBuilder) -> Module {
    module_in(&Worker::spawn().unwrap().session_with(options).unwrap())
}

/// Still the same worker, and it still computes.
fn assert_unharmed(module: &Module) {
    let session = module.session();
    assert!(session.worker().is_alive(), "{:?}", session.worker().crash_report());
    assert_eq!(module.function::<fn(i32, i32) -> i32>("add").unwrap().call(2, 3).unwrap(), 5);
}

fn assert_says(error: &CallError, words: &[&str]) {
    let text = error.to_string();
    for word in words {
        assert!(text.contains(word), "{word:?} is not in {text:?}");
    }
}

/// A repeating text of `length` bytes, as the fixture makes it.
fn text_of(length: usize) -> CString {
    CString::new((0..length).map(|i| b'a' + (i % 26) as u8).collect::<Vec<_>>()).unwrap()
}

fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(bytes.len() as u64, |h, b| h.wrapping_mul(31).wrapping_add(u64::from(*b)))
}

// Strings.

#[test]
fn strings_go_in_with_all_their_bytes() {
    let _dog = common::watchdog(120);
    let module = module();
    let str_length = module.function::<fn(In<str>) -> u64>("text_length").unwrap();
    let c_length = module.function::<fn(In<CStr>) -> u64>("text_length").unwrap();
    let by_name = module.prototype("uint64_t text_length(const char *)").unwrap();
    let bytes_sum = module.function::<fn(In<CStr>, u64) -> u64>("bytes_sum").unwrap();
    for length in [0, 1, 63, 64, 65, STRING_ROOM, SCRATCH - 1, SCRATCH, SCRATCH + 1, MIB] {
        let text = text_of(length);
        let str = text.to_str().unwrap();
        assert_eq!(str_length.call(str).unwrap(), length as u64);
        assert_eq!(c_length.call(&text).unwrap(), length as u64);
        assert_eq!(by_name.call([str]).unwrap(), Value::Unsigned(length as u64));
        assert_eq!(by_name.call([text.as_c_str()]).unwrap(), Value::Unsigned(length as u64));
        assert_eq!(by_name.call([text.as_bytes_with_nul()]).unwrap(), Value::Unsigned(length as u64));
        assert_eq!(bytes_sum.call(&text, length as u64).unwrap(), sum(text.as_bytes()));
    }
    // A shorter string after a longer one ends where it ends.
    assert_eq!(str_length.call("grüße").unwrap(), 7);
    let optional = module.function::<fn(Option<In<str>>) -> u64>("text_length").unwrap();
    assert_eq!(optional.call(Some("x")).unwrap(), 1);
    assert_eq!(optional.call(None).unwrap(), u64::MAX);
    assert_eq!(by_name.call([Arg::Null]).unwrap(), Value::Unsigned(u64::MAX));
}

#[test]
fn a_nul_inside_a_string_is_refused_before_the_call() {
    let _dog = common::watchdog(120);
    let module = module();
    let typed = module.function::<fn(In<str>) -> u64>("text_length").unwrap();
    let by_name = module.prototype("uint64_t bytes_sum(buffer, size_t)").unwrap();
    let text = module.prototype("uint64_t text_length(const char *)").unwrap();
    for bad in ["\0", "a\0", "a\0b", "\0b"] {
        for error in [typed.call(bad).unwrap_err(), text.call([bad]).unwrap_err()] {
            assert!(matches!(error, CallError::InteriorNul { .. }), "{error:?}");
            assert!(!error.may_have_run() && error.session_usable());
            assert_says(&error, &["text_length", module.name(), "NUL"]);
        }
        // The refusal comes after a slot was claimed: it must come back, in both lanes.
        assert!(matches!(typed.submit(bad), Err(CallError::InteriorNul { .. })));
    }
    let error = by_name.call((Arg::Str("a\0b"), 3)).unwrap_err();
    assert!(matches!(error, CallError::InteriorNul { index: 1, .. }), "{error:?}");
    for _ in 0..600 {
        assert!(typed.submit("a\0b").is_err());
    }
    assert_eq!(typed.submit("abc").unwrap().wait().unwrap(), 3);
    assert_unharmed(&module);
}

#[test]
fn strings_come_out_whole_at_every_length() {
    let _dog = common::watchdog(120);
    let module = module();
    let typed = module.function::<fn(usize) -> CString>("text_of").unwrap();
    let with_errno = module.function::<fn(usize) -> WithErrno<CString>>("text_of").unwrap();
    let by_name = module.prototype("const char *text_of(size_t)").unwrap();
    let page = 4096;
    let lengths = [0, 1, 2, STRING_ROOM - 2, STRING_ROOM - 1, STRING_ROOM, STRING_ROOM + 1, STRING_ROOM + 2]
        .into_iter()
        .chain([
            page - 1,
            page,
            page + 1,
            16 * KIB - 1,
            16 * KIB,
            16 * KIB + 1,
            SCRATCH - 1,
            SCRATCH,
            SCRATCH + 1,
        ])
        .chain([256 * KIB - 1, 256 * KIB, 256 * KIB + 1, MIB]);
    for length in lengths {
        let expected = text_of(length);
        assert!(typed.call(length).unwrap() == expected, "{length}");
        assert!(typed.submit(length).unwrap().wait().unwrap() == expected, "{length}, as a ticket");
        let (text, _) = with_errno.call(length).unwrap();
        assert!(text == expected, "{length}, with errno");
        assert!(by_name.call([length]).unwrap() == Value::CString(expected), "{length}, by name");
    }
}

#[test]
fn strings_over_the_limit_are_an_error_and_at_the_limit_are_not() {
    let _dog = common::watchdog(120);
    for max in [1, 10, STRING_ROOM - 1, STRING_ROOM, STRING_ROOM + 1, 5000, 300 * KIB] {
        let module = module_with(SessionBuilder::new().string_bytes_max(max as u64));
        let typed = module.function::<fn(usize) -> CString>("text_of").unwrap();
        let nullable = module.function::<fn(usize) -> Nullable<CString>>("text_of").unwrap();
        let by_name = module.prototype("const char *text_of(size_t)").unwrap();
        for length in [0, max - 1, max] {
            assert!(typed.call(length).unwrap() == text_of(length), "{length} of {max}");
            assert!(by_name.call([length]).unwrap() == Value::CString(text_of(length)));
        }
        for length in [max + 1, max + STRING_ROOM, 2 * MIB] {
            for error in [
                typed.call(length).unwrap_err(),
                nullable.call(length).unwrap_err(),
                by_name.call([length]).unwrap_err(),
            ] {
                let stated = match &error {
                    CallError::StringTooLong { max, .. } => *max,
                    other => panic!("{other:?} for {length} of {max}"),
                };
                assert_eq!(stated, max as u64);
                assert!(error.may_have_run() && error.session_usable());
                assert_says(&error, &["text_of", module.name(), &max.to_string()]);
            }
        }
        assert_unharmed(&module);
    }
}

#[test]
fn null_strings_are_errors_or_none() {
    let _dog = common::watchdog(120);
    let module = module();
    let error = module.function::<fn() -> CString>("no_text").unwrap().call().unwrap_err();
    assert!(matches!(error, CallError::NullString { .. }));
    assert!(error.may_have_run() && error.session_usable());
    assert_says(&error, &["no_text", module.name(), "null"]);
    let nullable = module.function::<fn() -> Nullable<CString>>("no_text").unwrap();
    assert_eq!(nullable.call().unwrap(), None);
    let (text, errno) =
        module.function::<fn() -> WithErrno<Nullable<CString>>>("no_text").unwrap().call().unwrap();
    assert_eq!((text, errno.0), (None, libc::ENOENT));
    let by_name = module.prototype("const char *no_text(void)").unwrap();
    let value = by_name.call(()).unwrap();
    assert!(value.is_null() && value == Value::Null);
    assert!(String::try_from(value.clone()).is_err());
    assert_eq!(Option::<CString>::try_from(value).unwrap(), None);
}

#[test]
fn strings_that_are_not_utf8_keep_their_bytes() {
    let _dog = common::watchdog(120);
    let module = module();
    let text = module.function::<fn() -> CString>("latin1").unwrap().call().unwrap();
    assert_eq!(text.as_bytes(), b"caf\xe9");
    let value = module.prototype("const char *latin1(void)").unwrap().call(()).unwrap();
    let error = String::try_from(value.clone()).unwrap_err();
    assert_says(&error, &["UTF-8"]);
    assert_eq!(CString::try_from(value).unwrap().as_bytes(), b"caf\xe9");
    let length = module.function::<fn(In<CStr>) -> u64>("text_length").unwrap();
    assert_eq!(length.call(c"\xff\xfe").unwrap(), 2);
}

#[test]
fn a_returned_string_that_is_none_crashes_like_any_use_of_it() {
    let _dog = common::watchdog(120);
    let module = module();
    let error = module.function::<fn() -> CString>("wild_text").unwrap().call().unwrap_err();
    assert!(matches!(error, CallError::Crashed(_)), "{error:?}");
    assert!(error.may_have_run());
    assert_says(&error, &["wild_text"]);
}

#[test]
fn a_long_string_needs_no_free_slot() {
    let _dog = common::watchdog(120);
    let module = module_with(SessionBuilder::new().slots(2).timeout(Duration::from_secs(60)));
    let add = module.function::<fn(i32, i32) -> i32>("add").unwrap();
    let text = module.function::<fn(usize) -> CString>("text_of").unwrap();
    let by_name = module.prototype("const char *text_of(size_t)").unwrap();
    let held = add.submit(1, 2).unwrap();
    assert!(text.call(5000).unwrap() == text_of(5000));
    assert!(CString::try_from(by_name.call([5000]).unwrap()).unwrap() == text_of(5000));
    assert_eq!(held.wait().unwrap(), 3);
}

#[test]
fn a_long_string_survives_the_calls_after_its_own() {
    let _dog = common::watchdog(120);
    // The function uses one buffer for all its strings. Long ones were once read from it when later calls had overwritten it.
    let text = module().function::<fn(usize) -> CString>("text_of").unwrap();
    let tickets: Vec<_> = (0..20).map(|i| (1000 + i * 300, text.submit(1000 + i * 300).unwrap())).collect();
    while !tickets.iter().all(|(_, ticket)| ticket.is_done()) {
        std::thread::yield_now();
    }
    for (length, ticket) in tickets {
        assert!(ticket.wait().unwrap() == text_of(length), "{length}");
    }
}

#[test]
fn a_long_string_that_cannot_be_fetched_says_that_the_function_ran() {
    let _dog = common::watchdog(120);
    // Fetching it takes room in the arena. The error for want of it once was that of a call that had not run.
    let options = SessionBuilder::new().payload_bytes_max(16 << 10).string_bytes_max(16 << 10);
    let module = module_with(options);
    let text = module.function::<fn(usize) -> CString>("text_of").unwrap();
    let by_name = module.prototype("const char *text_of(size_t)").unwrap();
    let session = module.session();
    let mut held = Vec::new();
    for bytes in [16 << 10, 64] {
        while let Ok(block) = session.block(bytes) {
            held.push(block);
        }
    }
    for error in [text.call(5000).unwrap_err(), by_name.call([5000]).unwrap_err()] {
        assert!(
            matches!(&error, CallError::StringLost { source, .. } if matches!(**source, CallError::NoRoom { .. })),
            "{error:?}"
        );
        assert!(error.may_have_run() && error.session_usable());
        assert_says(&error, &["text_of", module.name(), "string"]);
    }
    drop(held);
    assert!(text.call(5000).unwrap() == text_of(5000));
}

// Bytes.

#[test]
fn bytes_of_every_size_go_in_out_and_both() {
    let _dog = common::watchdog(120);
    let module = module();
    let bytes_sum = module.function::<fn(In<[u8]>, usize) -> u64>("bytes_sum").unwrap();
    let copy = module.function::<fn(Out<[u8]>, In<[u8]>, usize)>("copy_bytes").unwrap();
    let double = module.function::<fn(InOut<[u8]>, usize)>("double_u8").unwrap();
    let sum_by_name = module.prototype("uint64_t bytes_sum(buffer, size_t)").unwrap();
    let copy_by_name = module.prototype("void copy_bytes(void *, const void *, size_t)").unwrap();
    let double_by_name = module.prototype("void double_u8(void *, size_t)").unwrap();
    for size in [0, 1, 7, 8, 9, 63, 64, 65, SCRATCH / 2, SCRATCH - 1, SCRATCH, SCRATCH + 1, MIB] {
        let bytes: Vec<u8> = (0..size).map(|i| (i * 7 + i / 256) as u8).collect();
        let doubled: Vec<u8> = bytes.iter().map(|b| b.wrapping_add(*b)).collect();

        assert_eq!(bytes_sum.call(&bytes, size).unwrap(), sum(&bytes), "{size}");
        assert_eq!(sum_by_name.call((&bytes, size)).unwrap(), Value::Unsigned(sum(&bytes)), "{size}");
        assert_eq!(bytes_sum.submit(&bytes, size).unwrap().wait().unwrap(), sum(&bytes), "{size}");

        let mut target = vec![0xee; size];
        copy.call(&mut target, &bytes, size).unwrap();
        assert!(target == bytes, "{size}");
        target.fill(0xee);
        copy_by_name.call((hotcell::out(&mut target), &bytes, size)).unwrap();
        assert!(target == bytes, "{size}");

        let mut both = bytes.clone();
        double.call(&mut both, size).unwrap();
        assert!(both == doubled, "{size}");
        double_by_name.call((&mut target, size)).unwrap();
        assert!(target == doubled, "{size}");
    }
    assert_unharmed(&module);
}

#[test]
fn empty_bytes_are_no_null_pointer_and_none_is() {
    let _dog = common::watchdog(120);
    let module = module();
    assert_eq!(module.function::<fn(In<[u8]>) -> i32>("is_null").unwrap().call(&[]).unwrap(), 0);
    assert_eq!(module.function::<fn(Out<[u64]>) -> i32>("is_null").unwrap().call(&mut []).unwrap(), 0);
    assert_eq!(module.function::<fn(In<[()]>) -> i32>("is_null").unwrap().call(&[(), ()]).unwrap(), 0);
    assert_eq!(module.function::<fn(In<str>) -> i32>("is_null").unwrap().call("").unwrap(), 0);
    macro_rules! none {
        ($($t:ty),+) => {$(
            let function = module.function::<fn(Option<$t>) -> i32>("is_null").unwrap();
            assert_eq!(function.call(None).unwrap(), 1, "{}", stringify!($t));
        )+};
    }
    none!(
        In<[u8]>,
        Out<[u8]>,
        InOut<[u8]>,
        In<u64>,
        Out<u64>,
        InOut<u64>,
        Out<RemotePtr>,
        In<str>,
        In<CStr>,
        Block
    );
    let by_name = module.prototype("int is_null(void *)").unwrap();
    assert_eq!(by_name.call([Arg::Null]).unwrap(), Value::Signed(1));
    assert_eq!(by_name.call([None::<&str>]).unwrap(), Value::Signed(1));
    assert_eq!(by_name.call([RemotePtr::NULL]).unwrap(), Value::Signed(1));
    assert_eq!(by_name.call([b""]).unwrap(), Value::Signed(0));
    // What a function leaves alone is left alone, or null.
    let mut pointer = module.session().alloc(1).unwrap();
    module.function::<fn(Out<RemotePtr>)>("touch_nothing").unwrap().call(&mut pointer).unwrap();
    assert!(pointer.is_null());
    let mut value = 7u64;
    module.function::<fn(Option<InOut<u64>>)>("touch_nothing").unwrap().call(Some(&mut value)).unwrap();
    assert_eq!(value, 7);
}

/// Bytes of pages in this process's memfds: the sessions' shared memory, whoever touched it.
fn memfd_bytes() -> u64 {
    let mut files = std::collections::HashMap::new();
    for entry in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
        if std::fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().contains("memfd:"))
            && let Ok(metadata) = std::fs::metadata(entry.path())
        {
            files.insert(metadata.ino(), metadata.blocks() * 512);
        }
    }
    files.values().sum()
}

#[test]
fn payloads_over_the_limit_are_refused_before_anything_is_allocated() {
    let _dog = common::watchdog(240);
    // Alone in a process of its own: other tests' sessions would count too.
    if std::env::var_os("HOTCELL_TEST_ALONE").is_none() {
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args([
                "payloads_over_the_limit_are_refused_before_anything_is_allocated",
                "--exact",
                "--nocapture",
            ])
            .env("HOTCELL_TEST_ALONE", "1")
            .status()
            .unwrap();
        assert!(status.success());
        return;
    }
    let max = 12 * MIB;
    let module = module_with(SessionBuilder::new().payload_bytes_max(max as u64));
    let bytes_sum = module.function::<fn(In<[u8]>, usize) -> u64>("bytes_sum").unwrap();
    let double = module.function::<fn(InOut<[u8]>, usize)>("double_u8").unwrap();
    let fill = module.function::<fn(Out<[u8]>, i32, usize)>("fill").unwrap();
    let length = module.function::<fn(In<str>) -> u64>("text_length").unwrap();
    let by_name = module.prototype("uint64_t bytes_sum(buffer, size_t)").unwrap();
    let mut bytes = vec![b'x'; max + 1];
    let before = memfd_bytes();
    assert!(before > 0 && before < max as u64, "{before}");

    let text = std::str::from_utf8(&bytes).unwrap();
    let errors = [
        (bytes_sum.call(&bytes, max + 1).unwrap_err(), "bytes_sum"),
        (bytes_sum.submit(&bytes, max + 1).map(drop).unwrap_err(), "bytes_sum"),
        (by_name.call((&bytes, max + 1)).unwrap_err(), "bytes_sum"),
        // one byte for the NUL
        (length.call(&text[..max]).unwrap_err(), "text_length"),
        (module.session().block(max as u64 + 1).map(drop).unwrap_err(), "block"),
        (module.session().block(u64::MAX).map(drop).unwrap_err(), "block"),
        (double.call(&mut bytes, max + 1).unwrap_err(), "double_u8"),
        (fill.call(&mut bytes, 1, max + 1).unwrap_err(), "fill"),
    ];
    for (error, symbol) in errors {
        assert!(matches!(error, CallError::TooLarge { max: limit, .. } if limit == max as u64), "{error:?}");
        assert!(!error.may_have_run() && error.session_usable());
        assert_says(&error, &[symbol, &max.to_string()]);
        assert_eq!(memfd_bytes(), before, "pages were allocated for {symbol}");
    }
    assert!(bytes.iter().all(|b| *b == b'x'));

    // Exactly the limit goes; and for that, pages are needed.
    bytes.truncate(max);
    assert_eq!(bytes_sum.call(&bytes, max).unwrap(), sum(&bytes));
    let block = module.session().block(max as u64).unwrap();
    assert!(memfd_bytes() >= before + (max as u64 - (4 << 20)), "the measure does not see what is allocated");
    drop(block);
    double.call(&mut bytes, max).unwrap();
    assert!(bytes.iter().all(|b| *b == b'x'.wrapping_mul(2)));
    // An idle arena keeps 4 MiB.
    assert!(memfd_bytes() <= before + (4 << 20), "{} from {before}", memfd_bytes());
    assert_unharmed(&module);
}

#[test]
fn slices_of_numbers_go_in_out_and_both() {
    let _dog = common::watchdog(120);
    let module = module();
    macro_rules! check {
        ($($t:ident),+) => {$({
            let sum = module.function::<fn(In<[$t]>, usize) -> $t>(concat!("sum_", stringify!($t))).unwrap();
            let fill = module.function::<fn(Out<[$t]>, usize, $t)>(concat!("fill_", stringify!($t))).unwrap();
            let double = module.function::<fn(InOut<[$t]>, usize)>(concat!("double_", stringify!($t))).unwrap();
            for count in [0usize, 1, 3, 14] {
                let first = 2 as $t;
                let expected: Vec<$t> = (0..count).map(|i| first + i as $t).collect();
                let mut given = vec![0 as $t; count];
                fill.call(&mut given, count, first).unwrap();
                assert_eq!(given, expected);
                assert_eq!(sum.call(&given, count).unwrap(), expected.iter().sum::<$t>() as $t);
                double.call(&mut given, count).unwrap();
                assert_eq!(given, expected.iter().map(|x| x + x).collect::<Vec<$t>>());
            }
        })+};
    }
    check!(u8, i8, u16, i16, u32, i32, u64, i64, f32, f64);
}

/// C's `struct padded`, its padding written out so that every byte is a value's.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
struct Padded {
    tag: u8,
    padding: [u8; 3],
    number: u32,
    real: f64,
    tail: u16,
    end: [u8; 6],
}
// SAFETY: all fields may be zero.
unsafe impl Zeroable for Padded {}
// SAFETY: `repr(C)`, all fields are plain, and the padding is a field: 1 + 3 + 4 + 8 + 2 + 6 = 24 bytes, which is the size.
unsafe impl Pod for Padded {}
const _: () = assert!(size_of::<Padded>() == 24);

/// C's `struct span`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Span {
    data: u64,
    length: u64,
}
// SAFETY: all fields may be zero.
unsafe impl Zeroable for Span {}
// SAFETY: `repr(C)`, two plain words, no padding.
unsafe impl Pod for Span {}

#[test]
fn plain_structs_go_in_out_and_both() {
    let _dog = common::watchdog(120);
    let module = module();
    assert_eq!(module.function::<fn() -> u64>("padded_size").unwrap().call().unwrap(), 24);
    let mut value = Padded { tag: 9, padding: [1; 3], number: 9, real: 9.0, tail: 9, end: [9; 6] };
    let sum = module.function::<fn(In<Padded>) -> f64>("padded_sum").unwrap();
    assert_eq!(sum.call(&value).unwrap(), 36.0);
    module.function::<fn(Out<Padded>)>("padded_make").unwrap().call(&mut value).unwrap();
    assert_eq!((value.tag, value.number, value.real, value.tail), (1, 0xdead_beef, -0.5, 0xabcd));
    value.padding = [1, 2, 3];
    module.function::<fn(InOut<Padded>)>("padded_step").unwrap().call(&mut value).unwrap();
    let expected =
        Padded { tag: 2, padding: [1, 2, 3], number: 0xdead_bef0, real: -1.0, tail: 0xabce, end: value.end };
    assert_eq!(value, expected);
    // Several in one call do not overlap: the second is copied over the first.
    let copy = module.function::<fn(Out<Padded>, In<Padded>, usize)>("copy_bytes").unwrap();
    let mut copied = Padded::zeroed();
    copy.call(&mut copied, &value, size_of::<Padded>()).unwrap();
    assert_eq!(copied, value);
    let optional = module.function::<fn(Option<In<Padded>>) -> i32>("is_null").unwrap();
    assert_eq!((optional.call(Some(&value)).unwrap(), optional.call(None).unwrap()), (0, 1));
    // A slice of structs is one buffer.
    let bytes_sum = module.function::<fn(In<[Padded]>, usize) -> u64>("bytes_sum").unwrap();
    let all = [value, copied, expected];
    assert_eq!(bytes_sum.call(&all, 72).unwrap(), self::sum(hotcell::bytemuck::cast_slice(&all)));
}

// Pointers.

#[test]
fn pointers_are_kept_passed_back_and_tested() {
    let _dog = common::watchdog(120);
    let module = module();
    let new = module.function::<fn(Out<RemotePtr>) -> i32>("counter_new").unwrap();
    let add = module.function::<fn(RemotePtr, i32) -> i32>("counter_add").unwrap();
    let none = module.function::<fn(Out<RemotePtr>) -> i32>("counter_none").unwrap();
    let free = module.function::<fn(RemotePtr)>("counter_free").unwrap();
    let (mut first, mut second) = (RemotePtr::NULL, RemotePtr::NULL);
    assert_eq!((new.call(&mut first).unwrap(), new.call(&mut second).unwrap()), (0, 0));
    assert!(!first.is_null() && first != second);
    assert_eq!(add.call(first, 5).unwrap(), 5);
    assert_eq!(add.call(second, 7).unwrap(), 7);
    assert_eq!(add.call(first, 5).unwrap(), 10);
    let by_name = module.prototype("int counter_add(struct counter *, int)").unwrap();
    assert_eq!(by_name.call((first, -3)).unwrap(), Value::Signed(7));
    let mut bytes = [0; 4];
    module.session().read(first, &mut bytes).unwrap();
    assert_eq!(i32::from_le_bytes(bytes), 7);
    let mut third = first;
    assert_eq!(none.call(&mut third).unwrap(), -1);
    assert!(third.is_null() && third == RemotePtr::NULL);
    let address = module.function::<fn(RemotePtr) -> u64>("address").unwrap();
    assert_eq!(address.call(first).unwrap(), first.address());
    assert_eq!(address.call(first.offset(3)).unwrap(), first.address() + 3);
    assert_eq!(first.to_string(), format!("{:#x}", first.address()));
    free.call(first).unwrap();
    free.call(second).unwrap();
}

#[test]
fn pointers_of_other_sessions_and_former_workers_are_refused() {
    let _dog = common::watchdog(120);
    let worker = Worker::spawn().unwrap();
    let (one, two) = (module_in(&worker.session().unwrap()), module_in(&worker.session().unwrap()));
    let pointer = one.session().alloc(8).unwrap();
    let block = one.session().block(8).unwrap();
    let restarted = module();
    for other in [&two, &restarted] {
        let typed = other.function::<fn(RemotePtr) -> i32>("is_null").unwrap();
        let typed_block = other.function::<fn(Block) -> i32>("is_null").unwrap();
        let by_name = other.prototype("int is_null(void *)").unwrap();
        let session = other.session();
        for (error, symbol) in [
            (typed.call(pointer).unwrap_err(), "is_null"),
            (typed.submit(pointer).map(drop).unwrap_err(), "is_null"),
            (typed.call(block.pointer()).unwrap_err(), "is_null"),
            (typed_block.call(&block).unwrap_err(), "is_null"),
            (by_name.call([pointer]).unwrap_err(), "is_null"),
            (by_name.call([&block]).unwrap_err(), "is_null"),
            (session.read(pointer, &mut [0]).unwrap_err(), "read"),
            (session.write(pointer, &[0]).unwrap_err(), "write"),
            (session.free(pointer).unwrap_err(), "free"),
            (session.read_string(pointer, 10).unwrap_err(), "read_string"),
        ] {
            assert!(matches!(error, CallError::ForeignPointer { .. }), "{symbol}: {error:?}");
            assert!(!error.may_have_run() && error.session_usable());
            assert_says(&error, &[symbol, "another session"]);
        }
        // Null belongs to all.
        assert_eq!(typed.call(RemotePtr::NULL).unwrap(), 1);
        assert_unharmed(other);
    }
    drop((two, restarted));
    worker.dispose();
    let error = one.function::<fn(RemotePtr) -> i32>("is_null").unwrap_err();
    assert!(error.to_string().contains(one.name()), "{error}");
}

#[test]
fn bad_addresses_are_errors_and_do_the_worker_no_harm() {
    let _dog = common::watchdog(120);
    let module = module();
    let session = module.session();
    // Three pages, the middle one taken away.
    let libc = session.load("libc.so.6").unwrap();
    let mmap = libc.function::<fn(RemotePtr, usize, i32, i32, i32, i64) -> RemotePtr>("mmap").unwrap();
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let pages = mmap.call(RemotePtr::NULL, 3 * 4096, protection, flags, -1, 0).unwrap();
    let munmap = libc.function::<fn(RemotePtr, usize) -> i32>("munmap").unwrap();
    assert_eq!(munmap.call(pages.offset(4096), 4096).unwrap(), 0);

    let at = |address: u64| pages.offset(address.wrapping_sub(pages.address()));
    assert_eq!(at(16).address(), 16);
    let mut byte = [0u8; 1];
    let mut large = vec![0u8; 8192];
    for (what, pointer, bytes) in [
        ("null", RemotePtr::NULL, 1),
        ("near null", at(16), 8),
        ("unmapped", pages.offset(4096), 1),
        ("crossing into an unmapped page", pages.offset(4090), 16),
        ("over a hole", pages, 8192),
        ("kernel", at(0xffff_8000_0000_0000), 8),
        ("not canonical", at(0x1234_5678_9abc_def0), 8),
        ("the last byte", at(u64::MAX), 1),
        ("overflowing", at(u64::MAX - 3), 16),
    ] {
        for error in [
            session.read(pointer, &mut large[..bytes]).unwrap_err(),
            session.write(pointer, &large[..bytes]).unwrap_err(),
        ] {
            assert!(
                matches!(error, CallError::BadAddress { address, bytes: b } if address == pointer.address() && b == bytes as u64),
                "{what}: {error:?}"
            );
            assert!(error.session_usable());
            assert_says(&error, &[&format!("{:#x}", pointer.address()), &bytes.to_string()]);
        }
        let error = session.read_string(pointer, 100).err();
        // A string may end before the hole; all other addresses have none.
        assert!(
            bytes > 8 && what != "overflowing" || matches!(error, Some(CallError::BadAddress { .. })),
            "{what}: {error:?}"
        );
        assert_unharmed(&module);
    }
    // A string that runs into the unmapped page without its NUL; one that ends right before it; one limited before it.
    session.write(pages.offset(4090), b"sixsix").unwrap();
    assert!(matches!(session.read_string(pages.offset(4090), 100), Err(CallError::BadAddress { .. })));
    assert!(matches!(
        session.read_string(pages.offset(4090), 3),
        Err(CallError::StringTooLong { max: 3, .. })
    ));
    session.write(pages.offset(4090), b"five5\0").unwrap();
    assert_eq!(session.read_string(pages.offset(4090), 5).unwrap().as_c_str(), c"five5");
    assert_eq!(session.read_string(pages.offset(4095), 0).unwrap().as_c_str(), c"");
    // Read-only memory can be read but not written.
    let text = module.function::<fn() -> RemotePtr>("latin1").unwrap().call().unwrap();
    session.read(text, &mut byte).unwrap();
    assert_eq!(byte, *b"c");
    assert!(matches!(session.write(text, b"x"), Err(CallError::BadAddress { .. })));
    // Nothing is asked of the worker for no bytes.
    session.read(at(16), &mut []).unwrap();
    session.write(at(16), &[]).unwrap();
    assert_unharmed(&module);
}

#[test]
fn worker_memory_is_allocated_read_written_and_freed_once() {
    let _dog = common::watchdog(120);
    // With a payload limit smaller than what is copied, so that it goes in pieces.
    let module = module_with(SessionBuilder::new().payload_bytes_max(128 * KIB as u64));
    let session = module.session();
    let size = MIB + 77;
    let memory = session.alloc(size as u64).unwrap();
    let mut back = vec![0xff; size];
    session.read(memory, &mut back).unwrap();
    assert!(back.iter().all(|b| *b == 0));
    let bytes: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
    session.write(memory, &bytes).unwrap();
    session.read(memory, &mut back).unwrap();
    assert!(back == bytes);
    session.read(memory.offset(4097), &mut back[..300]).unwrap();
    assert_eq!(back[..300], bytes[4097..4397]);
    assert_eq!(
        module.function::<fn(RemotePtr, usize) -> u64>("bytes_sum").unwrap().call(memory, size).unwrap(),
        sum(&bytes)
    );

    let unknown = |pointer: RemotePtr| {
        let error = session.free(pointer).unwrap_err();
        assert!(
            matches!(error, CallError::UnknownBlock { address } if address == pointer.address()),
            "{error:?}"
        );
        assert!(error.session_usable());
        assert_says(&error, &[&format!("{:#x}", pointer.address())]);
    };
    unknown(memory.offset(8));
    session.free(memory).unwrap();
    unknown(memory);
    unknown(RemotePtr::NULL);
    unknown(module.function::<fn() -> RemotePtr>("latin1").unwrap().call().unwrap());
    // What the module allocated is not the session's to free.
    let mut counter = RemotePtr::NULL;
    module.function::<fn(Out<RemotePtr>) -> i32>("counter_new").unwrap().call(&mut counter).unwrap();
    unknown(counter);

    let (a, b) = (session.alloc(0).unwrap(), session.alloc(0).unwrap());
    assert!(!a.is_null() && a != b);
    session.free(b).unwrap();
    session.free(a).unwrap();
    let error = session.alloc(u64::MAX / 4).unwrap_err();
    assert!(matches!(error, CallError::OutOfMemory { bytes } if bytes == u64::MAX / 4), "{error:?}");
    assert!(error.session_usable());
    assert_unharmed(&module);
}

// Blocks.

#[test]
fn a_block_is_seen_by_both_sides_without_a_copy() {
    let _dog = common::watchdog(120);
    let module = module();
    let session = module.session();
    let block = session.block(100_000).unwrap();
    assert_eq!((block.len(), block.is_empty()), (100_000, false));
    module.function::<fn(Block)>("store").unwrap().call(&block).unwrap();
    let stored_byte = module.function::<fn(usize) -> i32>("stored_byte").unwrap();
    let stored_set = module.function::<fn(usize, i32)>("stored_set").unwrap();
    // The worker keeps the address; later writes of either side are seen by the other, with no call that passes the block.
    for (i, byte) in [(0u64, 1u8), (99_999, 2), (65_536, 3), (1, 4)] {
        assert!(block.write(i, &[byte]));
        assert_eq!(stored_byte.call(i as usize).unwrap(), i32::from(byte));
        stored_set.call(i as usize, i32::from(byte) + 100).unwrap();
        assert_eq!(block.read_value::<u8>(i), Some(byte + 100));
    }
    // Passed again and again it is at the same place.
    let address = module.function::<fn(Block) -> u64>("address").unwrap();
    let by_name = module.prototype("uint64_t address(void *)").unwrap();
    for _ in 0..10 {
        assert_eq!(address.call(&block).unwrap(), block.pointer().address());
        assert_eq!(by_name.call([&block]).unwrap(), Value::Unsigned(block.pointer().address()));
        assert_eq!(address.submit(&block).unwrap().wait().unwrap(), block.pointer().address());
    }
    // By its address in a struct.
    let span = Span { data: block.pointer().offset(10).address(), length: 50_000 };
    module.function::<fn(In<Span>, i32)>("span_fill").unwrap().call(&span, 0x5a).unwrap();
    let mut bytes = vec![0; 50_002];
    assert!(block.read(9, &mut bytes));
    assert_ne!(bytes[0], 0x5a);
    assert!(bytes[1..50_001].iter().all(|b| *b == 0x5a));
    assert_ne!(bytes[50_001], 0x5a);
    let span_sum = module.function::<fn(In<Span>) -> u64>("span_sum").unwrap();
    assert_eq!(span_sum.call(&span).unwrap(), sum(&[0x5a; 50_000]));
    // Plain values, at odd places too.
    assert!(block.write_value(3, &f64::MIN_POSITIVE));
    assert_eq!(block.read_value::<f64>(3), Some(f64::MIN_POSITIVE));
    // Session::read and write take its address too.
    session.write(block.pointer(), b"by address").unwrap();
    let mut text = [0; 10];
    assert!(block.read(0, &mut text));
    assert_eq!(&text, b"by address");
}

#[test]
fn a_block_ends_where_it_ends() {
    let _dog = common::watchdog(120);
    let module = module();
    let session = module.session();
    let neighbours = (session.block(64).unwrap(), session.block(10).unwrap(), session.block(64).unwrap());
    assert!(neighbours.0.write(0, &[7; 64]) && neighbours.2.write(0, &[7; 64]));
    let block = &neighbours.1;
    assert!(block.write(0, &[1; 10]) && block.write(10, &[]) && block.read(10, &mut []));
    for (offset, length) in
        [(0, 11), (1, 10), (10, 1), (11, 0), (u64::MAX, 1), (u64::MAX, 0), (u64::MAX - 3, 8)]
    {
        let mut into = vec![9; length];
        assert!(!block.write(offset, &into) && !block.read(offset, &mut into), "{offset} {length}");
        assert!(into.iter().all(|b| *b == 9));
    }
    assert_eq!(block.read_value::<u64>(3), None);
    assert!(!block.write_value(3, &0u64));
    let mut bytes = [0; 10];
    assert!(block.read(0, &mut bytes));
    assert_eq!(bytes, [1; 10]);
    for other in [&neighbours.0, &neighbours.2] {
        let mut bytes = [0; 64];
        assert!(other.read(0, &mut bytes));
        assert_eq!(bytes, [7; 64]);
    }
    let empty = session.block(0).unwrap();
    assert!(empty.is_empty() && empty.write(0, &[]) && !empty.write(0, &[1]));
    assert_eq!(module.function::<fn(Block) -> i32>("is_null").unwrap().call(&empty).unwrap(), 0);
}

#[test]
fn a_full_arena_is_an_error_and_recovers() {
    let _dog = common::watchdog(120);
    let module = module_with(SessionBuilder::new().payload_bytes_max(256 * KIB as u64));
    let session = module.session();
    let bytes_sum = module.function::<fn(In<[u8]>, usize) -> u64>("bytes_sum").unwrap();
    let by_name = module.prototype("uint64_t bytes_sum(buffer, size_t)").unwrap();
    let bytes = vec![3u8; 256 * KIB];
    for _ in 0..3 {
        let mut blocks = Vec::new();
        let error = loop {
            match session.block(64 * KIB as u64) {
                Ok(block) => blocks.push(block),
                Err(error) => break error,
            }
            assert!(blocks.len() < 10_000);
        };
        assert!(blocks.len() >= 16, "{}", blocks.len());
        for error in [
            error,
            bytes_sum.call(&bytes, bytes.len()).unwrap_err(),
            bytes_sum.submit(&bytes, bytes.len()).map(drop).unwrap_err(),
            by_name.call((&bytes, bytes.len())).unwrap_err(),
        ] {
            assert!(matches!(error, CallError::NoRoom { .. }), "{error:?}");
            assert!(!error.may_have_run() && error.session_usable());
            assert_says(&error, &["no room"]);
            assert!(std::error::Error::source(&error).unwrap().to_string().contains("no room for"));
        }
        // Small payloads have room of their own.
        assert_eq!(bytes_sum.call(&bytes[..100], 100).unwrap(), sum(&bytes[..100]));
        drop(blocks);
        assert_eq!(bytes_sum.call(&bytes, bytes.len()).unwrap(), sum(&bytes));
        assert_eq!(bytes_sum.submit(&bytes, bytes.len()).unwrap().wait().unwrap(), sum(&bytes));
    }
    assert_unharmed(&module);
}

// errno, callbacks, checks by name, deadlines.

#[test]
fn errno_is_what_the_call_left_and_zero_if_it_left_none() {
    let _dog = common::watchdog(120);
    let module = module();
    let missing = module.function::<fn(In<str>) -> WithErrno<i32>>("open_missing").unwrap();
    let alone = module.function::<fn(i32) -> WithErrno<i32>>("leave_errno_alone").unwrap();
    let text = module.function::<fn() -> WithErrno<CString>>("text_and_errno").unwrap();
    for _ in 0..3 {
        let (fd, errno) = missing.call("/no/such/file").unwrap();
        assert_eq!((fd, errno.0), (-1, libc::ENOENT));
        assert!(errno.to_string().contains("No such file"), "{errno}");
        let (fd, errno) = missing.call("/dev/null/under").unwrap();
        assert_eq!((fd, errno.0), (-1, libc::ENOTDIR));
        let (x, errno) = alone.call(7).unwrap();
        assert_eq!((x, errno.0), (7, 0));
        let (text, errno) = text.call().unwrap();
        assert_eq!((text.as_c_str(), errno.0), (c"text", libc::EAGAIN));
        let (x, errno) = alone.submit(8).unwrap().wait().unwrap();
        assert_eq!((x, errno.0), (8, 0));
    }
    let by_name = module.prototype("int open_missing(const char *)").unwrap();
    let many = module.prototype("double many_and_errno(double, int, int, int, int, int, int, int)").unwrap();
    for _ in 0..3 {
        let (value, errno) = by_name.call_errno(["/no/such/file"]).unwrap();
        assert_eq!((value, errno.0), (Value::Signed(-1), libc::ENOENT));
        assert_eq!(by_name.call(["/no/such/file"]).unwrap(), Value::Signed(-1));
        // Through the stack.
        let (value, errno) = many.call_errno((0.5, 1, 2, 3, 4, 5, 6, 7)).unwrap();
        assert_eq!((value, errno.0), (Value::F64(28.5), libc::ERANGE));
    }
    let (value, errno) = module.prototype("int leave_errno_alone(int)").unwrap().call_errno([9]).unwrap();
    assert_eq!((value, errno.0), (Value::Signed(9), 0));
}

#[test]
fn callbacks_are_declared_but_calls_with_them_are_refused() {
    let _dog = common::watchdog(120);
    let module = module();
    let typed = module.function::<fn(Callback, i32) -> i32>("apply").unwrap();
    let by_text = module.prototype("int apply(int (*f)(int), int)").unwrap();
    let by_signature =
        module.dynamic("apply", Signature::new([Type::Function, Type::I32], Type::I32)).unwrap();
    for error in [
        typed.call((), 1).unwrap_err(),
        typed.submit((), 1).map(drop).unwrap_err(),
        by_text.call((Arg::Null, 1)).unwrap_err(),
        by_signature.call((Arg::Null, 1)).unwrap_err(),
    ] {
        assert!(matches!(error, CallError::CallbackUnsupported { .. }), "{error:?}");
        assert!(!error.may_have_run() && error.session_usable());
        assert_says(&error, &["apply", module.name(), "callback"]);
    }
    assert_unharmed(&module);
}

#[test]
fn wrong_arguments_by_name_are_told_with_module_symbol_and_expectation() {
    let _dog = common::watchdog(120);
    let module = module();
    let add = module.prototype("int add(int, int)").unwrap();
    for (error, given) in [
        (add.call(()).unwrap_err(), 0),
        (add.call([1]).unwrap_err(), 1),
        (add.call((1, 2, 3)).unwrap_err(), 3),
        (add.call(vec![1; 65]).unwrap_err(), 65),
    ] {
        assert!(
            matches!(error, CallError::WrongCount { expected: 2, given: g, .. } if g == given),
            "{error:?}"
        );
        assert!(!error.may_have_run() && error.session_usable());
        assert_says(&error, &["add", module.name(), "2 arguments", &given.to_string()]);
    }
    for (error, said) in [
        (add.call((1, "two")).unwrap_err(), "a string of 3 bytes"),
        (add.call((1, 1u64 << 31)).unwrap_err(), "2147483648"),
        (add.call((1, 2.5)).unwrap_err(), "2.5"),
        (add.call((1, None::<i32>)).unwrap_err(), "null"),
        (add.call((Arg::Signed(1), Arg::Bytes(b"xy"))).unwrap_err(), "2 bytes"),
        (add.call((1, RemotePtr::NULL)).unwrap_err(), "the pointer"),
    ] {
        assert!(matches!(error, CallError::WrongArgument { index: 2, expected: Type::I32, .. }), "{error:?}");
        assert_says(&error, &["argument 2", "add", module.name(), "i32", said]);
    }
    assert_eq!(add.call((2.0, true)).unwrap(), Value::Signed(3));
    let sum = add.call((-2, u64::from(7u8))).unwrap();
    assert_eq!(i8::try_from(sum.clone()).unwrap(), 5);
    let error = f64::try_from(sum).unwrap_err();
    assert_says(&error, &["5", "f64"]);
    let error = u8::try_from(add.call((-2, -3)).unwrap()).unwrap_err();
    assert_says(&error, &["-5", "u8"]);
}

/// The error of a call that runs for 100 s, its timeout, and whether the worker is still there.
fn timed_out(error: CallError) -> (Duration, bool) {
    assert!(error.may_have_run());
    match &error {
        CallError::TimedOut { after, worker_killed, function } => {
            assert_eq!(&*function.symbol, "sleep_ms");
            assert_eq!(error.session_usable(), !worker_killed);
            (*after, *worker_killed)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_deadline_is_the_functions_or_the_sessions_or_the_workers() {
    let _dog = common::watchdog(240);
    let ms = Duration::from_millis;
    let long = Duration::from_secs(100);
    let forever = 100_000;
    // The worker's, for a session that sets none; a function's own goes before it, both shorter and longer.
    for by_name in [false, true] {
        for own in [None, Some(ms(70))] {
            in_time(ms(200), |short| {
                let worker = Worker::builder().timeout(short).spawn().unwrap();
                let module = prepared(worker.session().unwrap().load(fixture()))?;
                let longer = i32::try_from(short.as_millis()).unwrap() + 200;
                let error = if by_name {
                    let sleep = prepared(module.prototype("void sleep_ms(int)"))?;
                    sleep.with_timeout(long).unwrap().call([longer]).unwrap();
                    own.map_or(sleep.clone(), |own| sleep.with_timeout(own).unwrap())
                        .call([forever])
                        .unwrap_err()
                } else {
                    let sleep = prepared(module.function::<fn(i32)>("sleep_ms"))?;
                    sleep.with_timeout(long).unwrap().call(longer).unwrap();
                    own.map_or(sleep.clone(), |own| sleep.with_timeout(own).unwrap())
                        .call(forever)
                        .unwrap_err()
                };
                assert_says(&error, &["sleep_ms", module.name(), "killed"]);
                assert_eq!(timed_out(error), (own.unwrap_or(short), true));
                Some(())
            });
        }
    }
    // The session's own goes before the worker's.
    in_time(ms(300), |short| {
        let worker = Worker::builder().timeout(ms(1)).spawn().unwrap();
        let session = worker.session_with(SessionBuilder::new().timeout(short)).unwrap();
        let sleep = prepared(prepared(session.load(fixture()))?.function::<fn(i32)>("sleep_ms"))?;
        if let Err(late) = sleep.call(20) {
            timed_out(late);
            return None;
        }
        assert_eq!(timed_out(sleep.call(forever).unwrap_err()), (short, true));
        Some(())
    });

    // A ticket's deadline is its function's too.
    let module = self::module();
    let sleep = module.function::<fn(i32)>("sleep_ms").unwrap().with_timeout(ms(80)).unwrap();
    assert_eq!(timed_out(sleep.submit(forever).unwrap().wait().unwrap_err()), (ms(80), true));
    let error = sleep.call(0).unwrap_err();
    assert!(matches!(error, CallError::Crashed(_)) && !error.may_have_run(), "{error:?}");

    // Given up instead of killed, and usable again.
    in_time(ms(100), |short| {
        let options = SessionBuilder::new().timeout(short).on_deadline(OnDeadline::AbandonSession);
        let worker = Worker::spawn().unwrap();
        let module = prepared(worker.session_with(options).unwrap().load(fixture()))?;
        let sleep = prepared(module.function::<fn(i32)>("sleep_ms"))?;
        let add = prepared(module.function::<fn(i32, i32) -> i32>("add"))?.with_timeout(long).unwrap();
        let Err(late) = sleep.call(15 * i32::try_from(short.as_millis()).unwrap()) else {
            // This thread was held up until the sleep was over.
            return None;
        };
        assert_eq!(timed_out(late), (short, false));
        match add.call(1, 2) {
            Err(error @ CallError::Abandoned { .. }) => {
                assert_says(&error, &["sleep_ms", module.name()]);
                assert!(!error.may_have_run() && error.session_usable());
            }
            Ok(3) => return None,
            other => panic!("{other:?}"),
        }
        assert!(common::wait_until(Duration::from_secs(300), || matches!(add.call(1, 2), Ok(3))));
        assert!(worker.is_alive());
        Some(())
    });
}

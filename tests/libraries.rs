//! Real libraries, called the way their own documentation says, from a worker.
//!
//! Each part is a binding as a program would write it: a struct of functions, resolved once, with methods that take and give Rust values. Results come
//! from an untrusted process, so lengths and counts are checked before they are used.
#![allow(clippy::type_complexity)] // a C prototype, written as a Rust type, is as long as the prototype

use bytemuck::{Pod, Zeroable};
use hotcell::{
    Block, CallError, Error, Function, In, InOut, LoadError, Module, Nullable, Out, RemotePtr, Session,
    Worker,
};
use std::ffi::{CStr, CString};
use std::hint::black_box;
use std::sync::Once;
use std::time::Duration;

type Result<T = (), E = Error> = std::result::Result<T, E>;

/// A session, in a worker of its own: it lives as long as its last handle, and the session is one.
fn session() -> Session {
    static WATCHDOG: Once = Once::new();
    WATCHDOG.call_once(|| {
        std::thread::spawn(|| {
            std::thread::sleep(Duration::from_secs(600));
            eprintln!("a test hangs: these are over within seconds");
            std::process::abort();
        });
    });
    Worker::spawn().expect("a worker starts").session().expect("a session opens")
}

/// Loads a library that has to be on this machine.
fn load(session: &Session, soname: &str, debian_package: &str) -> Result<Module> {
    match session.load(soname) {
        Err(LoadError::NotFound { .. }) => {
            panic!("{soname} is not on this machine: install the Debian package {debian_package}")
        }
        loaded => Ok(loaded?),
    }
}

/// Text that compresses, and not too well: words in the order of a small generator.
fn sample(bytes: usize) -> Vec<u8> {
    let words = ["hot", "cell", "shield", "glass", "worker", "region", "slot", "arena", "\n"];
    let mut state = 1u64;
    let mut text = Vec::with_capacity(bytes + 8);
    while text.len() < bytes {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        text.extend(words[usize::from(state.to_le_bytes()[5]) % words.len()].as_bytes());
    }
    text.truncate(bytes);
    text
}

// zlib, by <https://zlib.net/manual.html>.

const Z_OK: i32 = 0;
const Z_STREAM_END: i32 = 1;
const Z_STREAM_ERROR: i32 = -2;
const Z_DATA_ERROR: i32 = -3;
const Z_BUF_ERROR: i32 = -5;
const Z_NO_FLUSH: i32 = 0;
const Z_FINISH: i32 = 4;

/// `z_stream` as it lies in memory. The addresses in it are the worker's.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct ZStream {
    next_in: u64,
    avail_in: u32,
    pad_in: u32,
    total_in: u64,
    next_out: u64,
    avail_out: u32,
    pad_out: u32,
    total_out: u64,
    msg: u64,
    state: u64,
    zalloc: u64,
    zfree: u64,
    opaque: u64,
    data_type: i32,
    pad_type: u32,
    adler: u64,
    reserved: u64,
}

struct Zlib {
    session: Session,
    version: Function<fn() -> CString>,
    crc32: Function<fn(u64, In<[u8]>, u32) -> u64>,
    compress_bound: Function<fn(u64) -> u64>,
    compress2: Function<fn(Out<[u8]>, InOut<u64>, In<[u8]>, u64, i32) -> i32>,
    uncompress: Function<fn(Out<[u8]>, InOut<u64>, In<[u8]>, u64) -> i32>,
    deflate: Codec,
    inflate: Codec,
}

/// One direction of zlib's streams. `deflateInit` and `inflateInit` are macros over what is called here.
struct Codec {
    init: Init,
    step: Function<fn(Block, i32) -> i32>,
    end: Function<fn(Block) -> i32>,
}

enum Init {
    Deflate(Function<fn(Block, i32, In<CStr>, i32) -> i32>),
    Inflate(Function<fn(Block, In<CStr>, i32) -> i32>),
}

impl Zlib {
    fn load(session: &Session) -> Result<Self> {
        let z = load(session, "libz.so.1", "zlib1g")?;
        Ok(Self {
            session: session.clone(),
            version: z.function("zlibVersion")?,
            crc32: z.function("crc32")?,
            compress_bound: z.function("compressBound")?,
            compress2: z.function("compress2")?,
            uncompress: z.function("uncompress")?,
            deflate: Codec {
                init: Init::Deflate(z.function("deflateInit_")?),
                step: z.function("deflate")?,
                end: z.function("deflateEnd")?,
            },
            inflate: Codec {
                init: Init::Inflate(z.function("inflateInit_")?),
                step: z.function("inflate")?,
                end: z.function("inflateEnd")?,
            },
        })
    }

    fn compress(&self, bytes: &[u8], level: i32) -> Result<Vec<u8>> {
        let bound = self.compress_bound.call(bytes.len() as u64)?;
        // Its word for it, so with a limit of ours.
        assert!(bound < 2 * bytes.len() as u64 + 1000);
        let mut packed = vec![0; usize::try_from(bound).unwrap()];
        let mut length = bound;
        let status = self.compress2.call(&mut packed, &mut length, bytes, bytes.len() as u64, level)?;
        assert_eq!(status, Z_OK);
        // `truncate` bounds the length: a larger one keeps all there is.
        packed.truncate(usize::try_from(length).unwrap());
        Ok(packed)
    }

    /// `bytes_max`: what the result may be at most.
    fn uncompress(&self, packed: &[u8], bytes_max: usize) -> Result<Result<Vec<u8>, i32>> {
        let mut bytes = vec![0; bytes_max];
        let mut length = bytes_max as u64;
        let status = self.uncompress.call(&mut bytes, &mut length, packed, packed.len() as u64)?;
        bytes.truncate(usize::try_from(length).unwrap());
        Ok(if status == Z_OK { Ok(bytes) } else { Err(status) })
    }

    /// Runs a stream over the input, a piece at a time. zlib keeps the address of its `z_stream` and refuses one that has moved, so the struct lives in a
    /// [`Block`]: shared memory at one address, which both sides read and write without a copy of it being passed. So do the two buffers.
    fn run(&self, codec: &Codec, input: &[u8]) -> Result<Result<Vec<u8>, i32>> {
        const PIECE: usize = 4000;
        let [stream, source, target] =
            [size_of::<ZStream>(), PIECE, PIECE].map(|n| self.session.block(n as u64));
        let (stream, source, target) = (stream?, source?, target?);
        let zero = ZStream::zeroed();
        assert!(stream.write_value(0, &zero));
        let version = self.version.call()?;
        let stream_bytes = i32::try_from(size_of::<ZStream>()).unwrap();
        let status = match &codec.init {
            Init::Deflate(init) => init.call(&stream, 6, &version, stream_bytes)?,
            Init::Inflate(init) => init.call(&stream, &version, stream_bytes)?,
        };
        assert_eq!(status, Z_OK);

        let mut output = Vec::new();
        let mut pieces = input.chunks(PIECE).peekable();
        let result = 'all: loop {
            let piece = pieces.next().unwrap_or_default();
            let flush = if pieces.peek().is_some() { Z_NO_FLUSH } else { Z_FINISH };
            assert!(source.write(0, piece));
            let mut books: ZStream = stream.read_value(0).unwrap();
            books.next_in = source.pointer().address();
            books.avail_in = u32::try_from(piece.len()).unwrap();
            loop {
                books.next_out = target.pointer().address();
                books.avail_out = u32::try_from(PIECE).unwrap();
                assert!(stream.write_value(0, &books));
                let status = codec.step.call(&stream, flush)?;
                books = stream.read_value(0).unwrap();
                // How much it has written is its word, too.
                let room_left = usize::try_from(books.avail_out).unwrap().min(PIECE);
                let mut written = vec![0; PIECE - room_left];
                assert!(target.read(0, &mut written));
                output.extend(written);
                match status {
                    Z_STREAM_END => break 'all Ok(output),
                    Z_OK | Z_BUF_ERROR if room_left == 0 => {}
                    Z_OK if pieces.peek().is_some() => break,
                    other => break 'all Err(other),
                }
            }
        };
        codec.end.call(&stream)?;
        Ok(result)
    }
}

#[test]
fn zlib_checks_and_compresses_in_one_go() -> Result {
    let zlib = Zlib::load(&session())?;
    assert!(zlib.version.call()?.to_string_lossy().starts_with("1."));
    // The check value of this CRC, as every catalogue has it.
    assert_eq!(zlib.crc32.call(0, b"123456789", 9)?, 0xcbf4_3926);
    let bytes = sample(300_000);
    for level in [0, 1, 6, 9] {
        let packed = zlib.compress(&bytes, level)?;
        assert_eq!(packed.len() < bytes.len(), level > 0);
        assert_eq!(zlib.uncompress(&packed, bytes.len())?, Ok(bytes.clone()));
    }
    let mut packed = zlib.compress(&bytes, 6)?;
    assert_eq!(zlib.uncompress(&packed, 100)?.unwrap_err(), Z_BUF_ERROR);
    packed[100] ^= 0xff;
    assert_eq!(zlib.uncompress(&packed, bytes.len())?.unwrap_err(), Z_DATA_ERROR);
    Ok(())
}

#[test]
fn zlib_streams_through_a_struct_in_shared_memory() -> Result {
    let zlib = Zlib::load(&session())?;
    for size in [0, 1, 3999, 4000, 4001, 200_000] {
        let bytes = sample(size);
        let packed = zlib.run(&zlib.deflate, &bytes)?.unwrap();
        assert_eq!(zlib.run(&zlib.inflate, &packed)?.unwrap(), bytes);
        // The stream's format is that of the functions that work in one go.
        assert_eq!(zlib.uncompress(&packed, size.max(1))?, Ok(bytes));
    }
    assert_eq!(zlib.run(&zlib.inflate, b"this was never compressed")?.unwrap_err(), Z_DATA_ERROR);
    Ok(())
}

#[test]
fn zlib_refuses_a_stream_that_has_moved() -> Result {
    let session = session();
    let zlib = Zlib::load(&session)?;
    let Init::Deflate(init) = &zlib.deflate.init else { unreachable!() };
    let version = zlib.version.call()?;
    let (first, second) = (session.block(112).map_err(Error::from)?, session.block(112)?);
    assert!(first.write_value(0, &ZStream::zeroed()));
    assert_eq!(init.call(&first, 6, &version, 112)?, Z_OK);
    let moved: ZStream = first.read_value(0).unwrap();
    assert!(second.write_value(0, &moved));
    assert_eq!(zlib.deflate.end.call(&second)?, Z_STREAM_ERROR);
    assert_eq!(zlib.deflate.end.call(&first)?, Z_OK);
    Ok(())
}

/// The same with memory of the worker's own, for structs that have to outlive their [`Block`] or that only the library looks into.
#[test]
fn zlib_streams_through_memory_of_the_worker() -> Result {
    let session = session();
    let z = load(&session, "libz.so.1", "zlib1g")?;
    let version = z.function::<fn() -> CString>("zlibVersion")?.call()?;
    let init = z.function::<fn(RemotePtr, i32, In<CStr>, i32) -> i32>("deflateInit_")?;
    let deflate = z.function::<fn(RemotePtr, i32) -> i32>("deflate")?;
    let end = z.function::<fn(RemotePtr) -> i32>("deflateEnd")?;
    let bytes = sample(10_000);
    let stream = session.alloc(size_of::<ZStream>() as u64)?;
    let source = session.alloc(bytes.len() as u64)?;
    let target = session.alloc(20_000)?;
    session.write(source, &bytes)?;
    assert_eq!(init.call(stream, 6, &version, 112)?, Z_OK);
    let mut books = ZStream::zeroed();
    session.read(stream, bytemuck::bytes_of_mut(&mut books))?;
    (books.next_in, books.avail_in) = (source.address(), 10_000);
    (books.next_out, books.avail_out) = (target.address(), 20_000);
    session.write(stream, bytemuck::bytes_of(&books))?;
    assert_eq!(deflate.call(stream, Z_FINISH)?, Z_STREAM_END);
    session.read(stream, bytemuck::bytes_of_mut(&mut books))?;
    let mut packed = vec![0; usize::try_from(books.total_out.min(20_000)).unwrap()];
    session.read(target, &mut packed)?;
    assert_eq!(end.call(stream)?, Z_OK);
    for pointer in [stream, source, target] {
        session.free(pointer)?;
    }
    assert_eq!(Zlib::load(&session)?.uncompress(&packed, bytes.len())?, Ok(bytes));
    Ok(())
}

// libm, by its manual pages.

/// Rust's own methods call the same functions, or their like in the compiler: at most the last bits may differ.
fn assert_same(name: &str, given: &[f64], theirs: f64, ours: f64) {
    let same = theirs == ours || theirs.is_nan() && ours.is_nan();
    assert!(same || ((theirs - ours) / ours).abs() < 1e-14, "{name}{given:?} is {theirs}, not {ours}");
}

const NUMBERS: [f64; 14] = [
    0.0,
    -0.0,
    0.5,
    -0.75,
    1.0,
    -1.0,
    2.0,
    std::f64::consts::PI,
    -10.25,
    1e-300,
    1e300,
    f64::INFINITY,
    f64::NEG_INFINITY,
    f64::NAN,
];

#[test]
fn libm_agrees_with_rust_on_functions_of_one_number() -> Result {
    let libm = load(&session(), "libm.so.6", "libc6")?;
    let table: [(&str, fn(f64) -> f64); 24] = [
        ("sin", f64::sin),
        ("cos", f64::cos),
        ("tan", f64::tan),
        ("asin", f64::asin),
        ("acos", f64::acos),
        ("atan", f64::atan),
        ("sinh", f64::sinh),
        ("cosh", f64::cosh),
        ("tanh", f64::tanh),
        ("exp", f64::exp),
        ("exp2", f64::exp2),
        ("expm1", f64::exp_m1),
        ("log", f64::ln),
        ("log2", f64::log2),
        ("log10", f64::log10),
        ("log1p", f64::ln_1p),
        ("sqrt", f64::sqrt),
        ("cbrt", f64::cbrt),
        ("floor", f64::floor),
        ("ceil", f64::ceil),
        ("trunc", f64::trunc),
        ("round", f64::round),
        ("rint", f64::round_ties_even),
        ("fabs", f64::abs),
    ];
    for (name, ours) in table {
        let theirs = libm.function::<fn(f64) -> f64>(name)?;
        for x in NUMBERS {
            assert_same(name, &[x], theirs.call(x)?, ours(black_box(x)));
        }
    }
    Ok(())
}

#[test]
fn libm_agrees_with_rust_on_functions_of_two_and_three_numbers() -> Result {
    let libm = load(&session(), "libm.so.6", "libc6")?;
    let table: [(&str, fn(f64, f64) -> f64); 7] = [
        ("pow", f64::powf),
        ("atan2", f64::atan2),
        ("hypot", f64::hypot),
        ("fmod", |x, y| x % y),
        ("fmax", f64::max),
        ("fmin", f64::min),
        ("copysign", f64::copysign),
    ];
    for (name, ours) in table {
        let theirs = libm.function::<fn(f64, f64) -> f64>(name)?;
        for x in NUMBERS {
            for y in NUMBERS {
                assert_same(name, &[x, y], theirs.call(x, y)?, ours(black_box(x), black_box(y)));
            }
        }
    }
    let fma = libm.function::<fn(f64, f64, f64) -> f64>("fma")?;
    for x in NUMBERS {
        assert_same("fma", &[x, 3.0, 0.1], fma.call(x, 3.0, 0.1)?, black_box(x).mul_add(3.0, 0.1));
    }
    Ok(())
}

#[test]
fn libm_mixes_integers_floats_and_out_parameters() -> Result {
    let libm = load(&session(), "libm.so.6", "libc6")?;
    let frexp = libm.function::<fn(f64, Out<i32>) -> f64>("frexp")?;
    let ldexp = libm.function::<fn(f64, i32) -> f64>("ldexp")?;
    let modf = libm.function::<fn(f64, Out<f64>) -> f64>("modf")?;
    let mut exponent = 0;
    assert_eq!((frexp.call(48.0, &mut exponent)?, exponent), (0.75, 6));
    assert_eq!(ldexp.call(0.75, 6)?, 48.0);
    let mut whole = 0.0;
    assert_eq!((modf.call(-2.25, &mut whole)?, whole), (-0.25, -2.0));
    assert_eq!(libm.function::<fn(f64) -> i64>("llround")?.call(-2.5)?, -3);
    assert_eq!(libm.function::<fn(f32) -> f32>("sqrtf")?.call(2.25)?, 1.5);
    assert_eq!(libm.function::<fn(i32, f64) -> f64>("jn")?.call(0, 0.0)?, 1.0);
    // By its C prototype, with arguments checked when they are passed.
    let hypot = libm.prototype("double hypot(double, double)")?;
    assert_eq!(f64::try_from(hypot.call((3.0, 4.0))?)?, 5.0);
    Ok(())
}

// SQLite, by <https://www.sqlite.org/cintro.html>.

const SQLITE_OK: i32 = 0;
const SQLITE_ROW: i32 = 100;
const SQLITE_DONE: i32 = 101;
/// "The content is volatile": SQLite makes its own copy. The only choice for bytes that are lent to one call.
const SQLITE_TRANSIENT: isize = -1;

/// The functions of SQLite. `sqlite3 *` and `sqlite3_stmt *` are opaque: a [`RemotePtr`] that is kept and passed back.
struct Sqlite {
    session: Session,
    open: Function<fn(In<str>, Out<RemotePtr>) -> i32>,
    close: Function<fn(RemotePtr) -> i32>,
    errmsg: Function<fn(RemotePtr) -> CString>,
    prepare: Function<fn(RemotePtr, In<[u8]>, i32, Out<RemotePtr>, Option<Out<RemotePtr>>) -> i32>,
    bind_null: Function<fn(RemotePtr, i32) -> i32>,
    bind_int64: Function<fn(RemotePtr, i32, i64) -> i32>,
    bind_double: Function<fn(RemotePtr, i32, f64) -> i32>,
    bind_text: Function<fn(RemotePtr, i32, In<[u8]>, i32, isize) -> i32>,
    bind_blob: Function<fn(RemotePtr, i32, In<[u8]>, i32, isize) -> i32>,
    step: Function<fn(RemotePtr) -> i32>,
    reset: Function<fn(RemotePtr) -> i32>,
    finalize: Function<fn(RemotePtr) -> i32>,
    column_count: Function<fn(RemotePtr) -> i32>,
    column_type: Function<fn(RemotePtr, i32) -> i32>,
    column_int64: Function<fn(RemotePtr, i32) -> i64>,
    column_double: Function<fn(RemotePtr, i32) -> f64>,
    column_text: Function<fn(RemotePtr, i32) -> Nullable<CString>>,
    column_blob: Function<fn(RemotePtr, i32) -> RemotePtr>,
    column_bytes: Function<fn(RemotePtr, i32) -> i32>,
}

#[derive(Clone, Debug, PartialEq)]
enum SqlValue {
    Null,
    Integer(i64),
    Real(f64),
    Text(String),
    Blob(Vec<u8>),
}

impl Sqlite {
    fn load(session: &Session) -> Result<Self> {
        let module = load(session, "libsqlite3.so.0", "libsqlite3-0")?;
        Ok(Self {
            session: session.clone(),
            open: module.function("sqlite3_open")?,
            close: module.function("sqlite3_close")?,
            errmsg: module.function("sqlite3_errmsg")?,
            prepare: module.function("sqlite3_prepare_v2")?,
            bind_null: module.function("sqlite3_bind_null")?,
            bind_int64: module.function("sqlite3_bind_int64")?,
            bind_double: module.function("sqlite3_bind_double")?,
            bind_text: module.function("sqlite3_bind_text")?,
            bind_blob: module.function("sqlite3_bind_blob")?,
            step: module.function("sqlite3_step")?,
            reset: module.function("sqlite3_reset")?,
            finalize: module.function("sqlite3_finalize")?,
            column_count: module.function("sqlite3_column_count")?,
            column_type: module.function("sqlite3_column_type")?,
            column_int64: module.function("sqlite3_column_int64")?,
            column_double: module.function("sqlite3_column_double")?,
            column_text: module.function("sqlite3_column_text")?,
            column_blob: module.function("sqlite3_column_blob")?,
            column_bytes: module.function("sqlite3_column_bytes")?,
        })
    }

    fn open(&self, path: &str) -> Result<Database<'_>> {
        let mut handle = RemotePtr::NULL;
        let status = self.open.call(path, &mut handle)?;
        // Even a failed open gives a handle, which has the message and has to be closed.
        let database = Database { sqlite: self, handle };
        assert_eq!(status, SQLITE_OK, "{}", database.message()?);
        Ok(database)
    }
}

struct Database<'s> {
    sqlite: &'s Sqlite,
    handle: RemotePtr,
}

impl Database<'_> {
    fn message(&self) -> Result<String> {
        Ok(self.sqlite.errmsg.call(self.handle)?.to_string_lossy().into_owned())
    }

    /// Prepares a statement, or gives SQLite's words on why not.
    fn prepare(&self, sql: &str) -> Result<Result<Statement<'_>, String>> {
        let mut handle = RemotePtr::NULL;
        let bytes = i32::try_from(sql.len()).unwrap();
        // The tail would point into the text, which is lent for this call only: null, it is not wanted.
        let status = self.sqlite.prepare.call(self.handle, sql.as_bytes(), bytes, &mut handle, None)?;
        if status == SQLITE_OK {
            Ok(Ok(Statement { sqlite: self.sqlite, handle }))
        } else {
            Ok(Err(self.message()?))
        }
    }

    fn run(&self, sql: &str) -> Result<Vec<Vec<SqlValue>>> {
        self.prepare(sql)?.unwrap().rows(&[])
    }
}

impl Drop for Database<'_> {
    fn drop(&mut self) {
        // With the worker dead there is nothing left to close.
        let _ = self.sqlite.close.call(self.handle);
    }
}

struct Statement<'s> {
    sqlite: &'s Sqlite,
    handle: RemotePtr,
}

impl Statement<'_> {
    fn rows(&self, parameters: &[SqlValue]) -> Result<Vec<Vec<SqlValue>>> {
        let (sqlite, handle) = (self.sqlite, self.handle);
        for (index, value) in (1..).zip(parameters) {
            let bytes = |bytes: &[u8]| i32::try_from(bytes.len()).unwrap();
            let status = match value {
                SqlValue::Null => sqlite.bind_null.call(handle, index)?,
                SqlValue::Integer(n) => sqlite.bind_int64.call(handle, index, *n)?,
                SqlValue::Real(x) => sqlite.bind_double.call(handle, index, *x)?,
                SqlValue::Text(text) => {
                    let text = text.as_bytes();
                    sqlite.bind_text.call(handle, index, text, bytes(text), SQLITE_TRANSIENT)?
                }
                SqlValue::Blob(blob) => {
                    sqlite.bind_blob.call(handle, index, blob, bytes(blob), SQLITE_TRANSIENT)?
                }
            };
            assert_eq!(status, SQLITE_OK);
        }
        let columns = sqlite.column_count.call(handle)?;
        let mut rows = Vec::new();
        loop {
            match sqlite.step.call(handle)? {
                SQLITE_ROW => {
                    let row: Result<_> = (0..columns).map(|column| self.column(column)).collect();
                    rows.push(row?);
                }
                SQLITE_DONE => break,
                other => panic!("step gave {other}"),
            }
        }
        sqlite.reset.call(handle)?;
        Ok(rows)
    }

    fn column(&self, column: i32) -> Result<SqlValue> {
        let (sqlite, handle) = (self.sqlite, self.handle);
        Ok(match sqlite.column_type.call(handle, column)? {
            1 => SqlValue::Integer(sqlite.column_int64.call(handle, column)?),
            2 => SqlValue::Real(sqlite.column_double.call(handle, column)?),
            3 => {
                let text = sqlite.column_text.call(handle, column)?.unwrap_or_default();
                SqlValue::Text(text.to_string_lossy().into_owned())
            }
            4 => {
                let pointer = sqlite.column_blob.call(handle, column)?;
                let bytes = sqlite.column_bytes.call(handle, column)?;
                // The length is SQLite's word: bounded before anything is allocated for it.
                let mut blob = vec![0; usize::try_from(bytes).unwrap_or(0).min(1 << 20)];
                sqlite.session.read(pointer, &mut blob)?;
                SqlValue::Blob(blob)
            }
            _ => SqlValue::Null,
        })
    }
}

impl Drop for Statement<'_> {
    fn drop(&mut self) {
        let _ = self.sqlite.finalize.call(self.handle);
    }
}

#[test]
fn sqlite_keeps_what_it_is_given() -> Result {
    let sqlite = Sqlite::load(&session())?;
    let database = sqlite.open(":memory:")?;
    database.run("CREATE TABLE t (id INTEGER PRIMARY KEY, number REAL, name TEXT, data BLOB)")?;
    let rows: Vec<Vec<SqlValue>> = (1..=100u8)
        .map(|n| {
            vec![
                SqlValue::Integer(i64::from(n) * (i64::MAX / 100)),
                SqlValue::Real(f64::from(n) / 3.0),
                if n % 10 == 0 { SqlValue::Null } else { SqlValue::Text(format!("naïve {n} ☢")) },
                SqlValue::Blob((0..n).chain([0, 255]).collect()),
            ]
        })
        .collect();
    let insert = database.prepare("INSERT INTO t VALUES (?, ?, ?, ?)")?.unwrap();
    database.run("BEGIN")?;
    for row in &rows {
        insert.rows(row)?;
    }
    database.run("COMMIT")?;
    assert_eq!(database.run("SELECT * FROM t ORDER BY id")?, rows);
    let count = database.run("SELECT count(*), max(length(data)), sum(number) FROM t")?;
    assert_eq!(count[0][..2], [SqlValue::Integer(100), SqlValue::Integer(102)]);
    let SqlValue::Real(sum) = count[0][2] else { panic!("{count:?}") };
    assert!((sum - 5050.0 / 3.0).abs() < 1e-9);
    Ok(())
}

#[test]
fn sqlite_says_what_is_wrong_and_goes_on() -> Result {
    let sqlite = Sqlite::load(&session())?;
    let database = sqlite.open(":memory:")?;
    let error = |sql: &str| Ok::<_, Error>(database.prepare(sql)?.map(drop).unwrap_err());
    assert_eq!(error("SELEKT 1")?, "near \"SELEKT\": syntax error");
    assert_eq!(error("SELECT * FROM nowhere")?, "no such table: nowhere");
    assert_eq!(database.run("SELECT 6 * 7")?, [[SqlValue::Integer(42)]]);
    // A long text crosses in more than one round.
    let long = database.run("SELECT hex(zeroblob(100000))")?;
    assert_eq!(long, [[SqlValue::Text("0".repeat(200_000))]]);
    Ok(())
}

#[test]
fn handles_of_one_session_are_refused_by_another() -> Result {
    let (here, elsewhere) = (session(), session());
    let (sqlite, other) = (Sqlite::load(&here)?, Sqlite::load(&elsewhere)?);
    let database = sqlite.open(":memory:")?;
    let refused = other.errmsg.call(database.handle);
    assert!(matches!(refused, Err(CallError::ForeignPointer { .. })), "{refused:?}");
    Ok(())
}

// LZ4, by lz4.h.

#[test]
fn lz4_packs_and_unpacks_and_notices_damage() -> Result {
    let lz4 = load(&session(), "liblz4.so.1", "liblz4-1")?;
    let bound = lz4.function::<fn(i32) -> i32>("LZ4_compressBound")?;
    let compress = lz4.function::<fn(In<[u8]>, Out<[u8]>, i32, i32) -> i32>("LZ4_compress_default")?;
    let decompress = lz4.function::<fn(In<[u8]>, Out<[u8]>, i32, i32) -> i32>("LZ4_decompress_safe")?;
    for size in [0, 1, 1000, 1_000_000] {
        let bytes = sample(size);
        let length = i32::try_from(size).unwrap();
        let room = bound.call(length)?;
        assert!((length..length + length / 200 + 100).contains(&room));
        let mut packed = vec![0; usize::try_from(room).unwrap()];
        let packed_length = compress.call(&bytes, &mut packed, length, room)?;
        assert!(packed_length > 0);
        packed.truncate(usize::try_from(packed_length).unwrap());
        let mut back = vec![0xee; size];
        assert_eq!(decompress.call(&packed, &mut back, packed_length, length)?, length);
        assert_eq!(back, bytes);
        if size >= 1000 {
            assert!(packed.len() < size * 3 / 4);
            let short = decompress.call(&packed, &mut back[..size / 2], packed_length, length / 2)?;
            assert!(short < 0, "more than there is room for is an error, not an overrun");
            assert!(decompress.call(&packed[..100], &mut back, 100, length)? < 0);
        }
    }
    Ok(())
}

// Zstandard, by zstd.h.

struct Zstd {
    compress_bound: Function<fn(usize) -> usize>,
    compress: Function<fn(Out<[u8]>, usize, In<[u8]>, usize, i32) -> usize>,
    decompress: Function<fn(Out<[u8]>, usize, In<[u8]>, usize) -> usize>,
    content_size: Function<fn(In<[u8]>, usize) -> u64>,
    is_error: Function<fn(usize) -> u32>,
    error_name: Function<fn(usize) -> CString>,
}

impl Zstd {
    fn load(session: &Session) -> Result<Self> {
        let module = load(session, "libzstd.so.1", "libzstd1")?;
        Ok(Self {
            compress_bound: module.function("ZSTD_compressBound")?,
            compress: module.function("ZSTD_compress")?,
            decompress: module.function("ZSTD_decompress")?,
            content_size: module.function("ZSTD_getFrameContentSize")?,
            is_error: module.function("ZSTD_isError")?,
            error_name: module.function("ZSTD_getErrorName")?,
        })
    }

    /// A length, or Zstandard's name for what went wrong.
    fn check(&self, result: usize) -> Result<Result<usize, String>> {
        Ok(if self.is_error.call(result)? == 0 {
            Ok(result)
        } else {
            Err(self.error_name.call(result)?.to_string_lossy().into_owned())
        })
    }

    fn compress(&self, bytes: &[u8], level: i32) -> Result<Vec<u8>> {
        let mut packed = vec![0; self.compress_bound.call(bytes.len())?.min(2 * bytes.len() + 1000)];
        let room = packed.len();
        let length = self.compress.call(&mut packed, room, bytes, bytes.len(), level)?;
        packed.truncate(self.check(length)?.unwrap());
        Ok(packed)
    }

    fn decompress(&self, packed: &[u8], bytes_max: usize) -> Result<Result<Vec<u8>, String>> {
        let mut bytes = vec![0; bytes_max];
        let length = self.decompress.call(&mut bytes, bytes_max, packed, packed.len())?;
        Ok(self.check(length)?.map(|length| {
            bytes.truncate(length);
            bytes
        }))
    }
}

#[test]
fn zstd_packs_and_unpacks_and_names_its_errors() -> Result {
    let zstd = Zstd::load(&session())?;
    for size in [0, 1, 100_000, 5_000_000] {
        let bytes = sample(size);
        let packed = zstd.compress(&bytes, 3)?;
        assert_eq!(zstd.content_size.call(&packed, packed.len())?, size as u64);
        assert_eq!(zstd.decompress(&packed, size)?, Ok(bytes));
        if size > 1 {
            assert!(packed.len() < size * 3 / 4);
            assert_eq!(zstd.decompress(&packed, size / 2)?.unwrap_err(), "Destination buffer is too small");
            assert_eq!(zstd.decompress(&packed[..50], size)?.unwrap_err(), "Src size is incorrect");
        }
    }
    assert_eq!(
        zstd.decompress(b"this is no frame of Zstandard", 100)?.unwrap_err(),
        "Unknown frame descriptor"
    );
    Ok(())
}

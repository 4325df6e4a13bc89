//! The tour: call C code and zlib in a cell, see how long a call takes, let native code crash, go on.
//!
//! ```text
//! cargo run --release --example quickstart
//! ```

use hotcell::{
    CallError, DynFunction, Function, In, InOut, IsolatedProcess, LoadError, Out, RemotePtr, Session, Worker,
};
use std::error::Error;
use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

const LIBRARY: &str = "
int add(int a, int b) { return a + b; }
int value_at(const int *address) { return *address; }
";

fn main() -> ExitCode {
    if let Some(argument) = std::env::args_os().nth(1) {
        eprintln!("quickstart takes no arguments, and was given {}", argument.display());
        return ExitCode::from(2);
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("quickstart: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let directory = tempfile::tempdir()?;
    let library = compile(LIBRARY, directory.path())?;

    // A worker is a process; a session is a thread in it, with a channel of shared memory to this process.
    let started = Instant::now();
    let worker = Worker::spawn()?;
    let session = worker.session()?;
    println!("worker {} with a session, ready after {:.1?}", worker.pid(), started.elapsed());

    // A function is resolved once. Its signature is checked for what can be checked, and is otherwise our promise: C keeps no types.
    let ours = session.load(&library)?;
    let add = ours.function::<fn(i32, i32) -> i32>("add")?;
    println!("add(2, 3) = {}", expect(add.call(2, 3)?, 5)?);
    call_a_system_library(&session)?;

    let by_name = ours.prototype("int add(int, int)")?;
    measure(&add, &by_name)?;

    // The short form: one worker with one module, whose functions are called by name. Here native code dereferences null. In this process that would be the
    // end; in the cell it is an error that tells what happened.
    let symbols = r#"{"add": {"args": ["i32", "i32"], "returns": "i32"}, "value_at": {"args": ["ptr"], "returns": "i32"}}"#;
    let cell = IsolatedProcess::start(library, symbols)?;
    println!("\nvalue_at(NULL) crashes its worker:");
    match cell.call("value_at", [RemotePtr::NULL]) {
        Err(CallError::Crashed(report)) => println!("{report}"),
        other => return Err(format!("expected a crash, got {other:?}").into()),
    }

    // A crashed worker does not come back; a new one takes its place.
    let started = Instant::now();
    cell.restart()?;
    let sum: i32 = cell.call("add", (20, 22))?.try_into()?;
    let sum = expect(sum, 42)?;
    println!("\nrestarted: add(20, 22) = {sum} after {:.1?}", started.elapsed());
    Ok(())
}

/// Compiles C source with the system's compiler. The name has a slash in it, so the dynamic linker takes it as a path.
fn compile(source: &str, directory: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let (file, library) = (directory.join("quickstart.c"), directory.join("libquickstart.so"));
    std::fs::write(&file, source)?;
    let done = Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(&file).status();
    match done {
        Ok(status) if status.success() => Ok(library),
        Ok(status) => Err(format!("the C compiler failed ({status}); its own message is above").into()),
        Err(error) => Err(format!(
            "this example needs the C compiler `cc`, which cannot be run ({error}): install gcc or clang"
        )
        .into()),
    }
}

/// zlib with bytes in, bytes out and strings; the C library's mathematics where zlib is not installed.
fn call_a_system_library(session: &Session) -> Result<(), Box<dyn Error>> {
    let zlib = match session.load("libz.so.1") {
        Ok(zlib) => zlib,
        Err(LoadError::NotFound { .. }) => {
            println!("libz.so.1 is not installed here, so libm.so.6 stands in for it");
            let pow = session.load("libm.so.6")?.function::<fn(f64, f64) -> f64>("pow")?;
            println!("pow(2, 10) = {}", expect(pow.call(2.0, 10.0)?, 1024.0)?);
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    let version = zlib.function::<fn() -> CString>("zlibVersion")?.call()?;
    let crc32 = zlib.function::<fn(u64, In<[u8]>, u32) -> u64>("crc32")?;
    let sum = expect(crc32.call(0, b"hello", 5)?, 0x3610_a686)?;
    println!("zlib {}: crc32(\"hello\") = {sum:#x}", version.to_string_lossy());

    // int compress(Bytef *dest, uLongf *destLen, const Bytef *source, uLong sourceLen), and its inverse.
    type Convert = fn(Out<[u8]>, InOut<u64>, In<[u8]>, u64) -> i32;
    let (text, mut packed, mut back) = ("hot cell ".repeat(100), [0u8; 1000], vec![0u8; 900]);
    let (mut packed_bytes, mut back_bytes) = (packed.len() as u64, back.len() as u64);
    let (compress, uncompress) =
        (zlib.function::<Convert>("compress")?, zlib.function::<Convert>("uncompress")?);
    expect(compress.call(&mut packed, &mut packed_bytes, text.as_bytes(), text.len() as u64)?, 0)?;
    // What a cell returns is input from another process: `get` instead of an index.
    let only =
        packed.get(..usize::try_from(packed_bytes)?).ok_or("zlib claims more bytes than it had room for")?;
    expect(uncompress.call(&mut back, &mut back_bytes, only, packed_bytes)?, 0)?;
    expect(&back[..], text.as_bytes())?;
    println!("compress: {} bytes to {packed_bytes} and back", text.len());
    Ok(())
}

/// Times calls one by one and prints what the middle and the slow ones take.
fn measure(add: &Function<fn(i32, i32) -> i32>, by_name: &DynFunction) -> Result<(), Box<dyn Error>> {
    println!("\n{:<28}{:>10}{:>10}{:>10}", "each call timed by itself", "median", "p99", "p99.9");
    sample("nothing (the clock's cost)", |_| Ok(()))?;
    sample("add.call(i, 1)", |i| expect(add.call(i, 1)?, i + 1).map(drop))?;
    sample("by_name.call((i, 1))", |i| {
        let sum: i32 = by_name.call((i, 1))?.try_into()?;
        expect(sum, i + 1).map(drop)
    })?;
    println!("(the clock's cost is contained in the other two rows)");
    Ok(())
}

fn sample(what: &str, mut call: impl FnMut(i32) -> Result<(), Box<dyn Error>>) -> Result<(), Box<dyn Error>> {
    let (end, mut times) = (Instant::now() + Duration::from_secs(5), Vec::with_capacity(200_000));
    for i in 0..220_000 {
        let start = Instant::now();
        call(i)?;
        let now = Instant::now();
        // The first tenth warms up.
        if i >= 20_000 {
            times.push(now - start);
        }
        if now > end {
            break;
        }
    }
    if times.is_empty() {
        return Err(format!("{what}: too slow here to be measured in 5 s").into());
    }
    times.sort_unstable();
    let at = |permille: usize| times[(times.len() - 1) * permille / 1000].as_nanos();
    println!("{what:<28}{:>7} ns{:>7} ns{:>7} ns", at(500), at(990), at(999));
    Ok(())
}

fn expect<T: PartialEq + std::fmt::Debug>(result: T, expected: T) -> Result<T, Box<dyn Error>> {
    if result == expected {
        Ok(result)
    } else {
        Err(format!("{result:?} where {expected:?} was expected").into())
    }
}

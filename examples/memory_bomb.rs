//! Native code that takes all the memory there is, in a worker that may have 64 MiB.
//!
//! ```text
//! cargo run --release --example memory_bomb
//! ```

use hotcell::{CallError, Worker};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// Like most code, it never asks whether there was memory.
const BOMB: &str = r#"
#include <stdlib.h>
#include <string.h>
static char *volatile last;
long fill(long mib) {
    for (long n = 0; n < mib; n++) {
        last = malloc(1 << 20);
        memset(last, 1, 1 << 20);
    }
    return mib;
}
"#;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("memory_bomb: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let directory = tempfile::tempdir()?;
    let library = compile(BOMB, directory.path())?;
    let limited = Worker::builder().memory_bytes_max(64 << 20);

    let session = limited.clone().spawn()?.session()?;
    let fill = session.load(&library)?.function::<fn(i64) -> i64>("fill")?;
    println!("a worker may have 64 MiB");
    println!("fill(40) = {} MiB", fill.call(40)?);
    match fill.call(1 << 20) {
        Err(error @ CallError::MemoryExceeded(_)) => {
            println!("fill(1048576) was ended: {}", error.code());
            println!("{error}");
        }
        other => return Err(format!("a terabyte was to be had: {other:?}").into()),
    }

    let session = limited.spawn()?.session()?;
    let fill = session.load(&library)?.function::<fn(i64) -> i64>("fill")?;
    println!("and the next worker has 64 MiB again: fill(40) = {} MiB", fill.call(40)?);
    Ok(())
}

fn compile(source: &str, directory: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let (file, library) = (directory.join("example.c"), directory.join("libexample.so"));
    std::fs::write(&file, source)?;
    match Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(&file).status() {
        Ok(status) if status.success() => Ok(library),
        Ok(status) => Err(format!("the C compiler failed ({status}); its own message is above").into()),
        Err(error) => Err(format!("this example needs the C compiler `cc`: {error}").into()),
    }
}

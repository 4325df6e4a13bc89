//! A call that never returns, under a limit of CPU time: it is ended by what it uses, not by the clock on the wall, so a call that only waits is left alone.
//!
//! ```text
//! cargo run --release --example runaway
//! ```

use hotcell::{CallError, IsolatedProcessConfig};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

/// A search that ends, unless there is nothing to be found.
const SEARCH: &str = r#"
#include <unistd.h>
unsigned find(unsigned wanted, unsigned step) {
    volatile unsigned at = 0;
    while (at != wanted) at += step;
    return at;
}
int wait_ms(int ms) { usleep(ms * 1000); return ms; }
"#;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("runaway: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let directory = tempfile::tempdir()?;
    let library = compile(SEARCH, directory.path())?;
    let limit = Duration::from_millis(200);
    let prototypes = "unsigned find(unsigned wanted, unsigned step); int wait_ms(int ms);";
    let cell = IsolatedProcessConfig::new(library, prototypes).cpu_time_per_call(limit).start()?;

    println!("each call may use {limit:?} of CPU time");
    println!("find(3000, 3) = {:?}", cell.call("find", (3000, 3))?);
    let started = Instant::now();
    cell.call("wait_ms", [500])?;
    println!("wait_ms(500) slept for {:?}, which uses nothing", started.elapsed());

    let started = Instant::now();
    match cell.call("find", (3001, 2)) {
        Err(error @ CallError::CpuTimeExceeded(_)) => {
            println!("find(3001, 2) was ended after {:?}: {}", started.elapsed(), error.code());
            println!("{error}");
            let report = error.crash_report().ok_or("there is a report")?;
            println!("as an exit code: {:?}", report.exit_code());
        }
        other => return Err(format!("a search without an end has ended: {other:?}").into()),
    }

    cell.restart()?;
    println!("and the next process finds again: {:?}", cell.call("find", (9, 3))?);
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

//! A host that lives through its native code: work that crashes the worker is skipped, and the rest is done by the next one.
//!
//! ```text
//! cargo run --release --example survive_crash
//! ```

use hotcell::{CallError, Function, In, Worker};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// A parser as they are: it works, until the input is unusual.
const PARSER: &str = r#"
#include <stdlib.h>
#include <string.h>
int count_words(const char *text) {
    int words = 0;
    for (const char *at = text; *at; at++) words += *at != ' ' && (at[1] == ' ' || !at[1]);
    if (strstr(text, "null")) words += *(volatile int *)0;
    if (strstr(text, "zero")) words /= (volatile int){0};
    if (strstr(text, "abort")) abort();
    if (strstr(text, "exit")) exit(3);
    return words;
}
"#;

type CountWords = Function<fn(In<str>) -> i32>;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("survive_crash: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let directory = tempfile::tempdir()?;
    let library = compile(PARSER, directory.path())?;
    let inputs = [
        "three plain words",
        "a null pointer",
        "two words",
        "division by zero",
        "a call of abort",
        "an exit from within",
        "and all of this was survived",
    ];

    let mut count_words = start(&library)?;
    let (mut counted, mut crashes) = (0, 0);
    for input in inputs {
        match count_words.call(input) {
            Ok(words) => {
                println!("{input:?}: {words} words");
                counted += 1;
            }
            // The worker is gone. Whoever is to blame is known: had this call been a bystander of another session's crash, it could be repeated.
            Err(CallError::Crashed(report)) => {
                println!("{input:?}: {}", report.cause());
                crashes += 1;
                // A host that runs for ever would count how often it does this, and wait in between.
                count_words = start(&library)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    println!("{counted} counted, {crashes} crashes survived");
    if (counted, crashes) == (3, 4) { Ok(()) } else { Err("expected 3 counted and 4 crashes".into()) }
}

/// A worker with the parser in it. The function keeps its session and worker alive; dropping it ends them.
fn start(library: &Path) -> Result<CountWords, hotcell::Error> {
    Ok(Worker::spawn()?.session()?.load(library)?.function("count_words")?)
}

fn compile(source: &str, directory: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let (file, library) = (directory.join("parser.c"), directory.join("libparser.so"));
    std::fs::write(&file, source)?;
    match Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(&file).status() {
        Ok(status) if status.success() => Ok(library),
        Ok(status) => Err(format!("the C compiler failed ({status}); its own message is above").into()),
        Err(error) => Err(format!("this example needs the C compiler `cc`: {error}").into()),
    }
}

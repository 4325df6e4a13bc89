//! Private memory, as the kernel counts it: what a worker has that no other process shares.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use hotcell::{Module, Worker};
use hotcell_compare::Result;
use hotcell_compare::cell::Library;
use hotcell_compare::command_line::Options;
use hotcell_compare::verdict::{Limit, Verdict};

use crate::{Program, compile_program};

const FURTHER_SESSIONS: usize = 16;

/// In KiB.
fn private(process: u32) -> Result<f64> {
    let rollup = std::fs::read_to_string(format!("/proc/{process}/smaps_rollup"))?;
    let kib = |key: &str| -> Result<f64> {
        let line =
            rollup.lines().find(|line| line.starts_with(key)).ok_or(format!("no {key} in smaps_rollup"))?;
        Ok(line.split_whitespace().nth(1).unwrap_or_default().parse()?)
    };
    Ok(kib("Private_Clean:")? + kib("Private_Dirty:")?)
}

/// A session that has made calls.
fn session(worker: &Worker, library: &Library) -> Result<Module> {
    let module = worker.session()?.load(library.path.as_path())?;
    let add = module.function::<fn(i32, i32) -> i32>("add")?;
    assert_eq!(add.call(2, 3)?, 5);
    Ok(module)
}

/// A process that has the C library and nothing else; ended when dropped.
struct Bare(Child);

impl Drop for Bare {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn bare() -> Result<f64> {
    let folder = tempfile::tempdir()?;
    let program = compile_program(
        folder.path(),
        "bare",
        "#include <unistd.h>\n#include <stdio.h>\nint main(void) { puts(\"ready\"); fflush(stdout); pause(); return 0; }\n",
    )?;
    let mut child = Bare(Command::new(program).stdout(Stdio::piped()).spawn()?);
    let mut line = String::new();
    let mut output = std::io::BufReader::new(child.0.stdout.take().ok_or("it has an output")?);
    std::io::BufRead::read_line(&mut output, &mut line)?;
    private(child.0.id())
}

pub fn run(_options: &Options) -> Result<Vec<Verdict>> {
    let library = Library::compile()?;
    let bare = bare()?;
    println!(
        "KiB.\n\n| {:40} | private | beyond libc alone |\n|:{}-|--------:|------------------:|",
        "",
        "-".repeat(40)
    );
    let line = |what: &str, kib: f64, beyond: Option<f64>| {
        let beyond = beyond.map(|kib| format!("{kib:.0}")).unwrap_or_default();
        println!("| {what:40} | {kib:>7.0} | {beyond:>17} |");
    };
    line("a C program that waits", bare, None);
    let mut verdicts = Vec::new();
    for program in Program::BOTH {
        let name = program.name();
        let worker = program.builder().spawn()?;
        let _first = session(&worker, &library)?;
        // Whatever a start leaves to be done is done by then.
        std::thread::sleep(Duration::from_millis(50));
        let with_one = private(worker.pid())?;
        line(&format!("{name}, one session"), with_one, Some(with_one - bare));
        let further: Vec<Module> =
            (0..FURTHER_SESSIONS).map(|_| session(&worker, &library)).collect::<Result<_>>()?;
        let each = (private(worker.pid())? - with_one) / further.len() as f64;
        line(&format!("{name}, each further session"), each, None);
        if matches!(program, Program::Lean) {
            verdicts.push(Verdict::anywhere(
                "KiB private to hotcell-worker with one session, beyond libc alone",
                Limit::AtMost(1024.0),
                with_one - bare,
            ));
        }
        verdicts.push(Verdict::anywhere(
            format!("KiB private to each further session, {name}"),
            Limit::AtMost(96.0),
            each,
        ));
    }
    Ok(verdicts)
}

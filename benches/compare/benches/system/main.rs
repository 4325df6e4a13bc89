//! What a call's round trip does not show: many threads, too few CPUs, doing nothing, starting, memory, and the end.
//!
//! ```text
//! cargo bench --bench system                     every section
//! cargo bench --bench system -- start fault      some of them
//! cargo bench --bench system -- --help
//! ```

mod fault;
mod idle;
mod memory;
mod oversubscribed;
mod start;
mod threads;

use std::process::ExitCode;
use std::time::Duration;

use hotcell::{Worker, WorkerBuilder};
use hotcell_compare::Result;
use hotcell_compare::command_line::{Options, Usage};
use hotcell_compare::report::Time;
use hotcell_compare::verdict;
use hotcell_compare::watchdog::Watchdog;

const USAGE: Usage = Usage {
    bench: "system",
    sections: &[
        ("threads", "many threads that call, on one session and on a session each"),
        ("oversubscribed", "both sides on one CPU, and every CPU busy with something else"),
        ("idle", "what an idle host and worker do in ten seconds"),
        ("start", "from nothing to the first result, beside posix_spawn of /bin/true"),
        ("memory", "private memory of a worker, and of each further session"),
        ("fault", "from a fault in the call to the caller's error, beside a bare child"),
    ],
    options: &[],
};

fn main() -> ExitCode {
    hotcell_compare::main(&USAGE, |options| {
        let watchdog = Watchdog::start();
        let mut verdicts = Vec::new();
        let mut section = |name: &'static str, run: fn(&Options) -> Result<Vec<verdict::Verdict>>| {
            if options.wants(name) {
                watchdog.turn(name);
                println!("## {name}\n");
                verdicts.extend(run(options)?);
                println!();
            }
            Result::Ok(())
        };
        section("threads", threads::run)?;
        section("oversubscribed", oversubscribed::run)?;
        section("idle", idle::run)?;
        section("start", start::run)?;
        section("memory", memory::run)?;
        section("fault", fault::run)?;
        verdict::print(&verdicts);
        Ok(ExitCode::SUCCESS)
    })
}

/// The two programs that a worker can be.
#[derive(Clone, Copy)]
enum Program {
    /// `hotcell-worker`.
    Lean,
    /// This executable, started again.
    Own,
}

impl Program {
    const BOTH: [Self; 2] = [Self::Lean, Self::Own];

    fn name(self) -> &'static str {
        match self {
            Self::Lean => "hotcell-worker",
            Self::Own => "own executable",
        }
    }

    fn builder(self) -> WorkerBuilder {
        match self {
            Self::Lean => Worker::builder().program(env!("CARGO_BIN_EXE_lean-worker")),
            Self::Own => Worker::builder(),
        }
    }
}

/// Times of one thing, for its median and its worst.
#[derive(Default)]
struct Times(Vec<f64>);

impl Times {
    fn add(&mut self, time: Duration) {
        self.0.push(time.as_nanos() as f64);
    }

    fn quantile(&self, quantile: f64) -> f64 {
        let mut times = self.0.clone();
        times.sort_unstable_by(f64::total_cmp);
        times[((times.len() - 1) as f64 * quantile).round() as usize]
    }

    fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// A line of a table, with the multiple of a floor.
    fn print(&self, what: &str, floor: &Times) {
        println!(
            "| {what:44} | {:>8} | {:>8} | {:>8} | {:5.2} |",
            Time(self.quantile(0.1)).to_string(),
            Time(self.median()).to_string(),
            Time(self.quantile(0.9)).to_string(),
            self.median() / floor.median()
        );
    }
}

fn print_times_header(floor: &str) {
    println!("| {:44} |      p10 |   median |      p90 | median to {floor} |", "");
    println!("|:{}-|---------:|---------:|---------:|------:|", "-".repeat(44));
}

/// Compiles a C program of one file.
fn compile_program(folder: &std::path::Path, name: &str, source: &str) -> Result<std::path::PathBuf> {
    let (file, program) = (folder.join(name).with_extension("c"), folder.join(name));
    std::fs::write(&file, source)?;
    let done = std::process::Command::new("cc").args(["-O2", "-o"]).arg(&program).arg(&file).status()?;
    if done.success() { Ok(program) } else { Err(format!("cc: {done}").into()) }
}

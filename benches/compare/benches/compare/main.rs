//! hotcell beside its floors and its peers, measured in one run.
//!
//! Every row computes `add(a, b)` on the other side of its mechanism, and the caller checks every result. The rows take
//! turns, round after round, so that whatever drifts in the machine hits them alike. See `measure.rs` for how a
//! turn is timed, `roster.rs` for their order, `process.rs` for how the other process comes and goes, and `hotcell_rows.rs` for our own rows.
//!
//! ```text
//! cargo bench --bench compare                          the table
//! cargo bench --bench compare -- --json                one JSON object a row
//! cargo bench --bench compare -- --only floor,hotcell  some of the rows
//! ```

mod clock;
mod cpus;
mod floor;
mod hotcell_rows;
mod in_process;
mod measure;
mod memory;
mod options;
mod peers;
mod process;
mod report;
mod roster;
mod watchdog;

use std::error::Error;
use std::process::ExitCode;

use clock::Clock;
use cpus::Cpus;
use options::{Command, Options};
use report::Report;
use roster::Roster;
use watchdog::Watchdog;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// What every row computes.
fn add(a: i32, b: i32) -> i32 {
    a.wrapping_add(b)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some(role) = process::role(&arguments) {
        return process::run_as_peer(role, &arguments, serve);
    }
    match options::parse(&arguments) {
        Ok(Command::Help) => {
            print!("{}", options::HELP);
            ExitCode::SUCCESS
        }
        Ok(Command::Run(options)) => compare(&options).unwrap_or_else(|error| {
            eprintln!("compare: {error}");
            ExitCode::FAILURE
        }),
        Err(message) => {
            eprintln!("compare: {message}\n\n{}", options::HELP);
            ExitCode::from(2)
        }
    }
}

/// The peer's half of a row, in a process of its own.
fn serve(role: &str, caller: process::Caller) -> Result<()> {
    match role {
        floor::RECORD => floor::serve_record(caller),
        floor::FUTEX => floor::serve_futex(caller),
        peers::bytes::ROLE => peers::bytes::serve(caller),
        peers::pthread_event::NAME => peers::pthread_event::serve(caller),
        peers::iceoryx::NAME => peers::iceoryx::serve(caller),
        peers::servo_ipc::NAME => peers::servo_ipc::serve(caller),
        unknown => Err(format!("no such role: {unknown}").into()),
    }
}

fn compare(options: &Options) -> Result<ExitCode> {
    let cpus = Cpus::choose()?;
    let mut roster = Roster::new(cpus, options.only.clone());
    floor::enlist(&mut roster);
    hotcell_rows::enlist(&mut roster);
    in_process::enlist(&mut roster);
    peers::enlist(&mut roster);
    if roster.is_empty() {
        return Err("no row has such a name".into());
    }

    // Only now: a process started by a pinned thread would inherit its one CPU.
    cpus::pin_thread(cpus.host)?;
    let clock = Clock::calibrate();
    let report = measure_all(&mut roster, &clock, options);
    drop(roster); // ends the peers, before anything is printed

    report.print(options, cpus, &clock);
    Ok(if options.test && report.has_failures() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// All rounds of all rows.
fn measure_all(roster: &mut Roster, clock: &Clock, options: &Options) -> Report {
    let mut report = Report::new(roster.names());
    let mut ticks = Vec::with_capacity(measure::MOST_CALLS);
    let watchdog = Watchdog::start();
    for round in 0..options.rounds {
        for name in roster.turns(round) {
            watchdog.turn(name);
            let mean = roster.row(name).turn(clock, options.span, &mut ticks);
            report.record(name, mean, ticks.iter().map(|&ticks| clock.nanoseconds(ticks)));
        }
        report.end_round();
    }
    report
}

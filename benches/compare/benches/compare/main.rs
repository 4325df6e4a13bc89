//! hotcell beside its floors and its peers, measured in one run.
//!
//! Every row makes calls to the other side of its mechanism, and checks every result. The rows of a section take
//! turns, round after round, so that whatever drifts in the machine hits them alike. See `measure.rs` for how a
//! turn is timed, `roster.rs` for their order, `process.rs` for how the other process comes and goes, `cell.rs` for our own rows and
//! `floor.rs` for what they are held against.
//!
//! ```text
//! cargo bench --bench compare                     every section
//! cargo bench --bench compare -- calls gaps       some of them
//! cargo bench --bench compare -- --help
//! ```

mod in_process;
mod sections;

use std::process::ExitCode;

use hotcell_compare::Result;
use hotcell_compare::clock::Clock;
use hotcell_compare::command_line::{Accepted, Options, Usage};
use hotcell_compare::cpus::{self, Cpus};
use hotcell_compare::measure::{SPAN, TEST_SPAN};
use hotcell_compare::report::{self, NEAR_NANOSECONDS};
use hotcell_compare::roster::Roster;
use hotcell_compare::verdict;
use sections::SECTIONS;

const USAGE: Usage = Usage {
    bench: "compare",
    sections: &[
        ("calls", "numbers, awake and asleep, beside a bare record and a bare futex"),
        ("bursts", "calls that do not wait for each other, beside a bare stream"),
        ("buffers", "bytes in and out, beside memcpy and a bare record"),
        ("gaps", "calls after a pause, beside a bare futex after the same pause"),
        ("peers", "other ways to reach another process"),
    ],
    options: &[Accepted {
        name: "--only",
        value: Some("TEXT"),
        help: "only rows whose name contains it; may be repeated",
    }],
};

fn main() -> ExitCode {
    hotcell_compare::main(&USAGE, compare)
}

fn compare(options: &Options) -> Result<ExitCode> {
    let cpus = Cpus::choose()?;
    let clock = Clock::calibrate();
    let span = if options.test { TEST_SPAN } else { SPAN };
    let peer_cpu = cpus.peer.map_or("the same CPU".into(), |cpu| format!("CPU {cpu}"));
    println!(
        "# hotcell beside its floors and its peers\n\n\
         The caller runs on CPU {}, the other side on {peer_cpu}. All results are checked. Times are of one call.\n\
         Mean: blocks of calls between two clock readings, the average of the middle half of all blocks. Percentiles and maximum: single calls by {}, in steps of {:.1} ns, \
         less its own cost of {:.1} ns; a fast row's may lie above its mean, whose calls no clock keeps apart.\n\
         Near or far: whether the bare record comes back within {NEAR_NANOSECONDS} ns, measured in every round before and after the rows that keep both CPUs awake.\n\
         A row that sleeps wakes an idle CPU each way; `taskset -c 0` puts both sides on one, which spinning rows refuse.\n",
        cpus.host,
        clock.name(),
        clock.step_nanoseconds(),
        clock.overhead_nanoseconds(),
    );

    let (mut verdicts, mut failed) = (Vec::new(), false);
    for section in SECTIONS.iter().filter(|section| options.wants(section.name)) {
        // A process started by a pinned thread would inherit its one CPU.
        cpus.release_thread()?;
        let mut roster = Roster::new(options.values("--only"), &cpus);
        (section.enlist)(&mut roster, &cpus)?;
        cpus::pin_thread(cpus.host)?;
        let report = report::measure(section.name, &mut roster, &clock, options.rounds(section.rounds), span);
        drop(roster); // ends the peers, before anything is printed
        report.print();
        verdicts.extend((section.verdicts)(&report));
        failed |= report.has_failures();
    }
    verdict::print(&verdicts);
    Ok(if options.test && failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

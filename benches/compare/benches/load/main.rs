//! Latency under a load that does not wait: calls are due at a fixed rate, and each one's latency counts from when it was due.
//!
//! A loop that calls, waits and calls again makes fewer calls while the other side is slow, and so measures the slow times
//! less often than a user meets them ("coordinated omission"). Here a call that is late because the one before took long
//! counts with all of its delay, as in Aeron's load test rig. The caller spins until the next call is due; bursts are calls that are due
//! at the same moment.
//!
//! ```text
//! cargo bench --bench load                    every section
//! cargo bench --bench load -- --plot          and pictures, in the target directory
//! ```

mod plot;
mod schedule;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use hotcell::WaitPolicy::Adaptive;
use hotcell_compare::Result;
use hotcell_compare::cell::{Bytes, Cell, Typed};
use hotcell_compare::command_line::{Accepted, Options, Usage};
use hotcell_compare::cpus::{self, Cpus};
use hotcell_compare::floor::{CopyRow, FutexRow, RecordRow};
use hotcell_compare::peers;
use hotcell_compare::report::Distance;
use hotcell_compare::watchdog::Watchdog;
use schedule::{AfterPauses, Loaded, Measured, Schedule};

const USAGE: Usage = Usage {
    bench: "load",
    sections: &[
        ("numbers", "a call of two numbers, at several rates and bursts, ours and the peers'"),
        ("bytes", "a call with bytes in and out, at several rates"),
        ("gaps", "a call after a pause, by the length of the pause"),
    ],
    options: &[Accepted {
        name: "--plot",
        value: None,
        help: "draw latency-percentiles.svg and idle-gaps.svg",
    }],
};

const TYPED: &str = "hotcell";
const SOCKET: &str = "unix socket";
const FUTEX: &str = "bare futex";
const RECORD: &str = "bare record";

/// How long each row keeps each schedule in a round.
const SLICE: Duration = Duration::from_millis(150);
const TEST_SLICE: Duration = Duration::from_millis(3);

const RATES: [u64; 4] = [1_000, 10_000, 100_000, 1_000_000];
const BURSTS: [u64; 2] = [1, 16];
const SIZES: [(&str, usize); 3] = [("64 B", 64), ("1 KiB", 1 << 10), ("64 KiB", 64 << 10)];
/// The schedule of the picture.
const DRAWN: (u64, u64) = (10_000, 1);

fn main() -> ExitCode {
    hotcell_compare::main(&USAGE, load)
}

fn load(options: &Options) -> Result<ExitCode> {
    let cpus = Cpus::choose()?;
    cpus.require_two()?;
    let slice = if options.test { TEST_SLICE } else { SLICE };
    let rounds = options.rounds(3);
    let watchdog = Watchdog::start();
    println!(
        "# Latency under load\n\nThe caller runs on CPU {}, spinning until each call is due, the other side on CPU {}. \
         {rounds} rounds of {slice:?} for each row and schedule, interleaved. \"kept\" is how many of the calls that were due in a slice were made in it; where it is \
         below 100 %, latencies grow with the slice.\n",
        cpus.host,
        cpus.peer.unwrap_or(cpus.host)
    );

    if options.wants("numbers") {
        let mut rows = numbers(&cpus)?;
        cpus::pin_thread(cpus.host)?;
        for round in 0..rounds {
            for rate in RATES {
                for burst in BURSTS {
                    let schedule = Schedule { rate, burst };
                    schedule::round(&mut rows, round, schedule, slice, &watchdog);
                }
            }
        }
        cpus.release_thread()?;
        println!("## numbers\n\n{}", schedule::Table(&rows));
        if options.has("--plot") {
            let (rate, burst) = DRAWN;
            let mut lines: Vec<_> =
                rows.iter().filter_map(|row| row.percentiles(Schedule { rate, burst })).collect();
            lines.sort_by_key(|line| line.name != TYPED);
            let title = format!("{rate} calls a second, latency from when each was due{}", placed(&rows));
            plot::percentiles(&picture("latency-percentiles.svg")?, &title, &lines)?;
        }
    }
    if options.wants("bytes") {
        let mut tables = Vec::new();
        for (size, bytes) in SIZES {
            let mut rows = with_bytes(&cpus, bytes)?;
            cpus::pin_thread(cpus.host)?;
            for round in 0..rounds {
                for rate in &RATES[..3] {
                    schedule::round(&mut rows, round, Schedule { rate: *rate, burst: 1 }, slice, &watchdog);
                }
            }
            cpus.release_thread()?;
            tables.push((size, rows));
        }
        for (size, rows) in &tables {
            println!("## {size} in and out\n\n{}", schedule::Table(rows));
        }
    }
    if options.wants("gaps") {
        let mut rows = [
            AfterPauses::new(TYPED, Typed::new(&Cell::open(&cpus, Adaptive)?)?),
            AfterPauses::new(FUTEX, FutexRow::open(&cpus)?),
            AfterPauses::new(SOCKET, peers::bytes::Bytes::over_socket(&cpus)?),
        ];
        cpus::pin_thread(cpus.host)?;
        for _ in 0..rounds {
            rows.iter_mut().for_each(|row| {
                watchdog.turn(row.name());
                row.turn(options.test);
            });
        }
        cpus.release_thread()?;
        println!("## gaps\n\nThe caller sleeps for so long, then calls: p50 and p99 of the call.\n");
        schedule::print_pauses(&rows);
        if options.has("--plot") {
            let lines: Vec<_> = rows.iter().map(AfterPauses::line).collect();
            plot::gaps(&picture("idle-gaps.svg")?, "A call after a pause: median", &lines)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Near or far, if it was one of them all the time.
fn placed(rows: &[Box<dyn Loaded>]) -> String {
    let record = rows.iter().find(|row| row.name() == RECORD);
    match record.map_or(Distance::Unknown, |row| row.distance()) {
        Distance::Near => " (near cores)".into(),
        Distance::Far => " (far cores)".into(),
        Distance::Changing | Distance::Unknown => String::new(),
    }
}

fn numbers(cpus: &Cpus) -> Result<Vec<Box<dyn Loaded>>> {
    Ok(vec![
        Box::new(Measured::new(RECORD, RecordRow::open(cpus)?)),
        Box::new(Measured::new(TYPED, Typed::new(&Cell::open(cpus, Adaptive)?)?)),
        Box::new(Measured::new("iceoryx2", peers::iceoryx::IceoryxRow::open(cpus)?)),
        Box::new(Measured::new("unix socket, polled", peers::bytes::Polled::open(cpus)?)),
        Box::new(Measured::new(FUTEX, FutexRow::open(cpus)?)),
        Box::new(Measured::new(SOCKET, peers::bytes::Bytes::over_socket(cpus)?)),
        Box::new(Measured::new("pipe", peers::bytes::Bytes::over_pipes(cpus)?)),
        Box::new(Measured::new("ipc-channel", peers::servo_ipc::ChannelRow::open(cpus)?)),
        Box::new(Measured::new("raw_sync events", peers::pthread_event::Sleeping::open(cpus)?)),
    ])
}

fn with_bytes(cpus: &Cpus, bytes: usize) -> Result<Vec<Box<dyn Loaded>>> {
    Ok(vec![
        Box::new(Measured::new("bare record, copies", CopyRow::open(cpus, bytes, false)?)),
        Box::new(Measured::new(TYPED, Bytes::new(&Cell::open(cpus, Adaptive)?, bytes, false)?)),
        Box::new(Measured::new(SOCKET, peers::bytes::Large::open(cpus, bytes)?)),
    ])
}

/// A file in the bench output folder.
fn picture(name: &str) -> Result<PathBuf> {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("load");
    std::fs::create_dir_all(&folder)?;
    let path = folder.join(name);
    println!("drawn: {}\n", path.display());
    Ok(path)
}

//! The sections: which rows each has, and which bars they are held to.

use std::time::Duration;

use hotcell::WaitPolicy::{Adaptive, Park, Spin};
use hotcell::{SessionBuilder, Worker};
use hotcell_compare::Result;
use hotcell_compare::cell::{ByName, Bytes, BytesIn, Cell, EightDoubles, InBlock, Parked, SixWords, Typed};
use hotcell_compare::cpus::Cpus;
use hotcell_compare::floor::{self, CopyRow, FutexRow, MemcpyRow, TwoLinesRow};
use hotcell_compare::measure::AfterPause;
use hotcell_compare::peers;
use hotcell_compare::pipeline::Pipelined;
use hotcell_compare::report::Report;
use hotcell_compare::roster::{PLACES, Roster};
use hotcell_compare::stream::{BareStream, Burst, STREAM, Stream, Sustained, Tickets};
use hotcell_compare::verdict::{Limit, Verdict};

use crate::in_process::{Direct, Libffi};

pub struct Section {
    pub name: &'static str,
    /// Unless others are asked for.
    pub rounds: usize,
    pub enlist: fn(&mut Roster, &Cpus) -> Result<()>,
    pub verdicts: fn(&Report) -> Vec<Verdict>,
}

pub const SECTIONS: [Section; 5] = [
    Section { name: "calls", rounds: 300, enlist: calls, verdicts: call_verdicts },
    Section { name: "bursts", rounds: 150, enlist: bursts, verdicts: burst_verdicts },
    Section { name: "buffers", rounds: 100, enlist: buffers, verdicts: buffer_verdicts },
    Section { name: "gaps", rounds: 40, enlist: gaps, verdicts: gap_verdicts },
    Section { name: "peers", rounds: 150, enlist: peers, verdicts: peer_verdicts },
];

const TYPED: &str = "typed";
const SIX_WORDS: &str = "six words";
const EIGHT_DOUBLES: &str = "eight doubles";
const BY_NAME: &str = "by name";
const PARKED: &str = "typed, parked";

fn calls(roster: &mut Roster, cpus: &Cpus) -> Result<()> {
    // A session's place in the cache decides over a part of each call, so these rows share theirs.
    let cells = (0..PLACES).map(|_| Cell::open(cpus, Adaptive)).collect::<Result<Vec<_>>>()?;
    let mut places = [0, 1, 2, 3].map(|_| cells.iter());
    let [typed, six, eight, by_name] = &mut places;
    let next = |places: &mut std::slice::Iter<'_, _>| {
        std::rc::Rc::clone(places.next().expect("a cell for each place"))
    };

    roster.add_in_places(floor::TWO_LINES, Some(floor::RECORD), || TwoLinesRow::open(cpus));
    roster.add_in_places(TYPED, Some(floor::RECORD), || Typed::new(&next(typed)));
    roster.add_in_places(SIX_WORDS, Some(floor::RECORD), || SixWords::new(&next(six)));
    roster.add_in_places(EIGHT_DOUBLES, Some(floor::TWO_LINES), || EightDoubles::new(&next(eight)));
    roster.add_in_places(BY_NAME, Some(floor::RECORD), || ByName::new(&next(by_name)));
    roster.add_in_places("typed, spinning", Some(floor::RECORD), || Typed::new(&Cell::open(cpus, Spin)?));

    roster.add(floor::FUTEX, None, || FutexRow::open(cpus));
    roster.add(PARKED, Some(floor::FUTEX), || Ok(Parked(Typed::new(&Cell::open(cpus, Park)?)?)));
    roster.add("by name, parked", Some(floor::FUTEX), || Ok(Parked(ByName::new(&Cell::open(cpus, Park)?)?)));
    roster.add("in process: direct", None, || Ok(Direct::new()));
    roster.add("in process: libffi", None, || Ok(Libffi::new()));
    Ok(())
}

fn call_verdicts(report: &Report) -> Vec<Verdict> {
    let mean = |what: &str, row, floor, limit| {
        report.verdict(what, Limit::AtMost(limit), move |view| view.ratio(row, floor))
    };
    let quantile = |what: &str, quantile, limit| {
        report.verdict(what, Limit::AtMost(limit), move |view| {
            Some(view.quantile(TYPED, quantile)? / view.quantile(floor::RECORD, quantile)?)
        })
    };
    vec![
        mean("typed call: mean to the bare record's", TYPED, floor::RECORD, 1.15),
        quantile("typed call: p50 to the bare record's", 0.5, 1.15),
        quantile("typed call: p99.9 to the bare record's", 0.999, 1.5),
        mean("six words: mean to the bare record's", SIX_WORDS, floor::RECORD, 1.25),
        mean("eight doubles: mean to the bare two-line record's", EIGHT_DOUBLES, floor::TWO_LINES, 1.25),
        mean("by name, prepared: mean to the bare record's", BY_NAME, floor::RECORD, 1.25),
        mean("typed, both sides park: mean to the bare futex's", PARKED, floor::FUTEX, 1.1),
    ]
}

const PIPELINE: &str = "pipeline";
const TICKETS: &str = "tickets";
const BURSTS: [&str; 3] = ["16 a burst", "256 a burst", "sustained"];

fn burst_name(row: &str, burst: &str) -> String {
    format!("{row}, {burst}")
}

/// The three bursts of whatever can send and receive.
fn add_bursts<S: Stream + 'static>(
    roster: &mut Roster,
    row: &str,
    floor: Option<&str>,
    mut open: impl FnMut() -> Result<S>,
) {
    let [few, many, sustained] = BURSTS;
    let floor = |burst: &str| floor.map(|floor| burst_name(floor, burst));
    roster.add(burst_name(row, few), floor(few).as_deref(), || Ok(Burst::<_, 16>(open()?)));
    roster.add(burst_name(row, many), floor(many).as_deref(), || Ok(Burst::<_, 256>(open()?)));
    roster.add(burst_name(row, sustained), floor(sustained).as_deref(), || Ok(Sustained::new(open()?)));
}

fn bursts(roster: &mut Roster, cpus: &Cpus) -> Result<()> {
    let cell = || {
        let session = SessionBuilder::new().slots(512); // the largest burst needs 256
        Cell::open_with(cpus, Adaptive, Worker::builder(), session)
    };
    add_bursts(roster, STREAM, None, || BareStream::open(cpus));
    add_bursts(roster, PIPELINE, Some(STREAM), || Pipelined::new(&cell()?));
    add_bursts(roster, TICKETS, Some(STREAM), || Tickets::new(&cell()?));
    Ok(())
}

fn burst_verdicts(report: &Report) -> Vec<Verdict> {
    let verdict = |(row, burst): (&str, &str)| {
        report.verdict(
            format!("{}: per call to the bare stream's", burst_name(row, burst)),
            Limit::AtMost(1.5),
            |view| view.ratio(&burst_name(row, burst), &burst_name(STREAM, burst)),
        )
    };
    BURSTS.map(|burst| (PIPELINE, burst)).map(verdict).into()
}

const SIZES: [(&str, usize); 4] =
    [("64 B", 64), ("1 KiB", 1 << 10), ("64 KiB", 64 << 10), ("1 MiB", 1 << 20)];

fn memcpy_name(size: &str) -> String {
    format!("memcpy twice, {size}")
}

fn copy_name(size: &str, touch: bool) -> String {
    format!("{} {size}{}", floor::COPY, if touch { ", touched" } else { "" })
}

fn bytes_name(size: &str, touch: bool) -> String {
    format!("in and out {size}{}", if touch { ", touched" } else { "" })
}

fn block_name(size: &str) -> String {
    format!("in a block {size}")
}

fn buffers(roster: &mut Roster, cpus: &Cpus) -> Result<()> {
    let cell = Cell::open(cpus, Adaptive)?;
    roster.add(TYPED, Some(floor::RECORD), || Typed::new(&cell));
    for (size, bytes) in SIZES {
        roster.add(memcpy_name(size), None, || Ok(MemcpyRow::new(bytes)));
        for touch in [false, true] {
            let floor = copy_name(size, touch);
            roster.add(&floor, None, || CopyRow::open(cpus, bytes, touch));
            roster.add(bytes_name(size, touch), Some(&floor), || Bytes::new(&cell, bytes, touch));
        }
        roster.add(format!("in {size}"), None, || BytesIn::new(&cell, bytes));
        roster.add(block_name(size), Some(&block_name(SIZES[0].0)), || InBlock::new(&cell, bytes));
    }
    Ok(())
}

fn buffer_verdicts(report: &Report) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    for (size, _) in SIZES {
        let what = format!("{size} in and out: to memcpy twice and the bare record");
        verdicts.push(report.verdict(what, Limit::AtMost(1.3), |view| {
            let floor = view.mean(&memcpy_name(size))? + view.mean(floor::RECORD)?;
            Some(view.mean(&bytes_name(size, false))? / floor)
        }));
    }
    for (size, _) in SIZES {
        for touch in [false, true] {
            let touched = if touch { ", touched" } else { "" };
            let what = format!("{size} in and out{touched}: to the same copies around a bare record");
            verdicts.push(report.verdict(what, Limit::AtMost(1.3), |view| {
                view.ratio(&bytes_name(size, touch), &copy_name(size, touch))
            }));
        }
    }
    let (smallest, largest) = (SIZES[0].0, SIZES[SIZES.len() - 1].0);
    let what = format!("a buffer that stays in the arena: {largest} to {smallest}");
    verdicts.push(
        report.verdict(what, Limit::AtMost(1.15), |view| {
            view.ratio(&block_name(largest), &block_name(smallest))
        }),
    );
    verdicts
}

/// The pauses, and how many calls a turn makes after each.
const GAPS: [(&str, Duration, usize); 4] = [
    ("100 µs", Duration::from_micros(100), 20),
    ("1 ms", Duration::from_millis(1), 10),
    ("10 ms", Duration::from_millis(10), 4),
    ("100 ms", Duration::from_millis(100), 2),
];

fn gap_name(row: &str, gap: &str) -> String {
    format!("{row}, after {gap}")
}

fn gaps(roster: &mut Roster, cpus: &Cpus) -> Result<()> {
    for (gap, pause, calls) in GAPS {
        let floor = gap_name(floor::FUTEX, gap);
        roster.add(&floor, None, || Ok(AfterPause { row: FutexRow::open(cpus)?, pause, calls }));
        roster.add(gap_name(TYPED, gap), Some(&floor), || {
            Ok(AfterPause { row: Typed::new(&Cell::open(cpus, Adaptive)?)?, pause, calls })
        });
        roster.add(gap_name(PARKED, gap), Some(&floor), || {
            Ok(AfterPause { row: Typed::new(&Cell::open(cpus, Park)?)?, pause, calls })
        });
    }
    Ok(())
}

fn gap_verdicts(report: &Report) -> Vec<Verdict> {
    let verdict = |(gap, _, _)| {
        let (row, floor) = (gap_name(TYPED, gap), gap_name(floor::FUTEX, gap));
        report.verdict(
            format!("typed call after {gap} of nothing: mean to the bare futex's"),
            Limit::AtMost(1.15),
            move |view| view.ratio(&row, &floor),
        )
    };
    GAPS.into_iter().map(verdict).collect()
}

const SOCKET: &str = "peer/unix_socket";
const PIPE: &str = "peer/pipe";

fn peers(roster: &mut Roster, cpus: &Cpus) -> Result<()> {
    roster.add_in_places(TYPED, Some(floor::RECORD), || Typed::new(&Cell::open(cpus, Adaptive)?));
    roster.add(peers::iceoryx::NAME, Some(floor::RECORD), || peers::iceoryx::IceoryxRow::open(cpus));
    roster.add(peers::pthread_event::BUSY, Some(floor::RECORD), || peers::pthread_event::Busy::open(cpus));
    roster.add("peer/unix_socket polled", Some(floor::RECORD), || peers::bytes::Polled::open(cpus));

    roster.add(floor::FUTEX, None, || FutexRow::open(cpus));
    roster.add(PARKED, Some(floor::FUTEX), || Ok(Parked(Typed::new(&Cell::open(cpus, Park)?)?)));
    roster.add(SOCKET, Some(floor::FUTEX), || peers::bytes::Bytes::over_socket(cpus));
    roster.add(PIPE, Some(floor::FUTEX), || peers::bytes::Bytes::over_pipes(cpus));
    roster
        .add(peers::pthread_event::EVENT, Some(floor::FUTEX), || peers::pthread_event::Sleeping::open(cpus));
    roster.add(peers::servo_ipc::NAME, Some(floor::FUTEX), || peers::servo_ipc::ChannelRow::open(cpus));
    Ok(())
}

fn peer_verdicts(report: &Report) -> Vec<Verdict> {
    let faster = |name: &str, limit| {
        let what = format!("{name}: mean round trip to the typed call's");
        report.verdict(what, Limit::AtLeastNear(limit), |view| view.ratio(name, TYPED))
    };
    vec![
        faster(peers::iceoryx::NAME, 5.0),
        faster(peers::servo_ipc::NAME, 30.0),
        faster(SOCKET, 20.0),
        faster(PIPE, 20.0),
        faster(peers::pthread_event::EVENT, 20.0),
    ]
}

//! Both sides on one CPU, and a busy process on every CPU: whoever spins there takes the time from the side that it waits for.

use std::time::Duration;

use hotcell::WaitPolicy::{Adaptive, Park};
use hotcell_compare::Result;
use hotcell_compare::cell::{Cell, Parked, Typed};
use hotcell_compare::clock::Clock;
use hotcell_compare::command_line::Options;
use hotcell_compare::cpus::{self, Cpus};
use hotcell_compare::floor::{FUTEX, FutexRow};
use hotcell_compare::measure::TEST_SPAN;
use hotcell_compare::peers::bytes::Bytes;
use hotcell_compare::process::{BUSY, Peer};
use hotcell_compare::report;
use hotcell_compare::roster::Roster;
use hotcell_compare::verdict::{Limit, Verdict};

const TYPED: &str = "typed";
const SOCKET: &str = "peer/unix_socket";
/// Long enough for the scheduler to have its say several times in each turn.
const SPAN: Duration = Duration::from_millis(60);

pub fn run(options: &Options) -> Result<Vec<Verdict>> {
    let cpus = Cpus::choose()?;
    let one = cpus.only_one();
    let mut roster = Roster::without_record();
    roster.add(FUTEX, None, || FutexRow::open(&one));
    roster.add(SOCKET, Some(FUTEX), || Bytes::over_socket(&one));
    roster.add("peer/pipe", Some(FUTEX), || Bytes::over_pipes(&one));
    // As a host would have it: the library is not told.
    roster.add(TYPED, Some(SOCKET), || Ok(Parked(Typed::new(&Cell::open(&one, Adaptive)?)?)));
    roster.add("typed, parked", Some(SOCKET), || Ok(Parked(Typed::new(&Cell::open(&one, Park)?)?)));

    let span = if options.test { TEST_SPAN } else { SPAN };
    let clock = Clock::calibrate();
    let mut verdicts = Vec::new();
    let mut measure = |title: &str| -> Result<()> {
        cpus::pin_thread(one.host)?;
        let report = report::measure(title, &mut roster, &clock, options.rounds(12), span);
        cpus.release_thread()?;
        report.print();
        verdicts.push(report.verdict(
            format!("{title}: Unix socket to typed call"),
            Limit::AtLeast(1.0),
            |view| view.ratio(SOCKET, TYPED),
        ));
        Ok(())
    };
    measure("both sides on one CPU")?;
    let busy: Vec<Peer> = Cpus::all()?
        .into_iter()
        .map(|cpu| {
            let peer = Peer::start(&cpus, BUSY, &[], &[])?;
            cpus::pin_process(peer.process(), cpu)?;
            Ok(peer)
        })
        .collect::<Result<_>>()?;
    measure("both sides on one CPU, every CPU busy")?;
    drop(busy);
    Ok(verdicts)
}

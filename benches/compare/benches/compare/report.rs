//! What was measured: the samples, the tables, and the bars hotcell is held to.

use std::collections::BTreeMap;
use std::fmt::{self, Display};

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::clock::Clock;
use crate::cpus::Cpus;
use crate::options::Options;
use crate::{floor, hotcell_rows};

/// How far apart the two cores were in a round, as the floor shows it: a hypervisor may move either at any time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Distance {
    Near,
    Far,
    /// The floor's turns in the round disagree.
    Changing,
    /// The floor is not among the rows.
    Unknown,
}

/// Near cores answer faster than this.
const NEAR_NANOSECONDS: f64 = 150.0;

impl Distance {
    /// By the floor's means in one round.
    fn of(floor_means: &[f64]) -> Self {
        let near = floor_means.iter().filter(|&&mean| mean < NEAR_NANOSECONDS).count();
        match near {
            _ if floor_means.is_empty() => Self::Unknown,
            0 => Self::Far,
            _ if near == floor_means.len() => Self::Near,
            _ => Self::Changing,
        }
    }
}

/// One row's turns, of one round or of all rounds at one distance.
#[derive(Clone)]
struct Samples {
    means: Vec<f64>,
    /// Single calls, in tenths of a nanosecond.
    latencies: Histogram<u64>,
}

const TENTHS: f64 = 10.0;
/// A minute, in tenths of a nanosecond.
const LONGEST: u64 = 600_000_000_000;

impl Samples {
    fn new() -> Self {
        let latencies = Histogram::new_with_bounds(1, LONGEST, 3).expect("the bounds are in order");
        Self { means: Vec::new(), latencies }
    }

    fn add(&mut self, other: &Self) {
        self.means.extend(&other.means);
        self.latencies.add(&other.latencies).expect("the bounds are the same");
    }

    fn clear(&mut self) {
        self.means.clear();
        self.latencies.reset();
    }

    /// Each turn counts the same.
    fn mean(&self) -> f64 {
        self.means.iter().sum::<f64>() / self.means.len() as f64
    }

    fn quantile(&self, quantile: f64) -> f64 {
        self.latencies.value_at_quantile(quantile) as f64 / TENTHS
    }
}

pub struct Report {
    rows: Vec<Row>,
    /// The distance in each round so far.
    rounds: Vec<Distance>,
}

struct Row {
    name: &'static str,
    failure: Option<String>,
    /// The round that goes on: its distance is known when it ends.
    round: Samples,
    samples: BTreeMap<Distance, Samples>,
}

impl Report {
    /// A report on these rows, with the reason for each that cannot run.
    pub fn new<'a>(rows: impl Iterator<Item = (&'static str, Option<&'a str>)>) -> Self {
        let row = |(name, failure): (_, Option<&str>)| Row {
            name,
            failure: failure.map(str::to_owned),
            round: Samples::new(),
            samples: BTreeMap::new(),
        };
        Self { rows: rows.map(row).collect(), rounds: Vec::new() }
    }

    /// Adds one turn of one row: its mean, and its single calls in nanoseconds.
    pub fn record(&mut self, name: &str, mean: f64, calls: impl Iterator<Item = f64>) {
        let row = self.rows.iter_mut().find(|row| row.name == name).expect("every row is in the report");
        row.round.means.push(mean);
        for nanoseconds in calls {
            row.round.latencies.saturating_record((nanoseconds * TENTHS).round() as u64);
        }
    }

    pub fn end_round(&mut self) {
        let floor = self.rows.iter().find(|row| row.name == floor::RECORD);
        let distance = Distance::of(floor.map_or(&[], |row| &row.round.means));
        self.rounds.push(distance);
        for row in self.rows.iter_mut().filter(|row| row.failure.is_none()) {
            row.samples.entry(distance).or_insert_with(Samples::new).add(&row.round);
            row.round.clear();
        }
    }

    pub fn has_failures(&self) -> bool {
        self.rows.iter().any(|row| row.failure.is_some())
    }

    /// The result goes to stdout. With `--json` that is one object a row, and the rest goes to stderr.
    pub fn print(&self, options: &Options, cpus: Cpus, clock: &Clock) {
        let all = self.table(None);
        let mut tables = vec![("All rounds", &all)];
        let (near, far) = (self.table(Some(Distance::Near)), self.table(Some(Distance::Far)));
        // Each by itself when there were both, or when some rounds were neither.
        if self.rounds.iter().any(|round| round != &self.rounds[0]) {
            tables.extend(near.has_samples().then_some(("Rounds on near cores", &near)));
            tables.extend(far.has_samples().then_some(("Rounds on far cores", &far)));
        }
        let notes = self.notes(options, cpus, clock);
        if options.json {
            all.print_json();
            eprintln!("{notes}");
        } else {
            println!("{notes}");
        }
        for (title, table) in tables {
            let bars = table.bars();
            if options.json && !bars.0.is_empty() {
                eprintln!("{title}:\n{bars}");
            } else if !options.json {
                println!("## {title}\n\n{table}\n{bars}");
            }
        }
    }

    fn notes(&self, options: &Options, cpus: Cpus, clock: &Clock) -> String {
        let rounds = |distance| self.rounds.iter().filter(|&&round| round == distance).count();
        let peer_cpu = cpus.peer.map_or("the same CPU".into(), |cpu| format!("CPU {cpu}"));
        let effort = if options.test { "tiny, to see that the rows work" } else { "interleaved" };
        format!(
            "# hotcell beside its floors and its peers\n\n\
             Every row computes add(i32, i32) on the other side; all results were checked. Nanoseconds a call.\n\
             The caller ran on CPU {}, the peer on {peer_cpu}; rounds: {} ({effort}).\n\
             Mean: blocks of calls between two clock readings. Percentiles: single calls by {}, in steps of {:.1} ns, \
             less its own cost of {:.1} ns; a fast row's may lie above its mean, whose calls no clock keeps apart.\n\
             A row that blocks wakes an idle CPU each way; `taskset -c 0` puts both sides on one, which spinning rows refuse.\n\
             Cores by floor/record, at the start and the end of the rows that keep both awake: \
             near (under {NEAR_NANOSECONDS} ns) in {} rounds, far in {}, changing in {}.\n",
            cpus.host,
            options.rounds,
            clock.name(),
            clock.step_nanoseconds(),
            clock.overhead_nanoseconds(),
            rounds(Distance::Near),
            rounds(Distance::Far),
            rounds(Distance::Changing),
        )
    }

    /// The rows over the rounds at one distance, or over all.
    fn table(&self, distance: Option<Distance>) -> Table<'_> {
        let select = |row: &Row| {
            let mut chosen =
                row.samples.iter().filter(|(at, _)| distance.is_none_or(|wanted| wanted == **at));
            let mut samples = chosen.next()?.1.clone();
            chosen.for_each(|(_, more)| samples.add(more));
            Some(samples)
        };
        Table { rows: self.rows.iter().map(|row| (row, select(row))).collect() }
    }
}

#[derive(Serialize)]
struct JsonRow {
    name: &'static str,
    mean_ns: Option<f64>,
    p50_ns: Option<f64>,
    p99_ns: Option<f64>,
    p999_ns: Option<f64>,
    floor_ratio: Option<f64>,
}

struct Table<'a> {
    rows: Vec<(&'a Row, Option<Samples>)>,
}

impl Table<'_> {
    fn has_samples(&self) -> bool {
        self.rows.iter().any(|(_, samples)| samples.is_some())
    }

    fn mean(&self, name: &str) -> Option<f64> {
        self.rows.iter().find(|(row, _)| row.name == name)?.1.as_ref().map(Samples::mean)
    }

    fn floor_ratio(&self, samples: &Samples) -> Option<f64> {
        self.mean(floor::RECORD).map(|floor| samples.mean() / floor)
    }

    /// A row that could not run has nulls; its reason is on stderr.
    fn print_json(&self) {
        let hundredths = |value: f64| (value * 100.0).round() / 100.0;
        for (row, samples) in &self.rows {
            let samples = samples.as_ref();
            let quantile = |quantile| samples.map(|samples| samples.quantile(quantile));
            let line = JsonRow {
                name: row.name,
                mean_ns: samples.map(|samples| hundredths(samples.mean())),
                p50_ns: quantile(0.5),
                p99_ns: quantile(0.99),
                p999_ns: quantile(0.999),
                floor_ratio: samples.and_then(|samples| self.floor_ratio(samples)).map(hundredths),
            };
            println!("{}", serde_json::to_string(&line).expect("a flat record of numbers"));
        }
    }

    /// The bars whose rows were measured, each with its verdict.
    fn bars(&self) -> Bars {
        use hotcell_rows::{BY_NAME, PARKED, TYPED, TYPED_SPIN};
        let typed = self.mean(TYPED);
        let best_typed = [typed, self.mean(TYPED_SPIN)].into_iter().flatten().reduce(f64::min);
        let bar = |what, value: Option<f64>, base: Option<f64>, limit| {
            Some(Bar { what, ratio: value? / base?, limit })
        };
        let bars = [
            bar("typed call, adaptive or spin, to floor/record", best_typed, self.mean(floor::RECORD), 1.5),
            bar("hotcell/parked to floor/futex", self.mean(PARKED), self.mean(floor::FUTEX), 1.25),
            bar("hotcell/by_name to hotcell/typed", self.mean(BY_NAME), typed, 1.5),
        ];
        Bars(bars.into_iter().flatten().collect())
    }
}

impl Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(f, "| name                 |     mean |      p50 |      p99 |    p99.9 |  to floor |")?;
        writeln!(f, "|:---------------------|---------:|---------:|---------:|---------:|----------:|")?;
        for (row, samples) in &self.rows {
            write!(f, "| {:<20} |", row.name)?;
            if let Some(samples) = samples {
                write!(f, " {:>8.1} |", samples.mean())?;
                for quantile in [0.5, 0.99, 0.999] {
                    write!(f, " {:>8.1} |", samples.quantile(quantile))?;
                }
                match self.floor_ratio(samples) {
                    Some(ratio) => writeln!(f, " {ratio:>8.2}x |")?,
                    None => writeln!(f, "         - |")?,
                }
            } else {
                let reason = row.failure.as_deref().unwrap_or("no rounds");
                writeln!(f, " cannot run here: {reason} | | | | |")?;
            }
        }
        Ok(())
    }
}

struct Bars(Vec<Bar>);

/// A promise: one mean is at most so many times another.
struct Bar {
    what: &'static str,
    ratio: f64,
    limit: f64,
}

impl Display for Bars {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for Bar { what, ratio, limit } in &self.0 {
            let verdict = if ratio <= limit { "met" } else { "MISSED" };
            writeln!(f, "bar: {what}: {ratio:.2}x of at most {limit:.2}x: {verdict}")?;
        }
        Ok(())
    }
}

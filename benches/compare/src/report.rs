//! What a section measured: its rounds, and the tables.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::time::Duration;

use hdrhistogram::Histogram;

use crate::clock::Clock;
use crate::floor;
use crate::roster::{Named, Roster};
use crate::verdict::{Limit, Verdict};
use crate::watchdog::Watchdog;

/// How far apart the two cores were, as the bare record shows it: a hypervisor may move either at any time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Distance {
    Near,
    Far,
    /// The bare record's turns in the round disagree.
    Changing,
    /// The bare record cannot run here, or does not matter.
    Unknown,
}

/// Fewer rounds tell little.
const FEW_ROUNDS: usize = 5;

/// Near cores answer faster than this.
pub const NEAR_NANOSECONDS: f64 = 150.0;

impl Distance {
    /// By the bare record's means in one round.
    pub fn of(floor_means: &[f64]) -> Self {
        let near = floor_means.iter().filter(|&&mean| mean < NEAR_NANOSECONDS).count();
        match near {
            _ if floor_means.is_empty() => Self::Unknown,
            0 => Self::Far,
            _ if near == floor_means.len() => Self::Near,
            _ => Self::Changing,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Near => "near",
            Self::Far => "far",
            Self::Changing => "changing",
            Self::Unknown => "any",
        }
    }
}

/// Turns of one row: of one round, or of all rounds at one distance.
#[derive(Clone)]
pub struct Samples {
    means: Vec<f64>,
    /// Single steps, in tenths of a nanosecond a call.
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

    /// The average of the middle half of the turns' means: a turn that the machine interrupted for milliseconds tells nothing of a call, and the
    /// percentiles and the maximum have it.
    pub fn mean(&self) -> f64 {
        let mut means = self.means.clone();
        means.sort_unstable_by(f64::total_cmp);
        let quarter = means.len() / 4;
        let middle = &means[quarter..means.len() - quarter];
        middle.iter().sum::<f64>() / middle.len() as f64
    }

    /// Within the clock's step, values are taken to be spread evenly: single readings of a coarse clock come in two or three sizes, and only how many there are
    /// of each tells where in between the quantile lies.
    pub fn quantile(&self, quantile: f64, step: f64) -> f64 {
        let at = self.latencies.value_at_quantile(quantile);
        let lowest = self.latencies.lowest_equivalent(at);
        let below = if lowest == 0 { 0 } else { self.latencies.count_between(0, lowest - 1) };
        let part =
            (quantile * self.latencies.len() as f64 - below as f64) / self.latencies.count_at(at) as f64;
        (at as f64 / TENTHS + step * (part.clamp(0.0, 1.0) - 0.5)).max(0.0)
    }

    pub fn max(&self) -> f64 {
        self.latencies.max() as f64 / TENTHS
    }
}

pub struct Report {
    title: String,
    /// The clock's, in nanoseconds.
    step: f64,
    rows: Vec<Row>,
    /// The distance in each round so far.
    rounds: Vec<Distance>,
}

struct Row {
    name: String,
    floor: Option<String>,
    failure: Option<String>,
    /// The round that goes on: its distance is known when it ends.
    round: Samples,
    samples: BTreeMap<Distance, Samples>,
}

/// Runs all rounds of all rows.
pub fn measure(title: &str, roster: &mut Roster, clock: &Clock, rounds: usize, span: Duration) -> Report {
    let mut report = Report::new(title, clock.step_nanoseconds(), roster.rows());
    let mut singles = Vec::new();
    let watchdog = Watchdog::start();
    for round in 0..rounds {
        for number in roster.turns(round) {
            watchdog.turn(&report.rows[number].name);
            let mean = roster.row(number).turn(clock, span, &mut singles);
            report.record(number, mean, &singles);
        }
        report.end_round();
    }
    report
}

impl Report {
    fn new<'a>(title: &str, step: f64, rows: impl Iterator<Item = Named<'a>>) -> Self {
        let row = |row: Named| Row {
            name: row.name.to_owned(),
            floor: row.floor.map(str::to_owned),
            failure: row.failure.map(str::to_owned),
            round: Samples::new(),
            samples: BTreeMap::new(),
        };
        Self { title: title.to_owned(), step, rows: rows.map(row).collect(), rounds: Vec::new() }
    }

    /// Adds one turn of one row: its mean, and its steps, in nanoseconds a call.
    fn record(&mut self, number: usize, mean: f64, singles: &[f64]) {
        let round = &mut self.rows[number].round;
        round.means.push(mean);
        for nanoseconds in singles {
            round.latencies.saturating_record((nanoseconds * TENTHS).round() as u64);
        }
    }

    fn end_round(&mut self) {
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

    /// A table for each distance that occurred.
    pub fn print(&self) {
        println!("## {}\n", self.title);
        let counted: usize = self.views().iter().map(|view| view.rounds).sum();
        let left_out = self.rounds.len() - counted;
        if left_out > 0 {
            println!(
                "{left_out} of {} rounds are left out: the distance changed within them, or had fewer than {FEW_ROUNDS} of them.\n",
                self.rounds.len()
            );
        }
        for view in self.views() {
            let rounds = if view.rounds == 1 { "round" } else { "rounds" };
            println!("{} {rounds}, {}:\n\n{view}", view.rounds, view.distance.name());
        }
    }

    /// What counts: the rounds near, the rounds far, of each a few at least if there are so many of the other; if there were neither, what there was.
    pub fn views(&self) -> Vec<View<'_>> {
        let at = |distances: &[Distance]| -> Vec<View> {
            distances.iter().map(|&distance| self.at(distance)).filter(|view| view.rounds > 0).collect()
        };
        let mut settled = at(&[Distance::Near, Distance::Far, Distance::Unknown]);
        if settled.iter().any(|view| view.rounds >= FEW_ROUNDS) {
            settled.retain(|view| view.rounds >= FEW_ROUNDS);
        }
        if settled.is_empty() { at(&[Distance::Changing]) } else { settled }
    }

    fn at(&self, distance: Distance) -> View<'_> {
        let rounds = self.rounds.iter().filter(|&&round| round == distance).count();
        View { report: self, distance, rounds }
    }

    /// Holds `reached` of each view against a limit; `None` where its rows were not measured.
    pub fn verdict(
        &self,
        what: impl Into<String>,
        limit: Limit,
        reached: impl Fn(&View) -> Option<f64>,
    ) -> Verdict {
        let views = self.views();
        let reached = views.iter().filter_map(|view| Some((view.distance, reached(view)?))).collect();
        Verdict { what: what.into(), limit, reached }
    }
}

/// The rounds at one distance.
pub struct View<'a> {
    report: &'a Report,
    pub distance: Distance,
    pub rounds: usize,
}

impl View<'_> {
    pub fn samples(&self, name: &str) -> Option<&Samples> {
        let row = self.report.rows.iter().find(|row| row.name == name)?;
        row.samples.get(&self.distance)
    }

    pub fn mean(&self, name: &str) -> Option<f64> {
        self.samples(name).map(Samples::mean)
    }

    pub fn quantile(&self, name: &str, quantile: f64) -> Option<f64> {
        self.samples(name).map(|samples| samples.quantile(quantile, self.report.step))
    }

    /// The ratio of two means.
    pub fn ratio(&self, name: &str, floor: &str) -> Option<f64> {
        Some(self.mean(name)? / self.mean(floor)?)
    }
}

impl Display for View<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let width = self.report.rows.iter().map(|row| row.name.len()).max().unwrap_or(0);
        let dashes = |count: usize| "-".repeat(count);
        writeln!(
            f,
            "| {:width$} |    mean |     p50 |     p99 |   p99.9 |     max | mean, p50, p99.9 to its floor |",
            "row"
        )?;
        writeln!(
            f,
            "|:{}-|--------:|--------:|--------:|--------:|--------:|:------------------------------|",
            dashes(width)
        )?;
        for row in &self.report.rows {
            write!(f, "| {:width$} |", row.name)?;
            let Some(samples) = row.samples.get(&self.distance) else {
                let reason = row.failure.as_deref().unwrap_or("no rounds");
                writeln!(f, " cannot run here: {reason} | | | | | |")?;
                continue;
            };
            let step = self.report.step;
            let quantiles = [0.5, 0.99, 0.999].map(|quantile| samples.quantile(quantile, step));
            for time in std::iter::once(samples.mean()).chain(quantiles).chain([samples.max()]) {
                write!(f, " {:>7} |", Time(time).to_string())?;
            }
            match row.floor.as_deref().and_then(|floor| Some((floor, self.samples(floor)?))) {
                Some((name, floor)) => writeln!(
                    f,
                    " {:.2} {:.2} {:.2} of {name} |",
                    samples.mean() / floor.mean(),
                    samples.quantile(0.5, step) / floor.quantile(0.5, step),
                    samples.quantile(0.999, step) / floor.quantile(0.999, step)
                )?,
                None => writeln!(f, " |")?,
            }
        }
        Ok(())
    }
}

/// Nanoseconds, in the unit that reads best.
pub struct Time(pub f64);

impl Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.0 {
            time if time < 99.95 => write!(f, "{time:.1} ns"),
            time if time < 999.5 => write!(f, "{time:.0} ns"),
            time if time < 99_950.0 => write!(f, "{:.1} µs", time / 1e3),
            time if time < 999_500.0 => write!(f, "{:.0} µs", time / 1e3),
            time if time < 999_500_000.0 => write!(f, "{:.1} ms", time / 1e6),
            time => write!(f, "{:.1} s", time / 1e9),
        }
    }
}

//! Calls that are due at a fixed rate, and what became of them.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::hint::spin_loop;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use hotcell_compare::measure::Row;
use hotcell_compare::report::{Distance, NEAR_NANOSECONDS, Time};
use hotcell_compare::watchdog::Watchdog;

/// `rate` calls a second, `burst` of them due at a time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Schedule {
    pub rate: u64,
    pub burst: u64,
}

/// A line of a picture.
pub struct Line {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

struct Outcome {
    /// In nanoseconds, from when a call was due until its result was there.
    latencies: Histogram<u64>,
    due: u64,
}

/// A row under load, as the main loop sees it. The loops around `step` are compiled for each row by itself.
pub trait Loaded {
    fn name(&self) -> &str;
    fn turn(&mut self, schedule: Schedule, slice: Duration);
    /// What the row's quickest calls tell, if it is the bare record.
    fn distance(&self) -> Distance;
    /// Latencies by percentile, if the row had this schedule: the percentile as `1 / (1 - quantile)`.
    fn percentiles(&self, schedule: Schedule) -> Option<Line>;
    #[doc(hidden)]
    fn lines(&self) -> Vec<(Schedule, String)>;
}

pub struct Measured<R> {
    name: &'static str,
    row: R,
    outcomes: BTreeMap<Schedule, Outcome>,
    /// How long a call took in itself, in each turn.
    service: Vec<f64>,
}

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("the bounds are in order")
}

impl<R: Row> Measured<R> {
    pub fn new(name: &'static str, row: R) -> Self {
        Self { name, row, outcomes: BTreeMap::new(), service: Vec::new() }
    }
}

/// Calls before the first is due, so that the other side is awake and known.
const WARM_UP: u64 = 64;

impl<R: Row> Loaded for Measured<R> {
    fn name(&self) -> &str {
        self.name
    }

    fn turn(&mut self, Schedule { rate, burst }: Schedule, slice: Duration) {
        self.row.wake();
        let begin = Instant::now();
        (0..WARM_UP).for_each(|number| self.row.step(number));
        self.service.push(begin.elapsed().as_nanos() as f64 / WARM_UP as f64);

        let outcome = self
            .outcomes
            .entry(Schedule { rate, burst })
            .or_insert_with(|| Outcome { latencies: histogram(), due: 0 });
        let interval = Duration::from_secs(1).as_nanos() as f64 * burst as f64 / rate as f64;
        let bursts = ((slice.as_nanos() as f64 / interval) as u64).max(1);
        outcome.due += bursts * burst;
        let start = Instant::now();
        'slice: for number in 0..bursts {
            let due = Duration::from_nanos((number as f64 * interval) as u64);
            while start.elapsed() < due {
                spin_loop();
            }
            for _ in 0..burst {
                self.row.step(number);
                let now = start.elapsed();
                outcome.latencies.saturating_record((now - due).as_nanos() as u64);
                if now > slice {
                    break 'slice;
                }
            }
        }
        self.row.rest();
    }

    fn distance(&self) -> Distance {
        let near = self.service.iter().filter(|&&service| service < NEAR_NANOSECONDS).count();
        match near {
            0 => Distance::Far,
            _ if near == self.service.len() => Distance::Near,
            _ => Distance::Changing,
        }
    }

    fn percentiles(&self, schedule: Schedule) -> Option<Line> {
        let latencies = &self.outcomes.get(&schedule)?.latencies;
        let last = latencies.len() as f64;
        let points = std::iter::successors(Some(1.25_f64), |x| Some(x * 1.25))
            .take_while(|&x| x <= last)
            .map(|x| (x, latencies.value_at_quantile(1.0 - 1.0 / x) as f64))
            .collect();
        Some(Line { name: self.name.into(), points })
    }

    fn lines(&self) -> Vec<(Schedule, String)> {
        let line = |(schedule, outcome): (&Schedule, &Outcome)| {
            let quantiles = [0.5, 0.99, 0.999, 1.0]
                .map(|at| Time(outcome.latencies.value_at_quantile(at) as f64).to_string());
            let kept = outcome.latencies.len() as f64 / outcome.due as f64 * 100.0;
            let [p50, p99, p999, max] = quantiles;
            let text = format!(
                "| {:>9} | {:>5} | {:20} | {p50:>7} | {p99:>7} | {p999:>7} | {max:>7} | {kept:>4.0} % |",
                schedule.rate, schedule.burst, self.name
            );
            (*schedule, text)
        };
        self.outcomes.iter().map(line).collect()
    }
}

/// One turn of each row, each round beginning with another.
pub fn round(
    rows: &mut [Box<dyn Loaded>],
    round: usize,
    schedule: Schedule,
    slice: Duration,
    watchdog: &Watchdog,
) {
    for at in 0..rows.len() {
        let at = (at + round) % rows.len();
        watchdog.turn(rows[at].name());
        rows[at].turn(schedule, slice);
    }
}

/// What became of every schedule, with the rows beside each other.
pub struct Table<'a>(pub &'a [Box<dyn Loaded>]);

impl Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(
            f,
            "|    a second | burst | row                  |     p50 |     p99 |   p99.9 |     max |   kept |"
        )?;
        writeln!(
            f,
            "|----------:|------:|:---------------------|--------:|--------:|--------:|--------:|-------:|"
        )?;
        let mut lines: Vec<_> = self.0.iter().flat_map(|row| row.lines()).collect();
        lines.sort_by_key(|(schedule, _)| *schedule); // stable: rows keep their order
        lines.into_iter().try_for_each(|(_, line)| writeln!(f, "{line}"))
    }
}

/// A row that is called after pauses of several lengths.
pub struct AfterPauses {
    name: &'static str,
    row: Box<dyn FnMut(u64)>,
    pauses: BTreeMap<Duration, Histogram<u64>>,
}

const PAUSES_MICROSECONDS: [u64; 8] = [10, 30, 100, 300, 1_000, 3_000, 10_000, 100_000];
/// What all calls after one pause may take in a turn.
const PAUSED_IN_A_TURN: Duration = Duration::from_millis(200);

impl AfterPauses {
    pub fn new(name: &'static str, mut row: impl Row + 'static) -> Self {
        Self { name, row: Box::new(move |number| row.step(number)), pauses: BTreeMap::new() }
    }

    pub fn name(&self) -> &'static str {
        self.name
    }

    pub fn turn(&mut self, test: bool) {
        for pause in PAUSES_MICROSECONDS.map(Duration::from_micros) {
            let most = (PAUSED_IN_A_TURN.as_nanos() / pause.as_nanos()).clamp(2, 400) as u64;
            let latencies = self.pauses.entry(pause).or_insert_with(histogram);
            for number in 0..if test { 1 } else { most } {
                std::thread::sleep(pause);
                let start = Instant::now();
                (self.row)(number);
                latencies.saturating_record(start.elapsed().as_nanos() as u64);
            }
        }
    }

    /// Medians by the pause, both in nanoseconds.
    pub fn line(&self) -> Line {
        let point = |(pause, latencies): (&Duration, &Histogram<u64>)| {
            (pause.as_nanos() as f64, latencies.value_at_quantile(0.5) as f64)
        };
        Line { name: self.name.into(), points: self.pauses.iter().map(point).collect() }
    }
}

pub fn print_pauses(rows: &[AfterPauses]) {
    print!("| pause    |");
    rows.iter().for_each(|row| print!(" {:>19} |", row.name));
    print!("\n|---------:|");
    rows.iter().for_each(|_| print!("--------------------:|"));
    println!();
    for pause in PAUSES_MICROSECONDS.map(Duration::from_micros) {
        print!("| {:>8} |", Time(pause.as_nanos() as f64).to_string());
        for row in rows {
            let [p50, p99] = [0.5, 0.99].map(|at| {
                Time(row.pauses.get(&pause).map_or(0.0, |latencies| latencies.value_at_quantile(at) as f64))
                    .to_string()
            });
            print!(" {:>19} |", format!("{p50}, {p99}"));
        }
        println!();
    }
    println!();
}

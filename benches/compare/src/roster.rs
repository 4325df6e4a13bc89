//! The rows of a section, and their order.

use std::time::Duration;

use crate::clock::Clock;
use crate::cpus::Cpus;
use crate::measure::{Row, Timed};
use crate::{Result, floor, with_causes};

pub struct Roster {
    only: Vec<String>,
    /// Whether the first row is the bare record.
    tells_distance: bool,
    entries: Vec<Entry>,
}

/// How often a row is opened whose result depends on where its cache line lies.
pub const PLACES: usize = 6;

/// The same row in several places, which take turns.
struct Places<R> {
    rows: Vec<R>,
    at: usize,
}

impl<R: Row> Timed for Places<R> {
    fn idles(&self) -> bool {
        R::IDLES
    }

    fn turn(&mut self, clock: &Clock, span: Duration, singles: &mut Vec<f64>) -> f64 {
        self.at = (self.at + 1) % self.rows.len();
        self.rows[self.at].turn(clock, span, singles)
    }
}

/// A row that works, or the reason why it cannot on this machine.
struct Entry {
    name: String,
    floor: Option<String>,
    body: std::result::Result<Box<dyn Timed>, String>,
}

/// What a report needs to know of a row before the first round.
pub struct Named<'a> {
    pub name: &'a str,
    pub floor: Option<&'a str>,
    pub failure: Option<&'a str>,
}

impl Roster {
    /// Rows whose name contains one of these texts; none means all. The bare record is always there: it tells near from far.
    pub fn new(only: impl Iterator<Item = impl Into<String>>, cpus: &Cpus) -> Self {
        let only = only.map(Into::into).collect();
        let mut roster = Self { only, tells_distance: true, entries: Vec::new() };
        roster.add_in_places(floor::RECORD, None, || floor::RecordRow::open(cpus));
        roster
    }

    /// For rows to which the distance of the CPUs does not matter.
    pub fn without_record() -> Self {
        Self { only: Vec::new(), tells_distance: false, entries: Vec::new() }
    }

    /// Adds a row, unless `--only` leaves it out. Its times are given as multiples of the row `floor`'s. A row that cannot be opened stays in the
    /// report with the reason.
    pub fn add<R: Timed + 'static>(
        &mut self,
        name: impl Into<String>,
        floor: Option<&str>,
        open: impl FnOnce() -> Result<R>,
    ) {
        let name = name.into();
        let wanted = self.only.is_empty() || name == floor::RECORD;
        if !wanted && !self.only.iter().any(|text| name.contains(text.as_str())) {
            return;
        }
        let body = match open() {
            Ok(row) => Ok(Box::new(row) as Box<dyn Timed>),
            Err(error) => Err(with_causes(&*error)),
        };
        if let Err(reason) = &body {
            eprintln!("{name} cannot run here: {reason}");
        }
        self.entries.push(Entry { name, floor: floor.map(str::to_owned), body });
    }

    /// Adds a row that is opened in several places, one of which each turn uses. Where a cache line lies decides over a third of what it costs to pass it
    /// between near cores, and a row opened once would keep its luck for the whole run.
    pub fn add_in_places<R: Row + 'static>(
        &mut self,
        name: impl Into<String>,
        floor: Option<&str>,
        open: impl FnMut() -> Result<R>,
    ) {
        self.add(name, floor, || {
            let rows: Result<Vec<R>> = std::iter::repeat_with(open).take(PLACES).collect();
            Ok(Places { rows: rows?, at: 0 })
        });
    }

    pub fn rows(&self) -> impl Iterator<Item = Named<'_>> {
        self.entries.iter().map(|entry| Named {
            name: &entry.name,
            floor: entry.floor.as_deref(),
            failure: entry.body.as_ref().err().map(String::as_str),
        })
    }

    /// The rows that work, by number, in the order of this round. The bare record opens and closes the rows that keep both
    /// CPUs awake, so that a change of distance between them does not go unseen; the others follow. Each round starts
    /// both groups with another row.
    pub fn turns(&self, round: usize) -> Vec<usize> {
        let works =
            |at: &usize, idles| self.entries[*at].body.as_ref().is_ok_and(|body| body.idles() == idles);
        let group = |idles| {
            let first = usize::from(self.tells_distance);
            let mut numbers: Vec<_> = (first..self.entries.len()).filter(|at| works(at, idles)).collect();
            let turned = round % numbers.len().max(1);
            numbers.rotate_left(turned);
            numbers
        };
        let floor = self.tells_distance.then_some(0).filter(|at| works(at, false));
        floor.into_iter().chain(group(false)).chain(floor).chain(group(true)).collect()
    }

    /// A row that works.
    pub fn row(&mut self, number: usize) -> &mut dyn Timed {
        &mut **self.entries[number].body.as_mut().expect("only rows that work have turns")
    }
}

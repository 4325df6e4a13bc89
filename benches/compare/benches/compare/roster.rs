//! The rows of this run.

use std::error::Error;

use std::time::Duration;

use crate::clock::Clock;
use crate::cpus::Cpus;
use crate::measure::{Row, Timed};
use crate::{Result, floor};

pub struct Roster {
    cpus: Cpus,
    only: Vec<String>,
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

    fn turn(&mut self, clock: &Clock, span: Duration, ticks: &mut Vec<u64>) -> f64 {
        self.at = (self.at + 1) % self.rows.len();
        self.rows[self.at].turn(clock, span, ticks)
    }
}

/// A row that works, or the reason why it cannot on this machine.
struct Entry {
    name: &'static str,
    body: std::result::Result<Box<dyn Timed>, String>,
}

impl Roster {
    pub fn new(cpus: Cpus, only: Vec<String>) -> Self {
        Self { cpus, only, entries: Vec::new() }
    }

    /// Adds a row, unless `--only` leaves it out. A row that cannot be opened stays in the report with the reason.
    pub fn add<R: Timed + 'static>(&mut self, name: &'static str, open: impl FnOnce(&Cpus) -> Result<R>) {
        if !self.only.is_empty() && !self.only.iter().any(|text| name.contains(text.as_str())) {
            return;
        }
        let body = match open(&self.cpus) {
            Ok(row) => Ok(Box::new(row) as Box<dyn Timed>),
            Err(error) => Err(with_causes(&*error)),
        };
        if let Err(reason) = &body {
            eprintln!("compare: {name} cannot run here: {reason}");
        }
        self.entries.push(Entry { name, body });
    }

    /// Adds a row that is opened in several places, one of which each turn uses. Where a cache line lies decides over a third of what it costs to pass it
    /// between near cores, and a row opened once would keep its luck for the whole run.
    pub fn add_in_places<R: Row + 'static>(&mut self, name: &'static str, open: impl Fn(&Cpus) -> Result<R>) {
        self.add(name, |cpus| {
            let rows: Result<Vec<R>> = (0..PLACES).map(|_| open(cpus)).collect();
            Ok(Places { rows: rows?, at: 0 })
        });
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Every row's name, and the reason if it cannot run.
    pub fn names(&self) -> impl Iterator<Item = (&'static str, Option<&str>)> {
        self.entries.iter().map(|entry| (entry.name, entry.body.as_ref().err().map(String::as_str)))
    }

    /// The names of the rows that work, in the order of this round. The floor opens and closes the rows that keep both
    /// CPUs awake, so that a change of distance between them does not go unseen; the others follow. Each round starts
    /// both groups with another row.
    pub fn turns(&self, round: usize) -> Vec<&'static str> {
        let group = |idles| {
            let of_group = |entry: &&Entry| entry.body.as_ref().is_ok_and(|body| body.idles() == idles);
            let names = self.entries.iter().filter(of_group).map(|entry| entry.name);
            let mut names: Vec<_> = names.filter(|&name| name != floor::RECORD).collect();
            let turned = round % names.len().max(1);
            names.rotate_left(turned);
            names
        };
        let floor = self.entries.iter().find(|entry| entry.name == floor::RECORD && entry.body.is_ok());
        let floor = floor.map(|entry| entry.name);
        floor.into_iter().chain(group(false)).chain(floor).chain(group(true)).collect()
    }

    /// A row that works.
    pub fn row(&mut self, name: &str) -> &mut dyn Timed {
        let entry = self.entries.iter_mut().find(|entry| entry.name == name).expect("the row was added");
        &mut **entry.body.as_mut().expect("the row works")
    }
}

fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

//! The rows of this run.

use std::error::Error;

use crate::Result;
use crate::cpus::Cpus;
use crate::measure::{Row, Timed};

pub struct Roster {
    cpus: Cpus,
    only: Vec<String>,
    entries: Vec<Entry>,
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
    pub fn add<R: Row + 'static>(&mut self, name: &'static str, open: impl FnOnce(&Cpus) -> Result<R>) {
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

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Every row's name, and the reason if it cannot run.
    pub fn names(&self) -> impl Iterator<Item = (&'static str, Option<&str>)> {
        self.entries.iter().map(|entry| (entry.name, entry.body.as_ref().err().map(String::as_str)))
    }

    /// The rows that work, in the order of this round: the first stays first, the others rotate.
    pub fn turns(&mut self, round: usize) -> Vec<(&'static str, &mut Box<dyn Timed>)> {
        let mut turns: Vec<_> = self
            .entries
            .iter_mut()
            .filter_map(|entry| Some((entry.name, entry.body.as_mut().ok()?)))
            .collect();
        if let Some((_, others)) = turns.split_first_mut().filter(|(_, others)| !others.is_empty()) {
            others.rotate_left(round % others.len());
        }
        turns
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

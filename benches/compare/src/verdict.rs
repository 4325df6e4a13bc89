//! The bars that hotcell is held to, and what was reached.

use crate::report::Distance;

/// What a figure has to keep to.
#[derive(Clone, Copy, Debug)]
pub enum Limit {
    AtMost(f64),
    AtLeast(f64),
    /// Like `AtLeast`, promised where cores are near only.
    AtLeastNear(f64),
}

impl Limit {
    fn is_met(self, reached: f64) -> bool {
        match self {
            Self::AtMost(limit) => reached <= limit,
            Self::AtLeast(limit) | Self::AtLeastNear(limit) => reached >= limit,
        }
    }

    fn text(self) -> String {
        match self {
            Self::AtMost(limit) => format!("at most {limit}"),
            Self::AtLeast(limit) => format!("at least {limit}"),
            Self::AtLeastNear(limit) => format!("near at least {limit}"),
        }
    }
}

#[derive(Debug)]
pub struct Verdict {
    pub what: String,
    pub limit: Limit,
    /// Where, and how much; empty if it was not measured.
    pub reached: Vec<(Distance, f64)>,
}

impl Verdict {
    /// Of a figure to which the distance of the cores does not matter, or which was taken over all.
    pub fn anywhere(what: impl Into<String>, limit: Limit, reached: f64) -> Self {
        Self { what: what.into(), limit, reached: vec![(Distance::Unknown, reached)] }
    }

    fn at(&self, distance: Distance) -> Option<String> {
        let (_, reached) = self.reached.iter().find(|(at, _)| *at == distance)?;
        let verdict = match self.limit {
            Limit::AtLeastNear(_) if distance == Distance::Far => "no bar",
            limit if limit.is_met(*reached) => "met",
            _ => "MISSED",
        };
        Some(format!("{reached:.2} {verdict}"))
    }
}

/// The table of bars: reached, met or missed, wherever it was measured.
pub fn print(verdicts: &[Verdict]) {
    let places = [Distance::Near, Distance::Far, Distance::Changing, Distance::Unknown];
    let columns: Vec<_> =
        places.into_iter().filter(|&place| verdicts.iter().any(|v| v.at(place).is_some())).collect();
    if columns.is_empty() {
        return;
    }
    let width = verdicts.iter().map(|verdict| verdict.what.chars().count()).max().unwrap_or(0);
    println!("## Bars\n");
    print!("| {:width$} | bar              |", "ratio");
    columns.iter().for_each(|place| print!(" {:12} |", place.name()));
    print!("\n|:{}-|:-----------------|", "-".repeat(width));
    columns.iter().for_each(|_| print!(":-------------|"));
    println!();
    for verdict in verdicts.iter().filter(|verdict| !verdict.reached.is_empty()) {
        print!("| {:width$} | {:16} |", verdict.what, verdict.limit.text());
        columns.iter().for_each(|&place| print!(" {:12} |", verdict.at(place).unwrap_or_default()));
        println!();
    }
}

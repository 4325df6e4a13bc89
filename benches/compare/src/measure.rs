//! How a row is timed.
//!
//! A turn warms the row up and then times two spans of equal length: one block of calls with a single pair of clock
//! readings, which gives its mean, and one with a pair of readings around each call, which gives the percentiles. Timing
//! a call of 100 ns by itself costs a fifth of it; a block's mean is free of that, and the percentiles have the clock's
//! own cost subtracted. All rows are timed the same way.

use std::time::{Duration, Instant};

use crate::clock::Clock;

/// Most steps in a span: what the buffer for single timings holds.
pub const MOST_STEPS: usize = 200_000;
const FEWEST_STEPS: usize = 8;

/// A turn is two spans: short, so that a round is over before the machine changes.
pub const SPAN: Duration = Duration::from_millis(2);
pub const TEST_SPAN: Duration = Duration::from_micros(100);

/// One way to make calls.
pub trait Row {
    /// Whether a CPU goes idle during this row's turn. A hypervisor may then move it closer or farther, so these rows
    /// come after those that keep both CPUs awake, which would otherwise not meet the distance the floor met.
    const IDLES: bool = false;

    /// Calls made by one [`step`](Row::step): figures are per call.
    const CALLS: usize = 1;

    /// Makes a call, or a burst of them, and checks what comes back. Steps are numbered.
    fn step(&mut self, number: u64);

    /// Before this row's turn: a peer that spins is let out of its gate.
    fn wake(&mut self) {}

    /// After this row's turn: from here to the next [`wake`](Row::wake) the peer uses no CPU.
    fn rest(&mut self) {}
}

/// A [`Row`] as the main loop sees it. The loops around `step` are compiled for each row by itself.
pub trait Timed {
    /// See [`Row::IDLES`].
    fn idles(&self) -> bool;

    /// Runs one turn: returns the mean in nanoseconds a call, and leaves each step's nanoseconds a call in `singles`.
    fn turn(&mut self, clock: &Clock, span: Duration, singles: &mut Vec<f64>) -> f64;
}

impl<R: Row> Timed for R {
    fn idles(&self) -> bool {
        R::IDLES
    }

    fn turn(&mut self, clock: &Clock, span: Duration, singles: &mut Vec<f64>) -> f64 {
        self.wake();
        let steps = warm_up(self, span);
        let mean = block(self, steps);
        one_by_one(self, clock, steps, singles);
        self.rest();
        mean
    }
}

/// Calls for an eighth of a span, and tells how many steps fill one, by its quickest part: the first calls wake somebody up.
fn warm_up<R: Row>(row: &mut R, span: Duration) -> usize {
    let (mut chunk, mut quickest, start) = (1, f64::MAX, Instant::now());
    while start.elapsed() < span / 8 {
        quickest = quickest.min(block(row, chunk) * R::CALLS as f64);
        chunk = (chunk * 2).min(64);
    }
    ((span.as_nanos() as f64 / quickest) as usize).clamp(FEWEST_STEPS, MOST_STEPS)
}

fn block<R: Row>(row: &mut R, steps: usize) -> f64 {
    let start = Instant::now();
    for number in 0..steps {
        row.step(number as u64);
    }
    start.elapsed().as_nanos() as f64 / (steps * R::CALLS) as f64
}

fn one_by_one<R: Row>(row: &mut R, clock: &Clock, steps: usize, singles: &mut Vec<f64>) {
    singles.clear();
    for number in 0..steps {
        let start = clock.now();
        row.step(number as u64);
        // The ticks for now: turning them into time is not part of a step.
        singles.push((clock.now() - start) as f64);
    }
    for single in singles {
        *single = clock.nanoseconds(*single as u64) / R::CALLS as f64;
    }
}

/// A row whose every call comes after a pause, in which this thread sleeps and the other side has nothing to do.
pub struct AfterPause<R> {
    pub row: R,
    pub pause: Duration,
    pub calls: usize,
}

impl<R: Row> Timed for AfterPause<R> {
    fn idles(&self) -> bool {
        true
    }

    fn turn(&mut self, clock: &Clock, _span: Duration, singles: &mut Vec<f64>) -> f64 {
        singles.clear();
        for number in 0..self.calls {
            std::thread::sleep(self.pause);
            let start = clock.now();
            self.row.step(number as u64);
            singles.push(clock.nanoseconds(clock.now() - start));
        }
        singles.iter().sum::<f64>() / singles.len() as f64
    }
}

//! How a row is timed.
//!
//! A turn warms the row up and then times two spans of equal length: one block of calls with a single pair of clock
//! readings, which gives the mean, and one with a pair of readings around each call, which gives the percentiles. Timing
//! a call of 100 ns by itself costs a fifth of it; a block's mean is free of that, and the percentiles have the clock's
//! own cost subtracted. All rows are timed the same way.

use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::clock::Clock;

/// Most calls in a span: what the buffer for single timings holds.
pub const MOST_CALLS: usize = 200_000;
const FEWEST_CALLS: usize = 16;
const WARM_UP_CHUNK: usize = 32;

/// One way to call `add`.
pub trait Row {
    /// Whether a CPU goes idle during this row's turn. A hypervisor may then move it closer or farther, so these rows
    /// come after those that keep both CPUs awake, which would otherwise not meet the distance the floor met.
    const IDLES: bool = false;

    /// `a + b`, wrapping, computed on the other side.
    fn call(&mut self, a: i32, b: i32) -> i32;

    /// Before this row's turn: a peer that spins is let out of its gate.
    fn wake(&mut self) {}

    /// After this row's turn: from here to the next [`wake`](Row::wake) the peer uses no CPU.
    fn rest(&mut self) {}
}

/// A [`Row`] as the main loop sees it. The loops around `call` are compiled for each row by itself.
pub trait Timed {
    /// See [`Row::IDLES`].
    fn idles(&self) -> bool;

    /// Runs one turn: returns the mean in nanoseconds and leaves each single call's ticks in `ticks`.
    fn turn(&mut self, clock: &Clock, span: Duration, ticks: &mut Vec<u64>) -> f64;
}

impl<R: Row> Timed for R {
    fn idles(&self) -> bool {
        R::IDLES
    }

    fn turn(&mut self, clock: &Clock, span: Duration, ticks: &mut Vec<u64>) -> f64 {
        self.wake();
        let calls = warm_up(self, span);
        let mean = block(self, calls);
        one_by_one(self, clock, calls, ticks);
        self.rest();
        mean
    }
}

/// Calls for an eighth of a span, and tells how many calls fill one.
fn warm_up(row: &mut impl Row, span: Duration) -> usize {
    let (mut calls, start) = (0, Instant::now());
    while start.elapsed() < span / 8 {
        block(row, WARM_UP_CHUNK);
        calls += WARM_UP_CHUNK;
    }
    let per_call = start.elapsed().as_secs_f64() / calls as f64;
    ((span.as_secs_f64() / per_call) as usize).clamp(FEWEST_CALLS, MOST_CALLS)
}

fn block(row: &mut impl Row, calls: usize) -> f64 {
    let start = Instant::now();
    for number in 0..calls {
        checked_call(row, number);
    }
    start.elapsed().as_nanos() as f64 / calls as f64
}

fn one_by_one(row: &mut impl Row, clock: &Clock, calls: usize, ticks: &mut Vec<u64>) {
    ticks.clear();
    for number in 0..calls {
        let start = clock.now();
        checked_call(row, number);
        ticks.push(clock.now() - start);
    }
}

#[inline(always)]
fn checked_call(row: &mut impl Row, number: usize) {
    let (a, b) = black_box((number as i32, 0x5eed_i32));
    let sum = row.call(a, b);
    assert_eq!(sum, crate::add(a, b), "the row's answer to add({a}, {b})");
}

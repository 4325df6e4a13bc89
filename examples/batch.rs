//! Many calls in flight: a pipeline sends calls in a row and gives the results in order; `submit` hands one call over and returns a ticket for its result.
//!
//! The worker serves a session's calls one after another, so a burst does not run in parallel. What it saves is waiting: one
//! cache line a call instead of a round trip a call, and the host is free meanwhile.
//!
//! ```text
//! cargo run --release --example batch
//! ```

use hotcell::{Function, Ticket, Worker};
use std::collections::VecDeque;
use std::error::Error;
use std::time::Instant;

type Labs = fn(i64) -> i64;

const CALLS: i64 = 200_000;
/// Below the session's slots (256 by default), so that a submit never waits for a free one.
const IN_FLIGHT: usize = 128;

fn main() -> Result<(), Box<dyn Error>> {
    let session = Worker::spawn()?.session()?;
    let labs = session.load("libc.so.6")?.function::<Labs>("labs")?;

    let started = Instant::now();
    let one_by_one = call_each(&labs)?;
    println!("one by one:         {} ns a call", started.elapsed().as_nanos() / CALLS as u128);

    let started = Instant::now();
    let pipelined = call_pipelined(&labs)?;
    println!("{IN_FLIGHT} in flight:      {} ns a call", started.elapsed().as_nanos() / CALLS as u128);

    let started = Instant::now();
    let in_a_row = labs.pipeline()?.calls((0..CALLS).map(|i| (-i,))).sum::<Result<i64, _>>()?;
    println!("in a pipeline:      {} ns a call", started.elapsed().as_nanos() / CALLS as u128);

    if one_by_one != pipelined || one_by_one != in_a_row || one_by_one != CALLS * (CALLS - 1) / 2 {
        return Err(format!("sums differ: {one_by_one}, {pipelined} and {in_a_row}").into());
    }
    Ok(())
}

fn call_each(labs: &Function<Labs>) -> Result<i64, hotcell::CallError> {
    let mut sum = 0;
    for i in 0..CALLS {
        sum += labs.call(-i)?;
    }
    Ok(sum)
}

fn call_pipelined(labs: &Function<Labs>) -> Result<i64, hotcell::CallError> {
    let mut sum = 0;
    let mut in_flight: VecDeque<Ticket<'_, Labs>> = VecDeque::with_capacity(IN_FLIGHT);
    for i in 0..CALLS {
        if in_flight.len() == IN_FLIGHT
            && let Some(oldest) = in_flight.pop_front()
        {
            sum += oldest.wait()?;
        }
        in_flight.push_back(labs.submit(-i)?);
    }
    for ticket in in_flight {
        sum += ticket.wait()?;
    }
    Ok(sum)
}

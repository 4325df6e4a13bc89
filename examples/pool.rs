//! A pool with a standby: one crash takes a fraction of the capacity, never the service.
//!
//! ```text
//! cargo run --release --example pool
//! ```

use hotcell::{BoxError, CallError, Module, Pool, Session};
use std::time::{Duration, Instant};

/// Prepares each worker: loads the module, and does whatever it needs before it can serve.
fn setup(session: &Session) -> Result<Module, BoxError> {
    Ok(session.load("libc.so.6")?)
}

fn main() -> Result<(), hotcell::Error> {
    let pool = Pool::builder(setup).workers(3).standby(1).recycle_after_calls(100_000).build()?;
    let events = pool.events();
    println!("{:?}", pool.capacity());

    let labs = pool.function::<fn(i64) -> i64>("labs")?;
    let abort = pool.function::<fn()>("abort")?;

    // Four threads call, each with a handle of its own, and meanwhile workers die.
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let mut labs = labs.caller();
            scope.spawn(move || {
                let (mut right, mut failed) = (0, 0);
                for n in 0..50_000 {
                    match labs.call(-n) {
                        Ok(result) if result == n => right += 1,
                        // The worker died with this call in it. Whether it is worth repeating only its caller can know.
                        Err(CallError::Crashed(_)) => failed += 1,
                        other => panic!("{other:?}"),
                    }
                }
                println!("thread {thread}: {right} calls, and {failed} that a crash took with it");
            });
        }
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(5));
            let error = abort.call().expect_err("abort does not return");
            let started = Instant::now();
            let next = labs.call(-1);
            println!(
                "{:?} after \"{}\" a call gives {next:?}",
                started.elapsed(),
                error.to_string().lines().next().unwrap_or("")
            );
        }
    });

    pool.wait_ready(Duration::from_secs(30))?;
    println!("{:?}", pool.capacity());
    for event in events.try_iter() {
        println!("  {event}");
    }
    let seen = pool.snapshot();
    println!(
        "{} calls, {} lost, {} promoted, {} recycled, {} made again",
        seen.calls, seen.lost, seen.promoted, seen.recycled, seen.retried
    );
    pool.dispose();
    Ok(())
}

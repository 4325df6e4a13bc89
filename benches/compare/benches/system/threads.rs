//! Many threads that call as fast as they can: what they get done together, beside one thread on one session, and whether each gets its share.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hotcell::{Function, Module, Worker};
use hotcell_compare::Result;
use hotcell_compare::cell::Library;
use hotcell_compare::command_line::Options;
use hotcell_compare::floor::{check, operands};
use hotcell_compare::verdict::{Limit, Verdict};

type Add = Function<fn(i32, i32) -> i32>;

/// Threads, each calling for so long.
const SLICE: Duration = Duration::from_millis(300);
const TEST_SLICE: Duration = Duration::from_millis(20);

struct Crowd {
    name: String,
    /// Each thread's: one, or one on each of several sessions, which it calls in turn.
    functions: Vec<Vec<Add>>,
    /// Calls a second in each round, and the slowest thread's share of the fastest's.
    rates: Vec<f64>,
    shares: Vec<f64>,
    _modules: Vec<Module>,
}

impl Crowd {
    fn new(worker: &Worker, library: &Library, threads: usize, sessions: usize) -> Result<Self> {
        let modules: Vec<Module> = (0..sessions)
            .map(|_| Ok(worker.session()?.load(library.path.as_path())?))
            .collect::<Result<_>>()?;
        let functions = (0..threads)
            .map(|thread| {
                let own = (thread % sessions..sessions).step_by(threads);
                own.map(|session| Ok(modules[session].function("add")?)).collect()
            })
            .collect::<Result<_>>()?;
        let on = if sessions == 1 { "on one session".into() } else { format!("on {sessions} sessions") };
        let name = format!("{threads} {} {on}", if threads == 1 { "thread" } else { "threads" });
        Ok(Self { name, functions, rates: Vec::new(), shares: Vec::new(), _modules: modules })
    }

    fn run(&mut self, slice: Duration) {
        let (start, stop) = (Barrier::new(self.functions.len() + 1), AtomicBool::new(false));
        let calls = |functions: &[Add]| {
            start.wait();
            let mut done = 0;
            for add in functions.iter().cycle() {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let (a, b) = operands(done);
                check(add.call(a, b).expect("the worker lives"), (a, b));
                done += 1;
            }
            done
        };
        let (done, elapsed) = std::thread::scope(|scope| {
            let threads: Vec<_> =
                self.functions.iter().map(|functions| scope.spawn(|| calls(functions))).collect();
            start.wait();
            let begin = Instant::now();
            std::thread::sleep(slice);
            stop.store(true, Ordering::Relaxed);
            let elapsed = begin.elapsed();
            let done: Vec<u64> =
                threads.into_iter().map(|thread| thread.join().expect("every call works")).collect();
            (done, elapsed)
        });
        let (slowest, fastest) = (done.iter().min().copied(), done.iter().max().copied());
        self.rates.push(done.iter().sum::<u64>() as f64 / elapsed.as_secs_f64());
        self.shares.push(slowest.unwrap_or(0) as f64 / fastest.unwrap_or(0).max(1) as f64);
    }
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

pub fn run(options: &Options) -> Result<Vec<Verdict>> {
    let library = Library::compile()?;
    let worker = Worker::spawn()?;
    let mut crowds = vec![Crowd::new(&worker, &library, 1, 1)?];
    for threads in [2, 4, 16] {
        crowds.push(Crowd::new(&worker, &library, threads, 1)?);
        crowds.push(Crowd::new(&worker, &library, threads, threads)?);
    }
    // Four sessions a thread, called in turn.
    crowds.push(Crowd::new(&worker, &library, 4, 16)?);

    let slice = if options.test { TEST_SLICE } else { SLICE };
    let rounds = options.rounds(12);
    for round in 0..rounds {
        let count = crowds.len();
        (0..count).for_each(|at| crowds[(at + round) % count].run(slice));
    }

    println!("{rounds} rounds of {slice:?} each; nothing is pinned; one worker. Medians over rounds.\n");
    println!("| {:26} | calls a second | to one thread | slowest thread to fastest | worst round |", "");
    println!(
        "|:{}-|---------------:|--------------:|--------------------------:|------------:|",
        "-".repeat(26)
    );
    let mut verdicts = Vec::new();
    let one = crowds[0].rates.clone();
    for crowd in &crowds {
        let ratios: Vec<f64> = crowd.rates.iter().zip(&one).map(|(rate, one)| rate / one).collect();
        let (ratio, share) = (median(&ratios), median(&crowd.shares));
        println!(
            "| {:26} | {:>14.0} | {ratio:>13.2} | {share:>25.2} | {:>11.2} |",
            crowd.name,
            median(&crowd.rates),
            crowd.shares.iter().copied().fold(f64::MAX, f64::min)
        );
        if crowd.functions.len() > 1 {
            let name = &crowd.name;
            verdicts.push(Verdict::anywhere(
                format!("{name}: calls together to one thread's on one session"),
                Limit::AtLeast(0.8),
                ratio,
            ));
            verdicts.push(Verdict::anywhere(
                format!("{name}: slowest thread to fastest"),
                Limit::AtLeast(0.25),
                share,
            ));
        }
    }
    Ok(verdicts)
}

//! From nothing to a result, step by step.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hotcell::{CallError, IsolatedProcessConfig, Worker};
use hotcell_compare::Result;
use hotcell_compare::cell::Library;
use hotcell_compare::command_line::Options;
use hotcell_compare::verdict::{Limit, Verdict};

use crate::{Program, Times, print_times_header};

const STEPS: [&str; 6] = [
    "spawn to ready",
    "open a session",
    "load the module",
    "resolve a function",
    "first call",
    "all of it: spawn to first result",
];

/// A program that ends at once, by `posix_spawn` as the standard library has it, until it was waited for.
fn run_program(program: &str) -> Result<Duration> {
    let mut command = Command::new(program);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let start = Instant::now();
    command.spawn()?.wait()?;
    Ok(start.elapsed())
}

fn first_result(program: Program, library: &Library, steps: &mut [Times; 6]) -> Result<()> {
    let begin = Instant::now();
    let mut last = begin;
    let mut step = |number: usize| {
        let now = Instant::now();
        steps[number].add(now - last);
        last = now;
    };
    let worker = program.builder().spawn()?;
    step(0);
    let session = worker.session()?;
    step(1);
    let module = session.load(library.path.as_path())?;
    step(2);
    let add = module.function::<fn(i32, i32) -> i32>("add")?;
    step(3);
    assert_eq!(add.call(2, 3)?, 5);
    step(4);
    steps[5].add(begin.elapsed());
    worker.dispose();
    Ok(())
}

/// What is measured of one program.
#[derive(Default)]
struct Start {
    steps: [Times; 6],
    restart: Times,
    /// In a worker that runs already.
    load: Times,
}

impl Start {
    fn round(&mut self, program: Program, library: &Library, running: &Worker) -> Result<()> {
        first_result(program, library, &mut self.steps)?;

        let session = running.session()?;
        let begin = Instant::now();
        let module = session.load(library.path.as_path())?;
        self.load.add(begin.elapsed());
        drop(module);
        session.close()?;

        let config = IsolatedProcessConfig::new(
            library.path.as_path(),
            r#"{"add":{"args":["i32","i32"],"returns":"i32"},"fault":{}}"#,
        );
        let cell = config.worker(program.builder()).start()?;
        let fault = cell.call("fault", ());
        assert!(matches!(fault, Err(CallError::Crashed(_))), "{fault:?}");
        let begin = Instant::now();
        cell.restart()?;
        let sum: i32 = cell.call("add", (2, 3))?.try_into()?;
        self.restart.add(begin.elapsed());
        assert_eq!(sum, 5);
        cell.shutdown();
        Ok(())
    }
}

pub fn run(options: &Options) -> Result<Vec<Verdict>> {
    let library = Library::compile()?;
    let (mut floor, mut lean_program) = (Times::default(), Times::default());
    let mut starts = Program::BOTH.map(|program| (program, Start::default()));
    let running =
        Program::BOTH.iter().map(|program| Ok(program.builder().spawn()?)).collect::<Result<Vec<_>>>()?;
    let rounds = options.rounds(60);
    for _ in 0..rounds {
        floor.add(run_program("/bin/true")?);
        // Loading and linking the lean program, with nothing to do: it says that it is started by hosts, and ends.
        lean_program.add(run_program(env!("CARGO_BIN_EXE_lean-worker"))?);
        for ((program, start), running) in starts.iter_mut().zip(&running) {
            start.round(*program, &library, running)?;
        }
    }

    println!("{rounds} rounds, interleaved.\n");
    print_times_header("/bin/true");
    floor.print("posix_spawn of /bin/true, and wait", &floor);
    lean_program.print("the same of hotcell-worker with nothing to do", &floor);
    for (program, start) in &starts {
        let line = |what: &str, times: &Times| times.print(&format!("{}: {what}", program.name()), &floor);
        STEPS.iter().zip(&start.steps).for_each(|(step, times)| line(step, times));
        line("restart and first result", &start.restart);
        line("load in a running worker", &start.load);
    }
    let [(_, lean), _] = &starts;
    let ratio = |times: &Times| times.median() / floor.median();
    Ok(vec![
        Verdict::anywhere(
            "spawn to first result, hotcell-worker: to posix_spawn of /bin/true",
            Limit::AtMost(3.0),
            ratio(&lean.steps[5]),
        ),
        Verdict::anywhere(
            "restart to first result, hotcell-worker: to posix_spawn of /bin/true",
            Limit::AtMost(3.0),
            ratio(&lean.restart),
        ),
    ])
}

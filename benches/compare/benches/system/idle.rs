//! A host and a worker with open sessions that have nothing to do.

use std::collections::BTreeMap;
use std::time::Duration;

use hotcell::Worker;
use hotcell_compare::Result;
use hotcell_compare::cell::Library;
use hotcell_compare::command_line::Options;
use hotcell_compare::verdict::{Limit, Verdict};

const SESSIONS: usize = 8;
const CALLS: i32 = 10_000;

/// How often each thread was switched in or out, and for how many nanoseconds it ran.
type Activity = BTreeMap<u32, (u64, u64)>;

fn activity(process: u32) -> Result<Activity> {
    let mut threads = Activity::new();
    for task in std::fs::read_dir(format!("/proc/{process}/task"))? {
        let folder = task?.path();
        let thread: u32 = folder.file_name().unwrap_or_default().to_string_lossy().parse()?;
        let status = std::fs::read_to_string(folder.join("status"))?;
        let switches = status
            .lines()
            .filter(|line| line.contains("ctxt_switches:"))
            .map(|line| line.split_whitespace().nth(1).unwrap_or_default().parse::<u64>())
            .sum::<std::result::Result<u64, _>>()?;
        let schedstat = std::fs::read_to_string(folder.join("schedstat"))
            .map_err(|error| format!("the kernel does not count run time (CONFIG_SCHEDSTATS): {error}"))?;
        let ran = schedstat.split_whitespace().next().unwrap_or_default().parse()?;
        threads.insert(thread, (switches, ran));
    }
    Ok(threads)
}

/// Between two looks at the same threads.
fn difference(before: &Activity, after: &Activity) -> Result<(u64, u64)> {
    if !before.keys().eq(after.keys()) {
        return Err("threads came or went while nothing happened".into());
    }
    let sum = |activity: &Activity| activity.values().fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
    let (before, after) = (sum(before), sum(after));
    Ok((after.0 - before.0, after.1 - before.1))
}

pub fn run(options: &Options) -> Result<Vec<Verdict>> {
    let [settle, watch] = if options.test { [50, 50] } else { [1_000, 10_000] }.map(Duration::from_millis);
    let library = Library::compile()?;
    let worker = Worker::spawn()?;
    let modules = (0..SESSIONS)
        .map(|_| {
            let module = worker.session()?.load(library.path.as_path())?;
            let add = module.function::<fn(i32, i32) -> i32>("add")?;
            for number in 0..CALLS {
                assert_eq!(add.call(number, 1)?, number + 1);
            }
            Ok(module)
        })
        .collect::<Result<Vec<_>>>()?;

    // This thread's own sleep and look are no part of it, nor are the bench's other threads: they sleep too, and would show.
    let me = nix::unistd::gettid().as_raw() as u32;
    let host = || {
        let mut threads = activity(std::process::id())?;
        threads.remove(&me);
        Result::Ok(threads)
    };
    std::thread::sleep(settle);
    let before = (host()?, activity(worker.pid())?);
    std::thread::sleep(watch);
    let after = (host()?, activity(worker.pid())?);
    let (host_switches, host_time) = difference(&before.0, &after.0)?;
    let (worker_switches, worker_time) = difference(&before.1, &after.1)?;
    println!("In {watch:?}, with {SESSIONS} open sessions that had {CALLS} calls each:\n");
    println!(
        "host's {} other threads: {host_switches} context switches, {host_time} ns of CPU",
        before.0.len()
    );
    println!(
        "worker's {} threads: {worker_switches} context switches, {worker_time} ns of CPU",
        before.1.len()
    );
    drop(modules);
    let verdict = |what: &str, reached: u64| {
        Verdict::anywhere(format!("idle for {watch:?}: {what}"), Limit::AtMost(0.0), reached as f64)
    };
    Ok(vec![
        verdict("context switches, host and worker", host_switches + worker_switches),
        verdict("ns of CPU, host and worker", host_time + worker_time),
    ])
}

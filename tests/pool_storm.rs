//! A pool of four workers and two standbys under load from eight threads, while its workers are killed at random, more than a thousand of them: every call is accounted for, what
//! its error says about having run is true, the pool is always on its way back to full strength, and nothing grows.
//!
//! The workers keep a ledger in a file, one byte for each call, raised when the call runs. It survives them and is compared with what the host was told. Who was ready, promoted and lost is
//! taken from the pool's events, whose order is the pool's own.
//!
//! `HOTCELL_STORM_KILLS` sets the number of kills, `HOTCELL_STORM_SEED` repeats the choice of victims and pauses.

#[path = "common/ledger.rs"]
mod ledger;
#[path = "common/process.rs"]
mod process;

use crossbeam_channel::Receiver;
use hotcell::{
    BoxError, CallError, In, Module, Pool, PoolEvent, PoolFunction, Restart, RestartPolicy, Retry, Role,
    Session, Worker,
};
use ledger::{Booked, FIXTURE, Told, mixed};
use process::{Process, Random, isolated, library, until};
use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::{CStr, CString};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

type Mix = fn(u64, u64) -> u64;

const WORKERS: usize = 4;
const STANDBYS: usize = 2;
const THREADS: u64 = 8;
/// Ledger entries of one thread. One that has used half of them goes slowly, so that they last for any storm.
const SHARE: u64 = 1 << 21;
const RETRIES: u32 = 2;
/// Longer than anything that is waited for should ever take.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Debug, Default)]
struct Tally {
    right: AtomicU64,
    crashed: AtomicU64,
    did_not_run: AtomicU64,
}

/// One thread's calls.
struct Caller<'s> {
    first: u64,
    told: Vec<Told>,
    idempotent: bool,
    random: Random,
    tally: &'s Tally,
    over: &'s AtomicBool,
}

impl Caller<'_> {
    /// The next call's number and argument; nothing when the storm is over.
    fn next(&mut self) -> Option<(u64, u64)> {
        let used = self.told.len() as u64;
        if self.over.load(Relaxed) || used == SHARE {
            return None;
        }
        if used >= SHARE / 2 {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.told.push(Told::DidNotRun);
        Some((self.first + used, self.random.next()))
    }

    fn book(&mut self, (call, x): (u64, u64), outcome: Result<u64, CallError>) {
        let told = &mut self.told[usize::try_from(call - self.first).unwrap()];
        match outcome {
            Ok(y) => {
                assert_eq!(y, mixed(call, x), "call {call} gave a wrong result");
                self.tally.right.fetch_add(1, Relaxed);
                *told = Told::Ran;
            }
            Err(error) => {
                // Killed, and nothing else: no call waits in vain, none finds a closed door.
                let CallError::Crashed(report) = &error else { panic!("call {call}: {error:?}") };
                assert_eq!(report.signal(), Some(libc::SIGKILL), "{report}");
                self.tally.crashed.fetch_add(1, Relaxed);
                if error.may_have_run() {
                    *told = Told::MayHaveRun;
                } else {
                    self.tally.did_not_run.fetch_add(1, Relaxed);
                }
            }
        }
    }

    fn run(&mut self, kind: u64, mix: &PoolFunction<Mix>) {
        match kind {
            0 => {
                while let Some((call, x)) = self.next() {
                    self.book((call, x), mix.call(call, x));
                }
            }
            1 => {
                let mut caller = mix.caller();
                while let Some((call, x)) = self.next() {
                    self.book((call, x), caller.call(call, x));
                }
            }
            2 => {
                let mut flying = VecDeque::new();
                while let Some((call, x)) = self.next() {
                    match mix.submit(call, x) {
                        Ok(ticket) => flying.push_back(((call, x), ticket)),
                        Err(error) => self.book((call, x), Err(error)),
                    }
                    if flying.len() > 20
                        && let Some((call, ticket)) = flying.pop_front()
                    {
                        self.book(call, ticket.wait());
                    }
                }
                for (call, ticket) in flying {
                    self.book(call, ticket.wait());
                }
            }
            _ => {
                self.idempotent = true;
                let sticky = mix.idempotent().sticky(self.first);
                while let Some((call, x)) = self.next() {
                    self.book((call, x), sticky.call(call, x));
                }
            }
        }
    }
}

/// The pool's own account of who did what, checked event by event.
struct Account {
    alive: HashMap<u64, Role>,
    lost: HashSet<u64>,
    promoted: u64,
    /// Since when nobody serves, and the longest such time.
    none_since: Option<Instant>,
    longest_outage: Duration,
}

impl Account {
    fn new(pool: &Pool) -> Self {
        let alive = pool.snapshot().workers.iter().map(|worker| (worker.worker, worker.role)).collect();
        let longest_outage = Duration::ZERO;
        Self { alive, lost: HashSet::new(), promoted: 0, none_since: None, longest_outage }
    }

    fn take(&mut self, event: &PoolEvent) {
        match event {
            PoolEvent::Ready { worker, role, .. } => {
                assert!(self.alive.insert(*worker, *role).is_none(), "{event}");
            }
            PoolEvent::Promoted { worker, seat } => {
                let serving = Role::Serving { seat: *seat };
                assert!(!self.alive.values().any(|role| *role == serving), "{event}: {:?}", self.alive);
                let before = self.alive.insert(*worker, serving);
                assert_eq!(before, Some(Role::Standby), "{event}: {:?}", self.alive);
                self.promoted += 1;
            }
            PoolEvent::Lost { worker, report, .. } => {
                assert!(self.alive.remove(worker).is_some(), "{event}: {:?}", self.alive);
                assert_eq!(report.signal(), Some(libc::SIGKILL), "{report}");
                self.lost.insert(*worker);
            }
            other => panic!("nothing of this kind should happen: {other}"),
        }
        let serves = self.alive.values().any(|role| matches!(role, Role::Serving { .. }));
        match (serves, self.none_since) {
            (false, None) => self.none_since = Some(Instant::now()),
            (true, Some(since)) => {
                self.longest_outage = self.longest_outage.max(since.elapsed());
                self.none_since = None;
            }
            _ => {}
        }
    }
}

/// Kills as many workers, one after the other, each at most once. Gives their numbers.
fn kill_at_random(
    pool: &Pool,
    kills: usize,
    random: &mut Random,
    tally: &Tally,
    account: &mut Account,
    events: &Receiver<PoolEvent>,
) -> HashSet<u64> {
    let mut killed = HashSet::new();
    while killed.len() < kills {
        let right = tally.right.load(Relaxed);
        std::thread::sleep(Duration::from_micros(random.below(6000)));
        // A worker that the pool says it has is not collected, so its number is its own: it is looked up, and then the pool is asked again.
        let victims = |killed: &HashSet<u64>| {
            let mut workers = pool.snapshot().workers;
            workers.retain(|worker| worker.role != Role::Leaving && !killed.contains(&worker.worker));
            workers
        };
        let (worker, process) = until("somebody to kill", || {
            let workers = victims(&killed);
            let at = random.below(workers.len().max(1) as u64);
            let victim = workers.get(usize::try_from(at).unwrap())?;
            let process = Process::find(victim.pid)?;
            victims(&killed)
                .iter()
                .any(|other| other.worker == victim.worker)
                .then_some((victim.worker, process))
        });
        process.kill();
        killed.insert(worker);
        events.try_iter().for_each(|event| account.take(&event));
        // Whoever is left, or comes next, serves.
        until("a call to succeed", || (tally.right.load(Relaxed) > right).then_some(()));
    }
    killed
}

/// One storm: so many kills under load, and every account is right.
fn storm(pool: &Pool, ledger: &Path, kills: usize, seed: u64) -> Account {
    let file = std::fs::OpenOptions::new().write(true).open(ledger).unwrap();
    file.set_len(0).unwrap();
    file.set_len(THREADS * SHARE).unwrap();
    let mix = pool.function::<Mix>("mix").unwrap();
    let events = pool.events();
    let mut account = Account::new(pool);
    let (tally, over) = (Tally::default(), AtomicBool::new(false));
    let before = pool.snapshot();
    let started = Instant::now();
    let (killed, callers) = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let mut caller = Caller {
                    first: thread * SHARE,
                    told: Vec::new(),
                    idempotent: false,
                    random: Random(seed ^ (thread + 1)),
                    tally: &tally,
                    over: &over,
                };
                let mix = &mix;
                scope.spawn(move || {
                    caller.run(thread % 4, mix);
                    let times_max = if caller.idempotent { 1 + RETRIES } else { 1 };
                    Booked { first: caller.first, times_max, told: caller.told }
                })
            })
            .collect();
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            kill_at_random(pool, kills, &mut Random(seed), &tally, &mut account, &events)
        }));
        // Also after a failure, or the threads would never end.
        over.store(true, Relaxed);
        let callers: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        (done.unwrap_or_else(|panic| std::panic::resume_unwind(panic)), callers)
    });
    ledger::check(ledger, &callers);
    // Each kill is one loss, told once, and every loss is replaced.
    while account.lost.len() < kills {
        account.take(&events.recv_timeout(PATIENCE).expect("every loss is told"));
    }
    pool.wait_ready(PATIENCE).unwrap();
    events.try_iter().for_each(|event| account.take(&event));
    assert_eq!(account.lost, killed);
    let after = until("the pool to be at rest", || {
        Some(pool.snapshot()).filter(|seen| seen.capacity.leaving == 0 && seen.in_flight == 0)
    });
    let alive: HashMap<u64, Role> = after.workers.iter().map(|worker| (worker.worker, worker.role)).collect();
    assert_eq!(alive, account.alive);
    assert_eq!((after.capacity.serving, after.capacity.standby), (WORKERS, STANDBYS));
    let made: u64 = callers.iter().map(|caller| caller.told.len() as u64).sum();
    let (right, crashed) = (tally.right.load(Relaxed), tally.crashed.load(Relaxed));
    assert_eq!(made, right + crashed, "every call has one outcome");
    assert_eq!(after.errors.crashed - before.errors.crashed, crashed);
    assert_eq!((after.errors.no_worker, after.errors.other, after.start_failures), (0, 0, 0));
    assert_eq!(after.lost - before.lost, kills as u64);
    assert_eq!(after.restarts - before.restarts, kills as u64);
    assert_eq!(after.promoted - before.promoted, account.promoted);
    let retried = after.retried - before.retried;
    assert!(after.calls - before.calls >= right + retried.saturating_sub(crashed), "{after:?}");
    eprintln!(
        "{kills} kills in {:.1?}: {made} calls, {crashed} crashed ({} of them did not run), {retried} made again, {} promoted, nobody served for {:?} at most",
        started.elapsed(),
        tally.did_not_run.load(Relaxed),
        account.promoted,
        account.longest_outage,
    );
    account
}

#[test]
fn a_pool_serves_through_a_thousand_kills_and_every_call_is_accounted_for() {
    let number = |name, default| match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name} is {text}, which is no number")),
        Err(_) => default,
    };
    let kills = usize::try_from(number("HOTCELL_STORM_KILLS", 1000)).unwrap();
    let seed = number("HOTCELL_STORM_SEED", 20_260_102);
    let name = "a_pool_serves_through_a_thousand_kills_and_every_call_is_accounted_for";
    isolated(name, 600 + kills as u64 / 2, || {
        let me = std::process::id();
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let ledger: PathBuf = folder.path().join("ledger");
        std::fs::File::create(&ledger).unwrap().set_len(THREADS * SHARE).unwrap();
        let path = CString::new(ledger.to_str().unwrap()).unwrap();
        let setup = move |session: &Session| -> Result<Module, BoxError> {
            let module = session.load(library("pool_storm", FIXTURE))?;
            let open_ledger = module.function::<fn(In<CStr>, u64) -> i32>("open_ledger")?;
            match open_ledger.call(&path, THREADS * SHARE)? {
                0 => Ok(module),
                error => Err(format!("the ledger cannot be opened: {error}").into()),
            }
        };
        let tireless = RestartPolicy::new(Restart::OnCrash)
            .limit(1 << 20, PATIENCE)
            .backoff(Duration::ZERO, Duration::ZERO);
        let pool = Pool::builder(setup)
            .workers(WORKERS)
            .standby(STANDBYS)
            .worker(Worker::builder().start_timeout(PATIENCE).timeout(PATIENCE))
            .restart(tireless)
            .retry(Retry::unseen(RETRIES))
            .patience(PATIENCE)
            .build()
            .unwrap();
        // The first of everything costs memory once.
        storm(&pool, &ledger, 30, seed ^ 1);
        let has = || (process::descriptors(me).len(), process::threads(me), process::region_mappings(me));
        // What the host has of the last lost worker goes a moment after the event.
        let full = WORKERS + STANDBYS;
        until("the last of the lost to be dropped", || (process::pidfds(me) == full).then_some(()));
        let (before, resident) = (has(), process::kib(me, "VmRSS"));
        storm(&pool, &ledger, kills, seed);
        until("the last of the lost to be dropped", || (process::pidfds(me) == full).then_some(()));
        until("no more descriptors, threads and mappings than before", || {
            let now = has();
            (now.0 <= before.0 && now.1 <= before.1 && now.2 <= before.2).then_some(())
        });
        let resident_now = process::kib(me, "VmRSS");
        eprintln!("resident before and after: {resident} and {resident_now} KiB");
        assert!(resident_now < resident + 64 * 1024, "{resident} KiB before, {resident_now} KiB after");
        assert_eq!(process::zombies(), Vec::<u32>::new());
        assert_eq!(process::workers_of(me).len(), WORKERS + STANDBYS);
        pool.dispose();
        assert_eq!(process::workers_of(me), Vec::<u32>::new());
    });
}

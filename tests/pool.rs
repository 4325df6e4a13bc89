//! Pools: placement, standbys, what becomes of calls when workers die, recycling, accounting, and refusals.
//!
//! Which worker did what is taken from the pool's own events and from the process number that each call gives back, never guessed from two looks.

#[path = "common/in_time.rs"]
mod in_time;
#[path = "common/process.rs"]
mod process;

use crossbeam_channel::Receiver;
use hotcell::{
    CallError, Cause, In, InOut, LoadError, Module, OnDeadline, Pool, PoolBuilder, PoolEvent, Reason,
    Restart, RestartPolicy, Retry, Role, Session, StartError, Worker,
};
use in_time::in_time;
use process::{isolated, library, threads, until, watchdog, workers_of};
use std::collections::{HashMap, HashSet};
use std::ffi::{CStr, CString};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const FIXTURE: &str = r#"
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int64_t taught;

int32_t add(int32_t a, int32_t b) { return a + b; }
int32_t own_pid(void) { return getpid(); }
void teach(int64_t n) { taught = n; }
int64_t recall(void) { return taught; }
void die(void) { abort(); }
/* Keeps memory and uses it. */
char *hoarded;
int32_t hoard(uint64_t bytes) {
  hoarded = malloc(bytes);
  if (!hoarded) return 0;
  memset(hoarded, 1, bytes);
  return getpid();
}
uint64_t reverse(uint8_t *bytes, uint64_t count) {
  for (uint64_t i = 0; i < count / 2; i++) {
    uint8_t b = bytes[i];
    bytes[i] = bytes[count - 1 - i];
    bytes[count - 1 - i] = b;
  }
  return count;
}
static int exists(const char *path) { return access(path, F_OK) == 0; }
/* Says that it is there, by a file of its own, and waits until there is such a file, five minutes at most. */
int32_t gate(const char *path) {
  char in[4096];
  snprintf(in, sizeof in, "%s.in", path);
  close(open(in, O_CREAT | O_RDWR, 0600));
  for (int i = 0; i < 300000 && !exists(path); i++) usleep(1000);
  return getpid();
}
int32_t gate_then_die(const char *path) { gate(path); abort(); }
/* Dies in the first process that comes here, which makes the file, and lives in the others. */
int32_t die_once(const char *path) {
  if (open(path, O_CREAT | O_EXCL | O_RDWR, 0600) >= 0) abort();
  return getpid();
}
const char *long_name(void) {
  static char text[5001];
  memset(text, 'n', 5000);
  return text;
}
"#;

type Add = fn(i32, i32) -> i32;
type OwnPid = fn() -> i32;

/// Longer than anything that is waited for should ever take.
const PATIENCE: Duration = Duration::from_secs(300);

fn setup(session: &Session) -> Result<Module, Box<dyn std::error::Error + Send + Sync>> {
    Ok(session.load(library("pool", FIXTURE))?)
}

/// Many restarts are wanted here, and no pauses.
fn tireless() -> RestartPolicy {
    RestartPolicy::new(Restart::OnCrash).limit(1 << 20, PATIENCE).backoff(Duration::ZERO, Duration::ZERO)
}

fn pool(workers: usize, standbys: usize) -> PoolBuilder {
    Pool::builder(setup).workers(workers).standby(standbys).restart(tireless()).patience(PATIENCE)
}

/// A file that is not there yet.
struct Gate {
    _folder: tempfile::TempDir,
    path: PathBuf,
    name: CString,
}

impl Gate {
    fn new() -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = folder.path().join("gate");
        let name = CString::new(path.to_str().unwrap()).unwrap();
        Self { _folder: folder, path, name }
    }

    /// Waits until a call is in the gate.
    fn until_entered(&self) {
        until("a call in the gate", || self.path.with_extension("in").exists().then_some(()));
    }

    fn open(&self) {
        std::fs::write(&self.path, []).unwrap();
    }
}

type AtGate = fn(In<CStr>) -> i32;

/// What a pool has told so far: every claim about who did what is checked against it.
struct Told {
    events: Receiver<PoolEvent>,
    /// Process and present role of each worker that is ready and not gone.
    alive: HashMap<u64, (u32, Role)>,
    all: Vec<PoolEvent>,
}

impl Told {
    /// From now on; who is there already is asked for. Only for a pool in which nothing happens meanwhile.
    fn listen(pool: &Pool) -> Self {
        let events = pool.events();
        let workers = pool.snapshot().workers;
        let alive = workers.iter().map(|worker| (worker.worker, (worker.pid, worker.role))).collect();
        Self { events, alive, all: Vec::new() }
    }

    /// Takes in events until one is what `look` looks for.
    fn until<T>(&mut self, what: &str, look: impl Fn(&PoolEvent) -> Option<T>) -> T {
        loop {
            let event = self.events.recv_timeout(PATIENCE);
            let event = event.unwrap_or_else(|_| panic!("still waiting for {what} after {:#?}", self.all));
            let found = look(&event);
            self.take(event);
            if let Some(found) = found {
                return found;
            }
        }
    }

    /// Checks an event against those before it.
    fn take(&mut self, event: PoolEvent) {
        match &event {
            PoolEvent::Ready { worker, pid, role } => {
                let before = self.alive.insert(*worker, (*pid, *role));
                assert!(before.is_none(), "{event}, which was there: {:#?}", self.all);
            }
            PoolEvent::Promoted { worker, seat } => {
                let before =
                    self.alive.insert(*worker, (self.alive[worker].0, Role::Serving { seat: *seat }));
                assert!(matches!(before, Some((_, Role::Standby))), "{event}: {:#?}", self.all);
            }
            PoolEvent::Replaced { worker, successor, seat, .. } => {
                assert_eq!(self.alive[worker].1, Role::Serving { seat: *seat }, "{event}: {:#?}", self.all);
                assert_eq!(self.alive[successor].1, Role::Standby, "{event}: {:#?}", self.all);
                self.alive.get_mut(successor).unwrap().1 = Role::Serving { seat: *seat };
                self.alive.get_mut(worker).unwrap().1 = Role::Leaving;
            }
            PoolEvent::Lost { worker, report, .. } => {
                let before = self.alive.remove(worker);
                assert_eq!(before.map(|(pid, _)| pid), Some(report.pid()), "{event}: {:#?}", self.all);
            }
            PoolEvent::Recycled { worker, .. } => {
                assert!(self.alive.remove(worker).is_some(), "{event}: {:#?}", self.all);
            }
            _ => {}
        }
        self.all.push(event);
    }

    fn lost(&mut self) -> (u64, Role, Cause) {
        self.until("a loss", |event| match event {
            PoolEvent::Lost { worker, role, report } => Some((*worker, *role, report.cause().clone())),
            _ => None,
        })
    }

    fn recycled(&mut self) -> (Reason, bool) {
        self.until("an end after a replacement", |event| match event {
            PoolEvent::Recycled { reason, forced, .. } => Some((*reason, *forced)),
            _ => None,
        })
    }
}

/// Raises a flag when it is dropped.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

fn pid_of(answer: Result<i32, CallError>) -> u32 {
    answer.unwrap().cast_unsigned()
}

/// Waits until as many calls are in the pool's workers.
fn until_in_flight(pool: &Pool, calls: usize) {
    until("calls in flight", || (pool.snapshot().in_flight >= calls).then_some(()));
}

#[test]
fn a_call_goes_to_one_of_the_workers() {
    let _watchdog = watchdog(120);
    let pool = pool(3, 1).build().unwrap();
    let add = pool.function::<Add>("add").unwrap();
    assert_eq!(add.call(2, 3).unwrap(), 5);
    let pids: HashSet<u32> = pool.snapshot().workers.iter().map(|worker| worker.pid).collect();
    assert_eq!(pids.len(), 4);
    let own_pid = pool.function::<OwnPid>("own_pid").unwrap();
    assert!(pids.contains(&own_pid.call().unwrap().cast_unsigned()));
}

#[test]
fn one_threads_calls_stay_with_one_idle_worker() {
    let _watchdog = watchdog(120);
    let pool = pool(4, 0).build().unwrap();
    let own_pid = pool.function::<OwnPid>("own_pid").unwrap();
    let pids: HashSet<u32> = (0..100).map(|_| pid_of(own_pid.call())).collect();
    assert_eq!(pids.len(), 1);
}

#[test]
fn calls_avoid_a_worker_that_is_busy_while_others_are_idle() {
    let _watchdog = watchdog(120);
    let pool = pool(2, 0).build().unwrap();
    let (gate, own_pid) =
        (pool.function::<AtGate>("gate").unwrap(), pool.function::<OwnPid>("own_pid").unwrap());
    let file = Gate::new();
    std::thread::scope(|scope| {
        let held = scope.spawn(|| pid_of(gate.call(&file.name)));
        file.until_entered();
        // From threads of whatever number.
        let others: Vec<u32> =
            (0..4).map(|_| scope.spawn(|| pid_of(own_pid.call())).join().unwrap()).collect();
        file.open();
        let busy = held.join().unwrap();
        assert!(!others.contains(&busy), "{others:?} went to {busy}");
    });
}

#[test]
fn equal_keys_have_one_worker_and_keys_spread() {
    let _watchdog = watchdog(120);
    let pool = pool(4, 0).build().unwrap();
    let own_pid = pool.function::<OwnPid>("own_pid").unwrap();
    let pid = |key: u32| pid_of(own_pid.sticky(key).call());
    let by_key: Vec<u32> = (0..64).map(pid).collect();
    assert_eq!(by_key, (0..64).map(pid).collect::<Vec<_>>());
    std::thread::scope(|scope| {
        let elsewhere = scope.spawn(|| (0..64).map(pid).collect::<Vec<_>>()).join().unwrap();
        assert_eq!(by_key, elsewhere, "whichever thread calls");
    });
    assert_eq!(by_key.iter().collect::<HashSet<_>>().len(), 4);
}

#[test]
fn callers_spread_over_the_seats_and_stay() {
    let _watchdog = watchdog(120);
    let pool = pool(3, 0).build().unwrap();
    let own_pid = pool.function::<OwnPid>("own_pid").unwrap();
    let mut callers = [own_pid.caller(), own_pid.caller(), own_pid.caller()];
    let pids: HashSet<u32> = callers.iter_mut().map(|caller| pid_of(caller.call())).collect();
    assert_eq!(pids.len(), 3);
    for caller in &mut callers {
        let first = pid_of(caller.call());
        assert!((0..100).all(|_| pid_of(caller.call()) == first));
    }
}

#[test]
fn after_a_crash_a_standby_has_the_seat_and_another_is_started() {
    let _watchdog = watchdog(120);
    let pool = pool(1, 2).build().unwrap();
    let (die, own_pid) = (pool.function::<fn()>("die").unwrap(), pool.function::<OwnPid>("own_pid").unwrap());
    let mut told = Told::listen(&pool);
    for _ in 0..5 {
        let before = pid_of(own_pid.call());
        let error = die.call().unwrap_err();
        assert!(error.may_have_run(), "{error}");
        assert_eq!(error.crash_report().unwrap().pid(), before);
        let after = pid_of(own_pid.call());
        let (lost, role, cause) = told.lost();
        assert!(matches!(cause, Cause::Signaled { signal: libc::SIGABRT, .. }), "{cause}");
        assert_eq!(role, Role::Serving { seat: 0 });
        let (promoted, seat) = told.until("a promotion", |event| match event {
            PoolEvent::Promoted { worker, seat } => Some((*worker, *seat)),
            _ => None,
        });
        assert!(promoted != lost && seat == 0);
        assert_eq!(told.alive[&promoted].0, after);
        // So that there is always somebody to promote.
        pool.wait_ready(PATIENCE).unwrap();
    }
    let seen = pool.snapshot();
    assert_eq!((seen.lost, seen.promoted, seen.errors.crashed), (5, 5, 5));
    assert_eq!((seen.restarts, seen.started, seen.capacity.standby), (5, 8, 2));
}

#[test]
fn without_standbys_a_call_waits_for_the_next_worker() {
    let _watchdog = watchdog(120);
    let pool = pool(1, 0).build().unwrap();
    let (die, add) = (pool.function::<fn()>("die").unwrap(), pool.function::<Add>("add").unwrap());
    let mut caller = add.caller();
    for round in 0..5 {
        assert!(matches!(die.call(), Err(CallError::Crashed(_))));
        assert_eq!(add.call(round, 1).unwrap(), round + 1);
        assert_eq!(caller.call(round, 2).unwrap(), round + 2);
    }
    assert_eq!(pool.snapshot().promoted, 0);
}

#[test]
fn a_lost_standby_is_replaced() {
    let _watchdog = watchdog(120);
    let pool = pool(1, 1).build().unwrap();
    let mut told = Told::listen(&pool);
    let standby = pool.snapshot().workers.into_iter().find(|worker| worker.role == Role::Standby).unwrap();
    // Nobody else ends it, so the number is its own.
    process::Process::of(standby.pid).kill();
    let (lost, role, _) = told.lost();
    assert_eq!((lost, role), (standby.worker, Role::Standby));
    pool.wait_ready(PATIENCE).unwrap();
    assert_eq!(pool.snapshot().promoted, 0);
}

/// A call that waits behind another one when the worker dies, in a pool with this policy.
fn call_behind_a_crash(retry: Retry) -> (Pool, u32, Result<i32, CallError>) {
    let pool = pool(1, 1).retry(retry).build().unwrap();
    let gate = pool.function::<AtGate>("gate_then_die").unwrap();
    let own_pid = pool.function::<OwnPid>("own_pid").unwrap();
    let file = Gate::new();
    let (dead, behind) = std::thread::scope(|scope| {
        let culprit = scope.spawn(|| gate.call(&file.name).unwrap_err());
        file.until_entered();
        let behind = scope.spawn(|| own_pid.call());
        until_in_flight(&pool, 2);
        file.open();
        (culprit.join().unwrap().crash_report().unwrap().pid(), behind.join().unwrap())
    });
    (pool, dead, behind)
}

#[test]
fn a_call_that_its_function_never_saw_is_made_again() {
    let _watchdog = watchdog(120);
    let (pool, dead, behind) = call_behind_a_crash(Retry::unseen(1));
    assert_ne!(pid_of(behind), dead);
    assert_eq!(pool.snapshot().retried, 1);
}

#[test]
fn no_call_is_made_again_without_leave() {
    let _watchdog = watchdog(120);
    let (pool, dead, behind) = call_behind_a_crash(Retry::NEVER);
    let error = behind.unwrap_err();
    assert!(!error.may_have_run(), "{error}");
    assert_eq!(error.crash_report().unwrap().pid(), dead);
    assert_eq!(pool.snapshot().retried, 0);
}

#[test]
fn a_call_that_may_have_run_is_made_again_only_if_that_is_declared_harmless() {
    let _watchdog = watchdog(120);
    let pool = pool(2, 1).retry(Retry::unseen(3)).build().unwrap();
    let die_once = pool.function::<AtGate>("die_once").unwrap();
    let error = die_once.call(&Gate::new().name).unwrap_err();
    assert!(error.may_have_run(), "{error}");
    assert_eq!(pool.snapshot().retried, 0);
    let file = Gate::new();
    die_once.idempotent().call(&file.name).unwrap();
    assert!(file.path.exists());
    die_once.idempotent().caller().call(&Gate::new().name).unwrap();
    let seen = pool.snapshot();
    assert_eq!((seen.retried, seen.errors.crashed), (2, 1));
}

#[test]
fn retries_end_and_the_error_still_says_that_the_function_may_have_run() {
    let _watchdog = watchdog(120);
    let pool = pool(1, 1).retry(Retry::unseen(2)).build().unwrap();
    let die = pool.function::<fn()>("die").unwrap().idempotent();
    let mut told = Told::listen(&pool);
    let error = die.call().unwrap_err();
    assert!(error.may_have_run(), "{error}");
    let lost: HashSet<u64> = (0..3).map(|_| told.lost().0).collect();
    assert_eq!(lost.len(), 3, "one worker for each attempt");
    let seen = pool.snapshot();
    assert_eq!((seen.retried, seen.errors.crashed, seen.lost), (2, 1, 3));
}

#[test]
fn bytes_are_sent_again_as_they_were() {
    let _watchdog = watchdog(120);
    let pool = pool(1, 1).build().unwrap();
    let reverse = pool.function::<fn(InOut<[u8]>, u64) -> u64>("reverse").unwrap();
    let gate = pool.function::<AtGate>("gate_then_die").unwrap();
    let file = Gate::new();
    std::thread::scope(|scope| {
        scope.spawn(|| assert!(gate.call(&file.name).is_err()));
        file.until_entered();
        let behind = scope.spawn(|| {
            let mut bytes: Vec<u8> = (0..200).collect();
            assert_eq!(reverse.call(&mut bytes, 200).unwrap(), 200);
            assert!(bytes.iter().copied().eq((0..200).rev()));
        });
        until_in_flight(&pool, 2);
        file.open();
        behind.join().unwrap();
    });
    assert_eq!(pool.snapshot().retried, 1);
}

#[test]
fn a_deadline_costs_a_worker_and_not_the_service() {
    let _watchdog = watchdog(120);
    let pool = pool(1, 1).build().unwrap();
    let (gate, add) = (pool.function::<AtGate>("gate").unwrap(), pool.function::<Add>("add").unwrap());
    let mut told = Told::listen(&pool);
    let file = Gate::new();
    let error = gate.with_timeout(Duration::from_millis(20)).unwrap().call(&file.name).unwrap_err();
    assert!(matches!(error, CallError::TimedOut { worker_killed: true, .. }), "{error}");
    assert_eq!(add.call(1, 2).unwrap(), 3);
    let (_, role, cause) = told.lost();
    assert!(matches!(cause, Cause::DeadlineExceeded { .. }), "{cause}");
    assert_eq!(role, Role::Serving { seat: 0 });
    assert_eq!(pool.snapshot().errors.timed_out, 1);
}

#[test]
fn a_worker_whose_session_was_given_up_is_replaced_and_its_call_may_finish() {
    let _watchdog = watchdog(120);
    let worker = Worker::builder().on_deadline(OnDeadline::AbandonSession);
    let pool = pool(1, 1).worker(worker).build().unwrap();
    let (gate, add) = (pool.function::<AtGate>("gate").unwrap(), pool.function::<Add>("add").unwrap());
    let mut told = Told::listen(&pool);
    let file = Gate::new();
    let error = gate.with_timeout(Duration::from_millis(20)).unwrap().call(&file.name).unwrap_err();
    assert!(matches!(error, CallError::TimedOut { worker_killed: false, .. }), "{error}");
    assert_eq!(add.call(1, 2).unwrap(), 3);
    file.open();
    assert_eq!(told.recycled(), (Reason::Abandoned, false));
}

#[test]
fn setup_teaches_every_worker_what_the_module_needs() {
    let _watchdog = watchdog(120);
    let teaching = |session: &Session| {
        let module = setup(session)?;
        module.function::<fn(i64)>("teach")?.call(42)?;
        Ok(module)
    };
    let pool =
        Pool::builder(teaching).workers(1).standby(1).restart(tireless()).patience(PATIENCE).build().unwrap();
    let (die, recall) =
        (pool.function::<fn()>("die").unwrap(), pool.function::<fn() -> i64>("recall").unwrap());
    for _ in 0..4 {
        assert_eq!(recall.call().unwrap(), 42);
        assert!(die.call().is_err());
    }
}

#[test]
fn a_function_is_in_every_worker_whenever_it_was_asked_for() {
    let _watchdog = watchdog(120);
    let pool = pool(2, 1).build().unwrap();
    let die = pool.function::<fn()>("die").unwrap();
    // Workers come and go meanwhile.
    let over = &AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            while !over.load(SeqCst) {
                assert!(die.call().is_err());
            }
        });
        // Also when something here fails, or the killer would never end.
        let _over = Over(over);
        for _ in 0..20 {
            let add = pool.function::<Add>("add").unwrap();
            let own_pid = pool.function::<OwnPid>("own_pid").unwrap();
            assert_eq!(add.idempotent().call(1, 1).map_or(2, |sum| sum), 2);
            drop(own_pid);
        }
    });
    pool.wait_ready(PATIENCE).unwrap();
    let add = pool.function::<Add>("add").unwrap();
    assert!((0..8).all(|key| add.sticky(key).call(key, 1).unwrap() == key + 1));
    let error = pool.function::<fn()>("no_such_function").unwrap_err();
    assert!(matches!(error, LoadError::MissingSymbol { .. }), "{error}");
    assert!(pool.prototype("not a prototype").is_err());
    // Neither of these keeps new workers from becoming ready.
    assert!(pool.function::<fn()>("die").unwrap().call().is_err());
    pool.wait_ready(PATIENCE).unwrap();
}

#[test]
fn functions_are_called_by_prototype_too() {
    let _watchdog = watchdog(120);
    let pool = pool(1, 1).build().unwrap();
    let add = pool.prototype("int add(int a, int b)").unwrap();
    let die = pool.prototype("void die(void)").unwrap();
    let five: i32 = add.call((2, 3)).unwrap().try_into().unwrap();
    assert_eq!(five, 5);
    assert!(matches!(add.call([1]), Err(CallError::WrongCount { .. })));
    assert!(matches!(die.call(()), Err(CallError::Crashed(_))));
    assert_eq!(i32::try_from(add.sticky("k").call((20, 3)).unwrap()).unwrap(), 23);
    assert!(die.idempotent().call(()).unwrap_err().may_have_run());
    let mut bytes = *b"olleh";
    let reverse = pool.prototype("uint64_t reverse(uint8_t *bytes, uint64_t count)").unwrap();
    reverse.call((&mut bytes, 5)).unwrap();
    assert_eq!(&bytes, b"hello");
}

#[test]
fn tickets_are_redeemed_and_an_unsent_one_goes_elsewhere() {
    let _watchdog = watchdog(120);
    let pool = pool(2, 1).build().unwrap();
    let (add, die) = (pool.function::<Add>("add").unwrap(), pool.function::<fn()>("die").unwrap());
    let tickets: Vec<_> = (0..50).map(|n| add.submit(n, n).unwrap()).collect();
    for (n, ticket) in (0..).zip(tickets) {
        assert_eq!(ticket.wait().unwrap(), 2 * n);
    }
    let ticket = die.submit().unwrap();
    let error = ticket.wait().unwrap_err();
    assert!(error.may_have_run(), "{error}");
    assert_eq!(add.submit(1, 2).unwrap().wait().unwrap(), 3);
    drop(add.submit(1, 2).unwrap());
    until("nothing in flight", || (pool.snapshot().in_flight == 0).then_some(()));
}

/// Calls from several threads and in all ways until so many workers were recycled and so many processes have answered, and checks each answer: none may fail. (A worker may
/// be recycled before it has answered one of those calls that tell who answers.)
fn call_without_a_failure(pool: &Pool, recycled: u64, processes: usize) {
    let answered = Mutex::new(HashSet::new());
    let enough = || pool.snapshot().recycled >= recycled && answered.lock().unwrap().len() >= processes;
    let own_pid = pool.function::<OwnPid>("own_pid").unwrap();
    let by_name = pool.prototype("int own_pid(void)").unwrap();
    let long = pool.function::<fn() -> CString>("long_name").unwrap();
    std::thread::scope(|scope| {
        let one = || {
            let (mut caller, mut long_caller) = (own_pid.caller(), long.caller());
            while !enough() {
                let mut pids = HashSet::from([pid_of(own_pid.call())]);
                pids.extend((0..20).map(|_| pid_of(caller.call())));
                let tickets: Vec<_> = (0..5).map(|_| own_pid.submit().unwrap()).collect();
                pids.extend(tickets.into_iter().map(|ticket| pid_of(ticket.wait())));
                pids.insert(pid_of(by_name.call(()).and_then(TryInto::try_into)));
                assert_eq!(long.call().unwrap().count_bytes(), 5000);
                assert_eq!(long_caller.call().unwrap().count_bytes(), 5000);
                answered.lock().unwrap().extend(pids);
            }
        };
        for thread in [(); 3].map(|()| scope.spawn(one)) {
            thread.join().unwrap();
        }
    });
}

#[test]
fn recycling_by_calls_fails_none_of_them() {
    let _watchdog = watchdog(120);
    for (workers, standbys) in [(1, 0), (2, 1)] {
        let pool = pool(workers, standbys).recycle_after_calls(30).retry(Retry::NEVER).build().unwrap();
        let mut told = Told::listen(&pool);
        call_without_a_failure(&pool, 20, 20);
        for _ in 0..20 {
            assert_eq!(told.recycled(), (Reason::Calls, false));
        }
        let seen = pool.snapshot();
        assert_eq!((seen.lost, seen.errors), (0, Default::default()), "{seen:#?}");
    }
}

#[test]
fn recycling_by_age_fails_no_call() {
    let _watchdog = watchdog(120);
    let age = Duration::from_millis(100);
    let pool = pool(2, 0).recycle_after_age(age).retry(Retry::NEVER).build().unwrap();
    let mut told = Told::listen(&pool);
    call_without_a_failure(&pool, 4, 3);
    assert_eq!(told.recycled(), (Reason::Age, false));
    assert_eq!(pool.snapshot().errors, Default::default());
}

#[test]
fn recycling_by_growth_replaces_the_one_that_has_grown() {
    let _watchdog = watchdog(120);
    let pool = pool(2, 1).recycle_after_growth(64 << 20).build().unwrap();
    let hoard = pool.function::<fn(u64) -> i32>("hoard").unwrap();
    let mut told = Told::listen(&pool);
    let grown = pid_of(hoard.call(80 << 20));
    let replaced = told.until("a replacement", |event| match event {
        PoolEvent::Replaced { worker, reason, .. } => Some((*worker, *reason)),
        _ => None,
    });
    assert_eq!((told.alive[&replaced.0].0, replaced.1), (grown, Reason::Growth));
    assert_eq!(told.recycled(), (Reason::Growth, false));
}

#[test]
fn a_replaced_worker_finishes_what_it_has() {
    let _watchdog = watchdog(120);
    let pool = pool(1, 0).recycle_after_age(Duration::from_millis(100)).build().unwrap();
    let (gate, own_pid) =
        (pool.function::<AtGate>("gate").unwrap(), pool.function::<OwnPid>("own_pid").unwrap());
    let mut told = Told::listen(&pool);
    let file = Gate::new();
    let ticket = gate.submit(&file.name).unwrap();
    let replaced = told.until("a replacement", |event| match event {
        PoolEvent::Replaced { worker, .. } => Some(*worker),
        _ => None,
    });
    // The old worker is in the gate, so whoever answers is its successor.
    let old = told.alive[&replaced].0;
    assert_ne!(pid_of(own_pid.call()), old);
    file.open();
    assert_eq!(pid_of(ticket.wait()), old);
    let ended = told.until("its end", |event| match event {
        PoolEvent::Recycled { worker, forced, .. } => Some((*worker, *forced)),
        _ => None,
    });
    assert_eq!(ended, (replaced, false));
}

#[test]
fn a_forgotten_ticket_does_not_keep_a_replaced_worker_for_ever() {
    let _watchdog = watchdog(120);
    let builder = pool(1, 0).recycle_after_calls(1).drain_timeout(Duration::from_millis(50));
    let pool = builder.build().unwrap();
    let add = pool.function::<Add>("add").unwrap();
    let mut told = Told::listen(&pool);
    std::mem::forget(add.submit(1, 2).unwrap());
    assert_eq!(told.recycled(), (Reason::Calls, true));
    assert_eq!(add.call(1, 2).unwrap(), 3);
}

#[test]
fn senseless_values_are_refused_with_their_range() {
    let _watchdog = watchdog(120);
    let sound = || Pool::builder(|_| Err("never started".into()));
    for (bad, option) in [
        (sound().workers(0), "workers"),
        (sound().workers(100_000), "workers"),
        (sound().standby(100_000), "standby"),
        (sound().recycle_after_calls(0), "recycle_after_calls"),
        (sound().recycle_after_age(Duration::ZERO), "recycle_after_age"),
        (sound().recycle_after_growth(0), "recycle_after_growth"),
        (sound().drain_timeout(Duration::ZERO), "drain_timeout"),
        (sound().restart(Restart::Never.into()), "restart"),
        (sound().restart(RestartPolicy::default().limit(0, PATIENCE)), "the limit of restarts"),
    ] {
        match bad.build().unwrap_err() {
            StartError::Configuration { option: told, .. } => assert_eq!(told, option),
            other => panic!("{option}: {other}"),
        }
    }
}

#[test]
fn a_setup_that_fails_panics_or_cheats_is_a_failed_build_and_leaves_nothing() {
    isolated("a_setup_that_fails_panics_or_cheats_is_a_failed_build_and_leaves_nothing", 120, || {
        let failed = |pool: PoolBuilder, expected: &str| {
            let error = pool.workers(2).standby(1).build().unwrap_err();
            assert!(matches!(error, StartError::Hook { hook: "setup", .. }), "{error:?}");
            assert!(error.to_string().contains(expected), "{error}");
        };
        failed(Pool::builder(|_| Err("no luck today".into())), "no luck today");
        failed(Pool::builder(|_| panic!("out of its mind")), "it panicked: out of its mind");
        failed(Pool::builder(|session| Ok(session.load("./no-such-library.so")?)), "was not found");
        let other = Worker::spawn().unwrap().session().unwrap();
        let foreign = other.load(library("pool", FIXTURE)).unwrap();
        failed(Pool::builder(move |_| Ok(foreign.clone())), "another session");
        drop(other);
        until("all workers to be gone", || workers_of(std::process::id()).is_empty().then_some(()));
    });
}

/// A pool of one whose setup can be told to fail, and counts how often it runs.
fn moody(policy: RestartPolicy, standbys: usize) -> (Pool, Arc<AtomicBool>, Arc<AtomicU32>) {
    let (fails, runs) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
    let (sulking, count) = (Arc::clone(&fails), Arc::clone(&runs));
    let mood = move |session: &Session| {
        count.fetch_add(1, SeqCst);
        match (sulking.load(SeqCst), count.load(SeqCst) % 2) {
            (false, _) => setup(session),
            (true, 0) => Err("sulking".into()),
            (true, _) => panic!("sulking loudly"),
        }
    };
    let pool =
        Pool::builder(mood).workers(1).standby(standbys).restart(policy).patience(PATIENCE).build().unwrap();
    (pool, fails, runs)
}

/// Formerly a pool whose successors could not start tried again without a pause.
#[test]
fn starts_that_fail_open_the_circuit_and_calls_then_fail_at_once() {
    let _watchdog = watchdog(120);
    let policy = RestartPolicy::new(Restart::OnCrash)
        .limit(4, Duration::from_secs(3600))
        .backoff(Duration::from_millis(1), Duration::from_millis(8))
        .open_for(Duration::from_secs(3600));
    let (pool, fails, runs) = moody(policy, 0);
    let (die, add) = (pool.function::<fn()>("die").unwrap(), pool.function::<Add>("add").unwrap());
    let mut told = Told::listen(&pool);
    fails.store(true, SeqCst);
    assert!(matches!(die.call(), Err(CallError::Crashed(_))));
    // The crash is one end and each failed start another; the fifth is one too many.
    let error = add.call(1, 2).unwrap_err();
    let CallError::NoWorker { source: Some(source), .. } = &error else { panic!("{error:?}") };
    let StartError::CircuitOpen { until: open_until, retry_after, last, .. } = &**source else {
        panic!("{error:?}")
    };
    assert!(*open_until > std::time::Instant::now() && *retry_after <= Duration::from_secs(3600));
    assert!(last.to_string().contains("sulking"), "{error}");
    assert!(!error.may_have_run() && !error.session_usable());
    assert!(matches!(add.caller().call(1, 2), Err(CallError::NoWorker { .. })));
    assert!(matches!(add.submit(1, 2), Err(CallError::NoWorker { .. })));
    assert!(matches!(pool.wait_ready(PATIENCE), Err(StartError::CircuitOpen { .. })));
    assert!(matches!(pool.function::<OwnPid>("own_pid"), Err(LoadError::Call { .. })));
    told.until("the circuit", |event| matches!(event, PoolEvent::CircuitOpened { .. }).then_some(()));
    let seen = pool.snapshot();
    assert_eq!((runs.load(SeqCst), seen.start_failures), (1 + 4, 4), "{seen:#?}");
    assert_eq!((seen.capacity.serving, seen.capacity.starting), (0, 0));
    assert_eq!(seen.circuit_open_until, Some(*open_until));
}

#[test]
fn a_pool_recovers_when_its_setup_does() {
    let _watchdog = watchdog(120);
    in_time(Duration::from_millis(500), |window| {
        let policy = RestartPolicy::new(Restart::OnCrash)
            .limit(2, window)
            .backoff(Duration::from_millis(1), Duration::from_millis(8))
            .open_for(Duration::from_millis(50));
        let (pool, fails, _) = moody(policy, 1);
        let (die, add) = (pool.function::<fn()>("die").unwrap(), pool.function::<Add>("add").unwrap());
        let mut told = Told::listen(&pool);
        fails.store(true, SeqCst);
        // Both the worker and the standby.
        assert!(die.call().is_err());
        until("the last worker to be gone", || die.call().is_err().then_some(()));
        // Starts have to fail that often within the window, which a busy machine may not be quick enough for.
        let give_up = Instant::now() + 8 * window;
        loop {
            let event = told.events.recv_deadline(give_up).ok()?;
            let opened = matches!(event, PoolEvent::CircuitOpened { .. });
            told.take(event);
            if opened {
                break;
            }
        }
        fails.store(false, SeqCst);
        let five = until("the pool to recover", || add.call(2, 3).ok());
        assert_eq!(five, 5);
        until("all to be there", || pool.wait_ready(PATIENCE).ok());
        Some(())
    });
}

#[test]
fn a_crash_that_comes_back_at_every_start_ends_with_an_open_circuit() {
    let _watchdog = watchdog(120);
    // Not a failed setup: a worker that dies of it.
    let armed = Arc::new(AtomicBool::new(false));
    let trigger = Arc::clone(&armed);
    let deadly = move |session: &Session| {
        let module = setup(session)?;
        if trigger.load(SeqCst) {
            module.function::<fn()>("die")?.call()?;
        }
        Ok(module)
    };
    let policy = RestartPolicy::new(Restart::OnCrash)
        .limit(3, Duration::from_secs(3600))
        .backoff(Duration::from_millis(1), Duration::from_millis(4))
        .open_for(Duration::from_secs(3600));
    let pool = Pool::builder(deadly).workers(2).standby(0).restart(policy).build().unwrap();
    let die = pool.function::<fn()>("die").unwrap();
    let add = pool.function::<Add>("add").unwrap();
    let mut told = Told::listen(&pool);
    armed.store(true, SeqCst);
    assert!(die.call().is_err());
    told.until("the circuit", |event| matches!(event, PoolEvent::CircuitOpened { .. }).then_some(()));
    // One crash took a fraction of the capacity, and not the service.
    assert_eq!(pool.capacity().serving, 1);
    assert_eq!(add.call(1, 2).unwrap(), 3);
    assert_eq!(pool.snapshot().start_failures, 3);
}

#[test]
fn calls_in_flight_end_when_the_pool_is_disposed_and_later_ones_are_refused() {
    isolated("calls_in_flight_end_when_the_pool_is_disposed_and_later_ones_are_refused", 120, || {
        let me = std::process::id();
        let pool = pool(2, 1).build().unwrap();
        let (gate, add) = (pool.function::<AtGate>("gate").unwrap(), pool.function::<Add>("add").unwrap());
        let mut caller = add.caller();
        assert_eq!(caller.call(1, 2).unwrap(), 3);
        let file = Gate::new();
        std::thread::scope(|scope| {
            let held = scope.spawn(|| gate.call(&file.name));
            file.until_entered();
            pool.dispose();
            let error = held.join().unwrap().unwrap_err();
            assert!(matches!(error, CallError::Disposed(_)) && error.may_have_run(), "{error:?}");
        });
        assert_eq!(workers_of(me), Vec::<u32>::new());
        let refused = [
            add.call(1, 2).unwrap_err(),
            caller.call(1, 2).unwrap_err(),
            add.submit(1, 2).map(drop).unwrap_err(),
        ];
        for error in refused {
            assert!(matches!(error, CallError::PoolDisposed { .. }), "{error:?}");
            assert!(!error.may_have_run() && !error.session_usable());
            let said = error.to_string();
            assert!(said.contains("add of the pool") && said.contains("disposed of"), "{said}");
        }
        assert!(matches!(pool.wait_ready(PATIENCE), Err(StartError::Disposed)));
        assert!(pool.function::<OwnPid>("own_pid").is_err());
        pool.dispose();
        // The keeper has gone too: what is left is the main thread, this one, the watchdog's, and the library's two.
        until("the keeper to be gone", || (threads(me) <= 5).then_some(()));
    });
}

#[test]
fn the_last_handle_ends_the_workers() {
    isolated("the_last_handle_ends_the_workers", 120, || {
        let me = std::process::id();
        let pool = pool(2, 1).build().unwrap();
        let add = pool.function::<Add>("add").unwrap();
        drop(pool);
        assert_eq!(add.call(1, 2).unwrap(), 3, "a function keeps its pool open");
        assert_eq!(workers_of(me).len(), 3);
        drop(add);
        until("all workers to be gone", || workers_of(me).is_empty().then_some(()));
        until("the keeper to be gone", || (threads(me) <= 5).then_some(()));
    });
}

//! From spawn to the end: disposing at any moment, closing sessions, dropping handles, output, events, and what is left afterwards (nothing).

#[path = "common/process.rs"]
mod process;

use hotcell::{
    CallError, Cause, Function, In, InOut, Involvement, LoadError, Module, OUTPUT_TAIL_BYTES, Output,
    Session, StartError, Worker, WorkerEvent,
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use process::{
    Process, Random, descriptors, isolated, kib, library, region_mappings, rerun, threads, until, watchdog,
};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::time::{Duration, Instant};

const FIXTURE: &str = r#"
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char note[4096];
static void leave_note(void) { if (note[0]) close(open(note, O_CREAT | O_WRONLY, 0600)); }

int add(int a, int b) { return a + b; }

/* Leaves a file, then sleeps for longer than any test. */
int sleep_for_ever(const char *path) {
  close(open(path, O_CREAT | O_WRONLY, 0600));
  for (;;) pause();
}

void ignore_sigterm(void) { signal(SIGTERM, SIG_IGN); }

static void on_sigterm(int signal) { (void)signal; leave_note(); _exit(3); }
void leave_note_at_sigterm(const char *path) { strncpy(note, path, sizeof note - 1); signal(SIGTERM, on_sigterm); }
void leave_note_at_unload(const char *path) { strncpy(note, path, sizeof note - 1); }
__attribute__((destructor)) static void unload(void) { leave_note(); }

int say(int fd, const char *text) { return (int)write(fd, text, strlen(text)); }

/* Writes that many MiB. */
int flood(int fd, int mib) {
  static char piece[1 << 16];
  memset(piece, 'x', sizeof piece);
  for (int i = 0; i < mib * 16; i++)
    for (size_t done = 0; done < sizeof piece;) {
      ssize_t n = write(fd, piece + done, sizeof piece - done);
      if (n < 0) return -1;
      done += (size_t)n;
    }
  return mib;
}

uint64_t touch(uint8_t *bytes, uint64_t count) { for (uint64_t i = 0; i < count; i++) bytes[i]++; return count; }
void leave(int code) { exit(code); }
"#;

const SLOW_TO_LOAD: &str = r#"
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>
__attribute__((constructor)) static void load(void) {
  close(open(getenv("MARK"), O_CREAT | O_WRONLY, 0600));
  for (;;) pause();
}
"#;

fn load(session: &Session) -> Module {
    session.load(Module::ffi(library("lifecycle", FIXTURE))).unwrap()
}

fn module_of(worker: &Worker) -> Module {
    load(&worker.session().unwrap())
}

fn add_of(worker: &Worker) -> Function<fn(i32, i32) -> i32> {
    module_of(worker).function("add").unwrap()
}

/// A place for a file that says how far the worker is.
struct Mark {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

impl Mark {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mark");
        Self { _folder: folder, path }
    }

    fn text(&self) -> &str {
        self.path.to_str().unwrap()
    }

    fn wait(&self) {
        until("the mark", || self.path.exists().then_some(()));
    }
}

/// The error of a call whose worker was disposed, and whether its function may have run.
fn check_disposed(error: &CallError, involvement: Option<Involvement>) {
    let CallError::Disposed(report) = error else { panic!("{error:?}") };
    assert_eq!(*report.cause(), Cause::Disposed);
    if let Some(involvement) = involvement {
        assert_eq!(report.involvement(), involvement, "{report}");
    }
    assert!(!error.session_usable());
}

#[test]
fn disposing_again_and_from_many_threads_is_the_same_as_once() {
    let _watchdog = watchdog(120);
    let worker = Worker::spawn().unwrap();
    let process = Process::of(worker.pid());
    let session = worker.session().unwrap();
    let add = load(&session).function::<fn(i32, i32) -> i32>("add").unwrap();
    assert!(worker.is_alive() && worker.crash_report().is_none());
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                worker.clone().dispose();
                assert!(!worker.is_alive(), "dispose returns when the worker is gone");
            });
        }
    });
    assert!(process.is_gone());
    worker.dispose();
    assert_eq!(*worker.crash_report().unwrap().cause(), Cause::Disposed);
    assert_eq!(worker.crash_report().unwrap().pid(), worker.pid());
    // Whatever is tried afterwards says what happened, and that nothing ran.
    check_disposed(&add.call(1, 2).unwrap_err(), Some(Involvement::NotRun));
    check_disposed(&add.submit(1, 2).unwrap_err(), Some(Involvement::NotRun));
    check_disposed(&session.ping().unwrap_err(), Some(Involvement::NotRun));
    check_disposed(&session.alloc(8).unwrap_err(), Some(Involvement::NotRun));
    check_disposed(&session.close().unwrap_err(), Some(Involvement::NotRun));
    assert!(matches!(worker.session(), Err(StartError::Disposed)));
    match session.load("libm.so.6") {
        Err(LoadError::Call { source, .. }) => check_disposed(&source, Some(Involvement::NotRun)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn disposing_resolves_every_call_in_flight() {
    let _watchdog = watchdog(120);
    for blocking in [true, false] {
        let worker = Worker::spawn().unwrap();
        let module = module_of(&worker);
        let add = module.function::<fn(i32, i32) -> i32>("add").unwrap();
        let sleep = module.function::<fn(In<str>) -> i32>("sleep_for_ever").unwrap();
        let mark = Mark::new();
        let answered = add.submit(20, 22).unwrap();
        until("the answer", || answered.is_done().then_some(()));
        std::thread::scope(|scope| {
            let running = scope.spawn(|| {
                if blocking { sleep.call(mark.text()) } else { sleep.submit(mark.text()).unwrap().wait() }
            });
            mark.wait();
            let tickets: Vec<_> = (0..100).map(|i| add.submit(i, 1).unwrap()).collect();
            let waiting: Vec<_> = (0..4)
                .map(|i| {
                    scope.spawn({
                        let add = &add;
                        move || add.call(i, 1)
                    })
                })
                .collect();
            worker.dispose();
            check_disposed(&running.join().unwrap().unwrap_err(), Some(Involvement::Bystander));
            for ticket in tickets {
                assert!(ticket.is_done());
                check_disposed(&ticket.wait().unwrap_err(), Some(Involvement::NotRun));
            }
            for thread in waiting {
                check_disposed(&thread.join().unwrap().unwrap_err(), Some(Involvement::NotRun));
            }
        });
        assert_eq!(answered.wait().unwrap(), 42, "an answer that was there stays there");
    }
}

#[test]
fn disposing_during_a_load_ends_the_load() {
    let _watchdog = watchdog(120);
    let mark = Mark::new();
    let worker = Worker::builder().env("MARK", &mark.path).spawn().unwrap();
    let session = worker.session().unwrap();
    std::thread::scope(|scope| {
        let loading = scope.spawn(|| session.load(Module::ffi(library("slow_to_load", SLOW_TO_LOAD))));
        mark.wait();
        worker.dispose();
        match loading.join().unwrap() {
            Err(LoadError::Call { source, .. }) => check_disposed(&source, Some(Involvement::Bystander)),
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn disposing_at_any_moment_of_opening_loading_and_calling_is_an_error_that_says_so() {
    let _watchdog = watchdog(120);
    let mut random = Random(7);
    let mut stages = [0; 3];
    for _ in 0..60 {
        let worker = Worker::spawn().unwrap();
        std::thread::scope(|scope| {
            let user = scope.spawn(|| {
                loop {
                    let session = match worker.session() {
                        Ok(session) => session,
                        Err(StartError::Disposed) => return 0,
                        Err(other) => panic!("{other:?}"),
                    };
                    let function = session
                        .load(Module::ffi(library("lifecycle", FIXTURE)))
                        .and_then(|module| module.function::<fn(i32, i32) -> i32>("add"));
                    let add = match function {
                        Ok(add) => add,
                        Err(LoadError::Call { source, .. }) => {
                            check_disposed(&source, None);
                            return 1;
                        }
                        Err(other) => panic!("{other:?}"),
                    };
                    for i in 0..100 {
                        match add.call(i, 1) {
                            Ok(sum) => assert_eq!(sum, i + 1),
                            Err(error) => {
                                check_disposed(&error, None);
                                return 2;
                            }
                        }
                    }
                }
            });
            std::thread::sleep(Duration::from_micros(random.below(5000)));
            worker.dispose();
            stages[user.join().unwrap()] += 1;
        });
    }
    eprintln!("ended while opening, loading, calling: {stages:?}");
}

#[test]
fn disposing_of_one_worker_leaves_others_and_those_being_spawned_alone() {
    let _watchdog = watchdog(120);
    let steady = Worker::spawn().unwrap();
    let add = add_of(&steady);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for i in 0..15 {
                    let worker = Worker::spawn().unwrap();
                    let other = Worker::spawn().unwrap();
                    worker.dispose();
                    assert_eq!(add_of(&other).call(i, 1).unwrap(), i + 1);
                    assert_eq!(add.call(i, 2).unwrap(), i + 2);
                }
            });
        }
    });
    assert!(steady.is_alive());
}

#[test]
fn a_worker_that_ignores_sigterm_is_killed_after_the_grace_period() {
    let _watchdog = watchdog(120);
    let grace = Duration::from_millis(150);
    let worker = Worker::builder().grace(grace).spawn().unwrap();
    let process = Process::of(worker.pid());
    module_of(&worker).function::<fn()>("ignore_sigterm").unwrap().call().unwrap();
    let start = Instant::now();
    worker.dispose();
    assert!(start.elapsed() >= grace, "it had its time");
    assert!(process.is_gone());
    assert_eq!(*worker.crash_report().unwrap().cause(), Cause::Disposed);
    // Without a grace period there is no waiting.
    let worker = Worker::builder().grace(Duration::ZERO).spawn().unwrap();
    module_of(&worker).function::<fn()>("ignore_sigterm").unwrap().call().unwrap();
    worker.dispose();
    assert!(!worker.is_alive());
}

#[test]
fn a_worker_can_use_its_grace_period() {
    let _watchdog = watchdog(120);
    let mark = Mark::new();
    let worker = Worker::builder().grace(Duration::from_secs(60)).spawn().unwrap();
    let note = module_of(&worker).function::<fn(In<str>)>("leave_note_at_sigterm").unwrap();
    note.call(mark.text()).unwrap();
    worker.dispose();
    assert!(mark.path.exists(), "the handler ran");
    assert_eq!(*worker.crash_report().unwrap().cause(), Cause::Disposed);
}

#[test]
fn the_last_handle_ends_the_worker_and_no_other_does() {
    let _watchdog = watchdog(120);
    let worker = Worker::spawn().unwrap();
    let process = Process::of(worker.pid());
    let events = worker.events();
    let session = worker.session().unwrap();
    let module = load(&session);
    let add = module.function::<fn(i32, i32) -> i32>("add").unwrap();
    let clone = add.clone();
    drop((worker, session, module, add));
    assert_eq!(clone.call(1, 2).unwrap(), 3);
    assert!(process.runs());
    drop(clone);
    let WorkerEvent::Ended(report) = events.recv().unwrap() else { panic!("nothing was written") };
    assert_eq!(*report.cause(), Cause::Disposed);
    assert!(process.is_gone());
    // A block keeps it too, and a worker handle taken from a session.
    let session = Worker::spawn().unwrap().session().unwrap();
    let block = session.block(10).unwrap();
    let worker = session.worker();
    drop(session);
    assert!(worker.is_alive());
    let process = Process::of(worker.pid());
    drop(worker);
    std::thread::sleep(Duration::from_millis(20));
    assert!(process.runs() && block.write(0, &[1; 10]));
    drop(block);
    until("the end", || process.is_gone().then_some(()));
}

#[test]
fn a_ticket_keeps_its_worker_until_it_is_redeemed() {
    let _watchdog = watchdog(120);
    let ticket = {
        let add = add_of(&Worker::spawn().unwrap());
        add.submit(40, 2).unwrap()
    };
    assert_eq!(ticket.wait().unwrap(), 42);
}

#[test]
fn a_closed_session_is_closed_for_every_handle_and_others_go_on() {
    let _watchdog = watchdog(120);
    let worker = Worker::spawn().unwrap();
    let (session, other) = (worker.session().unwrap(), worker.session().unwrap());
    let module = load(&session);
    let add = module.function::<fn(i32, i32) -> i32>("add").unwrap();
    let by_name = module.prototype("int add(int, int)").unwrap();
    let other_add = load(&other).function::<fn(i32, i32) -> i32>("add").unwrap();
    let clone = session.clone();
    let answered = add.submit(40, 2).unwrap();
    let block = session.block(100).unwrap();
    session.close().unwrap();
    assert!(matches!(session.close(), Err(CallError::Closed)));
    assert!(matches!(clone.ping(), Err(CallError::Closed)));
    assert!(matches!(add.call(1, 2), Err(CallError::Closed)));
    assert!(matches!(add.submit(1, 2), Err(CallError::Closed)));
    assert!(matches!(by_name.call((1, 2)), Err(CallError::Closed)));
    assert!(matches!(clone.load("libm.so.6"), Err(LoadError::Call { source: CallError::Closed, .. })));
    // Submitted before, so it was either answered before or refused.
    match answered.wait() {
        Ok(sum) => assert_eq!(sum, 42),
        Err(error) => assert!(matches!(error, CallError::Closed), "{error:?}"),
    }
    drop(block);
    assert_eq!(other_add.call(1, 2).unwrap(), 3);
    assert!(worker.is_alive());
    until("the session's thread to end", || (threads(worker.pid()) == 2).then_some(()));
}

#[test]
fn closing_a_session_unloads_its_modules() {
    let _watchdog = watchdog(120);
    for by_drop in [false, true] {
        let worker = Worker::spawn().unwrap();
        let session = worker.session().unwrap();
        let mark = Mark::new();
        load(&session).function::<fn(In<str>)>("leave_note_at_unload").unwrap().call(mark.text()).unwrap();
        assert!(!mark.path.exists());
        if by_drop {
            drop(session)
        } else {
            session.close().unwrap()
        }
        // A close waits for the destructor. A drop waits for no longer than the grace period.
        if by_drop {
            mark.wait();
        }
        assert!(mark.path.exists(), "the library's destructor ran");
        assert!(worker.is_alive());
    }
}

#[test]
fn closing_under_fire_loses_no_call() {
    let _watchdog = watchdog(120);
    let worker = Worker::spawn().unwrap();
    for round in 0..40 {
        let session = worker.session().unwrap();
        let add = load(&session).function::<fn(i32, i32) -> i32>("add").unwrap();
        let barrier = Barrier::new(4);
        std::thread::scope(|scope| {
            for submits in [false, false, true] {
                let (add, barrier) = (&add, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    for i in 0.. {
                        let outcome =
                            if submits { add.submit(i, 1).and_then(|t| t.wait()) } else { add.call(i, 1) };
                        match outcome {
                            Ok(sum) => assert_eq!(sum, i + 1),
                            Err(error) => {
                                assert!(matches!(error, CallError::Closed), "round {round}: {error:?}");
                                break;
                            }
                        }
                    }
                });
            }
            barrier.wait();
            std::thread::sleep(Duration::from_micros(200));
            session.close().unwrap();
        });
    }
    assert!(worker.is_alive());
}

#[test]
fn two_hundred_sessions_leave_nothing_in_host_or_worker() {
    isolated("two_hundred_sessions_leave_nothing_in_host_or_worker", 120, || {
        let (me, worker) = (std::process::id(), Worker::spawn().unwrap());
        let pid = worker.pid();
        let round = |count: usize| {
            for i in 0..count {
                let session = worker.session().unwrap();
                let module = load(&session);
                let touch = module.function::<fn(InOut<[u8]>, u64) -> u64>("touch").unwrap();
                let mut bytes = vec![1; 200_000];
                assert_eq!(touch.call(&mut bytes, 200_000).unwrap(), 200_000);
                session.alloc(100_000).unwrap();
                let block = session.block(100_000).unwrap();
                match i % 3 {
                    0 => session.close().unwrap(),
                    1 => drop(session),
                    _ => drop(touch.submit(&mut bytes, 200_000).unwrap()),
                }
                drop(block);
            }
        };
        let measure = || {
            until("the sessions' threads to end", || (threads(pid) == 1).then_some(()));
            until("the sessions' mappings to go", || {
                // One is the crash page, which both have mapped for as long as the worker lives.
                (region_mappings(me) == 1 && region_mappings(pid) <= 1).then_some(())
            });
            let counts = [me, pid].map(|pid| (descriptors(pid), threads(pid)));
            (counts, kib(me, "VmRSS"), kib(pid, "VmRSS"))
        };
        round(30);
        let before = measure();
        round(200);
        let after = measure();
        assert_eq!(after.0, before.0, "descriptors and threads of host and worker");
        eprintln!("resident: host {} to {} KiB, worker {} to {} KiB", before.1, after.1, before.2, after.2);
        assert!(after.1 < before.1 + 8192, "the host grew from {} to {} KiB", before.1, after.1);
        assert!(after.2 < before.2 + 8192, "the worker grew from {} to {} KiB", before.2, after.2);
    });
}

#[test]
fn a_hundred_workers_started_by_eight_threads_come_and_go() {
    isolated("a_hundred_workers_started_by_eight_threads_come_and_go", 120, || {
        let me = std::process::id();
        Worker::spawn().unwrap().dispose();
        until("the first worker to be forgotten", || (process::pidfds(me) == 0).then_some(()));
        let before = (descriptors(me), threads(me));
        let workers: Vec<Worker> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|thread| {
                    scope.spawn(move || {
                        let count = if thread < 4 { 13 } else { 12 };
                        (0..count)
                            .map(|i| {
                                let worker = Worker::spawn().unwrap();
                                assert_eq!(add_of(&worker).call(i, thread).unwrap(), i + thread);
                                worker
                            })
                            .collect::<Vec<_>>()
                    })
                })
                .collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        let pids: HashSet<u32> = workers.iter().map(Worker::pid).collect();
        assert_eq!(pids.len(), 100);
        assert_eq!(process::workers_of(me).into_iter().collect::<HashSet<u32>>(), pids);
        // A thread that was joined is seen by the kernel for a moment longer.
        until("the starting threads to end, and no thread for each worker", || {
            (threads(me) == before.1).then_some(())
        });
        drop(workers);
        until("the workers to go", || process::workers_of(me).is_empty().then_some(()));
        until("their descriptors to go", || (descriptors(me) == before.0).then_some(()));
        assert_eq!(process::zombies(), Vec::<u32>::new());
    });
}

#[test]
fn running_out_of_descriptors_is_an_error_that_leaves_nothing() {
    isolated("running_out_of_descriptors_is_an_error_that_leaves_nothing", 120, || {
        let me = std::process::id();
        let steady = Worker::spawn().unwrap();
        let add = add_of(&steady);
        let before = descriptors(me);
        let lowest_free = (0..).find(|fd| before.iter().all(|(open, _)| open != fd)).unwrap();
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let (mut refused, mut started) = (0, 0);
        for room in 0..24 {
            // Descriptors from this number on are not to be had. What is open stays open.
            setrlimit(Resource::RLIMIT_NOFILE, u64::from(lowest_free) + room, hard).unwrap();
            let spawned = Worker::spawn();
            let opened = spawned.as_ref().ok().map(Worker::session);
            let session = steady.session();
            setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
            match (&spawned, opened) {
                (Ok(_), Some(Ok(session))) => {
                    session.ping().unwrap();
                    started += 1;
                }
                (
                    Ok(_),
                    Some(Err(StartError::System { .. } | StartError::Died(_) | StartError::Refused { .. })),
                ) => refused += 1,
                (Err(StartError::System { .. } | StartError::Program { .. } | StartError::Died(_)), None) => {
                    refused += 1
                }
                other => panic!("with room for {room}: {other:?}"),
            }
            match session {
                Ok(session) => session.ping().unwrap(),
                Err(error) => assert!(matches!(error, StartError::System { .. }), "{error:?}"),
            }
            assert_eq!(add.call(40, 2).unwrap(), 42);
            drop(spawned);
            until("everything else to go", || (process::workers_of(me) == [steady.pid()]).then_some(()));
            until("its descriptors to go", || (descriptors(me) == before).then_some(()));
        }
        assert_eq!(process::zombies(), Vec::<u32>::new());
        eprintln!("{refused} refused, {started} started");
        assert!(refused > 3 && started > 3);
    });
}

fn say(worker: &Worker) -> Function<fn(i32, In<str>) -> i32> {
    module_of(worker).function("say").unwrap()
}

#[test]
fn captured_output_comes_as_events_in_order_and_the_end_comes_last() {
    let _watchdog = watchdog(120);
    let worker = Worker::spawn().unwrap();
    let (first, second) = (worker.events(), worker.events());
    let module = module_of(&worker);
    let say = module.function::<fn(i32, In<str>) -> i32>("say").unwrap();
    let mut expected = [String::new(), String::new()];
    for i in 0..50 {
        for (fd, expected) in (1..).zip(&mut expected) {
            let text = format!("{fd}:{i};");
            say.call(fd, &text).unwrap();
            *expected += &text;
        }
    }
    // Written, and then ended at once: nothing of it is lost.
    let leave = module.function::<fn(i32)>("leave").unwrap();
    let Err(CallError::Crashed(report)) = leave.call(9) else { panic!("it has left") };
    assert_eq!(report.exit_code(), Some(9));
    assert_eq!(report.stderr_tail(), expected[1]);
    for events in [first, second] {
        let mut said = [Vec::new(), Vec::new()];
        let mut ends = 0;
        for event in &events {
            assert_eq!(ends, 0, "the end comes last");
            match event {
                WorkerEvent::Stdout(piece) => said[0].extend(piece),
                WorkerEvent::Stderr(piece) => said[1].extend(piece),
                WorkerEvent::Ended(report) => {
                    assert_eq!(report.exit_code(), Some(9));
                    ends += 1;
                }
                _ => panic!("{event:?}"),
            }
        }
        // The loop ended by itself: after the end nobody sends any more.
        assert_eq!(ends, 1);
        assert_eq!(said.map(|bytes| String::from_utf8(bytes).unwrap()), expected);
    }
    assert_eq!(worker.stdout_tail(), expected[0].as_bytes());
    assert_eq!(worker.stderr_tail(), expected[1].as_bytes());
    // Whoever listens only now hears of the end alone.
    let late: Vec<_> = worker.events().iter().collect();
    assert!(matches!(&late[..], [WorkerEvent::Ended(report)] if report.exit_code() == Some(9)));
}

#[test]
fn a_flood_of_output_neither_blocks_the_worker_nor_fills_the_host() {
    isolated("a_flood_of_output_neither_blocks_the_worker_nor_fills_the_host", 120, || {
        const MIB: i32 = 100;
        let worker = Worker::spawn().unwrap();
        // One listener that never listens, one that has gone.
        let unread = worker.events();
        drop(worker.events());
        let module = module_of(&worker);
        let flood = module.function::<fn(i32, i32) -> i32>("flood").unwrap();
        let flood = flood.with_timeout(Duration::from_secs(100)).unwrap();
        assert_eq!(flood.call(1, 1).unwrap(), 1);
        let before = kib(std::process::id(), "VmRSS");
        for fd in [1, 2] {
            assert_eq!(flood.call(fd, MIB).unwrap(), MIB);
        }
        let after = kib(std::process::id(), "VmRSS");
        assert!(after < before + 24 * 1024, "{before} KiB before, {after} KiB after");
        assert_eq!(worker.stdout_tail(), vec![b'x'; OUTPUT_TAIL_BYTES]);
        worker.dispose();
        let events: Vec<_> = unread.iter().collect();
        assert!(events.len() < 1000, "{} events were kept for somebody who does not listen", events.len());
        assert!(matches!(events.last(), Some(WorkerEvent::Ended(_))));
    });
}

#[test]
fn discarded_output_goes_nowhere() {
    let _watchdog = watchdog(120);
    let worker = Worker::builder().stdout(Output::Discard).stderr(Output::Discard).spawn().unwrap();
    let events = worker.events();
    let say = say(&worker);
    assert_eq!(say.call(1, "one").unwrap(), 3);
    assert_eq!(say.call(2, "two").unwrap(), 3);
    let targets: Vec<_> =
        descriptors(worker.pid()).into_iter().filter(|(fd, _)| *fd < 3).map(|(_, to)| to).collect();
    assert_eq!(targets, ["/dev/null"; 3]);
    worker.dispose();
    assert!(worker.stdout_tail().is_empty() && worker.stderr_tail().is_empty());
    assert!(matches!(&events.iter().collect::<Vec<_>>()[..], [WorkerEvent::Ended(_)]));
}

#[test]
fn inherited_output_goes_to_the_hosts_own() {
    const NAME: &str = "inherited_output_goes_to_the_hosts_own";
    if std::env::var_os("HOTCELL_TEST_INHERIT").is_some() {
        let worker = Worker::builder().stdout(Output::Inherit).stderr(Output::Inherit).spawn().unwrap();
        let say = say(&worker);
        say.call(1, "said on standard output\n").unwrap();
        say.call(2, "said on standard error\n").unwrap();
        return;
    }
    let _watchdog = watchdog(120);
    let done = rerun(NAME).env("HOTCELL_TEST_INHERIT", "1").output().unwrap();
    assert!(done.status.success());
    assert!(String::from_utf8_lossy(&done.stdout).contains("said on standard output"));
    assert!(String::from_utf8_lossy(&done.stderr).contains("said on standard error"));
}

#[test]
fn the_working_directory_is_the_one_that_was_configured() {
    let _watchdog = watchdog(120);
    let folder = tempfile::tempdir().unwrap();
    let worker = Worker::builder().current_dir(folder.path()).spawn().unwrap();
    let there = std::fs::read_link(format!("/proc/{}/cwd", worker.pid())).unwrap();
    assert_eq!(there, folder.path().canonicalize().unwrap());
    let missing = Worker::builder().current_dir("/no/such/folder").spawn();
    assert!(matches!(missing, Err(StartError::Configuration { .. })), "{missing:?}");
    let worker = Worker::spawn().unwrap();
    let there = std::fs::read_link(format!("/proc/{}/cwd", worker.pid())).unwrap();
    assert_eq!(there, Path::new(".").canonicalize().unwrap());
}

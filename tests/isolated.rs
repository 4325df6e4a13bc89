//! `IsolatedProcess`: its methods, events and error modes; and the defects of its namesake, none of which it may have.

#[path = "common/in_time.rs"]
mod in_time;

use hotcell::{
    CallError, Cause, Error, ErrorMode, Event, EventData, Exit, IsolatedProcess, IsolatedProcessConfig,
    LoadError, Module, StartError, Value, Worker, create_isolated_process,
};
use in_time::in_time;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Barrier, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

const FIXTURE: &str = r#"
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char unload_mark[4096];
static int counter;

int add(int a, int b) { return a + b; }
int count(void) { return ++counter; }
const char *greet(void) { return "hello"; }
void nothing(void) {}
void boom(void) { *(volatile int *)0 = 1; }
void leave(int code) { exit(code); }
void hang(void) { for (;;) pause(); }
void say(const char *text) { if (write(1, text, strlen(text)) < 0) abort(); }
void complain(const char *text) { if (write(2, text, strlen(text)) < 0) abort(); }
void say_and_hang(void) { say("hanging"); hang(); }
void say_and_sleep(int ms) { say("sleeping"); usleep(ms * 1000); }
void ignore_sigterm(void) { signal(SIGTERM, SIG_IGN); }
void mark_on_unload(const char *path) { strncpy(unload_mark, path, sizeof unload_mark - 1); }

__attribute__((constructor)) static void loaded(void) {
#if LOAD == 1
    boom();
#elif LOAD == 2
    exit(0);
#elif LOAD == 3
    hang();
#endif
}

__attribute__((destructor)) static void unloaded(void) {
#if LOAD == 4
    hang();
#endif
    if (unload_mark[0]) {
        FILE *mark = fopen(unload_mark, "w");
        if (mark) fclose(mark);
    }
}
"#;

const SYMBOLS: &str = r#"{
    "add": {"args": ["i32", "i32"], "returns": "i32"},
    "plus": {"symbol": "add", "args": ["i32", "i32"], "returns": "i32"},
    "count": {"returns": "i32"},
    "greet": {"returns": "cstring"},
    "nothing": {},
    "boom": {},
    "leave": {"args": ["i32"]},
    "hang": {},
    "say_and_hang": {},
    "say_and_sleep": {"args": ["i32"]},
    "say": {"args": ["cstring"]},
    "complain": {"args": ["cstring"]},
    "ignore_sigterm": {},
    "mark_on_unload": {"args": ["cstring"]}
}"#;

/// What the module does besides having functions.
#[derive(Clone, Copy)]
enum Kind {
    Good = 0,
    CrashesOnLoad = 1,
    ExitsOnLoad = 2,
    HangsOnLoad = 3,
    HangsOnUnload = 4,
}

fn module(kind: Kind) -> PathBuf {
    static BUILT: OnceLock<(tempfile::TempDir, Vec<PathBuf>)> = OnceLock::new();
    let (_, paths) = BUILT.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap();
        let source = directory.path().join("fixture.c");
        std::fs::write(&source, FIXTURE).unwrap();
        let build = |kind: u32| {
            let path = directory.path().join(format!("libfixture{kind}.so"));
            let status = Command::new("cc")
                .args(["-shared", "-fPIC", "-O1", &format!("-DLOAD={kind}"), "-o"])
                .args([&path, &source])
                .status();
            assert!(status.expect("a C compiler named cc is needed").success());
            path
        };
        let paths = (0..5).map(build).collect();
        (directory, paths)
    });
    paths[kind as usize].clone()
}

/// Aborts the test process if the test takes too long: a hang fails.
struct Watchdog(Arc<AtomicBool>);

fn watchdog() -> Watchdog {
    let done = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&done);
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    std::thread::spawn(move || {
        let started = Instant::now();
        while !seen.load(SeqCst) {
            if started.elapsed() > Duration::from_secs(600) {
                eprintln!("{test} hangs");
                std::process::abort();
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    Watchdog(done)
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

fn config(kind: Kind) -> IsolatedProcessConfig {
    IsolatedProcessConfig::new(module(kind), SYMBOLS)
}

fn short_grace() -> hotcell::WorkerBuilder {
    Worker::builder().grace(Duration::from_millis(200))
}

/// What was started; `None` if the timeout passed before the module was loaded.
fn loaded_in_time<T: std::fmt::Debug>(started: Result<T, Error>) -> Option<T> {
    match started {
        Err(Error::Load(LoadError::Call { source: CallError::TimedOut { .. }, .. })) => None,
        done => Some(done.unwrap()),
    }
}

fn start() -> IsolatedProcess {
    config(Kind::Good).start().unwrap()
}

fn add(cell: &IsolatedProcess) -> i32 {
    cell.call("add", (2, 3)).unwrap().try_into().unwrap()
}

/// Waits until a process has ended and been collected; the watchdog is the limit.
fn wait_gone(pid: u32) {
    while exists(pid) {
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Whether there is a worker process of this number, dead or alive.
fn exists(pid: u32) -> bool {
    std::fs::read(format!("/proc/{pid}/cmdline"))
        .is_ok_and(|line| line.is_empty() || line.starts_with(b"hotcell-worker"))
}

fn wait_until(what: impl Fn() -> bool) {
    while !what() {
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Collects what is told, as text.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    fn add(&self, line: impl Into<String>) {
        self.0.lock().unwrap().push(line.into());
    }
    fn lines(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
    fn wait_for(&self, count: usize) -> Vec<String> {
        wait_until(|| self.lines().len() >= count);
        self.lines()
    }
}

/// After this returns, everything that was queued for handlers before has been handled.
fn settle_events(cell: &IsolatedProcess) {
    let (sender, done) = std::sync::mpsc::channel();
    cell.once(Event::Ready, move |_| sender.send(()).unwrap());
    assert!(cell.emit(EventData::Ready { pid: 0 }));
    done.recv().unwrap();
}

// Calls.

#[test]
fn functions_are_called_by_their_declared_names() {
    let _watchdog = watchdog();
    let cell = start();
    assert_eq!(add(&cell), 5);
    assert_eq!(cell.call("greet", ()).unwrap(), Value::CString(c"hello".into()));
    assert_eq!(cell.call("nothing", ()).unwrap(), Value::Void);
    assert_eq!(cell.function("add").unwrap().call((4, 5)).unwrap(), Value::Signed(9));
}

/// BunNativeKit's worker looked functions up by the key and ignored `symbol`.
#[test]
fn a_renamed_symbol_is_called_by_its_new_name() {
    let _watchdog = watchdog();
    let cell = start();
    assert_eq!(cell.call("plus", (20, 22)).unwrap(), Value::Signed(42));
}

#[test]
fn symbols_may_be_c_prototypes() {
    let _watchdog = watchdog();
    let cell = IsolatedProcess::start(module(Kind::Good), "int add(int a, int b); const char *greet(void);")
        .unwrap();
    assert_eq!(add(&cell), 5);
}

/// BunNativeKit turned type names that it did not know into `void`.
#[test]
fn an_unknown_type_is_refused_before_anything_is_started() {
    let _watchdog = watchdog();
    let config = IsolatedProcessConfig::new("libc.so.6", r#"{"f": {"args": ["int128"], "returns": "i32"}}"#);
    let error = create_isolated_process(config).unwrap_err();
    assert!(matches!(error, Error::Load(LoadError::Signature { .. })), "{error}");
    assert!(error.to_string().contains("libc.so.6") && error.to_string().contains("int128"), "{error}");
}

#[test]
fn wrong_calls_are_refused_and_do_no_harm() {
    let _watchdog = watchdog();
    let cell = start();
    let pid = cell.pid();
    assert!(
        matches!(cell.call("missing", ()), Err(CallError::Undeclared(name)) if &*name.symbol == "missing")
    );
    assert!(matches!(cell.function("missing"), Err(CallError::Undeclared(_))));
    assert!(matches!(cell.call("add", [1]), Err(CallError::WrongCount { expected: 2, given: 1, .. })));
    assert!(matches!(cell.call("add", (1, "x")), Err(CallError::WrongArgument { index: 2, .. })));
    assert_eq!((add(&cell), cell.pid()), (5, pid));
}

#[test]
fn a_session_of_the_process_reaches_its_memory() {
    let _watchdog = watchdog();
    let cell = start();
    let session = cell.session().unwrap();
    let pointer = session.alloc(16).unwrap();
    session.write(pointer, b"from the host\0").unwrap();
    let output = cell.receiver(&[Event::Stdout]);
    cell.call("say", [pointer]).unwrap();
    assert_eq!(output.recv().unwrap().to_string(), "from the host");
    cell.shutdown();
    assert!(cell.session().is_none());
    assert!(session.alloc(16).is_err());
}

// Life.

#[test]
fn a_created_process_runs_from_its_launch_on() {
    let _watchdog = watchdog();
    let cell = create_isolated_process(config(Kind::Good)).unwrap();
    assert!(!cell.is_alive() && cell.pid().is_none() && cell.last_report().is_none());
    assert!(cell.session().is_none());
    let error = cell.call("add", (2, 3)).unwrap_err();
    assert!(matches!(error, CallError::NotRunning { .. }), "{error}");
    assert!(!error.may_have_run() && !error.session_usable());
    assert!(matches!(cell.function("add"), Err(CallError::NotRunning { .. })));
    cell.shutdown();
    cell.launch().unwrap();
    assert_eq!(add(&cell), 5);
}

#[test]
fn launching_a_running_process_changes_nothing() {
    let _watchdog = watchdog();
    let cell = start();
    let pid = cell.pid();
    cell.launch().unwrap();
    assert_eq!(cell.pid(), pid);
    assert!(matches!(cell.call("leave", [0]), Err(CallError::Crashed(_))));
    cell.launch().unwrap();
    assert!(cell.is_alive() && cell.pid() != pid);
}

#[test]
fn a_crashed_process_answers_why_until_it_is_restarted() {
    let _watchdog = watchdog();
    let cell = start();
    let pid = cell.pid().unwrap();
    let Err(CallError::Crashed(report)) = cell.call("boom", ()) else { panic!("boom returned") };
    assert_eq!((report.signal(), report.pid()), (Some(11), pid));
    assert_eq!(&*report.culprit().unwrap().symbol, "boom");
    assert!(!cell.is_alive() && cell.pid().is_none());
    assert_eq!(cell.last_report().unwrap().signal(), Some(11));
    for _ in 0..3 {
        let error = cell.call("add", (2, 3)).unwrap_err();
        assert!(matches!(&error, CallError::Crashed(report) if report.signal() == Some(11)), "{error}");
        assert!(!error.may_have_run());
    }
    cell.restart().unwrap();
    assert!(cell.is_alive());
    assert_eq!(add(&cell), 5);
    assert_eq!(cell.last_report().unwrap().pid(), pid, "the report outlives the restart");
}

#[test]
fn a_restart_loads_the_module_anew_in_another_process() {
    let _watchdog = watchdog();
    let cell = start();
    let pid = cell.pid().unwrap();
    assert_eq!(cell.call("count", ()).unwrap(), Value::Signed(1));
    assert_eq!(cell.call("count", ()).unwrap(), Value::Signed(2));
    let old = cell.function("count").unwrap();
    cell.restart().unwrap();
    assert_ne!(cell.pid().unwrap(), pid);
    assert!(!exists(pid));
    assert_eq!(cell.call("count", ()).unwrap(), Value::Signed(1));
    assert!(matches!(old.call(()), Err(CallError::Disposed(_) | CallError::Closed)));
    assert_eq!(*cell.last_report().unwrap().cause(), Cause::Disposed);
}

/// BunNativeKit's `restart()` was `shutdown()` and `start()`. The SIGKILL timer of the shutdown looked at "the process" when it fired a second later, and
/// killed the new one; and when the old one exited, its handler took the new one's handle away and failed its calls.
#[test]
fn a_restarted_process_outlives_the_timer_and_the_exit_of_the_old_one() {
    let _watchdog = watchdog();
    let grace = Duration::from_millis(100);
    let cell = config(Kind::Good).worker(Worker::builder().grace(grace)).start().unwrap();
    let old = cell.pid().unwrap();
    // An old process that hangs and withstands SIGTERM needs both grace periods and the SIGKILL.
    cell.call("ignore_sigterm", ()).unwrap();
    let deaths = cell.receiver(&[Event::Death]);
    let output = cell.receiver(&[Event::Stdout]);
    std::thread::scope(|scope| {
        let hanging = scope.spawn(|| cell.call("say_and_hang", ()));
        output.recv().unwrap();
        cell.restart().unwrap();
        assert!(matches!(hanging.join().unwrap(), Err(CallError::Disposed(_))));
    });
    let new = cell.pid().unwrap();
    assert!(!exists(old));
    for _ in 0..10 {
        std::thread::sleep(grace / 2);
        assert_eq!(add(&cell), 5);
    }
    assert_eq!(cell.pid(), Some(new));
    assert!(deaths.is_empty(), "{deaths:?}");
}

/// As above with an exit of the old process that is still on its way through the host when the new one starts.
#[test]
fn a_restart_right_after_a_crash_is_not_hit_by_the_old_exit() {
    let _watchdog = watchdog();
    let cell = create_isolated_process(config(Kind::Good)).unwrap();
    let events = cell.receiver(&[Event::Ready, Event::Death]);
    cell.launch().unwrap();
    for _ in 0..10 {
        assert!(matches!(cell.call("boom", ()), Err(CallError::Crashed(_))));
        cell.restart().unwrap();
        assert_eq!(add(&cell), 5);
    }
    let told: Vec<Event> = events.try_iter().map(|data| data.event()).collect();
    let mut expected = [Event::Ready, Event::Death].repeat(10);
    expected.push(Event::Ready);
    assert_eq!(told, expected);
}

/// BunNativeKit's `shutdown()` forgot the process before its SIGKILL timer fired, so a hung worker was left behind for ever.
#[test]
fn shutdown_kills_a_process_that_hangs_and_ignores_sigterm() {
    let _watchdog = watchdog();
    let cell = config(Kind::Good).worker(short_grace()).start().unwrap();
    let pid = cell.pid().unwrap();
    cell.call("ignore_sigterm", ()).unwrap();
    let output = cell.receiver(&[Event::Stdout]);
    std::thread::scope(|scope| {
        let hanging = scope.spawn(|| cell.call("say_and_hang", ()));
        output.recv().unwrap();
        cell.shutdown();
        assert!(!exists(pid), "gone when shutdown returns");
        let error = hanging.join().unwrap().unwrap_err();
        assert!(matches!(error, CallError::Disposed(_)), "{error}");
        assert!(error.may_have_run());
    });
    assert_eq!(*cell.last_report().unwrap().cause(), Cause::Disposed);
}

/// BunNativeKit reported `ready` after a load that had failed, and the first call said "No module loaded".
#[test]
fn a_failed_load_is_an_error_of_the_start_and_never_ready() {
    let _watchdog = watchdog();
    type Expected = fn(&Error) -> bool;
    let cases: [(PathBuf, &str, Expected); 4] = [
        ("./no-such-library.so".into(), "void f(void);", |e| {
            matches!(e, Error::Load(LoadError::NotFound { .. }))
        }),
        (module(Kind::Good), "void no_such_symbol(void);", |e| {
            matches!(e, Error::Load(LoadError::MissingSymbol { .. }))
        }),
        (module(Kind::CrashesOnLoad), SYMBOLS, |e| {
            e.crash_report().and_then(hotcell::CrashReport::signal) == Some(11)
        }),
        (module(Kind::ExitsOnLoad), SYMBOLS, |e| {
            e.crash_report().and_then(hotcell::CrashReport::exit_code) == Some(0)
        }),
    ];
    for (path, symbols, is_expected) in cases {
        let cell = create_isolated_process(IsolatedProcessConfig::new(path, symbols)).unwrap();
        let ready = cell.receiver(&[Event::Ready]);
        for start in [IsolatedProcess::launch, IsolatedProcess::restart] {
            let error = start(&cell).unwrap_err();
            assert!(is_expected(&error), "{error:?}");
            assert!(!cell.is_alive());
            assert!(matches!(cell.call("add", (2, 3)), Err(CallError::NotRunning { .. })));
        }
        assert!(ready.is_empty());
        assert!(!exists(cell.last_report().unwrap().pid()));
    }
}

/// BunNativeKit's `start()` had no deadline, and did not notice that the worker had gone.
#[test]
fn a_module_that_hangs_on_load_fails_the_start_and_is_killed() {
    let _watchdog = watchdog();
    let config = config(Kind::HangsOnLoad).timeout(Duration::from_millis(100));
    let cell = create_isolated_process(config).unwrap();
    let events = cell.receiver(&[Event::Ready, Event::Death]);
    let error = cell.launch().unwrap_err();
    assert!(
        matches!(&error, Error::Load(LoadError::Call { source: CallError::TimedOut { .. }, .. })),
        "{error:?}"
    );
    let EventData::Death(report) = events.recv().unwrap() else { panic!("ready") };
    assert!(matches!(report.cause(), Cause::DeadlineExceeded { .. }), "{report}");
    assert!(!exists(report.pid()));
}

/// A timeout of BunNativeKit dropped the call and left the worker stuck in it: every later call queued behind it and timed out too.
#[test]
fn a_timeout_kills_the_worker_and_a_restart_serves_again() {
    let _watchdog = watchdog();
    in_time(Duration::from_millis(500), |timeout| {
        let cell = loaded_in_time(config(Kind::Good).timeout(timeout).start())?;
        let pid = cell.pid().unwrap();
        let deaths = cell.receiver(&[Event::Death]);
        assert!(matches!(cell.call("hang", ()), Err(CallError::TimedOut { worker_killed: true, .. })));
        let EventData::Death(report) = deaths.recv().unwrap() else { panic!("not a death") };
        assert!(matches!(report.cause(), Cause::DeadlineExceeded { .. }), "{report}");
        wait_gone(pid);
        assert!(matches!(cell.call("nothing", ()), Err(CallError::Crashed(_))));
        loaded_in_time(cell.restart())?;
        match cell.call("nothing", ()) {
            Err(CallError::TimedOut { .. }) => return None,
            done => drop(done.unwrap()),
        }
        Some(())
    });
}

#[test]
fn shutdown_runs_the_destructors_of_the_module() {
    let _watchdog = watchdog();
    let directory = tempfile::tempdir().unwrap();
    for restart in [false, true] {
        let mark = directory.path().join(if restart { "restart" } else { "shutdown" });
        let cell = start();
        let pid = cell.pid().unwrap();
        cell.call("mark_on_unload", [mark.to_str().unwrap()]).unwrap();
        if restart {
            cell.restart().unwrap()
        } else {
            cell.shutdown()
        }
        assert!(mark.exists());
        assert!(!exists(pid));
    }
}

#[test]
fn shutdown_lets_a_call_in_flight_finish() {
    let _watchdog = watchdog();
    let cell = config(Kind::Good).worker(Worker::builder().grace(Duration::from_secs(60))).start().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let mark = directory.path().join("unloaded");
    cell.call("mark_on_unload", [mark.to_str().unwrap()]).unwrap();
    let output = cell.receiver(&[Event::Stdout]);
    std::thread::scope(|scope| {
        let call = scope.spawn(|| cell.call("say_and_sleep", [300]));
        output.recv().unwrap();
        cell.shutdown();
        assert_eq!(call.join().unwrap().unwrap(), Value::Void);
    });
    assert!(mark.exists());
}

#[test]
fn shutdown_survives_a_destructor_that_hangs() {
    let _watchdog = watchdog();
    let cell = config(Kind::HangsOnUnload).worker(short_grace()).start().unwrap();
    let pid = cell.pid().unwrap();
    let deaths = cell.receiver(&[Event::Death]);
    cell.shutdown();
    assert!(!exists(pid));
    assert_eq!(*cell.last_report().unwrap().cause(), Cause::Disposed);
    assert!(deaths.is_empty());
}

/// As a failed start with a destructor that hangs: the polite close of a dropped session would take the whole call timeout.
#[test]
fn a_failed_start_survives_a_destructor_that_hangs() {
    let _watchdog = watchdog();
    let config = IsolatedProcessConfig::new(module(Kind::HangsOnUnload), "void no_such_symbol(void);")
        .timeout(Duration::from_secs(3600))
        .worker(short_grace());
    let cell = create_isolated_process(config).unwrap();
    assert!(matches!(cell.launch(), Err(Error::Load(LoadError::MissingSymbol { .. }))));
    assert_eq!(*cell.last_report().unwrap().cause(), Cause::Disposed);
}

#[test]
fn shutting_down_twice_and_from_many_threads_is_the_same_as_once() {
    let _watchdog = watchdog();
    let cell = start();
    let pid = cell.pid().unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                cell.shutdown();
                assert!(!exists(pid));
            });
        }
    });
    cell.shutdown();
    assert!(matches!(cell.call("add", (1, 2)), Err(CallError::NotRunning { .. })));
    cell.restart().unwrap();
    assert_eq!(add(&cell), 5);
}

#[test]
fn shutdown_during_a_load_does_not_wait_for_the_module() {
    let _watchdog = watchdog();
    let config = config(Kind::HangsOnLoad).timeout(Duration::from_secs(3600));
    let cell = create_isolated_process(config).unwrap();
    let events = cell.receiver(&[Event::Ready, Event::Death]);
    std::thread::scope(|scope| {
        let launch = scope.spawn(|| cell.launch());
        // Whatever it hits: before the spawn, during it, during the load. The first may miss it.
        while !launch.is_finished() {
            cell.shutdown();
            std::thread::sleep(Duration::from_millis(1));
        }
        let error = launch.join().unwrap().unwrap_err();
        let disposed = matches!(
            &error,
            Error::Start(StartError::Disposed)
                | Error::Load(LoadError::Call { source: CallError::Disposed(_), .. })
        );
        assert!(disposed, "{error:?}");
    });
    assert!(events.is_empty(), "{events:?}");
}

#[test]
fn dropping_without_shutdown_leaves_no_process() {
    let _watchdog = watchdog();
    let cell = start();
    let (pid, function) = (cell.pid().unwrap(), cell.function("add").unwrap());
    drop(cell);
    wait_gone(pid);
    assert!(matches!(function.call((2, 3)), Err(CallError::Disposed(_))));

    let cell = config(Kind::Good).worker(short_grace()).start().unwrap();
    let pid = cell.pid().unwrap();
    cell.call("ignore_sigterm", ()).unwrap();
    drop(cell);
    wait_gone(pid);

    let cell = Arc::new(start());
    let pid = cell.pid().unwrap();
    let hanging = cell.function("say_and_hang").unwrap();
    let output = cell.receiver(&[Event::Stdout]);
    let call = std::thread::spawn(move || hanging.call(()));
    output.recv().unwrap();
    drop(cell);
    wait_gone(pid);
    assert!(matches!(call.join().unwrap(), Err(CallError::Disposed(_))));
}

#[test]
fn a_worker_that_is_disposed_by_its_own_handle_is_no_crash_and_can_be_restarted() {
    let _watchdog = watchdog();
    let cell = start();
    let deaths = cell.receiver(&[Event::Death]);
    let output = cell.receiver(&[Event::Stdout]);
    let worker = cell.session().unwrap().worker();
    std::thread::scope(|scope| {
        let hanging = scope.spawn(|| cell.call("say_and_hang", ()));
        output.recv().unwrap();
        worker.dispose();
        worker.dispose();
        assert!(matches!(hanging.join().unwrap(), Err(CallError::Disposed(_))));
    });
    assert!(!cell.is_alive() && !exists(worker.pid()));
    assert!(matches!(cell.call("add", (2, 3)), Err(CallError::Disposed(_))));
    cell.restart().unwrap();
    assert_eq!(add(&cell), 5);
    assert!(deaths.is_empty());
}

#[test]
fn restarts_under_load_give_results_or_clear_errors() {
    let _watchdog = watchdog();
    let cell = start();
    let stop = AtomicBool::new(false);
    let (good, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut n = 0;
                while !stop.load(SeqCst) {
                    n += 1;
                    match cell.call("add", (n, 1)) {
                        Ok(sum) => {
                            assert_eq!(sum, Value::Signed((n + 1).into()));
                            good.fetch_add(1, SeqCst);
                        }
                        Err(CallError::NotRunning { .. } | CallError::Closed | CallError::Disposed(_)) => {
                            refused.fetch_add(1, SeqCst);
                            std::thread::yield_now();
                        }
                        Err(other) => panic!("{other:?}"),
                    }
                }
            });
        }
        for restarter in 0..2 {
            let (cell, stop, good) = (&cell, &stop, &good);
            scope.spawn(move || {
                for _ in 0..10 {
                    let before = good.load(SeqCst);
                    cell.restart().unwrap();
                    if restarter == 0 {
                        wait_until(|| good.load(SeqCst) > before);
                    }
                }
                if restarter == 0 {
                    stop.store(true, SeqCst);
                }
            });
        }
    });
    assert!(good.load(SeqCst) >= 10);
    assert_eq!(add(&cell), 5);
}

#[test]
fn crashes_and_restarts_from_many_threads_end_in_a_running_process() {
    let _watchdog = watchdog();
    let cell = start();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..5 {
                    if cell.call("boom", ()).is_err() {
                        cell.restart().unwrap();
                    }
                }
            });
        }
    });
    assert_eq!(add(&cell), 5);
}

// Error modes.

#[test]
fn mode_null_gives_null_for_every_failure() {
    let _watchdog = watchdog();
    let cell = config(Kind::Good).on_error(ErrorMode::Null).start().unwrap();
    assert_eq!(cell.call("add", (2, 3)).unwrap(), Value::Signed(5));
    assert_eq!(cell.call("missing", ()).unwrap(), Value::Null);
    assert_eq!(cell.call("add", ("x", 1)).unwrap(), Value::Null);
    assert_eq!(cell.call("boom", ()).unwrap(), Value::Null);
    assert_eq!(cell.call("add", (2, 3)).unwrap(), Value::Null);
    cell.shutdown();
    assert_eq!(cell.call("add", (2, 3)).unwrap(), Value::Null);
}

#[test]
fn mode_event_emits_each_failure_and_gives_null() {
    let _watchdog = watchdog();
    in_time(Duration::from_millis(500), |timeout| {
        let cell = loaded_in_time(config(Kind::Good).on_error(ErrorMode::Event).timeout(timeout).start())?;
        let errors = cell.receiver(&[Event::Error]);
        let next = || match errors.recv().unwrap() {
            EventData::Error(error) => error,
            other => panic!("{other:?}"),
        };
        if cell.call("add", (2, 3)).unwrap() != Value::Signed(5) {
            assert!(matches!(&*next(), CallError::TimedOut { .. }));
            return None;
        }
        assert!(errors.is_empty());
        assert_eq!(cell.call("missing", ()).unwrap(), Value::Null);
        assert!(matches!(&*next(), CallError::Undeclared(_)));
        assert_eq!(cell.call("hang", ()).unwrap(), Value::Null);
        assert!(matches!(&*next(), CallError::TimedOut { .. }));
        assert_eq!(cell.call("add", (2, 3)).unwrap(), Value::Null);
        assert!(matches!(&*next(), CallError::Crashed(_)));
        cell.remove_all_listeners(None);
        // Nobody listens: still no error, and no panic.
        assert_eq!(cell.call("add", (2, 3)).unwrap(), Value::Null);
        Some(())
    });
}

#[test]
fn mode_throw_emits_no_error_event() {
    let _watchdog = watchdog();
    let cell = start();
    let errors = cell.receiver(&[Event::Error]);
    assert!(cell.call("missing", ()).is_err());
    assert!(errors.is_empty());
}

// Events.

#[test]
fn ready_is_told_once_for_each_start() {
    let _watchdog = watchdog();
    let cell = create_isolated_process(config(Kind::Good)).unwrap();
    let log = Log::default();
    let told = log.clone();
    cell.on(Event::Ready, move |data| {
        let EventData::Ready { pid } = data else { panic!("{data}") };
        told.add(pid.to_string());
    });
    cell.launch().unwrap();
    let first = cell.pid().unwrap();
    cell.launch().unwrap();
    cell.restart().unwrap();
    let second = cell.pid().unwrap();
    settle_events(&cell);
    assert_eq!(log.wait_for(3), [first.to_string(), second.to_string(), "0".into()]);
}

#[test]
fn death_is_told_with_its_report_and_then_exit() {
    let _watchdog = watchdog();
    let cell = start();
    let events = cell.receiver(&[Event::Death, Event::Exit]);
    assert!(cell.call("boom", ()).is_err());
    let told: Vec<EventData> = (0..3).map(|_| events.recv().unwrap()).collect();
    let deaths: Vec<_> = told.iter().filter(|data| data.event() == Event::Death).collect();
    assert_eq!(deaths.len(), 1);
    assert_eq!(deaths[0].report().unwrap().signal(), Some(11));
    assert!(deaths[0].to_string().contains("SIGSEGV"), "{}", deaths[0]);
    let at = |pick: fn(&EventData) -> bool| told.iter().position(pick).unwrap();
    let death = at(|data| data.event() == Event::Death);
    assert!(death < at(|data| matches!(data, EventData::Exit(Exit::Death(_)))));
    at(|data| matches!(data, EventData::Exit(Exit::Error(_))));
}

/// BunNativeKit took an exit with code 0 for a clean end, even when native code had called `exit` in the middle of a call.
#[test]
fn an_exit_with_code_zero_is_a_death() {
    let _watchdog = watchdog();
    let cell = start();
    let deaths = cell.receiver(&[Event::Death]);
    assert!(matches!(cell.call("leave", [0]), Err(CallError::Crashed(_))));
    assert_eq!(deaths.recv().unwrap().report().unwrap().exit_code(), Some(0));
}

#[test]
fn a_kill_from_outside_is_told_without_any_call() {
    let _watchdog = watchdog();
    let cell = start();
    let deaths = cell.receiver(&[Event::Death]);
    let pid = nix::unistd::Pid::from_raw(cell.pid().unwrap().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    assert_eq!(deaths.recv().unwrap().report().unwrap().signal(), Some(9));
    assert!(!cell.is_alive());
}

#[test]
fn shutdown_restart_and_drop_are_no_death() {
    let _watchdog = watchdog();
    let cell = start();
    let events = cell.receiver(&[Event::Death, Event::Exit]);
    cell.restart().unwrap();
    cell.shutdown();
    cell.launch().unwrap();
    drop(cell);
    // Disconnected when the last process has ended.
    assert_eq!(events.iter().count(), 0);
}

#[test]
fn exit_is_told_for_each_call_only_while_somebody_listens() {
    let _watchdog = watchdog();
    let cell = start();
    cell.call("nothing", ()).unwrap();
    let exits = cell.receiver(&[Event::Exit]);
    cell.call("add", (2, 3)).unwrap();
    assert!(cell.call("missing", ()).is_err());
    let next = || match exits.try_recv().unwrap() {
        EventData::Exit(exit) => exit,
        other => panic!("{other:?}"),
    };
    assert!(matches!(next(), Exit::Success(Value::Signed(5))));
    let failed = next();
    assert!(matches!(&failed, Exit::Error(text) if text.contains("missing")), "{failed}");
    assert!(exits.is_empty());
}

#[test]
fn output_is_told_as_it_was_written() {
    let _watchdog = watchdog();
    let cell = start();
    let (sender, told) = std::sync::mpsc::channel();
    for event in [Event::Stdout, Event::Stderr] {
        let sender = sender.clone();
        cell.on(event, move |data| sender.send(data.clone()).unwrap());
    }
    cell.call("say", ["to stdout\u{1b}"]).unwrap();
    assert!(matches!(told.recv().unwrap(), EventData::Stdout(bytes) if bytes == b"to stdout\x1b"));
    cell.call("complain", ["to stderr"]).unwrap();
    let data = told.recv().unwrap();
    assert!(matches!(&data, EventData::Stderr(bytes) if bytes == b"to stderr"));
    assert_eq!(data.to_string(), "to stderr");
    cell.restart().unwrap();
    cell.call("say", ["again"]).unwrap();
    assert!(matches!(told.recv().unwrap(), EventData::Stdout(bytes) if bytes == b"again"));
}

#[test]
fn once_runs_once_and_off_takes_a_handler_back() {
    let _watchdog = watchdog();
    let cell = start();
    let log = Log::default();
    let (first, second, third) = (log.clone(), log.clone(), log.clone());
    cell.once(Event::Stdout, move |data| first.add(format!("once {data}")));
    cell.on(Event::Stdout, move |data| second.add(format!("on {data}")));
    let off = cell.on(Event::Stdout, move |data| third.add(format!("off {data}")));
    assert!(cell.off(off));
    assert!(!cell.off(off));
    for text in ["a", "b"] {
        assert!(cell.emit(EventData::Stdout(text.into())));
    }
    settle_events(&cell);
    assert_eq!(log.lines(), ["once a", "on a", "on b"]);
}

#[test]
fn removed_listeners_hear_nothing_and_their_channels_close() {
    let _watchdog = watchdog();
    let cell = start();
    let log = Log::default();
    let told = log.clone();
    cell.on(Event::Stdout, move |data| told.add(data.to_string()));
    let stdout = cell.receiver(&[Event::Stdout]);
    let both = cell.receiver(&[Event::Stdout, Event::Stderr]);
    cell.remove_all_listeners(Some(Event::Stdout));
    assert!(!cell.emit(EventData::Stdout(b"x".to_vec())));
    assert!(stdout.recv().is_err());
    assert!(cell.emit(EventData::Stderr(b"y".to_vec())));
    assert_eq!(both.recv().unwrap().to_string(), "y");
    cell.remove_all_listeners(None);
    assert!(both.recv().is_err());
    settle_events(&cell);
    assert!(log.lines().is_empty());
}

#[test]
fn a_panicking_handler_stops_neither_the_others_nor_itself() {
    let _watchdog = watchdog();
    let cell = start();
    let log = Log::default();
    let (panics, others) = (log.clone(), log.clone());
    cell.on(Event::Stdout, move |data| {
        panics.add("panics");
        panic!("in the handler of {data}, as this test wants it");
    });
    cell.on(Event::Stdout, move |_| others.add("goes on"));
    for _ in 0..2 {
        cell.emit(EventData::Stdout(b"event".to_vec()));
    }
    settle_events(&cell);
    assert_eq!(log.lines(), ["panics", "goes on", "panics", "goes on"]);
    assert_eq!(add(&cell), 5);
}

#[test]
fn handlers_run_on_one_thread_that_takes_no_signals() {
    let _watchdog = watchdog();
    let cell = start();
    let log = Log::default();
    let told = log.clone();
    cell.on(Event::Stdout, move |_| {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let blocked = status.lines().find(|line| line.starts_with("SigBlk:")).unwrap();
        told.add(format!("{} {blocked}", std::thread::current().name().unwrap()));
    });
    cell.emit(EventData::Stdout(Vec::new()));
    // All but SIGKILL, SIGSTOP and the two numbers that the C library keeps for itself.
    assert_eq!(log.wait_for(1), ["hotcell-events SigBlk:\tfffffffe7ffbfeff"]);
}

#[test]
fn a_blocked_handler_holds_up_no_call() {
    let _watchdog = watchdog();
    let cell = start();
    let (release, held) = std::sync::mpsc::channel::<()>();
    let finished = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&finished);
    let entered = Arc::new(AtomicBool::new(false));
    let inside = Arc::clone(&entered);
    cell.once(Event::Stdout, move |_| {
        inside.store(true, SeqCst);
        let _ = held.recv();
        seen.store(true, SeqCst);
    });
    cell.call("say", ["block"]).unwrap();
    wait_until(|| entered.load(SeqCst));
    for _ in 0..100 {
        assert_eq!(add(&cell), 5);
    }
    assert!(cell.call("boom", ()).is_err());
    cell.restart().unwrap();
    cell.shutdown();
    assert!(!finished.load(SeqCst));
    release.send(()).unwrap();
    wait_until(|| finished.load(SeqCst));
}

// Handlers may call anything.

#[test]
fn a_death_handler_may_restart() {
    let _watchdog = watchdog();
    let cell = Arc::new(start());
    let healed = Arc::new(AtomicU32::new(0));
    let (inside, count) = (Arc::downgrade(&cell), Arc::clone(&healed));
    cell.on(Event::Death, move |_| {
        let cell = inside.upgrade().unwrap();
        cell.restart().unwrap();
        assert_eq!(add(&cell), 5);
        count.fetch_add(1, SeqCst);
    });
    for round in 1..=3 {
        assert!(cell.call("boom", ()).is_err());
        wait_until(|| healed.load(SeqCst) == round);
        assert_eq!(add(&cell), 5);
    }
}

#[test]
fn a_handler_may_shut_down_call_and_remove_itself() {
    let _watchdog = watchdog();
    let cell = Arc::new(start());
    let pid = cell.pid().unwrap();
    let log = Log::default();
    let (inside, told) = (Arc::downgrade(&cell), log.clone());
    let own = Arc::new(OnceLock::new());
    let id = Arc::clone(&own);
    let listener = cell.on(Event::Stdout, move |_| {
        let cell: Arc<IsolatedProcess> = inside.upgrade().unwrap();
        assert_eq!(add(&cell), 5);
        assert!(cell.off(*id.wait()));
        cell.shutdown();
        cell.shutdown();
        told.add(format!("{:?}", cell.call("add", (2, 3)).is_err()));
    });
    own.set(listener).unwrap();
    cell.call("say", ["go"]).unwrap();
    assert_eq!(log.wait_for(1), ["true"]);
    assert!(!exists(pid) && !cell.is_alive());
    assert!(!cell.emit(EventData::Stdout(Vec::new())));
}

#[test]
fn the_last_handle_may_be_dropped_in_a_handler() {
    let _watchdog = watchdog();
    let cell = Arc::new(start());
    let pid = cell.pid().unwrap();
    let slot = Arc::new(Mutex::new(Some(Arc::clone(&cell))));
    let inside = Arc::clone(&slot);
    let gone: Weak<IsolatedProcess> = Arc::downgrade(&cell);
    cell.on(Event::Stderr, move |_| drop(inside.lock().unwrap().take()));
    cell.emit(EventData::Stderr(b"now".to_vec()));
    drop(cell);
    wait_until(|| gone.strong_count() == 0);
    wait_gone(pid);
}

#[test]
fn shutdown_from_a_handler_and_from_other_threads_at_once_does_not_deadlock() {
    let _watchdog = watchdog();
    for _ in 0..5 {
        let cell = Arc::new(config(Kind::Good).worker(short_grace()).start().unwrap());
        let pid = cell.pid().unwrap();
        let barrier = Arc::new(Barrier::new(4));
        let (inside, wait) = (Arc::downgrade(&cell), Arc::clone(&barrier));
        let done = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&done);
        cell.once(Event::Stdout, move |_| {
            wait.wait();
            inside.upgrade().unwrap().shutdown();
            seen.store(true, SeqCst);
        });
        cell.call("say", ["go"]).unwrap();
        std::thread::scope(|scope| {
            for restart in [false, true, false] {
                let (cell, barrier) = (&cell, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    if restart {
                        // A shutdown may win over it.
                        let _ = cell.restart();
                    } else {
                        cell.shutdown();
                    }
                });
            }
        });
        wait_until(|| done.load(SeqCst));
        cell.shutdown();
        assert!(!exists(pid) && !cell.is_alive());
    }
}

// Debug.

#[test]
fn debug_passes_output_on_and_writes_a_line_for_each_start_and_end() {
    let _watchdog = watchdog();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "debug_host", "--include-ignored", "--nocapture"])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("said by the module"));
    for expected in ["complained by the module", "is ready", "killed by SIGSEGV", "ending worker"] {
        assert!(stderr.contains(expected), "{expected:?} is missing in {stderr}");
    }
}

#[test]
#[ignore = "the other half of debug_passes_output_on_and_writes_a_line_for_each_start_and_end, which runs it"]
fn debug_host() {
    let _watchdog = watchdog();
    let cell = create_isolated_process(config(Kind::Good).debug(true)).unwrap();
    // Does not silence the library's own lines.
    cell.remove_all_listeners(None);
    cell.launch().unwrap();
    cell.call("say", ["said by the module\n"]).unwrap();
    cell.call("complain", ["complained by the module\n"]).unwrap();
    assert!(cell.call("boom", ()).is_err());
    cell.restart().unwrap();
    cell.shutdown();
    settle_events(&cell);
}

#[test]
fn a_module_source_with_options_is_accepted() {
    let _watchdog = watchdog();
    let path: &Path = &module(Kind::Good);
    let cell = IsolatedProcess::start(Module::ffi(path).resolve_now(true), SYMBOLS).unwrap();
    assert_eq!(add(&cell), 5);
}

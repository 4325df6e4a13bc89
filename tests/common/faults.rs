//! What the tests of faults share: fixtures compiled at test time, a watchdog, and the checks that hold after every death of a worker.
#![allow(dead_code)] // each test binary uses a part

#[path = "in_time.rs"]
pub(crate) mod in_time;

use hotcell::{CallError, Cause, CrashReport, Function, Involvement, Module, Session, StartError, Worker};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

/// How long any one test may take before it counts as hung: far more than it needs on a machine that is slow, and busy with other things.
pub(crate) const PATIENCE: Duration = Duration::from_secs(600);

/// Ends the test process if it is not dropped in time: a hang fails.
pub(crate) struct Watchdog {
    _alive: mpsc::Sender<()>,
}

/// The first line of each test. Also forbids core files, which workers inherit.
#[must_use]
pub(crate) fn watchdog() -> Watchdog {
    let (_, hard) = getrlimit(Resource::RLIMIT_CORE).unwrap();
    setrlimit(Resource::RLIMIT_CORE, 0, hard).unwrap();
    let (alive, watched) = mpsc::channel();
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    std::thread::spawn(move || {
        if watched.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
            eprintln!("{test} hangs: ended by its watchdog");
            std::process::abort();
        }
    });
    Watchdog { _alive: alive }
}

fn fixtures() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    [package.join("tests/fixtures"), package.join("../tests/fixtures")]
        .into_iter()
        .find(|folder| folder.join("faulty.c").exists())
        .expect("the fixtures are in the workspace's tests/fixtures")
}

/// Compiles a fixture into a shared library, once for each name in this process.
pub(crate) fn build(name: &str, source: &str, flags: &[&str]) -> PathBuf {
    compile(&format!("lib{name}.so"), source, &[&["-shared", "-fPIC"], flags].concat())
}

/// Compiles a fixture into a program.
pub(crate) fn build_program(name: &str, source: &str, flags: &[&str]) -> PathBuf {
    compile(name, source, flags)
}

fn compile(name: &str, source: &str, flags: &[&str]) -> PathBuf {
    let compiler = if source.ends_with(".cpp") { "c++" } else { "cc" };
    static BUILT: Mutex<Option<HashMap<String, PathBuf>>> = Mutex::new(None);
    let mut built = BUILT.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let built = built.get_or_insert_default();
    if let Some(path) = built.get(name) {
        return path.clone();
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(env!("CARGO_CRATE_NAME"));
    std::fs::create_dir_all(&folder).unwrap();
    let library = folder.join(name);
    let fresh = folder.join(format!("{name}.{}", std::process::id()));
    let output = Command::new(compiler)
        .args(["-O1", "-w", "-o"])
        .arg(&fresh)
        .arg(fixtures().join(source))
        .args(flags)
        .arg("-pthread")
        .output()
        .unwrap_or_else(|error| panic!("the tests of faults need the compiler {compiler}: {error}"));
    assert!(output.status.success(), "{compiler} {source}: {}", String::from_utf8_lossy(&output.stderr));
    // Another process of this test may have the library loaded: it keeps its own.
    std::fs::rename(&fresh, &library).unwrap();
    built.insert(name.to_owned(), library.clone());
    library
}

/// `constructor.c` with one of its functions as constructor (`CONSTRUCTOR`) or destructor (`DESTRUCTOR`).
pub(crate) fn with_constructor(body: &str) -> PathBuf {
    build(&format!("constructor-{body}"), "constructor.c", &[&format!("-DCONSTRUCTOR={body}")])
}

pub(crate) fn with_destructor(body: &str) -> PathBuf {
    build(&format!("destructor-{body}"), "constructor.c", &[&format!("-DDESTRUCTOR={body}")])
}

pub(crate) fn faulty() -> PathBuf {
    build("faulty", "faulty.c", &[])
}

/// A worker with one session that has `libfaulty.so` loaded.
pub(crate) struct Cell {
    pub(crate) worker: Worker,
    pub(crate) session: Session,
    pub(crate) module: Module,
}

impl Cell {
    pub(crate) fn new() -> Self {
        Self::in_worker(Worker::spawn().unwrap())
    }

    pub(crate) fn in_worker(worker: Worker) -> Self {
        let session = worker.session().unwrap();
        let module = session.load(faulty()).unwrap();
        Self { worker, session, module }
    }

    pub(crate) fn f0(&self, symbol: &str) -> Function<fn() -> i32> {
        self.module.function(symbol).unwrap()
    }

    pub(crate) fn f1(&self, symbol: &str) -> Function<fn(i32) -> i32> {
        self.module.function(symbol).unwrap()
    }

    pub(crate) fn at(&self, symbol: &str) -> Function<fn(u64) -> i32> {
        self.module.function(symbol).unwrap()
    }

    pub(crate) fn add(&self) -> Function<fn(i32, i32) -> i32> {
        self.module.function("add").unwrap()
    }

    /// `nap`: says that it runs in a word of shared memory, then sleeps.
    pub(crate) fn nap(&self) -> Function<fn(hotcell::RemotePtr, i32, i32) -> i32> {
        self.module.function("nap").unwrap()
    }
}

/// The report of a call that must have ended with its worker's death.
pub(crate) fn crashed<T: std::fmt::Debug>(result: Result<T, CallError>) -> Box<CrashReport> {
    match result {
        Err(error @ CallError::Crashed(_)) => {
            assert!(!error.session_usable(), "{error}");
            let CallError::Crashed(report) = error else { unreachable!() };
            report
        }
        other => panic!("expected a crash, got {other:?}"),
    }
}

/// Makes one call that must kill the worker of a new cell, and checks everything that holds for every such call. `call` gets the cell; the
/// function that dies is `symbol`.
pub(crate) fn dies<T: std::fmt::Debug>(
    symbol: &str,
    call: impl FnOnce(&Cell) -> Result<T, CallError>,
) -> CrashReport {
    let cell = Cell::new();
    let result = call(&cell);
    let report = *crashed(result);
    assert_eq!(report.function().map(|f| &*f.symbol), Some(symbol), "{report}");
    assert_eq!(report.involvement(), Involvement::Culprit, "{report}");
    assert!(report.involvement().may_have_run());
    assert_eq!(report.culprit(), report.function());
    let running: Vec<_> = report.running().collect();
    assert_eq!(running, Vec::from_iter(report.function()), "exactly this call was running");
    is_dead(&cell, &report);
    let (first, library) = (report.to_string(), faulty());
    let expected = format!("worker {} {} in {symbol} of {}", report.pid(), report.cause(), library.display());
    assert_eq!(first.lines().next(), Some(&*expected), "{first}");
    next_worker_works();
    report
}

/// What holds once a cell's worker has died with this report.
pub(crate) fn is_dead(cell: &Cell, report: &CrashReport) {
    let Cell { worker, session, .. } = cell;
    assert_eq!(report.pid(), worker.pid());
    assert!(!report.core_dumped(), "no core file is written under a limit of 0: {report}");
    assert!(report.usage().resident_bytes_max > 0 && report.usage().minor_faults > 0, "{report}");
    assert!(!worker.is_alive());
    let workers = worker.crash_report().expect("a dead worker has a report");
    assert_eq!(workers.cause(), report.cause());
    // Whatever comes later has the same cause, and did not run.
    let error = session.ping().unwrap_err();
    assert!(!error.may_have_run() && !error.session_usable(), "{error}");
    let later = error.crash_report().expect("it names the death");
    assert_eq!((later.cause(), later.involvement()), (report.cause(), Involvement::NotRun));
    match worker.session().map(drop) {
        Err(StartError::Died(died)) => assert_eq!(died.cause(), report.cause()),
        other => panic!("a dead worker opens no session: {other:?}"),
    }
    is_gone(worker.pid());
}

/// Waits until this process has no child of that number, not even a zombie.
pub(crate) fn is_gone(pid: u32) {
    let us = format!("PPid:\t{}\n", std::process::id());
    eventually("the worker's process is gone", || {
        std::fs::read_to_string(format!("/proc/{pid}/status")).map_or(true, |status| !status.contains(&us))
    });
}

/// A worker can be started and called.
pub(crate) fn next_worker_works() {
    let cell = Cell::new();
    assert_eq!(cell.add().call(2, 3).unwrap(), 5);
}

/// Waits for a fact; the watchdog bounds it.
pub(crate) fn eventually(what: &str, fact: impl Fn() -> bool) {
    let start = Instant::now();
    while !fact() {
        assert!(start.elapsed() < PATIENCE / 2, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Runs a call in a thread until it runs in the worker; gives the thread.
pub(crate) fn napping(cell: &Cell, ms: i32, result: i32) -> std::thread::JoinHandle<Result<i32, CallError>> {
    let running = Arc::new(cell.session.block(64).unwrap());
    assert!(running.write_value(0, &0u32));
    let (nap, block) = (cell.nap(), Arc::clone(&running));
    let thread = std::thread::spawn(move || nap.call(block.pointer(), ms, result));
    eventually("the call runs", || running.read_value::<u32>(0) == Some(1));
    thread
}

pub(crate) fn signaled(signal: i32) -> Cause {
    Cause::Signaled { signal, core_dumped: false }
}

pub(crate) fn exited(code: i32) -> Cause {
    Cause::Exited { code }
}

/// Whether this process is the child that [`in_child`] starts.
pub(crate) fn is_child() -> bool {
    std::env::var_os("FAULTS_CHILD").is_some()
}

/// Runs the calling test, by its name, again, alone in a process of its own, where [`is_child`] holds; it must pass there.
pub(crate) fn in_child(test: &str, variables: &[(&str, &str)]) -> Output {
    let output = Command::new(std::env::current_exe().unwrap())
        .env("RUST_BACKTRACE", "0")
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env("FAULTS_CHILD", "1")
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{test} failed in its own process ({}):\n{text}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

pub(crate) fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

pub(crate) fn own_threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

pub(crate) fn mappings() -> usize {
    std::fs::read_to_string("/proc/self/maps").unwrap().lines().count()
}

/// Whether this process has no child, a dead one included.
pub(crate) fn no_children() -> bool {
    std::fs::read_dir("/proc/self/task").unwrap().flatten().all(|task| {
        std::fs::read_to_string(task.path().join("children")).is_ok_and(|children| children.trim().is_empty())
    })
}

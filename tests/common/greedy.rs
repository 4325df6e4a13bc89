//! What happens when a limit is exceeded: cases that hold for the host's own executable as the worker (`tests/limits.rs`) and for the lean program
//! (`worker/tests/limits.rs`) alike. Each takes the builder to start from.

#![allow(dead_code)]

use crate::faults;
use faults::{eventually, is_gone, watchdog};
use hotcell::{
    CallError, Cause, CrashReport, Involvement, IsolatedProcess, IsolatedProcessConfig, Limited, LoadError,
    Module, Scarce, Session, SessionBuilder, StartError, Worker, WorkerBuilder,
};
use std::path::PathBuf;
use std::time::Duration;

/// No call of these is to end by its deadline, unless that is what it is about.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);
/// A limit that no test comes near by accident, and a runaway is soon at.
const CPU: Duration = Duration::from_millis(100);
/// Room for the C library, the module and little more.
const MEMORY: u64 = 24 << 20;

pub(crate) fn greedy() -> PathBuf {
    faults::build("greedy", "greedy.c", &[])
}

fn greedy_at_unload(function: &str) -> PathBuf {
    faults::build(&format!("greedy-last-{function}"), "greedy.c", &[&format!("-DDESTRUCTOR={function}")])
}

fn greedy_at_load(function: &str) -> PathBuf {
    faults::build(&format!("greedy-{function}"), "greedy.c", &[&format!("-DCONSTRUCTOR={function}")])
}

struct Cell {
    worker: Worker,
    session: Session,
    module: Module,
}

impl Cell {
    fn new(builder: WorkerBuilder) -> Self {
        let worker = builder.spawn().unwrap();
        let session = worker.session().unwrap();
        let module = session.load(greedy()).unwrap();
        Self { worker, session, module }
    }

    fn f0(&self, symbol: &str) -> hotcell::Function<fn() -> i32> {
        self.module.function(symbol).unwrap()
    }

    fn f1(&self, symbol: &str) -> hotcell::Function<fn(i32) -> i32> {
        self.module.function(symbol).unwrap()
    }

    /// The report, once the worker has ended by itself.
    fn end(&self) -> CrashReport {
        eventually("the worker has ended", || !self.worker.is_alive());
        self.worker.crash_report().unwrap()
    }
}

fn cpu_time(of: Limited, max: Duration) -> Cause {
    Cause::CpuTimeExceeded { scope: of, max }
}

/// The report of the call that exceeded its CPU time.
fn burnt<T: std::fmt::Debug>(result: Result<T, CallError>, of: Limited, max: Duration) -> Box<CrashReport> {
    match result {
        Err(error @ CallError::CpuTimeExceeded(_)) => {
            assert!(error.may_have_run() && !error.session_usable(), "{error}");
            assert_eq!(error.code(), "ERR_CPU_TIME_EXCEEDED");
            let CallError::CpuTimeExceeded(report) = error else { unreachable!() };
            assert_eq!(*report.cause(), cpu_time(of, max), "{report}");
            assert_eq!(report.cause().code(), "ERR_CPU_TIME_EXCEEDED");
            assert_eq!((report.exit_code(), report.signal()), (Some(124), None), "{report}");
            let used = report.usage().user + report.usage().system;
            assert!(used + Duration::from_millis(1) >= max, "{report}");
            report
        }
        other => panic!("expected too much CPU time, got {other:?}"),
    }
}

/// The report of the call that exceeded its worker's memory.
fn starved<T: std::fmt::Debug>(result: Result<T, CallError>) -> Box<CrashReport> {
    match result {
        Err(error @ CallError::MemoryExceeded(_)) => {
            assert!(error.may_have_run() && !error.session_usable(), "{error}");
            assert_eq!(error.code(), "ERR_MEMORY_EXCEEDED");
            let CallError::MemoryExceeded(report) = error else { unreachable!() };
            out_of_memory(&report);
            report
        }
        other => panic!("expected too much memory, got {other:?}"),
    }
}

fn out_of_memory(report: &CrashReport) {
    assert!(
        matches!(report.cause(), Cause::MemoryExceeded { scope: Limited::Worker, bytes_max: MEMORY, .. }),
        "{report}"
    );
    assert_eq!(report.cause().code(), "ERR_MEMORY_EXCEEDED");
}

pub(crate) fn runaway_call_ends_as_cpu_time_exceeded_and_names_its_function(builder: WorkerBuilder) {
    let _watchdog = watchdog();
    let cell = Cell::new(builder.cpu_time_per_call(CPU));
    let other = cell.worker.session().unwrap();
    let report = burnt(cell.f0("burn").call(), Limited::Call, CPU);
    assert_eq!(report.involvement(), Involvement::Culprit);
    assert_eq!(report.culprit().map(|f| &*f.symbol), Some("burn"), "{report}");
    // The handler took the stack where it burned.
    assert!(report.backtrace().iter().any(|frame| frame.symbol.as_deref() == Some("burn")), "{report}");
    let error = other.ping().unwrap_err();
    assert_eq!((error.code(), error.may_have_run()), ("ERR_WORKER_CRASH", false));
    assert_eq!(error.crash_report().unwrap().cause(), report.cause());
    match cell.worker.session().map(drop) {
        Err(error @ StartError::Died(_)) => assert_eq!(error.code(), "ERR_WORKER_CRASH"),
        other => panic!("{other:?}"),
    }
    is_gone(cell.worker.pid());
}

pub(crate) fn runaway_that_takes_no_signal_ends_too(builder: WorkerBuilder) {
    let _watchdog = watchdog();
    let cell = Cell::new(builder.cpu_time_per_call(CPU));
    let report = burnt(cell.f0("burn_deaf").call(), Limited::Call, CPU);
    assert_eq!(report.culprit().map(|f| &*f.symbol), Some("burn_deaf"), "{report}");
}

pub(crate) fn submitted_runaway_ends_too(builder: WorkerBuilder) {
    let _watchdog = watchdog();
    let cell = Cell::new(builder.cpu_time_per_call(CPU));
    let burn = cell.f0("burn");
    let first = burn.submit().unwrap();
    let second = burn.submit().unwrap();
    burnt(first.wait(), Limited::Call, CPU);
    let error = second.wait().unwrap_err();
    assert_eq!((error.code(), error.may_have_run()), ("ERR_WORKER_CRASH", false), "{error}");
}

/// The stream has no slot whose turn could tell that a call runs.
pub(crate) fn runaway_of_a_pipeline_ends_too(builder: WorkerBuilder) {
    let _watchdog = watchdog();
    let cell = Cell::new(builder.cpu_time_per_call(CPU));
    let burn_ms = cell.f1("burn_ms");
    let mut pipeline = burn_ms.pipeline().unwrap();
    // Together more than one may use, each less.
    for _ in 0..30 {
        pipeline.send(10).unwrap();
    }
    for _ in 0..30 {
        assert_eq!(pipeline.receive().unwrap(), Some(10));
    }
    drop(pipeline);
    let burn = cell.f0("burn");
    let mut pipeline = burn.pipeline().unwrap();
    pipeline.send().unwrap();
    pipeline.send().unwrap();
    let report = burnt(pipeline.receive(), Limited::Call, CPU);
    assert_eq!(report.culprit().map(|f| &*f.symbol), Some("burn"), "{report}");
    let error = pipeline.receive().unwrap_err();
    assert_eq!((error.code(), error.may_have_run()), ("ERR_WORKER_CRASH", false), "{error}");
}

pub(crate) fn runaway_constructor_ends_its_load(builder: WorkerBuilder) {
    let _watchdog = watchdog();
    let worker = builder.cpu_time_per_call(CPU).spawn().unwrap();
    match worker.session().unwrap().load(greedy_at_load("burn")) {
        Err(error @ LoadError::Call { .. }) => {
            assert_eq!(error.code(), "ERR_CPU_TIME_EXCEEDED");
            let LoadError::Call { source, .. } = error else { unreachable!() };
            burnt::<()>(Err(source), Limited::Call, CPU);
        }
        other => panic!("{other:?}"),
    }
}

pub(crate) fn runaway_destructor_ends_its_close(builder: WorkerBuilder) {
    let _watchdog = watchdog();
    for (function, limited) in [
        ("burn", builder.clone().cpu_time_per_call(CPU)),
        ("burn_deaf", builder.clone().cpu_time_per_call(CPU)),
        ("burn", builder.clone().cpu_time_max(10 * CPU)),
    ] {
        let worker = limited.spawn().unwrap();
        let session = worker.session().unwrap();
        let module = session.load(greedy_at_unload(function)).unwrap();
        assert_eq!(module.function::<fn(i32, i32) -> i32>("add").unwrap().call(2, 3).unwrap(), 5);
        let error = session.close().unwrap_err();
        assert_eq!(error.code(), "ERR_CPU_TIME_EXCEEDED", "{function}: {error}");
        assert!(error.may_have_run() && !error.session_usable(), "{error}");
        let report = error.crash_report().unwrap();
        assert_eq!(report.function().map(|function| &*function.symbol), Some("close"), "{report}");
        // Which session used up its worker's time nobody can tell.
        if let Cause::CpuTimeExceeded { scope: Limited::Call, .. } = report.cause() {
            assert_eq!(report.culprit().map(|function| &*function.symbol), Some("close"), "{report}");
        }
        is_gone(worker.pid());
    }
}

/// Nobody waits for the end of a session that is dropped for longer than the grace period; the limit does not go with the handle.
pub(crate) fn runaway_destructor_of_a_dropped_session_ends_its_worker(builder: WorkerBuilder) {
    let _watchdog = watchdog();
    let worker = builder.cpu_time_per_call(CPU).grace(Duration::from_millis(1)).spawn().unwrap();
    drop(worker.session().unwrap().load(greedy_at_unload("burn")).unwrap());
    eventually("the worker has ended", || !worker.is_alive());
    let report = worker.crash_report().unwrap();
    assert_eq!(*report.cause(), cpu_time(Limited::Call, CPU), "{report}");
    is_gone(worker.pid());
}

pub(crate) fn hoarding_destructor_ends_its_close(builder: WorkerBuilder) {
    let _watchdog = watchdog();
    for function in ["hoard", "hoard_abort"] {
        let worker = builder.clone().memory_bytes_max(MEMORY).spawn().unwrap();
        let session = worker.session().unwrap();
        session.load(greedy_at_unload(function)).unwrap();
        let report = starved(session.close());
        assert_eq!(report.function().map(|function| &*function.symbol), Some("close"), "{report}");
        is_gone(worker.pid());
    }
}

pub(crate) fn calls_that_stay_below_their_cpu_time_are_left_alone(builder: WorkerBuilder) {
    let _watchdog = watchdog();
    // Far from each other: what a virtual machine's host takes from it may be counted as used.
    let cell = Cell::new(builder.cpu_time_per_call(Duration::from_secs(1)));
    // Together more than one may use, each much less.
    for _ in 0..30 {
        assert_eq!(cell.f1("burn_ms").call(50).unwrap(), 50);
    }
    // Sleeping is not using.
    assert_eq!(cell.f1("nap_ms").call(1500).unwrap(), 1500);
    assert!(cell.worker.is_alive());
}

pub(crate) fn session_that_uses_up_its_cpu_time_ends(builder: WorkerBuilder) {
    let _watchdog = watchdog();
    let worker = builder.spawn().unwrap();
    let max = Duration::from_millis(300);
    let session = worker
        .session_with(SessionBuilder::new().timeout(Duration::from_secs(100)).cpu_time_max(max))
        .unwrap();
    let burn = session.load(greedy()).unwrap().function::<fn(i32) -> i32>("burn_ms").unwrap();
    let mut calls = 0;
    let error = loop {
        match burn.call(20) {
            Ok(_) => calls += 1,
            Err(error) => break error,
        }
        assert!(calls < 1000, "no end");
    };
    // It may come in a call or between two.
    let report = error.crash_report().unwrap();
    assert_eq!(*report.cause(), cpu_time(Limited::Session, max), "{report}");
    assert!(matches!(error, CallError::CpuTimeExceeded(_) | CallError::Crashed(_)), "{error:?}");
}

pub(crate) fn worker_that_uses_up_its_cpu_time_between_calls_ends(builder: WorkerBuilder) {
    let _watchdog = watchdog();
    let max = Duration::from_millis(500);
    let cell = Cell::new(builder.cpu_time_max(max));
    // It may end before the call that starts it has returned.
    if let Err(error) = cell.f1("in_thread").call(0) {
        assert!(error.crash_report().is_some(), "{error:?}");
    }
    let report = cell.end();
    assert_eq!(*report.cause(), cpu_time(Limited::Worker, max), "{report}");
    assert_eq!(report.exit_code(), Some(124));
    let error = cell.session.ping().unwrap_err();
    assert_eq!((error.code(), error.may_have_run()), ("ERR_WORKER_CRASH", false), "{error}");
}

pub(crate) fn call_that_uses_up_its_workers_cpu_time_ends(builder: WorkerBuilder) {
    let _watchdog = watchdog();
    let max = Duration::from_millis(500);
    let cell = Cell::new(builder.cpu_time_max(max));
    burnt(cell.f0("burn").call(), Limited::Worker, max);
}

pub(crate) fn deadline_holds_beside_cpu_time(builder: WorkerBuilder) {
    let _watchdog = watchdog();
    let cell = Cell::new(builder.cpu_time_per_call(Duration::from_secs(1000)));
    let nap = cell.f1("nap_ms").with_timeout(Duration::from_millis(50)).unwrap();
    let error = nap.call(600_000).unwrap_err();
    assert!(matches!(error, CallError::TimedOut { .. }), "{error:?}");
    assert_eq!(error.code(), "ERR_CALL_TIMEOUT");
}

pub(crate) fn module_that_follows_refused_memory_ends_as_memory_exceeded(builder: WorkerBuilder) {
    let _watchdog = watchdog();
    let cell = Cell::new(builder.memory_bytes_max(MEMORY));
    let report = starved(cell.f0("hoard").call());
    assert_eq!(report.culprit().map(|f| &*f.symbol), Some("hoard"), "{report}");
}

pub(crate) fn module_that_aborts_without_memory_ends_as_memory_exceeded(builder: WorkerBuilder) {
    let _watchdog = watchdog();
    let cell = Cell::new(builder.memory_bytes_max(MEMORY));
    let report = starved(cell.f0("hoard_abort").call());
    assert_eq!(report.culprit().map(|f| &*f.symbol), Some("hoard_abort"), "{report}");
}

pub(crate) fn one_large_piece_ends_as_memory_exceeded(builder: WorkerBuilder) {
    let _watchdog = watchdog();
    let cell = Cell::new(builder.memory_bytes_max(MEMORY));
    let take = cell.module.function::<fn(u64) -> i32>("take").unwrap();
    starved(take.call(4 << 30));
}

pub(crate) fn hoarding_constructor_ends_its_load(builder: WorkerBuilder) {
    let _watchdog = watchdog();
    let worker = builder.memory_bytes_max(MEMORY).spawn().unwrap();
    match worker.session().unwrap().load(greedy_at_load("hoard")) {
        Err(error @ LoadError::Call { .. }) => {
            assert_eq!(error.code(), "ERR_MEMORY_EXCEEDED");
            let LoadError::Call { source, .. } = error else { unreachable!() };
            starved::<()>(Err(source));
        }
        other => panic!("{other:?}"),
    }
}

pub(crate) fn hoarding_thread_ends_the_worker_between_calls(builder: WorkerBuilder) {
    let _watchdog = watchdog();
    let cell = Cell::new(builder.memory_bytes_max(MEMORY));
    // It may end before the call that starts it has returned.
    if let Err(error) = cell.f1("in_thread").call(1) {
        assert!(error.crash_report().is_some(), "{error:?}");
    }
    let report = cell.end();
    out_of_memory(&report);
    assert_eq!(report.culprit(), None, "no call did it: {report}");
}

pub(crate) fn memory_below_the_limit_is_there_and_more_is_refused_without_harm(builder: WorkerBuilder) {
    let _watchdog = watchdog();
    let cell = Cell::new(builder.memory_bytes_max(MEMORY));
    // Each session's own stack of 8 MiB is not charged.
    let sessions: Vec<_> = (0..8).map(|_| cell.worker.session().unwrap()).collect();
    let is_there = cell.module.function::<fn(u64) -> i32>("is_there").unwrap();
    assert_eq!(is_there.call(MEMORY / 2).unwrap(), 1);
    if by_control_group() {
        eprintln!("a control group counts what is touched: a refusal is not to be had");
    } else {
        assert_eq!(is_there.call(MEMORY * 8).unwrap(), 0);
        let error = cell.session.alloc(MEMORY * 8).unwrap_err();
        assert_eq!(error.code(), "ERR_OUT_OF_MEMORY", "{error}");
    }
    drop(sessions);
    assert_eq!(cell.module.function::<fn(i32, i32) -> i32>("add").unwrap().call(2, 3).unwrap(), 5);
}

/// Whether workers' memory is limited by control groups here; said aloud.
pub(crate) fn by_control_group() -> bool {
    let named = std::env::var_os(hotcell::CGROUP_VARIABLE).is_some_and(|folder| !folder.is_empty());
    eprintln!("memory is limited by {}", if named { "a control group" } else { "RLIMIT_DATA" });
    named
}

pub(crate) fn other_faults_stay_what_they_are_under_limits(builder: WorkerBuilder) {
    let _watchdog = watchdog();
    let builder =
        builder.memory_bytes_max(64 << 20).cpu_time_per_call(Duration::from_secs(10)).file_bytes_max(1 << 20);
    let cause = |symbol: &str, argument: i32| {
        let cell = Cell::new(builder.clone());
        let result = cell.f1(symbol).call(argument);
        match result {
            Err(CallError::Crashed(report)) => report.cause().clone(),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(cause("null_read", 0), Cause::Signaled { signal: libc::SIGSEGV, core_dumped: false });
    assert!(matches!(cause("overflow", 1), Cause::StackOverflow { .. }));
}

pub(crate) fn longer_file_ends_as_file_size_exceeded(builder: WorkerBuilder) {
    let _watchdog = watchdog();
    let cell = Cell::new(builder.file_bytes_max(64 << 10));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file").to_str().unwrap().to_owned();
    let write = cell.module.prototype("int write_file(const char *path, int kib)").unwrap();
    let written: i32 = write.call((path.as_str(), 64)).unwrap().try_into().unwrap();
    assert_eq!(written, 64);
    match write.call((path.as_str(), 65)) {
        Err(error @ CallError::FileSizeExceeded(_)) => {
            assert_eq!(error.code(), "ERR_FILE_SIZE_EXCEEDED");
            let report = error.crash_report().unwrap();
            assert_eq!(*report.cause(), Cause::FileSizeExceeded { bytes_max: 64 << 10 });
            assert_eq!(report.culprit().map(|f| &*f.symbol), Some("write_file"), "{report}");
        }
        other => panic!("{other:?}"),
    }
}

pub(crate) fn open_files_run_out_for_calls_modules_and_sessions(builder: WorkerBuilder) {
    let _watchdog = watchdog();
    let cell = Cell::new(builder.open_files_max(32));
    let opened = cell.f1("files").call(1000).unwrap();
    assert!((1..32).contains(&opened), "{opened}");
    match cell.session.load("libz.so.1") {
        Err(error @ LoadError::OpenFilesExceeded { .. }) => {
            assert_eq!(error.code(), "ERR_OPEN_FILES_EXCEEDED")
        }
        other => panic!("{other:?}"),
    }
    match cell.session.load(greedy_at_load("burn")) {
        Err(LoadError::OpenFilesExceeded { .. }) => {}
        other => panic!("{other:?}"),
    }
    match cell.worker.session().map(drop) {
        Err(error @ StartError::Scarce { what: Scarce::OpenFiles }) => {
            assert_eq!(error.code(), "ERR_OPEN_FILES_EXCEEDED");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(cell.module.function::<fn(i32, i32) -> i32>("add").unwrap().call(2, 3).unwrap(), 5);
}

/// How often a limit is looked for that counts what the same user runs elsewhere, such as the other tests, and so may be met too early or too late.
pub(crate) const ATTEMPTS: u32 = 50;

/// What root gets without a control group: no promise that cannot be kept.
pub(crate) fn processes_are_limited_or_refused(builder: WorkerBuilder) {
    let _watchdog = watchdog();
    for _ in 0..ATTEMPTS {
        let worker = match builder.clone().processes_max(10).spawn() {
            Ok(worker) => worker,
            Err(error @ StartError::LimitUnavailable { option: "processes_max", .. }) => {
                eprintln!("processes_max is refused here: {error}");
                assert_eq!(error.code(), "ERR_LIMIT_UNAVAILABLE");
                assert!(error.to_string().contains("root"), "{error}");
                return;
            }
            Err(other) => panic!("{other:?}"),
        };
        eprintln!("processes_max is in force here");
        let session = match worker.session() {
            Err(StartError::Scarce { what: Scarce::Processes }) => continue,
            opened => opened.unwrap(),
        };
        let threads = session.load(greedy()).unwrap().function::<fn(i32) -> i32>("threads").unwrap();
        let started = threads.call(1000).unwrap();
        if (1..=10).contains(&started) {
            return;
        }
        eprintln!("{started} threads were started: others of this user have come or gone");
    }
    panic!("in {ATTEMPTS} attempts the limit was never seen");
}

pub(crate) fn blocks_run_out_and_come_back(builder: WorkerBuilder) {
    let _watchdog = watchdog();
    let worker = builder.spawn().unwrap();
    let session = worker.session_with(SessionBuilder::new().remote_blocks_max(3)).unwrap();
    let blocks: Vec<_> = (0..3).map(|_| session.alloc(8).unwrap()).collect();
    for _ in 0..3 {
        let error = session.alloc(8).unwrap_err();
        assert!(matches!(error, CallError::TooManyBlocks { max: 3 }), "{error:?}");
        assert!(!error.may_have_run() && error.session_usable());
        assert_eq!(error.code(), "ERR_TOO_MANY_BLOCKS");
    }
    session.free(blocks[0]).unwrap();
    assert!(session.free(blocks[0]).is_err(), "not twice");
    // What is refused takes no place.
    assert_eq!(session.alloc(u64::MAX / 2).unwrap_err().code(), "ERR_OUT_OF_MEMORY");
    session.alloc(8).unwrap();
    assert_eq!(session.alloc(8).unwrap_err().code(), "ERR_TOO_MANY_BLOCKS");
}

pub(crate) fn output_beyond_what_is_kept_is_counted(builder: WorkerBuilder) {
    let _watchdog = watchdog();
    let cell = Cell::new(builder.output_bytes_max(2000));
    assert_eq!(cell.f1("say").call(50_000).unwrap(), 50_000);
    eventually("all has been read", || cell.worker.stderr_dropped() == 48_000);
    assert_eq!(cell.worker.stderr_tail(), vec![b'x'; 2000]);
    assert_eq!((cell.worker.stdout_dropped(), cell.worker.stdout_tail().len()), (0, 0));
    let CallError::Crashed(report) = cell.f0("null_read").call().unwrap_err() else { panic!() };
    assert_eq!((report.stderr_dropped(), report.stderr_tail().len()), (48_000, 2000));
    assert!(report.to_string().contains("48000 bytes before this were dropped"), "{report}");
}

pub(crate) fn no_core_file_unless_asked_for(builder: WorkerBuilder) {
    let _watchdog = watchdog();
    let limit = |worker: &Worker| {
        let limits = std::fs::read_to_string(format!("/proc/{}/limits", worker.pid())).unwrap();
        let line = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap().to_owned();
        line["Max core file size".len()..].split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    let worker = builder.clone().spawn().unwrap();
    worker.session().unwrap();
    assert_eq!(limit(&worker)[0], "0");
    let (_, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_CORE).unwrap();
    let worker = builder.core_bytes_max(1 << 20).spawn().unwrap();
    worker.session().unwrap();
    assert_eq!(limit(&worker)[0], hard.min(1 << 20).to_string());
}

pub(crate) fn isolated_process_has_exit_code_124_and_restarts(builder: WorkerBuilder) {
    let _watchdog = watchdog();
    let config = IsolatedProcessConfig::new(greedy(), "int add(int, int); int burn(void); int hoard(void);")
        .worker(builder)
        .cpu_time_per_call(CPU)
        .memory_bytes_max(MEMORY);
    let cell: IsolatedProcess = config.start().unwrap();
    let deaths = cell.receiver(&[hotcell::Event::Death]);
    burnt(cell.call("burn", ()), Limited::Call, CPU);
    let hotcell::EventData::Death(report) = deaths.recv().unwrap() else { panic!() };
    assert_eq!(report.exit_code(), Some(124));
    cell.restart().unwrap();
    starved(cell.call("hoard", ()));
    cell.restart().unwrap();
    assert_eq!(i32::try_from(cell.call("add", (2, 3)).unwrap()).unwrap(), 5);
}

pub(crate) fn the_hosts_own_limits_are_as_they_were(builder: WorkerBuilder) {
    let _watchdog = watchdog();
    let limits = || std::fs::read_to_string("/proc/self/limits").unwrap();
    let before = limits();
    let builder = builder
        .memory_bytes_max(MEMORY)
        .cpu_time_max(Duration::from_secs(5))
        .cpu_time_per_call(Duration::from_secs(1))
        .open_files_max(64)
        .file_bytes_max(1 << 20)
        .core_bytes_max(0);
    let cell = Cell::new(builder);
    let of_worker = std::fs::read_to_string(format!("/proc/{}/limits", cell.worker.pid())).unwrap();
    assert_ne!(of_worker, before);
    drop(cell);
    assert_eq!(limits(), before);
}

pub(crate) fn values_out_of_range_are_refused_before_anything_starts(builder: WorkerBuilder) {
    let _watchdog = watchdog();
    let option = |builder: WorkerBuilder| match builder.spawn() {
        Err(error @ StartError::Configuration { .. }) => {
            assert_eq!(error.code(), "ERR_CONFIGURATION");
            let StartError::Configuration { option, .. } = error else { unreachable!() };
            option
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(option(builder.clone().cpu_time_per_call(Duration::ZERO)), "cpu_time_per_call");
    assert_eq!(option(builder.clone().cpu_time_max(Duration::from_millis(9))), "cpu_time_max");
    assert_eq!(option(builder.clone().cpu_time_max(Duration::MAX)), "cpu_time_max");
    assert_eq!(option(builder.clone().memory_bytes_max(1000)), "memory_bytes_max");
    assert_eq!(option(builder.clone().open_files_max(3)), "open_files_max");
    assert_eq!(option(builder.clone().processes_max(1)), "processes_max");
    assert_eq!(option(builder.clone().output_bytes_max(usize::MAX)), "output_bytes_max");
    match builder.memory_bytes_max(MEMORY).cgroup("/no/such/folder").spawn() {
        Err(StartError::LimitUnavailable { option: "cgroup", reason }) => {
            assert!(reason.contains("/no/such/folder"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
}

/// Makes a test of each case.
#[macro_export]
macro_rules! each_limit {
    ($builder:expr) => {
        each_limit!($builder;
            runaway_call_ends_as_cpu_time_exceeded_and_names_its_function
            runaway_that_takes_no_signal_ends_too
            submitted_runaway_ends_too
            runaway_of_a_pipeline_ends_too
            runaway_constructor_ends_its_load
            runaway_destructor_ends_its_close
            runaway_destructor_of_a_dropped_session_ends_its_worker
            calls_that_stay_below_their_cpu_time_are_left_alone
            session_that_uses_up_its_cpu_time_ends
            worker_that_uses_up_its_cpu_time_between_calls_ends
            call_that_uses_up_its_workers_cpu_time_ends
            deadline_holds_beside_cpu_time
            module_that_follows_refused_memory_ends_as_memory_exceeded
            module_that_aborts_without_memory_ends_as_memory_exceeded
            one_large_piece_ends_as_memory_exceeded
            hoarding_constructor_ends_its_load
            hoarding_destructor_ends_its_close
            hoarding_thread_ends_the_worker_between_calls
            memory_below_the_limit_is_there_and_more_is_refused_without_harm
            other_faults_stay_what_they_are_under_limits
            longer_file_ends_as_file_size_exceeded
            open_files_run_out_for_calls_modules_and_sessions
            processes_are_limited_or_refused
            blocks_run_out_and_come_back
            output_beyond_what_is_kept_is_counted
            no_core_file_unless_asked_for
            isolated_process_has_exit_code_124_and_restarts
            the_hosts_own_limits_are_as_they_were
            values_out_of_range_are_refused_before_anything_starts
        );
    };
    ($builder:expr; $($case:ident)+) => {
        $(#[test]
        fn $case() {
            // Nothing here is about time on the clock, however slow the machine is.
            greedy::$case($builder.timeout(greedy::PATIENCE).start_timeout(greedy::PATIENCE));
        })+
    };
}

//! The lean program `hotcell-worker` as a host's worker: named in the configuration, or in the environment variable.

#[path = "../../tests/common/faults.rs"]
mod faults;

use faults::{Cell, crashed, eventually, exited, in_child, is_child, is_gone, watchdog};
use hotcell::{Cause, Involvement, LoadError, StartError, WORKER_VARIABLE, Worker};
use hotcell_worker::{EXIT_HOST_GONE, EXIT_NO_SOCKET};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const LEAN: &str = env!("CARGO_BIN_EXE_hotcell-worker");

fn lean() -> Cell {
    Cell::in_worker(Worker::builder().program(LEAN).spawn().unwrap())
}

/// The program that a process runs.
fn program_of(pid: u32) -> std::path::PathBuf {
    std::fs::read_link(format!("/proc/{pid}/exe")).unwrap()
}

fn is_lean(worker: &Worker) -> bool {
    program_of(worker.pid()) == std::fs::canonicalize(LEAN).unwrap()
}

#[test]
fn named_program_serves_calls() {
    let _watchdog = watchdog();
    let cell = lean();
    assert!(is_lean(&cell.worker));
    assert_eq!(cell.add().call(2, 3).unwrap(), 5);
    let tickets: Vec<_> = (0..100).map(|i| cell.add().submit(i, i).unwrap()).collect();
    for (i, ticket) in tickets.into_iter().enumerate() {
        assert_eq!(usize::try_from(ticket.wait().unwrap()), Ok(2 * i));
    }
    let error = cell.session.load("/no/such/libthing.so").unwrap_err();
    assert!(matches!(error, LoadError::NotFound { .. }), "{error:?}");
    cell.worker.dispose();
    is_gone(cell.worker.pid());
}

#[test]
fn lean_worker_has_little_memory_of_its_own() {
    let _watchdog = watchdog();
    let cell = lean();
    assert_eq!(cell.add().call(2, 3).unwrap(), 5);
    let rollup = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", cell.worker.pid())).unwrap();
    let kib = |key: &str| -> u64 {
        let line =
            rollup.lines().find(|line| line.starts_with(key)).unwrap_or_else(|| panic!("{key} in {rollup}"));
        line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).unwrap()
    };
    let private = kib("Private_Dirty:") + kib("Private_Clean:");
    eprintln!("private: {private} KiB, proportional: {} KiB", kib("Pss:"));
    assert!(private < 2048, "{private} KiB of private memory");
}

#[test]
fn crash_in_the_named_program_is_reported_as_in_any_other() {
    let _watchdog = watchdog();
    let cell = lean();
    let report = crashed(cell.at("write_at").call(0x77));
    assert_eq!(*report.cause(), Cause::Signaled { signal: libc::SIGSEGV, core_dumped: false });
    assert_eq!(report.involvement(), Involvement::Culprit);
    assert_eq!((report.fault_address(), report.access()), (Some(0x77), Some(hotcell::Access::Write)));
    let first = &report.backtrace()[0];
    assert_eq!((first.symbol.as_deref(), first.object.as_deref()), (Some("write_at"), Some("libfaulty.so")));
    assert!(report.backtrace().iter().any(|f| f.object.as_deref() == Some("hotcell-worker")), "{report}");
    faults::is_dead(&cell, &report);
    assert_eq!(*crashed(lean().f1("call_exit").call(4)).cause(), exited(4));
    assert!(matches!(
        crashed(lean().f1("recurse").call(0)).cause(),
        Cause::StackOverflow { signal: libc::SIGSEGV, .. }
    ));
}

#[test]
fn exception_through_the_named_program_is_an_abort() {
    let _watchdog = watchdog();
    let cell = lean();
    let throws = cell.session.load(faults::build("throws", "throws.cpp", &[])).unwrap();
    let report = crashed(throws.function::<fn() -> i32>("throw_int").unwrap().call());
    assert_eq!(report.signal(), Some(libc::SIGABRT), "{report}");
    let report = crashed(lean().f0("leave_thread").call());
    assert!(report.signal() == Some(libc::SIGABRT) || report.exit_code() == Some(134), "{report}");
}

#[test]
fn environment_variable_names_the_program_and_the_configuration_goes_before_it() {
    let _watchdog = watchdog();
    if !is_child() {
        let test = "environment_variable_names_the_program_and_the_configuration_goes_before_it";
        in_child(test, &[(WORKER_VARIABLE, LEAN), ("EXPECT", "lean")]);
        in_child(test, &[(WORKER_VARIABLE, "/no/such/program"), ("EXPECT", "missing")]);
        in_child(test, &[(WORKER_VARIABLE, ""), ("EXPECT", "own")]);
        return;
    }
    match &*std::env::var("EXPECT").unwrap() {
        "lean" => {
            let cell = Cell::new();
            assert!(is_lean(&cell.worker));
            assert_eq!(cell.add().call(2, 3).unwrap(), 5);
        }
        "missing" => {
            match Worker::spawn().map(drop) {
                Err(StartError::Program { program, source }) => {
                    assert_eq!(program.to_str(), Some("/no/such/program"));
                    assert_eq!(source.kind(), std::io::ErrorKind::NotFound);
                }
                other => panic!("{other:?}"),
            }
            let cell = lean();
            assert!(is_lean(&cell.worker));
        }
        // An empty variable is none: the worker is this executable.
        _ => {
            let worker = Worker::spawn().unwrap();
            assert_eq!(
                program_of(worker.pid()),
                std::fs::canonicalize(std::env::current_exe().unwrap()).unwrap()
            );
        }
    }
}

#[test]
fn lean_worker_has_an_empty_environment_and_no_foreign_descriptor() {
    let _watchdog = watchdog();
    let cell = Cell::in_worker(Worker::builder().program(LEAN).env("ONLY", "this").spawn().unwrap());
    let pid = cell.worker.pid();
    assert_eq!(std::fs::read(format!("/proc/{pid}/environ")).unwrap(), b"ONLY=this\0");
    // Standard input, the two pipes of captured output, the control socket. A session's first reply comes while its thread still closes what it needed to open.
    eventually("the worker has its four descriptors and no other", || {
        let mut kinds: Vec<_> = std::fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
            .map(|target| target.display().to_string().split(':').next().unwrap().to_owned())
            .collect();
        kinds.sort();
        kinds == ["/dev/null", "pipe", "pipe", "socket"]
    });
}

#[test]
fn started_by_hand_it_explains_itself_or_gives_up() {
    let _watchdog = watchdog();
    let run = |arguments: &[&str]| Command::new(LEAN).args(arguments).stdin(Stdio::null()).output().unwrap();
    let output = run(&[]);
    assert_eq!(output.status.code(), Some(2));
    let words = String::from_utf8(output.stderr).unwrap();
    assert!(words.contains("started by hotcell hosts") && words.contains(WORKER_VARIABLE), "{words}");
    // With a worker's arguments, but another parent than they say: no host, so no worker.
    let output = run(&["--hotcell-worker", "1"]);
    assert_eq!(output.status.code(), Some(EXIT_HOST_GONE), "{output:?}");
    // The right parent, but no socket.
    let output = run(&["--hotcell-worker", &std::process::id().to_string()]);
    assert!(!output.status.success() && output.status.code() != Some(2), "{output:?}");
    assert_ne!(EXIT_NO_SOCKET, EXIT_HOST_GONE);
}

#[test]
fn two_programs_work_side_by_side() {
    let _watchdog = watchdog();
    let (lean, own) = (lean(), Cell::new());
    assert_ne!(program_of(lean.worker.pid()), program_of(own.worker.pid()));
    assert_eq!((lean.f0("count").call().unwrap(), own.f0("count").call().unwrap()), (1, 1));
    crashed(lean.at("read_at").call(0));
    eventually("only one is dead", || !lean.worker.is_alive());
    assert_eq!(own.f0("count").call().unwrap(), 2);
}

/// The example `embedded`: a shared library with hotcell in it.
fn embedded_library() -> PathBuf {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    cargo.args([
        "build",
        "--quiet",
        "--package",
        "hotcell",
        "--example",
        "embedded",
        "--message-format=json",
    ]);
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    let output = cargo.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let messages = String::from_utf8(output.stdout).unwrap();
    let library = messages.split('"').find(|text| text.ends_with("/libembedded.so"));
    PathBuf::from(library.expect("cargo names what it has built"))
}

/// Runs a C program that loads the library and has it compute a power in a worker.
fn foreign_host(library: &Path, worker: Option<&str>) -> Output {
    let program = faults::build_program("foreign_host", "foreign_host.c", &["-ldl"]);
    let mut command = Command::new(program);
    command.arg(library).env_remove(WORKER_VARIABLE);
    if let Some(worker) = worker {
        command.env(WORKER_VARIABLE, worker);
    }
    command.output().unwrap()
}

#[test]
fn foreign_executable_is_told_what_it_needs_and_works_with_it() {
    // Before the watchdog: the compiler may take its time.
    let library = embedded_library();
    let _watchdog = watchdog();
    let without = foreign_host(&library, None);
    let (words, reason) =
        (String::from_utf8_lossy(&without.stdout), String::from_utf8_lossy(&without.stderr));
    // Its `main` ran once: nothing was started again.
    assert_eq!(words, "main\n-1\n", "{reason}");
    assert!(reason.contains("foreign_host, which is not a hotcell program"), "{reason}");
    assert!(reason.contains("HOTCELL_WORKER") && reason.contains("hotcell-worker"), "{reason}");
    let with = foreign_host(&library, Some(LEAN));
    assert_eq!(String::from_utf8_lossy(&with.stdout), "main\n1024\n", "{with:?}");
    assert!(with.status.success());
}

//! Workers that cannot be started, or are none: each way has its own error, and nothing is left behind.

#[path = "common/faults.rs"]
mod faults;

use faults::in_time::in_time;
use faults::{Cell, eventually, exited, in_child, is_child, is_gone, next_worker_works, no_children};
use faults::{open_descriptors, own_threads, watchdog};
use hotcell::{Cause, Scarce, StartError, Worker};
use nix::libc;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Makes a file with the execute bit. Another process writes it: while this one had it open for writing, a child that another test is just starting would have
/// it open too, and the kernel refuses to run such a file.
fn script(folder: &tempfile::TempDir, text: &str) -> PathBuf {
    let path = folder.path().join("worker");
    let made = Command::new("/bin/sh")
        .args(["-c", "printf %s \"$1\" > \"$2\" && chmod 755 \"$2\"", "sh", text])
        .arg(&path)
        .status()
        .unwrap();
    assert!(made.success());
    path
}

fn start(program: impl Into<PathBuf>) -> Result<Worker, StartError> {
    Worker::builder().program(program).start_timeout(Duration::from_secs(60)).spawn()
}

/// The error and its source of a program that the system refuses to run.
fn not_run(program: &Path) -> std::sync::Arc<std::io::Error> {
    match start(program).map(drop) {
        Err(error @ StartError::Program { .. }) => {
            assert!(error.to_string().contains(program.to_str().unwrap()), "{error}");
            let StartError::Program { program: named, source } = error else { unreachable!() };
            assert_eq!(named, program);
            source
        }
        other => panic!("{}: {other:?}", program.display()),
    }
}

#[test]
fn program_that_cannot_be_run_is_told_with_the_systems_reason() {
    let _watchdog = watchdog();
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(not_run(Path::new("/no/such/program")).kind(), std::io::ErrorKind::NotFound);
    let plain = folder.path().join("plain");
    std::fs::write(&plain, "#!/bin/sh\n").unwrap();
    assert_eq!(not_run(&plain).kind(), std::io::ErrorKind::PermissionDenied);
    assert_eq!(not_run(folder.path()).kind(), std::io::ErrorKind::PermissionDenied);
    assert_eq!(not_run(&plain.join("below")).kind(), std::io::ErrorKind::NotADirectory);
    // No ELF, no `#!`: the kernel does not know how to run it.
    let nonsense = script(&folder, "\u{1}\u{2}\u{3} not a program");
    assert_eq!(not_run(&nonsense).raw_os_error(), Some(libc::ENOEXEC));
    let lost = script(&folder, "#!/no/such/interpreter\n");
    assert_eq!(not_run(&lost).kind(), std::io::ErrorKind::NotFound);
    next_worker_works();
}

#[test]
fn program_that_ends_at_once_is_told_with_its_exit_status() {
    let _watchdog = watchdog();
    for (program, code) in [("/bin/true", 0), ("/bin/false", 1), ("/bin/cat", 1)] {
        match start(program).map(drop) {
            Err(StartError::Died(report)) => {
                assert_eq!(*report.cause(), exited(code), "{program}: {report}");
                assert_eq!(report.function(), None);
                assert_eq!(report.running().count(), 0);
                assert!(report.to_string().contains("never said hello"), "{report}");
                is_gone(report.pid());
            }
            other => panic!("{program}: {other:?}"),
        }
    }
    next_worker_works();
}

#[test]
fn senseless_environment_and_folder_are_refused_by_name() {
    let _watchdog = watchdog();
    let builder = hotcell::Worker::builder;
    for (worker, option) in [
        (builder().env("", "x"), "env"),
        (builder().env("A=B", "x"), "env"),
        (builder().env("A\0", "x"), "env"),
        (builder().env("A", "x\0y"), "env"),
        (builder().current_dir("/no/such/folder"), "current_dir"),
        (builder().current_dir("/bin/true"), "current_dir"),
    ] {
        match worker.spawn().map(drop) {
            Err(StartError::Configuration { option: named, .. }) => assert_eq!(named, option),
            other => panic!("{option}: {other:?}"),
        }
    }
    next_worker_works();
}

#[test]
fn program_that_dies_of_a_signal_is_told_with_it_and_with_its_last_words() {
    let _watchdog = watchdog();
    let folder = tempfile::tempdir().unwrap();
    let program =
        script(&folder, "#!/bin/sh\necho garbage on stdout\necho cannot go on >&2\nkill -KILL $$\n");
    match start(program).map(drop) {
        Err(error @ StartError::Died(_)) => {
            let text = error.to_string();
            let StartError::Died(report) = error else { unreachable!() };
            assert_eq!(report.signal(), Some(libc::SIGKILL), "{report}");
            assert_eq!(report.stderr_tail(), "cannot go on\n");
            assert!(text.contains("killed by SIGKILL") && text.contains("cannot go on"), "{text}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn program_that_never_says_hello_is_killed_at_the_start_timeout() {
    let _watchdog = watchdog();
    let folder = tempfile::tempdir().unwrap();
    let pid_file = folder.path().join("pid");
    // Talking on standard output is no hello; a deaf ear for SIGTERM is no shield.
    let text =
        format!("#!/bin/sh\ntrap '' TERM\necho $$ > {}\necho garbage\nexec sleep 1000\n", pid_file.display());
    let program = script(&folder, &text);
    let pid = in_time(Duration::from_secs(1), |after| {
        match Worker::builder().program(&program).start_timeout(after).spawn().map(drop) {
            Err(error @ StartError::TimedOut { .. }) => {
                let said = error.to_string();
                assert!(said.contains(&format!("within {after:?}")), "{said}");
                assert!(said.contains(&program.display().to_string()), "{said}");
            }
            other => panic!("{other:?}"),
        }
        // The script may not have come so far.
        std::fs::read_to_string(&pid_file).ok()?.trim().parse().ok()
    });
    is_gone(pid);
    next_worker_works();
}

#[test]
fn program_that_talks_nonsense_on_the_socket_is_a_mismatch() {
    let _watchdog = watchdog();
    let folder = tempfile::tempdir().unwrap();
    let pid_file = folder.path().join("pid");
    for garbage in ["echo garbage", "head -c 4096 /dev/zero", "head -c 100000 /dev/zero", "printf x"] {
        let text = format!("#!/bin/sh\necho $$ > {}\n{garbage} >&0\nexec sleep 1000\n", pid_file.display());
        let program = script(&folder, &text);
        match start(&program).map(drop) {
            Err(error @ StartError::Mismatch { .. }) => {
                assert!(error.to_string().contains("not a hello"), "{error}");
            }
            // A packet over the limit is a breach before it is read.
            Err(StartError::Died(report)) => {
                assert!(matches!(report.cause(), Cause::ProtocolBreach { .. }), "{garbage}: {report}");
            }
            other => panic!("{garbage}: {other:?}"),
        }
        is_gone(std::fs::read_to_string(&pid_file).unwrap().trim().parse().unwrap());
    }
    next_worker_works();
}

#[test]
fn mirror_that_returns_every_packet_is_no_worker() {
    let _watchdog = watchdog();
    let folder = tempfile::tempdir().unwrap();
    // It returns the host's own hello, which is a good one; and then the request for a session.
    let mirror = script(&folder, "#!/bin/sh\nexec cat <&0 >&0\n");
    let worker = start(mirror).unwrap();
    match worker.session().map(drop) {
        Err(StartError::Died(report)) => {
            assert!(matches!(report.cause(), Cause::ProtocolBreach { .. }), "{report}");
        }
        other => panic!("{other:?}"),
    }
    is_gone(worker.pid());
    next_worker_works();
}

#[test]
fn program_that_closes_its_socket_and_lives_on_is_killed() {
    let _watchdog = watchdog();
    let folder = tempfile::tempdir().unwrap();
    let program = script(&folder, "#!/bin/sh\nexec sleep 1000 < /dev/null\n");
    match start(program).map(drop) {
        Err(StartError::Died(report)) => {
            assert!(matches!(report.cause(), Cause::ProtocolBreach { .. }), "{report}");
            is_gone(report.pid());
        }
        other => panic!("{other:?}"),
    }
}

/// In a process of its own, because it lowers the limit of the whole process.
#[test]
fn start_without_descriptors_is_an_error_that_leaves_nothing_and_later_ones_work() {
    let _watchdog = watchdog();
    if !is_child() {
        in_child("start_without_descriptors_is_an_error_that_leaves_nothing_and_later_ones_work", &[]);
        return;
    }
    // Compiled while there are descriptors.
    let library = faults::faulty();
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let mut failures = 0;
    let mut sessions_refused = 0;
    // With room for none, one, two ... more: each step of the start is the one that fails once.
    for spare in 0..24 {
        let before = open_descriptors() - 1; // less the one that counts them
        let limit = u64::try_from(before + spare).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, limit, hard).unwrap();
        let started = Worker::spawn();
        let session = started.as_ref().ok().map(Worker::session);
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
        match started {
            Ok(worker) => {
                match session.unwrap() {
                    // Its limit is the one that it was started with, and may be too low to load anything.
                    Ok(session) => session.ping().unwrap(),
                    Err(
                        StartError::System { .. }
                        | StartError::Refused { .. }
                        | StartError::Scarce { what: Scarce::OpenFiles }
                        | StartError::Died(_),
                    ) => {
                        sessions_refused += 1;
                    }
                    Err(other) => panic!("{other:?}"),
                }
                let pid = worker.pid();
                worker.dispose();
                is_gone(pid);
            }
            Err(error) => {
                failures += 1;
                assert!(
                    matches!(
                        error,
                        StartError::System { .. } | StartError::Program { .. } | StartError::Died(_)
                    ),
                    "{error:?}"
                );
                // The system's own words are the innermost.
                let first = std::error::Error::source(&error);
                if let Some(source) = std::iter::successors(first, |error| error.source()).last() {
                    let source = source.to_string();
                    assert!(source.contains("Too many open files") || source.contains("EMFILE"), "{source}");
                }
            }
        }
        eventually("no process is left", no_children);
        // The library's own three come with the first start that gets that far.
        eventually("no descriptor is left", || open_descriptors() - 1 <= before + 3);
    }
    assert!(failures >= 5, "{failures} failures");
    eprintln!("{failures} starts and {sessions_refused} sessions refused");
    let settled = open_descriptors();
    for _ in 0..5 {
        let session = Worker::spawn().unwrap().session().unwrap();
        let add = session.load(library.clone()).unwrap().function::<fn(i32, i32) -> i32>("add").unwrap();
        assert_eq!(add.call(2, 3).unwrap(), 5);
    }
    eventually("no descriptor is left", || open_descriptors() <= settled);
}

/// In a process of its own, because descriptors and threads are counted.
#[test]
fn failed_starts_leave_no_descriptor_thread_or_process_behind() {
    let _watchdog = watchdog();
    if !is_child() {
        in_child("failed_starts_leave_no_descriptor_thread_or_process_behind", &[]);
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let silent = script(&folder, "#!/bin/sh\nexec sleep 1000\n");
    drop(Cell::new());
    eventually("the first worker is gone", no_children);
    let (descriptors, threads) = (open_descriptors(), own_threads());
    for _ in 0..10 {
        assert!(start("/no/such/program").is_err());
        assert!(start("/bin/true").is_err());
        let late = Worker::builder().program(&silent).start_timeout(Duration::from_millis(10)).spawn();
        assert!(matches!(late, Err(StartError::TimedOut { .. })));
    }
    eventually("no process is left", no_children);
    eventually("descriptors and threads are as few as before", || {
        open_descriptors() <= descriptors && own_threads() <= threads
    });
}

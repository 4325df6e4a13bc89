//! Modules that cannot be loaded, or do harm while they are loaded and unloaded: each way has its own error, and the host goes on.

#[path = "common/faults.rs"]
mod faults;

use faults::in_time::{in_time, prepared};
use faults::{
    Cell, build, exited, faulty, is_gone, next_worker_works, signaled, watchdog, with_constructor,
    with_destructor,
};
use faults::{eventually, in_child, is_child, no_children, open_descriptors, own_threads};
use hotcell::{CallError, Cause, CrashReport, Involvement, LoadError, Module, Session, Worker};
use nix::libc;
use std::path::{Path, PathBuf};
use std::time::Duration;

fn session() -> Session {
    Worker::spawn().unwrap().session().unwrap()
}

/// The error of a load that must fail and do no harm: the session works afterwards.
fn refused(session: &Session, source: impl Into<hotcell::ModuleSource>) -> LoadError {
    let error = session.load(source).expect_err("it cannot be loaded");
    session.ping().unwrap();
    error
}

/// The report of a load that must have killed its worker, after the checks that hold for all of them.
fn fatal(library: &Path) -> CrashReport {
    let session = session();
    let worker = session.worker();
    let error = session.load(library).expect_err("it kills its worker");
    let LoadError::Call { module, source: source @ CallError::Crashed(_) } = error else {
        panic!("{error:?}")
    };
    assert_eq!(&*module, library.to_str().unwrap());
    assert!(source.may_have_run() && !source.session_usable());
    let report = source.crash_report().unwrap().clone();
    assert_eq!(report.involvement(), Involvement::Culprit, "{report}");
    assert_eq!(report.function().map(|f| &*f.symbol), Some("(load)"));
    assert_eq!(report.function().map(|f| &*f.module), library.to_str());
    assert!(!report.core_dumped() && report.usage().minor_faults > 0);
    assert!(!worker.is_alive());
    is_gone(worker.pid());
    let text = report.to_string();
    let first = format!("worker {} {} in the load of {}", worker.pid(), report.cause(), library.display());
    assert_eq!(text.lines().next(), Some(&*first));
    next_worker_works();
    report
}

/// Whether the backtrace has a frame in this library. (Constructors are static functions, so they have no name there.)
fn is_in(report: &CrashReport, library: &Path) -> bool {
    let name = library.file_name().unwrap().to_str();
    report.backtrace().iter().any(|frame| frame.object.as_deref() == name)
}

fn file_with(folder: &tempfile::TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

// Files.

#[test]
fn missing_file_and_missing_soname_are_not_found() {
    let _watchdog = watchdog();
    let session = session();
    for name in ["/no/such/libthing.so", "./libthing.so", "libno-such-thing.so.7", "/dev/null/libthing.so"] {
        let error = refused(&session, name);
        assert!(matches!(&error, LoadError::NotFound { module, .. } if &**module == name), "{error:?}");
        assert!(error.to_string().contains(name), "{error}");
    }
    for name in ["", "lib\0.so"] {
        assert!(matches!(refused(&session, name), LoadError::NotFound { .. }));
    }
}

#[test]
fn what_is_not_elf_is_told_so_and_never_waited_for() {
    let _watchdog = watchdog();
    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join("fifo.so");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let link = folder.path().join("link.so");
    std::os::unix::fs::symlink("/dev/zero", &link).unwrap();
    let session = session();
    for path in [
        file_with(&folder, "text.so", b"#!/bin/sh\necho not a library\n"),
        file_with(&folder, "script.so", b"INPUT(/lib/libc.so.6)\n"),
        file_with(&folder, "empty.so", b""),
        file_with(&folder, "short.so", b"\x7fEL"),
        fifo,
        link,
        folder.path().to_owned(),
        "/dev/null".into(),
    ] {
        let error = refused(&session, path.clone());
        assert!(matches!(error, LoadError::NotElf { .. }), "{}: {error:?}", path.display());
        assert!(error.to_string().contains("is not an ELF shared object"), "{error}");
    }
}

#[test]
fn soname_found_on_the_library_path_is_judged_like_a_path() {
    let _watchdog = watchdog();
    let folder = tempfile::tempdir().unwrap();
    file_with(
        &folder,
        "libtext.so",
        b"some text that is long enough to be looked at, and is no ELF file at all....",
    );
    std::fs::copy(faulty(), folder.path().join("libfound.so")).unwrap();
    let worker = Worker::builder().env("LD_LIBRARY_PATH", folder.path()).spawn().unwrap();
    let session = worker.session().unwrap();
    let error = refused(&session, "libtext.so");
    assert!(matches!(error, LoadError::NotElf { .. }), "{error:?}");
    let add = session.load("libfound.so").unwrap().function::<fn(i32, i32) -> i32>("add").unwrap();
    assert_eq!(add.call(2, 3).unwrap(), 5);
}

#[test]
fn objects_of_other_kinds_are_told_from_libraries_of_this_machine() {
    let _watchdog = watchdog();
    let folder = tempfile::tempdir().unwrap();
    let good = std::fs::read(faulty()).unwrap();
    let with = |name: &str, at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        file_with(&folder, name, &bytes)
    };
    let session = session();
    for path in [
        with("class32.so", 4, 1),
        with("machine.so", 18, 8),
        with("executable.so", 16, 2),
        with("relocatable.so", 16, 1),
        with("core.so", 16, 4),
        file_with(&folder, "header-cut.so", &good[..17]),
    ] {
        let error = refused(&session, path.clone());
        assert!(matches!(error, LoadError::WrongKind { .. }), "{}: {error:?}", path.display());
    }
    // The untouched one is fine.
    session.load(file_with(&folder, "good.so", &good)).unwrap();
}

#[test]
fn damaged_libraries_are_errors_of_any_kind_and_never_more() {
    let _watchdog = watchdog();
    let folder = tempfile::tempdir().unwrap();
    let good = std::fs::read(faulty()).unwrap();
    // Cut where the linker's checks end and its trust begins, and with bytes of its tables overwritten.
    for (i, cut) in [20, 63, 64, 200, 1000, 4096, good.len() / 2].into_iter().enumerate() {
        let path = file_with(&folder, &format!("cut{i}.so"), &good[..cut]);
        let (session, name) = (session(), path.display().to_string());
        match session.load(path).map(drop) {
            Err(LoadError::Call { source, .. }) => {
                let report = source.crash_report().expect("a crash and no timeout");
                assert!(matches!(report.cause(), Cause::Signaled { .. }), "{name}: {report}");
            }
            Err(_) => session.ping().unwrap(),
            Ok(()) => panic!("{name} was loaded"),
        }
    }
    for at in [24, 32, 40, 54, 56, 58, 64 + 8, 64 + 16, 64 + 32, 64 + 40] {
        let mut bytes = good.clone();
        bytes[at..at + 4].copy_from_slice(&[0xff, 0xfe, 0xfd, 0x7f]);
        let path = file_with(&folder, &format!("torn{at}.so"), &bytes);
        let session = session();
        match session.load(path).map(drop) {
            Err(LoadError::Call { source, .. }) => {
                let report = source.crash_report().expect("a crash and no timeout");
                assert!(matches!(report.cause(), Cause::Signaled { .. } | Cause::Exited { .. }), "{report}");
            }
            // Some fields do not matter to the linker.
            Err(_) | Ok(()) => session.ping().unwrap(),
        }
    }
    next_worker_works();
}

#[test]
fn symbol_that_is_not_there_names_itself_and_its_module() {
    let _watchdog = watchdog();
    let session = session();
    let module = session.load(faulty()).unwrap();
    for symbol in ["no_such_function", "", "a\0b", "add ", &"x".repeat(5000)] {
        let error = module.function::<fn() -> i32>(symbol).expect_err("it is not there");
        let LoadError::MissingSymbol { function, .. } = &error else { panic!("{error:?}") };
        assert_eq!((&*function.symbol, &*function.module), (symbol, faulty().to_str().unwrap()));
        if symbol == "no_such_function" {
            let said = error.to_string();
            assert!(said.starts_with("there is no symbol no_such_function of "), "{said}");
            for name in ["no_such_function", "libfaulty.so"] {
                assert_eq!(said.matches(name).count(), 1, "{name} once in {said}");
            }
        }
    }
    let add = module.function::<fn(i32, i32) -> i32>("add").unwrap();
    assert_eq!(add.call(2, 3).unwrap(), 5, "the session is none the worse");
}

#[test]
fn missing_dependency_is_told_from_a_missing_module() {
    let _watchdog = watchdog();
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("libbase.so");
    std::fs::copy(build("base", "base.c", &[]), &base).unwrap();
    let flags = [base.to_str().unwrap().to_owned(), format!("-Wl,-rpath,{}", folder.path().display())];
    let needs = build("needs-dependency", "needs.c", &[&flags[0], &flags[1]]);
    let session = session();
    std::fs::rename(&base, folder.path().join("moved.so")).unwrap();
    let error = refused(&session, needs.clone());
    assert!(
        matches!(&error, LoadError::MissingDependency { detail, .. } if detail.contains("libbase.so")),
        "{error:?}"
    );
    // Once it is there, the same session loads it.
    std::fs::rename(folder.path().join("moved.so"), &base).unwrap();
    let value = session.load(needs).unwrap().function::<fn() -> i32>("needs_value").unwrap();
    assert_eq!(value.call().unwrap(), 42);
}

#[test]
fn missing_import_is_found_at_load_or_at_the_call_as_asked() {
    let _watchdog = watchdog();
    let needs = build("needs-nothing", "needs.c", &[]);
    let session = session();
    let error = refused(&session, Module::ffi(&needs).resolve_now(true));
    assert!(
        matches!(&error, LoadError::MissingImport { detail, .. } if detail.contains("base_value")),
        "{error:?}"
    );
    // Lazily: the load is fine, and the call that needs the symbol ends in the linker's exit.
    let lazy = session.load(Module::ffi(&needs)).unwrap();
    let error = lazy.function::<fn() -> i32>("needs_value").unwrap().call().unwrap_err();
    let report = error.crash_report().expect("the worker ended");
    assert_eq!(*report.cause(), exited(127), "{report}");
    assert!(report.stderr_tail().contains("base_value"), "{report}");
    next_worker_works();
}

#[test]
fn import_from_a_global_module_is_found() {
    let _watchdog = watchdog();
    let (needs, base) = (build("needs-nothing", "needs.c", &[]), build("base", "base.c", &[]));
    let session = session();
    session.load(Module::ffi(base).global(true)).unwrap();
    let needs = session.load(Module::ffi(needs).resolve_now(true)).unwrap();
    assert_eq!(needs.function::<fn() -> i32>("needs_value").unwrap().call().unwrap(), 42);
}

#[test]
fn module_that_was_never_loaded_by_this_session_is_refused_after_a_failed_load() {
    let _watchdog = watchdog();
    let session = session();
    refused(&session, "/no/such/libthing.so");
    let module = session.load(faulty()).unwrap();
    assert_eq!(module.name(), faulty().to_str().unwrap());
    assert_eq!(module.function::<fn() -> i32>("count").unwrap().call().unwrap(), 1);
}

// Constructors.

#[test]
fn segfault_in_a_constructor_is_a_crash_during_load() {
    let _watchdog = watchdog();
    let library = with_constructor("segfault");
    let report = fatal(&library);
    assert_eq!(*report.cause(), signaled(libc::SIGSEGV));
    assert_eq!(report.fault_address(), Some(0));
    assert!(is_in(&report, &library), "{report}");
}

#[test]
fn abort_in_a_constructor_comes_with_its_explanation_escaped() {
    let _watchdog = watchdog();
    let library = with_constructor("explains_and_aborts");
    let report = fatal(&library);
    assert_eq!(*report.cause(), signaled(libc::SIGABRT));
    assert_eq!(report.stderr_tail(), "constructor: cannot go on\\u{1b}[31m\n");
    assert!(is_in(&report, &library), "{report}");
    assert_eq!(*fatal(&with_constructor("aborts")).cause(), signaled(libc::SIGABRT));
}

#[test]
fn exit_in_a_constructor_is_no_success_whatever_its_code() {
    let _watchdog = watchdog();
    assert_eq!(*fatal(&with_constructor("exit_zero")).cause(), exited(0));
    assert_eq!(*fatal(&with_constructor("exit_three")).cause(), exited(3));
}

#[test]
fn hanging_constructor_is_ended_by_the_deadline() {
    let _watchdog = watchdog();
    let after = Duration::from_millis(100);
    let worker = Worker::builder().timeout(after).spawn().unwrap();
    let session = worker.session().unwrap();
    match session.load(with_constructor("hangs")).map(drop) {
        Err(LoadError::Call {
            source: CallError::TimedOut { function, after: told, worker_killed }, ..
        }) => {
            assert_eq!((&*function.symbol, told, worker_killed), ("(load)", after, true));
        }
        other => panic!("{other:?}"),
    }
    eventually("the death is known", || !worker.is_alive());
    is_gone(worker.pid());
    let report = worker.crash_report().unwrap();
    assert!(matches!(report.cause(), Cause::DeadlineExceeded { .. }), "{report}");
    next_worker_works();
}

#[test]
fn constructor_that_forks_does_not_keep_the_host_waiting() {
    let _watchdog = watchdog();
    let session = session();
    let worker = session.worker();
    let module = session.load(with_constructor("forks")).unwrap();
    assert_eq!(module.function::<fn() -> i32>("healthy").unwrap().call().unwrap(), 42);
    let child = module.function::<fn() -> i32>("child_pid").unwrap().call().unwrap();
    assert!(child > 0);
    // The child holds the output pipes and the control socket open, and outlives the worker: the kernel ends only the worker with its host.
    // Neither the worker's end nor the news of it wait for the child.
    worker.dispose();
    is_gone(worker.pid());
    let report = worker.crash_report().unwrap();
    assert_eq!(*report.cause(), Cause::Disposed);
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(child), nix::sys::signal::Signal::SIGKILL);
    next_worker_works();
}

#[test]
fn crash_after_a_fork_does_not_wait_for_the_child() {
    let _watchdog = watchdog();
    let session = session();
    let forked = session.load(with_constructor("forks")).unwrap();
    let child = forked.function::<fn() -> i32>("child_pid").unwrap().call().unwrap();
    let faulty = session.load(faulty()).unwrap();
    let error = faulty.function::<fn(u64) -> i32>("read_at").unwrap().call(0).unwrap_err();
    assert_eq!(*error.crash_report().expect("a crash").cause(), signaled(libc::SIGSEGV));
    is_gone(session.worker().pid());
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(child), nix::sys::signal::Signal::SIGKILL);
}

#[test]
fn constructor_that_closes_all_descriptors_harms_at_most_its_worker() {
    let _watchdog = watchdog();
    let session = session();
    let worker = session.worker();
    // Calls need no descriptor.
    let module = session.load(with_constructor("closes_all")).unwrap();
    assert_eq!(module.function::<fn() -> i32>("healthy").unwrap().call().unwrap(), 42);
    // A new session does: the worker cannot give it, and says so or ends.
    let error = worker.session().map(drop).expect_err("there is no socket to answer on");
    assert!(matches!(error, hotcell::StartError::Died(_) | hotcell::StartError::Refused { .. }), "{error:?}");
    worker.dispose();
    is_gone(worker.pid());
    next_worker_works();
}

#[test]
fn threads_of_a_constructor_end_with_the_worker() {
    let _watchdog = watchdog();
    let session = session();
    let worker = session.worker();
    let module = session.load(with_constructor("starts_threads")).unwrap();
    assert_eq!(module.function::<fn() -> i32>("healthy").unwrap().call().unwrap(), 42);
    let threads = std::fs::read_dir(format!("/proc/{}/task", worker.pid())).unwrap().count();
    assert!(threads >= 16 + 2, "{threads}");
    worker.dispose();
    is_gone(worker.pid());
}

#[test]
fn talkative_constructor_is_neither_blocked_nor_kept_in_memory() {
    let _watchdog = watchdog();
    let session = session();
    let worker = session.worker();
    let module = session.load(with_constructor("is_talkative")).unwrap();
    assert_eq!(module.function::<fn() -> i32>("healthy").unwrap().call().unwrap(), 42);
    eventually("the tail arrives", || worker.stdout_tail().ends_with(b"x\nthe last words\n"));
    assert_eq!(worker.stdout_tail().len(), hotcell::OUTPUT_TAIL_BYTES);
    assert!(worker.stderr_tail().is_empty());
}

// Destructors.

#[test]
fn destructor_that_crashes_is_told_by_close() {
    let _watchdog = watchdog();
    for (body, cause) in [
        ("segfault", signaled(libc::SIGSEGV)),
        ("aborts", signaled(libc::SIGABRT)),
        ("exit_three", exited(3)),
    ] {
        let session = session();
        let worker = session.worker();
        let library = with_destructor(body);
        let module = session.load(&*library).unwrap();
        assert_eq!(module.function::<fn() -> i32>("healthy").unwrap().call().unwrap(), 42);
        let error = session.close().unwrap_err();
        assert!(error.may_have_run() && !error.session_usable());
        let report = error.crash_report().expect("a crash");
        assert_eq!(*report.cause(), cause, "{report}");
        assert_eq!(report.function().map(|f| &*f.symbol), Some("close"));
        assert!(body == "exit_three" || is_in(report, &library), "{report}");
        is_gone(worker.pid());
    }
    next_worker_works();
}

#[test]
fn destructor_that_hangs_is_ended_by_the_deadline() {
    let _watchdog = watchdog();
    in_time(Duration::from_millis(500), |timeout| {
        let worker = Worker::builder().timeout(timeout).spawn().unwrap();
        let session = worker.session().unwrap();
        prepared(session.load(with_destructor("hangs")))?;
        let error = session.close().unwrap_err();
        assert!(matches!(error, CallError::TimedOut { worker_killed: true, .. }), "{error:?}");
        is_gone(worker.pid());
        Some(())
    });
}

#[test]
fn dropping_a_session_whose_destructor_crashes_is_silent_and_its_worker_knows() {
    let _watchdog = watchdog();
    let session = session();
    let worker = session.worker();
    session.load(with_destructor("segfault")).unwrap();
    drop(session);
    eventually("the worker dies", || !worker.is_alive());
    assert_eq!(*worker.crash_report().unwrap().cause(), signaled(libc::SIGSEGV));
    is_gone(worker.pid());
}

#[test]
fn disposal_runs_no_destructor() {
    let _watchdog = watchdog();
    let session = session();
    let worker = session.worker();
    session.load(with_destructor("segfault")).unwrap();
    worker.dispose();
    assert_eq!(*worker.crash_report().unwrap().cause(), Cause::Disposed);
    is_gone(worker.pid());
}

// Several of them.

#[test]
fn module_loaded_twice_is_one_library_behind_two_handles() {
    let _watchdog = watchdog();
    let session = session();
    let (one, two) = (session.load(faulty()).unwrap(), session.load(faulty()).unwrap());
    let count = |module: &Module| module.function::<fn() -> i32>("count").unwrap().call().unwrap();
    assert_eq!((count(&one), count(&two), count(&one)), (1, 2, 3));
}

#[test]
fn several_modules_live_side_by_side_in_one_session() {
    let _watchdog = watchdog();
    let session = session();
    let modules: Vec<_> =
        (0..20).map(|i| session.load(build(&format!("copy{i}"), "faulty.c", &[])).unwrap()).collect();
    for (i, module) in modules.iter().enumerate() {
        let count = module.function::<fn() -> i32>("count").unwrap();
        for round in 1..=i + 1 {
            assert_eq!(usize::try_from(count.call().unwrap()), Ok(round), "each has its own state");
        }
    }
    let libm = session.load("libm.so.6").unwrap();
    assert_eq!(libm.function::<fn(f64, f64) -> f64>("pow").unwrap().call(2.0, 0.5).unwrap(), 2f64.sqrt());
}

#[test]
fn sessions_of_one_worker_share_a_library_and_closing_one_leaves_it_to_the_other() {
    let _watchdog = watchdog();
    let one = Cell::new();
    let two = Cell::in_worker(one.worker.clone());
    assert_eq!(one.f0("count").call().unwrap(), 1);
    let count = two.f0("count");
    assert_eq!(count.call().unwrap(), 2, "one process has one copy of a library");
    one.session.close().unwrap();
    assert!(matches!(one.session.ping(), Err(CallError::Closed)));
    assert_eq!(count.call().unwrap(), 3);
    two.session.close().unwrap();
    // The last user gone, the library is unloaded: the next one starts afresh.
    let three = Cell::in_worker(one.worker.clone());
    assert_eq!(three.f0("count").call().unwrap(), 1);
}

#[test]
fn workers_share_nothing_of_a_library() {
    let _watchdog = watchdog();
    let (one, two) = (Cell::new(), Cell::new());
    assert_eq!(one.f0("count").call().unwrap(), 1);
    assert_eq!(two.f0("count").call().unwrap(), 1);
    assert_eq!(one.f0("count").call().unwrap(), 2);
}

/// In a process of its own, because descriptors and threads are counted.
#[test]
fn failed_loads_leave_no_descriptor_or_thread_behind() {
    let _watchdog = watchdog();
    if !is_child() {
        in_child("failed_loads_leave_no_descriptor_or_thread_behind", &[]);
        return;
    }
    let fatal = ["segfault", "exit_zero"].map(with_constructor);
    let round = || {
        let session = session();
        refused(&session, "/no/such/libthing.so");
        refused(&session, "/dev/null");
        let theirs = || std::fs::read_dir(format!("/proc/{}/fd", session.worker().pid())).unwrap().count();
        let before = theirs();
        for _ in 0..20 {
            refused(&session, "/dev/null");
            refused(&session, "libno-such-thing.so.7");
        }
        assert_eq!(theirs(), before, "in the worker");
        for library in &fatal {
            let session = self::session();
            assert!(session.load(library).is_err());
        }
    };
    round();
    eventually("the first round's workers are gone", no_children);
    let (descriptors, threads) = (open_descriptors(), own_threads());
    for _ in 0..8 {
        round();
    }
    eventually("the workers are gone", no_children);
    eventually("descriptors and threads are as few as before", || {
        open_descriptors() <= descriptors && own_threads() <= threads
    });
}

//! Native code that dies in a call: each way has its own cause, told by the kernel, and the host goes on.

#[path = "common/faults.rs"]
mod faults;

use faults::{
    Cell, build, crashed, dies, eventually, exited, faulty, is_dead, is_gone, napping, next_worker_works,
};
use faults::{in_child, is_child, mappings, no_children, open_descriptors, own_threads, signaled, watchdog};
use hotcell::{
    Access, CallError, Cause, CrashReport, In, Involvement, OnDeadline, RemotePtr, SessionBuilder,
    WaitPolicy, Worker, WorkerEvent,
};
use nix::libc;
use std::ffi::CStr;
use std::sync::Arc;
use std::time::Duration;

/// Whether the backtrace has a frame of this function of `libfaulty.so`.
fn backtrace_has(report: &CrashReport, symbol: &str) -> bool {
    report.backtrace().iter().any(|frame| {
        frame.symbol.as_deref() == Some(symbol) && frame.object.as_deref() == Some("libfaulty.so")
    })
}

/// The fault's facts: it happened in `symbol`, and the instruction is known.
fn is_located(report: &CrashReport, symbol: &str) {
    assert!(backtrace_has(report, symbol), "{report}");
    let (pc, bytes) = report.instruction().expect("the crash handler ran");
    assert!(pc != 0 && !bytes.is_empty(), "{report}");
    assert_eq!(report.backtrace()[0].pc, pc);
    assert_eq!(report.backtrace()[0].symbol.as_deref(), Some(symbol), "innermost first: {report}");
}

// Faults of the processor.

#[test]
fn segfault_in_read_reports_signal_address_and_access() {
    let _watchdog = watchdog();
    let report = dies("read_at", |cell| cell.at("read_at").call(0x123));
    assert_eq!(*report.cause(), signaled(libc::SIGSEGV));
    assert_eq!(report.signal(), Some(libc::SIGSEGV));
    assert_eq!(report.exit_code(), None);
    assert_eq!(report.fault_address(), Some(0x123));
    assert_eq!(report.access(), Some(Access::Read));
    is_located(&report, "read_at");
    let own = std::env::current_exe().unwrap();
    let last = report.backtrace().last().unwrap().object.as_deref();
    assert_eq!(last, own.file_name().and_then(|name| name.to_str()), "it ends at the serve loop: {report}");
    let text = report.to_string();
    assert!(text.contains("killed by SIGSEGV in read_at of "), "{text}");
    assert!(text.contains("\n  fault: read of 0x123\n"), "{text}");
    assert!(text.contains("\n  #0 "), "{text}");
    assert!(text.contains("libfaulty.so"), "{text}");
    assert!(text.contains("\n  used: "), "{text}");
    assert!(!text.contains("did not finish"), "{text}");
}

#[test]
fn segfault_in_write_reports_a_write() {
    let _watchdog = watchdog();
    let report = dies("write_at", |cell| cell.at("write_at").call(0xdead000));
    assert_eq!(*report.cause(), signaled(libc::SIGSEGV));
    assert_eq!((report.fault_address(), report.access()), (Some(0xdead000), Some(Access::Write)));
    is_located(&report, "write_at");
    assert!(report.to_string().contains("fault: write to 0xdead000"), "{report}");
}

#[test]
fn call_of_a_null_function_reports_a_jump_and_its_caller() {
    let _watchdog = watchdog();
    let report = dies("call_at", |cell| cell.at("call_at").call(0));
    assert_eq!(*report.cause(), signaled(libc::SIGSEGV));
    assert_eq!((report.fault_address(), report.access()), (Some(0), Some(Access::Execute)));
    let (pc, bytes) = report.instruction().unwrap();
    assert_eq!((pc, bytes.len()), (0, 0), "there is no instruction at null");
    assert!(backtrace_has(&report, "call_at"), "{report}");
    assert!(report.to_string().contains("fault: jump to 0x0"), "{report}");
}

#[test]
fn non_canonical_address_is_a_segfault_without_address() {
    let _watchdog = watchdog();
    let report = dies("read_at", |cell| cell.at("read_at").call(0x8000_0000_0000_0000));
    assert_eq!(*report.cause(), signaled(libc::SIGSEGV));
    assert_eq!(report.fault_address(), None, "the processor does not tell: {report}");
    is_located(&report, "read_at");
}

#[test]
fn access_beyond_the_end_of_a_mapped_file_is_a_bus_error() {
    let _watchdog = watchdog();
    let report = dies("bus_error", |cell| cell.f0("bus_error").call());
    assert_eq!(*report.cause(), signaled(libc::SIGBUS));
    assert_eq!(report.access(), Some(Access::Write));
    assert_eq!(report.fault_address().unwrap() % 4096, 0, "{report}");
    is_located(&report, "bus_error");
}

#[test]
fn division_by_zero_is_a_sigfpe_at_the_dividing_instruction() {
    let _watchdog = watchdog();
    let report = dies("divide", |cell| {
        let divide = cell.module.function::<fn(i32, i32) -> i32>("divide").unwrap();
        assert_eq!(divide.call(7, 2).unwrap(), 3);
        divide.call(7, 0)
    });
    assert_eq!(*report.cause(), signaled(libc::SIGFPE));
    assert_eq!(report.access(), None);
    is_located(&report, "divide");
    // The address that comes with it is that of the instruction.
    assert_eq!(report.fault_address(), report.instruction().map(|(pc, _)| pc));
}

#[test]
fn illegal_instruction_reports_its_bytes() {
    let _watchdog = watchdog();
    let report = dies("illegal", |cell| cell.f0("illegal").call());
    assert_eq!(*report.cause(), signaled(libc::SIGILL));
    is_located(&report, "illegal");
    if cfg!(target_arch = "x86_64") {
        assert_eq!(report.instruction().unwrap().1[..2], [0x0f, 0x0b], "ud2: {report}");
        assert!(report.to_string().contains(" 0f 0b"), "{report}");
    }
}

// Ends of the library's own making.

#[test]
fn abort_is_a_sigabrt_with_the_aborting_function_in_the_backtrace() {
    let _watchdog = watchdog();
    let report = dies("call_abort", |cell| cell.f0("call_abort").call());
    assert_eq!(*report.cause(), signaled(libc::SIGABRT));
    assert_eq!(report.fault_address(), None, "{report}");
    assert!(backtrace_has(&report, "call_abort"), "{report}");
}

#[test]
fn exit_in_a_call_is_told_with_its_code_and_zero_is_no_success() {
    let _watchdog = watchdog();
    for (function, code) in [
        ("call_exit", 0),
        ("call_exit", 3),
        ("call_exit", 255),
        ("call_quick_exit", 0),
        ("call_quick_exit", 7),
    ] {
        let report = dies(function, |cell| cell.f1(function).call(code));
        assert_eq!(*report.cause(), exited(code));
        assert_eq!((report.exit_code(), report.signal()), (Some(code), None));
        assert!(report.backtrace().is_empty() && report.fault_address().is_none(), "{report}");
        assert!(
            report.to_string().contains(&format!("exited with code {code} in {function} of ")),
            "{report}"
        );
    }
}

#[test]
fn fatal_signals_that_a_library_raises_are_told_apart() {
    let _watchdog = watchdog();
    for signal in [libc::SIGKILL, libc::SIGTERM, libc::SIGSEGV, libc::SIGPIPE, libc::SIGSYS, libc::SIGRTMIN()]
    {
        let report = dies("raise_signal", |cell| cell.f1("raise_signal").call(signal));
        assert_eq!(*report.cause(), signaled(signal), "{report}");
        assert_eq!(report.fault_address(), None, "nothing faulted: {report}");
    }
}

#[test]
fn stopped_worker_is_ended_by_the_deadline() {
    let _watchdog = watchdog();
    let cell = Cell::new();
    let stop = cell.f1("raise_signal").with_timeout(Duration::from_millis(100)).unwrap();
    let error = stop.call(libc::SIGSTOP).unwrap_err();
    assert!(matches!(error, CallError::TimedOut { worker_killed: true, .. }), "{error}");
    assert!(error.may_have_run() && !error.session_usable());
    is_gone(cell.worker.pid());
    next_worker_works();
}

#[test]
fn worker_killed_from_outside_is_a_crash_and_not_a_disposal() {
    let _watchdog = watchdog();
    let cell = Cell::new();
    let nap = napping(&cell, 60_000, 0);
    let pid = i32::try_from(cell.worker.pid()).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    let report = crashed(nap.join().unwrap());
    assert_eq!(*report.cause(), signaled(libc::SIGKILL));
    is_dead(&cell, &report);
}

// Odd ways out of the call.

#[test]
fn exception_that_leaves_the_library_aborts_the_worker() {
    let _watchdog = watchdog();
    let throws = build("throws", "throws.cpp", &[]);
    for symbol in ["throw_int", "throw_error"] {
        let cell = Cell::new();
        let module = cell.session.load(throws.clone()).unwrap();
        assert_eq!(module.function::<fn() -> i32>("throw_and_catch").unwrap().call().unwrap(), 3);
        let report = crashed(module.function::<fn() -> i32>(symbol).unwrap().call());
        assert_eq!(*report.cause(), signaled(libc::SIGABRT), "{report}");
        assert_eq!(report.culprit().map(|f| &*f.symbol), Some(symbol));
        // Whichever language's run-time system notices first.
        let words = report.stderr_tail();
        assert!(words.contains("terminate called") || words.contains("foreign exception"), "{report}");
        is_dead(&cell, &report);
    }
    next_worker_works();
}

#[test]
fn jump_to_a_call_that_has_returned_harms_at_most_the_worker() {
    let _watchdog = watchdog();
    let cell = Cell::new();
    assert_eq!(cell.f0("remember_jump").call().unwrap(), 1);
    // What happens is undefined in C: it may look like a second return of the first call, or crash. Never a hang, never anything
    // in the host.
    match cell.f0("jump_away").call() {
        Ok(value) => {
            assert_eq!(value, 1007);
            assert_eq!(cell.add().call(2, 3).unwrap(), 5);
        }
        result => is_dead(&cell, &crashed(result)),
    }
    next_worker_works();
}

#[test]
fn ending_the_session_thread_ends_the_worker_and_is_explained() {
    let _watchdog = watchdog();
    let report = dies("leave_thread", |cell| cell.f0("leave_thread").call());
    assert!(
        *report.cause() == exited(134) || *report.cause() == signaled(libc::SIGABRT),
        "nobody would ever answer: {report}"
    );
}

// Stack and heap.

#[test]
fn recursion_without_end_is_a_stack_overflow() {
    let _watchdog = watchdog();
    for stack_bytes in [64 << 10, 8 << 20] {
        let worker = Worker::builder()
            .session_defaults(SessionBuilder::new().stack_bytes(stack_bytes))
            .spawn()
            .unwrap();
        let cell = Cell::in_worker(worker);
        let report = crashed(cell.f1("recurse").call(0));
        assert_eq!(
            *report.cause(),
            Cause::StackOverflow { signal: libc::SIGSEGV, core_dumped: false },
            "{report}"
        );
        assert_eq!(report.signal(), Some(libc::SIGSEGV));
        assert_eq!(report.access(), Some(Access::Write));
        assert_eq!(report.culprit().map(|f| &*f.symbol), Some("recurse"));
        assert!(backtrace_has(&report, "recurse"), "{report}");
        assert!(report.to_string().contains("stack overflow, killed by SIGSEGV in recurse of"), "{report}");
        is_dead(&cell, &report);
    }
    next_worker_works();
}

#[test]
fn stack_overflow_in_a_library_thread_kills_the_worker_by_sigsegv() {
    let _watchdog = watchdog();
    let report = dies("overflow_in_thread", |cell| cell.f0("overflow_in_thread").call());
    // A thread of the library's has no stack for signal handlers, so no handler ran: the kernel's word alone.
    assert_eq!(report.signal(), Some(libc::SIGSEGV), "{report}");
}

#[test]
fn double_free_is_an_abort_with_the_c_librarys_words() {
    let _watchdog = watchdog();
    let report = dies("use_heap", |cell| cell.f0("use_heap").call());
    assert_eq!(*report.cause(), signaled(libc::SIGABRT));
    assert!(report.stderr_tail().contains("free()"), "{report}");
    assert!(report.to_string().contains("\n  stderr: free()"), "{report}");
    assert!(backtrace_has(&report, "use_heap"), "{report}");
}

#[test]
fn corrupted_heap_ends_in_a_crash_of_the_worker_only() {
    let _watchdog = watchdog();
    let cell = Cell::new();
    assert_eq!(cell.f0("corrupt_heap").call().unwrap(), 0);
    // The damage shows when the allocator comes across it: in this call, in a later one, or when the session is closed.
    let mut end = None;
    for _ in 0..1000 {
        if let Err(error) = cell.session.alloc(2000).and_then(|block| cell.session.free(block)) {
            end = Some(error);
            break;
        }
    }
    let report = match end {
        Some(error) => crashed(Err::<(), _>(error)),
        None => crashed(cell.f0("use_heap").call()),
    };
    assert!(matches!(report.cause(), Cause::Signaled { .. }), "{report}");
    is_dead(&cell, &report);
    next_worker_works();
}

/// The handler once entered itself again and again when the crash page was gone, and ate memory until the deadline: a damaged library that the dynamic linker
/// had mapped over it did that.
#[test]
fn crash_without_the_crash_page_is_still_a_crash() {
    let _watchdog = watchdog();
    let report = dies("unmap", |cell| {
        let unmap = cell.module.function::<fn(In<CStr>, i32) -> i32>("unmap").unwrap();
        unmap.call(c"hotcell-crash", 1)
    });
    assert_eq!(*report.cause(), signaled(libc::SIGSEGV));
    assert!(report.backtrace().is_empty() && report.instruction().is_none(), "{report}");
}

#[test]
fn worker_that_unmaps_its_own_channel_crashes_at_its_reply() {
    let _watchdog = watchdog();
    let report = dies("unmap", |cell| {
        let unmap = cell.module.function::<fn(In<CStr>, i32) -> i32>("unmap").unwrap();
        unmap.call(c"memfd:hotcell ", 0)
    });
    assert_eq!(*report.cause(), signaled(libc::SIGSEGV));
}

// No return: the default deadline policy is to kill.

#[test]
fn calls_that_never_return_are_ended_by_their_deadline() {
    let _watchdog = watchdog();
    for symbol in ["spin", "spin_with_syscalls", "deadlock"] {
        let cell = Cell::new();
        let add = cell.add();
        let after = Duration::from_millis(50);
        match cell.f0(symbol).with_timeout(after).unwrap().call() {
            Err(CallError::TimedOut { function, after: told, worker_killed: true }) => {
                assert_eq!((&*function.symbol, told), (symbol, after));
            }
            other => panic!("{symbol}: {other:?}"),
        }
        is_gone(cell.worker.pid());
        let error = add.call(1, 2).unwrap_err();
        assert!(!error.may_have_run() && !error.session_usable());
        let report = error.crash_report().expect("the death is told");
        assert!(
            matches!(report.cause(), Cause::DeadlineExceeded { function, .. } if &*function.symbol == symbol),
            "{report}"
        );
        assert_eq!(report.culprit().map(|f| &*f.symbol), Some(symbol), "{report}");
        assert_eq!(report.signal(), None, "the host sent it");
    }
    next_worker_works();
}

// Threads that outlive their call.

#[test]
fn crash_of_a_library_thread_between_calls_is_told_by_the_next_call_which_did_not_run() {
    let _watchdog = watchdog();
    let cell = Cell::new();
    let (add, events) = (cell.add(), cell.worker.events());
    assert_eq!(cell.f1("crash_later").call(20).unwrap(), 0, "the call itself is fine");
    let ended = events.into_iter().find_map(|event| match event {
        WorkerEvent::Ended(report) => Some(report),
        _ => None,
    });
    let ended = ended.expect("the end is an event");
    assert_eq!(ended.culprit(), None, "no call was running: {ended}");
    assert_eq!(ended.running().count(), 0);
    let error = add.call(1, 2).unwrap_err();
    assert!(!error.may_have_run());
    let report = crashed(Err::<(), _>(error));
    assert_eq!(report.involvement(), Involvement::NotRun);
    assert_eq!(*report.cause(), signaled(libc::SIGSEGV));
    assert_eq!((report.fault_address(), report.access()), (Some(16), Some(Access::Write)));
    assert!(report.backtrace()[0].object.as_deref() == Some("libfaulty.so"), "{report}");
    let text = report.to_string();
    assert!(text.contains("\n  call: add of ") && text.contains(" did not run\n"), "{text}");
    is_dead(&cell, &report);
    next_worker_works();
}

#[test]
fn crash_of_a_library_thread_during_a_call_ends_the_call() {
    let _watchdog = watchdog();
    let cell = Cell::new();
    assert_eq!(cell.f1("crash_later").call(50).unwrap(), 0);
    let report = crashed(cell.nap().call(hotcell::RemotePtr::NULL, 60_000, 0));
    assert_eq!(*report.cause(), signaled(libc::SIGSEGV));
    assert_eq!(report.fault_address(), Some(16));
    assert!(report.involvement().may_have_run());
    assert_eq!(report.running().map(|f| &*f.symbol).collect::<Vec<_>>(), ["nap"]);
    is_dead(&cell, &report);
    next_worker_works();
}

#[test]
fn exit_by_a_library_thread_ends_the_call_with_the_code() {
    let _watchdog = watchdog();
    let cell = Cell::new();
    assert_eq!(cell.f1("exit_later").call(50).unwrap(), 0);
    let report = crashed(cell.nap().call(hotcell::RemotePtr::NULL, 60_000, 0));
    assert_eq!(*report.cause(), exited(9));
    is_dead(&cell, &report);
}

#[test]
fn fork_that_leaves_the_call_twice_gives_one_answer_and_leaves_the_session_usable() {
    let _watchdog = watchdog();
    let cell = Cell::new();
    let child = cell.f0("fork_and_return").call().unwrap();
    assert!(child > 0, "the parent's answer is the one that counts, not {child}");
    for i in 0..2000 {
        assert_eq!(cell.add().call(i, 1).unwrap(), i + 1);
    }
    assert_eq!(cell.f0("worker_pid").call().unwrap(), i32::try_from(cell.worker.pid()).unwrap());
    cell.worker.dispose();
    is_gone(cell.worker.pid());
    eventually("the forked child is gone", || !std::path::Path::new(&format!("/proc/{child}")).exists());
}

// Who is told what.

#[test]
fn session_of_another_call_in_the_same_worker_is_a_bystander() {
    let _watchdog = watchdog();
    let culprit = Cell::new();
    let bystander = Cell::in_worker(culprit.worker.clone());
    let idle = Cell::in_worker(culprit.worker.clone());
    let add = idle.add();
    let nap = napping(&bystander, 60_000, 0);
    let report = crashed(culprit.at("write_at").call(8));
    assert_eq!(report.involvement(), Involvement::Culprit);
    let mut running: Vec<_> = report.running().map(|f| &*f.symbol).collect();
    running.sort_unstable();
    assert_eq!(running, ["nap", "write_at"]);
    let theirs = crashed(nap.join().unwrap());
    assert_eq!(theirs.involvement(), Involvement::Bystander);
    assert!(theirs.involvement().may_have_run());
    assert_eq!(theirs.cause(), report.cause(), "one death, one cause");
    assert_eq!(theirs.function().map(|f| &*f.symbol), Some("nap"));
    assert_eq!(theirs.culprit().map(|f| &*f.symbol), Some("write_at"));
    let text = theirs.to_string();
    assert!(text.contains(" in write_at of ") && text.contains("\n  call: nap of "), "{text}");
    assert!(text.contains("was in flight and may have run"), "{text}");
    let third = crashed(add.call(1, 1));
    assert_eq!((third.involvement(), third.cause()), (Involvement::NotRun, report.cause()));
    for cell in [&culprit, &bystander, &idle] {
        is_dead(cell, &report);
    }
    next_worker_works();
}

#[test]
fn crashes_of_two_sessions_at_once_are_one_death() {
    let _watchdog = watchdog();
    for _ in 0..20 {
        let first = Cell::new();
        let second = Cell::in_worker(first.worker.clone());
        let crash = |cell: &Cell| {
            let go = Arc::new(cell.session.block(64).unwrap());
            assert!(go.write_value(0, &0u32));
            let function = cell.module.function::<fn(RemotePtr) -> i32>("crash_when").unwrap();
            let block = Arc::clone(&go);
            (go, std::thread::spawn(move || function.call(block.pointer())))
        };
        let (go, one) = crash(&first);
        let (also_go, two) = crash(&second);
        assert!(go.write_value(0, &1u32));
        // The worker may be dead by now.
        let _ = also_go.write_value(0, &1u32);
        let reports = [crashed(one.join().unwrap()), crashed(two.join().unwrap())];
        for report in &reports {
            assert_eq!(*report.cause(), signaled(libc::SIGSEGV), "{report}");
            let pc = report.instruction().map(|(pc, _)| pc);
            assert!(report.backtrace().first().is_none_or(|frame| Some(frame.pc) == pc), "{report}");
        }
        let culprits = reports.iter().filter(|report| report.involvement() == Involvement::Culprit).count();
        assert!(culprits <= 1, "{} {}", reports[0], reports[1]);
        is_dead(&first, &reports[0]);
        is_dead(&second, &reports[1]);
    }
    next_worker_works();
}

#[test]
fn caller_that_sleeps_or_spins_gets_the_whole_report_and_listeners_get_output_before_the_end() {
    let _watchdog = watchdog();
    for policy in [WaitPolicy::Adaptive, WaitPolicy::Spin, WaitPolicy::Park] {
        for ms in [0, 0, 0, 1, 5] {
            let worker = Worker::spawn().unwrap();
            let events = worker.events();
            let session = worker.session_with(SessionBuilder::default().wait(policy)).unwrap();
            let module = session.load(faulty()).unwrap();
            let say = module.function::<fn(In<CStr>) -> i32>("say").unwrap();
            say.call(c"one ").unwrap();
            say.call(c"two").unwrap();
            let report = crashed(module.function::<fn(i32) -> i32>("nap_and_crash").unwrap().call(ms));
            assert_eq!(*report.cause(), signaled(libc::SIGSEGV));
            assert_eq!((report.involvement(), report.fault_address()), (Involvement::Culprit, Some(0)));
            is_located(&report, "nap_and_crash");
            assert_eq!(report.stderr_tail(), "one two");
            // The receiver ends with the event of the end.
            let mut told: Vec<_> = events.iter().collect();
            assert!(matches!(told.pop(), Some(WorkerEvent::Ended(_))), "the end comes last");
            let written: Vec<u8> = told
                .into_iter()
                .flat_map(|event| match event {
                    WorkerEvent::Stderr(piece) => piece,
                    other => panic!("{other:?}"),
                })
                .collect();
            assert_eq!(written, b"one two");
        }
    }
}

#[test]
fn queue_is_told_call_by_call_replied_running_and_not_run() {
    let _watchdog = watchdog();
    let cell = Cell::new();
    let (add, write_at) = (cell.add(), cell.at("write_at"));
    let done = add.submit(1, 2).unwrap();
    let crashing = write_at.submit(64).unwrap();
    let behind: Vec<_> = (0..20).map(|i| add.submit(i, 0).unwrap()).collect();
    eventually("the worker dies", || !cell.worker.is_alive());
    // The reply was there before the crash, and is waited for after it.
    assert!(done.is_done() && crashing.is_done());
    assert_eq!(done.wait().unwrap(), 3);
    let report = crashed(crashing.wait());
    assert_eq!(report.involvement(), Involvement::Culprit);
    assert_eq!(report.fault_address(), Some(64));
    for ticket in behind {
        assert!(ticket.is_done());
        let error = ticket.wait().unwrap_err();
        assert!(!error.may_have_run() && !error.session_usable(), "{error}");
        let theirs = crashed(Err::<(), _>(error));
        assert_eq!((theirs.involvement(), theirs.cause()), (Involvement::NotRun, report.cause()));
        assert_eq!(theirs.culprit().map(|f| &*f.symbol), Some("write_at"));
    }
    // No new one is taken.
    assert!(add.submit(1, 1).is_err());
    is_dead(&cell, &report);
}

#[test]
fn reply_before_the_crash_is_delivered_after_it() {
    let _watchdog = watchdog();
    let cell = Cell::new();
    let add = cell.add();
    let replied = cell.f1("crash_later").submit(20).unwrap();
    eventually("the worker dies", || !cell.worker.is_alive());
    assert_eq!(replied.wait().unwrap(), 0);
    let report = crashed(add.call(1, 1));
    assert_eq!(report.involvement(), Involvement::NotRun);
    next_worker_works();
}

#[test]
fn every_kind_of_caller_under_every_wait_policy_learns_of_the_death() {
    let _watchdog = watchdog();
    for policy in [WaitPolicy::Adaptive, WaitPolicy::Spin, WaitPolicy::Park] {
        // At once, so that a caller still spins; and late, so that it sleeps if it ever does.
        for ms in [0, 80] {
            let worker = Worker::builder().wait(policy).spawn().unwrap();
            let cell = Cell::in_worker(worker);
            let crash = cell.f1("nap_and_crash");
            let add = cell.add();
            let (direct, blocked, ticket) = std::thread::scope(|scope| {
                let direct = scope.spawn(|| crash.call(ms));
                // In the ring, behind the direct slot's call or before it.
                let blocked: Vec<_> = (0..2).map(|_| scope.spawn(|| crash.call(ms))).collect();
                let ticket = add.submit(1, 2).map(hotcell::Ticket::wait);
                let blocked: Vec<_> = blocked.into_iter().map(|thread| thread.join().unwrap()).collect();
                (direct.join().unwrap(), blocked, ticket)
            });
            let mut culprits = 0;
            for result in blocked.into_iter().chain([direct]) {
                let report = crashed(result);
                assert_eq!(*report.cause(), signaled(libc::SIGSEGV), "{policy:?}, {ms} ms: {report}");
                culprits += usize::from(report.involvement() == Involvement::Culprit);
                is_dead(&cell, &report);
            }
            // The calls that the crash was not in were never taken, but the session is to blame for all of them it took.
            assert_eq!(culprits, 1, "{policy:?}, {ms} ms");
            match ticket {
                Ok(Ok(sum)) => assert_eq!(sum, 3, "it came first"),
                Ok(Err(error)) | Err(error) => {
                    assert!(!error.may_have_run(), "{policy:?}, {ms} ms: {error}");
                }
            }
        }
    }
    next_worker_works();
}

#[test]
fn last_words_on_standard_error_are_in_the_report_and_harmless() {
    let _watchdog = watchdog();
    let report = dies("call_abort", |cell| {
        let say = cell.module.function::<fn(In<CStr>) -> i32>("say").unwrap();
        say.call(c"about to fail\n\x1b[2Jreason: 42\n").unwrap();
        cell.f0("call_abort").call()
    });
    assert_eq!(report.stderr_tail(), "about to fail\n\\u{1b}[2Jreason: 42\n");
    let text = report.to_string();
    assert!(text.ends_with("\n  stderr: about to fail\n          \\u{1b}[2Jreason: 42"), "{text}");
}

#[test]
fn standard_error_is_kept_to_its_last_bytes() {
    let _watchdog = watchdog();
    let report = dies("call_abort", |cell| {
        let say = cell.module.function::<fn(In<CStr>) -> i32>("say").unwrap();
        let line = std::ffi::CString::new(format!("{}\n", "x".repeat(1000))).unwrap();
        for _ in 0..100 {
            say.call(&line).unwrap();
        }
        say.call(c"the end\n").unwrap();
        cell.f0("call_abort").call()
    });
    assert_eq!(report.stderr_tail().len(), hotcell::OUTPUT_TAIL_BYTES);
    assert!(report.stderr_tail().ends_with("x\nthe end\n"));
}

#[test]
fn crash_of_one_worker_is_nothing_to_another() {
    let _watchdog = watchdog();
    let (a, b) = (Cell::new(), Cell::new());
    let nap = napping(&b, 100, 11);
    crashed(a.at("read_at").call(0));
    assert_eq!(nap.join().unwrap().unwrap(), 11);
    assert_eq!(b.f0("count").call().unwrap(), 1);
    assert_eq!(b.f0("count").call().unwrap(), 2);
}

#[test]
fn handles_of_a_dead_worker_are_errors_and_safe_to_drop_in_any_order() {
    let _watchdog = watchdog();
    let cell = Cell::new();
    let block = cell.session.block(4096).unwrap();
    let pointer = cell.session.alloc(64).unwrap();
    crashed(cell.at("read_at").call(0));
    // Shared memory outlives the worker; nothing faults.
    assert!(block.write(0, b"still there"));
    let mut bytes = [0; 11];
    assert!(block.read(0, &mut bytes));
    assert_eq!(&bytes, b"still there");
    let mut into = [0; 8];
    for error in [
        cell.session.read(pointer, &mut into).unwrap_err(),
        cell.session.write(pointer, &into).unwrap_err(),
        cell.session.free(pointer).unwrap_err(),
        cell.session.alloc(1).map(drop).unwrap_err(),
        cell.session.close().unwrap_err(),
    ] {
        assert!(matches!(error, CallError::Crashed(_)) && !error.may_have_run(), "{error}");
    }
    match cell.session.load(faults::faulty()).map(drop) {
        Err(hotcell::LoadError::Call { source: CallError::Crashed(report), .. }) => {
            assert_eq!(report.involvement(), Involvement::NotRun);
        }
        other => panic!("{other:?}"),
    }
    let Cell { worker, session, module } = cell;
    drop(worker);
    drop(session);
    drop(block);
    assert!(module.function::<fn() -> i32>("count").is_err());
}

#[test]
fn disposal_is_told_from_a_crash() {
    let _watchdog = watchdog();
    let cell = Cell::new();
    let nap = napping(&cell, 60_000, 0);
    cell.worker.dispose();
    match nap.join().unwrap() {
        Err(error @ CallError::Disposed(_)) => {
            assert!(error.may_have_run() && !error.session_usable());
            assert_eq!(*error.crash_report().unwrap().cause(), Cause::Disposed);
        }
        other => panic!("{other:?}"),
    }
    is_gone(cell.worker.pid());
}

#[test]
fn any_grace_period_can_be_given() {
    let _watchdog = watchdog();
    for grace in [Duration::ZERO, Duration::MAX] {
        let worker = Worker::builder().grace(grace).spawn().unwrap();
        let pid = worker.pid();
        worker.dispose();
        is_gone(pid);
        assert_eq!(worker.crash_report().map(|r| r.cause().clone()), Some(Cause::Disposed));
    }
}

/// In a process of its own, because descriptors and threads are counted.
#[test]
fn crashes_leave_no_descriptor_thread_or_mapping_behind() {
    let _watchdog = watchdog();
    if !is_child() {
        in_child("crashes_leave_no_descriptor_thread_or_mapping_behind", &[]);
        return;
    }
    let round = || {
        for symbol in ["call_abort", "bus_error", "illegal"] {
            let cell = Cell::new();
            crashed(cell.f0(symbol).call());
        }
        let cell = Cell::new();
        crashed(cell.f1("call_exit").call(0));
        let cell = Cell::in_worker(Worker::builder().on_deadline(OnDeadline::KillWorker).spawn().unwrap());
        let error = cell.f0("spin").with_timeout(Duration::from_millis(1)).unwrap().call().unwrap_err();
        assert!(matches!(error, CallError::TimedOut { .. }));
        let pid = cell.worker.pid();
        drop(cell);
        is_gone(pid);
        let cell = Cell::new();
        let crash = cell.f1("nap_and_crash");
        let tickets: Vec<_> = (0..50).map(|i| crash.submit(i)).collect();
        drop(tickets);
        drop(cell);
    };
    let settled = |descriptors: usize, threads: usize| {
        eventually("descriptors and threads are as few as before", || {
            open_descriptors() <= descriptors && own_threads() <= threads
        });
    };
    round();
    eventually("the first round's workers are gone", no_children);
    let (descriptors, threads, before) = (open_descriptors(), own_threads(), mappings());
    for _ in 0..8 {
        round();
    }
    eventually("the workers are gone", no_children);
    settled(descriptors, threads);
    // The allocator may map an arena or two for new threads; a leak would be one region for each of the 48 workers.
    let after = mappings();
    assert!(after < before + 24, "{before} mappings became {after}");
}

/// The caller, the monitor and the worker on one CPU: each wake-up may take the CPU from the one that wakes.
#[test]
#[allow(unsafe_code)]
fn culprit_is_known_where_all_share_one_cpu() {
    let _watchdog = watchdog();
    if !is_child() {
        in_child("culprit_is_known_where_all_share_one_cpu", &[]);
        return;
    }
    // The library's threads and its workers come from this thread and stay where it is.
    // SAFETY: all zeros are an empty CPU set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: takes nothing.
    let here = usize::try_from(unsafe { libc::sched_getcpu() }).unwrap();
    // SAFETY: the set is initialised, and the number is that of a CPU.
    unsafe { libc::CPU_SET(here, &mut set) };
    // SAFETY: reads a set of the size given.
    let status = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) };
    assert_eq!(status, 0, "sched_setaffinity");
    for _ in 0..20 {
        let session = Worker::spawn().unwrap().session().unwrap();
        let exit = session.load("libc.so.6").unwrap().function::<fn(i32)>("_exit").unwrap();
        // The session's thread goes to sleep.
        std::thread::sleep(Duration::from_millis(2));
        let report = crashed(exit.call(3));
        assert_eq!(report.culprit().map(|function| &*function.symbol), Some("_exit"), "{report}");
    }
}

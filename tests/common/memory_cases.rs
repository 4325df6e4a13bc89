//! Memory of a session, in whatever kind of worker `super::worker` gives.

use super::faults::{self, build, watchdog};
use super::worker;
use hotcell::{
    CallError, Cause, CrashReport, Function, In, Involvement, Limited, LoadError, Module, Nullable, Out,
    RemotePtr, Session, SessionBuilder, SessionMemory, StartError, Worker,
};
use std::ffi::CString;
use std::time::{Duration, Instant};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

fn limited(worker: &Worker, bytes: u64) -> Session {
    worker.session_with(SessionBuilder::new().memory_bytes_max(bytes)).unwrap()
}

fn fixture() -> std::path::PathBuf {
    build("memory", "memory.c", &[])
}

fn load(session: &Session) -> Module {
    session.load(fixture()).unwrap()
}

fn memory(session: &Session) -> SessionMemory {
    session.memory().unwrap().unwrap()
}

fn bytes_fn(module: &Module, symbol: &str) -> Function<fn(u64) -> i32> {
    module.function(symbol).unwrap()
}

/// A call ended because it was refused memory, and the session goes on.
#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, CallError>, limit: u64) -> u64 {
    let error = result.unwrap_err();
    assert!(error.may_have_run() && error.session_usable() && error.crash_report().is_none(), "{error:?}");
    match error {
        CallError::SessionMemoryExceeded { asked, used, bytes_max, .. } => {
            assert_eq!(bytes_max, limit);
            assert!(used <= limit && asked > limit - used, "{asked} asked, {used} used, of {limit}");
            asked
        }
        other => panic!("{other:?}"),
    }
}

/// A call ended its worker because it was refused memory.
#[track_caller]
fn died<T: std::fmt::Debug>(result: Result<T, CallError>, limit: u64, signal: Option<i32>) -> CrashReport {
    match result.unwrap_err() {
        CallError::MemoryExceeded(report) => {
            let scope = Limited::Session;
            assert_eq!(*report.cause(), Cause::MemoryExceeded { scope, bytes_max: limit, signal });
            assert_eq!(report.involvement(), Involvement::Culprit, "{report}");
            *report
        }
        other => panic!("{other:?}"),
    }
}

/// Polls; what is waited for happens in the worker, whenever it gets its turn.
#[track_caller]
fn until(what: &str, mut look: impl FnMut() -> bool) {
    let start = Instant::now();
    while !look() {
        assert!(start.elapsed() < Duration::from_secs(60), "still waiting for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn an_allocation_beyond_the_limit_ends_the_call_and_not_the_session() {
    let _watchdog = watchdog();
    let worker = worker().spawn().unwrap();
    let session = limited(&worker, 4 * MIB);
    let module = load(&session);
    let (keep, release) = (bytes_fn(&module, "keep"), module.function::<fn() -> i32>("release").unwrap());
    let before = memory(&session);
    assert_eq!(before.bytes_max, 4 * MIB);
    assert_eq!(keep.call(MIB).unwrap(), 1);
    let after = memory(&session);
    assert!((MIB..MIB + 64 * KIB).contains(&(after.used_bytes - before.used_bytes)), "{before:?} {after:?}");
    assert_eq!(refused(keep.call(4 * MIB), 4 * MIB), 4 * MIB);
    assert_eq!(keep.call(MIB).unwrap(), 1, "there is room for this one still");
    assert_eq!(release.call().unwrap(), 2);
    let end = memory(&session);
    assert_eq!(end.used_bytes, before.used_bytes);
    assert_eq!(end.refusals, 1);
    assert!(end.peak_bytes >= 2 * MIB && end.peak_bytes <= 4 * MIB, "{end:?}");
    // By ticket too, where the reply waits in its slot.
    let tickets = [keep.submit(8 * MIB).unwrap(), keep.submit(1).unwrap(), keep.submit(9 * MIB).unwrap()];
    let [first, second, third] = tickets.map(|ticket| ticket.wait());
    assert_eq!(refused(first, 4 * MIB), 8 * MIB);
    assert_eq!(second.unwrap(), 1);
    assert_eq!(refused(third, 4 * MIB), 9 * MIB);
    // A dropped ticket's slot is used again, whatever the reply was.
    for _ in 0..600 {
        drop(keep.submit(8 * MIB).unwrap());
    }
    assert_eq!(release.call().unwrap(), 1);
    session.close().unwrap();
}

#[test]
fn errors_say_how_much_of_what_and_what_to_do() {
    let _watchdog = watchdog();
    let worker = worker().spawn().unwrap();
    let session = limited(&worker, MIB);
    let module = load(&session);
    let error = bytes_fn(&module, "keep").call(MIB).unwrap_err().to_string();
    assert!(error.contains("keep of ") && error.contains("asked for 1048576 bytes when "), "{error}");
    assert!(error.contains(" of the 1048576 of its session were in use"), "{error}");
    assert!(error.contains("SessionBuilder::memory_bytes_max"), "{error}");
    // The code itself sees what C promises it.
    assert!(matches!(
        module.prototype("int errno_of(uint64_t bytes)").unwrap().call((MIB,)),
        Err(CallError::SessionMemoryExceeded { .. })
    ));
    assert_eq!(bytes_fn(&module, "errno_of").call(100).unwrap(), 0);
    let death = died(bytes_fn(&module, "write_at_null").call(MIB), MIB, Some(libc::SIGSEGV)).to_string();
    assert!(
        death.contains(
            "ended by SIGSEGV because it asked for more memory than the 1048576 bytes of its session"
        )
    );
    for bytes in [0, 65535, 1 << 48, u64::MAX] {
        let refused = worker.session_with(SessionBuilder::new().memory_bytes_max(bytes)).unwrap_err();
        assert!(
            matches!(refused, StartError::Configuration { option: "memory_bytes_max", .. }),
            "{refused:?}"
        );
    }
}

#[test]
fn code_that_does_not_live_through_it_has_died_of_memory() {
    let _watchdog = watchdog();
    for (symbol, signal) in [
        ("write_at_null", Some(libc::SIGSEGV)),
        ("abort_without", Some(libc::SIGABRT)),
        ("exit_without", None),
    ] {
        let worker = worker().spawn().unwrap();
        let session = limited(&worker, 8 * MIB);
        let module = load(&session);
        assert_eq!(bytes_fn(&module, symbol).call(MIB).unwrap(), 0, "{symbol}");
        let report = died(bytes_fn(&module, symbol).call(64 * MIB), 8 * MIB, signal);
        assert_eq!(&*report.culprit().unwrap().symbol, symbol);
        assert_eq!(report.signal(), signal);
        // Whoever comes later gets the same report.
        match session.ping().unwrap_err() {
            CallError::Crashed(later) => {
                assert_eq!(later.cause(), report.cause());
                assert_eq!(later.involvement(), Involvement::NotRun);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_crash_that_has_nothing_to_do_with_it_stays_what_it_is() {
    let _watchdog = watchdog();
    let worker = worker().spawn().unwrap();
    let session = limited(&worker, MIB);
    let module = load(&session);
    refused(bytes_fn(&module, "keep").call(2 * MIB), MIB);
    // Threads that were refused and have ended do not count either.
    refused(bytes_fn(&module, "in_thread").call(2 * MIB), MIB);
    refused(bytes_fn(&module, "leaving_thread").call(2 * MIB), MIB);
    let report = faults::crashed(module.function::<fn() -> i32>("null_write").unwrap().call());
    assert_eq!(*report.cause(), Cause::Signaled { signal: libc::SIGSEGV, core_dumped: false });
    assert_eq!(report.fault_address(), Some(8));
}

#[test]
fn what_is_freed_is_given_back_to_the_last_byte() {
    let _watchdog = watchdog();
    let worker = worker().spawn().unwrap();
    let session = limited(&worker, 4 * MIB);
    let module = load(&session);
    let churn = module.function::<fn(i32, u64) -> i32>("churn").unwrap();
    assert_eq!(churn.call(1, 100).unwrap(), 1);
    let before = memory(&session).used_bytes;
    for bytes in [1, 100, 5000, 300 * KIB] {
        assert_eq!(churn.call(500, bytes).unwrap(), 500, "{bytes}");
    }
    assert_eq!(memory(&session).used_bytes, before);
    let grow = module.function::<fn(u64) -> u64>("grow").unwrap();
    assert_eq!(grow.call(MIB).unwrap(), MIB);
    refused(grow.call(64 * MIB), 4 * MIB);
    assert_eq!(memory(&session).used_bytes, before);
}

#[test]
fn a_leak_comes_to_its_end_after_many_calls() {
    let _watchdog = watchdog();
    let worker = worker().spawn().unwrap();
    let session = limited(&worker, 2 * MIB);
    let module = load(&session);
    let keep = bytes_fn(&module, "keep");
    let mut calls = 0;
    let error = loop {
        match keep.call(1000) {
            Ok(got) => assert_eq!(got, 1),
            Err(error) => break error,
        }
        calls += 1;
    };
    refused::<()>(Err(error), 2 * MIB);
    // A block of a thousand bytes costs what the allocator makes of it and the seal.
    assert!((1900..2100).contains(&calls), "{calls}");
}

#[test]
fn mapped_memory_counts() {
    let _watchdog = watchdog();
    let worker = worker().spawn().unwrap();
    let session = limited(&worker, 4 * MIB);
    let module = load(&session);
    let map = module.function::<fn(u64) -> RemotePtr>("map").unwrap();
    let unmap = module.function::<fn(RemotePtr, u64) -> i32>("unmap").unwrap();
    let before = memory(&session).used_bytes;
    let at = map.call(2 * MIB).unwrap();
    assert_eq!(memory(&session).used_bytes - before, 2 * MIB);
    refused(map.call(2 * MIB + 1), 4 * MIB);
    assert_eq!(unmap.call(at, MIB).unwrap(), 0);
    assert_eq!(unmap.call(at.offset(MIB), MIB).unwrap(), 0);
    assert_eq!(memory(&session).used_bytes, before);
}

#[test]
fn what_the_c_library_allocates_for_a_call_counts() {
    let _watchdog = watchdog();
    let worker = worker().spawn().unwrap();
    let session = limited(&worker, 4 * MIB);
    let duplicate = bytes_fn(&load(&session), "duplicate");
    let before = memory(&session).used_bytes;
    assert_eq!(duplicate.call(MIB).unwrap(), 1);
    assert!(memory(&session).used_bytes - before >= MIB);
    // The map and the copy together are too much.
    refused(duplicate.call(2 * MIB), 4 * MIB);
    // Functions of the C library itself, called by name.
    let libc = session.load("libc.so.6").unwrap();
    let malloc = libc.function::<fn(u64) -> RemotePtr>("malloc").unwrap();
    let free = libc.function::<fn(RemotePtr)>("free").unwrap();
    let before = memory(&session).used_bytes;
    let block = malloc.call(MIB).unwrap();
    assert!(memory(&session).used_bytes - before >= MIB);
    refused(malloc.call(4 * MIB), 4 * MIB);
    free.call(block).unwrap();
    assert_eq!(memory(&session).used_bytes, before);
}

#[test]
fn memory_that_the_host_asks_for_counts() {
    let _watchdog = watchdog();
    let worker = worker().spawn().unwrap();
    let session = limited(&worker, 4 * MIB);
    load(&session);
    let block = session.alloc(MIB).unwrap();
    assert!(memory(&session).used_bytes >= MIB);
    refused(session.alloc(4 * MIB), 4 * MIB);
    session.free(block).unwrap();
    assert!(memory(&session).used_bytes < MIB);
    assert_eq!(worker.session().unwrap().memory().unwrap(), None, "a session without a limit");
}

#[test]
fn blocks_that_were_refused_are_not_counted_and_not_kept() {
    let _watchdog = watchdog();
    let worker = worker().spawn().unwrap();
    let limit = 4 * MIB;
    let options = SessionBuilder::new().memory_bytes_max(limit).remote_blocks_max(2);
    let session = worker.session_with(options).unwrap();
    let module = load(&session);
    let block = session.alloc(MIB).unwrap();
    let before = memory(&session).used_bytes;
    for _ in 0..5 {
        refused(session.alloc(limit), limit);
    }
    assert_eq!(memory(&session).used_bytes, before);
    let tell = module.function::<fn(u64) -> CString>("ask_and_tell").unwrap();
    let length = |told: Result<CString, CallError>| told.unwrap().count_bytes();
    assert_eq!(length(tell.call(KIB)), (64 << 10) - 1);
    let before = memory(&session).used_bytes;
    for _ in 0..5 {
        refused(tell.call(limit), limit);
    }
    assert_eq!(memory(&session).used_bytes, before, "copies of strings that nobody fetched");
    assert_eq!(length(tell.call(KIB)), (64 << 10) - 1);
    let second = session.alloc(MIB).unwrap();
    assert!(matches!(session.alloc(1), Err(CallError::TooManyBlocks { max: 2 })));
    session.free(second).unwrap();
    session.free(block).unwrap();
}

#[test]
fn a_session_with_a_limit_has_no_pipelines() {
    let _watchdog = watchdog();
    let worker = worker().spawn().unwrap();
    let limited = load(&limited(&worker, 16 * MIB));
    let labs = |module: &Module| module.function::<fn(i64) -> i64>("labs").unwrap();
    match labs(&limited).pipeline() {
        Err(CallError::PipelineUnsupported { function }) => {
            assert!(function.to_string().contains("labs"), "{function}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(labs(&limited).call(-7).unwrap(), 7, "the session goes on");
    assert_eq!(labs(&limited).submit(-8).unwrap().wait().unwrap(), 8);
    let free = load(&worker.session().unwrap());
    let labs = labs(&free);
    let mut pipeline = labs.pipeline().unwrap();
    pipeline.send(-9).unwrap();
    assert_eq!(pipeline.receive().unwrap(), Some(9), "one without a limit beside it has them");
}

#[test]
fn threads_of_a_module_allocate_for_its_session() {
    let _watchdog = watchdog();
    let worker = worker().spawn().unwrap();
    let session = limited(&worker, 4 * MIB);
    let module = load(&session);
    let in_thread = bytes_fn(&module, "in_thread");
    assert_eq!(in_thread.call(MIB).unwrap(), 1);
    let before = memory(&session).used_bytes;
    assert_eq!(in_thread.call(MIB).unwrap(), 1);
    assert_eq!(memory(&session).used_bytes, before);
    refused(in_thread.call(5 * MIB), 4 * MIB);
    // What a thread's end frees, after its function, is given back too.
    let thread_local = bytes_fn(&module, "thread_local_block");
    for _ in 0..20 {
        assert_eq!(thread_local.call(MIB).unwrap(), 0);
    }
    assert_eq!(memory(&session).used_bytes, before);
}

#[test]
fn a_thread_between_calls_is_held_to_the_limit() {
    let _watchdog = watchdog();
    let worker = worker().spawn().unwrap();
    let session = limited(&worker, 4 * MIB);
    let module = load(&session);
    let hoard = module.function::<fn(i32) -> i32>("hoard_in_background").unwrap();
    match hoard.call(0) {
        Ok(status) => assert_eq!(status, 0),
        // The thread was refused before the call that starts it has returned.
        Err(error) => assert!(matches!(error, CallError::SessionMemoryExceeded { .. }), "{error:?}"),
    }
    until("the thread to be refused", || match session.memory() {
        Ok(counts) => counts.unwrap().refusals == 1,
        // It was refused while the question was being answered.
        Err(CallError::SessionMemoryExceeded { .. }) => true,
        Err(other) => panic!("{other:?}"),
    });
    let counts = memory(&session);
    assert!(counts.used_bytes <= 4 * MIB && counts.used_bytes > 4 * MIB - 128 * KIB, "{counts:?}");
    // Calls that need nothing go on.
    assert_eq!(module.function::<fn() -> i32>("release").unwrap().call().unwrap(), 0);
}

#[test]
fn a_thread_that_dies_of_it_between_calls_has_died_of_memory() {
    let _watchdog = watchdog();
    let worker = worker().spawn().unwrap();
    let session = limited(&worker, 4 * MIB);
    let module = load(&session);
    // The thread may be refused and die before the call that starts it has returned.
    let started = module.function::<fn(i32) -> i32>("hoard_in_background").unwrap().call(1);
    until("the worker's end", || worker.crash_report().is_some());
    let report = worker.crash_report().unwrap();
    let cause =
        Cause::MemoryExceeded { scope: Limited::Session, bytes_max: 4 * MIB, signal: Some(libc::SIGSEGV) };
    assert_eq!(*report.cause(), cause, "{started:?}");
    assert_eq!(report.fault_address(), Some(0x10));
}

#[test]
fn constructors_are_held_to_the_limit() {
    let _watchdog = watchdog();
    let modest = build("memory-modest", "memory.c", &["-DCONSTRUCTOR_BYTES=1048576"]);
    let greedy = build("memory-greedy", "memory.c", &["-DCONSTRUCTOR_BYTES=67108864"]);
    let fatal = build("memory-fatal", "memory.c", &["-DCONSTRUCTOR_BYTES=67108864", "-DCONSTRUCTOR_WRITES"]);
    let worker = worker().spawn().unwrap();
    let session = limited(&worker, 4 * MIB);
    let module = session.load(&modest).unwrap();
    assert_eq!(module.function::<fn() -> i32>("was_constructed").unwrap().call().unwrap(), 1);
    assert!(memory(&session).used_bytes >= MIB);
    match session.load(&greedy).unwrap_err() {
        LoadError::Call { source, .. } => assert_eq!(refused::<()>(Err(source), 4 * MIB), 64 * MIB),
        other => panic!("{other:?}"),
    }
    assert_eq!(memory(&session).refusals, 1);
    // It is not loaded: its next load runs the constructor again.
    assert!(session.load(&greedy).is_err());
    assert_eq!(memory(&session).refusals, 2);
    // Where nothing limits it, it loads.
    let free = worker.session().unwrap().load(&greedy).unwrap();
    assert_eq!(free.function::<fn() -> i32>("was_constructed").unwrap().call().unwrap(), 1);
    match session.load(&fatal).unwrap_err() {
        LoadError::Call { source, .. } => {
            died::<()>(Err(source), 4 * MIB, Some(libc::SIGSEGV));
        }
        other => panic!("{other:?}"),
    }
}

/// The reply of any request that ran while a thread of a module was refused memory was the refusal: a block was freed, and `free` said that it was not.
#[test]
fn requests_that_allocate_nothing_are_answered_whatever_a_thread_is_refused() {
    let _watchdog = watchdog();
    let worker = worker().spawn().unwrap();
    let session = limited(&worker, 4 * MIB);
    let module = load(&session);
    let blocks: Vec<RemotePtr> = (0..500).map(|_| session.alloc(64).unwrap()).collect();
    let before = memory(&session).refusals;
    // The replies of these two may be refusals: they are calls. So may be those of resolving them.
    let (begin, end) =
        (bytes_fn(&module, "begin_asking"), module.function::<fn() -> i32>("end_asking").unwrap());
    let call = |result: Result<i32, CallError>| match result {
        Ok(status) => assert_eq!(status, 0),
        Err(CallError::SessionMemoryExceeded { .. }) => {}
        Err(other) => panic!("{other:?}"),
    };
    call(begin.call(64 * MIB));
    until("refusals", || memory(&session).refusals > before);
    let mut bytes = [0; 64];
    for block in blocks {
        session.ping().unwrap();
        session.write(block, b"some bytes, and a NUL behind them\0").unwrap();
        session.read(block, &mut bytes).unwrap();
        assert_eq!(&bytes[..10], b"some bytes");
        assert_eq!(session.read_string(block, 64).unwrap().count_bytes(), 33);
        session.free(block).unwrap();
        assert!(matches!(session.free(block), Err(CallError::UnknownBlock { .. })));
    }
    call(end.call());
    session.close().unwrap();
}

#[test]
fn destructors_are_held_to_the_limit() {
    let _watchdog = watchdog();
    let greedy = build("memory-last", "memory.c", &["-DDESTRUCTOR_BYTES=67108864"]);
    let fatal =
        build("memory-last-fatal", "memory.c", &["-DDESTRUCTOR_BYTES=67108864", "-DDESTRUCTOR_WRITES"]);
    let worker = worker().spawn().unwrap();
    let other = worker.session().unwrap();
    let getenv = other.load("libc.so.6").unwrap();
    let getenv = getenv.function::<fn(In<str>) -> Nullable<CString>>("getenv").unwrap();
    let last_block = || getenv.call("LAST_BLOCK").unwrap();
    // It lives through the refusal, and the session is closed: no reply is left that could tell of it.
    let session = limited(&worker, 4 * MIB);
    session.load(&greedy).unwrap();
    assert_eq!(last_block(), None);
    session.close().unwrap();
    assert_eq!(last_block().as_deref(), Some(c"refused"));
    // Where nothing limits it, it gets what it asks for.
    let free = worker.session().unwrap();
    free.load(&greedy).unwrap();
    free.close().unwrap();
    assert_eq!(last_block().as_deref(), Some(c"given"));
    // What was refused then is no cause of a later death.
    let report = faults::crashed(load(&other).function::<fn() -> i32>("null_write").unwrap().call());
    assert_eq!(*report.cause(), Cause::Signaled { signal: libc::SIGSEGV, core_dumped: false });

    let worker = self::worker().spawn().unwrap();
    let session = limited(&worker, 4 * MIB);
    session.load(&fatal).unwrap();
    let report = died(session.close(), 4 * MIB, Some(libc::SIGSEGV));
    assert_eq!(report.function().map(|function| &*function.symbol), Some("close"), "{report}");
}

#[test]
fn sessions_have_limits_of_their_own() {
    let _watchdog = watchdog();
    let worker = worker().spawn().unwrap();
    let (small, large, free) =
        (limited(&worker, 2 * MIB), limited(&worker, 64 * MIB), worker.session().unwrap());
    // One file, one copy in the process, three sessions.
    let [of_small, of_large, of_free] = [&small, &large, &free].map(load);
    refused(bytes_fn(&of_small, "keep").call(4 * MIB), 2 * MIB);
    assert_eq!(bytes_fn(&of_large, "keep").call(4 * MIB).unwrap(), 1);
    assert_eq!(bytes_fn(&of_free, "keep").call(128 * MIB).unwrap(), 1);
    assert_eq!((memory(&small).refusals, memory(&large).refusals), (1, 0));
    let [before_small, before_large] = [&small, &large].map(|session| memory(session).used_bytes);
    assert!(before_large >= 4 * MIB);
    // Whoever frees it, it is given back to whom it was charged.
    assert_eq!(of_small.function::<fn() -> i32>("release").unwrap().call().unwrap(), 2);
    assert_eq!(memory(&small).used_bytes, before_small);
    assert!(memory(&large).used_bytes <= before_large - 4 * MIB);
    // Who makes a block larger takes it over. (Pointers are their session's, so they cross as numbers.)
    let give = of_large.function::<fn(u64) -> u64>("give").unwrap();
    let regrow = of_small.function::<fn(u64, u64) -> u64>("regrow").unwrap();
    let before_large = memory(&large).used_bytes;
    let block = give.call(100 * KIB).unwrap();
    let block = regrow.call(block, 500 * KIB).unwrap();
    assert_eq!(memory(&large).used_bytes, before_large);
    assert!(memory(&small).used_bytes - before_small >= 500 * KIB);
    of_free.function::<fn(u64)>("take").unwrap().call(block).unwrap();
    assert_eq!(memory(&small).used_bytes, before_small);
}

#[test]
fn a_module_that_was_there_before_is_counted_from_then_on() {
    let _watchdog = watchdog();
    let worker = worker().spawn().unwrap();
    let free = worker.session().unwrap();
    let of_free = load(&free);
    // Calls through it before: slots that the linker has filled already.
    let (keep, release) = (bytes_fn(&of_free, "keep"), of_free.function::<fn() -> i32>("release").unwrap());
    assert_eq!(keep.call(100).unwrap(), 1);
    let session = limited(&worker, 2 * MIB);
    let module = load(&session);
    let before = memory(&session).used_bytes;
    assert_eq!(bytes_fn(&module, "keep").call(MIB).unwrap(), 1);
    refused(bytes_fn(&module, "keep").call(MIB), 2 * MIB);
    assert_eq!(keep.call(8 * MIB).unwrap(), 1);
    // A block from before, one of the session, one of nobody.
    assert_eq!(release.call().unwrap(), 3);
    assert_eq!(memory(&session).used_bytes, before);
}

#[test]
fn neighbours_go_on_while_a_session_is_refused_and_closed() {
    let _watchdog = watchdog();
    let worker = worker().spawn().unwrap();
    let neighbour = worker.session().unwrap();
    let churn = load(&neighbour).function::<fn(i32, u64) -> i32>("churn").unwrap();
    for round in 0..10 {
        let session = limited(&worker, MIB);
        let module = load(&session);
        let keep = bytes_fn(&module, "keep");
        assert_eq!(keep.call(400 * KIB).unwrap(), 1, "{round}: a new session starts with nothing in use");
        std::thread::scope(|scope| {
            scope.spawn(|| refused(keep.call(MIB), MIB));
            assert_eq!(churn.call(200, 50 * KIB).unwrap(), 200);
        });
        session.close().unwrap();
    }
    // What the sessions have left behind is nobody's, and can be freed by anybody.
    let module = load(&neighbour);
    assert_eq!(module.function::<fn() -> i32>("release").unwrap().call().unwrap(), 10);
}

#[test]
fn a_child_process_is_left_alone() {
    let _watchdog = watchdog();
    let worker = worker().spawn().unwrap();
    let session = limited(&worker, 2 * MIB);
    let module = load(&session);
    assert_eq!(bytes_fn(&module, "in_child").call(1000).unwrap(), 42);
    assert_eq!(bytes_fn(&module, "in_child").call(64 * MIB).unwrap(), 42);
    assert_eq!(memory(&session).refusals, 0, "that was the child's");
}

#[test]
fn containers_and_exceptions_are_counted() {
    let _watchdog = watchdog();
    let worker = worker().spawn().unwrap();
    let session = limited(&worker, 4 * MIB);
    let module = session.load(build("memory-cpp", "memory.cpp", &[])).unwrap();
    let hold = bytes_fn(&module, "hold");
    let let_go = module.function::<fn()>("let_go").unwrap();
    assert_eq!(hold.call(1000).unwrap(), 1);
    let_go.call().unwrap();
    let before = memory(&session).used_bytes;
    assert_eq!(hold.call(MIB).unwrap(), 1);
    assert!(memory(&session).used_bytes - before >= MIB);
    refused(hold.call(8 * MIB), 4 * MIB);
    let_go.call().unwrap();
    let in_thread_local = bytes_fn(&module, "in_thread_local");
    assert_eq!(in_thread_local.call(MIB).unwrap(), 1);
    let before = memory(&session).used_bytes;
    for _ in 0..20 {
        assert_eq!(in_thread_local.call(MIB).unwrap(), 1);
    }
    assert_eq!(memory(&session).used_bytes, before, "destructors of a thread's objects run at its end");
    refused(in_thread_local.call(8 * MIB), 4 * MIB);
    assert_eq!(bytes_fn(&module, "in_session_local").call(MIB).unwrap(), 1);
    session.close().unwrap();
    let session = limited(&worker, 4 * MIB);
    let module = session.load(build("memory-cpp", "memory.cpp", &[])).unwrap();
    died(bytes_fn(&module, "hold_or_die").call(8 * MIB), 4 * MIB, Some(libc::SIGABRT));
}

#[test]
fn sqlite_answers_and_lives_when_there_is_no_more_memory() {
    let _watchdog = watchdog();
    const LIMIT: u64 = 2 * MIB;
    const NO_MEMORY: i32 = 7;
    let worker = worker().spawn().unwrap();
    let session = limited(&worker, LIMIT);
    let sqlite = session.load("libsqlite3.so.0").unwrap();
    let open = sqlite.function::<fn(In<std::ffi::CStr>, Out<RemotePtr>) -> i32>("sqlite3_open");
    let exec = |database: RemotePtr, text: &std::ffi::CStr| {
        let exec = sqlite
            .function::<fn(RemotePtr, In<std::ffi::CStr>, u64, u64, u64) -> i32>("sqlite3_exec")
            .unwrap();
        exec.call(database, text, 0, 0, 0)
    };
    let mut database = RemotePtr::NULL;
    assert_eq!(open.unwrap().call(c":memory:", &mut database).unwrap(), 0);
    assert_eq!(exec(database, c"create table t(b); insert into t values (zeroblob(100000));").unwrap(), 0);
    refused(exec(database, c"insert into t values (zeroblob(10000000));"), LIMIT);
    let errcode = sqlite.function::<fn(RemotePtr) -> i32>("sqlite3_errcode").unwrap();
    assert_eq!(errcode.call(database).unwrap(), NO_MEMORY);
    // The database is as it was.
    assert_eq!(exec(database, c"insert into t values (zeroblob(100000)); delete from t;").unwrap(), 0);
    let close = sqlite.function::<fn(RemotePtr) -> i32>("sqlite3_close").unwrap();
    assert_eq!(close.call(database).unwrap(), 0);
}

#[test]
fn zlib_says_that_there_is_no_memory() {
    let _watchdog = watchdog();
    let worker = worker().spawn().unwrap();
    let session = limited(&worker, 512 * KIB);
    let zlib = session.load("libz.so.1").unwrap();
    let compress =
        zlib.function::<fn(Out<[u8]>, hotcell::InOut<u64>, In<[u8]>, u64) -> i32>("compress").unwrap();
    let text = vec![b'x'; 100_000];
    let mut packed = vec![0u8; 101_000];
    let mut length = 101_000u64;
    // deflate wants some 260 KiB.
    assert_eq!(compress.call(&mut packed, &mut length, &text, 100_000).unwrap(), 0);
    assert!(length < 1000);
    let before = memory(&session).used_bytes;
    let small = limited(&worker, 128 * KIB);
    let compress = small
        .load("libz.so.1")
        .unwrap()
        .function::<fn(Out<[u8]>, hotcell::InOut<u64>, In<[u8]>, u64) -> i32>("compress")
        .unwrap();
    refused(compress.call(&mut packed, &mut length, &text, 100_000), 128 * KIB);
    assert_eq!(memory(&session).used_bytes, before);
}

#[test]
fn modules_that_cannot_be_loaded_say_why_as_without_a_limit() {
    let _watchdog = watchdog();
    let worker = worker().spawn().unwrap();
    let session = limited(&worker, 4 * MIB);
    assert!(matches!(session.load("libno-such-thing.so.9").unwrap_err(), LoadError::NotFound { .. }));
    assert!(matches!(session.load("/no/such/libthing.so").unwrap_err(), LoadError::NotFound { .. }));
    let base = build("base", "base.c", &[]);
    let folder = base.parent().unwrap().display().to_string();
    let needs = build("needs-base", "needs.c", &["-L", &folder, "-lbase"]);
    assert!(matches!(session.load(&needs).unwrap_err(), LoadError::MissingDependency { .. }));
    // And what can be loaded finds its symbols, again and again.
    for _ in 0..50 {
        let libm = session.load("libm.so.6").unwrap();
        assert_eq!(libm.function::<fn(f64, f64) -> f64>("pow").unwrap().call(2.0, 10.0).unwrap(), 1024.0);
    }
    session.load(faults::faulty()).unwrap();
}

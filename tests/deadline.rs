//! Deadlines: where they come from, and what a passed one does to the call, its session, its worker and everybody else.

#[path = "common/faults.rs"]
mod faults;

use faults::in_time::{in_time, prepared};
use faults::{Cell, crashed, eventually, is_gone, napping, next_worker_works, watchdog};
use hotcell::{
    Block, CallError, Cause, Function, In, InOut, Involvement, LoadError, OnDeadline, Out, RemotePtr,
    Session, SessionBuilder, Ticket, WaitPolicy, Worker,
};
use std::ffi::CString;
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_millis(50);
const NEVER: i32 = 600_000;

fn abandoning() -> Cell {
    Cell::in_worker(Worker::builder().on_deadline(OnDeadline::AbandonSession).spawn().unwrap())
}

/// The timeout that a call was told, if that is how it ended.
fn timed_out<T: std::fmt::Debug>(result: Result<T, CallError>, killed: bool) -> Duration {
    match result {
        Err(error @ CallError::TimedOut { after, worker_killed, .. }) => {
            assert_eq!(worker_killed, killed, "{error}");
            assert!(error.may_have_run(), "nobody knows");
            assert_eq!(error.session_usable(), !killed);
            after
        }
        other => panic!("expected a passed deadline, got {other:?}"),
    }
}

/// A word of shared memory that a call waits for: no test depends on how long anything takes.
struct Gate(Block);

impl Gate {
    fn new(cell: &Cell) -> Self {
        let gate = Self(cell.session.block(64).unwrap());
        gate.set(0);
        gate
    }

    fn set(&self, word: u32) {
        assert!(self.0.write_value(0, &word));
    }

    fn open(&self) {
        self.set(1);
    }

    fn pointer(&self) -> RemotePtr {
        self.0.pointer()
    }
}

fn wait_for(cell: &Cell) -> Function<fn(RemotePtr, i32) -> i32> {
    cell.module.function("wait_for").unwrap()
}

// The worker is killed.

#[test]
fn passed_deadline_kills_the_worker_and_tells_everybody_why() {
    let _watchdog = watchdog();
    let late = Cell::new();
    let bystander = Cell::in_worker(late.worker.clone());
    let add = late.add();
    let behind = bystander.add().with_timeout(Duration::MAX).unwrap();
    let nap = napping(&bystander, NEVER, 0);
    let spin = late.f0("spin").with_timeout(SOON).unwrap();
    std::thread::scope(|scope| {
        let behind = scope.spawn(|| behind.call(1, 2));
        assert_eq!(timed_out(spin.call(), true), SOON);
        for (result, involvement) in
            [(nap.join().unwrap(), Involvement::Bystander), (behind.join().unwrap(), Involvement::NotRun)]
        {
            let report = crashed(result);
            let Cause::DeadlineExceeded { function, after } = report.cause() else { panic!("{report}") };
            assert_eq!((&*function.symbol, *after), ("spin", SOON));
            assert_eq!(report.involvement(), involvement, "{report}");
            assert_eq!(report.culprit().map(|f| &*f.symbol), Some("spin"));
            assert_eq!((report.signal(), report.exit_code()), (None, None), "the host killed it");
            assert!(report.to_string().contains("killed because spin of "), "{report}");
        }
    });
    let error = add.call(1, 2).unwrap_err();
    assert!(!error.may_have_run() && !error.session_usable());
    is_gone(late.worker.pid());
    next_worker_works();
}

#[test]
fn time_out_does_not_wait_for_the_workers_end() {
    let _watchdog = watchdog();
    // A stopped worker cannot react to anything: the caller is back all the same, and the kernel's kill does not need it.
    for policy in [WaitPolicy::Adaptive, WaitPolicy::Spin, WaitPolicy::Park] {
        let cell = Cell::in_worker(Worker::builder().wait(policy).spawn().unwrap());
        let stop = cell.f1("raise_signal").with_timeout(SOON).unwrap();
        let start = Instant::now();
        assert_eq!(timed_out(stop.call(nix::libc::SIGSTOP), true), SOON);
        assert!(start.elapsed() >= SOON, "not before its time");
        is_gone(cell.worker.pid());
    }
}

#[test]
fn submitted_calls_count_their_time_from_the_wait() {
    let _watchdog = watchdog();
    let cell = Cell::new();
    let (nap, add) = (cell.nap().with_timeout(SOON).unwrap(), cell.add());
    // Longer under way than its timeout, but not longer waited for.
    let ticket = nap.submit(RemotePtr::NULL, 200, 5).unwrap();
    eventually("the call is over", || ticket.is_done());
    assert_eq!(ticket.wait().unwrap(), 5);
    let stuck = nap.submit(RemotePtr::NULL, NEVER, 5).unwrap();
    let behind: Vec<_> = (0..5).map(|i| add.submit(i, i).unwrap()).collect();
    assert_eq!(timed_out(stuck.wait(), true), SOON);
    for ticket in behind {
        let report = crashed(ticket.wait());
        assert!(matches!(report.cause(), Cause::DeadlineExceeded { .. }), "{report}");
        assert_eq!(report.involvement(), Involvement::NotRun);
    }
    is_gone(cell.worker.pid());
}

#[test]
fn call_behind_a_slow_one_has_its_own_deadline() {
    let _watchdog = watchdog();
    let cell = Cell::new();
    let add = cell.add().with_timeout(SOON).unwrap();
    let nap = napping(&cell, NEVER, 0);
    // The session is busy with another call; this one is the first to lose patience.
    let error = add.call(1, 2);
    assert_eq!(timed_out(error, true), SOON);
    let report = crashed(nap.join().unwrap());
    assert!(
        matches!(report.cause(), Cause::DeadlineExceeded { function, .. } if &*function.symbol == "add"),
        "{report}"
    );
    is_gone(cell.worker.pid());
}

// Where the timeout comes from.

type Nap = fn(RemotePtr, i32, i32) -> i32;

/// `nap` in a session whose timeout is short; `None` if loading took longer than that.
fn nap_of(session: &Session) -> Option<Function<Nap>> {
    prepared(prepared(session.load(faults::faulty()))?.function("nap"))
}

#[test]
fn timeout_of_the_call_goes_before_the_sessions_and_that_before_the_workers() {
    let _watchdog = watchdog();
    // Loading has to be done within the short one.
    let (shortest, long) = (Duration::from_millis(300), Duration::from_secs(1000));
    let nothing = RemotePtr::NULL;

    // The worker's reaches its sessions and their functions.
    in_time(shortest, |short| {
        let worker = Worker::builder().timeout(short).spawn().unwrap();
        let nap = nap_of(&worker.session().unwrap())?;
        assert_eq!(timed_out(nap.call(nothing, NEVER, 0), true), short);
        Some(())
    });

    // A session with options of its own has its own.
    in_time(shortest, |short| {
        let worker = Worker::builder().timeout(long).spawn().unwrap();
        let nap = nap_of(&worker.session_with(SessionBuilder::new().timeout(short)).unwrap())?;
        assert_eq!(timed_out(nap.call(nothing, NEVER, 0), true), short);
        Some(())
    });

    // A function with a timeout of its own has that, in both directions.
    in_time(shortest, |short| {
        let worker = Worker::builder().timeout(short).spawn().unwrap();
        let nap = nap_of(&worker.session().unwrap())?;
        let longer = i32::try_from(short.as_millis()).unwrap() + 200;
        assert_eq!(nap.with_timeout(long).unwrap().call(nothing, longer, 3).unwrap(), 3);
        let shorter = Duration::from_millis(20);
        assert_eq!(timed_out(nap.with_timeout(shorter).unwrap().call(nothing, NEVER, 0), true), shorter);
        Some(())
    });

    // By name too.
    let cell = Cell::in_worker(Worker::builder().timeout(long).spawn().unwrap());
    let spin = cell.module.prototype("int spin(void)").unwrap();
    assert_eq!(timed_out(spin.with_timeout(shortest).unwrap().call(()), true), shortest);
}

#[test]
fn timeout_of_the_session_holds_for_its_own_work() {
    let _watchdog = watchdog();
    in_time(Duration::from_millis(300), |after| {
        let worker =
            Worker::builder().timeout(after).on_deadline(OnDeadline::AbandonSession).spawn().unwrap();
        let session = worker.session().unwrap();
        let module = prepared(session.load(faults::faulty()))?;
        let wait = prepared(module.function::<fn(RemotePtr, i32) -> i32>("wait_for"))?;
        let cell = Cell { worker, session, module };
        let gate = Gate::new(&cell);
        // Behind a call that does not return, the session's own work is late too.
        let wait = wait.with_timeout(Duration::MAX).unwrap();
        let running = wait.submit(gate.pointer(), 1).unwrap();
        assert_eq!(timed_out(cell.session.ping(), false), after);
        gate.open();
        assert_eq!(running.wait().unwrap(), 1);
        eventually("the session is back", || cell.session.ping().is_ok());
        match cell.session.load(faults::with_constructor("hangs")).map(drop) {
            Err(LoadError::Call { source, .. }) => assert_eq!(timed_out(Err::<(), _>(source), false), after),
            other => panic!("{other:?}"),
        }
        Some(())
    });
}

#[test]
fn longest_duration_is_no_deadline() {
    let _watchdog = watchdog();
    for policy in [WaitPolicy::Adaptive, WaitPolicy::Spin, WaitPolicy::Park] {
        let worker = Worker::builder()
            .wait(policy)
            .timeout(Duration::MAX)
            .start_timeout(Duration::MAX)
            .grace(Duration::MAX)
            .spawn()
            .unwrap();
        let cell = Cell::in_worker(worker);
        assert_eq!(cell.add().call(2, 3).unwrap(), 5);
        assert_eq!(cell.nap().call(RemotePtr::NULL, 120, 9).unwrap(), 9);
        let add = cell.add();
        let tickets: Vec<_> = (0..200).map(|i| add.submit(i, 1)).collect();
        for (i, ticket) in tickets.into_iter().enumerate() {
            assert_eq!(usize::try_from(ticket.unwrap().wait().unwrap()), Ok(i + 1));
        }
        crashed(cell.f1("nap_and_crash").call(60));
    }
}

#[test]
fn a_zero_timeout_is_refused_wherever_one_is_set_and_nothing_is_sent() {
    let _watchdog = watchdog();
    let zero = Duration::ZERO;
    let refused = |option: &'static str, result: Result<(), hotcell::Error>| match result {
        Err(hotcell::Error::Start(hotcell::StartError::Configuration { option: bad, given, .. })) => {
            assert_eq!((bad, given.as_str()), (option, "0"));
        }
        other => panic!("{option}: {other:?}"),
    };
    refused("start_timeout", Worker::builder().start_timeout(zero).spawn().map(drop).map_err(Into::into));
    refused("timeout", Worker::builder().timeout(zero).spawn().map(drop).map_err(Into::into));
    let (worker, session) = (Worker::builder().timeout(zero), SessionBuilder::new().timeout(zero));
    let supervisor = hotcell::Supervisor::builder();
    let supervisor =
        [supervisor.clone().worker(worker.clone()), supervisor.session_defaults(session.clone())];
    for supervisor in supervisor {
        refused("timeout", supervisor.build().map(drop).map_err(Into::into));
    }
    let pool = || hotcell::Pool::builder(|session| Ok(session.load("libc.so.6")?)).workers(1);
    refused("timeout", pool().worker(worker).build().map(drop).map_err(Into::into));
    let pool = pool().build().unwrap();
    let abs = pool.function::<fn(i32) -> i32>("abs").unwrap();
    assert!(matches!(abs.with_timeout(zero), Err(CallError::ZeroTimeout { .. })));
    let isolated = hotcell::IsolatedProcessConfig::new("libc.so.6", "int abs(int)").timeout(zero);
    refused("timeout", isolated.start().map(drop));

    let cell = Cell::new();
    refused("timeout", cell.worker.session_with(session).map(drop).map_err(Into::into));
    let (typed, by_name) = (cell.add(), cell.module.prototype("int add(int, int)").unwrap());
    let before = cell.session.counters().requests;
    let errors = [typed.with_timeout(zero).unwrap_err(), by_name.with_timeout(zero).unwrap_err()];
    for error in errors {
        assert!(
            matches!(&error, CallError::ZeroTimeout { function } if &*function.symbol == "add"),
            "{error:?}"
        );
        assert_eq!(error.code(), "ERR_CONFIGURATION");
        assert!(!error.may_have_run() && error.session_usable());
    }
    assert_eq!(cell.session.counters().requests, before);
    assert_eq!(typed.call(2, 3).unwrap(), 5);
}

// One timeout for all waits of a call. What these calls wait for first is there after four fifths of their timeout, what they wait for then never comes. A call whose second wait had a timeout of
// its own could not be back sooner than that after the first one was over; one whose waits share a timeout is back after a fifth of it, unless the machine is held up for as long as the rest.

#[test]
fn the_wait_for_a_slot_and_the_wait_for_the_reply_share_a_calls_timeout() {
    let _watchdog = watchdog();
    in_time(Duration::from_millis(400), |timeout| {
        let session = Worker::spawn().unwrap().session_with(SessionBuilder::new().slots(2)).unwrap();
        let wait = session.load(faults::faulty()).unwrap();
        let wait: Function<fn(RemotePtr, i32) -> i32> = wait.function("wait_for").unwrap();
        let (first, never) = (session.block(4).unwrap(), session.block(4).unwrap());
        assert!(first.write_value(0, &0u32) && never.write_value(0, &0u32));
        // This thread is at home in the direct slot, and the one other slot is taken: another thread's call waits for it.
        let taken = wait.submit(first.pointer(), 1).unwrap();
        let late = wait.with_timeout(timeout).unwrap();
        std::thread::scope(|scope| {
            let late = scope.spawn(move || (late.call(never.pointer(), 0), Instant::now()));
            std::thread::sleep(timeout / 5 * 4);
            let opened = Instant::now();
            assert!(first.write_value(0, &1u32));
            drop(taken);
            let (late, back) = late.join().unwrap();
            if let Err(CallError::Full { .. }) = late {
                return None; // its time was over before it had the slot
            }
            assert_eq!(timed_out(late, true), timeout);
            (back < opened + timeout).then_some(())
        })
    });
}

#[test]
fn the_wait_for_a_long_strings_bytes_shares_its_calls_timeout() {
    let _watchdog = watchdog();
    in_time(Duration::from_millis(400), |timeout| {
        let cell = Cell::new();
        let (wait, first, never) = (wait_for(&cell), Gate::new(&cell), Gate::new(&cell));
        let strdup = cell.session.load("libc.so.6").unwrap();
        let strdup = strdup.function::<fn(In<str>) -> CString>("strdup").unwrap().with_timeout(timeout);
        // Served in this order. The string's bytes are fetched by a request behind all three.
        let before = wait.submit(first.pointer(), 0).unwrap();
        let text = "x".repeat(5000);
        let late = strdup.unwrap().submit(&text).unwrap();
        let behind = wait.submit(never.pointer(), 0).unwrap();
        std::thread::scope(|scope| {
            let late = scope.spawn(move || (late.wait(), Instant::now()));
            std::thread::sleep(timeout / 5 * 4);
            let opened = Instant::now();
            first.open();
            let (late, back) = late.join().unwrap();
            drop((before, behind));
            match late {
                Err(CallError::StringLost { source, .. }) => {
                    assert_eq!(timed_out::<()>(Err(*source), true), timeout);
                    (back < opened + timeout).then_some(())
                }
                // Its time was over before it was called.
                late => {
                    assert_eq!(timed_out(late, true), timeout);
                    None
                }
            }
        })
    });
}

// The session is given up.

#[test]
fn abandoned_session_refuses_until_its_call_returns_and_is_right_again_afterwards() {
    let _watchdog = watchdog();
    for policy in [WaitPolicy::Adaptive, WaitPolicy::Spin, WaitPolicy::Park] {
        let cell = Cell::in_worker(
            Worker::builder().wait(policy).on_deadline(OnDeadline::AbandonSession).spawn().unwrap(),
        );
        let (add, gate) = (cell.add(), Gate::new(&cell));
        let wait = wait_for(&cell).with_timeout(SOON).unwrap();
        assert_eq!(timed_out(wait.call(gate.pointer(), 77), false), SOON);
        for _ in 0..20 {
            let error = add.call(2, 3).unwrap_err();
            assert!(error.session_usable() && !error.may_have_run(), "{error}");
            let CallError::Abandoned { function } = error else { panic!("{error:?}") };
            assert_eq!(&*function.symbol, "wait_for");
        }
        gate.open();
        eventually("the session is back", || matches!(add.call(2, 3), Ok(5)));
        assert!(cell.worker.is_alive());
        for i in 0..1000 {
            assert_eq!(add.call(i, 7).unwrap(), i + 7);
        }
        // And again: it is no one-time grace.
        gate.set(0);
        timed_out(wait.call(gate.pointer(), 78), false);
        gate.open();
        eventually("the session is back", || cell.session.ping().is_ok());
        assert_eq!(cell.nap().call(RemotePtr::NULL, 1, 79).unwrap(), 79, "not an old result");
    }
}

#[test]
fn other_sessions_of_the_worker_do_not_notice() {
    let _watchdog = watchdog();
    let stuck = abandoning();
    let other = Cell::in_worker(stuck.worker.clone());
    let add = other.add();
    timed_out(stuck.f0("spin_with_syscalls").with_timeout(SOON).unwrap().call(), false);
    for i in 0..500 {
        assert_eq!(add.call(i, 1).unwrap(), i + 1);
    }
    assert!(matches!(stuck.session.ping(), Err(CallError::Abandoned { .. })));
    assert!(matches!(
        stuck.session.load("libm.so.6"),
        Err(LoadError::Call { source: CallError::Abandoned { .. }, .. })
    ));
    let third = stuck.worker.session().unwrap();
    third.ping().unwrap();
    stuck.worker.dispose();
    is_gone(stuck.worker.pid());
}

#[test]
fn buffer_of_an_abandoned_call_is_nobody_elses_until_it_returns() {
    let _watchdog = watchdog();
    // Small buffers lie in the direct slot's own room, large ones in the arena.
    for bytes in [200usize, 300_000] {
        let cell = abandoning();
        let gate = Gate::new(&cell);
        let fill = cell.module.function::<fn(RemotePtr, Out<[u8]>, i32, i32) -> i32>("fill_when").unwrap();
        let same = cell.module.function::<fn(RemotePtr, InOut<[u8]>, i32, i32) -> i32>("fill_when").unwrap();
        let count = i32::try_from(bytes).unwrap();
        let mut late = vec![7u8; bytes];
        timed_out(fill.with_timeout(SOON).unwrap().call(gate.pointer(), &mut late, count, 0xee), false);
        assert!(late.iter().all(|byte| *byte == 7), "the caller's own memory is out of reach");
        // Blocks are taken from the arena meanwhile, and must not be what the late write hits.
        let blocks: Vec<_> = (0..8).map(|_| cell.session.block(bytes as u64).unwrap()).collect();
        for block in &blocks {
            assert!(block.write(0, &vec![0x11; bytes]));
        }
        gate.open();
        eventually("the session is back", || cell.session.ping().is_ok());
        for block in &blocks {
            let mut seen = vec![0; bytes];
            assert!(block.read(0, &mut seen));
            assert!(seen.iter().all(|byte| *byte == 0x11), "the late write hit a block");
        }
        // Later calls are right, and get the room back.
        for value in 0..50 {
            let mut buffer = vec![1u8; bytes];
            assert_eq!(same.call(RemotePtr::NULL, &mut buffer, count - 1, value).unwrap(), count - 1);
            let (last, filled) = buffer.split_last().unwrap();
            assert!(filled.iter().all(|byte| i32::from(*byte) == value) && *last == 1);
        }
    }
}

#[test]
fn room_of_abandoned_calls_is_given_back() {
    let _watchdog = watchdog();
    let worker = Worker::builder()
        .session_defaults(
            SessionBuilder::new().payload_bytes_max(1 << 20).on_deadline(OnDeadline::AbandonSession),
        )
        .spawn()
        .unwrap();
    let cell = Cell::in_worker(worker);
    let gate = Gate::new(&cell);
    let fill = cell.module.function::<fn(RemotePtr, Out<[u8]>, i32, i32) -> i32>("fill_when").unwrap();
    let mut buffer = vec![0u8; 1 << 20];
    // Many times what the arena holds.
    for _ in 0..20 {
        gate.set(0);
        let late = fill.with_timeout(Duration::from_millis(5)).unwrap().call(
            gate.pointer(),
            &mut buffer,
            1 << 20,
            1,
        );
        timed_out(late, false);
        gate.open();
        eventually("the session is back", || cell.session.ping().is_ok());
    }
    assert_eq!(fill.call(RemotePtr::NULL, &mut buffer, 1 << 20, 9).unwrap(), 1 << 20);
    assert!(buffer.iter().all(|byte| *byte == 9));
}

#[test]
fn submitted_call_can_be_abandoned_and_those_behind_it_still_answer() {
    let _watchdog = watchdog();
    let cell = abandoning();
    let (wait, add, gate) = (wait_for(&cell).with_timeout(SOON).unwrap(), cell.add(), Gate::new(&cell));
    let stuck = wait.submit(gate.pointer(), 1).unwrap();
    let behind: Vec<_> = (0..10).map(|i| add.submit(i, 100).unwrap()).collect();
    assert_eq!(timed_out(stuck.wait(), false), SOON);
    // No new call is taken now; those that were are waited for as ever.
    assert!(matches!(add.submit(1, 1), Err(CallError::Abandoned { .. })));
    assert!(matches!(add.try_submit_tuple((1, 1)), Err(CallError::Abandoned { .. })));
    gate.open();
    for (i, ticket) in behind.into_iter().enumerate() {
        assert_eq!(usize::try_from(ticket.wait().unwrap()), Ok(i + 100));
    }
    assert_eq!(add.call(2, 3).unwrap(), 5);
    // The whole ring is in order.
    let tickets: Vec<Ticket<'_, _>> = (0..200).map(|i| add.submit(i, 0)).collect::<Result<_, _>>().unwrap();
    for (i, ticket) in tickets.into_iter().enumerate() {
        assert_eq!(usize::try_from(ticket.wait().unwrap()), Ok(i));
    }
}

#[test]
fn a_string_that_is_not_fetched_in_time_gives_its_session_up_and_no_other() {
    let _watchdog = watchdog();
    in_time(Duration::from_millis(400), |timeout| {
        let cell = abandoning();
        let other = Cell::in_worker(cell.worker.clone());
        let add = cell.add();
        let (wait, first, second) = (wait_for(&cell), Gate::new(&cell), Gate::new(&cell));
        let strdup = cell.session.load("libc.so.6").unwrap();
        let strdup = strdup.function::<fn(In<str>) -> CString>("strdup").unwrap();
        let text = "x".repeat(5000);
        // This thread is at home in the direct slot. The worker looks at the two kinds of slots in turn: it serves the string's call between these two, and the request for the string's bytes, on the
        // direct slot again, behind the second.
        let tickets = [&first, &second].map(|gate| wait.submit(gate.pointer(), 0).unwrap());
        let before = cell.session.counters().requests;
        let late = std::thread::scope(|scope| {
            scope.spawn(|| {
                eventually("the call is sent", || cell.session.counters().requests > before);
                first.open();
            });
            strdup.with_timeout(timeout).unwrap().call(&text)
        });
        match late {
            Err(CallError::StringLost { source, .. }) => {
                assert_eq!(timed_out::<()>(Err(*source), false), timeout);
            }
            // Its time was over before it was called.
            late => {
                assert_eq!(timed_out(late.map(drop), false), timeout);
                second.open();
                return None;
            }
        }
        assert_eq!(other.add().call(2, 3).unwrap(), 5, "other sessions go on");
        assert!(matches!(add.call(2, 3), Err(CallError::Abandoned { .. })));
        second.open();
        for ticket in tickets {
            assert_eq!(ticket.wait().unwrap(), 0);
        }
        eventually("the session is back", || cell.session.ping().is_ok());
        for i in 0..300 {
            assert_eq!(add.call(i, i).unwrap(), 2 * i);
            assert_eq!(strdup.call(&text).unwrap().as_bytes(), text.as_bytes());
        }
        Some(())
    });
}

#[test]
fn several_abandoned_calls_must_all_return_before_the_session_does() {
    let _watchdog = watchdog();
    let cell = abandoning();
    let (wait, add) = (wait_for(&cell).with_timeout(SOON).unwrap(), cell.add());
    let gates: Vec<_> = (0..3).map(|_| Gate::new(&cell)).collect();
    let tickets: Vec<_> = gates.iter().map(|gate| wait.submit(gate.pointer(), 1).unwrap()).collect();
    for ticket in tickets {
        timed_out(ticket.wait(), false);
    }
    for gate in gates {
        assert!(matches!(add.call(1, 1), Err(CallError::Abandoned { .. })));
        gate.open();
    }
    eventually("the session is back", || add.call(1, 1).is_ok());
    for i in 0..300 {
        assert_eq!(add.call(i, i).unwrap(), 2 * i);
    }
}

#[test]
fn dropped_tickets_of_slow_calls_are_no_deadline_matter() {
    let _watchdog = watchdog();
    let cell = Cell::new();
    let (nap, add) = (cell.nap().with_timeout(SOON).unwrap(), cell.add());
    drop(nap.submit(RemotePtr::NULL, 200, 1).unwrap());
    assert_eq!(add.call(2, 3).unwrap(), 5, "it only comes later");
}

#[test]
fn crash_of_an_abandoned_call_ends_the_worker_with_its_own_cause() {
    let _watchdog = watchdog();
    let cell = abandoning();
    let (add, gate) = (cell.add(), Gate::new(&cell));
    let crash = cell.module.function::<fn(RemotePtr) -> i32>("crash_when").unwrap();
    timed_out(crash.with_timeout(SOON).unwrap().call(gate.pointer()), false);
    gate.open();
    eventually("the worker dies", || !cell.worker.is_alive());
    let report = crashed(add.call(1, 2));
    assert_eq!(report.signal(), Some(nix::libc::SIGSEGV), "{report}");
    assert_eq!(report.culprit().map(|f| &*f.symbol), Some("crash_when"), "{report}");
    assert_eq!(report.involvement(), Involvement::NotRun);
    is_gone(cell.worker.pid());
}

#[test]
fn abandoned_session_that_is_dropped_leaves_no_thread_once_its_call_returns() {
    let _watchdog = watchdog();
    in_time(SOON, |soon| {
        let cell = abandoning();
        let other = Cell::in_worker(cell.worker.clone());
        let threads = || std::fs::read_dir(format!("/proc/{}/task", other.worker.pid())).unwrap().count();
        let before = threads();
        let longer = i32::try_from(soon.as_millis()).unwrap() * 20;
        match cell.nap().with_timeout(soon).unwrap().call(RemotePtr::NULL, longer, 0) {
            // This thread was held up until the nap was over.
            Ok(_) => return None,
            late => timed_out(late, false),
        };
        drop(cell);
        eventually("the session's thread ends", || threads() < before);
        assert_eq!(other.add().call(2, 3).unwrap(), 5);
        Some(())
    });
}

#[test]
fn close_that_is_given_up_closes_the_session_when_it_returns() {
    let _watchdog = watchdog();
    in_time(Duration::from_millis(200), |timeout| {
        let longer = (8 * timeout).as_millis().to_string();
        let cell = Cell::in_worker(Worker::builder().env("SLEEP_MS", longer).spawn().unwrap());
        let options = SessionBuilder::new().timeout(timeout).on_deadline(OnDeadline::AbandonSession);
        let session = cell.worker.session_with(options).unwrap();
        prepared(session.load(faults::with_destructor("sleeps")))?;
        match session.close() {
            // This thread was held up until the destructor was over.
            Ok(()) => return None,
            late => timed_out(late, false),
        };
        match session.ping() {
            Err(CallError::Abandoned { .. }) => {}
            Err(CallError::Closed) => return None,
            other => panic!("{other:?}"),
        }
        // Its thread is gone then: another call must not wait for an answer.
        eventually("the session is closed", || matches!(session.ping(), Err(CallError::Closed)));
        assert!(matches!(session.close(), Err(CallError::Closed)));
        assert_eq!(cell.add().call(2, 3).unwrap(), 5);
        Some(())
    });
}

#[test]
fn abandoned_session_can_be_closed_when_its_call_has_returned() {
    let _watchdog = watchdog();
    let cell = abandoning();
    let gate = Gate::new(&cell);
    timed_out(wait_for(&cell).with_timeout(SOON).unwrap().call(gate.pointer(), 0), false);
    assert!(matches!(cell.session.close(), Err(CallError::Abandoned { .. })));
    gate.open();
    eventually("the session is closed", || cell.session.close().is_ok());
    assert!(matches!(cell.session.ping(), Err(CallError::Closed)));
}

#[test]
fn close_that_overtakes_an_abandoned_call_closes_the_session() {
    let _watchdog = watchdog();
    let cell = abandoning();
    let gate = Gate::new(&cell);
    // A call holds the session's thread, a close waits behind it, and behind that another call, which is given up before the close is served.
    let first = wait_for(&cell).submit(gate.pointer(), 1).unwrap();
    let before = cell.session.counters().requests;
    std::thread::scope(|scope| {
        let close = scope.spawn(|| cell.session.close());
        eventually("the close is sent", || cell.session.counters().requests > before);
        let late = wait_for(&cell).with_timeout(SOON).unwrap().submit(gate.pointer(), 2).unwrap();
        timed_out(late.wait(), false);
        gate.open();
        assert_eq!(first.wait().unwrap(), 1);
        close.join().unwrap().unwrap();
    });
    assert!(matches!(cell.session.ping(), Err(CallError::Closed)), "{:?}", cell.session.ping());
}

#[test]
fn block_of_a_forgotten_ticket_is_nobody_elses_until_its_call_returns() {
    let _watchdog = watchdog();
    let cell = Cell::new();
    let gate = Gate::new(&cell);
    let fill = cell.module.function::<fn(RemotePtr, Block, i32, i32) -> i32>("fill_when").unwrap();
    let given = cell.session.block(64).unwrap();
    std::mem::forget(fill.submit(gate.pointer(), &given, 64, 0xee).unwrap());
    let pointer = given.pointer();
    drop(given);
    let blocks: Vec<_> = (0..8).map(|_| cell.session.block(64).unwrap()).collect();
    for block in &blocks {
        assert!(block.write(0, &[0x11; 64]));
    }
    gate.open();
    cell.session.ping().unwrap();
    for block in &blocks {
        assert_eq!(block.read_value::<[u8; 64]>(0), Some([0x11; 64]), "the late write hit a block");
    }
    // Its call is over: the room is given back with the next block that is dropped.
    drop(blocks);
    let again: Vec<_> = (0..16).map(|_| cell.session.block(64).unwrap()).collect();
    assert!(again.iter().any(|block| block.pointer() == pointer));
}

//! A worker that lies against a real host: whatever it does, the host gets a typed error within a bounded time, and goes on.
//!
//! Each test starts `hotcell-hostile` with the name of one lie (see its sources) and ends with a real worker that works. A hang, and a panic on one of the
//! library's own threads, abort the whole run.

use hotcell::{
    ARGS_MAX, Block, CallError, Cause, CrashReport, Error, In, InOut, Involvement, LoadError, Mismatch,
    Module, OnDeadline, Out, Pipeline, RemotePtr, Session, SessionBuilder, Signature, StartError, Type,
    WaitPolicy, Worker, WorkerBuilder, WorkerEvent,
};
use nix::time::{ClockId, clock_gettime};
use std::ffi::CString;
use std::sync::Once;
use std::time::{Duration, Instant};

/// A test that takes longer hangs, on a slow and busy machine too.
const HANG: Duration = Duration::from_secs(600);
/// The deadline of calls to a worker that will never answer.
const SHORT: Duration = Duration::from_millis(150);

/// Ends the whole process if the test is not over in time, or if one of the library's own threads panics.
struct Watchdog(#[expect(dead_code, reason = "hangs up when dropped")] std::sync::mpsc::Sender<()>);

fn watchdog(limit: Duration) -> Watchdog {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let print = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            print(info);
            if std::thread::current().name().is_some_and(|name| name.starts_with("hotcell-")) {
                eprintln!("a thread of the library panicked");
                std::process::abort();
            }
        }));
    });
    let name = std::thread::current().name().unwrap_or("a test").to_owned();
    let (alive, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        if ended.recv_timeout(limit) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            eprintln!("{name} hangs: not over after {limit:?}");
            std::process::abort();
        }
    });
    Watchdog(alive)
}

fn liar(lie: impl Into<String>) -> WorkerBuilder {
    Worker::builder().program(env!("CARGO_BIN_EXE_hotcell-hostile")).env("LIE", lie.into())
}

/// A worker of a builder with a short start timeout, which holds for its sessions too. The worker itself may be late on a busy machine; that is said, and tried again.
fn started_in_time(builder: impl Fn() -> WorkerBuilder) -> Worker {
    for _ in 0..20 {
        match builder().spawn() {
            Err(late @ StartError::TimedOut { .. }) => eprintln!("{late}"),
            started => return started.unwrap(),
        }
    }
    panic!("the liar never started in time");
}

/// After every lie: the host has not suffered.
fn a_real_worker_works() {
    let session = Worker::spawn().expect("a real worker starts").session().expect("and opens a session");
    let pow = session.load("libm.so.6").unwrap().function::<fn(f64, f64) -> f64>("pow").unwrap();
    assert_eq!(pow.call(2.0, 10.0).unwrap(), 1024.0);
}

fn wait_for_the_end(worker: &Worker) -> CrashReport {
    for event in worker.events() {
        if let WorkerEvent::Ended(report) = event {
            assert!(!worker.is_alive());
            return report;
        }
    }
    panic!("the events ended without an end")
}

fn assert_breach(report: &CrashReport) {
    assert!(matches!(report.cause(), Cause::ProtocolBreach { .. }), "{report}");
    assert_printable(&report.to_string());
}

fn assert_died_of_breach(result: Result<impl std::fmt::Debug, StartError>) {
    match result {
        Err(StartError::Died(report)) => assert_breach(&report),
        other => panic!("{other:?}"),
    }
}

/// Text from a worker is shown without what a terminal or a log would act on.
fn assert_printable(text: &str) {
    let bad = |c: char| {
        c != '\n' && c.is_control()
            || ('\u{202a}'..='\u{202e}').contains(&c)
            || ('\u{2066}'..='\u{2069}').contains(&c)
            || ('\u{2028}'..='\u{2029}').contains(&c)
    };
    if let Some(c) = text.chars().find(|c| bad(*c)) {
        panic!("unescaped {c:?} in {text:?}");
    }
}

type Echo = fn(u64) -> u64;

/// A session with the liar, and a function in it.
struct Cell {
    worker: Worker,
    session: Session,
    module: Module,
}

impl Cell {
    fn with(builder: WorkerBuilder) -> Self {
        let worker = builder.spawn().unwrap();
        let session = worker.session().unwrap();
        let module = session.load("libliar.so").unwrap();
        Self { worker, session, module }
    }

    fn new(lie: impl Into<String>) -> Self {
        Self::with(liar(lie))
    }

    fn call(&self) -> Result<u64, CallError> {
        self.module.function::<fn(u64) -> u64>("f").unwrap().call(7)
    }

    fn pipeline(&self) -> Result<Pipeline<Echo>, CallError> {
        self.module.function::<fn(u64) -> u64>("f").unwrap().pipeline()
    }

    fn call_string(&self) -> Result<CString, CallError> {
        self.module.function::<fn() -> CString>("s").unwrap().call()
    }
}

fn assert_call_is_a_breach<T: std::fmt::Debug>(result: Result<T, CallError>) {
    match result {
        Err(CallError::Crashed(report)) => assert_breach(&report),
        other => panic!("{other:?}"),
    }
}

// The handshake.

macro_rules! tests {
    ($($(#[$meta:meta])* fn $name:ident() $body:block)+) => {
        $($(#[$meta])* #[test] fn $name() {
            let _watchdog = watchdog(HANG);
            $body
            a_real_worker_works();
        })+

        /// Every lie of this file, to be told again and again.
        const LIES: &[(&str, fn())] = &[$((stringify!($name), || $body)),+];
    };
}

tests! {
    fn wrong_hello_is_a_mismatch_that_says_what_does_not_fit() {
        let mismatch = |lie: &str| match liar(lie).spawn() {
            Err(StartError::Mismatch { mismatch, .. }) => mismatch,
            other => panic!("{lie}: {other:?}"),
        };
        assert!(matches!(mismatch("wrong-magic:1"), Mismatch::NotHello { bytes: 32, magic: 1 }));
        assert!(matches!(mismatch("wrong-version"), Mismatch::Version { theirs: u32::MAX, .. }));
        assert!(matches!(mismatch("wrong-layout"), Mismatch::Layout { .. }));
        for bytes in [1, 7, 8, 31, 33, 64, 4096] {
            assert!(matches!(mismatch(&format!("hello-of-bytes:{bytes}")),
                Mismatch::NotHello { bytes: told, .. } if told == bytes));
        }
    }

    fn hello_that_is_no_frame_is_a_breach() {
        assert_died_of_breach(liar("hello-of-bytes:0").spawn());
        assert_died_of_breach(liar("hello-of-bytes:4097").spawn());
        assert_died_of_breach(liar("hello-of-bytes:100000").spawn());
    }

    fn silent_worker_times_out_and_is_killed() {
        for lie in ["no-hello", "late-hello:60000"] {
            let after = SHORT;
            match liar(lie).start_timeout(after).spawn() {
                Err(StartError::TimedOut { after: told, .. }) => assert_eq!(told, after),
                other => panic!("{lie}: {other:?}"),
            }
        }
    }

    fn late_hello_is_waited_for() {
        let worker = liar("late-hello:300").spawn().unwrap();
        worker.session().unwrap().ping().unwrap();
    }

    fn what_comes_after_hello_unasked_is_a_breach() {
        for lie in [
            "hello-twice", "unasked-opened", "unasked-refused", "empty-frame", "frame-over-the-cap",
            "frame-over-the-cap:100000", "flood-of-hellos", "flood-of-garbage", "close-after-hello",
            "shut-down-writing", "garbage-frame:1", "garbage-frame:200", "garbage-frame:4095",
        ] {
            let worker = liar(lie).spawn().unwrap_or_else(|e| panic!("{lie}: {e}"));
            assert_breach(&wait_for_the_end(&worker));
            // And whoever comes later hears the same.
            assert_died_of_breach(worker.session());
        }
    }

    fn closed_socket_of_a_living_worker_is_a_breach() {
        assert_died_of_breach(liar("close-before-hello").spawn());
    }

    fn socket_that_takes_nothing_any_more_is_a_breach() {
        let worker = started_in_time(|| liar("shut-down-reading").start_timeout(Duration::from_secs(2)));
        // The shutdown may come after the request, which is then never read.
        match worker.session() {
            Err(StartError::TimedOut { .. }) => {}
            other => assert_died_of_breach(other),
        }
        assert!(!worker.is_alive() || matches!(wait_for_the_end(&worker).cause(), Cause::NeverReady { .. }));
    }

    fn descriptors_that_nobody_asked_for_are_a_breach() {
        for count in [1, 2, 3, 200] {
            assert_died_of_breach(liar(format!("hello-with-descriptors:{count}")).spawn());
            let worker = liar(format!("frame-with-descriptors:{count}")).spawn().unwrap();
            assert_breach(&wait_for_the_end(&worker));
            assert_died_of_breach(liar(format!("answer-with-descriptors:{count}")).spawn().unwrap().session());
            let cell = Cell::new(format!("control-frames-while-calling:{count}"));
            assert_call_is_a_breach(cell.call());
        }
    }

    fn death_in_the_handshake_is_told_as_it_was() {
        for code in [0, 7, 255] {
            match liar(format!("exit-before-hello:{code}")).spawn() {
                Err(StartError::Died(report)) => assert_eq!(report.exit_code(), Some(code)),
                other => panic!("{other:?}"),
            }
        }
        for signal in [6, 9, 11, 15] {
            match liar(format!("signal-before-hello:{signal}")).spawn() {
                Err(StartError::Died(report)) => assert_eq!(report.signal(), Some(signal)),
                other => panic!("{other:?}"),
            }
        }
        // It may be dead before its hello is seen.
        match liar("exit-after-hello:8").spawn() {
            Ok(worker) => assert_eq!(wait_for_the_end(&worker).exit_code(), Some(8)),
            Err(StartError::Died(report)) => assert_eq!(report.exit_code(), Some(8)),
            other => panic!("{other:?}"),
        }
    }

    // Sessions that are not opened.

    fn session_that_is_never_opened_times_out_and_ends_the_worker() {
        let worker = started_in_time(|| liar("never-opens").start_timeout(Duration::from_secs(2)));
        assert!(matches!(worker.session(), Err(StartError::TimedOut { .. })));
        assert!(matches!(wait_for_the_end(&worker).cause(), Cause::NeverReady { .. }));
    }

    fn wrong_answer_to_open_is_a_breach() {
        for lie in [
            "opens-another", "refuses-with-a-lie-about-length", "refuses-in-no-text", "half-an-answer",
            "answer-and-more", "answer-over-the-cap",
        ] {
            assert_died_of_breach(liar(lie).spawn().unwrap().session());
        }
        // The first answer is right, so the session may have been opened before the second is seen.
        for lie in ["opens-twice", "opens-then-refuses"] {
            let worker = liar(lie).spawn().unwrap();
            let _ = worker.session();
            assert_breach(&wait_for_the_end(&worker));
        }
    }

    fn refusal_is_an_error_with_its_reason_made_harmless() {
        let worker = liar("refuses-with-control-characters").spawn().unwrap();
        for _ in 0..3 {
            match worker.session() {
                Err(StartError::Refused { reason }) => {
                    assert!(reason.contains("owned") && reason.len() < 40_000);
                    assert_printable(&reason);
                }
                other => panic!("{other:?}"),
            }
            assert!(worker.is_alive());
        }
    }

    fn refusing_a_placement_that_was_not_asked_for_is_a_breach() {
        let worker = liar("refuses-a-placement:1").spawn().unwrap();
        assert_died_of_breach(worker.session_with(SessionBuilder::new().pin_to(0)));
        // One that was asked for is refused, whatever its number.
        for errno in [0, 1, 2_147_483_647] {
            let worker = liar(format!("refuses-a-placement:{errno}")).spawn().unwrap();
            match worker.session_with(SessionBuilder::new().real_time(1)) {
                Err(error @ StartError::Placement { option: "real_time", place: "the worker", .. }) => {
                    assert_printable(&error.to_string());
                }
                other => panic!("{other:?}"),
            }
            assert!(worker.is_alive());
        }
    }

    fn account_of_a_placement_is_shown_and_not_used() {
        let session = liar("places-at-will").spawn().unwrap().session_with(SessionBuilder::new().prefault_bytes(1)).unwrap();
        let placement = session.placement();
        assert_eq!((placement.cpu, placement.real_time), (Some(u32::MAX), Some(0)));
        assert_eq!(placement.worker.locked_bytes, u64::MAX);
        assert_eq!(placement.host.locked_bytes, 0);
        assert!(placement.host.prefaulted_bytes > 64 << 10);
        assert_printable(&placement.to_string());
        session.ping().unwrap();
    }

    fn death_while_opening_is_told_as_it_was() {
        match liar("exit-at-open:5").spawn().unwrap().session() {
            Err(StartError::Died(report)) => assert_eq!(report.exit_code(), Some(5)),
            other => panic!("{other:?}"),
        }
    }

    fn socket_that_is_never_read_blocks_nobody() {
        let worker = started_in_time(|| liar("never-reads").start_timeout(Duration::from_secs(3)));
        let small = || SessionBuilder::new().slots(2).payload_bytes_max(16 << 10);
        // More requests than the socket holds.
        std::thread::scope(|scope| {
            for _ in 0..400 {
                let worker = worker.clone();
                let open = move || match worker.session_with(small()) {
                    Err(StartError::TimedOut { .. } | StartError::System { .. }) => {}
                    Err(StartError::Died(report)) => {
                        assert!(matches!(report.cause(), Cause::NeverReady { .. }), "{report}");
                    }
                    other => panic!("{other:?}"),
                };
                std::thread::Builder::new().stack_size(128 << 10).spawn_scoped(scope, open).unwrap();
            }
        });
        assert!(matches!(wait_for_the_end(&worker).cause(), Cause::NeverReady { .. }));
    }

    fn wild_arena_address_harms_nobody() {
        for address in [0, 1, 63, 4096, 1 << 47, u64::MAX - (64 << 10) + 1, u64::MAX - 63, u64::MAX - 1, u64::MAX] {
            let worker = liar(format!("arena-address:{address}")).spawn().unwrap();
            let session = worker.session().unwrap();
            exercise(&session, 20);
            let f = session.load("libliar.so").unwrap().function::<fn(In<str>, In<str>) -> u64>("f").unwrap();
            f.call("some text", &"x".repeat(100)).unwrap();
        }
    }

    fn more_arguments_than_possible_are_refused_whatever_the_worker_says() {
        for count in [ARGS_MAX + 1, 200, 300] {
            let cell = Cell::new("string-length:0");
            let signature = Signature::new(vec![Type::U8; count], Type::Void);
            match cell.module.dynamic("f", signature) {
                Err(LoadError::BadSignature { .. }) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    // The shared memory.

    fn unknown_states_are_breaches_and_the_known_ones_are_what_they_say() {
        const PARKED: u32 = 1 << 31;
        let mut states: Vec<u32> = (0..32).map(|bit| 1 << bit).collect();
        states.extend([0, 3, 5, 6, 7, 0xff, 0x7fff_ffff, 0x1234_5678, u32::MAX]);
        states.extend([0, 1, 2, 3, 4, 5].map(|state| state | PARKED));
        for (at, state) in states.into_iter().enumerate() {
            // A request that is "not answered yet", whatever the sleep bit says, is a wait to the deadline.
            let pending = state & !PARKED == 1;
            let policy = [WaitPolicy::Adaptive, WaitPolicy::Park, WaitPolicy::Spin][at % 3];
            let cell = Cell::with(liar(format!("state:{state}")).wait(policy));
            let f = cell.module.function::<fn(u64) -> u64>("f").unwrap();
            let f = if pending { f.with_timeout(SHORT).unwrap() } else { f };
            match (f.call(7), state & !PARKED) {
                (Err(CallError::TimedOut { worker_killed: true, .. }), 1) => {}
                (Ok(7), 2) => {}
                (Err(CallError::Crashed(report)), _) if !pending => {
                    assert_breach(&report);
                    assert_eq!(report.function().unwrap().symbol.as_ref(), "f");
                }
                (other, _) => panic!("state {state:#x}: {other:?}"),
            }
        }
    }

    fn wrong_turns_in_the_stream_are_breaches() {
        let turns = ["head:3", "head:255", "head:256", "head:257", "head:4294967295", "head:4294967299", "head:18446744073709551615",
            "shifted:1", "shifted:256", "shifted:4294967040", "shifted:4294967296"];
        for (at, lie) in turns.into_iter().enumerate() {
            let policy = [WaitPolicy::Adaptive, WaitPolicy::Park, WaitPolicy::Spin][at % 3];
            let cell = Cell::with(liar(format!("stream-{lie}")).wait(policy).timeout(Duration::from_secs(20)));
            let mut pipeline = cell.pipeline().unwrap();
            pipeline.send(7).unwrap();
            pipeline.send(8).unwrap();
            match pipeline.receive() {
                // A whole round of turns further on is the same turn. (What stands above a turn is errno: any number.)
                Ok(Some(_)) if lie == "shifted:4294967296" => continue,
                result => assert_call_is_a_breach(result),
            }
            // The second call, or a third: the worker is dead.
            assert_call_is_a_breach(pipeline.receive());
            assert_call_is_a_breach(pipeline.send(9));
        }
    }

    fn stream_without_answers_is_a_deadline() {
        // The turn 0, and the one before the first, are what stands there before the first round: as if nothing had been said.
        for lie in ["stream-silence", "stream-head:0", "stream-shifted:4294967295"] {
            for policy in [WaitPolicy::Adaptive, WaitPolicy::Park, WaitPolicy::Spin] {
                let cell = Cell::with(liar(lie).wait(policy));
                let f = cell.module.function::<fn(u64) -> u64>("f").unwrap().with_timeout(SHORT).unwrap();
                let mut pipeline = f.pipeline().unwrap();
                pipeline.send(7).unwrap();
                match pipeline.receive() {
                    Err(CallError::TimedOut { after, worker_killed: true, .. }) => assert_eq!(after, SHORT),
                    other => panic!("{lie}: {other:?}"),
                }
                assert!(matches!(wait_for_the_end(&cell.worker).cause(), Cause::DeadlineExceeded { .. }));
            }
        }
    }

    fn replies_to_nothing_and_sleepers_that_are_none_harm_nobody() {
        for lie in ["stream-before-requests", "stream-sleepers:1", "stream-sleepers:2", "stream-barrier:7", "stream-barrier:0", "stream-without-waking"] {
            for policy in [WaitPolicy::Adaptive, WaitPolicy::Park] {
                let cell = Cell::with(liar(lie).wait(policy));
                let mut pipeline = cell.pipeline().unwrap();
                assert!(pipeline.receive().unwrap().is_none());
                for round in 0..5 {
                    for i in 0..20 {
                        pipeline.send(round * 20 + i).unwrap();
                    }
                    for i in 0..20 {
                        let result = pipeline.receive().unwrap_or_else(|error| panic!("{lie}: {error}"));
                        // A reply that came before its request has any value.
                        assert!(result == Some(round * 20 + i) || lie == "stream-before-requests", "{lie}: {result:?}");
                    }
                }
                assert!(pipeline.receive().unwrap().is_none());
                drop(pipeline);
                drop(cell.pipeline().unwrap());
            }
        }
    }

    fn stream_that_was_refused_is_a_breach() {
        for status in [1, 5, u64::MAX] {
            let cell = Cell::new(format!("stream-refused:{status}"));
            assert_call_is_a_breach(cell.pipeline());
        }
    }

    fn counts_of_the_stream_are_believed_only_as_far_as_they_go() {
        for taken in [0, 3, 4, 5, 200, 1 << 32, u64::MAX] {
            let cell = Cell::new(format!("stream-taken-and-exit:{taken}"));
            let mut pipeline = cell.pipeline().unwrap();
            let sent = (0..10).take_while(|i| pipeline.send(*i).is_ok()).count() as u64;
            for i in 0..sent {
                match pipeline.receive() {
                    Ok(Some(result)) => assert!(i < 3 && result == i),
                    Err(CallError::Crashed(report)) => {
                        assert!(i >= 3);
                        assert_eq!(report.involvement() == Involvement::NotRun, taken <= i, "{i} of {taken}");
                        assert_printable(&report.to_string());
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    fn stream_in_which_anything_changes_ends_every_wait() {
        for seed in 0..20 {
            let lie = if seed % 2 == 0 { "stream-flipping" } else { "stream-random" };
            let cell = Cell::new(format!("{lie}:{seed}"));
            // It starts with the first call.
            let function = cell.module.function::<fn(u64) -> u64>("f").unwrap();
            let function = function.with_timeout(Duration::from_secs(1)).unwrap();
            for _ in 0..10 {
                let Ok(mut pipeline) = function.pipeline() else { break };
                for i in 0..200 {
                    let _ = pipeline.send(i);
                }
                for _ in 0..pipeline.in_flight() / 2 {
                    let _ = pipeline.receive();
                }
            }
        }
    }

    fn silence_is_a_deadline_and_the_end_of_the_worker() {
        for policy in [WaitPolicy::Adaptive, WaitPolicy::Park, WaitPolicy::Spin] {
            let cell = Cell::with(liar("silence").wait(policy));
            let f = cell.module.function::<fn(u64) -> u64>("f").unwrap().with_timeout(SHORT).unwrap();
            match f.call(7) {
                Err(CallError::TimedOut { after, worker_killed: true, .. }) => assert_eq!(after, SHORT),
                other => panic!("{other:?}"),
            }
            assert!(matches!(wait_for_the_end(&cell.worker).cause(), Cause::DeadlineExceeded { .. }));
            assert!(matches!(f.call(7), Err(CallError::Crashed(_))));
        }
        let session = liar("silence-from-the-start").timeout(SHORT).spawn().unwrap().session().unwrap();
        assert!(matches!(session.load("x"), Err(LoadError::Call { source: CallError::TimedOut { .. }, .. })));
    }

    fn silence_is_only_the_session_given_up_where_that_is_asked_for() {
        let builder = liar("silence").on_deadline(OnDeadline::AbandonSession);
        let cell = Cell::with(builder);
        let f = cell.module.function::<fn(u64) -> u64>("f").unwrap().with_timeout(SHORT).unwrap();
        assert!(matches!(f.call(7), Err(CallError::TimedOut { worker_killed: false, .. })));
        assert!(matches!(f.call(7), Err(CallError::Abandoned { .. })));
        assert!(matches!(cell.session.ping(), Err(CallError::Abandoned { .. })));
        assert!(cell.worker.is_alive());
        cell.worker.session().unwrap().ping().unwrap();
    }

    fn calls_on_an_abandoned_session_whose_states_flip_end() {
        let builder = liar("flipping-pending-states").timeout(SHORT).on_deadline(OnDeadline::AbandonSession);
        let worker = builder.start_timeout(Duration::from_secs(30)).spawn().unwrap();
        let options = SessionBuilder::new().on_deadline(OnDeadline::AbandonSession);
        let session = worker.session_with(options).unwrap();
        let f = session.load("x").unwrap().function::<fn(u64) -> u64>("f").unwrap().with_timeout(SHORT).unwrap();
        for _ in 0..50 {
            let _ = f.call(1);
        }
        // It cannot be closed: it never answers. That must not take the default deadline of 30 s.
        let _ = session.close();
    }

    fn sleeper_that_nobody_wakes_looks_for_itself() {
        for lie in ["reply-without-waking", "requeued-sleeper"] {
            for policy in [WaitPolicy::Adaptive, WaitPolicy::Park] {
                let cell = Cell::with(liar(lie).wait(policy));
                for _ in 0..3 {
                    assert_eq!(cell.call().unwrap(), 42, "{lie}");
                }
            }
        }
    }

    fn wake_storm_only_costs_time() {
        for policy in [WaitPolicy::Adaptive, WaitPolicy::Park] {
            let cell = Cell::with(liar("wake-storm").wait(policy));
            let f = cell.module.function::<fn(u64) -> u64>("f").unwrap().with_timeout(SHORT).unwrap();
            assert!(matches!(f.call(7), Err(CallError::TimedOut { worker_killed: true, .. })));
        }
    }

    fn forged_replies_are_worth_nothing_and_harm_nobody() {
        for lie in ["replies-before-requests", "replies-to-nobody"] {
            let worker = liar(lie).timeout(Duration::from_secs(1)).spawn().unwrap();
            exercise(&worker.session().unwrap(), 50);
        }
    }

    fn flipping_states_end_every_call() {
        for lie in ["flipping-states", "flipping-pending-states"] {
            for policy in [WaitPolicy::Adaptive, WaitPolicy::Park, WaitPolicy::Spin] {
                let worker = liar(lie).wait(policy).timeout(SHORT).spawn().unwrap();
                // Opened, loaded and resolved with time enough, called with little.
                exercise(&worker.session().unwrap(), 50);
            }
        }
    }

    fn string_length_beyond_the_limit_is_a_breach() {
        for length in [(16 << 20) + 1, 1 << 32, 1 << 63, u64::MAX - 3] {
            assert_call_is_a_breach(Cell::new(format!("string-length:{length}")).call_string());
        }
        let prototype = Cell::new("string-length:9999999999").module.prototype("cstring s(void)").unwrap();
        assert_call_is_a_breach(prototype.call(()));
        // What the room holds is believed, up to its first NUL; and the null pointer, and the want of memory.
        assert_eq!(Cell::new("string-length:0").call_string().unwrap().count_bytes(), 0);
        assert_eq!(Cell::new("string-with-nul").call_string().unwrap().as_c_str(), c"ab");
        let null = Cell::new(format!("string-length:{}", u64::MAX - 1)).call_string();
        assert!(matches!(null, Err(CallError::NullString { .. })), "{null:?}");
        let lost = Cell::new(format!("string-length:{}", u64::MAX - 2)).call_string();
        assert!(matches!(lost, Err(CallError::StringLost { .. })), "{lost:?}");
    }

    fn long_string_that_cannot_be_had_is_an_error() {
        let too_long = Cell::new("string-too-long").call_string();
        assert!(matches!(too_long, Err(CallError::StringTooLong { .. })), "{too_long:?}");
        for lie in ["string-to-fetch:0", "string-to-fetch:1"] {
            match Cell::new(lie).call_string() {
                Err(CallError::StringLost { source, .. }) => {
                    assert!(matches!(*source, CallError::BadAddress { .. }), "{source}");
                }
                other => panic!("{other:?}"),
            }
        }
        // It says that it has copied the string, whatever is there now.
        assert!(Cell::new("string-to-fetch:2").call_string().unwrap().count_bytes() <= 5000);
    }

    fn directory_answer_that_is_none_is_a_breach() {
        let breach = |result: Result<Module, LoadError>, number| match result {
            Err(LoadError::Call { source, .. }) => assert_call_is_a_breach(Err::<(), _>(source)),
            other => panic!("{number}: {other:?}"),
        };
        for number in 0..=13 {
            let session = liar(format!("directory:{number}")).spawn().unwrap().session().unwrap();
            breach(session.load("x"), number);
        }
        for number in (0..=8).chain(10..=14) {
            let session = liar(format!("directory-resolve:{number}")).spawn().unwrap().session().unwrap();
            let module = session.load("x").unwrap();
            let resolved = module.function::<fn()>("f").map(|_| module.clone());
            breach(resolved, number);
        }
    }

    fn directory_failures_are_typed_and_their_text_made_harmless() {
        let mut told = Vec::new();
        for number in 15..26 {
            for lie in ["directory", "directory-resolve"] {
                let session = liar(format!("{lie}:{number}")).spawn().unwrap().session().unwrap();
                let error = match session.load("x") {
                    Ok(module) => module.function::<fn()>("f").map(drop).unwrap_err(),
                    Err(error) => error,
                };
                assert!(!matches!(error, LoadError::Call { .. }), "{error:?}");
                assert_printable(&error.to_string());
                told.push(std::mem::discriminant(&error));
                // It is no breach to say no.
                session.ping().map_or_else(|e| assert!(matches!(e, CallError::Crashed(_))), drop);
            }
        }
        told.dedup();
        assert!(told.len() > 5, "each failure has its own error");
    }

    fn death_in_each_step_of_a_session_is_told_as_it_was() {
        let code = |error: &Error| error.crash_report().unwrap_or_else(|| panic!("{error}")).exit_code();
        let session = liar("exit-in-directory:11").spawn().unwrap().session().unwrap();
        assert_eq!(code(&session.load("x").unwrap_err().into()), Some(11));
        let cell = Cell::new("exit-in-call:12");
        // Several calls in flight: all hear the same cause.
        std::thread::scope(|scope| {
            for _ in 0..6 {
                let f = cell.module.function::<fn(u64) -> u64>("f");
                scope.spawn(|| {
                    let error = match f {
                        Ok(f) => Error::from(f.call(1).unwrap_err()),
                        Err(error) => error.into(),
                    };
                    assert_eq!(code(&error), Some(12));
                });
            }
        });
        let cell = Cell::new("exit-at-close:13");
        assert_eq!(code(&cell.session.close().unwrap_err().into()), Some(13));
        for signal in [4, 6, 7, 8, 9, 11, 15] {
            let error = Cell::new(format!("signal-in-call:{signal}")).call().unwrap_err();
            assert_eq!(error.crash_report().unwrap().signal(), Some(signal));
        }
    }

    fn tickets_in_flight_hear_of_the_death() {
        let cell = Cell::new("exit-in-call:14");
        let f = cell.module.function::<fn(u64) -> u64>("f").unwrap();
        let tickets: Vec<_> = (0..100).map_while(|n| f.submit(n).ok()).collect();
        assert!(!tickets.is_empty());
        for ticket in tickets {
            let error = ticket.wait().unwrap_err();
            assert_eq!(error.crash_report().unwrap().exit_code(), Some(14));
        }
    }

    fn session_that_cannot_be_closed_ends_with_its_worker() {
        let cell = Cell::new("silence-at-close");
        let options = SessionBuilder::new().timeout(SHORT);
        let session = cell.worker.session_with(options).unwrap();
        assert!(matches!(session.close(), Err(CallError::TimedOut { .. })));
        assert!(matches!(wait_for_the_end(&cell.worker).cause(), Cause::DeadlineExceeded { .. }));
    }

    fn closed_session_stays_closed_whatever_is_written_into_it() {
        let cell = Cell::new("lives-on-after-close");
        let f = cell.module.function::<fn(u64) -> u64>("f").unwrap();
        match cell.session.close() {
            Ok(()) => {
                for _ in 0..100 {
                    assert!(matches!(f.call(1), Err(CallError::Closed)));
                    assert!(matches!(f.submit(1), Err(CallError::Closed)));
                }
                assert!(cell.worker.is_alive());
            }
            // It wrote over its own answer before the host saw it.
            Err(error) => {
                assert_call_is_a_breach(Err::<(), _>(error));
                assert_call_is_a_breach(f.call(1));
            }
        }
    }

    fn worker_that_stopped_itself_is_killed_at_the_deadline() {
        let cell = Cell::new("stop");
        let f = cell.module.function::<fn(u64) -> u64>("f").unwrap().with_timeout(SHORT).unwrap();
        assert!(matches!(f.call(1), Err(CallError::TimedOut { .. })));
        assert!(matches!(wait_for_the_end(&cell.worker).cause(), Cause::DeadlineExceeded { .. }));
    }

    fn worker_that_is_deaf_to_termination_is_disposed_of() {
        let cell = Cell::with(liar("deaf-to-termination").grace(Duration::from_millis(50)));
        assert_eq!(cell.call().unwrap(), 7);
        cell.worker.dispose();
        assert_eq!(wait_for_the_end(&cell.worker).cause(), &Cause::Disposed);
        assert!(matches!(cell.call_string_after_the_end(), Err(CallError::Disposed(_))));
    }

    fn absurd_progress_only_spoils_the_report() {
        for count in [0, 1, 2, 3, 1 << 63, u64::MAX] {
            let cell = Cell::new(format!("progress-and-exit:{count}"));
            let error = cell.call().unwrap_err();
            let report = error.crash_report().unwrap();
            assert_eq!(report.exit_code(), Some(9));
            assert!(report.running().count() <= 1);
            assert_printable(&report.to_string());
        }
    }

    fn scribbling_over_the_whole_region_harms_nobody() {
        for seed in 0..6 {
            let policy = [WaitPolicy::Adaptive, WaitPolicy::Park, WaitPolicy::Spin][seed % 3];
            let worker = liar(format!("scribble:{seed}")).timeout(SHORT).wait(policy).spawn().unwrap();
            if let Ok(session) = worker.session() {
                exercise(&session, 30);
            }
        }
    }

    fn holes_in_the_region_harm_nobody() {
        for seed in 0..4 {
            let worker = liar(format!("holes:{seed}")).timeout(SHORT).spawn().unwrap();
            if let Ok(session) = worker.session() {
                exercise(&session, 30);
            }
        }
    }

    fn region_and_crash_page_cannot_change_their_size() {
        assert_eq!(Cell::new("break-the-seal").call().unwrap(), 0, "one bit for each attempt that worked");
    }

    fn worker_that_says_for_ever_that_it_is_dying_is_looked_at_once() {
        const CALLS: u32 = 300;
        let cell = Cell::new("dying-for-ever");
        let on_cpu = || Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap());
        let before = on_cpu();
        for _ in 0..CALLS {
            assert_eq!(cell.call().unwrap(), 42);
        }
        // To look for its end takes 1 ms of CPU; in each call that would be 300 ms, and in each wake-up 900 ms. The rest is spins and sleeps: a few µs each.
        let used = on_cpu() - before;
        assert!(used < Duration::from_millis(150), "{CALLS} calls took {used:?} of CPU");
        assert!(cell.worker.is_alive() && cell.worker.crash_report().is_none());
        cell.worker.dispose();
        assert_eq!(wait_for_the_end(&cell.worker).cause(), &Cause::Disposed);
    }

    fn crash_page_is_believed_only_where_the_kernel_agrees() {
        for number in 0..64u64 {
            let cell = Cell::new(format!("crash-page:{number}"));
            let result = cell.call();
            if number % 4 == 0 {
                // A crash page alone is no crash.
                assert_eq!(result.unwrap(), 42);
                assert!(cell.worker.is_alive() && cell.worker.crash_report().is_none());
                cell.worker.dispose();
                let report = wait_for_the_end(&cell.worker);
                assert_eq!(report.cause(), &Cause::Disposed);
                assert_printable(&report.to_string());
                continue;
            }
            let error = result.unwrap_err();
            let report = error.crash_report().unwrap_or_else(|| panic!("{error}"));
            match number % 4 {
                1 => assert_eq!(report.signal(), Some(11)),
                2 => assert!(matches!(report.cause(), Cause::Signaled { signal: 15, .. }), "{report}"),
                _ => assert_eq!(report.exit_code(), Some(9)),
            }
            assert!(report.backtrace().len() <= 48);
            assert_printable(&report.to_string());
            assert!(report.culprit().is_none_or(|function| function.symbol.as_ref() == "f"));
            assert_ne!(report.involvement(), Involvement::NotRun);
        }
    }

    fn shouting_worker_fills_no_memory_and_its_last_words_are_kept() {
        let cell = Cell::new("shouts");
        let events = cell.worker.events();
        let error = cell.call().unwrap_err();
        let report = error.crash_report().unwrap();
        assert_eq!(report.exit_code(), Some(9));
        assert!(report.stderr_tail().ends_with("last words"), "{}", report.stderr_tail());
        assert!(report.stderr_tail().len() < 100_000);
        assert_printable(&report.to_string());
        assert!(cell.worker.stdout_tail().len() <= hotcell::OUTPUT_TAIL_BYTES);
        assert!(matches!(events.iter().last(), Some(WorkerEvent::Ended(_))));
    }

    fn grandchild_that_keeps_everything_keeps_nobody_waiting() {
        for lie in [
            "grandchild-holds", "grandchild-scribbles:0", "grandchild-scribbles:1", "grandchild-scribbles:2",
            "grandchild-scribbles:3",
        ] {
            let cell = Cell::new(lie);
            let result = cell.call();
            let report = wait_for_the_end(&cell.worker);
            let _grandchild = Grandchild::of(&report);
            assert_eq!(report.exit_code(), Some(9), "{lie}");
            // What it scribbles while the first call waits may pass for a reply or a breach; after that there is nothing to believe.
            match result {
                Ok(_) => assert!(lie.starts_with("grandchild-scribbles")),
                Err(CallError::Crashed(report)) => {
                    let cause = report.cause();
                    assert!(matches!(cause, Cause::Exited { code: 9 } | Cause::ProtocolBreach { .. }), "{lie}: {cause}");
                }
                Err(other) => panic!("{lie}: {other:?}"),
            }
            for _ in 0..100 {
                assert!(matches!(cell.session.ping(), Err(CallError::Crashed(_))), "{lie}");
            }
            drop(cell);
        }
    }

    fn grandchild_that_traces_its_worker_keeps_nobody_waiting() {
        let cell = Cell::new("grandchild-traces");
        let start = Instant::now();
        let error = cell.call().unwrap_err();
        let _grandchild = Grandchild::of_text(&String::from_utf8_lossy(&cell.worker.stderr_tail()));
        assert!(matches!(error, CallError::Crashed(_)), "{error:?} after {:?}", start.elapsed());
        assert!(!cell.worker.is_alive());
    }

    fn worker_that_cannot_be_killed_keeps_nobody_waiting() {
        let cell = Cell::new("grandchild-stops-the-exit");
        let f = cell.module.function::<fn(u64) -> u64>("f").unwrap().with_timeout(SHORT).unwrap();
        let call = f.submit(7).unwrap();
        let told = || String::from_utf8_lossy(&cell.worker.stderr_tail()).into_owned();
        let start = Instant::now();
        while !told().ends_with('\n') {
            assert!(start.elapsed() < HANG / 2, "no grandchild in {:?}", told());
            std::thread::sleep(Duration::from_millis(2));
        }
        let grandchild = Grandchild::of_text(&told());
        assert!(matches!(call.wait(), Err(CallError::TimedOut { worker_killed: true, .. })));
        // Whether the kernel lets the tracer stop a killed process or not: a call ends, with the one cause that there is.
        match cell.session.ping() {
            Err(CallError::Crashed(report)) => {
                assert!(matches!(report.cause(), Cause::DeadlineExceeded { .. }), "{report}");
            }
            Err(CallError::TimedOut { .. }) => {}
            other => panic!("{other:?}"),
        }
        drop(grandchild);
        assert!(matches!(wait_for_the_end(&cell.worker).cause(), Cause::DeadlineExceeded { .. }));
    }
}

impl Cell {
    /// A call after the worker's end, on a function that was never resolved: the session itself answers.
    fn call_string_after_the_end(&self) -> Result<(), CallError> {
        self.session.ping()
    }
}

/// Ends the process that a liar left behind.
struct Grandchild(u32);

impl Grandchild {
    fn of(report: &CrashReport) -> Self {
        Self::of_text(report.stderr_tail())
    }

    fn of_text(text: &str) -> Self {
        let pid = text.lines().find_map(|line| line.strip_prefix("grandchild ")?.trim().parse().ok());
        Self(pid.unwrap_or_else(|| panic!("no grandchild in {text:?}")))
    }
}

impl Drop for Grandchild {
    fn drop(&mut self) {
        // The number is still its own: it lives until its alarm rings, long after this test.
        let pid = nix::unistd::Pid::from_raw(self.0.cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL)
            .expect("the grandchild was there until the end");
    }
}

/// Calls of every kind from several threads. What they give is the liar's business; that they end is the host's.
fn exercise(session: &Session, rounds: u64) {
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            scope.spawn(move || {
                for round in 0..rounds {
                    if let Err(error) = one_round(session, thread * rounds + round) {
                        assert_printable(&error.to_string());
                        let usable = match &error {
                            Error::Call(call) | Error::Load(LoadError::Call { source: call, .. }) => {
                                call.session_usable()
                            }
                            _ => true,
                        };
                        if !usable {
                            return;
                        }
                    }
                }
            });
        }
    });
}

fn one_round(session: &Session, number: u64) -> Result<(), Error> {
    let module = session.load("libliar.so")?;
    match number % 8 {
        0 => {
            let f = module.function::<fn(u64, f64, u8) -> u64>("f")?;
            for n in 0..50 {
                f.call(n, 0.5, 1)?;
            }
        }
        1 => {
            let f = module.function::<fn(In<[u8]>, InOut<[u32]>, Out<[u64]>) -> i32>("f")?;
            for size in [0, 1, 100, 5000, 70_000] {
                f.call(&vec![1; size], &mut vec![2; size], &mut vec![3; size])?;
            }
        }
        2 => {
            let f = module.function::<fn(In<str>) -> CString>("s")?;
            for _ in 0..5 {
                f.call("text")?;
            }
        }
        3 => {
            let f = module.function::<fn(Out<u64>, Out<RemotePtr>) -> bool>("f")?;
            let (mut word, mut pointer) = (0, RemotePtr::NULL);
            f.call(&mut word, &mut pointer)?;
            let mut bytes = [0; 3000];
            session.read(pointer, &mut bytes)?;
            session.write(pointer, &bytes)?;
            session.read_string(pointer, 10_000)?;
        }
        4 => {
            let f = module.function::<fn(u64) -> u64>("f")?;
            let tickets: Result<Vec<_>, _> = (0..20).map(|n| f.submit(n)).collect();
            for (at, ticket) in tickets?.into_iter().enumerate() {
                if at % 3 > 0 {
                    ticket.wait()?;
                }
            }
        }
        5 => {
            let pointer = session.alloc(100)?;
            session.free(pointer)?;
            let block = session.block(100_000)?;
            assert!(block.write(0, &[1; 100_000]));
            module.function::<fn(Block, usize) -> i32>("f")?.call(&block, 100_000)?;
            let mut back = vec![0; 100_000];
            assert!(block.read(0, &mut back));
        }
        6 => {
            let f = module.prototype("cstring f(int, double, buffer)")?;
            f.call((1, 2.5, b"bytes"))?;
            let many = format!("uint64_t many({})", ["uint64_t"; 20].join(", "));
            module.prototype(&many)?;
        }
        _ => session.ping()?,
    }
    Ok(())
}

/// Seeds are printed; `HOTCELL_HOSTILE_SEED` starts from one, `HOTCELL_HOSTILE_SECONDS` says for how long (default 10).
#[test]
fn random_liars_get_typed_errors() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seconds = Duration::from_secs(number("HOTCELL_HOSTILE_SECONDS").unwrap_or(10));
    let _watchdog = watchdog(HANG + seconds);
    let start = Instant::now();
    let mut seed = number("HOTCELL_HOSTILE_SEED").unwrap_or_else(|| u64::from(std::process::id()) << 20);
    let first = seed;
    while start.elapsed() < seconds || seed == first {
        println!("seed {seed}");
        let policy = [WaitPolicy::Adaptive, WaitPolicy::Park, WaitPolicy::Spin][(seed % 3) as usize];
        let on_deadline = [OnDeadline::KillWorker, OnDeadline::AbandonSession][(seed / 3 % 2) as usize];
        let options =
            SessionBuilder::new().timeout(Duration::from_millis(50)).wait(policy).on_deadline(on_deadline);
        let builder =
            liar(format!("random:{seed}")).session_defaults(options).start_timeout(Duration::from_secs(2));
        match builder.grace(Duration::ZERO).spawn() {
            Ok(worker) => {
                for _ in 0..2 {
                    match worker.session() {
                        Ok(session) => exercise(&session, 12),
                        Err(error) => assert_printable(&error.to_string()),
                    }
                }
                worker.dispose();
                assert_printable(&wait_for_the_end(&worker).to_string());
            }
            Err(error) => assert_printable(&error.to_string()),
        }
        seed += 1;
    }
    println!("{} liars", seed - first);
    a_real_worker_works();
}

/// Runs alone, in a process of its own, where nothing else opens descriptors or starts threads.
#[test]
fn lies_leave_no_descriptor_thread_memory_or_zombie_behind() {
    const INSIDE: &str = "HOTCELL_HOSTILE_ALONE";
    let _watchdog = watchdog(HANG * 5);
    if std::env::var_os(INSIDE).is_none() {
        let name = "lies_leave_no_descriptor_thread_memory_or_zombie_behind";
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(INSIDE, "1")
            .status();
        assert!(status.unwrap().success());
        return;
    }
    // The first round makes everything that is made once: threads, buffers, the allocator's reserve.
    let mut before = None;
    for round in 0..3 {
        for (name, lie) in LIES {
            lie();
            println!("{round} {name}: {:?}", Kept::now());
        }
        a_real_worker_works();
        let after = Kept::settled(before);
        if round == 0 {
            before = Some(after);
        } else if let Some(before) = before {
            assert!(after.descriptors <= before.descriptors, "descriptors: {before:?}, {after:?}");
            assert!(after.threads <= before.threads, "threads: {before:?}, {after:?}");
            assert_eq!(after.children, 0, "zombies: {after:?}");
            // Two more rounds of all lies: what each left behind would add up.
            assert!(after.resident_kib < before.resident_kib + 32_768, "memory: {before:?}, {after:?}");
            assert!(after.mapped_regions <= before.mapped_regions, "regions: {before:?}, {after:?}");
        }
    }
}

/// What a process has.
#[derive(Clone, Copy, Debug)]
struct Kept {
    descriptors: usize,
    threads: usize,
    children: usize,
    resident_kib: u64,
    mapped_regions: usize,
}

impl Kept {
    fn now() -> Self {
        let count = |directory: &str| std::fs::read_dir(directory).map_or(0, Iterator::count);
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let mut children = 0;
        for task in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
            let list = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
            children += list.split_whitespace().count();
        }
        Self {
            descriptors: count("/proc/self/fd"),
            threads: count("/proc/self/task"),
            children,
            resident_kib: resident.trim().trim_end_matches(" kB").parse().unwrap(),
            mapped_regions: std::fs::read_to_string("/proc/self/maps")
                .unwrap()
                .matches("memfd:hotcell")
                .count(),
        }
    }

    /// Dropped workers are collected a moment later, and threads end: what is there when nothing has changed for a while, or when it is no more than `before`.
    fn settled(before: Option<Self>) -> Self {
        let mut last = Self::now();
        let mut quiet = 0;
        for _ in 0..1200 {
            std::thread::sleep(Duration::from_millis(100));
            let now = Self::now();
            let same = (now.descriptors, now.threads) == (last.descriptors, last.threads);
            quiet = if same { quiet + 1 } else { 0 };
            let enough = match before {
                Some(before) => {
                    now.descriptors <= before.descriptors
                        && now.threads <= before.threads
                        && now.mapped_regions <= before.mapped_regions
                }
                None => quiet >= 10,
            };
            if now.children == 0 && enough {
                return now;
            }
            last = now;
        }
        last
    }
}

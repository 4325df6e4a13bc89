//! Sessions placed by topology, under limits; crashes, restarts, quarantine, disposal, and the host's death, for each topology. What depends on the time of day is tested in the crate itself, with a clock
//! that the test moves.

#[path = "common/process.rs"]
mod process;

use hotcell::{
    CallError, Canary, Cause, LimitScope, LoadError, Module, OnFull, Quarantine, Restart, RestartPolicy,
    Session, SessionBuilder, SessionRequest, StartError, Supervisor, SupervisorBuilder, SupervisorEvent,
    SupervisorEventData, Topology, Worker,
};
use nix::sys::signal::{Signal, kill};
use process::{Process, isolated, library, raw_pid, region_mappings, rerun, threads, until, watchdog};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::mpsc;
use std::time::Duration;

const SECOND: Duration = Duration::from_secs(1);
const LONG: Duration = Duration::from_secs(100);
const TOPOLOGIES: [Topology; 3] = [Topology::Shared, Topology::PerTenant, Topology::PerSession];

const PLUGIN: &str = r"
#include <stdlib.h>

int add(int a, int b) { return a + b; }
int crash(void) { abort(); }
";

fn plugin() -> PathBuf {
    library("plugin", PLUGIN)
}

/// A supervisor that lets tests crash workers as often as they like.
fn patient(topology: Topology) -> SupervisorBuilder {
    let builder = Supervisor::builder().topology(topology).no_quarantine();
    if topology == Topology::PerSession { builder } else { builder.restart(tireless()) }
}

fn tireless() -> RestartPolicy {
    RestartPolicy::new(Restart::OnCrash).limit(1_000_000, LONG).backoff(Duration::ZERO, Duration::ZERO)
}

fn open(supervisor: &Supervisor, tenant: &str) -> Session {
    supervisor.session(tenant).unwrap()
}

fn load(session: &Session) -> Module {
    session.load(plugin()).unwrap()
}

fn adds(session: &Session) {
    let add = load(session).function::<fn(i32, i32) -> i32>("add").unwrap();
    assert_eq!(add.call(2, 3).unwrap(), 5);
}

/// Crashes the session's worker.
fn crash(session: &Session) {
    let crash = load(session).function::<fn() -> i32>("crash").unwrap();
    assert!(matches!(crash.call(), Err(CallError::Crashed(_))));
}

fn is_crashed(session: &Session) -> bool {
    match session.ping() {
        Ok(()) => false,
        Err(CallError::Crashed(_)) => true,
        Err(other) => panic!("{other}"),
    }
}

fn pid(session: &Session) -> u32 {
    session.worker().pid()
}

#[test]
fn sessions_share_a_process_as_the_topology_says() {
    let _watchdog = watchdog(120);
    for (topology, same_tenant, other_tenant) in [
        (Topology::Shared, true, true),
        (Topology::PerTenant, true, false),
        (Topology::PerSession, false, false),
    ] {
        let supervisor = patient(topology).build().unwrap();
        assert_eq!(supervisor.snapshot().workers.len(), 0, "nothing is started before it is used");
        let [a1, a2, b] = ["a", "a", "b"].map(|tenant| open(&supervisor, tenant));
        [&a1, &a2, &b].into_iter().for_each(adds);
        assert_eq!(pid(&a1) == pid(&a2), same_tenant, "{topology:?}");
        assert_eq!(pid(&a1) == pid(&b), other_tenant, "{topology:?}");
    }
}

#[test]
fn a_crash_ends_the_sessions_of_its_worker_and_no_others_and_the_next_session_gets_a_new_one() {
    let _watchdog = watchdog(120);
    for topology in TOPOLOGIES {
        let supervisor = patient(topology).build().unwrap();
        let [a1, a2, b] = ["a", "a", "b"].map(|tenant| open(&supervisor, tenant));
        crash(&a1);
        let crashed = [&a1, &a2, &b].map(is_crashed);
        let expected = match topology {
            Topology::Shared => [true, true, true],
            Topology::PerTenant => [true, true, false],
            _ => [true, false, false],
        };
        assert_eq!(crashed, expected, "{topology:?}");
        let again = open(&supervisor, "a");
        assert_ne!(pid(&again), pid(&a1));
        adds(&again);
        let snapshot = supervisor.snapshot();
        assert_eq!(snapshot.ends.get("SIGABRT"), Some(&1), "{snapshot:?}");
        assert_eq!(snapshot.restarts, u64::from(topology != Topology::PerSession));
    }
}

#[test]
fn a_tenant_needs_a_name_where_each_has_a_worker() {
    let supervisor = patient(Topology::PerTenant).build().unwrap();
    let error = supervisor.session(SessionRequest::new()).unwrap_err();
    assert!(error.to_string().contains("tenant"), "{error}");
    assert_eq!(supervisor.snapshot().sessions_refused, 1);
}

#[test]
fn a_given_worker_is_used_and_neither_replaced_nor_disposed() {
    let _watchdog = watchdog(120);
    for topology in TOPOLOGIES {
        let supervisor = patient(topology).sessions_max(2).build().unwrap();
        let [first, second] = [(); 2].map(|()| Worker::spawn().unwrap());
        let session = supervisor.session(&first).unwrap();
        assert_eq!(pid(&session), first.pid());
        let other = supervisor.session(&second).unwrap();
        assert!(matches!(supervisor.session(&second), Err(StartError::SessionLimit { open: 2, max: 2, .. })));
        crash(&session);
        let report = first.crash_report().unwrap();
        match supervisor.session(&first) {
            Err(StartError::Died(same)) => assert_eq!(same.to_string(), report.to_string()),
            error => panic!("{error:?}"),
        }
        supervisor.dispose();
        other.ping().unwrap();
        second.dispose();
        assert!(matches!(other.ping(), Err(CallError::Disposed(_))));
    }
}

#[test]
fn each_limit_refuses_at_once_and_tells_itself() {
    let _watchdog = watchdog(120);
    for topology in TOPOLOGIES {
        let builder = || patient(topology);
        let limited = [
            (builder().sessions_max_per_tenant(1), LimitScope::Tenant("a".into()), "tenant \"a\""),
            (builder().sessions_max(1), LimitScope::Supervisor, "the supervisor"),
            (builder().sessions_max_per_worker(1), LimitScope::Worker, "the worker"),
        ];
        for (builder, expected, name) in limited {
            if topology == Topology::PerSession && expected == LimitScope::Worker {
                continue; // each has a worker of its own
            }
            let supervisor = builder.build().unwrap();
            let first = open(&supervisor, "a");
            let error = supervisor.session("a").unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("{name} has no place for another session: 1 session is open, the limit is 1")
            );
            match error {
                StartError::SessionLimit { scope, open: 1, max: 1, waited: None } => {
                    assert_eq!(scope, expected)
                }
                other => panic!("{other:?}"),
            }
            first.close().unwrap();
            let second = open(&supervisor, "a");
            assert!(supervisor.session("a").is_err());
            // A crash frees the places of its worker's sessions, even while handles to them are held.
            crash(&second);
            let third = open(&supervisor, "a");
            assert!(supervisor.session("a").is_err());
            drop(third);
            adds(&open(&supervisor, "a"));
            assert_eq!(supervisor.snapshot().sessions_open, 0);
        }
    }
}

#[test]
fn a_limit_of_two_speaks_in_the_plural() {
    let supervisor = patient(Topology::Shared).sessions_max(2).build().unwrap();
    let _held = [open(&supervisor, "a"), open(&supervisor, "b")];
    let error = supervisor.session("c").unwrap_err().to_string();
    assert!(error.contains("2 sessions are open, the limit is 2"), "{error}");
}

#[test]
fn a_tenant_at_its_limit_does_not_keep_others_out() {
    let _watchdog = watchdog(120);
    let supervisor =
        patient(Topology::Shared).sessions_max_per_tenant(1).on_full(OnFull::Wait(LONG)).build().unwrap();
    let held = open(&supervisor, "a");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| open(&supervisor, "a"));
        until("the request to wait", || (supervisor.snapshot().sessions_waiting == 1).then_some(()));
        adds(&open(&supervisor, "b"));
        drop(held);
        adds(&waiting.join().unwrap());
    });
}

#[test]
fn requests_wait_in_the_order_of_arrival_and_one_that_gives_up_leaves_no_hole() {
    let _watchdog = watchdog(120);
    let supervisor = patient(Topology::Shared).sessions_max(1).build().unwrap();
    let held = open(&supervisor, "first");
    let (opened, order) = mpsc::channel();
    std::thread::scope(|scope| {
        for number in 0..6 {
            let (supervisor, opened) = (&supervisor, opened.clone());
            scope.spawn(move || {
                // The third gives up while the others wait.
                let patience = if number == 2 { Duration::from_millis(1) } else { LONG };
                let request = SessionRequest::new().on_full(OnFull::Wait(patience));
                opened.send((number, supervisor.session(request))).unwrap();
            });
            if number == 2 {
                let (number, given_up) = order.recv().unwrap();
                let error = given_up.unwrap_err();
                assert_eq!(number, 2);
                assert!(matches!(error, StartError::SessionLimit { waited: Some(_), .. }));
                assert!(error.to_string().ends_with("none was closed within 1ms"), "{error}");
            }
            let waiting = if number < 2 { number + 1 } else { number };
            until("the request to wait", || {
                (supervisor.snapshot().sessions_waiting == waiting).then_some(())
            });
        }
        drop(held);
        for expected in [0, 1, 3, 4, 5] {
            let (number, session) = order.recv().unwrap();
            assert_eq!(number, expected);
            assert!(order.try_recv().is_err(), "there is one place");
            adds(&session.unwrap());
        }
    });
    assert_eq!(supervisor.snapshot().sessions_waiting, 0);
}

#[test]
fn closing_a_session_frees_its_thread_its_memory_and_its_modules_at_once() {
    isolated("closing_a_session_frees_its_thread_its_memory_and_its_modules_at_once", 120, || {
        // A dropped session is waited for no longer than the grace period.
        let worker = Worker::builder().grace(LONG);
        let supervisor = patient(Topology::Shared).worker(worker).sessions_max(2).build().unwrap();
        let stays = open(&supervisor, "stays");
        let worker = pid(&stays);
        let is_loaded =
            || std::fs::read_to_string(format!("/proc/{worker}/maps")).unwrap().contains("plugin-");
        let before = (threads(worker), region_mappings(worker), region_mappings(std::process::id()));
        for round in 0..100 {
            let session = open(&supervisor, "comes and goes");
            adds(&session);
            assert!(is_loaded());
            let block = session.block(1 << 20).unwrap();
            assert!(block.write(0, &[1; 4096]));
            if round % 2 == 0 {
                // Every second time the handles outlive the session.
                session.close().unwrap();
                assert_eq!(supervisor.snapshot().sessions_open, 1);
            }
            drop((block, session));
            assert_eq!(supervisor.snapshot().sessions_open, 1);
            assert!(!is_loaded(), "no session has the module any more");
        }
        // The thread has answered; the kernel takes it off its list a moment later.
        until("the sessions' threads and regions to be gone", || {
            let now = (threads(worker), region_mappings(worker), region_mappings(std::process::id()));
            (now == before).then_some(())
        });
        let module = load(&stays);
        let other = open(&supervisor, "other");
        adds(&other);
        drop(other);
        assert!(is_loaded(), "a module that another session uses stays");
        let add = module.function::<fn(i32, i32) -> i32>("add").unwrap();
        assert_eq!(add.call(1, 1).unwrap(), 2);
    });
}

#[test]
fn closing_the_session_of_a_worker_of_its_own_ends_the_worker() {
    let _watchdog = watchdog(120);
    let supervisor = patient(Topology::PerSession).canary(Canary::new(LONG, LONG)).build().unwrap();
    let ended = supervisor.receiver(&[SupervisorEvent::WorkerEnded]);
    let closed = open(&supervisor, "a");
    closed.close().unwrap();
    let dropped = open(&supervisor, "b");
    let dropped_pid = pid(&dropped);
    drop(dropped);
    let mut ends = [ended.recv().unwrap(), ended.recv().unwrap()].map(|event| match event {
        SupervisorEventData::WorkerEnded { report, .. } => (report.pid(), report.cause().clone()),
        other => panic!("{other:?}"),
    });
    let mut expected = [(pid(&closed), Cause::Disposed), (dropped_pid, Cause::Disposed)];
    ends.sort_by_key(|end| end.0);
    expected.sort_by_key(|end| end.0);
    assert_eq!(ends, expected);
}

#[test]
fn senseless_values_are_refused_when_the_supervisor_is_built() {
    let builder = Supervisor::builder;
    let per_session = || builder().topology(Topology::PerSession);
    let short = SessionBuilder::new().slots(1);
    for (bad, about) in [
        (builder().sessions_max(0), "sessions_max is 0"),
        (builder().sessions_max_per_tenant(0), "sessions_max_per_tenant is 0"),
        (builder().sessions_max_per_worker(0), "sessions_max_per_worker is 0"),
        (per_session().sessions_max_per_worker(2), "sessions_max_per_worker is 2"),
        (per_session().restart(Restart::Always), "restart is"),
        (builder().on_full(OnFull::Wait(Duration::ZERO)), "on_full is"),
        (builder().restart(RestartPolicy::default().limit(0, SECOND)), "the limit of restarts is 0"),
        (builder().quarantine(Quarantine::after(0, SECOND)), "the crashes before quarantine is 0"),
        (builder().canary(Canary::new(Duration::ZERO, SECOND)), "the canary's interval is 0ns"),
        (builder().canary(Canary::new(SECOND, Duration::ZERO)), "the canary's timeout is 0ns"),
        (builder().session_defaults(short), "slots is 1"),
    ] {
        match bad.build() {
            Err(error @ StartError::Configuration { .. }) => {
                assert!(error.to_string().starts_with(about), "{error}");
            }
            other => panic!("{about}: {other:?}"),
        }
    }
}

#[test]
fn a_worker_that_is_never_restarted_is_refused_with_the_report_of_its_end() {
    let _watchdog = watchdog(120);
    let supervisor = Supervisor::builder().restart(Restart::Never).build().unwrap();
    let session = open(&supervisor, "a");
    crash(&session);
    match supervisor.session("a") {
        Err(StartError::Died(report)) => {
            assert_eq!((report.pid(), report.signal()), (pid(&session), Some(libc::SIGABRT)));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_first_start_that_fails_and_is_not_repeated_says_what_happened() {
    let worker = Worker::builder().program("/no/such/program");
    let supervisor = Supervisor::builder().worker(worker).restart(Restart::Never).build().unwrap();
    let failed = supervisor.receiver(&[SupervisorEvent::StartFailed]);
    assert!(matches!(supervisor.session("a"), Err(StartError::Program { .. })));
    let again = supervisor.session("a").unwrap_err();
    assert!(again.to_string().contains("/no/such/program"), "{again}");
    assert_eq!(failed.try_iter().count(), 1);
}

#[test]
fn a_disposed_worker_is_replaced_only_if_the_policy_says_always() {
    let _watchdog = watchdog(120);
    for (restart, again) in [(Restart::OnCrash, false), (Restart::Always, true)] {
        let supervisor = Supervisor::builder().restart(restart).build().unwrap();
        open(&supervisor, "a").worker().dispose();
        match supervisor.session("a") {
            Ok(session) if again => adds(&session),
            Err(StartError::Disposed) if !again => {}
            other => panic!("{restart:?}: {other:?}"),
        }
    }
}

#[test]
fn hooks_prepare_each_worker_and_each_session() {
    let _watchdog = watchdog(120);
    static WORKERS: AtomicU32 = AtomicU32::new(0);
    static SESSIONS: AtomicU32 = AtomicU32::new(0);
    let supervisor = patient(Topology::Shared)
        .on_start(|worker: &Worker| {
            WORKERS.fetch_add(1, Relaxed);
            worker.session()?.ping()?;
            Ok::<_, hotcell::Error>(())
        })
        .on_session(|session: &Session| {
            SESSIONS.fetch_add(1, Relaxed);
            adds(session);
            Ok::<_, hotcell::Error>(())
        })
        .build()
        .unwrap();
    for round in 1..=3 {
        let [first, _second] = [open(&supervisor, "a"), open(&supervisor, "b")];
        assert_eq!((WORKERS.load(Relaxed), SESSIONS.load(Relaxed)), (round, 2 * round));
        crash(&first);
    }
}

#[test]
fn a_hook_that_fails_or_panics_is_a_failed_start_and_leaves_no_worker() {
    isolated("a_hook_that_fails_or_panics_is_a_failed_start_and_leaves_no_worker", 120, || {
        let policy = || RestartPolicy::default().limit(1, LONG);
        let fails = |_: &Worker| Err::<(), _>("the database is away");
        let panics = |_: &Worker| -> Result<(), String> { panic!("the database is away") };
        for builder in [patient(Topology::Shared).on_start(fails), patient(Topology::Shared).on_start(panics)]
        {
            let supervisor = builder.restart(policy()).build().unwrap();
            for _ in 0..2 {
                let error = supervisor.session("a").unwrap_err();
                assert!(error.to_string().contains("the database is away"), "{error}");
                assert!(matches!(error, StartError::Hook { hook: "on_start", .. }));
            }
            assert!(matches!(supervisor.session("a"), Err(StartError::CircuitOpen { .. })));
            let snapshot = supervisor.snapshot();
            assert_eq!((snapshot.starts_failed, snapshot.workers_started, snapshot.sessions_open), (2, 0, 0));
        }
        let refuses = |_: &Session| Err::<(), _>("not this one");
        let supervisor = patient(Topology::PerSession).sessions_max(1).on_session(refuses).build().unwrap();
        for _ in 0..3 {
            assert!(matches!(supervisor.session("a"), Err(StartError::Hook { hook: "on_session", .. })));
        }
        until("the workers to end", || process::workers_of(std::process::id()).is_empty().then_some(()));
    });
}

#[test]
fn no_start_holds_up_another_tenant_and_a_second_request_for_the_same_worker_waits_at_most_its_patience() {
    let _watchdog = watchdog(120);
    static HELD: AtomicBool = AtomicBool::new(true);
    let (entered, inside) = mpsc::channel();
    let entered = std::sync::Mutex::new(entered);
    let first = AtomicBool::new(true);
    let supervisor = patient(Topology::PerTenant)
        .start_patience(Duration::from_millis(20))
        .on_start(move |_: &Worker| {
            if first.swap(false, Relaxed) {
                entered.lock().unwrap().send(()).unwrap();
                until("the test to go on", || (!HELD.load(Relaxed)).then_some(()));
            }
            Ok::<_, String>(())
        })
        .build()
        .unwrap();
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| open(&supervisor, "a"));
        inside.recv().unwrap();
        adds(&open(&supervisor, "b"));
        assert!(matches!(supervisor.session("a"), Err(StartError::StillStarting { .. })));
        HELD.store(false, Relaxed);
        adds(&slow.join().unwrap());
    });
    let snapshot = supervisor.snapshot();
    assert_eq!((snapshot.workers_started, snapshot.sessions_refused), (2, 1));
}

#[test]
fn requests_at_the_same_time_start_one_worker() {
    let _watchdog = watchdog(120);
    let supervisor = patient(Topology::Shared).build().unwrap();
    for round in 1..=5 {
        let sessions: Vec<Session> = std::thread::scope(|scope| {
            let opening: Vec<_> = (0..8).map(|_| scope.spawn(|| open(&supervisor, "a"))).collect();
            opening.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(sessions.iter().all(|session| pid(session) == pid(&sessions[0])));
        assert_eq!(supervisor.snapshot().workers_started, round);
        crash(&sessions[0]);
    }
}

#[test]
fn a_module_that_crashes_again_and_again_is_loaded_no_more_until_it_is_released() {
    let _watchdog = watchdog(120);
    let other = library("sound", "int add(int a, int b) { return a + b; }");
    for topology in TOPOLOGIES {
        let supervisor = patient(topology).quarantine(Quarantine::after(3, LONG)).build().unwrap();
        let quarantined = supervisor.receiver(&[SupervisorEvent::Quarantined]);
        let before = open(&supervisor, "z");
        for tenant in ["a", "b", "c"] {
            assert_eq!(supervisor.quarantined(), Vec::<String>::new());
            crash(&open(&supervisor, tenant));
        }
        let session = open(&supervisor, "d");
        session.load(&*other).unwrap();
        // Another spelling of its path is the same module.
        let spelled = plugin().parent().unwrap().join(".").join(plugin().file_name().unwrap());
        for name in [plugin(), spelled] {
            match session.load(name) {
                Err(LoadError::Quarantined { reports, .. }) => {
                    assert_eq!(reports.len(), 3);
                    assert!(reports.iter().all(|report| report.signal() == Some(libc::SIGABRT)));
                }
                other => panic!("{other:?}"),
            }
        }
        if !is_dead(&before) {
            assert!(
                matches!(before.load(plugin()), Err(LoadError::Quarantined { .. })),
                "older sessions too"
            );
        }
        assert_eq!(quarantined.try_iter().count(), 1);
        assert_eq!(supervisor.snapshot().quarantined.len(), 1);
        assert!(supervisor.release(plugin()) && !supervisor.release(plugin()));
        adds(&session);
    }
}

/// Whether the session's worker has crashed.
fn is_dead(session: &Session) -> bool {
    !session.worker().is_alive()
}

#[test]
fn a_crash_in_a_constructor_is_the_modules_too() {
    let _watchdog = watchdog(120);
    let module = library(
        "constructor",
        "#include <stdlib.h>\n__attribute__((constructor)) static void load(void) { abort(); }",
    );
    let supervisor = patient(Topology::Shared).quarantine(Quarantine::after(1, LONG)).build().unwrap();
    assert!(matches!(open(&supervisor, "a").load(&*module), Err(LoadError::Call { .. })));
    assert!(matches!(open(&supervisor, "a").load(&*module), Err(LoadError::Quarantined { .. })));
}

#[test]
fn the_canary_finds_a_worker_that_hangs_before_a_user_does() {
    let _watchdog = watchdog(120);
    let default = Canary::new(Duration::from_millis(10), 10 * SECOND);
    let called = default.clone().call(|session: &Session| session.ping());
    for canary in [default, called] {
        let supervisor = patient(Topology::Shared).canary(canary).build().unwrap();
        let ended = supervisor.receiver(&[SupervisorEvent::WorkerEnded]);
        let session = open(&supervisor, "a");
        kill(raw_pid(pid(&session)), Signal::SIGSTOP).unwrap();
        match ended.recv_timeout(LONG).unwrap() {
            SupervisorEventData::WorkerEnded { report, .. } => {
                assert!(matches!(report.cause(), Cause::Unresponsive { .. }), "{report}");
            }
            other => panic!("{other:?}"),
        }
        assert!(is_crashed(&session));
        adds(&open(&supervisor, "a"));
        assert_eq!(supervisor.snapshot().ends.get("unresponsive"), Some(&1));
    }
}

#[test]
fn a_canary_that_complains_or_panics_condemns_the_worker_and_nothing_else() {
    let _watchdog = watchdog(120);
    let every = Canary::new(Duration::from_millis(10), LONG);
    let complains = every.clone().call(|_: &Session| Err::<(), _>("it sings no more"));
    let panics = every.call(|_: &Session| -> Result<(), String> { panic!("it sings no more") });
    for canary in [complains, panics] {
        let supervisor = patient(Topology::Shared).canary(canary).build().unwrap();
        let ended = supervisor.receiver(&[SupervisorEvent::WorkerEnded]);
        for _ in 0..2 {
            let _session = open(&supervisor, "a");
            let told = ended.recv_timeout(LONG).unwrap().to_string();
            assert!(told.contains("it sings no more"), "{told}");
        }
    }
}

#[test]
fn dispose_ends_all_workers_and_whoever_waits_for_a_place() {
    let _watchdog = watchdog(120);
    for topology in TOPOLOGIES {
        let supervisor = patient(topology).sessions_max(2).build().unwrap();
        let sessions = [open(&supervisor, "a"), open(&supervisor, "b")];
        let workers = [0, 1].map(|at: usize| Process::of(pid(&sessions[at])));
        std::thread::scope(|scope| {
            let request = SessionRequest::from("c").on_full(OnFull::Wait(LONG));
            let waiting = scope.spawn(|| supervisor.session(request));
            until("the request to wait", || (supervisor.snapshot().sessions_waiting == 1).then_some(()));
            supervisor.dispose();
            assert!(workers.iter().all(Process::is_gone));
            assert!(matches!(waiting.join().unwrap(), Err(StartError::Disposed)));
        });
        assert!(sessions.iter().all(|session| matches!(session.ping(), Err(CallError::Disposed(_)))));
        assert!(matches!(supervisor.session("a"), Err(StartError::Disposed)));
        supervisor.dispose();
        assert_eq!(supervisor.snapshot().sessions_open, 0);
    }
}

#[test]
fn a_dropped_supervisor_ends_idle_workers_and_leaves_sessions_in_peace() {
    let _watchdog = watchdog(120);
    for topology in TOPOLOGIES {
        let supervisor = patient(topology).canary(Canary::new(LONG, LONG)).build().unwrap();
        let idle = (topology == Topology::PerTenant).then(|| {
            let session = open(&supervisor, "idle");
            Process::of(pid(&session))
        });
        let session = open(&supervisor, "busy");
        drop(supervisor);
        if let Some(idle) = idle {
            until("the idle worker to end", || idle.is_gone().then_some(()));
        }
        adds(&session);
        let busy = Process::of(pid(&session));
        drop(session);
        until("the worker to end with its last session", || busy.is_gone().then_some(()));
    }
}

#[test]
fn all_calls_of_b_succeed_while_as_worker_crashes_and_restarts_100_times() {
    let _watchdog = watchdog(120);
    let supervisor = patient(Topology::PerTenant).build().unwrap();
    let add = load(&open(&supervisor, "b")).function::<fn(i32, i32) -> i32>("add").unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let b = scope.spawn(|| {
            let mut calls = 0u64;
            while !over.load(Relaxed) {
                assert_eq!(add.call(2, 3).unwrap(), 5);
                calls += 1;
            }
            calls
        });
        for _ in 0..100 {
            crash(&open(&supervisor, "a"));
        }
        over.store(true, Relaxed);
        assert!(b.join().unwrap() > 0);
    });
    let snapshot = supervisor.snapshot();
    assert_eq!((snapshot.ends["SIGABRT"], snapshot.restarts, snapshot.sessions_open), (100, 99, 1));
}

#[test]
fn the_snapshot_counts_calls_sessions_and_ends_and_is_plain_data() {
    let _watchdog = watchdog(120);
    let supervisor = patient(Topology::PerTenant).sessions_max_per_tenant(1).build().unwrap();
    let a = open(&supervisor, "a");
    let before = supervisor.snapshot();
    for _ in 0..10 {
        a.ping().unwrap();
    }
    let b = open(&supervisor, "b");
    supervisor.session("b").unwrap_err();
    let now = supervisor.snapshot();
    assert_eq!((now.calls_done - before.calls_done, now.calls_in_flight), (10, 0));
    assert_eq!(
        (now.sessions_open, now.sessions_opened, now.sessions_refused, now.workers_started),
        (2, 2, 1, 2)
    );
    let of_a = &now.workers[0];
    assert_eq!((of_a.tenant.as_deref(), of_a.pid), (Some("a"), Some(pid(&a))));
    assert_eq!((of_a.sessions.len(), of_a.sessions[0].calls_done), (1, now.calls_done));
    assert!(of_a.resident_bytes.unwrap() > 0 && of_a.uptime.is_some() && of_a.cpu_time.is_some());
    crash(&a);
    drop(b);
    let last = supervisor.snapshot();
    assert!(last.calls_done >= now.calls_done, "calls of sessions that are gone still count");
    assert!(last.workers[0].pid.is_none());
    assert!(last.workers[0].last_end.as_ref().unwrap().contains("SIGABRT"));
    let json = serde_json::to_value(&last).unwrap();
    assert_eq!(json["ends"]["SIGABRT"], 1);
    assert_eq!(json["workers"][1]["tenant"], "b");
}

#[test]
fn events_tell_the_life_of_workers_and_sessions_in_order_and_a_panicking_handler_harms_nobody() {
    let _watchdog = watchdog(120);
    let supervisor = patient(Topology::PerTenant).build().unwrap();
    for event in SupervisorEvent::ALL {
        supervisor.on(event, |_| panic!("a handler's panic"));
    }
    let (tell, told) = mpsc::channel();
    for event in SupervisorEvent::ALL {
        let tell = tell.clone();
        supervisor.on(event, move |data| tell.send((data.event(), data.to_string())).unwrap());
    }
    crash(&open(&supervisor, "a"));
    drop(open(&supervisor, "a"));
    supervisor.dispose();
    use SupervisorEvent::*;
    let expected = [
        WorkerStarted,
        SessionOpened,
        WorkerEnded,
        SessionClosed,
        WorkerStarted,
        SessionOpened,
        SessionClosed,
        Disposed,
        WorkerEnded,
    ];
    for event in expected {
        let (next, text) = told.recv_timeout(LONG).unwrap();
        assert_eq!(next, event, "{text}");
        assert!(event == Disposed || text.starts_with("a: "), "{text}");
    }
}

#[test]
fn a_tracing_subscriber_that_panics_does_not_end_the_monitor() {
    struct Panics;
    impl tracing::Subscriber for Panics {
        fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
            true
        }
        fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
            tracing::span::Id::from_u64(1)
        }
        fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
        fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
        fn event(&self, event: &tracing::Event<'_>) {
            let thread = std::thread::current();
            let name = thread.name().unwrap_or_default();
            assert!(!name.starts_with("hotcell"), "no good: {}", event.metadata().target());
        }
        fn enter(&self, _: &tracing::span::Id) {}
        fn exit(&self, _: &tracing::span::Id) {}
    }
    isolated("a_tracing_subscriber_that_panics_does_not_end_the_monitor", 120, || {
        tracing::subscriber::set_global_default(Panics).unwrap();
        let supervisor = patient(Topology::Shared).build().unwrap();
        for _ in 0..5 {
            let session = open(&supervisor, "a");
            crash(&session);
            assert!(is_crashed(&session));
        }
        assert_eq!(supervisor.snapshot().ends["SIGABRT"], 5);
    });
}

#[cfg(feature = "metrics")]
#[test]
fn a_recorder_hears_the_counts() {
    isolated("a_recorder_hears_the_counts", 120, || {
        use metrics::{
            Counter, CounterFn, Gauge, GaugeFn, Histogram, Key, KeyName, Metadata, Recorder, SharedString,
            Unit,
        };
        use std::collections::HashMap;
        use std::sync::{Arc, Mutex};

        #[derive(Clone, Default)]
        struct Sums(Arc<Mutex<HashMap<String, f64>>>);
        struct Sum(Sums, String);
        impl Sum {
            fn add(&self, value: f64) {
                *self.0.0.lock().unwrap().entry(self.1.clone()).or_default() += value;
            }
        }
        impl CounterFn for Sum {
            fn increment(&self, value: u64) {
                self.add(value as f64);
            }
            fn absolute(&self, _: u64) {
                panic!("several supervisors add up");
            }
        }
        impl GaugeFn for Sum {
            fn increment(&self, value: f64) {
                self.add(value);
            }
            fn decrement(&self, value: f64) {
                self.add(-value);
            }
            fn set(&self, _: f64) {
                panic!("several supervisors add up");
            }
        }
        impl Recorder for Sums {
            fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
            fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
            fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
            fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
                Counter::from_arc(Arc::new(Sum(self.clone(), key.to_string())))
            }
            fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
                Gauge::from_arc(Arc::new(Sum(self.clone(), key.to_string())))
            }
            fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
                Histogram::noop()
            }
        }

        let sums = Sums::default();
        metrics::set_global_recorder(sums.clone()).unwrap_or_else(|_| panic!("it is the only one"));
        let [first, second] = [(); 2].map(|()| patient(Topology::Shared).build().unwrap());
        for supervisor in [&first, &second] {
            crash(&open(supervisor, "a"));
        }
        let held = open(&first, "a");
        let expect = |what: &str, value: f64| {
            until(&format!("{what} to be {value}"), || {
                let sums = sums.0.lock().unwrap();
                let found = sums.iter().find(|(key, _)| key.contains(what));
                (found.map_or(0.0, |(_, sum)| *sum) == value).then_some(())
            });
        };
        expect("hotcell_sessions_opened_total", 3.0);
        expect("hotcell_restarts_total", 1.0);
        expect("SIGABRT", 2.0);
        expect("hotcell_sessions)", 1.0);
        drop((held, first, second));
        expect("hotcell_sessions)", 0.0);
        expect("hotcell_workers)", 0.0);
    });
}

/// A host with workers of each topology, when this binary is started as one: not a test by itself.
#[test]
fn host() {
    let Some(report) = std::env::var_os("HOTCELL_TEST_SUPERVISED_HOST").map(PathBuf::from) else { return };
    let _watchdog = watchdog(120);
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).unwrap();
    let supervisors = TOPOLOGIES.map(|topology| {
        let builder = patient(topology).canary(Canary::new(Duration::from_millis(5), LONG));
        builder.build().unwrap()
    });
    let sessions: Vec<Session> =
        supervisors.iter().flat_map(|supervisor| ["a", "b"].map(|tenant| open(supervisor, tenant))).collect();
    let list: Vec<String> = sessions.iter().map(|session| pid(session).to_string()).collect();
    std::fs::write(report.with_extension("draft"), list.join(" ")).unwrap();
    std::fs::rename(report.with_extension("draft"), &report).unwrap();
    // Others come and go at the moment of the end.
    loop {
        crash(&open(&supervisors[1], "c"));
    }
}

#[test]
fn a_host_that_is_killed_leaves_no_workers() {
    let _watchdog = watchdog(150);
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("report");
    let mut host = rerun("host")
        .env("HOTCELL_TEST_SUPERVISED_HOST", &report)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let list = until("the host's report", || {
        assert!(report.exists() || host.try_wait().unwrap().is_none(), "the host ended early");
        std::fs::read_to_string(&report).ok()
    });
    let workers: Vec<Process> = list.split(' ').map(|pid| Process::of(pid.parse().unwrap())).collect();
    assert_eq!(workers.len(), 6);
    kill(raw_pid(host.id()), Signal::SIGKILL).unwrap();
    assert_eq!(host.wait().unwrap().signal(), Some(libc::SIGKILL));
    until("the workers to end", || {
        (workers.iter().all(Process::is_gone) && process::workers_of(host.id()).is_empty()).then_some(())
    });
}

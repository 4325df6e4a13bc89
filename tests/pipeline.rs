#![allow(unsafe_code)]
//! Pipelines: calls in a row keep their order and their results, and what becomes of each call is told exactly, whatever happens to the worker meanwhile.

#[path = "common/process.rs"]
mod process;

use hotcell::{
    Block, CallError, Cause, Errno, Function, Involvement, Module, OnDeadline, PIPELINE_DEPTH, RemotePtr,
    Session, SessionBuilder, WaitPolicy, WithErrno, Worker,
};
use process::{Random, isolated, library, until, watchdog};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

const FIXTURE: &str = r#"
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

uint64_t mix(uint64_t call, uint64_t x) {
  x ^= call * 0x9e3779b97f4a7c15u;
  return (x ^ x >> 29) * 0xbf58476d1ce4e5b9u;
}

static void sleep_ms(uint64_t ms) {
  struct timespec time = { (time_t)(ms / 1000), (long)(ms % 1000) * 1000000 };
  while (nanosleep(&time, &time)) {}
}
uint64_t slow(uint64_t x, uint64_t ms) { if (ms) sleep_ms(ms); return x + 1; }
uint64_t fault_at(uint64_t x, uint64_t bad) { if (x == bad) *(volatile int *)16 = 1; return x * 2; }
uint64_t hang_at(uint64_t x, uint64_t bad) { while (x == bad) pause(); return x * 2; }

static volatile int gate;
int set_gate(int open) { gate = open; return open; }
uint64_t wait_at_gate(uint64_t x) { while (!gate) sleep_ms(1); return x + 1; }

static volatile uint64_t counter;
uint64_t count(uint64_t ms) { if (ms) sleep_ms(ms); return ++counter; }
uint64_t counted(void) { return counter; }

int8_t i8(int8_t v) { return v; }
int16_t i16(int16_t v) { return v; }
int32_t i32(int32_t v) { return v; }
int64_t i64(int64_t v) { return v; }
uint8_t u8(uint8_t v) { return v; }
uint16_t u16(uint16_t v) { return v; }
uint32_t u32(uint32_t v) { return v; }
uint64_t u64(uint64_t v) { return v; }
float f32(float v) { return v; }
double f64(double v) { return v; }
bool not(bool v) { return !v; }
void nothing(void) {}
double seven(int8_t a, double b, uint16_t c, float d, int64_t e, double f, uint32_t g) {
  return a + 10 * b + 100 * c + 1000 * d + 10000 * e + 100000 * f + 1000000.0 * g;
}
int64_t stack(int64_t a, int64_t b, int64_t c, int64_t d, int64_t e, int64_t f, int8_t g) {
  return a + 2 * b + 3 * c + 4 * d + 5 * e + 6 * f + 7 * g;
}
uint64_t fourth(uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f) { return d; }
int fail_with(int code) { errno = code; return -1; }
const uint8_t *same(const uint8_t *p) { return p; }
uint64_t sum(const uint8_t *bytes, uint64_t count) {
  uint64_t sum = 0;
  for (uint64_t i = 0; bytes && i < count; i++) sum += bytes[i];
  return sum;
}

/* From here on membarrier fails on this thread. */
int forbid_membarrier(void) {
  struct sock_filter filter[] = {
    BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_membarrier, 0, 1),
    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  struct sock_fprog program = { sizeof filter / sizeof filter[0], filter };
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return -1;
  return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}
"#;

type Two = fn(u64, u64) -> u64;

fn mixed(call: u64, x: u64) -> u64 {
    let x = x ^ call.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (x ^ (x >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

fn load(session: &Session) -> Module {
    session.load(Module::ffi(library("pipeline", FIXTURE))).unwrap()
}

fn module() -> Module {
    load(&Worker::spawn().unwrap().session().unwrap())
}

fn module_with(options: SessionBuilder) -> Module {
    load(&Worker::spawn().unwrap().session_with(options).unwrap())
}

/// Sends and receives at random, `calls` calls in all, with pauses now and then that let either side fall asleep.
fn storm(mix: &Function<Two>, calls: u64, seed: u64, sleepy: bool) {
    let mut random = Random(seed);
    let mut pipeline = mix.pipeline().unwrap();
    let (mut sent, mut received) = (0, 0);
    while received < calls {
        for _ in 0..random.below(PIPELINE_DEPTH + 20) {
            if sent == calls || pipeline.in_flight() == PIPELINE_DEPTH {
                break;
            }
            pipeline.send(sent, sent * 3).unwrap();
            sent += 1;
        }
        if sleepy && random.below(4) == 0 {
            std::thread::sleep(Duration::from_micros(random.below(300)));
        }
        for _ in 0..random.below(PIPELINE_DEPTH + 20) {
            let Some(result) = pipeline.receive().unwrap() else { break };
            assert_eq!(result, mixed(received, received * 3), "call {received}");
            received += 1;
        }
        assert_eq!(pipeline.in_flight(), sent - received);
    }
    assert_eq!(pipeline.receive().unwrap(), None);
}

#[test]
fn results_come_in_the_order_of_the_calls() {
    let _watchdog = watchdog(120);
    let mix: Function<Two> = module().function("mix").unwrap();
    storm(&mix, 100_000, 1, false);
    let mut pipeline = mix.pipeline().unwrap();
    let mut expected = 0;
    for result in pipeline.calls((0..50_000).map(|i| (i, i))) {
        assert_eq!(result.unwrap(), mixed(expected, expected));
        expected += 1;
    }
    assert_eq!((expected, pipeline.in_flight()), (50_000, 0));
    // What is in flight comes first; what the iterator leaves in flight comes later.
    pipeline.send(7, 7).unwrap();
    let first: Vec<u64> = pipeline.calls((0..10).map(|i| (i, 1))).take(3).map(Result::unwrap).collect();
    assert_eq!(first, [mixed(7, 7), mixed(0, 1), mixed(1, 1)]);
    assert_eq!(pipeline.in_flight(), 8);
    assert_eq!(pipeline.receive().unwrap(), Some(mixed(2, 1)));
}

#[test]
fn every_type_of_one_word_goes_through() {
    let _watchdog = watchdog(60);
    let module = module();
    macro_rules! identity {
        ($($t:ident: $($value:expr),+;)+) => {$(
            let mut pipeline = module.function::<fn($t) -> $t>(stringify!($t)).unwrap().pipeline().unwrap();
            for value in [$($value),+] {
                pipeline.send(value).unwrap();
            }
            for value in [$($value),+] {
                assert_eq!(pipeline.receive().unwrap(), Some(value), stringify!($t));
            }
            drop(pipeline);
        )+};
    }
    identity! {
        i8: 0, -1, i8::MIN, i8::MAX;
        i16: 0, -1, i16::MIN, i16::MAX;
        i32: 0, -1, i32::MIN, i32::MAX;
        i64: 0, -1, i64::MIN, i64::MAX;
        u8: 0, 1, u8::MAX;
        u16: 0, 1, u16::MAX;
        u32: 0, 1, u32::MAX;
        u64: 0, 1, u64::MAX;
        f32: 0.0, -1.5, f32::MAX;
        f64: 0.0, -1.5, f64::MAX;
    }
    let mut sizes = module.function::<fn(usize) -> isize>("u64").unwrap().pipeline().unwrap();
    sizes.send(usize::MAX).unwrap();
    assert_eq!(sizes.receive().unwrap(), Some(-1));
    drop(sizes);
    let mut not = module.function::<fn(bool) -> bool>("not").unwrap().pipeline().unwrap();
    not.send(true).unwrap();
    not.send(false).unwrap();
    assert_eq!((not.receive().unwrap(), not.receive().unwrap()), (Some(false), Some(true)));
    drop(not);
    let mut nothing = module.function::<fn()>("nothing").unwrap().pipeline().unwrap();
    nothing.send().unwrap();
    assert_eq!(nothing.receive().unwrap(), Some(()));
    drop(nothing);
    let mut seven =
        module.function::<fn(i8, f64, u16, f32, i64, f64, u32) -> f64>("seven").unwrap().pipeline().unwrap();
    seven.send(-1, 2.0, 3, 4.0, -5, 6.0, 7).unwrap();
    assert_eq!(
        seven.receive().unwrap(),
        Some(-1.0 + 20.0 + 300.0 + 4000.0 - 50_000.0 + 600_000.0 + 7_000_000.0)
    );
    drop(seven);
    let mut stack =
        module.function::<fn(i64, i64, i64, i64, i64, i64, i8) -> i64>("stack").unwrap().pipeline().unwrap();
    stack.send(1, 2, 3, 4, 5, 6, -7).unwrap();
    assert_eq!(stack.receive().unwrap(), Some(1 + 4 + 9 + 16 + 25 + 36 - 49));
    drop(stack);
    let mut fail = module.function::<fn(i32) -> WithErrno<i32>>("fail_with").unwrap().pipeline().unwrap();
    for code in [1, 33] {
        fail.send(code).unwrap();
    }
    assert_eq!(fail.receive().unwrap(), Some((-1, Errno(1))));
    assert_eq!(fail.receive().unwrap(), Some((-1, Errno(33))));
    drop(fail);
    let pointer = module.session().alloc(8).unwrap();
    let mut same = module.function::<fn(RemotePtr) -> RemotePtr>("same").unwrap().pipeline().unwrap();
    same.send(pointer).unwrap();
    same.send(RemotePtr::NULL).unwrap();
    assert_eq!((same.receive().unwrap(), same.receive().unwrap()), (Some(pointer), Some(RemotePtr::NULL)));
    let foreign = load(&module.session().worker().session().unwrap());
    let other = foreign.session().alloc(8).unwrap();
    assert!(matches!(same.send(other), Err(CallError::ForeignPointer { .. })));
    assert_eq!(same.receive().unwrap(), None, "what was refused was not sent");
    drop(same);
    let block = module.session().block(100).unwrap();
    assert!(block.write(0, &[3; 100]));
    let mut sum = module.function::<fn(Block, u64) -> u64>("sum").unwrap().pipeline().unwrap();
    sum.send(&block, 100).unwrap();
    assert_eq!(sum.receive().unwrap(), Some(300));
    assert!(matches!(
        sum.send(&foreign.session().block(8).unwrap(), 1),
        Err(CallError::ForeignPointer { .. })
    ));
    drop(sum);
    let mut sum = module.function::<fn(Option<Block>, u64) -> u64>("sum").unwrap().pipeline().unwrap();
    sum.send(None, 100).unwrap();
    sum.send(Some(&block), 50).unwrap();
    assert_eq!((sum.receive().unwrap(), sum.receive().unwrap()), (Some(0), Some(150)));
}

/// Requests of more than three words take a line, others half of one. What the wide ones leave in the middle of their lines is where heads of narrow ones are to come.
#[test]
fn an_argument_is_never_taken_for_a_call_when_widths_change() {
    let _watchdog = watchdog(120);
    type Wide = fn(u64, u64, u64, u64, u64, u64) -> u64;
    let module = module();
    let wide = module.function::<Wide>("fourth").unwrap();
    let narrow = module.function::<Two>("mix").unwrap();
    // Both sides count the session's requests: its calls, and one end for each pipeline.
    let mut position = 0;
    for round in 0..4 {
        let calls = 256 + 10 * round;
        // The head of a narrow request is the low half of the number behind its own; in its place a wide one has its fourth argument.
        let end = position + calls + 1;
        let turn = |call: u64| {
            let behind = (2 * ((position + call) % 256) + 1).wrapping_sub(end) % 256;
            end + behind + 1
        };
        let arguments = (0..calls).map(|call| (1, 2, 3, turn(call), 5, 6));
        let results: Result<Vec<_>, _> = wide.pipeline().unwrap().calls(arguments).collect();
        assert_eq!(results.unwrap(), (0..calls).map(turn).collect::<Vec<_>>());
        position = end;

        // One at a time, with time for a worker that sees more than was sent.
        let mut pipeline = narrow.pipeline().unwrap();
        for call in 0..20 {
            pipeline.send(round, call).unwrap();
            assert_eq!(pipeline.receive().unwrap(), Some(mixed(round, call)));
            std::thread::sleep(Duration::from_micros(50));
        }
        drop(pipeline);
        position += 21;
    }
}

#[test]
fn a_full_pipeline_refuses_and_goes_on() {
    let _watchdog = watchdog(60);
    let mix: Function<Two> = module().function("mix").unwrap();
    let mut pipeline = mix.pipeline().unwrap();
    for round in 0..4 {
        for i in 0..PIPELINE_DEPTH {
            pipeline.send(i, round).unwrap();
        }
        match pipeline.send(0, 0) {
            Err(error @ CallError::Full { slots: 255 }) => {
                assert!(!error.may_have_run() && error.session_usable())
            }
            other => panic!("{other:?}"),
        }
        for i in 0..PIPELINE_DEPTH {
            assert_eq!(pipeline.receive().unwrap(), Some(mixed(i, round)));
        }
    }
    // Forgotten while full: the end still finds room.
    for i in 0..PIPELINE_DEPTH {
        pipeline.send(i, 9).unwrap();
    }
    drop(pipeline);
    storm(&mix, 1000, 2, false);
}

#[test]
fn a_fault_in_the_middle_is_accounted_for_call_by_call() {
    let _watchdog = watchdog(120);
    for bad in [0, 1, 100, 253, 254] {
        let module = module();
        let mut pipeline = module.function::<Two>("fault_at").unwrap().pipeline().unwrap();
        let mut sent = 0;
        while sent < PIPELINE_DEPTH && pipeline.send(sent, bad).is_ok() {
            sent += 1;
        }
        assert!(sent > bad);
        for call in 0..sent {
            let result = pipeline.receive();
            let involvement = match call {
                _ if call < bad => {
                    assert_eq!(result.unwrap(), Some(call * 2));
                    continue;
                }
                _ if call == bad => Involvement::Culprit,
                _ => Involvement::NotRun,
            };
            let error = result.unwrap_err();
            let CallError::Crashed(report) = &error else { panic!("call {call}: {error:?}") };
            assert_eq!(report.signal(), Some(libc::SIGSEGV), "{report}");
            assert_eq!(report.involvement(), involvement, "call {call} of {sent}, fault at {bad}");
            assert_eq!(error.may_have_run(), call == bad);
            assert!(report.to_string().contains("fault_at"), "{report}");
        }
        assert!(pipeline.receive().unwrap().is_none());
        let error = pipeline.send(0, 0).unwrap_err();
        assert!(matches!(&error, CallError::Crashed(report) if report.involvement() == Involvement::NotRun));
        assert!(matches!(pipeline.function().pipeline(), Err(CallError::Crashed(_))));
    }
}

#[test]
fn what_comes_before_a_fault_is_given_by_the_iterator_too() {
    let _watchdog = watchdog(60);
    let fault_at = module().function::<Two>("fault_at").unwrap();
    let mut pipeline = fault_at.pipeline().unwrap();
    let results: Vec<_> = pipeline.calls((0..).map(|i| (i, 1000))).collect();
    assert!(results[..1000].iter().zip(0..).all(|(result, i)| *result.as_ref().unwrap() == i * 2));
    let ran = |result: &Result<u64, CallError>| result.as_ref().is_err_and(CallError::may_have_run);
    assert!(ran(&results[1000]));
    assert!(results.len() > 1001 && !results[1001..].iter().any(ran));
    assert!(results[1001..].iter().all(|result| matches!(result, Err(CallError::Crashed(_)))));
}

#[test]
fn a_passed_deadline_kills_the_worker_and_names_the_call() {
    let _watchdog = watchdog(120);
    let module = module();
    let hang_at =
        module.function::<Two>("hang_at").unwrap().with_timeout(Duration::from_millis(300)).unwrap();
    let mut pipeline = hang_at.pipeline().unwrap();
    for call in 0..20 {
        pipeline.send(call, 5).unwrap();
    }
    for call in 0..5 {
        // What is ready needs no time.
        until("the call", || pipeline.is_ready().then_some(()));
        assert_eq!(pipeline.receive().unwrap(), Some(call * 2));
    }
    match pipeline.receive() {
        Err(error @ CallError::TimedOut { worker_killed: true, .. }) => assert!(error.may_have_run()),
        other => panic!("{other:?}"),
    }
    for _ in 6..20 {
        match pipeline.receive() {
            Err(CallError::Crashed(report)) => {
                assert!(matches!(report.cause(), Cause::DeadlineExceeded { .. }), "{report}");
                assert_eq!(report.involvement(), Involvement::NotRun);
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(pipeline.receive().unwrap().is_none());
}

#[test]
fn an_abandoned_call_gives_the_pipeline_back_when_it_returns() {
    let _watchdog = watchdog(120);
    let worker = Worker::spawn().unwrap();
    let module =
        load(&worker.session_with(SessionBuilder::new().on_deadline(OnDeadline::AbandonSession)).unwrap());
    let gate = load(&worker.session().unwrap()).function::<fn(i32) -> i32>("set_gate").unwrap();
    let wait_at_gate = module.function::<fn(u64) -> u64>("wait_at_gate").unwrap();
    let mut pipeline = wait_at_gate.with_timeout(Duration::from_millis(100)).unwrap().pipeline().unwrap();
    for call in 0..10 {
        pipeline.send(call).unwrap();
    }
    for _ in 0..2 {
        assert!(matches!(pipeline.receive(), Err(CallError::TimedOut { worker_killed: false, .. })));
    }
    assert!(matches!(pipeline.send(10), Err(CallError::Abandoned { .. })));
    assert_eq!(pipeline.in_flight(), 8);
    gate.call(1).unwrap();
    // The others are answered as soon as the two are.
    for call in 2..10 {
        let result = until("the call", || match pipeline.is_ready() {
            true => Some(pipeline.receive()),
            false => None,
        });
        assert_eq!(result.unwrap(), Some(call + 1));
    }
    for call in 0..1000 {
        pipeline.send(call).unwrap();
        // On a slow machine even this may pass the short deadline; then it is the same again.
        match pipeline.receive() {
            Ok(result) => assert_eq!(result, Some(call + 1)),
            Err(CallError::TimedOut { .. }) => return,
            other => panic!("{other:?}"),
        }
    }
}

/// A former pipeline waited for each of 256 forgotten replies with a deadline of its own. Here that would take nine minutes.
#[test]
fn forgotten_calls_share_one_deadline() {
    let _watchdog = watchdog(60);
    let module = module();
    let hang_at = module.function::<Two>("hang_at").unwrap();
    let mut pipeline = hang_at.pipeline().unwrap();
    for call in 0..PIPELINE_DEPTH {
        pipeline.send(call, 0).unwrap();
    }
    drop(pipeline);
    match hang_at.with_timeout(Duration::from_secs(2)).unwrap().pipeline() {
        Err(CallError::TimedOut { function, worker_killed: true, .. }) => {
            assert_eq!(&*function.symbol, "hang_at")
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(hang_at.pipeline(), Err(CallError::Crashed(_))));
}

#[test]
fn forgotten_calls_run_all_the_same() {
    let _watchdog = watchdog(60);
    let worker = Worker::spawn().unwrap();
    let module = load(&worker.session().unwrap());
    let (count, counted) = (
        module.function::<fn(u64) -> u64>("count").unwrap(),
        module.function::<fn() -> u64>("counted").unwrap(),
    );
    let mut pipeline = count.pipeline().unwrap();
    for _ in 0..100 {
        pipeline.send(1).unwrap();
    }
    drop(pipeline);
    let mut pipeline = count.pipeline().unwrap();
    assert_eq!(counted.call().unwrap(), 100, "the next pipeline waits until they have run");
    pipeline.send(0).unwrap();
    assert_eq!(pipeline.receive().unwrap(), Some(101));
    // The session goes, and they run before it does. The library's counter is the process's.
    for _ in 0..50 {
        pipeline.send(1).unwrap();
    }
    let other = load(&worker.session().unwrap()).function::<fn() -> u64>("counted").unwrap();
    drop((pipeline, count, counted, module));
    until("the forgotten calls", || (other.call().unwrap() == 151).then_some(()));
}

#[test]
fn closing_the_session_lets_sent_calls_run() {
    let _watchdog = watchdog(60);
    let module = module();
    let mut pipeline = module.function::<fn(u64) -> u64>("count").unwrap().pipeline().unwrap();
    for _ in 0..50 {
        pipeline.send(1).unwrap();
    }
    module.session().close().unwrap();
    for call in 1..=50 {
        assert_eq!(pipeline.receive().unwrap(), Some(call));
    }
    assert!(matches!(pipeline.send(0), Err(CallError::Closed)));
    assert!(matches!(pipeline.function().pipeline(), Err(CallError::Closed)));
}

/// The worker used to serve the stream until it was empty before it closed, which a busy pipeline never let it be: the closing ran into its deadline, and that killed the worker.
#[test]
fn closing_the_session_does_not_wait_for_a_pipeline_to_pause() {
    let _watchdog = watchdog(150);
    let module = module_with(SessionBuilder::new().timeout(Duration::from_secs(120)));
    let slow = module.function::<Two>("slow").unwrap();
    let (session, worker) = (module.session(), module.session().worker());
    let answered = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let calls = scope.spawn(|| {
            let mut pipeline = slow.pipeline().unwrap();
            let mut error = None;
            for (at, result) in pipeline.calls((0..).map(|i| (i, 1))).enumerate() {
                match result {
                    // What is answered is right, in order.
                    Ok(value) => assert_eq!((value, error.is_none()), (at as u64 + 1, true)),
                    Err(lost) => error = Some(lost),
                }
                answered.fetch_add(1, Relaxed);
            }
            error.unwrap()
        });
        until("a call is answered", || (answered.load(Relaxed) > 0).then_some(()));
        session.close().unwrap();
        let error = calls.join().unwrap();
        assert!(matches!(error, CallError::Closed), "{error:?}");
    });
    assert!(worker.is_alive());
}

#[test]
fn a_second_pipeline_waits_for_the_first() {
    let _watchdog = watchdog(60);
    let module = module();
    let mix: Function<Two> = module.function("mix").unwrap();
    let first = mix.pipeline().unwrap();
    match mix.with_timeout(Duration::from_millis(1)).unwrap().pipeline() {
        Err(error @ CallError::PipelineTaken { by_this_thread: true, .. }) => {
            assert!(!error.may_have_run() && error.session_usable())
        }
        other => panic!("{other:?}"),
    }
    std::thread::scope(|scope| {
        let other = scope.spawn(|| mix.with_timeout(Duration::from_millis(1)).unwrap().pipeline().map(drop));
        let error = other.join().unwrap().unwrap_err();
        assert!(matches!(error, CallError::PipelineTaken { by_this_thread: false, .. }), "{error:?}");
    });
    std::thread::scope(|scope| {
        let second = scope.spawn(|| storm(&mix, 1000, 3, false));
        std::thread::sleep(Duration::from_millis(20));
        drop(first);
        second.join().unwrap();
    });
    // In turn, by many.
    std::thread::scope(|scope| {
        for seed in 0..8 {
            let mix = &mix;
            scope.spawn(move || {
                for round in 0..20 {
                    storm(mix, 200, seed * 100 + round, false);
                }
            });
        }
    });
}

#[test]
fn a_dropped_block_stays_until_its_call_is_over() {
    let _watchdog = watchdog(60);
    let module = module();
    let session = module.session();
    let sum = module.function::<fn(Block, u64) -> u64>("sum").unwrap();
    let slow = module.function::<Two>("slow").unwrap();
    for round in 0..20 {
        let mut pipeline = sum.pipeline().unwrap();
        // The worker is busy with something else, so the calls below are in flight while their blocks are dropped.
        let busy = slow.submit(1, 10).unwrap();
        for with in 1..=100 {
            let block = session.block(1000).unwrap();
            assert!(block.write(0, &[with; 1000]));
            pipeline.send(&block, 1000).unwrap();
        }
        if round % 2 == 0 {
            for with in 1..=100 {
                assert_eq!(pipeline.receive().unwrap(), Some(1000 * with));
            }
        }
        busy.wait().unwrap();
    }
    // Nothing was kept for good: there is room for the largest block several times over.
    drop(sum.pipeline().unwrap());
    let most = 64 << 20;
    until("the kept blocks", || {
        let blocks: Vec<_> = (0..3).map(|_| session.block(most)).collect();
        blocks.iter().all(Result::is_ok).then_some(())
    });
}

#[test]
fn other_calls_are_served_beside_a_pipeline_and_the_other_way_round() {
    let _watchdog = watchdog(120);
    let mix: Function<Two> = module().function("mix").unwrap();
    let (stop, direct, submitted) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Relaxed) {
                let i = direct.fetch_add(1, Relaxed);
                assert_eq!(mix.call(i, 2).unwrap(), mixed(i, 2));
            }
        });
        scope.spawn(|| {
            while !stop.load(Relaxed) {
                let i = submitted.fetch_add(8, Relaxed);
                let tickets: Vec<_> = (i..i + 8).map(|i| (i, mix.submit(i, 5).unwrap())).collect();
                for (i, ticket) in tickets {
                    assert_eq!(ticket.wait().unwrap(), mixed(i, 5));
                }
            }
        });
        // Until everybody has come far, however long that takes here.
        let mut seed = 10;
        while direct.load(Relaxed) < 2000 || submitted.load(Relaxed) < 2000 {
            storm(&mix, 2000, seed, false);
            seed += 1;
        }
        stop.store(true, Relaxed);
    });
}

#[test]
fn pipelines_of_many_sessions_do_not_mix() {
    let _watchdog = watchdog(120);
    let worker = Worker::spawn().unwrap();
    std::thread::scope(|scope| {
        for seed in 0..6 {
            let worker = &worker;
            scope.spawn(move || {
                let mix: Function<Two> = load(&worker.session().unwrap()).function("mix").unwrap();
                for round in 0..5 {
                    storm(&mix, 3000, seed * 10 + round, true);
                }
            });
        }
    });
}

fn storms_under_all_policies() {
    for policy in [WaitPolicy::Adaptive, WaitPolicy::Park, WaitPolicy::Spin] {
        let mix: Function<Two> = module_with(SessionBuilder::new().wait(policy)).function("mix").unwrap();
        storm(&mix, 3000, 20, true);
        // One at a time: each side falls asleep for each call.
        let mut pipeline = mix.pipeline().unwrap();
        for i in 0..300 {
            pipeline.send(i, i).unwrap();
            if i % 50 == 0 {
                std::thread::sleep(Duration::from_millis(2));
            }
            assert_eq!(pipeline.receive().unwrap(), Some(mixed(i, i)));
        }
    }
}

#[test]
fn both_sides_sleep_and_wake() {
    let _watchdog = watchdog(120);
    storms_under_all_policies();
}

/// Makes `membarrier` fail for the calling thread and what it starts.
fn forbid_membarrier_here() {
    // SAFETY: the fixture has no constructors.
    let fixture = unsafe { libloading::Library::new(library("pipeline", FIXTURE)) }.unwrap();
    // SAFETY: the type is the one of its source.
    let forbid = unsafe { fixture.get::<unsafe extern "C" fn() -> i32>(b"forbid_membarrier") }.unwrap();
    // SAFETY: it changes which system calls this thread may make, and nothing else.
    assert_eq!(unsafe { forbid() }, 0, "no seccomp");
}

#[test]
fn without_membarrier_both_sides_sleep_and_wake() {
    isolated("without_membarrier_both_sides_sleep_and_wake", 120, || {
        // Before the library's threads are started: they and the workers inherit it.
        forbid_membarrier_here();
        storms_under_all_policies();
    });
}

#[test]
fn a_worker_whose_membarrier_fails_later_says_so_and_goes_on() {
    let _watchdog = watchdog(120);
    let worker = Worker::builder().stderr(hotcell::Output::Capture).spawn().unwrap();
    let module = load(&worker.session_with(SessionBuilder::new().wait(WaitPolicy::Park)).unwrap());
    let forbid = module.function::<fn() -> i32>("forbid_membarrier").unwrap();
    let mix: Function<Two> = module.function("mix").unwrap();
    let mut pipeline = mix.pipeline().unwrap();
    assert_eq!(forbid.call().unwrap(), 0, "no seccomp");
    for i in 0..500 {
        pipeline.send(i, i).unwrap();
        assert_eq!(pipeline.receive().unwrap(), Some(mixed(i, i)));
    }
    let said = || String::from_utf8_lossy(&worker.stderr_tail()).contains("membarrier").then_some(());
    until("the worker's word about it", said);
    drop(pipeline);
    // Now it is known from the start.
    storm(&mix, 1000, 30, true);
}

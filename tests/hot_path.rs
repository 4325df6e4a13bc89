#![allow(unsafe_code)]
//! While both sides are awake, a call makes no syscall and allocates nothing, on either side.
//!
//! Syscalls are not counted but forbidden: a seccomp filter on the calling thread, or on the worker's session thread, ends the process at the first one. Each such
//! test has a counterpart that shows the filter at work.

#[path = "common/process.rs"]
mod process;

use hotcell::{
    CallError, DynFunction, Function, In, InOut, Module, Out, Pipeline, Session, SessionBuilder, WaitPolicy,
    Worker,
};
use process::{isolated, isolated_status, library, until, watchdog};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

const FIXTURE: &str = r#"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

uint64_t add(uint64_t a, uint64_t b) { return a + b; }

uint64_t sum(const uint8_t *bytes, uint64_t count) {
  uint64_t sum = 0;
  for (uint64_t i = 0; i < count; i++) sum += bytes[i];
  return sum;
}
void fill(uint8_t *bytes, uint64_t count, uint8_t with) { for (uint64_t i = 0; i < count; i++) bytes[i] = with; }
void raise_each(uint8_t *bytes, uint64_t count) { for (uint64_t i = 0; i < count; i++) bytes[i]++; }

/* From here on any syscall of this thread but `allowed` ends the process. */
int lock_down(uint32_t allowed) {
  struct sock_filter filter[] = {
    BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, allowed, 0, 1),
    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
  };
  struct sock_fprog program = { sizeof filter / sizeof filter[0], filter };
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return -1;
  return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}
"#;

/// Most calls of each kind that are made under the filter.
const CALLS: u32 = 100_000;
/// At least as many, however long they take.
const CALLS_MIN: u32 = 101;
/// Where the machine is so busy that the others would take longer than this, fewer are made.
const PATIENCE: Duration = Duration::from_secs(15);

/// Counts what the calling thread allocates.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
}

// SAFETY: hands everything on to the system's allocator; counting touches only a const thread-local without a destructor, so it does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise, handed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise, handed on.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promise, handed on.
        unsafe { System.realloc(block, layout, bytes) }
    }
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // Freeing is work too, and nothing can be freed that was not allocated here or elsewhere.
        count();
        // SAFETY: the caller's promise, handed on.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations_of(work: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.with(Cell::get);
    work();
    ALLOCATIONS.with(Cell::get) - before
}

type Sum = fn(In<[u8]>, u64) -> u64;
type Fill = fn(Out<[u8]>, u64, u8);
type RaiseEach = fn(InOut<[u8]>, u64);

/// Every kind of call that is meant to be fast.
struct Calls {
    _session: Session,
    add: Function<fn(u64, u64) -> u64>,
    pipeline: Pipeline<fn(u64, u64) -> u64>,
    by_name: DynFunction,
    sum: Function<Sum>,
    fill: Function<Fill>,
    raise_each: Function<RaiseEach>,
    sum_by_name: DynFunction,
    lock_down: Function<fn(u32) -> i32>,
    small: [u8; 64],
    large: [u8; 4096],
    block: hotcell::Block,
    sum_block: Function<fn(hotcell::Block, u64) -> u64>,
}

/// The kinds of call, by number.
const KINDS: [&str; 12] = [
    "typed",
    "by name",
    "64 B in",
    "64 B out",
    "64 B in and out",
    "4 KiB in",
    "4 KiB out",
    "4 KiB in and out",
    "bytes by name",
    "submitted",
    "block",
    "pipelined",
];

impl Calls {
    fn new(worker: &Worker) -> Self {
        let session = worker.session().unwrap();
        let module = session.load(Module::ffi(library("hot_path", FIXTURE))).unwrap();
        let block = session.block(4096).unwrap();
        assert!(block.write(0, &[2; 4096]));
        Self {
            add: module.function("add").unwrap(),
            pipeline: module.function("add").unwrap().pipeline().unwrap(),
            by_name: module.prototype("uint64_t add(uint64_t, uint64_t)").unwrap(),
            sum: module.function("sum").unwrap(),
            fill: module.function("fill").unwrap(),
            raise_each: module.function("raise_each").unwrap(),
            sum_by_name: module.prototype("uint64_t sum(buffer, uint64_t)").unwrap(),
            lock_down: module.function("lock_down").unwrap(),
            sum_block: module.function("sum").unwrap(),
            small: [1; 64],
            large: [1; 4096],
            block,
            _session: session,
        }
    }

    /// Makes the `i`-th call of a kind. Whether its result is right.
    fn make(&mut self, kind: usize, i: u32) -> bool {
        let i = u64::from(i);
        let with = i.to_le_bytes()[0];
        match kind {
            0 => self.add.call(i, 2).is_ok_and(|sum| sum == i + 2),
            1 => self.by_name.call((i, 3u64)).is_ok_and(|sum| sum == hotcell::Value::Unsigned(i + 3)),
            2 => self.sum.call(&[with; 64], 64).is_ok_and(|sum| sum == 64 * u64::from(with)),
            3 => self.fill.call(&mut self.small, 64, with).is_ok() && self.small == [with; 64],
            4 => {
                self.small = [with; 64];
                self.raise_each.call(&mut self.small, 64).is_ok() && self.small == [with.wrapping_add(1); 64]
            }
            5 => self.sum.call(&[with; 4096], 4096).is_ok_and(|sum| sum == 4096 * u64::from(with)),
            6 => self.fill.call(&mut self.large, 4096, with).is_ok() && self.large == [with; 4096],
            7 => {
                self.large = [with; 4096];
                self.raise_each.call(&mut self.large, 4096).is_ok()
                    && self.large == [with.wrapping_add(1); 4096]
            }
            8 => {
                let sum = self.sum_by_name.call((&[with; 64][..], 64u64));
                sum.is_ok_and(|sum| sum == hotcell::Value::Unsigned(64 * u64::from(with)))
            }
            9 => {
                // Several in flight, redeemed out of order.
                let Ok(first) = self.add.submit(i, 1) else { return false };
                let Ok(second) = self.add.submit(i, 2) else { return false };
                second.wait().is_ok_and(|sum| sum == i + 2) && first.wait().is_ok_and(|sum| sum == i + 1)
            }
            11 => {
                // Enough to go round the ring, and round again.
                let sent = (0..200).all(|j| self.pipeline.send(i, j).is_ok());
                sent && (0..200).all(|j| self.pipeline.receive().is_ok_and(|sum| sum == Some(i + j)))
            }
            _ => self.sum_block.call(&self.block, 4096).is_ok_and(|sum| sum == 8192),
        }
    }

    fn warm_up(&mut self) {
        let start = Instant::now();
        for i in 0..300 {
            for (kind, name) in KINDS.iter().enumerate() {
                assert!(self.make(kind, i), "{name}");
            }
            if i >= CALLS_MIN && start.elapsed() > PATIENCE {
                return;
            }
        }
    }

    /// Makes calls of all kinds. How many of each, or a kind whose result was wrong.
    fn make_many(&mut self) -> Result<u32, usize> {
        let start = Instant::now();
        for i in 0..CALLS {
            for kind in 0..KINDS.len() {
                if !self.make(kind, i) {
                    return Err(kind);
                }
            }
            if i >= CALLS_MIN && i % 64 == 0 && start.elapsed() > PATIENCE {
                return Ok(i + 1);
            }
        }
        Ok(CALLS)
    }
}

#[test]
fn calls_allocate_nothing() {
    // Callers in a crowd take turns, and the first time that a thread waits for its turn it allocates: so no other test may call at the same time.
    isolated("calls_allocate_nothing", 120, || {
        for (policy, latencies) in [
            (WaitPolicy::Adaptive, false),
            (WaitPolicy::Spin, false),
            (WaitPolicy::Park, false),
            (WaitPolicy::Adaptive, true),
        ] {
            let options = SessionBuilder::new().wait(policy).latencies(latencies);
            let worker = Worker::builder().session_defaults(options).spawn().unwrap();
            let mut calls = Calls::new(&worker);
            calls.warm_up();
            let mut all = 0;
            for (kind, name) in KINDS.iter().enumerate() {
                let start = Instant::now();
                let made = allocations_of(|| {
                    for i in 0..1000 {
                        assert!(calls.make(kind, i));
                        all += 1;
                        // A busy machine takes a time slice for each.
                        if i >= CALLS_MIN && start.elapsed() > PATIENCE / 10 {
                            break;
                        }
                    }
                });
                assert_eq!(made, 0, "{name} under {policy:?}, measured: {latencies}");
            }
            // One call in 17, if it is not submitted.
            assert_eq!(
                calls._session.latencies().map(|measured| measured.count() > all / 34),
                latencies.then_some(true)
            );
        }
        assert!(allocations_of(|| drop(std::hint::black_box(Box::new(1)))) == 2, "the allocator counts");
    });
}

/// A syscall that nothing here makes; stands for "none".
const NOTHING: u32 = u32::MAX;

/// Whether this machine's clock is read without a syscall. If not, reading it is not what the tests are about.
fn clock_needs_no_syscall() -> bool {
    let source = std::fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource");
    let source = source.unwrap_or_default();
    let free =
        ["tsc", "kvm-clock", "arch_sys_counter", "hyperv_clocksource_tsc_page"].contains(&source.trim());
    if !free {
        eprintln!("the clock source {} needs a syscall: clock_gettime is allowed", source.trim());
    }
    free
}

/// What the worker may still call: the clock, where that is a syscall.
fn clock() -> u32 {
    if clock_needs_no_syscall() { NOTHING } else { u32::try_from(libc::SYS_clock_gettime).unwrap() }
}

/// Forbids the calling thread every syscall but `exit_group` (and the clock, where that is one); the process ends at the first.
fn lock_this_thread_down() {
    use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W};
    let code = |code: u32| u16::try_from(code).unwrap();
    let statement = |what: u32, k: u32| libc::sock_filter { code: code(what), jt: 0, jf: 0, k };
    let jump = |k: u32, jt: u8| libc::sock_filter { code: code(BPF_JMP | BPF_JEQ | BPF_K), jt, jf: 0, k };
    let mut filter = [
        statement(BPF_LD | BPF_W | BPF_ABS, 0),
        jump(u32::try_from(libc::SYS_exit_group).unwrap(), 2),
        jump(clock(), 1),
        statement(BPF_RET | BPF_K, libc::SECCOMP_RET_KILL_PROCESS),
        statement(BPF_RET | BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: code(5), filter: filter.as_mut_ptr() };
    // SAFETY: takes numbers only.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
    // SAFETY: `program` and the filter that it points to are live; the kernel copies them.
    let done = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    assert_eq!(done, 0, "no seccomp: {}", std::io::Error::last_os_error());
}

fn end_with(code: i32) -> ! {
    // SAFETY: takes a number and does not return.
    unsafe { libc::_exit(code) }
}

const WRONG_RESULT: i32 = 100;
const TOO_FEW: i32 = 99;

#[test]
fn the_caller_makes_no_syscall() {
    let status = isolated_status("the_caller_makes_no_syscall", 110, || {
        let worker = Worker::builder().wait(WaitPolicy::Spin).spawn().unwrap();
        let mut calls = Calls::new(&worker);
        calls.warm_up();
        eprintln!("locking down; at most {CALLS} calls of {} kinds", KINDS.len());
        lock_this_thread_down();
        match calls.make_many() {
            Ok(made) if made >= CALLS_MIN => end_with(0),
            Ok(_) => end_with(TOO_FEW),
            Err(kind) => end_with(WRONG_RESULT + i32::try_from(kind).unwrap_or(0)),
        }
    });
    let status = status.unwrap();
    assert!(
        status.success(),
        "{status}: SIGSYS is a forbidden syscall, {TOO_FEW} too few calls, {WRONG_RESULT} + n a wrong result of kind n"
    );
}

#[test]
fn a_syscall_of_the_caller_would_be_noticed() {
    let status = isolated_status("a_syscall_of_the_caller_would_be_noticed", 110, || {
        // A caller that parks makes syscalls.
        let worker = Worker::builder().wait(WaitPolicy::Park).spawn().unwrap();
        let mut calls = Calls::new(&worker);
        calls.warm_up();
        lock_this_thread_down();
        let _ = calls.make_many();
        end_with(0);
    });
    assert_eq!(status.unwrap().signal(), Some(libc::SIGSYS));
}

#[test]
fn the_worker_makes_no_syscall() {
    let _watchdog = watchdog(120);
    let worker = Worker::builder().wait(WaitPolicy::Spin).spawn().unwrap();
    let mut calls = Calls::new(&worker);
    calls.warm_up();
    assert_eq!(calls.lock_down.call(clock()).unwrap(), 0, "no seccomp");
    let made =
        calls.make_many().unwrap_or_else(|kind| panic!("{}: {:?}", KINDS[kind], worker.crash_report()));
    eprintln!("{made} calls of each kind");
    assert!(made >= CALLS_MIN && worker.is_alive());
    // Now one that does: unloading and closing cannot be done without.
    drop(calls);
    let report = until("the worker to end", || worker.crash_report());
    assert_eq!(report.signal(), Some(libc::SIGSYS), "{report}");
}

#[test]
fn a_syscall_of_the_worker_would_be_noticed() {
    let _watchdog = watchdog(120);
    // Under this policy it sleeps when nothing comes for a while.
    let worker = Worker::builder().wait(WaitPolicy::Adaptive).spawn().unwrap();
    let calls = Calls::new(&worker);
    // The call itself may be over before the report comes, or may not.
    match calls.lock_down.call(clock()) {
        Ok(0) | Err(CallError::Crashed(_)) => {}
        other => panic!("{other:?}"),
    }
    let report = until("the worker to sleep, and to end by that", || worker.crash_report());
    assert_eq!(report.signal(), Some(libc::SIGSYS), "{report}");
}

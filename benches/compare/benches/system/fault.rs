//! From a fault in native code to the caller's error, beside the same fault in a bare child until its pidfd is readable.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hotcell::{CallError, Function, Module, Worker};
use hotcell_compare::Result;
use hotcell_compare::cell::Library;
use hotcell_compare::command_line::Options;
use hotcell_compare::memory::{Record, Shared};
use hotcell_compare::verdict::{Limit, Verdict};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{Program, Times, compile_program, print_times_header};

/// Says that it is there, spins until it is told, faults. Its standard input is the memory.
const CHILD: &str = r"
#include <sys/mman.h>
int main(void) {
    volatile unsigned *state = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, 0, 0);
    *state = 1;
    while (*state != 2) __builtin_ia32_pause();
    *(volatile int *)0 = 1;
    return 0;
}
";
const READY: u32 = 1;
const FAULT: u32 = 2;

/// Becomes readable when the process has ended.
fn pidfd(process: u32) -> Result<OwnedFd> {
    // SAFETY: a system call with two numbers.
    let descriptor = unsafe { libc::syscall(libc::SYS_pidfd_open, process, 0) };
    if descriptor < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor as i32) })
}

fn await_end(pidfd: &OwnedFd) -> Result<()> {
    let mut poll = libc::pollfd { fd: pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one structure of which the kernel writes a part, for the length of the call.
    let ready = unsafe { libc::poll(&mut poll, 1, 30_000) };
    if ready == 1 { Ok(()) } else { Err("the process did not end".into()) }
}

fn bare_child(program: &Path) -> Result<Duration> {
    let record = Shared::<Record>::create(0)?;
    let memory = File::from(record.as_fd().try_clone_to_owned()?);
    let mut child = Command::new(program).stdin(Stdio::from(memory)).spawn()?;
    let pidfd = pidfd(child.id())?;
    while record.state.load(Ordering::Acquire) != READY {
        std::thread::yield_now();
    }
    let start = Instant::now();
    record.state.store(FAULT, Ordering::Release);
    await_end(&pidfd)?;
    let took = start.elapsed();
    child.wait()?;
    Ok(took)
}

/// A worker that has just answered a call, and is awake.
struct Victim {
    worker: Worker,
    _module: Module,
    fault: Function<fn()>,
}

impl Victim {
    fn new(program: Program, library: &Library) -> Result<Self> {
        let worker = program.builder().spawn()?;
        let module = worker.session()?.load(library.path.as_path())?;
        let fault = module.function("fault")?;
        let add = module.function::<fn(i32, i32) -> i32>("add")?;
        for number in 0..100 {
            assert_eq!(add.call(number, 1)?, number + 1);
        }
        Ok(Self { worker, _module: module, fault })
    }

    /// Until the caller has its error.
    fn fault(self) -> Result<Duration> {
        let start = Instant::now();
        let error = self.fault.call();
        let took = start.elapsed();
        match error {
            Err(CallError::Crashed(report)) if report.signal() == Some(libc::SIGSEGV) => Ok(took),
            other => Err(format!("expected a crash by SIGSEGV, got {other:?}").into()),
        }
    }

    /// Until its end can be seen: what of it is the kernel's.
    fn end_by_kill(self) -> Result<Duration> {
        let pidfd = pidfd(self.worker.pid())?;
        let start = Instant::now();
        kill(Pid::from_raw(self.worker.pid() as i32), Signal::SIGKILL)?;
        await_end(&pidfd)?;
        Ok(start.elapsed())
    }
}

pub fn run(options: &Options) -> Result<Vec<Verdict>> {
    let (library, folder) = (Library::compile()?, tempfile::tempdir()?);
    let program = compile_program(folder.path(), "child", CHILD)?;
    let mut floor = Times::default();
    let mut kills = Program::BOTH.map(|_| Times::default());
    let mut faults = Program::BOTH.map(|_| Times::default());
    let rounds = options.rounds(200);
    for _ in 0..rounds {
        floor.add(bare_child(&program)?);
        for (at, program) in Program::BOTH.into_iter().enumerate() {
            kills[at].add(Victim::new(program, &library)?.end_by_kill()?);
            faults[at].add(Victim::new(program, &library)?.fault()?);
        }
    }
    println!("{rounds} rounds, interleaved; nothing is pinned.\n");
    print_times_header("a bare child");
    floor.print("bare child: fault to pidfd readable", &floor);
    for (at, program) in Program::BOTH.into_iter().enumerate() {
        kills[at].print(&format!("{}: SIGKILL to pidfd readable", program.name()), &floor);
        faults[at].print(&format!("{}: fault to the caller's error", program.name()), &floor);
    }
    let verdict = |(at, program): (usize, Program)| {
        Verdict::anywhere(
            format!("{}: fault to the caller's error, to a bare child's pidfd", program.name()),
            Limit::AtMost(3.0),
            faults[at].median() / floor.median(),
        )
    };
    Ok(Program::BOTH.into_iter().enumerate().map(verdict).collect())
}

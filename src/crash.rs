//! The crash report: what a dead worker's host knows, from the kernel first and from the crash page second.

use crate::error::FunctionName;
use crate::limits::Limited;
use hotcell_channel::crash::CrashFacts;
pub use hotcell_channel::crash::{Access, Frame};
pub use hotcell_channel::sys::Usage;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// Why a worker ended. The first cause counts: a worker that is killed for a deadline stays that, whatever it does on its way out.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cause {
    /// Code in the worker ended the process.
    Exited {
        /// The exit code.
        code: i32,
    },
    /// A signal ended it.
    Signaled {
        /// The signal's number.
        signal: i32,
        /// Whether the kernel wrote a core file.
        core_dumped: bool,
    },
    /// It ran out of stack: the fault lies at the end of the thread's stack.
    StackOverflow {
        /// The signal's number, `SIGSEGV` as a rule.
        signal: i32,
        /// Whether the kernel wrote a core file.
        core_dumped: bool,
    },
    /// The host killed it because a call passed its deadline.
    DeadlineExceeded {
        /// The call.
        function: FunctionName,
        /// Its timeout.
        after: Duration,
    },
    /// It used more CPU time than it may: [`cpu_time_per_call`](crate::SessionBuilder::cpu_time_per_call), [`cpu_time_max`](crate::SessionBuilder::cpu_time_max) of the
    /// session or [that of the worker](crate::WorkerBuilder::cpu_time_max).
    CpuTimeExceeded {
        /// What the limit holds for.
        scope: Limited,
        /// The limit.
        max: Duration,
    },
    /// It asked for more memory than it may have, and did not live through the refusal: [`memory_bytes_max`](crate::WorkerBuilder::memory_bytes_max) of the worker or
    /// [that of a session](crate::SessionBuilder::memory_bytes_max).
    MemoryExceeded {
        /// What the limit holds for.
        scope: Limited,
        /// The limit.
        bytes_max: u64,
        /// The signal by which it ended: what native code makes of memory that it does not get, or `SIGKILL` from the kernel. `None` if it exited.
        signal: Option<i32>,
    },
    /// It wrote a file beyond [`file_bytes_max`](crate::WorkerBuilder::file_bytes_max).
    FileSizeExceeded {
        /// The limit.
        bytes_max: u64,
    },
    /// The host killed it because it was not ready in time.
    NeverReady {
        /// The start timeout.
        after: Duration,
    },
    /// The host disposed of it.
    Disposed,
    /// The host killed it because it broke the protocol between them.
    ProtocolBreach {
        /// What it did.
        what: String,
    },
    /// The host killed it because it gave no sign of life: see [`Canary`](crate::Canary).
    Unresponsive {
        /// What was asked, and what came of it.
        what: String,
    },
    /// It ended, and its status could not be had: somebody else in the host's process collected it first, or a process that traces the worker keeps it.
    Unknown,
}

/// The exit code of a worker that used too much CPU time, where one is asked for: `timeout(1)`'s, and secure-exec's.
const EXIT_CPU_TIME_EXCEEDED: i32 = 124;

impl Cause {
    /// A stable name for programs: see [`CallError::code`](crate::CallError::code).
    pub fn code(&self) -> &'static str {
        match self {
            Cause::Exited { .. } | Cause::Signaled { .. } | Cause::Unknown => "ERR_WORKER_CRASH",
            Cause::StackOverflow { .. } => "ERR_STACK_OVERFLOW",
            Cause::DeadlineExceeded { .. } => "ERR_CALL_TIMEOUT",
            Cause::CpuTimeExceeded { .. } => "ERR_CPU_TIME_EXCEEDED",
            Cause::MemoryExceeded { .. } => "ERR_MEMORY_EXCEEDED",
            Cause::FileSizeExceeded { .. } => "ERR_FILE_SIZE_EXCEEDED",
            Cause::NeverReady { .. } => "ERR_START_TIMEOUT",
            Cause::Disposed => "ERR_WORKER_DISPOSED",
            Cause::ProtocolBreach { .. } => "ERR_PROTOCOL",
            Cause::Unresponsive { .. } => "ERR_WORKER_UNRESPONSIVE",
        }
    }

    /// A short name of its kind, for counts: `SIGSEGV`, `exit`, `deadline`, …
    pub(crate) fn kind(&self) -> String {
        match self {
            Cause::Exited { .. } => "exit".to_owned(),
            Cause::Signaled { signal, .. } => signal_name(*signal),
            Cause::StackOverflow { .. } => "stack overflow".to_owned(),
            Cause::DeadlineExceeded { .. } => "deadline".to_owned(),
            Cause::CpuTimeExceeded { .. } => "CPU time".to_owned(),
            Cause::MemoryExceeded { .. } => "memory".to_owned(),
            Cause::FileSizeExceeded { .. } => "file size".to_owned(),
            Cause::NeverReady { .. } => "never ready".to_owned(),
            Cause::Disposed => "disposed".to_owned(),
            Cause::ProtocolBreach { .. } => "protocol breach".to_owned(),
            Cause::Unresponsive { .. } => "unresponsive".to_owned(),
            Cause::Unknown => "unknown".to_owned(),
        }
    }
}

/// The name of a signal, such as `SIGSEGV`.
pub(crate) fn signal_name(signal: i32) -> String {
    let name = match signal {
        libc::SIGHUP => "SIGHUP",
        libc::SIGINT => "SIGINT",
        libc::SIGQUIT => "SIGQUIT",
        libc::SIGILL => "SIGILL",
        libc::SIGTRAP => "SIGTRAP",
        libc::SIGABRT => "SIGABRT",
        libc::SIGBUS => "SIGBUS",
        libc::SIGFPE => "SIGFPE",
        libc::SIGKILL => "SIGKILL",
        libc::SIGUSR1 => "SIGUSR1",
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGUSR2 => "SIGUSR2",
        libc::SIGPIPE => "SIGPIPE",
        libc::SIGALRM => "SIGALRM",
        libc::SIGTERM => "SIGTERM",
        libc::SIGXCPU => "SIGXCPU",
        libc::SIGXFSZ => "SIGXFSZ",
        libc::SIGSYS => "SIGSYS",
        other => return format!("signal {other}"),
    };
    name.to_owned()
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let core = |dumped: &bool| if *dumped { " (core dumped)" } else { "" };
        match self {
            Cause::Exited { code } => write!(f, "exited with code {code}"),
            Cause::Signaled { signal, core_dumped } => {
                write!(f, "killed by {}{}", signal_name(*signal), core(core_dumped))
            }
            Cause::StackOverflow { signal, core_dumped } => {
                write!(f, "stack overflow, killed by {}{}", signal_name(*signal), core(core_dumped))
            }
            Cause::DeadlineExceeded { function, after } => {
                write!(f, "killed because {function} did not return within {after:?}")
            }
            Cause::CpuTimeExceeded { scope, max } => {
                write!(f, "ended because it used more than {max:?} of CPU time, the limit of its {scope}")
            }
            Cause::MemoryExceeded { scope, bytes_max, signal } => {
                match signal {
                    Some(signal) => write!(f, "ended by {}", signal_name(*signal))?,
                    None => f.write_str("exited")?,
                }
                write!(f, " because it asked for more memory than the {bytes_max} bytes of its {scope}")
            }
            Cause::FileSizeExceeded { bytes_max } => {
                write!(f, "ended because it wrote a file beyond its limit of {bytes_max} bytes")
            }
            Cause::NeverReady { after } => write!(f, "killed because it was not ready after {after:?}"),
            Cause::Disposed => f.write_str("disposed by the host"),
            Cause::ProtocolBreach { what } => write!(f, "killed because it broke the protocol: {what}"),
            Cause::Unresponsive { what } => write!(f, "killed because it gave no sign of life: {what}"),
            Cause::Unknown => {
                f.write_str("ended for an unknown reason (its status was collected or is kept elsewhere)")
            }
        }
    }
}

/// What one call had to do with the death of its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Involvement {
    /// This call was running and is the cause, as far as the facts tell.
    Culprit,
    /// This call was running too, or its function may have run, but another is the cause, or none of them.
    Bystander,
    /// The worker never took this call: its function did not run.
    NotRun,
}

impl Involvement {
    /// Whether the call's function may have run.
    pub fn may_have_run(self) -> bool {
        self != Involvement::NotRun
    }
}

/// What is the same for everybody who was hit by one worker's death.
#[derive(Debug)]
pub(crate) struct Death {
    pub(crate) pid: u32,
    pub(crate) cause: Cause,
    /// The worker has said hello: its program is one that hotcell can use.
    pub(crate) greeted: bool,
    pub(crate) usage: Usage,
    pub(crate) facts: Option<CrashFacts>,
    /// The calls that were running, session by session.
    pub(crate) running: Vec<(u32, FunctionName)>,
    /// Which of the sessions is the cause, if the facts tell.
    pub(crate) culprit: Option<u32>,
    pub(crate) stderr_tail: String,
    pub(crate) stderr_dropped: u64,
}

impl Death {
    pub(crate) fn culprit_function(&self) -> Option<&FunctionName> {
        let culprit = self.culprit?;
        self.running.iter().find(|(session, _)| *session == culprit).map(|(_, function)| function)
    }
}

/// Why a worker ended: causes and exit status from the kernel; fault, stack and names from the worker's own crash handler (as far as it got: they are
/// untrusted, bounded and escaped); and what the call that got this report had to do with it.
///
/// A report never changes. Cloning it is cheap.
#[derive(Clone)]
pub struct CrashReport {
    pub(crate) death: Arc<Death>,
    pub(crate) function: Option<FunctionName>,
    pub(crate) involvement: Involvement,
}

/// The report's text: a `main` that returns the error prints this.
impl fmt::Debug for CrashReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl CrashReport {
    /// The first line of the report: what happened to whom.
    pub(crate) fn headline(&self) -> String {
        let mut line = String::new();
        // Writing to a string does not fail.
        let _ = self.death.headline(&mut line);
        line
    }

    /// The worker's process id, which may belong to another process by now.
    pub fn pid(&self) -> u32 {
        self.death.pid
    }

    /// Why the worker ended.
    pub fn cause(&self) -> &Cause {
        &self.death.cause
    }

    /// The exit code, if the worker exited. 124 if it used more CPU time than it may, as `timeout(1)` has it.
    pub fn exit_code(&self) -> Option<i32> {
        match self.death.cause {
            Cause::Exited { code } => Some(code),
            Cause::CpuTimeExceeded { .. } => Some(EXIT_CPU_TIME_EXCEEDED),
            _ => None,
        }
    }

    /// The signal that ended the worker, if one did that the host did not send.
    pub fn signal(&self) -> Option<i32> {
        match self.death.cause {
            Cause::Signaled { signal, .. } | Cause::StackOverflow { signal, .. } => Some(signal),
            Cause::MemoryExceeded { signal, .. } => signal,
            Cause::FileSizeExceeded { .. } => Some(libc::SIGXFSZ),
            _ => None,
        }
    }

    /// Whether the kernel wrote a core file.
    pub fn core_dumped(&self) -> bool {
        matches!(
            self.death.cause,
            Cause::Signaled { core_dumped: true, .. } | Cause::StackOverflow { core_dumped: true, .. }
        )
    }

    /// What the worker used in its life.
    pub fn usage(&self) -> &Usage {
        &self.death.usage
    }

    /// The call that got this report; `None` when the report was not made for a call.
    pub fn function(&self) -> Option<&FunctionName> {
        self.function.as_ref()
    }

    /// What that call had to do with the death. [`Involvement::NotRun`] when the report was not made for a call.
    pub fn involvement(&self) -> Involvement {
        self.involvement
    }

    /// The call that is the cause, whichever session made it, if the facts tell.
    pub fn culprit(&self) -> Option<&FunctionName> {
        self.death.culprit_function()
    }

    /// The calls that were running when the worker ended, one for each busy session.
    pub fn running(&self) -> impl Iterator<Item = &FunctionName> {
        self.death.running.iter().map(|(_, function)| function)
    }

    /// The address whose access faulted.
    pub fn fault_address(&self) -> Option<u64> {
        self.death.facts.as_ref()?.fault_address
    }

    /// What kind of access faulted, if the processor told.
    pub fn access(&self) -> Option<Access> {
        self.death.facts.as_ref()?.access
    }

    /// The address of the instruction that faulted, and its bytes as far as they were readable.
    pub fn instruction(&self) -> Option<(u64, &[u8])> {
        self.death.facts.as_ref().map(|facts| (facts.pc, facts.instruction.as_slice()))
    }

    /// The native call stack, innermost first, as far as it could be taken.
    pub fn backtrace(&self) -> &[Frame] {
        self.death.facts.as_ref().map_or(&[], |facts| &facts.frames)
    }

    /// The last of what the worker wrote to its standard error, if that was captured; escaped.
    pub fn stderr_tail(&self) -> &str {
        &self.death.stderr_tail
    }

    /// Bytes of captured standard error that were dropped before what [`CrashReport::stderr_tail`] has.
    pub fn stderr_dropped(&self) -> u64 {
        self.death.stderr_dropped
    }
}

impl Death {
    /// What happened, in one line.
    fn headline(&self, f: &mut impl fmt::Write) -> fmt::Result {
        let death = self;
        write!(f, "worker {} {}", death.pid, death.cause)?;
        match death.culprit_function() {
            // The deadline's own text names it already.
            Some(_) if matches!(death.cause, Cause::DeadlineExceeded { .. }) => {}
            Some(culprit) => write!(f, " in {culprit}")?,
            None if death.running.is_empty() => {}
            None => {
                f.write_str(" while running ")?;
                for (i, (_, function)) in death.running.iter().enumerate() {
                    write!(f, "{}{function}", if i > 0 { ", " } else { "" })?;
                }
            }
        }
        Ok(())
    }
}

/// One line for the cause and one for each further fact.
impl fmt::Display for CrashReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let death = &self.death;
        death.headline(f)?;
        if !death.greeted && matches!(death.cause, Cause::Exited { .. }) {
            f.write_str(
                "\n  it never said hello: is its program (WorkerBuilder::program, HOTCELL_WORKER) the hotcell-worker of this version?",
            )?;
        }
        if let Some(function) = &self.function {
            match self.involvement {
                Involvement::Culprit => {}
                Involvement::Bystander => write!(f, "\n  call: {function} was in flight and may have run")?,
                Involvement::NotRun => write!(f, "\n  call: {function} did not run")?,
            }
        }
        if let Some(facts) = &death.facts {
            if let Some(address) = facts.fault_address {
                let access = match facts.access {
                    Some(Access::Read) => "read of ",
                    Some(Access::Write) => "write to ",
                    Some(Access::Execute) => "jump to ",
                    None => "",
                };
                write!(f, "\n  fault: {access}{address:#x}")?;
            }
            write!(f, "\n  instruction: {:#x}", facts.pc)?;
            for byte in &facts.instruction {
                write!(f, " {byte:02x}")?;
            }
            for (i, frame) in facts.frames.iter().enumerate() {
                write!(f, "\n  #{i} {frame}")?;
            }
            if !facts.complete {
                f.write_str("\n  (the crash handler did not finish)")?;
            }
        }
        write!(
            f,
            "\n  used: {:?} user, {:?} system, {} KiB at most",
            death.usage.user,
            death.usage.system,
            death.usage.resident_bytes_max / 1024
        )?;
        if death.stderr_dropped > 0 {
            write!(f, "\n  stderr: ({} bytes before this were dropped)", death.stderr_dropped)?;
        }
        if !death.stderr_tail.is_empty() {
            write!(f, "\n  stderr: {}", death.stderr_tail.trim_end().replace('\n', "\n          "))?;
        }
        Ok(())
    }
}

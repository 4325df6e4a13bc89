//! The two threads of the library.
//!
//! *The monitor* watches every worker: its control socket, its pidfd, its output pipes, and the few timers (a worker that has not ended after its grace
//! period). It runs no code of the host's user, waits for nobody, and sleeps while nothing happens.
//!
//! *The spawner* starts processes and never ends. It exists because `PR_SET_PDEATHSIG` fires when the *thread* that started the process ends:
//! a worker must not die because the host's thread that asked for it did.
//!
//! Both threads block all signals: they belong to the host's own threads.

use crate::error::StartError;
use crate::worker::WorkerInner;
use hotcell_channel::sys;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What of a worker became ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Exit,
    Socket,
    Stdout,
    Stderr,
}

const SOURCES: [Source; 4] = [Source::Exit, Source::Socket, Source::Stdout, Source::Stderr];
const WAKER: u64 = 0;

fn token(worker: u64, source: Source) -> u64 {
    worker * 4 + source as u64
}

/// A process that the spawner has started.
#[derive(Debug)]
pub(crate) struct Spawned {
    pub(crate) pid: u32,
    pub(crate) pidfd: OwnedFd,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
}

struct Job {
    command: Command,
    answer: crossbeam_channel::Sender<io::Result<Spawned>>,
}

/// A worker whose time runs out.
#[derive(Debug)]
struct Timer {
    at: Instant,
    worker: u64,
    /// The breach that its being alive then amounts to; `None`: it was asked to end, and is only helped along.
    breach: Option<&'static str>,
}

/// A worker that has ended and that a process keeps from being collected by tracing it: a debugger, which lets go at once, or a process that the
/// worker left behind for that purpose.
#[derive(Debug)]
struct Traced {
    worker: Arc<WorkerInner>,
    since: Instant,
    told: bool,
}

/// How long a tracer may keep an ended worker before its end is told without its status.
const TRACED_GRACE: Duration = Duration::from_millis(200);
const TRACED_LOOK: Duration = Duration::from_millis(10);
const TRACED_LOOK_LATER: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
struct Watched {
    workers: HashMap<u64, Arc<WorkerInner>>,
    timers: Vec<Timer>,
}

/// The process-wide half of the library.
#[derive(Debug)]
pub(crate) struct Runtime {
    epoll: Epoll,
    waker: EventFd,
    watched: Mutex<Watched>,
    jobs: crossbeam_channel::Sender<Job>,
}

/// Locks, whether or not a thread has panicked with the lock held: what the locks of this crate guard is consistent at every step.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tells the host's tracing subscriber, which is the user's code: should it panic, nothing is lost but what it was told. The monitor has to go on.
pub(crate) fn guarded(tell: impl FnOnce()) {
    if let Err(panic) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(tell)) {
        // Dropping a payload can panic too.
        std::mem::forget(panic);
    }
}

/// The runtime of this process, started on first use.
pub(crate) fn runtime() -> Result<&'static Runtime, StartError> {
    static RUNTIME: Mutex<Option<&'static Runtime>> = Mutex::new(None);
    if sys::original_process().load(Relaxed) == 0 {
        return Err(StartError::Forked);
    }
    let mut started = lock(&RUNTIME);
    if let Some(runtime) = *started {
        return Ok(runtime);
    }
    let failed = |what| move |errno: Errno| StartError::system(what, io::Error::from(errno));
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed("epoll_create1"))?;
    let waker =
        EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(failed("eventfd"))?;
    epoll.add(&waker, EpollEvent::new(EpollFlags::EPOLLIN, WAKER)).map_err(failed("epoll_ctl"))?;
    let (jobs, inbox) = crossbeam_channel::unbounded::<Job>();
    let runtime: &'static Runtime =
        Box::leak(Box::new(Runtime { epoll, waker, watched: Mutex::default(), jobs }));
    start_thread("hotcell-spawn", move || {
        for job in inbox {
            let _ = job.answer.send(start(job.command));
        }
    })?;
    start_thread("hotcell-monitor", move || runtime.watch())?;
    *started = Some(runtime);
    Ok(runtime)
}

/// Starts a thread of the library that lives as long as the process, with all signals blocked.
pub(crate) fn start_thread(
    name: &'static str,
    body: impl FnOnce() + Send + 'static,
) -> Result<(), StartError> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            sys::block_all_signals();
            body();
        })
        .map(drop)
        .map_err(|source| StartError::system("starting a thread of the library", source))
}

/// Starts the process; on the spawner's thread. The command, and with it the worker's end of the control socket, is closed on return.
fn start(mut command: Command) -> io::Result<Spawned> {
    let mut child = command.spawn()?;
    let pidfd = match sys::pidfd_open(child.id()) {
        Ok(pidfd) => pidfd,
        Err(error) => {
            // Without a pidfd it cannot be watched. It is our child and not collected, so the pid is still its own.
            let _ = child.kill();
            let _ = child.wait();
            return Err(error);
        }
    };
    let Child { stdout, stderr, .. } = &mut child;
    let stdout = stdout.take().map(OwnedFd::from);
    let stderr = stderr.take().map(OwnedFd::from);
    for pipe in [&stdout, &stderr].into_iter().flatten() {
        nix::fcntl::fcntl(pipe, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))?;
    }
    Ok(Spawned { pid: child.id(), pidfd, stdout, stderr })
}

impl Runtime {
    /// Starts a process on the spawner's thread.
    pub(crate) fn spawn(&self, command: Command) -> io::Result<Spawned> {
        let (answer, answered) = crossbeam_channel::bounded(1);
        let gone = || io::Error::other("the spawner thread is gone");
        self.jobs.send(Job { command, answer }).map_err(|_| gone())?;
        answered.recv().map_err(|_| gone())?
    }

    /// Begins to watch a worker.
    pub(crate) fn add(&self, worker: &Arc<WorkerInner>) -> io::Result<()> {
        lock(&self.watched).workers.insert(worker.id(), Arc::clone(worker));
        for source in SOURCES {
            if let Some(fd) = worker.descriptor(source) {
                let event = EpollEvent::new(EpollFlags::EPOLLIN, token(worker.id(), source));
                self.epoll.add(fd, event)?;
            }
        }
        Ok(())
    }

    /// Stops watching one of a worker's descriptors. They stay open, so epoll has to be told.
    pub(crate) fn forget(&self, worker: &WorkerInner, source: Source) {
        if let Some(fd) = worker.descriptor(source) {
            // Not being watched any more is what is wanted, so ENOENT is no failure.
            let _ = self.epoll.delete(fd);
        }
    }

    /// Kills the worker if it is still there when `after` has passed, for `breach` if that is given.
    pub(crate) fn end_after(&self, worker: &WorkerInner, after: Duration, breach: Option<&'static str>) {
        // A time that the clock cannot hold never comes.
        let Some(at) = Instant::now().checked_add(after) else { return };
        let timer = Timer { at, worker: worker.id(), breach };
        lock(&self.watched).timers.push(timer);
        let _ = self.waker.write(1);
    }

    fn watch(&self) {
        let mut events = [EpollEvent::empty(); 32];
        let mut traced = Vec::new();
        loop {
            let next = [self.run_timers(), self.look_at_traced(&mut traced)].into_iter().flatten().min();
            let timeout = next.map_or(EpollTimeout::NONE, |left| {
                EpollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(EpollTimeout::MAX)
            });
            let count = match self.epoll.wait(&mut events, timeout) {
                Ok(count) => count,
                Err(Errno::EINTR) => continue,
                // Nothing else can happen to a descriptor that is never closed; not spinning is the best that is left.
                Err(_) => {
                    std::thread::sleep(Duration::from_millis(10));
                    continue;
                }
            };
            // Deaths first: a caller may be spinning on one.
            for death in [true, false] {
                for event in &events[..count] {
                    let (id, source) = (event.data() / 4, SOURCES[usize::from((event.data() % 4) as u8)]);
                    if event.data() == WAKER {
                        let _ = self.waker.read();
                    } else if (source == Source::Exit) == death {
                        self.ready(id, source, &mut traced);
                    }
                }
            }
        }
    }

    fn ready(&self, id: u64, source: Source, traced: &mut Vec<Traced>) {
        let Some(worker) = lock(&self.watched).workers.get(&id).cloned() else { return };
        match source {
            Source::Exit => {
                if worker.collect() {
                    self.remove(&worker);
                } else {
                    // The descriptor would stay ready, and this thread would spin on it.
                    self.forget(&worker, Source::Exit);
                    traced.push(Traced { worker, since: Instant::now(), told: false });
                }
            }
            Source::Socket => worker.read_control(self),
            Source::Stdout | Source::Stderr => worker.read_output(self, source),
        }
    }

    /// Stops watching a worker, whose end has been told.
    pub(crate) fn remove(&self, worker: &WorkerInner) {
        for source in SOURCES {
            self.forget(worker, source);
        }
        let mut watched = lock(&self.watched);
        watched.workers.remove(&worker.id());
        watched.timers.retain(|timer| timer.worker != worker.id());
    }

    /// Collects whom a tracer has let go; gives the time until the next look.
    fn look_at_traced(&self, traced: &mut Vec<Traced>) -> Option<Duration> {
        traced.retain_mut(|ended| {
            if ended.told {
                return !ended.worker.is_collected();
            }
            let collected = ended.worker.collect();
            if !collected && ended.since.elapsed() < TRACED_GRACE {
                return true;
            }
            if !collected {
                ended.worker.ended_but_traced();
            }
            self.remove(&ended.worker);
            ended.told = true;
            !collected
        });
        traced.iter().map(|ended| if ended.told { TRACED_LOOK_LATER } else { TRACED_LOOK }).min()
    }

    /// Kills whoever's time is up; gives the time until the next one.
    fn run_timers(&self) -> Option<Duration> {
        let now = Instant::now();
        let mut due = Vec::new();
        let next = {
            let mut watched = lock(&self.watched);
            let Watched { workers, timers } = &mut *watched;
            timers.retain(|timer| {
                if timer.at > now {
                    return true;
                }
                due.extend(workers.get(&timer.worker).map(|worker| (Arc::clone(worker), timer.breach)));
                false
            });
            timers.iter().map(|timer| timer.at.saturating_duration_since(now)).min()
        };
        // Without the lock: a breach is told to the host's tracing subscriber, which may do anything.
        for (worker, breach) in due {
            match breach {
                Some(what) => worker.breach(what, None),
                None => worker.kill(),
            }
        }
        next
    }
}

/// `read` from a non-blocking pipe: what is there, at most `buffer.len()` bytes. `None` at the end.
pub(crate) fn read_some(fd: &impl AsFd, buffer: &mut [u8]) -> Option<usize> {
    loop {
        match nix::unistd::read(fd, buffer) {
            Ok(0) => return None,
            Ok(count) => return Some(count),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Some(0),
            Err(_) => return None,
        }
    }
}

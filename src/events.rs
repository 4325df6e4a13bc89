//! Events of an [`IsolatedProcess`](crate::IsolatedProcess) and of a [`Supervisor`](crate::Supervisor): who listens, and the thread that tells them.
//!
//! An event happens on the monitor's thread (output, death) or on a caller's (ready, error, call results). Neither may wait for the host's handlers, so
//! both only put it into queues: into each [channel](crate::IsolatedProcess::receiver), and once into the queue of the thread `hotcell-events` if there are handlers for it. That
//! thread runs the handlers of all of them, one after another, with no lock of the library held: a handler may call anything.
//!
//! Events are queued under the lock of the list of listeners, so everybody sees them in the same order.

use crate::crash::CrashReport;
use crate::dynamic::Value;
use crate::error::CallError;
use crate::monitor::{self, lock};
use crossbeam_channel::{Receiver, Sender};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};

/// Events that may wait for one slow listener, or for slow handlers of one process, before the frequent kinds (output, call results, call errors) are dropped.
const WAITING_MAX: usize = 1024;

/// The kinds of events of an [`IsolatedProcess`](crate::IsolatedProcess).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Event {
    /// The module is loaded and its functions are resolved, after each start and restart. Never after a failed one.
    Ready,
    /// A call failed, under [`ErrorMode::Event`](crate::ErrorMode::Event).
    Error,
    /// The process has ended, and not because the host shut it down: a crash, an `exit` of native code with whatever code, a deadline.
    Death,
    /// A call has returned or failed, or the process died. Calls cost more while somebody listens to this.
    Exit,
    /// A piece of the process's standard output.
    Stdout,
    /// A piece of the process's standard error.
    Stderr,
}

/// What a set of listeners is told: the data of an event, of one of at most 32 kinds.
pub(crate) trait Telling: Clone + Send + Sync + 'static {
    /// The kinds.
    type Kind: Copy + fmt::Debug;

    /// A bit for each kind.
    fn bit(kind: Self::Kind) -> u32;

    /// Which kind this is.
    fn kind(&self) -> Self::Kind;

    /// Whether it may be dropped for a listener that does not keep up. What may come any number of times must be: a worker could fill the host's memory with it.
    fn is_frequent(&self) -> bool;
}

/// What happened. `Display` says it in words.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum EventData {
    /// The module is loaded.
    Ready {
        /// The process that it is loaded in.
        pid: u32,
    },
    /// A call failed.
    Error(Arc<CallError>),
    /// The process died.
    Death(CrashReport),
    /// A call has returned or failed, or the process died.
    Exit(Exit),
    /// A piece of standard output, as the process wrote it: untrusted bytes.
    Stdout(Vec<u8>),
    /// A piece of standard error, as the process wrote it: untrusted bytes.
    Stderr(Vec<u8>),
}

/// How something ended: the payload of [`Event::Exit`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Exit {
    /// A call returned this.
    Success(Value),
    /// A call failed; the error in words. The error itself goes to whoever called, or with [`Event::Error`].
    Error(String),
    /// The process died.
    Death(CrashReport),
}

impl EventData {
    /// Which event this is the data of.
    pub fn event(&self) -> Event {
        match self {
            EventData::Ready { .. } => Event::Ready,
            EventData::Error(_) => Event::Error,
            EventData::Death(_) => Event::Death,
            EventData::Exit(_) => Event::Exit,
            EventData::Stdout(_) => Event::Stdout,
            EventData::Stderr(_) => Event::Stderr,
        }
    }

    /// The report, if this is about a death.
    pub fn report(&self) -> Option<&CrashReport> {
        match self {
            EventData::Death(report) | EventData::Exit(Exit::Death(report)) => Some(report),
            EventData::Error(error) => error.crash_report(),
            _ => None,
        }
    }
}

impl Telling for EventData {
    type Kind = Event;

    fn bit(kind: Event) -> u32 {
        1 << (kind as u32)
    }

    fn kind(&self) -> Event {
        self.event()
    }

    fn is_frequent(&self) -> bool {
        !matches!(self, EventData::Ready { .. } | EventData::Death(_) | EventData::Exit(Exit::Death(_)))
    }
}

impl fmt::Display for EventData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            EventData::Ready { pid } => write!(f, "worker {pid} is ready"),
            EventData::Error(error) => error.fmt(f),
            EventData::Death(report) => report.fmt(f),
            EventData::Exit(exit) => exit.fmt(f),
            EventData::Stdout(bytes) | EventData::Stderr(bytes) => {
                f.write_str(&crate::worker::printable(bytes))
            }
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Exit::Success(value) => write!(f, "returned {value}"),
            Exit::Error(error) => write!(f, "failed: {error}"),
            Exit::Death(report) => report.fmt(f),
        }
    }
}

/// Names one registration of a handler, to take it back with [`IsolatedProcess::off`](crate::IsolatedProcess::off) or
/// [`Supervisor::off`](crate::Supervisor::off).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ListenerId(u64);

type Handler<D> = dyn FnMut(&D) + Send;

enum Sink<D> {
    /// Locked only by the events thread while it runs: the lock stands for "one at a time", nobody waits for it.
    Handler(Arc<Mutex<Handler<D>>>),
    Channel(Sender<D>),
}

impl<D> Clone for Sink<D> {
    fn clone(&self) -> Self {
        match self {
            Sink::Handler(handler) => Sink::Handler(Arc::clone(handler)),
            Sink::Channel(sender) => Sink::Channel(sender.clone()),
        }
    }
}

struct Listener<D> {
    id: u64,
    /// The events it is for: [`Telling::bit`] of each.
    events: u32,
    once: bool,
    /// The library's own: stays when all listeners are removed.
    own: bool,
    sink: Sink<D>,
}

impl<D> fmt::Debug for Listener<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Listener {}", self.id)
    }
}

#[derive(Debug)]
struct List<D> {
    next: u64,
    listeners: Vec<Listener<D>>,
    /// The number of the last process that has ended.
    ended: u64,
}

/// The listeners of one isolated process or supervisor.
#[derive(Debug)]
pub(crate) struct Emitter<D = EventData> {
    /// The events that anybody listens to: [`Telling::bit`] of each.
    wanted: AtomicU32,
    /// Events in the queue of the events thread.
    waiting: AtomicUsize,
    list: Mutex<List<D>>,
}

impl<D> Default for Emitter<D> {
    fn default() -> Self {
        let list = List { next: 0, listeners: Vec::new(), ended: 0 };
        Self { wanted: AtomicU32::new(0), waiting: AtomicUsize::new(0), list: Mutex::new(list) }
    }
}

impl<D: Telling> Emitter<D> {
    /// Whether anybody listens. A listener that comes at the same moment may be missed.
    #[inline(always)]
    pub(crate) fn wants(&self, event: D::Kind) -> bool {
        self.wanted.load(Relaxed) & D::bit(event) != 0
    }

    pub(crate) fn on(
        &self,
        events: &[D::Kind],
        once: bool,
        own: bool,
        handler: impl FnMut(&D) + Send + 'static,
    ) -> ListenerId {
        start_thread();
        self.add(events, once, own, Sink::Handler(Arc::new(Mutex::new(handler))))
    }

    pub(crate) fn receiver(&self, events: &[D::Kind]) -> Receiver<D> {
        let (sender, receiver) = crossbeam_channel::unbounded();
        self.add(events, false, false, Sink::Channel(sender));
        receiver
    }

    fn add(&self, events: &[D::Kind], once: bool, own: bool, sink: Sink<D>) -> ListenerId {
        let events = events.iter().fold(0, |mask, event| mask | D::bit(*event));
        let mut list = lock(&self.list);
        let id = list.next;
        list.next += 1;
        list.listeners.push(Listener { id, events, once, own, sink });
        self.count(&list);
        ListenerId(id)
    }

    /// Removes the listeners that `remove` picks. Gives how many.
    pub(crate) fn remove(&self, events: u32, remove: impl Fn(ListenerId) -> bool) -> usize {
        let mut list = lock(&self.list);
        let mut removed = Vec::new();
        for mut listener in std::mem::take(&mut list.listeners) {
            if listener.own || listener.events & events == 0 || !remove(ListenerId(listener.id)) {
                list.listeners.push(listener);
            } else if listener.events & !events != 0 {
                // A channel for several events loses one of them.
                listener.events &= !events;
                list.listeners.push(listener);
            } else {
                removed.push(listener);
            }
        }
        self.count(&list);
        drop(list);
        // After the lock is gone: what a handler owns may run anything when it is dropped.
        removed.len()
    }

    pub(crate) fn off(&self, id: ListenerId) -> bool {
        self.remove(u32::MAX, |other| other == id) > 0
    }

    pub(crate) fn remove_all(&self, event: Option<D::Kind>) {
        self.remove(event.map_or(u32::MAX, D::bit), |_| true);
    }

    fn count(&self, list: &List<D>) {
        let wanted = list.listeners.iter().fold(0, |mask, listener| mask | listener.events);
        self.wanted.store(wanted, Relaxed);
    }

    /// Tells everybody who listens. False if nobody does.
    pub(crate) fn emit(self: &Arc<Self>, data: D) -> bool {
        self.wants(data.kind()) && self.queue(&mut lock(&self.list), data)
    }

    fn queue(self: &Arc<Self>, list: &mut List<D>, data: D) -> bool {
        let bit = D::bit(data.kind());
        let frequent = data.is_frequent();
        let (mut heard, mut handled, mut gone) = (false, false, false);
        list.listeners.retain(|listener| {
            if listener.events & bit == 0 {
                return true;
            }
            match &listener.sink {
                Sink::Handler(_) => handled = true,
                Sink::Channel(sender) if frequent && sender.len() >= WAITING_MAX => {}
                Sink::Channel(sender) => {
                    if sender.send(data.clone()).is_err() {
                        gone = true;
                        return false;
                    }
                }
            }
            heard = true;
            true
        });
        if gone {
            self.count(list);
        }
        if handled && !(frequent && self.waiting.load(Relaxed) >= WAITING_MAX) {
            self.waiting.fetch_add(1, Relaxed);
            let (emitter, before) = (Arc::clone(self), list.next);
            send(Box::new(move || {
                emitter.run(&data, before);
                emitter.waiting.fetch_sub(1, Relaxed);
            }));
        }
        heard
    }

    /// Gives up a hold on the listeners on a thread that must not run what their drop might: the monitor.
    pub(crate) fn release(self: Arc<Self>) {
        if let Some(last) = Arc::into_inner(self)
            && !lock(&last.list).listeners.is_empty()
        {
            send(Box::new(move || drop(last)));
        }
    }

    /// Runs the handlers; on the events thread. `before`: those from this number on came after the event.
    fn run(&self, data: &D, before: u64) {
        let bit = D::bit(data.kind());
        let is_for = |listener: &&Listener<D>| {
            listener.events & bit != 0 && listener.id < before && matches!(listener.sink, Sink::Handler(_))
        };
        let ids: Vec<u64> = lock(&self.list).listeners.iter().filter(is_for).map(|l| l.id).collect();
        for id in ids {
            // Looked up again: a handler may have removed those behind it.
            let Some(handler) = self.take(id) else { continue };
            let run = catch_unwind(AssertUnwindSafe(move || {
                lock(&handler)(data);
                drop(handler);
            }));
            if let Err(panic) = run {
                let what = panic.downcast_ref::<&str>().copied();
                let what = what.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
                tracing::error!(event = ?data.kind(), panic = what.unwrap_or("?"), "an event handler panicked");
                // Dropping a payload can panic too.
                std::mem::forget(panic);
            }
        }
    }

    fn take(&self, id: u64) -> Option<Arc<Mutex<Handler<D>>>> {
        let mut list = lock(&self.list);
        let at = list.listeners.iter().position(|listener| listener.id == id)?;
        let sink = if list.listeners[at].once {
            let sink = list.listeners.remove(at).sink;
            self.count(&list);
            sink
        } else {
            list.listeners[at].sink.clone()
        };
        match sink {
            Sink::Handler(handler) => Some(handler),
            Sink::Channel(_) => None,
        }
    }
}

impl Emitter {
    /// The process number `generation` has its module loaded. Not told if its death has been told already: nobody wants to hear these the other way round.
    pub(crate) fn ready(self: &Arc<Self>, generation: u64, pid: u32) {
        let mut list = lock(&self.list);
        if list.ended < generation {
            self.queue(&mut list, EventData::Ready { pid });
        }
    }

    /// The process number `generation` has ended. `death`: its report, if that was not the host's wish.
    pub(crate) fn ended(self: &Arc<Self>, generation: u64, death: Option<&CrashReport>) {
        let mut list = lock(&self.list);
        list.ended = list.ended.max(generation);
        if let Some(report) = death {
            self.queue(&mut list, EventData::Death(report.clone()));
            self.queue(&mut list, EventData::Exit(Exit::Death(report.clone())));
        }
    }
}

/// Something to do on the events thread.
type Job = Box<dyn FnOnce() + Send>;

/// Gives up a hold on something that owns code of the host's user, on a thread that must not run what its drop might: the monitor.
pub(crate) fn drop_elsewhere<T: Send + Sync + 'static>(shared: Arc<T>) {
    if let Some(last) = Arc::into_inner(shared) {
        start_thread();
        send(Box::new(move || drop(last)));
    }
}

fn jobs() -> &'static (Sender<Job>, Receiver<Job>) {
    static JOBS: OnceLock<(Sender<Job>, Receiver<Job>)> = OnceLock::new();
    JOBS.get_or_init(crossbeam_channel::unbounded)
}

fn send(job: Job) {
    // The other end is in the same static.
    let _ = jobs().0.send(job);
}

/// Starts the events thread, unless it runs. A failure is tried again with the next handler; events wait until then.
fn start_thread() {
    static RUNNING: Mutex<bool> = Mutex::new(false);
    let mut running = lock(&RUNNING);
    if *running {
        return;
    }
    let started = monitor::start_thread("hotcell-events", || {
        for job in &jobs().1 {
            // Handlers are caught one by one; this is for what is dropped here.
            let done = catch_unwind(AssertUnwindSafe(job));
            if let Err(panic) = done {
                tracing::error!("dropping an event handler panicked");
                std::mem::forget(panic);
            }
        }
    });
    match started {
        Ok(()) => *running = true,
        Err(error) => tracing::error!(%error, "the thread for event handlers cannot be started"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn emitter() -> Arc<Emitter> {
        Arc::default()
    }

    #[test]
    fn the_monitor_never_drops_a_handler() {
        struct Dropped(Sender<Option<String>>);
        impl Drop for Dropped {
            fn drop(&mut self) {
                let _ = self.0.send(std::thread::current().name().map(str::to_owned));
            }
        }
        let (sender, dropped) = crossbeam_channel::unbounded();
        let owned = Dropped(sender);
        let emitter = emitter();
        emitter.on(&[Event::Ready], false, false, move |_| assert!(!owned.0.is_full()));
        emitter.release();
        let thread = dropped.recv_timeout(Duration::from_secs(60)).unwrap();
        assert_eq!(thread.as_deref(), Some("hotcell-events"));
    }

    #[test]
    fn a_death_told_first_silences_the_ready_of_the_same_process() {
        let emitter = emitter();
        let events = emitter.receiver(&[Event::Ready]);
        emitter.ended(2, None);
        emitter.ready(2, 20);
        emitter.ready(3, 30);
        let told: Vec<_> = events.try_iter().collect();
        assert!(matches!(told[..], [EventData::Ready { pid: 30 }]), "{told:?}");
    }

    #[test]
    fn frequent_events_are_dropped_for_a_stalled_listener_and_lifecycle_events_are_not() {
        let emitter = emitter();
        let events = emitter.receiver(&[Event::Stdout, Event::Ready]);
        for _ in 0..3 * WAITING_MAX {
            emitter.emit(EventData::Stdout(b"x".to_vec()));
        }
        for pid in 0..10 {
            emitter.emit(EventData::Ready { pid });
        }
        let told: Vec<_> = events.try_iter().collect();
        let ready = told.iter().filter(|data| data.event() == Event::Ready).count();
        assert_eq!((told.len() - ready, ready), (WAITING_MAX, 10));
    }

    #[test]
    fn nobody_pays_for_events_that_nobody_wants() {
        let emitter = emitter();
        let id = emitter.on(&[Event::Exit], false, false, |_| ());
        let death = emitter.receiver(&[Event::Death, Event::Exit]);
        assert!(emitter.wants(Event::Exit) && !emitter.wants(Event::Stdout));
        assert!(emitter.off(id) && !emitter.off(id));
        assert!(emitter.wants(Event::Exit));
        emitter.remove_all(Some(Event::Exit));
        assert!(!emitter.wants(Event::Exit) && emitter.wants(Event::Death));
        drop(death);
        emitter.ready(1, 1);
        assert!(!emitter.emit(EventData::Ready { pid: 1 }));
    }

    #[test]
    fn a_dropped_receiver_is_forgotten_at_the_next_event() {
        let emitter = emitter();
        drop(emitter.receiver(&[Event::Ready]));
        assert!(emitter.wants(Event::Ready));
        assert!(!emitter.emit(EventData::Ready { pid: 1 }));
        assert!(!emitter.wants(Event::Ready));
    }

    #[test]
    fn a_handler_that_comes_after_an_event_does_not_see_it() {
        let emitter = emitter();
        let (release, held) = crossbeam_channel::bounded::<()>(0);
        let (sender, told) = crossbeam_channel::unbounded();
        emitter.on(&[Event::Ready], true, false, move |_| assert!(held.recv().is_err()));
        emitter.emit(EventData::Ready { pid: 1 });
        emitter.on(&[Event::Ready], false, false, move |data| drop(sender.send(data.to_string())));
        emitter.emit(EventData::Ready { pid: 2 });
        drop(release);
        assert_eq!(told.recv_timeout(Duration::from_secs(60)).unwrap(), "worker 2 is ready");
    }
}

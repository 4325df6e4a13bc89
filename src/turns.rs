//! Turns: what happens when more threads make short calls one after another than the machine has CPUs for.
//!
//! A call of 100 ns only exists while the caller and its worker both have a CPU. Two callers on a machine of two CPUs take the CPU away from the workers that they wait
//! for, and every call then lasts as long as the scheduler leaves somebody running: milliseconds. So callers that notice it take turns. For [`TURN`] one of them (one for
//! each pair of CPUs) calls at full speed, while the others sleep in the order in which they came.
//!
//! **Law.** A turn is a courtesy, never a permission. No call's correctness depends on it, and no caller waits for it longer than [`WAIT_MAX`] or a quarter of its own timeout,
//! which that wait is a part of.
//! A holder that is asked to hand its turn on and does not (its thread ended, or is in a long call) loses it after [`GRACE`]. All that is here is private to this process.
//!
//! Only *dense* callers take part: those whose session makes calls of at most [`DENSE_CALL`] on average. Who calls from time to time, who sleeps for each reply by policy, and
//! whose calls take long is never held up.
//!
//! The holder of a turn makes its calls on the direct slot and looks at nothing of this. It is asked through the slot's `home` word, which it reads in every call
//! anyway: see `SessionInner::ask_home`.

use crate::monitor::lock;
use crate::session::SessionInner;
use crossbeam_utils::sync::{Parker, Unparker};
use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

/// How long a caller has the CPUs while others wait.
pub(crate) const TURN: Duration = Duration::from_millis(2);
/// How long a holder has to hand its turn on. Longer than a preemption by somebody who only wakes up and sleeps again.
const GRACE: Duration = Duration::from_millis(1);
/// Longest wait for a turn: with 64 callers in front.
const WAIT_MAX: Duration = Duration::from_millis(200);
/// How long a caller counts as dense after it was last seen to be.
const RECENT: Duration = Duration::from_millis(20);
/// Average time of a call up to which callers count as dense.
pub(crate) const DENSE_CALL: Duration = Duration::from_micros(10);
/// Calls over which that average is taken.
pub(crate) const DENSE_CALLS: u64 = 64;

/// Calls of strangers to a session between two looks at whether it is crowded.
pub(crate) const LOOK_EVERY: u64 = 16;

/// The mark of a thread: see `session::this_thread`.
type Thread = usize;

#[derive(Debug)]
struct Holder<S> {
    thread: Thread,
    session: S,
    since: Instant,
    asked: Option<Instant>,
}

#[derive(Debug)]
struct Waiting<S> {
    thread: Thread,
    session: S,
    unparker: Unparker,
}

/// Who calls, who waits. Plain data: time is given, sleeping is the caller's.
#[derive(Debug)]
struct Book<S> {
    places: usize,
    dense: Vec<(Thread, Instant)>,
    holders: Vec<Holder<S>>,
    queue: VecDeque<Waiting<S>>,
}

/// What a waiting caller does next.
#[derive(Debug, PartialEq)]
enum Step<S> {
    /// It is its turn.
    Go,
    /// Nothing, until then or until it is woken.
    Sleep(Duration),
    /// Ask this thread, the home of that session's direct slot, to hand its turn on; then sleep.
    Ask(Thread, S, Duration),
}

impl<S> Step<S> {
    /// Not longer than `left`.
    fn at_most(self, left: Duration) -> Self {
        match self {
            Step::Go => Step::Go,
            Step::Sleep(time) => Step::Sleep(time.min(left)),
            Step::Ask(thread, session, time) => Step::Ask(thread, session, time.min(left)),
        }
    }
}

impl<S: Clone> Book<S> {
    fn new(places: usize) -> Self {
        // Room for as many as there rarely are, so that noting a caller allocates nothing.
        Self {
            places,
            dense: Vec::with_capacity(64),
            holders: Vec::with_capacity(64),
            queue: VecDeque::with_capacity(64),
        }
    }

    /// Notes that `thread` makes dense calls. True if there are more such threads than places.
    fn note(&mut self, thread: Thread, now: Instant) -> bool {
        self.dense.retain(|(other, at)| *other != thread && now.saturating_duration_since(*at) < RECENT);
        self.dense.push((thread, now));
        let idle = self.dense.iter().filter(|(thread, _)| !self.is_in(*thread)).count();
        idle + self.holders.len() + self.queue.len() > self.places
    }

    fn is_in(&self, thread: Thread) -> bool {
        self.holds(thread) || self.queue.iter().any(|waiting| waiting.thread == thread)
    }

    fn holds(&self, thread: Thread) -> bool {
        self.holders.iter().any(|holder| holder.thread == thread)
    }

    /// Makes a thread that calls without having asked a holder, so that it can be asked to hand on.
    fn adopt(&mut self, thread: Thread, session: S, now: Instant) {
        if !self.is_in(thread) {
            self.holders.push(Holder { thread, session, since: now, asked: None });
        }
    }

    /// Puts `thread` at the end of the queue, unless it is in already.
    fn enter(&mut self, thread: Thread, session: &S, unparker: &Unparker, now: Instant) {
        if !self.is_in(thread) {
            let waiting = Waiting { thread, session: session.clone(), unparker: unparker.clone() };
            self.queue.push_back(waiting);
        }
        self.fill(now);
    }

    /// Gives free places to whoever has waited longest, and wakes the first of those who still wait: it watches the clock.
    fn fill(&mut self, now: Instant) {
        let mut moved = false;
        while self.holders.len() < self.places {
            let Some(next) = self.queue.pop_front() else { break };
            self.holders.push(Holder { thread: next.thread, session: next.session, since: now, asked: None });
            next.unparker.unpark();
            moved = true;
        }
        if moved && let Some(first) = self.queue.front() {
            first.unparker.unpark();
        }
    }

    /// Ends a turn.
    fn leave(&mut self, thread: Thread, now: Instant) {
        self.holders.retain(|holder| holder.thread != thread);
        self.fill(now);
    }

    /// Stops waiting.
    fn give_up(&mut self, thread: Thread) {
        let was_first = self.queue.front().is_some_and(|first| first.thread == thread);
        self.queue.retain(|waiting| waiting.thread != thread);
        if was_first && let Some(first) = self.queue.front() {
            first.unparker.unpark();
        }
    }

    fn step(&mut self, thread: Thread, now: Instant) -> Step<S> {
        self.fill(now);
        if self.holds(thread) || !self.is_in(thread) {
            return Step::Go;
        }
        if self.queue.front().is_none_or(|first| first.thread != thread) {
            return Step::Sleep(WAIT_MAX);
        }
        let Some(oldest) = self.holders.iter_mut().min_by_key(|holder| holder.since) else { return Step::Go };
        match oldest.asked {
            Some(asked) if now.saturating_duration_since(asked) >= GRACE => {
                let lost = oldest.thread;
                self.leave(lost, now);
                if self.holds(thread) { Step::Go } else { Step::Sleep(GRACE) }
            }
            Some(asked) => Step::Sleep(GRACE.saturating_sub(now.saturating_duration_since(asked))),
            None => {
                let held = now.saturating_duration_since(oldest.since);
                if held < TURN {
                    return Step::Sleep(TURN.saturating_sub(held));
                }
                oldest.asked = Some(now);
                Step::Ask(oldest.thread, oldest.session.clone(), GRACE)
            }
        }
    }
}

/// The turns of this process.
#[derive(Debug)]
pub(crate) struct Turns {
    book: Mutex<Book<Weak<SessionInner>>>,
    /// Whether somebody waits. A hint, so that nobody takes the lock where there is no crowd.
    waited_for: AtomicBool,
}

impl Turns {
    /// Those of this process, made with its first session, so that no call has to. One caller and its worker need two CPUs.
    pub(crate) fn get() -> &'static Self {
        static TURNS: OnceLock<Turns> = OnceLock::new();
        TURNS.get_or_init(|| {
            let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
            Turns { book: Mutex::new(Book::new((cpus / 2).max(1))), waited_for: AtomicBool::new(false) }
        })
    }

    fn with<R>(&self, act: impl FnOnce(&mut Book<Weak<SessionInner>>, Instant) -> R) -> R {
        let mut book = lock(&self.book);
        let result = act(&mut book, Instant::now());
        self.waited_for.store(!book.queue.is_empty(), Relaxed);
        result
    }

    /// Whether somebody waits for a turn.
    pub(crate) fn waited_for(&self) -> bool {
        self.waited_for.load(Relaxed)
    }

    /// Notes that these threads make dense calls. True if callers should take turns.
    pub(crate) fn note(&self, threads: &[Thread]) -> bool {
        self.with(|book, now| threads.iter().fold(false, |_, thread| book.note(*thread, now)))
    }

    /// Makes a thread that is at home in `session` and calls without a turn a holder.
    pub(crate) fn adopt(&self, thread: Thread, session: &Weak<SessionInner>) {
        self.with(|book, now| book.adopt(thread, session.clone(), now));
    }

    /// Ends the turn of `thread`, if it has one: the next one's begins.
    pub(crate) fn leave(&self, thread: Thread) {
        self.with(|book, now| book.leave(thread, now));
    }

    /// Waits until it is the turn of `thread`, which is the calling one, but not longer than is good for a call with this timeout.
    pub(crate) fn wait(&self, thread: Thread, session: &Weak<SessionInner>, timeout: Duration) {
        // A thread that is ending has no parker any more.
        let Ok(parker) = PARKER.try_with(Cell::take) else { return };
        let parker = parker.unwrap_or_default();
        let start = Instant::now();
        let most = WAIT_MAX.min(timeout / 4);
        self.with(|book, now| book.enter(thread, session, parker.unparker(), now));
        loop {
            let step = self.with(|book, now| {
                let left = most.saturating_sub(now.saturating_duration_since(start));
                if left.is_zero() {
                    book.give_up(thread);
                    return Step::Go;
                }
                book.step(thread, now).at_most(left)
            });
            match step {
                Step::Go => break,
                Step::Sleep(time) => parker.park_timeout(time),
                Step::Ask(holder, session, time) => {
                    if let Some(session) = session.upgrade() {
                        session.ask_home(holder);
                    }
                    parker.park_timeout(time);
                }
            }
        }
        PARKER.set(Some(parker));
    }
}

/// `sched_setaffinity`, twice: moves the calling thread off `cpu`, to any other that it may run on, and leaves it the affinity that it had.
///
/// # Errors
/// The kernel's; also if there is no other CPU for it.
pub(crate) fn avoid_cpu(cpu: u32) -> nix::Result<()> {
    let this = nix::unistd::Pid::from_raw(0);
    let allowed = nix::sched::sched_getaffinity(this)?;
    let mut others = allowed;
    others.unset(cpu as usize)?;
    nix::sched::sched_setaffinity(this, &others)?;
    nix::sched::sched_setaffinity(this, &allowed)
}

thread_local! {
    /// What the thread sleeps on while it waits. Not `std::thread::park`, whose token is the user's.
    static PARKER: Cell<Option<Parker>> = const { Cell::new(None) };
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Rig {
        book: Book<&'static str>,
        parker: Parker,
        now: Instant,
    }

    fn rig(places: usize) -> Rig {
        Rig { book: Book::new(places), parker: Parker::new(), now: Instant::now() }
    }

    impl Rig {
        /// Whether it need not wait.
        fn enter(&mut self, thread: Thread) -> bool {
            self.book.enter(thread, &"session", self.parker.unparker(), self.now);
            self.book.holds(thread)
        }

        fn step(&mut self, thread: Thread) -> Step<&'static str> {
            self.book.step(thread, self.now)
        }
    }

    #[test]
    fn a_crowd_is_more_dense_callers_than_places() {
        let mut r = rig(2);
        assert!(!r.book.note(10, r.now));
        assert!(!r.book.note(10, r.now), "the same again");
        assert!(!r.book.note(20, r.now));
        assert!(r.book.note(30, r.now));
        r.now += RECENT;
        assert!(!r.book.note(30, r.now), "the others have stopped");
    }

    #[test]
    fn those_who_wait_count_as_dense_without_being_noted_again() {
        let mut r = rig(1);
        r.enter(10);
        r.enter(20);
        r.now += 10 * RECENT;
        assert!(r.book.note(20, r.now));
        r.book.leave(10, r.now);
        r.book.leave(20, r.now);
        assert!(!r.book.note(20, r.now));
    }

    #[test]
    fn turns_go_round_in_the_order_of_arrival() {
        let mut r = rig(1);
        assert!(r.enter(10));
        assert!(!r.enter(20));
        assert!(!r.enter(30));
        assert_eq!(r.step(20), Step::Sleep(TURN));
        assert_eq!(r.step(30), Step::Sleep(WAIT_MAX), "only the first watches the clock");
        r.now += TURN;
        assert_eq!(r.step(20), Step::Ask(10, "session", GRACE));
        assert_eq!(r.step(20), Step::Sleep(GRACE), "it asks once");
        r.book.leave(10, r.now);
        assert!(!r.enter(10), "at the end of the queue again");
        assert_eq!(r.step(20), Step::Go);
        assert_eq!(r.step(30), Step::Sleep(TURN));
        r.book.leave(20, r.now);
        assert_eq!((r.step(30), r.step(10)), (Step::Go, Step::Sleep(TURN)));
    }

    #[test]
    fn a_holder_that_does_not_answer_loses_its_turn() {
        let mut r = rig(1);
        r.enter(10);
        r.enter(20);
        r.now += TURN;
        assert!(matches!(r.step(20), Step::Ask(..)));
        r.now += GRACE;
        assert_eq!(r.step(20), Step::Go);
        assert!(!r.book.holds(10));
        r.book.leave(10, r.now);
        assert!(r.book.holds(20), "a late answer takes nothing from the next one");
    }

    #[test]
    fn giving_up_lets_the_next_one_watch() {
        let mut r = rig(1);
        r.enter(10);
        r.enter(20);
        r.enter(30);
        r.book.give_up(20);
        assert_eq!(r.step(20), Step::Go, "who is not in the queue does not wait");
        assert_eq!(r.step(30), Step::Sleep(TURN));
    }

    #[test]
    fn as_many_call_at_once_as_there_are_places() {
        let mut r = rig(2);
        assert!(r.enter(10) && r.enter(20));
        assert!(!r.enter(30));
        r.book.leave(20, r.now);
        assert_eq!(r.step(30), Step::Go);
    }

    #[test]
    fn who_calls_without_a_turn_is_adopted_and_then_asked() {
        let mut r = rig(1);
        r.book.adopt(10, "its session", r.now);
        assert!(!r.enter(20));
        r.now += TURN;
        assert_eq!(r.step(20), Step::Ask(10, "its session", GRACE));
    }
}

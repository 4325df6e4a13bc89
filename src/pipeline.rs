//! `Pipeline`: calls to one function in a row, sent without waiting for each other's results.
//!
//! A pipeline is one thread's half of the session's stream (see [`hotcell_channel::stream`]): a call is one record out and one reply back, in the order in which they
//! were sent. Nothing is claimed or given back a call; positions are plain numbers here.
//!
//! **Law.** At most [`PIPELINE_DEPTH`] calls are without a received reply, so a record that is written is one that the worker is done with. What a reply holds is a number from an
//! untrusted process, copied once. A reply is looked for by its turn; anything that is neither it nor what stood there before is a breach.

use crate::call::{Errno, Function, FunctionType, Param, Returned, WithErrno, word_index};
use crate::error::{CallError, FunctionName};
use crate::monitor::lock;
use crate::session::{Block, RemotePtr, SessionInner};
use hotcell_channel::session::{OK, STREAM, STREAM_END};
use hotcell_channel::stream::{self, Barrier, IN_FLIGHT_MAX, RECORD_WORDS, Record, Reply, Stream, Width};
use hotcell_channel::wait::{Spin, Waited};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

/// Most calls that a [`Pipeline`] has sent and not received.
pub const PIPELINE_DEPTH: u64 = IN_FLIGHT_MAX;

/// The stream's books in the host.
#[derive(Debug, Default)]
pub(crate) struct StreamBooks {
    positions: Positions,
    /// The function of all that is in flight.
    label: AtomicU32,
    owner: Mutex<Owner>,
    given_back: Condvar,
}

/// The position of the next call, and of the next reply. Private: nothing that is shared decides where we write. Written by whoever has the stream; read by others who have to know what is
/// in flight.
///
/// They stand in one cache line, and nowhere else, because stores are what a row of calls costs: those to a request wait for its line, and the processor keeps only a few lines waiting at a time,
/// in the order of the program. Each other line that is written between two requests takes one of these places.
#[derive(Debug, Default)]
#[repr(align(16))]
struct Positions {
    sent: AtomicU64,
    received: AtomicU64,
}

#[derive(Debug, Default)]
struct Owner {
    /// A pipeline has the stream, and was taken by this thread.
    taken: Option<ThreadId>,
    /// The stream has its pages.
    committed: bool,
    /// Where the last pipeline's end is in the stream, if nobody has seen yet that the worker has come to it.
    end: Option<u64>,
    /// The last pipeline's.
    width: Option<Width>,
}

impl StreamBooks {
    /// How many requests were sent.
    #[inline(always)]
    pub(crate) fn sent(&self) -> u64 {
        self.positions.sent.load(Acquire)
    }

    /// How many replies were received.
    #[inline(always)]
    fn received(&self) -> u64 {
        self.positions.received.load(Acquire)
    }

    #[inline(always)]
    fn set_sent(&self, sent: u64) {
        self.positions.sent.store(sent, Release);
    }

    #[inline(always)]
    fn set_received(&self, received: u64) {
        self.positions.received.store(received, Release);
    }
}

impl SessionInner {
    /// How many requests of the stream are not over, or were answered and not received.
    pub(crate) fn stream_in_flight(&self) -> u64 {
        self.stream.sent().saturating_sub(self.oldest_of_stream())
    }

    /// The number below which all calls of the stream are over.
    pub(crate) fn oldest_of_stream(&self) -> u64 {
        let sent = self.stream.sent();
        // Replies come in order.
        if sent == 0 || self.region.stream().has_reply(sent - 1) {
            return u64::MAX;
        }
        self.stream.received()
    }

    /// For a dead worker: the function that was running out of the stream.
    pub(crate) fn running_in_stream(&self) -> Option<FunctionName> {
        let (taken, sent) = (self.region.progress().stream_taken(), self.stream.sent());
        // The worker's counter may be anything.
        let last = taken.checked_sub(1).filter(|last| *last < sent && sent - last <= IN_FLIGHT_MAX + 1)?;
        let running = !self.region.stream().has_reply(last);
        running.then(|| self.label_name(self.stream.label.load(Relaxed)))
    }

    fn stream_wait(
        &self,
        position: u64,
        others: u64,
        barrier: Barrier,
        spin: &Spin,
        timeout: Duration,
    ) -> Waited {
        let region = &self.region;
        stream::wait_reply(
            region.stream(),
            region.sleepers(),
            position,
            others,
            barrier,
            spin,
            region.bell(),
            region.progress(),
            timeout,
            || self.has_live_worker(),
        )
    }

    /// The error of a call of the stream that got no reply.
    #[cold]
    fn stream_lost(&self, waited: Waited, position: u64, name: &FunctionName, after: Duration) -> CallError {
        match waited {
            Waited::TimedOut => {
                let worker_killed = self.stream_timed_out(position, name, after);
                return CallError::TimedOut { function: name.clone(), after, worker_killed };
            }
            Waited::Breach(turn) => {
                let what = format!(
                    "it wrote turn {turn} into the reply to call {position} of the stream, of {name}"
                );
                self.worker.breach(what, Some(self.id()));
            }
            _ if self.is_closed() => return CallError::Closed,
            _ => {}
        }
        self.worker.wait_gone();
        // Exact once the worker is dead.
        self.death_error(Some(name.clone()), position < self.region.progress().stream_taken())
    }
}

/// A reply of the stream, with its session.
#[derive(Debug)]
pub struct StreamReply<'s> {
    reply: &'s Reply,
    session: &'s SessionInner,
}

mod sealed {
    pub trait Sealed {}
}
use sealed::Sealed;

/// An argument type that is one word, as calls through a [`Pipeline`] take them: the integer and float types, `bool`, [`RemotePtr`], [`Block`] and `Option<Block>`.
#[diagnostic::on_unimplemented(
    message = "a pipeline cannot pass `{Self}`",
    label = "not one word",
    note = "bytes and strings go through a pipeline in a `Block`, which stays where it is, or by `Function::submit`"
)]
pub trait WordParam: Param + Sealed {}

/// A result type that is one word, as calls through a [`Pipeline`] give them: `()`, the integer and float types, `bool`, [`RemotePtr`], and [`WithErrno`] of these.
#[diagnostic::on_unimplemented(
    message = "a pipeline cannot give `{Self}`",
    label = "not one word",
    note = "a returned string comes through `Function::call` and `Function::submit`"
)]
pub trait WordReturned: Returned + Sealed {
    #[doc(hidden)]
    #[inline(always)]
    fn value(reply: &StreamReply<'_>) -> Self::Output {
        Self::from_word(reply.reply.word(), reply.session)
    }
}

macro_rules! words {
    ($($t:ident)+) => {$(
        impl Sealed for $t {}
        impl WordParam for $t {}
        impl WordReturned for $t {}
    )+};
}
words! { i8 i16 i32 i64 isize u8 u16 u32 u64 usize bool f32 f64 RemotePtr }
impl Sealed for () {}
impl WordReturned for () {}
impl Sealed for Block {}
impl WordParam for Block {}
impl Sealed for Option<Block> {}
impl WordParam for Option<Block> {}

impl<R> Sealed for WithErrno<R> {}
impl<R: WordReturned> WordReturned for WithErrno<R> {
    #[inline(always)]
    fn value(reply: &StreamReply<'_>) -> Self::Output {
        (R::value(reply), Errno(reply.reply.errno()))
    }
}

/// A function type that a [`Pipeline`] can call: `fn(A, B) -> R` with up to seven arguments, each a [`WordParam`], and `R` a [`WordReturned`].
pub trait Pipelined: FunctionType + Sealed {
    /// Writes the words to the record that `record` gives, which is called when all of them are known.
    #[doc(hidden)]
    fn encode_words<'r>(
        values: Self::Values<'_>,
        session: &SessionInner,
        name: &FunctionName,
        record: impl FnOnce() -> Record<'r>,
    ) -> Result<(), CallError>;
    #[doc(hidden)]
    const WIDTH: Width;
    #[doc(hidden)]
    fn decode_word(reply: &StreamReply<'_>) -> Self::Output;
}

impl<F: Pipelined> Function<F> {
    /// Takes the session's pipeline for calls to this function in a row. A session has one: if another one is in use this waits for its end, at most the function's timeout (so a
    /// thread that has one and asks for a second waits in vain; it may want a session for each).
    ///
    /// The first pipeline of a process registers it with the kernel for `membarrier`, which may take some milliseconds.
    ///
    /// # Errors
    /// [`CallError::PipelineUnsupported`] in a session with a memory limit of its own, [`CallError::PipelineTaken`] if another one is in use for so long, [`CallError::NoRoom`] if there is no memory for the stream (20 KiB), and those of any call:
    /// what the last pipeline has left in flight is waited for, within one timeout for all of it.
    pub fn pipeline(&self) -> Result<Pipeline<F>, CallError> {
        let function = self.clone();
        let session = &*function.session;
        if session.is_forked() {
            return Err(CallError::Forked); // the lock may be held for ever, by a thread that was not forked
        }
        if session.options.limits.memory_bytes.is_some() {
            return Err(CallError::PipelineUnsupported {
                function: FunctionName::clone(&function.target.name),
            });
        }
        take(session, function.target.timeout, &function.target.name)?;
        // From here on dropping the pipeline gives the stream back.
        let spin = Spin::new(session.options.wait_policy());
        let mut pipeline = Pipeline { function, barrier: Barrier::Fence, spin, on: false };
        pipeline.start()?;
        Ok(pipeline)
    }
}

/// Takes the stream for a pipeline.
fn take(session: &SessionInner, timeout: Duration, name: &FunctionName) -> Result<(), CallError> {
    let start = Instant::now();
    let here = std::thread::current().id();
    let mut owner = lock(&session.stream.owner);
    // No error at once: the other one may have been moved to a thread that is about to drop it.
    if owner.taken == Some(here) {
        tracing::warn!(function = %name, "this thread has taken a pipeline of the session already, and waits in vain unless another one drops that");
    }
    loop {
        if !session.is_open() {
            session.refuse(&|| name.clone())?;
        }
        let Some(holder) = owner.taken else {
            owner.taken = Some(here);
            return Ok(());
        };
        let left = timeout.saturating_sub(start.elapsed());
        if left.is_zero() {
            let by_this_thread = holder == here;
            return Err(CallError::PipelineTaken { function: name.clone(), after: timeout, by_this_thread });
        }
        // A session that dies tells nobody here.
        let slice = left.min(hotcell_channel::wait::SLICE);
        owner =
            session.stream.given_back.wait_timeout(owner, slice).unwrap_or_else(PoisonError::into_inner).0;
    }
}

/// Calls to one function in a row: each [`send`](Pipeline::send) hands a call over without waiting, [`receive`](Pipeline::receive) gives the results in the order in
/// which the calls were sent. The cheapest way to make many calls: some 25 ns each on near cores and 75 on far
/// ones, where a call by itself takes 80 and 350. Functions of up to three arguments are the cheapest: two of their requests share a cache line.
///
/// The worker makes the calls one after the other, on the session's thread, beside the calls that come in other ways; among these there is no order. A pipeline belongs
/// to one thread at a time (it can be moved). Made by [`Function::pipeline`]; a session has one at a time. What a result holds is input from an untrusted process, as everywhere.
///
/// Dropping it with calls in flight forgets their results; the calls run all the same, and the session's next pipeline waits until they have. A
/// [`Block`] that is dropped while a call may use it stays until that is over.
///
/// ```
/// # fn main() -> Result<(), hotcell::Error> {
/// # let session = hotcell::Worker::spawn()?.session()?;
/// let labs = session.load("libc.so.6")?.function::<fn(i64) -> i64>("labs")?;
/// let mut pipeline = labs.pipeline()?;
/// pipeline.send(-1)?;
/// pipeline.send(-2)?;
/// assert_eq!(pipeline.receive()?, Some(1));
/// assert_eq!(pipeline.receive()?, Some(2));
/// assert_eq!(pipeline.receive()?, None); // nothing is in flight
///
/// // Or all at once: keeps as many in flight as there is room for.
/// let sum = pipeline.calls((0..1000).map(|i| (-i,))).sum::<Result<i64, _>>()?;
/// assert_eq!(sum, 499_500);
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Pipeline<F: Pipelined> {
    function: Function<F>,
    barrier: Barrier,
    spin: Spin,
    /// The worker listens.
    on: bool,
}

impl<F: Pipelined> Pipeline<F> {
    fn start(&mut self) -> Result<(), CallError> {
        let (session, function) = (&*self.function.session, &self.function);
        let name = || FunctionName::clone(&function.target.name);
        let (committed, end, width) = {
            let owner = lock(&session.stream.owner);
            (owner.committed, owner.end, owner.width)
        };
        if !committed {
            session
                .commit_stream()
                .map_err(|source| CallError::NoRoom { function: name(), source: source.into() })?;
            lock(&session.stream.owner).committed = true;
        }
        // Replies come in order: behind the end of the last pipeline there is nothing in flight. One wait, so one deadline.
        if let Some(end) = end {
            if !session.region.stream().has_reply(end) {
                // Whichever barrier was agreed on: a fence beside the other side's barrier is right too, and a sleep is short in any case.
                let waited =
                    session.stream_wait(end, 0, Barrier::available(), &self.spin, function.target.timeout);
                if waited != Waited::Replied {
                    let forgotten = session.label_name(session.stream.label.load(Relaxed));
                    return Err(session.stream_lost(waited, end, &forgotten, function.target.timeout));
                }
            }
            lock(&session.stream.owner).end = None;
        }
        let position = session.stream.sent();
        session.stream.set_received(position);
        if width.is_some_and(|width| width != F::WIDTH) {
            session.region.stream().forget_requests(position, F::WIDTH);
        }
        lock(&session.stream.owner).width = Some(F::WIDTH);
        session.stream.label.store(function.target.label, Relaxed);
        match session.fixed(STREAM, &[position, Barrier::available() as u64, F::WIDTH as u64], "pipeline")? {
            [OK, barrier] => self.barrier = Barrier::from_word(barrier),
            _ => return Err(session.wrong_answer(&session.own_name("pipeline"))),
        }
        self.on = true;
        Ok(())
    }

    /// The function that it calls.
    pub fn function(&self) -> &Function<F> {
        &self.function
    }

    /// How many calls were sent and not received; at most [`PIPELINE_DEPTH`].
    #[inline]
    pub fn in_flight(&self) -> u64 {
        let stream = &self.function.session.stream;
        stream.sent() - stream.received()
    }

    /// Whether [`Pipeline::receive`] would return a result at once. The worker may finish the call at any moment.
    pub fn is_ready(&self) -> bool {
        let session = &self.function.session;
        self.in_flight() != 0
            && !session.is_forked()
            && session.region.stream().has_reply(session.stream.received())
    }

    /// Hands a call to the worker, its arguments as a tuple: what `send` does, for generic code.
    ///
    /// # Errors
    /// [`CallError::Full`] if [`PIPELINE_DEPTH`] calls are in flight: receive some first. Otherwise whatever keeps a call from being sent. A call that gives an error here was not sent and
    /// did not run; those before it are in flight as they were.
    #[inline(always)]
    pub fn send_tuple(&mut self, values: F::Values<'_>) -> Result<(), CallError> {
        let function = &self.function;
        let session = &*function.session;
        if !session.is_open() {
            session.refuse(&|| FunctionName::clone(&function.target.name))?;
        }
        let position = session.stream.sent();
        if position - session.stream.received() >= PIPELINE_DEPTH {
            return Err(full());
        }
        let stream = session.region.stream();
        F::encode_words(values, session, &function.target.name, || {
            // Before it is out, so that what the worker has taken was sent; and before its words, so that all stores to the request come one after the other.
            session.stream.set_sent(position + 1);
            stream.request(position, F::WIDTH)
        })?;
        publish::<F>(session, stream, position, function.target.index, self.barrier);
        Ok(())
    }

    /// The next result, in the order in which the calls were sent; `None` if no call is in flight. Waits for it at most the function's timeout from now.
    ///
    /// # Errors
    /// Those of any call; each is the outcome of the one call whose result was next. When the worker dies each call in flight has an outcome of its own: results that
    /// came before the death are given, then the error of the call that was running, then those of calls that did not run.
    #[inline(always)]
    pub fn receive(&mut self) -> Result<Option<F::Output>, CallError> {
        let session = &*self.function.session;
        let position = session.stream.received();
        if position == session.stream.sent() {
            return Ok(None);
        }
        if session.is_forked() {
            return Err(CallError::Forked);
        }
        let stream = session.region.stream();
        if !stream.has_reply(position) {
            self.wait()?;
        }
        let output = F::decode_word(&StreamReply { reply: stream.reply(position), session });
        session.stream.set_received(position + 1);
        Ok(Some(output))
    }

    #[inline(never)]
    fn wait(&self) -> Result<(), CallError> {
        let (session, function) = (&*self.function.session, &self.function);
        let (position, others) = (session.stream.received(), self.in_flight());
        match session.stream_wait(position, others, self.barrier, &self.spin, function.target.timeout) {
            Waited::Replied => Ok(()),
            waited => {
                let error =
                    session.stream_lost(waited, position, &function.target.name, function.target.timeout);
                // This call has its outcome; the next one is the next.
                session.stream.set_received(position + 1);
                Err(error)
            }
        }
    }

    /// Makes a call with each tuple of arguments that `arguments` gives and iterates over the results, with as many calls in flight as there is room for. Calls that are in flight already come
    /// first.
    ///
    /// If a call cannot be sent no further arguments are taken: the outcomes of those in flight come first, then the error, then the end. What is in flight when the iterator is dropped
    /// stays so.
    pub fn calls<'a, I>(&mut self, arguments: I) -> Calls<'_, F, I::IntoIter>
    where
        I: IntoIterator<Item = F::Values<'a>>,
    {
        Calls { pipeline: self, arguments: Some(arguments.into_iter()), filling: true, error: None }
    }
}

/// Publishes the request at `position`, which is written and counted as sent.
#[inline(always)]
fn publish<F: Pipelined>(
    session: &SessionInner,
    stream: &Stream,
    position: u64,
    function: u32,
    barrier: Barrier,
) {
    stream.publish(position, F::WIDTH, function);
    session.region.sleepers().wake_worker(barrier, session.region.bell());
}

#[cold]
fn foreign(name: &FunctionName) -> CallError {
    CallError::ForeignPointer { function: name.clone() }
}

#[cold]
fn full() -> CallError {
    CallError::Full { slots: u32::try_from(PIPELINE_DEPTH).unwrap_or(u32::MAX) }
}

impl<F: Pipelined> Drop for Pipeline<F> {
    fn drop(&mut self) {
        let session = &*self.function.session;
        if session.is_forked() {
            return; // the lock may be held for ever, by a thread that was not forked
        }
        let mut owner = lock(&session.stream.owner);
        if self.on && session.is_alive() {
            // There is room: one record more than calls can be in flight. The worker stops listening when it comes there.
            let position = session.stream.sent();
            owner.end = Some(position);
            session.stream.set_sent(position + 1);
            publish::<F>(session, session.region.stream(), position, STREAM_END, self.barrier);
        }
        owner.taken = None;
        session.stream.given_back.notify_one();
    }
}

/// Results of many calls: see [`Pipeline::calls`].
#[derive(Debug)]
#[must_use = "the calls are made when the iterator is used"]
pub struct Calls<'p, F: Pipelined, I> {
    pipeline: &'p mut Pipeline<F>,
    arguments: Option<I>,
    /// Sends until there is no room; then receives until half of it is free, so that each side works on many lines before it meets the other.
    filling: bool,
    error: Option<CallError>,
}

impl<'a, F: Pipelined, I: Iterator<Item = F::Values<'a>>> Iterator for Calls<'_, F, I> {
    type Item = Result<F::Output, CallError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.filling || self.pipeline.in_flight() <= PIPELINE_DEPTH / 2 {
            self.fill();
        }
        match self.pipeline.receive().transpose() {
            None => self.error.take().map(Err),
            some => some,
        }
    }
}

impl<'a, F: Pipelined, I: Iterator<Item = F::Values<'a>>> Calls<'_, F, I> {
    #[inline]
    fn fill(&mut self) {
        self.filling = false;
        let Some(arguments) = &mut self.arguments else { return };
        while self.pipeline.in_flight() < PIPELINE_DEPTH {
            let Some(values) = arguments.next() else {
                self.arguments = None;
                return;
            };
            if let Err(error) = self.pipeline.send_tuple(values) {
                self.error = Some(error);
                self.arguments = None;
                return;
            }
        }
    }
}

const _: () = assert!(RECORD_WORDS == 7, "as many arguments as below");

macro_rules! arities {
    ($($count:literal: $($P:ident $p:ident $i:tt),*;)+) => {$(
        impl<R: WordReturned, $($P: WordParam),*> Sealed for fn($($P),*) -> R {}
        impl<R: WordReturned, $($P: WordParam),*> Pipelined for fn($($P),*) -> R {
            const WIDTH: Width = Width::of($count);
            #[inline(always)]
            #[allow(unused_variables)]
            fn encode_words<'r>(
                values: Self::Values<'_>,
                session: &SessionInner,
                name: &FunctionName,
                record: impl FnOnce() -> Record<'r>,
            ) -> Result<(), CallError> {
                $(let $p = <$P as Param>::word(&values.$i, session).ok_or_else(|| foreign(name))?;)*
                let record = record();
                $(record.set_word(const { word_index(<Self as FunctionType>::TYPES, $i) }, $p);)*
                Ok(())
            }

            #[inline(always)]
            fn decode_word(reply: &StreamReply<'_>) -> Self::Output {
                R::value(reply)
            }
        }

        impl<R: WordReturned, $($P: WordParam),*> Pipeline<fn($($P),*) -> R> {
            /// Hands a call to the worker and returns at once.
            ///
            /// # Errors
            /// See [`Pipeline::send_tuple`].
            #[inline(always)]
            #[allow(clippy::too_many_arguments, clippy::extra_unused_lifetimes)]
            pub fn send<'a>(&mut self, $($p: $P::Value<'a>),*) -> Result<(), CallError> {
                self.send_tuple(($($p,)*))
            }
        }
    )+};
}
arities! {
    0: ;
    1: A a 0;
    2: A a 0, B b 1;
    3: A a 0, B b 1, C c 2;
    4: A a 0, B b 1, C c 2, D d 3;
    5: A a 0, B b 1, C c 2, D d 3, E e 4;
    6: A a 0, B b 1, C c 2, D d 3, E e 4, F f 5;
    7: A a 0, B b 1, C c 2, D d 3, E e 4, F f 5, G g 6;
}

//! The handles through which a pool is called, and what becomes of a call that fails: which worker it may be made on again, and how often.
//!
//! A call is *redirected* if its worker was replaced between being chosen and being given the call: that is nobody's failure. It is *retried* if it failed and the policy
//! allows it. Whatever happens, the error that a caller gets says that the function may have run if it may have run in any of the attempts.

use super::PoolOwner;
use super::keeper::{FunctionKey, Shared, is_forked};
use super::roster::{Member, Placement, Seat};
use crate::call::{Failed, Function, FunctionType, Param, Returned, Ticket};
use crate::dynamic::{Arg, DynFunction, IntoArgs, Value};
use crate::error::{CallError, FunctionName, LoadError};
use crate::module::Module;
use crate::session::check_timeout;
use crate::signature;
use crate::supervisor::retry::Retry;
use std::any::TypeId;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

/// Redirects of one call before it is given up: each needs a worker that was replaced in that very moment.
const REDIRECTS_MAX: u32 = 64;

/// A call or a ticket that a member has.
#[derive(Debug)]
struct Entered<'m>(&'m Member);

impl Drop for Entered<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, SeqCst);
    }
}

impl Member {
    /// Begins a call, unless the member is leaving. Count first, then look: whoever makes a member leave does it the other way round, so one of the two sees the other. SYNC leaving
    #[inline(always)]
    fn enter(&self) -> Option<Entered<'_>> {
        self.in_flight.fetch_add(1, SeqCst);
        let entered = Entered(self);
        (!self.leaving.load(SeqCst)).then_some(entered)
    }
}

/// What is the same for all attempts of one call.
#[derive(Clone, Copy)]
struct Call<'f> {
    name: &'f FunctionName,
    placement: Placement,
    retry: Retry,
}

impl Shared {
    /// Makes a call on the worker that the placement chooses.
    #[inline(always)]
    fn run<V, O>(
        &self,
        call: Call<'_>,
        values: V,
        attempt: impl Fn(&Seat, V) -> Result<O, Failed<V>>,
    ) -> Result<O, CallError> {
        let roster = self.roster.load();
        let Some(seat) = roster.pick(call.placement) else {
            drop(roster);
            return self.run_elsewhere(call, values, attempt);
        };
        match self.run_on(seat, values, &attempt) {
            Ok(output) => Ok(output),
            Err(failed) => {
                let seat = seat.clone();
                drop(roster);
                self.run_again(call, seat, failed, attempt)
            }
        }
    }

    #[inline(always)]
    fn run_on<V, O>(
        &self,
        seat: &Seat,
        values: V,
        attempt: &impl Fn(&Seat, V) -> Result<O, Failed<V>>,
    ) -> Result<O, Failed<V>> {
        let member = &*seat.member;
        let Some(_entered) = member.enter() else {
            return Err(Failed { error: CallError::Closed, values: Some(values) });
        };
        let result = attempt(seat, values);
        self.spend(member, 1);
        result
    }

    /// Notes calls that a member was given, if they are counted at all.
    #[inline(always)]
    fn spend(&self, member: &Member, calls: i64) {
        if self.config.recycling.calls.is_some() && member.spend(calls) {
            self.worn_out(member);
        }
    }

    /// A call for which no worker was there.
    #[cold]
    fn run_elsewhere<V, O>(
        &self,
        call: Call<'_>,
        values: V,
        attempt: impl Fn(&Seat, V) -> Result<O, Failed<V>>,
    ) -> Result<O, CallError> {
        let seat = match self.wait_for_seat(call.placement, call.name) {
            Ok(seat) => seat,
            Err(error) => {
                self.count_error(&error);
                return Err(error);
            }
        };
        match self.run_on(&seat, values, &attempt) {
            Ok(output) => Ok(output),
            Err(failed) => self.run_again(call, seat, failed, attempt),
        }
    }

    /// What becomes of a call that has failed.
    #[cold]
    fn run_again<V, O>(
        &self,
        call: Call<'_>,
        mut seat: Seat,
        mut failed: Failed<V>,
        attempt: impl Fn(&Seat, V) -> Result<O, Failed<V>>,
    ) -> Result<O, CallError> {
        let (mut retries, mut redirects) = (0, 0);
        // The first error after which the function may have run: it is what the caller gets if nothing better comes.
        let mut may_have_run = None;
        let error = loop {
            let Failed { error, values } = failed;
            let replaced = matches!(error, CallError::Closed) && seat.member.leaving.load(SeqCst);
            self.failed(&seat.member, &error);
            let Some(values) = values else { break error };
            if replaced && redirects < REDIRECTS_MAX {
                redirects += 1;
                self.count_redirect();
            } else if call.retry.allows(retries, &error) {
                retries += 1;
                self.count_retry();
            } else {
                break error;
            }
            if error.may_have_run() {
                may_have_run.get_or_insert(error);
            }
            seat = match self.wait_for_seat(call.placement, call.name) {
                Ok(seat) => seat,
                Err(error) => break error,
            };
            match self.run_on(&seat, values, &attempt) {
                Ok(output) => return Ok(output),
                Err(again) => failed = again,
            }
        };
        let error = may_have_run.filter(|_| !error.may_have_run()).unwrap_or(error);
        self.count_error(&error);
        Err(error)
    }
}

/// A function of a [`Pool`](crate::Pool): each call goes to one of its workers. Any number of threads may call it.
///
/// A thread's calls go to one worker, the same each time, as long as that is idle, and otherwise to the one with the fewest calls in flight. [`PoolFunction::sticky`] chooses by a key
/// instead. A handle for one thread that costs as much as a [`Function`](crate::Function) is a [`PoolCaller`].
///
/// What is said of signatures and results of a [`Function`](crate::Function) holds here. Pointers and blocks belong to one session, so functions that take or give them are not for a pool: another
/// worker refuses them with [`CallError::ForeignPointer`].
///
/// Handles can be cloned and kept; they keep their pool open.
#[derive(Debug)]
pub struct PoolFunction<F: FunctionType> {
    owner: Arc<PoolOwner>,
    index: usize,
    name: Arc<FunctionName>,
    placement: Placement,
    retry: Retry,
    /// If it is not the one that all functions of the pool have.
    timeout: Option<Duration>,
    _type: std::marker::PhantomData<F>,
}

impl<F: FunctionType> Clone for PoolFunction<F> {
    fn clone(&self) -> Self {
        Self { owner: Arc::clone(&self.owner), name: Arc::clone(&self.name), _type: self._type, ..*self }
    }
}

fn sticky(key: impl Hash) -> Placement {
    let mut hasher = rustc_hash::FxHasher::default();
    key.hash(&mut hasher);
    // Its upper bits are the better ones.
    Placement::Sticky(usize::try_from(hasher.finish() >> 32).unwrap_or(0))
}

impl<F: FunctionType + Send + Sync + 'static> PoolFunction<F> {
    pub(super) fn new(
        owner: &Arc<PoolOwner>,
        symbol: &str,
        variadic_after: Option<u8>,
    ) -> Result<Self, LoadError> {
        let key = FunctionKey {
            symbol: symbol.into(),
            handle: TypeId::of::<Function<F>>(),
            signature: None,
            variadic_after,
        };
        let symbol = symbol.to_owned();
        let resolve = move |module: &Module| {
            Ok(Arc::new(Function::<F>::resolve(module, &symbol, variadic_after)?) as _)
        };
        let name = owner.shared.pool_name(&key.symbol);
        let index = owner.shared.register(key, Arc::new(resolve))?;
        Ok(Self {
            owner: Arc::clone(owner),
            index,
            name: Arc::new(name),
            placement: Placement::LeastLoaded,
            retry: owner.shared.config.retry,
            timeout: None,
            _type: std::marker::PhantomData,
        })
    }

    /// The same function with another timeout for each attempt of a call. The handle can be kept.
    ///
    /// # Errors
    /// [`CallError::ZeroTimeout`].
    pub fn with_timeout(&self, timeout: Duration) -> Result<Self, CallError> {
        check_timeout(timeout, &self.name)?;
        Ok(Self { timeout: Some(timeout), ..self.clone() })
    }

    /// The same function, declared to do no harm if it runs twice: a call that may have run is made again too if its worker died or its deadline passed, as often as the pool's
    /// [`Retry`](crate::Retry) says. A call that kills its worker may then kill one for each attempt.
    #[must_use]
    pub fn idempotent(&self) -> Self {
        Self { retry: self.retry.idempotent(), ..self.clone() }
    }

    /// The same function, with all calls to one worker, which equal keys have in common: for a module that keeps something in memory that is worth coming back to. While that seat is empty another worker
    /// serves; its successor in the seat knows only what the setup taught it.
    #[must_use]
    pub fn sticky(&self, key: impl Hash) -> Self {
        Self { placement: sticky(key), ..self.clone() }
    }

    /// A handle for one thread, whose calls cost as much as those of a [`Function`](crate::Function): it keeps the function of one worker and looks, with one load, whether that is still the right one.
    /// Handles spread over the seats in turn, or go by the key of a [sticky](PoolFunction::sticky) function.
    pub fn caller(&self) -> PoolCaller<F> {
        let placement = match self.placement {
            Placement::LeastLoaded => Placement::Sticky(self.owner.shared.next_home()),
            sticky => sticky,
        };
        PoolCaller {
            function: Self { placement, ..self.clone() },
            // No roster has this number, so the first call looks for a worker.
            generation: u64::MAX,
            cached: None,
            unspent: 0,
        }
    }

    /// Calls the function with a tuple of values: what `call` does, for generic code.
    ///
    /// # Errors
    /// As `call`.
    #[inline(always)]
    pub fn call_tuple(&self, values: F::Values<'_>) -> Result<F::Output, CallError> {
        self.owner.shared.run(self.to_call(), values, |seat, values| {
            let function = seat.function::<Function<F>>(self.index);
            match self.timeout {
                None => function.attempt(values, || true),
                Some(timeout) => function.within(timeout).attempt(values, || true),
            }
        })
    }

    /// A member's function, with this handle's deadline.
    fn function_of(&self, seat: &Seat) -> Function<F> {
        let function = seat.function::<Function<F>>(self.index);
        self.timeout.map_or_else(|| function.clone(), |timeout| function.within(timeout))
    }

    fn to_call(&self) -> Call<'_> {
        Call { name: &self.name, placement: self.placement, retry: self.retry }
    }

    /// Submits a call with a tuple of values: what `submit` does, for generic code.
    ///
    /// # Errors
    /// As `submit`.
    pub fn submit_tuple<'a>(&self, values: F::Values<'a>) -> Result<PoolTicket<'a, F>, CallError> {
        let shared = &self.owner.shared;
        shared.run(self.to_call(), values, |seat, values| {
            let ticket = self.function_of(seat).attempt_submit(values)?;
            seat.member.in_flight.fetch_add(1, SeqCst);
            Ok(PoolTicket {
                ticket: Some(ticket),
                member: Arc::clone(&seat.member),
                owner: Arc::clone(&self.owner),
            })
        })
    }
}

/// A [`PoolFunction`] for one thread, which keeps the function of one worker at hand. Made by [`PoolFunction::caller`].
///
/// It costs a call what a [`Function`](crate::Function) costs, and a load. It stays with its own seat: when the worker there is replaced it goes on with the successor; while the seat is empty it
/// is the guest of another. Between two calls it may hold on to what the host has of a worker that is gone (descriptors, mappings), but never to the worker.
#[derive(Debug)]
pub struct PoolCaller<F: FunctionType> {
    function: PoolFunction<F>,
    generation: u64,
    cached: Option<(Seat, Function<F>)>,
    /// Calls that the member was not yet told of.
    unspent: i64,
}

impl<F: FunctionType + Send + Sync + 'static> PoolCaller<F> {
    /// Calls the function with a tuple of values: what `call` does, for generic code.
    ///
    /// # Errors
    /// As `call`.
    #[inline(always)]
    pub fn call_tuple(&mut self, values: F::Values<'_>) -> Result<F::Output, CallError> {
        let Some((_, function)) = &self.cached else { return self.call_slowly(values) };
        let (shared, generation) = (&*self.function.owner.shared, self.generation);
        match function.attempt(values, || shared.generation() == generation) {
            Ok(output) => {
                self.unspent += 1;
                if self.unspent >= shared.batch {
                    self.spend();
                }
                Ok(output)
            }
            Err(failed) => self.call_again(failed),
        }
    }

    /// Tells the member of the calls that it was given.
    #[cold]
    fn spend(&mut self) {
        if let Some((seat, _)) = &self.cached {
            self.function.owner.shared.spend(&seat.member, self.unspent);
        }
        self.unspent = 0;
    }

    #[cold]
    #[inline(never)]
    fn call_again(&mut self, failed: Failed<F::Values<'_>>) -> Result<F::Output, CallError> {
        self.spend();
        let shared = &self.function.owner.shared;
        match (failed, self.cached.take()) {
            // The pool has changed since the last call.
            (Failed { error: CallError::Closed, values: Some(values) }, _)
                if shared.generation() != self.generation =>
            {
                self.call_slowly(values)
            }
            (failed, Some((seat, _))) => {
                shared.run_again(self.function.to_call(), seat, failed, |seat, values| {
                    self.function.function_of(seat).attempt(values, || true)
                })
            }
            (Failed { error, .. }, None) => Err(error),
        }
    }

    /// Looks for the worker to keep, and makes this call as a [`PoolFunction`] does.
    #[cold]
    #[inline(never)]
    fn call_slowly(&mut self, values: F::Values<'_>) -> Result<F::Output, CallError> {
        let function = &self.function;
        let shared = &function.owner.shared;
        // In this order: a roster newer than its number is looked at once too often, not once too seldom.
        self.generation = shared.generation();
        let seat = shared.roster.load().pick(function.placement).cloned();
        self.cached = seat.map(|seat| {
            let cached = function.function_of(&seat);
            (seat, cached)
        });
        function.call_tuple(values)
    }
}

impl<F: FunctionType> Drop for PoolCaller<F> {
    fn drop(&mut self) {
        if let Some((seat, _)) = &self.cached
            && !is_forked()
        {
            self.function.owner.shared.spend(&seat.member, self.unspent);
        }
    }
}

/// A call that was handed to a worker of a pool and not yet waited for. Dropping it forgets the result; the function runs all the same.
///
/// A worker that is replaced meanwhile finishes it, if it is waited for within [`PoolBuilder::drain_timeout`](crate::PoolBuilder::drain_timeout). A ticket's call is not made again.
#[must_use = "a ticket that is dropped loses its result"]
#[derive(Debug)]
pub struct PoolTicket<'a, F: FunctionType> {
    ticket: Option<Ticket<'a, F>>,
    member: Arc<Member>,
    owner: Arc<PoolOwner>,
}

impl<F: FunctionType> PoolTicket<'_, F> {
    /// Whether [`PoolTicket::wait`] would return at once. The worker may finish the call at any moment.
    pub fn is_done(&self) -> bool {
        self.ticket.as_ref().is_none_or(Ticket::is_done)
    }

    /// Waits for the result, at most the function's timeout from now.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn wait(mut self) -> Result<F::Output, CallError> {
        let Some(ticket) = self.ticket.take() else { return Err(CallError::Closed) };
        let result = ticket.wait();
        let shared = &self.owner.shared;
        if let Err(error) = &result {
            shared.failed(&self.member, error);
            shared.count_error(error);
        }
        result
    }
}

impl<F: FunctionType> Drop for PoolTicket<'_, F> {
    fn drop(&mut self) {
        // Its slot first: who sees that nothing is in flight may close the session.
        self.ticket = None;
        drop(Entered(&self.member));
    }
}

/// A function of a [`Pool`](crate::Pool) whose signature is known at run time, called with arguments that are checked when the call is made. Otherwise as [`PoolFunction`].
#[derive(Clone, Debug)]
pub struct PoolDynFunction {
    owner: Arc<PoolOwner>,
    index: usize,
    name: Arc<FunctionName>,
    placement: Placement,
    retry: Retry,
}

impl PoolDynFunction {
    pub(super) fn new(owner: &Arc<PoolOwner>, prototype: &str) -> Result<Self, LoadError> {
        let shared = &owner.shared;
        let (symbol, signature) = signature::parse_c(prototype)
            .map_err(|source| LoadError::Signature { module: shared.pool_name("").module, source })?;
        let key = FunctionKey {
            symbol: symbol.clone(),
            handle: TypeId::of::<DynFunction>(),
            signature: Some(signature.clone()),
            variadic_after: None,
        };
        let name = Arc::new(shared.pool_name(&symbol));
        let resolve = move |module: &Module| Ok(Arc::new(module.dynamic(&symbol, signature.clone())?) as _);
        let index = shared.register(key, Arc::new(resolve))?;
        let retry = shared.config.retry;
        Ok(Self { owner: Arc::clone(owner), index, name, placement: Placement::LeastLoaded, retry })
    }

    /// As [`PoolFunction::idempotent`].
    #[must_use]
    pub fn idempotent(&self) -> Self {
        Self { retry: self.retry.idempotent(), ..self.clone() }
    }

    /// As [`PoolFunction::sticky`].
    #[must_use]
    pub fn sticky(&self, key: impl Hash) -> Self {
        Self { placement: sticky(key), ..self.clone() }
    }

    /// Calls the function on one of the workers and waits for its result.
    ///
    /// # Errors
    /// [`CallError::WrongCount`] and [`CallError::WrongArgument`] before anything is sent, [`CallError::NoWorker`], and see [`CallError`].
    pub fn call<'a>(&self, args: impl IntoArgs<'a>) -> Result<Value, CallError> {
        let call = Call { name: &self.name, placement: self.placement, retry: self.retry };
        args.with(|args| {
            self.owner.shared.run(call, args, |seat, args: &mut [Arg<'a>]| {
                let function = seat.function::<DynFunction>(self.index);
                function.call_slice(args).map_err(|error| Failed { error, values: Some(args) })
            })
        })
    }
}

macro_rules! arities {
    ($($($P:ident $p:ident),*;)+) => {$(
        impl<R: Returned + 'static, $($P: Param + 'static),*> PoolFunction<fn($($P),*) -> R> {
            /// Calls the function on one of the workers and waits for its result. A call that fails may be made again on another worker: see [`PoolBuilder::retry`](crate::PoolBuilder::retry).
            ///
            /// # Errors
            /// [`CallError::NoWorker`] if there is no worker, and see [`CallError`], which says whether the function may have run, in any of the attempts.
            #[inline]
            #[allow(clippy::too_many_arguments, clippy::extra_unused_lifetimes)]
            pub fn call<'a>(&self, $($p: $P::Value<'a>),*) -> Result<R::Output, CallError> {
                self.call_tuple(($($p,)*))
            }

            /// Hands the call to one of the workers and returns a ticket for its result. If all slots of its session are taken, waits for one, at most the function's timeout. A call that could not be
            /// sent may be sent to another worker; one that was sent is not made again.
            ///
            /// # Errors
            /// [`CallError::Full`] if no slot became free in time, [`CallError::NoWorker`], and whatever keeps a call from being sent.
            #[allow(clippy::too_many_arguments)]
            pub fn submit<'a>(&self, $($p: $P::Value<'a>),*) -> Result<PoolTicket<'a, fn($($P),*) -> R>, CallError> {
                self.submit_tuple(($($p,)*))
            }
        }

        impl<R: Returned + 'static, $($P: Param + 'static),*> PoolCaller<fn($($P),*) -> R> {
            /// Calls the function on this handle's worker and waits for its result.
            ///
            /// # Errors
            /// As [`PoolFunction`]'s.
            #[inline]
            #[allow(clippy::too_many_arguments, clippy::extra_unused_lifetimes)]
            pub fn call<'a>(&mut self, $($p: $P::Value<'a>),*) -> Result<R::Output, CallError> {
                self.call_tuple(($($p,)*))
            }
        }
    )+};
}
arities! {
    ;
    A a;
    A a, B b;
    A a, B b, C c;
    A a, B b, C c, D d;
    A a, B b, C c, D d, E e;
    A a, B b, C c, D d, E e, F f;
    A a, B b, C c, D d, E e, F f, G g;
    A a, B b, C c, D d, E e, F f, G g, H h;
    A a, B b, C c, D d, E e, F f, G g, H h, I i;
    A a, B b, C c, D d, E e, F f, G g, H h, I i, J j;
    A a, B b, C c, D d, E e, F f, G g, H h, I i, J j, K k;
    A a, B b, C c, D d, E e, F f, G g, H h, I i, J j, K k, L l;
}

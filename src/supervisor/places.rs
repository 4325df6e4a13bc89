//! Who has a place, and who waits for one: the session limits as plain data.
//!
//! A request needs room under every limit that applies to it. Requests are looked at in the order of their arrival, and each that has room gets its place. So nobody is passed by
//! a later one that needs the same room, while a tenant that has used up its own limit holds up nobody else.

use crate::error::{LimitScope, StartError};
use rustc_hash::FxHashMap;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

/// Which worker serves a session.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Key {
    /// The one for all.
    Shared,
    /// The one of a tenant.
    Tenant(Arc<str>),
    /// One of its own; the number of its place.
    Own(u64),
    /// The caller's; the worker's number.
    Given(u64),
}

impl Key {
    /// Whether the supervisor keeps this worker, and replaces it after its end.
    pub(crate) fn is_replaced(&self) -> bool {
        matches!(self, Key::Shared | Key::Tenant(_))
    }
}

/// How many sessions there may be. `None`: as many as the system bears.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Limits {
    pub(crate) worker: Option<u32>,
    pub(crate) tenant: Option<u32>,
    pub(crate) supervisor: Option<u32>,
}

/// What a session needs room in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Want {
    /// `None`: a worker of its own.
    pub(crate) worker: Option<Key>,
    pub(crate) tenant: Option<Arc<str>>,
}

/// Why there is no place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Full {
    pub(crate) scope: LimitScope,
    pub(crate) open: u32,
    pub(crate) max: u32,
}

impl Full {
    pub(crate) fn error(self, waited: Option<Duration>) -> StartError {
        StartError::SessionLimit { scope: self.scope, open: self.open, max: self.max, waited }
    }
}

/// The places of one supervisor.
#[derive(Debug, Default)]
pub(crate) struct Places {
    limits: Limits,
    next: u64,
    taken: FxHashMap<u64, Want>,
    workers: FxHashMap<Key, u32>,
    tenants: FxHashMap<Arc<str>, u32>,
    waiting: VecDeque<(u64, Want)>,
}

impl Places {
    pub(crate) fn new(limits: Limits) -> Self {
        Self { limits, ..Self::default() }
    }

    /// How many are taken.
    pub(crate) fn taken(&self) -> usize {
        self.taken.len()
    }

    /// How many requests wait.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// How many are taken on one worker.
    pub(crate) fn on_worker(&self, key: &Key) -> u32 {
        self.workers.get(key).copied().unwrap_or(0)
    }

    /// Asks for a place. It may be there at once: see [`Places::is_taken`].
    pub(crate) fn request(&mut self, want: Want) -> u64 {
        self.next += 1;
        self.waiting.push_back((self.next, want));
        self.grant();
        self.next
    }

    /// Whether the request has its place.
    pub(crate) fn is_taken(&self, id: u64) -> bool {
        self.taken.contains_key(&id)
    }

    /// Takes a request back. Gives what it waited for; `None` if it has its place, which it keeps.
    pub(crate) fn give_up(&mut self, id: u64) -> Option<Full> {
        let at = self.waiting.iter().position(|(waiting, _)| *waiting == id)?;
        let (_, want) = self.waiting.remove(at)?;
        // What it waited for. Full, or it would have its place.
        let full = self.full(&want);
        self.grant();
        full
    }

    /// Gives a place back. False if it was not taken any more.
    pub(crate) fn release(&mut self, id: u64) -> bool {
        let Some(want) = self.taken.remove(&id) else { return false };
        fn one_less<K: std::hash::Hash + Eq>(counts: &mut FxHashMap<K, u32>, key: &K) {
            if let Some(count) = counts.get_mut(key) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(key);
                }
            }
        }
        if let Some(worker) = &want.worker {
            one_less(&mut self.workers, worker);
        }
        if let Some(tenant) = &want.tenant {
            one_less(&mut self.tenants, tenant);
        }
        self.grant();
        true
    }

    /// Gives places to all who wait and have room, in the order of their arrival.
    fn grant(&mut self) {
        let mut at = 0;
        while let Some((_, want)) = self.waiting.get(at) {
            if self.full(want).is_some() {
                at += 1;
                continue;
            }
            let Some((id, want)) = self.waiting.remove(at) else { return };
            if let Some(worker) = &want.worker {
                *self.workers.entry(worker.clone()).or_default() += 1;
            }
            if let Some(tenant) = &want.tenant {
                *self.tenants.entry(Arc::clone(tenant)).or_default() += 1;
            }
            self.taken.insert(id, want);
        }
    }

    /// The limit that leaves no room.
    fn full(&self, want: &Want) -> Option<Full> {
        let worker = want.worker.as_ref().map(|worker| self.on_worker(worker));
        let tenant = want.tenant.as_ref().map(|tenant| self.tenants.get(tenant).copied().unwrap_or(0));
        let all = u32::try_from(self.taken.len()).unwrap_or(u32::MAX);
        let check = |open: Option<u32>, max: Option<u32>, scope: &dyn Fn() -> LimitScope| match (open, max) {
            (Some(open), Some(max)) if open >= max => Some(Full { scope: scope(), open, max }),
            _ => None,
        };
        let named = || LimitScope::Tenant(want.tenant.clone().unwrap_or_else(|| "".into()));
        check(tenant, self.limits.tenant, &named)
            .or_else(|| check(worker, self.limits.worker, &|| LimitScope::Worker))
            .or_else(|| check(Some(all), self.limits.supervisor, &|| LimitScope::Supervisor))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(worker: u32, tenant: u32, supervisor: u32) -> Places {
        let limit = |max| (max > 0).then_some(max);
        Places::new(Limits { worker: limit(worker), tenant: limit(tenant), supervisor: limit(supervisor) })
    }

    fn on(worker: u64) -> Want {
        Want { worker: Some(Key::Given(worker)), tenant: None }
    }

    fn of(tenant: &str) -> Want {
        Want { worker: Some(Key::Tenant(tenant.into())), tenant: Some(tenant.into()) }
    }

    #[test]
    fn without_limits_everybody_has_a_place() {
        let mut places = limits(0, 0, 0);
        for _ in 0..1000 {
            let id = places.request(on(1));
            assert!(places.is_taken(id));
        }
        assert_eq!((places.taken(), places.on_worker(&Key::Given(1))), (1000, 1000));
    }

    #[test]
    fn each_limit_tells_itself() {
        for (mut places, want, scope) in [
            (limits(1, 0, 0), on(1), LimitScope::Worker),
            (limits(0, 1, 0), of("a"), LimitScope::Tenant("a".into())),
            (limits(0, 0, 1), on(1), LimitScope::Supervisor),
        ] {
            let first = places.request(want.clone());
            let second = places.request(want);
            assert!(places.is_taken(first) && !places.is_taken(second));
            assert_eq!(places.give_up(first), None, "it has its place");
            assert_eq!(places.give_up(second), Some(Full { scope, open: 1, max: 1 }));
        }
    }

    #[test]
    fn a_place_given_back_goes_to_who_waits_longest() {
        let mut places = limits(0, 0, 1);
        let ids: Vec<_> = (0..4).map(|_| places.request(on(1))).collect();
        for pair in ids.windows(2) {
            assert!(places.is_taken(pair[0]) && !places.is_taken(pair[1]));
            assert!(places.release(pair[0]) && !places.release(pair[0]));
        }
        assert!(places.release(ids[3]));
        assert_eq!((places.taken(), places.waiting(), places.workers.len()), (0, 0, 0));
    }

    #[test]
    fn who_gives_up_leaves_no_hole() {
        let mut places = limits(0, 0, 1);
        let [first, second, third] = [(); 3].map(|()| places.request(on(1)));
        assert!(places.give_up(second).is_some());
        places.release(first);
        assert!(places.is_taken(third) && !places.is_taken(second));
        assert!(!places.release(second));
    }

    #[test]
    fn a_full_tenant_holds_up_nobody_else() {
        let mut places = limits(0, 1, 3);
        let first = places.request(of("a"));
        let second = places.request(of("a"));
        let other = places.request(of("b"));
        assert!(places.is_taken(first) && !places.is_taken(second) && places.is_taken(other));
        places.release(first);
        assert!(places.is_taken(second));
    }

    #[test]
    fn who_waits_is_not_passed_by_a_later_one_that_needs_the_same_room() {
        let mut places = limits(0, 0, 2);
        let [first, _second] = [(); 2].map(|()| places.request(of("a")));
        let waits = places.request(of("a"));
        let later = places.request(of("b"));
        places.release(first);
        assert!(places.is_taken(waits) && !places.is_taken(later));
    }

    /// Against a naive model: after each step, nobody waits who has room, and the counts are what is taken.
    #[test]
    fn whatever_happens_counts_agree_and_nobody_waits_in_vain() {
        let mut random = fastrand::Rng::with_seed(7);
        let mut places = limits(3, 2, 5);
        let mut ids = Vec::new();
        for _ in 0..20_000 {
            match random.u8(0..4) {
                0 | 1 => {
                    let tenant: Arc<str> = ["a", "b", "c", "d"][random.usize(0..4)].into();
                    let worker = [Key::Shared, Key::Tenant(Arc::clone(&tenant))][random.usize(0..2)].clone();
                    ids.push(places.request(Want { worker: Some(worker), tenant: Some(tenant) }));
                }
                2 if !ids.is_empty() => {
                    places.release(ids[random.usize(0..ids.len())]);
                }
                _ if !ids.is_empty() => {
                    let id = ids.swap_remove(random.usize(0..ids.len()));
                    if places.give_up(id).is_none() {
                        places.release(id);
                    }
                }
                _ => {}
            }
            assert!(places.taken() <= 5);
            assert!(places.workers.values().all(|count| (1..=3).contains(count)));
            assert!(places.tenants.values().all(|count| (1..=2).contains(count)));
            assert_eq!(places.workers.values().sum::<u32>() as usize, places.taken());
            assert_eq!(places.tenants.values().sum::<u32>() as usize, places.taken());
            assert!(places.waiting.iter().all(|(_, want)| places.full(want).is_some()));
            assert!(places.waiting.iter().is_sorted_by_key(|(id, _)| *id));
            if places.waiting() > 50 {
                while let Some(id) = ids.pop() {
                    if places.give_up(id).is_none() {
                        places.release(id);
                    }
                }
            }
        }
    }
}

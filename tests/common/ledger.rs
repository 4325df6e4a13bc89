//! A ledger in a file, which workers keep and which survives them: one byte for each call, raised when the call runs. What the host was told of its calls is compared with it.
#![allow(dead_code)] // each test binary uses a part

use std::path::Path;

/// The library: [`mixed`] in C, and a function on bytes; both note in the ledger that a call has run.
pub(crate) const FIXTURE: &str = r#"
#include <fcntl.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

static uint8_t *ledger;
static uint64_t entries;

int open_ledger(const char *path, uint64_t count) {
  int fd = open(path, O_RDWR);
  if (fd < 0) return -1;
  ledger = mmap(0, count, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  entries = count;
  close(fd);
  return ledger == MAP_FAILED ? -2 : 0;
}

static void enter(uint64_t call) { if (call < entries) ledger[call]++; }

uint64_t mix(uint64_t call, uint64_t x) {
  enter(call);
  x ^= call * 0x9e3779b97f4a7c15u;
  return (x ^ x >> 29) * 0xbf58476d1ce4e5b9u;
}

/* Adds to each byte; gives the sum of what was there. */
uint64_t raise_by(uint64_t call, uint8_t *bytes, uint64_t count, uint8_t by) {
  enter(call);
  uint64_t sum = 0;
  for (uint64_t i = 0; i < count; i++) { sum += bytes[i]; bytes[i] += by; }
  return sum;
}
"#;

/// What `mix` gives.
pub(crate) fn mixed(call: u64, x: u64) -> u64 {
    let x = x ^ call.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (x ^ (x >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

/// What the host was told of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    Ran,
    MayHaveRun,
    DidNotRun,
}

/// What one thread was told of its calls, which have consecutive entries.
#[derive(Debug)]
pub(crate) struct Booked {
    /// The entry of its first call.
    pub(crate) first: u64,
    /// How often a call may have run: more than once only where it may be made again after it may have run.
    pub(crate) times_max: u32,
    pub(crate) told: Vec<Told>,
}

/// Compares what the host was told with what ran.
pub(crate) fn check(ledger: &Path, threads: &[Booked]) {
    let entries = std::fs::read(ledger).unwrap();
    let mut booked = 0;
    for Booked { first, times_max, told } in threads {
        for (call, told) in (*first..).zip(told) {
            let times = u32::from(entries[usize::try_from(call).unwrap()]);
            booked += u64::from(times);
            let fits = match told {
                Told::Ran => (1..=*times_max).contains(&times),
                Told::MayHaveRun => times <= *times_max,
                Told::DidNotRun => times == 0,
            };
            assert!(fits, "call {call} ran {times} times, and the host was told that it {told:?}");
        }
    }
    let ran: u64 = entries.iter().map(|times| u64::from(*times)).sum();
    assert_eq!(ran, booked, "something ran that nobody called");
}

//! The clock for single calls: the processor's time-stamp counter where it is steady, else [`Instant`].

use std::time::{Duration, Instant};

const CALIBRATION: Duration = Duration::from_millis(50);
const SAMPLES: usize = 100_000;

pub struct Clock {
    source: Source,
    nanoseconds_per_tick: f64,
    /// What two readings in a row are apart: a mean, for the counter may advance in steps that are longer.
    overhead: f64,
    /// The step in which the readings advance.
    step: u64,
}

enum Source {
    #[cfg(target_arch = "x86_64")]
    TimeStampCounter,
    Instant(Instant),
}

impl Clock {
    pub fn calibrate() -> Self {
        let mut clock = Self { source: Source::best(), nanoseconds_per_tick: 1.0, overhead: 0.0, step: 1 };
        let (start, first) = (Instant::now(), clock.now());
        while start.elapsed() < CALIBRATION {
            std::hint::spin_loop();
        }
        let (elapsed, last) = (start.elapsed(), clock.now());
        clock.nanoseconds_per_tick = elapsed.as_nanos() as f64 / (last - first) as f64;

        let mut gaps: Vec<u64> = (0..SAMPLES)
            .map(|_| {
                let start = clock.now();
                clock.now() - start
            })
            .collect();
        gaps.sort_unstable();
        let usual = &gaps[..SAMPLES / 100 * 99]; // the rest was interrupted
        clock.overhead = usual.iter().sum::<u64>() as f64 / usual.len() as f64;
        clock.step = gaps.into_iter().find(|&gap| gap > 0).unwrap_or(1);
        clock
    }

    /// The time in ticks. Waits for everything before it, so that a call's result is there when the call is timed.
    #[inline(always)]
    pub fn now(&self) -> u64 {
        match &self.source {
            #[cfg(target_arch = "x86_64")]
            Source::TimeStampCounter => time_stamp(),
            Source::Instant(origin) => origin.elapsed().as_nanos() as u64,
        }
    }

    /// Nanoseconds between two readings, without what the reading itself costs.
    pub fn nanoseconds(&self, ticks: u64) -> f64 {
        (ticks as f64 - self.overhead).max(0.0) * self.nanoseconds_per_tick
    }

    pub fn overhead_nanoseconds(&self) -> f64 {
        self.overhead * self.nanoseconds_per_tick
    }

    /// No two readings differ by less, unless they are the same.
    pub fn step_nanoseconds(&self) -> f64 {
        self.step as f64 * self.nanoseconds_per_tick
    }

    pub fn name(&self) -> &'static str {
        match self.source {
            #[cfg(target_arch = "x86_64")]
            Source::TimeStampCounter => "rdtsc behind lfence",
            Source::Instant(_) => "Instant",
        }
    }
}

impl Source {
    fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        if has_steady_counter() {
            return Self::TimeStampCounter;
        }
        Self::Instant(Instant::now())
    }
}

/// Whether the counter runs at one rate, whatever the core's frequency and sleep, as the kernel sees it.
#[cfg(target_arch = "x86_64")]
fn has_steady_counter() -> bool {
    let cpu_info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpu_info.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    ["constant_tsc", "nonstop_tsc"].iter().all(|wanted| flags.split_whitespace().any(|flag| flag == *wanted))
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
#[allow(unused_unsafe, reason = "both are safe functions in newer toolchains")]
fn time_stamp() -> u64 {
    use std::arch::x86_64::{_mm_lfence, _rdtsc};
    // SAFETY: SSE2, and with it `lfence`, is part of every x86-64.
    unsafe { _mm_lfence() };
    // SAFETY: Linux leaves `rdtsc` to user programs; a program that forbids it to itself would have to ask first.
    unsafe { _rdtsc() }
}

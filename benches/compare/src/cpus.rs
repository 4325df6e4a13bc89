//! Which CPU each side runs on.

use std::fs;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::Result;

/// The caller's CPU and, if this process may use two, the peer's.
#[derive(Clone, Copy, Debug)]
pub struct Cpus {
    pub host: usize,
    pub peer: Option<usize>,
}

impl Cpus {
    /// The first two CPUs this process may run on.
    pub fn choose() -> Result<Self> {
        let allowed = sched_getaffinity(Pid::from_raw(0))?;
        let mut allowed = (0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu).unwrap_or(false));
        let host = allowed.next().ok_or("this process may run on no CPU")?;
        Ok(Self { host, peer: allowed.next() })
    }

    /// Lets the calling thread use all CPUs of this process again.
    pub fn release_thread(&self) -> Result<()> {
        let mut set = only(self.host)?;
        if let Some(peer) = self.peer {
            set.set(peer)?;
        }
        Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
    }

    /// Every CPU that this process may use.
    pub fn all() -> Result<Vec<usize>> {
        let allowed = sched_getaffinity(Pid::from_raw(0))?;
        Ok((0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu).unwrap_or(false)).collect())
    }

    /// For rows in which both sides spin: on one CPU each call would take a turn of the scheduler.
    pub fn require_two(&self) -> Result<()> {
        self.peer.map(|_| ()).ok_or_else(|| "needs two CPUs: both of its sides spin".into())
    }

    /// Both sides on the caller's CPU.
    pub fn only_one(&self) -> Self {
        Self { peer: None, ..*self }
    }

    /// Puts all threads a peer has by now on the peer's CPU; threads started later inherit it.
    pub fn pin_peer(&self, process: u32) -> Result<()> {
        pin_process(process, self.peer.unwrap_or(self.host))
    }
}

/// Keeps all threads that a process has by now on one CPU.
pub fn pin_process(process: u32, cpu: usize) -> Result<()> {
    for task in fs::read_dir(format!("/proc/{process}/task"))? {
        let thread = task?.file_name().to_string_lossy().parse()?;
        sched_setaffinity(Pid::from_raw(thread), &only(cpu)?)?;
    }
    Ok(())
}

/// Keeps the calling thread on one CPU.
pub fn pin_thread(cpu: usize) -> Result<()> {
    Ok(sched_setaffinity(Pid::from_raw(0), &only(cpu)?)?)
}

fn only(cpu: usize) -> Result<CpuSet> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    Ok(set)
}

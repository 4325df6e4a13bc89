//! Where a session's thread and memory lie, for hosts that own their cores: what the host asks for, and how each side does its part.
//!
//! The worker places the session's thread (`place_thread`); both sides back their own mapping of the region ([`back`]). Each step reads back from the kernel what
//! became of it. A step that the kernel refuses ends the opening of the session with a [`Failure`]: nothing that was asked for is left out in silence.
//!
//! Order: the CPU before the memory, so that pages are mapped where they are used; pages before huge pages, which are made of them; the lock last, on what is there.

use crate::layout::{HUGE_PAGE_BYTES, PAGE_BYTES, SCRATCH_BYTES};
use crate::region::Region;
use crate::sys;
use serde::{Deserialize, Serialize};
use std::io;

/// CPUs that can be named are below this: the most that Linux can be built for.
pub const CPUS_MAX: u32 = sys::CPUS_MAX;
/// Real-time priorities are 1 to this (`sched(7)`).
pub const PRIORITY_MAX: u8 = 99;
/// How often a huge page is asked for: the kernel answers `EAGAIN` and the like for passing reasons.
const ATTEMPTS: u32 = 16;

/// What the host asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// The CPU that the session's thread runs on.
    pub cpu: Option<u32>,
    /// Its priority under `SCHED_FIFO`.
    pub real_time: Option<u8>,
    /// How many of the arena's first bytes are mapped before the session opens.
    pub prefault_bytes: u64,
    /// Whether the slots and those bytes are locked in memory.
    pub lock_memory: bool,
    /// Whether those bytes are in huge pages.
    pub huge_pages: bool,
}

impl Wanted {
    /// How many of the arena's first bytes have pages from the start and keep them.
    pub fn committed_bytes(&self) -> u64 {
        let unit = if self.huge_pages { HUGE_PAGE_BYTES } else { PAGE_BYTES };
        self.prefault_bytes.max(SCRATCH_BYTES).next_multiple_of(unit)
    }

    /// Whether anything is asked for.
    pub fn is_any(&self) -> bool {
        *self != Self::default()
    }
}

/// What can be asked for, one by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Wish {
    /// [`Wanted::cpu`].
    Cpu,
    /// [`Wanted::real_time`].
    RealTime,
    /// [`Wanted::prefault_bytes`].
    Prefault,
    /// [`Wanted::lock_memory`].
    Lock,
    /// [`Wanted::huge_pages`].
    HugePages,
}

/// A wish that the kernel refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The wish.
    pub wish: Wish,
    /// The kernel's error number; 0 if it said yes and did something else.
    pub errno: i32,
}

/// How pages were mapped ahead of their use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Prefault {
    /// `madvise(MADV_POPULATE_WRITE)` (Linux 5.14).
    Populated,
    /// One access to each page, where the kernel has no `MADV_POPULATE_WRITE`.
    Touched,
}

/// What one process did with its own mapping of a session's region, as the kernel told that process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Backing {
    /// How pages were mapped ahead; `None` if that was not asked for.
    pub prefault: Option<Prefault>,
    /// Bytes that were mapped ahead: the slots and the arena's beginning.
    pub prefaulted_bytes: u64,
    /// Bytes of the arena that lie in huge pages in this process: `ShmemPmdMapped` in `/proc/self/smaps`, right after the session was opened.
    pub huge_page_bytes: u64,
    /// Bytes that `mlock` keeps in memory.
    pub locked_bytes: u64,
}

/// What the worker did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placed {
    /// The one CPU that the session's thread may run on, as `sched_getaffinity` gave it.
    pub cpu: Option<u32>,
    /// Its priority under `SCHED_FIFO`, as `sched_getparam` gave it.
    pub real_time: Option<u8>,
    /// Its memory.
    pub backing: Backing,
}

/// Worker: places the calling thread, which is a session's, and backs its mapping.
///
/// # Errors
/// The first wish that the kernel refused.
pub fn place(region: &Region, wanted: &Wanted) -> Result<Placed, Failure> {
    let (cpu, real_time) = place_thread(wanted)?;
    Ok(Placed { cpu, real_time, backing: back(region, wanted)? })
}

fn place_thread(wanted: &Wanted) -> Result<(Option<u32>, Option<u8>), Failure> {
    if let Some(cpu) = wanted.cpu {
        sys::pin_thread(cpu).map_err(failed(Wish::Cpu))?;
        if sys::pinned_cpu() != Some(cpu) {
            return Err(Failure { wish: Wish::Cpu, errno: 0 });
        }
    }
    if let Some(priority) = wanted.real_time {
        sys::set_real_time(priority).map_err(failed(Wish::RealTime))?;
        if sys::real_time_priority() != Some(priority) {
            return Err(Failure { wish: Wish::RealTime, errno: 0 });
        }
    }
    Ok((wanted.cpu, wanted.real_time))
}

/// Either side: backs this process's mapping of the region.
///
/// # Errors
/// The first wish that the kernel refused.
pub fn back(region: &Region, wanted: &Wanted) -> Result<Backing, Failure> {
    let mut backing = Backing::default();
    let arena = region.geometry().arena_offset();
    // With huge pages there is a hole between the two, which gets no pages.
    let ranges = [(0, region.geometry().slots_end()), (arena, wanted.committed_bytes())];
    if wanted.prefault_bytes > 0 {
        for (offset, bytes) in ranges {
            backing.prefault = Some(prefault(region, offset, bytes).map_err(failed(Wish::Prefault))?);
            backing.prefaulted_bytes += bytes;
        }
    }
    if wanted.huge_pages {
        backing.huge_page_bytes = into_huge_pages(region, arena, wanted.committed_bytes())?;
    }
    if wanted.lock_memory {
        for (offset, bytes) in ranges {
            region.lock(offset, bytes).map_err(failed(Wish::Lock))?;
            backing.locked_bytes += bytes;
        }
    }
    Ok(backing)
}

fn failed(wish: Wish) -> impl Fn(io::Error) -> Failure {
    move |error| Failure { wish, errno: error.raw_os_error().unwrap_or(0) }
}

fn prefault(region: &Region, offset: u64, bytes: u64) -> io::Result<Prefault> {
    match region.populate(offset, bytes) {
        Ok(()) => Ok(Prefault::Populated),
        // Before Linux 5.14.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            region.touch(offset, bytes);
            Ok(Prefault::Touched)
        }
        Err(error) => Err(error),
    }
}

/// Makes huge pages of pages that are there. Gives how many bytes lie in huge pages then, which is all of them.
///
/// `MADV_COLLAPSE` (Linux 6.1) does that whatever `/sys/kernel/mm/transparent_hugepage/shmem_enabled` says, except `deny`; `MADV_HUGEPAGE` does nothing for memory like this
/// under `never`, which is the default. What really became of it stands in `/proc/self/smaps`.
fn into_huge_pages(region: &Region, offset: u64, bytes: u64) -> Result<u64, Failure> {
    let mut errno = 0;
    for _ in 0..ATTEMPTS {
        match region.collapse(offset, bytes) {
            Ok(()) => {
                let huge = region.huge_bytes(offset, bytes).map_err(failed(Wish::HugePages))?;
                if huge >= bytes {
                    return Ok(huge);
                }
                errno = 0;
            }
            Err(error) => {
                errno = error.raw_os_error().unwrap_or(0);
                // No memory in one piece, or a page that is busy now, may be there the next time; the rest is for good.
                if !matches!(errno, libc::EAGAIN | libc::EBUSY | libc::ENOMEM) {
                    break;
                }
            }
        }
        std::thread::yield_now();
    }
    Err(Failure { wish: Wish::HugePages, errno })
}

/// How many bytes in huge pages (`ShmemPmdMapped`) a text like `/proc/self/smaps` shows for the mappings that begin in a range of addresses or reach into it.
pub(crate) fn huge_bytes_in(smaps: &str, start: u64, end: u64) -> u64 {
    let mut inside = false;
    let mut kib = 0;
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(first), second) = (words.next(), words.next()) else { continue };
        if let Some(number) = first.strip_suffix(':') {
            if inside && number == "ShmemPmdMapped" {
                kib += second.and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
            }
        } else if let Some((from, to)) = first.split_once('-') {
            let number = |hex| u64::from_str_radix(hex, 16).unwrap_or(0);
            inside = number(from) < end && number(to) > start;
        }
    }
    kib * 1024
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Geometry;

    #[test]
    fn only_huge_pages_of_the_range_are_counted() {
        let smaps = "\
            1000-2000 rw-s 00000000 00:01 5 /memfd:a b (deleted)\nRss: 4 kB\nShmemPmdMapped: 8 kB\nVmFlags: rd wr\n\
            2000-4000 rw-s 00000000 00:01 5 /memfd:a\nShmemPmdMapped:      2048 kB\n\
            4000-5000 rw-s 00000000 00:01 5 /memfd:a\nShmemPmdMapped:      4096 kB\nShmemHugePages: 7 kB\n\
            5000-6000 ---p 00000000 00:00 0\nShmemPmdMapped: 1 kB\n";
        assert_eq!(huge_bytes_in(smaps, 0x2000, 0x5000), (2048 + 4096) << 10);
        assert_eq!(huge_bytes_in(smaps, 0x3000, 0x3001), 2048 << 10);
        assert_eq!(huge_bytes_in(smaps, 0x6000, 0x7000), 0);
        assert_eq!(huge_bytes_in("nonsense\n-\n:\n", 0, u64::MAX), 0);
    }

    #[test]
    fn pages_are_there_after_a_touch_as_after_populating() {
        let geometry = Geometry { slots: 4, arena_bytes: 4 * SCRATCH_BYTES, huge_pages: false };
        let (region, _fd) = Region::create(geometry, 1).unwrap();
        assert!(region.write(5, &[7]));
        region.touch(0, geometry.region_bytes());
        let mut byte = [0];
        assert!(region.read(5, &mut byte));
        assert_eq!(byte, [7], "touching changes nothing");
        let wanted = Wanted { prefault_bytes: 1, ..Wanted::default() };
        let backing = back(&region, &wanted).unwrap();
        assert_eq!(backing.prefaulted_bytes, geometry.slots_end() + SCRATCH_BYTES);
        assert!(backing.prefault.is_some() && backing.locked_bytes == 0 && backing.huge_page_bytes == 0);
    }

    #[test]
    fn a_thread_is_pinned_or_the_kernel_says_why_not() {
        std::thread::spawn(|| {
            let cpu = sys::current_cpu();
            let wanted = Wanted { cpu: Some(cpu), ..Wanted::default() };
            assert_eq!(place_thread(&wanted), Ok((Some(cpu), None)));
            assert_eq!(sys::pinned_cpu(), Some(cpu));
            let wanted = Wanted { cpu: Some(CPUS_MAX - 1), ..Wanted::default() };
            // A machine that has that CPU would be the largest there can be.
            assert_eq!(place_thread(&wanted), Err(Failure { wish: Wish::Cpu, errno: libc::EINVAL }));
        })
        .join()
        .unwrap();
    }
}

#![allow(unsafe_code)]
//! Where a session runs and on which memory, as the kernel tells it from outside: `/proc` of the worker and of the host, not what either says of itself.
//!
//! What a machine permits differs (root or not, control groups, containers), so each test asks the kernel for the same thing on its own account first. Where the kernel refuses, the test says so
//! and asserts the error instead.

#[path = "common/process.rs"]
mod process;

use hotcell::{Backing, CallError, Placement, Prefault, Session, SessionBuilder, StartError, Worker};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use process::{isolated, watchdog};
use std::io;

const HUGE: u64 = 2 << 20;
const SCRATCH: u64 = 64 << 10;
/// Header and 256 slots of 128 bytes.
const SLOTS: u64 = 36 << 10;

fn options() -> SessionBuilder {
    SessionBuilder::new()
}

fn allowed_cpus() -> Vec<u32> {
    let allowed = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0)).unwrap();
    (0..nix::sched::CpuSet::count())
        .filter(|cpu| allowed.is_set(*cpu).unwrap())
        .map(|cpu| u32::try_from(cpu).unwrap())
        .collect()
}

/// The kernel ids of the worker's session threads, by their names.
fn session_threads(worker: &Worker) -> Vec<u32> {
    let folder = format!("/proc/{}/task", worker.pid());
    let threads = std::fs::read_dir(folder).unwrap().flatten();
    let is_session = |tid: &u32| {
        let name = std::fs::read_to_string(format!("/proc/{}/task/{tid}/comm", worker.pid()));
        name.is_ok_and(|name| name.starts_with("session-"))
    };
    threads.filter_map(|t| t.file_name().to_str()?.parse().ok()).filter(is_session).collect()
}

/// The only session thread of a worker.
fn session_thread(worker: &Worker) -> u32 {
    let threads = session_threads(worker);
    assert_eq!(threads.len(), 1, "{threads:?}");
    threads[0]
}

fn cpus_of(worker: &Worker, thread: u32) -> String {
    let status = std::fs::read_to_string(format!("/proc/{}/task/{thread}/status", worker.pid())).unwrap();
    status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim().to_owned()
}

/// Policy and priority of a thread.
fn scheduling_of(thread: u32) -> (i32, i32) {
    let thread = thread.cast_signed();
    let mut parameters = libc::sched_param { sched_priority: -1 };
    // SAFETY: takes a number.
    let policy = unsafe { libc::sched_getscheduler(thread) };
    // SAFETY: writes the live parameters.
    assert_eq!(unsafe { libc::sched_getparam(thread, &raw mut parameters) }, 0);
    (policy, parameters.sched_priority)
}

/// The sum of a field of all mappings of session regions of a process, in bytes.
fn region_bytes(pid: u32, field: &str) -> u64 {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut inside = false;
    let mut kib = 0;
    for line in smaps.lines() {
        let first = line.split_ascii_whitespace().next().unwrap_or_default();
        if !first.ends_with(':') {
            // The crash page has a name of its own.
            inside = line.contains("memfd:hotcell (") || line.ends_with("memfd:hotcell");
        } else if inside && first == format!("{field}:") {
            kib += line.split_ascii_whitespace().nth(1).unwrap().parse::<u64>().unwrap();
        }
    }
    kib * 1024
}

#[track_caller]
fn refused(
    opened: Result<Session, StartError>,
) -> (&'static str, &'static str, std::sync::Arc<std::io::Error>, String) {
    match opened {
        Err(error @ StartError::Placement { .. }) => {
            let text = error.to_string();
            let StartError::Placement { option, place, source, advice, .. } = error else { unreachable!() };
            assert!(text.contains(option) && text.contains(advice) && text.contains(&source.to_string()));
            (option, place, source, text)
        }
        other => panic!("{other:?}"),
    }
}

/// A worker: the own executable, or in the package of the lean program that one.
fn start() -> Worker {
    match option_env!("CARGO_BIN_EXE_hotcell-worker") {
        Some(lean) => Worker::builder().program(lean).spawn().unwrap(),
        None => Worker::spawn().unwrap(),
    }
}

/// Runs a test of this file in a process of its own.
fn alone(test: &str, body: impl FnOnce()) {
    let module = module_path!().split_once("::").map_or(String::new(), |(_, module)| format!("{module}::"));
    isolated(&format!("{module}{test}"), 60, body);
}

#[test]
fn without_options_nothing_is_placed() {
    let _watchdog = watchdog(60);
    let worker = start();
    let session = worker.session().unwrap();
    assert_eq!(*session.placement(), Placement::default());
    let thread = session_thread(&worker);
    assert_eq!(scheduling_of(thread).0, libc::SCHED_OTHER);
    assert_eq!(region_bytes(worker.pid(), "Locked"), 0);
    assert_eq!(region_bytes(worker.pid(), "ShmemPmdMapped"), 0);
    assert_eq!(
        session.placement().to_string(),
        "session thread: on any CPU, ordinary scheduling; memory in the host: 0 KiB mapped ahead, 0 KiB in huge pages, 0 KiB locked; \
         memory in the worker: 0 KiB mapped ahead, 0 KiB in huge pages, 0 KiB locked"
    );
}

#[test]
fn a_pinned_session_runs_on_its_cpu_and_no_other_thread_does_for_it() {
    let _watchdog = watchdog(60);
    let worker = start();
    let before = cpus_of(&worker, worker.pid());
    for cpu in allowed_cpus() {
        let session = worker.session_with(options().pin_to(cpu)).unwrap();
        assert_eq!(session.placement().cpu, Some(cpu));
        assert_eq!(cpus_of(&worker, session_thread(&worker)), cpu.to_string());
        assert_eq!(cpus_of(&worker, worker.pid()), before, "the worker's main thread is left alone");
        session.ping().unwrap();
        session.close().unwrap();
        process::until("the session's thread to end", || session_threads(&worker).is_empty().then_some(()));
    }
}

#[test]
fn a_cpu_that_is_not_there_is_an_error_and_the_worker_goes_on() {
    let _watchdog = watchdog(60);
    let worker = start();
    for cpu in [4096, 8191] {
        let (option, place, source, text) = refused(worker.session_with(options().pin_to(cpu)));
        assert_eq!((option, place), ("pin_to", "the worker"));
        assert_eq!(source.raw_os_error(), Some(libc::EINVAL));
        assert!(text.starts_with(&format!("pin_to cannot be {cpu} in the worker: ")), "{text}");
    }
    assert!(worker.is_alive());
    process::until("the refused sessions' threads to end", || {
        session_threads(&worker).is_empty().then_some(())
    });
    worker.session().unwrap().ping().unwrap();
}

#[test]
fn values_out_of_range_are_refused_before_anything_is_done() {
    let _watchdog = watchdog(60);
    let worker = start();
    let max = 16 << 10;
    for (wrong, named) in [
        (options().pin_to(8192), "pin_to"),
        (options().real_time(0), "real_time"),
        (options().real_time(100), "real_time"),
        (
            options().payload_bytes_max(max).string_bytes_max(max).prefault_bytes(4 * max + 1),
            "prefault_bytes",
        ),
        (options().huge_pages(true), "prefault_bytes"),
    ] {
        match worker.session_with(wrong.clone()) {
            Err(StartError::Configuration { option, .. }) => assert_eq!(option, named),
            other => panic!("{other:?}"),
        }
        let spawned = Worker::builder().session_defaults(wrong).spawn();
        assert!(matches!(spawned, Err(StartError::Configuration { option, .. }) if option == named));
    }
    assert!(session_threads(&worker).is_empty());
}

/// What the kernel says to a thread of this process that asks for `SCHED_FIFO`.
fn real_time_here(priority: i32) -> io::Result<()> {
    let ask = move || {
        let parameters = libc::sched_param { sched_priority: priority };
        // SAFETY: thread 0 is the calling one, which ends right after this; the parameters are live.
        let done = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    std::thread::spawn(ask).join().unwrap()
}

#[test]
fn a_real_time_session_is_one_or_an_error() {
    let _watchdog = watchdog(60);
    let worker = start();
    let opened = worker.session_with(options().real_time(3));
    match real_time_here(3) {
        Ok(()) => {
            let session = opened.unwrap();
            assert_eq!(session.placement().real_time, Some(3));
            let thread = session_thread(&worker);
            assert_eq!(scheduling_of(thread), (libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, 3),);
            assert_eq!(scheduling_of(worker.pid()).0, libc::SCHED_OTHER, "the main thread is left alone");
            session.ping().unwrap();
        }
        Err(error) => {
            eprintln!("real-time scheduling is not permitted here ({error}): its error is tested");
            let (option, place, source, _) = refused(opened);
            assert_eq!((option, place), ("real_time", "the worker"));
            assert_eq!(source.raw_os_error(), error.raw_os_error());
        }
    }
}

/// Gives up a capability for good: for this thread, and for threads and processes that it starts. The library's threads come with the first worker, so it has to be before that.
fn give_up_capability(number: u32) {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    // From the set that `exec` gives to root. Not permitted to others, who get none by `exec` anyway.
    // SAFETY: takes numbers.
    unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(number), 0, 0, 0) };
    // Effective, permitted and inheritable; low words first.
    let mut sets = [[0u32; 3]; 2];
    let header = Header { version: VERSION_3, pid: 0 };
    // SAFETY: reads the live header, writes the live sets, which have the layout of this version.
    let done = unsafe { libc::syscall(libc::SYS_capget, &raw const header, &raw mut sets) };
    assert_eq!(done, 0, "capget: {}", io::Error::last_os_error());
    let word = &mut sets[usize::try_from(number / 32).unwrap()];
    for set in word {
        *set &= !(1 << (number % 32));
    }
    // SAFETY: reads the live header and sets.
    let done = unsafe { libc::syscall(libc::SYS_capset, &raw const header, &raw const sets) };
    assert_eq!(done, 0, "capset: {}", io::Error::last_os_error());
}

const CAP_IPC_LOCK: u32 = 14;
const CAP_SYS_NICE: u32 = 23;

#[test]
fn without_the_right_to_real_time_the_error_says_what_to_raise() {
    alone("without_the_right_to_real_time_the_error_says_what_to_raise", || {
        give_up_capability(CAP_SYS_NICE);
        setrlimit(Resource::RLIMIT_RTPRIO, 0, 0).unwrap();
        let worker = start();
        let (option, place, source, text) = refused(worker.session_with(options().real_time(1)));
        assert_eq!((option, place, source.raw_os_error()), ("real_time", "the worker", Some(libc::EPERM)));
        assert!(text.contains("RLIMIT_RTPRIO") && text.contains("CAP_SYS_NICE"), "{text}");
        worker.session().unwrap().ping().unwrap();
    });
}

#[test]
fn prefaulted_memory_is_there_in_both_processes_and_stays() {
    alone("prefaulted_memory_is_there_in_both_processes_and_stays", || {
        let bytes = 9 << 20;
        let worker = start();
        let plain = worker.session().unwrap();
        let (host, other) = (region_bytes(std::process::id(), "Rss"), region_bytes(worker.pid(), "Rss"));
        assert!(host < bytes && other < bytes, "{host} {other}");
        let session = worker.session_with(options().prefault_bytes(bytes)).unwrap();
        let placement = session.placement();
        for (backing, pid, before) in
            [(placement.host, std::process::id(), host), (placement.worker, worker.pid(), other)]
        {
            assert!(matches!(backing.prefault, Some(Prefault::Populated | Prefault::Touched)));
            assert_eq!(backing.prefaulted_bytes, SLOTS + bytes);
            assert_eq!((backing.locked_bytes, backing.huge_page_bytes), (0, 0));
            let now = region_bytes(pid, "Rss");
            assert!(now >= before + SLOTS + bytes, "{before} {now}");
        }
        // Larger than what is kept of an ordinary arena, and given back at once.
        drop(session.block(30 << 20).unwrap());
        assert!(region_bytes(worker.pid(), "Rss") >= other + SLOTS + bytes, "it stays");
        drop((plain, session));
    });
}

/// What the kernel says to this process when it locks `bytes` bytes.
fn lock_here(bytes: u64) -> io::Result<()> {
    let memory = vec![0u8; usize::try_from(bytes).unwrap()];
    // SAFETY: the range is that of the live vector.
    let done = unsafe { libc::mlock(memory.as_ptr().cast(), memory.len()) };
    let error = io::Error::last_os_error();
    // SAFETY: as above.
    unsafe { libc::munlock(memory.as_ptr().cast(), memory.len()) };
    if done == 0 { Ok(()) } else { Err(error) }
}

#[test]
fn locked_memory_is_locked_in_both_processes_or_an_error() {
    alone("locked_memory_is_locked_in_both_processes_or_an_error", || {
        for prefault in [0, 1 << 20] {
            let bytes = SLOTS + prefault.max(SCRATCH);
            let worker = start();
            let opened = worker.session_with(options().lock_memory(true).prefault_bytes(prefault));
            // A page more, for the ends of what is not aligned.
            if let Err(error) = lock_here(bytes + 4096) {
                eprintln!("{bytes} bytes cannot be locked here ({error}): its error is tested");
                let (option, _, source, _) = refused(opened);
                assert_eq!((option, source.raw_os_error()), ("lock_memory", error.raw_os_error()),);
                continue;
            }
            let session = opened.unwrap();
            let locked = |backing: Backing| backing.locked_bytes;
            let placement = session.placement();
            assert_eq!((locked(placement.host), locked(placement.worker)), (bytes, bytes));
            // `Locked:` counts each page by the processes that share it: half of two pages is one.
            for pid in [std::process::id(), worker.pid()] {
                let flags = locked_mappings(pid);
                assert_eq!(flags, bytes, "VmFlags lo");
                assert!(region_bytes(pid, "Locked") > 0);
            }
            session.ping().unwrap();
        }
    });
}

/// How many bytes of session regions of a process are in mappings with the flag `lo`.
fn locked_mappings(pid: u32) -> u64 {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut region = None;
    let mut bytes = 0;
    for line in smaps.lines() {
        let first = line.split_ascii_whitespace().next().unwrap_or_default();
        if !first.ends_with(':') {
            let (from, to) = first.split_once('-').unwrap();
            let number = |hex| u64::from_str_radix(hex, 16).unwrap();
            region = line.contains("memfd:hotcell (").then(|| number(to) - number(from));
        } else if first == "VmFlags:" && line.split_ascii_whitespace().any(|flag| flag == "lo") {
            bytes += region.unwrap_or(0);
        }
    }
    bytes
}

#[test]
fn over_the_limit_of_locked_memory_the_error_says_what_to_raise() {
    alone("over_the_limit_of_locked_memory_the_error_says_what_to_raise", || {
        give_up_capability(CAP_IPC_LOCK);
        let worker_of_before = start();
        let (_, most) = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap();
        let enough = (SLOTS + SCRATCH + 4096).min(most);
        let little = SLOTS.min(most);
        for (limit, errno) in
            [(0, libc::EPERM), (little, if little == 0 { libc::EPERM } else { libc::ENOMEM })]
        {
            setrlimit(Resource::RLIMIT_MEMLOCK, limit, most).unwrap();
            let (option, place, source, text) =
                refused(worker_of_before.session_with(options().lock_memory(true)));
            assert_eq!((option, place), ("lock_memory", "this process"));
            assert_eq!(source.raw_os_error(), Some(errno), "{limit}");
            assert!(text.contains("RLIMIT_MEMLOCK") && text.contains("CAP_IPC_LOCK"), "{text}");
            // A worker that is started now has the limit too.
            start().session().unwrap().ping().unwrap();
        }
        // Room in this process, and none in the worker, which was started under the lower limit.
        setrlimit(Resource::RLIMIT_MEMLOCK, little, most).unwrap();
        let poor = start();
        setrlimit(Resource::RLIMIT_MEMLOCK, enough, most).unwrap();
        match lock_here(SLOTS + SCRATCH) {
            Ok(()) => {
                let (option, place, source, _) = refused(poor.session_with(options().lock_memory(true)));
                assert_eq!((option, place), ("lock_memory", "the worker"));
                assert!(matches!(source.raw_os_error(), Some(libc::ENOMEM | libc::EPERM)), "{source}");
                poor.session().unwrap().ping().unwrap();
            }
            Err(error) => {
                eprintln!(
                    "the hard limit of {most} bytes leaves no room ({error}): the host's own error is tested"
                );
                let (option, place, source, _) = refused(poor.session_with(options().lock_memory(true)));
                assert_eq!((option, place), ("lock_memory", "this process"));
                assert_eq!(source.raw_os_error(), error.raw_os_error());
            }
        }
    });
}

#[test]
fn huge_pages_are_huge_in_both_processes_or_an_error() {
    alone("huge_pages_are_huge_in_both_processes_or_an_error", || {
        let worker = start();
        // Rounded up to two huge pages.
        match worker.session_with(options().huge_pages(true).prefault_bytes(HUGE + 1)) {
            Ok(session) => {
                let placement = session.placement();
                for (backing, pid) in [(placement.host, std::process::id()), (placement.worker, worker.pid())]
                {
                    assert_eq!(backing.huge_page_bytes, 2 * HUGE);
                    assert_eq!(backing.prefaulted_bytes, SLOTS + 2 * HUGE);
                    assert_eq!(region_bytes(pid, "ShmemPmdMapped"), 2 * HUGE);
                    assert_eq!(region_bytes(pid, "Rss"), SLOTS + 2 * HUGE);
                }
                // Bytes go to the right places, in huge pages and beyond them.
                let libc = session.load("libc.so.6").unwrap();
                let memfrob = libc
                    .function::<fn(hotcell::InOut<[u8]>, usize) -> hotcell::RemotePtr>("memfrob")
                    .unwrap();
                for size in [10, 100_000, 3 << 20, 9 << 20] {
                    let bytes: Vec<u8> = (0u8..=250).cycle().take(size).collect();
                    let mut frobbed = bytes.clone();
                    memfrob.call(&mut frobbed, size).unwrap();
                    assert!(frobbed.iter().zip(&bytes).all(|(a, b)| a ^ b == 42), "{size}");
                }
                assert!(matches!(session.block((64 << 20) + 1), Err(CallError::TooLarge { .. })));
            }
            Err(error @ StartError::Placement { option: "huge_pages", .. }) => {
                let StartError::Placement { source, .. } = &error else { unreachable!() };
                let errno = source.raw_os_error();
                eprintln!("no huge pages here: {error}");
                assert!(
                    matches!(errno, Some(libc::EINVAL | libc::ENOMEM | libc::EAGAIN | libc::EBUSY)),
                    "{errno:?}"
                );
            }
            other => panic!("{other:?}"),
        }
        worker.session().unwrap().ping().unwrap();
    });
}

#[test]
fn all_options_go_together() {
    alone("all_options_go_together", || {
        let worker = start();
        let cpu = *allowed_cpus().last().unwrap();
        let mut wanted = options().pin_to(cpu).prefault_bytes(1 << 20);
        if lock_here(2 << 20).is_ok() {
            wanted = wanted.lock_memory(true);
        } else {
            eprintln!("2 MiB cannot be locked here: left out");
        }
        if real_time_here(1).is_ok() {
            wanted = wanted.real_time(1);
        } else {
            eprintln!("no real-time scheduling here: left out");
        }
        let session = worker.session_with(wanted).unwrap();
        eprintln!("{}", session.placement());
        let abs = session.load("libc.so.6").unwrap().function::<fn(i32) -> i32>("abs").unwrap();
        for i in 0..1000 {
            assert_eq!(abs.call(-i).unwrap(), i);
        }
    });
}

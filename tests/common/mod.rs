//! What the integration tests share: a watchdog against hangs, C libraries compiled at test time, and counts of what a process has left behind.
//!
//! Every test binary compiles this file for itself and uses a part of it.
#![allow(dead_code, unreachable_pub)]

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Condvar, LazyLock, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Ends the test process if it is not dropped in time: a hang fails, with the test's name, instead of going on for ever.
#[must_use = "the watchdog watches until it is dropped"]
pub struct Watchdog {
    state: Arc<(Mutex<bool>, Condvar)>,
}

/// A watchdog that barks after `seconds`, which are far more than a quiet machine needs, times five: the machine may be slow, and busy with other things.
pub fn watchdog(seconds: u64) -> Watchdog {
    let seconds = seconds * 5;
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    let state = Arc::new((Mutex::new(false), Condvar::new()));
    let watched = Arc::clone(&state);
    let deadline = Instant::now() + Duration::from_secs(seconds);
    std::thread::spawn(move || {
        let (over, changed) = &*watched;
        let mut over = over.lock().unwrap_or_else(PoisonError::into_inner);
        while !*over {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                eprintln!("watchdog: {test} did not end within {seconds} s");
                std::process::abort();
            }
            over = changed.wait_timeout(over, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    });
    Watchdog { state }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        let (over, changed) = &*self.state;
        *over.lock().unwrap_or_else(PoisonError::into_inner) = true;
        changed.notify_all();
    }
}

/// A directory of this process's own. Removed when the process ends by `exit`, as a test binary does; an aborted one leaves it to the system's cleaning.
pub fn scratch_dir() -> &'static Path {
    static DIRECTORY: OnceLock<(u32, PathBuf)> = OnceLock::new();
    // Rust drops no statics, so the C library is asked.
    extern "C" fn remove() {
        // A fork of this process, should a test make one, leaves the directory alone.
        if let Some((owner, directory)) = DIRECTORY.get()
            && *owner == std::process::id()
        {
            let _ = std::fs::remove_dir_all(directory);
        }
    }
    let (_, directory) = DIRECTORY.get_or_init(|| {
        let directory = tempfile::Builder::new()
            .prefix("hotcell-test-")
            .tempdir()
            .expect("a directory for fixtures")
            .keep();
        #[allow(unsafe_code)]
        // SAFETY: `remove` is a plain function that lives as long as the program.
        let status = unsafe { libc::atexit(remove) };
        assert_eq!(status, 0, "atexit");
        (std::process::id(), directory)
    });
    directory
}

/// Compiles a C source to a shared library `lib<name>.so` and gives its path. Built once for each name in a process, so one name means one source;
/// the compiler is `$CC` or `cc`.
pub fn compile(name: &str, source: &str, flags: &[&str]) -> PathBuf {
    type Slot = Arc<OnceLock<PathBuf>>;
    static BUILT: LazyLock<Mutex<HashMap<String, Slot>>> = LazyLock::new(Mutex::default);
    let slot = {
        let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(built.entry(name.to_owned()).or_default())
    };
    slot.get_or_init(|| {
        let file = scratch_dir().join(format!("{name}.c"));
        let library = scratch_dir().join(format!("lib{name}.so"));
        std::fs::write(&file, source).expect("writing a fixture's source");
        let compiler =
            std::env::var_os("CC").filter(|v| !v.is_empty()).unwrap_or_else(|| OsString::from("cc"));
        let output = Command::new(&compiler)
            .args(["-shared", "-fPIC", "-O1", "-w", "-o"])
            .arg(&library)
            .arg(&file)
            .args(flags)
            .output()
            .unwrap_or_else(|e| panic!("the C compiler {} cannot be run: {e}", compiler.display()));
        assert!(output.status.success(), "{name}.c:\n{}", String::from_utf8_lossy(&output.stderr));
        library
    })
    .clone()
}

/// Waits until `condition` holds, at most `patience`. Gives whether it held.
pub fn wait_until(patience: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether no process, and no zombie, has this id.
pub fn is_process_gone(pid: u32) -> bool {
    !Path::new("/proc").join(pid.to_string()).exists()
}

/// The children of this process, zombies included, as the kernel lists them under each of its threads.
pub fn own_children() -> Vec<u32> {
    let mut children = Vec::new();
    for thread in std::fs::read_dir("/proc/self/task").expect("/proc/self/task").flatten() {
        // A thread may end while it is looked at; its children then belong to another one.
        let listed = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        children.extend(listed.split_ascii_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
    }
    children
}

/// How many descriptors this process has open, without the one that looking takes.
pub fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("/proc/self/fd").count() - 1
}

/// What this process has at one moment: descriptors, children, mappings of shared memory, names in `/dev/shm`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Belongings {
    /// Open descriptors.
    pub descriptors: usize,
    /// Children, zombies included.
    pub children: usize,
    /// Mappings of memfds.
    pub shared_mappings: usize,
    /// Names in `/dev/shm`.
    pub shared_names: Vec<OsString>,
}

/// Takes stock of this process. Only meaningful in a test binary that does nothing else at the same time.
///
/// The library's monitor comes with the first worker and stays for good, with two descriptors: start and drop one worker before taking stock.
pub fn belongings() -> Belongings {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("/proc/self/maps");
    let mut shared_names: Vec<_> = std::fs::read_dir("/dev/shm")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name())
        .collect();
    shared_names.sort();
    Belongings {
        descriptors: open_descriptors(),
        children: own_children().len(),
        shared_mappings: maps.lines().filter(|line| line.contains("/memfd:")).count(),
        shared_names,
    }
}

/// Fails unless this process soon has no more than it had `before`.
pub fn no_leftovers(before: &Belongings) {
    let mut now = belongings();
    let clean = wait_until(Duration::from_secs(300), || {
        now = belongings();
        now.descriptors <= before.descriptors
            && now.children <= before.children
            && now.shared_mappings <= before.shared_mappings
            && now.shared_names.iter().all(|name| before.shared_names.contains(name))
    });
    assert!(clean, "left behind: {now:#?}\nbefore: {before:#?}");
}

//! Processes of tests: tests in a process of their own, a watchdog, and what `/proc` says of a process.
#![allow(dead_code)]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Names, in a process of its own, the test that it runs.
const ISOLATED: &str = "HOTCELL_TEST_ISOLATED";

/// How many times slower than a quiet machine of today the one may be that runs the tests: it is slow, and busy with other things.
const SLOWNESS: u64 = 5;

/// Ends the test process if it is not dropped in time: a hang is a failure.
pub(crate) struct Watchdog {
    _bark: mpsc::Sender<()>,
}

/// `seconds` is far more than a quiet machine needs. What is waited for is longer by [`SLOWNESS`], since only a hang should end by it.
pub(crate) fn watchdog(seconds: u64) -> Watchdog {
    let seconds = seconds * SLOWNESS;
    // Workers die here by the hundred: no core files.
    let _ = nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0);
    let (bark, quiet) = mpsc::channel::<()>();
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    std::thread::spawn(move || {
        if quiet.recv_timeout(Duration::from_secs(seconds)) == Err(mpsc::RecvTimeoutError::Timeout) {
            eprintln!("watchdog: {test} still runs after {seconds} s");
            std::process::abort();
        }
    });
    Watchdog { _bark: bark }
}

/// Runs `body` in a process of its own, which is this test binary again with only the test `name`. For tests that count what a whole process has, or that
/// change it. Fails unless the process ends with exit code 0.
pub(crate) fn isolated(name: &str, seconds: u64, body: impl FnOnce()) {
    if let Some(ended) = isolated_status(name, seconds, body) {
        assert!(ended.success(), "{name}, in a process of its own, ended with {ended}");
    }
}

/// As [`isolated`], but whatever way the process ends is told. In the process itself: `None`.
pub(crate) fn isolated_status(name: &str, seconds: u64, body: impl FnOnce()) -> Option<ExitStatus> {
    if std::env::var_os(ISOLATED).is_some_and(|test| test == name) {
        nix::sys::prctl::set_pdeathsig(nix::sys::signal::SIGKILL).unwrap();
        let _watchdog = watchdog(seconds);
        body();
        return None;
    }
    let _watchdog = watchdog(seconds + 20);
    let done = rerun(name)
        .env(ISOLATED, name)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .and_then(std::process::Child::wait_with_output)
        .unwrap();
    eprint!("{}", String::from_utf8_lossy(&done.stderr));
    Some(done.status)
}

/// This test binary again, with only the test `name`.
pub(crate) fn rerun(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--nocapture", "--include-ignored"]);
    command
}

/// Compiles a C library. The same source is compiled once, whatever process asks.
pub(crate) fn library(name: &str, source: &str) -> PathBuf {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    source.hash(&mut hasher);
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let library = folder.join(format!("{name}-{:016x}.so", hasher.finish()));
    if !library.exists() {
        let scratch = tempfile::tempdir_in(folder).unwrap();
        let (text, object) = (scratch.path().join("source.c"), scratch.path().join("library.so"));
        std::fs::write(&text, source).unwrap();
        let done = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"])
            .args([&object, &text])
            .output()
            .expect("these tests need a C compiler named cc");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        // Atomic: whoever sees the name sees all of it.
        std::fs::rename(object, &library).unwrap();
    }
    library
}

/// Polls until `look` gives something. Fails after a long time, which only says that something is broken.
pub(crate) fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < Duration::from_secs(60 * SLOWNESS), "still waiting for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// State letter, parent and start time of a process.
fn stat(pid: u32) -> Option<(char, u32, u64)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; what follows its last parenthesis does not.
    let mut fields = stat[stat.rfind(')')? + 1..].split_whitespace();
    let state = fields.next()?.chars().next()?;
    let parent = fields.next()?.parse().ok()?;
    let start = fields.nth(17)?.parse().ok()?;
    Some((state, parent, start))
}

/// One process, and no other that gets its number later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    start: u64,
}

impl Process {
    pub(crate) fn of(pid: u32) -> Process {
        Process::find(pid).unwrap_or_else(|| panic!("there is no process {pid}"))
    }

    pub(crate) fn find(pid: u32) -> Option<Process> {
        stat(pid).map(|(_, _, start)| Process { pid, start })
    }

    /// Whether it still runs: it is there, and no zombie.
    pub(crate) fn runs(&self) -> bool {
        stat(self.pid).is_some_and(|(state, _, start)| start == self.start && !matches!(state, 'Z' | 'X'))
    }

    /// Whether nothing is left of it, no zombie either.
    pub(crate) fn is_gone(&self) -> bool {
        stat(self.pid).is_none_or(|(_, _, start)| start != self.start)
    }

    pub(crate) fn kill(&self) {
        if !self.is_gone() {
            let _ = nix::sys::signal::kill(raw_pid(self.pid), nix::sys::signal::SIGKILL);
        }
    }
}

pub(crate) fn raw_pid(pid: u32) -> nix::unistd::Pid {
    nix::unistd::Pid::from_raw(pid.cast_signed())
}

fn pids() -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Everything that runs and says that it is a worker of `host`, or still has `token` in its environment (a child between its fork and its exec has).
pub(crate) fn workers_and_forks(host: u32, token: &str) -> Vec<u32> {
    let marker = format!("--hotcell-worker\0{host}\0");
    pids()
        .into_iter()
        .filter(|pid| mentions(*pid, "cmdline", &marker) || mentions(*pid, "environ", token))
        .collect()
}

/// The running workers of `host`.
pub(crate) fn workers_of(host: u32) -> Vec<u32> {
    let marker = format!("--hotcell-worker\0{host}\0");
    pids().into_iter().filter(|pid| mentions(*pid, "cmdline", &marker)).collect()
}

fn mentions(pid: u32, file: &str, text: &str) -> bool {
    let Ok(content) = std::fs::read(format!("/proc/{pid}/{file}")) else { return false };
    content.windows(text.len()).any(|window| window == text.as_bytes())
}

/// The children of this process that have ended and were not collected.
pub(crate) fn zombies() -> Vec<u32> {
    let me = std::process::id();
    pids()
        .into_iter()
        .filter(|pid| stat(*pid).is_some_and(|(state, parent, _)| state == 'Z' && parent == me))
        .collect()
}

/// The open descriptors of a process, with what they lead to.
pub(crate) fn descriptors(pid: u32) -> Vec<(u32, String)> {
    let Ok(list) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    let mut found: Vec<(u32, String)> = list
        .flatten()
        .filter_map(|entry| {
            let target = std::fs::read_link(entry.path()).ok()?;
            Some((entry.file_name().to_str()?.parse().ok()?, target.to_string_lossy().into_owned()))
        })
        // Our own look at the list is on it.
        .filter(|(_, target)| !(target.starts_with("/proc/") && target.ends_with("/fd")))
        .collect();
    found.sort();
    found
}

/// How many other processes a process watches: the library has one descriptor of this kind for each worker, until it has forgotten it.
pub(crate) fn pidfds(pid: u32) -> usize {
    descriptors(pid).iter().filter(|(_, target)| target.contains("pidfd")).count()
}

pub(crate) fn threads(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count)
}

/// A line of `/proc/<pid>/status` that is a number of KiB.
pub(crate) fn kib(pid: u32, line: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix(line)?.strip_prefix(':'));
    line.and_then(|l| l.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// How many shared regions a process has mapped. One may show as several mappings with different rights or advice.
pub(crate) fn region_mappings(pid: u32) -> usize {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let inodes =
        maps.lines().filter(|line| line.contains("memfd:hotcell")).map(|line| line.split_whitespace().nth(4));
    inodes.collect::<std::collections::HashSet<_>>().len()
}

/// The names in a folder.
pub(crate) fn names_in(folder: impl AsRef<Path>) -> Vec<String> {
    let entries =
        std::fs::read_dir(folder).map(|list| list.flatten().collect::<Vec<_>>()).unwrap_or_default();
    entries
        .iter()
        .map(|entry| AsRef::<OsStr>::as_ref(&entry.file_name()).to_string_lossy().into_owned())
        .collect()
}

/// A small deterministic random number generator (splitmix64).
#[derive(Clone, Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

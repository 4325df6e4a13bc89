#![allow(unsafe_code)]
//! A worker never outlives its host, whatever ends the host, and leaves nothing behind; and the host's process is left as it was.
//!
//! This binary starts itself again as a host (see [`host`]), which starts workers in every state that they can be in, tells their numbers, and then ends in the way under test.

#[path = "common/process.rs"]
mod process;

use hotcell::{CallError, Cause, In, Module, Output, Session, StartError, WaitPolicy, Worker};
use nix::sys::signal::{Signal, kill};
use process::{Process, descriptors, isolated, library, raw_pid, rerun, until, watchdog};
use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// How a host ends, and where it tells of itself.
const ENDING: &str = "HOTCELL_TEST_ENDING";
const REPORT: &str = "HOTCELL_TEST_REPORT";

const BUSY: &str = r#"
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

static void mark(const char *path) { close(open(path, O_CREAT | O_WRONLY, 0600)); }

/* Busy, or asleep, for longer than any test. */
int spin_for_ever(const char *path) { mark(path); for (volatile int i = 0;; i++) {} return 0; }
int sleep_for_ever(const char *path) { mark(path); for (;;) pause(); return 0; }
int add(int a, int b) { return a + b; }
void leave(int code) { exit(code); }
"#;

const SLOW_TO_LOAD: &str = r#"
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

__attribute__((constructor)) static void load(void) {
  close(open(getenv("MARK"), O_CREAT | O_WRONLY, 0600));
  for (;;) pause();
}
"#;

fn busy() -> PathBuf {
    library("busy", BUSY)
}

fn session_of(worker: &Worker) -> Session {
    worker.session().unwrap()
}

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

/// What a host holds until its end.
#[derive(Default)]
struct Held {
    workers: Vec<Worker>,
    sessions: Vec<Session>,
}

/// Starts workers: idle, with idle sessions under each policy, in a sleeping call, in a spinning call, and in the middle of a load; and threads that go on starting
/// and dropping others. Returns once all of them are in that state.
fn start_workers(scratch: &Path) -> Held {
    let mut held = Held::default();
    held.workers.push(Worker::spawn().unwrap());
    for policy in [WaitPolicy::Adaptive, WaitPolicy::Spin, WaitPolicy::Park] {
        let worker = Worker::builder().wait(policy).spawn().unwrap();
        let session = session_of(&worker);
        session.ping().unwrap();
        held.workers.push(worker);
        held.sessions.push(session);
    }
    let mut marks = Vec::new();
    for symbol in ["sleep_for_ever", "spin_for_ever"] {
        let worker = Worker::spawn().unwrap();
        let call = session_of(&worker).load(Module::ffi(busy())).unwrap();
        let call = call.function::<fn(In<CStr>) -> i32>(symbol).unwrap();
        let mark = scratch.join(symbol);
        marks.push(mark.clone());
        std::thread::spawn(move || {
            call.with_timeout(Duration::from_secs(3600)).unwrap().call(&c_path(&mark))
        });
        held.workers.push(worker);
    }
    let mark = scratch.join("load");
    let worker = Worker::builder().env("MARK", &mark).spawn().unwrap();
    let session = session_of(&worker);
    marks.push(mark);
    std::thread::spawn(move || session.load(Module::ffi(library("slow_to_load", SLOW_TO_LOAD))));
    held.workers.push(worker);
    for _ in 0..2 {
        std::thread::spawn(|| {
            loop {
                let _ = Worker::spawn();
            }
        });
    }
    until("all workers to be where they shall be", || marks.iter().all(|mark| mark.exists()).then_some(()));
    for mark in marks {
        std::fs::remove_file(mark).unwrap();
    }
    held
}

/// A host, when this binary is started as one: not a test by itself.
#[test]
fn host() {
    let (Some(ending), Some(report)) = (std::env::var_os(ENDING), std::env::var_os(REPORT)) else { return };
    let ending = ending.to_string_lossy().into_owned();
    let _watchdog = watchdog(120);
    // Not longer than the test that started it, whatever becomes of that.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).unwrap();
    let report = PathBuf::from(report);
    let folder = report.parent().unwrap();
    let held = start_workers(folder);
    let mut pids: Vec<u32> = held.workers.iter().map(Worker::pid).collect();
    if ending == "killed while a fork lives on" {
        // SAFETY: the child only sleeps and ends: it takes no lock and touches nothing of this process.
        match unsafe { libc::fork() } {
            0 => {
                // SAFETY: takes a number. Should all else fail, the child ends by itself.
                unsafe { libc::alarm(600) };
                loop {
                    // SAFETY: takes nothing.
                    unsafe { libc::pause() };
                }
            }
            child => pids.push(child.cast_unsigned()),
        }
    }
    let list: Vec<String> = pids.iter().map(u32::to_string).collect();
    std::fs::write(folder.join("draft"), list.join(" ")).unwrap();
    std::fs::rename(folder.join("draft"), &report).unwrap();
    match ending.as_str() {
        "panic" => panic!("the ending under test"),
        "exit" => std::process::exit(7),
        "_exit" => {
            // SAFETY: takes a number and does not return.
            unsafe { libc::_exit(8) }
        }
        "abort" => std::process::abort(),
        "exec" => panic!("{}", Command::new("/bin/sleep").arg("3600").exec()),
        "return" => {}
        _ => loop {
            std::thread::park();
        },
    }
    drop(held);
}

/// A host that has started its workers.
struct Host {
    child: Child,
    workers: Vec<Process>,
    folder: tempfile::TempDir,
    temporary: tempfile::TempDir,
    token: String,
}

fn start_host(ending: &str) -> Host {
    static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let (folder, temporary) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let report = folder.path().join("report");
    let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let token = format!("HOTCELL_TEST_TOKEN={}-{count}", std::process::id());
    let (name, value) = token.split_once('=').unwrap();
    let mut child = rerun("host")
        .env(ENDING, ending)
        .env(REPORT, &report)
        .env(name, value)
        .env("TMPDIR", temporary.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let list = until("the host's report", || {
        assert!(report.exists() || child.try_wait().unwrap().is_none(), "the host ended early");
        std::fs::read_to_string(&report).ok()
    });
    // A host that ends at once may have taken its workers with it already: then there is nothing to be seen of them, which is as it should be.
    let workers = list
        .split(' ')
        .map(|pid| pid.parse().unwrap())
        .filter(|pid| Path::new(&format!("/proc/{pid}/stat")).exists())
        .map(Process::of)
        .collect();
    Host { child, workers, folder, temporary, token }
}

impl Host {
    fn signal(&self, signal: Signal) {
        kill(raw_pid(self.child.id()), signal).unwrap();
    }

    /// Waits for the host's end; checks that everything else has ended and that nothing is left.
    fn expect_nothing_left(mut self, what: &str) -> ExitStatus {
        let status = self.child.wait().unwrap();
        let host = self.child.id();
        until(&format!("the workers to end ({what})"), || {
            let running = self.workers.iter().any(Process::runs);
            (!running && process::workers_and_forks(host, &self.token).is_empty()).then_some(())
        });
        // Nobody's zombies: they are collected by whoever inherited them.
        until(&format!("the workers to be collected ({what})"), || {
            self.workers.iter().all(Process::is_gone).then_some(())
        });
        assert_eq!(
            process::names_in("/dev/shm").iter().filter(|name| name.contains("hotcell")).count(),
            0,
            "{what}"
        );
        assert_eq!(process::names_in(self.temporary.path()), Vec::<String>::new(), "{what}");
        assert_eq!(process::names_in(self.folder.path()), ["report"], "{what}");
        status
    }
}

fn host_that_gets(signal: Signal) {
    let _watchdog = watchdog(150);
    let host = start_host("wait");
    assert!(host.workers.len() >= 7 && host.workers.iter().all(Process::runs));
    host.signal(signal);
    let status = host.expect_nothing_left(signal.as_str());
    assert_eq!(status.signal(), Some(signal as i32));
}

fn host_that_ends_by(ending: &str) -> ExitStatus {
    let _watchdog = watchdog(150);
    start_host(ending).expect_nothing_left(ending)
}

#[test]
fn sigkill_of_the_host_leaves_nothing() {
    // The moment differs each time: other workers are being started meanwhile.
    for _ in 0..3 {
        host_that_gets(Signal::SIGKILL);
    }
}

#[test]
fn sigterm_of_the_host_leaves_nothing() {
    host_that_gets(Signal::SIGTERM);
}

#[test]
fn a_crash_of_the_host_leaves_nothing() {
    host_that_gets(Signal::SIGILL);
}

#[test]
fn a_panic_in_the_host_leaves_nothing() {
    assert_eq!(host_that_ends_by("panic").code(), Some(101));
}

#[test]
fn exit_of_the_host_leaves_nothing() {
    assert_eq!(host_that_ends_by("exit").code(), Some(7));
}

#[test]
fn exit_without_destructors_leaves_nothing() {
    assert_eq!(host_that_ends_by("_exit").code(), Some(8));
}

#[test]
fn return_from_the_host_leaves_nothing() {
    assert_eq!(host_that_ends_by("return").code(), Some(0));
}

#[test]
fn abort_of_the_host_leaves_nothing() {
    assert_eq!(host_that_ends_by("abort").signal(), Some(Signal::SIGABRT as i32));
}

#[test]
fn exec_of_the_host_ends_its_workers_while_the_new_program_runs() {
    let _watchdog = watchdog(150);
    let mut host = start_host("exec");
    let pid = host.child.id();
    until("the host to become another program", || {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        (name.trim() == "sleep").then_some(())
    });
    // The new program knows nothing of the children that it has, so they stay zombies as long as it runs. They hold nothing.
    until("the workers to end", || {
        let running = host.workers.iter().any(Process::runs);
        (!running && process::workers_of(pid).is_empty()).then_some(())
    });
    assert!(host.child.try_wait().unwrap().is_none(), "the new program still runs");
    // What this test itself got from whoever started it may pass through as well.
    let own: Vec<String> = descriptors(std::process::id()).into_iter().map(|(_, target)| target).collect();
    let passed = descriptors(pid).into_iter().filter(|(fd, target)| *fd > 2 && !own.contains(target));
    assert_eq!(passed.collect::<Vec<_>>(), [], "descriptors of the library passed through exec");
    host.signal(Signal::SIGKILL);
    let status = host.expect_nothing_left("exec");
    assert_eq!(status.signal(), Some(Signal::SIGKILL as i32));
}

#[test]
fn a_fork_that_outlives_the_host_does_not_keep_the_workers() {
    let _watchdog = watchdog(150);
    let mut host = start_host("killed while a fork lives on");
    let fork = host.workers.pop().unwrap();
    host.signal(Signal::SIGKILL);
    host.child.wait().unwrap();
    until("the workers to end", || (!host.workers.iter().any(Process::runs)).then_some(()));
    assert!(fork.runs(), "the fork lives on, with its copies of the host's descriptors");
    fork.kill();
    host.expect_nothing_left("fork");
}

#[test]
fn a_worker_lives_on_when_the_thread_that_started_it_ends() {
    let _watchdog = watchdog(120);
    let worker = std::thread::spawn(|| Worker::spawn().unwrap()).join().unwrap();
    let session = std::thread::spawn({
        let worker = worker.clone();
        move || session_of(&worker)
    });
    let session = session.join().unwrap();
    // The signal would come with the thread's end, which is over.
    for _ in 0..20 {
        session.ping().unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(worker.is_alive() && Process::of(worker.pid()).runs());
}

/// Forks. Both sides have the handles then: the child does its part and ends with exit code 0, or 1 if it panicked; the parent waits for that and does its own.
fn fork<T>(handles: T, child_does: impl FnOnce(T), parent_does: impl FnOnce(T)) {
    // SAFETY: the child of this many-threaded process takes no lock that another thread can hold: the other threads are the library's, which sleep, and the test
    // harness's, which waits. glibc makes its allocator usable in the child.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: takes a number. Should the child hang, it ends by itself and the parent sees the signal.
        unsafe { libc::alarm(300) };
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| child_does(handles)));
        // SAFETY: takes a number and does not return.
        unsafe { libc::_exit(i32::from(done.is_err())) };
    }
    assert!(child > 0);
    let status = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(child), None).unwrap();
    assert!(matches!(status, nix::sys::wait::WaitStatus::Exited(_, 0)), "the fork ended with {status:?}");
    parent_does(handles);
}

#[test]
fn a_fork_of_the_host_can_use_nothing_and_harm_nothing() {
    isolated("a_fork_of_the_host_can_use_nothing_and_harm_nothing", 100, || {
        const BYTES: usize = 16 << 20;
        let worker = Worker::spawn().unwrap();
        let session = session_of(&worker);
        let module = session.load(Module::ffi(busy())).unwrap();
        let add = module.function::<fn(i32, i32) -> i32>("add").unwrap();
        let by_name = module.prototype("int add(int, int)").unwrap();
        let big = session.block(BYTES as u64).unwrap();
        assert!(big.write(0, &vec![7; BYTES]));
        let remote = session.alloc(8).unwrap();
        let ticket = add.submit(40, 2).unwrap();
        let dropped = add.submit(1, 1).unwrap();
        let mut pipeline = add.pipeline().unwrap();
        pipeline.send(5, 6).unwrap();
        fork(
            (worker, session, module, add, by_name, big, ticket, dropped, pipeline),
            |(worker, session, module, add, by_name, big, ticket, dropped, mut pipeline)| {
                assert!(!pipeline.is_ready());
                assert!(matches!(pipeline.receive(), Err(CallError::Forked)));
                assert!(matches!(pipeline.send(1, 2), Err(CallError::Forked)));
                assert!(matches!(pipeline.calls([(1, 2)]).next(), Some(Err(CallError::Forked))));
                assert!(matches!(add.pipeline(), Err(CallError::Forked)));
                drop(pipeline);
                assert!(matches!(add.call(1, 2), Err(CallError::Forked)));
                assert!(matches!(by_name.call((1, 2)), Err(CallError::Forked)));
                assert!(matches!(add.submit(1, 2), Err(CallError::Forked)));
                assert!(matches!(session.ping(), Err(CallError::Forked)));
                assert!(matches!(session.close(), Err(CallError::Forked)));
                assert!(matches!(session.alloc(1), Err(CallError::Forked)));
                assert!(matches!(session.block(1), Err(CallError::Forked)));
                assert!(!big.write(0, &[1]) && !big.read(0, &mut [0]));
                assert!(matches!(session.read(remote, &mut [0; 8]), Err(CallError::Forked)));
                assert!(matches!(worker.session(), Err(StartError::Forked)));
                assert!(matches!(Worker::spawn(), Err(StartError::Forked)));
                assert!(module.function::<fn(i32)>("leave").is_err());
                worker.dispose();
                drop((dropped, ticket, big, by_name, add, module, session, worker));
            },
            |(worker, session, _module, add, by_name, big, ticket, dropped, mut pipeline)| {
                pipeline.send(7, 8).unwrap();
                assert_eq!(pipeline.receive().unwrap(), Some(11));
                assert_eq!(pipeline.receive().unwrap(), Some(15));
                assert_eq!(pipeline.receive().unwrap(), None);
                drop(pipeline);
                assert_eq!(ticket.wait().unwrap(), 42);
                drop(dropped);
                assert_eq!(add.call(1, 2).unwrap(), 3);
                assert_eq!(i32::try_from(by_name.call((4, 5)).unwrap()).unwrap(), 9);
                let mut back = vec![0; BYTES];
                assert!(big.read(0, &mut back));
                assert!(
                    back.iter().all(|byte| *byte == 7),
                    "the fork's drop of a block gave the parent's pages away"
                );
                session.ping().unwrap();
                assert!(worker.is_alive());
                worker.dispose();
                assert_eq!(worker.crash_report().unwrap().cause(), &Cause::Disposed);
            },
        );
    });
}

#[test]
fn a_fork_that_execs_can_be_a_host_of_its_own() {
    isolated("a_fork_that_execs_can_be_a_host_of_its_own", 120, || {
        let worker = Worker::spawn().unwrap();
        let session = session_of(&worker);
        // The standard library's own way of starting programs, with code between fork and exec.
        let mut command = rerun("host");
        let folder = tempfile::tempdir().unwrap();
        command.env(ENDING, "return").env(REPORT, folder.path().join("report"));
        // SAFETY: chdir is async-signal-safe, and the path fits on the stack: nothing is allocated.
        unsafe { command.pre_exec(|| nix::unistd::chdir("/").map_err(Into::into)) };
        let status = command.stdout(Stdio::null()).status().unwrap();
        assert!(status.success());
        session.ping().unwrap();
    });
}

/// Whether this kernel tells a process's exit status after it was collected (`PIDFD_GET_INFO` with exit status: Linux 6.15).
fn kernel_keeps_exit_status() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map_while(|part| part.trim().parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < (6, 15) {
        eprintln!(
            "Linux {} does not keep the status of a collected process: only Cause::Unknown is checked",
            release.trim()
        );
    }
    version >= (6, 15)
}

/// Workers that exit, that are killed, and that are disposed, while somebody else in the process may collect them first.
fn reports_are_right_although_others_collect(rounds: i32) {
    let told = kernel_keeps_exit_status();
    for round in 0..rounds {
        let code = round % 100 + 1;
        let worker = Worker::spawn().unwrap();
        let leave = session_of(&worker).load(Module::ffi(busy())).unwrap();
        let leave = leave.function::<fn(i32)>("leave").unwrap();
        let Err(CallError::Crashed(report)) = leave.call(code) else { panic!("the worker has exited") };
        let right = *report.cause() == Cause::Exited { code };
        assert!(right || (!told && *report.cause() == Cause::Unknown), "round {round}: {report}");

        let worker = Worker::spawn().unwrap();
        let session = session_of(&worker);
        kill(raw_pid(worker.pid()), Signal::SIGKILL).unwrap();
        let report = until("the report", || worker.crash_report());
        let right = *report.cause() == Cause::Signaled { signal: libc::SIGKILL, core_dumped: false };
        assert!(right || (!told && *report.cause() == Cause::Unknown), "round {round}: {report}");
        assert!(matches!(session.ping(), Err(CallError::Crashed(_))));

        let worker = Worker::spawn().unwrap();
        worker.dispose();
        assert_eq!(*worker.crash_report().unwrap().cause(), Cause::Disposed);
    }
}

#[test]
fn reports_are_right_when_the_host_ignores_sigchld() {
    isolated("reports_are_right_when_the_host_ignores_sigchld", 100, || {
        // SAFETY: SIG_IGN runs no code.
        unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
        reports_are_right_although_others_collect(60);
        // SAFETY: asks only.
        let now = unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
        assert_eq!(now, libc::SIG_IGN, "the library left the host's choice alone");
        assert_eq!(process::zombies(), Vec::<u32>::new());
    });
}

#[test]
fn reports_are_right_when_the_host_collects_every_child_itself() {
    isolated("reports_are_right_when_the_host_collects_every_child_itself", 100, || {
        std::thread::spawn(|| {
            loop {
                if nix::sys::wait::waitpid(None, None).is_err() {
                    std::thread::yield_now();
                }
            }
        });
        reports_are_right_although_others_collect(60);
    });
}

#[test]
fn the_host_has_no_zombie_and_the_same_signal_settings_after_its_workers() {
    isolated("the_host_has_no_zombie_and_the_same_signal_settings_after_its_workers", 100, || {
        let settings = || {
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            let wanted =
                |line: &&str| ["SigBlk", "SigIgn", "SigCgt"].iter().any(|name| line.starts_with(name));
            status.lines().filter(wanted).map(str::to_owned).collect::<Vec<_>>()
        };
        let before = settings();
        let worker = Worker::spawn().unwrap();
        session_of(&worker).ping().unwrap();
        kill(raw_pid(worker.pid()), Signal::SIGKILL).unwrap();
        until("the report", || worker.crash_report());
        Worker::spawn().unwrap().dispose();
        assert_eq!(process::zombies(), Vec::<u32>::new());
        assert_eq!(settings(), before);
    });
}

/// A call through a new worker works, and its standard descriptors lead somewhere.
fn check_new_worker(output: Output) {
    let worker = Worker::builder().stdout(output).stderr(output).spawn().unwrap();
    let add = session_of(&worker).load(Module::ffi(busy())).unwrap();
    let add = add.function::<fn(i32, i32) -> i32>("add").unwrap();
    assert_eq!(add.call(40, 2).unwrap(), 42);
    let open = descriptors(worker.pid());
    let standard: Vec<u32> = open.iter().map(|(fd, _)| *fd).filter(|fd| *fd < 3).collect();
    assert_eq!(standard, [0, 1, 2], "with {output:?} the worker has {open:?}");
    for (fd, target) in open {
        assert!(fd > 2 || !target.starts_with("socket:"), "descriptor {fd} of the worker is {target}");
    }
}

#[test]
fn a_host_without_standard_descriptors_has_working_workers() {
    isolated("a_host_without_standard_descriptors_has_working_workers", 100, || {
        let folder = tempfile::tempdir().unwrap();
        let note = folder.path().join("panic");
        let at = note.clone();
        std::panic::set_hook(Box::new(move |info| drop(std::fs::write(&at, info.to_string()))));
        // Kept, to tell what went wrong.
        let stderr = nix::unistd::dup(std::io::stderr()).unwrap();
        let done = std::thread::spawn(|| {
            for fd in 0..3 {
                // SAFETY: what this test is about: nothing in this process reads or writes them from here on.
                unsafe { libc::close(fd) };
            }
            for output in [Output::Capture, Output::Discard, Output::Inherit] {
                check_new_worker(output);
            }
        })
        .join();
        if done.is_err() {
            let _ = nix::unistd::write(&stderr, &std::fs::read(note).unwrap());
        }
        // The harness would write to descriptors that are now something else.
        // SAFETY: takes a number and does not return.
        unsafe { libc::_exit(i32::from(done.is_err())) };
    });
}

fn environment(pid: u32) -> String {
    String::from_utf8(std::fs::read(format!("/proc/{pid}/environ")).unwrap()).unwrap()
}

#[test]
fn the_workers_environment_is_what_was_configured_and_nothing_else() {
    let _watchdog = watchdog(120);
    let bare = Worker::spawn().unwrap();
    assert_eq!(environment(bare.pid()), "");
    let worker = Worker::builder()
        .env("COLOUR", "green")
        .inherit_env("CARGO_MANIFEST_DIR")
        .inherit_env("NOT_SET_ANYWHERE");
    let worker = worker.spawn().unwrap();
    let own = std::env::var("CARGO_MANIFEST_DIR").unwrap();
    let mut variables: Vec<String> =
        environment(worker.pid()).split_terminator('\0').map(str::to_owned).collect();
    variables.sort();
    assert_eq!(variables, [format!("CARGO_MANIFEST_DIR={own}"), "COLOUR=green".to_owned()]);
}

#[test]
fn descriptors_that_the_host_leaks_do_not_reach_the_worker() {
    isolated("descriptors_that_the_host_leaks_do_not_reach_the_worker", 100, || {
        let file = std::fs::File::open("/etc/passwd").unwrap();
        for fd in [3, 10, 57, 500, 900] {
            // SAFETY: duplicates onto numbers that are free in this young process, or are checked to be: none of them is close-on-exec.
            let free = unsafe { libc::fcntl(fd, libc::F_GETFD) } == -1;
            if free {
                // SAFETY: as above.
                assert_eq!(unsafe { libc::dup2(std::os::fd::AsRawFd::as_raw_fd(&file), fd) }, fd);
            }
        }
        let inherited = descriptors(std::process::id());
        assert!(inherited.iter().filter(|(_, target)| target == "/etc/passwd").count() > 3);
        let worker = Worker::spawn().unwrap();
        let sessions: Vec<Session> = (0..3).map(|_| session_of(&worker)).collect();
        // A session's first reply comes while its thread still closes what it needed to open.
        let open = until("the worker to have its four descriptors", || {
            let open = descriptors(worker.pid());
            (open.len() == 4).then_some(open)
        });
        assert_eq!(open[0], (0, "/dev/null".to_owned()));
        assert!(open[1].1.starts_with("pipe:") && open[1].0 == 1, "{open:?}");
        assert!(open[2].1.starts_with("pipe:") && open[2].0 == 2, "{open:?}");
        assert!(open[3].1.starts_with("socket:"), "{open:?}");
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", worker.pid())).unwrap();
        assert!(!maps.contains("/dev/shm/"), "nothing that is shared has a name");
        assert_eq!(
            process::region_mappings(worker.pid()),
            sessions.len() + 1,
            "one for each session, one for the crash page"
        );
    });
}

//! Limits, exceeded one by one in workers that are the host's own executable. The same for the lean program: `worker/tests/limits.rs`.

#[path = "common/faults.rs"]
mod faults;
#[path = "common/greedy.rs"]
#[macro_use]
mod greedy;

each_limit!(hotcell::Worker::builder());

/// `RLIMIT_NPROC` does not bind root, so the test becomes somebody else, in a process of its own; of a number that nobody has, since the kernel counts all of a user's processes.
#[test]
fn processes_of_an_ordinary_user_are_limited() {
    use hotcell::{Scarce, StartError, Worker};
    use nix::unistd::{Gid, Uid, geteuid, setgroups, setresgid, setresuid};
    use std::os::unix::fs::PermissionsExt;
    let _watchdog = faults::watchdog();
    if !faults::is_child() {
        faults::in_child("processes_of_an_ordinary_user_are_limited", &[]);
        return;
    }
    // Where anybody may read it.
    let folder = tempfile::tempdir().unwrap();
    let library = folder.path().join("libgreedy.so");
    std::fs::copy(greedy::greedy(), &library).unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::set_permissions(&library, std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut attempts = greedy::ATTEMPTS;
    if geteuid().is_root() {
        let (user, group) = (Uid::from_raw(1_000_000 + std::process::id()), Gid::from_raw(65534));
        setgroups(&[]).unwrap();
        setresgid(group, group, group).unwrap();
        setresuid(user, user, user).unwrap();
        attempts = 1;
    }
    for _ in 0..attempts {
        let worker = Worker::builder().processes_max(12).spawn().unwrap();
        let session = match worker.session() {
            Err(StartError::Scarce { what: Scarce::Processes }) if attempts > 1 => continue,
            opened => opened.unwrap(),
        };
        let threads = session.load(&*library).unwrap().function::<fn(i32) -> i32>("threads").unwrap();
        let started = threads.call(1000).unwrap();
        let second = worker.session().map(drop);
        session.ping().unwrap();
        match second {
            Err(error @ StartError::Scarce { what: Scarce::Processes }) if (1..=12).contains(&started) => {
                assert_eq!(error.code(), "ERR_PROCESSES_EXCEEDED");
                return;
            }
            other => eprintln!("{started} threads were started, and then: {other:?}"),
        }
    }
    panic!("in {attempts} attempts the limit was never seen");
}

//! Real workers under a clock that stands still until the test moves it.

use super::clock::Clock;
use super::*;
use crate::CallError;

const SECOND: Duration = Duration::from_secs(1);

/// Opens a session and crashes its worker; returns when the supervisor has booked that, at this time of the clock.
fn crash(supervisor: &Supervisor) {
    let session = supervisor.session(SessionRequest::new()).unwrap();
    let abort = session.load("libc.so.6").unwrap().function::<fn()>("abort").unwrap();
    assert!(matches!(abort.call(), Err(CallError::Crashed(_))));
    supervisor.snapshot();
}

fn policy() -> RestartPolicy {
    RestartPolicy::new(restart::Restart::OnCrash)
        .limit(2, 60 * SECOND)
        .backoff(SECOND, 4 * SECOND)
        .open_for(30 * SECOND)
}

#[test]
fn the_circuit_opens_after_the_last_restart_and_closes_when_its_time_has_come() {
    let clock = Clock::manual();
    let supervisor =
        Supervisor::builder().clock(&clock).restart(policy()).start_patience(Duration::ZERO).build().unwrap();
    let opened = supervisor.receiver(&[SupervisorEvent::CircuitOpened]);
    crash(&supervisor);
    crash(&supervisor);
    match supervisor.session(SessionRequest::new()) {
        Err(StartError::BackingOff { retry_after, .. }) => assert!(retry_after <= SECOND),
        other => panic!("{other:?}"),
    }
    clock.advance(SECOND);
    crash(&supervisor);
    clock.advance(10 * SECOND);
    match supervisor.session(SessionRequest::new()) {
        Err(StartError::CircuitOpen { retry_after, .. }) => assert_eq!(retry_after, 20 * SECOND),
        other => panic!("{other:?}"),
    }
    assert_eq!(supervisor.snapshot().workers[0].circuit_open_for, Some(20 * SECOND));
    clock.advance(20 * SECOND);
    assert_eq!(opened.try_iter().count(), 1);
    crash(&supervisor);
    assert!(matches!(
        supervisor.session(SessionRequest::new()),
        Err(StartError::CircuitOpen { retry_after, .. }) if retry_after == 30 * SECOND
    ));
    assert_eq!(opened.try_iter().count(), 1);
}

#[test]
fn a_request_waits_for_the_back_off_to_pass() {
    let clock = Clock::manual();
    let supervisor = Supervisor::builder().clock(&clock).restart(policy()).build().unwrap();
    crash(&supervisor);
    crash(&supervisor);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| supervisor.session(SessionRequest::new()).map(drop));
        clock.advance(SECOND);
        waiting.join().unwrap().unwrap();
    });
    assert_eq!(supervisor.snapshot().restarts, 2);
}

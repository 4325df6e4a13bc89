//! Ends the bench when a row stops making progress: several mechanisms here wait without a deadline for a peer that
//! may be gone. Peers die with the bench (see `process.rs`).

use std::process::exit;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

/// No single turn takes longer, unless its peer is lost.
const LIMIT: Duration = Duration::from_secs(60);

/// Watches until it is dropped.
pub struct Watchdog(Sender<String>);

impl Watchdog {
    pub fn start() -> Self {
        let (sender, turns) = channel();
        thread::spawn(move || watch(&turns));
        Self(sender)
    }

    /// The turn named so begins, and the one before it is over.
    pub fn turn(&self, row: &str) {
        // The other end exits the process rather than go away.
        let _ = self.0.send(row.to_owned());
    }
}

fn watch(turns: &Receiver<String>) {
    let mut row = String::from("the first row");
    loop {
        match turns.recv_timeout(LIMIT) {
            Ok(next) => row = next,
            Err(RecvTimeoutError::Timeout) => {
                eprintln!("{row} made no progress for {LIMIT:?}");
                exit(1);
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

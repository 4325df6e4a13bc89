//! The mechanisms one would otherwise use, each set up as its own documentation has it.

pub mod bytes;
pub mod iceoryx;
pub mod pthread_event;
pub mod servo_ipc;

use crate::roster::Roster;

pub fn enlist(roster: &mut Roster) {
    bytes::enlist(roster);
    pthread_event::enlist(roster);
    iceoryx::enlist(roster);
    servo_ipc::enlist(roster);
}

//! The mechanisms one would otherwise use, each set up as its own documentation has it, for its shortest round trip.

pub mod bytes;
pub mod iceoryx;
pub mod pthread_event;
pub mod servo_ipc;

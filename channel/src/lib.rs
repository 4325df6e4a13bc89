//! What the two sides of a hotcell share, and nothing else: record layouts, the shared region, the slot's
//! state machine, waiting, the arena's allocator, control messages and thin system calls.
//!
//! This crate is the wall between `hotcell` (the host) and `hotcell-worker` (the program in the cell). It is
//! published because both need it; its API is not stable and not meant for other users.
//!
//! **What it does not do:** start processes, load libraries, know what a call means.
//!
//! Unsafe code is confined to `region` (the only owner of the mapping's base pointer), `copy` (payload bytes in and out of it) and `sys` (system
//! calls). Everything else is safe Rust over atomics.

pub mod arena;
#[cfg(not(loom))]
pub mod control;
#[cfg(not(loom))]
mod copy;
pub mod crash;
mod hint;
pub mod layout;
#[cfg(not(loom))]
pub mod placement;
#[cfg(not(loom))]
pub mod region;
pub mod session;
pub mod signature;
pub mod slot;
#[cfg(not(loom))]
pub mod socket;
pub mod stream;
pub mod sys;
pub mod wait;
#[cfg(all(test, not(loom)))]
mod wire_format;

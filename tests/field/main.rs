//! What real libraries, runtimes and hosts do to a worker, a theme to a module.

mod closing;
#[path = "../common/mod.rs"]
mod common;
mod guilty;
mod hosts;
mod memory;
mod monitor;
mod runtimes;
mod spawning;
mod tenants;
mod verdicts;

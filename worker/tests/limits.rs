//! Limits, exceeded one by one in workers that are the lean program. The same for the host's own executable: the host's `tests/limits.rs`.

#[path = "../../tests/common/faults.rs"]
mod faults;
#[path = "../../tests/common/greedy.rs"]
#[macro_use]
mod greedy;

each_limit!(hotcell::Worker::builder().program(env!("CARGO_BIN_EXE_hotcell-worker")));

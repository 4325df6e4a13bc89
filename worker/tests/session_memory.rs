//! Memory of a session in the lean worker: see `tests/session_memory.rs` of the workspace.

#[path = "../../tests/common/faults.rs"]
mod faults;
#[path = "../../tests/common/memory_cases.rs"]
mod memory_cases;

fn worker() -> hotcell::WorkerBuilder {
    hotcell::Worker::builder().program(env!("CARGO_BIN_EXE_hotcell-worker"))
}

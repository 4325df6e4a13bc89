//! Memory of a session in a shared worker: what counts, what a refusal does, and what it leaves alone. Here in a worker that is the host's own executable; `worker/tests` has
//! the same for the lean one.

#[path = "common/faults.rs"]
mod faults;
#[path = "common/memory_cases.rs"]
mod memory_cases;

fn worker() -> hotcell::WorkerBuilder {
    hotcell::Worker::builder()
}

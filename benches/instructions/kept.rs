//! The counts that a change is held to. Who lowers one writes the new figure here; who raises one says in the commit what it buys.

/// The compiler that the figures are from. Another one chooses other instructions, and is given more room.
pub(crate) const COMPILER: &str = "rustc 1.95.0";

/// Name of the call, and instructions of the host's side and of the worker's side.
pub(crate) const KEPT: [(&str, u64, u64); 4] = [
    ("typed, two i32", 51, 64),
    ("typed, six words", 69, 68),
    ("typed, eight doubles", 77, 71),
    ("by name, two i32", 79, 64),
];

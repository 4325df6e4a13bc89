//! The placement of sessions in the lean program: the same checks as for the host's own executable.

#[path = "../../tests/placement.rs"]
mod checks;

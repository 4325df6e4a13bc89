//! A worker that lies.
fn main() {}

//! Crash reports name the guilty: each way to crash, its cause, its function and its frames.

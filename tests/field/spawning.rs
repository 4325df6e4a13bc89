//! Starting workers: signals, scheduling, wrappers, forks and small stacks of the host.

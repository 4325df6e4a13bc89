//! Language runtimes in a worker, as docs/runtimes.md describes them.

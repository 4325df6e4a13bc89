//! The host lives within its limits of memory and file size, and so does what a dead worker leaves.

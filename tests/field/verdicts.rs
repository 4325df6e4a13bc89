//! What an end is put down to: limits, deadlines, stopped time, and the first cause for all.

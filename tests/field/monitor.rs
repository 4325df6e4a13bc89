//! The monitor waits for nobody: not for a descriptor, a subscriber, a flood of output or a kill.

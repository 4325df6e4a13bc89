//! Hosts under each limit and filter that containers set: works, or an error that names the cure.

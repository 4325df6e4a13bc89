//! Our own rows.

use crate::roster::Roster;

// The names the bars in `report.rs` look for.
pub const TYPED: &str = "hotcell/typed";
pub const TYPED_SPIN: &str = "hotcell/typed_spin";
pub const BY_NAME: &str = "hotcell/by_name";
pub const PARKED: &str = "hotcell/parked";

/// Each row is a type that implements [`Row`](crate::measure::Row), added here under its name. It is opened while this
/// process may still use all its CPUs, and puts its worker where the other peers are, with `Cpus::pin_peer`.
pub fn enlist(_roster: &mut Roster) {
    // None yet.
}

//! A worker that lies: it speaks the protocol as it should, up to the lie that the variable `LIE` names.
//!
//! `LIE` is a name, and after a colon a number where the lie has variants: `state:4`. The lies are in three files by the place where they are told:
//! [`control`] (the handshake and the control socket), [`session`] (the shared memory) and [`process`] (how a process lives and ends). What an
//! honest worker would do at that point is in [`peer`].

mod control;
mod memory;
mod peer;
mod process;
mod random;
mod session;
mod stream;

use peer::Peer;

/// What to lie about.
#[derive(Clone, Debug)]
pub(crate) struct Lie {
    name: String,
    number: u64,
}

impl Lie {
    fn from_environment() -> Self {
        let text = std::env::var("LIE").unwrap_or_default();
        let (name, number) = text.split_once(':').unwrap_or((&text, "0"));
        Self { name: name.to_owned(), number: number.parse().unwrap_or(0) }
    }
}

fn main() {
    // The host's spawner blocks all signals, and the liar would inherit that.
    hotcell_channel::sys::reset_signals();
    // A liar that nobody kills goes by itself.
    process::end_after_seconds(600);
    let lie = Lie::from_environment();
    let Some(peer) = Peer::from_stdin() else {
        eprintln!("hotcell-hostile plays a worker; only a host can start it");
        std::process::exit(2);
    };
    if lie.name == "random" {
        random::run(peer, lie.number);
    }
    control::tell(&peer, &lie);
    // Those that come here lie in a session, or are honest.
    peer.serve(move |session| session::tell(session, &lie));
}

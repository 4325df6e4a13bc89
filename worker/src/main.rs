//! The lean worker: see the library of the same name. Not meant to be started by hand.

use std::os::unix::ffi::OsStrExt;

fn main() {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    match hotcell_worker::host_of_worker_arguments(arguments.iter().map(|a| a.as_bytes())) {
        Some(host) => hotcell_worker::run(host),
        None => {
            eprintln!(
                "hotcell-worker {}: this program is started by hotcell hosts: name its path in Worker::builder().program(..) or in the \
                 environment variable HOTCELL_WORKER of the host",
                env!("CARGO_PKG_VERSION")
            );
            std::process::exit(2);
        }
    }
}

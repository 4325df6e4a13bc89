//! What the benches of this package share: the command line, the other process, the clock, how rows take turns, and how
//! they are reported. The benches themselves are in `benches`.

pub mod cell;
pub mod clock;
pub mod command_line;
pub mod cpus;
pub mod floor;
pub mod measure;
pub mod memory;
pub mod peers;
pub mod pipeline;
pub mod process;
pub mod report;
pub mod roster;
pub mod stream;
pub mod verdict;
pub mod watchdog;

use std::error::Error;

pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// What every peer computes.
#[inline(always)]
pub fn add(a: i32, b: i32) -> i32 {
    a.wrapping_add(b)
}

/// The peer's half of a row, in a process of its own.
fn serve(role: &str, caller: process::Caller) -> Result<()> {
    match role {
        floor::RECORD => floor::serve_record(caller),
        floor::TWO_LINES => floor::serve_two_lines(caller),
        floor::FUTEX => floor::serve_futex(caller),
        floor::COPY => floor::serve_copy(caller),
        stream::STREAM => stream::serve(caller),
        peers::bytes::ROLE => peers::bytes::serve(caller),
        peers::bytes::POLLING_ROLE => peers::bytes::serve_polling(caller),
        peers::bytes::LARGE_ROLE => peers::bytes::serve_large(caller),
        peers::pthread_event::EVENT | peers::pthread_event::BUSY => peers::pthread_event::serve(role, caller),
        peers::iceoryx::NAME => peers::iceoryx::serve(caller),
        peers::servo_ipc::NAME => peers::servo_ipc::serve(caller),
        process::BUSY => process::serve_busy(caller),
        unknown => Err(format!("no such role: {unknown}").into()),
    }
}

/// A whole bench program: its other processes, its command line, its errors.
pub fn main(
    usage: &command_line::Usage,
    bench: impl FnOnce(&command_line::Options) -> Result<std::process::ExitCode>,
) -> std::process::ExitCode {
    use std::process::ExitCode;
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some(role) = process::role(&arguments) {
        return process::run_as_peer(role, &arguments, serve);
    }
    match usage.parse(&arguments) {
        Ok(command_line::Command::Help) => {
            print!("{}", usage.help());
            ExitCode::SUCCESS
        }
        Ok(command_line::Command::Run(options)) => bench(&options).unwrap_or_else(|error| {
            eprintln!("{}: {}", usage.bench, with_causes(&*error));
            ExitCode::FAILURE
        }),
        Err(message) => {
            eprintln!("{}: {message}\n\n{}", usage.bench, usage.help());
            ExitCode::from(2)
        }
    }
}

/// An error and what led to it, in one line.
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

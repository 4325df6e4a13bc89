#![allow(unsafe_code)]
//! Becoming the worker: the host's own executable, started again, and an initialiser that notices before `main` runs.
//!
//! **Law.** The initialiser runs in every process that has this library in it, before `main` and before most other constructors. In all but one case it
//! looks at the arguments and returns. Only a process whose arguments are exactly those of a worker, in the executable that this code is part of, becomes
//! a worker, and then never returns.
//!
//! The dynamic linker runs `.init_array` entries with `(argc, argv, envp)` on Linux with glibc; elsewhere there is no initialiser, and the refusal names the way out. The entry's number (`00101`) sorts it behind the Rust standard library's own
//! and before constructors without a number, so a host's own constructors do not run in a worker (those that do, with smaller numbers or in
//! libraries that the executable needs, can ask [`is_worker`](crate::is_worker)).

use crate::error::StartError;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

static INITIALISED: AtomicBool = AtomicBool::new(false);

// An entry of .init_array must be a function pointer of this type.
#[cfg(target_env = "gnu")]
#[used]
#[unsafe(link_section = ".init_array.00101")]
static INITIALISER: extern "C" fn(c_int, *const *const c_char, *const *const c_char) = initialise;

#[cfg(target_env = "gnu")]
extern "C" fn initialise(argc: c_int, argv: *const *const c_char, _envp: *const *const c_char) {
    INITIALISED.store(true, Relaxed);
    // A worker has exactly three arguments with its name.
    if argc != 3 || argv.is_null() {
        return;
    }
    let arguments = [1, 2].map(|at| {
        // SAFETY: argv has argc (3) pointers and a null behind them (System V ABI).
        let argument = unsafe { argv.add(at) };
        // SAFETY: as above.
        let argument = unsafe { *argument };
        // SAFETY: each of the argc pointers is to a NUL-terminated string that lives as long as the process.
        unsafe { CStr::from_ptr(argument) }
    });
    let Some(host) = hotcell_worker::host_of_worker_arguments(arguments.iter().map(|a| a.to_bytes())) else {
        return;
    };
    // A library of a foreign executable does not become a worker: that executable was not started by us.
    if is_in_main_program() {
        hotcell_worker::run(host);
    }
}

/// Whether this process was started as a worker, from its own arguments. For constructors of a host that run before ours.
pub(crate) fn is_worker() -> bool {
    let Ok(arguments) = std::fs::read("/proc/self/cmdline") else { return false };
    let mut arguments = arguments.split(|b| *b == 0).skip(1).collect::<Vec<_>>();
    // The list ends with a NUL.
    arguments.pop();
    hotcell_worker::host_of_worker_arguments(arguments.into_iter()).is_some() && is_in_main_program()
}

/// The program that makes a worker of this host: the running executable itself.
pub(crate) fn own_program() -> Result<PathBuf, StartError> {
    if INITIALISED.load(Relaxed) && is_in_main_program() {
        // Resolved by the child, whose executable is still this one then, even if its file has been replaced or deleted.
        return Ok(PathBuf::from("/proc/self/exe"));
    }
    let executable = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("this executable"));
    Err(StartError::ForeignExecutable { executable })
}

/// Whether this code is part of the main program, rather than of a library loaded into it.
fn is_in_main_program() -> bool {
    struct Search {
        address: usize,
        found: bool,
    }
    unsafe extern "C" fn first_object(
        info: *mut libc::dl_phdr_info,
        _size: usize,
        data: *mut c_void,
    ) -> c_int {
        // SAFETY: dl_iterate_phdr passes a valid info.
        let info = unsafe { &*info };
        // SAFETY: dl_iterate_phdr hands `data` through, which is the Search below, and nobody else has it meanwhile.
        let search = unsafe { &mut *data.cast::<Search>() };
        // SAFETY: the object has `dlpi_phnum` program headers at `dlpi_phdr`.
        let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum)) };
        let base = usize::try_from(info.dlpi_addr).unwrap_or(0);
        search.found = headers.iter().filter(|h| h.p_type == libc::PT_LOAD).any(|h| {
            let start = base.wrapping_add(usize::try_from(h.p_vaddr).unwrap_or(0));
            let bytes = usize::try_from(h.p_memsz).unwrap_or(0);
            search.address.wrapping_sub(start) < bytes
        });
        1 // the first object is the main program: look no further
    }
    let mut search = Search { address: (&raw const INITIALISED).addr(), found: false };
    // SAFETY: the callback has the right type, keeps no pointer, and `data` lives for the call.
    unsafe { libc::dl_iterate_phdr(Some(first_object), (&raw mut search).cast()) };
    search.found
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_test_binary_is_its_own_program_and_no_worker() {
        assert!(super::own_program().is_ok());
        assert!(!super::is_worker());
    }
}

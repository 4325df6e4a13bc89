#![allow(unsafe_code)]
//! The shared libraries of one session, and their symbols.
//!
//! **Law.** Loading a library runs foreign code (its constructors), and a symbol's address is foreign code: that is the purpose of this
//! process. A library stays loaded as long as any [`Callable`] of its session may be called: both live in the session and go with it.

use crate::allocations;
use crate::dispatch::Callable;
use crate::linker::{self, OpenError};
use crate::serve::failed;
use hotcell_channel::session::{Answer, FailureKind};
use hotcell_channel::signature::Signature;
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LAZY, RTLD_LOCAL, RTLD_NOW};
use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;

#[derive(Debug, Default)]
pub(crate) struct Libraries {
    loaded: Vec<Library>,
    /// The session has a memory limit: what its modules allocate is counted.
    counted: bool,
}

impl Libraries {
    pub(crate) fn new(counted: bool) -> Self {
        Self { loaded: Vec::new(), counted }
    }

    pub(crate) fn load(&mut self, name: &[u8], now: bool, global: bool) -> Answer {
        let name = OsStr::from_bytes(name);
        // What can be told without the linker's words is told by the file itself.
        let has_path = name.as_bytes().contains(&b'/');
        if has_path && let Err(answer) = inspect(name) {
            return answer;
        }
        let flags = if now { RTLD_NOW } else { RTLD_LAZY } | if global { RTLD_GLOBAL } else { RTLD_LOCAL };
        let opened = if self.counted {
            linker::open(name, flags)
        } else {
            // SAFETY: runs the library's constructors, as the host asks; see the module's law.
            unsafe { Library::open(Some(name), flags) }.map_err(OpenError::Linker)
        };
        match opened {
            Ok(library) => {
                self.loaded.push(library);
                match u32::try_from(self.loaded.len() - 1) {
                    Ok(index) => Answer::Loaded(index),
                    Err(_) => failed(FailureKind::Linker, "too many modules"),
                }
            }
            // The linker says so in words only.
            Err(OpenError::Linker(error)) if no_descriptor_is_left() => {
                failed(FailureKind::OpenFiles, linkers_words(&error))
            }
            Err(OpenError::Linker(error)) => classify(&name.to_string_lossy(), linkers_words(&error)),
            Err(OpenError::Uncounted(why)) => failed(FailureKind::Linker, why),
        }
    }

    /// Unloads what was loaded last.
    pub(crate) fn unload_last(&mut self) {
        drop(self.loaded.pop());
    }

    pub(crate) fn resolve(
        &self,
        module: u32,
        symbol: &str,
        signature: &Signature,
        errno: bool,
    ) -> Result<Callable, Answer> {
        let library = self
            .loaded
            .get(module as usize)
            .ok_or_else(|| failed(FailureKind::UnknownModule, format!("module {module}")))?;
        // SAFETY: the symbol is only used as an address, whatever it is; calling it is `Callable`'s business.
        let found = unsafe { library.get::<Option<unsafe extern "C" fn()>>(symbol.as_bytes()) };
        let address = match found {
            Ok(found) => *found,
            Err(error) => return Err(failed(FailureKind::MissingSymbol, linkers_words(&error))),
        };
        let address =
            address.ok_or_else(|| failed(FailureKind::MissingSymbol, "the symbol's address is null"))?;
        let address = if self.counted { counting(address) } else { address };
        Callable::new(address, signature, errno).map_err(|why| failed(FailureKind::BadSignature, why))
    }
}

/// The function that the session's own modules call in place of this one: a host that calls `malloc` by name is counted like them.
fn counting(function: unsafe extern "C" fn()) -> unsafe extern "C" fn() {
    let ours = allocations::in_place_of(function as usize);
    // SAFETY: the address is the function's, or that of one which takes its place with the same contract.
    unsafe { std::mem::transmute::<usize, unsafe extern "C" fn()>(ours) }
}

/// Whether the process has as many descriptors open as it may. Asked by making one more.
fn no_descriptor_is_left() -> bool {
    let error = match std::io::stdin().as_fd().try_clone_to_owned() {
        Ok(_) => return false,
        Err(error) => error,
    };
    error.raw_os_error() == Some(libc::EMFILE)
}

/// The dynamic linker's own text, which is the error's source in libloading 0.9.
fn linkers_words(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), ToString::to_string)
}

/// The file's own story, before the dynamic linker is asked.
fn inspect(path: &OsStr) -> Result<(), Answer> {
    use std::io::Read;
    use std::os::unix::fs::OpenOptionsExt;
    let io = |error: std::io::Error| {
        if error.raw_os_error() == Some(libc::EMFILE) {
            return failed(FailureKind::OpenFiles, error.to_string());
        }
        let kind = match error.kind() {
            std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory => FailureKind::NotFound,
            _ => FailureKind::Unreadable,
        };
        failed(kind, error.to_string())
    };
    // Non-blocking, so that a FIFO by that name is an error and not a wait.
    let mut file =
        std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(io)?;
    if !file.metadata().map_err(io)?.is_file() {
        return Err(failed(FailureKind::NotElf, "not a regular file"));
    }
    let mut header = [0u8; 20];
    let mut length = 0;
    while length < header.len() {
        match file.read(&mut header[length..]).map_err(io)? {
            0 => break,
            n => length += n,
        }
    }
    if length < 4 || header[..4] != *b"\x7fELF" {
        return Err(failed(
            FailureKind::NotElf,
            format!("a file of {length} or more bytes without the ELF magic"),
        ));
    }
    let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let (class, kind, machine) = (header[4], half(16), half(18));
    const OURS: u16 = if cfg!(target_arch = "x86_64") {
        62
    } else if cfg!(target_arch = "aarch64") {
        183
    } else {
        0
    };
    const SHARED_OBJECT: u16 = 3;
    if length < header.len() || class != 2 || (OURS != 0 && machine != OURS) || kind != SHARED_OBJECT {
        return Err(failed(
            FailureKind::WrongKind,
            format!(
                "ELF class {class}, type {kind}, machine {machine}, where class 2, type 3, machine {OURS} is needed"
            ),
        ));
    }
    Ok(())
}

/// Sorts the dynamic linker's words. They are English: a worker has no locale in its environment, and glibc's are stable for decades.
fn classify(name: &str, text: String) -> Answer {
    let kind = if text.contains("cannot open shared object file") {
        // `<what>: cannot open shared object file: <why>`; what is missing is either the module itself or one of its needs.
        let missing = text.split(": cannot open").next().unwrap_or_default();
        if missing == name {
            if text.contains("No such file") { FailureKind::NotFound } else { FailureKind::Unreadable }
        } else {
            FailureKind::MissingDependency
        }
    } else if text.contains("undefined symbol") {
        FailureKind::MissingImport
    } else if text.contains("invalid ELF header") || text.contains("file too short") {
        FailureKind::NotElf
    } else if text.contains("wrong ELF class") || text.contains("cannot dynamically load") {
        FailureKind::WrongKind
    } else {
        FailureKind::Linker
    };
    failed(kind, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(answer: &Answer) -> FailureKind {
        match answer {
            Answer::Failed { kind, .. } => *kind,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn each_way_to_fail_has_its_kind() {
        let mut libraries = Libraries::default();
        let mut load = |name: &str| kind(&libraries.load(name.as_bytes(), true, false));
        assert_eq!(load("/no/such/file.so"), FailureKind::NotFound);
        assert_eq!(load("libno-such-thing.so.9"), FailureKind::NotFound);
        assert_eq!(load(concat!(env!("CARGO_MANIFEST_DIR"), "/src/library.rs")), FailureKind::NotElf);
        assert_eq!(load("/dev/null"), FailureKind::NotElf);
        assert_eq!(load("/proc"), FailureKind::NotElf);
    }

    #[test]
    fn the_linkers_words_are_sorted() {
        let sort = |text: &str| kind(&classify("libfoo.so", text.into()));
        let missing = "cannot open shared object file: No such file or directory";
        assert_eq!(sort(&format!("libfoo.so: {missing}")), FailureKind::NotFound);
        assert_eq!(sort(&format!("libbar.so.1: {missing}")), FailureKind::MissingDependency);
        assert_eq!(sort("libfoo.so: undefined symbol: bar"), FailureKind::MissingImport);
        assert_eq!(sort("libfoo.so: something new"), FailureKind::Linker);
    }
}

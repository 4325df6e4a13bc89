//! The native code that the benches call, compiled once for each of them.

use hotcell::{Module, Session};
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// The functions touch the first and the last byte only: what is measured is how bytes travel, not what is done with them.
const SOURCE: &str = r#"
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
int32_t add(int32_t a, int32_t b) { return a + b; }
uint32_t take(const uint8_t *bytes, uint64_t length) { return bytes[0] + bytes[length - 1]; }
/* One byte of each cache line. */
uint32_t skim(const uint8_t *bytes, uint64_t length) {
    uint32_t sum = 0;
    for (uint64_t i = 0; i < length; i += 64) sum += bytes[i];
    return sum;
}
void give(uint8_t *bytes, uint64_t length) { bytes[0] = 7; bytes[length - 1] = 9; }
uint64_t length(const char *text) { return strlen(text); }
const char *name(void) { return "a name of 20 letters"; }
const char *story(void) {
    static char text[4001];
    if (!text[0]) memset(text, 's', 4000);
    return text;
}
void die(void) { abort(); }
"#;

/// The compiled library, in a directory that goes with it.
pub(crate) struct Library {
    path: PathBuf,
    _directory: TempDir,
}

impl Library {
    /// Compiles it with the system's C compiler.
    pub(crate) fn compile() -> Library {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        let (source, path) = (directory.path().join("native.c"), directory.path().join("libnative.so"));
        std::fs::write(&source, SOURCE).expect("the temporary directory can be written");
        let done =
            Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&path).arg(&source).status();
        let done = done.expect("the benches need the C compiler cc: install gcc or clang");
        assert!(done.success(), "cc failed: {done}");
        Library { path, _directory: directory }
    }

    /// Where it is.
    #[allow(dead_code)] // not every bench opens its sessions itself
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Loads it in a session.
    #[allow(dead_code)]
    pub(crate) fn load(&self, session: &Session) -> Module {
        session.load(&self.path).expect("the library that was just compiled can be loaded")
    }
}

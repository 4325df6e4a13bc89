//! Our own rows: `add` in a C library, called in a worker by typed handle and by name, under each waiting policy.

use std::path::{Path, PathBuf};
use std::process::Command;

use hotcell::{DynFunction, Function, WaitPolicy, Worker};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::Result;
use crate::cpus::Cpus;
use crate::measure::Row;
use crate::roster::Roster;

// The names the bars in `report.rs` look for.
pub const TYPED: &str = "hotcell/typed";
pub const TYPED_SPIN: &str = "hotcell/typed_spin";
pub const BY_NAME: &str = "hotcell/by_name";
pub const PARKED: &str = "hotcell/parked";

/// Each row has a worker of its own, opened while this process may still use all its CPUs.
pub fn enlist(roster: &mut Roster) {
    roster.add_in_places(TYPED, |cpus| Typed::open(cpus, WaitPolicy::Adaptive));
    roster.add_in_places(TYPED_SPIN, |cpus| Typed::open(cpus, WaitPolicy::Spin));
    roster.add_in_places(BY_NAME, |cpus| ByName::open(cpus, WaitPolicy::Adaptive));
    roster.add_in_places("hotcell/by_name_spin", |cpus| ByName::open(cpus, WaitPolicy::Spin));
    roster.add(PARKED, |cpus| Typed::open(cpus, WaitPolicy::Park).map(Parked));
    roster.add("hotcell/by_name_parked", |cpus| ByName::open(cpus, WaitPolicy::Park).map(Parked));
}

/// A worker with the library loaded, on the peer's CPU.
struct Cell {
    module: hotcell::Module,
    worker: Worker,
    policy: WaitPolicy,
    _folder: Folder,
}

impl Cell {
    fn open(cpus: &Cpus, policy: WaitPolicy) -> Result<Self> {
        if policy == WaitPolicy::Spin {
            cpus.require_two()?;
        }
        let folder = Folder::new()?;
        let worker = Worker::builder().wait(policy).spawn()?;
        let module = worker.session()?.load(folder.library()?)?;
        cpus.pin_peer(worker.pid())?;
        let cell = Self { module, worker, policy, _folder: folder };
        cell.rest();
        Ok(cell)
    }

    /// A worker that spins would disturb the rows that come after it, so it is stopped between its turns. The others go to sleep by
    /// themselves.
    fn rest(&self) {
        self.signal(Signal::SIGSTOP);
    }

    fn wake(&self) {
        self.signal(Signal::SIGCONT);
    }

    fn signal(&self, signal: Signal) {
        if self.policy == WaitPolicy::Spin {
            kill(Pid::from_raw(self.worker.pid() as i32), signal).expect("the worker lives");
        }
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        if self.worker.is_alive() {
            self.wake();
        }
    }
}

/// Where the library is compiled; removed with its content.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self> {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("hotcell-compare-{}-{number}", std::process::id()));
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }

    fn library(&self) -> Result<PathBuf> {
        let (source, library) = (self.0.join("add.c"), self.0.join("libadd.so"));
        std::fs::write(&source, "int add(int a, int b) { return (int)((unsigned)a + (unsigned)b); }\n")?;
        compile(&source, &library)?;
        Ok(library)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn compile(source: &Path, library: &Path) -> Result<()> {
    let status =
        Command::new("cc").args(["-shared", "-fPIC", "-O2", "-o"]).arg(library).arg(source).status()?;
    if status.success() { Ok(()) } else { Err(format!("cc: {status}").into()) }
}

struct Typed {
    add: Function<fn(i32, i32) -> i32>,
    cell: Cell,
}

impl Typed {
    fn open(cpus: &Cpus, policy: WaitPolicy) -> Result<Self> {
        let cell = Cell::open(cpus, policy)?;
        cell.wake();
        let add = cell.module.function("add")?;
        cell.rest();
        Ok(Self { add, cell })
    }
}

impl Row for Typed {
    #[inline(always)]
    fn call(&mut self, a: i32, b: i32) -> i32 {
        self.add.call(a, b).expect("the worker lives")
    }

    fn wake(&mut self) {
        self.cell.wake();
    }

    fn rest(&mut self) {
        self.cell.rest();
    }
}

struct ByName {
    add: DynFunction,
    cell: Cell,
}

impl ByName {
    fn open(cpus: &Cpus, policy: WaitPolicy) -> Result<Self> {
        let cell = Cell::open(cpus, policy)?;
        cell.wake();
        let add = cell.module.prototype("int add(int, int)")?;
        cell.rest();
        Ok(Self { add, cell })
    }
}

impl Row for ByName {
    #[inline(always)]
    fn call(&mut self, a: i32, b: i32) -> i32 {
        self.add.call((a, b)).and_then(TryInto::try_into).expect("the worker lives")
    }

    fn wake(&mut self) {
        self.cell.wake();
    }

    fn rest(&mut self) {
        self.cell.rest();
    }
}

/// A row under the parking policy: its CPUs go idle.
struct Parked<R>(R);

impl<R: Row> Row for Parked<R> {
    const IDLES: bool = true;

    #[inline(always)]
    fn call(&mut self, a: i32, b: i32) -> i32 {
        self.0.call(a, b)
    }
}

//! Our own rows: a small C library in a worker.

use std::path::PathBuf;
use std::process::Command;
use std::rc::Rc;

use hotcell::{
    Block, DynFunction, Function, In, InOut, Module, SessionBuilder, WaitPolicy, Worker, WorkerBuilder,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::Result;
use crate::cpus::Cpus;
use crate::floor::{check, eight_doubles, operands};
use crate::measure::Row;

/// What every function does is as little as shows that it ran: bytes are what is measured, not what is done with them.
const SOURCE: &str = r"
#include <stdint.h>
int add(int a, int b) { return (int)((unsigned)a + (unsigned)b); }
int64_t sum6(int64_t a, int64_t b, int64_t c, int64_t d, int64_t e, int64_t f) { return a + b + c + d + e + f; }
double sum8(double a, double b, double c, double d, double e, double f, double g, double h) { return a + b + c + d + e + f + g + h; }
void edges(uint8_t *bytes, uint64_t length) { bytes[0]++; bytes[length - 1]++; }
void touch(uint8_t *bytes, uint64_t length) { for (uint64_t i = 0; i < length; i++) bytes[i]++; }
int first(const uint8_t *bytes, uint64_t length) { return bytes[0] + (int)(length & 1); }
void fault(void) { *(volatile int *)0 = 1; }
";

/// The library, compiled; its folder goes with it.
pub struct Library {
    pub path: PathBuf,
    _folder: tempfile::TempDir,
}

impl Library {
    pub fn compile() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("hotcell-compare-").tempdir()?;
        let (source, path) = (folder.path().join("bench.c"), folder.path().join("libbench.so"));
        std::fs::write(&source, SOURCE)?;
        let done =
            Command::new("cc").args(["-shared", "-fPIC", "-O3", "-o"]).arg(&path).arg(&source).status();
        let done =
            done.map_err(|error| format!("the benches need the C compiler cc (gcc or clang): {error}"))?;
        if done.success() { Ok(Self { path, _folder: folder }) } else { Err(format!("cc: {done}").into()) }
    }
}

/// A worker with the library loaded, on the peer's CPU.
pub struct Cell {
    pub module: Module,
    pub worker: Worker,
    policy: WaitPolicy,
    _library: Library,
}

impl Cell {
    pub fn open(cpus: &Cpus, policy: WaitPolicy) -> Result<Rc<Self>> {
        if policy == WaitPolicy::Spin {
            cpus.require_two()?;
        }
        Self::open_with(cpus, policy, Worker::builder(), SessionBuilder::new())
    }

    pub fn open_with(
        cpus: &Cpus,
        policy: WaitPolicy,
        worker: WorkerBuilder,
        session: SessionBuilder,
    ) -> Result<Rc<Self>> {
        let library = Library::compile()?;
        let worker = worker.spawn()?;
        let module = worker.session_with(session.wait(policy))?.load(library.path.as_path())?;
        cpus.pin_peer(worker.pid())?;
        Ok(Rc::new(Self { module, worker, policy, _library: library }))
    }

    /// A worker that spins would disturb the rows that come after it, so it is stopped between its turns. The others go to sleep by
    /// themselves.
    pub fn rest(&self) {
        self.signal(Signal::SIGSTOP);
    }

    pub fn wake(&self) {
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

/// `add` by its Rust type.
pub struct Typed {
    add: Function<fn(i32, i32) -> i32>,
    cell: Rc<Cell>,
}

impl Typed {
    /// In a cell that is awake.
    pub fn new(cell: &Rc<Cell>) -> Result<Self> {
        let add = cell.module.function("add")?;
        cell.rest();
        Ok(Self { add, cell: Rc::clone(cell) })
    }
}

impl Row for Typed {
    #[inline(always)]
    fn step(&mut self, number: u64) {
        let (a, b) = operands(number);
        check(self.add.call(a, b).expect("the worker lives"), (a, b));
    }

    fn wake(&mut self) {
        self.cell.wake();
    }

    fn rest(&mut self) {
        self.cell.rest();
    }
}

/// `add` by its declaration, resolved once.
pub struct ByName {
    add: DynFunction,
    cell: Rc<Cell>,
}

impl ByName {
    pub fn new(cell: &Rc<Cell>) -> Result<Self> {
        let add = cell.module.prototype("int add(int, int)")?;
        cell.rest();
        Ok(Self { add, cell: Rc::clone(cell) })
    }
}

impl Row for ByName {
    #[inline(always)]
    fn step(&mut self, number: u64) {
        let (a, b) = operands(number);
        let sum: i32 = self.add.call((a, b)).and_then(TryInto::try_into).expect("the worker lives");
        check(sum, (a, b));
    }

    fn wake(&mut self) {
        self.cell.wake();
    }

    fn rest(&mut self) {
        self.cell.rest();
    }
}

/// Six words and a word back: as many integers as travel in registers.
pub struct SixWords {
    sum: Function<fn(i64, i64, i64, i64, i64, i64) -> i64>,
    _cell: Rc<Cell>,
}

impl SixWords {
    pub fn new(cell: &Rc<Cell>) -> Result<Self> {
        Ok(Self { sum: cell.module.function("sum6")?, _cell: Rc::clone(cell) })
    }
}

impl Row for SixWords {
    #[inline(always)]
    fn step(&mut self, number: u64) {
        let [a, b, c, d, e, f] = std::hint::black_box([number as i64, 1, 2, 3, 4, 5]);
        assert_eq!(self.sum.call(a, b, c, d, e, f).expect("the worker lives"), number as i64 + 15);
    }
}

/// Eight doubles and a double back: they need the slot's second line.
pub struct EightDoubles {
    sum: Function<fn(f64, f64, f64, f64, f64, f64, f64, f64) -> f64>,
    _cell: Rc<Cell>,
}

impl EightDoubles {
    pub fn new(cell: &Rc<Cell>) -> Result<Self> {
        Ok(Self { sum: cell.module.function("sum8")?, _cell: Rc::clone(cell) })
    }
}

impl Row for EightDoubles {
    #[inline(always)]
    fn step(&mut self, number: u64) {
        let [a, b, c, d, e, f, g, h] = eight_doubles(number);
        let sum = self.sum.call(a, b, c, d, e, f, g, h).expect("the worker lives");
        assert_eq!(sum, number as f64 + 28.0);
    }
}

/// A row under the parking policy: its CPUs go idle.
pub struct Parked<R>(pub R);

impl<R: Row> Row for Parked<R> {
    const IDLES: bool = true;

    #[inline(always)]
    fn step(&mut self, number: u64) {
        self.0.step(number);
    }
}

/// Bytes in and out by copy.
pub struct Bytes {
    function: Function<fn(InOut<[u8]>, u64)>,
    bytes: Vec<u8>,
    _cell: Rc<Cell>,
}

impl Bytes {
    /// With `touch` the function changes every byte, otherwise the first and the last.
    pub fn new(cell: &Rc<Cell>, bytes: usize, touch: bool) -> Result<Self> {
        let function = cell.module.function(if touch { "touch" } else { "edges" })?;
        Ok(Self { function, bytes: vec![0; bytes], _cell: Rc::clone(cell) })
    }
}

impl Row for Bytes {
    #[inline(always)]
    fn step(&mut self, _number: u64) {
        let (next, length) = (self.bytes[0].wrapping_add(1), self.bytes.len());
        self.function.call(&mut self.bytes, length as u64).expect("the worker lives");
        assert_eq!((self.bytes[0], self.bytes[length - 1]), (next, next), "both edges are changed");
    }
}

/// Bytes in, a number out.
pub struct BytesIn {
    function: Function<fn(In<[u8]>, u64) -> i32>,
    bytes: Vec<u8>,
    _cell: Rc<Cell>,
}

impl BytesIn {
    pub fn new(cell: &Rc<Cell>, bytes: usize) -> Result<Self> {
        Ok(Self { function: cell.module.function("first")?, bytes: vec![0; bytes], _cell: Rc::clone(cell) })
    }
}

impl Row for BytesIn {
    #[inline(always)]
    fn step(&mut self, number: u64) {
        let length = self.bytes.len();
        self.bytes[0] = number as u8;
        let first = self.function.call(&self.bytes, length as u64).expect("the worker lives");
        assert_eq!(first, i32::from(number as u8) + (length & 1) as i32);
    }
}

/// Bytes that stay in the session's arena.
pub struct InBlock {
    function: Function<fn(Block, u64) -> i32>,
    block: Block,
    _cell: Rc<Cell>,
}

impl InBlock {
    pub fn new(cell: &Rc<Cell>, bytes: usize) -> Result<Self> {
        let block = cell.module.session().block(bytes as u64)?;
        assert!(block.write(0, &[7]));
        Ok(Self { function: cell.module.function("first")?, block, _cell: Rc::clone(cell) })
    }
}

impl Row for InBlock {
    #[inline(always)]
    fn step(&mut self, _number: u64) {
        let first = self.function.call(&self.block, self.block.len()).expect("the worker lives");
        assert_eq!(first, 7);
    }
}

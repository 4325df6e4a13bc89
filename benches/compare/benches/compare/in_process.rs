//! What the call costs with no other process at all.

use std::hint::black_box;

use hotcell_compare::floor::{check, operands};
use hotcell_compare::measure::Row;
use libffi::middle::{Cif, CodePtr, Type, arg};

extern "C" fn native_add(a: i32, b: i32) -> i32 {
    hotcell_compare::add(a, b)
}

/// A call through a C function pointer that the compiler cannot see through.
pub struct Direct(extern "C" fn(i32, i32) -> i32);

impl Direct {
    pub fn new() -> Self {
        Self(native_add)
    }
}

impl Row for Direct {
    const IDLES: bool = true;

    #[inline(always)]
    fn step(&mut self, number: u64) {
        let (a, b) = operands(number);
        check(black_box(self.0)(a, b), (a, b));
    }
}

/// The same through libffi, its call interface prepared once.
pub struct Libffi {
    cif: Cif,
    function: CodePtr,
}

impl Libffi {
    pub fn new() -> Self {
        let cif = Cif::new([Type::i32(), Type::i32()], Type::i32());
        Self { cif, function: CodePtr(native_add as *mut _) }
    }
}

impl Row for Libffi {
    const IDLES: bool = true;

    #[inline(always)]
    fn step(&mut self, number: u64) {
        let (a, b) = operands(number);
        let function = black_box(self.function);
        // SAFETY: the call interface and the arguments match `native_add`.
        let sum = unsafe { self.cif.call(function, &[arg(&a), arg(&b)]) };
        check(sum, (a, b));
    }
}

//! What the call costs with no other process at all.

use std::hint::black_box;

use libffi::middle::{Cif, CodePtr, Type, arg};

use crate::measure::Row;
use crate::roster::Roster;

pub const DIRECT: &str = "inprocess/direct";
pub const LIBFFI: &str = "inprocess/libffi";

pub fn enlist(roster: &mut Roster) {
    roster.add(DIRECT, |_| Ok(Direct(native_add)));
    roster.add(LIBFFI, |_| {
        let cif = Cif::new([Type::i32(), Type::i32()], Type::i32());
        Ok(Libffi { cif, function: CodePtr(native_add as *mut _) })
    });
}

extern "C" fn native_add(a: i32, b: i32) -> i32 {
    crate::add(a, b)
}

/// A call through a C function pointer that the compiler cannot see through.
struct Direct(extern "C" fn(i32, i32) -> i32);

impl Row for Direct {
    const IDLES: bool = true;

    #[inline(always)]
    fn call(&mut self, a: i32, b: i32) -> i32 {
        black_box(self.0)(a, b)
    }
}

/// The same through libffi, its call interface prepared once.
struct Libffi {
    cif: Cif,
    function: CodePtr,
}

impl Row for Libffi {
    const IDLES: bool = true;

    #[inline(always)]
    fn call(&mut self, a: i32, b: i32) -> i32 {
        let function = black_box(self.function);
        // SAFETY: the call interface and the arguments match `native_add`.
        unsafe { self.cif.call(function, &[arg(&a), arg(&b)]) }
    }
}

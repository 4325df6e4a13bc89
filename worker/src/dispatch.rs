#![allow(unsafe_code)]
//! The call itself: words from the slot into registers, a foreign function, its result back into the slot.
//!
//! **Law.** What is called is foreign code at an address that the dynamic linker gave for a symbol, with a signature that the host's caller
//! vouches for. If that signature is wrong, this process may crash or compute nonsense; nothing outside it is touched. That is the promise of the cell,
//! and why calling from here is acceptable where in the host it would not be.
//!
//! Under the System V x86-64 ABI a function whose arguments all travel in registers can be called through a fixed shape: six integer
//! registers, and eight vector registers if it takes floats. Registers beyond the function's own are caller-saved scratch to it; a result comes back in
//! `rax` or `xmm0`. The record already lists integer words first and float words after them (see [`hotcell_channel::signature`]), so
//! a shape is loads from fixed places and a call: which shape it is was chosen when the function was resolved, and a call looks at no argument. Everything else
//! (stack arguments, variadic functions, other machines) goes through libffi.

use crate::memory::Blocks;
use hotcell_channel::layout::FUNCTIONS_BASE;
use hotcell_channel::session::{STRING_LONGER, STRING_LOST, STRING_NULL, STRING_WORDS};
use hotcell_channel::signature::{ARGS_MAX, Class, Signature, Type};
use hotcell_channel::slot::{Slot, WORDS_MAX};
use libffi::middle::{self, Cif};
use std::ffi::c_void;

type Foreign = unsafe extern "C" fn();
type Integers = unsafe extern "C" fn(u64, u64, u64, u64, u64, u64) -> u64;
type Floats = unsafe extern "C" fn(f64, f64, f64, f64, f64, f64, f64, f64) -> f64;
#[rustfmt::skip]
type Mixed<R> = unsafe extern "C" fn(
    u64, u64, u64, u64, u64, u64, f64, f64, f64, f64, f64, f64, f64, f64,
) -> R;
/// Loads both kinds of registers, calls, and gives the result as a word.
type Shape = fn(Foreign, &Slot) -> u64;

/// Integer argument registers of the fixed shapes.
const INTEGER_REGISTERS: usize = 6;
/// Vector argument registers of the fixed shapes.
const FLOAT_REGISTERS: usize = 8;
const _: () = assert!(INTEGER_REGISTERS + FLOAT_REGISTERS <= WORDS_MAX);

/// A resolved function, ready to be called. The commonest kinds are called in line.
pub(crate) enum Callable {
    /// Integer registers only, none of them a pointer, and nothing to be done besides the call.
    Integers(Integers),
    /// The same with pointers: the call may have a payload.
    Pointers(Integers),
    /// Vector registers only, a float result, and nothing to be done besides the call.
    Floats(Floats),
    /// Any other.
    Other(Box<Other>),
}

pub(crate) struct Other {
    way: Way,
    /// Whether the call's `errno` is wanted.
    errno: bool,
    /// Whether it returns a string, which is copied.
    string: bool,
    /// Argument words, those for a returned string included.
    words: usize,
}

/// How the arguments travel.
enum Way {
    /// In registers.
    Registers(Shape, Foreign),
    /// By libffi's prepared call interface.
    Prepared(Prepared),
}

struct Prepared {
    cif: Cif,
    function: Foreign,
    /// Which word each argument is in, in declared order.
    words: Vec<u8>,
}

/// The resolved function that a call index stands for.
#[inline(always)]
pub(crate) fn resolved(functions: &[Callable], function: u32) -> Option<&Callable> {
    functions.get(function.checked_sub(FUNCTIONS_BASE)? as usize)
}

impl Callable {
    pub(crate) fn new(function: Foreign, signature: &Signature, errno: bool) -> Result<Self, String> {
        if signature.args.len() > ARGS_MAX {
            return Err(format!("{} arguments where at most {ARGS_MAX} are possible", signature.args.len()));
        }
        if let Some(at) = signature.args.iter().position(|t| *t == Type::Void) {
            return Err(format!("argument {} is void", at + 1));
        }
        let (integers, floats) = signature.class_counts();
        let string = signature.returns == Type::CString;
        let words = signature.args.len() + if string { STRING_WORDS } else { 0 };
        // The fixed shapes read the slot. With all fourteen registers in use, the words of a returned string do not fit it any more.
        let registers_do = cfg!(target_arch = "x86_64")
            && words <= WORDS_MAX
            && signature.variadic_after.is_none()
            && integers <= INTEGER_REGISTERS
            && floats <= FLOAT_REGISTERS;
        let float_result = matches!(signature.returns, Type::F32 | Type::F64);
        let plain = !errno && !string;
        if registers_do && plain && floats == 0 && !float_result {
            // SAFETY: only the pointer's type changes; all function pointers have one size. What calling it through this type means is
            // argued at the call.
            let function = unsafe { std::mem::transmute::<Foreign, Integers>(function) };
            let pointers =
                signature.args.iter().any(|t| matches!(t, Type::Ptr | Type::CString | Type::Buffer));
            return Ok(if pointers { Self::Pointers(function) } else { Self::Integers(function) });
        }
        if registers_do && plain && integers == 0 && float_result {
            // SAFETY: as above.
            return Ok(Self::Floats(unsafe { std::mem::transmute::<Foreign, Floats>(function) }));
        }
        let way = if !registers_do {
            Way::Prepared(Prepared::new(function, signature)?)
        } else if float_result {
            Way::Registers(FLOAT_SHAPES[integers], function)
        } else {
            Way::Registers(INTEGER_SHAPES[integers], function)
        };
        Ok(Self::Other(Box::new(Other { way, errno, string, words })))
    }

    /// Whether its result is a string, which may have taken a block.
    pub(crate) fn returns_string(&self) -> bool {
        matches!(self, Self::Other(other) if other.string)
    }

    /// What `errno` was after the call that [`Callable::invoke`] made with `slot`; 0 if it is not wanted.
    #[allow(clippy::cast_possible_truncation)]
    pub(crate) fn errno_in(&self, slot: &Slot) -> i32 {
        match self {
            Self::Other(other) if other.errno => (slot.word(2) as u32).cast_signed(),
            _ => 0,
        }
    }

    /// Calls the function with words from elsewhere, if it takes registers of one kind and nothing else is to be done. `word` gives one for each register of its kind.
    #[inline(always)]
    pub(crate) fn invoke_quick(&self, word: impl Fn(usize) -> u64) -> Option<u64> {
        match self {
            Self::Integers(function) | Self::Pointers(function) => Some(call_integers(*function, word)),
            Self::Floats(function) => Some(call_floats(*function, word).to_bits()),
            Self::Other(_) => None,
        }
    }

    /// Calls the function with the words in `slot` and leaves the result there, if it takes numbers and nothing else is to be done.
    #[inline(always)]
    pub(crate) fn invoke_plain(&self, slot: &Slot) -> bool {
        // Apart from the others, so that it is found with one comparison.
        if let Self::Integers(function) = self {
            slot.set_word(0, call_integers(*function, |at| slot.word(at)));
            return true;
        }
        if let Self::Floats(function) = self {
            slot.set_word(0, call_floats(*function, |at| slot.word(at)).to_bits());
            return true;
        }
        false
    }

    /// Calls the function with the words in `slot` and leaves the result there.
    #[inline(always)]
    pub(crate) fn invoke(&self, slot: &Slot, blocks: &mut Blocks) {
        match self {
            Self::Integers(function) | Self::Pointers(function) => {
                slot.set_word(0, call_integers(*function, |at| slot.word(at)));
            }
            Self::Floats(function) => {
                slot.set_word(0, call_floats(*function, |at| slot.word(at)).to_bits());
            }
            Self::Other(other) => other.invoke(slot, blocks),
        }
    }
}

impl Other {
    #[inline(never)]
    fn invoke(&self, slot: &Slot, blocks: &mut Blocks) {
        if self.errno || self.string {
            self.invoke_with_extras(slot, blocks);
        } else {
            slot.set_word(0, self.call(slot));
        }
    }

    fn invoke_with_extras(&self, slot: &Slot, blocks: &mut Blocks) {
        // The words behind the arguments say where a returned string goes; read them before the reply overwrites any word.
        let room = self.string.then(|| {
            let word = |i| if self.words > WORDS_MAX { spilled(slot, i) } else { slot.word(i) };
            [3, 2, 1].map(|behind| word(self.words - behind))
        });
        if self.errno {
            set_errno(0);
        }
        let result = self.call(slot);
        let errno = if self.errno { get_errno() } else { 0 };
        slot.set_word(0, result);
        if let Some([target, capacity, limit]) = room {
            let (address, length) = keep_string(result, target, capacity, limit, blocks);
            slot.set_word(0, address);
            slot.set_word(1, length);
        }
        slot.set_word(2, u64::from(errno.cast_unsigned()));
    }

    #[inline(always)]
    fn call(&self, slot: &Slot) -> u64 {
        match &self.way {
            Way::Registers(shape, function) => shape(*function, slot),
            Way::Prepared(prepared) => prepared.call(slot, self.words > WORDS_MAX),
        }
    }
}

#[inline(always)]
fn call_integers(function: Integers, i: impl Fn(usize) -> u64) -> u64 {
    // SAFETY: the module's law. The shape passes six integer registers, of which the function reads as many as it has
    // integer arguments; it has no others (checked in `Callable::new`).
    unsafe { function(i(0), i(1), i(2), i(3), i(4), i(5)) }
}

#[inline(always)]
fn call_floats(function: Floats, word: impl Fn(usize) -> u64) -> f64 {
    // An f32 lies in the low half of its word as in its register.
    let f = |at: usize| f64::from_bits(word(at));
    // SAFETY: as for `call_integers`, with eight vector registers and the result in one.
    unsafe { function(f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7)) }
}

/// Calls with both kinds of registers, of which the float words start at `FIRST`.
#[inline(always)]
fn call_mixed<const FIRST: usize, R>(function: Mixed<R>, slot: &Slot) -> R {
    const { assert!(FIRST <= INTEGER_REGISTERS) };
    let i = |at: usize| slot.word(at);
    let f = |at: usize| f64::from_bits(slot.word(FIRST + at));
    // SAFETY: as for `call_integers`, with eight vector registers; R says whether the result is in the integer or the vector one.
    unsafe { function(i(0), i(1), i(2), i(3), i(4), i(5), f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7)) }
}

fn shape<const FIRST: usize>(function: Foreign, slot: &Slot) -> u64 {
    // SAFETY: only the pointer's type changes, as in `Callable::new`.
    let function = unsafe { std::mem::transmute::<Foreign, Mixed<u64>>(function) };
    call_mixed::<FIRST, u64>(function, slot)
}

fn float_shape<const FIRST: usize>(function: Foreign, slot: &Slot) -> u64 {
    // SAFETY: only the pointer's type changes, as in `Callable::new`.
    let function = unsafe { std::mem::transmute::<Foreign, Mixed<f64>>(function) };
    call_mixed::<FIRST, f64>(function, slot).to_bits()
}

/// By the number of integer words. The result is in the integer register.
const INTEGER_SHAPES: [Shape; INTEGER_REGISTERS + 1] =
    [shape::<0>, shape::<1>, shape::<2>, shape::<3>, shape::<4>, shape::<5>, shape::<6>];
/// By the number of integer words. The result is in the vector register.
#[rustfmt::skip]
const FLOAT_SHAPES: [Shape; INTEGER_REGISTERS + 1] = [
    float_shape::<0>, float_shape::<1>, float_shape::<2>, float_shape::<3>, float_shape::<4>, float_shape::<5>, float_shape::<6>,
];

impl Prepared {
    fn new(function: Foreign, signature: &Signature) -> Result<Self, String> {
        // Words are extended to 64 bits already, and are passed whole: libffi copies a narrow argument to the stack by its size and leaves what was
        // there above it, where a caller compiled from C extends it to 32 bits.
        let args = signature.args.iter().map(|t| match t.class() {
            Some(Class::Integer) => middle::Type::u64(),
            _ => ffi_type(*t),
        });
        let result = ffi_type(signature.returns);
        let cif = match signature.variadic_after {
            Some(fixed) => Cif::try_new_variadic(args, usize::from(fixed), result),
            None => Cif::try_new(args, result),
        }
        .map_err(|error| format!("libffi: {error:?}"))?;
        Ok(Self { cif, function, words: signature.word_indexes() })
    }

    #[inline(never)]
    fn call(&self, slot: &Slot, spills: bool) -> u64 {
        let mut values = [0u64; ARGS_MAX];
        for (i, value) in values.iter_mut().enumerate().take(self.words.len()) {
            *value = if spills { spilled(slot, i) } else { slot.word(i) };
        }
        let mut arguments = [std::ptr::null_mut::<c_void>(); ARGS_MAX];
        for (argument, word) in arguments.iter_mut().zip(&self.words) {
            // Little-endian: an f32 is the first bytes of its word.
            *argument = (&raw mut values[usize::from(*word)]).cast();
        }
        let mut result = 0u64;
        // SAFETY: the module's law for the function. The interface was prepared for as many arguments as `words` has, each pointer is to eight live
        // bytes of which libffi reads the type's size; the result takes at most eight bytes (no struct or long double type exists), and libffi
        // widens smaller integers to a whole register.
        unsafe {
            libffi::low::call_return_into(
                self.cif.as_raw_ptr(),
                libffi::low::CodePtr::from_fun(self.function),
                arguments.as_mut_ptr(),
                (&raw mut result).cast(),
            );
        }
        result
    }
}

fn ffi_type(t: Type) -> middle::Type {
    match t {
        Type::Void => middle::Type::void(),
        Type::Bool | Type::U8 => middle::Type::u8(),
        Type::Char | Type::I8 => middle::Type::i8(),
        Type::I16 => middle::Type::i16(),
        Type::I32 => middle::Type::i32(),
        Type::I64 | Type::I64Fast => middle::Type::i64(),
        Type::U16 => middle::Type::u16(),
        Type::U32 => middle::Type::u32(),
        Type::U64 | Type::U64Fast => middle::Type::u64(),
        Type::F32 => middle::Type::f32(),
        Type::F64 => middle::Type::f64(),
        _ => middle::Type::pointer(),
    }
}

/// Word `index` of a call whose words do not fit the slot: word 0 is the address of a block that has them all.
fn spilled(slot: &Slot, index: usize) -> u64 {
    let Ok(base) = usize::try_from(slot.word(0)) else { return 0 };
    let word = std::ptr::with_exposed_provenance::<u64>(base).wrapping_add(index);
    // SAFETY: the host put the block's address there, in the arena that this process has mapped, eight-aligned, with room for all words of the call.
    // The worker trusts its host. Volatile, because the arena is shared memory.
    unsafe { word.read_volatile() }
}

/// Copies the string at `source`, without its NUL, before another call can change it: to `target` if it fits the `capacity` there, else to a block of its own, which the
/// host reads and frees. Gives the address of the string, or of the copy in a block, and the length word.
fn keep_string(source: u64, target: u64, capacity: u64, limit: u64, blocks: &mut Blocks) -> (u64, u64) {
    blocks.forget_string();
    if source == 0 {
        return (0, STRING_NULL);
    }
    let (Ok(from), Ok(most)) = (usize::try_from(source), usize::try_from(limit.saturating_add(1))) else {
        return (source, STRING_LONGER);
    };
    let from = std::ptr::with_exposed_provenance::<libc::c_char>(from);
    // SAFETY: `from` is what the function returned as a C string. If it is not one, this faults like any other use of it, inside the
    // call, and the crash report names the function.
    let length = unsafe { libc::strnlen(from, most) } as u64;
    if length > limit {
        return (source, STRING_LONGER);
    }
    let (address, to) = if length <= capacity {
        (source, target)
    } else {
        match blocks.allocate_string(length) {
            Some(copy) => (copy, copy),
            None => return (source, STRING_LOST),
        }
    };
    let (Ok(to), Ok(bytes)) = (usize::try_from(to), usize::try_from(length)) else {
        return (source, STRING_LOST);
    };
    let to = std::ptr::with_exposed_provenance_mut::<u8>(to);
    // SAFETY: `length` bytes were just readable at `from`. `to` has room for them: in the arena, where the host reserved `capacity` bytes for this
    // call, or in the block made above.
    unsafe { std::ptr::copy_nonoverlapping(from.cast::<u8>(), to, bytes) };
    (address, length)
}

fn set_errno(value: i32) {
    // SAFETY: takes nothing, gives the address of the thread's own errno.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: that address is always valid.
    unsafe { *errno = value }
}

fn get_errno() -> i32 {
    // SAFETY: as in `set_errno`.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as in `set_errno`.
    unsafe { *errno }
}

/// A function of this process behind a slot of its own: what the bench of this package calls.
#[doc(hidden)]
#[allow(missing_debug_implementations)]
pub struct InProcess {
    callable: Callable,
    slot: Slot,
    blocks: Blocks,
}

impl InProcess {
    /// Resolves a function as a session does; with `prepared`, for libffi even if its arguments travel in registers.
    ///
    /// # Safety
    /// `address` is that of a C function with this signature, which may be called from any thread at any time.
    pub unsafe fn new(address: *const (), signature: &Signature, prepared: bool) -> Result<Self, String> {
        // SAFETY: the caller says that a function is there, and function pointers have the size of data pointers on every machine this builds for.
        let function = unsafe { std::mem::transmute::<*const (), Foreign>(address) };
        let callable = if prepared {
            let way = Way::Prepared(Prepared::new(function, signature)?);
            Callable::Other(Box::new(Other { way, errno: false, string: false, words: signature.args.len() }))
        } else {
            Callable::new(function, signature, false)?
        };
        Ok(Self { callable, slot: Slot::default(), blocks: Blocks::default() })
    }

    /// Stores the words, calls, and loads the result.
    #[inline(always)]
    pub fn call(&mut self, words: &[u64]) -> u64 {
        self.slot.set_words(words);
        self.callable.invoke(&self.slot, &mut self.blocks);
        self.slot.word(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    extern "C" fn weigh(a: i8, x: f32, b: u64, y: f64) -> f64 {
        f64::from(a) + f64::from(x) * 10.0 + b as f64 * 100.0 + y * 1000.0
    }

    extern "C" fn last_of_nine(
        _: i64,
        _: i64,
        _: i64,
        _: i64,
        _: i64,
        _: i64,
        _: i64,
        _: i64,
        last: i16,
    ) -> i16 {
        last
    }

    fn foreign(address: usize) -> Foreign {
        // SAFETY: the addresses given below are those of functions.
        unsafe { std::mem::transmute::<usize, Foreign>(address) }
    }

    #[test]
    fn registers_get_integers_and_floats_from_their_words() {
        let signature = Signature::new([Type::I8, Type::F32, Type::U64, Type::F64], Type::F64);
        let callable = Callable::new(foreign(weigh as *const () as usize), &signature, false).unwrap();
        let slot = Slot::default();
        let words = [(-1i64).cast_unsigned(), 2, u64::from(2.0f32.to_bits()), 3.0f64.to_bits()];
        for (i, word) in words.into_iter().enumerate() {
            slot.set_word(i, word);
        }
        callable.invoke(&slot, &mut Blocks::default());
        assert_eq!(f64::from_bits(slot.word(0)), -1.0 + 20.0 + 200.0 + 3000.0);
    }

    #[test]
    fn arguments_on_the_stack_go_through_libffi() {
        let mut args = vec![Type::I64; 8];
        args.push(Type::I16);
        let callable = Callable::new(
            foreign(last_of_nine as *const () as usize),
            &Signature::new(args, Type::I16),
            false,
        )
        .unwrap();
        let slot = Slot::default();
        slot.set_word(8, 0xffff_ffff_ffff_fffe);
        callable.invoke(&slot, &mut Blocks::default());
        assert_eq!(slot.word(0) & 0xffff, 0xfffe);
    }
}

//! `Function`: a typed, resolved function, and the types that its arguments and result may have.
//!
//! A signature is written once, as a Rust function type: `Function<fn(u64, In<[u8]>, u32) -> u64>`. Each argument type implements [`Param`], which
//! says what a caller passes for it and how that becomes a word; the result type implements [`Returned`]. Everything is known to the compiler, so a
//! call of numbers compiles to plain stores into the slot, the publish, the wait, and a load.

use crate::budget::Budget;
use crate::error::{CallError, FunctionName, LoadError};
use crate::module::Module;
use crate::session::{
    Block, Detached, Frame, Need, RemotePtr, SessionInner, SessionOwner, Straight, Target, check_timeout,
};
use bytemuck::{NoUninit, Pod};
use hotcell_channel::session::{STRING_LONGER, STRING_LOST, STRING_NULL};
use hotcell_channel::signature::{Class, Signature, Type};
use hotcell_channel::slot::Slot;
use std::ffi::{CStr, CString};
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::time::Duration;

/// Bytes, a string or a plain value that the function reads. Caller's type: `&[T]`, `&str`, `&CStr`, `&T`.
///
/// Plain values are structs whose bytes are all data: `bytemuck::NoUninit` for `In`, `bytemuck::Pod` for [`Out`] and [`InOut`]. The derives come with the crate `bytemuck`
/// and its feature `derive`; padding has to be spelled out as fields.
///
/// ```
/// # use hotcell::{Out, Worker};
/// #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
/// #[repr(C)]
/// struct Timespec {
///     seconds: i64,
///     nanoseconds: i64,
/// }
///
/// # fn main() -> Result<(), hotcell::Error> {
/// # let libc = Worker::spawn()?.session()?.load("libc.so.6")?;
/// let clock_gettime = libc.function::<fn(i32, Out<Timespec>) -> i32>("clock_gettime")?;
/// let mut now = Timespec { seconds: 0, nanoseconds: 0 };
/// assert_eq!(clock_gettime.call(0, &mut now)?, 0);
/// assert!(now.seconds > 0);
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct In<T: ?Sized>(PhantomData<T>);

/// Bytes or a plain value that the function writes; what it leaves unwritten is unspecified afterwards. Caller's type: `&mut [T]`, `&mut T`.
#[derive(Debug)]
pub struct Out<T: ?Sized>(PhantomData<T>);

/// Bytes or a plain value that the function reads and writes. Caller's type: `&mut [T]`, `&mut T`.
#[derive(Debug)]
pub struct InOut<T: ?Sized>(PhantomData<T>);

/// A result together with `errno` as the call left it (0 if it did not touch it): `Function<fn(..) -> WithErrno<i32>>` returns `(i32, Errno)`.
#[derive(Debug)]
pub struct WithErrno<R>(PhantomData<R>);

/// A callback into the host. It can be declared; calling a function that takes one answers [`CallError::CallbackUnsupported`].
#[derive(Debug)]
pub struct Callback(PhantomData<()>);

/// The C library's error number, as a call left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub i32);

impl std::fmt::Display for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::io::Error::from_raw_os_error(self.0).fmt(f)
    }
}

mod sealed {
    pub trait Sealed {}
}
use sealed::Sealed;

/// An argument type of a typed function. Implemented for the integer and float types, `bool`, [`RemotePtr`], [`Block`],
/// [`In`], [`Out`], [`InOut`], `Option` of those that are pointers, and [`Callback`].
pub trait Param: Sealed {
    /// What a caller passes.
    type Value<'a>;
    #[doc(hidden)]
    const TYPE: Type;
    /// Whether a value is its word, without any payload.
    #[doc(hidden)]
    const IS_WORD: bool = false;
    /// The word, if [`Param::IS_WORD`]. `None` for a pointer of another session.
    #[doc(hidden)]
    #[inline(always)]
    fn word(_value: &Self::Value<'_>, _session: &SessionInner) -> Option<u64> {
        None
    }
    #[doc(hidden)]
    #[inline(always)]
    fn need(_value: &Self::Value<'_>, _need: &mut Need) {}
    #[doc(hidden)]
    #[inline(always)]
    fn encode(
        value: &mut Self::Value<'_>,
        frame: &mut Frame<'_>,
        name: &FunctionName,
    ) -> Result<u64, CallError> {
        Self::word(value, frame.session()).ok_or_else(|| CallError::ForeignPointer { function: name.clone() })
    }
    #[doc(hidden)]
    #[inline(always)]
    fn finish(_value: Self::Value<'_>, _word: u64, _frame: &Frame<'_>) {}
}

/// The result type of a typed function. Implemented for `()`, the integer and float types, `bool`, [`RemotePtr`],
/// `CString`, [`Nullable<CString>`](Nullable) and [`WithErrno`] of these.
pub trait Returned: Sealed {
    /// What the caller gets.
    type Output;
    #[doc(hidden)]
    const TYPE: Type;
    #[doc(hidden)]
    const ERRNO: bool = false;
    #[doc(hidden)]
    const STRING: bool = false;
    /// Whether the reply's first word is all there is to it.
    #[doc(hidden)]
    const FROM_WORD: bool = false;
    /// The result that a word stands for. Only if [`Returned::FROM_WORD`].
    #[doc(hidden)]
    #[inline(always)]
    fn from_word(_word: u64, _session: &SessionInner) -> Self::Output {
        unreachable!("FROM_WORD says which types have it")
    }
    #[doc(hidden)]
    #[inline(always)]
    fn decode(
        frame: &Frame<'_>,
        _string: u64,
        _name: &FunctionName,
        _budget: Budget,
    ) -> Result<Self::Output, CallError> {
        Ok(Self::from_word(frame.reply(0), frame.session()))
    }
}

/// Room for a returned string that is copied in the call itself; a longer one takes a second round.
pub(crate) const STRING_ROOM: usize = 1024;

macro_rules! integers {
    ($($t:ident $kind:ident),+) => {$(
        impl Sealed for $t {}
        impl Param for $t {
            type Value<'a> = $t;
            const TYPE: Type = Type::$kind;
            const IS_WORD: bool = true;
            #[inline(always)]
            fn word(value: &$t, _: &SessionInner) -> Option<u64> {
                // Extended by its sign, as the ABI wants it in a register.
                Some(i64::from(*value).cast_unsigned())
            }
        }
        impl Returned for $t {
            type Output = $t;
            const TYPE: Type = Type::$kind;
            const FROM_WORD: bool = true;
            #[inline(always)]
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            fn from_word(word: u64, _: &SessionInner) -> $t {
                word as $t // the bits above the type are unspecified
            }
        }
    )+};
}
integers!(i8 I8, i16 I16, i32 I32, i64 I64);

macro_rules! unsigned {
    ($($t:ident $kind:ident),+) => {$(
        impl Sealed for $t {}
        impl Param for $t {
            type Value<'a> = $t;
            const TYPE: Type = Type::$kind;
            const IS_WORD: bool = true;
            #[inline(always)]
            fn word(value: &$t, _: &SessionInner) -> Option<u64> {
                Some(*value as u64)
            }
        }
        impl Returned for $t {
            type Output = $t;
            const TYPE: Type = Type::$kind;
            const FROM_WORD: bool = true;
            #[inline(always)]
            #[allow(clippy::cast_possible_truncation)]
            fn from_word(word: u64, _: &SessionInner) -> $t {
                word as $t // the bits above the type are unspecified
            }
        }
    )+};
}
unsigned!(u8 U8, u16 U16, u32 U32, u64 U64, usize U64);

impl Sealed for isize {}
impl Param for isize {
    type Value<'a> = isize;
    const TYPE: Type = Type::I64;
    const IS_WORD: bool = true;
    #[inline(always)]
    fn word(value: &isize, _: &SessionInner) -> Option<u64> {
        Some((*value as i64).cast_unsigned())
    }
}
impl Returned for isize {
    type Output = isize;
    const TYPE: Type = Type::I64;
    const FROM_WORD: bool = true;
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation)]
    fn from_word(word: u64, _: &SessionInner) -> isize {
        word.cast_signed() as isize
    }
}

impl Sealed for bool {}
impl Param for bool {
    type Value<'a> = bool;
    const TYPE: Type = Type::Bool;
    const IS_WORD: bool = true;
    #[inline(always)]
    fn word(value: &bool, _: &SessionInner) -> Option<u64> {
        Some(u64::from(*value))
    }
}
impl Returned for bool {
    type Output = bool;
    const TYPE: Type = Type::Bool;
    const FROM_WORD: bool = true;
    #[inline(always)]
    fn from_word(word: u64, _: &SessionInner) -> bool {
        word & 0xff != 0
    }
}

impl Sealed for f32 {}
impl Param for f32 {
    type Value<'a> = f32;
    const TYPE: Type = Type::F32;
    const IS_WORD: bool = true;
    #[inline(always)]
    fn word(value: &f32, _: &SessionInner) -> Option<u64> {
        Some(u64::from(value.to_bits()))
    }
}
impl Returned for f32 {
    type Output = f32;
    const TYPE: Type = Type::F32;
    const FROM_WORD: bool = true;
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation)]
    fn from_word(word: u64, _: &SessionInner) -> f32 {
        f32::from_bits(word as u32)
    }
}

impl Sealed for f64 {}
impl Param for f64 {
    type Value<'a> = f64;
    const TYPE: Type = Type::F64;
    const IS_WORD: bool = true;
    #[inline(always)]
    fn word(value: &f64, _: &SessionInner) -> Option<u64> {
        Some(value.to_bits())
    }
}
impl Returned for f64 {
    type Output = f64;
    const TYPE: Type = Type::F64;
    const FROM_WORD: bool = true;
    #[inline(always)]
    fn from_word(word: u64, _: &SessionInner) -> f64 {
        f64::from_bits(word)
    }
}

impl Sealed for RemotePtr {}
impl Param for RemotePtr {
    type Value<'a> = RemotePtr;
    const TYPE: Type = Type::Ptr;
    const IS_WORD: bool = true;
    #[inline(always)]
    fn word(value: &RemotePtr, session: &SessionInner) -> Option<u64> {
        session.address_here(*value)
    }
}
impl Returned for RemotePtr {
    type Output = RemotePtr;
    const TYPE: Type = Type::Ptr;
    const FROM_WORD: bool = true;
    #[inline(always)]
    fn from_word(word: u64, session: &SessionInner) -> RemotePtr {
        session.pointer(word)
    }
}

impl Sealed for Block {}
impl Param for Block {
    type Value<'a> = &'a Block;
    const TYPE: Type = Type::Ptr;
    const IS_WORD: bool = true;
    #[inline(always)]
    fn word(value: &&Block, session: &SessionInner) -> Option<u64> {
        (value.session_id() == session.id()).then(|| value.pointer().address())
    }
}

impl Sealed for Callback {}
impl Param for Callback {
    type Value<'a> = ();
    const TYPE: Type = Type::Function;
    fn encode(_: &mut (), _: &mut Frame<'_>, name: &FunctionName) -> Result<u64, CallError> {
        Err(CallError::CallbackUnsupported { function: name.clone() })
    }
}

impl<T> Sealed for In<[T]> {}
impl<T: NoUninit> Param for In<[T]> {
    type Value<'a> = &'a [T];
    const TYPE: Type = Type::Buffer;
    #[inline(always)]
    fn need(value: &&[T], need: &mut Need) {
        need.add(size_of_val(*value));
    }
    #[inline(always)]
    fn encode(value: &mut &[T], frame: &mut Frame<'_>, _: &FunctionName) -> Result<u64, CallError> {
        Ok(frame.lend(bytemuck::cast_slice(value)))
    }
}

impl<T> Sealed for Out<[T]> {}
impl<T: Pod> Param for Out<[T]> {
    type Value<'a> = &'a mut [T];
    const TYPE: Type = Type::Buffer;
    #[inline(always)]
    fn need(value: &&mut [T], need: &mut Need) {
        need.add(size_of_val(*value));
    }
    #[inline(always)]
    fn encode(value: &mut &mut [T], frame: &mut Frame<'_>, _: &FunctionName) -> Result<u64, CallError> {
        Ok(frame.room(size_of_val(*value)))
    }
    #[inline(always)]
    fn finish(value: &mut [T], word: u64, frame: &Frame<'_>) {
        frame.read_back(word, bytemuck::cast_slice_mut(value));
    }
}

impl<T> Sealed for InOut<[T]> {}
impl<T: Pod> Param for InOut<[T]> {
    type Value<'a> = &'a mut [T];
    const TYPE: Type = Type::Buffer;
    #[inline(always)]
    fn need(value: &&mut [T], need: &mut Need) {
        need.add(size_of_val(*value));
    }
    #[inline(always)]
    fn encode(value: &mut &mut [T], frame: &mut Frame<'_>, _: &FunctionName) -> Result<u64, CallError> {
        Ok(frame.lend(bytemuck::cast_slice(value)))
    }
    #[inline(always)]
    fn finish(value: &mut [T], word: u64, frame: &Frame<'_>) {
        frame.read_back(word, bytemuck::cast_slice_mut(value));
    }
}

impl<T> Sealed for In<T> {}
impl<T: NoUninit> Param for In<T> {
    type Value<'a> = &'a T;
    const TYPE: Type = Type::Ptr;
    #[inline(always)]
    fn need(_: &&T, need: &mut Need) {
        need.add(size_of::<T>());
    }
    #[inline(always)]
    fn encode(value: &mut &T, frame: &mut Frame<'_>, _: &FunctionName) -> Result<u64, CallError> {
        Ok(frame.lend(bytemuck::bytes_of(*value)))
    }
}

impl<T> Sealed for Out<T> {}
impl<T: Pod> Param for Out<T> {
    type Value<'a> = &'a mut T;
    const TYPE: Type = Type::Ptr;
    #[inline(always)]
    fn need(_: &&mut T, need: &mut Need) {
        need.add(size_of::<T>());
    }
    #[inline(always)]
    fn encode(_: &mut &mut T, frame: &mut Frame<'_>, _: &FunctionName) -> Result<u64, CallError> {
        Ok(frame.room(size_of::<T>()))
    }
    #[inline(always)]
    fn finish(value: &mut T, word: u64, frame: &Frame<'_>) {
        frame.read_back(word, bytemuck::bytes_of_mut(value));
    }
}

impl<T> Sealed for InOut<T> {}
impl<T: Pod> Param for InOut<T> {
    type Value<'a> = &'a mut T;
    const TYPE: Type = Type::Ptr;
    #[inline(always)]
    fn need(_: &&mut T, need: &mut Need) {
        need.add(size_of::<T>());
    }
    #[inline(always)]
    fn encode(value: &mut &mut T, frame: &mut Frame<'_>, _: &FunctionName) -> Result<u64, CallError> {
        Ok(frame.lend(bytemuck::bytes_of(*value)))
    }
    #[inline(always)]
    fn finish(value: &mut T, word: u64, frame: &Frame<'_>) {
        frame.read_back(word, bytemuck::bytes_of_mut(value));
    }
}

/// The function writes an address: `sqlite3 **db` and its like.
impl Param for Out<RemotePtr> {
    type Value<'a> = &'a mut RemotePtr;
    const TYPE: Type = Type::Ptr;
    fn need(_: &&mut RemotePtr, need: &mut Need) {
        need.add(size_of::<u64>());
    }
    fn encode(_: &mut &mut RemotePtr, frame: &mut Frame<'_>, _: &FunctionName) -> Result<u64, CallError> {
        // Null, should the function leave it alone.
        Ok(frame.lend(&[0; 8]))
    }
    fn finish(value: &mut RemotePtr, word: u64, frame: &Frame<'_>) {
        let mut address = 0u64;
        frame.read_back(word, bytemuck::bytes_of_mut(&mut address));
        *value = frame.session().pointer(address);
    }
}

impl Sealed for In<CStr> {}
impl Param for In<CStr> {
    type Value<'a> = &'a CStr;
    const TYPE: Type = Type::CString;
    #[inline(always)]
    fn need(value: &&CStr, need: &mut Need) {
        need.add(value.count_bytes() + 1);
    }
    #[inline(always)]
    fn encode(value: &mut &CStr, frame: &mut Frame<'_>, _: &FunctionName) -> Result<u64, CallError> {
        Ok(frame.lend(value.to_bytes_with_nul()))
    }
}

impl Sealed for In<str> {}
impl Param for In<str> {
    type Value<'a> = &'a str;
    const TYPE: Type = Type::CString;
    #[inline(always)]
    fn need(value: &&str, need: &mut Need) {
        need.add(value.len() + 1);
    }
    #[inline(always)]
    fn encode(value: &mut &str, frame: &mut Frame<'_>, name: &FunctionName) -> Result<u64, CallError> {
        lend_str(value, frame).ok_or_else(|| CallError::InteriorNul { function: name.clone(), index: 0 })
    }
}

/// Lends a string with a NUL behind it. `None` if it has one inside. The payload was reserved with one byte more than its length.
pub(crate) fn lend_str(text: &str, frame: &mut Frame<'_>) -> Option<u64> {
    if text.as_bytes().contains(&0) {
        return None;
    }
    let address = frame.room(text.len() + 1);
    frame.write_at(address, text.as_bytes());
    // The worker says where the arena is; what it says may be near the end of all addresses.
    frame.write_at(address.wrapping_add(text.len() as u64), &[0]);
    Some(address)
}

/// Marks the parameters that are pointers, which `Option` makes nullable.
pub trait PointerParam: Param {}
impl<T: NoUninit> PointerParam for In<[T]> {}
impl<T: Pod> PointerParam for Out<[T]> {}
impl<T: Pod> PointerParam for InOut<[T]> {}
impl<T: NoUninit> PointerParam for In<T> {}
impl<T: Pod> PointerParam for Out<T> {}
impl<T: Pod> PointerParam for InOut<T> {}
impl PointerParam for Out<RemotePtr> {}
impl PointerParam for In<CStr> {}
impl PointerParam for In<str> {}
impl PointerParam for Block {}

impl<P: PointerParam> Sealed for Option<P> {}
impl<P: PointerParam> Param for Option<P> {
    type Value<'a> = Option<P::Value<'a>>;
    const TYPE: Type = P::TYPE;
    const IS_WORD: bool = P::IS_WORD;
    #[inline(always)]
    fn word(value: &Self::Value<'_>, session: &SessionInner) -> Option<u64> {
        value.as_ref().map_or(Some(0), |value| P::word(value, session))
    }
    #[inline(always)]
    fn need(value: &Self::Value<'_>, need: &mut Need) {
        if let Some(value) = value {
            P::need(value, need);
        }
    }
    #[inline(always)]
    fn encode(
        value: &mut Self::Value<'_>,
        frame: &mut Frame<'_>,
        name: &FunctionName,
    ) -> Result<u64, CallError> {
        value.as_mut().map_or(Ok(0), |value| P::encode(value, frame, name))
    }
    #[inline(always)]
    fn finish(value: Self::Value<'_>, word: u64, frame: &Frame<'_>) {
        if let Some(value) = value {
            P::finish(value, word, frame);
        }
    }
}

impl Sealed for () {}
impl Returned for () {
    type Output = ();
    const TYPE: Type = Type::Void;
    const FROM_WORD: bool = true;
    #[inline(always)]
    fn from_word(_: u64, _: &SessionInner) {}
}

/// The string that a call returned; `None` for a null pointer.
pub(crate) fn decode_string(
    frame: &Frame<'_>,
    target: u64,
    name: &FunctionName,
    budget: Budget,
) -> Result<Option<CString>, CallError> {
    let session = frame.session();
    let max = session.options.longest_string();
    let lost = |source| CallError::StringLost { function: name.clone(), source: Box::new(source) };
    match frame.reply(1) {
        STRING_NULL => Ok(None),
        STRING_LONGER => Err(CallError::StringTooLong { function: name.clone(), max }),
        STRING_LOST => Err(lost(CallError::OutOfMemory { bytes: max })),
        length if length <= STRING_ROOM as u64 => Ok(Some(frame.string(target, length))),
        length if length <= max => match frame.fetch_string(frame.reply(0), length, budget) {
            Ok(string) => Ok(Some(string)),
            // The fetching did not run; the function did.
            Err(CallError::Crashed(_) | CallError::Disposed(_)) => {
                Err(session.death_error(Some(name.clone()), true))
            }
            Err(error) => Err(lost(error)),
        },
        length => Err(session.broken(format!("a string of {length} bytes where {max} are the limit"), name)),
    }
}

impl Sealed for CString {}
impl Returned for CString {
    type Output = CString;
    const TYPE: Type = Type::CString;
    const STRING: bool = true;
    fn decode(
        frame: &Frame<'_>,
        string: u64,
        name: &FunctionName,
        budget: Budget,
    ) -> Result<CString, CallError> {
        decode_string(frame, string, name, budget)?
            .ok_or_else(|| CallError::NullString { function: name.clone() })
    }
}

/// A string, or `None` when the function returns a null pointer: `Function<fn(..) -> Nullable<CString>>` gives `Option<CString>`.
#[derive(Debug)]
pub struct Nullable<R>(PhantomData<R>);
impl<R> Sealed for Nullable<R> {}
impl Returned for Nullable<CString> {
    type Output = Option<CString>;
    const TYPE: Type = Type::CString;
    const STRING: bool = true;
    fn decode(
        frame: &Frame<'_>,
        string: u64,
        name: &FunctionName,
        budget: Budget,
    ) -> Result<Option<CString>, CallError> {
        decode_string(frame, string, name, budget)
    }
}

impl<R> Sealed for WithErrno<R> {}
impl<R: Returned> Returned for WithErrno<R> {
    type Output = (R::Output, Errno);
    const TYPE: Type = R::TYPE;
    const ERRNO: bool = true;
    const STRING: bool = R::STRING;
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation)]
    fn decode(
        frame: &Frame<'_>,
        string: u64,
        name: &FunctionName,
        budget: Budget,
    ) -> Result<Self::Output, CallError> {
        // Before a returned string is fetched in a second round.
        let errno = Errno((frame.reply(2) as u32).cast_signed());
        Ok((R::decode(frame, string, name, budget)?, errno))
    }
}

/// A Rust function type that describes a native function: `fn(A, B) -> R` with up to twelve arguments, each a [`Param`], and
/// `R` a [`Returned`].
pub trait FunctionType: Sealed {
    /// What a caller passes, as a tuple.
    type Values<'a>;
    /// What the caller gets.
    type Output;
    #[doc(hidden)]
    const ERRNO: bool;
    #[doc(hidden)]
    const TYPES: &'static [Type];
    #[doc(hidden)]
    fn signature() -> Signature;
    #[doc(hidden)]
    type Words: Copy + std::fmt::Debug;
    /// Whether all arguments and the result are plain words.
    #[doc(hidden)]
    const IS_WORDS: bool;
    /// The arguments as words, in the order of the slot. `None` for a pointer of another session.
    #[doc(hidden)]
    fn words(values: &Self::Values<'_>, session: &SessionInner) -> Option<Self::Words>;
    /// Stores words that [`FunctionType::words`] gave.
    #[doc(hidden)]
    fn store(words: &Self::Words, slot: &Slot);
    #[doc(hidden)]
    fn from_word(word: u64, session: &SessionInner) -> Self::Output;
    /// Whether the result is a string.
    #[doc(hidden)]
    const STRING: bool;
    /// The payload that a call needs.
    #[doc(hidden)]
    fn need(values: &Self::Values<'_>) -> Need;
    /// Lays arguments into a slot and into payload that was reserved for [`FunctionType::need`]. Gives their words, and the address of the room for a returned string.
    #[doc(hidden)]
    fn lay(
        values: &mut Self::Values<'_>,
        frame: &mut Frame<'_>,
        name: &FunctionName,
    ) -> Result<(Self::Words, u64), CallError>;
    #[doc(hidden)]
    #[inline(always)]
    fn encode(
        values: &mut Self::Values<'_>,
        frame: &mut Frame<'_>,
        name: &FunctionName,
    ) -> Result<(Self::Words, u64), CallError> {
        frame.reserve(Self::need(values), || name.clone())?;
        Self::lay(values, frame, name)
    }
    #[doc(hidden)]
    fn finish(
        values: Self::Values<'_>,
        words: Self::Words,
        string: u64,
        frame: &Frame<'_>,
        name: &FunctionName,
        budget: Budget,
    ) -> Result<Self::Output, CallError>;
}

/// Where argument `at`'s word lies: integers first, then floats. Folds to a constant.
pub(crate) const fn word_index(types: &[Type], at: usize) -> usize {
    let mut integers = 0;
    let mut before_same_class = 0;
    let mut i = 0;
    let float = matches!(types[at].class(), Some(Class::Float));
    while i < types.len() {
        let other = matches!(types[i].class(), Some(Class::Float));
        if !other {
            integers += 1;
        }
        if i < at && other == float {
            before_same_class += 1;
        }
        i += 1;
    }
    if float { integers + before_same_class } else { before_same_class }
}

/// A call that failed, with its values if they are still as the caller gave them.
#[derive(Debug)]
pub(crate) struct Failed<V> {
    pub(crate) error: CallError,
    pub(crate) values: Option<V>,
}

/// A native function that has been found in its module and whose signature has been prepared, ready to be called from any thread.
///
/// **The signature is a promise of yours that nobody can check**: C keeps no types. A wrong one can make the worker crash or compute nonsense; it cannot harm the
/// host. What a function returns is input from an untrusted process.
///
/// Handles can be cloned and kept; they keep their session open.
#[derive(Debug)]
pub struct Function<F: FunctionType> {
    pub(crate) session: Arc<SessionInner>,
    pub(crate) target: Target,
    _owner: Arc<SessionOwner>,
    _type: PhantomData<F>,
}

impl<F: FunctionType> Clone for Function<F> {
    fn clone(&self) -> Self {
        Self {
            session: Arc::clone(&self.session),
            target: self.target.clone(),
            _owner: Arc::clone(&self._owner),
            _type: PhantomData,
        }
    }
}

impl<F: FunctionType> Function<F> {
    pub(crate) fn resolve(
        module: &Module,
        symbol: &str,
        variadic_after: Option<u8>,
    ) -> Result<Self, LoadError> {
        let mut signature = F::signature();
        signature.variadic_after = variadic_after;
        let resolved = module.resolve(symbol, &signature, F::ERRNO)?;
        let owner = module.owner();
        Ok(Self {
            session: Arc::clone(&owner.inner),
            target: Target::new(resolved, owner.inner.options.call_timeout()),
            _owner: Arc::clone(owner),
            _type: PhantomData,
        })
    }

    /// The function's name and module.
    pub fn name(&self) -> &FunctionName {
        &self.target.name
    }

    /// The same function with another timeout than its session's: see [`SessionBuilder::timeout`](crate::SessionBuilder::timeout). The handle can be kept.
    ///
    /// # Errors
    /// [`CallError::ZeroTimeout`].
    pub fn with_timeout(&self, timeout: Duration) -> Result<Self, CallError> {
        check_timeout(timeout, &self.target.name)?;
        Ok(self.within(timeout))
    }

    /// [`Function::with_timeout`] for a timeout that was checked.
    pub(crate) fn within(&self, timeout: Duration) -> Self {
        let mut function = self.clone();
        function.target.timeout = timeout;
        function
    }

    /// Calls the function with a tuple of values: what `call` does, for generic code.
    ///
    /// # Errors
    /// See [`CallError`].
    #[inline(always)]
    pub fn call_tuple(&self, values: F::Values<'_>) -> Result<F::Output, CallError> {
        if !F::IS_WORDS {
            if !F::STRING
                && let Some(frame) = self.session.claim_straight(F::need(&values))
            {
                return self.attempt_straight(frame, values, || true).map_err(|failed| failed.error);
            }
            return self.call_framed(values);
        }
        if let Some(words) = F::words(&values, &self.session) {
            match self.session.call_straight(&self.target, |slot| F::store(&words, slot)) {
                Straight::Replied(word) => return Ok(F::from_word(word, &self.session)),
                Straight::Failed(error) => return Err(*error),
                Straight::Elsewhere => {}
            }
        }
        self.call_elsewhere(values)
    }

    /// A call with a payload that [`SessionInner::claim_straight`] has no place for.
    #[inline(never)]
    fn call_framed(&self, values: F::Values<'_>) -> Result<F::Output, CallError> {
        match self.session.claim_direct() {
            Some(frame) => self.call_in(frame, values, self.budget()),
            None => self.call_elsewhere(values),
        }
    }

    #[inline(never)]
    fn call_elsewhere(&self, values: F::Values<'_>) -> Result<F::Output, CallError> {
        match self.session.latencies() {
            None => self.call_claimed(values),
            Some(latencies) => {
                let started = latencies.start();
                let output = match self.session.claim_direct_measured() {
                    Some(frame) => self.call_in(frame, values, self.budget()),
                    None => self.call_claimed(values),
                }?;
                latencies.stop(started);
                Ok(output)
            }
        }
    }

    #[inline(never)]
    fn call_claimed(&self, values: F::Values<'_>) -> Result<F::Output, CallError> {
        let mut budget = self.budget();
        let frame = self.session.claim(&mut budget, || FunctionName::clone(&self.target.name))?;
        self.call_in(frame, values, budget)
    }

    #[inline(always)]
    fn budget(&self) -> Budget {
        Budget::new(self.target.timeout)
    }

    #[inline(always)]
    fn call_in(
        &self,
        mut frame: Frame<'_>,
        mut values: F::Values<'_>,
        mut budget: Budget,
    ) -> Result<F::Output, CallError> {
        let (words, string) = F::encode(&mut values, &mut frame, &self.target.name)?;
        frame.publish(self.target.index, self.target.label);
        frame.wait(&mut budget, || FunctionName::clone(&self.target.name))?;
        F::finish(values, words, string, &frame, &self.target.name, budget)
    }

    /// [`Function::call_tuple`] for whoever may make a call again: one that fails gives its values back. `still` is asked when the call has its slot and is not yet sent; a no ends it with
    /// [`CallError::Closed`].
    #[inline(always)]
    pub(crate) fn attempt<'a>(
        &self,
        values: F::Values<'a>,
        still: impl Fn() -> bool,
    ) -> Result<F::Output, Failed<F::Values<'a>>> {
        if !F::IS_WORDS {
            if !F::STRING
                && let Some(frame) = self.session.claim_straight(F::need(&values))
            {
                return self.attempt_straight(frame, values, still);
            }
            return self.attempt_framed(values, still);
        }
        if let Some(words) = F::words(&values, &self.session) {
            match self.session.call_straight_if(&self.target, &still, |slot| F::store(&words, slot)) {
                Straight::Replied(word) => return Ok(F::from_word(word, &self.session)),
                Straight::Failed(error) => return Err(Failed { error: *error, values: Some(values) }),
                Straight::Elsewhere => {}
            }
        }
        self.attempt_elsewhere(values, still)
    }

    /// A whole call with a payload in the direct slot's scratch, in a straight line: see [`SessionInner::call_straight`].
    #[inline(always)]
    fn attempt_straight<'a>(
        &self,
        mut frame: ManuallyDrop<Frame<'_>>,
        mut values: F::Values<'a>,
        still: impl Fn() -> bool,
    ) -> Result<F::Output, Failed<F::Values<'a>>> {
        if !still() {
            self.session.release_straight();
            return Err(Failed { error: CallError::Closed, values: Some(values) });
        }
        let (words, string) = match F::lay(&mut values, &mut frame, &self.target.name) {
            Ok(laid) => laid,
            Err(error) => {
                self.session.release_straight();
                return Err(Failed { error, values: Some(values) });
            }
        };
        if let Some(error) = self.session.run_straight(&self.target, &frame) {
            return Err(Failed { error: *error, values: Some(values) });
        }
        let output = F::finish(values, words, string, &frame, &self.target.name, self.budget());
        self.session.release_straight();
        output.map_err(|error| Failed { error, values: None })
    }

    /// [`Function::call_framed`] for [`Function::attempt`].
    #[inline(never)]
    fn attempt_framed<'a>(
        &self,
        values: F::Values<'a>,
        still: impl Fn() -> bool,
    ) -> Result<F::Output, Failed<F::Values<'a>>> {
        match self.session.claim_direct() {
            Some(frame) => self.attempt_in(frame, values, self.budget(), still),
            None => self.attempt_elsewhere(values, still),
        }
    }

    #[inline(never)]
    fn attempt_elsewhere<'a>(
        &self,
        values: F::Values<'a>,
        still: impl Fn() -> bool,
    ) -> Result<F::Output, Failed<F::Values<'a>>> {
        match self.session.latencies() {
            None => self.attempt_claimed(values, still),
            Some(latencies) => {
                let started = latencies.start();
                let output = match self.session.claim_direct_measured() {
                    Some(frame) => self.attempt_in(frame, values, self.budget(), still),
                    None => self.attempt_claimed(values, still),
                }?;
                latencies.stop(started);
                Ok(output)
            }
        }
    }

    #[inline(never)]
    fn attempt_claimed<'a>(
        &self,
        values: F::Values<'a>,
        still: impl Fn() -> bool,
    ) -> Result<F::Output, Failed<F::Values<'a>>> {
        let mut budget = self.budget();
        match self.session.claim(&mut budget, || FunctionName::clone(&self.target.name)) {
            Ok(frame) => self.attempt_in(frame, values, budget, still),
            Err(error) => Err(Failed { error, values: Some(values) }),
        }
    }

    #[inline(always)]
    fn attempt_in<'a>(
        &self,
        mut frame: Frame<'_>,
        mut values: F::Values<'a>,
        mut budget: Budget,
        still: impl Fn() -> bool,
    ) -> Result<F::Output, Failed<F::Values<'a>>> {
        if !still() {
            return Err(Failed { error: CallError::Closed, values: Some(values) });
        }
        let (words, string) = match F::encode(&mut values, &mut frame, &self.target.name) {
            Ok(encoded) => encoded,
            Err(error) => return Err(Failed { error, values: Some(values) }),
        };
        frame.publish(self.target.index, self.target.label);
        match frame.wait(&mut budget, || FunctionName::clone(&self.target.name)) {
            Ok(()) => F::finish(values, words, string, &frame, &self.target.name, budget)
                .map_err(|error| Failed { error, values: None }),
            Err(error) => Err(Failed { error, values: Some(values) }),
        }
    }

    /// Submits a call; one that cannot be sent gives its values back.
    pub(crate) fn attempt_submit<'a>(
        &self,
        mut values: F::Values<'a>,
    ) -> Result<Ticket<'a, F>, Failed<F::Values<'a>>> {
        let Target { index, label, timeout, name } = &self.target;
        let claimed = self.session.claim_ring(&mut Budget::new(*timeout), || FunctionName::clone(name));
        let encoded = claimed.and_then(|mut frame| {
            let encoded = F::encode(&mut values, &mut frame, name)?;
            Ok((frame, encoded))
        });
        match encoded {
            Ok((mut frame, (words, string))) => {
                frame.publish(*index, *label);
                let detached = Some(frame.detach());
                Ok(Ticket { function: self.clone(), detached, values: Some(values), words, string })
            }
            Err(error) => Err(Failed { error, values: Some(values) }),
        }
    }

    /// Hands the call to the worker and returns at once. If all slots are taken, waits for one, at most the function's timeout.
    ///
    /// # Errors
    /// [`CallError::Full`] if no slot became free in time, and whatever keeps a call from being sent.
    pub fn submit_tuple<'a>(&self, values: F::Values<'a>) -> Result<Ticket<'a, F>, CallError> {
        self.submit_within(values, self.target.timeout)
    }

    /// Like [`Function::submit_tuple`], but answers [`CallError::Full`] at once if all slots are taken.
    ///
    /// # Errors
    /// [`CallError::Full`], and whatever keeps a call from being sent.
    pub fn try_submit_tuple<'a>(&self, values: F::Values<'a>) -> Result<Ticket<'a, F>, CallError> {
        self.submit_within(values, Duration::ZERO)
    }

    fn submit_within<'a>(
        &self,
        mut values: F::Values<'a>,
        patience: Duration,
    ) -> Result<Ticket<'a, F>, CallError> {
        let mut budget = Budget::new(patience);
        let mut frame = self.session.claim_ring(&mut budget, || FunctionName::clone(&self.target.name))?;
        let (words, string) = F::encode(&mut values, &mut frame, &self.target.name)?;
        frame.publish(self.target.index, self.target.label);
        let detached = Some(frame.detach());
        Ok(Ticket { function: self.clone(), detached, values: Some(values), words, string })
    }
}

/// A call that was handed to the worker and not yet waited for. Dropping it forgets the result; the function runs all the same.
///
/// Its slot is taken until it is waited for or dropped. Its deadline counts from [`Ticket::wait`].
#[must_use = "a ticket that is dropped loses its result"]
pub struct Ticket<'a, F: FunctionType> {
    function: Function<F>,
    detached: Option<Detached>,
    values: Option<F::Values<'a>>,
    words: F::Words,
    string: u64,
}

impl<F: FunctionType> std::fmt::Debug for Ticket<'_, F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ticket").field("function", &self.function.target.name).finish_non_exhaustive()
    }
}

impl<F: FunctionType> Ticket<'_, F> {
    /// Whether [`Ticket::wait`] would return at once. The worker may finish the call at any moment.
    pub fn is_done(&self) -> bool {
        self.detached.as_ref().is_none_or(|detached| detached.is_over(&self.function.session))
    }

    /// Waits for the result, at most the function's timeout from now.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn wait(mut self) -> Result<F::Output, CallError> {
        let (Some(detached), Some(values)) = (self.detached.take(), self.values.take()) else {
            return Err(CallError::Closed);
        };
        let function = &self.function;
        if !detached.is_ours(&function.session) {
            return Err(CallError::Forked);
        }
        let mut frame = detached.attach(&function.session);
        let mut budget = function.budget();
        frame.wait(&mut budget, || FunctionName::clone(&function.target.name))?;
        F::finish(values, self.words, self.string, &frame, &function.target.name, budget)
    }
}

impl<F: FunctionType> Drop for Ticket<'_, F> {
    fn drop(&mut self) {
        if let Some(detached) = self.detached.take() {
            drop(detached.attach(&self.function.session));
        }
    }
}

macro_rules! arities {
    ($($count:literal: $($P:ident $p:ident $i:tt),*;)+) => {$(
        impl<R: Returned, $($P: Param),*> Sealed for fn($($P),*) -> R {}
        impl<R: Returned, $($P: Param),*> FunctionType for fn($($P),*) -> R {
            type Values<'a> = ($($P::Value<'a>,)*);
            type Output = R::Output;
            type Words = [u64; $count];
            const ERRNO: bool = R::ERRNO;
            const TYPES: &'static [Type] = &[$($P::TYPE),*];
            const IS_WORDS: bool = R::FROM_WORD $(&& $P::IS_WORD)*;
            const STRING: bool = R::STRING;

            #[inline(always)]
            #[allow(unused_variables, unused_mut)]
            fn words(values: &Self::Values<'_>, session: &SessionInner) -> Option<Self::Words> {
                let mut words = [0; $count];
                $(words[const { word_index(<Self as FunctionType>::TYPES, $i) }] = $P::word(&values.$i, session)?;)*
                Some(words)
            }

            #[inline(always)]
            fn store(words: &Self::Words, slot: &Slot) {
                slot.set_words(words);
            }

            #[inline(always)]
            fn from_word(word: u64, session: &SessionInner) -> R::Output {
                R::from_word(word, session)
            }

            fn signature() -> Signature {
                Signature::new(vec![$($P::TYPE),*], R::TYPE)
            }

            #[inline(always)]
            #[allow(unused_variables)]
            fn need(values: &Self::Values<'_>) -> Need {
                let mut need = Need::default();
                $($P::need(&values.$i, &mut need);)*
                if R::STRING {
                    need.add(STRING_ROOM);
                }
                need
            }

            #[inline(always)]
            #[allow(unused_variables, unused_mut)]
            fn lay(
                values: &mut Self::Values<'_>,
                frame: &mut Frame<'_>,
                name: &FunctionName,
            ) -> Result<(Self::Words, u64), CallError> {
                let words: Self::Words = [$($P::encode(&mut values.$i, frame, name)?),*];
                $(frame.set(const { word_index(<Self as FunctionType>::TYPES, $i) }, words[$i]);)*
                let mut string = 0;
                if R::STRING {
                    string = frame.room(STRING_ROOM);
                    frame.set($count, string);
                    frame.set($count + 1, STRING_ROOM as u64);
                    frame.set($count + 2, frame.session().options.longest_string());
                }
                Ok((words, string))
            }

            #[inline(always)]
            #[allow(unused_variables)]
            fn finish(
                values: Self::Values<'_>,
                words: Self::Words,
                string: u64,
                frame: &Frame<'_>,
                name: &FunctionName,
                budget: Budget,
            ) -> Result<Self::Output, CallError> {
                let output = R::decode(frame, string, name, budget)?;
                $($P::finish(values.$i, words[$i], frame);)*
                Ok(output)
            }
        }

        impl<R: Returned, $($P: Param),*> Function<fn($($P),*) -> R> {
            /// Calls the function and waits for its result.
            ///
            /// # Errors
            /// See [`CallError`], which says whether the function may have run and whether the session can be used again.
            #[inline]
            #[allow(clippy::too_many_arguments, clippy::extra_unused_lifetimes)]
            pub fn call<'a>(&self, $($p: $P::Value<'a>),*) -> Result<R::Output, CallError> {
                self.call_tuple(($($p,)*))
            }

            /// Hands the call to the worker and returns a ticket for its result. If all slots are taken, waits for one, at most the function's timeout.
            ///
            /// # Errors
            /// [`CallError::Full`] if no slot became free in time, and whatever keeps a call from being sent.
            #[allow(clippy::too_many_arguments)]
            pub fn submit<'a>(&self, $($p: $P::Value<'a>),*) -> Result<Ticket<'a, fn($($P),*) -> R>, CallError> {
                self.submit_tuple(($($p,)*))
            }
        }
    )+};
}
arities! {
    0: ;
    1: A a 0;
    2: A a 0, B b 1;
    3: A a 0, B b 1, C c 2;
    4: A a 0, B b 1, C c 2, D d 3;
    5: A a 0, B b 1, C c 2, D d 3, E e 4;
    6: A a 0, B b 1, C c 2, D d 3, E e 4, F f 5;
    7: A a 0, B b 1, C c 2, D d 3, E e 4, F f 5, G g 6;
    8: A a 0, B b 1, C c 2, D d 3, E e 4, F f 5, G g 6, H h 7;
    9: A a 0, B b 1, C c 2, D d 3, E e 4, F f 5, G g 6, H h 7, I i 8;
    10: A a 0, B b 1, C c 2, D d 3, E e 4, F f 5, G g 6, H h 7, I i 8, J j 9;
    11: A a 0, B b 1, C c 2, D d 3, E e 4, F f 5, G g 6, H h 7, I i 8, J j 9, K k 10;
    12: A a 0, B b 1, C c 2, D d 3, E e 4, F f 5, G g 6, H h 7, I i 8, J j 9, K k 10, L l 11;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_lie_where_the_channel_says() {
        let types = [Type::F64, Type::I32, Type::F32, Type::Ptr, Type::F64];
        let expected = Signature::new(types, Type::Void).word_indexes();
        for (at, index) in expected.iter().enumerate() {
            assert_eq!(word_index(&types, at), usize::from(*index));
        }
    }
}

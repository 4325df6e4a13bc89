//! Calls whose types are known only at run time: by name, with arguments that are checked against the declared signature when the call is made.

use crate::budget::Budget;
use crate::call::{Errno, STRING_ROOM, decode_string, lend_str};
use crate::error::{CallError, FunctionName, LoadError};
use crate::module::Module;
use crate::session::{
    Block, Frame, Need, RemotePtr, SessionInner, SessionOwner, Straight, Target, check_timeout,
};
use hotcell_channel::session::STRING_WORDS;
use hotcell_channel::signature::{ARGS_MAX, Signature, Type};
use hotcell_channel::slot::WORDS_MAX;
use std::ffi::{CStr, CString};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// What a call by name returned.
///
/// `TryFrom` gives the Rust type, if the value fits it without loss: `let n: i32 = cell.call("add", (2, 3))?.try_into()?;`
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Value {
    /// Nothing: the function returns `void`.
    Void,
    /// A null string, or what an [`IsolatedProcess`](crate::IsolatedProcess) in error mode `null` gives for a failed call.
    Null,
    /// `bool`
    Bool(bool),
    /// A signed integer of any size.
    Signed(i64),
    /// An unsigned integer of any size.
    Unsigned(u64),
    /// `f32`
    F32(f32),
    /// `f64`
    F64(f64),
    /// An address in the worker.
    Ptr(RemotePtr),
    /// A string.
    CString(CString),
}

impl Value {
    fn kind(&self) -> String {
        match self {
            Value::Void => "nothing (void)".into(),
            Value::Null => "null".into(),
            Value::Bool(b) => format!("the bool {b}"),
            Value::Signed(n) => format!("the integer {n}"),
            Value::Unsigned(n) => format!("the integer {n}"),
            Value::F32(x) => format!("the f32 {x}"),
            Value::F64(x) => format!("the f64 {x}"),
            Value::Ptr(p) => format!("the pointer {p}"),
            Value::CString(_) => "a string".into(),
        }
    }

    /// Whether there is no value: `void` or null.
    pub fn is_null(&self) -> bool {
        matches!(self, Value::Void | Value::Null)
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Void => f.write_str("void"),
            Value::Null => f.write_str("null"),
            Value::Bool(b) => b.fmt(f),
            Value::Signed(n) => n.fmt(f),
            Value::Unsigned(n) => n.fmt(f),
            Value::F32(x) => x.fmt(f),
            Value::F64(x) => x.fmt(f),
            Value::Ptr(p) => p.fmt(f),
            Value::CString(s) => s.to_string_lossy().fmt(f),
        }
    }
}

#[cold]
#[inline(never)]
fn wrong_result(expected: &'static str, given: Value) -> CallError {
    CallError::WrongResult { expected, given: given.kind() }
}

// A value is moved on the way to the error only: where its address is not needed, it stays in registers. Written to memory in pieces and read back whole it would cost a
// call a third of its time, for the processor stalls on that.
macro_rules! from_value {
    ($($t:ty, $name:expr, $($pattern:pat => $value:expr),+;)+) => {$(
        impl TryFrom<Value> for $t {
            type Error = CallError;
            #[inline(always)]
            fn try_from(value: Value) -> Result<$t, CallError> {
                let fits = match &value {
                    $($pattern => $value,)+
                    _ => None,
                };
                match fits {
                    Some(fits) => Ok(fits),
                    None => Err(wrong_result($name, { value })),
                }
            }
        }
    )+};
}
macro_rules! from_integer {
    ($($t:ident),+) => {
        from_value! {$(
            $t, stringify!($t), Value::Signed(n) => $t::try_from(*n).ok(), Value::Unsigned(n) => $t::try_from(*n).ok();
        )+}
    };
}
from_integer!(i8, i16, i32, i64, u8, u16, u32, u64, isize, usize);
from_value! {
    (), "void", Value::Void => Some(());
    bool, "bool", Value::Bool(b) => Some(*b);
    f32, "f32", Value::F32(x) => Some(*x);
    f64, "f64", Value::F64(x) => Some(*x), Value::F32(x) => Some(f64::from(*x));
    RemotePtr, "ptr", Value::Ptr(p) => Some(*p), Value::Null => Some(RemotePtr::NULL);
}

impl TryFrom<Value> for CString {
    type Error = CallError;
    fn try_from(value: Value) -> Result<CString, CallError> {
        match value {
            Value::CString(s) => Ok(s),
            other => Err(wrong_result("string", other)),
        }
    }
}

impl TryFrom<Value> for Option<CString> {
    type Error = CallError;
    fn try_from(value: Value) -> Result<Option<CString>, CallError> {
        match value {
            Value::CString(s) => Ok(Some(s)),
            Value::Null => Ok(None),
            other => Err(wrong_result("string or null", other)),
        }
    }
}

impl TryFrom<Value> for String {
    type Error = CallError;
    fn try_from(value: Value) -> Result<String, CallError> {
        CString::try_from(value)?.into_string().map_err(|_| CallError::WrongResult {
            expected: "UTF-8 string",
            given: "a string that is not UTF-8".into(),
        })
    }
}

/// An argument of a call by name. Made from numbers, strings, byte slices, pointers and blocks with `into()`.
///
/// Integers are accepted for any integer type that can hold them, and for floats; a float is accepted for an integer type if it is a whole
/// number that the type can hold.
#[derive(Debug)]
#[non_exhaustive]
pub enum Arg<'a> {
    /// A null pointer.
    Null,
    /// A bool.
    Bool(bool),
    /// A signed integer.
    Signed(i64),
    /// An unsigned integer.
    Unsigned(u64),
    /// A float.
    Float(f64),
    /// An address in the worker.
    Ptr(RemotePtr),
    /// A block of the session's shared memory.
    Block(&'a Block),
    /// A string without a NUL inside.
    Str(&'a str),
    /// A C string.
    CStr(&'a CStr),
    /// Bytes that the function reads.
    Bytes(&'a [u8]),
    /// Bytes that the function reads and writes.
    BytesMut(&'a mut [u8]),
    /// Bytes that the function writes; see [`out`].
    BytesOut(&'a mut [u8]),
}

/// Bytes that the function only writes: they are not copied to the worker, only back.
pub fn out(bytes: &mut [u8]) -> Arg<'_> {
    Arg::BytesOut(bytes)
}

macro_rules! into_arg {
    ($($t:ty, $v:ident => $arg:expr;)+) => {$(
        impl<'a> From<$t> for Arg<'a> {
            #[inline(always)]
            fn from($v: $t) -> Arg<'a> {
                $arg
            }
        }
    )+};
}
into_arg! {
    i8, v => Arg::Signed(v.into());
    i16, v => Arg::Signed(v.into());
    i32, v => Arg::Signed(v.into());
    i64, v => Arg::Signed(v);
    isize, v => Arg::Signed(v as i64);
    u8, v => Arg::Unsigned(v.into());
    u16, v => Arg::Unsigned(v.into());
    u32, v => Arg::Unsigned(v.into());
    u64, v => Arg::Unsigned(v);
    usize, v => Arg::Unsigned(v as u64);
    f32, v => Arg::Float(v.into());
    f64, v => Arg::Float(v);
    bool, v => Arg::Bool(v);
    RemotePtr, v => Arg::Ptr(v);
    &'a Block, v => Arg::Block(v);
    &'a str, v => Arg::Str(v);
    &'a String, v => Arg::Str(v);
    &'a CStr, v => Arg::CStr(v);
    &'a CString, v => Arg::CStr(v);
    &'a [u8], v => Arg::Bytes(v);
    &'a Vec<u8>, v => Arg::Bytes(v);
    &'a mut [u8], v => Arg::BytesMut(v);
    &'a mut Vec<u8>, v => Arg::BytesMut(v);
}
impl<'a, const N: usize> From<&'a [u8; N]> for Arg<'a> {
    fn from(v: &'a [u8; N]) -> Arg<'a> {
        Arg::Bytes(v)
    }
}
impl<'a, const N: usize> From<&'a mut [u8; N]> for Arg<'a> {
    fn from(v: &'a mut [u8; N]) -> Arg<'a> {
        Arg::BytesMut(v)
    }
}
impl<'a, T: Into<Arg<'a>>> From<Option<T>> for Arg<'a> {
    fn from(v: Option<T>) -> Arg<'a> {
        v.map_or(Arg::Null, Into::into)
    }
}
/// What a call returned, as an argument of the next one. A string's bytes are borrowed.
impl<'a> From<&'a Value> for Arg<'a> {
    fn from(v: &'a Value) -> Arg<'a> {
        match v {
            Value::Void | Value::Null => Arg::Null,
            Value::Bool(b) => Arg::Bool(*b),
            Value::Signed(n) => Arg::Signed(*n),
            Value::Unsigned(n) => Arg::Unsigned(*n),
            Value::F32(x) => Arg::Float((*x).into()),
            Value::F64(x) => Arg::Float(*x),
            Value::Ptr(p) => Arg::Ptr(*p),
            Value::CString(s) => Arg::CStr(s),
        }
    }
}

impl fmt::Display for Arg<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Arg::Null => f.write_str("null"),
            Arg::Bool(b) => write!(f, "the bool {b}"),
            Arg::Signed(n) => write!(f, "the integer {n}"),
            Arg::Unsigned(n) => write!(f, "the integer {n}"),
            Arg::Float(x) => write!(f, "the float {x}"),
            Arg::Ptr(p) => write!(f, "the pointer {p}"),
            Arg::Block(block) => write!(f, "a block of {} bytes", block.len()),
            Arg::Str(s) => write!(f, "a string of {} bytes", s.len()),
            Arg::CStr(s) => write!(f, "a string of {} bytes", s.count_bytes()),
            Arg::Bytes(b) => write!(f, "{} bytes", b.len()),
            Arg::BytesMut(b) | Arg::BytesOut(b) => write!(f, "{} writable bytes", b.len()),
        }
    }
}

/// The arguments of a call by name: a tuple of up to twelve, an array, or a `Vec` of things that are [`Arg`]s.
pub trait IntoArgs<'a>: Sized {
    #[doc(hidden)]
    fn with<R>(self, body: impl FnOnce(&mut [Arg<'a>]) -> R) -> R;
    /// Calls `function` with them.
    #[doc(hidden)]
    #[inline(always)]
    fn call(self, function: &DynFunction) -> Result<Value, CallError> {
        self.with(|args| function.call_slice(args))
    }
}

impl<'a> IntoArgs<'a> for () {
    #[inline(always)]
    fn with<R>(self, body: impl FnOnce(&mut [Arg<'a>]) -> R) -> R {
        body(&mut [])
    }
    #[inline(always)]
    fn call(self, function: &DynFunction) -> Result<Value, CallError> {
        function.call_array([])
    }
}
impl<'a, T: Into<Arg<'a>>, const N: usize> IntoArgs<'a> for [T; N] {
    #[inline(always)]
    fn with<R>(self, body: impl FnOnce(&mut [Arg<'a>]) -> R) -> R {
        body(&mut self.map(Into::into))
    }
    #[inline(always)]
    fn call(self, function: &DynFunction) -> Result<Value, CallError> {
        function.call_array(self.map(Into::into))
    }
}
impl<'a, T: Into<Arg<'a>>> IntoArgs<'a> for Vec<T> {
    fn with<R>(self, body: impl FnOnce(&mut [Arg<'a>]) -> R) -> R {
        body(&mut self.into_iter().map(Into::into).collect::<Vec<_>>())
    }
}
macro_rules! tuples {
    ($($($T:ident $i:tt),+;)+) => {$(
        impl<'a, $($T: Into<Arg<'a>>),+> IntoArgs<'a> for ($($T,)+) {
            #[inline(always)]
            fn with<R>(self, body: impl FnOnce(&mut [Arg<'a>]) -> R) -> R {
                body(&mut [$(self.$i.into()),+])
            }
            #[inline(always)]
            fn call(self, function: &DynFunction) -> Result<Value, CallError> {
                function.call_array([$(self.$i.into()),+])
            }
        }
    )+};
}
tuples! {
    A 0;
    A 0, B 1;
    A 0, B 1, C 2;
    A 0, B 1, C 2, D 3;
    A 0, B 1, C 2, D 3, E 4;
    A 0, B 1, C 2, D 3, E 4, F 5;
    A 0, B 1, C 2, D 3, E 4, F 5, G 6;
    A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7;
    A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7, I 8;
    A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7, I 8, J 9;
    A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7, I 8, J 9, K 10;
    A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7, I 8, J 9, K 10, L 11;
}

/// A resolved function whose signature is known at run time. What [`Function`](crate::Function) says about signatures and results holds here too.
#[derive(Clone, Debug)]
pub struct DynFunction {
    session: Arc<SessionInner>,
    target: Target,
    /// A second call index, whose replies carry `errno`; resolved when it is first asked for.
    with_errno: Arc<std::sync::OnceLock<u32>>,
    function: Arc<Declared>,
    module: Module,
    _owner: Arc<SessionOwner>,
}

#[derive(Debug)]
struct Declared {
    signature: Signature,
    places: Vec<Place>,
    quick: Quick,
    /// The places again, for [`Quick::Integers`].
    integers: [Place; QUICK_ARGS],
    result: ResultKind,
    takes_callback: bool,
}

/// Where an argument's word lies, and which integers it takes as they are: the commonest kind of argument, checked without a look at the type.
#[derive(Clone, Copy, Debug)]
struct Place {
    word: u8,
    least: i64,
    most: i64,
    /// The largest one that comes as an unsigned number; 0 as well where the type takes none.
    unsigned_most: u64,
}

impl Place {
    const NONE: Self = Self { word: 0, least: 1, most: 0, unsigned_most: 0 };

    fn new(word: u8, t: Type) -> Self {
        let (least, most, unsigned_most) = match t {
            Type::Char | Type::I8 => (i8::MIN.into(), i8::MAX.into(), 0x7f),
            Type::I16 => (i16::MIN.into(), i16::MAX.into(), 0x7fff),
            Type::I32 => (i32::MIN.into(), i32::MAX.into(), 0x7fff_ffff),
            Type::I64 | Type::I64Fast => (i64::MIN, i64::MAX, u64::MAX >> 1),
            Type::U8 => (0, u8::MAX.into(), u8::MAX.into()),
            Type::U16 => (0, u16::MAX.into(), u16::MAX.into()),
            Type::U32 => (0, u32::MAX.into(), u32::MAX.into()),
            Type::U64 | Type::U64Fast => (0, i64::MAX, u64::MAX),
            // None: every argument goes through `check`.
            _ => return Self { word, ..Self::NONE },
        };
        Self { word, least, most, unsigned_most }
    }

    fn takes_integers(&self) -> bool {
        self.least <= self.most
    }
}

/// Most arguments of a call that is made without further looks.
const QUICK_ARGS: usize = 8;

/// Whether calls of a function can be made straight: decided when it is resolved. The words lie in the order of the arguments, for all are of one class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Quick {
    /// So many arguments, all of integer types.
    Integers(u8),
    /// So many arguments, all `f64`.
    Doubles(u8),
    /// No.
    Never,
}

impl Quick {
    fn new(signature: &Signature, places: &[Place]) -> Self {
        match u8::try_from(places.len()) {
            Ok(count) if places.len() <= QUICK_ARGS && signature.returns != Type::CString => {
                if places.iter().all(Place::takes_integers) {
                    Self::Integers(count)
                } else if signature.args.iter().all(|t| *t == Type::F64) {
                    Self::Doubles(count)
                } else {
                    Self::Never
                }
            }
            _ => Self::Never,
        }
    }
}

/// What becomes of a reply's first word, sorted so that integers take no look at their type.
#[derive(Clone, Copy, Debug)]
enum ResultKind {
    /// Shifted up and down again by so many bits; those above a narrower type are unspecified.
    Signed(u8),
    /// The same.
    Unsigned(u8),
    /// By its type.
    Other(Type),
}

impl ResultKind {
    fn new(t: Type) -> Self {
        match t {
            Type::Char | Type::I8 => Self::Signed(56),
            Type::I16 => Self::Signed(48),
            Type::I32 => Self::Signed(32),
            Type::I64 | Type::I64Fast => Self::Signed(0),
            Type::U8 => Self::Unsigned(56),
            Type::U16 => Self::Unsigned(48),
            Type::U32 => Self::Unsigned(32),
            Type::U64 | Type::U64Fast => Self::Unsigned(0),
            other => Self::Other(other),
        }
    }

    /// The value that a word stands for. A string is not one: its word is an address.
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation)] // the bits above a narrower type are unspecified
    fn value(self, word: u64, session: &SessionInner) -> Value {
        match self {
            Self::Signed(bits) => Value::Signed((word << (bits & 63)).cast_signed() >> (bits & 63)),
            Self::Unsigned(bits) => Value::Unsigned((word << (bits & 63)) >> (bits & 63)),
            Self::Other(Type::F64) => Value::F64(f64::from_bits(word)),
            Self::Other(Type::Void) => Value::Void,
            Self::Other(Type::Bool) => Value::Bool(word & 0xff != 0),
            Self::Other(Type::F32) => Value::F32(f32::from_bits(word as u32)),
            Self::Other(_) => Value::Ptr(session.pointer(word)),
        }
    }
}

/// A call whose arguments have been checked.
#[derive(Clone, Copy)]
struct Checked {
    index: u32,
    need: Need,
    /// Words of the request.
    count: usize,
    /// Whether all arguments are numbers, whose words are final.
    numbers: bool,
    /// Whether a string comes back.
    string: bool,
}

impl DynFunction {
    pub(crate) fn resolve(module: &Module, symbol: &str, signature: Signature) -> Result<Self, LoadError> {
        let resolved = module.resolve(symbol, &signature, false)?;
        let owner = module.owner();
        let words = signature.word_indexes();
        let places: Vec<Place> =
            words.iter().zip(&signature.args).map(|(word, t)| Place::new(*word, *t)).collect();
        let mut integers = [Place::NONE; QUICK_ARGS];
        integers.iter_mut().zip(&places).for_each(|(to, from)| *to = *from);
        Ok(Self {
            session: Arc::clone(&owner.inner),
            target: Target::new(resolved, owner.inner.options.call_timeout()),
            with_errno: Arc::default(),
            function: Arc::new(Declared {
                quick: Quick::new(&signature, &places),
                integers,
                result: ResultKind::new(signature.returns),
                places,
                takes_callback: signature.args.contains(&Type::Function),
                signature,
            }),
            module: module.clone(),
            _owner: Arc::clone(owner),
        })
    }

    /// The function's name and module.
    pub fn name(&self) -> &FunctionName {
        &self.target.name
    }

    /// The declared signature.
    pub fn signature(&self) -> &Signature {
        &self.function.signature
    }

    /// The same function with another timeout than its session's: see [`SessionBuilder::timeout`](crate::SessionBuilder::timeout). The handle can be kept.
    ///
    /// # Errors
    /// [`CallError::ZeroTimeout`].
    pub fn with_timeout(&self, timeout: Duration) -> Result<Self, CallError> {
        check_timeout(timeout, &self.target.name)?;
        let mut function = self.clone();
        function.target.timeout = timeout;
        Ok(function)
    }

    /// Calls the function and waits for its result.
    ///
    /// # Errors
    /// [`CallError::WrongCount`] and [`CallError::WrongArgument`] before anything is sent, and see [`CallError`].
    #[inline]
    pub fn call<'a>(&self, args: impl IntoArgs<'a>) -> Result<Value, CallError> {
        args.call(self)
    }

    /// Calls it with arguments of which the caller's compiler knows the number and the kinds. They are put in memory on the way to `call_otherwise` only, and so is its result.
    #[inline(always)]
    fn call_array<const N: usize>(&self, args: [Arg<'_>; N]) -> Result<Value, CallError> {
        match self.call_quickly(&args) {
            Straight::Replied(word) => Ok(self.function.result.value(word, &self.session)),
            Straight::Failed(error) => Err(*error),
            Straight::Elsewhere => {
                let mut result = Ok(Value::Void);
                self.call_otherwise(&mut { args }, &mut result);
                result
            }
        }
    }

    /// Calls it with any arguments, which the caller still has afterwards.
    pub(crate) fn call_slice(&self, args: &mut [Arg<'_>]) -> Result<Value, CallError> {
        match self.call_quickly(args) {
            Straight::Replied(word) => Ok(self.function.result.value(word, &self.session)),
            Straight::Failed(error) => Err(*error),
            Straight::Elsewhere => self.call_args(self.target.index, args, |_| ()).map(|(value, ())| value),
        }
    }

    #[inline(never)]
    fn call_otherwise(&self, args: &mut [Arg<'_>], result: &mut Result<Value, CallError>) {
        *result = self.call_args(self.target.index, args, |_| ()).map(|(value, ())| value);
    }

    /// The commonest call, in a straight line: a few integers that the function takes as they are, or doubles, no string back, the direct slot free. Any other is made
    /// elsewhere, also one that is wrong.
    #[inline(always)]
    fn call_quickly(&self, args: &[Arg<'_>]) -> Straight {
        let declared = &*self.function;
        let mut words = [0u64; QUICK_ARGS];
        if args.len() > QUICK_ARGS {
            return Straight::Elsewhere;
        }
        match declared.quick {
            Quick::Integers(count) if usize::from(count) == args.len() => {
                for ((arg, place), word) in args.iter().zip(&declared.integers).zip(&mut words) {
                    match arg {
                        Arg::Signed(n) if (place.least..=place.most).contains(n) => *word = n.cast_unsigned(),
                        Arg::Unsigned(n) if *n <= place.unsigned_most => *word = *n,
                        _ => return Straight::Elsewhere,
                    }
                }
            }
            Quick::Doubles(count) if usize::from(count) == args.len() => {
                for (arg, word) in args.iter().zip(&mut words) {
                    match arg {
                        Arg::Float(x) => *word = x.to_bits(),
                        _ => return Straight::Elsewhere,
                    }
                }
            }
            _ => return Straight::Elsewhere,
        }
        self.session.call_straight(&self.target, |slot| slot.set_words(&words[..args.len()]))
    }

    /// Calls the function and also gives `errno` as the call left it.
    ///
    /// # Errors
    /// As [`DynFunction::call`]; the first use resolves the function once more.
    #[allow(clippy::cast_possible_truncation)]
    pub fn call_errno<'a>(&self, args: impl IntoArgs<'a>) -> Result<(Value, Errno), crate::Error> {
        let index = match self.with_errno.get() {
            Some(index) => *index,
            None => {
                let resolved =
                    self.module.resolve(&self.target.name.symbol, &self.function.signature, true)?;
                *self.with_errno.get_or_init(|| resolved.index)
            }
        };
        let errno = |frame: &Frame<'_>| Errno((frame.reply(2) as u32).cast_signed());
        Ok(args.with(|args| self.call_args(index, args, errno))?)
    }

    #[inline(never)]
    fn call_args<T>(
        &self,
        index: u32,
        args: &mut [Arg<'_>],
        more: impl FnOnce(&Frame<'_>) -> T,
    ) -> Result<(Value, T), CallError> {
        // The words are gathered on the stack; clearing room for the longest signature would cost a short one more than all the rest.
        if args.len() + STRING_WORDS <= WORDS_MAX {
            self.call_sized::<WORDS_MAX, T>(index, args, more)
        } else {
            self.call_sized::<{ ARGS_MAX + STRING_WORDS }, T>(index, args, more)
        }
    }

    #[inline(always)]
    fn call_sized<const WORDS: usize, T>(
        &self,
        index: u32,
        args: &mut [Arg<'_>],
        more: impl FnOnce(&Frame<'_>) -> T,
    ) -> Result<(Value, T), CallError> {
        let Declared { signature, places, takes_callback, .. } = &*self.function;
        let name: &FunctionName = &self.target.name;
        if args.len() != signature.args.len() {
            return Err(CallError::WrongCount {
                function: name.clone(),
                expected: signature.args.len(),
                given: args.len(),
            });
        }
        if *takes_callback {
            return Err(CallError::CallbackUnsupported { function: name.clone() });
        }
        // Everything that can be wrong with the arguments is found before a slot is claimed.
        let mut need = Need::default();
        let mut words = [0u64; WORDS];
        let mut numbers = true;
        for (at, ((arg, t), place)) in args.iter().zip(&signature.args).zip(places).enumerate() {
            if let Arg::Signed(n) = arg
                && (place.least..=place.most).contains(n)
            {
                words[usize::from(place.word)] = n.cast_unsigned();
                continue;
            }
            numbers &= matches!(arg, Arg::Signed(_) | Arg::Unsigned(_) | Arg::Float(_) | Arg::Bool(_));
            match check(arg, *t, &mut need) {
                Some(word) => words[usize::from(place.word)] = word,
                None => {
                    return Err(CallError::WrongArgument {
                        function: name.clone(),
                        index: at + 1,
                        expected: *t,
                        given: arg.to_string(),
                    });
                }
            }
        }
        let string = signature.returns == Type::CString;
        let count = args.len() + if string { STRING_WORDS } else { 0 };
        if string {
            need.add(STRING_ROOM);
        }
        if count > WORDS_MAX {
            need.add(count * size_of::<u64>());
        }
        let call = Checked { index, need, count, numbers, string };
        match self.session.claim_direct() {
            Some(frame) => self.call_in(frame, args, &mut words, call, self.budget(), more),
            None => self.call_elsewhere(args, &mut words, call, more),
        }
    }

    #[inline(never)]
    fn call_elsewhere<T>(
        &self,
        args: &mut [Arg<'_>],
        words: &mut [u64],
        call: Checked,
        more: impl FnOnce(&Frame<'_>) -> T,
    ) -> Result<(Value, T), CallError> {
        match self.session.latencies() {
            None => self.call_claimed(args, words, call, more),
            Some(latencies) => {
                let started = latencies.start();
                let output = match self.session.claim_direct_measured() {
                    Some(frame) => self.call_in(frame, args, words, call, self.budget(), more),
                    None => self.call_claimed(args, words, call, more),
                }?;
                latencies.stop(started);
                Ok(output)
            }
        }
    }

    #[inline(never)]
    fn call_claimed<T>(
        &self,
        args: &mut [Arg<'_>],
        words: &mut [u64],
        call: Checked,
        more: impl FnOnce(&Frame<'_>) -> T,
    ) -> Result<(Value, T), CallError> {
        let mut budget = self.budget();
        let frame = self.session.claim(&mut budget, || FunctionName::clone(&self.target.name))?;
        self.call_in(frame, args, words, call, budget, more)
    }

    #[inline(always)]
    fn budget(&self) -> Budget {
        Budget::new(self.target.timeout)
    }

    #[inline(always)]
    fn call_in<T>(
        &self,
        mut frame: Frame<'_>,
        args: &mut [Arg<'_>],
        words: &mut [u64],
        call: Checked,
        mut budget: Budget,
        more: impl FnOnce(&Frame<'_>) -> T,
    ) -> Result<(Value, T), CallError> {
        let places = &self.function.places;
        let name: &FunctionName = &self.target.name;
        let Checked { index, need, count, numbers, string } = call;
        frame.reserve(need, || name.clone())?;
        if !numbers {
            for (at, (arg, place)) in args.iter().zip(places).enumerate() {
                let word = &mut words[usize::from(place.word)];
                match arg {
                    Arg::Ptr(pointer) => *word = frame.session().address_of(*pointer, || name.clone())?,
                    Arg::Block(block) if block.session_id() == frame.session().id() => {
                        *word = block.pointer().address();
                    }
                    Arg::Block(_) => return Err(CallError::ForeignPointer { function: name.clone() }),
                    Arg::Bytes(bytes) => *word = frame.lend(bytes),
                    Arg::BytesMut(bytes) => *word = frame.lend(bytes),
                    Arg::BytesOut(bytes) => *word = frame.room(bytes.len()),
                    Arg::CStr(text) => *word = frame.lend(text.to_bytes_with_nul()),
                    Arg::Str(text) => {
                        *word = lend_str(text, &mut frame).ok_or_else(|| CallError::InteriorNul {
                            function: name.clone(),
                            index: at + 1,
                        })?;
                    }
                    _ => {}
                }
            }
        }
        let mut target = 0;
        if string {
            target = frame.room(STRING_ROOM);
            words[args.len()] = target;
            words[args.len() + 1] = STRING_ROOM as u64;
            words[args.len() + 2] = frame.session().options.longest_string();
        }
        if count > WORDS_MAX {
            frame.spill(&words[..count]);
        } else {
            for (at, word) in words[..count].iter().enumerate() {
                frame.set(at, *word);
            }
        }
        frame.publish(index, self.target.label);
        frame.wait(&mut budget, || name.clone())?;
        let more = more(&frame);
        let value = match self.function.result {
            ResultKind::Other(Type::CString) => {
                decode_string(&frame, target, name, budget)?.map_or(Value::Null, Value::CString)
            }
            kind => kind.value(frame.reply(0), frame.session()),
        };
        if !numbers {
            for (arg, place) in args.iter_mut().zip(places) {
                if let Arg::BytesMut(bytes) | Arg::BytesOut(bytes) = arg {
                    frame.read_back(words[usize::from(place.word)], bytes);
                }
            }
        }
        Ok((value, more))
    }
}

/// Whether an argument can be passed as a type: its word, and what it needs. Words of bytes and pointers are set later.
#[inline(never)]
fn check(arg: &Arg<'_>, t: Type, need: &mut Need) -> Option<u64> {
    match t {
        Type::Bool => match arg {
            Arg::Bool(b) => Some(u64::from(*b)),
            _ => unsigned(arg, 1),
        },
        Type::Char | Type::I8 => signed(arg, i8::MIN.into(), i8::MAX.into()),
        Type::I16 => signed(arg, i16::MIN.into(), i16::MAX.into()),
        Type::I32 => signed(arg, i32::MIN.into(), i32::MAX.into()),
        Type::I64 | Type::I64Fast => signed(arg, i64::MIN, i64::MAX),
        Type::U8 => unsigned(arg, u8::MAX.into()),
        Type::U16 => unsigned(arg, u16::MAX.into()),
        Type::U32 => unsigned(arg, u32::MAX.into()),
        Type::U64 | Type::U64Fast => unsigned(arg, u64::MAX),
        #[allow(clippy::cast_possible_truncation)] // rounding to the declared type is what C does too
        Type::F32 => float(arg).map(|x| u64::from((x as f32).to_bits())),
        Type::F64 => float(arg).map(f64::to_bits),
        Type::Ptr | Type::Buffer | Type::CString => match arg {
            Arg::Null | Arg::Ptr(_) | Arg::Block(_) => Some(0),
            Arg::Str(text) => {
                need.add(text.len() + 1);
                Some(0)
            }
            Arg::CStr(text) => {
                need.add(text.count_bytes() + 1);
                Some(0)
            }
            // Bytes without a NUL at the end are not a C string.
            Arg::Bytes(bytes) if t != Type::CString || bytes.last() == Some(&0) => {
                need.add(bytes.len());
                Some(0)
            }
            Arg::BytesMut(bytes) | Arg::BytesOut(bytes) if t != Type::CString => {
                need.add(bytes.len());
                Some(0)
            }
            _ => None,
        },
        _ => None,
    }
}

/// A whole number from what is no integer, if it is one.
#[cold]
#[inline(never)]
fn whole(arg: &Arg<'_>) -> Option<i128> {
    match arg {
        Arg::Bool(b) => Some((*b).into()),
        #[allow(clippy::cast_possible_truncation)]
        // in range: checked by the bound, and whole: checked by fract
        Arg::Float(x) if x.fract() == 0.0 && x.abs() < 2f64.powi(64) => Some(*x as i128),
        _ => None,
    }
}

#[inline(always)]
fn signed(arg: &Arg<'_>, min: i64, max: i64) -> Option<u64> {
    let n = match arg {
        Arg::Signed(n) => *n,
        Arg::Unsigned(n) => i64::try_from(*n).ok()?,
        _ => i64::try_from(whole(arg)?).ok()?,
    };
    (min..=max).contains(&n).then_some(n.cast_unsigned())
}

#[inline(always)]
fn unsigned(arg: &Arg<'_>, max: u64) -> Option<u64> {
    let n = match arg {
        Arg::Unsigned(n) => *n,
        Arg::Signed(n) => u64::try_from(*n).ok()?,
        _ => u64::try_from(whole(arg)?).ok()?,
    };
    (n <= max).then_some(n)
}

#[inline]
#[allow(clippy::cast_precision_loss)] // integers beyond 2^53 are rounded, as C does
fn float(arg: &Arg<'_>) -> Option<f64> {
    match arg {
        Arg::Float(x) => Some(*x),
        Arg::Signed(n) => Some(*n as f64),
        Arg::Unsigned(n) => Some(*n as f64),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(arg: impl Into<Arg<'static>>, t: Type) -> Option<u64> {
        check(&arg.into(), t, &mut Need::default())
    }

    #[test]
    fn numbers_are_accepted_where_they_fit() {
        assert_eq!(word(-1i32, Type::I64), Some(u64::MAX));
        assert_eq!(word(200i32, Type::U8), Some(200));
        assert_eq!(word(3.0f64, Type::I32), Some(3));
        assert_eq!(word(3i32, Type::F64), Some(3f64.to_bits()));
        assert_eq!(word(true, Type::Bool), Some(1));
        assert_eq!(word(u64::MAX, Type::U64), Some(u64::MAX));
    }

    #[test]
    fn numbers_are_refused_where_they_do_not_fit() {
        for (arg, t) in [
            (Arg::Signed(256), Type::U8),
            (Arg::Signed(-1), Type::U64),
            (Arg::Float(0.5), Type::I32),
            (Arg::Float(f64::NAN), Type::I64),
            (Arg::Float(1e30), Type::U64),
            (Arg::Signed(2), Type::Bool),
            (Arg::Unsigned(1 << 63), Type::I64),
            (Arg::Str("x"), Type::I32),
            (Arg::Signed(1), Type::Ptr),
            (Arg::Bytes(b"no nul"), Type::CString),
            (Arg::Null, Type::F64),
        ] {
            assert_eq!(check(&arg, t, &mut Need::default()), None, "{arg} as {t}");
        }
    }

    #[test]
    fn values_become_only_what_they_are() {
        assert_eq!(i8::try_from(Value::Signed(-5)).unwrap(), -5);
        assert!(u8::try_from(Value::Signed(-5)).is_err());
        assert!(i32::try_from(Value::F64(1.0)).is_err());
        assert_eq!(f64::try_from(Value::F32(0.5)).unwrap(), 0.5);
        assert_eq!(String::try_from(Value::CString(c"x".into())).unwrap(), "x");
        assert!(<()>::try_from(Value::Null).is_err());
    }
}

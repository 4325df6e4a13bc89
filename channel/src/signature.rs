//! What a function takes and gives back, as both sides must agree on it.
//!
//! A [`Signature`] fixes where each argument's word lies in a record: **integer-class words first, then
//! float-class words, each group in declared order**. Under the System V ABI the first six integer words
//! and the first eight float words are then exactly the argument registers, so a worker that calls a
//! register-only function copies words to registers with no table in between.

use serde::{Deserialize, Serialize};

/// Most arguments that a signature may have.
pub const ARGS_MAX: usize = 64;

/// A type that may cross: the names are those of `bun:ffi`.
///
/// The discriminants are wire values; new types are added at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u8)]
#[non_exhaustive]
pub enum Type {
    /// No value; only as a return type.
    Void,
    /// `_Bool`: one byte, 0 or 1.
    Bool,
    /// `char`: one signed byte on the targets that hotcell runs on.
    Char,
    /// `int8_t`
    I8,
    /// `int16_t`
    I16,
    /// `int32_t`
    I32,
    /// `int64_t`
    I64,
    /// `uint8_t`
    U8,
    /// `uint16_t`
    U16,
    /// `uint32_t`
    U32,
    /// `uint64_t`
    U64,
    /// `float`
    F32,
    /// `double`
    F64,
    /// An address in the worker, or bytes that are lent to the call.
    Ptr,
    /// NUL-terminated string.
    CString,
    /// Bytes that are lent to the call.
    Buffer,
    /// A callback into the host. Can be declared; calling a function that takes one is not yet supported.
    Function,
    /// `int64_t`; bun's variant that may come back as a small number. The same as `I64` here.
    I64Fast,
    /// `uint64_t`; bun's variant that may come back as a small number. The same as `U64` here.
    U64Fast,
}

/// The kind of register a type travels in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Integer registers: integers, `bool`, addresses.
    Integer,
    /// Vector registers: `float`, `double`.
    Float,
}

impl Type {
    /// The kind of register this type travels in; `None` for `void`.
    pub const fn class(self) -> Option<Class> {
        match self {
            Type::Void => None,
            Type::F32 | Type::F64 => Some(Class::Float),
            _ => Some(Class::Integer),
        }
    }

    /// The type's own name, as in `bun:ffi`.
    pub const fn name(self) -> &'static str {
        match self {
            Type::Void => "void",
            Type::Bool => "bool",
            Type::Char => "char",
            Type::I8 => "i8",
            Type::I16 => "i16",
            Type::I32 => "i32",
            Type::I64 => "i64",
            Type::U8 => "u8",
            Type::U16 => "u16",
            Type::U32 => "u32",
            Type::U64 => "u64",
            Type::F32 => "f32",
            Type::F64 => "f64",
            Type::Ptr => "ptr",
            Type::CString => "cstring",
            Type::Buffer => "buffer",
            Type::Function => "function",
            Type::I64Fast => "i64_fast",
            Type::U64Fast => "u64_fast",
        }
    }
}

impl core::fmt::Display for Type {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.name())
    }
}

/// Argument types, return type, and where a variadic function's fixed arguments end.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Signature {
    /// Types of the arguments that a call passes; for a variadic function with the actual types of this use.
    pub args: Vec<Type>,
    /// What the function returns.
    pub returns: Type,
    /// For a variadic function: how many of `args` are before the `...`. `None`: not variadic.
    pub variadic_after: Option<u8>,
}

impl Signature {
    /// A signature that is not variadic.
    pub fn new(args: impl Into<Vec<Type>>, returns: Type) -> Self {
        Self { args: args.into(), returns, variadic_after: None }
    }

    /// How many arguments are integer class, and how many float class.
    pub fn class_counts(&self) -> (usize, usize) {
        let floats = self.args.iter().filter(|t| t.class() == Some(Class::Float)).count();
        (self.args.len() - floats, floats)
    }

    /// The word index of each argument: integer class first, then float class, each in declared order.
    pub fn word_indexes(&self) -> Vec<u8> {
        let (integers, _) = self.class_counts();
        let (mut next_integer, mut next_float) = (0u8, u8::try_from(integers).unwrap_or(u8::MAX));
        self.args
            .iter()
            .map(|t| {
                let next = if t.class() == Some(Class::Float) { &mut next_float } else { &mut next_integer };
                let index = *next;
                *next = next.saturating_add(1);
                index
            })
            .collect()
    }
}

/// C-like: `f64(f64, i32, ...: cstring)`.
impl core::fmt::Display for Signature {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}(", self.returns)?;
        for (i, t) in self.args.iter().enumerate() {
            if i > 0 {
                f.write_str(", ")?;
            }
            if self.variadic_after.map(usize::from) == Some(i) {
                f.write_str("..., ")?;
            }
            write!(f, "{t}")?;
        }
        if self.variadic_after.map(usize::from) == Some(self.args.len()) {
            f.write_str(if self.args.is_empty() { "..." } else { ", ..." })?;
        }
        f.write_str(")")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_lie_integers_first_then_floats() {
        let s = Signature::new([Type::F64, Type::I32, Type::F32, Type::Ptr], Type::Void);
        assert_eq!(s.word_indexes(), [2, 0, 3, 1]);
        assert_eq!(s.class_counts(), (2, 2));
    }

    #[test]
    fn display_shows_where_the_fixed_arguments_end() {
        let mut s = Signature::new([Type::CString, Type::I32], Type::I32);
        s.variadic_after = Some(1);
        assert_eq!(s.to_string(), "i32(cstring, ..., i32)");
        s.variadic_after = Some(2);
        assert_eq!(s.to_string(), "i32(cstring, i32, ...)");
    }
}

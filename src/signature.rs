//! Signatures as a host writes them: C prototypes, or the JSON of `bun:ffi`.
//!
//! One law: **what is not understood is an error that names the token and its byte offset**, for a signature
//! that is nearly right breaks the worker at the first call instead of at load. The text is the host's own,
//! but nothing here recurses over it or panics.
//!
//! ```text
//! double pow(double, double);                            // C scalars, LP64; names are optional
//! const char *zlibVersion(void);                         // const char * is cstring, other pointers are ptr
//! int printf(const char *format, ..., int, double);      // after the ... come the types of this use
//! void each(struct list *l, void (*f)(void *item));      // opaque pointer, function
//! i32 add(i32, i32);                                     // names of bun:ffi
//!
//! { "add": { "args": ["i32", "i32"], "returns": "i32", "symbol": "lib_add", "description": "sum" },
//!   "log": { "args": ["cstring", "i32"], "variadic": 1 } }    // one fixed argument, then the ...
//! ```
//!
//! There is no preprocessor, and a typedef that is not in `NAMES` is known only behind a `*`.

use std::collections::HashSet;
use std::fmt;

use hotcell_channel::signature::{ARGS_MAX, Signature, Type};
use serde_json::Value;

/// Longest text that is parsed.
const TEXT_BYTES_MAX: usize = 1 << 20;

/// Longest token that an error quotes in full.
const QUOTED_CHARS_MAX: usize = 64;

/// A function to look up in a module, and the types to call it with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SymbolDefinition {
    /// What the host calls it.
    pub name: String,
    /// What the module exports it as; the same as `name` unless the JSON renames it.
    pub symbol: String,
    /// The types of its arguments and of its result.
    pub signature: Signature,
}

/// The part of a signature that an error is about: `argument 2 of "pow"`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The function; `None` where the text gives it no name.
    pub function: Option<String>,
    /// The argument, counted from 1; `None` for the return type.
    pub argument: Option<usize>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.argument {
            Some(n) => write!(f, "argument {n}")?,
            None => f.write_str("the return type")?,
        }
        f.write_str(&of(self.function.as_deref()))
    }
}

/// Why a text is not a signature.
///
/// In each variant `at` is a byte offset into the text, `place` or `function` says whose type it is, `token`,
/// `found` and `words` are what stands there (cut after 64 characters), and `expected` or `max` is what may.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(
    missing_docs,
    reason = "the fields have one meaning in all variants, which the enum's own text gives"
)]
pub enum SignatureError {
    /// The text is too long to be parsed.
    #[error("text of {len} bytes: expected at most {max}")]
    TextTooLong { len: usize, max: usize },

    /// No type has this name. A C typedef must be written out, unless a `*` follows.
    #[error("unknown type {token:?} in {place} at byte {at}: expected a C scalar, a pointer or a bun:ffi name{}",
        suggestion.map_or(String::new(), |name| format!("; did you mean {name:?}?")))]
    UnknownType { token: String, place: Place, at: usize, suggestion: Option<&'static str> },

    /// Type words that C does not combine, such as `unsigned float`.
    #[error("type {words:?} at byte {at}: expected words that C combines, such as \"unsigned long\"")]
    InvalidCombination { words: String, at: usize },

    /// A struct or union that is passed or returned by value.
    #[error("{token:?} by value in {place} at byte {at}: expected a scalar, or a pointer to it")]
    StructByValue { token: String, place: Place, at: usize },

    /// `long double`, which no word holds.
    #[error("\"long double\" in {place} at byte {at}: expected \"double\", or a pointer to it")]
    LongDouble { place: Place, at: usize },

    /// A complex number by value.
    #[error("complex number in {place} at byte {at}: expected a real number, or a pointer to it")]
    Complex { place: Place, at: usize },

    /// A function whose result is a function pointer, as C spells it. `void *` is passed alike.
    #[error("function that returns a function pointer at byte {at}: expected \"void *\" as its return type")]
    ReturnsFunctionPointer { at: usize },

    /// `void` as an argument, other than in `(void)`.
    #[error("\"void\" as {place} at byte {at}: expected a value, or \"(void)\" for no arguments")]
    VoidArgument { place: Place, at: usize },

    /// A variadic argument of a type that C promotes: the function reads it with the promoted type.
    #[error("{found} after the \"...\" in {place} at byte {at}: expected {expected}, to which C promotes it")]
    NotPromoted { found: Type, expected: Type, place: Place, at: usize },

    /// More than [`ARGS_MAX`] arguments; `place` is the first too many.
    #[error("{place} at byte {at}: expected at most {max} arguments")]
    TooManyArguments { place: Place, max: usize, at: usize },

    /// The JSON's `variadic` counts more fixed arguments than there are.
    #[error("{fixed} arguments before the \"...\"{} at byte {at}: expected at most {max}", of(function.as_deref()))]
    VariadicOutOfRange { function: Option<String>, fixed: u64, max: usize, at: usize },

    /// `static`, `inline` or `typedef`: there is no symbol to look up.
    #[error("{token:?} at byte {at}: expected the prototype of an exported function")]
    NotExported { token: String, at: usize },

    /// Something else stands where the function's name should be.
    #[error("{found} at byte {at}: expected the name of the function")]
    NameMissing { found: String, at: usize },

    /// A name in the JSON that no symbol can have.
    #[error("name {name:?} at byte {at}: expected one that is not empty and has no NUL")]
    InvalidName { name: String, at: usize },

    /// A function that the text defines twice.
    #[error("function {name:?} again at byte {at}: expected each function once")]
    DuplicateName { name: String, at: usize },

    /// Anything else that is not a prototype.
    #[error("{found} at byte {at}: expected {expected}")]
    Unexpected { found: String, expected: &'static str, at: usize },

    /// A `/*` without its `*/`.
    #[error("comment at byte {at}: expected \"*/\" at its end")]
    OpenComment { at: usize },

    /// Not JSON; the message gives line and column.
    #[error("invalid JSON: {message}")]
    JsonSyntax { message: String },

    /// JSON of the wrong kind, such as a string for an array.
    #[error("{subject} at byte {at}: expected {expected}")]
    JsonKind { subject: String, expected: &'static str, at: usize },

    /// A key of a function that means nothing.
    #[error("unknown key {key:?}{} at byte {at}: expected one of {expected}", of(function.as_deref()))]
    UnknownKey { key: String, function: Option<String>, expected: &'static str, at: usize },

    /// A key that comes twice in one function.
    #[error("key {key:?}{} again at byte {at}: expected each key once", of(function.as_deref()))]
    DuplicateKey { key: String, function: Option<String>, at: usize },
}

/// ` of "pow"`, or nothing for a signature without a name.
fn of(function: Option<&str>) -> String {
    function.map_or(String::new(), |name| format!(" of {name:?}"))
}

/// Every one-word type: those of `bun:ffi`, its aliases, and the typedefs of C and POSIX under LP64 Linux.
///
/// `int_fast16_t` and `int_fast32_t` are left out, for their size depends on the C library.
#[rustfmt::skip]
const NAMES: &[(&str, Type)] = &[
    // bun:ffi
    ("void", Type::Void), ("bool", Type::Bool), ("char", Type::Char),
    ("i8", Type::I8), ("i16", Type::I16), ("i32", Type::I32), ("i64", Type::I64),
    ("u8", Type::U8), ("u16", Type::U16), ("u32", Type::U32), ("u64", Type::U64),
    ("f32", Type::F32), ("f64", Type::F64),
    ("ptr", Type::Ptr), ("cstring", Type::CString), ("buffer", Type::Buffer), ("function", Type::Function),
    ("i64_fast", Type::I64Fast), ("u64_fast", Type::U64Fast),
    // its aliases
    ("int8_t", Type::I8), ("int16_t", Type::I16), ("int32_t", Type::I32), ("int64_t", Type::I64),
    ("uint8_t", Type::U8), ("uint16_t", Type::U16), ("uint32_t", Type::U32), ("uint64_t", Type::U64),
    ("int", Type::I32), ("c_int", Type::I32), ("c_uint", Type::U32),
    ("isize", Type::I64), ("usize", Type::U64), ("size_t", Type::U64),
    ("float", Type::F32), ("double", Type::F64),
    ("pointer", Type::Ptr), ("void*", Type::Ptr), ("char*", Type::Ptr),
    ("fn", Type::Function), ("callback", Type::Function),
    // C
    ("_Bool", Type::Bool), ("short", Type::I16), ("long", Type::I64),
    ("ssize_t", Type::I64), ("intptr_t", Type::I64), ("uintptr_t", Type::U64), ("ptrdiff_t", Type::I64),
    ("intmax_t", Type::I64), ("uintmax_t", Type::U64),
    ("int_least8_t", Type::I8), ("int_least16_t", Type::I16), ("int_least32_t", Type::I32),
    ("int_least64_t", Type::I64), ("uint_least8_t", Type::U8), ("uint_least16_t", Type::U16),
    ("uint_least32_t", Type::U32), ("uint_least64_t", Type::U64), ("int_fast8_t", Type::I8),
    ("uint_fast8_t", Type::U8), ("int_fast64_t", Type::I64), ("uint_fast64_t", Type::U64),
    ("wchar_t", Type::I32), ("wint_t", Type::U32), ("char8_t", Type::U8), ("char16_t", Type::U16),
    ("char32_t", Type::U32), ("time_t", Type::I64), ("clock_t", Type::I64),
    // POSIX
    ("ushort", Type::U16), ("uint", Type::U32), ("ulong", Type::U64),
    ("off_t", Type::I64), ("off64_t", Type::I64), ("pid_t", Type::I32), ("uid_t", Type::U32), ("gid_t", Type::U32),
    ("id_t", Type::U32), ("mode_t", Type::U32), ("dev_t", Type::U64), ("ino_t", Type::U64),
    ("clockid_t", Type::I32), ("useconds_t", Type::U32), ("suseconds_t", Type::I64), ("socklen_t", Type::U32),
    ("in_addr_t", Type::U32), ("in_port_t", Type::U16), ("sa_family_t", Type::U16),
];

/// The values of bun's `FFIType`, by index. 18 and 19 are `napi_env` and `napi_value`, which are no types here.
#[rustfmt::skip]
const NUMBERS: [Option<Type>; 21] = [
    Some(Type::Char), Some(Type::I8), Some(Type::U8), Some(Type::I16), Some(Type::U16), Some(Type::I32),
    Some(Type::U32), Some(Type::I64), Some(Type::U64), Some(Type::F64), Some(Type::F32), Some(Type::Bool),
    Some(Type::Ptr), Some(Type::Void), Some(Type::CString), Some(Type::I64Fast), Some(Type::U64Fast),
    Some(Type::Function), None, None, Some(Type::Buffer),
];

/// The type of that name: a `bun:ffi` name, one of its aliases, or a one-word C type.
pub(crate) fn type_from_name(name: &str) -> Option<Type> {
    NAMES.iter().find(|(known, _)| *known == name).map(|(_, ty)| *ty)
}

/// The known name that is nearest to `token`, if it could be a slip of the pen.
fn suggest(token: &str) -> Option<&'static str> {
    let token = token.to_ascii_lowercase();
    if token.len() > 24 {
        return None;
    }
    let near = |known: &str| edit_distance(token.as_bytes(), known.as_bytes());
    let (known, _) = NAMES.iter().min_by_key(|(known, _)| near(known))?;
    (near(known) <= (token.len() / 3).max(1)).then_some(known)
}

/// Levenshtein's distance, one row at a time.
fn edit_distance(a: &[u8], b: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// `token` as an error keeps it: a hostile text does not make the error as long as itself.
fn clip(token: &str) -> String {
    match token.char_indices().nth(QUOTED_CHARS_MAX) {
        Some((end, _)) => format!("{}…", &token[..end]),
        None => token.to_owned(),
    }
}

fn check_len(text: &str) -> Result<(), SignatureError> {
    if text.len() > TEXT_BYTES_MAX {
        return Err(SignatureError::TextTooLong { len: text.len(), max: TEXT_BYTES_MAX });
    }
    Ok(())
}

fn check_name(name: &str, at: usize) -> Result<(), SignatureError> {
    // The worker looks the name up as a C string: a NUL would cut it short and find another function.
    if name.is_empty() || name.contains('\0') {
        return Err(SignatureError::InvalidName { name: clip(name), at });
    }
    Ok(())
}

fn unknown_type(token: &str, place: Place, at: usize) -> SignatureError {
    SignatureError::UnknownType { token: clip(token), place, at, suggestion: suggest(token) }
}

/// Appends an argument, or says why it can't be one.
fn push_argument(
    signature: &mut Signature,
    ty: Type,
    function: Option<&str>,
    at: usize,
) -> Result<(), SignatureError> {
    let index = signature.args.len();
    let place = || Place { function: function.map(clip), argument: Some(index + 1) };
    if index == ARGS_MAX {
        return Err(SignatureError::TooManyArguments { place: place(), max: ARGS_MAX, at });
    }
    let promoted = match ty {
        Type::Void => return Err(SignatureError::VoidArgument { place: place(), at }),
        Type::F32 => Type::F64,
        Type::Bool | Type::Char | Type::I8 | Type::U8 | Type::I16 | Type::U16 => Type::I32,
        other => other,
    };
    // The callee reads such an argument with its promoted type.
    if promoted != ty && signature.variadic_after.is_some_and(|fixed| index >= usize::from(fixed)) {
        return Err(SignatureError::NotPromoted { found: ty, expected: promoted, place: place(), at });
    }
    signature.args.push(ty);
    Ok(())
}

/// Parses one C prototype, with or without its `;`.
///
/// # Errors
///
/// The first thing in `text` that is not understood.
pub fn parse_c(text: &str) -> Result<(String, Signature), SignatureError> {
    let mut tokens = Tokens::new(text)?;
    let (_, name, signature) = prototype(&mut tokens)?;
    tokens.eat(";");
    if !tokens.peek().is_empty() {
        return Err(tokens.unexpected("the end of the prototype"));
    }
    Ok((name, signature))
}

/// Parses C prototypes with `;` between them, such as an excerpt of a header. No preprocessor is run.
///
/// # Errors
///
/// The first thing in `text` that is not understood, or a function that is declared twice.
pub fn parse_c_list(text: &str) -> Result<Vec<(String, Signature)>, SignatureError> {
    let mut tokens = Tokens::new(text)?;
    let (mut list, mut seen) = (Vec::new(), HashSet::new());
    while !tokens.peek().is_empty() {
        if tokens.eat(";") {
            continue;
        }
        let (at, name, signature) = prototype(&mut tokens)?;
        if !seen.insert(name.clone()) {
            return Err(SignatureError::DuplicateName { name: clip(&name), at });
        }
        list.push((name, signature));
        if !tokens.peek().is_empty() {
            tokens.expect(";", "\";\" after the prototype")?;
        }
    }
    Ok(list)
}

/// Parses a JSON object if the text starts with `{`, else C prototypes.
///
/// # Errors
///
/// Those of [`parse_json`] or of [`parse_c_list`].
pub fn parse_symbols(text: &str) -> Result<Vec<SymbolDefinition>, SignatureError> {
    if text.trim_ascii_start().starts_with('{') {
        return parse_json(text);
    }
    let list = parse_c_list(text)?.into_iter();
    Ok(list.map(|(name, signature)| SymbolDefinition { symbol: name.clone(), name, signature }).collect())
}

/// Words, `...` and single characters, with their byte offsets; comments and space are dropped.
struct Tokens<'a> {
    list: Vec<(usize, &'a str)>,
    next: usize,
    end: usize,
}

/// What stands left of the `*`s and the name.
struct Base<'a> {
    kind: Kind<'a>,
    is_const: bool,
    at: usize,
}

#[derive(Clone, Copy)]
enum Kind<'a> {
    Scalar(Type),
    Record(&'a str),
    LongDouble,
    Complex,
    Unknown(&'a str),
}

/// The words that combine to a type, and so are no names.
const TYPE_WORDS: [&str; 11] =
    ["void", "bool", "char", "short", "int", "long", "float", "double", "signed", "unsigned", "complex"];

fn is_name(token: &str) -> bool {
    is_word(token) && !TYPE_WORDS.contains(&token) && !["struct", "union", "enum"].contains(&token)
}

fn is_word(token: &str) -> bool {
    token.starts_with(|c: char| c == '_' || c.is_ascii_alphabetic())
}

/// What C's type words mean together, in whatever order they came.
fn combine(words: &mut [&str]) -> Option<Kind<'static>> {
    words.sort_unstable();
    Some(Kind::Scalar(match words.join(" ").as_str() {
        "void" => Type::Void,
        "bool" => Type::Bool,
        "char" => Type::Char,
        "char signed" => Type::I8,
        "char unsigned" => Type::U8,
        "short" | "int short" | "short signed" | "int short signed" => Type::I16,
        "short unsigned" | "int short unsigned" => Type::U16,
        "int" | "signed" | "int signed" => Type::I32,
        "unsigned" | "int unsigned" => Type::U32,
        "long" | "int long" | "long signed" | "int long signed" => Type::I64,
        "long unsigned" | "int long unsigned" => Type::U64,
        "long long" | "int long long" | "long long signed" | "int long long signed" => Type::I64,
        "long long unsigned" | "int long long unsigned" => Type::U64,
        "float" => Type::F32,
        "double" => Type::F64,
        "double long" => return Some(Kind::LongDouble),
        "complex" | "complex float" | "complex double" | "complex double long" => return Some(Kind::Complex),
        _ => return None,
    }))
}

impl<'a> Tokens<'a> {
    fn new(text: &'a str) -> Result<Self, SignatureError> {
        check_len(text)?;
        let mut list = Vec::new();
        let mut rest = text;
        while let Some(first) = rest.chars().next() {
            let at = text.len() - rest.len();
            let in_word = |c: char| c == '_' || c.is_ascii_alphanumeric();
            let (len, is_token) = if first.is_ascii_whitespace() {
                (1, false)
            } else if rest.starts_with("//") {
                (rest.find('\n').unwrap_or(rest.len()), false)
            } else if let Some(comment) = rest.strip_prefix("/*") {
                (comment.find("*/").ok_or(SignatureError::OpenComment { at })? + 4, false)
            } else if in_word(first) {
                (rest.find(|c| !in_word(c)).unwrap_or(rest.len()), true)
            } else if rest.starts_with("...") {
                (3, true)
            } else {
                (first.len_utf8(), true)
            };
            if is_token {
                list.push((at, &rest[..len]));
            }
            rest = &rest[len..];
        }
        Ok(Self { list, next: 0, end: text.len() })
    }

    /// The token `ahead` of the next one; empty behind the end.
    fn look(&self, ahead: usize) -> &'a str {
        self.list.get(self.next + ahead).map_or("", |(_, token)| token)
    }

    fn peek(&self) -> &'a str {
        self.look(0)
    }

    fn at(&self) -> usize {
        self.list.get(self.next).map_or(self.end, |(at, _)| *at)
    }

    fn eat(&mut self, token: &str) -> bool {
        let found = self.peek() == token;
        self.next += usize::from(found);
        found
    }

    fn expect(&mut self, token: &str, expected: &'static str) -> Result<(), SignatureError> {
        if self.eat(token) { Ok(()) } else { Err(self.unexpected(expected)) }
    }

    fn found(&self) -> String {
        match self.peek() {
            "" => "end of text".to_owned(),
            token => format!("{:?}", clip(token)),
        }
    }

    fn unexpected(&self, expected: &'static str) -> SignatureError {
        SignatureError::Unexpected { found: self.found(), expected, at: self.at() }
    }

    /// `*`s with their qualifiers; returns how many.
    fn stars(&mut self) -> usize {
        let mut count = 0;
        loop {
            match self.peek() {
                "*" => count += 1,
                "const" | "__const" | "volatile" | "restrict" | "__restrict" | "__restrict__" => {}
                _ => return count,
            }
            self.next += 1;
        }
    }

    /// Array bounds; returns how many.
    fn brackets(&mut self) -> Result<usize, SignatureError> {
        let mut count = 0;
        while self.peek() == "[" {
            self.skip_group()?;
            count += 1;
        }
        Ok(count)
    }

    /// From an opening bracket to its partner. What is between has no part in how the argument is passed.
    fn skip_group(&mut self) -> Result<(), SignatureError> {
        let mut open = Vec::new();
        loop {
            match self.peek() {
                "(" => open.push(")"),
                "[" => open.push("]"),
                token @ (")" | "]") if open.last() == Some(&token) => drop(open.pop()),
                "*" | "," | "..." | "+" | "-" | "/" => {}
                word if word.starts_with(|c: char| c == '_' || c.is_ascii_alphanumeric()) => {}
                _ => return Err(self.unexpected("the bracket to be closed")),
            }
            self.next += 1;
            if open.is_empty() {
                return Ok(());
            }
        }
    }

    /// Type words and qualifiers in any order: `const unsigned long int`, `struct tm const`, `size_t`.
    fn base(&mut self) -> Result<Base<'a>, SignatureError> {
        let (at, start) = (self.at(), self.next);
        let (mut words, mut named, mut is_const) = (Vec::new(), None, false);
        loop {
            let word = self.peek();
            let is_first = words.is_empty() && named.is_none();
            let mut conflict = false;
            match word {
                "const" | "__const" => is_const = true,
                "volatile" | "restrict" | "__restrict" | "__restrict__" | "register" | "_Atomic"
                | "_Noreturn" | "__extension__" => {}
                "static" | "inline" | "__inline" | "__inline__" | "typedef" | "_Thread_local" => {
                    return Err(SignatureError::NotExported { token: word.to_owned(), at: self.at() });
                }
                "_Bool" => words.push("bool"),
                "_Complex" | "__complex__" => words.push("complex"),
                _ if TYPE_WORDS.contains(&word) => words.push(word),
                "struct" | "union" | "enum" => {
                    conflict = !is_first;
                    self.next += 1;
                    let tag = self.peek();
                    if !is_name(tag) {
                        return Err(self.unexpected("a tag"));
                    }
                    // An enumeration is an int to the ABI.
                    named = Some(if word == "enum" { Kind::Scalar(Type::I32) } else { Kind::Record(tag) });
                }
                // Not a parameter's name, although it may follow `unsigned`.
                "__int128" | "_BitInt" => {
                    conflict = named.is_some();
                    words.clear();
                    named = Some(Kind::Unknown(word));
                }
                _ if is_word(word) && is_first => {
                    named = Some(type_from_name(word).map_or(Kind::Unknown(word), Kind::Scalar));
                }
                // `unsigned int32_t` is a slip; `int buffer` is an int of that name.
                _ if word.ends_with("_t") && type_from_name(word).is_some() => conflict = true,
                _ => break,
            }
            self.next += 1;
            if conflict || words.len() > 5 || (named.is_some() && !words.is_empty()) {
                return Err(self.invalid_combination(start, at));
            }
        }
        let kind = match named {
            Some(kind) => kind,
            None if words.is_empty() => return Err(self.unexpected("a type")),
            None => combine(&mut words).ok_or_else(|| self.invalid_combination(start, at))?,
        };
        Ok(Base { kind, is_const, at })
    }

    fn invalid_combination(&self, start: usize, at: usize) -> SignatureError {
        let words: Vec<_> = self.list[start..self.next].iter().map(|(_, word)| *word).collect();
        SignatureError::InvalidCombination { words: clip(&words.join(" ")), at }
    }

    /// The type of one parameter, whose name is dropped.
    fn parameter(&mut self, place: impl FnOnce() -> Place) -> Result<(usize, Type), SignatureError> {
        let base = self.base()?;
        let mut levels = self.stars();
        if self.eat("(") {
            let inner = self.stars();
            if inner == 0 {
                return Err(self.unexpected("a function pointer such as \"(*name)(int)\""));
            }
            if is_name(self.peek()) {
                self.next += 1;
            }
            let arrays = self.brackets()?;
            self.expect(")", "\")\" of a function pointer such as \"(*name)(int)\"")?;
            if self.peek() == "(" {
                self.skip_group()?;
                let ty = if inner + arrays == 1 { Type::Function } else { Type::Ptr };
                return Ok((base.at, ty));
            }
            levels += inner + arrays;
        } else if is_name(self.peek()) {
            self.next += 1;
            if self.peek() == "(" {
                // C passes a parameter of function type as a pointer to it.
                self.skip_group()?;
                return Ok((base.at, Type::Function));
            }
        }
        // C passes an array as a pointer to its first element.
        levels += self.brackets()?;
        Ok((base.at, base.resolve(levels, place)?))
    }
}

impl Base<'_> {
    /// The type behind `levels` pointers.
    fn resolve(&self, levels: usize, place: impl FnOnce() -> Place) -> Result<Type, SignatureError> {
        let at = self.at;
        match (self.kind, levels) {
            (Kind::Scalar(Type::Char), 1) if self.is_const => Ok(Type::CString),
            (_, 1..) => Ok(Type::Ptr),
            (Kind::Scalar(ty), 0) => Ok(ty),
            (Kind::Record(tag), 0) => {
                Err(SignatureError::StructByValue { token: clip(tag), place: place(), at })
            }
            (Kind::LongDouble, 0) => Err(SignatureError::LongDouble { place: place(), at }),
            (Kind::Complex, 0) => Err(SignatureError::Complex { place: place(), at }),
            (Kind::Unknown(token), 0) => Err(unknown_type(token, place(), at)),
        }
    }
}

/// One prototype up to its `)`, with the offset of its name.
fn prototype(tokens: &mut Tokens<'_>) -> Result<(usize, String, Signature), SignatureError> {
    while tokens.eat("extern") {}
    let base = tokens.base()?;
    let levels = tokens.stars();
    // `int (name)(int)` is how a header keeps a macro of that name away.
    let is_wrapped =
        tokens.peek() == "(" && is_name(tokens.look(1)) && tokens.look(2) == ")" && tokens.look(3) == "(";
    if !is_wrapped && tokens.peek() == "(" && tokens.look(1) == "*" && tokens.look(3) == "(" {
        return Err(SignatureError::ReturnsFunctionPointer { at: tokens.at() });
    }
    tokens.next += usize::from(is_wrapped);
    let (at, name) = (tokens.at(), tokens.peek());
    if !is_name(name) {
        return Err(SignatureError::NameMissing { found: tokens.found(), at });
    }
    tokens.next += 1 + usize::from(is_wrapped);
    tokens.expect("(", "\"(\" and the arguments")?;

    let returns = base.resolve(levels, || Place { function: Some(clip(name)), argument: None })?;
    let mut signature = Signature::new([], returns);
    if tokens.peek() == "void" && tokens.look(1) == ")" {
        tokens.next += 1;
    }
    if tokens.eat(")") {
        return Ok((at, name.to_owned(), signature));
    }
    loop {
        if tokens.peek() == "..." && signature.variadic_after.is_none() {
            tokens.next += 1;
            signature.variadic_after = u8::try_from(signature.args.len()).ok();
        } else {
            let argument = Some(signature.args.len() + 1);
            let (at, ty) = tokens.parameter(|| Place { function: Some(clip(name)), argument })?;
            push_argument(&mut signature, ty, Some(name), at)?;
        }
        if !tokens.eat(",") {
            tokens.expect(")", "\",\" or \")\" after the argument")?;
            return Ok((at, name.to_owned(), signature));
        }
    }
}

/// Parses a JSON object of functions: `{"add":{"args":["i32","i32"],"returns":"i32"}}`.
///
/// A function's keys are all optional: `args` (default none) and `returns` (default `void`) take type names or
/// numbers of bun's `FFIType`, `symbol` is the exported name where it differs, `variadic` is the number of
/// arguments before the `...`, and `description` is for the reader.
///
/// # Errors
///
/// The first thing in `text` that is not understood, or a name that is defined twice.
pub fn parse_json(text: &str) -> Result<Vec<SymbolDefinition>, SignatureError> {
    let mut json = Json::new(text)?;
    let (mut list, mut seen) = (Vec::new(), HashSet::new());
    json.open('{', "an object of functions", || "text".to_owned())?;
    while let Some((at, name)) = json.key()? {
        check_name(&name, at)?;
        if !seen.insert(name.clone()) {
            return Err(SignatureError::DuplicateName { name: clip(&name), at });
        }
        let (symbol, signature) = json.function(Some(&name))?;
        list.push(SymbolDefinition { symbol: symbol.unwrap_or_else(|| name.clone()), name, signature });
    }
    Ok(list)
}

/// Parses the JSON of one signature: `{"args":["i32","i32"],"returns":"i32"}`, with the keys of [`parse_json`]
/// but `symbol`.
///
/// # Errors
///
/// The first thing in `text` that is not understood.
pub fn parse_json_one(text: &str) -> Result<Signature, SignatureError> {
    Json::new(text)?.function(None).map(|(_, signature)| signature)
}

/// A walk over JSON that is known to be well-formed, so that commas and colons need no checks. A tree of `Value`s
/// would hide where things stand, and which key came twice.
struct Json<'a> {
    text: &'a str,
    at: usize,
}

fn json_syntax(error: &serde_json::Error) -> SignatureError {
    SignatureError::JsonSyntax { message: error.to_string() }
}

impl<'a> Json<'a> {
    fn new(text: &'a str) -> Result<Self, SignatureError> {
        check_len(text)?;
        serde_json::from_str::<Value>(text).map_err(|error| json_syntax(&error))?;
        Ok(Self { text, at: 0 })
    }

    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or("")
    }

    fn eat(&mut self, byte: char) -> bool {
        self.at = self.text.len() - self.rest().trim_ascii_start().len();
        let found = self.rest().starts_with(byte);
        self.at += usize::from(found);
        found
    }

    /// The next value and its offset.
    fn value(&mut self) -> Result<(usize, Value), SignatureError> {
        let at = self.text.len() - self.rest().trim_ascii_start().len();
        self.at = at;
        let mut values = serde_json::Deserializer::from_str(self.rest()).into_iter::<Value>();
        let value = values.next().unwrap_or(Ok(Value::Null)).map_err(|error| json_syntax(&error))?;
        self.at += values.byte_offset();
        Ok((at, value))
    }

    fn string(
        &mut self,
        expected: &'static str,
        subject: impl FnOnce() -> String,
    ) -> Result<(usize, String), SignatureError> {
        match self.value()? {
            (at, Value::String(string)) => Ok((at, string)),
            (at, _) => Err(SignatureError::JsonKind { subject: subject(), expected, at }),
        }
    }

    fn open(
        &mut self,
        bracket: char,
        expected: &'static str,
        subject: impl FnOnce() -> String,
    ) -> Result<(), SignatureError> {
        if self.eat(bracket) {
            return Ok(());
        }
        Err(SignatureError::JsonKind { subject: subject(), expected, at: self.at })
    }

    /// Whether an item comes before the closing bracket, which is taken.
    fn has_item(&mut self, close: char) -> bool {
        self.eat(',');
        !self.eat(close)
    }

    /// The next key of an object and its offset.
    fn key(&mut self) -> Result<Option<(usize, String)>, SignatureError> {
        if !self.has_item('}') {
            return Ok(None);
        }
        let key = self.string("a key", || "text".to_owned())?;
        self.eat(':');
        Ok(Some(key))
    }

    /// One type; numbers are those of bun's `FFIType`.
    fn type_of(&mut self, place: impl FnOnce() -> Place) -> Result<(usize, Type), SignatureError> {
        let (at, value) = self.value()?;
        let (ty, token) = match value {
            Value::String(name) => (type_from_name(&name), name),
            Value::Number(number) => {
                let index = number.as_u64().and_then(|n| usize::try_from(n).ok());
                (index.and_then(|n| NUMBERS.get(n).copied().flatten()), number.to_string())
            }
            _ => {
                let subject = place().to_string();
                return Err(SignatureError::JsonKind { subject, expected: "the name of a type", at });
            }
        };
        ty.map(|ty| (at, ty)).ok_or_else(|| unknown_type(&token, place(), at))
    }

    /// `{"args":[...],"returns":...}`; the symbol if the object names one.
    fn function(&mut self, name: Option<&str>) -> Result<(Option<String>, Signature), SignatureError> {
        let function = name.map(clip);
        let place = |argument| Place { function: function.clone(), argument };
        let subject = |key: &str| format!("{key:?}{}", of(function.as_deref()));
        let (mut args, mut returns, mut symbol, mut variadic) = (Vec::new(), Type::Void, None, None);
        let mut seen = Vec::new();

        let expected = "an object such as {\"args\":[\"i32\"],\"returns\":\"i32\"}";
        self.open('{', expected, || function.as_ref().map_or("text".to_owned(), |name| format!("{name:?}")))?;
        while let Some((at, key)) = self.key()? {
            if seen.contains(&key) {
                return Err(SignatureError::DuplicateKey { key, function, at });
            }
            match key.as_str() {
                "args" => {
                    self.open('[', "an array of type names", || subject("args"))?;
                    while self.has_item(']') {
                        args.push(self.type_of(|| place(Some(args.len() + 1)))?);
                    }
                }
                "returns" => returns = self.type_of(|| place(None))?.1,
                "symbol" if name.is_some() => {
                    let (at, found) = self.string("a string", || subject("symbol"))?;
                    check_name(&found, at)?;
                    symbol = Some(found);
                }
                "description" => drop(self.string("a string", || subject("description"))?),
                "variadic" => {
                    let (at, fixed) = self.value()?;
                    let expected = "the number of arguments before the \"...\"";
                    let fixed = fixed.as_u64().ok_or_else(|| {
                        let subject = subject("variadic");
                        SignatureError::JsonKind { subject, expected, at }
                    })?;
                    variadic = Some((at, fixed));
                }
                _ => {
                    let expected = match name {
                        Some(_) => "args, returns, symbol, variadic, description",
                        None => "args, returns, variadic, description",
                    };
                    return Err(SignatureError::UnknownKey { key: clip(&key), function, expected, at });
                }
            }
            seen.push(key);
        }

        let mut signature = Signature::new([], returns);
        if let Some((at, fixed)) = variadic {
            let max = args.len().min(ARGS_MAX);
            match u8::try_from(fixed) {
                Ok(n) if usize::from(n) <= max => signature.variadic_after = Some(n),
                _ => return Err(SignatureError::VariadicOutOfRange { function, fixed, max, at }),
            }
        }
        for (at, ty) in args {
            push_argument(&mut signature, ty, name, at)?;
        }
        Ok((symbol, signature))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// `double(double, double)` as `f64(f64, f64)`: what a prototype comes to.
    fn c(text: &str) -> String {
        parse_c(text)
            .map_or_else(|error| format!("{error}"), |(name, signature)| format!("{name} {signature}"))
    }

    fn refusal(text: &str) -> String {
        parse_symbols(text).expect_err(text).to_string()
    }

    #[test]
    fn every_type_is_known_by_its_own_name_and_its_bun_number() {
        let values = [
            "char",
            "i8",
            "u8",
            "i16",
            "u16",
            "i32",
            "u32",
            "i64",
            "u64",
            "f64",
            "f32",
            "bool",
            "ptr",
            "void",
            "cstring",
            "i64_fast",
            "u64_fast",
            "function",
            "napi_env",
            "napi_value",
            "buffer",
        ];
        for (number, name) in values.into_iter().enumerate() {
            assert_eq!(type_from_name(name), NUMBERS[number], "{name}");
            assert_eq!(NUMBERS[number].map_or(name, Type::name), name);
        }
        assert_eq!(type_from_name("I32"), None);
        assert_eq!(type_from_name(""), None);
    }

    #[test]
    fn no_name_has_two_meanings() {
        let names: HashSet<_> = NAMES.iter().map(|(name, _)| name).collect();
        assert_eq!(names.len(), NAMES.len());
    }

    #[test]
    fn prototypes_become_signatures() {
        for (text, expected) in [
            ("double pow(double, double)", "pow f64(f64, f64)"),
            ("const char *zlibVersion(void);", "zlibVersion cstring()"),
            ("int rand()", "rand i32()"),
            ("extern void f(int a,\n\tfloat b) ; // done", "f void(i32, f32)"),
            ("/* a */ int /**/ f /* b; */ (int x /* c */)", "f i32(i32)"),
            ("int deflate(z_streamp *strm, int flush)", "deflate i32(ptr, i32)"),
            (
                "unsigned long crc32(unsigned long crc, const unsigned char *buf, unsigned int len)",
                "crc32 u64(u64, ptr, u32)",
            ),
            ("int printf(const char *format, ..., int, double)", "printf i32(cstring, ..., i32, f64)"),
            ("int printf(const char *format, ...)", "printf i32(cstring, ...)"),
            ("void f(...)", "f void(...)"),
            (
                "void qsort(void *base, size_t n, size_t size, int (*cmp)(const void*, const void*))",
                "qsort void(ptr, u64, u64, function)",
            ),
            (
                "void f(void (*)(int (*)(int), char[]), int cmp(int), int (**pp)(void))",
                "f void(function, function, ptr)",
            ),
            ("void f(int (*table[4])(void), int (*row)[4], int (*p))", "f void(ptr, ptr, ptr)"),
            (
                "FILE *fopen(const char *restrict path, const char *restrict mode)",
                "fopen ptr(cstring, cstring)",
            ),
            (
                "void f(char *, char const *, const char *const, const char **, char *const)",
                "f void(ptr, cstring, cstring, ptr, ptr)",
            ),
            (
                "void f(char buf[16], int v[], const char s[], char *argv[], int m[2][N + 1])",
                "f void(ptr, ptr, cstring, ptr, ptr)",
            ),
            (
                "struct foo *f(struct foo *p, union bar **q, const struct foo[2], enum color c)",
                "f ptr(ptr, ptr, ptr, i32)",
            ),
            ("void f(char, signed char, unsigned char, _Bool, bool)", "f void(char, i8, u8, bool, bool)"),
            ("void f(short, short int, unsigned short, int unsigned short)", "f void(i16, i16, u16, u16)"),
            (
                "void f(int, signed, unsigned, unsigned int, long, long int)",
                "f void(i32, i32, u32, u32, i64, i64)",
            ),
            (
                "void f(long long, long long unsigned int, unsigned long, int long signed long)",
                "f void(i64, u64, u64, i64)",
            ),
            (
                "ssize_t f(int8_t, uint16_t, intptr_t, wchar_t, time_t, pid_t, off_t)",
                "f i64(i8, u16, i64, i32, i64, i32, i64)",
            ),
            ("i32 add(i32, i32)", "add i32(i32, i32)"),
            ("cstring f(ptr, buffer, function cb, u64_fast)", "f cstring(ptr, buffer, function, u64_fast)"),
            ("void f(int ptr, char buffer, unsigned function, i32 *i32)", "f void(i32, char, u32, ptr)"),
            ("void f(long double *, _Complex double *, void **)", "f void(ptr, ptr, ptr)"),
            ("int (isdigit)(int c)", "isdigit i32(i32)"),
            ("volatile int *const f(register int x)", "f ptr(i32)"),
        ] {
            assert_eq!(c(text), expected, "{text}");
        }
    }

    #[test]
    fn refused_prototypes_name_the_token_and_its_byte() {
        for (text, expected) in [
            (
                "int bar(int a, foo_t b)",
                "unknown type \"foo_t\" in argument 2 of \"bar\" at byte 15: expected a C scalar, a pointer or a bun:ffi name",
            ),
            (
                "uLong f(void)",
                "unknown type \"uLong\" in the return type of \"f\" at byte 0: expected a C scalar, a pointer or a \
                 bun:ffi name; did you mean \"ulong\"?",
            ),
            (
                "struct foo f(void)",
                "\"foo\" by value in the return type of \"f\" at byte 0: expected a scalar, or a pointer to it",
            ),
            (
                "void f(union u x)",
                "\"u\" by value in argument 1 of \"f\" at byte 7: expected a scalar, or a pointer to it",
            ),
            (
                "long double f(int)",
                "\"long double\" in the return type of \"f\" at byte 0: expected \"double\", or a pointer to it",
            ),
            (
                "void f(double complex)",
                "complex number in argument 1 of \"f\" at byte 7: expected a real number, or a pointer to it",
            ),
            (
                "void (*signal(int n, void (*f)(int)))(int)",
                "function that returns a function pointer at byte 5: expected \"void *\" as its return type",
            ),
            (
                "void f(int, void)",
                "\"void\" as argument 2 of \"f\" at byte 12: expected a value, or \"(void)\" for no arguments",
            ),
            (
                "void f(void x)",
                "\"void\" as argument 1 of \"f\" at byte 7: expected a value, or \"(void)\" for no arguments",
            ),
            (
                "int f(ptr, ..., float)",
                "f32 after the \"...\" in argument 2 of \"f\" at byte 16: expected f64, to which C promotes it",
            ),
            (
                "int f(ptr, ..., char x)",
                "char after the \"...\" in argument 2 of \"f\" at byte 16: expected i32, to which C promotes it",
            ),
            (
                "static inline int f(int)",
                "\"static\" at byte 0: expected the prototype of an exported function",
            ),
            ("typedef int foo;", "\"typedef\" at byte 0: expected the prototype of an exported function"),
            (
                "unsigned float f(void)",
                "type \"unsigned float\" at byte 0: expected words that C combines, such as \"unsigned long\"",
            ),
            (
                "void f(unsigned int32_t)",
                "type \"unsigned int32_t\" at byte 7: expected words that C combines, such as \"unsigned long\"",
            ),
            (
                "void f(foo_t int)",
                "type \"foo_t int\" at byte 7: expected words that C combines, such as \"unsigned long\"",
            ),
            ("add(int, int)", "\"(\" at byte 3: expected the name of the function"),
            ("int (*variable)(int)", "\"(\" at byte 4: expected the name of the function"),
            ("int", "end of text at byte 3: expected the name of the function"),
            ("int errno", "end of text at byte 9: expected \"(\" and the arguments"),
            ("int f(int", "end of text at byte 9: expected \",\" or \")\" after the argument"),
            ("int f(int,)", "\")\" at byte 10: expected a type"),
            ("int f(..., ..., int)", "\"...\" at byte 11: expected a type"),
            ("int f(char * int)", "\"int\" at byte 13: expected \",\" or \")\" after the argument"),
            ("int f(int (*cb)(int)", "end of text at byte 20: expected \",\" or \")\" after the argument"),
            ("int f(int (*cb)(int]", "\"]\" at byte 19: expected the bracket to be closed"),
            ("int f(int (x))", "\"x\" at byte 11: expected a function pointer such as \"(*name)(int)\""),
            ("int f(int) { return 1; }", "\"{\" at byte 11: expected \";\" after the prototype"),
            ("int f(int) int g(int)", "\"int\" at byte 11: expected \";\" after the prototype"),
            ("int f(int); int f(long);", "function \"f\" again at byte 16: expected each function once"),
            ("#include <math.h>", "\"#\" at byte 0: expected a type"),
            ("int é(int)", "\"é\" at byte 4: expected the name of the function"),
            ("int f(int /* x)", "comment at byte 10: expected \"*/\" at its end"),
        ] {
            assert_eq!(refusal(text), expected, "{text}");
        }
        assert!(c("void f(unsigned __int128)").starts_with("unknown type \"__int128\" in argument 1"));
        assert!(c("int f(int);;").starts_with("\";\" at byte 11: expected the end"));
        assert!(c("").starts_with("end of text at byte 0: expected a type"));
    }

    #[test]
    fn limits_hold_at_their_edge() {
        let with = |count| format!("int f({})", vec!["int"; count].join(","));
        assert_eq!(parse_c(&with(ARGS_MAX)).unwrap().1.args.len(), ARGS_MAX);
        let error = parse_c(&with(ARGS_MAX + 1)).unwrap_err();
        assert!(
            matches!(error, SignatureError::TooManyArguments { max: ARGS_MAX, at: 262, .. }),
            "{error:?}"
        );
        let error = parse_json_one(&format!("{{\"args\":{:?}}}", ["i32"; ARGS_MAX + 1])).unwrap_err();
        assert!(matches!(error, SignatureError::TooManyArguments { .. }), "{error:?}");

        let padded = |len: usize| "int f();".to_owned() + &" ".repeat(len - 8);
        assert!(parse_c(&padded(TEXT_BYTES_MAX)).is_ok());
        assert!(matches!(
            parse_symbols(&padded(TEXT_BYTES_MAX + 1)),
            Err(SignatureError::TextTooLong { .. })
        ));
        let deep = format!("int f(int (*x){}", "(".repeat(TEXT_BYTES_MAX / 2));
        assert!(matches!(parse_c(&deep), Err(SignatureError::Unexpected { .. })));
        assert!(matches!(parse_json(&"[".repeat(TEXT_BYTES_MAX)), Err(SignatureError::JsonSyntax { .. })));
        assert!(refusal(&format!("int f({})", "x".repeat(10_000))).len() < 300);
    }

    #[test]
    fn a_header_excerpt_gives_each_function() {
        let list = parse_c_list(" ;; int f(int);\n/* g; */ void g(void);;\n\ndouble h(...)").unwrap();
        let list: Vec<_> = list.iter().map(|(name, signature)| format!("{name} {signature}")).collect();
        assert_eq!(list, ["f i32(i32)", "g void()", "h f64(...)"]);
        assert_eq!(parse_symbols(" \n"), Ok(vec![]));
    }

    #[test]
    fn json_and_c_give_the_same_definitions() {
        let json = r#" { "add": {"args": ["i32", 5], "returns": "int"}, "nop": {},
            "p": {"variadic": 1, "args": ["cstring", "c_uint" , "f64"], "returns": 5, "description": "a \"p\" }"} }"#;
        let text = "int add(int, int); void nop(void); i32 p(const char *, ..., unsigned, double)";
        assert_eq!(parse_symbols(json).unwrap(), parse_symbols(text).unwrap());

        let renamed = parse_json(r#"{"version": {"returns": "cstring", "symbol": "lib_version"}}"#).unwrap();
        assert_eq!((&*renamed[0].name, &*renamed[0].symbol), ("version", "lib_version"));
        let one = parse_json_one(r#"{"args":[20,"void*"],"returns":13}"#).unwrap();
        assert_eq!(one, Signature::new([Type::Buffer, Type::Ptr], Type::Void));
    }

    #[test]
    fn refused_json_names_the_function_the_key_and_its_byte() {
        for (text, expected) in [
            (
                r#"{"add":{"args":["i32","i33"]}}"#,
                "unknown type \"i33\" in argument 2 of \"add\" at byte 22: expected a C scalar, a pointer or a bun:ffi \
                 name; did you mean \"i32\"?",
            ),
            (
                r#"{"f":{"args":["void"]}}"#,
                "\"void\" as argument 1 of \"f\" at byte 14: expected a value, or \"(void)\" for no arguments",
            ),
            (
                r#"{"f":{"return":"i32"}}"#,
                "unknown key \"return\" of \"f\" at byte 6: expected one of args, returns, symbol, variadic, description",
            ),
            (r#"{"f":{"args":"i32"}}"#, "\"args\" of \"f\" at byte 13: expected an array of type names"),
            (r#"{"f":{"args":[null]}}"#, "argument 1 of \"f\" at byte 14: expected the name of a type"),
            (
                r#"{"f":{"returns":["i32"]}}"#,
                "the return type of \"f\" at byte 16: expected the name of a type",
            ),
            (r#"{"f":{"description":1}}"#, "\"description\" of \"f\" at byte 20: expected a string"),
            (r#"{"f":{"symbol":""}}"#, "name \"\" at byte 15: expected one that is not empty and has no NUL"),
            (r#"{"a\u0000b":{}}"#, "name \"a\\0b\" at byte 1: expected one that is not empty and has no NUL"),
            (
                r#"{"f":{"variadic":1}}"#,
                "1 arguments before the \"...\" of \"f\" at byte 17: expected at most 0",
            ),
            (
                r#"{"f":{"variadic":-1}}"#,
                "\"variadic\" of \"f\" at byte 17: expected the number of arguments before the \"...\"",
            ),
            (
                r#"{"f":{"args":["f32"],"variadic":0}}"#,
                "f32 after the \"...\" in argument 1 of \"f\" at byte 14: expected f64, to which C promotes it",
            ),
            (r#"{"f":{},"g":{},"f":{}}"#, "function \"f\" again at byte 15: expected each function once"),
            (
                r#"{"f":{"args":[],"args":[]}}"#,
                "key \"args\" of \"f\" again at byte 16: expected each key once",
            ),
            (
                r#"{"args":["i32"]}"#,
                "\"args\" at byte 8: expected an object such as {\"args\":[\"i32\"],\"returns\":\"i32\"}",
            ),
            (r#"{"f":{},}"#, "invalid JSON: trailing comma at line 1 column 9"),
            (r#"{"f":{}} x"#, "invalid JSON: trailing characters at line 1 column 10"),
        ] {
            assert_eq!(refusal(text), expected, "{text}");
        }
        for number in ["18", "19", "21", "-1", "0.5", "1e99", "18446744073709551616"] {
            let error = parse_json_one(&format!("{{\"returns\":{number}}}")).unwrap_err();
            assert!(matches!(error, SignatureError::UnknownType { at: 11, .. }), "{number}: {error}");
        }
        assert_eq!(
            parse_json("[]").unwrap_err().to_string(),
            "text at byte 0: expected an object of functions"
        );
        assert_eq!(
            parse_json_one(r#"{"symbol":"f"}"#).unwrap_err().to_string(),
            "unknown key \"symbol\" at byte 1: expected one of args, returns, variadic, description"
        );
    }

    const VALID: [&str; 5] = [
        "int printf(const char *restrict format, ..., int, double);",
        "void qsort(void *base, size_t n, size_t size, int (*cmp)(const void*, const void*))",
        "extern struct foo *f(enum e x, char buf[16], long long unsigned int); /* é */ i32 g(int (*p[2])(void))",
        r#"{"add":{"args":["i32",5],"returns":"i32"},"p":{"args":["cstring","i32"],"variadic":1,"symbol":"é"}}"#,
        r#"{"args":["i32","f64"],"returns":"cstring","description":"\n"}"#,
    ];

    /// Parses in every way. What is accepted must be a signature that can be called.
    fn parse_in_every_way(text: &str) -> Result<(), TestCaseError> {
        let list = parse_symbols(text).unwrap_or_default();
        let one = parse_c(text).ok().map(|(_, signature)| signature);
        let json = parse_json(text).unwrap_or_default();
        let all =
            list.into_iter().chain(json).map(|d| d.signature).chain(one).chain(parse_json_one(text).ok());
        for signature in all {
            prop_assert!(signature.args.len() <= ARGS_MAX);
            prop_assert!(!signature.args.contains(&Type::Void));
            prop_assert!(signature.variadic_after.is_none_or(|n| usize::from(n) <= signature.args.len()));
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: if cfg!(miri) { 8 } else { 1024 },
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        #[test]
        fn arbitrary_text_never_panics(text in any::<String>()) {
            parse_in_every_way(&text)?;
        }

        #[test]
        fn shuffled_tokens_never_panic(
            words in prop::collection::vec(
                prop::sample::select(vec![
                    "int", "unsigned", "long", "char", "const", "struct", "enum", "void", "f", "x_t", "size_t", "*",
                    "(", ")", "[", "]", ",", ";", "...", "{", "}", ":", "\"args\"", "\"i32\"", "\"f\"", "7", "/*", "é",
                ]),
                0..40,
            ),
        ) {
            parse_in_every_way(&words.join(" "))?;
        }

        #[test]
        fn mutated_texts_never_panic(
            text in prop::sample::select(VALID.to_vec()),
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<Option<char>>()), 1..6),
        ) {
            let mut chars: Vec<char> = text.chars().collect();
            for (index, edit) in edits {
                let index = index.index(chars.len());
                match edit {
                    Some(c) => chars[index] = c,
                    None => drop(chars.remove(index)),
                }
            }
            parse_in_every_way(&chars.into_iter().collect::<String>())?;
        }
    }

    #[test]
    fn texts_that_the_mutations_start_from_are_valid() {
        for text in VALID {
            assert!(parse_symbols(text).is_ok() || parse_json_one(text).is_ok(), "{text}");
        }
    }
}

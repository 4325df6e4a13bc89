//! `Module`: loaded native code, in one session.

use crate::call::{Function, FunctionType};
use crate::dynamic::DynFunction;
use crate::error::{FunctionName, LoadError};
use crate::session::{ModuleSource, Session, SessionOwner, load_failure};
use crate::signature::{self, SymbolDefinition};
use hotcell_channel::session::{Answer, Request};
use hotcell_channel::signature::{ARGS_MAX, Signature};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;

/// A module loaded in a session. It stays loaded until the session is closed.
///
/// Cloning gives another handle to the same module.
#[derive(Clone, Debug)]
pub struct Module {
    owner: Arc<SessionOwner>,
    index: u32,
    name: Arc<str>,
}

/// A resolved function, before it gets a type.
pub(crate) struct Resolved {
    pub(crate) index: u32,
    pub(crate) label: u32,
    pub(crate) name: Arc<FunctionName>,
}

impl Module {
    /// A shared library, by path (with a slash in it) or by the name that the dynamic linker looks up (`libz.so.1`).
    pub fn ffi(name: impl Into<PathBuf>) -> ModuleSource {
        ModuleSource { name: name.into(), now: false, global: false }
    }

    pub(crate) fn load(session: &Session, source: &ModuleSource) -> Result<Module, LoadError> {
        let name: Arc<str> = source.name.to_string_lossy().into();
        let function = FunctionName { module: Arc::clone(&name), symbol: crate::error::LOAD.into() };
        let bytes = source.name.as_os_str().as_bytes();
        if bytes.is_empty() || bytes.contains(&0) {
            let detail = "a module's name is not empty and has no NUL inside".to_owned();
            return Err(LoadError::NotFound { module: name, detail });
        }
        let request = Request::Load { name: bytes.to_vec(), now: source.now, global: source.global };
        let fail = |source| LoadError::Call { module: Arc::clone(&name), source };
        match session.inner().directory(&request, &function).map_err(fail)? {
            Answer::Loaded(index) => Ok(Module { owner: Arc::clone(&session.owner), index, name }),
            Answer::Failed { kind, detail } => Err(load_failure(kind, &detail, function)),
            Answer::Resolved(_) => Err(fail(session.inner().wrong_answer(&function))),
        }
    }

    /// The name that it was loaded by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The session that it is loaded in.
    pub fn session(&self) -> Session {
        Session { owner: Arc::clone(&self.owner) }
    }

    pub(crate) fn owner(&self) -> &Arc<SessionOwner> {
        &self.owner
    }

    /// Finds a function and prepares calls to it by its Rust type.
    ///
    /// # Errors
    /// [`LoadError::MissingSymbol`], [`LoadError::BadSignature`], and those of any call.
    ///
    /// ```
    /// # fn main() -> Result<(), hotcell::Error> {
    /// let session = hotcell::Worker::spawn()?.session()?;
    /// let libm = session.load("libm.so.6")?;
    /// let pow = libm.function::<fn(f64, f64) -> f64>("pow")?;
    /// assert_eq!(pow.call(2.0, 10.0)?, 1024.0);
    /// # Ok(()) }
    /// ```
    pub fn function<F: FunctionType>(&self, symbol: &str) -> Result<Function<F>, LoadError> {
        Function::resolve(self, symbol, None)
    }

    /// Finds a variadic function and prepares calls to it with the actual argument types of one use. `fixed` is how many of them stand before the `...`
    /// in its declaration. As in C, the others must have been promoted: no `f32`, `bool` or integer smaller than 32 bits.
    ///
    /// # Errors
    /// As [`Module::function`].
    ///
    /// ```
    /// # use hotcell::{In, Out};
    /// # use std::ffi::CStr;
    /// # fn main() -> Result<(), hotcell::Error> {
    /// # let session = hotcell::Worker::spawn()?.session()?;
    /// let libc = session.load("libc.so.6")?;
    /// let snprintf = libc.variadic_function::<fn(Out<[u8]>, usize, In<CStr>, i32, f64) -> i32>("snprintf", 3)?;
    /// let mut text = [0u8; 32];
    /// let length = snprintf.call(&mut text, 32, c"%d %.2f", 7, 0.5)?;
    /// assert_eq!(&text[..length as usize], b"7 0.50");
    /// # Ok(()) }
    /// ```
    pub fn variadic_function<F: FunctionType>(
        &self,
        symbol: &str,
        fixed: u8,
    ) -> Result<Function<F>, LoadError> {
        Function::resolve(self, symbol, Some(fixed))
    }

    /// Finds a function by its C prototype, `"double pow(double, double)"`; calls to it check their arguments when they are made. For several at once, or for
    /// definitions in JSON, see [`Module::declare`].
    ///
    /// # Errors
    /// [`LoadError::Signature`] if the text is not one prototype, and as [`Module::function`].
    pub fn prototype(&self, text: &str) -> Result<DynFunction, LoadError> {
        let (symbol, signature) = signature::parse_c(text)
            .map_err(|source| LoadError::Signature { module: Arc::clone(&self.name), source })?;
        self.dynamic(&symbol, signature)
    }

    /// Finds a function by name and signature; calls to it check their arguments when they are made.
    ///
    /// # Errors
    /// As [`Module::function`].
    pub fn dynamic(&self, symbol: &str, signature: Signature) -> Result<DynFunction, LoadError> {
        DynFunction::resolve(self, symbol, signature)
    }

    /// Finds all functions that a text declares: C prototypes separated by `;`, or the JSON object of `bun:ffi`. Gives them with the names by which they are declared.
    ///
    /// # Errors
    /// As [`Module::prototype`].
    pub fn declare(&self, symbols: &str) -> Result<Vec<(String, DynFunction)>, LoadError> {
        signature::parse_symbols(symbols)
            .map_err(|source| LoadError::Signature { module: Arc::clone(&self.name), source })?
            .into_iter()
            .map(|SymbolDefinition { name, symbol, signature }| Ok((name, self.dynamic(&symbol, signature)?)))
            .collect()
    }

    pub(crate) fn resolve(
        &self,
        symbol: &str,
        signature: &Signature,
        errno: bool,
    ) -> Result<Resolved, LoadError> {
        let name = FunctionName { module: Arc::clone(&self.name), symbol: symbol.into() };
        if symbol.is_empty() || symbol.contains('\0') {
            let detail = "a symbol's name is not empty and has no NUL inside".to_owned();
            return Err(LoadError::MissingSymbol { function: name, detail });
        }
        // The worker refuses it too, but what follows relies on it, and a worker may lie.
        if signature.args.len() > ARGS_MAX {
            let detail = format!("{} arguments where at most {ARGS_MAX} are possible", signature.args.len());
            return Err(LoadError::BadSignature { function: name, detail });
        }
        if let Some(fixed) = signature.variadic_after {
            check_variadic(signature, fixed)
                .map_err(|detail| LoadError::BadSignature { function: name.clone(), detail })?;
        }
        let request = Request::Resolve {
            module: self.index,
            symbol: symbol.into(),
            signature: signature.clone(),
            errno,
        };
        let session = &self.owner.inner;
        let key = (self.index, Arc::clone(&name.symbol), signature.clone(), errno);
        // In a fork its lock may be held for ever.
        if let Some(index) = (!session.is_forked()).then(|| session.resolved_before(&key)).flatten() {
            return Ok(Resolved { index, label: session.label(name.clone()), name: Arc::new(name) });
        }
        let running = FunctionName { symbol: format!("(resolve {symbol})").into(), ..name.clone() };
        let fail = |source| LoadError::Call { module: Arc::clone(&self.name), source };
        match session.directory(&request, &running).map_err(fail)? {
            Answer::Resolved(index) if session.is_function_index(index) => {
                session.remember_resolved(key, index);
                let label = session.label(name.clone());
                Ok(Resolved { index, label, name: Arc::new(name) })
            }
            Answer::Failed { kind, detail } => Err(load_failure(kind, &detail, name)),
            _ => Err(fail(session.wrong_answer(&running))),
        }
    }
}

fn check_variadic(signature: &Signature, fixed: u8) -> Result<(), String> {
    use hotcell_channel::signature::Type;
    let fixed = usize::from(fixed);
    if fixed > signature.args.len() {
        return Err(format!("{fixed} fixed arguments of {}", signature.args.len()));
    }
    for (i, t) in signature.args.iter().enumerate().skip(fixed) {
        let promoted = match t {
            Type::F32 => "f64",
            Type::Bool | Type::Char | Type::I8 | Type::I16 | Type::U8 | Type::U16 => "i32",
            _ => continue,
        };
        return Err(format!(
            "variadic argument {} is {t}, which C passes as {promoted}: declare that",
            i + 1
        ));
    }
    Ok(())
}

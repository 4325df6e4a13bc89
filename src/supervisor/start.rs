//! Starting a worker and preparing it: the one place where the host's hooks run.

use crate::error::StartError;
use crate::session::Session;
use crate::worker::{Worker, WorkerBuilder};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// What a hook may fail with.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

type HookFn<T> = dyn Fn(&T) -> Result<(), BoxError> + Send + Sync;

/// Code of the host's that prepares something. Runs with no lock of the library held.
pub(crate) struct Hook<T: ?Sized> {
    name: &'static str,
    run: Arc<HookFn<T>>,
}

pub(crate) type StartHook = Hook<Worker>;
pub(crate) type SessionHook = Hook<Session>;

impl<T> Clone for Hook<T> {
    fn clone(&self) -> Self {
        Self { name: self.name, run: Arc::clone(&self.run) }
    }
}

impl<T> fmt::Debug for Hook<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl<T> Hook<T> {
    pub(crate) fn new<E: Into<BoxError>>(
        name: &'static str,
        hook: impl Fn(&T) -> Result<(), E> + Send + Sync + 'static,
    ) -> Self {
        Self { name, run: Arc::new(move |it| hook(it).map_err(Into::into)) }
    }

    /// Runs it. A panic is a failure.
    pub(crate) fn run(&self, it: &T) -> Result<(), StartError> {
        let failed = |source: BoxError| Err(StartError::Hook { hook: self.name, source: source.into() });
        match catch_unwind(AssertUnwindSafe(|| (self.run)(it))) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(source)) => failed(source),
            Err(panic) => {
                let what = panic.downcast_ref::<&str>().copied();
                let what = what.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
                let text = format!("it panicked: {}", what.unwrap_or("?"));
                // Dropping a payload can panic too.
                std::mem::forget(panic);
                failed(text.into())
            }
        }
    }
}

/// How a kept worker is started.
#[derive(Clone, Debug)]
pub(crate) struct Starter {
    pub(crate) builder: WorkerBuilder,
    pub(crate) hook: Option<StartHook>,
}

impl Starter {
    /// Starts a worker and prepares it. After a failure no worker is left.
    pub(crate) fn start(&self) -> Result<Worker, StartError> {
        let worker = self.builder.clone().spawn()?;
        if let Some(hook) = &self.hook
            && let Err(error) = hook.run(&worker)
        {
            worker.dispose();
            return Err(error);
        }
        Ok(worker)
    }
}

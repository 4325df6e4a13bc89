//! A host for several tenants, each with a worker of its own. One of them runs code that crashes again and again: its sessions end, the others' go on, and at last its module is put into quarantine.
//!
//! ```text
//! cargo run --release --example multi_tenant
//! ```

use hotcell::{
    CallError, LoadError, OnFull, Quarantine, Restart, RestartPolicy, Session, SessionRequest, StartError,
    Supervisor, SupervisorEvent, Topology,
};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

const SOUND: &str = "int price(int items) { return items * 3; }";
const BROKEN: &str = "int price(int items) { return items > 2 ? *(volatile int *)0 : items * 3; }";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("multi_tenant: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let directory = tempfile::tempdir()?;
    let sound = compile("sound", SOUND, directory.path())?;
    let broken = compile("broken", BROKEN, directory.path())?;

    let supervisor = Supervisor::builder()
        .topology(Topology::PerTenant)
        .sessions_max_per_tenant(2)
        .restart(
            RestartPolicy::new(Restart::OnCrash).backoff(Duration::from_millis(5), Duration::from_secs(1)),
        )
        .quarantine(Quarantine::after(3, Duration::from_secs(60)))
        .build()?;
    let told = supervisor.receiver(&[
        SupervisorEvent::WorkerStarted,
        SupervisorEvent::WorkerEnded,
        SupervisorEvent::Quarantined,
    ]);

    // Two tenants with sound modules, whose sessions stay open over all that follows.
    let tenants = ["ada", "grace"].map(|tenant| supervisor.session(tenant));
    let mut sessions = Vec::new();
    for session in tenants {
        let session = session?;
        println!("{} items cost {}", 5, price(&session, &sound, 5)?);
        sessions.push(session);
    }

    // A third whose module crashes: each time a new session gets a new worker, until the module is not loaded any more.
    for attempt in 1.. {
        let session = supervisor.session("mallory")?;
        match price(&session, &broken, 5) {
            Err(PriceError::Call(CallError::Crashed(report))) => {
                println!(
                    "mallory, attempt {attempt}: {}",
                    report.to_string().lines().next().unwrap_or_default()
                );
            }
            Err(PriceError::Load(LoadError::Quarantined { reports, .. })) => {
                println!("mallory, attempt {attempt}: refused after {} crashes", reports.len());
                break;
            }
            other => return Err(format!("attempt {attempt} was to crash or to be refused: {other:?}").into()),
        }
        for session in &sessions {
            session.ping()?; // nobody else has noticed
        }
    }

    // Limits are kept: a tenant's third session is refused, or waits.
    let second = supervisor.session("ada")?;
    match supervisor.session("ada") {
        Err(error @ StartError::SessionLimit { .. }) => println!("ada: {error}"),
        other => return Err(format!("the limit was to refuse: {other:?}").into()),
    }
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let request = SessionRequest::from("ada").on_full(OnFull::Wait(Duration::from_secs(30)));
            supervisor.session(request).map(drop)
        });
        drop(second);
        waiting.join().expect("it does not panic")
    })?;
    println!("ada: got a place when one was free");

    for event in told.try_iter() {
        println!("event: {event}");
    }
    let snapshot = supervisor.snapshot();
    for worker in &snapshot.workers {
        println!(
            "{}: {} sessions, {} restarts, {} KiB",
            worker.tenant.as_deref().unwrap_or("?"),
            worker.sessions.len(),
            worker.restarts,
            worker.resident_bytes.unwrap_or(0) / 1024
        );
    }
    println!("{} calls, ends by cause: {:?}", snapshot.calls_done, snapshot.ends);
    supervisor.dispose();
    Ok(())
}

#[derive(Debug)]
enum PriceError {
    Load(LoadError),
    Call(CallError),
}

impl std::fmt::Display for PriceError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            PriceError::Load(error) => error.fmt(f),
            PriceError::Call(error) => error.fmt(f),
        }
    }
}

impl Error for PriceError {}

fn price(session: &Session, module: &Path, items: i32) -> Result<i32, PriceError> {
    let module = session.load(module).map_err(PriceError::Load)?;
    let price = module.function::<fn(i32) -> i32>("price").map_err(PriceError::Load)?;
    price.call(items).map_err(PriceError::Call)
}

fn compile(name: &str, source: &str, directory: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let (text, library) = (directory.join(format!("{name}.c")), directory.join(format!("lib{name}.so")));
    std::fs::write(&text, source)?;
    let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
    let done =
        Command::new(&compiler).args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(&text).status()?;
    if !done.success() {
        return Err(format!("{} failed: {done}", compiler.display()).into());
    }
    Ok(library)
}

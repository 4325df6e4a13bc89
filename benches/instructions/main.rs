#![allow(unsafe_code)]
//! How many instructions a call is, on the host's side and on the worker's, and whether a change has added to them.
//!
//! ```text
//! cargo bench --bench instructions                     the table; exit status 1 if a count is over the kept one
//! cargo bench --bench instructions -- --only typed     some of the calls
//! cargo bench --bench instructions -- --need-valgrind  a missing valgrind is a failure, not a word on stderr
//! ```
//!
//! It is the real call path that is counted: a host and a worker, two processes, one of them under `valgrind --tool=callgrind` and the other one not. The
//! program is run twice, with different numbers of calls; for each instruction of the program the difference between the two runs, divided by the difference of
//! the numbers, is how often a call executes it. What is executed a whole number of times counts. The start and the loading fall out, and so do the looks at a slot whose turn has
//! not come yet: how many there are is a matter of time, and the side that is not counted takes a different time for each call, so that they are no whole number. A count that two
//! attempts agree on is taken; there are [`ATTEMPTS`] at most.
//!
//! The counts hold the loop around the call too (six instructions or so on the host's side), and the called function (its additions and a return) on the worker's. They do not hold the
//! looks: the one that sees the turn is four instructions on the host's side.

mod kept;
#[cfg(target_arch = "x86_64")]
mod pidfd;

use hotcell::{DynFunction, Function, Module, WaitPolicy, Worker};
use std::collections::HashMap;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;
type Six = fn(u64, u64, u64, u64, u64, u64) -> u64;
type Eight = fn(f64, f64, f64, f64, f64, f64, f64, f64) -> f64;

const SOURCE: &str = "\
#include <stdint.h>
#ifdef TAKE_TIME
static void take_time(void) { static uint32_t n; n = n * 1664525 + 1013904223; for (volatile uint32_t i = 0; i < 1000 + (n >> 21); i++); }
#else
#define take_time() ((void)0)
#endif
int32_t add(int32_t a, int32_t b) { take_time(); return (int32_t)((uint32_t)a + (uint32_t)b); }
uint64_t six(uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f) { take_time(); return a + b + c + d + e + f; }
double eight(double a, double b, double c, double d, double e, double f, double g, double h) { take_time(); return a + b + c + d + e + f + g + h; }
";

/// Most attempts at two that agree.
const ATTEMPTS: u32 = 20;
/// Calls in the short and in the long run.
const CALLS: [u64; 2] = [2_000, 12_000];
/// How far from a whole number of times a call an instruction may be executed to count: a call that finds its peer's CPU taken away goes another way.
const SLACK: f64 = 0.02;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Host,
    Worker,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "--make-calls") {
        return match make_calls(&arguments[1..]) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&*error),
        };
    }
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => fail(&*error),
    }
}

fn fail(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("instructions: {error}");
    ExitCode::FAILURE
}

/// The program whose instructions are counted.
fn make_calls(arguments: &[String]) -> Result<()> {
    let [name, calls, library, program] = arguments else { return Err("wrong arguments".into()) };
    let calls: u64 = calls.parse()?;
    // Named, for the running executable of a host under valgrind is valgrind.
    let worker = Worker::builder().wait(WaitPolicy::Spin).program(program).spawn()?;
    let module = worker.session()?.load(Module::ffi(library))?;
    let host_counts = std::env::current_exe()? == Path::new(program);
    // Taken by the side that is not counted: here by the host, otherwise by the called function.
    let pause: fn(u64) = if host_counts { |_| () } else { take_time };
    match name.as_str() {
        "typed, two i32" => two(&module.function("add")?, calls, pause)?,
        "typed, six words" => six(&module.function("six")?, calls, pause)?,
        "typed, eight doubles" => eight(&module.function("eight")?, calls, pause)?,
        "by name, two i32" => by_name(&module.prototype("int32_t add(int32_t, int32_t)")?, calls, pause)?,
        other => return Err(format!("no such call: {other}").into()),
    }
    drop(module);
    if host_counts {
        // This is the side under valgrind, which knows no way to send the worker a signal. The worker goes with its host, as it does from any.
        std::process::exit(0);
    }
    worker.dispose();
    Ok(())
}

/// Between one and three microseconds or so.
fn take_time(i: u64) {
    let looks = 20 + (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 58);
    (0..looks).for_each(|_| std::hint::spin_loop());
}

#[inline(never)]
fn two(add: &Function<fn(i32, i32) -> i32>, calls: u64, pause: fn(u64)) -> Result<()> {
    for i in 0..calls {
        pause(i);
        assert_eq!(add.call(black_box(2), black_box(3))?, 5);
    }
    Ok(())
}

#[inline(never)]
fn six(six: &Function<Six>, calls: u64, pause: fn(u64)) -> Result<()> {
    for i in 0..calls {
        pause(i);
        let [a, b, c, d, e, f] = black_box([1, 2, 3, 4, 5, 6]);
        assert_eq!(six.call(a, b, c, d, e, f)?, 21);
    }
    Ok(())
}

#[inline(never)]
fn eight(eight: &Function<Eight>, calls: u64, pause: fn(u64)) -> Result<()> {
    for i in 0..calls {
        pause(i);
        let [a, b, c, d, e, f, g, h] = black_box([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
        assert!(eight.call(a, b, c, d, e, f, g, h)? == 36.0);
    }
    Ok(())
}

#[inline(never)]
fn by_name(add: &DynFunction, calls: u64, pause: fn(u64)) -> Result<()> {
    for i in 0..calls {
        pause(i);
        assert_eq!(i32::try_from(add.call((black_box(2), black_box(3)))?)?, 5);
    }
    Ok(())
}

/// Counts, prints, and tells whether every count is within what is kept.
fn run(arguments: &[String]) -> Result<bool> {
    let need = arguments.iter().any(|a| a == "--need-valgrind");
    let only = arguments.iter().position(|a| a == "--only").and_then(|at| arguments.get(at + 1));
    if !cfg!(target_arch = "x86_64") {
        return missing("the kept counts are those of x86-64", need);
    }
    let Ok(valgrind) = Command::new("valgrind").arg("--version").output() else {
        return missing("valgrind is not installed (package valgrind)", need);
    };
    let valgrind = String::from_utf8_lossy(&valgrind.stdout).trim().to_owned();
    // `cargo test --benches` passes neither: one small count shows that it works.
    let quick = !need && !arguments.iter().any(|a| a == "--bench");

    let folder = tempfile::tempdir()?;
    let libraries = [compile(folder.path(), &["-DTAKE_TIME"])?, compile(folder.path(), &[])?];
    let compiler = String::from_utf8(Command::new("rustc").arg("--version").output()?.stdout)?;
    let compiler = compiler.split(" (").next().unwrap_or_default().trim();
    println!("instructions a call, by {valgrind}'s callgrind, compiled by {compiler}\n");
    println!("| call                 | host: kept |   now | worker: kept |   now |");
    println!("|:---------------------|-----------:|------:|-------------:|------:|");
    let mut over = Vec::new();
    for (name, host, worker) in kept::KEPT {
        if only.is_some_and(|only| !name.contains(only.as_str())) || (quick && name != "typed, two i32") {
            continue;
        }
        let mut counts = [0; 2];
        for (count, (side, kept)) in counts.iter_mut().zip([(Side::Host, host), (Side::Worker, worker)]) {
            let most = kept + room(kept, compiler);
            *count = count_calls(name, side, &libraries[side as usize], folder.path())?;
            if *count > most {
                let side = if side == Side::Host { "host" } else { "worker" };
                over.push(format!("{name}, {side}: {count} where {kept} are kept, and {most} would do"));
            }
        }
        println!("| {name:<20} | {host:>10} | {:>5} | {worker:>12} | {:>5} |", counts[0], counts[1]);
    }
    for line in &over {
        println!("MORE THAN KEPT: {line}");
    }
    Ok(over.is_empty())
}

fn missing(what: &str, need: bool) -> Result<bool> {
    eprintln!("instructions: NOTHING WAS COUNTED: {what}");
    Ok(!need)
}

/// By how much a count may be over the kept one: for one more instruction or 2 in 100 there are reasons in the compiler's mood, and in another compiler's for more.
fn room(kept: u64, compiler: &str) -> u64 {
    if compiler == kept::COMPILER { (kept / 50).max(1) } else { kept / 10 }
}

/// The library; for the host's side one that takes its time.
fn compile(folder: &Path, more: &[&str]) -> Result<PathBuf> {
    let (source, library) = (folder.join("native.c"), folder.join(format!("libnative{}.so", more.len())));
    std::fs::write(&source, SOURCE)?;
    let status = Command::new("cc")
        .args(["-shared", "-fPIC", "-O2"])
        .args(more)
        .arg("-o")
        .arg(&library)
        .arg(&source)
        .status()?;
    if status.success() { Ok(library) } else { Err(format!("cc: {status}").into()) }
}

/// The instructions a call that two attempts agree on.
fn count_calls(name: &str, side: Side, library: &Path, folder: &Path) -> Result<u64> {
    let mut seen = Vec::new();
    for _ in 0..ATTEMPTS {
        let short = profile(name, CALLS[0], side, library, folder)?;
        let long = profile(name, CALLS[1], side, library, folder)?;
        let count = per_call(&short, &long, CALLS[1] - CALLS[0]);
        if seen.contains(&count) {
            return Ok(count);
        }
        seen.push(count);
    }
    Err(format!("{name}: the machine is too busy: no two attempts agree: {seen:?}").into())
}

/// How many instructions are executed a whole number of times a call, each as often as it is.
fn per_call(short: &HashMap<u64, u64>, long: &HashMap<u64, u64>, calls: u64) -> u64 {
    let times = |(at, count): (&u64, &u64)| {
        let more = count.saturating_sub(short.get(at).copied().unwrap_or(0));
        let times = (more + calls / 2) / calls;
        let off = (more as f64 / calls as f64 - times as f64).abs();
        if off <= SLACK { times } else { 0 }
    };
    long.iter().map(times).sum()
}

/// Runs the calls with one side under callgrind. Gives how often each instruction of that side was executed.
fn profile(name: &str, calls: u64, side: Side, library: &Path, folder: &Path) -> Result<HashMap<u64, u64>> {
    let out = folder.join("callgrind.out");
    let _ = std::fs::remove_file(&out);
    let this = std::env::current_exe()?;
    let valgrind = [
        "valgrind".to_owned(),
        "--tool=callgrind".into(),
        format!("--callgrind-out-file={}", out.display()),
        "--dump-instr=yes".into(),
        "--compress-pos=no".into(),
        "--compress-strings=no".into(),
        "--log-file=".to_owned() + &folder.join("valgrind.log").display().to_string(),
    ];
    let mut program = this.clone();
    let mut command = match side {
        Side::Host => {
            let mut command = Command::new(&valgrind[0]);
            command.args(&valgrind[1..]).arg(&this);
            command
        }
        Side::Worker => {
            // A worker's program that is this one under callgrind.
            let wrapper = folder.join("worker");
            let quoted: Vec<String> = valgrind[1..].iter().map(|a| format!("'{a}'")).collect();
            let path = std::env::var("PATH").unwrap_or_default();
            let text = format!(
                "#!/bin/sh\nPATH='{path}' exec valgrind {} '{}' \"$@\"\n",
                quoted.join(" "),
                this.display()
            );
            std::fs::write(&wrapper, text)?;
            std::fs::set_permissions(&wrapper, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
            program = wrapper;
            Command::new(&this)
        }
    };
    command.arg("--make-calls").args([name, &calls.to_string()]).arg(library).arg(&program);
    command.stdin(Stdio::null());
    let status = pidfd::run_with_helper(&mut command)?;
    if !status.success() {
        let log = std::fs::read_to_string(folder.join("valgrind.log")).unwrap_or_default();
        return Err(format!("{name}: the program under valgrind: {status}\n{log}").into());
    }
    parse(&std::fs::read_to_string(&out).map_err(|error| format!("{}: {error}", out.display()))?)
}

/// Reads callgrind's format: in a function's part, lines `0xaddress line cost`; after a line `calls=…` comes one such line with the cost of the callee, which has its own lines.
fn parse(text: &str) -> Result<HashMap<u64, u64>> {
    let mut counts = HashMap::new();
    let mut skip = false;
    for line in text.lines() {
        if line.starts_with("calls=") {
            skip = true;
            continue;
        }
        let Some(rest) = line.strip_prefix("0x") else { continue };
        if std::mem::take(&mut skip) {
            continue;
        }
        let mut fields = rest.split_ascii_whitespace();
        let (Some(at), Some(_), Some(count)) = (fields.next(), fields.next(), fields.next()) else {
            return Err(format!("callgrind wrote {line:?}").into());
        };
        *counts.entry(u64::from_str_radix(at, 16)?).or_default() += count.parse::<u64>()?;
    }
    if counts.is_empty() { Err("callgrind counted nothing".into()) } else { Ok(counts) }
}

#![allow(unsafe_code)]
//! How many instructions a call is, on the host's side and on the worker's, and whether a change has added to them.
//!
//! ```text
//! cargo bench --bench instructions                     the table; exit status 1 if a count is over the kept one
//! cargo bench --bench instructions -- --only typed     some of the calls
//! cargo bench --bench instructions -- --need-valgrind  a missing valgrind is a failure, not a word on stderr
//! ```
//!
//! It is the real call path that is counted: a host and a worker, two processes, one of them under `valgrind --tool=callgrind` and the other one not. The counted side runs a
//! mark after every [`BATCH`] calls, at which callgrind writes down how often each instruction was executed since the last one. An instruction belongs to a call if that is a
//! whole number of times a call, exactly. What is not of the calls falls out, and so do the looks at a slot whose turn has not come yet: how many there are is a matter of time, and the side that
//! is not counted takes a different time for each call, so that they are no whole number.
//!
//! On a busy machine a side loses its CPU now and then, and some call waits elsewhere. That shows: a function ran that the batch's other calls did not run. Only batches without such a call are
//! looked at, and the count that most of them have is taken. So a busy machine can make the check take longer, or fail saying so, but cannot make a count smaller.
//!
//! The counts hold the loop around the call too (six instructions or so on the host's side), and the called function (its additions and a return) on the worker's. They do not hold the
//! looks: the one that sees the turn is four instructions on the host's side.

mod kept;
#[cfg(target_arch = "x86_64")]
mod pidfd;

use hotcell::{DynFunction, Function, Module, WaitPolicy, Worker};
use std::collections::{HashMap, HashSet};
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;
type Six = fn(u64, u64, u64, u64, u64, u64) -> u64;
type Eight = fn(f64, f64, f64, f64, f64, f64, f64, f64) -> f64;

const SOURCE: &str = "\
#include <stdint.h>
#ifdef TAKE_TIME
static void take_time(void) { static uint32_t n; n = n * 1664525 + 1013904223; for (volatile uint32_t i = 0; i < 200 + (n >> 23); i++); }
#else
#define take_time() ((void)0)
#endif
int32_t add(int32_t a, int32_t b) { take_time(); return (int32_t)((uint32_t)a + (uint32_t)b); }
uint64_t six(uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f) { take_time(); return a + b + c + d + e + f; }
void hotcell_bench_mark(void) { }
double eight(double a, double b, double c, double d, double e, double f, double g, double h) { take_time(); return a + b + c + d + e + f + g + h; }
";

/// Most runs of the program for one side.
const ATTEMPTS: u32 = 6;
/// Calls between two marks.
const BATCH: u64 = 64;
/// Batches of each kind of call.
const BATCHES: usize = 40;
/// Batches that must have one count before it is believed.
const AGREE: usize = 10;
/// What callgrind stops at. On the host's side it is a function of this program, on the worker's one of the library.
const MARK: &str = "hotcell_bench_mark";

/// What was executed between two marks.
#[derive(Default)]
struct Batch {
    /// How often each instruction was, by its address.
    times: HashMap<u64, u64>,
    /// How often the most executed instruction of each function was.
    functions: HashMap<String, u64>,
}

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
    let [library, program, names @ ..] = arguments else { return Err("wrong arguments".into()) };
    // Named, for the running executable of a host under valgrind is valgrind.
    let worker = Worker::builder().wait(WaitPolicy::Spin).program(program).spawn()?;
    let module = worker.session()?.load(Module::ffi(library))?;
    let host_counts = std::env::current_exe()? == Path::new(program);
    // Taken by the side that is not counted: here by the host, otherwise by the called function.
    let pause: fn(u64) = if host_counts { |_| () } else { take_time };
    let add = module.function("add")?;
    let sum_six = module.function("six")?;
    let sum_eight = module.function("eight")?;
    let add_by_name = module.prototype("int32_t add(int32_t, int32_t)")?;
    let far_mark = module.function::<fn()>(MARK)?;
    let mark = || {
        if host_counts {
            hotcell_bench_mark();
            return Ok(());
        }
        far_mark.call()
    };
    for name in names {
        mark()?;
        for _ in 0..BATCHES {
            match name.as_str() {
                "typed, two i32" => two(&add, pause)?,
                "typed, six words" => six(&sum_six, pause)?,
                "typed, eight doubles" => eight(&sum_eight, pause)?,
                "by name, two i32" => by_name(&add_by_name, pause)?,
                other => return Err(format!("no such call: {other}").into()),
            }
            mark()?;
        }
    }
    if host_counts {
        // This is the side under valgrind, which knows no way to send the worker a signal. The worker goes with its host, as it does from any.
        std::process::exit(0);
    }
    drop(module);
    worker.dispose();
    Ok(())
}

/// Callgrind stops at its name.
///
/// # Safety
/// There is nothing to keep to. The name is given to no other function of this program, and the library's is looked up in the library only.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn hotcell_bench_mark() {
    black_box(());
}

/// A microsecond or two: a good many looks of the side that is slowed down by valgrind, but seldom so many that it goes on to the slow wait.
fn take_time(i: u64) {
    let looks = 10 + (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 58);
    (0..looks).for_each(|_| std::hint::spin_loop());
}

#[inline(never)]
fn two(add: &Function<fn(i32, i32) -> i32>, pause: fn(u64)) -> Result<()> {
    for i in 0..BATCH {
        pause(i);
        assert_eq!(add.call(black_box(2), black_box(3))?, 5);
    }
    Ok(())
}

#[inline(never)]
fn six(six: &Function<Six>, pause: fn(u64)) -> Result<()> {
    for i in 0..BATCH {
        pause(i);
        let [a, b, c, d, e, f] = black_box([1, 2, 3, 4, 5, 6]);
        assert_eq!(six.call(a, b, c, d, e, f)?, 21);
    }
    Ok(())
}

#[inline(never)]
fn eight(eight: &Function<Eight>, pause: fn(u64)) -> Result<()> {
    for i in 0..BATCH {
        pause(i);
        let [a, b, c, d, e, f, g, h] = black_box([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
        assert!(eight.call(a, b, c, d, e, f, g, h)? == 36.0);
    }
    Ok(())
}

#[inline(never)]
fn by_name(add: &DynFunction, pause: fn(u64)) -> Result<()> {
    for i in 0..BATCH {
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
    let chosen: Vec<_> = kept::KEPT
        .into_iter()
        .filter(|(name, ..)| only.is_none_or(|only| name.contains(only.as_str())))
        .filter(|(name, ..)| !quick || *name == "typed, two i32")
        .collect();
    let names: Vec<&str> = chosen.iter().map(|(name, ..)| *name).collect();
    let [host_now, worker_now] = [Side::Host, Side::Worker]
        .map(|side| count_calls(&names, side, &libraries[side as usize], folder.path()));
    let mut off = Vec::new();
    for (((name, host, worker), host_now), worker_now) in chosen.iter().zip(host_now?).zip(worker_now?) {
        println!("| {name:<20} | {host:>10} | {host_now:>5} | {worker:>12} | {worker_now:>5} |");
        for (side, kept, now) in [("host", *host, host_now), ("worker", *worker, worker_now)] {
            if cfg!(debug_assertions) {
                continue; // said below
            }
            let room = room(kept, compiler);
            if now > kept + room {
                off.push(format!(
                    "MORE THAN KEPT: {name}, {side}: {now} where {kept} are kept, and {room} more would do"
                ));
            }
            if now + room < kept {
                off.push(format!("FEWER THAN KEPT: {name}, {side}: {now} where {kept} are kept: keep {now}"));
            }
        }
    }
    if cfg!(debug_assertions) {
        println!(
            "built without optimisation: counted, and not compared with what is kept; `cargo bench` does that"
        );
    }
    for line in &off {
        println!("{line}");
    }
    Ok(off.is_empty())
}

fn missing(what: &str, need: bool) -> Result<bool> {
    eprintln!("instructions: NOTHING WAS COUNTED: {what}");
    Ok(!need)
}

/// By how much a count may be off the kept one: for one more instruction or 2 in 100 there are reasons in the compiler's mood, and in another compiler's for more.
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

/// The instructions of each of these calls on one side.
fn count_calls(names: &[&str], side: Side, library: &Path, folder: &Path) -> Result<Vec<u64>> {
    let mut clean: HashMap<&str, HashMap<u64, usize>> = HashMap::new();
    for _ in 0..ATTEMPTS {
        let open = |name: &&str| clean.get(*name).and_then(agreed).is_none();
        let open: Vec<&str> = names.iter().copied().filter(open).collect();
        if open.is_empty() {
            break;
        }
        let batches = profile(&open, side, library, folder)?;
        // The first part of each kind is what came before it.
        for (name, batches) in open.iter().zip(batches.chunks(BATCHES + 1)) {
            let counts = clean.entry(name).or_default();
            clean_counts(&batches[1..]).into_iter().for_each(|count| *counts.entry(count).or_default() += 1);
        }
    }
    let count = |name: &&str| {
        let seen = clean.get(name).ok_or("no such call")?;
        let busy =
            || format!("{name}: the machine is too busy: counts, and how many batches had them: {seen:?}");
        agreed(seen).ok_or_else(|| busy().into())
    };
    names.iter().map(count).collect()
}

/// The count that enough batches have, and more of them than all others together.
fn agreed(counts: &HashMap<u64, usize>) -> Option<u64> {
    let all: usize = counts.values().sum();
    let (count, batches) = counts.iter().max_by_key(|(_, batches)| **batches)?;
    (*batches >= AGREE && *batches * 2 > all).then_some(*count)
}

/// The count of each batch in which every call went the same way.
fn clean_counts(batches: &[Batch]) -> Vec<u64> {
    // A function that runs fewer times than there are calls is the batch's own frame if all batches have it, and else the other way of some call.
    let odd = |batch: &Batch| -> HashSet<String> {
        batch.functions.iter().filter(|(_, times)| **times < BATCH).map(|(name, _)| name.clone()).collect()
    };
    let mut odd_ones = batches.iter().map(odd);
    let Some(first) = odd_ones.next() else { return Vec::new() };
    let frame = odd_ones.fold(first, |frame, odd| frame.intersection(&odd).cloned().collect());
    let clean = |batch: &&Batch| odd(batch).is_subset(&frame);
    batches.iter().filter(clean).map(per_call).collect()
}

/// How many instructions are executed a whole number of times a call, each as often as it is. On the worker's side the mark is one more call.
fn per_call(batch: &Batch) -> u64 {
    let whole = |times: &u64| {
        let (each, rest) = (times / BATCH, times % BATCH);
        if rest == 0 || rest == each { each } else { 0 }
    };
    batch.times.values().map(whole).sum()
}

/// Runs these calls with one side under callgrind. Gives what was executed between the marks.
fn profile(names: &[&str], side: Side, library: &Path, folder: &Path) -> Result<Vec<Batch>> {
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
        "--combine-dumps=yes".into(),
        format!("--dump-before={MARK}"),
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
    command.arg("--make-calls").arg(library).arg(&program).args(names);
    command.stdin(Stdio::null());
    let status = pidfd::run_with_helper(&mut command)?;
    if !status.success() {
        let log = std::fs::read_to_string(folder.join("valgrind.log")).unwrap_or_default();
        return Err(format!("the program under valgrind: {status}\n{log}").into());
    }
    let batches =
        parse(&std::fs::read_to_string(&out).map_err(|error| format!("{}: {error}", out.display()))?)?;
    let marks = names.len() * (BATCHES + 1);
    if batches.len() < marks {
        return Err(format!("callgrind stopped at {} marks of {marks}", batches.len()).into());
    }
    Ok(batches)
}

/// Reads callgrind's format. Each mark starts a new part. In a function's part, lines `0xaddress line cost`; after a line `calls=…` comes one such line with the cost of the callee, which has its own lines.
fn parse(text: &str) -> Result<Vec<Batch>> {
    let mut batches: Vec<Batch> = Vec::new();
    let (mut skip, mut function) = (false, "");
    for line in text.lines() {
        if line.starts_with("part:") {
            batches.push(Batch::default());
            continue;
        }
        if let Some(name) = line.strip_prefix("fn=") {
            function = name;
            continue;
        }
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
        let batch = batches.last_mut().ok_or("callgrind wrote costs before the first part")?;
        let times = batch.times.entry(u64::from_str_radix(at, 16)?).or_default();
        *times += count.parse::<u64>()?;
        let most = batch.functions.entry(function.to_owned()).or_default();
        *most = (*most).max(*times);
    }
    if batches.is_empty() { Err("callgrind counted nothing".into()) } else { Ok(batches) }
}

//! What calls cost between two processes that both are awake: typed, by name, with bytes, with strings, and in bursts.
//!
//! ```text
//! cargo bench --bench call                    all groups
//! cargo bench --bench call -- buffer          those whose name has "buffer" in it
//! cargo bench --bench call -- --test          each once, as a test
//! ```
//!
//! Neither process is pinned: the numbers are those of the CPUs that the scheduler chose. For rows beside their floors, with
//! percentiles and labelled CPUs, see the package in `benches/compare`.

mod common;

use common::Library;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hotcell::{In, Module, Out, Value, Worker};
use std::ffi::CString;
use std::hint::black_box;

const SIZES: [(usize, &str); 4] =
    [(64, "64 B"), (1 << 10, "1 KiB"), (64 << 10, "64 KiB"), (1 << 20, "1 MiB")];
const BURSTS: [u64; 4] = [1, 8, 64, 255];

fn module() -> (Library, Module) {
    let library = Library::compile();
    let session = Worker::spawn().expect("a worker starts").session().expect("a session opens");
    let module = library.load(&session);
    (library, module)
}

fn numbers(c: &mut Criterion) {
    let (_library, module) = module();
    let add = module.function::<fn(i32, i32) -> i32>("add").unwrap();
    let by_name = module.prototype("int add(int, int)").unwrap();
    let libc = module.session().load("libc.so.6").unwrap();
    let labs = libc.function::<fn(i64) -> i64>("labs").unwrap();
    assert_eq!(add.call(-2, 5).unwrap(), 3);
    assert_eq!(by_name.call((-2, 5)).unwrap(), Value::Signed(3));
    assert_eq!(labs.call(-5).unwrap(), 5);

    let mut group = c.benchmark_group("call");
    group.bench_function("typed add(i32, i32)", |b| b.iter(|| add.call(black_box(2), 3).unwrap()));
    group.bench_function("typed labs(i64)", |b| b.iter(|| labs.call(black_box(-2)).unwrap()));
    group.bench_function("by name add(i32, i32)", |b| b.iter(|| by_name.call((black_box(2), 3)).unwrap()));
    group.bench_function("ping", |b| b.iter(|| module.session().ping().unwrap()));
    group.finish();
}

fn buffers(c: &mut Criterion) {
    let (_library, module) = module();
    let take = module.function::<fn(In<[u8]>, usize) -> u32>("take").unwrap();
    let give = module.function::<fn(Out<[u8]>, usize)>("give").unwrap();
    let take_block = module.function::<fn(hotcell::Block, usize) -> u32>("take").unwrap();

    let mut group = c.benchmark_group("buffer in");
    for (bytes, name) in SIZES {
        let mut input = vec![1u8; bytes];
        input[bytes - 1] = 5;
        assert_eq!(take.call(&input, bytes).unwrap(), 6);
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_function(name, |b| b.iter(|| take.call(black_box(&input), bytes).unwrap()));
    }
    group.finish();

    let mut group = c.benchmark_group("buffer out");
    for (bytes, name) in SIZES {
        let mut output = vec![0u8; bytes];
        give.call(&mut output, bytes).unwrap();
        assert_eq!((output[0], output[bytes - 1]), (7, 9));
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_function(name, |b| {
            b.iter(|| {
                give.call(&mut output, bytes).unwrap();
                black_box(&output);
            });
        });
    }
    group.finish();

    // Bytes that stay in shared memory cost the same, however many they are.
    let mut group = c.benchmark_group("buffer in a block");
    for (bytes, name) in SIZES {
        let block = module.session().block(bytes as u64).unwrap();
        assert!(block.write(0, &[1]) && block.write(bytes as u64 - 1, &[5]));
        assert_eq!(take_block.call(&block, bytes).unwrap(), 6);
        group.bench_function(name, |b| b.iter(|| take_block.call(black_box(&block), bytes).unwrap()));
    }
    group.finish();
}

fn strings(c: &mut Criterion) {
    let (_library, module) = module();
    let length = module.function::<fn(In<str>) -> u64>("length").unwrap();
    let name = module.function::<fn() -> CString>("name").unwrap();
    let story = module.function::<fn() -> CString>("story").unwrap();
    let long = "s".repeat(4000);
    assert_eq!(length.call("a name of 20 letters").unwrap(), 20);
    assert_eq!(length.call(&long).unwrap(), 4000);
    assert_eq!(name.call().unwrap().to_str(), Ok("a name of 20 letters"));
    assert_eq!(story.call().unwrap().to_str(), Ok(&*long));

    let mut group = c.benchmark_group("string");
    group.bench_function("in, 20 B", |b| b.iter(|| length.call(black_box("a name of 20 letters")).unwrap()));
    group.bench_function("in, 4000 B", |b| b.iter(|| length.call(black_box(&long)).unwrap()));
    group.bench_function("out, 20 B", |b| b.iter(|| name.call().unwrap()));
    // Longer than the room that a call reserves for a returned string: fetched in a second round trip.
    group.bench_function("out, 4000 B", |b| b.iter(|| story.call().unwrap()));
    group.finish();
}

fn bursts(c: &mut Criterion) {
    let (_library, module) = module();
    let add = module.function::<fn(i32, i32) -> i32>("add").unwrap();
    let mut tickets = Vec::new();
    let mut burst = |calls: u64| -> i64 {
        tickets.extend((0..calls).map(|_| add.submit(black_box(2), 3).unwrap()));
        tickets.drain(..).map(|ticket| i64::from(ticket.wait().unwrap())).sum()
    };
    let mut group = c.benchmark_group("submit, then wait");
    for calls in BURSTS {
        assert_eq!(burst(calls).unsigned_abs(), 5 * calls);
        group.throughput(Throughput::Elements(calls));
        group.bench_with_input(BenchmarkId::from_parameter(calls), &calls, |b, calls| {
            b.iter(|| burst(*calls));
        });
    }
    group.finish();
}

criterion_group!(benches, numbers, buffers, strings, bursts);
criterion_main!(benches);

//! try
use hotcell::*;
fn main() -> Result<(), Error> {
    let t = std::time::Instant::now();
    let worker = Worker::spawn()?;
    println!("spawn {:?}", t.elapsed());
    let session = worker.session()?;
    println!("session {:?}", t.elapsed());
    let zlib = session.load(Module::ffi("libz.so.1"))?;
    println!("load {:?}", t.elapsed());
    let crc32 = zlib.function::<fn(u64, In<[u8]>, u32) -> u64>("crc32")?;
    println!("{:x} {:?}", crc32.call(0, b"hello", 5)?, t.elapsed());
    let v = zlib.function::<fn() -> CString>("zlibVersion")?;
    println!("{:?}", v.call()?);
    let m = session.load("libm.so.6")?;
    let pow = m.function::<fn(f64, f64) -> f64>("pow")?;
    println!("{}", pow.call(2.0, 0.5)?);
    let c = session.load("libc.so.6")?;
    let abs = c.function::<fn(i32) -> i32>("abs")?;
    for _ in 0..5 {
        let t = std::time::Instant::now();
        for i in 0..1_000_000 { assert_eq!(abs.call(-i)?, i); }
        println!("abs {:?}", t.elapsed() / 1_000_000);
    }
    let dabs = c.prototype("int abs(int)")?;
    let t = std::time::Instant::now();
    for i in 0..1_000_000 { let v: i32 = dabs.call((-i,))?.try_into()?; assert_eq!(v, i); }
    println!("dyn abs {:?}", t.elapsed() / 1_000_000);
    let t = std::time::Instant::now();
    let mut tickets = std::collections::VecDeque::new();
    for i in 0..1_000_000 {
        if tickets.len() == 100 { let (j, t): (i32, Ticket<'_, fn(i32)->i32>) = tickets.pop_front().unwrap(); assert_eq!(t.wait()?, j); }
        tickets.push_back((i, abs.submit(-i)?));
    }
    println!("submit {:?}", t.elapsed() / 1_000_000);
    drop(tickets);
    println!("{:?}", session.load("libnope.so"));
    let strlen = c.function::<fn(RemotePtr) -> usize>("strlen")?;
    let t = std::time::Instant::now();
    match strlen.call(RemotePtr::NULL) { Ok(_) => unreachable!(), Err(e) => println!("{:?} {e}", t.elapsed()) }
    println!("{}", abs.call(1).unwrap_err());
    Ok(())
}
use std::ffi::CString;

//! The crash page of a worker that wrote anything: what is read is bounded and printable.
#![no_main]

use hotcell_channel::crash::{FRAMES_MAX, INSTRUCTION_BYTES_MAX};
use hotcell_channel::region::CrashRegion;
use libfuzzer_sys::fuzz_target;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

fuzz_target!(|bytes: &[u8]| {
    static PAGE: OnceLock<(File, CrashRegion)> = OnceLock::new();
    let (file, region) = PAGE.get_or_init(|| {
        let fd = CrashRegion::create().unwrap();
        let region = CrashRegion::open(fd.as_fd()).unwrap();
        (File::from(fd), region)
    });
    let mut page = [0; hotcell_channel::crash::CRASH_PAGE_BYTES];
    let bytes = &bytes[..bytes.len().min(page.len())];
    page[..bytes.len()].copy_from_slice(bytes);
    file.write_all_at(&page, 0).unwrap();
    if let Some(facts) = region.page().read() {
        assert!((1..=64).contains(&facts.signal));
        assert!(facts.frames.len() <= FRAMES_MAX && facts.instruction.len() <= INSTRUCTION_BYTES_MAX);
        let text = facts.backtrace().to_string();
        assert!(text.chars().all(|c| c == '\n' || !c.is_control()), "{text:?}");
        assert!(text.lines().count() <= FRAMES_MAX, "{text:?}");
    }
});

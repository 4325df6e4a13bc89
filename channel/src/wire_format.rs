//! Compares `docs/wire-format.md`, the normative description of every shared byte, with the code.

use crate::session::{Answer, FailureKind, Request};
use crate::signature::{ARGS_MAX, Signature, Type};
use crate::wait::Policy;
use crate::{control, crash, layout, placement, region, session, slot, stream};
use control::{Hello, Scarce, SessionLimits, ToHost, ToWorker, WorkerLimits};
use placement::{Failure, Placed, Wanted, Wish};
use serde::{Deserialize, Serialize};

/// A struct that lies in shared memory, as the code has it.
pub(crate) trait Shared: Sized {
    /// Name, offset and size of every field.
    fn fields() -> Vec<(&'static str, usize, usize)>;
}

/// Implements [`Shared`]. To be used where the struct is declared, since its fields are private; the pattern makes sure that none is left out.
macro_rules! shared {
    ($name:ident: $($field:ident),+) => {
        #[cfg(all(test, not(loom)))]
        impl crate::wire_format::Shared for $name {
            fn fields() -> Vec<(&'static str, usize, usize)> {
                fn size<F>(_: fn(&$name) -> &F) -> usize {
                    size_of::<F>()
                }
                let _all_there_are = |Self { $($field: _),+ }: &Self| ();
                vec![$((stringify!($field), std::mem::offset_of!($name, $field), size(|s| &s.$field))),+]
            }
        }
    };
}
pub(crate) use shared;

fn document() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/wire-format.md");
    std::fs::read_to_string(path).expect("docs/wire-format.md is part of the repository")
}

/// The rows of all tables whose header starts with these columns: their cells without back quotes.
fn rows(header: &[&str]) -> Vec<Vec<String>> {
    let document = document();
    let mut found = Vec::new();
    let mut wanted = false;
    let mut in_table = false;
    for line in document.lines() {
        let cells: Vec<String> =
            line.trim_matches('|').split('|').map(|cell| cell.trim().trim_matches('`').to_owned()).collect();
        if !line.starts_with('|') {
            in_table = false;
        } else if !in_table {
            in_table = true;
            wanted = cells.len() >= header.len() && cells.iter().zip(header).all(|(cell, name)| cell == name);
        } else if wanted && !cells[0].starts_with("---") {
            found.push(cells);
        }
    }
    assert!(!found.is_empty(), "no table {header:?}");
    found
}

fn number(text: &str) -> u64 {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    }
    .unwrap_or_else(|_| panic!("{text:?} is no number"))
}

/// The table of fields under the heading of a struct, and the size in that heading.
fn documented_struct(name: &str) -> (usize, Vec<(String, usize, usize)>) {
    let document = document();
    let (_, rest) = document.split_once(&format!("\n### `{name}` (")).expect(name);
    let (bytes, rest) = rest.split_once(" bytes)\n").expect(name);
    let section = rest.split("\n#").next().unwrap_or(rest);
    let cells = |line: &str| line.trim_matches('|').split('|').map(|c| c.trim().to_owned()).collect();
    let lines: Vec<Vec<String>> = section.lines().filter(|line| line.starts_with('|')).map(cells).collect();
    assert_eq!(lines[0][..3], ["offset", "bytes", "field"], "{name}");
    let size = |text: &str| usize::try_from(number(text)).unwrap();
    let fields = lines
        .iter()
        .skip(2)
        .take_while(|row| row[0].bytes().all(|b| b.is_ascii_digit()))
        .map(|row| (row[2].trim_matches('`').to_owned(), size(&row[0]), size(&row[1])))
        .collect();
    (size(bytes), fields)
}

fn compare_struct<T: Shared>(name: &str) {
    let (bytes, documented) = documented_struct(name);
    let fields: Vec<(String, usize, usize)> =
        T::fields().into_iter().map(|(name, offset, bytes)| (name.to_owned(), offset, bytes)).collect();
    assert_eq!(documented, fields, "{name}");
    assert_eq!(bytes, size_of::<T>(), "{name}");
}

#[test]
fn structs_in_shared_memory_lie_as_documented() {
    compare_struct::<slot::Slot>("Slot");
    compare_struct::<slot::Doorbell>("Doorbell");
    compare_struct::<slot::Progress>("Progress");
    compare_struct::<stream::Sleepers>("Sleepers");
    compare_struct::<stream::Reply>("Reply");
    compare_struct::<stream::Stream>("Stream");
    compare_struct::<region::SessionHeader>("SessionHeader");
    compare_struct::<crash::CrashPage>("CrashPage");
    compare_struct::<crash::FrameCell>("FrameCell");
    compare_struct::<crash::RefusalCell>("RefusalCell");
}

#[test]
fn constants_are_as_documented() {
    macro_rules! constants {
        ($($module:ident: $($name:ident)+;)+) => {
            vec![$($((stringify!($name), $module::$name as u64)),+),+]
        };
    }
    let mut expected = constants! {
        layout: MAGIC PROTOCOL_VERSION PAGE_BYTES HUGE_PAGE_BYTES PROGRESS_OFFSET DOORBELL_OFFSET SLEEPERS_OFFSET DIRECT_OFFSET RING_OFFSET
            SCRATCH_BYTES PAYLOAD_ALIGN ARENA_BYTES_MAX FUNCTIONS_BASE;
        stream: RECORDS RECORD_WORDS AWAKE ASLEEP;
        slot: WORDS_MAX SLOTS_MAX FUNCTION_BITS FUNCTIONS_MAX IDLE REQUEST REPLY UPCALL CLOSED REFUSED PARKED;
        control: FRAME_BYTES_MAX;
        session: DIRECTORY_BYTES_MAX STRING_LONGER STRING_LOST STRING_NULL STRING_WORDS NOP DIRECTORY READ WRITE ALLOCATE FREE READ_STRING
            CLOSE MEMORY STREAM STREAM_END OK FAULT TOO_LONG UNKNOWN_BLOCK NO_MEMORY BAD_REQUEST;
        crash: CRASH_PAGE_BYTES FRAMES_MAX REFUSALS_MAX;
    };
    expected.push(("ARGS_MAX", ARGS_MAX as u64));
    expected.extend(crash::WIRE_CONSTANTS.iter().map(|(name, value)| (*name, u64::from(*value))));
    let documented = rows(&["name", "value"]);
    for (name, value) in &expected {
        let row = documented.iter().find(|row| row[0] == *name);
        let row = row.unwrap_or_else(|| panic!("{name} is not documented"));
        assert_eq!(number(&row[1]), *value, "{name}");
    }
    for row in &documented {
        assert!(expected.iter().any(|(name, _)| *name == row[0]), "{} is in no code", row[0]);
    }
    assert_eq!(session::FIXED_MAX, session::STREAM_END);
    assert_eq!(
        document().lines().next(),
        Some(&*format!("# Wire format, version {}", layout::PROTOCOL_VERSION))
    );
    assert!(document().contains(&format!("\n**{}** (", layout::PROTOCOL_VERSION)), "the version history");
}

#[test]
fn the_parts_of_a_region_lie_as_documented() {
    let rows = rows(&["offset", "bytes", "what", "written by"]);
    let part = |what: &str| {
        rows.iter()
            .find(|row| row[2].contains(what))
            .map(|row| (number(&row[0]), row[1].clone()))
            .expect(what)
    };
    assert_eq!(part("SessionHeader"), (0, "128".into()));
    assert_eq!(part("Progress"), (layout::PROGRESS_OFFSET, "128".into()));
    assert_eq!(part("Doorbell"), (layout::DOORBELL_OFFSET, "128".into()));
    assert_eq!(part("Sleepers"), (layout::SLEEPERS_OFFSET, "128".into()));
    assert_eq!(part("the direct"), (layout::DIRECT_OFFSET, "128".into()));
    assert_eq!(part("the ring"), (layout::RING_OFFSET, "128 × slots".into()));
    let geometry = layout::Geometry { slots: 3, arena_bytes: layout::SCRATCH_BYTES, huge_pages: false };
    assert_eq!(geometry.stream_offset(), (640 + 128 * 3_u64).next_multiple_of(4096));
    assert_eq!(geometry.arena_offset(), geometry.stream_offset() + 20480);
}

#[test]
fn the_hello_is_as_documented() {
    let (bytes, fields) = documented_struct("Hello");
    let frame = Hello { magic: 0x0101, protocol: 0x0202, pid: 0x0303, layout_hash: 0x0404 }.encode();
    assert_eq!(bytes, frame.len());
    let mut end = 0;
    for (name, offset, bytes) in fields {
        let mut word = [0; 8];
        word[..bytes].copy_from_slice(&frame[offset..offset + bytes]);
        let expected = match &*name {
            "magic" => 0x0101,
            "protocol" => 0x0202,
            "pid" => 0x0303,
            "layout_hash" => 0x0404,
            "zero" => 0,
            other => panic!("no field {other}"),
        };
        assert_eq!(u64::from_le_bytes(word), expected, "{name}");
        assert_eq!(offset, end, "{name}");
        end = offset + bytes;
    }
    assert_eq!(end, frame.len());
}

fn same<M: Serialize + for<'a> Deserialize<'a> + PartialEq + std::fmt::Debug>(row: &[String], message: &M) {
    let example: Vec<u8> = row[3].split(' ').map(|b| u8::from_str_radix(b, 16).unwrap()).collect();
    let hex: Vec<String> = control::encode(message).iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(row[3], hex.join(" "), "{}", row[0]);
    assert_eq!(number(&row[1]), u64::from(example[0]), "{}", row[0]);
    assert_eq!(control::decode::<M>(&example).as_ref(), Ok(message), "{}", row[0]);
}

#[test]
fn messages_are_encoded_as_documented() {
    let rows = rows(&["message", "variant", "fields", "example"]);
    assert_eq!(rows.len(), 13);
    for row in &rows {
        match &*row[0] {
            "ToWorker::Open" => {
                let (session, slots, arena_bytes, stack_bytes) = (7, 256, 1 << 20, 8 << 20);
                let policy = Policy::Adaptive;
                let placement = Wanted { cpu: Some(3), prefault_bytes: 1 << 20, ..Wanted::default() };
                same(row, &ToWorker::Open { session, slots, arena_bytes, policy, stack_bytes, placement });
            }
            "ToHost::Opened" => same(row, &ToHost::Opened { session: 7, arena_address: 0x5000 }),
            "ToHost::Refused" => same(row, &ToHost::Refused { session: 7, reason: "no".into() }),
            "ToWorker::LimitWorker" => {
                let limits = WorkerLimits {
                    data_bytes: Some(1 << 20),
                    cpu_time_ns: Some(1000),
                    open_files: Some(64),
                    user_processes: None,
                    file_bytes: None,
                    core_bytes: 0,
                };
                same(row, &ToWorker::LimitWorker(limits));
            }
            "ToWorker::LimitSession" => {
                let limits = SessionLimits {
                    cpu_time_per_call_ns: Some(1000),
                    cpu_time_ns: None,
                    memory_bytes: Some(1 << 20),
                };
                same(row, &ToWorker::LimitSession { session: 7, limits });
            }
            "ToHost::Scarce" => same(row, &ToHost::Scarce { session: 7, what: Scarce::OpenFiles }),
            "ToHost::Placed" => {
                let placed = Placed { cpu: Some(3), ..Placed::default() };
                same(row, &ToHost::Placed { session: 7, arena_address: 0x5000, placed });
            }
            "ToHost::Unplaced" => {
                let failure = Failure { wish: Wish::RealTime, errno: libc::EPERM };
                same(row, &ToHost::Unplaced { session: 7, failure });
            }
            "Request::Load" => same(row, &Request::Load { name: b"libm".into(), now: true, global: false }),
            "Request::Resolve" => {
                let signature = Signature::new([Type::F64, Type::F64], Type::F64);
                same(row, &Request::Resolve { module: 0, symbol: "pow".into(), signature, errno: false });
            }
            "Answer::Loaded" => same(row, &Answer::Loaded(3)),
            "Answer::Resolved" => same(row, &Answer::Resolved(16)),
            "Answer::Failed" => {
                same(row, &Answer::Failed { kind: FailureKind::MissingSymbol, detail: "no".into() });
            }
            other => panic!("no message {other}"),
        }
    }
}

/// Each documented code decodes to the value of that name, and the next code to none.
fn codes<T: for<'a> Deserialize<'a>>(table: &str, name: impl Fn(&T) -> String) {
    let rows = rows(&[table, "code"]);
    for (at, row) in rows.iter().enumerate() {
        let code = u8::try_from(number(&row[1])).unwrap();
        assert_eq!(usize::from(code), at, "{table} {}", row[0]);
        let value = control::decode::<T>(&[code]).unwrap_or_else(|_| panic!("{table} {code}"));
        assert_eq!(name(&value), row[0]);
    }
    let next = u8::try_from(rows.len()).unwrap();
    assert!(control::decode::<T>(&[next]).is_err(), "{table} {next} is not documented");
}

#[test]
fn codes_are_as_documented() {
    codes::<Type>("type", |t| t.name().to_owned());
    codes::<Policy>("policy", |p| format!("{p:?}"));
    codes::<Wish>("wish", |w| format!("{w:?}"));
    codes::<FailureKind>("failure kind", |k| format!("{k:?}"));
    codes::<Scarce>("scarce", |s| format!("{s:?}"));
}

//! Frames of the control socket and of the directory: no bytes make the decoders panic, and what is decoded survives being encoded.
#![no_main]

use hotcell_channel::control::{self, Hello, ToHost, ToWorker};
use hotcell_channel::session::{Answer, Request};
use libfuzzer_sys::fuzz_target;

macro_rules! comes_back {
    ($Message:ty, $frame:expr) => {
        if let Ok(message) = control::decode::<$Message>($frame) {
            assert_eq!(control::decode::<$Message>(&control::encode(&message)), Ok(message));
        }
    };
}

fuzz_target!(|frame: &[u8]| {
    if let Ok(hello) = Hello::check(frame) {
        assert_eq!(Hello::check(&hello.encode()), Ok(hello));
    }
    comes_back!(ToHost, frame);
    comes_back!(ToWorker, frame);
    comes_back!(Request, frame);
    comes_back!(Answer, frame);
});

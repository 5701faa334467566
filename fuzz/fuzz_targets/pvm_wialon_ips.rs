//! Bytes of a wialon_ips device on a socket, cut anywhere.

#![no_main]

use std::sync::{Arc, LazyLock};

use fieldline_pvm::Program;
use libfuzzer_sys::fuzz_target;

static PROGRAM: LazyLock<Arc<Program>> = LazyLock::new(|| fieldline_fuzz::built_in("wialon_ips"));

fuzz_target!(|input: &[u8]| fieldline_fuzz::socket(&PROGRAM, input));

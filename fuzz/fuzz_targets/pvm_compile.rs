//! Any source compiles or says why; what compiles lays out stably and survives any bytes.

#![no_main]

use std::sync::Arc;

use fieldline_model::Transport;
use fieldline_pvm::Options;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (&str, &[u8])| {
    let (source, bytes) = input;
    if let Ok(formatted) = fieldline_pvm::format(source) {
        assert_eq!(fieldline_pvm::format(&formatted).as_ref(), Ok(&formatted));
    }
    match fieldline_pvm::compile("fuzz", source) {
        Err(found) => {
            assert!(!found.items().is_empty());
            let _shown = found.to_string();
        }
        Ok(program) => {
            let _listing = program.disassemble();
            let program = Arc::new(program);
            for transport in [Transport::Tcp, Transport::Udp] {
                let options = Options { limits: fieldline_fuzz::limits(), ..Options::new(transport) };
                fieldline_fuzz::run(&program, options, &[bytes]);
            }
        }
    }
});

//! What the fuzz targets of protocols share.

use std::collections::BTreeMap;
use std::sync::Arc;

use fieldline_model::{Decoded, Timestamp, Transport};
use fieldline_pvm::{Limits, Options, Program, Session, Step};

/// The built-in protocol `name`.
pub fn built_in(name: &str) -> Arc<Program> {
    let (_, source) = fieldline_pvm::library::built_in().iter().find(|(n, _)| *n == name).unwrap();
    Arc::new(fieldline_pvm::compile(name, source).unwrap())
}

/// What a session gives: messages, replies, frame lengths, classes of errors.
pub type Seen = (Vec<Decoded>, Vec<u8>, Vec<usize>, Vec<String>);

/// Limits that keep one input quick.
pub fn limits() -> Limits {
    Limits { steps_max: 100_000, frame_bytes_max: 64 << 10, ..Limits::default() }
}

/// Runs `chunks` as one connection; every step must make progress.
pub fn run(program: &Arc<Program>, options: Options, chunks: &[&[u8]]) -> Seen {
    let mut session = Session::new(Arc::clone(program), options);
    let mut seen = Seen::default();
    let total: usize = chunks.iter().map(|c| c.len()).sum();
    let mut steps = 0;
    for at in 0..=chunks.len() {
        match chunks.get(at) {
            Some(chunk) => session.feed(chunk),
            None => session.end_of_input(),
        }
        loop {
            steps += 1;
            assert!(steps <= 3 * total + 2 * chunks.len() + 4, "no progress");
            match session.step(Timestamp::default()) {
                Step::NeedMore => break,
                Step::Login { ident, .. } if ident.len() % 7 == 3 => session.login_refused(),
                Step::Login { .. } => session.login_accepted(&BTreeMap::new()),
                Step::Frame(frame) => {
                    seen.0.extend(frame.messages);
                    seen.1.extend(frame.replies.iter().flat_map(|r| r.bytes.iter()));
                    seen.2.push(frame.bytes.len());
                    seen.3.extend(frame.error.map(|e| e.class.to_string()));
                }
            }
        }
    }
    seen
}

/// Bytes on a socket, cut anywhere: the first byte chooses transport, options and the cut.
pub fn socket(program: &Arc<Program>, input: &[u8]) {
    let [choice, cut, bytes @ ..] = input else { return };
    let transport = if choice & 1 == 0 { Transport::Tcp } else { Transport::Udp };
    let options =
        Options { limits: limits(), lenient: choice & 2 != 0, ..Options::new(transport) };
    let whole = run(program, options, &[bytes]);
    let at = usize::from(*cut) * bytes.len() / 255;
    let (head, tail) = bytes.split_at(at);
    assert_eq!(run(program, options, &[head, tail]), whole, "chunking matters");
    if choice & 4 != 0 {
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(run(program, options, &single), whole, "chunking matters");
    }
    let traced = Options { trace: true, ..options };
    assert_eq!(run(program, traced, &[bytes]), whole, "tracing matters");
}

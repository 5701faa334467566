//! What must hold for any source, any bytes and any cut of a stream.

use std::collections::BTreeMap;
use std::sync::Arc;

use fieldline_model::value::from_hex;
use fieldline_model::{Decoded, Timestamp, Transport};
use fieldline_pvm::{Limits, Options, Program, Session, Step, library};
use proptest::prelude::*;
use proptest::strategy::ValueTree;

use crate::vectors::{program, shared};

/// Everything of a session that its caller sees.
#[derive(Debug, Default, PartialEq)]
struct Seen {
    logins: Vec<String>,
    messages: Vec<Decoded>,
    replies: Vec<u8>,
    errors: Vec<(String, usize)>,
    frames: Vec<usize>,
}

fn run(program: &Arc<Program>, options: Options, chunks: &[&[u8]], identified: bool) -> Seen {
    let mut session = Session::new(Arc::clone(program), options);
    if identified {
        session.identify("1", &BTreeMap::new());
    }
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
                Step::Login { ident, .. } => {
                    // Some devices are unknown.
                    if ident.len() % 7 == 3 {
                        session.login_refused();
                    } else {
                        session.login_accepted(&BTreeMap::new());
                    }
                    seen.logins.push(ident);
                }
                Step::Frame(frame) => {
                    seen.frames.push(frame.bytes.len());
                    seen.errors.extend(frame.error.map(|e| (e.class.to_string(), e.offset)));
                    seen.messages.extend(frame.messages);
                    seen.replies.extend(frame.replies.iter().flat_map(|r| r.bytes.iter()));
                }
            }
        }
    }
    seen
}

/// Frames of a protocol's vectors.
fn samples(name: &str, transport: &str) -> Vec<Vec<u8>> {
    let Some(text) = shared("telematics.json") else { return vec![b"#P#\r\n".to_vec()] };
    let file: serde_json::Value = serde_json::from_str(&text).unwrap();
    let vectors = file["vectors"].as_array().unwrap();
    let wanted = vectors.iter().filter(|v| v["protocol"] == name && v["transport"] == transport);
    wanted.map(|v| from_hex(v["hex"].as_str().unwrap()).unwrap()).collect()
}

const PROTOCOLS: [&str; 2] = ["teltonika", "wialon_ips"];

/// Cuts `bytes` where `cuts` say.
fn cut<'a>(bytes: &'a [u8], cuts: &[usize]) -> Vec<&'a [u8]> {
    let mut places: Vec<usize> = cuts.iter().map(|c| c % (bytes.len() + 1)).collect();
    places.extend([0, bytes.len()]);
    places.sort_unstable();
    places.windows(2).map(|w| &bytes[w[0]..w[1]]).collect()
}

#[test]
fn every_vector_gives_the_same_in_any_chunking() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    for name in PROTOCOLS {
        let program = program(name).unwrap();
        for frame in samples(name, "tcp") {
            for identified in [false, true] {
                let options = Options::new(Transport::Tcp);
                let whole = run(&program, options, &[&frame], identified);
                let bytes: Vec<&[u8]> = frame.chunks(1).collect();
                assert_eq!(run(&program, options, &bytes, identified), whole);
                let traced = Options { trace: true, ..options };
                assert_eq!(run(&program, traced, &[&frame], identified), whole);
                let cuts = proptest::collection::vec(0_usize..4_096, 0..8);
                for _ in 0..4 {
                    let cuts = cuts.new_tree(&mut runner).unwrap().current();
                    assert_eq!(run(&program, options, &cut(&frame, &cuts), identified), whole);
                }
            }
        }
    }
}

/// Words that programs are made of, so that random sources get past the lexer.
fn soup() -> impl Strategy<Value = String> {
    let words: Vec<&'static str> = "protocol p \"d\" transport tcp udp on rule r ( ) { } [ ] , : = == < > + - * / % & | ? .. # #a #io x x\"01\" \
        u8 u16 u64 s32 f32 f64 bytes text rest until or end peek if else switch repeat to within message attempt login reply send answer close \
        done break skip check fail error lenient session var define table setting bool int true false null 1 0 255 1e-7 \"s\" @2007-01-01 \
        session.x messages left number size inflate crc16_arc join datetime unless in and not ~ command param expect"
        .split_whitespace()
        .collect();
    let word = prop_oneof![
        8 => proptest::sample::select(words).prop_map(str::to_owned),
        2 => Just("\n".to_owned()),
        1 => ".{0,3}",
    ];
    proptest::collection::vec(word, 0..120).prop_map(|words| words.join(" "))
}

/// A built-in program with some of its bytes changed.
fn mutated() -> impl Strategy<Value = String> {
    let sources: Vec<&'static str> =
        library::built_in().iter().map(|(_, source)| *source).collect();
    let change = (any::<prop::sample::Index>(), ".{0,4}", 0_usize..12);
    (proptest::sample::select(sources), proptest::collection::vec(change, 1..6)).prop_map(
        |(source, changes)| {
            let mut text: Vec<char> = source.chars().collect();
            for (at, insert, remove) in changes {
                let at = at.index(text.len());
                let to = (at + remove).min(text.len());
                text.splice(at..to, insert.chars());
            }
            text.into_iter().collect()
        },
    )
}

fn small() -> Limits {
    Limits { steps_max: 20_000, frame_bytes_max: 4_096, messages_max: 64, ..Limits::default() }
}

fn compile_and_run(source: &str, bytes: &[u8]) {
    if let Ok(formatted) = fieldline_pvm::format(source) {
        assert_eq!(fieldline_pvm::format(&formatted).as_ref(), Ok(&formatted));
    }
    match fieldline_pvm::compile("soup", source) {
        Err(found) => {
            assert!(!found.items().is_empty());
            let _shown = found.to_string();
        }
        Ok(program) => {
            let _listing = program.disassemble();
            let program = Arc::new(program);
            for transport in [Transport::Tcp, Transport::Udp] {
                for (lenient, trace) in [(false, false), (true, true)] {
                    let options = Options { transport, limits: small(), lenient, trace };
                    let _seen = run(&program, options, &[bytes], true);
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_text_compiles_or_says_why(source in "\\PC{0,400}") {
        compile_and_run(&source, &[]);
    }

    #[test]
    fn any_words_compile_or_say_why(source in soup(), bytes: Vec<u8>) {
        compile_and_run(&source, &bytes);
        compile_and_run(&format!("protocol p \"d\"\ntransport tcp\non tcp {{\n{source}\n}}"), &bytes);
    }

    #[test]
    fn changed_programs_compile_or_say_why(source in mutated(), bytes in any::<prop::sample::Index>()) {
        let samples = samples("teltonika", "tcp");
        compile_and_run(&source, &samples[bytes.index(samples.len())]);
    }

    #[test]
    fn any_bytes_are_survived_and_chunking_does_not_matter(
        name in proptest::sample::select(PROTOCOLS.to_vec()),
        bytes in proptest::collection::vec(any::<u8>(), 0..300),
        cuts in proptest::collection::vec(any::<usize>(), 0..6),
        identified: bool,
        udp: bool,
        lenient: bool,
    ) {
        let program = program(name).unwrap();
        let transport = if udp { Transport::Udp } else { Transport::Tcp };
        let options = Options { lenient, limits: small(), ..Options::new(transport) };
        let whole = run(&program, options, &[&bytes], identified);
        prop_assert_eq!(run(&program, options, &cut(&bytes, &cuts), identified), whole);
    }

    #[test]
    fn changed_frames_are_survived_and_chunking_does_not_matter(
        name in proptest::sample::select(PROTOCOLS.to_vec()),
        pick in proptest::collection::vec(any::<prop::sample::Index>(), 1..4),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cuts in proptest::collection::vec(any::<usize>(), 0..6),
        udp: bool,
        lenient: bool,
    ) {
        let program = program(name).unwrap();
        let samples = samples(name, if udp { "udp" } else { "tcp" });
        let mut bytes: Vec<u8> = pick.iter().flat_map(|p| samples[p.index(samples.len())].clone()).collect();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let transport = if udp { Transport::Udp } else { Transport::Tcp };
        let options = Options { lenient, ..Options::new(transport) };
        let whole = run(&program, options, &[&bytes], true);
        prop_assert_eq!(&run(&program, options, &cut(&bytes, &cuts), true), &whole);
        let traced = run(&program, Options { trace: true, ..options }, &[&bytes], true);
        prop_assert_eq!(&traced, &whole);
    }
}

#[test]
fn a_frame_without_end_is_cut_off() {
    for (name, head) in [("teltonika", "00000000 7FFFFFFF 08"), ("wialon_ips", "23 44 23")] {
        let program = program(name).unwrap();
        let options = Options { limits: small(), ..Options::new(Transport::Tcp) };
        let mut session = Session::new(program, options);
        session.identify("1", &BTreeMap::new());
        session.feed(&from_hex(head).unwrap());
        let mut fed = 0;
        let frame = loop {
            match session.step(Timestamp::default()) {
                Step::Frame(frame) => break frame,
                _ => {
                    fed += 64;
                    assert!(fed <= 8_192, "{name}: nothing stops it");
                    session.feed(&[b'1'; 64]);
                }
            }
        };
        assert_eq!(
            frame.error.map(|e| e.class.to_string()).as_deref(),
            Some("frame_too_large"),
            "{name}"
        );
        assert_eq!(frame.close, Some(fieldline_model::CloseCode::FrameTooLarge));
    }
}

#[test]
fn a_stopped_search_does_not_begin_anew() {
    // A quadratic search over these pieces would take minutes.
    let program = program("wialon_ips").unwrap();
    let limits = Limits { frame_bytes_max: 64 << 20, steps_max: u64::MAX, ..Limits::default() };
    let mut session = Session::new(program, Options { limits, ..Options::new(Transport::Tcp) });
    session.identify("1", &BTreeMap::new());
    session.feed(b"#D#");
    for _ in 0..400_000 {
        session.feed(&[b'1'; 16]);
        assert_eq!(session.step(Timestamp::default()), Step::NeedMore);
    }
    assert!(session.mid_frame());
}

/// A loop over nothing must end before anyone else notices, however large the limit for whole
/// frames is: the machine runs where other devices are served.
#[test]
fn a_loop_over_nothing_ends_soon() {
    let source = "protocol p \"p\"\n\ntransport tcp\n\nvar b = 0\n\non tcp {\n    a: u8\n    repeat 1000000000 {\n        repeat 1000000000 { b = 1 }\n    }\n}\n";
    let program = Arc::new(fieldline_pvm::compile("p", source).unwrap());
    let mut session = Session::new(program, Options::new(Transport::Tcp));
    session.feed(&[1]);
    let Step::Frame(frame) = session.step(Timestamp::default()) else { panic!("no frame") };
    let error = frame.error.unwrap();
    assert_eq!(&*error.class, "limit_exceeded");
    let steps: u64 = error.message.split(' ').nth(2).unwrap().parse().unwrap();
    assert!(steps <= 25_000, "{error}");
}

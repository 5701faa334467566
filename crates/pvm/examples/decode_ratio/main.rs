//! How fast the machine decodes, against decoders written by hand in Rust for the same frames.
//!
//! Both give the same messages, which is checked first. Run `bench/decode.sh`; the last lines are
//! `ratio NAME X`, machine over hand, frames of the shared vectors. An argument picks one protocol.

#![allow(clippy::print_stdout, reason = "a benchmark prints what it measures")]

mod teltonika;
mod wialon_ips;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fieldline_model::value::from_hex;
use fieldline_model::{Decoded, Timestamp, Transport};
use fieldline_pvm::{Options, Program, Session, Step};

/// One frame in, its messages out; `None` if it is refused.
type Decode = fn(&[u8]) -> Option<Vec<Decoded>>;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/vectors");
    let directory = std::env::var_os("FIELDLINE_VECTORS").map_or(here, PathBuf::from);
    let text = std::fs::read_to_string(directory.join("telematics.json"))
        .map_err(|error| format!("VECTORS ABSENT: {}: {error}", directory.display()))?;
    let file: serde_json::Value = serde_json::from_str(&text)?;
    let only = std::env::args().nth(1);
    let mut ratios = Vec::new();
    for (name, decode) in
        [("teltonika", teltonika::decode as Decode), ("wialon_ips", wialon_ips::decode)]
    {
        if only.as_deref().is_some_and(|only| only != name) {
            continue;
        }
        let frames = frames(&file, name, decode);
        let source = fieldline_pvm::library::built_in().iter().find(|(n, _)| *n == name);
        let source = source.map(|(_, source)| *source).ok_or("the protocol is not built in")?;
        let program = Arc::new(fieldline_pvm::compile(name, source)?);
        for frame in &frames {
            let by_machine = run(&mut session(&program), frame);
            if decode(frame).as_ref() != Some(&by_machine) {
                return Err(format!("{name}: decoders differ on {frame:02x?}").into());
            }
        }
        let bytes: usize = frames.iter().map(Vec::len).sum();
        let messages: usize = frames.iter().filter_map(|f| decode(f)).map(|m| m.len()).sum();
        println!("{name}: {} frames, {messages} messages, {bytes} bytes a round", frames.len());
        let mut machine = session(&program);
        // Alternating rounds, best of each: what else the computer does hits both alike.
        let (mut hand_best, mut machine_best) = (Duration::MAX, Duration::MAX);
        for _ in 0..7 {
            hand_best = hand_best.min(measure(|| {
                frames.iter().filter_map(|frame| decode(frame)).map(|m| m.len()).sum()
            }));
            machine_best = machine_best
                .min(measure(|| frames.iter().map(|frame| run(&mut machine, frame).len()).sum()));
        }
        for (who, took) in [("hand", hand_best), ("machine", machine_best)] {
            let a_second = |count: usize| count as f64 / took.as_secs_f64();
            println!(
                "  {who:8} {:10.0} frames/s {:10.0} messages/s {:8.1} MB/s",
                a_second(frames.len()),
                a_second(messages),
                a_second(bytes) / 1e6
            );
        }
        ratios.push((name, hand_best.as_secs_f64() / machine_best.as_secs_f64()));
    }
    for (name, ratio) in ratios {
        println!("ratio {name} {ratio:.2}");
    }
    Ok(())
}

/// Good data frames over TCP that the hand-written decoder knows.
fn frames(file: &serde_json::Value, protocol: &str, decode: Decode) -> Vec<Vec<u8>> {
    let vectors = file.get("vectors").and_then(|v| v.as_array()).cloned().unwrap_or_default();
    let wanted = |v: &&serde_json::Value| {
        v["protocol"] == protocol
            && v["kind"] == "data"
            && v["transport"] == "tcp"
            && v["requires"].is_null()
    };
    let hex = vectors.iter().filter(wanted).filter_map(|v| from_hex(v["hex"].as_str()?));
    hex.filter(|frame| decode(frame).is_some_and(|messages| !messages.is_empty())).collect()
}

fn session(program: &Arc<Program>) -> Session {
    let mut session = Session::new(Arc::clone(program), Options::new(Transport::Tcp));
    session.identify("356307042441013", &BTreeMap::new());
    session
}

/// The messages of `bytes`, whole frames.
fn run(session: &mut Session, bytes: &[u8]) -> Vec<Decoded> {
    session.feed(bytes);
    match session.step(Timestamp::default()) {
        Step::Frame(frame) => frame.messages,
        _ => Vec::new(),
    }
}

/// Time of one round, averaged over about a quarter of a second.
fn measure(mut round: impl FnMut() -> usize) -> Duration {
    let started = Instant::now();
    let mut rounds = 0_u32;
    while started.elapsed() < Duration::from_millis(250) {
        for _ in 0..20 {
            std::hint::black_box(round());
        }
        rounds += 20;
    }
    started.elapsed() / rounds
}

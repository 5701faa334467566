//! Whatever a node says in headers, paths and problems: it is read or refused, and what was read is written as it was.

#![no_main]

use fieldline_router::calls::wire::{Head, method, path, problem, read_problem};
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use libfuzzer_sys::fuzz_target;

const HEADERS: [&str; 6] = [
    "fieldline-node",
    "fieldline-to",
    "fieldline-version",
    "fieldline-deadline-ms",
    "fieldline-hello-bytes",
    "traceparent",
];

fuzz_target!(|data: &[u8]| {
    let mut headers = HeaderMap::new();
    for (name, line) in HEADERS.iter().zip(data.split(|byte| *byte == b'\n')) {
        if let Ok(value) = HeaderValue::from_bytes(line) {
            headers.insert(HeaderName::from_static(name), value);
        }
    }
    if let Ok(head) = Head::read(&headers) {
        let mut again = HeaderMap::new();
        head.write(&mut again).unwrap();
        assert_eq!(Head::read(&again), Ok(head));
    }
    if let Some(error) = read_problem(data) {
        let (_, body) = problem(&error);
        assert!(read_problem(&body).is_some());
    }
    if let Ok(text) = std::str::from_utf8(data) {
        if let Some(name) = method(text) {
            assert_eq!(path(name), text);
        }
    }
});

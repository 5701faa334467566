//! What every [`Calls`] must do. Checks make nodes of their own, of one network.
#![allow(clippy::missing_panics_doc, reason = "a suite for tests: it panics by design")]

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

use crate::calls::{CALL_BYTES_MAX, CallError, Calls, Handlers, STREAM_BUFFER_BYTES, TraceParent};

/// Longest that anything may take that has no deadline of its own.
const PATIENCE: Duration = Duration::from_secs(20);
/// A deadline that passes in the test.
const SHORT: Duration = Duration::from_millis(300);

/// A node that others reach.
pub struct TestNode {
    /// What others call it.
    pub name: String,
    /// What it answers.
    pub handlers: Handlers,
    /// How it asks others.
    pub calls: Arc<dyn Calls>,
}

impl TestNode {
    async fn ask(
        &self,
        node: &Self,
        method: &'static str,
        request: &'static str,
    ) -> Result<Bytes, CallError> {
        self.calls.call(&node.name, method, Bytes::from_static(request.as_bytes()), PATIENCE).await
    }
}

/// Runs every check; panics at the first that fails. `node` gives a further node of one network each time.
pub async fn run(node: impl AsyncFn() -> TestNode) {
    let (one, two) = (node().await, node().await);
    a_call_is_answered(&one, &two).await;
    what_is_not_there_is_said(&one, &two).await;
    errors_come_as_they_were_said(&one, &two).await;
    a_deadline_ends_both_sides(&one, &two).await;
    who_gives_up_is_not_worked_for(&one, &two).await;
    sizes_are_bounded(&one, &two).await;
    a_trace_goes_along(&one, &two, &node().await).await;
    many_calls_are_answered_at_once(&one, &two).await;
    a_stream_carries_both_ways_and_ends_each_way(&one, &two).await;
    a_stream_may_be_refused(&one, &two).await;
    a_stream_that_is_not_read_holds_up_nobody_else(&one, &two).await;
    a_dropped_stream_ends_the_other_side(&one, &two).await;
}

/// The handler knows who asks and until when; a node asks itself as it asks others.
async fn a_call_is_answered(one: &TestNode, two: &TestNode) {
    for node in [one, two] {
        let own = node.name.clone();
        node.handlers.on_call("test/echo", move |request, caller| {
            let own = own.clone();
            async move {
                let left = caller.deadline.saturating_duration_since(Instant::now());
                assert!(left > PATIENCE / 2 && left <= PATIENCE, "{left:?}");
                Ok([own.as_bytes(), b" from ", caller.node.as_bytes(), b": ", &request]
                    .concat()
                    .into())
            }
        });
    }
    for (from, to) in [(one, two), (two, one), (one, one)] {
        let answer = from.ask(to, "test/echo", "hello").await.expect("an answer");
        assert_eq!(answer, format!("{} from {}: hello", to.name, from.name));
    }
    two.handlers.on_call("test/nothing", |request, _| async move {
        assert!(request.is_empty());
        Ok(Bytes::new())
    });
    assert_eq!(one.ask(two, "test/nothing", "").await, Ok(Bytes::new()));
}

async fn what_is_not_there_is_said(one: &TestNode, two: &TestNode) {
    let nobody = one.calls.call("nobody", "test/echo", Bytes::new(), PATIENCE).await;
    assert_eq!(nobody, Err(CallError::NoSuchNode("nobody".to_owned())));
    let unknown = Err(CallError::NoSuchMethod("test/unknown".to_owned()));
    assert_eq!(one.ask(two, "test/unknown", "").await, unknown);
    assert_eq!(one.ask(one, "test/unknown", "").await, unknown);
    let opened = one.calls.open(&two.name, "test/unknown", Bytes::new(), PATIENCE).await;
    assert_eq!(opened.err(), unknown.clone().err());
    // A stream is no call, and the other way round.
    let opened = one.calls.open(&two.name, "test/echo", Bytes::new(), PATIENCE).await;
    assert!(matches!(opened.err(), Some(CallError::NoSuchMethod(_))));
    two.handlers.on_stream("test/stream", |opening, _| async move { drop(opening.accept()) });
    let called = one.ask(two, "test/stream", "").await;
    assert!(matches!(called, Err(CallError::NoSuchMethod(_))), "{called:?}");
}

async fn errors_come_as_they_were_said(one: &TestNode, two: &TestNode) {
    let all = [
        CallError::NoSuchNode("a node".to_owned()),
        CallError::Unreachable("it is away: \"quoted\", ü\n".to_owned()),
        CallError::DeadlineExceeded,
        CallError::NoSuchMethod("another/method".to_owned()),
        CallError::Refused("not now".to_owned()),
        CallError::Failed("it broke".to_owned()),
    ];
    for error in all {
        let said = error.clone();
        two.handlers.on_call("test/fail", move |_, _| {
            let said = said.clone();
            async move { Err(said) }
        });
        assert_eq!(one.ask(two, "test/fail", "").await, Err(error));
    }
}

/// Tells when it is dropped.
struct Dropped(mpsc::Sender<()>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.try_send(()).unwrap_or_default();
    }
}

/// A handler that never ends, and tells that it has begun and that it was dropped.
fn hang(node: &TestNode, method: &'static str) -> (mpsc::Receiver<()>, mpsc::Receiver<()>) {
    let (begun, begins) = mpsc::channel(64);
    let (dropped, drops) = mpsc::channel(64);
    node.handlers.on_call(method, move |_, _| {
        let (begun, dropped) = (begun.clone(), dropped.clone());
        async move {
            let _dropped = Dropped(dropped);
            begun.try_send(()).unwrap_or_default();
            std::future::pending().await
        }
    });
    (begins, drops)
}

async fn told(told: &mut mpsc::Receiver<()>, what: &str) {
    timeout(PATIENCE, told.recv()).await.unwrap_or_else(|_| panic!("{what}")).expect("the handler");
}

async fn a_deadline_ends_both_sides(one: &TestNode, two: &TestNode) {
    for to in [two, one] {
        let (mut begins, mut drops) = hang(to, "test/hang");
        let began = Instant::now();
        let answer = one.calls.call(&to.name, "test/hang", Bytes::new(), SHORT).await;
        assert_eq!(answer, Err(CallError::DeadlineExceeded));
        let took = began.elapsed();
        assert!(took >= SHORT && took < PATIENCE, "{took:?}");
        told(&mut begins, "the handler was begun").await;
        told(&mut drops, "the handler was dropped").await;
    }
    two.handlers.on_stream("test/hang-stream", |opening, _| async move {
        std::future::pending::<()>().await;
        drop(opening);
    });
    let opened = one.calls.open(&two.name, "test/hang-stream", Bytes::new(), SHORT).await;
    assert_eq!(opened.err(), Some(CallError::DeadlineExceeded));
}

async fn who_gives_up_is_not_worked_for(one: &TestNode, two: &TestNode) {
    let (mut begins, mut drops) = hang(two, "test/give-up");
    let (calls, name) = (Arc::clone(&one.calls), two.name.clone());
    let asking = tokio::spawn(async move {
        calls.call(&name, "test/give-up", Bytes::new(), PATIENCE * 10).await
    });
    told(&mut begins, "the handler was begun").await;
    asking.abort();
    told(&mut drops, "the handler was dropped").await;
}

async fn sizes_are_bounded(one: &TestNode, two: &TestNode) {
    two.handlers.on_call("test/size", |request, _| async move {
        Ok(Bytes::from(request.len().to_string()))
    });
    two.handlers.on_call("test/large", |request, _| async move {
        let text = std::str::from_utf8(&request).expect("a number");
        Ok(vec![7; text.parse().expect("a number")].into())
    });
    let ask =
        |method, request: Vec<u8>| one.calls.call(&two.name, method, request.into(), PATIENCE);
    let most = ask("test/size", vec![1; CALL_BYTES_MAX]).await.expect("an answer");
    assert_eq!(most, CALL_BYTES_MAX.to_string());
    let more = ask("test/size", vec![1; CALL_BYTES_MAX + 1]).await;
    assert!(matches!(more, Err(CallError::Refused(_))), "{more:?}");
    let most = ask("test/large", CALL_BYTES_MAX.to_string().into()).await.expect("an answer");
    assert!(most.len() == CALL_BYTES_MAX && most.iter().all(|byte| *byte == 7));
    let more = ask("test/large", (CALL_BYTES_MAX + 1).to_string().into()).await;
    assert!(matches!(more, Err(CallError::Failed(_))), "{more:?}");
}

/// What a call belongs to is known to the handler, and to whoever that asks in turn.
async fn a_trace_goes_along(one: &TestNode, two: &TestNode, three: &TestNode) {
    three.handlers.on_call("test/trace", |_, caller| async move {
        assert_eq!(TraceParent::current(), Some(caller.trace));
        Ok(caller.trace.trace_id().into())
    });
    let (calls, next) = (Arc::clone(&two.calls), three.name.clone());
    two.handlers.on_call("test/trace", move |_, caller| {
        let (calls, next) = (Arc::clone(&calls), next.clone());
        async move {
            let theirs = calls.call(&next, "test/trace", Bytes::new(), PATIENCE).await?;
            assert_eq!(theirs, caller.trace.trace_id());
            Ok(theirs)
        }
    });
    let trace = TraceParent::next();
    let answer = trace.scope(one.ask(two, "test/trace", "")).await.expect("an answer");
    assert_eq!(answer, trace.trace_id());
}

async fn many_calls_are_answered_at_once(one: &TestNode, two: &TestNode) {
    let (begun, mut begins) = mpsc::channel(64);
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    let opened = Arc::clone(&gate);
    two.handlers.on_call("test/gate", move |request, _| {
        let (begun, gate) = (begun.clone(), Arc::clone(&gate));
        async move {
            begun.try_send(()).unwrap_or_default();
            drop(gate.acquire().await);
            Ok(request)
        }
    });
    let mut asking = tokio::task::JoinSet::new();
    for number in 0..32_u32 {
        let (calls, name) = (Arc::clone(&one.calls), two.name.clone());
        asking.spawn(async move {
            let request = Bytes::from(number.to_string());
            let answer = calls.call(&name, "test/gate", request.clone(), PATIENCE).await;
            assert_eq!(answer, Ok(request));
        });
    }
    for _ in 0..32 {
        told(&mut begins, "all are begun before one is answered").await;
    }
    opened.add_permits(32);
    timeout(PATIENCE, asking.join_all()).await.expect("all are answered");
}

/// Each direction ends by itself, and what was written before is read.
async fn a_stream_carries_both_ways_and_ends_each_way(one: &TestNode, two: &TestNode) {
    two.handlers.on_stream("test/both", |opening, caller| async move {
        let hello = [opening.hello(), caller.node.as_bytes()].concat();
        let mut stream = opening.accept();
        stream.write_all(&hello).await.expect("it is open");
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.expect("the end");
        all.reverse();
        stream.write_all(&all).await.expect("this direction is open yet");
        stream.shutdown().await.expect("it is open");
    });
    for to in ["other", "self"] {
        let from = if to == "self" { two } else { one };
        let work = async {
            let hello = Bytes::from_static(b"I am ");
            let opened = from.calls.open(&two.name, "test/both", hello, PATIENCE).await;
            let mut stream = opened.expect("a stream");
            let mut greeting = vec![0; 5 + from.name.len()];
            stream.read_exact(&mut greeting).await.expect("a greeting");
            assert_eq!(greeting, format!("I am {}", from.name).as_bytes());
            let sent: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
            stream.write_all(&sent).await.expect("it is open");
            stream.shutdown().await.expect("it is open");
            let mut back = Vec::new();
            stream.read_to_end(&mut back).await.expect("the end");
            assert!(back.iter().eq(sent.iter().rev()), "{} bytes", back.len());
        };
        timeout(PATIENCE, work).await.expect("a stream in time");
    }
}

async fn a_stream_may_be_refused(one: &TestNode, two: &TestNode) {
    let why = CallError::Refused("this session is elsewhere".to_owned());
    let said = why.clone();
    two.handlers.on_stream("test/refuse", move |opening, _| {
        let said = said.clone();
        async move { opening.refuse(said) }
    });
    let opened = one.calls.open(&two.name, "test/refuse", Bytes::new(), PATIENCE).await;
    assert_eq!(opened.err(), Some(why));
    two.handlers.on_stream("test/silent", |opening, _| async move { drop(opening) });
    let opened = one.calls.open(&two.name, "test/silent", Bytes::new(), PATIENCE).await;
    assert!(matches!(opened.err(), Some(CallError::Failed(_))));
    let hello = Bytes::from(vec![0; CALL_BYTES_MAX + 1]);
    let opened = one.calls.open(&two.name, "test/refuse", hello, PATIENCE).await;
    assert!(matches!(opened.err(), Some(CallError::Refused(_))));
}

/// Whoever writes to one that is not read has to wait, and nobody else has.
async fn a_stream_that_is_not_read_holds_up_nobody_else(one: &TestNode, two: &TestNode) {
    two.handlers.on_stream("test/stall", |opening, _| async move {
        let _stream = opening.accept();
        std::future::pending::<()>().await;
    });
    two.handlers.on_call("test/beside", |request, _| async move { Ok(request) });
    let mut stalled = Vec::new();
    for _ in 0..40 {
        let opened = one.calls.open(&two.name, "test/stall", Bytes::new(), PATIENCE).await;
        let mut stream = opened.expect("a stream");
        let piece = vec![0; STREAM_BUFFER_BYTES];
        let mut written = 0;
        while timeout(Duration::from_millis(20), stream.write_all(&piece)).await.is_ok() {
            written += piece.len();
            assert!(written < 16 << 20, "it is bounded");
        }
        stalled.push(stream);
    }
    assert_eq!(one.ask(two, "test/beside", "x").await, Ok(Bytes::from_static(b"x")));
    two.handlers.on_stream("test/lively", |opening, _| async move {
        let (mut reader, mut writer) = tokio::io::split(opening.accept());
        tokio::io::copy(&mut reader, &mut writer).await.map(|_| ()).unwrap_or_default();
    });
    let opened = one.calls.open(&two.name, "test/lively", Bytes::new(), PATIENCE).await;
    let mut stream = opened.expect("a stream");
    let mut back = [0; 4];
    stream.write_all(b"ping").await.expect("it is open");
    timeout(PATIENCE, stream.read_exact(&mut back)).await.expect("in time").expect("it is open");
    assert_eq!(&back, b"ping");
}

async fn a_dropped_stream_ends_the_other_side(one: &TestNode, two: &TestNode) {
    let (ended, mut ends) = mpsc::channel(64);
    two.handlers.on_stream("test/drop", move |opening, _| {
        let ended = ended.clone();
        async move {
            let mut stream = opening.accept();
            // An end or an error: both are an end.
            let mut all = Vec::new();
            stream.read_to_end(&mut all).await.map(|_| ()).unwrap_or_default();
            ended.try_send(()).unwrap_or_default();
        }
    });
    let opened = one.calls.open(&two.name, "test/drop", Bytes::new(), PATIENCE).await;
    let mut stream = opened.expect("a stream");
    stream.write_all(b"half a word").await.expect("it is open");
    drop(stream);
    told(&mut ends, "the handler saw the end").await;
    // And the other way round.
    two.handlers.on_stream("test/leave", |opening, _| async move { drop(opening.accept()) });
    let opened = one.calls.open(&two.name, "test/leave", Bytes::new(), PATIENCE).await;
    let mut stream = opened.expect("a stream");
    let mut all = Vec::new();
    let read = timeout(PATIENCE, stream.read_to_end(&mut all)).await.expect("in time");
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
}

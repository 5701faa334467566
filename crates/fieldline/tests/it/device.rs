//! A device that speaks Wialon IPS, keeps what was not acknowledged, and
//! remembers what was: the other side of "nothing acknowledged is lost".

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::server::Server;

/// Messages in a black-box packet.
const BATCH: u64 = 5;

/// How devices behave.
#[derive(Clone, Copy)]
pub(crate) struct Manner {
    /// How long an answer may take; then the connection counts as lost.
    pub(crate) patience: Duration,
    /// Rest between an answer and what is sent next.
    pub(crate) rest: Duration,
}

impl Manner {
    /// As fast as they are acknowledged.
    pub(crate) const FAST: Self = Self { patience: Duration::from_secs(20), rest: Duration::ZERO };
}

/// What a device has come to.
#[derive(Default)]
struct Device {
    ident: String,
    /// Messages that were acknowledged.
    acked: AtomicU64,
    /// Answers that acknowledged them.
    answers: AtomicU64,
    /// Connections on which it signed in.
    connections: AtomicU64,
}

/// Devices that send what was not acknowledged again.
pub(crate) struct Fleet {
    stop: Arc<AtomicBool>,
    devices: Vec<(Arc<Device>, JoinHandle<()>)>,
}

impl Fleet {
    /// Starts `count` devices that connect to `port`, whenever somebody listens there.
    pub(crate) fn start(port: u16, count: usize) -> Self {
        Self::start_at(&[format!("127.0.0.1:{port}")], count)
    }

    /// Starts `count` devices that connect to one of `places`, and to the next where a connection is lost.
    pub(crate) fn start_at(places: &[String], count: usize) -> Self {
        Self::start_with(places, count, Manner::FAST)
    }

    /// The same, in a manner of their own.
    pub(crate) fn start_with(places: &[String], count: usize, manner: Manner) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let start_one = |n: usize| {
            let device = Arc::new(Device { ident: format!("kill-{n:03}"), ..Device::default() });
            let thread = {
                let (stop, device) = (Arc::clone(&stop), Arc::clone(&device));
                let mut places: Vec<String> = places.to_vec();
                let first = n % places.len();
                places.rotate_left(first);
                std::thread::spawn(move || {
                    for place in places.iter().cycle() {
                        if stop.load(Ordering::Relaxed) {
                            return;
                        }
                        // A failure of any kind is a lost connection: try again.
                        let _lost = drive(place, &device, manner, &stop);
                        std::thread::sleep(Duration::from_millis(20));
                    }
                })
            };
            (device, thread)
        };
        Self { devices: (0..count).map(start_one).collect(), stop }
    }

    fn each(&self, count: impl Fn(&Device) -> &AtomicU64) -> Vec<u64> {
        self.devices.iter().map(|(device, _)| count(device).load(Ordering::SeqCst)).collect()
    }

    /// Messages acknowledged so far.
    pub(crate) fn acked(&self) -> u64 {
        self.each(|device| &device.acked).iter().sum()
    }

    /// The most messages that one device has had acknowledged.
    pub(crate) fn most(&self) -> u64 {
        self.each(|device| &device.acked).into_iter().max().unwrap_or_default()
    }

    /// Acknowledgements that each device had so far.
    pub(crate) fn answers(&self) -> Vec<u64> {
        self.each(|device| &device.answers)
    }

    /// Connections that each device has made so far.
    pub(crate) fn connections(&self) -> Vec<u64> {
        self.each(|device| &device.connections)
    }

    /// Stops sending, and returns for each ident how many messages were acknowledged: 1 to that number.
    pub(crate) fn finish(self) -> BTreeMap<String, u64> {
        self.stop.store(true, Ordering::Relaxed);
        let finish_one = |(device, thread): (Arc<Device>, JoinHandle<()>)| {
            thread.join().unwrap();
            (device.ident.clone(), device.acked.load(Ordering::SeqCst))
        };
        self.devices.into_iter().map(finish_one).collect()
    }
}

/// Second `seq` after 2026-01-01, as DDMMYY;HHMMSS.
fn clock(seq: u64) -> String {
    let (day, second) = (seq / 86_400, seq % 86_400);
    assert!(day < 28, "more messages than January has seconds for");
    format!("{:02}0126;{:02}{:02}{:02}", day + 1, second / 3_600, second / 60 % 60, second % 60)
}

/// One connection: sign in, then send what comes after the last acknowledged message, single or as a batch.
fn drive(place: &str, device: &Device, manner: Manner, stop: &AtomicBool) -> std::io::Result<()> {
    let address = place.parse().map_err(std::io::Error::other)?;
    let stream = TcpStream::connect_timeout(&address, manner.patience)?;
    stream.set_read_timeout(Some(manner.patience))?;
    stream.set_nodelay(true)?;
    let (mut answers, mut stream) = (BufReader::new(stream.try_clone()?), stream);
    let mut exchange = |line: String, expected: String| {
        stream.write_all(line.as_bytes())?;
        let mut answer = String::new();
        answers.read_line(&mut answer)?;
        if answer == expected { Ok(()) } else { Err(std::io::Error::other(format!("{answer:?}"))) }
    };
    exchange(format!("#L#{};NA\r\n", device.ident), "#AL#1\r\n".to_owned())?;
    device.connections.fetch_add(1, Ordering::SeqCst);
    let body = |seq: u64| {
        format!(
            "{};5355.0926;N;02732.4099;E;{};90;200;9;1.1;NA;NA;NA;NA;seq:1:{seq}",
            clock(seq),
            seq % 90
        )
    };
    while !stop.load(Ordering::Relaxed) {
        let next = device.acked.load(Ordering::SeqCst) + 1;
        let count = if next.is_multiple_of(3) { BATCH } else { 1 };
        if count == 1 {
            exchange(format!("#D#{}\r\n", body(next)), "#AD#1\r\n".to_owned())?;
        } else {
            let bodies: Vec<String> = (next..next + count).map(body).collect();
            exchange(format!("#B#{}\r\n", bodies.join("|")), format!("#AB#{count}\r\n"))?;
        }
        device.acked.store(next + count - 1, Ordering::SeqCst);
        device.answers.fetch_add(1, Ordering::SeqCst);
        std::thread::sleep(manner.rest);
    }
    Ok(())
}

/// Compares what the server has with what it acknowledged, and returns how many messages were compared.
pub(crate) fn check(server: &Server, acknowledged: &BTreeMap<String, u64>) -> u64 {
    let mut compared = 0;
    for (ident, acked) in acknowledged {
        let device = server.device(ident).unwrap_or_else(|| panic!("device {ident} is gone"));
        let messages = server.list(&format!("/api/v1/devices/{device}/messages?fields=seq"));
        let seqs: Vec<u64> =
            messages.iter().map(|message| message["seq"].as_u64().unwrap()).collect();
        // What was in flight at a kill may be there without having been acknowledged; it was sent again then.
        let expected: Vec<u64> = (1..=(*acked).max(seqs.len() as u64)).collect();
        assert_eq!(seqs, expected, "{ident}: {acked} acknowledged; lost, doubled or out of order");
        assert!(seqs.len() as u64 <= acked + BATCH, "{ident}: more than was in flight");
        let received: Vec<&str> =
            messages.iter().map(|m| m["received"].as_str().unwrap()).collect();
        assert!(
            received.is_sorted_by_key(|text| jiff_micros(text)),
            "{ident}: not in order of arrival"
        );
        compared += acked;
    }
    compared
}

/// RFC 3339 in UTC as something that sorts: fractions are of different lengths.
fn jiff_micros(text: &str) -> i64 {
    text.parse::<fieldline_model::Timestamp>().unwrap().as_micros()
}

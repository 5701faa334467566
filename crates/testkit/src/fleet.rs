//! A fleet of simulated trackers: one task and one socket for each device.
//!
//! Devices keep what was not acknowledged and send the very same bytes again
//! after a reconnect, as real ones do; so a store must recognise what it has.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use fieldline_contracts::Clock;
use fieldline_model::Timestamp;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::route::{Random, Vehicle};
use crate::stats::{AckJournal, Stats};
use crate::teltonika::{self, Codec, Record};
use crate::wialon::{self, Version};

/// Records that a device keeps while it cannot send; the oldest go first.
const MEMORY_MAX: usize = 5_000;
/// Time to connect, to be answered at login, and to be acknowledged.
const ANSWER_WAIT: Duration = Duration::from_secs(15);
/// Time after which a datagram is sent again.
const DATAGRAM_WAIT: Duration = Duration::from_secs(3);
/// Longest wait between two tries to connect.
const RECONNECT_MAX: Duration = Duration::from_secs(5);
/// Connections that a fleet makes a second at the start.
const CONNECTS_PER_S: u32 = 1_000;

/// What simulated trackers speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Teltonika; even devices by codec 8, odd ones by codec 8 extended.
    Teltonika,
    /// Wialon IPS; even devices by version 1.1, odd ones by 2.0.
    WialonIps,
}

impl Protocol {
    /// The protocol of this name.
    ///
    /// # Errors
    ///
    /// A text that lists the known ones.
    pub fn parse(name: &str) -> Result<Self, String> {
        match name {
            "teltonika" => Ok(Self::Teltonika),
            "wialon_ips" => Ok(Self::WialonIps),
            _ => Err(format!(
                "there is no simulator of `{name}`; there are teltonika and wialon_ips"
            )),
        }
    }

    /// The parameter of stored messages that carries a record's sequence number.
    #[must_use]
    pub const fn sequence_param(self) -> &'static str {
        match self {
            Self::Teltonika => teltonika::SEQUENCE_PARAM,
            Self::WialonIps => wialon::SEQUENCE_PARAM,
        }
    }
}

/// A fleet to be simulated.
#[derive(Clone)]
pub struct Fleet {
    /// What the devices speak.
    pub protocol: Protocol,
    /// Whether over UDP.
    pub udp: bool,
    /// How many there are.
    pub devices: u32,
    /// Records a second of each device; 0 sends as fast as is acknowledged.
    pub rate: f64,
    /// Host and port.
    pub target: String,
    /// Decides idents and routes.
    pub seed: u64,
    /// Most records of one packet, 1 to 50. A device that keeps up sends one.
    pub batch: usize,
    /// Sequence number of the first record, for a fleet that goes on after an earlier run.
    pub first_sequence: u32,
    /// Where to note what was acknowledged.
    pub journal: Option<Arc<AckJournal>>,
    /// Tells the devices the time.
    pub clock: Arc<dyn Clock>,
}

impl Fleet {
    /// A fleet that sends `rate` records a second and device to `target` over TCP.
    #[must_use]
    pub fn new(
        protocol: Protocol,
        devices: u32,
        rate: f64,
        target: String,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self {
            protocol,
            udp: false,
            devices,
            rate,
            target,
            seed: 1,
            batch: 20,
            first_sequence: 1,
            journal: None,
            clock,
        }
    }

    /// The ident of a device: 15 digits with a check digit, as an IMEI has.
    #[must_use]
    pub fn ident(&self, number: u32) -> String {
        let head = 35_000_000_000_000 + (self.seed % 10_000) * 100_000_000;
        let digits = (head + u64::from(number) % 100_000_000).to_string();
        let sum: u32 = digits
            .bytes()
            .rev()
            .enumerate()
            .map(|(place, digit)| {
                let value = u32::from(digit - b'0');
                let doubled = if place % 2 == 0 { value * 2 } else { value };
                doubled / 10 + doubled % 10
            })
            .sum();
        format!("{digits}{}", (10 - sum % 10) % 10)
    }

    /// Simulates until `shutdown`; what was not acknowledged by then is forgotten.
    pub async fn run(&self, shutdown: CancellationToken, stats: Arc<Stats>) {
        let tasks = TaskTracker::new();
        for number in 0..self.devices {
            let device = Device::new(self, number, Arc::clone(&stats));
            let shutdown = shutdown.clone();
            let start = Duration::from_secs_f64(f64::from(number) / f64::from(CONNECTS_PER_S));
            tasks.spawn(async move {
                let work = async {
                    sleep(start).await;
                    device.run().await;
                };
                tokio::select! {
                    () = shutdown.cancelled() => {}
                    () = work => {}
                }
            });
        }
        tasks.close();
        tasks.wait().await;
    }
}

/// The wire format of one device.
#[derive(Clone, Copy)]
enum Wire {
    Teltonika(Codec),
    Wialon(Version),
}

/// What the server says, whatever the protocol.
enum FromServer {
    Login(bool),
    Accepted(u32),
    Command(String),
    Other,
}

impl Wire {
    fn login(self, ident: &str) -> Vec<u8> {
        match self {
            Self::Teltonika(_) => teltonika::login(ident),
            Self::Wialon(version) => wialon::login(version, ident).into_bytes(),
        }
    }

    fn data(self, records: &[Record]) -> Vec<u8> {
        match self {
            Self::Teltonika(codec) => teltonika::tcp_packet(&teltonika::payload(codec, records)),
            Self::Wialon(version) => wialon::data(version, records).into_bytes(),
        }
    }

    fn datagram(self, ident: &str, packet: u16, records: &[Record]) -> Vec<u8> {
        match self {
            Self::Teltonika(codec) => {
                let payload = teltonika::payload(codec, records);
                teltonika::udp_packet(ident, packet, packet.to_be_bytes()[1], &payload)
            }
            Self::Wialon(version) => wialon::datagram(version, ident, records).into_bytes(),
        }
    }

    fn answer(self, text: &str) -> Vec<u8> {
        match self {
            Self::Teltonika(_) => teltonika::text_packet(6, text),
            Self::Wialon(version) => wialon::text(version, text).into_bytes(),
        }
    }

    /// Takes one of the server's words off `buffer`.
    fn take(self, buffer: &mut Vec<u8>, logged_in: bool) -> Option<FromServer> {
        match self {
            Self::Teltonika(_) if !logged_in => {
                (!buffer.is_empty()).then(|| FromServer::Login(buffer.remove(0) == 1))
            }
            Self::Teltonika(_) => Some(match teltonika::take_from_server(buffer)? {
                teltonika::FromServer::Accepted(count) => FromServer::Accepted(count),
                teltonika::FromServer::Command(text) => FromServer::Command(text),
            }),
            Self::Wialon(_) => Some(match wialon::take_from_server(buffer)? {
                wialon::FromServer::Login(accepted) => FromServer::Login(accepted),
                wialon::FromServer::Accepted(count) => FromServer::Accepted(count),
                wialon::FromServer::Command(text) => FromServer::Command(text),
                wialon::FromServer::Other(_) => FromServer::Other,
            }),
        }
    }
}

struct Device {
    wire: Wire,
    udp: bool,
    ident: String,
    target: String,
    interval: Option<Duration>,
    batch: usize,
    journal: Option<Arc<AckJournal>>,
    clock: Arc<dyn Clock>,
    stats: Arc<Stats>,
    vehicle: Vehicle,
    random: Random,
    memory: VecDeque<Record>,
    /// Records at the front of the memory that were on the wire before.
    tried: usize,
    sequence: u32,
    last_at: Timestamp,
    next_at: Instant,
}

impl Device {
    fn new(fleet: &Fleet, number: u32, stats: Arc<Stats>) -> Self {
        let odd = number % 2 == 1;
        let wire = match fleet.protocol {
            Protocol::Teltonika if odd => Wire::Teltonika(Codec::EightExtended),
            Protocol::Teltonika => Wire::Teltonika(Codec::Eight),
            Protocol::WialonIps if odd => Wire::Wialon(Version::Two),
            Protocol::WialonIps => Wire::Wialon(Version::One),
        };
        Self {
            wire,
            udp: fleet.udp,
            ident: fleet.ident(number),
            target: fleet.target.clone(),
            interval: (fleet.rate > 0.0).then(|| Duration::from_secs_f64(1.0 / fleet.rate)),
            // A Wialon IPS datagram holds one message.
            batch: match wire {
                Wire::Wialon(_) if fleet.udp => 1,
                _ => fleet.batch.clamp(1, 50),
            },
            journal: fleet.journal.clone(),
            clock: Arc::clone(&fleet.clock),
            stats,
            vehicle: Vehicle::new(fleet.seed, number),
            random: Random::new(fleet.seed.wrapping_add(u64::from(number) << 20)),
            memory: VecDeque::new(),
            tried: 0,
            sequence: fleet.first_sequence,
            last_at: Timestamp::MIN,
            next_at: Instant::now(),
        }
    }

    async fn run(mut self) {
        // Devices of one fleet do not all report in the same instant.
        self.next_at = Instant::now();
        if let Some(interval) = self.interval {
            self.next_at += interval.mul_f64(self.random.fraction());
        }
        let mut wait = Duration::from_millis(100);
        loop {
            let begun = Instant::now();
            // Every way out of a connection is a failure to the device: it comes again.
            let _reason = if self.udp { self.talk_udp().await } else { self.talk_tcp().await };
            Stats::add(&self.stats.failures, 1);
            if begun.elapsed() > RECONNECT_MAX {
                wait = Duration::from_millis(100);
            }
            sleep(wait.mul_f64(self.random.between(0.5, 1.0))).await;
            wait = (wait * 2).min(RECONNECT_MAX);
        }
    }

    /// Measures what is due by now.
    fn measure(&mut self) {
        let Some(interval) = self.interval else {
            while self.memory.len() < self.batch {
                self.record(1.0);
            }
            return;
        };
        while self.next_at <= Instant::now() {
            self.next_at += interval;
            self.record(interval.as_secs_f64());
        }
    }

    fn record(&mut self, seconds: f64) {
        // Every record has a time of its own, as the device's own ring needs.
        let now = Timestamp::from_millis(self.clock.now().as_micros() / 1_000);
        let at = now.max(self.last_at.plus_micros(1_000));
        self.last_at = at;
        let sample = self.vehicle.drive(seconds);
        if self.memory.len() >= MEMORY_MAX {
            self.memory.pop_front();
            self.tried = self.tried.saturating_sub(1);
            Stats::add(&self.stats.overflowed, 1);
        }
        self.memory.push_back(Record { at, sample, sequence: self.sequence });
        self.sequence = self.sequence.wrapping_add(1);
    }

    /// The records of the next packet.
    fn next_packet(&mut self) -> Vec<Record> {
        let records: Vec<Record> = self.memory.iter().take(self.batch).copied().collect();
        Stats::add(&self.stats.sent, records.len());
        Stats::add(&self.stats.resent, self.tried.min(records.len()));
        self.tried = self.tried.max(records.len());
        records
    }

    fn acked(&mut self, count: usize, sent_at: Instant) -> io::Result<()> {
        self.stats.latency.record(sent_at.elapsed());
        let records: Vec<Record> = self.memory.drain(..count.min(self.memory.len())).collect();
        self.tried = self.tried.saturating_sub(records.len());
        if let Some(journal) = &self.journal {
            journal.note(&self.ident, &records)?;
        }
        Stats::add(&self.stats.acked, records.len());
        Ok(())
    }

    async fn talk_tcp(&mut self) -> io::Result<()> {
        let mut stream = timeout(ANSWER_WAIT, TcpStream::connect(&self.target)).await??;
        stream.set_nodelay(true)?;
        stream.write_all(&self.wire.login(&self.ident)).await?;
        let mut buffer = Vec::with_capacity(64);
        loop {
            match self.wire.take(&mut buffer, false) {
                Some(FromServer::Login(true)) => break,
                Some(FromServer::Login(false)) => {
                    return Err(io::Error::other("the server refused the device"));
                }
                Some(_) => {}
                None => timeout(ANSWER_WAIT, read(&mut stream, &mut buffer)).await??,
            }
        }
        Stats::add(&self.stats.connects, 1);
        let _connected = Connected::new(&self.stats);
        self.report_tcp(&mut stream, &mut buffer).await
    }

    async fn report_tcp(&mut self, stream: &mut TcpStream, buffer: &mut Vec<u8>) -> io::Result<()> {
        let mut awaited: Option<(usize, Instant)> = None;
        loop {
            while let Some(word) = self.wire.take(buffer, true) {
                match word {
                    FromServer::Accepted(count) => {
                        let Some((sent, at)) = awaited.take() else { continue };
                        if usize::try_from(count) == Ok(sent) {
                            self.acked(sent, at)?;
                        }
                        // Any other count: the same records go again.
                    }
                    FromServer::Command(text) => {
                        let answer = self.obey(&text);
                        stream.write_all(&self.wire.answer(&answer)).await?;
                        Stats::add(&self.stats.commands, 1);
                    }
                    FromServer::Login(_) | FromServer::Other => {}
                }
            }
            self.measure();
            if awaited.is_none() && !self.memory.is_empty() {
                let packet = self.next_packet();
                awaited = Some((packet.len(), Instant::now()));
                stream.write_all(&self.wire.data(&packet)).await?;
            }
            let overdue = awaited.map(|(_, at)| at + ANSWER_WAIT);
            let due = match (overdue, self.interval) {
                (Some(overdue), _) => overdue,
                (None, Some(_)) => self.next_at,
                (None, None) => continue,
            };
            tokio::select! {
                read = read(stream, buffer) => read?,
                () = sleep_until(due) => {
                    if overdue.is_some() {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                }
            }
        }
    }

    async fn talk_udp(&mut self) -> io::Result<()> {
        let socket = UdpSocket::bind("0.0.0.0:0").await?;
        socket.connect(&self.target).await?;
        let mut connected = None;
        let mut packet_id = 0_u16;
        loop {
            self.measure();
            if self.memory.is_empty() {
                let mut datagram = [0_u8; 1_500];
                tokio::select! {
                    count = socket.recv(&mut datagram) => {
                        let bytes = datagram.get(..count?).unwrap_or_default();
                        self.obey_udp(&socket, bytes, packet_id).await?;
                    }
                    () = sleep_until(self.next_at) => {}
                }
                continue;
            }
            let packet = self.next_packet();
            packet_id = packet_id.wrapping_add(1);
            let sent_at = Instant::now();
            socket.send(&self.wire.datagram(&self.ident, packet_id, &packet)).await?;
            let accepted = timeout(DATAGRAM_WAIT, self.accepted_udp(&socket, packet_id)).await;
            // A wait that ran out counts as nothing accepted: the same records go again.
            let accepted = accepted.unwrap_or(Ok(0))?;
            if usize::try_from(accepted) != Ok(packet.len()) {
                Stats::add(&self.stats.failures, 1);
                continue;
            }
            self.acked(packet.len(), sent_at)?;
            if connected.is_none() {
                Stats::add(&self.stats.connects, 1);
                connected = Some(Connected::new(&self.stats));
            }
        }
    }

    async fn accepted_udp(&mut self, socket: &UdpSocket, packet_id: u16) -> io::Result<u32> {
        let mut datagram = [0_u8; 1_500];
        loop {
            let count = socket.recv(&mut datagram).await?;
            let bytes = datagram.get(..count).unwrap_or_default();
            let accepted = match self.wire {
                Wire::Teltonika(_) => {
                    teltonika::udp_accepted(bytes, packet_id, packet_id.to_be_bytes()[1])
                }
                Wire::Wialon(_) => match wialon::take_from_server(&mut bytes.to_vec()) {
                    Some(wialon::FromServer::Accepted(count)) => Some(count),
                    _ => None,
                },
            };
            if let Some(accepted) = accepted {
                return Ok(accepted);
            }
            self.obey_udp(socket, bytes, packet_id).await?;
        }
    }

    /// Answers a datagram if it is a command.
    async fn obey_udp(&mut self, socket: &UdpSocket, bytes: &[u8], packet: u16) -> io::Result<()> {
        // The other protocol has no commands over UDP.
        let Wire::Teltonika(_) = self.wire else { return Ok(()) };
        let Some(command) = teltonika::udp_command(bytes) else { return Ok(()) };
        let answer = teltonika::text_payload(6, &self.obey(&command));
        let avl = packet.to_be_bytes()[1];
        socket.send(&teltonika::udp_packet(&self.ident, packet, avl, &answer)).await?;
        Stats::add(&self.stats.commands, 1);
        Ok(())
    }

    /// What the device answers to a command.
    fn obey(&mut self, command: &str) -> String {
        let command = command.trim();
        match command.split_once(' ').unwrap_or((command, "")) {
            ("getver", _) => format!("Ver:03.27.07_00 GPS:AXN_5.10 Hw:FMB120 IMEI:{}", self.ident),
            ("getinfo", _) => {
                format!(
                    "RTC:{} Init:1 Up:{}s SIM:1 GPS:3 Records:{}",
                    self.last_at,
                    self.sequence,
                    self.memory.len()
                )
            }
            ("echo", text) => text.to_owned(),
            (other, _) => {
                format!("Unknown command: {}", other.chars().take(32).collect::<String>())
            }
        }
    }
}

/// Counts a device as connected while it lives.
struct Connected(Arc<Stats>);

impl Connected {
    fn new(stats: &Arc<Stats>) -> Self {
        stats.connected.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(stats))
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.connected.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Reads what is there; the end of the stream is an error. Cancel-safe.
async fn read(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> io::Result<()> {
    // A server that talks without end is no server of ours.
    if buffer.len() > 64 << 10 {
        return Err(io::Error::other("the server sends more than a tracker can hold"));
    }
    match stream.read_buf(buffer).await? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use fieldline_contracts::SystemClock;

    use super::*;

    fn fleet() -> Fleet {
        let target = "127.0.0.1:1".to_owned();
        Fleet::new(Protocol::Teltonika, 3, 1.0, target, Arc::new(SystemClock))
    }

    #[test]
    fn idents_are_distinct_and_have_a_check_digit() {
        let fleet = fleet();
        let idents: std::collections::HashSet<String> =
            (0..1_000).map(|number| fleet.ident(number)).collect();
        assert_eq!(idents.len(), 1_000);
        for ident in idents {
            let sum: u32 = ident
                .bytes()
                .rev()
                .enumerate()
                .map(|(place, digit)| {
                    let value = u32::from(digit - b'0') * (1 + u32::from(place % 2 == 1));
                    value / 10 + value % 10
                })
                .sum();
            assert_eq!((ident.len(), sum % 10), (15, 0), "{ident}");
        }
    }

    #[tokio::test]
    async fn what_was_not_acknowledged_is_sent_again_as_it_was() {
        let stats = Arc::new(Stats::default());
        let mut device = Device::new(&fleet(), 0, Arc::clone(&stats));
        device.interval = None;
        device.measure();
        let first = device.next_packet();
        let again = device.next_packet();
        assert_eq!(first, again);
        assert_eq!(Stats::get(&stats.resent), first.len() as u64);
        device.acked(first.len(), Instant::now()).unwrap();
        device.measure();
        let next = device.next_packet();
        assert_eq!(next[0].sequence, first.last().unwrap().sequence + 1);
        assert!(next[0].at > first.last().unwrap().at);
        assert_eq!(Stats::get(&stats.acked), first.len() as u64);
    }
}

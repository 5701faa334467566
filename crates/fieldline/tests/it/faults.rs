//! Faults, each over whole processes and under load. What each test measured is a line of its output that begins with
//! `fault:`; `docs/faults.md` has them as a table.
//!
//! The load are devices that send again what was not acknowledged, and callers of the API at every node. After all
//! faults of a test, what was acknowledged is compared with what is stored: it is there once, in order.

mod owners;
mod roles;
mod servers;
mod zones;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::device::{self, Fleet, Manner};
use crate::server::{Server, TOKEN, request_within, wait_for};

/// Devices of the load.
const DEVICES: usize = 8;
/// Longest that a node which is not hit may take for an answer during a fault.
const ANSWER_MAX: Duration = Duration::from_secs(8);

/// What a fault may do to devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    /// Nothing: they are acknowledged on the connections they have.
    None,
    /// They are acknowledged, where need be over new connections.
    Moved,
    /// As [`Effect::Moved`], but not before PostgreSQL has another primary; until then callers may be told to come again.
    Failover,
    /// Nothing is acknowledged meanwhile.
    Silence,
}

/// An answer of the API, or none.
struct Probe {
    asked: Instant,
    took: Duration,
    what: &'static str,
    status: Option<u16>,
}

/// Asks one node time and again: reads and changes in turn.
struct Prober {
    node: String,
    probes: Arc<Mutex<Vec<Probe>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Prober {
    fn start(node: &Server, device: &str) -> Self {
        let (probes, stop) = (Arc::default(), Arc::new(AtomicBool::new(false)));
        let thread = {
            let (probes, stop, address) =
                (Arc::clone(&probes), Arc::clone(&stop), node.http.clone());
            let path = format!("/api/v1/devices/{device}");
            std::thread::spawn(move || {
                for number in 0_u64.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let asked = Instant::now();
                    let ask = |method, path: &str, body: Option<&serde_json::Value>| {
                        request_within(ANSWER_MAX * 2, &address, TOKEN, method, path, body)
                    };
                    let (what, answer) = if number.is_multiple_of(4) {
                        let label = json!({ "labels": { "probed": number.to_string() } });
                        ("a change", ask("PATCH", &path, Some(&label)))
                    } else {
                        ("a list", ask("GET", "/api/v1/devices?limit=2", None))
                    };
                    let status = answer.map(|(status, _)| status);
                    let all: &Mutex<Vec<Probe>> = &probes;
                    all.lock().unwrap().push(Probe { asked, took: asked.elapsed(), what, status });
                    std::thread::sleep(Duration::from_millis(50));
                }
            })
        };
        Self { node: node.http.clone(), probes, stop, thread: Some(thread) }
    }

    /// Checks what was asked between two instants and answered since; returns how many, and the longest wait.
    fn check(&self, from: Instant, to: Instant, what: &str) -> (usize, Duration) {
        let probes = self.probes.lock().unwrap();
        let during = || probes.iter().filter(|probe| (from..to).contains(&probe.asked));
        for probe in during() {
            assert!(
                probe.status == Some(200) && probe.took < ANSWER_MAX,
                "{what}: {} at {} was answered {:?} after {:?}, {:?} into the fault",
                probe.what,
                self.node,
                probe.status,
                probe.took,
                probe.asked - from,
            );
        }
        (during().count(), during().map(|probe| probe.took).max().unwrap_or_default())
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // What it found is checked by who asks; here it ends.
            let _ended = thread.join();
        }
    }
}

/// What goes on while faults come and go.
struct Load {
    fleet: Fleet,
    probers: Vec<Prober>,
}

impl Load {
    /// Devices at `places`, callers at the nodes of `asked`.
    fn start(places: &[String], asked: &[&Server], manner: Manner) -> Self {
        let fleet = Fleet::start_with(places, DEVICES, manner);
        let load = Self { fleet, probers: Vec::new() };
        load.all_get_on("the first messages");
        let device = asked[0].device("kill-000").unwrap();
        Self { probers: asked.iter().map(|node| Prober::start(node, &device)).collect(), ..load }
    }

    /// Asks `node` instead of the one of this number: it has started again at another address.
    fn ask_instead(&mut self, number: usize, node: &Server) {
        let device = node.device("kill-000").unwrap();
        self.probers[number] = Prober::start(node, &device);
    }

    /// Waits until every device was acknowledged twice: the first may have been on its way before.
    fn all_get_on(&self, what: &str) -> Duration {
        let (before, began) = (self.fleet.answers(), Instant::now());
        wait_for(what, || {
            let now = self.fleet.answers();
            now.iter().zip(&before).all(|(now, before)| *now >= before + 2).then_some(())
        });
        began.elapsed()
    }

    /// Waits until no device has made a new connection for two seconds.
    fn settles(&self) {
        let (mut connections, mut since) = (self.fleet.connections(), Instant::now());
        wait_for("devices to stay where they are", || {
            let now = self.fleet.connections();
            if now != connections {
                (connections, since) = (now, Instant::now());
            }
            (since.elapsed() > Duration::from_secs(2)).then_some(())
        });
    }

    /// Has a fault begin, last, and end; `serving` are the callers whose nodes it leaves alone. Prints how long until every
    /// device was acknowledged and `recovered` was so.
    fn through(
        &self,
        fault: &Fault<'_>,
        begin: impl FnOnce(),
        end: impl FnOnce(),
        recovered: impl FnMut() -> Option<()>,
    ) {
        let Fault { what, lasts, effect, serving } = fault;
        let (connections, began) = (self.fleet.connections(), Instant::now());
        begin();
        let mut noticed = Duration::ZERO;
        if *effect == Effect::Silence {
            // What was stored before may still be told.
            std::thread::sleep(Duration::from_secs(1));
            let acked = self.fleet.acked();
            std::thread::sleep(lasts.saturating_sub(began.elapsed()));
            assert_eq!(
                self.fleet.acked(),
                acked,
                "{what}: acknowledged though it cannot be stored"
            );
        } else {
            noticed = self.all_get_on(&format!("all devices to be acknowledged: {what}"));
            std::thread::sleep(lasts.saturating_sub(began.elapsed()));
            // A while at least, in which callers are watched.
            std::thread::sleep(Duration::from_millis(300));
            self.all_get_on(&format!("all devices to be acknowledged to the end: {what}"));
        }
        let until = Instant::now();
        end();
        let ended = Instant::now();
        self.all_get_on(&format!("all devices to be acknowledged after: {what}"));
        wait_for(&format!("all to be as before: {what}"), recovered);
        let took = ended.elapsed();
        if *effect == Effect::None {
            assert_eq!(self.fleet.connections(), connections, "{what}: connections were dropped");
        }
        let (mut answered, mut slowest) = (0, Duration::ZERO);
        let from = if *effect == Effect::Failover { began + noticed } else { began };
        for at in *serving {
            let (count, longest) = self.probers[*at].check(from, until, what);
            assert!(count > 0, "{what}: the API at {} was not asked", self.probers[*at].node);
            (answered, slowest) = (answered + count, slowest.max(longest));
        }
        let meanwhile = match effect {
            Effect::Silence => "nothing is acknowledged meanwhile".to_owned(),
            Effect::None => "devices stay connected and acknowledged".to_owned(),
            Effect::Moved | Effect::Failover => {
                format!("all devices acknowledged after {} ms", noticed.as_millis())
            }
        };
        let api = if serving.is_empty() {
            String::new()
        } else {
            format!(", API answers (slowest of {answered}: {} ms)", slowest.as_millis())
        };
        println!("fault: {what}: {meanwhile}{api}; recovered in {} ms", took.as_millis());
    }

    /// Ends the load and compares what was acknowledged with what `server` has.
    fn finish(self, server: &Server, what: &str) {
        drop(self.probers);
        let acknowledged = self.fleet.finish();
        let compared = device::check(server, &acknowledged);
        println!("{what}: {compared} acknowledged messages: 0 lost, 0 doubled, all in order");
        // What is known of each device now is what it said last.
        for (ident, acked) in &acknowledged {
            let device = server.device(ident).unwrap();
            let path = format!("/api/v1/devices/{device}/state");
            wait_for(&format!("last values of {ident}: {acked} or one batch more"), || {
                let (status, state) = server.try_ask("GET", &path, None)?;
                let seq = state["values"]["seq"]["value"].as_u64()?;
                (status == 200 && seq >= *acked).then_some(())
            });
        }
    }
}

/// A fault of the table.
struct Fault<'a> {
    what: &'a str,
    lasts: Duration,
    effect: Effect,
    /// Callers of the API that must not notice it, by number.
    serving: &'a [usize],
}

/// Whether a node is ready and misses nothing.
fn is_whole(node: &Server) -> Option<()> {
    let (status, answer) = node.try_ask("GET", "/readyz", None)?;
    (status == 200 && answer["warnings"].as_array()?.is_empty()).then_some(())
}

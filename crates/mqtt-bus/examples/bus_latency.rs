//! What the external bus carries, and the latency that it adds at half of that.
//!
//! One thread publishes what ingest publishes, ten messages of a tracker and the names of what changed; another one listens
//! through a bus of its own. `BENCH_PORT` is a broker on this machine; `BENCH_SECONDS` how long each part takes, 5 unless given.

#![allow(
    clippy::print_stdout,
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a program that prints figures"
)]

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fieldline_contracts::{Bus, BusItem, MemoryBus, Subscription, SystemClock, TopicFilter};
use fieldline_model::{
    AccountId, Cursor, DeviceId, ParamName, Params, Series, Stored, Timestamp, Value,
};
use fieldline_mqtt_bus::{MqttBus, MqttBusConfig};

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

const ACCOUNT: AccountId = AccountId::from_bytes([1; 16]);
const MESSAGES: u64 = 10;
const DEVICES: u64 = 1_000;
/// Items that may be on their way while it is found out how many go through.
const WINDOW: u64 = 4_000;

fn setting<T: std::str::FromStr>(name: &str, default: T) -> T {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn main() -> Outcome<()> {
    let port: u16 = setting("BENCH_PORT", 1883);
    let seconds = Duration::from_secs(setting("BENCH_SECONDS", 5));
    let config =
        MqttBusConfig { url: format!("mqtt://127.0.0.1:{port}"), ..MqttBusConfig::default() };
    let carried = run(config.clone(), seconds, None)?;
    let messages = carried.items as f64 / 2.0 * MESSAGES as f64 / seconds.as_secs_f64();
    println!(
        "carried {:.0} items/s: {:.0} messages/s of {MESSAGES} at a time; {} told as lost",
        carried.items as f64 / seconds.as_secs_f64(),
        messages,
        carried.lost
    );
    let rate = messages / 2.0;
    let at_half = run(config, seconds, Some(rate))?;
    let own = memory(seconds, rate)?;
    for (name, run) in [("in process", &own), ("through the broker", &at_half)] {
        println!(
            "{name:>18} at {rate:.0} messages/s: p50 {:>6} us, p99 {:>6} us, {} told as lost",
            run.percentile(0.50),
            run.percentile(0.99),
            run.lost
        );
    }
    println!(
        "added: p50 {} us, p99 {} us; carries {messages:.0} messages/s",
        at_half.percentile(0.50).saturating_sub(own.percentile(0.50)),
        at_half.percentile(0.99).saturating_sub(own.percentile(0.99)),
    );
    Ok(())
}

/// What a listener got.
#[derive(Default)]
struct Got {
    items: u64,
    lost: u64,
    /// From publishing to here, sorted.
    micros: Vec<u64>,
}

impl Got {
    fn percentile(&self, share: f64) -> u64 {
        let at = (self.micros.len().saturating_sub(1) as f64 * share) as usize;
        self.micros.get(at).copied().unwrap_or_default()
    }
}

struct Shape {
    params: Params,
    changed: Arc<[ParamName]>,
    began: Instant,
}

impl Shape {
    fn new() -> Outcome<Self> {
        let values = [
            ("position.latitude", Value::scaled(547_146_368, 7)),
            ("position.longitude", Value::scaled(252_978_016, 7)),
            ("position.speed", Some(Value::Int(42))),
            ("position.satellites", Some(Value::Int(11))),
            ("battery.voltage", Value::scaled(12_610, 3)),
            ("engine.ignition.status", Some(Value::Bool(true))),
        ];
        let mut params = Params::new();
        for (name, value) in values {
            params.push(ParamName::new(name)?, value.ok_or("a value")?);
        }
        let changed = params.iter().map(|(name, _)| name.clone()).collect();
        Ok(Self { params, changed, began: Instant::now() })
    }

    /// Microseconds since the begin.
    fn now(&self) -> i64 {
        i64::try_from(self.began.elapsed().as_micros()).unwrap_or(i64::MAX)
    }

    /// What ingest publishes of one frame of a tracker.
    fn items(&self, n: u64) -> Vec<BusItem> {
        let mut id = [0; 16];
        id.iter_mut().zip((n % DEVICES).to_be_bytes()).for_each(|(to, from)| *to = from);
        let device = DeviceId::from_bytes(id);
        let (series, at) = (Series::messages(ACCOUNT, device), Timestamp::from_micros(self.now()));
        let one = |seq| {
            let cursor = Cursor { shard: 0, seq };
            Stored::read_back(series, at, at, self.params.clone(), cursor)
        };
        let messages = (n * MESSAGES..(n + 1) * MESSAGES).map(one).collect();
        let params = Arc::clone(&self.changed);
        vec![BusItem::Messages { device, messages }, BusItem::State { device, params }]
    }
}

/// Listens until told to stop; counts in `received`.
async fn listen(
    mut items: Box<dyn Subscription>,
    shape: &Shape,
    received: &AtomicU64,
    stop: &AtomicBool,
) -> Got {
    let mut got = Got::default();
    while !stop.load(Ordering::Relaxed) {
        let Ok(item) = tokio::time::timeout(Duration::from_millis(50), items.next()).await else {
            continue;
        };
        match item {
            Some(Ok(item)) => {
                got.items += 1;
                if let BusItem::Messages { messages, .. } = item
                    && let Some(first) = messages.first()
                {
                    let micros = shape.now() - first.received().as_micros();
                    got.micros.push(u64::try_from(micros).unwrap_or_default());
                }
                received.store(got.items + got.lost, Ordering::Relaxed);
            }
            Some(Err(lagged)) => got.lost += lagged.0,
            None => break,
        }
    }
    got.micros.sort_unstable();
    got
}

/// Publishes for a while: at a rate of messages, or as much as goes through.
async fn publish(
    bus: &dyn Bus,
    shape: &Shape,
    received: &AtomicU64,
    time: Duration,
    rate: Option<f64>,
) {
    let began = Instant::now();
    let mut n = 0_u64;
    let mut pace = tokio::time::interval(Duration::from_millis(1));
    while began.elapsed() < time {
        let due = match rate {
            Some(rate) => (began.elapsed().as_secs_f64() * rate / MESSAGES as f64) as u64,
            None => (received.load(Ordering::Relaxed) + WINDOW) / 2,
        };
        while n < due {
            bus.publish(ACCOUNT, shape.items(n)).await;
            n += 1;
            if n.is_multiple_of(32) {
                tokio::task::yield_now().await;
            }
        }
        pace.tick().await;
    }
}

fn runtime() -> Outcome<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// Through the broker, from one thread to another.
fn run(config: MqttBusConfig, time: Duration, rate: Option<f64>) -> Outcome<Got> {
    let shape = Shape::new()?;
    let (received, stop, ready) =
        (AtomicU64::new(0), AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let listener = scope.spawn(|| -> Outcome<Got> {
            runtime()?.block_on(async {
                let bus = MqttBus::connect(config.clone(), Arc::new(SystemClock)).await?;
                let items = bus.subscribe(ACCOUNT, TopicFilter::default()).await;
                ready.store(true, Ordering::Release);
                Ok(listen(items, &shape, &received, &stop).await)
            })
        });
        runtime()?.block_on(async {
            let bus = MqttBus::connect(config.clone(), Arc::new(SystemClock)).await?;
            while !ready.load(Ordering::Acquire) && !listener.is_finished() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            publish(&bus, &shape, &received, time, rate).await;
            stop.store(true, Ordering::Relaxed);
            bus.close(Duration::from_secs(5)).await;
            Outcome::Ok(())
        })?;
        listener.join().map_err(|_| "the listener ended badly")?
    })
}

/// Within one process, for comparison.
fn memory(time: Duration, rate: f64) -> Outcome<Got> {
    let shape = Shape::new()?;
    let (received, stop, bus) = (AtomicU64::new(0), AtomicBool::new(false), MemoryBus::new());
    let items = runtime()?.block_on(bus.subscribe(ACCOUNT, TopicFilter::default()));
    std::thread::scope(|scope| {
        let listener = scope.spawn(|| -> Outcome<Got> {
            Ok(runtime()?.block_on(listen(items, &shape, &received, &stop)))
        });
        runtime()?.block_on(publish(&bus, &shape, &received, time, Some(rate)));
        stop.store(true, Ordering::Relaxed);
        listener.join().map_err(|_| "the listener ended badly")?
    })
}

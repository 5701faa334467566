//! Last values a second through `RedisState` against bare GETs of the same server in the same run:
//! what the guard of a generation and the exact encoding cost.
//!
//! `cargo run --release -p fieldline-redis --example last_value_bench [-- URL]`; without an address
//! it starts a redis-server of its own. In turns, three rounds of two seconds each; medians count.

#![allow(clippy::print_stdout, reason = "a measurement prints")]
#![allow(clippy::expect_used, reason = "a measurement that cannot run ends")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fieldline_contracts::{Clock as _, History, State, SystemClock};
use fieldline_model::{Accepted, AccountId, DeviceId, ParamName, Params, Series, Value};
use fieldline_redis::{RedisConfig, RedisState};
use fieldline_testkit::ScriptedHistory;
use fieldline_testkit::servers::Redis;

const ROUND: Duration = Duration::from_secs(2);
const ROUNDS: usize = 3;
const DEVICES: usize = 100_000;
/// Callers at once: as many requests as an HTTP server has in hand.
const CALLERS: usize = 64;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let own = std::env::args().nth(1).is_none().then(Redis::start);
    let url = own.as_ref().map(Redis::url).or_else(|| std::env::args().nth(1)).expect("an address");
    let history = Arc::new(ScriptedHistory::new());
    let (account, devices) = stored(&history).await;
    let prefix = format!("bench-{:08x}", rand::random::<u32>());
    let config = RedisConfig { url: url.clone(), prefix, ..RedisConfig::default() };
    let dynamic: Arc<dyn History> = Arc::clone(&history) as _;
    let state = RedisState::connect(config, "bench", dynamic).await.expect("it connects");
    let filling = Instant::now();
    let first = devices.first().copied().expect("a device");
    while state.value(account, first, "battery.voltage").await.is_err() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let took = filling.elapsed().as_secs_f64();
    println!("filled from history: {DEVICES} devices in {took:.2} s");
    assert!(state.ready(Duration::from_secs(60)).await, "{:?}", state.problems());
    let state = Arc::new(state);
    let client = redis::Client::open(url.as_str()).expect("an address");
    let bare = client.get_multiplexed_async_connection().await.expect("it connects");
    let fill = (0..DEVICES).fold(redis::pipe(), |mut pipe, at| {
        // As long as a record is.
        pipe.cmd("SET").arg(format!("bench:{at:032}")).arg("x".repeat(30)).ignore();
        pipe
    });
    let () = fill.query_async(&mut bare.clone()).await.expect("it is written");
    let devices: Arc<[DeviceId]> = devices.into();

    let mut rates: [Vec<f64>; 4] = Default::default();
    for _ in 0..ROUNDS {
        let get = |callers: usize| {
            let bare = bare.clone();
            measure(callers, move |n| {
                let mut bare = bare.clone();
                async move {
                    let mut cmd = redis::cmd("GET");
                    cmd.arg(format!("bench:{:032}", n % DEVICES));
                    let found: Option<Vec<u8>> =
                        cmd.query_async(&mut bare).await.expect("it answers");
                    assert!(found.is_some_and(|found| found.len() == 30));
                }
            })
        };
        let value = |callers: usize| {
            let (state, devices) = (Arc::clone(&state), Arc::clone(&devices));
            measure(callers, move |n| {
                let (state, device) =
                    (Arc::clone(&state), devices.get(n % DEVICES).copied().expect("a device"));
                async move {
                    let found = state.value(account, device, "battery.voltage").await;
                    assert!(found.expect("it answers").is_some());
                }
            })
        };
        rates[0].push(get(1).await);
        rates[1].push(value(1).await);
        rates[2].push(get(CALLERS).await);
        rates[3].push(value(CALLERS).await);
    }
    let [get_one, value_one, get_many, value_many] = rates.map(median);
    println!("one at a time:   bare GET {get_one:9.0}/s, last values {value_one:9.0}/s");
    println!("{CALLERS} at a time:    bare GET {get_many:9.0}/s, last values {value_many:9.0}/s");
    let ratio = (value_one / get_one).min(value_many / get_many);
    println!(
        "ratio one at a time {:.2}, {CALLERS} at a time {:.2}",
        value_one / get_one,
        value_many / get_many
    );
    let met = if ratio >= 0.5 { "met" } else { "NOT met" };
    println!("ratio {ratio:.2}; goal: at least 0.50: {met}");
    state.close().await;
}

/// Devices that have said something.
async fn stored(history: &ScriptedHistory) -> (AccountId, Vec<DeviceId>) {
    let clock = SystemClock;
    let account = AccountId::new(clock.now(), clock.random());
    let name = |text: &str| ParamName::new(text).expect("a name");
    let mut devices = Vec::with_capacity(DEVICES);
    for n in 0..DEVICES {
        let device = DeviceId::new(clock.now(), clock.random());
        let voltage = Value::scaled(12_610 + i64::try_from(n).unwrap_or(0), 3).expect("a decimal");
        let params: Params =
            [(name("battery.voltage"), voltage), (name("position.speed"), Value::Int(42))]
                .into_iter()
                .collect();
        let accepted = Accepted::own(Series::messages(account, device), clock.now(), params);
        history.append(vec![accepted]).await.expect("it is stored");
        devices.push(device);
    }
    (account, devices)
}

/// Calls a second of `callers` that each make one after the other.
async fn measure<F>(callers: usize, call: impl Fn(usize) -> F + Clone + Send + 'static) -> f64
where
    F: Future<Output = ()> + Send + 'static,
{
    let done = Arc::new(AtomicU64::new(0));
    let began = Instant::now();
    let tasks: Vec<_> = (0..callers)
        .map(|caller| {
            let (done, call) = (Arc::clone(&done), call.clone());
            tokio::spawn(async move {
                let mut n = caller * 31;
                while began.elapsed() < ROUND {
                    call(n).await;
                    n += 1;
                    done.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("a caller ends");
    }
    done.load(Ordering::Relaxed) as f64 / began.elapsed().as_secs_f64()
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates.get(rates.len() / 2).copied().unwrap_or(0.0)
}

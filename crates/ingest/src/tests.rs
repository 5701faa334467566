use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::registry::{ParameterObject, RegistryExt};
use fieldline_contracts::{
    Actor, BusItem, Clock, HistoryError, MemoryBus, Platform, SystemClock, TopicFilter,
};
use fieldline_model::{
    Account, AccountId, Channel, Decimal, Decoded, Device, DeviceId, EventKind, ParamKind,
    ParamName, ParamSpec, Params, Series, SeriesKind, Timestamp, Transport, Value,
};
use fieldline_router::LocalCommands;
use fieldline_testkit::{MemoryRegistry, Script, ScriptedHistory, SwitchedState};

use crate::{Ingest, RegisterError, Submitted, own_params, stored_event};

struct World {
    ingest: Ingest,
    history: Arc<ScriptedHistory>,
    state: Arc<SwitchedState>,
    registry: Arc<MemoryRegistry>,
    account: AccountId,
    device: DeviceId,
}

fn device(account: AccountId, ident: &str) -> Device {
    let clock = SystemClock;
    Device {
        id: DeviceId::new(clock.now(), clock.random()),
        account,
        name: ident.to_owned(),
        ident: ident.to_owned(),
        protocol: String::new(),
        kind: String::new(),
        enabled: true,
        settings: Default::default(),
        labels: Default::default(),
        created_at: clock.now(),
    }
}

fn world() -> World {
    let clock = Arc::new(SystemClock);
    let registry = Arc::new(MemoryRegistry::new(clock.clone()));
    let history = Arc::new(ScriptedHistory::new());
    let state = Arc::new(SwitchedState::new());
    let platform = Platform {
        registry: registry.clone(),
        history: history.clone(),
        state: state.clone(),
        bus: Arc::new(MemoryBus::new()),
        commands: Arc::new(LocalCommands::new(registry.clone(), clock.clone())),
        clock,
    };
    let ingest = Ingest::new(platform);
    let clock = SystemClock;
    let account = AccountId::new(clock.now(), clock.random());
    let device = DeviceId::new(clock.now(), clock.random());
    World { ingest, history, state, registry, account, device }
}

fn message(second: i64, speed: i64) -> Decoded {
    let name = ParamName::new("position.speed").unwrap();
    let params = [(name, Value::Int(speed))].into_iter().collect();
    Decoded { timestamp: Some(Timestamp::from_seconds(1_700_000_000 + second)), params }
}

async fn speed(world: &World) -> Option<i64> {
    let values = world.ingest.platform().state.get(world.account, world.device).await.unwrap();
    values.get("position.speed").and_then(|last| last.value.as_i64())
}

impl World {
    async fn submit(&self, messages: Vec<Decoded>) -> Result<Submitted, HistoryError> {
        self.ingest.submit(self.account, self.device, self.ingest.now(), messages).await
    }
}

#[tokio::test]
async fn what_is_durable_is_known_and_told() {
    let world = world();
    let bus = Arc::clone(&world.ingest.platform().bus);
    let mut items = bus.subscribe(world.account, TopicFilter::default()).await;
    let submitted = world.submit(vec![message(1, 10), message(2, 20)]).await.unwrap();
    assert_eq!(submitted, Submitted { stored: 2, duplicates: 0, rejected: 0 });
    assert_eq!(speed(&world).await, Some(20));
    let Some(Ok(BusItem::Messages { messages, .. })) = items.next().await else { panic!() };
    assert_eq!(messages.len(), 2);
    // Brought to the declared kind: a decimal of three places.
    assert!(matches!(messages[0].params().get("position.speed"), Some(Value::Decimal(_))));
    let Some(Ok(BusItem::State { params, .. })) = items.next().await else { panic!() };
    assert_eq!(params.iter().map(ParamName::as_str).collect::<Vec<_>>(), ["position.speed"]);
    assert_eq!(world.ingest.inner.turns.in_use(), 0);
}

#[tokio::test]
async fn what_is_not_durable_is_neither_known_nor_told() {
    let world = world();
    let bus = Arc::clone(&world.ingest.platform().bus);
    let mut items = bus.subscribe(world.account, TopicFilter::default()).await;
    world.history.play([Script::Fail(HistoryError::Full("disk".to_owned()))]);
    let failed = world.submit(vec![message(1, 10)]).await;
    assert!(matches!(failed, Err(HistoryError::Full(_))), "{failed:?}");
    assert_eq!(speed(&world).await, None);
    let silent = tokio::time::timeout(Duration::from_millis(20), items.next()).await;
    assert!(silent.is_err());
}

/// Last values that are away keep nobody from being acknowledged, and those who follow them hear
/// that there is something to read.
#[tokio::test]
async fn last_values_that_are_away_keep_no_device_waiting() {
    let world = world();
    let bus = Arc::clone(&world.ingest.platform().bus);
    let mut items = bus.subscribe(world.account, TopicFilter::default()).await;
    world.state.set_away(true);
    let submitted = world.submit(vec![message(1, 10)]).await.unwrap();
    assert_eq!(submitted.stored, 1);
    let again = world.submit(vec![message(1, 10)]).await.unwrap();
    assert_eq!((again.stored, again.duplicates), (0, 1));
    let mut told = 0;
    for _ in 0..3 {
        if let Some(Ok(BusItem::State { params, .. })) = items.next().await {
            assert_eq!(params[0].as_str(), "position.speed");
            told += 1;
        }
    }
    assert_eq!(told, 2);
    world.state.set_away(false);
    world.submit(vec![message(2, 20)]).await.unwrap();
    assert_eq!(speed(&world).await, Some(20));
}

#[tokio::test(start_paused = true)]
async fn a_busy_store_is_tried_again() {
    let world = world();
    world.history.play([Script::Fail(HistoryError::Busy), Script::Fail(HistoryError::Busy)]);
    assert_eq!(world.submit(vec![message(1, 10)]).await.unwrap().stored, 1);
    world.history.fail_always(Some(HistoryError::Busy));
    assert!(matches!(world.submit(vec![message(2, 10)]).await, Err(HistoryError::Busy)));
    // However long the store takes to say so.
    world.history.set_delay(Duration::from_secs(2));
    let begun = tokio::time::Instant::now();
    assert!(matches!(world.submit(vec![message(2, 10)]).await, Err(HistoryError::Busy)));
    assert!(begun.elapsed() <= Duration::from_secs(6), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn again_is_the_same_as_once_and_state_catches_up() {
    let world = world();
    world.history.play([Script::StoreAndFail(HistoryError::Failed("sync".to_owned()))]);
    assert!(world.submit(vec![message(1, 10)]).await.is_err());
    assert_eq!(speed(&world).await, None);
    // The device sends it again: it is there already, and now last values learn of it.
    let again = world.submit(vec![message(1, 10), message(1, 11)]).await.unwrap();
    assert_eq!(again, Submitted { stored: 1, duplicates: 1, rejected: 0 });
    assert_eq!(speed(&world).await, Some(11));
    // The first of two of one instant, sent once more, must not undo the second.
    world.submit(vec![message(1, 10)]).await.unwrap();
    assert_eq!(speed(&world).await, Some(11));
    assert_eq!(world.history.all(SeriesKind::Message).len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn one_device_has_one_order_whoever_brings_it() {
    let world = Arc::new(world());
    let bus = Arc::clone(&world.ingest.platform().bus);
    let mut items = bus.subscribe(world.account, TopicFilter::default()).await;
    world.history.set_delay(Duration::from_micros(200));
    let submits = (0..40).map(|n| {
        let world = Arc::clone(&world);
        tokio::spawn(async move { world.submit(vec![message(n, n)]).await.unwrap() })
    });
    for submit in submits.collect::<Vec<_>>() {
        submit.await.unwrap();
    }
    let stored: Vec<Timestamp> =
        world.history.all(SeriesKind::Message).iter().map(|m| m.timestamp()).collect();
    let mut told = Vec::new();
    while told.len() < stored.len() {
        if let Some(Ok(BusItem::Messages { messages, .. })) = items.next().await {
            told.extend(messages.iter().map(|m| m.timestamp()));
        }
    }
    assert_eq!(stored, told);
    assert_eq!(world.ingest.inner.turns.in_use(), 0);
}

#[tokio::test]
async fn a_message_too_large_is_counted_and_logged() {
    let world = world();
    let huge = Decoded {
        timestamp: None,
        params: own_params([("payload", Value::from(vec![0_u8; (1 << 20) + 1].as_slice()))]),
    };
    let submitted = world.submit(vec![huge, message(1, 1)]).await.unwrap();
    assert_eq!(submitted, Submitted { stored: 1, duplicates: 0, rejected: 1 });
    world.ingest.flush().await;
    let log = world.history.all(SeriesKind::DeviceLog);
    assert_eq!(log[0].params().get("error.class"), Some(&Value::from("rejected")));
}

#[tokio::test]
async fn caches_follow_the_registry_at_once() {
    let world = world();
    let (ingest, registry, actor) = (&world.ingest, &world.registry, Actor::system("test"));
    assert!(ingest.ready(Duration::from_secs(5)).await);
    for round in 0..50 {
        let ident = format!("{round}");
        assert!(ingest.device_by_ident(world.account, &ident).await.unwrap().is_none());
        let mut device = device(world.account, &ident);
        registry.create_object(world.account, &device, &actor).await.unwrap();
        let known = ingest.device_by_ident(world.account, &ident).await.unwrap().unwrap();
        assert!(known.enabled);
        device.enabled = false;
        device.ident = format!("{round}-renamed");
        registry.update_object(world.account, &device, None, &actor).await.unwrap();
        assert!(ingest.device_by_ident(world.account, &ident).await.unwrap().is_none());
        let renamed = ingest.device_by_ident(world.account, &device.ident).await.unwrap().unwrap();
        assert!(!renamed.enabled);
        assert!(!ingest.device(world.account, device.id).await.unwrap().unwrap().enabled);
        // Another account never sees it.
        let other = AccountId::new(ingest.now(), [7; 10]);
        assert!(ingest.device_by_ident(other, &device.ident).await.unwrap().is_none());
        assert!(ingest.device(other, device.id).await.unwrap().is_none());
    }
}

/// Waits for a state that a background task brings about.
async fn eventually(mut holds: impl FnMut() -> bool) {
    for _ in 0..500 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it did not come to hold within five seconds");
}

#[tokio::test]
async fn declared_parameters_and_disabled_accounts_are_followed() {
    let world = world();
    let (ingest, registry, actor) = (&world.ingest, &world.registry, Actor::system("test"));
    assert!(ingest.ready(Duration::from_secs(5)).await);
    let spec = ParamSpec {
        name: ParamName::new("weight").unwrap(),
        kind: ParamKind::Decimal,
        bits: 0,
        decimals: 1,
        unit: "kg".to_owned(),
        title: String::new(),
        description: String::new(),
    };
    let parameter = ParameterObject { id: DeviceId::new(ingest.now(), [1; 10]).0, spec };
    registry.create_object(world.account, &parameter, &actor).await.unwrap();
    eventually(|| ingest.schema(world.account).get("weight").is_some()).await;
    assert!(ingest.schema(world.account).get("position.latitude").is_some());
    let spec = ingest.schema(world.account).get("weight").cloned().unwrap();
    assert_eq!(spec.conform(&Value::Int(7)), Decimal::new(70, 1).map(Value::Decimal),);

    let mut account = Account {
        id: world.account,
        name: "default".to_owned(),
        enabled: true,
        retention_days: 0,
        storage_bytes_max: 0,
        labels: Default::default(),
        created_at: ingest.now(),
    };
    registry.create_object(world.account, &account, &actor).await.unwrap();
    assert!(ingest.account_enabled(world.account));
    account.enabled = false;
    registry.update_object(world.account, &account, None, &actor).await.unwrap();
    eventually(|| !ingest.account_enabled(world.account)).await;
}

fn channel(account: AccountId) -> Channel {
    serde_json::from_value(serde_json::json!({
        "id": DeviceId::new(SystemClock.now(), [3; 10]), "account": account, "name": "c",
        "protocol": "teltonika", "transport": Transport::Tcp, "listen": "127.0.0.1:0",
        "enabled": true, "created_at": SystemClock.now(),
    }))
    .unwrap()
}

#[tokio::test]
async fn a_device_registers_itself_once() {
    let world = world();
    let channel = channel(world.account);
    let both =
        tokio::join!(world.ingest.register(&channel, "1"), world.ingest.register(&channel, "1"));
    assert_eq!(both.0.unwrap().id, both.1.unwrap().id);
    let long = "x".repeat(65);
    for wrong in ["", "a\nb", &long, "a/b", "a+b", "ü/#x", "a\u{202e}b", "\u{200b}", " a"] {
        let refused = world.ingest.register(&channel, wrong).await;
        assert!(matches!(refused, Err(RegisterError::Ident)), "{wrong:?}: {refused:?}");
    }
    assert!(world.ingest.register(&channel, &"ü".repeat(64)).await.is_ok());
    world.ingest.flush().await;
    let events = world.history.all(SeriesKind::Event);
    assert_eq!(events.len(), 2);
    let event = stored_event(&events[0]).unwrap();
    assert_eq!((event.kind, event.account), (EventKind::Registered, world.account));
    assert_eq!(event.params.get("ident"), Some(&Value::from("1")));
}

#[tokio::test]
async fn log_lines_are_stored_and_told_in_order_and_dropped_when_too_many() {
    let world = world();
    let bus = Arc::clone(&world.ingest.platform().bus);
    let mut items = bus.subscribe(world.account, TopicFilter::default()).await;
    let series = Series::device_log(world.account, world.device);
    let line = move |n: i64| {
        let params = own_params([("text", Value::Int(n))]);
        fieldline_model::Accepted::own(series, Timestamp::from_seconds(n), params)
    };
    world.ingest.log((0..10).map(line).collect()).await;
    world.ingest.log_with(100, move || line(10));
    world.ingest.flush().await;
    let mut told: Vec<i64> = Vec::new();
    while told.len() < 11 {
        let Some(Ok(BusItem::Log { lines, kind: SeriesKind::DeviceLog, .. })) = items.next().await
        else {
            panic!()
        };
        told.extend(lines.iter().filter_map(|l| l.params().get("text")?.as_i64()));
    }
    assert_eq!(told, (0..11).collect::<Vec<_>>());

    // 40 lines of 1 MiB do not fit the queue: some are dropped, nothing waits.
    for n in 0..40 {
        let params: Params =
            own_params([("frame.hex", Value::from(vec![0_u8; 1 << 20].as_slice()))]);
        let big = fieldline_model::Accepted::own(series, Timestamp::from_seconds(100 + n), params);
        world.ingest.log(vec![big]).await;
    }
    world.ingest.flush().await;
    let stored = world.history.all(SeriesKind::DeviceLog).len() - 11;
    assert!((1..40).contains(&stored), "{stored}");
}

#[tokio::test]
async fn the_pipeline_works_from_another_runtime() {
    let world = Arc::new(world());
    let elsewhere = Arc::clone(&world);
    let submitted = tokio::task::spawn_blocking(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(elsewhere.submit(vec![message(1, 5)]))
    });
    assert_eq!(submitted.await.unwrap().unwrap().stored, 1);
    assert_eq!(speed(&world).await, Some(5));
}

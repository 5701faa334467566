//! Simulated fleets against the gateway: what they call acknowledged is stored, once.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::{HistoryError, NewCommand, SystemClock};
use fieldline_model::{SeriesKind, Transport, Value};
use fieldline_testkit::{AckJournal, Fleet, Protocol, Script, Stats};
use tokio_util::sync::CancellationToken;

use crate::{World, actor, config};

async fn drive(protocol: Protocol, udp: bool) {
    let name = if protocol == Protocol::Teltonika { "teltonika" } else { "wialon_ips" };
    let mut world = World::start(config()).await;
    let transport = if udp { Transport::Udp } else { Transport::Tcp };
    let channel = world.new_channel(name, transport);
    let address = world.create(&channel).await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("acked");
    let mut fleet = Fleet::new(protocol, 20, 20.0, address.to_string(), Arc::new(SystemClock));
    fleet.udp = udp;
    fleet.journal = Some(Arc::new(AckJournal::open(&path).unwrap()));
    let (stop, stats) = (CancellationToken::new(), Arc::new(Stats::default()));
    let running = tokio::spawn({
        let (fleet, stop, stats) = (fleet.clone(), stop.clone(), Arc::clone(&stats));
        async move { fleet.run(stop, stats).await }
    });
    // Trouble on the way: refusals, and appends that happened although they failed.
    for round in 0..4 {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let error = HistoryError::Failed("sync".to_owned());
        world.history.play([if round % 2 == 0 {
            Script::Fail(error)
        } else {
            Script::StoreAndFail(error)
        }]);
    }
    tokio::time::sleep(Duration::from_millis(800)).await;
    stop.cancel();
    running.await.unwrap();

    let acked = AckJournal::read(&path).unwrap();
    assert_eq!(acked.len() as u64, Stats::get(&stats.acked), "{}", stats.summary());
    assert!(acked.len() > 300, "{}", stats.summary());
    let mut stored = HashSet::new();
    let sequence_param = protocol.sequence_param();
    for message in world.history.all(SeriesKind::Message) {
        let sequence = message.params().get(sequence_param).and_then(Value::as_i64);
        let sequence = sequence.unwrap_or_else(|| panic!("{sequence_param} in {message:?}"));
        assert!(stored.insert((message.series().object, sequence)), "stored twice");
    }
    for number in 0..fleet.devices {
        let ident = fleet.ident(number);
        let device = world.device(&ident).await;
        for (_, sequence, _) in acked.iter().filter(|(of, _, _)| *of == ident) {
            let key = (device.id.0, i64::from(*sequence));
            assert!(stored.contains(&key), "{ident} {sequence} was acknowledged and is lost");
        }
        let values = world.platform.state.get(world.account, device.id).await.unwrap();
        for name in ["position.latitude", "position.longitude", "position.speed"] {
            assert!(values.contains_key(name), "{name} of {ident}: {values:?}");
        }
    }
    assert_eq!(world.stop().await.abandoned, 0);
}

#[tokio::test]
async fn teltonika_over_tcp() {
    drive(Protocol::Teltonika, false).await;
}

#[tokio::test]
async fn teltonika_over_udp() {
    drive(Protocol::Teltonika, true).await;
}

#[tokio::test]
async fn wialon_ips_over_tcp() {
    drive(Protocol::WialonIps, false).await;
}

#[tokio::test]
async fn wialon_ips_over_udp() {
    drive(Protocol::WialonIps, true).await;
}

#[tokio::test]
async fn a_simulated_tracker_obeys() {
    obeys(Transport::Tcp).await;
}

#[tokio::test]
async fn a_simulated_tracker_obeys_over_udp() {
    obeys(Transport::Udp).await;
}

async fn obeys(transport: Transport) {
    let mut world = World::start(config()).await;
    let address = world.create(&world.new_channel("teltonika", transport)).await;
    let mut fleet =
        Fleet::new(Protocol::Teltonika, 2, 5.0, address.to_string(), Arc::new(SystemClock));
    fleet.udp = transport == Transport::Udp;
    let (stop, stats) = (CancellationToken::new(), Arc::new(Stats::default()));
    let running = tokio::spawn({
        let (fleet, stop, stats) = (fleet.clone(), stop.clone(), Arc::clone(&stats));
        async move { fleet.run(stop, stats).await }
    });
    while Stats::get(&stats.acked) < 4 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let device = world.device(&fleet.ident(1)).await;
    for (text, begins) in [("getver", "Ver:"), ("getinfo", "RTC:"), ("echo hello", "hello")] {
        let params = serde_json::from_value(serde_json::json!({ "text": text })).unwrap();
        let new = NewCommand { name: "text".to_owned(), params, ttl_s: 60 };
        let commands = &world.platform.commands;
        let command = commands.submit(world.account, device.id, new, &actor()).await.unwrap();
        let answered = commands.wait(world.account, command.id, 10_000).await.unwrap();
        assert!(answered.answer.as_deref().unwrap().starts_with(begins), "{answered:?}");
    }
    stop.cancel();
    running.await.unwrap();
    world.stop().await;
}

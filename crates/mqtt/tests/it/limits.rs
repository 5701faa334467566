//! Every bound, and what happens at it.

use std::time::Duration;

use fieldline_model::Value;
use fieldline_mqtt::MqttConfig;

use crate::harness::Server;
use crate::wire::{Hello, Wire, packet, text};

#[tokio::test]
async fn a_slow_client_loses_its_own_messages_only() {
    let config = MqttConfig {
        queue_messages_max: 64,
        write_timeout: Duration::from_secs(60),
        ..MqttConfig::default()
    };
    let server = Server::with(config, None).await;
    let tenant = server.tenant("a").await;
    let mut slow = Wire::join(&server, true, "slow", &tenant.token).await;
    let mut quick = Wire::join(&server, true, "quick", &tenant.token).await;
    slow.subscribe("client/#", 0).await;
    quick.subscribe("client/#", 0).await;
    let mut from = Wire::join(&server, true, "from", &tenant.token).await;
    // 40 MB: more than sockets hold. The quick client reads all of it.
    let payload = "x".repeat(100_000);
    let reading = tokio::spawn(async move {
        for n in 0..400 {
            let got = quick.message().await;
            assert_eq!(got.topic, format!("client/{n}"));
        }
        quick
    });
    for n in 0..400 {
        assert_eq!(from.publish_acked(&format!("client/{n}"), &payload).await, 0);
    }
    reading.await.unwrap();
    // The slow one gets what its queue and sockets held, in order, and lives on.
    let (mut count, mut last) = (0, -1);
    while let Ok(got) = slow.try_recv(Duration::from_millis(500)).await {
        let topic = crate::wire::received(&got, true).topic;
        let n: i64 = topic.trim_start_matches("client/").parse().unwrap();
        assert!(n > last);
        (count, last) = (count + 1, n);
    }
    assert!((1..400).contains(&count), "{count}");
    from.publish("client/after", "x", 0, &[]).await;
    assert_eq!(slow.message().await.topic, "client/after");
}

#[tokio::test]
async fn a_client_that_falls_behind_at_qos_1_is_told_and_ended() {
    let config = MqttConfig { queue_messages_max: 32, inflight_max: 4, ..MqttConfig::default() };
    let server = Server::with(config, None).await;
    let tenant = server.tenant("a").await;
    let mut slow = Wire::join(&server, true, "slow", &tenant.token).await;
    let mut quick = Wire::join(&server, true, "quick", &tenant.token).await;
    slow.subscribe("client/#", 1).await;
    quick.subscribe("client/#", 0).await;
    let mut from = Wire::join(&server, true, "from", &tenant.token).await;
    for n in 0..40 {
        assert_eq!(from.publish_acked("client/x", &n.to_string()).await, 0);
        assert_eq!(quick.message().await.payload, n.to_string());
    }
    assert_eq!(slow.closed().await, Some(0x97));
}

#[tokio::test]
async fn a_client_that_takes_nothing_is_ended() {
    let config = MqttConfig { write_timeout: Duration::from_millis(500), ..MqttConfig::default() };
    let server = Server::with(config, None).await;
    let tenant = server.tenant("a").await;
    let mut hello = Hello::new(true, "stuck", &tenant.token);
    hello.will = Some(("client/stuck", "gone", 0, false));
    let (mut stuck, _) = Wire::hello(&server, &hello).await;
    stuck.subscribe("client/load", 0).await;
    let mut watch = Wire::join(&server, true, "watch", &tenant.token).await;
    watch.subscribe("client/stuck", 0).await;
    let mut from = Wire::join(&server, true, "from", &tenant.token).await;
    let payload = "x".repeat(200_000);
    for _ in 0..100 {
        from.publish_acked("client/load", &payload).await;
    }
    assert_eq!(watch.message().await.payload, "gone");
}

#[tokio::test]
async fn oversized_packets_are_refused_before_they_are_read() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let mut wire = Wire::join(&server, true, "c", &tenant.token).await;
    // PUBLISH that says it has 256 MiB.
    wire.send(&[0x30, 0xff, 0xff, 0xff, 0x7f]).await;
    assert_eq!(wire.closed().await, Some(0x95));
    let mut wire = Wire::open(&server).await;
    wire.send(&[0x10, 0xff, 0xff, 0xff, 0x7f]).await;
    wire.closed().await;
    // HTTP is not waited for.
    let mut wire = Wire::open(&server).await;
    wire.send(b"GET / HTTP/1.1\r\n\r\n").await;
    assert_eq!(wire.closed().await, None);
}

#[tokio::test]
async fn connections_and_subscriptions_are_counted() {
    let config = MqttConfig {
        connections_max: 3,
        account_connections_max: 2,
        subscriptions_max: 2,
        ..MqttConfig::default()
    };
    let server = Server::with(config, None).await;
    let (a, b) = (server.tenant("a").await, server.tenant("b").await);
    let mut first = Wire::join(&server, true, "1", &a.token).await;
    let _second = Wire::join(&server, true, "2", &a.token).await;
    let refused = async |token: &str, reason: u8| {
        let mut wire = Wire::open(&server).await;
        wire.send(&Hello::new(true, "3", token).bytes()).await;
        assert_eq!(wire.recv().await.body[1], reason);
        wire.closed().await;
    };
    refused(&a.token, 0x97).await;
    let _third = Wire::join(&server, true, "1", &b.token).await;
    refused(&b.token, 0x89).await;
    for (filter, code) in
        [("message/a", 0), ("message/b", 0), ("message/c", 0x97), ("message/a", 0)]
    {
        assert_eq!(first.subscribe(filter, 0).await, code, "{filter}");
    }
    drop(first);
    // A place becomes free.
    let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
    loop {
        let mut wire = Wire::open(&server).await;
        wire.send(&Hello::new(true, "3", &a.token).bytes()).await;
        if wire.recv().await.body[1] == 0 {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn retained_messages_are_bounded_for_each_account() {
    let config =
        MqttConfig { retained_messages_max: 3, retained_bytes_max: 1_000, ..MqttConfig::default() };
    let server = Server::with(config, None).await;
    let (a, b) = (server.tenant("a").await, server.tenant("b").await);
    let mut wire = Wire::join(&server, true, "c", &a.token).await;
    let mut retain = async |topic: &str, payload: &str| {
        let id = wire.publish(topic, payload, 0x03, &[]).await.unwrap();
        wire.puback(id).await
    };
    assert_eq!(retain("client/1", &"x".repeat(2_000)).await, 0x97);
    for n in 1..4 {
        assert_eq!(retain(&format!("client/{n}"), "x").await, 0x10);
    }
    assert_eq!(retain("client/4", "x").await, 0x97);
    assert_eq!(retain("client/3", "y").await, 0x10, "replacing is no more");
    assert_eq!(retain("client/3", &"y".repeat(990)).await, 0x97);
    assert_eq!(retain("client/2", "").await, 0x10);
    assert_eq!(retain("client/4", "x").await, 0x10);
    let mut other = Wire::join(&server, true, "c", &b.token).await;
    let id = other.publish("client/1", "x", 0x03, &[]).await.unwrap();
    assert_eq!(other.puback(id).await, 0x10, "another account has its own");
}

#[tokio::test]
async fn an_account_that_publishes_too_fast_is_read_more_slowly_and_loses_nothing() {
    // Ten seconds' worth go at once, the rest by the second.
    let config = MqttConfig { account_publishes_per_s_max: 20, ..MqttConfig::default() };
    let server = Server::with(config, None).await;
    let (fast, other) = (server.tenant("fast").await, server.tenant("other").await);
    let mut wire = Wire::join(&server, true, "c", &fast.token).await;
    let mut burst = vec![];
    for n in 0..230_u16 {
        let mut body = vec![];
        text(&mut body, "client/x");
        body.extend((n + 1).to_be_bytes());
        body.push(0);
        burst.extend(packet(0x32, &body));
    }
    let begun = std::time::Instant::now();
    wire.send(&burst).await;
    let mut calm = Wire::join(&server, true, "c", &other.token).await;
    assert_eq!(calm.publish_acked("client/x", "").await, 0x10);
    assert!(begun.elapsed() < Duration::from_secs(1), "other accounts are not held up");
    for n in 0..230_u16 {
        wire.puback(n + 1).await;
    }
    assert!(begun.elapsed() > Duration::from_millis(1_000), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn messages_of_a_burst_reach_a_reading_client_whole() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let mut wire = Wire::join(&server, true, "c", &tenant.token).await;
    wire.subscribe("message/#", 1).await;
    let (services, account, device) = (server.services.clone(), tenant.account, tenant.device.id);
    let saying = tokio::spawn(async move {
        for batch in 0..10 {
            let messages = (0..1_000)
                .map(|n| fieldline_model::Decoded {
                    timestamp: None,
                    params: fieldline_ingest::own_params([("n", Value::Int(batch * 1_000 + n))]),
                })
                .collect();
            let now = services.ingest.now();
            services.ingest.submit(account, device, now, messages).await.unwrap();
        }
    });
    for n in 0..10_000 {
        let got = wire.message().await;
        assert!(got.payload.contains(&format!(r#""n":{n}}}"#)), "{n}: {}", got.payload);
        wire.ack(got.packet_id.unwrap()).await;
    }
    saying.await.unwrap();
}

#[tokio::test]
async fn connections_that_send_nothing_do_not_keep_others_waiting() {
    let config = MqttConfig { handshakes_max: 8, ..MqttConfig::default() };
    let server = Server::with(config, None).await;
    let tenant = server.tenant("a").await;
    let mut idle = vec![];
    for _ in 0..50 {
        idle.push(Wire::open(&server).await);
    }
    let begun = std::time::Instant::now();
    let mut wire = Wire::join(&server, true, "c", &tenant.token).await;
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    // The oldest lost their places, the newest still have theirs.
    for wire in idle.iter_mut().take(40) {
        assert_eq!(wire.try_recv(Duration::from_secs(5)).await, Err("closed"));
    }
    assert_eq!(idle[49].try_recv(Duration::from_millis(50)).await, Err("silent"));
    wire.send(&[0xc0, 0]).await;
    assert_eq!(wire.recv().await.first, 0xd0);
}

/// Clients that come, go, and take each other's names leave nothing behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn churn_leaves_nothing_behind() {
    let server = std::sync::Arc::new(Server::start().await);
    let tenant = server.tenant("a").await;
    let mut tasks = vec![];
    for task in 0..16_u64 {
        let (server, token) = (server.clone(), tenant.token.clone());
        tasks.push(tokio::spawn(async move {
            for round in 0..25_u64 {
                let name = format!("c{}", (task * 7 + round * 3) % 10);
                let mut hello = Hello::new(round % 2 == 0, &name, &token);
                hello.will = Some(("client/will", "x", 1, false));
                let mut wire = Wire::open(&server).await;
                wire.v5 = hello.v5;
                // Another may take the name at any moment, so any of these may fail.
                let mut bytes = hello.bytes();
                let mut body = vec![0, 1];
                if hello.v5 {
                    body.push(0);
                }
                for filter in ["client/#", "client/+", "#", "state/+/x"] {
                    text(&mut body, filter);
                    body.push(1);
                }
                bytes.extend(packet(0x82, &body));
                use tokio::io::AsyncWriteExt as _;
                let sent = wire.stream.write_all(&bytes).await;
                drop(sent);
                for _ in 0..(task + round) % 4 {
                    let got = wire.try_recv(Duration::from_millis(50)).await;
                    drop(got);
                }
                if round % 3 == 0 {
                    let sent = wire.stream.write_all(&[0xe0, 0]).await;
                    drop(sent);
                }
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    // Once the last of them has ended, nobody is subscribed any more.
    let mut wire = Wire::join(&server, true, "last", &tenant.token).await;
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while wire.publish_acked("client/probe", "x").await != 0x10 {
        assert!(tokio::time::Instant::now() < deadline, "somebody is still subscribed");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Resident memory of this process, in bytes.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4_096
}

#[tokio::test]
async fn an_idle_session_costs_little() {
    const WARM: usize = 200;
    const SESSIONS: usize = 3_000;
    const BYTES_MAX: usize = 6 * 1_024;
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let (address, token) = (server.address, tenant.token.clone());
    let device = tenant.device.id;
    // Sockets of the standard library: our side of them costs no memory here.
    let connect = move |from: usize, to: usize| {
        use std::io::{Read as _, Write as _};
        let mut clients = Vec::with_capacity(to - from);
        for n in from..to {
            let mut client = std::net::TcpStream::connect(address).unwrap();
            client.write_all(&Hello::new(true, &format!("c{n}"), &token).bytes()).unwrap();
            let mut body = vec![0, 1, 0];
            text(&mut body, &format!("message/{device}"));
            body.push(1);
            client.write_all(&packet(0x82, &body)).unwrap();
            let mut first = [0; 2];
            client.read_exact(&mut first).unwrap();
            let mut rest = vec![0; usize::from(first[1]) + 6];
            client.read_exact(&mut rest).unwrap();
            clients.push(client);
        }
        clients
    };
    let (warm, rest) = (connect.clone(), connect);
    let _warm = tokio::task::spawn_blocking(move || warm(0, WARM)).await.unwrap();
    let before = resident();
    let _clients = tokio::task::spawn_blocking(move || rest(WARM, WARM + SESSIONS)).await.unwrap();
    let each = resident().saturating_sub(before) / SESSIONS;
    eprintln!("{each} bytes for an idle session with a subscription");
    // Beside other tests in one process the figure means nothing.
    if std::env::var_os("NEXTEST").is_some() {
        assert!(each <= BYTES_MAX, "{each} bytes for an idle session");
    }
}

use std::net::{Ipv4Addr, SocketAddr};

use fieldline_contracts::{Clock, MemoryBus, MemoryState, Platform, SystemClock};
use fieldline_ingest::Ingest;
use fieldline_model::{AccountId, ChannelId, SeriesKind};
use fieldline_router::LocalCommands;
use fieldline_testkit::{MemoryRegistry, ScriptedHistory, teltonika};
use proptest::prelude::*;
use tokio::io::DuplexStream;

use super::*;
use crate::config::GatewayConfig;

struct World {
    shared: Arc<Shared>,
    history: Arc<ScriptedHistory>,
    channel: Arc<ChannelLive>,
}

fn world(protocol: &str) -> World {
    let clock = Arc::new(SystemClock);
    let registry = Arc::new(MemoryRegistry::new(clock.clone()));
    let history = Arc::new(ScriptedHistory::new());
    let platform = Platform {
        registry: registry.clone(),
        history: history.clone(),
        state: Arc::new(MemoryState::new()),
        bus: Arc::new(MemoryBus::new()),
        commands: Arc::new(LocalCommands::new(registry, clock.clone())),
        clock: clock.clone(),
    };
    let shared = Arc::new(Shared::new(GatewayConfig::default(), Ingest::new(platform), None));
    let settings = serde_json::from_value(serde_json::json!({
        "id": ChannelId::new(clock.now(), clock.random()),
        "account": AccountId::new(clock.now(), clock.random()),
        "name": "test", "protocol": protocol, "transport": "tcp", "listen": "127.0.0.1:0",
        "enabled": true, "auto_register": true, "created_at": clock.now(),
    }));
    let (_, source) =
        fieldline_pvm::library::built_in().iter().find(|(name, _)| *name == protocol).unwrap();
    let program = Arc::new(fieldline_pvm::compile(protocol, source).unwrap());
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
    let channel = ChannelLive::new(Arc::new(settings.unwrap()), program, None, address);
    World { shared, history, channel: Arc::new(channel) }
}

impl World {
    /// Serves one end of a pipe that holds `bytes`; the other end is the device's.
    fn serve(&self, bytes: usize) -> (DuplexStream, tokio::task::JoinHandle<()>) {
        let (device, server) = tokio::io::duplex(bytes);
        let (now, channel) = (self.shared.now(), &self.channel);
        let (id, peer) = (self.shared.fresh_id(now), channel.address);
        let connection = Connection::new(id, channel.settings(), peer, now);
        let (shared, channel) = (Arc::clone(&self.shared), Arc::clone(channel));
        let serving = Serving::new(shared, channel, server, Arc::new(connection), Instant::now());
        (device, tokio::spawn(serving.run()))
    }

    async fn codes(&self) -> Vec<String> {
        self.shared.ingest.flush().await;
        let (of_devices, of_channels) =
            (self.history.all(SeriesKind::DeviceLog), self.history.all(SeriesKind::ChannelLog));
        let code = |line: &fieldline_model::Stored| {
            Some(line.params().get("close.name")?.as_str()?.to_owned())
        };
        of_devices.iter().chain(&of_channels).filter_map(code).collect()
    }
}

#[tokio::test(start_paused = true)]
async fn a_device_that_does_not_read_is_cut() {
    let world = world("wialon_ips");
    let (mut device, served) = world.serve(64);
    // Answers of seven bytes into a pipe of sixty-four, and nobody takes them out.
    let sent = async {
        device.write_all(b"#L#77;NA\r\n").await?;
        for _ in 0..100 {
            device.write_all(b"#P#\r\n").await?;
        }
        io::Result::Ok(())
    };
    let _until_it_is_cut = timeout(Duration::from_secs(300), sent).await;
    served.await.unwrap();
    assert_eq!(world.codes().await, ["write_timeout"]);
}

#[tokio::test(start_paused = true)]
async fn a_connection_waits_in_little_memory() {
    let world = world("teltonika");
    let (device, server) = tokio::io::duplex(64);
    let (now, channel) = (world.shared.now(), &world.channel);
    let (id, peer) = (world.shared.fresh_id(now), channel.address);
    let connection = Connection::new(id, channel.settings(), peer, now);
    let (shared, channel) = (Arc::clone(&world.shared), Arc::clone(channel));
    let serving = Serving::new(shared, channel, server, Arc::new(connection), Instant::now());
    let bytes = size_of_val(&serving.run());
    assert!(bytes < 4 << 10, "{bytes} bytes while waiting");
    drop(device);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Whatever comes in whatever pieces, the connection ends with a code, and only what a
    /// device said in a whole frame is stored.
    #[test]
    fn any_bytes_end_with_a_code(
        teltonika_not_wialon: bool,
        begins_right: bool,
        bytes in proptest::collection::vec(any::<u8>(), 0..600),
        flips in proptest::collection::vec(any::<(u16, u8)>(), 0..3),
        chunk_bytes in 1_usize..200,
    ) {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        runtime.unwrap().block_on(async {
            let protocol = if teltonika_not_wialon { "teltonika" } else { "wialon_ips" };
            let world = world(protocol);
            let mut wire = match (begins_right, teltonika_not_wialon) {
                (false, _) => Vec::new(),
                (true, true) => {
                    let frame = teltonika::text_packet(6, "hello");
                    [teltonika::login("356307042441013"), frame].concat()
                }
                (true, false) => b"#L#77;NA\r\n#D#NA;NA;NA;NA;NA;NA;NA;NA;NA;NA;NA;NA;NA;;NA;a:1:2\r\n".to_vec(),
            };
            wire.extend(bytes);
            for (at, with) in flips {
                let at = usize::from(at) % wire.len().max(1);
                if let Some(byte) = wire.get_mut(at) {
                    *byte ^= with;
                }
            }
            let (mut device, served) = world.serve(1 << 20);
            for chunk in wire.chunks(chunk_bytes) {
                // It may hang up before everything is sent.
                if device.write_all(chunk).await.is_err() {
                    break;
                }
                tokio::task::yield_now().await;
            }
            let _hung_up_already = device.shutdown().await;
            let ended = timeout(Duration::from_secs(3_600), served).await;
            assert!(ended.is_ok_and(|ended| ended.is_ok()), "it hangs or panicked");
            assert_eq!(world.codes().await.len(), 1);
            assert!(world.history.all(SeriesKind::Message).len() <= 2);
        });
    }
}

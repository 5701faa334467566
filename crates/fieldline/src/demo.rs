//! The demo: channels, named vehicles, and trackers that drive them, over real sockets.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::{
    Actor, ChannelControl as _, Kind, Platform, RegistryError, RegistryExt as _,
};
use fieldline_gateway::Gateway;
use fieldline_model::{
    Account, AccountId, Channel, ChannelId, Device, DeviceId, Transport, object::defaults,
};
use fieldline_testkit::fleet::{Fleet, Protocol};
use fieldline_testkit::stats::Stats;
use tokio_util::sync::CancellationToken;

use crate::cli::UpArgs;

/// Protocol, its simulator, transport and port of each channel.
const CHANNELS: [(&str, Protocol, Transport, u16); 4] = [
    ("teltonika", Protocol::Teltonika, Transport::Tcp, 5027),
    ("wialon_ips", Protocol::WialonIps, Transport::Tcp, 5039),
    ("teltonika", Protocol::Teltonika, Transport::Udp, 5027),
    ("wialon_ips", Protocol::WialonIps, Transport::Udp, 5039),
];
/// Messages a second of each vehicle.
const RATE: f64 = 1.0;
/// Not the seeds that `simulate` has by default: the same idents would throw each other out.
const SEED: u64 = 4_001;
/// How often vehicles look whether their channel listens.
const LISTEN_WAIT: Duration = Duration::from_millis(500);
/// Kinds of vehicles, for names and types.
const VEHICLES: [&str; 4] = ["Van", "Truck", "Bus", "Car"];

/// A prepared demo: which fleet drives for which channel.
pub(crate) struct Demo {
    account: AccountId,
    parts: Vec<(ChannelId, Protocol, Transport, u64, u32)>,
}

impl Demo {
    /// Makes the channels and vehicles that are missing, in the account `default`.
    pub(crate) async fn prepare(platform: &Platform, args: &UpArgs) -> Result<Self, String> {
        let devices = args.demo_devices;
        let failed = |error: RegistryError| format!("preparing the demo: {error}");
        let registry = &platform.registry;
        let found =
            registry.find_anywhere(Kind::Account, "name", "default").await.map_err(failed)?;
        let Some(found) = found else {
            return Err("preparing the demo: there is no account `default`".to_owned());
        };
        let account =
            fieldline_contracts::registry::typed::<Account>(found).map_err(failed)?.object.id;
        let mut parts = Vec::new();
        for (at, (protocol, simulator, transport, port)) in (0..).zip(CHANNELS) {
            let listen = SocketAddr::new(
                args.device,
                if args.demo_free_ports { free_port()? } else { port },
            );
            let channel =
                channel(platform, account, protocol, transport, listen).await.map_err(failed)?;
            // The count is spread over the channels, the first ones taking what is left over.
            let share = devices / 4 + u32::from(at < devices % 4);
            let seed = SEED + u64::from(at);
            let fleet = fleet(simulator, share, seed, platform);
            for number in 0..share {
                let vehicle = number * 4 + at;
                device(platform, account, protocol, &fleet.ident(number), vehicle)
                    .await
                    .map_err(failed)?;
            }
            parts.push((channel, simulator, transport, seed, share));
        }
        Ok(Self { account, parts })
    }

    /// Drives until `stop`.
    pub(crate) async fn run(self, gateway: Gateway, platform: Platform, stop: CancellationToken) {
        let fleets = tokio_util::task::TaskTracker::new();
        for (channel, simulator, transport, seed, share) in self.parts {
            let (gateway, stop, account) = (gateway.clone(), stop.clone(), self.account);
            let mut fleet = fleet(simulator, share, seed, &platform);
            fleet.udp = transport == Transport::Udp;
            fleets.spawn(async move {
                // A port in use is reported by the gateway, which tries again; so do the vehicles.
                let target = async {
                    loop {
                        if let Some(address) = gateway.status(account, channel).await.address {
                            break reachable(&address);
                        }
                        tokio::time::sleep(LISTEN_WAIT).await;
                    }
                };
                tokio::select! {
                    () = stop.cancelled() => return,
                    target = target => fleet.target = target,
                }
                fleet.run(stop, Arc::new(Stats::default())).await;
            });
        }
        fleets.close();
        stop.cancelled().await;
        fleets.wait().await;
    }
}

/// The address to connect to for one that is listened on.
fn reachable(listening: &str) -> String {
    match listening.parse::<SocketAddr>() {
        Ok(address) if address.ip().is_unspecified() => format!("127.0.0.1:{}", address.port()),
        _ => listening.to_owned(),
    }
}

/// A port that nobody listens on now.
fn free_port() -> Result<u16, String> {
    let bound = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    bound.map(|address| address.port()).map_err(|error| format!("no free port: {error}"))
}

fn fleet(simulator: Protocol, share: u32, seed: u64, platform: &Platform) -> Fleet {
    let mut fleet = Fleet::new(simulator, share, RATE, String::new(), Arc::clone(&platform.clock));
    fleet.seed = seed;
    fleet
}

async fn channel(
    platform: &Platform,
    account: AccountId,
    protocol: &str,
    transport: Transport,
    listen: SocketAddr,
) -> Result<ChannelId, RegistryError> {
    let family = if transport == Transport::Udp { "UDP" } else { "TCP" };
    let name = format!("Demo {protocol} over {family}");
    if let Some(there) = platform.registry.find_object::<Channel>(account, "name", &name).await? {
        return Ok(there.object.id);
    }
    let now = platform.clock.now();
    let channel = Channel {
        id: ChannelId::new(now, platform.clock.random()),
        account,
        name,
        protocol: protocol.to_owned(),
        transport,
        listen: listen.to_string(),
        enabled: true,
        auto_register: true,
        idle_timeout_s: defaults::idle_timeout_s(),
        connections_max: defaults::connections_max(),
        frame_bytes_max: defaults::frame_bytes_max(),
        connection_bytes_per_s_max: defaults::connection_bytes_per_s_max(),
        tls_certificate: None,
        tls_key: None,
        labels: BTreeMap::from([("demo".to_owned(), "true".to_owned())]),
        created_at: now,
    };
    Ok(platform.registry.create_object(account, &channel, &Actor::system("demo")).await?.object.id)
}

async fn device(
    platform: &Platform,
    account: AccountId,
    protocol: &str,
    ident: &str,
    vehicle: u32,
) -> Result<(), RegistryError> {
    if platform.registry.find_object::<Device>(account, "ident", ident).await?.is_some() {
        return Ok(());
    }
    let now = platform.clock.now();
    let kind = VEHICLES.get(vehicle as usize % VEHICLES.len()).copied().unwrap_or("Vehicle");
    let device = Device {
        id: DeviceId::new(now, platform.clock.random()),
        account,
        name: format!("{kind} {:02}", vehicle + 1),
        ident: ident.to_owned(),
        protocol: protocol.to_owned(),
        kind: kind.to_lowercase(),
        enabled: true,
        settings: BTreeMap::new(),
        labels: BTreeMap::from([("demo".to_owned(), "true".to_owned())]),
        created_at: now,
    };
    platform.registry.create_object(account, &device, &Actor::system("demo")).await?;
    Ok(())
}

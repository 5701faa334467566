//! Devices that register themselves.

use std::collections::HashSet;
use std::sync::Arc;

use fieldline_contracts::registry::RegistryExt;
use fieldline_contracts::{MemoryBus, MemoryState, Page, SystemClock};
use fieldline_ingest::stored_event;
use fieldline_model::{Device, EventKind, SeriesKind, Transport};
use fieldline_testkit::servers::Postgres;

use crate::nodes::{Backends, Nodes};
use crate::{config, login};

/// Idents that register themselves, each at two nodes at the same moment.
const RACES: usize = 25;

/// A device that goes to another node while the first still registers it: both let it in, and it is one device.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_register_one_ident_at_once() {
    let postgres = Postgres::start();
    let (state, bus) = (Arc::new(MemoryState::new()), Arc::new(MemoryBus::new()));
    let mut backends = Vec::new();
    for _ in 0..2 {
        let settings = fieldline_postgres::Settings::new(postgres.url());
        let clock = Arc::new(SystemClock);
        let registry = fieldline_postgres::PostgresRegistry::connect(&settings, clock);
        let registry = Arc::new(registry.await.unwrap());
        backends.push(Backends { registry, state: state.clone(), bus: bus.clone() });
    }
    let nodes = Nodes::over(backends, Transport::Tcp, config()).await;
    let (a, b) = (nodes.nodes[0].address, nodes.nodes[1].address);
    let mut held = Vec::new();
    for race in 0..RACES {
        let ident = format!("{}", 357_000_000_000_000_u64 + race as u64);
        // Both believe that nobody has it, and have nothing else to make them ask again.
        for node in &nodes.nodes {
            assert!(node.ingest.device_by_ident(nodes.account, &ident).await.unwrap().is_none());
        }
        // `login` fails the test unless it is accepted.
        let ident = ident.as_str();
        held.push(tokio::join!(login(a, ident), login(b, ident)));
    }
    let page = Page::first(1_000);
    let devices = nodes.registry.list_objects::<Device>(nodes.account, &page).await.unwrap();
    let idents: HashSet<&str> = devices.iter().map(|device| &*device.object.ident).collect();
    assert_eq!((devices.len(), idents.len()), (RACES, RACES), "one device each");
    let events = nodes.log(SeriesKind::Event).await;
    let registered = events.iter().filter_map(stored_event);
    let registered = registered.filter(|event| event.kind == EventKind::Registered).count();
    assert_eq!(registered, RACES, "and told of once");
    drop(held);
    nodes.stop_all().await;
}

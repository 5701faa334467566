//! Work on what the bus brings, spread by partitions that nodes own: no shared subscriptions are needed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fieldline_contracts::ownership::{Progress, Work};
use fieldline_contracts::{
    Bus, Cluster, Lease, MemoryCluster, Node, Ownership, Topic, TopicFilter,
};
use fieldline_model::DeviceId;
use fieldline_model::placement::{Rendezvous, partition};
use fieldline_mqtt_bus::MqttBus;
use fieldline_testkit::servers::Mosquitto;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{account, eventually, message, node, number};

const PARTITIONS: u16 = 16;
const DEVICES: u8 = 40;

fn devices() -> impl Iterator<Item = DeviceId> {
    (0..DEVICES).map(|n| DeviceId::from_bytes([n; 16]))
}

/// What is durable of the work: who owns a partition, and how far each device came.
#[derive(Default)]
struct Book {
    owners: BTreeMap<u16, String>,
    /// Number of the last item of each device, and who worked on it.
    done: HashMap<DeviceId, (u64, String)>,
    /// Items that were worked on.
    items: u64,
    /// Nodes that worked on each device, in turn.
    nodes: HashMap<DeviceId, Vec<String>>,
}

struct Worker {
    node: String,
    bus: Arc<MqttBus>,
    book: Arc<Mutex<Book>>,
}

struct Line<'a>(&'a Worker, u16);

impl Drop for Line<'_> {
    fn drop(&mut self) {
        self.0.book.lock().owners.remove(&self.1);
    }
}

impl Work for Worker {
    async fn run(&self, key: String, lease: Arc<Lease>, stop: CancellationToken) {
        let own: u16 = key.parse().unwrap();
        let before = self.book.lock().owners.insert(own, self.node.clone());
        assert_eq!(before, None, "partition {own} has two owners");
        let _line = Line(self, own);
        let filter = TopicFilter { topics: vec![Topic::Message], objects: Vec::new() };
        let mut items = self.bus.subscribe(account(1), filter).await;
        loop {
            let item = tokio::select! {
                () = stop.cancelled() => return,
                item = items.next() => item.unwrap(),
            };
            // What was lost is read from history; here the next one is as good.
            let Ok(item) = item else { continue };
            let (device, seq) = number(&item);
            if partition(device, PARTITIONS) != own {
                continue;
            }
            assert!(lease.is_held());
            let mut book = self.book.lock();
            assert_eq!(book.owners[&own], self.node, "worked on without owning");
            let node = self.node.clone();
            // The owner before may have worked on what reaches this node only now.
            let last = book.done.get(&device).cloned();
            if let Some((last, by)) = last {
                assert!(by != node || seq > last, "{device}: {seq} after {last} on {node}");
                if seq <= last {
                    continue;
                }
            }
            book.done.insert(device, (seq, node.clone()));
            book.items += 1;
            let nodes = book.nodes.entry(device).or_default();
            if nodes.last() != Some(&node) {
                nodes.push(node);
            }
        }
    }
}

struct Member {
    cluster: Arc<dyn Cluster>,
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

async fn member(
    cluster: &MemoryCluster,
    name: &str,
    bus: MqttBus,
    book: &Arc<Mutex<Book>>,
) -> Member {
    let cluster: Arc<dyn Cluster> = Arc::new(cluster.beside());
    let described = Node {
        name: name.to_owned(),
        address: String::new(),
        roles: vec!["triggers".to_owned()],
        zone: None,
        version: String::new(),
        ready: true,
    };
    cluster.join(described).await.unwrap();
    let ownership = Ownership {
        prefix: "partitions/".to_owned(),
        role: "triggers".to_owned(),
        node: name.to_owned(),
        moves_max: 4,
        stop_max: Duration::from_secs(1),
    };
    let worker = Worker { node: name.to_owned(), bus: Arc::new(bus), book: Arc::clone(book) };
    let keys: BTreeSet<String> = (0..PARTITIONS).map(|n| n.to_string()).collect();
    let (_, keys) = watch::channel(Arc::new(keys));
    let (progress, _) = watch::channel(Progress::default());
    let shutdown = CancellationToken::new();
    let run =
        ownership.run(Arc::clone(&cluster), keys, Arc::new(worker), progress, shutdown.clone());
    Member { cluster, shutdown, task: tokio::spawn(run) }
}

#[tokio::test(flavor = "multi_thread")]
async fn partitions_have_one_owner_each_while_nodes_come_and_go() {
    let broker = Mosquitto::start_with("max_queued_messages 100000");
    let (cluster, book) = (MemoryCluster::new(), Arc::new(Mutex::new(Book::default())));
    let one = member(&cluster, "one", node(broker.port()).await, &book).await;
    let two = member(&cluster, "two", node(broker.port()).await, &book).await;
    let owned = |names: &[&str]| {
        let (owners, placement) = (&book.lock().owners, Rendezvous::over(names.iter().copied()));
        (0..PARTITIONS)
            .all(|own| owners.get(&own).map(String::as_str) == placement.owner(&own.to_string()))
    };
    eventually("partitions are where they belong", || owned(&["one", "two"])).await;

    let links = node(broker.port()).await;
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let load = tokio::spawn(async move {
        let mut next = 0_u64;
        while !stopped.load(Ordering::Relaxed) {
            for device in devices() {
                let items = (next..next + 3).map(|seq| message(account(1), device, seq)).collect();
                links.publish(account(1), items).await;
            }
            next += 3;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        links.close(Duration::from_secs(5)).await;
        next - 1
    });
    let everybody = |by: &[&str], from: u64| {
        let book = book.lock();
        devices().all(|device| {
            book.done
                .get(&device)
                .is_some_and(|(seq, node)| *seq >= from && by.contains(&node.as_str()))
        })
    };
    eventually("both work", || everybody(&["one", "two"], 100)).await;
    // Before anybody leaves, every device was worked on in one place, and by both nodes together.
    let nodes: BTreeSet<String> = {
        let book = book.lock();
        assert!(book.nodes.values().all(|nodes| nodes.len() == 1));
        book.nodes.values().flatten().cloned().collect()
    };
    assert_eq!(nodes.len(), 2);

    let began = std::time::Instant::now();
    one.shutdown.cancel();
    one.cluster.leave().await;
    one.task.await.unwrap();
    eventually("the other one owns all", || owned(&["two"])).await;
    println!("all partitions were owned again after {:?}", began.elapsed());
    eventually("the other one works on all", || everybody(&["two"], 0)).await;

    stop.store(true, Ordering::Relaxed);
    let last = load.await.unwrap();
    eventually("all is worked on", || everybody(&["two"], last)).await;
    let book = book.lock();
    assert!(book.nodes.values().all(|nodes| nodes.len() <= 2), "a device came back");
    let published = (last + 1) * u64::from(DEVICES);
    println!("{} of {published} items were worked on, each once and in order", book.items);
    // Beside what passed while a partition changed hands, nothing is missing.
    assert!(book.items > published / 2 && book.items <= published);
    two.shutdown.cancel();
}

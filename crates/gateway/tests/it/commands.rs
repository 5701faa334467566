//! A command's whole way: queued, sent, answered, recorded.

use std::time::Duration;

use fieldline_contracts::NewCommand;
use fieldline_ingest::stored_event;
use fieldline_model::{
    Command, CommandStatus, Device, EventKind, Params, SeriesKind, Transport, Value,
};
use fieldline_testkit::teltonika::{self, FromServer};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::{IMEI, World, actor, config, is_silent, kinds, login, payload, receive, rest};

impl World {
    async fn command(&self, device: &Device, text: &str, ttl_s: u32) -> Command {
        let params: Params = serde_json::from_value(serde_json::json!({ "text": text })).unwrap();
        let new = NewCommand { name: "text".to_owned(), params, ttl_s };
        let commands = &self.platform.commands;
        commands.submit(self.account, device.id, new, &actor()).await.unwrap()
    }

    async fn finished(&self, command: &Command) -> Command {
        self.platform.commands.wait(self.account, command.id, 10_000).await.unwrap()
    }
}

async fn next_command(stream: &mut TcpStream) -> String {
    let mut buffer = receive(stream, 8).await;
    let length = u32::from_be_bytes(buffer[4..8].try_into().unwrap()) as usize;
    buffer.extend(receive(stream, length + 4).await);
    match teltonika::take_from_server(&mut buffer) {
        Some(FromServer::Command(text)) => text,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_connected_device_gets_it_at_once_and_its_answer_is_kept() {
    let mut world = World::start(config()).await;
    let (_, address) = world.open("teltonika").await;
    let mut stream = login(address, IMEI).await;
    let device = world.device(IMEI).await;
    let (first, second) =
        (world.command(&device, "getinfo", 60).await, world.command(&device, "getver", 60).await);
    assert_eq!(next_command(&mut stream).await, "getinfo");
    assert!(is_silent(&mut stream).await, "one at a time");
    stream.write_all(&teltonika::text_packet(6, "RTC:now")).await.unwrap();
    let answered = world.finished(&first).await;
    assert_eq!(
        (answered.status, answered.answer.as_deref(), answered.attempts),
        (CommandStatus::Answered, Some("RTC:now"), 1)
    );
    assert_eq!(next_command(&mut stream).await, "getver");
    stream.write_all(&teltonika::text_packet(6, "Ver:1")).await.unwrap();
    assert_eq!(world.finished(&second).await.answer.as_deref(), Some("Ver:1"));

    let log = world.log(SeriesKind::DeviceLog).await;
    let log = kinds(&log);
    assert_eq!(log.iter().filter(|kind| **kind == "command").count(), 2);
    assert_eq!(log.iter().filter(|kind| **kind == "answer").count(), 2);
    let told: Vec<String> = world
        .log(SeriesKind::Event)
        .await
        .iter()
        .filter_map(stored_event)
        .filter(|event| event.kind == EventKind::Command && event.object == device.id.0)
        .filter_map(|event| event.params.get("command.status")?.as_str().map(str::to_owned))
        .collect();
    let of = |status: &str| told.iter().filter(|told| *told == status).count();
    assert_eq!((told.len(), of("queued"), of("sent"), of("answered")), (6, 2, 2, 2), "{told:?}");
    world.stop().await;
}

#[tokio::test]
async fn an_offline_device_gets_it_when_it_connects() {
    let mut world = World::start(config()).await;
    let (_, address) = world.open("teltonika").await;
    let device = world.register(IMEI).await;
    let late = world.command(&device, "getver", 1).await;
    let cancelled = world.command(&device, "getgps", 60).await;
    let waiting = world.command(&device, "getinfo", 60).await;
    let commands = &world.platform.commands;
    commands.cancel(world.account, cancelled.id, &actor()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(1_050)).await;
    commands.expire().await;
    assert_eq!(world.finished(&late).await.status, CommandStatus::Expired);
    let mut stream = login(address, IMEI).await;
    assert_eq!(next_command(&mut stream).await, "getinfo");
    // The connection ends before the answer: the next one gets it again.
    drop(stream);
    let mut stream = login(address, IMEI).await;
    assert_eq!(next_command(&mut stream).await, "getinfo");
    stream.write_all(&teltonika::text_packet(6, "here")).await.unwrap();
    let answered = world.finished(&waiting).await;
    assert_eq!((answered.answer.as_deref(), answered.attempts), (Some("here"), 2));
    assert!(is_silent(&mut stream).await);
    world.stop().await;
}

#[tokio::test]
async fn no_answer_ends_a_command_and_a_late_one_is_nobody_elses() {
    let mut config = config();
    config.answer_timeout = Duration::from_millis(600);
    let mut world = World::start(config).await;
    let (_, address) = world.open("teltonika").await;
    let mut stream = login(address, IMEI).await;
    let device = world.device(IMEI).await;
    let command = world.command(&device, "getinfo", 60).await;
    assert_eq!(next_command(&mut stream).await, "getinfo");
    let failed = world.finished(&command).await;
    assert_eq!((failed.status, failed.attempts), (CommandStatus::Failed, 1));
    assert_eq!(failed.error.as_deref(), Some("no answer within 0.6 s"));
    // The next one waits for the answer that is owed, and does not get it.
    let next = world.command(&device, "getver", 60).await;
    assert!(is_silent(&mut stream).await);
    stream.write_all(&teltonika::text_packet(6, "late")).await.unwrap();
    assert_eq!(next_command(&mut stream).await, "getver");
    stream.write_all(&teltonika::text_packet(6, "Ver:1")).await.unwrap();
    assert_eq!(world.finished(&next).await.answer.as_deref(), Some("Ver:1"));
    // Nor does it wait for ever.
    let lost = world.command(&device, "a", 60).await;
    let next = world.command(&device, "b", 60).await;
    assert_eq!(next_command(&mut stream).await, "a");
    assert_eq!(world.finished(&lost).await.status, CommandStatus::Failed);
    assert_eq!(next_command(&mut stream).await, "b");
    stream.write_all(&teltonika::text_packet(6, "b it is")).await.unwrap();
    assert_eq!(world.finished(&next).await.answer.as_deref(), Some("b it is"));
    // The device goes on being served.
    stream.write_all(&crate::packet(1, 1)).await.unwrap();
    assert_eq!(receive(&mut stream, 4).await, [0, 0, 0, 1]);
    world.stop().await;
}

#[tokio::test]
async fn a_command_that_the_protocol_lacks_fails_in_clear_words() {
    let mut world = World::start(config()).await;
    let (_, address) = world.open("teltonika").await;
    let mut stream = login(address, IMEI).await;
    let device = world.device(IMEI).await;
    let new = NewCommand { name: "reboot".to_owned(), params: Params::new(), ttl_s: 60 };
    let commands = &world.platform.commands;
    let command = commands.submit(world.account, device.id, new, &actor()).await.unwrap();
    let failed = world.finished(&command).await;
    assert_eq!(failed.status, CommandStatus::Failed);
    assert!(failed.error.unwrap().contains("no command `reboot`"));
    assert!(is_silent(&mut stream).await);
    world.stop().await;
}

#[tokio::test]
async fn the_newest_connection_gets_the_commands() {
    let mut world = World::start(config()).await;
    let (_, address) = world.open("teltonika").await;
    let mut old = login(address, IMEI).await;
    let device = world.device(IMEI).await;
    let command = world.command(&device, "getinfo", 60).await;
    assert_eq!(next_command(&mut old).await, "getinfo");
    let mut new = login(address, IMEI).await;
    rest(&mut old).await;
    assert_eq!(next_command(&mut new).await, "getinfo");
    new.write_all(&teltonika::text_packet(6, "new")).await.unwrap();
    assert_eq!(world.finished(&command).await.answer.as_deref(), Some("new"));
    world.stop().await;
}

#[tokio::test]
async fn a_device_over_udp_gets_it_where_it_was_last_heard() {
    let mut world = World::start(config()).await;
    let channel = world.new_channel("teltonika", Transport::Udp);
    let address = world.create(&channel).await;
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(address).await.unwrap();
    socket.send(&teltonika::udp_packet(IMEI, 1, 1, &payload(1, 1))).await.unwrap();
    let mut bytes = [0; 200];
    let count = socket.recv(&mut bytes).await.unwrap();
    assert_eq!(teltonika::udp_accepted(&bytes[..count], 1, 1), Some(1));
    let device = world.device(IMEI).await;
    let command = world.command(&device, "getinfo", 60).await;
    let sent = tokio::time::timeout(crate::SOON, socket.recv(&mut bytes)).await;
    let count = sent.expect("the command comes").unwrap();
    assert!(count > 10, "{:?}", &bytes[..count]);
    let status = world.platform.commands.get(world.account, command.id).await.unwrap();
    assert!(matches!(
        status.status,
        CommandStatus::Sent | CommandStatus::Answered | CommandStatus::Queued
    ));
    // The line is written beside the command, not before it.
    let line = tokio::time::timeout(crate::SOON, async {
        loop {
            let log = world.log(SeriesKind::DeviceLog).await;
            let of_command = |l: &&_| kinds(std::slice::from_ref(*l)) == ["command"];
            if let Some(line) = log.iter().find(of_command) {
                break line.clone();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    let line = line.await.expect("the log has the command");
    assert!(matches!(line.params().get("frame.hex"), Some(Value::Bytes(_))));
    world.stop().await;
}

//! Last values, retention and damage.

use std::collections::BTreeMap;

use fieldline_contracts::{History, HistoryError, Retention};
use fieldline_model::{
    Accepted, AccountId, Cursor, DeviceId, ParamName, Params, Series, Timestamp, Value,
};
use fieldline_testkit::servers::Postgres;

use crate::{ACCOUNT, START, all, at, device, history, number, psql, settings};

fn message(series: Series, millis: i64, names: &[&str], n: i64) -> Accepted {
    let named = |text: &&str| (ParamName::new((*text).to_owned()).unwrap(), Value::Int(n));
    let params: Params = names.iter().map(named).collect();
    Accepted::own(series, START.plus_micros(millis * 1_000), params)
}

async fn last_values(node: &impl History) -> BTreeMap<(Series, String), (i64, Timestamp)> {
    let mut values = BTreeMap::new();
    let mut visit = |series: Series, name: &ParamName, value: &Value, at: Timestamp| {
        let before = values.insert((series, name.to_string()), (value.as_i64().unwrap(), at));
        assert!(before.is_none(), "{name} was visited twice");
    };
    node.last_values(&mut visit).await.unwrap();
    values
}

/// Folded in several goes, on several nodes, out of order of time: the newest by time stands.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn last_values_are_folded_by_any_node() {
    let server = Postgres::start();
    let settings = settings(&server);
    let (one, two) = (history(&settings).await, history(&settings).await);
    let mut expected: BTreeMap<(Series, String), (i64, Timestamp)> = BTreeMap::new();
    for round in 0..6_i64 {
        let mut batch = Vec::new();
        for n in 0..3_000_i64 {
            let series = device(u8::try_from(n % 7).unwrap());
            let millis = (n * 7_919 + round * 104_729) % 100_003;
            let names: &[&str] = if n % 100 == 0 { &["seldom", "n"] } else { &["n"] };
            let sent = message(series, millis, names, round * 10_000 + n);
            for name in names {
                let slot =
                    expected.entry((series, (*name).to_owned())).or_insert((0, Timestamp::MIN));
                if sent.timestamp() >= slot.1 {
                    *slot = (round * 10_000 + n, sent.timestamp());
                }
            }
            batch.push(sent);
        }
        let node = if round % 2 == 0 { &one } else { &two };
        node.append(batch).await.unwrap();
        if round % 3 == 1 {
            let (left, right) = tokio::join!(last_values(&**node), last_values(&*one));
            assert_eq!((&left, &right), (&expected, &expected), "round {round}");
        }
    }
    assert_eq!(last_values(&*two).await, expected);
}

/// Of several accounts in one partition, one's rows go and the others' stay; by age and by bytes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retention_takes_one_account_of_many() {
    let server = Postgres::start();
    let node = history(&settings(&server)).await;
    let other = Series::messages(AccountId::from_bytes([2; 16]), DeviceId::from_bytes([9; 16]));
    let day = 86_400_000;
    for of in [device(1), device(2), other] {
        for part in 0..4 {
            let batch =
                (0..2_500).map(|n| at(of, (n % 5) * day + part * 2_500 + n, part * 2_500 + n));
            node.append(batch.collect()).await.unwrap();
        }
    }
    let before = Some(START.plus_micros(2 * day * 1_000));
    let freed = node.retain(Retention { account: ACCOUNT, before, bytes_max: None }).await.unwrap();
    assert!(freed > 0);
    assert_eq!((all(&node, device(1)).await.len(), all(&node, other).await.len()), (6_000, 10_000));
    assert_eq!(node.stats(Some(ACCOUNT)).messages, 12_000);
    // To half by bytes: the oldest days first.
    let has = node.stats(Some(ACCOUNT)).bytes;
    node.retain(Retention { account: ACCOUNT, before: None, bytes_max: Some(has / 2) })
        .await
        .unwrap();
    let left = node.stats(Some(ACCOUNT));
    assert!(left.bytes <= has / 2 && left.messages >= 3_000, "{left:?} of {has}");
    let kept = all(&node, device(2)).await;
    assert!(kept.iter().all(|message| number(message) % 5 >= 3), "the oldest go first");
    // Within one day.
    let has = left.bytes;
    node.retain(Retention { account: ACCOUNT, before: None, bytes_max: Some(has / 4) })
        .await
        .unwrap();
    let left = node.stats(Some(ACCOUNT));
    assert!(left.bytes <= has / 4, "{left:?} of {has}");
    node.retain(Retention { account: ACCOUNT, before: None, bytes_max: Some(0) }).await.unwrap();
    assert_eq!(node.stats(Some(ACCOUNT)).messages, 0);
    assert!(all(&node, device(1)).await.is_empty());
    assert_eq!(all(&node, other).await.len(), 10_000);
    // The last one takes the partitions with it.
    let account = other.account;
    node.retain(Retention {
        account,
        before: Some(START.plus_micros(30 * day * 1_000)),
        bytes_max: None,
    })
    .await
    .unwrap();
    assert_eq!(psql(&server, "SELECT count(*) FROM fieldline.messages"), "0");
    let tables = psql(
        &server,
        "SELECT count(*) FROM pg_class WHERE relname LIKE 'messages_2027%' AND relkind = 'r'",
    );
    assert_eq!(tables, "0");
    // And what is sent again is no duplicate any more.
    assert!(!node.append(vec![at(other, 0, 0)]).await.unwrap()[0].duplicate);
}

/// A row that cannot be read hides itself and nothing else.
#[tokio::test]
async fn damage_hides_one_message() {
    let server = Postgres::start();
    let node = history(&settings(&server)).await;
    let receipts = node.append((0..10).map(|n| at(device(1), n, n)).collect()).await.unwrap();
    psql(&server, "UPDATE fieldline.messages SET body = '\\x63ff' WHERE seq = 5");
    let shard = receipts[0].cursor.shard;
    let page = node.tail(Cursor { shard, seq: 0 }, 100).await.unwrap();
    assert_eq!(page.len(), 4, "the page ends before it");
    match node.tail(page[3].cursor(), 100).await {
        Err(HistoryError::Gap(gap)) => assert_eq!((gap.from.seq, gap.to.seq), (5, 5)),
        other => panic!("{other:?}"),
    }
    let over = node.tail_over_damage(page[3].cursor(), 100).await.unwrap();
    assert_eq!(over.iter().map(number).collect::<Vec<_>>(), [5, 6, 7, 8, 9]);
    psql(&server, "UPDATE fieldline.messages SET body = '\\x' WHERE seq > 5");
    assert!(node.tail_over_damage(page[3].cursor(), 2).await.unwrap().is_empty());
    assert_eq!(all(&node, device(1)).await.len(), 4);
}

/// Names get numbers, on one node and on all; rows written before and after are read by nodes that have not
/// heard of them. A server that lacks names that were used is noticed before anything is written.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_are_numbered_in_the_background() {
    let server = Postgres::start();
    let settings = settings(&server);
    let (one, two) = (history(&settings).await, history(&settings).await);
    let named = |n: i64| message(device(1), n, &["position.latitude", "made.up"], n);
    one.append(vec![named(1)]).await.unwrap();
    let began = std::time::Instant::now();
    while psql(&server, "SELECT count(*) FROM fieldline.names") != "2" {
        assert!(began.elapsed() < std::time::Duration::from_secs(20), "names get no numbers");
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    one.append(vec![named(2)]).await.unwrap();
    let lengths = psql(
        &server,
        "SELECT string_agg(octet_length(body)::text, ',' ORDER BY seq) FROM fieldline.messages",
    );
    assert_eq!(lengths, "34,8", "the second has numbers");
    for node in [&one, &two] {
        let read = all(node, device(1)).await;
        assert_eq!(read.len(), 2);
        assert!(read.iter().all(|message| message.params().get("made.up").is_some()));
    }
    // As after the promotion of a standby that was behind.
    psql(&server, "DELETE FROM fieldline.names WHERE name = 'made.up'");
    psql(
        &server,
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'fieldline'",
    );
    let refused = one.append(vec![named(3)]).await;
    assert!(
        matches!(&refused, Err(HistoryError::Failed(text)) if text.contains("again")),
        "{refused:?}"
    );
    one.append(vec![named(3)]).await.unwrap();
    let newest = one.read(&fieldline_contracts::Query::newest(device(1), 1)).await.unwrap();
    assert_eq!(newest[0].params().get("made.up"), Some(&Value::Int(3)));
}

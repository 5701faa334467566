//! What tests of the store share.

use std::sync::Arc;

use fieldline_contracts::{Clock, History, Query, TestClock};
use fieldline_mdb::{Disk, Mdb, MdbConfig, OpenError};
use fieldline_model::{
    Accepted, AccountId, Cursor, Decimal, DeviceId, ParamName, Params, Receipt, Series, Stored,
    Timestamp, Value,
};

use crate::fake_disk::FakeDisk;

/// 2027-01-15T08:00:00Z.
pub(crate) const START: Timestamp = Timestamp::from_seconds(1_800_000_000);

pub(crate) const ACCOUNT: AccountId = AccountId::from_bytes([7; 16]);

/// A store whose parts are as small as they may be, so that little data reaches all of them.
pub(crate) fn small() -> MdbConfig {
    MdbConfig {
        wal_bytes_max: 64 << 10,
        memtable_bytes_max: 64 << 10,
        merge_fan_in: 2,
        ..MdbConfig::default()
    }
}

pub(crate) fn clock() -> Arc<dyn Clock> {
    Arc::new(TestClock::at(START))
}

pub(crate) fn open(disk: &Arc<dyn Disk>, config: MdbConfig) -> Result<Mdb, OpenError> {
    Mdb::open_on(disk.clone(), "/store", config, clock())
}

pub(crate) fn device(number: u8) -> Series {
    Series::messages(ACCOUNT, DeviceId::from_bytes([number; 16]))
}

/// One of many devices.
pub(crate) fn numbered(number: u32) -> Series {
    let mut id = [0; 16];
    id[..4].copy_from_slice(&number.to_be_bytes());
    Series::messages(ACCOUNT, DeviceId::from_bytes(id))
}

pub(crate) fn params<const N: usize>(values: [(&str, Value); N]) -> Params {
    values.into_iter().map(|(n, v)| (ParamName::new(n).unwrap(), v)).collect()
}

/// A message of `device`, `seconds` after the start.
pub(crate) fn message(series: Series, seconds: i64, n: i64) -> Accepted {
    let at = START.plus_micros(seconds * 1_000_000);
    let height = Value::Decimal(Decimal::new(n * 10, 1).unwrap());
    Accepted::own(series, at, params([("n", Value::Int(n)), ("height", height)]))
}

pub(crate) fn numbers(messages: &[Stored]) -> Vec<i64> {
    messages.iter().map(|m| m.params().get("n").unwrap().as_i64().unwrap()).collect()
}

/// Messages of device 1, one a second.
pub(crate) fn batch(from: i64, to: i64) -> Vec<Accepted> {
    (from..to).map(|n| message(device(1), n, n)).collect()
}

/// A store of small parts on a disk of its own, with the first `count` messages of device 1.
pub(crate) async fn begun(count: i64) -> (FakeDisk, Mdb) {
    let disk = FakeDisk::new();
    let store = reopened(&disk);
    append(&store, batch(0, count)).await;
    (disk, store)
}

/// The store that is on a disk.
pub(crate) fn reopened(disk: &FakeDisk) -> Mdb {
    open(&disk.disk(), small()).unwrap()
}

/// What device 1 said.
pub(crate) async fn said(store: &Mdb) -> Vec<i64> {
    numbers(&all(store, device(1)).await)
}

pub(crate) async fn all(store: &Mdb, series: Series) -> Vec<Stored> {
    store.read(&Query::oldest(series, Query::LIMIT_MAX)).await.unwrap()
}

pub(crate) async fn append(store: &Mdb, batch: Vec<Accepted>) -> Vec<Receipt> {
    store.append(batch).await.unwrap()
}

/// Everything after `cursor`, in pages.
pub(crate) async fn tail(store: &Mdb, mut cursor: Cursor, page: usize) -> Vec<Stored> {
    let mut messages = Vec::new();
    loop {
        let more = store.tail(cursor, page).await.unwrap();
        let Some(last) = more.last() else { return messages };
        cursor = last.cursor();
        messages.extend(more);
    }
}

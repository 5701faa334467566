//! Sessions whose node is gone: it cannot tell their end any more, so somebody else does.
//!
//! A session is lost while the process that took it does not speak up, or another one has its name. The scripts look again
//! at every step, so that one that came back, or a device that connected elsewhere, is left alone. Its end raises the epoch:
//! a node that was only cut off finds it newer than its own, and lets go of the device.

use fieldline_contracts::{LostSession, StateError};
use fieldline_model::{AccountId, ConnectionId, DeviceId, Timestamp};

use crate::inner::{Inner, pipeline, script};
use crate::scripts::digits;

/// Keys that are looked at in one go.
const PAGE: usize = 500;

type Looked = Vec<Vec<u8>>;

impl Inner {
    /// A page of lost sessions, and where the next begins.
    pub(crate) async fn lost_sessions(
        &self,
        cursor: u64,
    ) -> Result<(Vec<LostSession>, Option<u64>), StateError> {
        // Until every node has told its own connections nothing is known to be lost.
        let (mut call, _) = self.settled()?;
        let mut scan = redis::cmd("SCAN");
        scan.arg(cursor).arg("MATCH").arg(self.keys.presences()).arg("COUNT").arg(PAGE);
        let scanned = self.answer(call.serial, scan.query_async(&mut call.connection)).await;
        let (next, keys): (u64, Vec<String>) = scanned?;
        let mut lost = Vec::new();
        if !keys.is_empty() {
            let looks = keys.iter().map(|key| {
                let mut look = script(&self.scripts.lost_look, &[key]);
                look.arg(&self.keys.node);
                look
            });
            let pipeline = pipeline(looks);
            let looked = self.answer(call.serial, pipeline.query_async(&mut call.connection)).await;
            let looked: Vec<Looked> = looked?;
            let found = keys.iter().zip(looked).filter_map(|(key, fields)| self.lost(key, &fields));
            lost.extend(found);
        }
        // Lost meanwhile, none of it says anything.
        self.settled()?;
        Ok((lost, (next != 0).then_some(next)))
    }

    fn lost(&self, key: &str, fields: &Looked) -> Option<LostSession> {
        let [connection, epoch, node, process, peer, replaced] = fields.as_slice() else {
            return None;
        };
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (account, device) = self.keys.presence_of(key)?;
        Some(LostSession {
            account,
            device,
            connection: ConnectionId::from_bytes(connection.as_slice().try_into().ok()?),
            epoch: text(epoch).parse().ok()?,
            node: text(node),
            process: text(process),
            peer: text(peer),
            replaced: replaced == b"1",
        })
    }

    /// Notes when a session was found lost; the first time stays.
    pub(crate) async fn mark_lost(
        &self,
        session: &LostSession,
        at: Timestamp,
    ) -> Result<Option<Timestamp>, StateError> {
        let (mut call, _) = self.settled()?;
        let key = self.keys.presence(session.account, session.device);
        let mut mark = script(&self.scripts.lost_mark, &[&key]);
        mark.arg(&self.keys.node).arg(&session.connection.as_bytes()[..]);
        mark.arg(digits(session.epoch)).arg(at.as_micros());
        let marked = self.answer(call.serial, mark.query_async(&mut call.connection)).await;
        let marked: String = marked?;
        Ok(marked.parse().ok().map(Timestamp::from_micros))
    }

    /// Ends a lost session.
    pub(crate) async fn end_lost(
        &self,
        session: &LostSession,
        at: Timestamp,
    ) -> Result<bool, StateError> {
        let (mut call, _) = self.settled()?;
        let key = self.keys.presence(session.account, session.device);
        let mut end = script(&self.scripts.lost_end, &[&key]);
        end.arg(&self.keys.node).arg(&session.connection.as_bytes()[..]);
        end.arg(digits(session.epoch)).arg(digits(session.epoch + 1)).arg(at.as_micros());
        let ended = self.answer(call.serial, end.query_async(&mut call.connection)).await;
        let ended: i64 = ended?;
        Ok(ended == 1)
    }
}

/// The account and device of a key of presence: what is between its fixed parts.
pub(crate) fn of_key(prefix: &str, key: &str) -> Option<(AccountId, DeviceId)> {
    let rest = key.strip_prefix(prefix)?.strip_prefix(":a:")?;
    let (account, device) = rest.split_once(":p:")?;
    Some((account.parse().ok()?, device.parse().ok()?))
}

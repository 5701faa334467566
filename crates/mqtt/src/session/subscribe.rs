//! Subscriptions of a session, and the retained messages that they begin with.

use fieldline_model::Scope;
use tokio::time::Instant;

use super::{Session, Subscribed};
use crate::codec::{self, Qos, Reason, Subscribe};
use crate::metrics;
use crate::replay::Replay;
use crate::routes::Options;
use crate::topic::check_filter;

/// What reading a page of devices, or of what clients retained, counts for, as bytes published.
const LIST_COST_BYTES: usize = 10 * 4_096;

impl Session {
    pub(super) fn subscribe(&mut self, subscribe: Subscribe) {
        let identifier = subscribe.identifier;
        let mut why = None;
        let mut results = Vec::with_capacity(subscribe.filters.len());
        for wanted in &subscribe.filters {
            let options = Options {
                // QoS 2 is granted as 1.
                qos: (wanted.qos as u8).min(1),
                no_local: wanted.no_local,
                retain_as_published: wanted.retain_as_published,
                identifier,
            };
            let filter = wanted.filter.as_str();
            match self.subscribe_one(filter, options, wanted.retain_handling) {
                Ok(()) => results.push(Ok(match options.qos {
                    0 => Qos::AtMostOnce,
                    _ => Qos::AtLeastOnce,
                })),
                Err((reason, text)) => {
                    why.get_or_insert(text);
                    results.push(Err(reason));
                }
            }
        }
        let text = why.filter(|_| self.problem_information);
        codec::suback(&mut self.output, self.version, subscribe.packet_id, &results, text);
    }

    fn subscribe_one(
        &mut self,
        filter: &str,
        options: Options,
        retain_handling: u8,
    ) -> Result<(), (Reason, &'static str)> {
        self.pace(0);
        check_filter(filter).map_err(|reason| match reason {
            Reason::SharedSubscriptionsNotSupported => {
                (reason, "shared subscriptions are not offered")
            }
            _ => (
                reason,
                "the filter matches no topic: they begin with message/, state/, event/, log/, \
                 command/ or client/",
            ),
        })?;
        if !self.client.identity.may(Scope::Read) {
            return Err((Reason::NotAuthorized, "the token lacks the scope `read`"));
        }
        let most = self.client.shared.config.subscriptions_max;
        let subscribed = &mut self.membership.subscribed;
        let count = subscribed.len();
        match subscribed.iter_mut().find(|s| &*s.filter == filter) {
            Some(present) => present.options = options,
            None if count >= most => {
                let text = "the client has as many subscriptions as may be";
                return Err((Reason::QuotaExceeded, text));
            }
            None => subscribed.push(Subscribed { filter: filter.into(), options }),
        }
        let is_new = self.client.hub.subscribe(self.client.session, filter, options);
        if retain_handling == 0 || (retain_handling == 1 && is_new) {
            self.begin_replay(Replay::new(filter, options));
        }
        Ok(())
    }

    /// At most one replay for each filter: another starts it over.
    fn begin_replay(&mut self, replay: Option<Replay>) {
        let Some(replay) = replay else { return };
        self.replays.retain(|present| present.filter() != replay.filter());
        self.replays.push_back(Box::new(replay));
    }

    /// Sends last values again, for every filter that asks for some; and what clients retained, where some of it may have
    /// been missed that clients of other nodes said.
    pub(super) fn replay_lost(&mut self) {
        // What clients of this node say goes by no bus.
        let replay = if self.client.hub.is_alone() { Replay::of_state } else { Replay::new };
        let subscribed = &self.membership.subscribed;
        let replays: Vec<Option<Replay>> =
            subscribed.iter().map(|s| replay(&s.filter, s.options)).collect();
        for replay in replays {
            self.begin_replay(replay);
        }
    }

    pub(super) async fn replay(&mut self) {
        let Some(replay) = self.replays.front_mut() else { return };
        let mark = self.link.len();
        let costly = replay.is_costly();
        let Some(page) = replay.page(&self.client).await else {
            self.replay_after = Some(Instant::now() + replay.retry_delay());
            return;
        };
        if replay.is_done() {
            self.replays.pop_front();
        }
        if costly {
            self.pace(LIST_COST_BYTES);
        }
        metrics::delivered(page.len());
        // Before what was published while the page was read: that is newer.
        self.link.insert(mark, page);
        // State in memory never makes us wait, so the others would not get their turn.
        tokio::task::yield_now().await;
    }

    pub(super) fn unsubscribe(&mut self, filter: &str) -> Reason {
        self.replays.retain(|replay| replay.filter() != filter);
        self.membership.subscribed.retain(|s| &*s.filter != filter);
        match self.client.hub.unsubscribe(self.client.session, filter) {
            true => Reason::Success,
            false => Reason::NoSubscriptionExisted,
        }
    }
}

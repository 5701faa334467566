//! Retained messages for a new subscription, page by page, so that one that
//! matches a whole fleet neither waits for all of it nor holds all of it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::{Kind, Page};
use fieldline_model::{DeviceId, ParamName};
use tracing::warn;
use uuid::Uuid;

use crate::hub::{may_see, state_message, state_topic};
use crate::link::{Delivery, Identifiers, Message};
use crate::publish::Client;
use crate::retained::client_prefix;
use crate::routes::Options;
use crate::topic::{StateFilter, matches, state_filter};

/// Retained messages of clients that are read for one page.
const CLIENT_PAGE: usize = 256;
/// Devices whose ids are read at once.
const LIST_PAGE: usize = 256;
/// Devices whose last values make one page.
const STATE_PAGE: usize = 4;

enum Stage {
    /// What clients retained, after this topic.
    Client(Option<Arc<str>>),
    /// The next page of devices, after this one.
    List(Option<Uuid>),
    /// Last values of these; `then` is where the list goes on.
    State {
        devices: VecDeque<DeviceId>,
        then: Option<Uuid>,
    },
    Done,
}

/// The retained messages of one filter, on their way.
pub(crate) struct Replay {
    filter: Box<str>,
    options: Options,
    /// The one parameter asked for, if it is one.
    name: Option<ParamName>,
    stage: Stage,
}

impl Replay {
    /// For a new subscription; `None` if nothing is ever retained for `filter`.
    pub(crate) fn new(filter: &str, options: Options) -> Option<Self> {
        let root = filter.split('/').next().unwrap_or(filter);
        if matches!(root, "client" | "+" | "#") {
            let stage = Stage::Client(None);
            return Some(Self { filter: filter.into(), options, name: None, stage });
        }
        Self::of_state(filter, options)
    }

    /// For last values only; `None` if `filter` asks for none.
    pub(crate) fn of_state(filter: &str, options: Options) -> Option<Self> {
        let stage = Self::first_of_state(filter)?;
        // A level with `%` stands for a name written otherwise: all are read then, and matched.
        let name = filter.split('/').nth(2).filter(|level| !level.contains(['+', '#', '%']));
        let name = name.and_then(|name| ParamName::new(name).ok());
        Some(Self { filter: filter.into(), options, name, stage })
    }

    fn first_of_state(filter: &str) -> Option<Stage> {
        match state_filter(filter) {
            StateFilter::None => None,
            StateFilter::One(device) => {
                Some(Stage::State { devices: VecDeque::from([device]), then: None })
            }
            StateFilter::All => Some(Stage::List(None)),
        }
    }

    /// What it is for.
    pub(crate) fn filter(&self) -> &str {
        &self.filter
    }

    /// Whether the next page reads many objects, or many that clients retained, from the disk.
    pub(crate) fn is_costly(&self) -> bool {
        match self.stage {
            Stage::List(_) => true,
            Stage::Client(_) => !client_prefix(&self.filter).1,
            _ => false,
        }
    }

    /// How long to wait before a page is asked for again that could not be read.
    pub(crate) fn retry_delay(&self) -> Duration {
        // The database may take its time to say no, and meanwhile nothing else is sent.
        Duration::from_secs(if matches!(self.stage, Stage::Client(_)) { 5 } else { 1 })
    }

    /// Whether everything was sent.
    pub(crate) fn is_done(&self) -> bool {
        matches!(self.stage, Stage::Done)
    }

    /// The next page; may be empty before the end. `None` if it cannot be read now: ask
    /// for the same page again later.
    pub(crate) async fn page(&mut self, client: &Client) -> Option<Vec<Delivery>> {
        match std::mem::replace(&mut self.stage, Stage::Done) {
            Stage::Client(after) => {
                let (prefix, whole) = client_prefix(&self.filter);
                let limit = if whole { 1 } else { CLIENT_PAGE };
                let page = client.hub.retained.page(prefix, after.as_deref(), limit).await;
                let (found, next) = match page {
                    Ok((found, next)) => (found, next.filter(|_| !whole)),
                    Err(_) => {
                        self.stage = Stage::Client(after);
                        return None;
                    }
                };
                self.stage = match next {
                    Some(next) => Stage::Client(Some(next)),
                    None => Self::first_of_state(&self.filter).unwrap_or(Stage::Done),
                };
                let seen = found.into_iter().filter(|m| {
                    matches(&self.filter, &m.topic) && may_see(&client.identity, m.object)
                });
                Some(seen.map(|message| self.delivery(Arc::new(message))).collect())
            }
            Stage::List(after) => {
                self.stage = self.list(client, after).await;
                Some(Vec::new())
            }
            Stage::State { mut devices, then } => {
                let taken: Vec<DeviceId> = devices.drain(..devices.len().min(STATE_PAGE)).collect();
                let seen = |device: &DeviceId| client.identity.may_see(*device);
                let page: Vec<DeviceId> = taken.iter().copied().filter(seen).collect();
                let Some(page) = self.state(client, &page).await else {
                    taken.into_iter().rev().for_each(|device| devices.push_front(device));
                    self.stage = Stage::State { devices, then };
                    return None;
                };
                self.stage = match (devices.is_empty(), then) {
                    (false, then) => Stage::State { devices, then },
                    (true, Some(then)) => Stage::List(Some(then)),
                    (true, None) => Stage::Done,
                };
                Some(page)
            }
            Stage::Done => Some(Vec::new()),
        }
    }

    async fn list(&self, client: &Client, after: Option<Uuid>) -> Stage {
        let identity = &client.identity;
        if !identity.sees_all() {
            return Stage::State {
                devices: identity.devices.iter().copied().collect(),
                then: None,
            };
        }
        let registry = &client.shared.services.platform.registry;
        let page = Page { after, ..Page::first(LIST_PAGE) };
        match registry.list(identity.account, Kind::Device, &page).await {
            Ok(records) if records.is_empty() => Stage::Done,
            Ok(records) => {
                let more = records.len() >= LIST_PAGE;
                let then = records.last().map(|record| record.id).filter(|_| more);
                let devices = records.into_iter().map(|record| DeviceId(record.id)).collect();
                Stage::State { devices, then }
            }
            Err(error) => {
                // What is missing comes with the next change of each value.
                warn!(%error, "retained values cannot be listed");
                Stage::Done
            }
        }
    }

    async fn state(&self, client: &Client, devices: &[DeviceId]) -> Option<Vec<Delivery>> {
        let names = self.name.as_slice();
        let state = &client.shared.services.platform.state;
        let values = state.get_many(client.identity.account, devices, names).await;
        let values = client.hub.told(values)?;
        let mut page = Vec::new();
        for (device, values) in values {
            for (name, last) in values {
                let topic = state_topic(device, name.as_str());
                if matches(&self.filter, &topic) {
                    page.push(self.delivery(Arc::new(state_message(topic, device, &last))));
                }
            }
        }
        Some(page)
    }

    fn delivery(&self, message: Arc<Message>) -> Delivery {
        let identifiers = match self.options.identifier {
            0 => Identifiers::None,
            one => Identifiers::One(one),
        };
        Delivery { qos: self.options.qos.min(message.qos), message, retain: true, identifiers }
    }
}

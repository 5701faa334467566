//! Reads what the encoding wrote, and nothing else.

use fieldline_model::codec::{part, take_tagged};

use super::*;

/// What is said of items that make no sense; readers only count them.
pub(super) const UNKNOWN: Damage = Damage("of no form that this node knows");

pub(super) struct Reader<'a> {
    pub(super) input: Input<'a>,
    /// Messages, names, values and nodes of trees that may still come.
    pub(super) parts: usize,
    pub(super) names: Vec<ParamName>,
}

impl Reader<'_> {
    fn uuid(&mut self) -> Result<Uuid, Damage> {
        self.input.array().map(Uuid::from_bytes)
    }

    pub(super) fn item(&mut self, about: About) -> Result<BusItem, Damage> {
        let About { account, kind, object } = about;
        Ok(match kind {
            Kind::Message => {
                let device = DeviceId(object);
                let messages = self.all_stored(Series::messages(account, device))?;
                BusItem::Messages { device, messages }
            }
            Kind::Log => {
                let kind = SeriesKind::from_u8(self.input.u8()?).ok_or(UNKNOWN)?;
                let lines = self.all_stored(Series { account, kind, object })?;
                BusItem::Log { kind, object, lines }
            }
            Kind::State => {
                let mut params = Vec::new();
                while let Some(name) = self.name()? {
                    params.push(name);
                }
                BusItem::State { device: DeviceId(object), params: params.into() }
            }
            Kind::Event => BusItem::Event(Arc::new(self.event(account, object)?)),
            Kind::Client => return client::read(&mut self.input, &mut self.parts),
            Kind::Mark => return Err(UNKNOWN),
        })
    }

    pub(super) fn event(&mut self, account: AccountId, object: Uuid) -> Result<Event, Damage> {
        let account = match self.input.u8()? {
            0 => account,
            1 => AccountId(self.uuid()?),
            _ => return Err(UNKNOWN),
        };
        Ok(Event {
            account,
            id: EventId(self.uuid()?),
            kind: event_kind(self.input.u8()?).ok_or(UNKNOWN)?,
            object,
            timestamp: Timestamp::from_micros(self.input.signed()?),
            params: self.params()?,
        })
    }

    pub(super) fn all_stored(&mut self, own: Series) -> Result<Arc<[Stored]>, Damage> {
        let mut all = Vec::new();
        loop {
            let series = match self.input.u8()? {
                0 => return Ok(all.into()),
                1 => own,
                2 => Series {
                    account: AccountId(self.uuid()?),
                    kind: SeriesKind::from_u8(self.input.u8()?).ok_or(UNKNOWN)?,
                    object: self.uuid()?,
                },
                _ => return Err(UNKNOWN),
            };
            part(&mut self.parts)?;
            let timestamp = self.input.signed()?;
            let received = timestamp.wrapping_add(self.input.signed()?);
            let shard = u16::try_from(self.input.varint()?).map_err(|_| UNKNOWN)?;
            let seq = self.input.varint()?;
            let params = self.params()?;
            all.push(Stored::read_back(
                series,
                Timestamp::from_micros(timestamp),
                Timestamp::from_micros(received),
                params,
                Cursor { shard, seq },
            ));
        }
    }

    pub(super) fn params(&mut self) -> Result<Params, Damage> {
        let mut params = Params::new();
        while let Some(name) = self.name()? {
            params.push(name, take_tagged(&mut self.input, &mut self.parts)?);
        }
        Ok(params)
    }

    /// The next name of a list; `None` at its end.
    pub(super) fn name(&mut self) -> Result<Option<ParamName>, Damage> {
        match self.input.varint()? {
            0 => Ok(None),
            1 => {
                part(&mut self.parts)?;
                let name = ParamName::new(self.input.text()?).map_err(|_| UNKNOWN)?;
                self.names.push(name.clone());
                Ok(Some(name))
            }
            number => {
                part(&mut self.parts)?;
                let at = usize::try_from(number - 2).map_err(|_| UNKNOWN)?;
                Ok(Some(self.names.get(at).ok_or(UNKNOWN)?.clone()))
            }
        }
    }
}

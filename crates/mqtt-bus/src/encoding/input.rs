//! Reads what the encoding wrote: `None` for whatever it never writes.

use super::*;

pub(super) struct Input<'a> {
    pub(super) bytes: &'a [u8],
    /// Parts that may still come.
    pub(super) parts: usize,
}

impl<'a> Input<'a> {
    pub(super) fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.bytes.split_at_checked(count)?;
        self.bytes = rest;
        Some(taken)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.bytes.split_first_chunk::<N>()?;
        self.bytes = rest;
        Some(*taken)
    }

    pub(super) fn byte(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub(super) fn number(&mut self) -> Option<u64> {
        let mut number = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                return None;
            }
            number |= bits << shift;
            if byte & 0x80 == 0 {
                return Some(number);
            }
        }
        None
    }

    pub(super) fn signed(&mut self) -> Option<i64> {
        let number = self.number()?;
        Some((number >> 1).cast_signed() ^ -(number & 1).cast_signed())
    }

    pub(super) fn bytes(&mut self) -> Option<&'a [u8]> {
        let count = usize::try_from(self.number()?).ok()?;
        self.take(count)
    }

    pub(super) fn text(&mut self) -> Option<&'a str> {
        std::str::from_utf8(self.bytes()?).ok()
    }

    /// How many elements follow: never more than may come.
    pub(super) fn count(&mut self) -> Option<usize> {
        let count = usize::try_from(self.number()?).ok()?;
        (count <= self.parts && count <= self.bytes.len()).then_some(count)
    }

    pub(super) fn part(&mut self) -> Option<()> {
        self.parts = self.parts.checked_sub(1)?;
        Some(())
    }

    pub(super) fn uuid(&mut self) -> Option<Uuid> {
        self.array().map(Uuid::from_bytes)
    }

    pub(super) fn value(&mut self) -> Option<Value> {
        self.part()?;
        Some(match self.byte()? {
            kind::FALSE => Value::Bool(false),
            kind::TRUE => Value::Bool(true),
            kind::INT => Value::Int(self.signed()?),
            kind::UINT => Value::from(self.number()?),
            kind::FLOAT => Value::float(f64::from_bits(u64::from_be_bytes(self.array()?)))?,
            kind::TEXT => Value::Text(self.text()?.into()),
            kind::BYTES => Value::Bytes(self.bytes()?.into()),
            kind::JSON => Value::Json(Arc::new(self.json(0)?)),
            scale => {
                let scale = scale.checked_sub(kind::DECIMAL)?;
                Value::Decimal(Decimal::new(self.signed()?, scale)?)
            }
        })
    }

    pub(super) fn json(&mut self, depth: usize) -> Option<Json> {
        self.part()?;
        if depth > DEPTH_MAX {
            return None;
        }
        Some(match self.byte()? {
            kind::NULL => Json::Null,
            kind::FALSE => Json::Bool(false),
            kind::TRUE => Json::Bool(true),
            kind::INT => self.signed()?.into(),
            kind::UINT => self.number()?.into(),
            kind::FLOAT => {
                let float = f64::from_bits(u64::from_be_bytes(self.array()?));
                Json::Number(Number::from_f64(float)?)
            }
            kind::TEXT => Json::String(self.text()?.to_owned()),
            kind::ARRAY => {
                let count = self.count()?;
                let mut items = Vec::with_capacity(count.min(64));
                for _ in 0..count {
                    items.push(self.json(depth + 1)?);
                }
                Json::Array(items)
            }
            kind::OBJECT => {
                let count = self.count()?;
                let mut members = Map::with_capacity(count.min(64));
                for _ in 0..count {
                    let name = self.text()?.to_owned();
                    members.insert(name, self.json(depth + 1)?);
                }
                Json::Object(members)
            }
            _ => return None,
        })
    }
}

pub(super) struct Reader<'a> {
    pub(super) input: Input<'a>,
    pub(super) names: Vec<ParamName>,
}

impl Reader<'_> {
    pub(super) fn item(&mut self, about: About) -> Option<BusItem> {
        let About { account, kind, object } = about;
        Some(match kind {
            Kind::Message => {
                let device = DeviceId(object);
                let messages = self.all_stored(Series::messages(account, device))?;
                BusItem::Messages { device, messages }
            }
            Kind::Log => {
                let kind = SeriesKind::from_u8(self.input.byte()?)?;
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
            Kind::Mark => return None,
        })
    }

    pub(super) fn event(&mut self, account: AccountId, object: Uuid) -> Option<Event> {
        let account = match self.input.byte()? {
            0 => account,
            1 => AccountId(self.input.uuid()?),
            _ => return None,
        };
        Some(Event {
            account,
            id: EventId(self.input.uuid()?),
            kind: event_kind(self.input.byte()?)?,
            object,
            timestamp: Timestamp::from_micros(self.input.signed()?),
            params: self.params()?,
        })
    }

    pub(super) fn all_stored(&mut self, own: Series) -> Option<Arc<[Stored]>> {
        let mut all = Vec::new();
        loop {
            let series = match self.input.byte()? {
                0 => return Some(all.into()),
                1 => own,
                2 => Series {
                    account: AccountId(self.input.uuid()?),
                    kind: SeriesKind::from_u8(self.input.byte()?)?,
                    object: self.input.uuid()?,
                },
                _ => return None,
            };
            self.input.part()?;
            let timestamp = self.input.signed()?;
            let received = timestamp.wrapping_add(self.input.signed()?);
            let shard = u16::try_from(self.input.number()?).ok()?;
            let seq = self.input.number()?;
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

    pub(super) fn params(&mut self) -> Option<Params> {
        let mut params = Params::new();
        while let Some(name) = self.name()? {
            params.push(name, self.input.value()?);
        }
        Some(params)
    }

    /// The next name of a list; `Some(None)` at its end.
    pub(super) fn name(&mut self) -> Option<Option<ParamName>> {
        match self.input.number()? {
            0 => Some(None),
            1 => {
                self.input.part()?;
                let name = ParamName::new(self.input.text()?).ok()?;
                self.names.push(name.clone());
                Some(Some(name))
            }
            number => {
                self.input.part()?;
                let at = usize::try_from(number - 2).ok()?;
                Some(Some(self.names.get(at)?.clone()))
            }
        }
    }
}

//! A shape says which parameters a message has and of which kind, so that messages that look alike, as most
//! of a device do, store values only.

pub(crate) use fieldline_model::codec::{Kind, put_value, take_value};
use fieldline_model::{ParamName, Params, Value};

use crate::codec::{Damage, Decoded, Input};

/// One parameter of a shape.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Column {
    pub(crate) name: ParamName,
    pub(crate) kind: Kind,
    /// Decimals of a [`Kind::Decimal`], else 0.
    pub(crate) scale: u8,
}

impl Column {
    pub(crate) fn fits(&self, name: &ParamName, value: &Value) -> bool {
        (self.name.same_text(name) || self.name == *name)
            && Kind::of(value) == (self.kind, self.scale)
    }
}

/// The parameters of a message, in order, without their values.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Shape(pub(crate) Box<[Column]>);

impl Shape {
    pub(crate) fn fits(&self, params: &Params) -> bool {
        self.0.len() == params.len()
            && self.0.iter().zip(params).all(|(column, (name, value))| column.fits(name, value))
    }

    /// Reads the values of a message of this shape.
    pub(crate) fn decode(&self, body: &[u8]) -> Decoded<Params> {
        let mut input = Input(body);
        let mut params = Params::with_capacity(self.0.len());
        for column in &self.0 {
            params.push(column.name.clone(), take_value(&mut input, column.kind, column.scale)?);
        }
        if input.is_empty() { Ok(params) } else { Err(Damage("bytes are left after the message")) }
    }

    /// Whether `body` has the values of this shape and nothing more.
    pub(crate) fn check(&self, body: &[u8]) -> Decoded<()> {
        let mut input = Input(body);
        for column in &self.0 {
            match column.kind {
                Kind::Bool => {
                    input.u8()?;
                }
                Kind::Int | Kind::Uint | Kind::Decimal => {
                    input.varint()?;
                }
                Kind::Float => {
                    input.u64()?;
                }
                Kind::Text => {
                    input.text()?;
                }
                Kind::Bytes | Kind::Json => {
                    input.bytes()?;
                }
            }
        }
        if input.is_empty() { Ok(()) } else { Err(Damage("bytes are left after the message")) }
    }
}

//! The dictionary of one memtable: numbers for names, shapes and series, so that
//! messages in memory and in the log repeat none of them. It lives as long as
//! its memtable: names that devices make up cannot grow it for ever.

use std::collections::HashMap;
use std::sync::Arc;

use fieldline_model::{ParamName, Params, Series};

use crate::hash::FoldMap;
use crate::value::{Column, Kind, Shape};

/// A parameter of a shape by the number of its name.
pub(crate) type ColumnKey = (u32, Kind, u8);

/// A thing with a number, and the log state that last defined it there.
pub(crate) struct Entry<T> {
    pub(crate) item: T,
    /// The [`Dict::epoch`] in which the log got to know it; 0 for never.
    pub(crate) epoch: u32,
}

/// What the writer knows of a series while it is in the memtable.
pub(crate) struct SeriesEntry {
    pub(crate) series: Series,
    /// The shape of its last message: the next mostly has the same.
    pub(crate) shape: Option<u32>,
    /// No message of the series is newer; a guess upwards is harmless. `None` if there is none.
    pub(crate) newest: Option<i64>,
}

pub(crate) struct ShapeEntry {
    pub(crate) shape: Arc<Shape>,
    pub(crate) keys: Box<[ColumnKey]>,
}

#[derive(Default)]
pub(crate) struct Dict {
    name_ids: HashMap<ParamName, u32>,
    pub(crate) names: Vec<Entry<ParamName>>,
    shape_ids: FoldMap<Box<[ColumnKey]>, u32>,
    pub(crate) shapes: Vec<Entry<ShapeEntry>>,
    series_ids: FoldMap<Series, u32>,
    pub(crate) series: Vec<Entry<SeriesEntry>>,
    /// Changes whenever the log forgets: with a new file, and when it was cut.
    pub(crate) epoch: u32,
    /// Memory it takes, about.
    pub(crate) bytes: usize,
}

/// Numbers are given in order, and a memtable is sealed long before they run out.
fn number(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

impl Dict {
    pub(crate) fn name(&mut self, name: &ParamName) -> u32 {
        if let Some(id) = self.name_ids.get(name) {
            return *id;
        }
        let id = number(self.names.len());
        self.name_ids.insert(name.clone(), id);
        self.names.push(Entry { item: name.clone(), epoch: 0 });
        self.bytes += name.as_str().len() + 96;
        id
    }

    /// The number of a series; `newest` is asked for one that is new here.
    pub(crate) fn series(&mut self, series: Series, newest: impl FnOnce() -> Option<i64>) -> u32 {
        if let Some(id) = self.series_ids.get(&series) {
            return *id;
        }
        let id = number(self.series.len());
        self.series_ids.insert(series, id);
        let item = SeriesEntry { series, shape: None, newest: newest() };
        self.series.push(Entry { item, epoch: 0 });
        // Here and in the memtable, with the first node of its order.
        self.bytes += 480;
        id
    }

    /// The number of the shape of `params`, a message of series number `of`.
    pub(crate) fn shape(&mut self, of: u32, params: &Params) -> u32 {
        let last = self.series.get(of as usize).and_then(|entry| entry.item.shape);
        if let Some(id) = last
            && let Some(entry) = self.shapes.get(id as usize)
            && entry.item.shape.fits(params)
        {
            return id;
        }
        let keys: Box<[ColumnKey]> = params
            .iter()
            .map(|(name, value)| {
                let (kind, scale) = Kind::of(value);
                (self.name(name), kind, scale)
            })
            .collect();
        let id = self.shape_of(keys);
        if let Some(entry) = self.series.get_mut(of as usize) {
            entry.item.shape = Some(id);
        }
        id
    }

    /// The number of the shape with these columns; the names must be known.
    pub(crate) fn shape_of(&mut self, keys: Box<[ColumnKey]>) -> u32 {
        if let Some(id) = self.shape_ids.get(&keys) {
            return *id;
        }
        let columns = keys.iter().filter_map(|(name, kind, scale)| {
            let name = self.names.get(*name as usize)?.item.clone();
            Some(Column { name, kind: *kind, scale: *scale })
        });
        let shape = Arc::new(Shape(columns.collect()));
        let id = number(self.shapes.len());
        self.bytes += 160 + 56 * keys.len();
        self.shape_ids.insert(keys.clone(), id);
        self.shapes.push(Entry { item: ShapeEntry { shape, keys }, epoch: 0 });
        id
    }
}

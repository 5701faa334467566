//! The index of a segment: pages of series with their blocks, pages of shapes with their
//! names, and a directory of the pages.
//!
//! ```text
//! page      := crc:u32 squeezed(series* | names shapes)
//! directory := index_bytes (account[16] kind object[16] Δoffset bytes)* (shape Δoffset bytes)*
//! ```
//!
//! The directory stays in memory while the segment is there: it is less than a hundredth
//! of the index. Pages are read when they are asked for, and kept as long as there is room: so
//! a look-up costs a page, however many devices or names a segment has.

#![allow(clippy::cast_possible_truncation, reason = "series kinds are u8 by their repr")]

use std::io;
use std::sync::Arc;

use fieldline_model::{AccountId, ParamName, Series, SeriesKind};
use uuid::Uuid;

use crate::codec::{Damage, Decoded, Input, put_bytes, put_signed, put_varint};
use crate::dict::{ColumnKey, ShapeEntry};
use crate::hash::FoldMap;
use crate::value::{Column, Kind, Shape};

/// A page is closed beyond this size; the blocks of one series, and one shape, follow whole.
const PAGE_BYTES: usize = 8 << 10;
/// Largest page that is written, before it is squeezed: always readable.
pub(crate) const PAGE_BYTES_MAX: usize = 60 << 20;

/// Where a block is and what it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockEntry {
    pub(crate) offset: u64,
    /// Of the statistics with their checksum; 0 if there are none.
    pub(crate) stats_bytes: u32,
    /// Of the data with its checksum.
    pub(crate) data_bytes: u32,
    pub(crate) rows: u32,
    pub(crate) from: i64,
    pub(crate) to: i64,
    pub(crate) first_seq: u64,
    pub(crate) last_seq: u64,
}

impl BlockEntry {
    pub(crate) const fn bytes(&self) -> u64 {
        self.stats_bytes as u64 + self.data_bytes as u64
    }
}

/// Where a page is, with its checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) offset: u64,
    pub(crate) bytes: u32,
}

/// Where the pages are.
#[derive(Debug)]
pub(crate) struct Directory {
    /// With the first series of each.
    pub(crate) series: Box<[(Series, Place)]>,
    /// With the first shape of each.
    pub(crate) shapes: Box<[(u32, Place)]>,
    /// Of all pages, not squeezed.
    pub(crate) index_bytes: usize,
    /// The checksum of an index of the first format, which is one page of everything.
    pub(crate) whole: Option<u32>,
}

impl Directory {
    /// Of an index of the first format.
    pub(crate) fn of_whole(place: Place, crc: u32) -> Self {
        let account = AccountId::from_bytes([0; 16]);
        let lowest = Series { account, kind: SeriesKind::Message, object: Uuid::nil() };
        Self {
            series: [(lowest, place)].into(),
            shapes: [(0, place)].into(),
            index_bytes: place.bytes as usize * 3,
            whole: Some(crc),
        }
    }

    pub(crate) fn read(plain: &[u8]) -> Decoded<Self> {
        let mut input = Input(plain);
        let index_bytes = usize::try_from(input.varint()?).unwrap_or(usize::MAX);
        let mut offset = 0_u64;
        let mut place = |input: &mut Input<'_>| -> Decoded<Place> {
            offset = offset.wrapping_add(input.varint()?);
            let place = Place { offset, bytes: input.id()? };
            offset = offset.wrapping_add(u64::from(place.bytes));
            Ok(place)
        };
        let mut series: Vec<(Series, Place)> = Vec::new();
        for _ in 0..input.count()? {
            let account = AccountId::from_bytes(input.array()?);
            let kind = SeriesKind::from_u8(input.u8()?).ok_or(Damage("unknown series kind"))?;
            let first = Series { account, kind, object: Uuid::from_bytes(input.array()?) };
            if series.last().is_some_and(|(last, _)| *last >= first) {
                return Err(Damage("pages are not in order"));
            }
            series.push((first, place(&mut input)?));
        }
        let mut shapes: Vec<(u32, Place)> = Vec::new();
        for _ in 0..input.count()? {
            let first = input.id()?;
            if shapes.last().is_some_and(|(last, _)| *last >= first) {
                return Err(Damage("pages are not in order"));
            }
            shapes.push((first, place(&mut input)?));
        }
        if !input.is_empty() {
            return Err(Damage("bytes are left after the directory"));
        }
        Ok(Self { series: series.into(), shapes: shapes.into(), index_bytes, whole: None })
    }

    /// The number of the page that would hold a series.
    pub(crate) fn page_of(&self, series: &Series) -> Option<usize> {
        self.series.partition_point(|(first, _)| first <= series).checked_sub(1)
    }

    /// The number of the page that holds a shape, and the first shape there.
    pub(crate) fn page_of_shape(&self, shape: u32) -> Option<(usize, u32)> {
        let at = self.shapes.partition_point(|(first, _)| *first <= shape).checked_sub(1)?;
        Some((at, self.shapes.get(at)?.0))
    }
}

/// What the numbers of a block are written against.
#[derive(Default)]
struct Before {
    account: Option<AccountId>,
    offset: u64,
    time: i64,
    seq: u64,
}

fn put_series(out: &mut Vec<u8>, before: &mut Before, series: &Series, blocks: &[BlockEntry]) {
    // Sorted by account first, so it is written where it changes only.
    out.push(u8::from(before.account != Some(series.account)));
    if before.account != Some(series.account) {
        before.account = Some(series.account);
        out.extend_from_slice(series.account.as_bytes());
    }
    out.push(series.kind as u8);
    out.extend_from_slice(series.object.as_bytes());
    put_varint(out, blocks.len() as u64);
    for block in blocks {
        put_varint(out, block.offset.wrapping_sub(before.offset));
        put_varint(out, u64::from(block.stats_bytes));
        put_varint(out, u64::from(block.data_bytes));
        put_varint(out, u64::from(block.rows));
        put_signed(out, block.from.wrapping_sub(before.time));
        put_signed(out, block.to.wrapping_sub(block.from));
        put_signed(out, block.first_seq.wrapping_sub(before.seq).cast_signed());
        put_signed(out, block.last_seq.wrapping_sub(block.first_seq).cast_signed());
        before.offset = block.offset + block.bytes();
        (before.time, before.seq) = (block.from, block.first_seq);
    }
}

/// Some series, in order, with the blocks of each in order of time.
#[derive(Default)]
pub(crate) struct SeriesPage {
    /// With where the blocks of each begin.
    series: Vec<(Series, usize)>,
    blocks: Vec<BlockEntry>,
}

impl SeriesPage {
    pub(crate) fn read(plain: &[u8]) -> Decoded<Self> {
        let (mut input, mut before, mut page) = (Input(plain), Before::default(), Self::default());
        while !input.is_empty() {
            page.take(&mut input, &mut before)?;
        }
        Ok(page)
    }

    fn take(&mut self, input: &mut Input<'_>, before: &mut Before) -> Decoded<()> {
        if input.u8()? != 0 {
            before.account = Some(AccountId::from_bytes(input.array()?));
        }
        let account = before.account.ok_or(Damage("a series without account"))?;
        let kind = SeriesKind::from_u8(input.u8()?).ok_or(Damage("unknown series kind"))?;
        let series = Series { account, kind, object: Uuid::from_bytes(input.array()?) };
        if self.series.last().is_some_and(|(last, _)| *last >= series) {
            return Err(Damage("series are not in order"));
        }
        self.series.push((series, self.blocks.len()));
        for _ in 0..input.count()? {
            let offset = before.offset.wrapping_add(input.varint()?);
            let stats_bytes = input.id()?;
            let data_bytes = input.id()?;
            let rows = input.id()?;
            let from = before.time.wrapping_add(input.signed()?);
            let to = from.wrapping_add(input.signed()?);
            let first_seq = before.seq.wrapping_add_signed(input.signed()?);
            let last_seq = first_seq.wrapping_add_signed(input.signed()?);
            let block =
                BlockEntry { offset, stats_bytes, data_bytes, rows, from, to, first_seq, last_seq };
            self.blocks.push(block);
            before.offset = offset.wrapping_add(block.bytes());
            (before.time, before.seq) = (from, first_seq);
        }
        Ok(())
    }

    fn blocks_at(&self, at: usize) -> Option<(&Series, &[BlockEntry])> {
        let (series, start) = self.series.get(at)?;
        let end = self.series.get(at + 1).map_or(self.blocks.len(), |(_, end)| *end);
        Some((series, self.blocks.get(*start..end)?))
    }

    pub(crate) fn blocks(&self, series: &Series) -> &[BlockEntry] {
        let at = self.series.binary_search_by(|(other, _)| other.cmp(series));
        at.ok().and_then(|at| self.blocks_at(at)).map_or(&[], |(_, blocks)| blocks)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Series, &[BlockEntry])> {
        (0..self.series.len()).filter_map(|at| self.blocks_at(at))
    }

    pub(crate) const fn heap_bytes(&self) -> usize {
        self.series.len() * size_of::<(Series, usize)>()
            + self.blocks.len() * size_of::<BlockEntry>()
            + 256
    }
}

/// Some shapes that follow each other, with the names in them.
#[derive(Default)]
pub(crate) struct ShapePage {
    pub(crate) shapes: Vec<Arc<ShapeEntry>>,
    /// With their numbers, which count for the whole segment.
    pub(crate) names: Vec<(u32, ParamName)>,
    pub(crate) heap_bytes: usize,
}

impl ShapePage {
    pub(crate) fn read(plain: &[u8]) -> Decoded<Self> {
        let mut input = Input(plain);
        let mut page = Self { heap_bytes: plain.len() + 256, ..Self::default() };
        let mut known: FoldMap<u32, ParamName> = FoldMap::default();
        for _ in 0..input.count()? {
            let id = input.id()?;
            let name = ParamName::new(input.text()?).map_err(|_| Damage("no name"))?;
            known.insert(id, name.clone());
            page.names.push((id, name));
        }
        page.take_shapes(&mut input, |id| known.get(&id))?;
        if input.is_empty() { Ok(page) } else { Err(Damage("bytes are left after the shapes")) }
    }

    fn take_shapes<'a>(
        &mut self,
        input: &mut Input<'_>,
        name: impl Fn(u32) -> Option<&'a ParamName>,
    ) -> Decoded<()> {
        for _ in 0..input.count()? {
            let mut keys: Vec<ColumnKey> = Vec::new();
            let mut columns = Vec::new();
            for _ in 0..input.count()? {
                let id = input.id()?;
                let name = name(id).ok_or(Damage("unknown name"))?.clone();
                let kind = Kind::from_u8(input.u8()?)?;
                let scale = input.u8()?;
                keys.push((id, kind, scale));
                columns.push(Column { name, kind, scale });
            }
            let shape = Arc::new(Shape(columns.into()));
            let entry = ShapeEntry { shape, keys: keys.into() };
            self.heap_bytes += entry.heap_bytes();
            self.shapes.push(Arc::new(entry));
        }
        self.heap_bytes += self.names.len() * 96;
        Ok(())
    }
}

impl ShapeEntry {
    /// Memory it takes without its names, about.
    pub(crate) fn heap_bytes(&self) -> usize {
        self.keys.len() * (size_of::<ColumnKey>() + size_of::<Column>()) + 128
    }
}

/// Reads an index of the first format.
pub(crate) fn read_whole(plain: &[u8]) -> Decoded<(SeriesPage, ShapePage)> {
    let mut input = Input(plain);
    let mut shapes = ShapePage { heap_bytes: plain.len(), ..ShapePage::default() };
    let mut names = Vec::new();
    for id in 0..u32::try_from(input.count()?).unwrap_or(u32::MAX) {
        let name = ParamName::new(input.text()?).map_err(|_| Damage("no name"))?;
        names.push(name.clone());
        shapes.names.push((id, name));
    }
    shapes.take_shapes(&mut input, |id| names.get(id as usize))?;
    let (mut series, mut before) = (SeriesPage::default(), Before::default());
    for _ in 0..input.count()? {
        series.take(&mut input, &mut before)?;
    }
    if !input.is_empty() {
        return Err(Damage("bytes are left after the index"));
    }
    Ok((series, shapes))
}

/// Cuts an index into pages, gives each to `put`, and returns the directory.
pub(crate) fn write(
    names: &[ParamName],
    shapes: &[Box<[ColumnKey]>],
    series: &[(Series, Vec<BlockEntry>)],
    mut put: impl FnMut(&[u8]) -> io::Result<Place>,
) -> io::Result<Vec<u8>> {
    let mut index_bytes = 0;
    let mut put = |plain: &[u8]| {
        index_bytes += plain.len();
        put(plain)
    };
    let mut series_pages = Vec::new();
    let (mut plain, mut before, mut first) = (Vec::new(), Before::default(), None);
    for (at, (of, blocks)) in series.iter().enumerate() {
        put_series(&mut plain, &mut before, of, blocks);
        let of = *first.get_or_insert(of);
        if plain.len() >= PAGE_BYTES || at + 1 == series.len() {
            series_pages.push((of, put(&plain)?));
            (before, first) = (Before::default(), None);
            plain.clear();
        }
    }
    let mut shape_pages = Vec::new();
    let (mut of_names, mut of_shapes) = (Vec::new(), Vec::new());
    // Shapes share most of their names: each is in a page once.
    let (mut first, mut named) = (0, FoldMap::<u32, ()>::default());
    for (at, keys) in shapes.iter().enumerate() {
        put_varint(&mut of_shapes, keys.len() as u64);
        for (id, kind, scale) in keys {
            put_varint(&mut of_shapes, u64::from(*id));
            of_shapes.extend_from_slice(&[*kind as u8, *scale]);
            if named.insert(*id, ()).is_none() {
                let name = names.get(*id as usize);
                let name = name.ok_or_else(|| io::Error::other("a shape without a name"))?;
                put_varint(&mut of_names, u64::from(*id));
                put_bytes(&mut of_names, name.as_str().as_bytes());
            }
        }
        if of_names.len() + of_shapes.len() >= PAGE_BYTES || at + 1 == shapes.len() {
            plain.clear();
            put_varint(&mut plain, named.len() as u64);
            plain.append(&mut of_names);
            put_varint(&mut plain, (at + 1 - first) as u64);
            plain.append(&mut of_shapes);
            shape_pages.push((first, put(&plain)?));
            first = at + 1;
            named.clear();
        }
    }
    let mut out = Vec::new();
    put_varint(&mut out, index_bytes as u64);
    let mut offset = 0;
    let mut put_place = |out: &mut Vec<u8>, place: Place| {
        put_varint(out, place.offset.wrapping_sub(offset));
        put_varint(out, u64::from(place.bytes));
        offset = place.offset + u64::from(place.bytes);
    };
    put_varint(&mut out, series_pages.len() as u64);
    for (first, place) in series_pages {
        out.extend_from_slice(first.account.as_bytes());
        out.push(first.kind as u8);
        out.extend_from_slice(first.object.as_bytes());
        put_place(&mut out, place);
    }
    put_varint(&mut out, shape_pages.len() as u64);
    for (first, place) in shape_pages {
        put_varint(&mut out, first as u64);
        put_place(&mut out, place);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

        #[test]
        fn any_bytes_are_read_without_panic(bytes: Vec<u8>) {
            let _read = (
                Directory::read(&bytes).is_ok(),
                SeriesPage::read(&bytes).is_ok(),
                ShapePage::read(&bytes).is_ok(),
                read_whole(&bytes).is_ok(),
            );
        }

        #[test]
        fn what_is_written_is_found_again(count in 1_u32..2_000, blocks in 1_u64..5) {
            let names: Vec<ParamName> =
                (0..count).map(|n| ParamName::new(format!("name.{n}")).unwrap()).collect();
            let shapes: Vec<Box<[ColumnKey]>> =
                (0..count).map(|n| Box::from([(0, Kind::Int, 0), (n, Kind::Text, 0)])).collect();
            let of = |n: u32| Series {
                account: AccountId::from_bytes([u8::try_from(n / 700).unwrap(); 16]),
                kind: SeriesKind::Message,
                object: Uuid::from_u128(u128::from(n) << 80),
            };
            let entry = |n: u32, at: u64| BlockEntry {
                offset: u64::from(n) * 1_000 + at * 100,
                stats_bytes: 10,
                data_bytes: 90,
                rows: 7,
                from: i64::from(n) * 3 - 500,
                to: i64::from(n) * 3,
                first_seq: u64::from(n) * at,
                last_seq: u64::from(n) * at + 9,
            };
            let series: Vec<(Series, Vec<BlockEntry>)> =
                (0..count).map(|n| (of(n), (0..blocks).map(|at| entry(n, at)).collect())).collect();
            let mut file: Vec<u8> = Vec::new();
            let directory = write(&names, &shapes, &series, |plain| {
                let place = Place { offset: file.len() as u64, bytes: u32::try_from(plain.len()).unwrap() };
                file.extend_from_slice(plain);
                Ok(place)
            });
            let directory = Directory::read(&directory.unwrap()).unwrap();
            prop_assert_eq!(directory.index_bytes, file.len());
            let plain = |place: Place| {
                let start = usize::try_from(place.offset).unwrap();
                &file[start..start + place.bytes as usize]
            };
            for n in (0..count).step_by(37) {
                let page = directory.page_of(&of(n)).unwrap();
                let page = SeriesPage::read(plain(directory.series[page].1)).unwrap();
                prop_assert_eq!(page.blocks(&of(n)), &series[n as usize].1[..]);
                let (page, first) = directory.page_of_shape(n).unwrap();
                let page = ShapePage::read(plain(directory.shapes[page].1)).unwrap();
                let shape = &page.shapes[(n - first) as usize];
                prop_assert_eq!(&shape.keys, &shapes[n as usize]);
                prop_assert_eq!(&shape.shape.0[1].name, &names[n as usize]);
            }
            let absent = Series { kind: SeriesKind::Event, ..of(0) };
            let page = directory.page_of(&absent).unwrap();
            let page = SeriesPage::read(plain(directory.series[page].1)).unwrap();
            prop_assert!(page.blocks(&absent).is_empty());
        }
    }
}

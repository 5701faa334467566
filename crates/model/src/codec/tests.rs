use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

fn any_json() -> impl Strategy<Value = Json> {
    let leaf = prop_oneof![
        Just(Json::Null),
        any::<bool>().prop_map(Json::Bool),
        any::<i64>().prop_map(Json::from),
        any::<u64>().prop_map(Json::from),
        any::<f64>().prop_map(Json::from),
        ".{0,8}".prop_map(Json::String),
    ];
    leaf.prop_recursive(4, 24, 6, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..6).prop_map(Json::Array),
            vec((".{0,4}", inner), 0..6)
                .prop_map(|items| Json::Object(items.into_iter().collect())),
        ]
    })
}

fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<bool>().prop_map(Value::Bool),
        any::<i64>().prop_map(Value::Int),
        any::<u64>().prop_map(Value::from),
        (any::<i64>(), 0_u8..=18).prop_map(|(m, s)| Value::Decimal(Decimal::new(m, s).unwrap())),
        any::<u64>().prop_map(|bits| Value::Float(f64::from_bits(bits))),
        ".{0,20}".prop_map(Value::from),
        any::<Vec<u8>>().prop_map(|b| Value::from(&b[..])),
        any_json().prop_map(|j| Value::Json(Arc::new(j))),
    ]
}

/// Equal to the last bit: kind, scale and the kinds of a tree's numbers too.
fn identical(a: &Value, b: &Value) -> bool {
    let text = |value: &Value| match value {
        Value::Json(json) => format!("{json:?}"),
        _ => String::new(),
    };
    Kind::of(a) == Kind::of(b) && a == b && text(a) == text(b)
}

proptest! {
    #[test]
    fn numbers_round_trip(n: u64, m: i64) {
        let mut out = Vec::new();
        put_varint(&mut out, n);
        put_signed(&mut out, m);
        let mut input = Input(&out);
        prop_assert_eq!((input.varint(), input.signed(), input.is_empty()), (Ok(n), Ok(m), true));
    }

    #[test]
    fn values_round_trip_to_the_last_bit(value in any_value()) {
        let (kind, scale) = Kind::of(&value);
        let (mut out, mut tagged) = (Vec::new(), Vec::new());
        put_value(&mut out, &value);
        put_tagged(&mut tagged, &value);
        prop_assert_eq!(&tagged[1..], &out[..]);
        let mut input = Input(&out);
        let read = take_value(&mut input, kind, scale).unwrap();
        prop_assert!(identical(&read, &value), "{read:?} {value:?}");
        prop_assert!(input.is_empty());
        let mut input = Input(&tagged);
        let read = take_tagged(&mut input, &mut { PARTS_MAX }).unwrap();
        prop_assert!(identical(&read, &value), "{read:?} {value:?}");
        prop_assert!(input.is_empty());
    }

    #[test]
    fn any_bytes_are_read_without_panic(bytes: Vec<u8>, kind in 0_u8..8, scale: u8) {
        let kind = Kind::from_u8(kind).unwrap();
        let mut input = Input(&bytes);
        let _read = (input.varint(), input.count(), input.text());
        let _read = take_value(&mut Input(&bytes), kind, scale);
        let _read = take_tagged(&mut Input(&bytes), &mut { PARTS_MAX });
        let _read = tree(&bytes, &mut { PARTS_MAX });
    }

    #[test]
    fn what_is_cut_short_or_bent_is_no_panic(value in any_value(), at: prop::sample::Index, flip: u8) {
        let mut out = Vec::new();
        put_tagged(&mut out, &value);
        let at = at.index(out.len());
        let cut = take_tagged(&mut Input(&out[..at]), &mut { PARTS_MAX });
        prop_assert!(cut.is_err());
        out[at] ^= flip;
        let _read = take_tagged(&mut Input(&out), &mut { PARTS_MAX });
    }
}

/// What is on disks and in databases: these bytes never change.
#[test]
fn the_bytes_are_as_they_ever_were() {
    let json = serde_json::json!({"a": [null, true, -1, 18_446_744_073_709_551_615_u64, 0.5, "x"]});
    let known: [(Value, &str); 9] = [
        (Value::Bool(true), "0001"),
        (Value::Int(-3), "0105"),
        (Value::Uint(u64::MAX), "02ffffffffffffffffff01"),
        (Value::Decimal(Decimal::new(12_610, 3).unwrap()), "2384c501"),
        (Value::Decimal(Decimal::new(1, 0).unwrap()), "2002"),
        (Value::Float(1.5), "04000000000000f83f"),
        (Value::from("hä"), "050368c3a4"),
        (Value::from(&[0_u8, 255][..]), "060200ff"),
        (
            Value::Json(Arc::new(json)),
            "07210801016107060002030104ffffffffffffffffff0105000000000000e03f060178",
        ),
    ];
    for (value, bytes) in known {
        let mut out = Vec::new();
        put_tagged(&mut out, &value);
        assert_eq!(crate::value::to_hex(&out), bytes, "{value:?}");
    }
}

#[test]
fn deep_json_is_kept_as_text_below_the_limit() {
    let mut json = Json::Null;
    for _ in 0..400 {
        json = Json::Array(vec![json]);
    }
    let mut out = Vec::new();
    put_json(&mut out, &json, 0);
    let mut read = &tree(&out, &mut { PARTS_MAX }).unwrap();
    while let Some(inner) = read.get(0) {
        read = inner;
    }
    assert!(read.as_str().unwrap().starts_with("[[["));
}

#[test]
fn trees_deeper_than_any_writer_makes_are_refused() {
    let mut bytes = [7, 1].repeat(257);
    bytes.push(0);
    assert_eq!(tree(&bytes, &mut { PARTS_MAX }), Err(Damage("JSON is nested too deeply")));
}

/// A byte of a tree takes many in memory: a bound on bytes alone would be none.
#[test]
fn a_tree_of_too_many_parts_is_refused() {
    let mut nulls = vec![Kind::Json as u8];
    let mut tree = vec![7];
    put_varint(&mut tree, PARTS_MAX as u64);
    tree.resize(tree.len() + PARTS_MAX, 0);
    put_bytes(&mut nulls, &tree);
    let mut parts = PARTS_MAX;
    let read = take_tagged(&mut Input(&nulls), &mut parts);
    assert_eq!(read, Err(Damage("has more parts than a message may")));
    // The largest that a message may have passes: each node counts for eight bytes of its limit at least.
    let largest = Json::Array(vec![Json::Null; crate::Accepted::BYTES_MAX / 24]);
    let mut bytes = Vec::new();
    put_tagged(&mut bytes, &Value::Json(Arc::new(largest)));
    assert!(take_tagged(&mut Input(&bytes), &mut { PARTS_MAX }).is_ok());
}

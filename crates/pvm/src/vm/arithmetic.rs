//! Operators. Whole numbers are exact up to 64 bits, decimals up to 18 places; what does not fit is
//! the error value, and so is every operation on it.

use std::cmp::Ordering;

use super::functions::Context;
use super::value::Val;
use crate::ast::{BinaryOp, UnaryOp};

/// Whether two values are the same: numbers by value, text and bytes by content.
pub(crate) fn equal(context: &Context<'_>, left: &Val, right: &Val) -> bool {
    match (left, right) {
        (Val::Int(a), Val::Int(b)) => a == b,
        (Val::Null, Val::Null) => true,
        (Val::Bool(a), Val::Bool(b)) => a == b,
        (Val::Time(a), Val::Time(b)) => a == b,
        _ => match (context.bytes(left), context.bytes(right)) {
            // Most differ in the first byte already.
            (Some(a), Some(b)) => a.len() == b.len() && a.first() == b.first() && a == b,
            _ => compare(context, left, right) == Some(Ordering::Equal),
        },
    }
}

/// The order of two values; `None` if they have none.
pub(crate) fn compare(context: &Context<'_>, left: &Val, right: &Val) -> Option<Ordering> {
    if let (Val::Int(a), Val::Int(b)) = (left, right) {
        return Some(a.cmp(b));
    }
    if let (Val::Time(a), Val::Time(b)) = (left, right) {
        return Some(a.cmp(b));
    }
    if let (Some((a, a_scale)), Some((b, b_scale))) = (left.as_scaled(), right.as_scaled()) {
        // Both fit: 20 digits and 18 more are below 2^127.
        let a = a.checked_mul(10_i128.checked_pow(b_scale)?)?;
        let b = b.checked_mul(10_i128.checked_pow(a_scale)?)?;
        return Some(a.cmp(&b));
    }
    if let (Some(a), Some(b)) = (left.as_float(), right.as_float()) {
        return a.partial_cmp(&b);
    }
    Some(context.bytes(left)?.cmp(context.bytes(right)?))
}

/// `left op right`; `and` and `or` never come here: they are jumps.
pub(crate) fn binary(context: &Context<'_>, op: BinaryOp, left: &Val, right: &Val) -> Val {
    if matches!(left, Val::Invalid) || matches!(right, Val::Invalid) {
        return Val::Invalid;
    }
    match op {
        BinaryOp::Eq => return Val::Bool(equal(context, left, right)),
        BinaryOp::Ne => return Val::Bool(!equal(context, left, right)),
        _ => {}
    }
    if matches!(left, Val::Null) || matches!(right, Val::Null) {
        return Val::Null;
    }
    let ordered = |fits: fn(Ordering) -> bool| {
        compare(context, left, right).map_or(Val::Invalid, |order| Val::Bool(fits(order)))
    };
    match op {
        BinaryOp::Lt => ordered(Ordering::is_lt),
        BinaryOp::Le => ordered(Ordering::is_le),
        BinaryOp::Gt => ordered(Ordering::is_gt),
        BinaryOp::Ge => ordered(Ordering::is_ge),
        BinaryOp::Add | BinaryOp::Sub | BinaryOp::Mul | BinaryOp::Div | BinaryOp::Rem => {
            calculate(op, left, right).unwrap_or(Val::Invalid)
        }
        _ => bits(op, left, right).unwrap_or(Val::Invalid),
    }
}

fn calculate(op: BinaryOp, left: &Val, right: &Val) -> Option<Val> {
    if let (Val::Int(a), Val::Int(b)) = (left, right) {
        let quick = match op {
            BinaryOp::Add => a.checked_add(*b),
            BinaryOp::Sub => a.checked_sub(*b),
            BinaryOp::Mul => a.checked_mul(*b),
            BinaryOp::Div => a.checked_div(*b),
            _ => a.checked_rem(*b),
        };
        if let Some(result) = quick {
            return Some(Val::Int(result));
        }
    }
    let (Some((a, a_scale)), Some((b, b_scale))) = (left.as_scaled(), right.as_scaled()) else {
        let (a, b) = (left.as_float()?, right.as_float()?);
        return Some(Val::float(match op {
            BinaryOp::Add => a + b,
            BinaryOp::Sub => a - b,
            BinaryOp::Mul => a * b,
            BinaryOp::Div => a / b,
            _ => a % b,
        }));
    };
    if op == BinaryOp::Mul {
        return Some(Val::decimal(a.checked_mul(b)?, a_scale + b_scale));
    }
    let scale = a_scale.max(b_scale);
    let a = a.checked_mul(10_i128.checked_pow(scale - a_scale)?)?;
    let b = b.checked_mul(10_i128.checked_pow(scale - b_scale)?)?;
    Some(match op {
        BinaryOp::Add => Val::decimal(a.checked_add(b)?, scale),
        BinaryOp::Sub => Val::decimal(a.checked_sub(b)?, scale),
        BinaryOp::Rem => Val::decimal(a.checked_rem(b)?, scale),
        _ if b == 0 => return None,
        _ if scale == 0 => Val::int(a.checked_div(b)?),
        // A quotient of decimals has at most nine places.
        _ => Val::decimal(divide_half_even(a.checked_mul(1_000_000_000)?, b), 9),
    })
}

fn bits(op: BinaryOp, left: &Val, right: &Val) -> Option<Val> {
    if let Val::Bool(a) = left {
        let Val::Bool(b) = right else { return None };
        return Some(Val::Bool(match op {
            BinaryOp::BitAnd => a & b,
            BinaryOp::BitOr => a | b,
            BinaryOp::BitXor => a ^ b,
            _ => return None,
        }));
    }
    if let (Val::Int(a), Val::Int(b)) = (left, right)
        && op == BinaryOp::BitAnd
    {
        return Some(Val::Int(a & b));
    }
    let (a, b) = (left.as_int()?, right.as_int()?);
    Some(Val::int(match op {
        BinaryOp::BitAnd => a & b,
        BinaryOp::BitOr => a | b,
        BinaryOp::BitXor => a ^ b,
        BinaryOp::Shl => {
            let by = u32::try_from(b).ok().filter(|by| *by < 64)?;
            a.checked_mul(1_i128 << by)?
        }
        _ => a >> u32::try_from(b).ok().filter(|by| *by < 128)?,
    }))
}

/// `op value`.
pub(crate) fn unary(op: UnaryOp, value: &Val) -> Val {
    match (op, value) {
        (UnaryOp::Not, Val::Bool(b)) => Val::Bool(!b),
        (UnaryOp::Not, Val::Null) => Val::Bool(true),
        (UnaryOp::Not, Val::Int(n)) => Val::Bool(*n == 0),
        (UnaryOp::Minus | UnaryOp::Invert, Val::Null) => Val::Null,
        (UnaryOp::Minus, Val::Float(x)) => Val::Float(-x),
        (UnaryOp::Minus, value) => match value.as_scaled() {
            Some((mantissa, scale)) => Val::decimal(-mantissa, scale),
            None => Val::Invalid,
        },
        (UnaryOp::Invert, value) => value.as_int().map_or(Val::Invalid, |n| Val::int(!n)),
        _ => Val::Invalid,
    }
}

/// `a / b` to the nearest whole number, halves to the even one; `b` is not zero.
pub(crate) fn divide_half_even(a: i128, b: i128) -> i128 {
    let (quotient, rest) = (a / b, a % b);
    let twice = rest.unsigned_abs().saturating_mul(2);
    let up = match twice.cmp(&b.unsigned_abs()) {
        Ordering::Greater => true,
        Ordering::Equal => quotient % 2 != 0,
        Ordering::Less => false,
    };
    let direction = if (a < 0) == (b < 0) { 1 } else { -1 };
    if up { quotient + direction } else { quotient }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn calculated(op: BinaryOp, left: Val, right: Val) -> String {
        let context =
            Context { input: &[], derived: &[], pool: &[], inflate_bytes_max: 0, cost: 0 };
        binary(&context, op, &left, &right).to_string()
    }

    fn dec(text: &str) -> Val {
        super::super::text::number(text.as_bytes())
    }

    #[test]
    fn results_are_exact_or_the_error_value() {
        use BinaryOp::{Add, BitAnd, Div, Lt, Mul, Rem, Shl, Shr, Sub};
        assert_eq!(calculated(Mul, Val::Int(-128_324_563), dec("0.0000001")), "-12.8324563");
        assert_eq!(calculated(Add, Val::Int(i64::MAX), Val::Int(1)), "9223372036854775808");
        assert_eq!(calculated(Add, Val::Uint(u64::MAX), Val::Int(1)), "invalid");
        assert_eq!(calculated(Sub, dec("1.5"), dec("0.25")), "1.25");
        assert_eq!(calculated(Div, Val::Int(7), Val::Int(0)), "invalid");
        assert_eq!(calculated(Div, Val::Int(i64::MIN), Val::Int(-1)), "9223372036854775808");
        assert_eq!(calculated(Rem, Val::Int(7), Val::Int(0)), "invalid");
        assert_eq!(calculated(Shl, Val::Int(1), Val::Int(63)), "9223372036854775808");
        assert_eq!(calculated(Shl, Val::Int(1), Val::Int(64)), "invalid");
        assert_eq!(calculated(Shr, Val::Uint(u64::MAX), Val::Int(63)), "1");
        assert_eq!(calculated(BitAnd, Val::Uint(u64::MAX), Val::Int(255)), "255");
        assert_eq!(calculated(Lt, Val::Null, Val::Int(1)), "null");
        assert_eq!(calculated(Mul, Val::Int(18), dec("1.40625")), "25.31250");
    }

    #[test]
    fn division_rounds_halves_to_even() {
        let halves = [(5, 2, 2), (7, 2, 4), (-5, 2, -2), (-7, 2, -4), (6, 4, 2), (5, 4, 1)];
        assert!(halves.iter().all(|(a, b, q)| divide_half_even(*a, *b) == *q));
    }
}

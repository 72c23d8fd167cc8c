//! Algebra of ascending, unique positions. Results are ascending and unique again.
use crate::num::Position;
use std::cmp::Ordering;

/// Positions in `a` or `b`.
pub fn union<P: Position>(a: &[P], b: &[P]) -> Vec<P> {
    let mut out = Vec::with_capacity(a.len() + b.len());
    let (mut i, mut j) = (0, 0);
    while i < a.len() && j < b.len() {
        let (x, y) = (a[i], b[j]);
        out.push(x.min(y));
        i += usize::from(x <= y);
        j += usize::from(y <= x);
    }
    out.extend_from_slice(&a[i..]);
    out.extend_from_slice(&b[j..]);
    out
}

/// Positions in `a` and `b`.
pub fn intersection<P: Position>(a: &[P], b: &[P]) -> Vec<P> {
    let mut out = Vec::new();
    let (mut i, mut j) = (0, 0);
    while i < a.len() && j < b.len() {
        match a[i].cmp(&b[j]) {
            Ordering::Less => i += 1,
            Ordering::Greater => j += 1,
            Ordering::Equal => {
                out.push(a[i]);
                (i, j) = (i + 1, j + 1);
            }
        }
    }
    out
}

/// Where in `a` the positions stand that `b` has too.
pub fn places<P: Position>(a: &[P], b: &[P]) -> Vec<P> {
    let mut out = Vec::with_capacity(a.len().min(b.len()));
    let (mut i, mut j) = (0, 0);
    while i < a.len() && j < b.len() {
        match a[i].cmp(&b[j]) {
            Ordering::Less => i += 1,
            Ordering::Greater => j += 1,
            Ordering::Equal => {
                out.push(P::new(i));
                (i, j) = (i + 1, j + 1);
            }
        }
    }
    out
}

/// Positions in `a` that are not in `b`.
pub fn difference<P: Position>(a: &[P], b: &[P]) -> Vec<P> {
    let mut out = Vec::new();
    let (mut i, mut j) = (0, 0);
    while i < a.len() && j < b.len() {
        match a[i].cmp(&b[j]) {
            Ordering::Less => {
                out.push(a[i]);
                i += 1;
            }
            Ordering::Greater => j += 1,
            Ordering::Equal => (i, j) = (i + 1, j + 1),
        }
    }
    out.extend_from_slice(&a[i..]);
    out
}

/// Positions below `len` that are not in `a`, all of which are below `len`.
pub fn complement<P: Position>(a: &[P], len: usize) -> Vec<P> {
    let mut out = Vec::with_capacity(len.saturating_sub(a.len()));
    let mut next = 0;
    for p in a {
        out.extend((next..p.at()).map(P::new));
        next = p.at() + 1;
    }
    out.extend((next..len).map(P::new));
    out
}

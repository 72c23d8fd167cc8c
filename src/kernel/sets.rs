//! Algebra of ascending, unique positions. Results are ascending and unique again.
//!
//! Which of two positions is smaller cannot be predicted, so a merge of two lists waits at every other
//! step. Long lists are cut into spans of positions instead, in parallel: one list sets a flag for each of
//! its positions in the span, the other looks at the flags.
use super::chunk::{check_len, install};
use crate::error::Result;
use crate::num::{Element, Position};
use crate::view::check_index;
use rayon::prelude::*;
use std::ops::Range;

/// Positions that share a table of flags, which fits into the nearest cache.
pub(super) const SPAN: usize = 1 << 15;
/// Lists that are shorter together are merged.
const FEW: usize = 1 << 13;

/// Positions in `a` or `b`.
pub fn union<P: Position>(threads: usize, a: &[P], b: &[P]) -> Vec<P> {
    if few(a, b) {
        let mut out = Vec::with_capacity(a.len() + b.len());
        merge(a, b, |x| out.push(x));
        return out;
    }
    let rest = difference(threads, b, a); // now each span knows how many it has
    let spans = spans([a, &rest[..]]);
    let counts: Vec<usize> = spans.iter().map(|s| s.of[0].len() + s.of[1].len()).collect();
    let mut out = vec![P::new(0); a.len() + rest.len()];
    install(threads, || {
        let work = spans.par_iter().zip(cut(&mut out, &counts));
        work.for_each(|(s, out)| {
            let mut next = out.iter_mut();
            merge(&a[s.of[0].clone()], &rest[s.of[1].clone()], |x| {
                if let Some(slot) = next.next() {
                    *slot = x;
                }
            });
        });
    });
    out
}

/// Positions in `a` and `b`.
pub fn intersection<P: Position>(threads: usize, a: &[P], b: &[P]) -> Vec<P> {
    sieve(threads, a, b, true, |_, x| x)
}

/// Where in `a` the positions stand that `b` has too.
pub fn places<P: Position>(threads: usize, a: &[P], b: &[P]) -> Vec<P> {
    sieve(threads, a, b, true, |i, _| P::new(i))
}

/// Positions in `a` that are not in `b`.
pub fn difference<P: Position>(threads: usize, a: &[P], b: &[P]) -> Vec<P> {
    sieve(threads, a, b, false, |_, x| x)
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

/// For each pair (from, to): `to` at the place in `new` of each position that `old` has too becomes what
/// `from` holds at its place in `old`. Bit for bit; the rest of `to` stays.
pub fn carry<P: Position, T: Element>(
    threads: usize,
    name: &str,
    old: &[P],
    new: &[P],
    pairs: Vec<(&[T], &mut [T])>,
) -> Result<()> {
    for index in [old, new] {
        if !ascending(index) {
            check_index(name, index, usize::MAX >> 1)?; // says what is wrong
        }
    }
    for (from, to) in &pairs {
        check_len(name, from.len(), old.len())?;
        check_len(name, to.len(), new.len())?;
    }
    let spans = spans([old, new]);
    let counts: Vec<usize> = spans.iter().map(|s| s.of[1].len()).collect();
    let mut pieces: Vec<Vec<(&[T], &mut [T])>> = spans.iter().map(|_| Vec::new()).collect();
    for (from, to) in pairs {
        for ((s, to), mine) in spans.iter().zip(cut(to, &counts)).zip(&mut pieces) {
            mine.push((&from[s.of[0].clone()], to));
        }
    }
    install(threads, || {
        let work = spans.par_iter().zip(pieces);
        work.for_each_init(Tables::default, |tables, (s, pairs)| {
            let matches = tables.matches(s, &old[s.of[0].clone()], &new[s.of[1].clone()]);
            for (from, to) in pairs {
                for [i, j] in matches {
                    to[*j as usize] = from[*i as usize];
                }
            }
        });
    });
    Ok(())
}

/// What lies in one span of positions, of each of some lists.
pub(super) struct Span<const N: usize> {
    pub(super) first: usize,
    pub(super) of: [Range<usize>; N],
}

/// The spans in which one of the lists has positions.
pub(super) fn spans<P: Position, const N: usize>(lists: [&[P]; N]) -> Vec<Span<N>> {
    let (mut spans, mut at) = (Vec::new(), [0; N]);
    while let Some(lowest) = lists.iter().zip(at).filter_map(|(list, i)| list.get(i)).min() {
        let first = lowest.at() / SPAN * SPAN;
        let inside = |p: &P| p.at() - first < SPAN;
        let of = std::array::from_fn(|n| at[n]..at[n] + gallop(&lists[n][at[n]..], inside));
        at = std::array::from_fn(|n| of[n].end);
        spans.push(Span { first, of });
    }
    spans
}

/// `partition_point` of what is near the beginning: a span has no more positions than this.
fn gallop<P: Position>(list: &[P], before: impl Fn(&P) -> bool) -> usize {
    let near = &list[..list.len().min(SPAN + 1)];
    match near.last() {
        Some(last) if before(last) => list.partition_point(before),
        _ => near.partition_point(before),
    }
}

/// `out` in pieces of these lengths.
pub(super) fn cut<'a, P>(out: &'a mut [P], counts: &[usize]) -> Vec<&'a mut [P]> {
    let mut rest = out;
    let mut next = |n: &usize| {
        let (mine, after) = std::mem::take(&mut rest).split_at_mut(*n);
        rest = after;
        mine
    };
    counts.iter().map(&mut next).collect()
}

/// Whether two lists are short, or not what they should be, so that flags would not fit them.
fn few<P: Position>(a: &[P], b: &[P]) -> bool {
    a.len() + b.len() < FEW || !ascending(a) || !ascending(b)
}

pub(super) fn ascending<P: Position>(a: &[P]) -> bool {
    a.iter().zip(a.iter().skip(1)).fold(true, |ok, (x, y)| ok & (x < y))
        && a.first().is_none_or(|x| *x >= P::new(0))
}

/// Both lists in order, each position once.
fn merge<P: Position>(a: &[P], b: &[P], mut put: impl FnMut(P)) {
    let (mut i, mut j) = (0, 0);
    while i < a.len() && j < b.len() {
        let (x, y) = (a[i], b[j]);
        put(x.min(y));
        i += usize::from(x <= y);
        j += usize::from(y <= x);
    }
    a[i..].iter().chain(&b[j..]).for_each(|x| put(*x));
}

/// What `put` makes of the place and position of each of `a` that `b` has (`shared`), or has not.
fn sieve<P: Position>(
    threads: usize,
    a: &[P],
    b: &[P],
    shared: bool,
    put: impl Fn(usize, P) -> P + Sync,
) -> Vec<P> {
    if few(a, b) {
        let (mut out, mut j) = (Vec::new(), 0);
        for (i, x) in a.iter().enumerate() {
            while j < b.len() && b[j] < *x {
                j += 1;
            }
            if (j < b.len() && b[j] == *x) == shared {
                out.push(put(i, *x));
            }
        }
        return out;
    }
    let spans = spans([a, b]);
    install(threads, || {
        let count = |tables: &mut Tables, s: &Span<2>| {
            let flags = tables.flags(s, &b[s.of[1].clone()]);
            let found = a[s.of[0].clone()].iter().filter(|x| flags[x.at() - s.first]).count();
            if shared { found } else { s.of[0].len() - found }
        };
        let counts: Vec<usize> = spans.par_iter().map_init(Tables::default, count).collect();
        let mut out = vec![P::new(0); counts.iter().sum()];
        let work = spans.par_iter().zip(cut(&mut out, &counts));
        work.for_each_init(
            || (Tables::default(), Vec::new()),
            |(tables, room), (s, out)| {
                let flags = tables.flags(s, &b[s.of[1].clone()]);
                room.resize(s.of[0].len(), P::new(0));
                let mut n = 0; // written whether it stays or not: it cannot be predicted
                for (i, x) in s.of[0].clone().zip(&a[s.of[0].clone()]) {
                    room[n] = put(i, *x);
                    n += usize::from(flags[x.at() - s.first] == shared);
                }
                out.copy_from_slice(&room[..n]);
            },
        );
        out
    })
}

/// Tables of one span at a time, kept for the next one.
#[derive(Default)]
struct Tables {
    flags: Vec<bool>,
    places: Vec<u32>,
    matches: Vec<[u32; 2]>,
}

impl Tables {
    /// True at the positions of a list, from the first of the span on.
    fn flags<P: Position>(&mut self, s: &Span<2>, list: &[P]) -> &[bool] {
        self.flags.clear();
        self.flags.resize(SPAN, false);
        for x in list {
            self.flags[x.at() - s.first] = true;
        }
        &self.flags
    }

    /// The places in either list of what both have.
    fn matches<P: Position>(&mut self, s: &Span<2>, old: &[P], new: &[P]) -> &[[u32; 2]] {
        self.places.resize(SPAN, 0);
        self.matches.resize(new.len() + 1, [0; 2]);
        for (i, x) in (1..).zip(old) {
            self.places[x.at() - s.first] = i;
        }
        let mut n = 0;
        for (j, x) in (0..).zip(new) {
            let i = self.places[x.at() - s.first];
            self.matches[n] = [i.wrapping_sub(1), j];
            n += usize::from(i != 0);
        }
        old.iter().for_each(|x| self.places[x.at() - s.first] = 0);
        &self.matches[..n]
    }
}

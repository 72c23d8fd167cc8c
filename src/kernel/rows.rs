//! The k best of each row.
//!
//! A row is small and stays in cache: a sample gives a rank that somewhat more than k reach, those are
//! collected, the k-th best of them is found, and the row is read again to emit what is above it.
use super::chunk::{CHUNK, check_len, install};
use super::marks::{chunks, room};
use super::rank::{Bracket, Ranking, first_bits, nth_best};
use super::select::{Order, refuse_nan};
use super::wide::{Isa, Loop, WORD, wide};
use crate::error::{Error, Result};
use crate::num::{Element, Position};
use crate::view::Positions;
use rayon::prelude::*;

/// The `k` best of each row of `row_len` scores: ascending flat positions, k for each row.
pub fn topk_rows<T: Element>(
    threads: usize,
    name: &str,
    scores: &[T],
    row_len: usize,
    k: usize,
    order: Order,
    absolute: bool,
) -> Result<Positions> {
    if k > row_len {
        return Err(Error::Budget { k, eligible: row_len });
    }
    let rows = scores.len().checked_div(row_len).unwrap_or(0);
    check_len(name, scores.len(), rows * row_len)?;
    install(threads, || {
        let mut out = room(scores.len(), rows * k);
        let nan = match (&mut out, absolute) {
            (Positions::Small(out), false) => {
                each_row::<T, _, false>(scores, row_len, k, order, out)
            }
            (Positions::Small(out), true) => each_row::<T, _, true>(scores, row_len, k, order, out),
            (Positions::Large(out), false) => {
                each_row::<T, _, false>(scores, row_len, k, order, out)
            }
            (Positions::Large(out), true) => each_row::<T, _, true>(scores, row_len, k, order, out),
        };
        if nan {
            let parts = [(name, scores)];
            refuse_nan(&parts, &chunks(&parts))?;
        }
        Ok(out)
    })
}

/// Returns whether a score may not be a number.
fn each_row<T: Element, P: Position, const A: bool>(
    scores: &[T],
    row_len: usize,
    k: usize,
    order: Order,
    out: &mut [P],
) -> bool {
    if out.is_empty() {
        return true; // nothing to select, and nobody has looked
    }
    let rows = (CHUNK / row_len).max(1); // of one task
    let tasks = out.par_chunks_mut(rows * k).zip(scores.par_chunks(rows * row_len)).enumerate();
    let run = |(task, (out, scores)): (usize, (&mut [P], &[T]))| {
        let ranking = order.ranking::<A>();
        wide(Rows { scores, first: task * rows * row_len, row_len, k, ranking, out })
    };
    tasks.map(run).reduce(|| false, |a, b| a | b)
}

struct Rows<'a, T, P, const A: bool> {
    scores: &'a [T],
    /// position of the first of them
    first: usize,
    row_len: usize,
    k: usize,
    ranking: Ranking<A>,
    out: &'a mut [P],
}

/// Scores of a sample of one row, and the length from which a row is sampled.
const SAMPLE: usize = 128;
const LONG: usize = 8 * SAMPLE;

impl<T: Element, P: Position, const A: bool> Loop for Rows<'_, T, P, A> {
    type Output = bool;
    #[inline(always)]
    fn run(self, isa: impl Isa) -> bool {
        let Rows { row_len, k, ranking, .. } = self;
        let mut nan = false;
        let mut ranks = Vec::with_capacity(row_len);
        let rows = self.scores.chunks_exact(row_len).zip(self.out.chunks_exact_mut(k));
        for (r, (row, out)) in rows.enumerate() {
            nan |= row.iter().fold(false, |nan, x| nan | x.is_nan());
            let floor = if row_len < LONG { 0 } else { low(row, k, ranking, &mut ranks) };
            collect(isa, row, floor, ranking, &mut ranks);
            if ranks.len() < k {
                collect(isa, row, 0, ranking, &mut ranks); // the sample was not like the row
            }
            let bound = nth_best(&mut ranks, k);
            let best = ranks.len() - k;
            let above = ranks[best..].iter().filter(|r| **r > bound).count();
            emit(isa, row, bound, k - above, self.first + r * row_len, ranking, out);
        }
        nan
    }
}

/// A rank that more than `k` of the row should be above.
#[inline(always)]
fn low<T: Element, const A: bool>(
    row: &[T],
    k: usize,
    ranking: Ranking<A>,
    ranks: &mut Vec<u32>,
) -> u32 {
    ranks.clear();
    ranks.extend(row.iter().step_by(row.len() / SAMPLE).map(|x| ranking.rank(*x)));
    let (m, share) = (ranks.len() as f64, k as f64 / row.len() as f64);
    let want = (share * m + 4.0 * (share * (1.0 - share) * m).sqrt() + 2.0) as usize;
    if want >= ranks.len() { 0 } else { nth_best(ranks, want).saturating_sub(1) }
}

/// The ranks above `floor`.
#[inline(always)]
fn collect<T: Element, const A: bool>(
    isa: impl Isa,
    row: &[T],
    floor: u32,
    ranking: Ranking<A>,
    ranks: &mut Vec<u32>,
) {
    ranks.clear();
    if floor == 0 {
        return ranks.extend(row.iter().map(|x| ranking.rank(*x)));
    }
    let (blocks, tail) = row.as_chunks::<WORD>();
    let mut add = |block: &[T], mut bits: u64| {
        while bits != 0 {
            ranks.push(ranking.rank(block[bits.trailing_zeros() as usize]));
            bits &= bits - 1;
        }
    };
    for block in blocks {
        add(block, isa.above(&ranking.ranks(block), floor));
    }
    add(tail, ranking.above_in(tail, floor));
}

/// Writes the positions of ranks above `bound` and of the first `ties` that equal it.
#[inline(always)]
fn emit<T: Element, P: Position, const A: bool>(
    isa: impl Isa,
    row: &[T],
    bound: u32,
    mut ties: usize,
    first: usize,
    ranking: Ranking<A>,
    out: &mut [P],
) {
    let Bracket { floor, ceiling } = Bracket::of(bound);
    let mut next = out.iter_mut();
    let mut write = |base: usize, at_least: u64, above: u64| {
        let mut bits = above | first_bits(at_least & !above, &mut ties);
        while bits != 0 {
            if let Some(out) = next.next() {
                *out = P::new(base + bits.trailing_zeros() as usize);
            }
            bits &= bits - 1;
        }
    };
    let (blocks, tail) = row.as_chunks::<WORD>();
    for (i, block) in blocks.iter().enumerate() {
        let ranks = ranking.ranks(block);
        write(first + i * WORD, isa.above(&ranks, floor), isa.above(&ranks, ceiling));
    }
    let (at_least, above) = (ranking.above_in(tail, floor), ranking.above_in(tail, ceiling));
    write(first + blocks.len() * WORD, at_least, above);
}

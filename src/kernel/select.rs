//! Exact selection by score: the k best of many tensors together, the k best of each row, and all that
//! reach a value.
//!
//! Scores become unsigned ranks (more is better, -0 equals 0). The k-th best rank is found exactly, by a
//! histogram of its upper and then its lower half; whatever ranks above it is selected, and of those
//! that equal it the first in (part, position) order, as many as are still needed. Nothing is
//! concatenated, and no step depends on the number of threads.
use super::chunk::{CHUNK, check_len, install};
use crate::error::{Error, Result};
use crate::num::{Element, Position};
use crate::view::Positions;
use rayon::prelude::*;

/// Which scores are best.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// the largest
    Largest,
    /// the smallest
    Smallest,
}

/// How a score becomes a rank.
#[derive(Clone, Copy)]
struct Ranking {
    flip: u32,
    absolute: bool,
}

impl Ranking {
    fn new(order: Order, absolute: bool) -> Self {
        Ranking { flip: if order == Order::Largest { 0 } else { !0 }, absolute }
    }

    #[inline(always)]
    fn rank<T: Element>(self, x: T) -> u32 {
        self.flip ^ if self.absolute { x.key_abs() } else { x.key() }
    }
}

/// A run of scores of one part.
#[derive(Clone, Copy)]
struct Chunk<'a, T> {
    part: usize,
    first: usize,
    scores: &'a [T],
}

fn chunks<'a, T>(parts: &[(&str, &'a [T])]) -> Vec<Chunk<'a, T>> {
    let mut all = Vec::new();
    for (part, (_, scores)) in parts.iter().enumerate() {
        let cut = scores.chunks(CHUNK).enumerate();
        all.extend(cut.map(|(i, scores)| Chunk { part, first: i * CHUNK, scores }));
    }
    all
}

fn refuse_nan<T: Element>(parts: &[(&str, &[T])], chunks: &[Chunk<'_, T>]) -> Result<()> {
    let found = chunks.par_iter().find_map_first(|c| {
        let position = c.scores.iter().position(|x| x.is_nan())?;
        Some((c.part, c.first + position))
    });
    match found {
        None => Ok(()),
        Some((part, position)) => {
            Err(Error::NotANumber { name: parts[part].0.to_string(), position })
        }
    }
}

/// Exactly the `k` best of all parts: for each part its ascending positions.
pub fn topk<T: Element>(
    threads: usize,
    parts: &[(&str, &[T])],
    k: usize,
    order: Order,
    absolute: bool,
) -> Result<Vec<Positions>> {
    let eligible: usize = parts.iter().map(|(_, x)| x.len()).sum();
    if k > eligible {
        return Err(Error::Budget { k, eligible });
    }
    install(threads, || {
        let chunks = chunks(parts);
        refuse_nan(parts, &chunks)?;
        let ranking = Ranking::new(order, absolute);
        if k == 0 {
            return Ok(emit(parts, &chunks, &vec![0; chunks.len()], |_, _| {}));
        }
        let bound = kth(&chunks, ranking, k);
        let counts: Vec<(usize, usize)> =
            chunks.par_iter().map(|c| count(c, ranking, bound)).collect();
        let above: usize = counts.iter().map(|c| c.0).sum();
        let mut ties = k - above; // of those that equal the bound, the first so many
        let (mut take, mut quota) = (Vec::new(), Vec::new());
        for (above, equal) in counts {
            let mine = equal.min(ties);
            ties -= mine;
            take.push(above + mine);
            quota.push(mine);
        }
        Ok(emit(parts, &chunks, &take, |i, out| {
            let mut left = quota[i];
            for (at, x) in chunks[i].scores.iter().enumerate() {
                let rank = ranking.rank(*x);
                if rank > bound {
                    out.push(chunks[i].first + at);
                } else if rank == bound && left > 0 {
                    left -= 1;
                    out.push(chunks[i].first + at);
                }
            }
        }))
    })
}

/// How many ranks of a chunk are above the bound, and how many equal it.
fn count<T: Element>(c: &Chunk<'_, T>, ranking: Ranking, bound: u32) -> (usize, usize) {
    let (mut above, mut equal) = (0, 0);
    for x in c.scores {
        let rank = ranking.rank(*x);
        above += usize::from(rank > bound);
        equal += usize::from(rank == bound);
    }
    (above, equal)
}

const BINS: usize = 1 << 16;

/// The k-th best rank, 1 <= k <= number of scores.
fn kth<T: Element>(chunks: &[Chunk<'_, T>], ranking: Ranking, k: usize) -> u32 {
    let upper = histogram(chunks, |x| Some(ranking.rank(x) >> 16));
    let (high, rest) = walk(&upper, k);
    let lower = histogram(chunks, |x| {
        let rank = ranking.rank(x);
        (rank >> 16 == high).then_some(rank & 0xffff)
    });
    high << 16 | walk(&lower, rest).0
}

fn histogram<T: Element>(
    chunks: &[Chunk<'_, T>],
    bin: impl Fn(T) -> Option<u32> + Sync,
) -> Vec<usize> {
    let fill = |mut bins: Vec<usize>, c: &Chunk<'_, T>| {
        for b in c.scores.iter().filter_map(|x| bin(*x)) {
            bins[b as usize % BINS] += 1;
        }
        bins
    };
    let add = |mut a: Vec<usize>, b: Vec<usize>| {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        a
    };
    // Whole numbers: their sum does not depend on how rayon groups the chunks.
    chunks.par_iter().fold(|| vec![0; BINS], fill).reduce(|| vec![0; BINS], add)
}

/// From the best bin down: the bin of the k-th element, and which one of that bin it is.
fn walk(bins: &[usize], mut k: usize) -> (u32, usize) {
    for (bin, count) in bins.iter().enumerate().rev() {
        if *count >= k {
            return (bin as u32, k);
        }
        k -= count;
    }
    (0, k)
}

/// A place for the positions that one chunk selects.
enum Slot<'a> {
    Small(&'a mut [i32]),
    Large(&'a mut [i64]),
}

/// Writes positions one after another.
struct Sink<'a> {
    slot: Slot<'a>,
    next: usize,
}

impl Sink<'_> {
    #[inline(always)]
    fn push(&mut self, at: usize) {
        match &mut self.slot {
            Slot::Small(out) => out[self.next] = i32::new(at),
            Slot::Large(out) => out[self.next] = i64::new(at),
        }
        self.next += 1;
    }
}

fn zeros(tensor: usize, count: usize) -> Positions {
    if tensor < 1 << 31 {
        Positions::Small(vec![0; count])
    } else {
        Positions::Large(vec![0; count])
    }
}

/// Makes the positions of each part; `fill(i, sink)` writes the `take[i]` of chunk i.
fn emit<T: Element>(
    parts: &[(&str, &[T])],
    chunks: &[Chunk<'_, T>],
    take: &[usize],
    fill: impl Fn(usize, &mut Sink<'_>) + Sync,
) -> Vec<Positions> {
    let mut totals = vec![0; parts.len()];
    chunks.iter().zip(take).for_each(|(c, n)| totals[c.part] += n);
    let mut all: Vec<Positions> =
        parts.iter().zip(&totals).map(|((_, x), n)| zeros(x.len(), *n)).collect();
    let mut slots = Vec::with_capacity(chunks.len());
    let mut next = 0;
    for (part, positions) in all.iter_mut().enumerate() {
        let mut rest = match positions {
            Positions::Small(out) => Slot::Small(out),
            Positions::Large(out) => Slot::Large(out),
        };
        while next < chunks.len() && chunks[next].part == part {
            let mine;
            (mine, rest) = match rest {
                Slot::Small(out) => {
                    let (a, b) = out.split_at_mut(take[next]);
                    (Slot::Small(a), Slot::Small(b))
                }
                Slot::Large(out) => {
                    let (a, b) = out.split_at_mut(take[next]);
                    (Slot::Large(a), Slot::Large(b))
                }
            };
            slots.push(mine);
            next += 1;
        }
    }
    slots.into_par_iter().enumerate().for_each(|(i, slot)| fill(i, &mut Sink { slot, next: 0 }));
    all
}

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
        let parts = [(name, scores)];
        refuse_nan(&parts, &chunks(&parts))?;
        let ranking = Ranking::new(order, absolute);
        Ok(match zeros(scores.len(), rows * k) {
            Positions::Small(mut out) => {
                each_row(scores, row_len, k, ranking, &mut out);
                Positions::Small(out)
            }
            Positions::Large(mut out) => {
                each_row(scores, row_len, k, ranking, &mut out);
                Positions::Large(out)
            }
        })
    })
}

fn each_row<T: Element, P: Position>(
    scores: &[T],
    row_len: usize,
    k: usize,
    ranking: Ranking,
    out: &mut [P],
) {
    if out.is_empty() {
        return;
    }
    // Rows of one task: about a chunk of scores.
    let rows = (CHUNK / row_len).max(1);
    let tasks = out.par_chunks_mut(rows * k).zip(scores.par_chunks(rows * row_len)).enumerate();
    tasks.for_each(|(task, (out, scores))| {
        let mut ranks = Vec::with_capacity(row_len);
        for (r, (out, row)) in out.chunks_mut(k).zip(scores.chunks(row_len)).enumerate() {
            ranks.clear();
            ranks.extend(row.iter().map(|x| ranking.rank(*x)));
            let bound = *ranks.select_nth_unstable(row_len - k).1;
            let above = ranks[row_len - k..].iter().filter(|r| **r > bound).count();
            let (mut ties, mut next) = (k - above, 0);
            for (at, x) in row.iter().enumerate() {
                let rank = ranking.rank(*x);
                if rank > bound || rank == bound && ties > 0 {
                    ties -= usize::from(rank == bound);
                    out[next] = P::new((task * rows + r) * row_len + at);
                    next += 1;
                }
            }
        }
    });
}

/// All scores that reach `t` (`>= t` for the largest, `<= t` for the smallest).
pub fn threshold<T: Element>(
    threads: usize,
    parts: &[(&str, &[T])],
    t: f32,
    order: Order,
    absolute: bool,
) -> Result<Vec<Positions>> {
    if t.is_nan() {
        let (name, rule) = ("the threshold".to_string(), "a number".to_string());
        return Err(Error::Value { name, rule, got: t.to_string() });
    }
    let reaches = |x: &T| {
        let x = if absolute { x.to_f32().abs() } else { x.to_f32() };
        if order == Order::Largest { x >= t } else { x <= t }
    };
    install(threads, || {
        let chunks = chunks(parts);
        refuse_nan(parts, &chunks)?;
        let take: Vec<usize> =
            chunks.par_iter().map(|c| c.scores.iter().filter(|x| reaches(x)).count()).collect();
        Ok(emit(parts, &chunks, &take, |i, out| {
            for (at, x) in chunks[i].scores.iter().enumerate() {
                if reaches(x) {
                    out.push(chunks[i].first + at);
                }
            }
        }))
    })
}

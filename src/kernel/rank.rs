//! Scores as unsigned ranks: more is better, -0 equals 0, the k-th best found exactly.
use super::marks::Chunk;
use super::wide::{Isa, Loop, WORD, wide};
use crate::num::Element;
use rayon::prelude::*;

/// How a score becomes a rank: never 0 and never `u32::MAX`, unless it is NaN. The choice of magnitudes is
/// a type, so that no loop asks for it.
#[derive(Clone, Copy)]
pub(super) struct Ranking<const ABSOLUTE: bool> {
    flip: u32,
}

impl<const ABSOLUTE: bool> Ranking<ABSOLUTE> {
    pub(super) fn new(largest: bool) -> Self {
        let up = if ABSOLUTE { 1 << 31 } else { 0 }; // the bit that a magnitude leaves free
        Ranking { flip: if largest { up } else { !up } }
    }

    #[inline(always)]
    pub(super) fn rank<T: Element>(self, x: T) -> u32 {
        self.flip ^ if ABSOLUTE { x.key_abs() } else { x.key() }
    }

    #[inline(always)]
    pub(super) fn ranks<T: Element>(self, block: &[T; WORD]) -> [u32; WORD] {
        std::array::from_fn(|j| self.rank(block[j]))
    }

    /// `Isa::above` for an incomplete block.
    #[inline(always)]
    pub(super) fn above_in<T: Element>(self, tail: &[T], bound: u32) -> u64 {
        tail.iter().enumerate().fold(0, |bits, (j, x)| bits | u64::from(self.rank(*x) > bound) << j)
    }
}

/// The lowest `left` of these bits; `left` is reduced by as many.
#[inline(always)]
pub(super) fn first_bits(bits: u64, left: &mut usize) -> u64 {
    let (mut taken, mut rest) = (0, bits);
    if bits.count_ones() as usize <= *left {
        (taken, rest) = (bits, 0);
        *left -= bits.count_ones() as usize;
    }
    while rest != 0 && *left > 0 {
        taken |= rest & rest.wrapping_neg();
        rest &= rest - 1;
        *left -= 1;
    }
    taken
}

/// The `n`-th largest of `ranks`, 1 <= n <= their number. Reorders them.
pub(super) fn nth_best(ranks: &mut [u32], n: usize) -> u32 {
    let at = ranks.len() - n;
    *ranks.select_nth_unstable(at).1
}

/// The ranks above `floor` and up to `ceiling`.
#[derive(Clone, Copy)]
pub(super) struct Bracket {
    pub(super) floor: u32,
    pub(super) ceiling: u32,
}

impl Bracket {
    pub(super) fn of(rank: u32) -> Self {
        Bracket { floor: rank.saturating_sub(1), ceiling: rank }
    }

    /// Whether there is but one rank in it.
    pub(super) fn is_one(self) -> bool {
        self.ceiling - self.floor <= 1
    }
}

/// Places at which a sample looks; each gives a few neighbours, which come in one cache line.
const STOPS: usize = 1 << 16;
const NEIGHBOURS: usize = 4;
/// Half the width of a bracket in standard deviations of independent draws. Neighbours are not quite
/// independent: six is three and more for the worst of them.
const DEVIATIONS: f64 = 6.0;

/// A bracket for the k-th best of `total` scores, from a fixed sample of them.
pub(super) fn bracket<T: Element, const A: bool>(
    chunks: &[Chunk<'_, T>],
    ranking: Ranking<A>,
    total: usize,
    k: usize,
) -> Bracket {
    let stops = STOPS.min(total / 256);
    if stops < 256 {
        return Bracket { floor: 0, ceiling: u32::MAX }; // everything is a candidate: the sample would cost more
    }
    let step = total / stops;
    let mut ranks = Vec::with_capacity((stops + 1) * NEIGHBOURS);
    let mut next = step / 2;
    let mut start = 0;
    for c in chunks {
        while next < start + c.len() {
            ranks.extend(c.some(next - start, NEIGHBOURS).map(|x| ranking.rank(x)));
            next += step;
        }
        start += c.len();
    }
    let m = ranks.len() as f64;
    let share = k as f64 / total as f64;
    let slack = DEVIATIONS * (share * (1.0 - share) * m).sqrt() + 2.0;
    let (low, high) = ((share * m + slack).ceil(), (share * m - slack).floor());
    let (mut floor, mut ceiling, mut best) = (0, u32::MAX, ranks.as_mut_slice());
    if low < m {
        floor = nth_best(best, low as usize).saturating_sub(1);
        let at = best.len() - low as usize;
        best = &mut best[at..];
    }
    if high >= 1.0 {
        ceiling = nth_best(best, high as usize);
    }
    Bracket { floor, ceiling }
}

/// Of a histogram of half a rank.
pub(super) const BINS: usize = 1 << 16;

/// The k-th best rank, 1 <= k <= number of scores, by a histogram of the upper and then of the lower
/// halves: linear whatever the scores are.
pub(super) fn kth_best<T: Element, const A: bool>(
    chunks: &[Chunk<'_, T>],
    ranking: Ranking<A>,
    k: usize,
) -> u32 {
    let upper = histogram(chunks, |x, bins| bins[(ranking.rank(x) >> 16) as usize] += 1);
    let (high, rest) = walk(&upper, k);
    let lower = histogram(chunks, |x, bins| {
        let rank = ranking.rank(x);
        if rank >> 16 == high {
            bins[(rank & 0xffff) as usize] += 1;
        }
    });
    high << 16 | walk(&lower, rest).0
}

type Bins = [u32; BINS];

struct Count<'a, T, F> {
    scores: &'a [T],
    bins: &'a mut [Bins; 2],
    add: F,
}

impl<T: Element, F: Fn(T, &mut Bins)> Loop for Count<'_, T, F> {
    type Output = ();
    #[inline(always)]
    fn run(self, _: impl Isa) {
        // Two tables: equal neighbours need not wait for each other's count.
        let [even, odd] = self.bins;
        let (pairs, last) = self.scores.as_chunks::<2>();
        for [x, y] in pairs {
            (self.add)(*x, even);
            (self.add)(*y, odd);
        }
        last.iter().for_each(|x| (self.add)(*x, even));
    }
}

fn histogram<T: Element>(
    chunks: &[Chunk<'_, T>],
    add: impl Fn(T, &mut Bins) + Sync + Copy,
) -> Vec<u64> {
    // Long enough to outweigh the tables, short enough for their counts of 32 bits.
    let run = chunks.len().div_ceil(64).clamp(16, 1 << 14);
    let fill = |mut sums: Vec<u64>, run: &[Chunk<'_, T>]| {
        let (mut bins, mut room) = (Box::new([[0; BINS]; 2]), Vec::new());
        for c in run {
            wide(Count { scores: c.scores(&mut room), bins: &mut bins, add });
        }
        for table in bins.iter() {
            sums.iter_mut().zip(table).for_each(|(s, b)| *s += u64::from(*b));
        }
        sums
    };
    let merge = |mut a: Vec<u64>, b: Vec<u64>| {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        a
    };
    // Whole numbers: their sum does not depend on how rayon groups the runs.
    chunks.par_chunks(run).fold(|| vec![0; BINS], fill).reduce(|| vec![0; BINS], merge)
}

/// From the best bin down: the bin of the k-th element, and which one of that bin it is.
pub(super) fn walk(bins: &[u64], k: usize) -> (u32, usize) {
    let mut k = k as u64;
    for (bin, count) in bins.iter().enumerate().rev() {
        if *count >= k {
            return (bin as u32, k as usize);
        }
        k -= count;
    }
    (0, k as usize)
}

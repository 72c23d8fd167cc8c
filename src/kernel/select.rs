//! Exact selection by score: the k best of many tensors together, the k best of each row, and all that
//! reach a value. Equal scores go to the lowest (part, position).
//!
//! The k-th best score is bracketed by a sample. One pass over the scores then marks whatever is above
//! the bracket and collects what lies inside, and the exact k-th is found among the collected few. Where
//! the bracket missed, or holds too many equal scores to collect, a histogram finds the k-th and the
//! pass is repeated with a bracket of one value. Nothing is concatenated; beside the result there is
//! one bit for each score.
use super::chunk::{check_len, install};
use super::made::Made;
use super::marks::{Chunk, blank, bytes, chunks, made_chunks, positions, room, words};
use super::rank::{Bracket, Ranking, bracket, first_bits, kth_best, nth_best};
pub use super::rows::topk_rows;
use super::wide::{Isa, Loop, WORD, wide};
use crate::error::{Error, Result};
use crate::num::Element;
use crate::view::Positions;
use rayon::prelude::*;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Which scores are best.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// the largest
    Largest,
    /// the smallest
    Smallest,
}

impl Order {
    pub(super) fn ranking<const A: bool>(self) -> Ranking<A> {
        Ranking::new(self == Order::Largest)
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
    let chunks = chunks(parts);
    install(threads, || match absolute {
        true => placed::<T, true>(parts, &chunks, k, order.ranking()),
        false => placed::<T, false>(parts, &chunks, k, order.ranking()),
    })
}

/// `topk` of groups of parts: `sizes` says how many parts each has, `ks` how many are its best.
pub fn topk_each<T: Element>(
    threads: usize,
    parts: &[(&str, &[T])],
    sizes: &[usize],
    ks: &[usize],
    order: Order,
    absolute: bool,
) -> Result<Vec<Positions>> {
    check_len("ks", ks.len(), sizes.len())?;
    check_len("the parts of all groups", sizes.iter().sum(), parts.len())?;
    let (mut groups, mut rest) = (Vec::new(), parts);
    for (size, k) in sizes.iter().zip(ks) {
        let (group, after) = rest.split_at(*size);
        rest = after;
        let eligible = group.iter().map(|(_, x)| x.len()).sum();
        if *k > eligible {
            return Err(Error::Budget { k: *k, eligible });
        }
        groups.push((group, *k));
    }
    let found: Vec<_> = install(threads, || {
        let work = groups.par_iter().map(|(group, k)| {
            let chunks = chunks(group);
            match absolute {
                true => placed::<T, true>(group, &chunks, *k, order.ranking()),
                false => placed::<T, false>(group, &chunks, *k, order.ranking()),
            }
        });
        work.collect()
    });
    let found: Vec<_> = found.into_iter().collect::<Result<_>>()?; // the first error, not the fastest
    Ok(found.into_iter().flatten().collect())
}

/// `topk` of scores that are made of the values of the parts, one `Made` for each part.
pub fn topk_made<T: Element>(
    threads: usize,
    parts: &[(&str, &[T])],
    made: &[Made<'_, T>],
    k: usize,
    order: Order,
) -> Result<Vec<Positions>> {
    check_len("what scores are made of", made.len(), parts.len())?;
    let eligible: usize = parts.iter().map(|(_, x)| x.len()).sum();
    if k > eligible {
        return Err(Error::Budget { k, eligible });
    }
    let chunks = made_chunks(parts, made);
    install(threads, || placed::<T, false>(parts, &chunks, k, order.ranking()))
}

/// The `k` best of one part as a byte for each score, 1 for those and 0 for the rest.
pub fn topk_bytes<T: Element>(
    threads: usize,
    part: (&str, &[T]),
    k: usize,
    order: Order,
    absolute: bool,
    out: &mut [u8],
) -> Result<()> {
    check_len("out", out.len(), part.1.len())?;
    if k > part.1.len() {
        return Err(Error::Budget { k, eligible: part.1.len() });
    }
    let (parts, chunks) = ([part], chunks(&[part]));
    install(threads, || match absolute {
        true => spread::<T, true>(&parts, &chunks, k, order.ranking(), out),
        false => spread::<T, false>(&parts, &chunks, k, order.ranking(), out),
    })
}

fn placed<T: Element, const A: bool>(
    parts: &[(&str, &[T])],
    chunks: &[Chunk<'_, T>],
    k: usize,
    ranking: Ranking<A>,
) -> Result<Vec<Positions>> {
    let Some(mut best) = Best::of(parts, chunks, k, ranking)? else {
        return Ok(parts.iter().map(|(_, x)| room(x.len(), 0)).collect());
    };
    let mut marks = std::mem::take(&mut best.marks);
    Ok(positions(parts, chunks, &mut marks, &best.take, |i, words| best.finish(i, words)))
}

fn spread<T: Element, const A: bool>(
    parts: &[(&str, &[T])],
    chunks: &[Chunk<'_, T>],
    k: usize,
    ranking: Ranking<A>,
    out: &mut [u8],
) -> Result<()> {
    let Some(mut best) = Best::of(parts, chunks, k, ranking)? else {
        out.fill(0);
        return Ok(());
    };
    let mut marks = std::mem::take(&mut best.marks);
    bytes(chunks, &mut marks, |i, words| best.finish(i, words), out);
    Ok(())
}

/// What is known of the k best once the k-th is.
struct Best<'a, T, const A: bool> {
    chunks: &'a [Chunk<'a, T>],
    ranking: Ranking<A>,
    bracket: Bracket,
    bound: u32,
    found: Vec<Found>,
    /// those above the bracket
    marks: Vec<u64>,
    /// how many of each chunk are among the best, and how many of these equal the k-th
    take: Vec<usize>,
    quota: Vec<usize>,
}

impl<'a, T: Element, const A: bool> Best<'a, T, A> {
    /// None where k is 0.
    fn of(
        parts: &[(&str, &[T])],
        chunks: &'a [Chunk<'a, T>],
        k: usize,
        ranking: Ranking<A>,
    ) -> Result<Option<Self>> {
        if k == 0 {
            refuse_nan(parts, chunks)?;
            return Ok(None);
        }
        let total = chunks.iter().map(Chunk::len).sum();
        let mut marks = blank(chunks);
        let mut bracket = bracket(chunks, ranking, total, k);
        let mut found = survey(chunks, &mut marks, ranking, bracket);
        if found.iter().any(|f| f.nan) {
            refuse_nan(parts, chunks)?;
        }
        if !encloses(&found, bracket, k) {
            let bound = kth_best(chunks, ranking, k);
            bracket = Bracket::of(bound);
            marks.fill(0);
            found = survey(chunks, &mut marks, ranking, bracket);
        }
        let bound = bound(&found, bracket, k);
        let split: Vec<(usize, usize)> = found.par_iter().map(|f| f.split(bound)).collect();
        let mut ties = k - split.iter().map(|s| s.0).sum::<usize>();
        let (mut take, mut quota) = (Vec::new(), Vec::new());
        for (above, equal) in split {
            let mine = equal.min(ties); // the first chunks take what is still needed
            ties -= mine;
            take.push(above + mine);
            quota.push(mine);
        }
        Ok(Some(Best { chunks, ranking, bracket, bound, found, marks, take, quota }))
    }

    /// Marks those of chunk `i` that lie inside of the bracket.
    fn finish(&self, i: usize, words: &mut [u64]) {
        let (ranking, bound, ties) = (self.ranking, self.bound, self.quota[i]);
        if self.bracket.is_one() {
            let mut room = Vec::new();
            let scores = if ties > 0 { self.chunks[i].scores(&mut room) } else { &[] };
            wide(Ties { scores, words, ranking, bound, ties });
        } else {
            self.found[i].mark(bound, ties, words);
        }
    }
}

/// What the pass over one chunk found.
#[derive(Default)]
struct Found {
    /// ranks above the bracket: they are marked
    above: usize,
    /// ranks inside
    within: usize,
    nan: bool,
    /// those inside, in order, and where in the chunk they are; empty if the bracket is one value
    ranks: Vec<u32>,
    at: Vec<u16>,
}

impl Found {
    /// How many ranks are above `bound`, and how many equal it.
    fn split(&self, bound: u32) -> (usize, usize) {
        if self.ranks.is_empty() {
            return (self.above, self.within);
        }
        let above = self.ranks.iter().filter(|r| **r > bound).count();
        let equal = self.ranks.iter().filter(|r| **r == bound).count();
        (self.above + above, equal)
    }

    /// Marks those above `bound`, and the first `ties` that equal it.
    fn mark(&self, bound: u32, mut ties: usize, words: &mut [u64]) {
        for (rank, at) in self.ranks.iter().zip(&self.at) {
            let tie = *rank == bound && ties > 0;
            ties -= usize::from(tie);
            let at = usize::from(*at);
            words[at / WORD] |= u64::from(*rank > bound || tie) << (at % WORD);
        }
    }
}

/// Marks the first `ties` scores whose rank is `bound`.
struct Ties<'a, T, const A: bool> {
    scores: &'a [T],
    words: &'a mut [u64],
    ranking: Ranking<A>,
    bound: u32,
    ties: usize,
}

impl<T: Element, const A: bool> Loop for Ties<'_, T, A> {
    type Output = ();
    #[inline(always)]
    fn run(mut self, isa: impl Isa) {
        let Bracket { floor, ceiling } = Bracket::of(self.bound);
        let (blocks, tail) = self.scores.as_chunks::<WORD>();
        for (block, word) in blocks.iter().zip(&mut *self.words) {
            if self.ties == 0 {
                return;
            }
            let ranks = self.ranking.ranks(block);
            let equal = isa.above(&ranks, floor) & !isa.above(&ranks, ceiling);
            *word |= first_bits(equal, &mut self.ties);
        }
        if let (false, Some(word)) = (tail.is_empty(), self.words.last_mut()) {
            let at_least = self.ranking.above_in(tail, floor);
            *word |= first_bits(at_least & !self.ranking.above_in(tail, ceiling), &mut self.ties);
        }
    }
}

/// The pass: marks ranks above the bracket and collects those inside.
fn survey<T: Element, const A: bool>(
    chunks: &[Chunk<'_, T>],
    marks: &mut [u64],
    ranking: Ranking<A>,
    bracket: Bracket,
) -> Vec<Found> {
    let total: usize = chunks.iter().map(Chunk::len).sum();
    let most = (1 << 17).max(total / 32); // 6 bytes each
    let collected = AtomicUsize::new(0);
    let work = words(marks, chunks).into_par_iter().zip(chunks);
    work.map_init(Vec::new, |room, (words, c)| {
        // Collecting may stop early, but only where the histogram is asked next anyway.
        let collect = !bracket.is_one() && collected.load(Relaxed) <= most;
        let found = wide(Survey { scores: c.scores(room), words, ranking, bracket, collect });
        collected.fetch_add(found.ranks.len(), Relaxed);
        found
    })
    .collect()
}

struct Survey<'a, T, const A: bool> {
    scores: &'a [T],
    words: &'a mut [u64],
    ranking: Ranking<A>,
    bracket: Bracket,
    collect: bool,
}

impl<T: Element, const A: bool> Loop for Survey<'_, T, A> {
    type Output = Found;
    #[inline(always)]
    fn run(self, isa: impl Isa) -> Found {
        let (mut found, ranking, Bracket { floor, ceiling }) =
            (Found::default(), self.ranking, self.bracket);
        let (blocks, tail) = self.scores.as_chunks::<WORD>();
        let mut tops = [0; WORD]; // the highest magnitude of each lane: beyond infinity is NaN
        for (i, (block, word)) in blocks.iter().zip(&mut *self.words).enumerate() {
            block.iter().zip(&mut tops).for_each(|(x, top)| *top = x.key_abs().max(*top));
            let ranks = ranking.ranks(block);
            *word = isa.above(&ranks, ceiling);
            found.above += word.count_ones() as usize;
            let inside = isa.above(&ranks, floor) & !*word;
            if inside != 0 {
                found.add(inside, i, block, ranking, self.collect);
            }
        }
        if let (false, Some(word)) = (tail.is_empty(), self.words.last_mut()) {
            tail.iter().for_each(|x| tops[0] = x.key_abs().max(tops[0]));
            *word = ranking.above_in(tail, ceiling);
            found.above += word.count_ones() as usize;
            let inside = ranking.above_in(tail, floor) & !*word;
            found.add(inside, blocks.len(), tail, ranking, self.collect);
        }
        found.nan = tops.iter().any(|top| *top > T::INFINITY_KEY);
        found
    }
}

impl Found {
    #[inline(always)]
    fn add<T: Element, const A: bool>(
        &mut self,
        mut within: u64,
        block: usize,
        scores: &[T],
        ranking: Ranking<A>,
        collect: bool,
    ) {
        self.within += within.count_ones() as usize;
        while collect && within != 0 {
            let j = within.trailing_zeros() as usize;
            self.ranks.push(ranking.rank(scores[j]));
            self.at.push((block * WORD + j) as u16);
            within &= within - 1;
        }
    }
}

/// Whether the k-th best is in the bracket and everything in the bracket is known.
fn encloses(found: &[Found], bracket: Bracket, k: usize) -> bool {
    let sum = |f: fn(&Found) -> usize| found.iter().map(f).sum::<usize>();
    let (above, within) = (sum(|f| f.above), sum(|f| f.within));
    let known = bracket.is_one() || within == sum(|f| f.ranks.len());
    known && above < k && k <= above + within
}

/// The k-th best rank, which the bracket encloses.
fn bound(found: &[Found], bracket: Bracket, k: usize) -> u32 {
    if bracket.is_one() {
        return bracket.ceiling;
    }
    let above: usize = found.iter().map(|f| f.above).sum();
    let mut all = Vec::with_capacity(found.iter().map(|f| f.ranks.len()).sum());
    found.iter().for_each(|f| all.extend_from_slice(&f.ranks));
    nth_best(&mut all, k - above)
}

/// Names the first score that is not a number.
pub(super) fn refuse_nan<T: Element>(
    parts: &[(&str, &[T])],
    chunks: &[Chunk<'_, T>],
) -> Result<()> {
    let found = chunks.par_iter().find_map_first(|c| {
        let mut room = Vec::new();
        let position = c.scores(&mut room).iter().position(|x| x.is_nan())?;
        Some((c.part, c.first + position))
    });
    match found {
        None => Ok(()),
        Some((part, position)) => {
            Err(Error::NotANumber { name: parts[part].0.to_string(), position })
        }
    }
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
    install(threads, || match absolute {
        true => reaching::<T, true>(parts, t, order),
        false => reaching::<T, false>(parts, t, order),
    })
}

fn reaching<T: Element, const A: bool>(
    parts: &[(&str, &[T])],
    t: f32,
    order: Order,
) -> Result<Vec<Positions>> {
    let ranking = order.ranking::<A>();
    let reaches = |x: f32| if order == Order::Largest { x >= t } else { x <= t };
    // The nearest score that the type can hold may lie on either side of t, but none lies between.
    let nearest = T::from_f32(t);
    let ceiling = match ranking.rank(nearest) {
        _ if A && t < 0.0 => {
            if order == Order::Largest {
                0
            } else {
                u32::MAX
            }
        } // all, or none
        rank => rank - u32::from(reaches(nearest.to_f32())),
    };
    let chunks = chunks(parts);
    let mut marks = blank(&chunks);
    let found = survey(&chunks, &mut marks, ranking, Bracket { floor: ceiling, ceiling });
    if found.iter().any(|f| f.nan) {
        refuse_nan(parts, &chunks)?;
    }
    let take: Vec<usize> = found.iter().map(|f| f.above).collect();
    Ok(positions(parts, &chunks, &mut marks, &take, |_, _| {}))
}

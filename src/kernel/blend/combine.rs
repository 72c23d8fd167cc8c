//! How the kept values of one position become one.
use super::{Scratch, Streams, only};
use crate::error::{Error, Result};
use crate::kernel::chunk::check_len;
use crate::kernel::wide::Isa;

/// What decides the sign of a position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vote {
    /// the sum of weighted values; a stream agrees if its weighted value has that sign
    Weighted,
    /// the sum of values
    Mass,
    /// the number of values above and below zero
    Count,
}

/// What becomes of the values that have the elected sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Take {
    /// their weighted sum
    Sum,
    /// their weighted sum by their number
    Mean,
    /// their weighted sum by the sum of their weights (by 1 where that is 0)
    WeightedMean,
    /// the largest magnitude, with the elected sign
    Largest,
}

/// How values are combined.
#[derive(Debug, Clone, Copy)]
pub enum Rule<'a> {
    /// the weighted sum
    Sum,
    /// those of one sign
    Elect {
        /// who decides
        vote: Vote,
        /// the sign where the vote is zero: 1, -1, or 0 for none
        zero: f32,
        /// what is made of them
        take: Take,
    },
    /// the one of largest magnitude, the last of equals
    Largest,
    /// the mean of those that are not zero; `alone` multiplies one that is so alone
    Active {
        /// a factor for each stream
        alone: &'a [f32],
    },
    /// the weighted sum, where at least `least` streams stand out: |x| > factor * |sum - x|
    Standing {
        /// a factor for each stream
        factors: &'a [f32],
        /// how many
        least: usize,
    },
    /// the variance across streams (by their number)
    Variance,
}

/// What happens to the combined value.
#[derive(Debug, Clone, Copy)]
pub struct Finish {
    /// it is divided by this
    pub divide: f32,
    /// and multiplied by this
    pub lambda: f32,
    /// and added to the base
    pub onto_base: bool,
    /// only where this stream takes part: it has the elected sign, or stands out
    pub own: Option<usize>,
}

impl Rule<'_> {
    pub(super) fn check(&self, streams: usize, finish: &Finish) -> Result<()> {
        if let Rule::Active { alone: factors } | Rule::Standing { factors, .. } = self {
            check_len("the factors", factors.len(), streams)?;
        }
        let own = matches!(self, Rule::Elect { .. } | Rule::Standing { .. });
        match finish.own {
            Some(t) if !own || t >= streams => Err(Error::Value {
                name: "own".to_string(),
                rule: "a stream that takes part or not".to_string(),
                got: t.to_string(),
            }),
            _ => Ok(()),
        }
    }

    /// Whether each stream is needed but once.
    pub(super) fn one_by_one(&self) -> bool {
        matches!(self, Rule::Sum | Rule::Largest | Rule::Active { .. })
    }

    /// One tile of `n` elements; the result comes in `scratch.more[0]`. False if one is not a number.
    #[inline(always)]
    pub(super) fn tile(
        &self,
        isa: impl Isa,
        streams: &Streams<'_>,
        finish: &Finish,
        (at, n): (usize, usize),
        scratch: &mut Scratch,
    ) -> bool {
        let Scratch { base, tiles, more: [result, a, b] } = scratch;
        let (base, result, a, b) = (&base[..n], &mut result[..n], &mut a[..n], &mut b[..n]);
        result.fill(0.0);
        let mut fine = true;
        let weight = |t: usize| streams.streams[t].weight;
        if self.one_by_one() {
            if let Rule::Active { .. } = self {
                a.fill(0.0);
                b.fill(0.0);
            }
            let d = &mut tiles[0][..n];
            for t in 0..streams.streams.len() {
                fine &= !streams.raw(t, at, base, d);
                streams.keep(isa, t, at, d);
                match self {
                    Rule::Largest => {
                        let pairs = result.iter_mut().zip(&*d);
                        pairs.for_each(|(r, x)| *r = if x.abs() >= r.abs() { *x } else { *r });
                    }
                    Rule::Active { alone } => {
                        let values = result.iter_mut().zip(&mut *a).zip(&mut *b).zip(&*d);
                        values.for_each(|(((r, count), single), x)| {
                            *r += x;
                            *count += if *x == 0.0 { 0.0 } else { 1.0 };
                            *single = x.mul_add(alone[t], *single);
                        });
                    }
                    _ => {
                        let w = weight(t);
                        result.iter_mut().zip(&*d).for_each(|(r, x)| *r = x.mul_add(w, *r));
                    }
                }
            }
            if let Rule::Active { .. } = self {
                for ((r, count), single) in result.iter_mut().zip(&*a).zip(&*b) {
                    *r = if *count == 1.0 { *single } else { *r / count.max(1.0) };
                }
            }
            finish.apply(base, result);
            return fine;
        }
        for (t, d) in tiles.iter_mut().enumerate() {
            let d = &mut d[..n];
            fine &= !streams.raw(t, at, base, d);
            streams.keep(isa, t, at, d);
        }
        match *self {
            Rule::Elect { vote, zero, take } => {
                let tiles = &*tiles;
                let side = |t| if vote == Vote::Weighted { weight(t) } else { 1.0 };
                a.fill(0.0);
                match vote {
                    Vote::Count => tiles.iter().for_each(|d| count(d, a)),
                    _ => few!(tiles, n, (first, few) => poll(few, |t| side(first + t), a)),
                }
                for s in &mut *a {
                    *s = if *s > 0.0 {
                        1.0
                    } else if *s < 0.0 {
                        -1.0
                    } else {
                        zero
                    };
                }
                if take == Take::Largest {
                    for d in tiles {
                        for ((r, x), s) in result.iter_mut().zip(d).zip(&*a) {
                            *r = only(x * s > 0.0, x.abs()).max(*r);
                        }
                    }
                    result.iter_mut().zip(&*a).for_each(|(r, s)| *r *= s);
                } else {
                    let part = |t| if take == Take::Mean { 1.0 } else { weight(t) };
                    b.fill(0.0);
                    let of = |t| [side(t), weight(t), part(t)];
                    few!(tiles, n, (first, few) => {
                        agreeing(few, |t| of(first + t), a, result, b);
                    });
                    if take != Take::Sum {
                        let all = result.iter_mut().zip(&*b);
                        all.for_each(|(r, b)| *r /= if *b == 0.0 { 1.0 } else { *b });
                    }
                }
                if let Some(own) = finish.own {
                    for ((r, x), s) in result.iter_mut().zip(&tiles[own]).zip(&*a) {
                        *r = only(x * s > 0.0, *r);
                    }
                }
            }
            Rule::Standing { factors, least } => {
                a.fill(0.0);
                for (t, d) in tiles.iter().enumerate() {
                    let w = weight(t);
                    a.iter_mut().zip(d).for_each(|(sum, x)| *sum = x.mul_add(w, *sum));
                }
                b.fill(0.0);
                for (t, d) in tiles.iter().enumerate() {
                    if finish.own.is_some_and(|own| own != t) {
                        continue;
                    }
                    for ((count, x), sum) in b.iter_mut().zip(d).zip(&*a) {
                        let stands = x.abs() > factors[t] * (sum - x).abs();
                        *count += only(stands, 1.0);
                    }
                }
                let least = if finish.own.is_some() { 1.0 } else { least as f32 };
                for ((r, sum), count) in result.iter_mut().zip(&*a).zip(&*b) {
                    *r = only(*count >= least, *sum);
                }
            }
            _ => {
                let share = 1.0 / tiles.len() as f32;
                a.fill(0.0);
                for d in &*tiles {
                    a.iter_mut().zip(d).for_each(|(sum, x)| *sum += x);
                }
                a.iter_mut().for_each(|mean| *mean *= share);
                for d in &*tiles {
                    for ((r, x), mean) in result.iter_mut().zip(d).zip(&*a) {
                        *r = (x - mean).mul_add(x - mean, *r);
                    }
                }
                result.iter_mut().for_each(|r| *r *= share);
            }
        }
        finish.apply(base, result);
        fine
    }
}

/// Adds the signs of a tile to the votes.
#[inline(always)]
fn count(d: &[f32], votes: &mut [f32]) {
    for (votes, x) in votes.iter_mut().zip(d) {
        *votes += only(*x > 0.0, 1.0) - only(*x < 0.0, 1.0);
    }
}

/// Runs `$body` with all streams, four at a time, in order: `$first` is the number of the first one, `$few`
/// an array whose length is known when it is compiled, so that sums over it stay in registers.
macro_rules! few {
    ($tiles:expr, $n:expr, ($first:ident, $few:ident) => $body:expr) => {
        for (i, group) in $tiles.chunks(4).enumerate() {
            let $first = 4 * i;
            match group {
                [a, b, c, d] => {
                    let $few = [&a[..$n], &b[..$n], &c[..$n], &d[..$n]];
                    $body
                }
                [a, b, c] => {
                    let $few = [&a[..$n], &b[..$n], &c[..$n]];
                    $body
                }
                [a, b] => {
                    let $few = [&a[..$n], &b[..$n]];
                    $body
                }
                [a] => {
                    let $few = [&a[..$n]];
                    $body
                }
                _ => {}
            }
        }
    };
}
use few;

/// Adds weighted values to the votes. (What is written comes as an argument of its own: the compiler knows
/// then that nothing else lies there.)
#[inline(always)]
fn poll<const N: usize>(tiles: [&[f32]; N], side: impl Fn(usize) -> f32, votes: &mut [f32]) {
    let sides: [f32; N] = std::array::from_fn(side);
    let tiles = tiles.map(|d| &d[..votes.len()]); // no check is left in the loop
    for i in 0..votes.len() {
        let mut vote = votes[i];
        for t in 0..N {
            vote = tiles[t][i].mul_add(sides[t], vote);
        }
        votes[i] = vote;
    }
}

/// Adds the values that have the elected sign, and their parts: `of` gives side, weight and part of a stream.
#[inline(always)]
fn agreeing<const N: usize>(
    tiles: [&[f32]; N],
    of: impl Fn(usize) -> [f32; 3],
    signs: &[f32],
    sums: &mut [f32],
    shares: &mut [f32],
) {
    let of: [_; N] = std::array::from_fn(of);
    let n = sums.len();
    let (tiles, signs, shares) = (tiles.map(|d| &d[..n]), &signs[..n], &mut shares[..n]);
    for i in 0..n {
        let (mut sum, mut share) = (sums[i], shares[i]);
        for t in 0..N {
            let ([side, weight, part], x) = (of[t], tiles[t][i]);
            let agrees = x * side * signs[i] > 0.0;
            sum = only(agrees, x).mul_add(weight, sum);
            share += only(agrees, part);
        }
        (sums[i], shares[i]) = (sum, share);
    }
}

impl Finish {
    #[inline(always)]
    fn apply(&self, base: &[f32], result: &mut [f32]) {
        if self.divide != 1.0 {
            result.iter_mut().for_each(|r| *r /= self.divide);
        }
        if self.onto_base {
            let lambda = self.lambda;
            result.iter_mut().zip(base).for_each(|(r, b)| *r = r.mul_add(lambda, *b));
        } else if self.lambda != 1.0 {
            result.iter_mut().for_each(|r| *r *= self.lambda);
        }
    }
}

//! How the kept values of one position become one.
use super::{Scratch, Streams, only};
use crate::error::{Error, Result};
use crate::kernel::chunk::check_len;

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
        streams: &Streams<'_>,
        finish: &Finish,
        at: usize,
        n: usize,
        scratch: &mut Scratch,
    ) -> bool {
        let Scratch { base, tiles, more: [result, a, b, c] } = scratch;
        let (base, result, a, b, c) =
            (&base[..n], &mut result[..n], &mut a[..n], &mut b[..n], &mut c[..n]);
        result.fill(0.0);
        let mut fine = true;
        let weight = |t: usize| streams.streams[t].weight;
        if self.one_by_one() {
            a.fill(0.0);
            b.fill(0.0);
            let d = &mut tiles[0][..n];
            for t in 0..streams.streams.len() {
                fine &= !streams.raw(t, at, base, d);
                streams.keep(t, at, d, c);
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
            streams.keep(t, at, d, c);
        }
        match *self {
            Rule::Elect { vote, zero, take } => {
                elect(tiles, weight, (vote, zero), a);
                let weighted = vote == Vote::Weighted;
                match take {
                    Take::Largest => {
                        for d in &*tiles {
                            for ((r, x), s) in result.iter_mut().zip(d).zip(&*a) {
                                *r = only(x * s > 0.0, x.abs()).max(*r);
                            }
                        }
                        result.iter_mut().zip(&*a).for_each(|(r, s)| *r *= s);
                    }
                    _ => {
                        b.fill(0.0);
                        for (t, d) in tiles.iter().enumerate() {
                            let w = weight(t);
                            let side = if weighted { w } else { 1.0 };
                            let part = if take == Take::Mean { 1.0 } else { w };
                            let all = result.iter_mut().zip(&mut *b).zip(d).zip(&*a);
                            for (((r, share), x), s) in all {
                                let agrees = x * side * s > 0.0;
                                *r = only(agrees, *x).mul_add(w, *r);
                                *share += only(agrees, part);
                            }
                        }
                        if take != Take::Sum {
                            let all = result.iter_mut().zip(&*b);
                            all.for_each(|(r, b)| *r /= if *b == 0.0 { 1.0 } else { *b });
                        }
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

/// The elected signs of one tile.
#[inline(always)]
fn elect(
    tiles: &[Vec<f32>],
    weight: impl Fn(usize) -> f32,
    (vote, zero): (Vote, f32),
    out: &mut [f32],
) {
    out.fill(0.0);
    for (t, d) in tiles.iter().enumerate() {
        match vote {
            Vote::Count => {
                for (sum, x) in out.iter_mut().zip(d) {
                    *sum += if *x > 0.0 { 1.0 } else { 0.0 } - if *x < 0.0 { 1.0 } else { 0.0 };
                }
            }
            _ => {
                let w = if vote == Vote::Weighted { weight(t) } else { 1.0 };
                out.iter_mut().zip(d).for_each(|(sum, x)| *sum = x.mul_add(w, *sum));
            }
        }
    }
    for s in out {
        *s = if *s > 0.0 {
            1.0
        } else if *s < 0.0 {
            -1.0
        } else {
            zero
        };
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

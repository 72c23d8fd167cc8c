//! Several streams of one length become one, in one pass: what each stream keeps, how the kept values are
//! combined, one rounding at the end.
//!
//! A stream is the difference of a tensor to a common base (or the tensor itself), made a tile at a time
//! and never stored as a whole. Positions are those of the whole tensor also where only a stretch is at
//! hand, so that cutting a tensor changes no bit.
mod combine;
mod cut;
mod rows;
mod sums;

pub use combine::{Finish, Rule, Take, Vote};
pub use cut::{Request, cuts};
pub use rows::{Band, Ramp, band, ramp};
pub use sums::{Sums, count_keys, gram, sums, value_of};

use super::chunk::{CHUNK, install};
use super::rng;
use super::wide::{Isa, Loop, WORD, soon, wide};
use crate::error::{Error, Result};
use crate::num::Element;
use crate::view::{View, ViewMut};
use crate::with_elements;
use rayon::prelude::*;

/// Elements handled at a time: a few tiles of f32 stay in the first-level cache.
pub(super) const TILE: usize = 2048;

/// A limit for magnitudes: what exceeds `bound`, and of what equals it the positions up to `last`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cut {
    /// a magnitude
    pub bound: f32,
    /// position of the last one that equals it and belongs to it; -1 for none
    pub last: i64,
}

impl Cut {
    /// Cuts a tile that begins at position `at` behind `last`.
    #[inline(always)]
    fn split(self, d: &mut [f32], at: usize) -> (&mut [f32], &mut [f32]) {
        let end = self.last.saturating_add(1).max(0) as usize;
        d.split_at_mut(end.saturating_sub(at).min(d.len()))
    }

    /// Keeps what exceeds the bound, and its equals up to `last`.
    #[inline(always)]
    fn keep_above(self, d: &mut [f32], at: usize) {
        let (early, late) = self.split(d, at);
        early.iter_mut().for_each(|x| *x = only(x.abs() >= self.bound, *x));
        late.iter_mut().for_each(|x| *x = only(x.abs() > self.bound, *x));
    }

    /// Keeps what is below the bound, and its equals up to `last`.
    #[inline(always)]
    fn keep_below(self, d: &mut [f32], at: usize) {
        let (early, late) = self.split(d, at);
        early.iter_mut().for_each(|x| *x = only(x.abs() <= self.bound, *x));
        late.iter_mut().for_each(|x| *x = only(x.abs() < self.bound, *x));
    }
}

/// The value where a condition holds, else 0: bits are cleared and always stored, because conditional
/// stores are slow on many processors.
#[inline(always)]
fn only(holds: bool, x: f32) -> f32 {
    f32::from_bits(x.to_bits() & u32::from(holds).wrapping_neg())
}

/// A random choice: a position stays where its uniform number is below `share`.
#[derive(Debug, Clone, Copy)]
pub struct Chance {
    /// key of the numbers
    pub seed: u64,
    /// which of its streams
    pub stream: u64,
    /// probability to stay
    pub share: f32,
}

/// One stream and what is kept of it. Without any limit all is kept.
#[derive(Debug, Clone, Copy)]
pub struct Stream<'a> {
    /// the tensor
    pub values: View<'a>,
    /// keeps what is above
    pub low: Option<Cut>,
    /// keeps what is below
    pub high: Option<Cut>,
    /// keeps at random
    pub chance: Option<Chance>,
    /// keeps the positions whose bit is set: what [`rng::draw`] wrote for the whole tensor
    pub drawn: Option<&'a [u8]>,
    /// multiplies each element
    pub factors: Option<&'a [f32]>,
    /// multiplies what is kept
    pub scale: f32,
    /// its part in what is combined
    pub weight: f32,
}

impl<'a> Stream<'a> {
    /// All of a tensor.
    pub fn new(values: View<'a>) -> Self {
        let (low, high, chance, drawn, factors) = (None, None, None, None, None);
        Stream { values, low, high, chance, drawn, factors, scale: 1.0, weight: 1.0 }
    }
}

/// Streams over one base.
#[derive(Debug, Clone)]
pub struct Streams<'a> {
    /// what is subtracted from each
    pub base: Option<View<'a>>,
    /// the streams
    pub streams: Vec<Stream<'a>>,
    /// position of the first element
    pub start: usize,
}

fn length(view: View<'_>) -> usize {
    with_elements!(View, view, x => x.len())
}

/// Keeps and scales where bits are set; `bit` of the first word is that of the first element.
#[inline(always)]
fn keep_bits(d: &mut [f32], word: impl Fn(usize) -> u64, bit: usize, scale: f32) {
    for (i, d) in d.chunks_mut(WORD).enumerate() {
        let mut bits = word(i) >> bit;
        if bit > 0 && WORD - bit < d.len() {
            bits |= word(i + 1) << (WORD - bit);
        }
        for (j, d) in d.chunks_mut(WORD / 2).enumerate() {
            let bits = (bits >> (j * WORD / 2)) as u32;
            d.iter_mut().enumerate().for_each(|(i, x)| *x = only(bits & (1 << i) != 0, *x) * scale);
        }
    }
}

/// Asks for the next tile while this one is at work: each begins a page of its own, where the processor
/// does not look ahead by itself. After less than a tile (a sample, a row) it may not be wanted.
#[inline(always)]
fn ahead<T>(x: &[T], at: usize, n: usize) {
    if n == TILE {
        soon(&x[(at + TILE).min(x.len())..(at + 2 * TILE).min(x.len())]);
    }
}

/// Widens a stretch of a tensor.
#[inline(always)]
fn load(view: View<'_>, at: usize, out: &mut [f32]) {
    with_elements!(View, view, x => {
        ahead(x, at, out.len());
        let x = &x[at..at + out.len()];
        out.iter_mut().zip(x).for_each(|(o, x)| *o = x.to_f32());
    });
}

impl Streams<'_> {
    /// Elements of each stream; refuses streams of different lengths.
    pub fn length(&self) -> Result<usize> {
        let Some(first) = self.streams.first() else { return Ok(0) };
        let want = length(first.values);
        for (i, stream) in self.streams.iter().enumerate() {
            super::chunk::check_len(&format!("tensor {i}"), length(stream.values), want)?;
            if let Some(factors) = stream.factors {
                super::chunk::check_len(
                    &format!("the factors of tensor {i}"),
                    factors.len(),
                    want,
                )?;
            }
            if let Some(drawn) = stream.drawn {
                let words = (self.start + want).div_ceil(WORD); // of the whole tensor, or of more
                let got = drawn.len().min(8 * words);
                super::chunk::check_len(&format!("the bits of tensor {i}"), got, 8 * words)?;
            }
        }
        if let Some(base) = self.base {
            super::chunk::check_len("the base", length(base), want)?;
        }
        Ok(want)
    }

    /// The base from `at` on; zeros if there is none.
    #[inline(always)]
    fn base(&self, at: usize, out: &mut [f32]) {
        match self.base {
            Some(view) => load(view, at, out),
            None => out.fill(0.0),
        }
    }

    /// A tile of one stream before anything is dropped; whether one is not a number.
    #[inline(always)]
    fn raw(&self, t: usize, at: usize, base: &[f32], out: &mut [f32]) -> bool {
        let mut top = 0;
        with_elements!(View, self.streams[t].values, x => {
            ahead(x, at, out.len());
            for ((o, b), x) in out.iter_mut().zip(base).zip(&x[at..]) {
                *o = x.to_f32() - b; // of no base: x - 0 is x, also where x is -0
                top = o.key_abs().max(top);
            }
        });
        top > f32::INFINITY_KEY
    }

    /// Drops what a stream does not keep, and scales the rest.
    #[inline(always)]
    fn keep(&self, isa: impl Isa, t: usize, at: usize, d: &mut [f32]) {
        let stream = &self.streams[t];
        let place = self.start + at;
        if let Some(cut) = stream.low {
            cut.keep_above(d, place);
        }
        if let Some(cut) = stream.high {
            cut.keep_below(d, place);
        }
        // factors come between a choice and the scale; without them one loop does both
        let (early, late) =
            if stream.factors.is_some() { (1.0, stream.scale) } else { (stream.scale, 1.0) };
        let (first, bit) = (place / WORD, place % WORD);
        if let Some(Chance { seed, stream, share }) = stream.chance {
            let mut words = [0; TILE / WORD + 1];
            for (i, word) in words.iter_mut().enumerate().take((bit + d.len()).div_ceil(WORD)) {
                *word = rng::bits(isa, seed, stream, share, first + i);
            }
            keep_bits(d, |i| words[i], bit, early);
        } else if let Some(drawn) = stream.drawn {
            let (words, _) = drawn.as_chunks();
            keep_bits(d, |i| u64::from_le_bytes(words[first + i]), bit, early);
        } else if early != 1.0 {
            d.iter_mut().for_each(|x| *x *= early);
        }
        if let Some(factors) = stream.factors {
            d.iter_mut().zip(&factors[at..]).for_each(|(x, f)| *x = *x * f * late);
        }
    }

    /// Names the first stream and position that is not a number.
    fn not_a_number(&self, name: &str, names: &[&str], len: usize) -> Error {
        for (t, stream) in self.streams.iter().enumerate() {
            let found = |view| with_elements!(View, view, x => x.iter().position(|x| x.is_nan()));
            if let Some(position) = found(stream.values) {
                let (name, position) = (whose(name, names.get(t)), self.start + position);
                return Error::Number { name, position };
            }
            if let Some(position) = self.base.and_then(found) {
                let (name, position) = (whose(name, Some(&"the base")), self.start + position);
                return Error::Number { name, position };
            }
        }
        // differences of infinities
        Error::Number { name: whose(name, None), position: self.start + len }
    }
}

fn whose(name: &str, model: Option<&&str>) -> String {
    model.map_or_else(|| name.to_string(), |model| format!("{name} of {model}"))
}

/// Scratch of one thread: the base, one tile for each stream, and a few more.
struct Scratch {
    base: Vec<f32>,
    tiles: Vec<Vec<f32>>,
    more: [Vec<f32>; 3],
}

impl Scratch {
    fn new(streams: usize) -> Self {
        let tile = || vec![0.0; TILE];
        Scratch {
            base: tile(),
            tiles: (0..streams).map(|_| tile()).collect(),
            more: std::array::from_fn(|_| tile()),
        }
    }
}

/// Combines the streams into `out`. `name` and `names` are for errors.
pub fn blend(
    threads: usize,
    (name, names): (&str, &[&str]),
    streams: &Streams<'_>,
    rule: &Rule<'_>,
    finish: &Finish,
    out: ViewMut<'_>,
) -> Result<()> {
    let len = streams.length()?;
    rule.check(streams.streams.len(), finish)?;
    let fine = with_elements!(ViewMut, out, out => {
        super::chunk::check_len("the result", out.len(), len)?;
        let one = |(i, out): (usize, &mut [_])| {
            wide(Blend { streams, rule, finish, first: i * CHUNK, out })
        };
        if len <= CHUNK {
            out.chunks_mut(CHUNK).enumerate().all(one)
        } else {
            install(threads, || {
                out.par_chunks_mut(CHUNK).enumerate().map(one).reduce(|| true, |a, b| a && b)
            })
        }
    });
    if fine { Ok(()) } else { Err(streams.not_a_number(name, names, len)) }
}

struct Blend<'a, T> {
    streams: &'a Streams<'a>,
    rule: &'a Rule<'a>,
    finish: &'a Finish,
    first: usize,
    out: &'a mut [T],
}

impl<T: Element> Loop for Blend<'_, T> {
    type Output = bool;
    #[inline(always)]
    fn run(self, isa: impl Isa) -> bool {
        let Blend { streams, rule, finish, first, out } = self;
        let mut scratch = Scratch::new(if rule.one_by_one() { 1 } else { streams.streams.len() });
        let mut fine = true;
        for (i, out) in out.chunks_mut(TILE).enumerate() {
            let at = first + i * TILE;
            let n = out.len();
            streams.base(at, &mut scratch.base[..n]);
            fine &= rule.tile(isa, streams, finish, (at, n), &mut scratch);
            let [result, ..] = &scratch.more;
            out.iter_mut().zip(&result[..n]).for_each(|(o, x)| *o = T::from_f32(*x));
        }
        fine
    }
}

//! Sums over whole streams, in f64 and in an order that no thread and no processor changes.
use super::{Scratch, Streams, TILE};
use crate::error::{Error, Result};
use crate::kernel::chunk::{CHUNK, install};
use crate::kernel::rank::Ranking;
use crate::kernel::wide::{Isa, Loop, wide};
use crate::num::Element;
use rayon::prelude::*;

/// Running sums side by side: the same ones whatever the width of the vectors.
const LANES: usize = 16;

/// Of one stream.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sums {
    /// magnitudes, before anything is dropped
    pub all: f64,
    /// magnitudes of what is kept, scaled
    pub magnitude: f64,
}

#[inline(always)]
fn magnitudes(d: &[f32]) -> f64 {
    let mut lanes = [0.0; LANES];
    let (blocks, tail) = d.as_chunks::<LANES>();
    for block in blocks {
        lanes.iter_mut().zip(block).for_each(|(l, x)| *l += f64::from(x.abs()));
    }
    lanes.iter_mut().zip(tail).for_each(|(l, x)| *l += f64::from(x.abs()));
    lanes.iter().sum()
}

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut lanes = [0.0; LANES];
    let ((a, x), (b, y)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for ((l, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *l += f64::from(*a) * f64::from(*b);
        }
    }
    for ((l, a), b) in lanes.iter_mut().zip(x).zip(y) {
        *l += f64::from(*a) * f64::from(*b);
    }
    lanes.iter().sum()
}

/// Runs `f` on all chunks; the results in order.
fn over<R: Send>(
    threads: usize,
    len: usize,
    f: impl Fn(usize, usize) -> R + Sync + Send,
) -> Vec<R> {
    let one = |i: usize| f(i * CHUNK, CHUNK.min(len - i * CHUNK));
    if len <= CHUNK {
        return (0..len.div_ceil(CHUNK)).map(one).collect();
    }
    install(threads, || (0..len.div_ceil(CHUNK)).into_par_iter().map(one).collect())
}

/// The sums of every stream.
pub fn sums(
    threads: usize,
    (name, names): (&str, &[&str]),
    streams: &Streams<'_>,
) -> Result<Vec<Sums>> {
    let len = streams.length()?;
    let parts = over(threads, len, |first, len| wide(Add { streams, first, len }));
    let mut out = vec![Sums::default(); streams.streams.len()];
    for part in parts {
        let part = part.ok_or_else(|| streams.not_a_number(name, names, len))?;
        for (o, p) in out.iter_mut().zip(part) {
            o.all += p.all;
            o.magnitude += p.magnitude;
        }
    }
    Ok(out)
}

struct Add<'a> {
    streams: &'a Streams<'a>,
    first: usize,
    len: usize,
}

impl Loop for Add<'_> {
    type Output = Option<Vec<Sums>>;
    #[inline(always)]
    fn run(self, isa: impl Isa) -> Self::Output {
        let Add { streams, first, len } = self;
        let mut out = vec![Sums::default(); streams.streams.len()];
        let mut scratch = Scratch::new(1);
        let Scratch { base, tiles, .. } = &mut scratch;
        for at in (first..first + len).step_by(TILE) {
            let n = TILE.min(first + len - at);
            let (base, d) = (&mut base[..n], &mut tiles[0][..n]);
            streams.base(at, base);
            for (t, sums) in out.iter_mut().enumerate() {
                if streams.raw(t, at, base, d) {
                    return None;
                }
                sums.all += magnitudes(d);
                streams.keep(isa, t, at, d);
                sums.magnitude += magnitudes(d);
            }
        }
        Some(out)
    }
}

/// All dot products of the streams with each other, row by row; what they drop is zero.
pub fn gram(
    threads: usize,
    (name, names): (&str, &[&str]),
    streams: &Streams<'_>,
) -> Result<Vec<f64>> {
    let (len, t) = (streams.length()?, streams.streams.len());
    let parts = over(threads, len, |first, len| wide(Dots { streams, first, len }));
    let mut out = vec![0.0; t * t];
    for part in parts {
        let part = part.ok_or_else(|| streams.not_a_number(name, names, len))?;
        out.iter_mut().zip(part).for_each(|(o, p)| *o += p);
    }
    for i in 0..t {
        for j in 0..i {
            out[i * t + j] = out[j * t + i];
        }
    }
    Ok(out)
}

struct Dots<'a> {
    streams: &'a Streams<'a>,
    first: usize,
    len: usize,
}

impl Loop for Dots<'_> {
    type Output = Option<Vec<f64>>;
    #[inline(always)]
    fn run(self, isa: impl Isa) -> Self::Output {
        let Dots { streams, first, len } = self;
        let t = streams.streams.len();
        let mut out = vec![0.0; t * t];
        let mut scratch = Scratch::new(t);
        let Scratch { base, tiles, .. } = &mut scratch;
        for at in (first..first + len).step_by(TILE) {
            let n = TILE.min(first + len - at);
            let base = &mut base[..n];
            streams.base(at, base);
            for (i, d) in tiles.iter_mut().enumerate() {
                if streams.raw(i, at, base, &mut d[..n]) {
                    return None;
                }
                streams.keep(isa, i, at, &mut d[..n]);
            }
            for i in 0..t {
                for j in i..t {
                    out[i * t + j] += dot(&tiles[i][..n], &tiles[j][..n]);
                }
            }
        }
        Some(out)
    }
}

/// Adds a histogram of one stream's kept values to 65536 bins: by the upper 16 bits of their rank, or,
/// of those whose upper bits are `within`, by the lower 16 bits. Ranks order magnitudes, or values if
/// `signed`.
pub fn count_keys(
    threads: usize,
    (name, names): (&str, &[&str]),
    streams: &Streams<'_>,
    within: Option<u32>,
    signed: bool,
    bins: &mut [i64],
) -> Result<()> {
    let len = streams.length()?;
    crate::kernel::chunk::check_len("the bins", bins.len(), 1 << 16)?;
    if streams.streams.len() != 1 {
        let (name, rule) = ("tensors".to_string(), "one".to_string());
        return Err(Error::Value { name, rule, got: streams.streams.len().to_string() });
    }
    let chunks: Vec<usize> = (0..len).step_by(CHUNK).collect();
    let parts: Vec<Option<Vec<i64>>> = install(threads, || {
        let run = chunks.len().div_ceil(2 * threads.max(1)).max(1);
        let parts = chunks.par_chunks(run).map(|run| {
            let mut bins = vec![0_i64; 1 << 16];
            let fine = run.iter().all(|&first| {
                let len = CHUNK.min(len - first);
                wide(Count { streams, first, len, within, signed, bins: &mut bins })
            });
            fine.then_some(bins)
        });
        parts.collect()
    });
    for part in parts {
        let part = part.ok_or_else(|| streams.not_a_number(name, names, len))?;
        bins.iter_mut().zip(part).for_each(|(b, p)| *b += p); // whole numbers: any order is the same
    }
    Ok(())
}

struct Count<'a> {
    streams: &'a Streams<'a>,
    first: usize,
    len: usize,
    within: Option<u32>,
    signed: bool,
    bins: &'a mut [i64],
}

impl Loop for Count<'_> {
    type Output = bool;
    #[inline(always)]
    fn run(self, isa: impl Isa) -> bool {
        let Count { streams, first, len, within, signed, bins } = self;
        let mut scratch = Scratch::new(1);
        let Scratch { base, tiles, .. } = &mut scratch;
        let (by_size, by_value) = (Ranking::<true>::new(true), Ranking::<false>::new(true));
        for at in (first..first + len).step_by(TILE) {
            let n = TILE.min(first + len - at);
            let (base, d) = (&mut base[..n], &mut tiles[0][..n]);
            streams.base(at, base);
            if streams.raw(0, at, base, d) {
                return false;
            }
            streams.keep(isa, 0, at, d);
            for x in &*d {
                let rank = if signed { by_value.rank(*x) } else { by_size.rank(*x) };
                match within {
                    None => bins[(rank >> 16) as usize] += 1,
                    Some(high) if rank >> 16 == high => bins[(rank & 0xffff) as usize] += 1,
                    Some(_) => {}
                }
            }
        }
        true
    }
}

/// The float that has this rank.
pub fn value_of(rank: u32, signed: bool) -> f32 {
    let bits = match (signed, rank >> 31) {
        (false, _) => rank ^ 1 << 31,
        (true, 1) => rank & 0x7fff_ffff,
        (true, _) => !rank,
    };
    debug_assert!(f32::from_bits(bits).key_abs() <= f32::INFINITY_KEY);
    f32::from_bits(bits)
}

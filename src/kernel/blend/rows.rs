//! Rows by themselves: factors that keep a middle band of magnitudes, or keep at random by rank.
use super::Streams;
use crate::error::{Error, Result};
use crate::kernel::chunk::{CHUNK, check_len, install};
use crate::kernel::rng;
use crate::num::Element;
use rayon::prelude::*;

/// How many of each row are dropped from the top, and kept below that.
#[derive(Debug, Clone, Copy)]
pub struct Band {
    /// the largest ones that are dropped
    pub top: usize,
    /// the largest of the rest that stay
    pub keep: usize,
}

/// Probabilities that rise with the rank of a magnitude in its row.
#[derive(Debug, Clone, Copy)]
pub struct Ramp {
    /// probability in the middle
    pub density: f32,
    /// how much less the smallest, and more the largest has
    pub epsilon: f32,
    /// key of the random numbers
    pub seed: u64,
    /// which of its streams
    pub stream: u64,
    /// what is kept is divided by its probability
    pub rescale: bool,
}

/// Writes 1 where the first stream is kept, else 0.
pub fn band(
    threads: usize,
    names: (&str, &[&str]),
    streams: &Streams<'_>,
    row: usize,
    band: Band,
    out: &mut [f32],
) -> Result<()> {
    each_row(threads, names, streams, row, out, |_, keys, out| {
        // descending magnitude, equal ones in order
        keys.sort_unstable_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
        out.fill(0.0);
        let end = (band.top + band.keep).min(keys.len());
        keys[band.top.min(end)..end].iter().for_each(|(_, at)| out[*at as usize] = 1.0);
    })
}

/// Writes the factor of each element: 0 where it is dropped, else 1 or one over its probability.
pub fn ramp(
    threads: usize,
    names: (&str, &[&str]),
    streams: &Streams<'_>,
    row: usize,
    ramp: Ramp,
    out: &mut [f32],
) -> Result<()> {
    let Ramp { density, epsilon, seed, stream, rescale } = ramp;
    each_row(threads, names, streams, row, out, |at, keys, out| {
        keys.sort_unstable(); // ascending magnitude, equal ones in order
        rng::fill(seed, stream, streams.start + at, out);
        let steps = keys.len().saturating_sub(1).max(1) as f32;
        for (rank, (_, at)) in keys.iter().enumerate() {
            let share = (density - epsilon) + 2.0 * epsilon * rank as f32 / steps;
            // a row of one element has no ranks: the probability in the middle
            let share = if keys.len() == 1 { density } else { share };
            let factor = if rescale { 1.0 / share } else { 1.0 };
            let u = &mut out[*at as usize];
            *u = if *u < share { factor } else { 0.0 };
        }
    })
}

/// Calls `f` with the position of each row, the keys of its magnitudes with their places, and its part of
/// `out`.
fn each_row(
    threads: usize,
    (name, names): (&str, &[&str]),
    streams: &Streams<'_>,
    row: usize,
    out: &mut [f32],
    f: impl Fn(usize, &mut [(u32, u32)], &mut [f32]) + Sync,
) -> Result<()> {
    let len = streams.length()?;
    check_len("the factors", out.len(), len)?;
    if streams.streams.is_empty() || row == 0 || !len.is_multiple_of(row) || row > u32::MAX as usize
    {
        let (name, rule) = ("row".to_string(), format!("a divisor of {len}"));
        return Err(Error::Value { name, rule, got: row.to_string() });
    }
    let rows = (CHUNK / row).max(1);
    let one = |(i, out): (usize, &mut [f32])| {
        let mut scratch = (vec![0.0; row], vec![0.0; row], Vec::with_capacity(row));
        out.chunks_mut(row).enumerate().all(|(r, out)| {
            let at = (i * rows + r) * row;
            let (base, d, keys) = (&mut scratch.0, &mut scratch.1, &mut scratch.2);
            streams.base(at, base);
            if streams.raw(0, at, base, d) {
                return false;
            }
            keys.clear();
            keys.extend(d.iter().zip(0..).map(|(x, at)| (x.key_abs(), at)));
            f(at, keys, out);
            true
        })
    };
    let fine = install(threads, || {
        out.par_chunks_mut(rows * row).enumerate().map(one).reduce(|| true, |a, b| a && b)
    });
    if fine { Ok(()) } else { Err(streams.not_a_number(name, names, len)) }
}

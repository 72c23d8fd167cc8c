//! Statistics over many steps: `score += weight * map(value)`, in f32; and whether values are finite.
use super::chunk::{CHUNK, Divide, check_len, each, install};
use super::wide::{Isa, Loop, WORD, wide};
use crate::error::Result;
use crate::num::Element;
use rayon::prelude::*;

/// What happens to a value before it is added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Map {
    /// nothing
    Id,
    /// its magnitude
    Abs,
    /// its square
    Square,
}

/// `score += weight * map(value)`: one rounding for the square, one for the multiply-add.
pub fn accumulate<T: Element>(
    threads: usize,
    score: &mut [f32],
    value: &[T],
    map: Map,
    weight: f32,
) -> Result<()> {
    check_len("value", value.len(), score.len())?;
    let pair = Pair { score, value };
    match map {
        Map::Id => each(threads, CHUNK, pair, |p| wide(Add { pair: p, weight, map: |x| x })),
        Map::Abs => each(threads, CHUNK, pair, |p| wide(Add { pair: p, weight, map: f32::abs })),
        Map::Square => {
            each(threads, CHUNK, pair, |p| wide(Add { pair: p, weight, map: |x| x * x }));
        }
    }
    Ok(())
}

/// Whether no value of any part is infinite or NaN.
pub fn finite<T: Element>(threads: usize, parts: &[&[T]]) -> bool {
    let chunks: Vec<&[T]> = parts.iter().flat_map(|x| x.chunks(CHUNK)).collect();
    install(threads, || chunks.into_par_iter().all(|x| wide(Finite { x })))
}

struct Finite<'a, T> {
    x: &'a [T],
}

impl<T: Element> Loop for Finite<'_, T> {
    type Output = bool;
    #[inline(always)]
    fn run(self, _: impl Isa) -> bool {
        let mut tops = [0; WORD];
        let (blocks, tail) = self.x.as_chunks::<WORD>();
        for block in blocks {
            block.iter().zip(&mut tops).for_each(|(x, top)| *top = x.key_abs().max(*top));
        }
        tail.iter().for_each(|x| tops[0] = x.key_abs().max(tops[0]));
        tops.iter().all(|top| *top < T::INFINITY_KEY)
    }
}

struct Add<'a, T, F> {
    pair: Pair<'a, T>,
    weight: f32,
    map: F,
}

impl<T: Element, F: Fn(f32) -> f32> Loop for Add<'_, T, F> {
    type Output = ();
    #[inline(always)]
    fn run(self, _: impl Isa) {
        for (s, x) in self.pair.score.iter_mut().zip(self.pair.value) {
            *s = (self.map)(x.to_f32()).mul_add(self.weight, *s);
        }
    }
}

struct Pair<'a, T> {
    score: &'a mut [f32],
    value: &'a [T],
}

impl<T: Element> Divide for Pair<'_, T> {
    fn len(&self) -> usize {
        self.score.len()
    }
    fn divide(self, at: usize) -> (Self, Self) {
        let ((s, t), (x, y)) = (self.score.split_at_mut(at), self.value.split_at(at));
        (Pair { score: s, value: x }, Pair { score: t, value: y })
    }
}

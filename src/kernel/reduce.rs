//! Statistics over many steps: `score += weight * map(value)`, in f32.
use super::chunk::{CHUNK, Divide, check_len, each};
use super::wide::{Isa, Loop, wide};
use crate::error::Result;
use crate::num::Element;

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

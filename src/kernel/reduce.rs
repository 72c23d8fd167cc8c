//! Statistics over many steps: `score += weight * map(value)`, in f32.
use super::chunk::{CHUNK, Divide, check_len, each};
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
    each(threads, CHUNK, Pair { score, value }, |w| {
        let pairs = w.score.iter_mut().zip(w.value);
        match map {
            Map::Id => pairs.for_each(|(s, x)| *s = x.to_f32().mul_add(weight, *s)),
            Map::Abs => pairs.for_each(|(s, x)| *s = x.to_f32().abs().mul_add(weight, *s)),
            Map::Square => pairs.for_each(|(s, x)| {
                let x = x.to_f32();
                *s = (x * x).mul_add(weight, *s);
            }),
        }
    });
    Ok(())
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

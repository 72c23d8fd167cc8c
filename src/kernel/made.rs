//! Scores that are made where they are read, so that no tensor of scores need be filled and read again:
//! `|x| / (|divisor| + offset)`, with some of them put before, or behind, all others.
use super::chunk::check_len;
use super::wide::{Isa, Loop, wide};
use crate::error::Result;
use crate::num::Element;
use crate::view::check_index;

/// What the scores of one part are made of, beside its values x.
#[derive(Debug, Clone, Copy)]
pub struct Made<'a, T> {
    /// one number for each value; without it the score is `|x|`
    pub divisor: Option<&'a [T]>,
    /// added to the magnitude of the divisor
    pub offset: f32,
    /// ascending positions whose score is `pin`
    pub pinned: &'a [i32],
    /// infinity or minus infinity
    pub pin: f32,
    first: usize,
}

impl<'a, T: Element> Made<'a, T> {
    /// Of a part of `len` values, which is called `name`.
    pub fn new(
        name: &str,
        len: usize,
        divisor: Option<(&'a [T], f32)>,
        pinned: &'a [i32],
        pin: f32,
    ) -> Result<Self> {
        check_index(name, pinned, len)?;
        if let Some((divisor, _)) = divisor {
            check_len(name, divisor.len(), len)?;
        }
        let (divisor, offset) = divisor.unzip();
        Ok(Made { divisor, offset: offset.unwrap_or(0.0), pinned, pin, first: 0 })
    }

    /// Of `len` values from position `first` on.
    pub(super) fn piece(&self, first: usize, len: usize) -> Self {
        let place = |end: usize| self.pinned.partition_point(|p| (*p as usize) < end);
        let divisor = self.divisor.map(|d| &d[first..first + len]);
        Made { divisor, pinned: &self.pinned[place(first)..place(first + len)], first, ..*self }
    }

    /// The scores of the values of a piece.
    pub(super) fn fill<'b>(&self, values: &[T], room: &'b mut Vec<T>) -> &'b [T] {
        room.resize(values.len(), T::from_f32(0.0));
        wide(Fill { made: self, values, out: room });
        for p in self.pinned {
            room[*p as usize - self.first] = T::from_f32(self.pin);
        }
        room
    }

    /// The score of one of them.
    pub(super) fn one(&self, values: &[T], at: usize) -> T {
        if self.pinned.binary_search(&((self.first + at) as i32)).is_ok() {
            return T::from_f32(self.pin);
        }
        match self.divisor {
            None => T::from_f32(values[at].to_f32().abs()),
            Some(divisor) => T::from_f32(ratio(values[at], divisor[at], self.offset)),
        }
    }
}

#[inline(always)]
fn ratio<T: Element>(x: T, divisor: T, offset: f32) -> f32 {
    x.to_f32().abs() / (divisor.to_f32().abs() + offset)
}

struct Fill<'a, 'b, T> {
    made: &'a Made<'b, T>,
    values: &'a [T],
    out: &'a mut [T],
}

impl<T: Element> Loop for Fill<'_, '_, T> {
    type Output = ();
    #[inline(always)]
    fn run(self, _: impl Isa) {
        let (rows, offset) = (self.out.iter_mut().zip(self.values), self.made.offset);
        match self.made.divisor {
            None => rows.for_each(|(out, x)| *out = T::from_f32(x.to_f32().abs())),
            Some(divisor) => {
                for ((out, x), d) in rows.zip(divisor) {
                    *out = T::from_f32(ratio(*x, *d, offset));
                }
            }
        }
    }
}

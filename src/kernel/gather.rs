//! Moving values between a tensor and a compact buffer: `out[i] = src[index[i]]` and
//! `dst[index[i]] = values[i]`.
//!
//! Positions are ascending and unique, so a piece of the index meets one stretch of the tensor that no
//! other piece meets: cutting both at the same place gives each thread memory of its own.
use super::chunk::{Divide, check_len, each};
use crate::error::Result;
use crate::num::{Element, Position};
use crate::view::check_index;

/// Positions of one piece. Random access is slow per element: smaller pieces than a chunk balance.
pub(crate) const GRAIN: usize = 1 << 14;

/// `out = src[index]`, widened to f32, or `out += src[index]`.
pub fn gather<T: Element, P: Position>(
    threads: usize,
    name: &str,
    src: &[T],
    index: &[P],
    out: &mut [f32],
    accumulate: bool,
) -> Result<()> {
    check_len("out", out.len(), index.len())?;
    check_index(name, index, src.len())?;
    each(threads, GRAIN, Read { index, out }, |w| {
        for (out, p) in w.out.iter_mut().zip(w.index) {
            let x = src[p.at()].to_f32();
            *out = if accumulate { *out + x } else { x };
        }
    });
    Ok(())
}

/// `dst[index] = values`, each rounded once.
pub fn scatter<T: Element, P: Position>(
    threads: usize,
    name: &str,
    dst: &mut [T],
    index: &[P],
    values: &[f32],
) -> Result<()> {
    check_len("values", values.len(), index.len())?;
    check_index(name, index, dst.len())?;
    each(threads, GRAIN, Write { values, target: Target { base: 0, dst, index } }, |w| {
        for (p, x) in w.target.index.iter().zip(w.values) {
            w.target.dst[p.at() - w.target.base] = T::from_f32(*x);
        }
    });
    Ok(())
}

/// `out = src[index]`, bit for bit.
pub fn take<T: Element, P: Position>(
    threads: usize,
    name: &str,
    src: &[T],
    index: &[P],
    out: &mut [T],
) -> Result<()> {
    check_len("out", out.len(), index.len())?;
    check_index(name, index, src.len())?;
    each(threads, GRAIN, Read { index, out }, |w| {
        for (out, p) in w.out.iter_mut().zip(w.index) {
            *out = src[p.at()];
        }
    });
    Ok(())
}

/// `dst[index] = values`, bit for bit.
pub fn put<T: Element, P: Position>(
    threads: usize,
    name: &str,
    dst: &mut [T],
    index: &[P],
    values: &[T],
) -> Result<()> {
    check_len("values", values.len(), index.len())?;
    check_index(name, index, dst.len())?;
    each(threads, GRAIN, Write { values, target: Target { base: 0, dst, index } }, |w| {
        for (p, x) in w.target.index.iter().zip(w.values) {
            w.target.dst[p.at() - w.target.base] = *x;
        }
    });
    Ok(())
}

/// A stretch of a tensor that begins at position `base`, and the positions that fall in it.
pub(crate) struct Target<'a, T, P> {
    pub(crate) base: usize,
    pub(crate) dst: &'a mut [T],
    pub(crate) index: &'a [P],
}

impl<T: Element, P: Position> Divide for Target<'_, T, P> {
    fn len(&self) -> usize {
        self.index.len()
    }
    fn divide(self, at: usize) -> (Self, Self) {
        let (low, high) = self.index.split_at(at);
        let middle = high.first().map_or(self.base + self.dst.len(), |p| p.at());
        let (a, b) = self.dst.split_at_mut(middle - self.base);
        (
            Target { base: self.base, dst: a, index: low },
            Target { base: middle, dst: b, index: high },
        )
    }
}

struct Read<'a, O, P> {
    index: &'a [P],
    out: &'a mut [O],
}

impl<O: Send, P: Position> Divide for Read<'_, O, P> {
    fn len(&self) -> usize {
        self.index.len()
    }
    fn divide(self, at: usize) -> (Self, Self) {
        let ((i, j), (a, b)) = (self.index.split_at(at), self.out.split_at_mut(at));
        (Read { index: i, out: a }, Read { index: j, out: b })
    }
}

struct Write<'a, V, T, P> {
    values: &'a [V],
    target: Target<'a, T, P>,
}

impl<V: Sync, T: Element, P: Position> Divide for Write<'_, V, T, P> {
    fn len(&self) -> usize {
        self.values.len()
    }
    fn divide(self, at: usize) -> (Self, Self) {
        let ((a, b), (s, t)) = (self.values.split_at(at), self.target.divide(at));
        (Write { values: a, target: s }, Write { values: b, target: t })
    }
}

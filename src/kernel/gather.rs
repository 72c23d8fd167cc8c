//! Moving values between a tensor and a compact buffer: `out[i] = src[index[i]]` and
//! `dst[index[i]] = values[i]`.
//!
//! Positions are ascending and unique, so a piece of the index meets one stretch of the tensor that no
//! other piece meets: cutting both at the same place gives each thread memory of its own.
use super::chunk::{CHUNK, Divide, check_len, each};
use super::wide::{Isa, Loop, wide};
use crate::error::Result;
use crate::num::{Element, Position};
use crate::view::check_index;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

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
    check(threads, name, index, src.len())?;
    each(threads, GRAIN, Read { index, out }, |read| match accumulate {
        true => wide(Gather { src, read, put: |out: &mut f32, x: T| *out += x.to_f32() }),
        false => wide(Gather { src, read, put: |out: &mut f32, x: T| *out = x.to_f32() }),
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
    let target = Target::new(threads, name, dst, index)?;
    each(threads, GRAIN, Write { values, target }, |write| {
        wide(Scatter { write, round: T::from_f32 })
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
    check(threads, name, index, src.len())?;
    let put = |out: &mut T, x: T| *out = x;
    each(threads, GRAIN, Read { index, out }, |read| wide(Gather { src, read, put }));
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
    let target = Target::new(threads, name, dst, index)?;
    each(threads, GRAIN, Write { values, target }, |write| {
        wide(Scatter { write, round: |x: T| x })
    });
    Ok(())
}

/// `check_index`, in parallel.
pub(crate) fn check<P: Position>(
    threads: usize,
    name: &str,
    index: &[P],
    len: usize,
) -> Result<()> {
    let bad = AtomicBool::new(false);
    each(threads, CHUNK, Ordered { index, next: None }, |w| {
        if !wide(w) {
            bad.store(true, Relaxed);
        }
    });
    let ends = [index.first(), index.last()].into_iter().flatten();
    if bad.load(Relaxed) || ends.into_iter().any(|p| p.at() >= len) {
        return check_index(name, index, len); // says what is wrong
    }
    Ok(())
}

/// Positions, and the one that follows them.
struct Ordered<'a, P> {
    index: &'a [P],
    next: Option<P>,
}

impl<P: Position> Divide for Ordered<'_, P> {
    fn len(&self) -> usize {
        self.index.len()
    }
    fn divide(self, at: usize) -> (Self, Self) {
        let (a, b) = self.index.split_at(at);
        (Ordered { index: a, next: b.first().copied() }, Ordered { index: b, next: self.next })
    }
}

impl<P: Position> Loop for Ordered<'_, P> {
    /// Whether they are ascending and unique.
    type Output = bool;
    #[inline(always)]
    fn run(self, _: impl Isa) -> bool {
        let pairs = self.index.iter().zip(self.index.iter().skip(1));
        let inside = pairs.fold(true, |ok, (a, b)| ok & (a < b));
        inside && self.index.last().zip(self.next).is_none_or(|(a, b)| *a < b)
    }
}

struct Gather<'a, T, O, P, F> {
    src: &'a [T],
    read: Read<'a, O, P>,
    put: F,
}

impl<T: Element, O, P: Position, F: Fn(&mut O, T)> Loop for Gather<'_, T, O, P, F> {
    type Output = ();
    #[inline(always)]
    fn run(self, _: impl Isa) {
        for (out, p) in self.read.out.iter_mut().zip(self.read.index) {
            (self.put)(out, self.src[p.at()]);
        }
    }
}

struct Scatter<'a, V, T, P, F> {
    write: Write<'a, V, T, P>,
    round: F,
}

impl<V: Copy, T: Element, P: Position, F: Fn(V) -> T> Loop for Scatter<'_, V, T, P, F> {
    type Output = ();
    #[inline(always)]
    fn run(mut self, _: impl Isa) {
        self.write.target.write(self.write.values, self.round);
    }
}

/// A stretch of a tensor that begins at position `base`, and the positions that fall in it.
pub(crate) struct Target<'a, T, P> {
    base: usize,
    dst: &'a mut [T],
    index: &'a [P],
}

impl<'a, T: Element, P: Position> Target<'a, T, P> {
    /// A whole tensor and positions in it, which are checked.
    pub(crate) fn new(
        threads: usize,
        name: &str,
        dst: &'a mut [T],
        index: &'a [P],
    ) -> Result<Self> {
        check(threads, name, index, dst.len())?;
        Ok(Target { base: 0, dst, index })
    }

    /// Puts one value at each position.
    #[inline(always)]
    pub(crate) fn write<V: Copy>(&mut self, values: &[V], round: impl Fn(V) -> T) {
        for (p, x) in self.index.iter().zip(values) {
            self.dst[p.at() - self.base] = round(*x);
        }
    }
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

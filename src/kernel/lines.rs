//! Rows and columns of a tensor of which some elements are selected: the factored second moment of Adafactor
//! (Shazeer and Stern, arXiv 1804.04235) over these elements alone.
//!
//! Sums are in f64 and in the order of the positions, so that no number of threads changes them.
use super::chunk::{Divide, check_len, each};
use super::gather::{GRAIN, check};
use super::wide::{Isa, Loop, wide};
use crate::error::Result;
use crate::num::Position;
use std::ops::Range;

/// The last two dimensions of a tensor. Those before them make a batch: each has rows and columns of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// rows
    pub height: usize,
    /// columns
    pub width: usize,
}

impl Shape {
    /// Refuses lines that are not those of one tensor; gives its number of elements.
    fn check(self, rows: usize, columns: usize) -> Result<usize> {
        let numel = rows * self.width;
        check_len("columns", columns, numel.checked_div(self.height).unwrap_or(0))?;
        check_len("rows", rows, columns.checked_div(self.width).unwrap_or(0) * self.height)?;
        Ok(numel)
    }

    /// Calls `f` for each row that has positions: with its number, their places in the index, and what is
    /// to be taken from a position to have its column.
    #[inline(always)]
    fn walk<P: Position>(self, index: &[P], mut f: impl FnMut(usize, Range<usize>, usize)) {
        let mut from = 0;
        while let Some(first) = index.get(from) {
            let row = first.at() / self.width;
            let end = (row + 1) * self.width;
            // Most rows are short: the search is among the next few first.
            let (rest, mut few) = (&index[from..], 16);
            while rest.get(few - 1).is_some_and(|position| position.at() < end) {
                few *= 2;
            }
            let near = &rest[..few.min(rest.len())];
            let to = from + near.partition_point(|position| position.at() < end);
            f(row, from..to, row * self.width - row / self.height * self.width);
            from = to;
        }
    }
}

/// A sum and how many it is of.
type Sum = (f64, f64);

/// Means of the squares of `x` over the selected of each row and each column; 0 where none is.
pub fn means<P: Position>(
    threads: usize,
    name: &str,
    x: &[f32],
    index: &[P],
    shape: Shape,
    rows: &mut [f32],
    columns: &mut [f32],
) -> Result<()> {
    check_len("x", x.len(), index.len())?;
    check(threads, name, index, shape.check(rows.len(), columns.len())?)?;
    let mut down: Vec<Sum> = vec![(0.0, 0.0); rows.len()];
    let mut across: Vec<Sum> = vec![(0.0, 0.0); columns.len()];
    shape.walk(index, |row, here, start| {
        let mut total = 0.0;
        for (x, position) in x[here.clone()].iter().zip(&index[here.clone()]) {
            let square = f64::from(*x) * f64::from(*x);
            total += square;
            let column = &mut across[position.at() - start];
            *column = (column.0 + square, column.1 + 1.0);
        }
        down[row] = (total, here.len() as f64);
    });
    for (out, sums) in [(rows, down), (columns, across)] {
        for (mean, (sum, count)) in out.iter_mut().zip(sums) {
            *mean = (sum / count.max(1.0)) as f32;
        }
    }
    Ok(())
}

/// The least of the divisors in f64.
const TINY: f64 = f64::MIN_POSITIVE;

/// `max(x, least)` that keeps NaN, as torch's clamp does.
macro_rules! at_least {
    ($x:expr, $least:expr) => {
        if $x < $least { $least } else { $x }
    };
}

/// The second moment of each selected element from the means of its row and its column, both scaled to each
/// other's gaps; or, with gradients, those by its root.
///
/// `eps` is the floor of the mean of all, and its square that under the root.
#[allow(clippy::too_many_arguments)]
pub fn estimate<P: Position>(
    threads: usize,
    name: &str,
    rows: &[f32],
    columns: &[f32],
    index: &[P],
    shape: Shape,
    eps: f64,
    grad: Option<&[f32]>,
    out: &mut [f32],
) -> Result<()> {
    check_len("out", out.len(), index.len())?;
    if let Some(grad) = grad {
        check_len("grad", grad.len(), index.len())?;
    }
    check(threads, name, index, shape.check(rows.len(), columns.len())?)?;
    let mut down: Vec<f64> = rows.iter().map(|x| f64::from(*x)).collect();
    let mut counts = vec![0.0; rows.len()];
    let mut across: Vec<Sum> = vec![(0.0, 0.0); columns.len()];
    shape.walk(index, |row, here, start| {
        counts[row] = here.len() as f64;
        for position in &index[here] {
            let column = &mut across[position.at() - start];
            *column = (column.0 + down[row], column.1 + 1.0);
        }
    });
    let scaled = columns.iter().zip(across);
    let across: Vec<f64> =
        scaled.map(|(x, (sum, count))| f64::from(*x) * count / at_least!(sum, TINY)).collect();
    let mut other = vec![0.0; rows.len()];
    shape.walk(index, |row, here, start| {
        other[row] = index[here].iter().fold(0.0, |sum, p| sum + across[p.at() - start]);
    });
    let tables = down.chunks_mut(shape.height.max(1));
    for (t, table) in tables.enumerate() {
        let first = t * shape.height;
        let counts = &counts[first..first + table.len()];
        let sum: f64 = table.iter().zip(counts).map(|(x, count)| x * count).sum();
        let mean = sum / counts.iter().sum::<f64>().max(1.0);
        let floor = mean / at_least!(mean, eps);
        for (i, (x, count)) in table.iter_mut().zip(counts).enumerate() {
            *x = *x * count / at_least!(other[first + i], TINY) * floor;
        }
    }
    let lines = Lines { down: &down, across: &across, shape, floor: (eps * eps) as f32 };
    let piece = Piece { index, grad, out };
    each(threads, GRAIN, piece, |piece| wide(Spread { lines, piece }));
    Ok(())
}

#[derive(Clone, Copy)]
struct Lines<'a> {
    down: &'a [f64],
    across: &'a [f64],
    shape: Shape,
    floor: f32,
}

struct Piece<'a, P> {
    index: &'a [P],
    grad: Option<&'a [f32]>,
    out: &'a mut [f32],
}

impl<P: Position> Divide for Piece<'_, P> {
    fn len(&self) -> usize {
        self.out.len()
    }
    fn divide(self, at: usize) -> (Self, Self) {
        let (i, j) = self.index.split_at(at);
        let (g, h) = self.grad.map(|grad| grad.split_at(at)).unzip();
        let (x, y) = self.out.split_at_mut(at);
        (Piece { index: i, grad: g, out: x }, Piece { index: j, grad: h, out: y })
    }
}

struct Spread<'a, P> {
    lines: Lines<'a>,
    piece: Piece<'a, P>,
}

impl<P: Position> Loop for Spread<'_, P> {
    type Output = ();
    #[inline(always)]
    fn run(self, _: impl Isa) {
        let (Lines { down, across, shape, floor }, piece) = (self.lines, self.piece);
        let out = piece.out;
        shape.walk(piece.index, |row, here, start| {
            for (x, position) in out[here.clone()].iter_mut().zip(&piece.index[here]) {
                *x = (down[row] * across[position.at() - start]) as f32;
            }
        });
        if let Some(grad) = piece.grad {
            for (x, g) in out.iter_mut().zip(grad) {
                *x = 1.0 / at_least!(*x, floor).sqrt() * g;
            }
        }
    }
}

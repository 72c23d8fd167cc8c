//! Selected entries of the gradient of a linear layer: `out[e] = Σ_t dY[t, o] · X[t, i]` for the flat
//! positions `o·n_in + i` of an index, without the rest of `G = dYᵀX`.
//!
//! Both operands are packed feature by feature, a tile of tokens at a time, so that an entry is a dot
//! product of two contiguous rows. X goes to a panel that all threads share and that stays in the last
//! level of cache; a block of columns of dY is packed by the thread that uses it. Where the entries are
//! dense enough, such a block meets X in blocks of columns too, that stay in the second level of cache.
//! Features without a selected entry are not read.
//!
//! The sum of an entry has one order, whatever the threads and the processor: within a tile of 16
//! lines, 16 lanes with one fused multiply-add per element; the lanes in a fixed tree; then tile after
//! tile. A lane of 32 bits holds a token of f32 (f16 is widened to it) or two tokens of bf16, the later
//! of which is added first, as the processor's bf16 instruction does. That instruction takes numbers
//! below 2^-126 for zero, which is the only difference between processors.
//!
//! A weight that is stored transposed, `[n_in, n_out]` (Conv1D of GPT-2), has its entries at
//! `i·n_out + o`: swap the roles, `Product { dy: x, x: dy, n_out: n_in, n_in: n_out, .. }`.
mod isa;
mod lanes;
#[cfg(target_arch = "x86_64")]
mod x86;

use super::chunk::{Divide, check_len, each, install};
use crate::error::Result;
use crate::num::Position;
use crate::view::check_index;
use isa::{Isa, Work, best};
pub use lanes::Sample;
use lanes::{LANES, Line, pack};
use std::cell::Cell;
use std::ops::Range;

/// Lines of one feature in a tile of tokens: 1 KiB, which is 256 tokens of f32 and 512 of bf16.
const TILE: usize = 16;
/// Lines of the panel of X (2 MiB), if a tile is not larger.
const PANEL: usize = 1 << 15;
/// Features packed by one task: a few KiB of a token, which memory gives faster than scattered lines.
const FEATURES: usize = 512;
/// Columns of G in a block: their part of a tile (512 KiB) stays in the second level of cache.
const COLUMNS: usize = 512;
/// Rows of G in a block, at least and at most.
const ROWS: (usize, usize) = (64, 1024);
/// Blocks of rows for each thread: rows may differ in length.
const BLOCKS: usize = 4;
/// How often a block of rows must use a column on average, for blocks of columns to pay.
const REUSE: usize = 3;
/// Multiply-adds and packed elements below which handing over costs more than the work.
const SMALL: usize = 1 << 19;

/// The factors of `G = dYᵀX`, both row-major over tokens.
#[derive(Debug, Clone, Copy)]
pub struct Product<'a, T> {
    /// gradient of the output, `[tokens, n_out]`
    pub dy: &'a [T],
    /// input, `[tokens, n_in]`
    pub x: &'a [T],
    /// number of tokens; may be 0
    pub tokens: usize,
    /// rows of G
    pub n_out: usize,
    /// columns of G
    pub n_in: usize,
}

/// Computes the entries of G at `index`, ascending flat positions of the weight `name`, in f32. With
/// `accumulate` they are added to `out`, tile after tile.
pub fn selected_entries<T: Sample, P: Position>(
    threads: usize,
    name: &str,
    product: &Product<'_, T>,
    index: &[P],
    out: &mut [f32],
    accumulate: bool,
) -> Result<()> {
    let &Product { dy, x, tokens, n_out, n_in } = product;
    // A size beyond usize is the length of no slice, nor a bound that a position reaches.
    check_len("dY", dy.len(), tokens.saturating_mul(n_out))?;
    check_len("X", x.len(), tokens.saturating_mul(n_in))?;
    check_len("out", out.len(), index.len())?;
    check_index(name, index, n_out.saturating_mul(n_in))?;
    if !accumulate {
        out.fill(0.0);
    }
    if tokens == 0 || index.is_empty() {
        return Ok(());
    }
    let work = tokens.saturating_mul(n_in + n_out + index.len());
    let alone = threads <= 1 || work < SMALL;
    let mut scratch = SCRATCH.take();
    if alone {
        entries(None, product, index, out, &mut scratch);
    } else {
        // One hand-over for all phases.
        install(threads, || entries(Some(threads), product, index, out, &mut scratch));
    }
    SCRATCH.set(scratch);
    Ok(())
}

/// Memory that a thread keeps from call to call.
#[derive(Default)]
struct Scratch {
    /// the panel of X
    panel: Vec<Line>,
    /// where the entries of each row of G begin in the index, and where the last end
    starts: Vec<usize>,
    /// which blocks of `LANES` columns of G have an entry
    used: Vec<bool>,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
    /// apart from `SCRATCH`, since the thread that owns a panel takes tasks too
    static ROWS_OF_DY: Cell<RowsOfDy> = Cell::default();
}

/// A block of columns of dY, which are rows of G.
#[derive(Default)]
struct RowsOfDy {
    /// packed, for one tile of tokens
    lines: Vec<Line>,
    /// the offset in the index of each row's next entry
    next: Vec<usize>,
}

/// `n` lines of a buffer that grows.
fn room(lines: &mut Vec<Line>, n: usize) -> &mut [Line] {
    if lines.len() < n {
        lines.resize(n, Line::ZERO);
    }
    &mut lines[..n]
}

/// All of it, once the arguments are known to be right; alone or on the threads of a pool.
fn entries<T: Sample, P: Position>(
    threads: Option<usize>,
    product: &Product<'_, T>,
    index: &[P],
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    let &Product { dy, x, tokens, n_out, n_in } = product;
    let Scratch { panel, starts, used } = scratch;
    find_rows(index, n_out, n_in, starts);
    find_columns(index, starts, n_in, used);
    let tile = TILE * T::TOKENS;
    let batch = (PANEL / (n_in * TILE)).max(1) * tile;
    let block = block(threads.unwrap_or(1), n_out, n_in, index.len());
    for first in (0..tokens).step_by(batch) {
        let tokens = first..tokens.min(first + batch);
        let panel = room(panel, tokens.len().div_ceil(T::TOKENS) * n_in);
        let columns = Columns { data: x, width: n_in, tokens: tokens.clone() };
        let blocks = columns.tiles() * n_in.div_ceil(FEATURES);
        spread(threads, 1, Pack { columns: &columns, used, blocks: 0..blocks, to: panel });
        let columns = Columns { data: dy, width: n_out, tokens };
        let rows = Rows { dy: &columns, panel, n_in, index, starts, rows: 0..n_out, block, out };
        spread(threads, block.0, rows);
    }
}

/// How many rows and columns of G make a block. This changes no bit.
fn block(threads: usize, n_out: usize, n_in: usize, entries: usize) -> (usize, usize) {
    let rows = n_out.div_ceil(BLOCKS * threads).next_multiple_of(LANES).clamp(ROWS.0, ROWS.1);
    let reused = rows.saturating_mul(entries) / n_out >= n_in.saturating_mul(REUSE);
    (rows, if reused { COLUMNS } else { n_in })
}

/// Work in pieces of `grain`, or in one where there are no threads.
fn spread<W: Divide + Work>(threads: Option<usize>, grain: usize, work: W) {
    match threads {
        Some(threads) => each(threads, grain, work, best),
        None => best(work),
    }
}

/// Fills `starts` with the offset in the index of the first entry of each row, and the end.
fn find_rows<P: Position>(index: &[P], n_out: usize, n_in: usize, starts: &mut Vec<usize>) {
    starts.clear();
    starts.push(0);
    let mut at = 0;
    for row in 1..=n_out {
        // Gallop: rows are short, and most are about as long as the one before.
        let end = row * n_in;
        let mut step = 1;
        while at + step <= index.len() && index[at + step - 1].at() < end {
            at += step;
            step *= 2;
        }
        let high = index.len().min(at + step - 1);
        at += index[at..high].partition_point(|p| p.at() < end);
        starts.push(at);
    }
}

/// Fills `used`: whether any entry lies in each block of `LANES` columns.
fn find_columns<P: Position>(index: &[P], starts: &[usize], n_in: usize, used: &mut Vec<bool>) {
    used.clear();
    used.resize(n_in.div_ceil(LANES), false);
    let mut unused = used.len();
    for (row, ends) in starts.windows(2).enumerate() {
        if unused == 0 {
            return; // what a mask without structure gets to soon
        }
        for p in &index[ends[0]..ends[1]] {
            let block = &mut used[(p.at() - row * n_in) / LANES];
            unused -= usize::from(!*block);
            *block = true;
        }
    }
}

/// Consecutive tokens of a matrix `[tokens, width]`.
struct Columns<'a, T> {
    data: &'a [T],
    width: usize,
    tokens: Range<usize>,
}

impl<T: Sample> Columns<'_, T> {
    fn tiles(&self) -> usize {
        self.tokens.len().div_ceil(TILE * T::TOKENS)
    }

    /// Lines of a feature in a tile: fewer in the last.
    fn lines(&self, tile: usize) -> usize {
        TILE.min(self.tokens.len().div_ceil(T::TOKENS) - tile * TILE)
    }

    /// Packs features of a tile, those of a block of `LANES` that is wanted, feature after feature.
    #[inline(always)]
    fn pack(
        &self,
        isa: impl Isa,
        tile: usize,
        features: Range<usize>,
        wanted: impl Fn(usize) -> bool,
        to: &mut [Line],
    ) {
        let lines = self.lines(tile);
        for line in 0..lines {
            let token = self.tokens.start + (tile * TILE + line) * T::TOKENS;
            let tokens = T::TOKENS.min(self.tokens.end - token);
            for feature in features.clone().step_by(LANES) {
                if !wanted(feature) {
                    continue;
                }
                let width = LANES.min(features.end - feature);
                let src = &self.data[token * self.width + feature..];
                let to = &mut to[(feature - features.start) * lines + line..];
                if tokens == T::TOKENS && width == LANES {
                    isa.transpose(src, self.width, to, lines);
                } else {
                    pack(src, self.width, (tokens, width), to, lines);
                }
            }
        }
    }
}

/// Packing X: blocks of `FEATURES` features of a tile, tile after tile.
struct Pack<'a, T> {
    columns: &'a Columns<'a, T>,
    used: &'a [bool],
    blocks: Range<usize>,
    to: &'a mut [Line],
}

impl<T: Sample> Pack<'_, T> {
    /// A block's tile, its features, and where it is in the panel.
    fn place(&self, block: usize) -> (usize, Range<usize>, usize) {
        let width = self.columns.width;
        let per_tile = width.div_ceil(FEATURES);
        let (tile, first) = (block / per_tile, block % per_tile * FEATURES);
        let at = tile * TILE * width;
        if tile == self.columns.tiles() {
            return (tile, 0..0, at);
        }
        (tile, first..width.min(first + FEATURES), at + first * self.columns.lines(tile))
    }
}

impl<T: Sample> Divide for Pack<'_, T> {
    fn len(&self) -> usize {
        self.blocks.len()
    }
    fn divide(self, at: usize) -> (Self, Self) {
        let middle = self.blocks.start + at;
        let cut = self.place(middle).2 - self.place(self.blocks.start).2;
        let (a, b) = self.to.split_at_mut(cut);
        (
            Pack { blocks: self.blocks.start..middle, to: a, ..self },
            Pack { blocks: middle..self.blocks.end, to: b, ..self },
        )
    }
}

impl<T: Sample> Work for Pack<'_, T> {
    #[inline(always)]
    fn run(self, isa: impl Isa) {
        let base = self.place(self.blocks.start).2;
        for block in self.blocks.clone() {
            let (tile, features, at) = self.place(block);
            let to = &mut self.to[at - base..];
            self.columns.pack(isa, tile, features, |f| self.used[f / LANES], to);
        }
    }
}

/// Rows of G, for the tokens that the panel of X holds.
struct Rows<'a, T, P> {
    dy: &'a Columns<'a, T>,
    panel: &'a [Line],
    n_in: usize,
    index: &'a [P],
    starts: &'a [usize],
    rows: Range<usize>,
    /// rows and columns that are computed together
    block: (usize, usize),
    out: &'a mut [f32],
}

impl<T: Sample, P: Position> Divide for Rows<'_, T, P> {
    fn len(&self) -> usize {
        self.rows.len()
    }
    fn divide(self, at: usize) -> (Self, Self) {
        let middle = self.rows.start + at;
        let cut = self.starts[middle] - self.starts[self.rows.start];
        let (a, b) = self.out.split_at_mut(cut);
        (
            Rows { rows: self.rows.start..middle, out: a, ..self },
            Rows { rows: middle..self.rows.end, out: b, ..self },
        )
    }
}

impl<T: Sample, P: Position> Work for Rows<'_, T, P> {
    #[inline(always)]
    fn run(self, isa: impl Isa) {
        let mut scratch = ROWS_OF_DY.take();
        let RowsOfDy { lines, next } = &mut scratch;
        let base = self.starts[self.rows.start];
        for first in self.rows.clone().step_by(self.block.0) {
            let rows = first..self.rows.end.min(first + self.block.0);
            if self.starts[rows.start] == self.starts[rows.end] {
                continue;
            }
            for tile in 0..self.dy.tiles() {
                let n = self.dy.lines(tile);
                let y = room(lines, rows.len() * n);
                let wanted = |row: usize| self.starts[row] < self.starts[rows.end.min(row + LANES)];
                self.dy.pack(isa, tile, rows.clone(), wanted, y);
                let x = &self.panel[tile * TILE * self.n_in..][..n * self.n_in];
                next.clear();
                next.extend_from_slice(&self.starts[rows.clone()]);
                for column in (0..self.n_in).step_by(self.block.1) {
                    let end = self.n_in.min(column + self.block.1);
                    for ((row, at), y) in rows.clone().zip(&mut *next).zip(y.chunks_exact(n)) {
                        let index = &self.index[*at..self.starts[row + 1]];
                        let index = &index[..before(index, row * self.n_in, end, self.n_in)];
                        let to = &mut self.out[*at - base..][..index.len()];
                        dots::<T, P>(isa, y, x, row * self.n_in, index, to);
                        *at += index.len();
                    }
                }
            }
        }
        ROWS_OF_DY.set(scratch);
    }
}

/// How many entries of the rest of a row, which begins at `base`, come before column `end`.
#[inline(always)]
fn before<P: Position>(index: &[P], base: usize, end: usize, n_in: usize) -> usize {
    if end == n_in {
        return index.len();
    }
    index.iter().position(|p| p.at() - base >= end).unwrap_or(index.len())
}

/// Adds to `out` the products of a row of dY with the rows of X that the index says.
#[inline(always)]
fn dots<T: Sample, P: Position>(
    isa: impl Isa,
    y: &[Line],
    x: &[Line],
    base: usize,
    index: &[P],
    out: &mut [f32],
) {
    let row = |p: &P| &x[(p.at() - base) * y.len()..][..y.len()];
    let (fours, rest) = index.as_chunks::<4>();
    let (sums, out) = out.split_at_mut(4 * fours.len());
    for (p, out) in fours.iter().zip(sums.as_chunks_mut::<4>().0) {
        let sums = isa.dots::<T, 4>(y, [row(&p[0]), row(&p[1]), row(&p[2]), row(&p[3])]);
        for (out, sum) in out.iter_mut().zip(sums) {
            *out += sum;
        }
    }
    let sums = match rest {
        [] => return,
        [a] => isa.dots::<T, 1>(y, [row(a)]),
        [a, b] => isa.dots::<T, 2>(y, [row(a), row(b)]),
        [a, b, c, ..] => isa.dots::<T, 3>(y, [row(a), row(b), row(c)]),
    };
    for (out, sum) in out.iter_mut().zip(sums) {
        *out += sum;
    }
}

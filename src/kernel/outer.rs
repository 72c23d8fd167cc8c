//! Products of the samples of a batch, each mapped before it is added: `score += Σ_b map(L_bᵀ R_b)`.
//!
//! A sample of few tokens makes a thin product, which a library multiplies slowly, writes out, and
//! reads again for the map. Here a tile of `score` stays in registers while all samples pass: the sums
//! of one sample stand beside it and are mapped and added there. Both operands are packed for it, as a
//! panel of rows that a task keeps for all tiles beside it and a strip of columns.
//!
//! An element has one order of sums, whatever the threads, the processor and the tile: a sample's
//! product is one fused multiply-add for each token from zero on, and is added to `score` sample after
//! sample (a square with one rounding). So cutting a batch in two changes no bit either.
use super::chunk::{Divide, check_len, each};
use super::reduce::Map;
use super::wide::{Isa, LINE, Loop, wide};
use crate::error::Result;
use std::cell::Cell;
use std::ops::Range;

/// Rows of a tile. With two lines of columns that is twelve sums, enough in flight to hide how long one
/// takes, and the registers hold them twice; where registers are fewer, a tile has one line.
const ROWS: usize = 6;
/// Tokens that are packed together, if a sample has no more: what then waits for its tile is in L2.
const TOKENS: usize = 512;
/// Packed elements of a task's rows (4 MiB), for samples of many tokens.
const PACKED: usize = 1 << 20;
/// Rows of a task, at least and at most: many tiles share a strip of columns.
const TASK: (usize, usize) = (8 * ROWS, 64 * ROWS);
/// Multiply-adds below which handing over costs more than the work.
const SMALL: usize = 1 << 20;
/// Tokens whose rows are packed side by side.
const BESIDE: usize = 16;

/// The factors of a product for each sample, both row-major.
#[derive(Debug, Clone, Copy)]
pub struct Samples<'a> {
    /// `[samples, tokens, rows]`
    pub left: &'a [f32],
    /// `[samples, tokens, columns]`
    pub right: &'a [f32],
    /// number of samples; may be 0
    pub samples: usize,
    /// tokens of each; may be 0
    pub tokens: usize,
    /// rows of a product
    pub rows: usize,
    /// columns of a product
    pub columns: usize,
}

/// Adds `map` of the product `[rows, columns]` of each sample to `score`.
pub fn accumulate_outer(
    threads: usize,
    score: &mut [f32],
    samples: &Samples<'_>,
    map: Map,
) -> Result<()> {
    let &Samples { left, right, samples: count, tokens, rows, columns } = samples;
    // A size beyond usize is the length of no slice.
    let all = count.saturating_mul(tokens);
    check_len("left", left.len(), all.saturating_mul(rows))?;
    check_len("right", right.len(), all.saturating_mul(columns))?;
    check_len("score", score.len(), rows.saturating_mul(columns))?;
    if all == 0 || score.is_empty() {
        return Ok(());
    }
    let most = TASK.1.min(PACKED / tokens).max(TASK.0);
    let share = rows.div_ceil(2 * threads.max(1)).clamp(TASK.0, most).next_multiple_of(ROWS);
    let grain = if score.len().saturating_mul(all) < SMALL { rows } else { share };
    each(threads, grain, Part { samples, rows: 0..rows, score }, |part| wide(Add { part, map }));
    Ok(())
}

/// One cache line, so that no vector lies across two.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LINE]);

impl Line {
    const ZERO: Line = Line([0.0; LINE]);
}

/// Sums of `ROWS` rows and N lines of columns.
type Tile<I, const N: usize> = [[<I as Isa>::Line; N]; ROWS];

/// Memory that a thread keeps from call to call.
#[derive(Default)]
struct Scratch {
    /// rows of a task, `ROWS` by `ROWS`: `[panel, token]`
    panels: Vec<[f32; ROWS]>,
    /// the columns of a tile: `[token, line]`
    strip: Vec<Line>,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// `n` elements of a buffer that grows.
fn room<T: Clone>(buffer: &mut Vec<T>, n: usize, zero: T) -> &mut [T] {
    if buffer.len() < n {
        buffer.resize(n, zero);
    }
    &mut buffer[..n]
}

/// Some rows of the score.
struct Part<'a> {
    samples: &'a Samples<'a>,
    rows: Range<usize>,
    score: &'a mut [f32],
}

impl Divide for Part<'_> {
    fn len(&self) -> usize {
        self.rows.len()
    }
    fn divide(self, at: usize) -> (Self, Self) {
        let middle = self.rows.start + at;
        let (a, b) = self.score.split_at_mut(at * self.samples.columns);
        (
            Part { rows: self.rows.start..middle, score: a, ..self },
            Part { rows: middle..self.rows.end, score: b, ..self },
        )
    }
}

struct Add<'a> {
    part: Part<'a>,
    map: Map,
}

impl Loop for Add<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self, isa: impl Isa) {
        let mut scratch = SCRATCH.take();
        if isa.large() {
            self.tiles::<_, 2>(isa, &mut scratch);
        } else {
            self.tiles::<_, 1>(isa, &mut scratch);
        }
        SCRATCH.set(scratch);
    }
}

impl Add<'_> {
    /// In tiles of N lines of columns.
    #[inline(always)]
    fn tiles<I: Isa, const N: usize>(self, isa: I, scratch: &mut Scratch) {
        let Part { samples, rows, score } = self.part;
        let &Samples { left, right, tokens, columns, .. } = samples;
        let together = (TOKENS / tokens).max(1) * tokens;
        for first in (0..samples.samples * tokens).step_by(together) {
            let n = together.min(samples.samples * tokens - first);
            let panels = room(&mut scratch.panels, n * rows.len().div_ceil(ROWS), [0.0; ROWS]);
            pack_rows(&left[first * samples.rows..], samples.rows, &rows, n, panels);
            for column in (0..columns).step_by(N * LINE) {
                let strip = room(&mut scratch.strip, n * N, Line::ZERO).as_chunks_mut::<N>().0;
                pack_columns(&right[first * columns..], columns, column, strip);
                let tiles = score.chunks_mut(ROWS * columns).zip(panels.chunks_exact(n));
                for (score, panel) in tiles {
                    let sums = read(isa, score, columns, column);
                    let sums = add(isa, sums, panel, strip, tokens, self.map);
                    write(isa, sums, score, columns, column);
                }
            }
        }
    }
}

/// Packs `rows` of `n` tokens, which lie `width` apart; those of a panel that are not there are zero.
#[inline(always)]
fn pack_rows(src: &[f32], width: usize, rows: &Range<usize>, n: usize, to: &mut [[f32; ROWS]]) {
    for first in (0..n).step_by(BESIDE) {
        let tokens = first..n.min(first + BESIDE);
        for (row, to) in rows.clone().step_by(ROWS).zip(to.chunks_exact_mut(n)) {
            for (token, to) in tokens.clone().zip(&mut to[tokens.clone()]) {
                let from = &src[token * width..][row..rows.end.min(row + ROWS)];
                match from.first_chunk() {
                    Some(from) => *to = *from,
                    None => {
                        *to = [0.0; ROWS];
                        to[..from.len()].copy_from_slice(from);
                    }
                }
            }
        }
    }
}

/// Packs N lines of columns of all tokens, which lie `width` apart; columns that are not there are zero.
#[inline(always)]
fn pack_columns<const N: usize>(src: &[f32], width: usize, column: usize, to: &mut [[Line; N]]) {
    let whole = column + N * LINE <= width;
    for (to, from) in to.iter_mut().zip(src.chunks_exact(width)) {
        if whole {
            let from = from[column..].as_chunks::<LINE>().0;
            for (to, from) in to.iter_mut().zip(from) {
                to.0 = *from;
            }
        } else {
            *to = [Line::ZERO; N];
            for (to, from) in to.iter_mut().zip(from[column..].chunks(LINE)) {
                to.0[..from.len()].copy_from_slice(from);
            }
        }
    }
}

/// A tile of the score that begins at a column of some rows; what is outside of it is zero.
#[inline(always)]
fn read<I: Isa, const N: usize>(isa: I, rows: &[f32], width: usize, column: usize) -> Tile<I, N> {
    std::array::from_fn(|i| {
        let row = rows.get(i * width + column..(i + 1) * width).unwrap_or_default();
        std::array::from_fn(|j| {
            let from = row.get(j * LINE..).unwrap_or_default();
            let mut line = [0.0; LINE];
            match from.first_chunk() {
                Some(from) => line = *from,
                None => line[..from.len()].copy_from_slice(from),
            }
            isa.load(&line)
        })
    })
}

/// The inverse of `read`.
#[inline(always)]
fn write<I: Isa, const N: usize>(
    isa: I,
    tile: Tile<I, N>,
    rows: &mut [f32],
    width: usize,
    column: usize,
) {
    for (tile, row) in tile.iter().zip(rows.chunks_exact_mut(width)) {
        for (sums, to) in tile.iter().zip(row[column..].chunks_mut(LINE)) {
            let mut line = [0.0; LINE];
            isa.store(*sums, &mut line);
            to.copy_from_slice(&line[..to.len()]);
        }
    }
}

/// Adds the products of all packed samples to a tile. All but the operands stays in registers.
#[inline(always)]
fn add<I: Isa, const N: usize>(
    isa: I,
    mut sums: Tile<I, N>,
    panel: &[[f32; ROWS]],
    strip: &[[Line; N]],
    tokens: usize,
    map: Map,
) -> Tile<I, N> {
    for (left, right) in panel.chunks_exact(tokens).zip(strip.chunks_exact(tokens)) {
        let mut product = [[isa.splat(0.0); N]; ROWS];
        for (left, right) in left.iter().zip(right) {
            let right = right.each_ref().map(|line| isa.load(&line.0));
            for i in 0..ROWS {
                let left = isa.splat(left[i]);
                for j in 0..N {
                    product[i][j] = isa.multiply_add(left, right[j], product[i][j]);
                }
            }
        }
        for i in 0..ROWS {
            for j in 0..N {
                let (x, sum) = (product[i][j], sums[i][j]);
                sums[i][j] = match map {
                    Map::Id => isa.multiply_add(isa.splat(1.0), x, sum),
                    Map::Abs => isa.multiply_add(isa.splat(1.0), isa.abs(x), sum),
                    Map::Square => isa.multiply_add(x, x, sum),
                };
            }
        }
    }
    sums
}

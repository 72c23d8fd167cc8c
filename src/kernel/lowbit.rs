//! Numbers of 8 bits: block-wise dynamic quantisation (Dettmers et al., arXiv 2110.02861).
//!
//! A block of 256 numbers has one f32 scale, its largest magnitude, and for each number the code of the
//! nearest of 256 levels in [-1, 1], or in [0, 1]; half-way it is the lower one. Without signs a number
//! above 0 never gets the level 0: it would be divided by.
use super::chunk::{Divide, check_len, each};
use super::gather::GRAIN;
use super::wide::{Isa, Loop, wide};
use crate::error::Result;
use std::sync::LazyLock;

/// Numbers that share a scale. Pieces of work are cut between blocks.
pub const BLOCK: usize = 256;
const _: () = assert!(GRAIN.is_multiple_of(BLOCK));

const DECADES: [f64; 7] = [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6];
const SHIFT: u32 = 16;
/// The bits of 2^-23: no level but 0, and no bound, is as small.
const LOW: u32 = 0x3400_0000;
const ONE: u32 = 1.0f32.to_bits();
const CELLS: usize = 1 << 12; // for each sign; a power of two, so that no place needs a check
const _: () = assert!(((ONE - LOW) >> SHIFT) < CELLS as u32);

/// What codes stand for, and how the nearest is found.
///
/// A cell is the numbers that share sign, exponent and the first 7 bits of the mantissa. Levels are further
/// apart than a cell is wide, so that each number in it has the code of its lowest one, or the next.
struct Table {
    signed: bool,
    levels: [f32; 256],
    /// what lies half-way to the next level
    bounds: [f32; 256],
    /// the code of the lowest number in each cell, of positive and then of negative numbers
    first: [u8; 2 * CELLS],
}

static TABLES: LazyLock<[Table; 2]> = LazyLock::new(|| [Table::new(false), Table::new(true)]);

/// The 256 numbers that a code stands for, ascending.
///
/// The decade up to `10^-d` has `64 / 2^d` levels for each sign (`128 / 2^d` without signs), in the middle of
/// equal parts of its upper nine tenths. 0 and 1 are levels of their own; -1 is none.
pub fn levels(signed: bool) -> &'static [f32; 256] {
    &TABLES[usize::from(signed)].levels
}

impl Table {
    fn new(signed: bool) -> Self {
        let mut found = vec![0.0, 1.0];
        for (d, decade) in DECADES.iter().enumerate() {
            let parts = if signed { 64 } else { 128 } >> d;
            for i in 0..parts {
                let middle = (0.1 + 0.9 * (f64::from(i) + 0.5) / f64::from(parts)) * decade;
                found.push(middle);
                if signed {
                    found.push(-middle);
                }
            }
        }
        found.sort_by(f64::total_cmp);
        let mut table = Table {
            signed,
            levels: [0.0; 256],
            bounds: [f32::INFINITY; 256],
            first: [0; 2 * CELLS],
        };
        for (level, wide) in table.levels.iter_mut().zip(found) {
            *level = wide as f32;
        }
        for (bound, pair) in table.bounds.iter_mut().zip(table.levels.windows(2)) {
            *bound = ((f64::from(pair[0]) + f64::from(pair[1])) / 2.0) as f32;
        }
        for cell in 0..=((ONE - LOW) >> SHIFT) as usize {
            let bits = LOW + ((cell as u32) << SHIFT);
            let least = if cell == 0 { 0.0 } else { f32::from_bits(bits) };
            let most = -f32::from_bits(bits | ((1 << SHIFT) - 1));
            for (side, lowest) in [least, most].into_iter().enumerate() {
                let below = table.bounds.partition_point(|bound| *bound < lowest);
                table.first[side * CELLS + cell] = below as u8; // at most 255: the last bound is infinite
            }
        }
        table
    }

    /// The numbers of one block.
    #[inline(always)]
    fn widen(&self, codes: &[u8], scale: f32, out: &mut [f32]) {
        for (x, code) in out.iter_mut().zip(codes) {
            *x = self.levels[usize::from(*code)] * scale;
        }
    }

    /// The codes of one block, and its scale. NaN and infinity spoil the block, and are not hidden.
    #[inline(always)]
    fn narrow(&self, x: &[f32], codes: &mut [u8]) -> f32 {
        // Magnitudes are ordered as their bits are, and NaN is above infinity.
        let top = x.iter().fold(0, |top, x| (x.to_bits() & 0x7fff_ffff).max(top));
        let scale = f32::from_bits(top);
        let by = if top == 0 { 1.0 } else { scale };
        // Only the look-ups are not vector code: they have a loop of their own.
        let (mut shares, mut cells) = ([0.0f32; BLOCK], [0u32; BLOCK]);
        for ((share, cell), x) in shares.iter_mut().zip(&mut cells).zip(x) {
            *share = x / by;
            let bits = share.to_bits();
            let place = ((bits & 0x7fff_ffff).clamp(LOW, ONE) - LOW) >> SHIFT;
            *cell = place + (bits >> 31) * CELLS as u32;
        }
        for ((code, share), cell) in codes.iter_mut().zip(&shares).zip(&cells) {
            let first = self.first[*cell as usize & (2 * CELLS - 1)];
            *code = first + u8::from(*share > self.bounds[usize::from(first)]);
        }
        if !self.signed {
            for (code, x) in codes.iter_mut().zip(x) {
                *code = (*code).max(u8::from(*x > 0.0));
            }
        }
        scale
    }
}

/// Numbers as they are kept, to be changed.
#[derive(Debug)]
pub struct Codes<'a> {
    /// one for each number
    pub codes: &'a mut [u8],
    /// one for each block
    pub scale: &'a mut [f32],
}

impl Codes<'_> {
    /// Refuses codes and scales of other lengths than those of `n` numbers.
    pub(crate) fn check(&self, name: &str, n: usize) -> Result<()> {
        check_len(&format!("{name} codes"), self.codes.len(), n)?;
        check_len(&format!("{name} scale"), self.scale.len(), n.div_ceil(BLOCK))
    }
}

impl Divide for Codes<'_> {
    fn len(&self) -> usize {
        self.codes.len()
    }
    fn divide(self, at: usize) -> (Self, Self) {
        let (a, b) = self.codes.split_at_mut(at);
        let (s, t) = self.scale.split_at_mut(at / BLOCK);
        (Codes { codes: a, scale: s }, Codes { codes: b, scale: t })
    }
}

/// Two sets of numbers of 8 bits, with signs and without, that a loop changes block by block.
pub(crate) struct Both<'a>(pub(crate) Codes<'a>, pub(crate) Codes<'a>);

impl Both<'_> {
    /// Calls `f` with the place of each block and its numbers, which are rounded again afterwards.
    #[inline(always)]
    pub(crate) fn each_block(self, mut f: impl FnMut(usize, &mut [f32], &mut [f32])) {
        let [unsigned, signed] = &*TABLES;
        let blocks = self.0.codes.chunks_mut(BLOCK).zip(self.0.scale.iter_mut());
        let others = self.1.codes.chunks_mut(BLOCK).zip(self.1.scale.iter_mut());
        let (mut first, mut second) = ([0.0; BLOCK], [0.0; BLOCK]);
        for (i, ((c, s), (d, t))) in blocks.zip(others).enumerate() {
            let (a, b) = (&mut first[..c.len()], &mut second[..c.len()]);
            signed.widen(c, *s, a);
            unsigned.widen(d, *t, b);
            f(i * BLOCK, a, b);
            *s = signed.narrow(a, c);
            *t = unsigned.narrow(b, d);
        }
    }
}

/// `kept = x`, rounded.
pub fn quantise(threads: usize, x: &[f32], signed: bool, kept: Codes<'_>) -> Result<()> {
    kept.check("the", x.len())?;
    let table = &TABLES[usize::from(signed)];
    each(threads, GRAIN, Narrow { x, kept, table }, wide);
    Ok(())
}

struct Narrow<'a> {
    x: &'a [f32],
    kept: Codes<'a>,
    table: &'static Table,
}

impl Divide for Narrow<'_> {
    fn len(&self) -> usize {
        self.x.len()
    }
    fn divide(self, at: usize) -> (Self, Self) {
        let (x, y) = self.x.split_at(at);
        let (a, b) = self.kept.divide(at);
        let table = self.table;
        (Narrow { x, kept: a, table }, Narrow { x: y, kept: b, table })
    }
}

impl Loop for Narrow<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self, _: impl Isa) {
        let kept = self.kept.codes.chunks_mut(BLOCK).zip(self.kept.scale);
        for (x, (codes, scale)) in self.x.chunks(BLOCK).zip(kept) {
            *scale = self.table.narrow(x, codes);
        }
    }
}

/// `out` = the numbers that codes and scales stand for.
pub fn dequantise(
    threads: usize,
    codes: &[u8],
    scale: &[f32],
    signed: bool,
    out: &mut [f32],
) -> Result<()> {
    check_len("codes", codes.len(), out.len())?;
    check_len("scale", scale.len(), out.len().div_ceil(BLOCK))?;
    let table = &TABLES[usize::from(signed)];
    each(threads, GRAIN, Widen { codes, scale, out, table }, wide);
    Ok(())
}

struct Widen<'a> {
    codes: &'a [u8],
    scale: &'a [f32],
    out: &'a mut [f32],
    table: &'static Table,
}

impl Divide for Widen<'_> {
    fn len(&self) -> usize {
        self.out.len()
    }
    fn divide(self, at: usize) -> (Self, Self) {
        let (c, d) = self.codes.split_at(at);
        let (s, t) = self.scale.split_at(at / BLOCK);
        let (x, y) = self.out.split_at_mut(at);
        let table = self.table;
        (Widen { codes: c, scale: s, out: x, table }, Widen { codes: d, scale: t, out: y, table })
    }
}

impl Loop for Widen<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self, _: impl Isa) {
        let blocks = self.codes.chunks(BLOCK).zip(self.scale);
        for ((codes, scale), out) in blocks.zip(self.out.chunks_mut(BLOCK)) {
            self.table.widen(codes, *scale, out);
        }
    }
}

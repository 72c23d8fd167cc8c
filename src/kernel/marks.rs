//! Marks: one bit for each element of many tensors, and the ascending positions that they stand for.
use super::chunk::CHUNK;
use super::made::Made;
use super::wide::{Isa, Loop, WORD, wide};
use crate::num::{Element, Position};
use crate::view::Positions;
use rayon::prelude::*;

/// A run of scores of one part.
#[derive(Clone, Copy)]
pub(super) struct Chunk<'a, T> {
    pub(super) part: usize,
    /// position of its first score in the part
    pub(super) first: usize,
    /// the scores, or what they are made of
    values: &'a [T],
    made: Option<Made<'a, T>>,
}

impl<'a, T: Element> Chunk<'a, T> {
    /// How many scores.
    pub(super) fn len(&self) -> usize {
        self.values.len()
    }

    /// Its scores; those that have to be made stand in `room`.
    pub(super) fn scores<'b>(&self, room: &'b mut Vec<T>) -> &'b [T]
    where
        'a: 'b,
    {
        match &self.made {
            None => self.values,
            Some(made) => made.fill(self.values, room),
        }
    }

    /// The scores from position `at` of the chunk on, a few of them.
    pub(super) fn some(&self, at: usize, most: usize) -> impl Iterator<Item = T> {
        let end = self.values.len().min(at + most);
        (at..end).map(|i| match &self.made {
            None => self.values[i],
            Some(made) => made.one(self.values, i),
        })
    }
}

/// All parts, cut into chunks in order.
pub(super) fn chunks<'a, T>(parts: &[(&str, &'a [T])]) -> Vec<Chunk<'a, T>> {
    let mut all = Vec::new();
    for (part, (_, values)) in parts.iter().enumerate() {
        let cut = values.chunks(CHUNK).enumerate();
        all.extend(cut.map(|(i, values)| Chunk { part, first: i * CHUNK, values, made: None }));
    }
    all
}

/// The same, of scores that are made of these values.
pub(super) fn made_chunks<'a, T: Element>(
    parts: &[(&str, &'a [T])],
    made: &[Made<'a, T>],
) -> Vec<Chunk<'a, T>> {
    let mut all = chunks(parts);
    for c in &mut all {
        c.made = Some(made[c.part].piece(c.first, c.values.len()));
    }
    all
}

/// One word of marks for every 64 elements of each chunk, all zero.
pub(super) fn blank<T>(chunks: &[Chunk<'_, T>]) -> Vec<u64> {
    vec![0; chunks.iter().map(|c| c.values.len().div_ceil(WORD)).sum()]
}

/// The words of each chunk.
pub(super) fn words<'a, T>(marks: &'a mut [u64], chunks: &[Chunk<'_, T>]) -> Vec<&'a mut [u64]> {
    let mut rest = marks;
    let mut cut = |c: &Chunk<'_, T>| {
        let (mine, after) = std::mem::take(&mut rest).split_at_mut(c.values.len().div_ceil(WORD));
        rest = after;
        mine
    };
    chunks.iter().map(&mut cut).collect()
}

/// A place for the positions that one chunk selects.
enum Slot<'a> {
    Small(&'a mut [i32]),
    Large(&'a mut [i64]),
}

impl<'a> Slot<'a> {
    fn split(self, at: usize) -> (Slot<'a>, Slot<'a>) {
        match self {
            Slot::Small(out) => {
                let (a, b) = out.split_at_mut(at);
                (Slot::Small(a), Slot::Small(b))
            }
            Slot::Large(out) => {
                let (a, b) = out.split_at_mut(at);
                (Slot::Large(a), Slot::Large(b))
            }
        }
    }
}

/// Room for `count` positions of a tensor of `len` elements.
pub(super) fn room(len: usize, count: usize) -> Positions {
    if len < 1 << 31 { Positions::Small(vec![0; count]) } else { Positions::Large(vec![0; count]) }
}

/// The positions of each part. `take` says how many marks each chunk will have; `finish` completes the
/// marks of a chunk just before they are read.
pub(super) fn positions<T: Sync>(
    parts: &[(&str, &[T])],
    chunks: &[Chunk<'_, T>],
    marks: &mut [u64],
    take: &[usize],
    finish: impl Fn(usize, &mut [u64]) + Sync,
) -> Vec<Positions> {
    let mut totals = vec![0; parts.len()];
    chunks.iter().zip(take).for_each(|(c, n)| totals[c.part] += n);
    let mut all: Vec<_> = parts.iter().zip(totals).map(|((_, x), n)| room(x.len(), n)).collect();
    let mut slots = Vec::with_capacity(chunks.len());
    let mut counts = chunks.iter().zip(take).peekable();
    for (part, positions) in all.iter_mut().enumerate() {
        let mut rest = match positions {
            Positions::Small(out) => Slot::Small(out),
            Positions::Large(out) => Slot::Large(out),
        };
        while let Some((_, n)) = counts.next_if(|(c, _)| c.part == part) {
            let (mine, after) = rest.split(*n);
            slots.push(mine);
            rest = after;
        }
    }
    let work = words(marks, chunks).into_par_iter().zip(slots).zip(chunks).enumerate();
    work.for_each(|(i, ((words, slot), c))| {
        finish(i, words);
        match slot {
            Slot::Small(out) => wide(Decode { words, first: c.first, out }),
            Slot::Large(out) => wide(Decode { words, first: c.first, out }),
        }
    });
    all
}

/// One byte for each element: 1 where it is marked. `finish` as for `positions`.
pub(super) fn bytes<T: Sync>(
    chunks: &[Chunk<'_, T>],
    marks: &mut [u64],
    finish: impl Fn(usize, &mut [u64]) + Sync,
    out: &mut [u8],
) {
    let work = words(marks, chunks).into_par_iter().zip(out.par_chunks_mut(CHUNK)).enumerate();
    work.for_each(|(i, (words, out))| {
        finish(i, words);
        wide(Spread { words, out });
    });
}

struct Spread<'a> {
    words: &'a [u64],
    out: &'a mut [u8],
}

impl Loop for Spread<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self, _: impl Isa) {
        let (blocks, tail) = self.out.as_chunks_mut::<WORD>();
        for (block, word) in blocks.iter_mut().zip(self.words) {
            for (eight, bits) in block.as_chunks_mut::<8>().0.iter_mut().zip(word.to_le_bytes()) {
                // byte i keeps bit i alone, and the sum carries it to the top of its byte
                let apart = (u64::from(bits) * 0x0101_0101_0101_0101) & 0x8040_2010_0804_0201;
                let ones = ((apart + 0x7f7f_7f7f_7f7f_7f7f) >> 7) & 0x0101_0101_0101_0101;
                *eight = ones.to_le_bytes();
            }
        }
        if let Some(word) = self.words.last() {
            tail.iter_mut().enumerate().for_each(|(j, out)| *out = (word >> j & 1) as u8);
        }
    }
}

struct Decode<'a, P> {
    words: &'a [u64],
    first: usize,
    out: &'a mut [P],
}

/// Words decoded at a time.
const GROUP: usize = 16;
/// How many bits a word has cannot be predicted: so many positions are written at a time, whether the
/// word has them or not.
const BATCH: usize = 4;

impl<P: Position> Loop for Decode<'_, P> {
    type Output = ();
    #[inline(always)]
    fn run(self, _: impl Isa) {
        let mut buffer = [0u32; GROUP * WORD + BATCH];
        let mut done = 0;
        for (g, group) in self.words.chunks(GROUP).enumerate() {
            let mut n = 0;
            for (i, word) in group.iter().enumerate() {
                let (mut rest, mut next) = (*word, n);
                loop {
                    for slot in &mut buffer[next..next + BATCH] {
                        *slot = (i * WORD) as u32 + rest.trailing_zeros();
                        rest &= rest.wrapping_sub(1);
                    }
                    if rest == 0 {
                        break;
                    }
                    next += BATCH;
                }
                n += word.count_ones() as usize;
            }
            let base = self.first + g * GROUP * WORD;
            for (out, at) in self.out[done..].iter_mut().zip(&buffer[..n]) {
                *out = P::new(base + *at as usize);
            }
            done += n;
        }
    }
}

//! Counter-based random numbers: Philox4x32-10 (Salmon et al., 2011).
//!
//! A number is a function of (seed, stream, position) and of nothing before it, so any range can be
//! made by any thread, in any order, with the same result.
use super::chunk::{CHUNK, Divide, each};
use super::wide::{Isa, Loop, WORD, wide};

const MULTIPLY: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Blocks computed together: they have the numbers of one word of bits.
const LANES: usize = WORD / 4;

/// Philox4x32-10: four random words for a counter and a key.
#[inline(always)]
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let ([mut a, mut b, mut c, mut d], [mut k, mut l]) = (counter, key);
    for _ in 0..10 {
        let x = u64::from(MULTIPLY[0]) * u64::from(a);
        let y = u64::from(MULTIPLY[1]) * u64::from(c);
        (a, b, c, d) = ((y >> 32) as u32 ^ b ^ k, y as u32, (x >> 32) as u32 ^ d ^ l, x as u32);
        (k, l) = (k.wrapping_add(WEYL[0]), l.wrapping_add(WEYL[1]));
    }
    [a, b, c, d]
}

/// The stream of a name (64-bit FNV-1a of its UTF-8 bytes).
pub fn stream(name: &str) -> u64 {
    name.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// Uniform numbers in [0, 1), multiples of 2⁻²⁴; element i depends on (seed, stream, i) alone.
pub fn uniform(threads: usize, seed: u64, stream: u64, out: &mut [f32]) {
    each(threads, CHUNK, Range { first: 0, out }, |range| wide(Fill { seed, stream, range }));
}

/// The same for the positions from `first` on.
#[inline(always)]
pub(super) fn fill(seed: u64, stream: u64, first: usize, out: &mut [f32]) {
    let skip = first % 4;
    let (head, rest) = out.split_at_mut(((4 - skip) % 4).min(out.len()));
    if !head.is_empty() {
        let key = [seed as u32, (seed >> 32) as u32];
        let block = (first / 4) as u64;
        let counter = [block as u32, (block >> 32) as u32, stream as u32, (stream >> 32) as u32];
        let words = philox(counter, key);
        head.iter_mut().zip(&words[skip..]).for_each(|(out, word)| *out = unit(*word));
    }
    groups(seed, stream, first + head.len(), rest);
}

/// One bit for each position: set where the uniform number is below `share`. Word i has the positions from
/// 64 i on, as little-endian bytes.
pub fn draw(threads: usize, seed: u64, stream: u64, share: f32, out: &mut [u8]) {
    let (out, _) = out.as_chunks_mut();
    let work = Range { first: 0, out };
    each(threads, CHUNK / WORD, work, |range| wide(Draw { seed, stream, share, range }));
}

/// The bits of the positions from `64 * word` on.
#[inline(always)]
pub(super) fn bits(isa: impl Isa, seed: u64, stream: u64, share: f32, word: usize) -> u64 {
    // A number is the upper 24 bits of a word by 2^24: below `share` are the words below this limit.
    let limit = (f64::from(share) * 16_777_216.0).ceil() as u64 * 256;
    if limit == 0 {
        return 0;
    }
    let mut words = [[0; 4]; LANES];
    side_by_side(seed, stream, (word * LANES) as u64, &mut words);
    let Some(words) = words.as_flattened().first_chunk() else { return 0 };
    !isa.above(words, u32::try_from(limit - 1).unwrap_or(u32::MAX))
}

struct Draw<'a> {
    seed: u64,
    stream: u64,
    share: f32,
    range: Range<'a, [u8; 8]>,
}

impl Loop for Draw<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self, isa: impl Isa) {
        let Draw { seed, stream, share, range: Range { first, out } } = self;
        for (i, out) in out.iter_mut().enumerate() {
            *out = bits(isa, seed, stream, share, first + i).to_le_bytes();
        }
    }
}

/// A word as a number in [0, 1).
#[inline(always)]
fn unit(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / 16_777_216.0)
}

/// Numbers from position `first` on, a multiple of four.
#[inline(always)]
fn groups(seed: u64, stream: u64, first: usize, out: &mut [f32]) {
    let mut words = [[0; 4]; LANES];
    for (g, group) in out.chunks_mut(4 * LANES).enumerate() {
        side_by_side(seed, stream, (first / 4 + g * LANES) as u64, &mut words);
        group.iter_mut().zip(words.as_flattened()).for_each(|(out, word)| *out = unit(*word));
    }
}

/// The words of `LANES` blocks from `block` on: each step of the rounds is a vector operation. A word lies
/// in the low half of a lane of 64 bits, where a product has room; what is above it is not looked at.
#[inline(always)]
fn side_by_side(seed: u64, stream: u64, block: u64, words: &mut [[u32; 4]; LANES]) {
    let low = |x: u64| x & u64::from(u32::MAX);
    let [mut k, mut l] = [seed as u32, (seed >> 32) as u32];
    let (mut a, mut b) = ([0_u64; LANES], [0_u64; LANES]);
    let (mut c, mut d) = ([low(stream); LANES], [stream >> 32; LANES]);
    for i in 0..LANES {
        a[i] = block + i as u64;
        b[i] = (block + i as u64) >> 32;
    }
    for _ in 0..10 {
        for i in 0..LANES {
            let x = u64::from(MULTIPLY[0]) * low(a[i]);
            let y = u64::from(MULTIPLY[1]) * low(c[i]);
            (a[i], b[i]) = (y >> 32 ^ b[i] ^ u64::from(k), y);
            (c[i], d[i]) = (x >> 32 ^ d[i] ^ u64::from(l), x);
        }
        (k, l) = (k.wrapping_add(WEYL[0]), l.wrapping_add(WEYL[1]));
    }
    for (i, words) in words.iter_mut().enumerate() {
        *words = [a[i] as u32, b[i] as u32, c[i] as u32, d[i] as u32];
    }
}

struct Fill<'a> {
    seed: u64,
    stream: u64,
    range: Range<'a, f32>,
}

impl Loop for Fill<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self, _: impl Isa) {
        groups(self.seed, self.stream, self.range.first, self.range.out);
    }
}

/// Numbers, or words of bits, from the `first` one of the stream on.
struct Range<'a, T> {
    first: usize,
    out: &'a mut [T],
}

impl<T: Send> Divide for Range<'_, T> {
    fn len(&self) -> usize {
        self.out.len()
    }
    fn divide(self, at: usize) -> (Self, Self) {
        let (a, b) = self.out.split_at_mut(at);
        (Range { first: self.first, out: a }, Range { first: self.first + at, out: b })
    }
}

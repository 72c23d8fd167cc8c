//! Bits of any tensor, as raw bytes: what differs, what a patch makes of it, and the fingerprint.
use super::chunk::{CHUNK, install};
use crate::error::{Error, Result};
use crate::num::Position;
use crate::view::{Index, Positions, check_index};
use crate::with_index;
use rayon::prelude::*;

/// Bytes that a patched stretch is copied in: small beside a tensor, large enough for all threads.
const BLOCK: usize = 4 << 20;

/// Runs `$body` with `$word` as the unsigned integer of `$width` bytes.
macro_rules! with_width {
    ($width:expr, $word:ident => $body:expr) => {
        match $width {
            1 => {
                type $word = u8;
                $body
            }
            2 => {
                type $word = u16;
                $body
            }
            4 => {
                type $word = u32;
                $body
            }
            8 => {
                type $word = u64;
                $body
            }
            other => Err(Error::Value {
                name: "width".to_string(),
                rule: "1, 2, 4 or 8 bytes".to_string(),
                got: other.to_string(),
            }),
        }
    };
}

/// Positions of the elements of `width` bytes whose bits differ.
pub fn diff(threads: usize, width: usize, a: &[u8], b: &[u8]) -> Result<Positions> {
    Ok(diff_up_to(threads, width, a, b, usize::MAX)?.1.unwrap_or(Positions::Small(Vec::new())))
}

/// How many elements differ, and which if there are at most `most`.
pub fn diff_up_to(
    threads: usize,
    width: usize,
    a: &[u8],
    b: &[u8],
    most: usize,
) -> Result<(usize, Option<Positions>)> {
    with_width!(width, Word => {
        let counts = counts::<Word>(threads, a, b)?;
        let count = counts.iter().sum();
        if count > most {
            return Ok((count, None));
        }
        let found = if a.len() / width < 1 << 31 {
            Positions::Small(positions::<Word, i32>(threads, a, b, &counts))
        } else {
            Positions::Large(positions::<Word, i64>(threads, a, b, &counts))
        };
        Ok((count, Some(found)))
    })
}

/// An element as an integer.
trait Word: Copy + PartialEq {
    const WIDTH: usize;
    fn of(bytes: &[u8]) -> Self;
}
macro_rules! word {
    ($($t:ty),*) => {$(impl Word for $t {
        const WIDTH: usize = size_of::<$t>();
        #[inline(always)]
        fn of(bytes: &[u8]) -> Self {
            let mut word = [0; size_of::<$t>()];
            word.copy_from_slice(bytes);
            <$t>::from_ne_bytes(word)
        }
    })*};
}
word!(u8, u16, u32, u64);

/// Elements that one bit mask covers.
const LANES: usize = 64;

fn counts<W: Word>(threads: usize, a: &[u8], b: &[u8]) -> Result<Vec<usize>> {
    let bad = |name: &str, got, want| Err(Error::Length { name: name.to_string(), got, want });
    if a.len() != b.len() {
        return bad("the second tensor (in bytes)", b.len(), a.len());
    }
    if !a.len().is_multiple_of(W::WIDTH) {
        return bad("the tensor (in bytes)", a.len(), a.len() / W::WIDTH * W::WIDTH);
    }
    let size = CHUNK * W::WIDTH;
    let one = |(a, b): (&[u8], &[u8])| -> usize {
        let (a, b) = (a.chunks(LANES * W::WIDTH), b.chunks(LANES * W::WIDTH));
        a.zip(b).map(|(a, b)| differing::<W>(a, b)).sum()
    };
    Ok(if a.len() <= size {
        a.chunks(size).zip(b.chunks(size)).map(one).collect()
    } else {
        install(threads, || a.par_chunks(size).zip(b.par_chunks(size)).map(one).collect())
    })
}

/// How many of at most `LANES` elements differ.
#[inline(always)]
fn differing<W: Word>(a: &[u8], b: &[u8]) -> usize {
    let pairs = a.chunks_exact(W::WIDTH).zip(b.chunks_exact(W::WIDTH));
    usize::from(pairs.map(|(x, y)| u8::from(W::of(x) != W::of(y))).sum::<u8>())
}

fn positions<W: Word, P: Position>(threads: usize, a: &[u8], b: &[u8], counts: &[usize]) -> Vec<P> {
    let mut out = vec![P::new(0); counts.iter().sum()];
    let mut rest = out.as_mut_slice();
    let mut pieces = Vec::with_capacity(counts.len());
    for (chunk, &count) in counts.iter().enumerate().filter(|(_, c)| **c > 0) {
        let (piece, tail) = rest.split_at_mut(count);
        pieces.push((chunk, piece));
        rest = tail;
    }
    let size = CHUNK * W::WIDTH;
    let one = |(chunk, out): (usize, &mut [P])| {
        let bytes = chunk * size..((chunk + 1) * size).min(a.len());
        let (a, b) = (&a[bytes.clone()], &b[bytes]);
        let mut out = out.iter_mut();
        let (a, b) = (a.chunks(LANES * W::WIDTH), b.chunks(LANES * W::WIDTH));
        for (block, (a, b)) in a.zip(b).enumerate() {
            if a == b {
                continue;
            }
            let pairs = a.chunks_exact(W::WIDTH).zip(b.chunks_exact(W::WIDTH));
            let mut mask = 0_u64;
            for (i, (x, y)) in pairs.enumerate() {
                mask |= u64::from(W::of(x) != W::of(y)) << i;
            }
            while mask != 0 {
                if let Some(slot) = out.next() {
                    *slot = P::new(chunk * CHUNK + block * LANES + mask.trailing_zeros() as usize);
                }
                mask &= mask - 1;
            }
        }
    };
    match pieces.len() {
        0 => {}
        1 => pieces.into_iter().for_each(one),
        _ => install(threads, || pieces.into_par_iter().for_each(one)),
    }
    out
}

/// New bytes for the elements at some positions of a tensor.
#[derive(Debug, Clone, Copy)]
pub struct Changes<'a> {
    index: Index<'a>,
    values: &'a [u8],
    width: usize,
}

impl<'a> Changes<'a> {
    /// Checks the positions against a tensor of `len` bytes; `values` holds `width` bytes for each.
    pub fn new(
        name: &str,
        index: Index<'a>,
        values: &'a [u8],
        width: usize,
        len: usize,
    ) -> Result<Self> {
        let count = index.len();
        if count.checked_mul(width) != Some(values.len()) {
            let name = format!("values of {name} (in bytes)");
            return Err(Error::Length { name, got: values.len(), want: count * width });
        }
        let numel = len.checked_div(width).unwrap_or(0);
        with_index!(index, i => check_index(name, i, numel))?;
        Ok(Changes { index, values, width })
    }
}

/// Hands the bytes of a tensor to `f` in order, as if the patch had been applied. What the patch does
/// not reach comes as it lies; the rest is copied one block at a time.
pub fn patched(
    bytes: &[u8],
    patch: Option<Changes<'_>>,
    mut f: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let Some(Changes { index, values, width }) = patch else { return f(bytes) };
    with_index!(index, index => {
        let mut block = Vec::new();
        let (mut at, mut i) = (0, 0);
        while i < index.len() {
            let begin = index[i].at() * width / BLOCK * BLOCK;
            if begin > at {
                f(&bytes[at..begin])?;
            }
            at = (begin + BLOCK).min(bytes.len());
            block.clear();
            block.extend_from_slice(&bytes[begin..at]);
            let end = i + index[i..].partition_point(|p| p.at() * width < at);
            let pairs = index[i..end].iter().zip(values[i * width..end * width].chunks_exact(width));
            for (p, value) in pairs {
                let p = p.at() * width - begin;
                block[p..p + width].copy_from_slice(value);
            }
            i = end;
            f(&block)?;
        }
        if at < bytes.len() { f(&bytes[at..]) } else { Ok(()) }
    })
}

/// The bytes of the elements at the positions of `index`.
pub fn take(name: &str, width: usize, bytes: &[u8], index: Index<'_>) -> Result<Vec<u8>> {
    with_index!(index, index => {
        check_index(name, index, bytes.len().checked_div(width).unwrap_or(0))?;
        let mut out = Vec::with_capacity(index.len() * width);
        for p in index {
            out.extend_from_slice(&bytes[p.at() * width..(p.at() + 1) * width]);
        }
        Ok(out)
    })
}

/// The hash of one tensor: BLAKE3 of dtype, shape and bytes, its first 128 bits.
#[derive(Debug, Clone)]
pub struct Hash(blake3::Hasher);

impl Hash {
    /// Begins with a header that no other dtype and shape share: every part has a length before it.
    pub fn new(dtype: &str, shape: &[usize]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"retouch tensor 1");
        hasher.update(&(dtype.len() as u64).to_le_bytes());
        hasher.update(dtype.as_bytes());
        hasher.update(&(shape.len() as u64).to_le_bytes());
        for &n in shape {
            hasher.update(&(n as u64).to_le_bytes());
        }
        Hash(hasher)
    }
    /// Takes the next bytes.
    pub fn update(&mut self, threads: usize, bytes: &[u8]) {
        if threads < 2 || bytes.len() < 1 << 18 {
            self.0.update(bytes);
        } else {
            install(threads, || self.0.update_rayon(bytes));
        }
    }
    /// 32 hex digits.
    pub fn finish(&self) -> String {
        let mut hex = self.0.finalize().to_hex().to_string();
        hex.truncate(32);
        hex
    }
}

/// The hash of a tensor, as if the elements at the positions of `patch` held its bytes.
pub fn fingerprint(
    threads: usize,
    dtype: &str,
    shape: &[usize],
    bytes: &[u8],
    patch: Option<(Index<'_>, &[u8])>,
) -> Result<String> {
    let patch = match patch {
        Some((index, values)) => match index.len() {
            0 => Some(Changes::new("fingerprint", index, values, 0, bytes.len())?),
            n => Some(Changes::new("fingerprint", index, values, values.len() / n, bytes.len())?),
        },
        None => None,
    };
    let mut hash = Hash::new(dtype, shape);
    patched(bytes, patch, |block| {
        hash.update(threads, block);
        Ok(())
    })?;
    Ok(hash.finish())
}

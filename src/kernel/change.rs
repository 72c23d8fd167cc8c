//! Differences in compact forms, decoded exactly, and added to a tensor with one rounding.
use super::chunk::check_len;
use crate::error::{Error, Result};
use crate::num::Element;
use half::{bf16, f16};

fn floats(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

/// Float32 numbers as they lie.
pub fn plain(bytes: &[u8]) -> Vec<f32> {
    floats(bytes).collect()
}

/// `count` times a magnitude with the signs of `bits`, the first in the lowest bit, 1 for negative.
pub fn signs(bits: &[u8], scale: &[u8], count: usize) -> Result<Vec<f32>> {
    check_len("bits", bits.len(), count.div_ceil(8))?;
    check_len("scale (in bytes)", scale.len(), 4)?;
    let size = floats(scale).next().unwrap_or(0.0);
    let one = |i: usize| if bits[i / 8] >> (i % 8) & 1 == 1 { -size } else { size };
    Ok((0..count).map(one).collect())
}

/// Integers times the scale of their block; of `bits` 8 (signed) or 4 (plus 8, the first in the low half).
pub fn integers(
    bits: usize,
    codes: &[u8],
    scales: &[u8],
    block: usize,
    count: usize,
) -> Result<Vec<f32>> {
    check_len("codes", codes.len(), (count * bits).div_ceil(8))?;
    let blocks = count.checked_div(block).map(|_| count.div_ceil(block));
    check_len("scale (in bytes)", scales.len(), blocks.unwrap_or(usize::MAX / 4) * 4)?;
    let scales = plain(scales);
    let code = |i: usize| match bits {
        4 => f32::from((codes[i / 2] >> (i % 2 * 4) & 15) as i8 - 8),
        _ => f32::from(codes[i] as i8),
    };
    Ok((0..count).map(|i| code(i) * scales[i / block]).collect())
}

/// The product of `up` [rows, rank] and `down` [rank, columns]: each number is a sum over the ranks in
/// order, in f64, where the product of two f32 is exact.
pub fn product(up: &[u8], down: &[u8], rows: usize, columns: usize) -> Result<Vec<f32>> {
    let rank = up.len().checked_div(rows * 4).unwrap_or(0);
    check_len("up (in bytes)", up.len(), rows * rank * 4)?;
    check_len("down (in bytes)", down.len(), rank * columns * 4)?;
    let (up, down) = (plain(up), plain(down));
    let mut out = Vec::with_capacity(rows * columns);
    let mut row = vec![0.0_f64; columns];
    for r in 0..rows {
        row.fill(0.0);
        for k in 0..rank {
            let left = f64::from(up[r * rank + k]);
            let right = &down[k * columns..(k + 1) * columns];
            row.iter_mut().zip(right).for_each(|(x, y)| *x += left * f64::from(*y));
        }
        out.extend(row.iter().map(|x| *x as f32));
    }
    Ok(out)
}

/// The bytes of a tensor plus numbers: added in f32 (f64 to F64) and rounded once.
pub fn add(name: &str, dtype: &str, base: &[u8], numbers: &[f32]) -> Result<Vec<u8>> {
    fn with<const N: usize>(
        base: &[u8],
        numbers: &[f32],
        one: impl Fn([u8; N], f32) -> [u8; N],
    ) -> Result<Vec<u8>> {
        check_len("the tensor (in bytes)", base.len(), numbers.len() * N)?;
        let mut out = Vec::with_capacity(base.len());
        for (bytes, number) in base.chunks_exact(N).zip(numbers) {
            let mut word = [0; N];
            word.copy_from_slice(bytes);
            out.extend_from_slice(&one(word, *number));
        }
        Ok(out)
    }
    match dtype {
        "F64" => with(base, numbers, |b, x| (f64::from_le_bytes(b) + f64::from(x)).to_le_bytes()),
        "F32" => with(base, numbers, |b, x| (f32::from_le_bytes(b) + x).to_le_bytes()),
        "F16" => with(base, numbers, |b, x| {
            <f16 as Element>::from_f32(Element::to_f32(f16::from_le_bytes(b)) + x).to_le_bytes()
        }),
        "BF16" => with(base, numbers, |b, x| {
            <bf16 as Element>::from_f32(Element::to_f32(bf16::from_le_bytes(b)) + x).to_le_bytes()
        }),
        other => Err(Error::Value {
            name: name.to_string(),
            rule: "a tensor of F64, F32, F16 or BF16, to which numbers can be added".to_string(),
            got: other.to_string(),
        }),
    }
}

//! Ascending positions as gaps of 16 bits: the first position, then each distance less one.
use crate::error::{Error, Result};
use crate::num::Position;
use crate::view::{Index, Positions};
use crate::with_index;

/// Whether the first position and every gap fit 16 bits.
pub fn fits_gap16(index: Index<'_>) -> bool {
    with_index!(index, index => {
        index.first().is_none_or(|p| p.at() < 1 << 16)
            && index.windows(2).all(|w| w[1].at().wrapping_sub(w[0].at()) <= 1 << 16)
    })
}

/// Little-endian gaps of the positions `from..to`; they must fit.
pub fn gap16(index: Index<'_>, from: usize, to: usize) -> Vec<u8> {
    with_index!(index, index => {
        let mut before = from.checked_sub(1).map(|i| index[i].at());
        let mut out = Vec::with_capacity((to - from) * 2);
        for p in &index[from..to] {
            let gap = before.map_or(p.at(), |b| p.at() - b - 1);
            out.extend_from_slice(&(gap as u16).to_le_bytes());
            before = Some(p.at());
        }
        out
    })
}

/// Little-endian bytes of the positions `from..to`.
pub fn raw(index: Index<'_>, from: usize, to: usize) -> Vec<u8> {
    with_index!(index.part(from, to), index => index.iter().flat_map(|p| p.to_le_bytes()).collect())
}

/// Positions in a tensor of `len` elements from their gaps.
pub fn from_gap16(name: &str, bytes: &[u8], len: usize) -> Result<Positions> {
    let gaps = bytes.chunks_exact(2).map(|b| usize::from(u16::from_le_bytes([b[0], b[1]])));
    fn sum<P: Position>(gaps: impl ExactSizeIterator<Item = usize>, len: usize) -> Option<Vec<P>> {
        let mut out = Vec::with_capacity(gaps.len());
        let mut next = 0_usize;
        for gap in gaps {
            let at = next.checked_add(gap).filter(|at| *at < len)?;
            out.push(P::new(at));
            next = at + 1;
        }
        Some(out)
    }
    let positions = if len < 1 << 31 {
        sum(gaps, len).map(Positions::Small)
    } else {
        sum(gaps, len).map(Positions::Large)
    };
    positions.ok_or_else(|| Error::Index {
        name: name.to_string(),
        why: format!("a position is outside of its {len} elements"),
    })
}

/// Positions from little-endian integers of 4 or 8 bytes. Their order is not checked.
pub fn from_raw(width: usize, bytes: &[u8]) -> Positions {
    if width == 4 {
        let one = |b: &[u8]| i32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        Positions::Small(bytes.chunks_exact(4).map(one).collect())
    } else {
        let one = |b: &[u8]| i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]);
        Positions::Large(bytes.chunks_exact(8).map(one).collect())
    }
}

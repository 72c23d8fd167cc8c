//! What crosses from the bridge to the kernels: slices of a known element type, and positions.
use crate::error::{Error, Result};
use crate::num::Position;
use half::{bf16, f16};

/// The elements of a tensor that is read, in row-major order.
#[derive(Debug, Clone, Copy)]
pub enum View<'a> {
    /// float32
    F32(&'a [f32]),
    /// float16
    F16(&'a [f16]),
    /// bfloat16
    BF16(&'a [bf16]),
}

/// The elements of a tensor that is written, in row-major order.
#[derive(Debug)]
pub enum ViewMut<'a> {
    /// float32
    F32(&'a mut [f32]),
    /// float16
    F16(&'a mut [f16]),
    /// bfloat16
    BF16(&'a mut [bf16]),
}

/// Ascending, unique flat positions, as a caller hands them over.
#[derive(Debug, Clone, Copy)]
pub enum Index<'a> {
    /// positions below 2^31
    Small(&'a [i32]),
    /// any positions
    Large(&'a [i64]),
}

impl<'a> Index<'a> {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Index::Small(v) => v.len(),
            Index::Large(v) => v.len(),
        }
    }
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The positions `from..to` of the list.
    pub fn part(self, from: usize, to: usize) -> Index<'a> {
        match self {
            Index::Small(v) => Index::Small(&v[from..to]),
            Index::Large(v) => Index::Large(&v[from..to]),
        }
    }
}

/// Ascending, unique flat positions that a kernel made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Positions {
    /// of a tensor with fewer than 2^31 elements
    Small(Vec<i32>),
    /// of a larger one
    Large(Vec<i64>),
}

impl Positions {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Positions::Small(v) => v.len(),
            Positions::Large(v) => v.len(),
        }
    }
    /// As a caller would hand them over.
    pub fn index(&self) -> Index<'_> {
        match self {
            Positions::Small(v) => Index::Small(v),
            Positions::Large(v) => Index::Large(v),
        }
    }
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Refuses positions that are not strictly ascending or not below `len`: what every kernel that
/// follows an index relies on.
pub fn check_index<P: Position>(name: &str, index: &[P], len: usize) -> Result<()> {
    let bad = |why: String| Err(Error::Index { name: name.to_string(), why });
    // `at` of a negative position is a huge offset: the bound below catches it when it is last, the
    // order check when it is not, because the first position is checked too.
    if let (Some(first), Some(last)) = (index.first(), index.last()) {
        if first.at() >= len || last.at() >= len {
            return bad(format!("a position is outside of its {len} elements"));
        }
        if index.windows(2).any(|w| w[0] >= w[1]) {
            return bad("positions must be ascending and unique".to_string());
        }
    }
    Ok(())
}

/// Runs `$body` with `$x` bound to the typed slice inside a `View` or `ViewMut`.
#[macro_export]
macro_rules! with_elements {
    ($view:ident, $any:expr, $x:ident => $body:expr) => {
        match $any {
            $crate::view::$view::F32($x) => $body,
            $crate::view::$view::F16($x) => $body,
            $crate::view::$view::BF16($x) => $body,
        }
    };
}

/// Runs `$body` with `$x` bound to the typed positions inside an `Index`.
#[macro_export]
macro_rules! with_index {
    ($any:expr, $x:ident => $body:expr) => {
        match $any {
            $crate::view::Index::Small($x) => $body,
            $crate::view::Index::Large($x) => $body,
        }
    };
}

//! Selecting: top-k, thresholds, random numbers, and the algebra of positions.
use super::{array, threads};
use crate::bridge::{Tensor, disjoint};
use crate::error::{Error, Result};
use crate::kernel::exchange::exchange;
use crate::kernel::made::Made;
use crate::kernel::select::{self, Order};
use crate::kernel::{reduce, rng, sets};
use crate::num::Element;
use crate::view::{Index, Positions, View, ViewMut};
use crate::{with_elements, with_index};
use half::{bf16, f16};
use numpy::IntoPyArray;
use pyo3::prelude::*;

pub(super) fn add(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(topk, m)?)?;
    m.add_function(wrap_pyfunction!(topk_rows, m)?)?;
    m.add_function(wrap_pyfunction!(topk_each, m)?)?;
    m.add_function(wrap_pyfunction!(topk_made, m)?)?;
    m.add_function(wrap_pyfunction!(topk_bytes_, m)?)?;
    m.add_function(wrap_pyfunction!(finite, m)?)?;
    m.add_function(wrap_pyfunction!(threshold, m)?)?;
    m.add_function(wrap_pyfunction!(uniform_, m)?)?;
    m.add_function(wrap_pyfunction!(union, m)?)?;
    m.add_function(wrap_pyfunction!(intersection, m)?)?;
    m.add_function(wrap_pyfunction!(difference, m)?)?;
    m.add_function(wrap_pyfunction!(places, m)?)?;
    m.add_function(wrap_pyfunction!(complement, m)?)?;
    m.add_function(wrap_pyfunction!(carry_, m)?)?;
    m.add_function(wrap_pyfunction!(exchange_, m)?)?;
    Ok(())
}

fn order(largest: bool) -> Order {
    if largest { Order::Largest } else { Order::Smallest }
}

/// A float type whose slices can be taken out of a view.
trait Pick: Element {
    fn pick<'a>(view: View<'a>) -> Option<&'a [Self]>;
}
macro_rules! pick {
    ($t:ty, $variant:ident) => {
        impl Pick for $t {
            fn pick<'a>(view: View<'a>) -> Option<&'a [Self]> {
                match view {
                    View::$variant(x) => Some(x),
                    _ => None,
                }
            }
        }
    };
}
pick!(f32, F32);
pick!(f16, F16);
pick!(bf16, BF16);

/// The scores as slices of one type.
fn parts<'a, T: Pick>(names: &'a [String], views: &[View<'a>]) -> Result<Vec<(&'a str, &'a [T])>> {
    let one = |(name, view): (&'a String, &View<'a>)| match T::pick(*view) {
        Some(x) => Ok((name.as_str(), x)),
        None => Err(Error::Layout {
            name: format!("the score of {name}"),
            got: "another dtype".to_string(),
            want: format!("{}, as the score of {}", T::NAME, names[0]),
        }),
    };
    names.iter().zip(views).map(one).collect()
}

/// Calls `run` with the scores as slices of the type of the first one.
macro_rules! with_parts {
    ($names:expr, $scores:expr, $parts:ident => $body:expr) => {{
        if $names.len() != $scores.len() {
            let (got, want) = ($names.len(), $scores.len());
            return Err(Error::Length { name: "names".to_string(), got, want }.into());
        }
        let views =
            $names.iter().zip(&$scores).map(|(n, s)| s.view(n)).collect::<Result<Vec<_>>>()?;
        match views.first() {
            None | Some(View::F32(_)) => {
                let $parts = parts::<f32>(&$names, &views)?;
                $body
            }
            Some(View::F16(_)) => {
                let $parts = parts::<f16>(&$names, &views)?;
                $body
            }
            Some(View::BF16(_)) => {
                let $parts = parts::<bf16>(&$names, &views)?;
                $body
            }
        }
    }};
}

fn arrays(py: Python<'_>, all: Vec<Positions>) -> Vec<Py<PyAny>> {
    all.into_iter().map(|p| array(py, p)).collect()
}

/// Exactly the k best of all scores together: ascending flat positions for each tensor.
#[pyfunction]
#[pyo3(signature = (scores, names, k, *, largest=true, absolute=false))]
fn topk(
    py: Python<'_>,
    scores: Vec<Tensor>,
    names: Vec<String>,
    k: usize,
    largest: bool,
    absolute: bool,
) -> PyResult<Vec<Py<PyAny>>> {
    let threads = threads(py)?;
    let all = with_parts!(names, scores, parts => py.allow_threads(|| {
        select::topk(threads, &parts, k, order(largest), absolute)
    }))?;
    Ok(arrays(py, all))
}

/// `topk` of groups of scores: `sizes` says how many tensors each has, `ks` how many are its best.
#[pyfunction]
#[pyo3(signature = (scores, names, sizes, ks, *, largest=true, absolute=false))]
fn topk_each(
    py: Python<'_>,
    scores: Vec<Tensor>,
    names: Vec<String>,
    sizes: Vec<usize>,
    ks: Vec<usize>,
    largest: bool,
    absolute: bool,
) -> PyResult<Vec<Py<PyAny>>> {
    let threads = threads(py)?;
    let all = with_parts!(names, scores, parts => py.allow_threads(|| {
        select::topk_each(threads, &parts, &sizes, &ks, order(largest), absolute)
    }))?;
    Ok(arrays(py, all))
}

/// `topk` of the scores |value| / (|divisor| + offset), or |value| without divisors, but for those at the
/// `pinned` positions (int32) of each tensor, which are `pin`.
#[pyfunction]
#[pyo3(signature = (values, divisors, offset, pinned, pin, names, k, *, largest=true))]
#[allow(clippy::too_many_arguments)]
fn topk_made(
    py: Python<'_>,
    values: Vec<Tensor>,
    divisors: Option<Vec<Tensor>>,
    offset: f32,
    pinned: Vec<Tensor>,
    pin: f32,
    names: Vec<String>,
    k: usize,
    largest: bool,
) -> PyResult<Vec<Py<PyAny>>> {
    let threads = threads(py)?;
    for (list, n) in
        [("pinned", pinned.len()), ("divisors", divisors.as_ref().map_or(names.len(), Vec::len))]
    {
        if n != names.len() {
            return Err(Error::Length { name: list.to_string(), got: n, want: names.len() }.into());
        }
    }
    let all = with_parts!(names, values, parts => {
        let made = made(&parts, divisors.as_deref(), offset, &pinned, pin)?;
        py.allow_threads(|| select::topk_made(threads, &parts, &made, k, order(largest)))
    })?;
    Ok(arrays(py, all))
}

fn made<'a, T: Pick>(
    parts: &[(&str, &[T])],
    divisors: Option<&'a [Tensor]>,
    offset: f32,
    pinned: &'a [Tensor],
    pin: f32,
) -> Result<Vec<Made<'a, T>>> {
    let one = |(i, (name, values)): (usize, &(&str, &[T]))| {
        let divisor = match divisors {
            None => None,
            Some(all) => match T::pick(all[i].view(name)?) {
                Some(divisor) => Some((divisor, offset)),
                None => {
                    return Err(Error::Layout {
                        name: format!("the divisor of {name}"),
                        got: "another dtype".to_string(),
                        want: T::NAME.to_string(),
                    });
                }
            },
        };
        let Index::Small(pinned) = pinned[i].index(name)? else {
            return Err(Error::Layout {
                name: format!("the pinned positions of {name}"),
                got: "int64".to_string(),
                want: "int32".to_string(),
            });
        };
        Made::new(name, values.len(), divisor, pinned, pin)
    };
    parts.iter().enumerate().map(one).collect()
}

/// The k best of one tensor as bytes: `out` (uint8) is 1 at those and 0 elsewhere.
#[pyfunction]
#[pyo3(signature = (out, scores, name, k, *, largest=true, absolute=false))]
fn topk_bytes_(
    py: Python<'_>,
    mut out: Tensor,
    scores: Tensor,
    name: String,
    k: usize,
    largest: bool,
    absolute: bool,
) -> PyResult<()> {
    disjoint(&[("out", &out)], &[(&name, &scores)])?;
    let (threads, view, out) = (threads(py)?, scores.view(&name)?, out.bytes_mut("out")?);
    with_elements!(View, view, x => py.allow_threads(|| {
        select::topk_bytes(threads, (&name, x), k, order(largest), absolute, out)
    }))?;
    Ok(())
}

/// Whether no value of any tensor, all of one dtype, is infinite or NaN.
#[pyfunction]
fn finite(py: Python<'_>, values: Vec<Tensor>, names: Vec<String>) -> PyResult<bool> {
    let threads = threads(py)?;
    Ok(with_parts!(names, values, parts => {
        let all: Vec<_> = parts.iter().map(|(_, x)| *x).collect();
        py.allow_threads(|| reduce::finite(threads, &all))
    }))
}

/// Exactly the k best of each row (last dimension): ascending flat positions.
#[pyfunction]
#[pyo3(signature = (scores, name, k, *, largest=true, absolute=false))]
fn topk_rows(
    py: Python<'_>,
    scores: Tensor,
    name: String,
    k: usize,
    largest: bool,
    absolute: bool,
) -> PyResult<Py<PyAny>> {
    let (threads, row, view) = (threads(py)?, scores.row(), scores.view(&name)?);
    let positions = with_elements!(View, view, x => py.allow_threads(|| {
        select::topk_rows(threads, &name, x, row, k, order(largest), absolute)
    }))?;
    Ok(array(py, positions))
}

/// All scores that reach a value: ascending flat positions for each tensor.
#[pyfunction]
#[pyo3(signature = (scores, names, value, *, largest=true, absolute=false))]
fn threshold(
    py: Python<'_>,
    scores: Vec<Tensor>,
    names: Vec<String>,
    value: f32,
    largest: bool,
    absolute: bool,
) -> PyResult<Vec<Py<PyAny>>> {
    let threads = threads(py)?;
    let all = with_parts!(names, scores, parts => py.allow_threads(|| {
        select::threshold(threads, &parts, value, order(largest), absolute)
    }))?;
    Ok(arrays(py, all))
}

/// Uniform numbers in [0, 1) that depend on (seed, name, position) alone.
#[pyfunction]
fn uniform_(py: Python<'_>, mut out: Tensor, seed: u64, name: String) -> PyResult<()> {
    let threads = threads(py)?;
    let out = out.f32_mut(&name)?;
    py.allow_threads(|| rng::uniform(threads, seed, rng::stream(&name), out));
    Ok(())
}

fn mixed() -> Error {
    Error::Layout {
        name: "the second index".to_string(),
        got: "another dtype".to_string(),
        want: "of the dtype of the first".to_string(),
    }
}

macro_rules! algebra {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[pyfunction]
        fn $name(py: Python<'_>, a: Tensor, b: Tensor) -> PyResult<Py<PyAny>> {
            let threads = threads(py)?;
            let positions = match (a.index("a")?, b.index("b")?) {
                (Index::Small(a), Index::Small(b)) => {
                    Positions::Small(py.allow_threads(|| sets::$name(threads, a, b)))
                }
                (Index::Large(a), Index::Large(b)) => {
                    Positions::Large(py.allow_threads(|| sets::$name(threads, a, b)))
                }
                _ => return Err(mixed().into()),
            };
            Ok(array(py, positions))
        }
    };
}
algebra!(
    /// Positions in either of two ascending indices.
    union
);
algebra!(
    /// Positions in both of two ascending indices.
    intersection
);
algebra!(
    /// Positions in the first but not in the second of two ascending indices.
    difference
);
algebra!(
    /// Where in the first of two ascending indices the positions of the second stand.
    places
);

/// Writes values of the positions that two indices share from the places in the first to those in the
/// second: `to[i]` has one value for each position of `new`, `values[i]` for each of `old`.
#[pyfunction]
fn carry_(
    py: Python<'_>,
    mut to: Vec<Tensor>,
    values: Vec<Tensor>,
    old: Tensor,
    new: Tensor,
    name: String,
) -> PyResult<()> {
    if to.len() != values.len() {
        let (got, want) = (to.len(), values.len());
        return Err(Error::Length { name: "to".to_string(), got, want }.into());
    }
    let written: Vec<_> = to.iter().map(|t| ("to", t)).collect();
    let mut read: Vec<_> = values.iter().map(|t| (name.as_str(), t)).collect();
    read.extend([("old", &old), ("new", &new)]);
    disjoint(&written, &read)?;
    let threads = threads(py)?;
    let (old, new) = (old.index("old")?, new.index("new")?);
    let from = values.iter().map(|t| t.view(&name)).collect::<Result<Vec<_>>>()?;
    let to = to.iter_mut().map(|t| t.view_mut("to")).collect::<Result<Vec<_>>>()?;
    macro_rules! carry {
        ($variant:ident) => {{
            let mut pairs = Vec::new();
            for pair in from.into_iter().zip(to) {
                match pair {
                    (View::$variant(x), ViewMut::$variant(y)) => pairs.push((x, y)),
                    _ => return Err(mixed().into()),
                }
            }
            match (old, new) {
                (Index::Small(a), Index::Small(b)) => {
                    py.allow_threads(|| sets::carry(threads, &name, a, b, pairs))
                }
                (Index::Large(a), Index::Large(b)) => {
                    py.allow_threads(|| sets::carry(threads, &name, a, b, pairs))
                }
                _ => Err(mixed()),
            }
        }};
    }
    match from.first() {
        None => Ok(()),
        Some(View::F32(_)) => carry!(F32),
        Some(View::F16(_)) => carry!(F16),
        Some(View::BF16(_)) => carry!(BF16),
    }?;
    Ok(())
}

/// What is put aside of `tensor` when its selection moves from `old` to `new`, each int32 positions with
/// `..._values`: returns positions, values (those of 16-bit tensors as uint16), and how many positions
/// stay selected. What comes back is written into `new_values`.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn exchange_(
    py: Python<'_>,
    mut new_values: Tensor,
    new: Tensor,
    old: Tensor,
    old_values: Tensor,
    aside: Tensor,
    aside_values: Tensor,
    tensor: Tensor,
    name: String,
) -> PyResult<(Py<PyAny>, Py<PyAny>, usize)> {
    let read = [
        ("new", &new),
        ("old", &old),
        ("old_values", &old_values),
        ("aside", &aside),
        ("aside_values", &aside_values),
        (name.as_str(), &tensor),
    ];
    disjoint(&[("new_values", &new_values)], &read)?;
    let threads = threads(py)?;
    let (Index::Small(i), Index::Small(j), Index::Small(k)) =
        (aside.index("aside")?, old.index("old")?, new.index("new")?)
    else {
        return Err(mixed().into());
    };
    let views =
        (aside_values.view("aside_values")?, old_values.view("old_values")?, tensor.view(&name)?);
    macro_rules! go {
        ($u:expr, $v:expr, $t:expr, $w:expr) => {
            py.allow_threads(|| exchange(threads, &name, $t, (i, $u), (j, $v), (k, $w)))?
        };
    }
    let halves = |bits: Vec<u16>| bits.into_pyarray(py).into_any().unbind();
    Ok(match (views, new_values.view_mut("new_values")?) {
        ((View::F32(u), View::F32(v), View::F32(t)), ViewMut::F32(w)) => {
            let found = go!(u, v, t, w);
            let values = found.values.into_pyarray(py).into_any().unbind();
            (array(py, Positions::Small(found.index)), values, found.shared)
        }
        ((View::F16(u), View::F16(v), View::F16(t)), ViewMut::F16(w)) => {
            let found = go!(u, v, t, w);
            let bits = found.values.into_iter().map(f16::to_bits).collect();
            (array(py, Positions::Small(found.index)), halves(bits), found.shared)
        }
        ((View::BF16(u), View::BF16(v), View::BF16(t)), ViewMut::BF16(w)) => {
            let found = go!(u, v, t, w);
            let bits = found.values.into_iter().map(bf16::to_bits).collect();
            (array(py, Positions::Small(found.index)), halves(bits), found.shared)
        }
        _ => return Err(mixed().into()),
    })
}

/// Positions below `length` that are not in an ascending index.
#[pyfunction]
fn complement(py: Python<'_>, a: Tensor, length: usize) -> PyResult<Py<PyAny>> {
    let index = a.index("a")?;
    with_index!(index, x => crate::view::check_index("a", x, length))?;
    let positions = match index {
        Index::Small(x) => Positions::Small(py.allow_threads(|| sets::complement(x, length))),
        Index::Large(x) => Positions::Large(py.allow_threads(|| sets::complement(x, length))),
    };
    Ok(array(py, positions))
}

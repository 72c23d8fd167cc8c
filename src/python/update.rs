//! Moving values: gather, scatter, sampled products and score accumulation.
use super::threads;
use crate::bridge::{Tensor, disjoint};
use crate::error::{Error, Result};
use crate::kernel::gather;
use crate::kernel::outer::{Samples, accumulate_outer};
use crate::kernel::reduce::{self, Map};
use crate::kernel::sampled::{Product, selected_entries};
use crate::view::{View, ViewMut};
use crate::{with_elements, with_index};
use pyo3::prelude::*;

pub(super) fn add(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(gather_, m)?)?;
    m.add_function(wrap_pyfunction!(scatter_, m)?)?;
    m.add_function(wrap_pyfunction!(take_, m)?)?;
    m.add_function(wrap_pyfunction!(put_, m)?)?;
    m.add_function(wrap_pyfunction!(selected_, m)?)?;
    m.add_function(wrap_pyfunction!(accumulate_, m)?)?;
    m.add_function(wrap_pyfunction!(accumulate_outer_, m)?)?;
    Ok(())
}

/// `out = source[index]` in float32, or `out += source[index]`.
#[pyfunction]
#[pyo3(signature = (out, source, index, name, *, accumulate=false))]
fn gather_(
    py: Python<'_>,
    mut out: Tensor,
    source: Tensor,
    index: Tensor,
    name: String,
    accumulate: bool,
) -> PyResult<()> {
    disjoint(&[("out", &out)], &[(&name, &source), ("index", &index)])?;
    let threads = threads(py)?;
    let (source, index, out) = (source.view(&name)?, index.index("index")?, out.f32_mut("out")?);
    with_elements!(View, source, x => with_index!(index, i => {
        py.allow_threads(|| gather::gather(threads, &name, x, i, out, accumulate))
    }))?;
    Ok(())
}

/// `target[index] = values`, rounded once to the dtype of the target.
#[pyfunction]
fn scatter_(
    py: Python<'_>,
    mut target: Tensor,
    index: Tensor,
    values: Tensor,
    name: String,
) -> PyResult<()> {
    disjoint(&[(&name, &target)], &[("values", &values), ("index", &index)])?;
    let threads = threads(py)?;
    let (index, values) = (index.index("index")?, values.f32("values")?);
    let target = target.view_mut(&name)?;
    with_elements!(ViewMut, target, x => with_index!(index, i => {
        py.allow_threads(|| gather::scatter(threads, &name, x, i, values))
    }))?;
    Ok(())
}

fn unlike(name: &str) -> Error {
    Error::Layout {
        name: name.to_string(),
        got: "another dtype".to_string(),
        want: "of the dtype of the weight".to_string(),
    }
}

/// `out = source[index]`, bit for bit.
#[pyfunction]
fn take_(
    py: Python<'_>,
    mut out: Tensor,
    source: Tensor,
    index: Tensor,
    name: String,
) -> PyResult<()> {
    disjoint(&[("out", &out)], &[(&name, &source), ("index", &index)])?;
    let threads = threads(py)?;
    let index = index.index("index")?;
    with_index!(index, i => match (source.view(&name)?, out.view_mut("out")?) {
        (View::F32(x), ViewMut::F32(o)) => py.allow_threads(|| gather::take(threads, &name, x, i, o)),
        (View::F16(x), ViewMut::F16(o)) => py.allow_threads(|| gather::take(threads, &name, x, i, o)),
        (View::BF16(x), ViewMut::BF16(o)) => py.allow_threads(|| gather::take(threads, &name, x, i, o)),
        _ => Err(unlike("out")),
    })?;
    Ok(())
}

/// `target[index] = values`, bit for bit.
#[pyfunction]
fn put_(
    py: Python<'_>,
    mut target: Tensor,
    index: Tensor,
    values: Tensor,
    name: String,
) -> PyResult<()> {
    disjoint(&[(&name, &target)], &[("values", &values), ("index", &index)])?;
    let threads = threads(py)?;
    let index = index.index("index")?;
    with_index!(index, i => match (target.view_mut(&name)?, values.view("values")?) {
        (ViewMut::F32(x), View::F32(v)) => py.allow_threads(|| gather::put(threads, &name, x, i, v)),
        (ViewMut::F16(x), View::F16(v)) => py.allow_threads(|| gather::put(threads, &name, x, i, v)),
        (ViewMut::BF16(x), View::BF16(v)) => py.allow_threads(|| gather::put(threads, &name, x, i, v)),
        _ => Err(unlike("values")),
    })?;
    Ok(())
}

/// `out = (leftᵀ · right)[index]` for `left` [tokens, rows] and `right` [tokens, columns], or `out += ...`.
#[pyfunction]
#[pyo3(signature = (out, left, right, index, name, *, accumulate=false))]
fn selected_(
    py: Python<'_>,
    mut out: Tensor,
    left: Tensor,
    right: Tensor,
    index: Tensor,
    name: String,
    accumulate: bool,
) -> PyResult<()> {
    disjoint(&[("out", &out)], &[("left", &left), ("right", &right), ("index", &index)])?;
    let threads = threads(py)?;
    let (n_out, n_in) = (left.row(), right.row());
    let (x, y) = (right.view("right")?, left.view("left")?);
    let (index, out) = (index.index("index")?, out.f32_mut("out")?);
    macro_rules! product {
        ($y:expr, $x:expr) => {
            with_index!(index, i => py.allow_threads(|| {
                let tokens = $y.len().checked_div(n_out).unwrap_or(0);
                let product = Product { dy: $y, x: $x, tokens, n_out, n_in };
                selected_entries(threads, &name, &product, i, out, accumulate)
            }))
        };
    }
    match (y, x) {
        (View::F32(y), View::F32(x)) => product!(y, x),
        (View::F16(y), View::F16(x)) => product!(y, x),
        (View::BF16(y), View::BF16(x)) => product!(y, x),
        _ => Err(Error::Layout {
            name: "right".to_string(),
            got: "another dtype".to_string(),
            want: "of the dtype of left".to_string(),
        }),
    }?;
    Ok(())
}

/// What happens to a value before it is added.
fn read_map(map: &str) -> Result<Map> {
    match map {
        "id" => Ok(Map::Id),
        "abs" => Ok(Map::Abs),
        "square" => Ok(Map::Square),
        other => {
            let (rule, got) = ("one of id, abs, square".to_string(), other.to_string());
            Err(Error::Value { name: "map".to_string(), rule, got })
        }
    }
}

/// `score += weight * map(value)` with `map` one of id, abs, square.
#[pyfunction]
#[pyo3(signature = (score, value, name, *, map="id", weight=1.0))]
fn accumulate_(
    py: Python<'_>,
    mut score: Tensor,
    value: Tensor,
    name: String,
    map: &str,
    weight: f32,
) -> PyResult<()> {
    let map = read_map(map)?;
    disjoint(&[("score", &score)], &[(&name, &value)])?;
    let threads = threads(py)?;
    let (score, value) = (score.f32_mut("score")?, value.view(&name)?);
    with_elements!(View, value, x => {
        py.allow_threads(|| reduce::accumulate(threads, score, x, map, weight))
    })?;
    Ok(())
}

/// `score += sum of map(leftᵀ · right)` over samples: `left` [samples, tokens, rows], `right` [samples,
/// tokens, columns], `score` [rows, columns], all float32.
#[pyfunction]
#[pyo3(signature = (score, left, right, samples, *, map="id"))]
fn accumulate_outer_(
    py: Python<'_>,
    mut score: Tensor,
    left: Tensor,
    right: Tensor,
    samples: usize,
    map: &str,
) -> PyResult<()> {
    let map = read_map(map)?;
    disjoint(&[("score", &score)], &[("left", &left), ("right", &right)])?;
    let threads = threads(py)?;
    let (rows, columns) = (left.row(), right.row());
    let (left, right) = (left.f32("left")?, right.f32("right")?);
    let tokens = left.len().checked_div(samples.saturating_mul(rows)).unwrap_or(0);
    let factors = Samples { left, right, samples, tokens, rows, columns };
    let score = score.f32_mut("score")?;
    py.allow_threads(|| accumulate_outer(threads, score, &factors, map))?;
    Ok(())
}

//! Moving values: gather, scatter, sampled products, score accumulation and the fused optimizer steps.
use super::threads;
use crate::bridge::{Tensor, disjoint};
use crate::error::{Error, Result};
use crate::kernel::adamw::{self, AdamW, Clock, Closed};
use crate::kernel::gather;
use crate::kernel::lion::{self, Lion};
use crate::kernel::outer::{Samples, accumulate_outer};
use crate::kernel::reduce::{self, Map};
use crate::kernel::sampled::{Product, selected_entries};
use crate::kernel::sgd::{self, Sgd};
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
    m.add_function(wrap_pyfunction!(adamw_, m)?)?;
    m.add_function(wrap_pyfunction!(lion_, m)?)?;
    m.add_function(wrap_pyfunction!(sgd_, m)?)?;
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

/// A weight and the positions in it that receive the new values.
struct Target {
    weight: Tensor,
    index: Tensor,
}

impl Target {
    fn new(weight: Option<Tensor>, index: Option<Tensor>) -> Result<Option<Target>> {
        match (weight, index) {
            (Some(weight), Some(index)) => Ok(Some(Target { weight, index })),
            (None, None) => Ok(None),
            _ => Err(Error::Value {
                name: "target and index".to_string(),
                rule: "given together".to_string(),
                got: "one without the other".to_string(),
            }),
        }
    }
}

/// Calls `$body` with `$target` as the kernel takes it, once for each element and index type.
macro_rules! with_target {
    ($any:expr, $name:expr, $target:ident => $body:expr) => {
        match $any.as_mut() {
            None => {
                let $target = None::<(&str, &mut [f32], &[i32])>;
                $body
            }
            Some(Target { weight, index }) => {
                let index = index.index("index")?;
                with_elements!(ViewMut, weight.view_mut($name)?, x => with_index!(index, i => {
                    let $target = Some(($name, x, i));
                    $body
                }))
            }
        }
    };
}

/// The number of this step, or an int32 tensor with the steps of each coordinate before it.
/// A tensor comes first: one of a single element would pass for a number.
#[derive(FromPyObject)]
enum Steps {
    Each(Tensor),
    Shared(u64),
}

/// One AdamW step of the compact values; the new values are rounded once into `target[index]`. Values
/// whose `gate` (uint8) is 0 stay, but for decay if `decay_closed`; `closed` is one of updated, frozen,
/// reset and says what becomes of their moments.
#[pyfunction]
#[pyo3(signature = (value, grad, exp_avg, exp_avg_sq, target, index, name, *, step, lr, beta1, beta2, eps, weight_decay, maximize=false, scale=1.0, gate=None, closed="updated", decay_closed=false))]
#[allow(clippy::too_many_arguments)]
fn adamw_(
    py: Python<'_>,
    mut value: Tensor,
    grad: Tensor,
    mut exp_avg: Tensor,
    mut exp_avg_sq: Tensor,
    target: Option<Tensor>,
    index: Option<Tensor>,
    name: String,
    mut step: Steps,
    lr: f64,
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
    maximize: bool,
    scale: f64,
    gate: Option<Tensor>,
    closed: &str,
    decay_closed: bool,
) -> PyResult<()> {
    let mut target = Target::new(target, index)?;
    let mut written = vec![("value", &value), ("exp_avg", &exp_avg), ("exp_avg_sq", &exp_avg_sq)];
    let mut read = vec![("grad", &grad)];
    if let Steps::Each(ages) = &step {
        written.push(("step", ages));
    }
    if let Some(gate) = &gate {
        read.push(("gate", gate));
    }
    if let Some(target) = &target {
        written.push((&name, &target.weight));
        read.push(("index", &target.index));
    }
    disjoint(&written, &read)?;
    let threads = threads(py)?;
    let cfg = AdamW { lr, beta1, beta2, eps, weight_decay, maximize, scale };
    let closed = match closed {
        "updated" => Closed::Updated { decay: decay_closed },
        "frozen" => Closed::Frozen,
        "reset" => Closed::Reset,
        other => {
            let (rule, got) = ("one of updated, frozen, reset".to_string(), other.to_string());
            return Err(Error::Value { name: "closed".to_string(), rule, got }.into());
        }
    };
    let gate = match &gate {
        Some(gate) => Some((gate.bytes("gate")?, closed)),
        None => None,
    };
    let (value, grad) = (value.f32_mut("value")?, grad.f32("grad")?);
    let (m, v) = (exp_avg.f32_mut("exp_avg")?, exp_avg_sq.f32_mut("exp_avg_sq")?);
    let clock = match &mut step {
        Steps::Shared(t) => Clock::Shared(*t),
        Steps::Each(ages) => Clock::Each(ages.i32_mut("step")?),
    };
    with_target!(target, name.as_str(), t => {
        py.allow_threads(|| adamw::step(threads, &cfg, clock, gate, value, grad, m, v, t))
    })?;
    Ok(())
}

/// One Lion step of the compact values; the new values are rounded once into `target[index]`.
#[pyfunction]
#[pyo3(signature = (value, grad, exp_avg, target, index, name, *, lr, beta1, beta2, weight_decay, maximize=false))]
#[allow(clippy::too_many_arguments)]
fn lion_(
    py: Python<'_>,
    mut value: Tensor,
    grad: Tensor,
    mut exp_avg: Tensor,
    target: Option<Tensor>,
    index: Option<Tensor>,
    name: String,
    lr: f64,
    beta1: f64,
    beta2: f64,
    weight_decay: f64,
    maximize: bool,
) -> PyResult<()> {
    let mut target = Target::new(target, index)?;
    let mut written = vec![("value", &value), ("exp_avg", &exp_avg)];
    let mut read = vec![("grad", &grad)];
    if let Some(target) = &target {
        written.push((&name, &target.weight));
        read.push(("index", &target.index));
    }
    disjoint(&written, &read)?;
    let threads = threads(py)?;
    let cfg = Lion { lr, beta1, beta2, weight_decay, maximize };
    let (value, grad) = (value.f32_mut("value")?, grad.f32("grad")?);
    let m = exp_avg.f32_mut("exp_avg")?;
    with_target!(target, name.as_str(), t => {
        py.allow_threads(|| lion::step(threads, &cfg, value, grad, m, t))
    })?;
    Ok(())
}

/// One SGD step of the compact values; the new values are rounded once into `target[index]`.
#[pyfunction]
#[pyo3(signature = (value, grad, momentum_buffer, target, index, name, *, first, lr, momentum, dampening, weight_decay, nesterov, maximize=false))]
#[allow(clippy::too_many_arguments)]
fn sgd_(
    py: Python<'_>,
    mut value: Tensor,
    grad: Tensor,
    mut momentum_buffer: Option<Tensor>,
    target: Option<Tensor>,
    index: Option<Tensor>,
    name: String,
    first: bool,
    lr: f64,
    momentum: f64,
    dampening: f64,
    weight_decay: f64,
    nesterov: bool,
    maximize: bool,
) -> PyResult<()> {
    let mut target = Target::new(target, index)?;
    let mut written = vec![("value", &value)];
    let mut read = vec![("grad", &grad)];
    if let Some(buffer) = &momentum_buffer {
        written.push(("momentum_buffer", buffer));
    }
    if let Some(target) = &target {
        written.push((&name, &target.weight));
        read.push(("index", &target.index));
    }
    disjoint(&written, &read)?;
    let threads = threads(py)?;
    let cfg = Sgd { lr, momentum, dampening, weight_decay, nesterov, maximize };
    let (value, grad) = (value.f32_mut("value")?, grad.f32("grad")?);
    let buffer = match &mut momentum_buffer {
        Some(buffer) => Some(buffer.f32_mut("momentum_buffer")?),
        None => None,
    };
    with_target!(target, name.as_str(), t => {
        py.allow_threads(|| sgd::step(threads, &cfg, first, value, grad, buffer, t))
    })?;
    Ok(())
}

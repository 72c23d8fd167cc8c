//! The fused optimizer steps, and what their states are made of.
use super::threads;
use crate::bridge::{Tensor, disjoint};
use crate::error::{Error, Result};
use crate::kernel::adamw::{self, AdamW, Clock, Closed};
use crate::kernel::lines::{self, Shape};
use crate::kernel::lion::{self, Lion};
use crate::kernel::lowbit::{self, Codes};
use crate::kernel::sgd::{self, Sgd};
use crate::{with_elements, with_index};
use numpy::PyArray1;
use pyo3::prelude::*;

pub(super) fn add(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(adamw_, m)?)?;
    m.add_function(wrap_pyfunction!(adamw_coded_, m)?)?;
    m.add_function(wrap_pyfunction!(code_levels, m)?)?;
    m.add_function(wrap_pyfunction!(quantise_, m)?)?;
    m.add_function(wrap_pyfunction!(dequantise_, m)?)?;
    m.add_function(wrap_pyfunction!(line_means_, m)?)?;
    m.add_function(wrap_pyfunction!(line_estimate_, m)?)?;
    m.add_function(wrap_pyfunction!(lion_, m)?)?;
    m.add_function(wrap_pyfunction!(sgd_, m)?)?;
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

/// One AdamW step of the compact values with moments of 8 bits: `codes` (uint8) and `scale` (float32, one
/// for 256 coordinates) of the mean of gradients, then of that of squares.
#[pyfunction]
#[pyo3(signature = (value, grad, exp_avg_codes, exp_avg_scale, exp_avg_sq_codes, exp_avg_sq_scale, target, index, name, *, step, lr, beta1, beta2, eps, weight_decay, maximize=false))]
#[allow(clippy::too_many_arguments)]
fn adamw_coded_(
    py: Python<'_>,
    mut value: Tensor,
    grad: Tensor,
    mut exp_avg_codes: Tensor,
    mut exp_avg_scale: Tensor,
    mut exp_avg_sq_codes: Tensor,
    mut exp_avg_sq_scale: Tensor,
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
) -> PyResult<()> {
    let mut target = Target::new(target, index)?;
    let mut written = vec![
        ("value", &value),
        ("exp_avg codes", &exp_avg_codes),
        ("exp_avg scale", &exp_avg_scale),
        ("exp_avg_sq codes", &exp_avg_sq_codes),
        ("exp_avg_sq scale", &exp_avg_sq_scale),
    ];
    let mut read = vec![("grad", &grad)];
    if let Steps::Each(ages) = &step {
        written.push(("step", ages));
    }
    if let Some(target) = &target {
        written.push((&name, &target.weight));
        read.push(("index", &target.index));
    }
    disjoint(&written, &read)?;
    let threads = threads(py)?;
    let cfg = AdamW { lr, beta1, beta2, eps, weight_decay, maximize, scale: 1.0 };
    let (value, grad) = (value.f32_mut("value")?, grad.f32("grad")?);
    let m = Codes {
        codes: exp_avg_codes.bytes_mut("exp_avg codes")?,
        scale: exp_avg_scale.f32_mut("exp_avg scale")?,
    };
    let v = Codes {
        codes: exp_avg_sq_codes.bytes_mut("exp_avg_sq codes")?,
        scale: exp_avg_sq_scale.f32_mut("exp_avg_sq scale")?,
    };
    let clock = match &mut step {
        Steps::Shared(t) => Clock::Shared(*t),
        Steps::Each(ages) => Clock::Each(ages.i32_mut("step")?),
    };
    with_target!(target, name.as_str(), t => {
        py.allow_threads(|| adamw::step_coded(threads, &cfg, clock, None, value, grad, m, v, t))
    })?;
    Ok(())
}

/// The 256 numbers that the codes of 8-bit moments stand for, ascending, in float32.
#[pyfunction]
fn code_levels<'py>(py: Python<'py>, signed: bool) -> Bound<'py, PyArray1<f32>> {
    PyArray1::from_slice(py, lowbit::levels(signed))
}

/// `codes` (uint8) and `scale` (float32, one for 256 numbers) of float32 numbers.
#[pyfunction]
fn quantise_(
    py: Python<'_>,
    mut codes: Tensor,
    mut scale: Tensor,
    x: Tensor,
    signed: bool,
) -> PyResult<()> {
    disjoint(&[("codes", &codes), ("scale", &scale)], &[("x", &x)])?;
    let threads = threads(py)?;
    let x = x.f32("x")?;
    let kept = Codes { codes: codes.bytes_mut("codes")?, scale: scale.f32_mut("scale")? };
    py.allow_threads(|| lowbit::quantise(threads, x, signed, kept))?;
    Ok(())
}

/// `out` (float32) = what codes and scales stand for.
#[pyfunction]
fn dequantise_(
    py: Python<'_>,
    mut out: Tensor,
    codes: Tensor,
    scale: Tensor,
    signed: bool,
) -> PyResult<()> {
    disjoint(&[("out", &out)], &[("codes", &codes), ("scale", &scale)])?;
    let threads = threads(py)?;
    let (codes, scale) = (codes.bytes("codes")?, scale.f32("scale")?);
    let out = out.f32_mut("out")?;
    py.allow_threads(|| lowbit::dequantise(threads, codes, scale, signed, out))?;
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

/// `rows` and `columns` = means of the squares of the selected `x` over each row and column of a tensor whose
/// last dimensions are `height` and `width` (float32; 0 where none is selected).
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn line_means_(
    py: Python<'_>,
    mut rows: Tensor,
    mut columns: Tensor,
    x: Tensor,
    index: Tensor,
    height: usize,
    width: usize,
    name: &str,
) -> PyResult<()> {
    disjoint(&[("rows", &rows), ("columns", &columns)], &[("x", &x), ("index", &index)])?;
    let (threads, shape) = (threads(py)?, Shape { height, width });
    let (rows, columns) = (rows.f32_mut("rows")?, columns.f32_mut("columns")?);
    let x = x.f32("x")?;
    with_index!(index.index("index")?, i => {
        py.allow_threads(|| lines::means(threads, name, x, i, shape, rows, columns))
    })?;
    Ok(())
}

/// `out` = the second moment of each selected element from means of rows and columns, or `grad` by its root.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn line_estimate_(
    py: Python<'_>,
    mut out: Tensor,
    rows: Tensor,
    columns: Tensor,
    grad: Option<Tensor>,
    index: Tensor,
    height: usize,
    width: usize,
    eps: f64,
    name: &str,
) -> PyResult<()> {
    let mut read = vec![("rows", &rows), ("columns", &columns), ("index", &index)];
    if let Some(grad) = &grad {
        read.push(("grad", grad));
    }
    disjoint(&[("out", &out)], &read)?;
    let (threads, shape) = (threads(py)?, Shape { height, width });
    let (rows, columns) = (rows.f32("rows")?, columns.f32("columns")?);
    let grad = match &grad {
        Some(grad) => Some(grad.f32("grad")?),
        None => None,
    };
    let out = out.f32_mut("out")?;
    with_index!(index.index("index")?, i => {
        py.allow_threads(|| {
            lines::estimate(threads, name, rows, columns, i, shape, eps, grad, out)
        })
    })?;
    Ok(())
}

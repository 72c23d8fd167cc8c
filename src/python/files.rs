//! Checkpoints and deltas on disk. Results come as JSON text: they are for reading, not for computing.
use super::threads;
use crate::delta::{self, DiffOptions, Run};
use crate::error::{Error, Result};
use pyo3::prelude::*;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

pub(super) fn add(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(diff_files, m)?)?;
    m.add_function(wrap_pyfunction!(apply_files, m)?)?;
    m.add_function(wrap_pyfunction!(revert_files, m)?)?;
    m.add_function(wrap_pyfunction!(verify_files, m)?)?;
    m.add_function(wrap_pyfunction!(show_files, m)?)?;
    Ok(())
}

/// Runs `f` without the GIL; a signal such as Ctrl-C ends it between two tensors.
fn run<T: Send>(py: Python<'_>, f: impl FnOnce(Run<'_>) -> Result<T> + Send) -> PyResult<T> {
    let threads = threads(py)?;
    let signal = Mutex::new(None);
    let go_on = || {
        Python::with_gil(|py| py.check_signals()).map_err(|e| {
            *signal.lock().unwrap_or_else(PoisonError::into_inner) = Some(e);
            Error::Stopped
        })
    };
    let result = py.allow_threads(|| f(Run { threads, go_on: &go_on }));
    match signal.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(e) => Err(e),
        None => Ok(result?),
    }
}

/// Compares two checkpoints; with `out`, writes the delta.
#[pyfunction]
#[pyo3(signature = (base, tuned, out=None, *, reversible=false, overwrite=false, base_model=None,
                    metadata_json=None))]
#[allow(clippy::too_many_arguments)]
fn diff_files(
    py: Python<'_>,
    base: PathBuf,
    tuned: PathBuf,
    out: Option<PathBuf>,
    reversible: bool,
    overwrite: bool,
    base_model: Option<String>,
    metadata_json: Option<String>,
) -> PyResult<String> {
    let metadata = serde_json::from_str(metadata_json.as_deref().unwrap_or("{}"));
    let metadata = metadata.map_err(|e| Error::Value {
        name: "metadata_json".to_string(),
        rule: "valid JSON".to_string(),
        got: e.to_string(),
    })?;
    let base_model = base_model.as_deref();
    let options = DiffOptions { reversible, overwrite, base_model, metadata };
    let stats = run(py, |run| delta::diff(run, &base, &tuned, out.as_deref(), &options))?;
    Ok(stats.to_string())
}

/// Writes a base with a delta's changes.
#[pyfunction]
#[pyo3(signature = (base, delta, out, *, force=false, overwrite=false))]
fn apply_files(
    py: Python<'_>,
    base: PathBuf,
    delta: PathBuf,
    out: PathBuf,
    force: bool,
    overwrite: bool,
) -> PyResult<String> {
    let stats = run(py, |run| delta::apply(run, &base, &delta, &out, force, overwrite))?;
    Ok(stats.to_string())
}

/// Writes a tuned checkpoint without a delta's changes.
#[pyfunction]
#[pyo3(signature = (tuned, delta, out, *, base=None, force=false, overwrite=false))]
fn revert_files(
    py: Python<'_>,
    tuned: PathBuf,
    delta: PathBuf,
    out: PathBuf,
    base: Option<PathBuf>,
    force: bool,
    overwrite: bool,
) -> PyResult<String> {
    let stats =
        run(py, |run| delta::revert(run, &tuned, &delta, &out, base.as_deref(), force, overwrite))?;
    Ok(stats.to_string())
}

/// The names of the tensors that are not as the delta's base (or its result) has them.
#[pyfunction]
#[pyo3(signature = (checkpoint, delta, *, result=false))]
fn verify_files(
    py: Python<'_>,
    checkpoint: PathBuf,
    delta: PathBuf,
    result: bool,
) -> PyResult<String> {
    let names = run(py, |run| delta::verify(run, &checkpoint, &delta, result))?;
    Ok(serde_json::Value::from(names).to_string())
}

/// What a delta says of itself, and its sizes.
#[pyfunction]
fn show_files(py: Python<'_>, delta: PathBuf) -> PyResult<String> {
    Ok(py.allow_threads(|| delta::show(&delta))?.to_string())
}

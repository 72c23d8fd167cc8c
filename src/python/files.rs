//! Checkpoints and deltas on disk. Results come as JSON text: they are for reading, not for computing.
use super::threads;
use crate::delta::{self, DiffOptions};
use crate::error::Error;
use pyo3::prelude::*;
use std::path::PathBuf;

pub(super) fn add(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(diff_files, m)?)?;
    m.add_function(wrap_pyfunction!(apply_files, m)?)?;
    m.add_function(wrap_pyfunction!(revert_files, m)?)?;
    m.add_function(wrap_pyfunction!(verify_files, m)?)?;
    m.add_function(wrap_pyfunction!(show_files, m)?)?;
    Ok(())
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
    let threads = threads(py)?;
    let metadata = serde_json::from_str(metadata_json.as_deref().unwrap_or("{}"));
    let metadata = metadata.map_err(|e| Error::Value {
        name: "metadata_json".to_string(),
        rule: "valid JSON".to_string(),
        got: e.to_string(),
    })?;
    let base_model = base_model.as_deref();
    let options = DiffOptions { reversible, overwrite, base_model, metadata };
    let stats =
        py.allow_threads(|| delta::diff(threads, &base, &tuned, out.as_deref(), &options))?;
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
    let threads = threads(py)?;
    let stats =
        py.allow_threads(|| delta::apply(threads, &base, &delta, &out, force, overwrite))?;
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
    let threads = threads(py)?;
    let stats = py.allow_threads(|| {
        delta::revert(threads, &tuned, &delta, &out, base.as_deref(), force, overwrite)
    })?;
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
    let threads = threads(py)?;
    let names = py.allow_threads(|| delta::verify(threads, &checkpoint, &delta, result))?;
    Ok(serde_json::Value::from(names).to_string())
}

/// What a delta says of itself, and its sizes.
#[pyfunction]
fn show_files(py: Python<'_>, delta: PathBuf) -> PyResult<String> {
    Ok(py.allow_threads(|| delta::show(&delta))?.to_string())
}

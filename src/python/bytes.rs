//! Bits of any tensor: what differs, and the fingerprint. Tensors come as their raw bytes (uint8).
use super::{array, threads};
use crate::bridge::Tensor;
use crate::io;
use crate::kernel::bits;
use pyo3::prelude::*;
use std::path::PathBuf;

pub(super) fn add(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(diff, m)?)?;
    m.add_function(wrap_pyfunction!(fingerprint, m)?)?;
    m.add_function(wrap_pyfunction!(file_hash, m)?)?;
    Ok(())
}

/// Positions of the elements (of `width` bytes) whose bits differ.
#[pyfunction]
fn diff(
    py: Python<'_>,
    base: Tensor,
    tuned: Tensor,
    width: usize,
    name: String,
) -> PyResult<Py<PyAny>> {
    let threads = threads(py)?;
    let (a, b) = (base.bytes(&name)?, tuned.bytes(&name)?);
    let positions = py.allow_threads(|| bits::diff(threads, width, a, b))?;
    Ok(array(py, positions))
}

/// BLAKE3 of a file (64 hex digits, as `b3sum` prints them).
#[pyfunction]
fn file_hash(py: Python<'_>, path: PathBuf) -> PyResult<String> {
    Ok(py.allow_threads(|| io::file_hash(&path))?)
}

/// The hash of a tensor, as if the elements at `index` were `values`.
#[pyfunction]
fn fingerprint(
    py: Python<'_>,
    bytes: Tensor,
    dtype: &str,
    shape: Vec<usize>,
    index: Option<Tensor>,
    values: Option<Tensor>,
) -> PyResult<String> {
    let threads = threads(py)?;
    let data = bytes.bytes("bytes")?;
    let patch = match (&index, &values) {
        (Some(index), Some(values)) => Some((index.index("index")?, values.bytes("values")?)),
        _ => None,
    };
    Ok(py.allow_threads(|| bits::fingerprint(threads, dtype, &shape, data, patch))?)
}

//! Every Rust error becomes one Python exception, here and nowhere else.
use crate::Error;
use pyo3::{PyErr, import_exception};

import_exception!(retouch.errors, ShapeError);
import_exception!(retouch.errors, LayoutError);
import_exception!(retouch.errors, HyperparameterError);
import_exception!(retouch.errors, ScoreError);
import_exception!(retouch.errors, BudgetError);
import_exception!(retouch.errors, MaskError);
import_exception!(retouch.errors, BaseMismatchError);
import_exception!(retouch.errors, FormatError);

impl From<Error> for PyErr {
    fn from(e: Error) -> PyErr {
        let text = e.to_string();
        match e {
            Error::Length { .. } => ShapeError::new_err(text),
            Error::Layout { .. } | Error::Overlap { .. } => LayoutError::new_err(text),
            Error::Value { .. } => HyperparameterError::new_err(text),
            Error::NotANumber { .. } | Error::Number { .. } => ScoreError::new_err(text),
            Error::Budget { .. } => BudgetError::new_err(text),
            Error::Index { .. } => MaskError::new_err(text),
            Error::Base { .. } => BaseMismatchError::new_err(text),
            Error::Stopped => pyo3::exceptions::PyKeyboardInterrupt::new_err(text),
            Error::Format { .. } => FormatError::new_err(text),
            Error::Io { path, source } => {
                // errno and file name make Python choose FileNotFoundError, PermissionError, ...
                match source.raw_os_error() {
                    Some(code) => pyo3::exceptions::PyOSError::new_err((
                        code,
                        source.to_string(),
                        path.display().to_string(),
                    )),
                    None => pyo3::exceptions::PyOSError::new_err(text),
                }
            }
        }
    }
}

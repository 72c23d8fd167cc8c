//! Selective parameter updates: the numbers live here, Python only names them.
//!
//! A module uses only those on its left:
//! `error` < `num` < `view` < `kernel` < `io` < `delta` < `bridge` < `python`
//! (`bridge` itself uses only `error`, `num` and `view`).
pub mod delta;
pub mod error;
pub mod io;
pub mod kernel;
pub mod num;
pub mod view;

#[cfg(feature = "python")]
mod bridge;
#[cfg(feature = "python")]
mod python;

pub use error::{Error, Result};

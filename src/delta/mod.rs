//! Deltas on disk: what changed between two checkpoints, and how to change it there and back.
//!
//! Every operation goes through the tensors one at a time; beside the maps of its files it holds the
//! positions and a block of one tensor.
mod apply;
mod check;
mod config;
mod diff;

use crate::error::Result;

/// How an operation runs.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    /// threads of the kernels; they change no bit of a result
    pub threads: usize,
    /// asked before every tensor: an error ends the operation, and nothing is left of it
    pub go_on: &'a (dyn Fn() -> Result<()> + Sync),
}

impl Run<'_> {
    /// Runs to the end.
    pub fn new(threads: usize) -> Self {
        Run { threads, go_on: &|| Ok(()) }
    }
}

pub use apply::{apply, revert};
pub use check::{show, verify};
pub use config::{CONFIG, Coding, Delta, Encoding, Entry, Kind, WEIGHTS};
pub use diff::{DiffOptions, diff};

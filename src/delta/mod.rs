//! Deltas on disk: what changed between two checkpoints, and how to change it there and back.
//!
//! Every operation goes through the tensors one at a time; beside the maps of its files it holds the
//! positions and a block of one tensor.
mod apply;
mod check;
mod config;
mod diff;

pub use apply::{apply, revert};
pub use check::{show, verify};
pub use config::{CONFIG, Delta, Encoding, Entry, Kind, WEIGHTS};
pub use diff::{DiffOptions, diff};

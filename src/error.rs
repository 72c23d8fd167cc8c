//! One error type for the crate: a variant for each thing that a caller can do wrong.
use std::path::PathBuf;
use thiserror::Error;

/// What can go wrong. Fields carry the name, what came and what was wanted.
#[derive(Debug, Error)]
pub enum Error {
    /// Two buffers that must have the same length do not.
    #[error("{name} has {got} elements, expected {want}")]
    Length {
        /// name of the buffer
        name: String,
        /// its length
        got: usize,
        /// the length asked for
        want: usize,
    },
    /// A tensor of a dtype, device, shape or stride that is not taken.
    #[error("{name} must be {want}, got {got}")]
    Layout {
        /// name of the tensor
        name: String,
        /// what came
        got: String,
        /// what is taken
        want: String,
    },
    /// Two tensors of one call share memory although one of them is written.
    #[error("{first} and {second} share memory, but one of them is written")]
    Overlap {
        /// name of one
        first: String,
        /// name of the other
        second: String,
    },
    /// A number out of its range.
    #[error("{name} must be {rule}, got {got}")]
    Value {
        /// its name
        name: String,
        /// its rule
        rule: String,
        /// what came
        got: String,
    },
    /// A score that is not a number.
    #[error("the score of {name} is NaN at flat position {position}; selection needs numbers")]
    NotANumber {
        /// name of the parameter
        name: String,
        /// flat position of the first NaN
        position: usize,
    },
    /// A weight that is not a number.
    #[error(
        "{name} is NaN at flat position {position}, or a difference of infinities; merging needs numbers"
    )]
    Number {
        /// name of the tensor, and of its model where it is known
        name: String,
        /// flat position of the first NaN
        position: usize,
    },
    /// A budget that cannot be met.
    #[error("cannot select {k} of {eligible} eligible coordinates")]
    Budget {
        /// how many were asked for
        k: usize,
        /// how many there are
        eligible: usize,
    },
    /// Positions that are not ascending, not unique or out of range.
    #[error("index of {name} is not valid: {why}")]
    Index {
        /// name of the parameter
        name: String,
        /// what is wrong
        why: String,
    },
    /// A delta met a base that is not its own.
    #[error(
        "this is not the base that the delta was made from: {} tensor(s) differ, first {}",
        .names.len(),
        .names.iter().take(5).map(String::as_str).collect::<Vec<_>>().join(", ")
    )]
    Base {
        /// the tensors that differ
        names: Vec<String>,
    },
    /// A file that is damaged, truncated or of another format.
    #[error("{}: {why}", .path.display())]
    Format {
        /// the file
        path: PathBuf,
        /// what is wrong
        why: String,
    },
    /// The caller asked to stop.
    #[error("stopped before the end; nothing was written")]
    Stopped,
    /// The operating system refused.
    #[error("{}: {source}", .path.display())]
    Io {
        /// the file
        path: PathBuf,
        /// its reason
        source: std::io::Error,
    },
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

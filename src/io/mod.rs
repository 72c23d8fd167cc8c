//! Files: safetensors checkpoints read through a memory map and written tensor by tensor. The only place
//! that names the file system.
//!
//! Nothing here trusts a file: every length and offset is checked, and what is wrong comes back as
//! [`Error::Format`] with the path. Output is staged beside its final name and appears there complete.
mod checkpoint;
mod header;
mod staged;
mod writer;

pub use checkpoint::{Checkpoint, Shard, Tensor, read_json, side_files};
pub use header::{Entry, Header, bits, width};
pub use staged::{Output, refuse_inputs};
pub(crate) use writer::aligned;
pub use writer::{Writer, layout};

use crate::error::{Error, Result};
use std::path::Path;

/// The name of the single file of a checkpoint folder.
pub const SINGLE: &str = "model.safetensors";
/// The name of the index of a sharded checkpoint folder.
pub const INDEX: &str = "model.safetensors.index.json";

/// BLAKE3 of a file, in hex: what `b3sum` prints. On the calling thread.
pub fn file_hash(path: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_mmap(path).map_err(os(path))?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// Names the path in an error of the operating system.
pub(crate) fn os(path: &Path) -> impl FnOnce(std::io::Error) -> Error + '_ {
    move |source| Error::Io { path: path.to_path_buf(), source }
}

/// A file that is not what it should be.
pub(crate) fn format(path: &Path, why: impl Into<String>) -> Error {
    Error::Format { path: path.to_path_buf(), why: why.into() }
}

/// Size of a file in bytes.
pub fn file_size(path: &Path) -> Result<u64> {
    Ok(std::fs::metadata(path).map_err(os(path))?.len())
}

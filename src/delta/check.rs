//! Does a checkpoint belong to a delta?
use super::Run;
use super::config::{CONFIG, Delta, Entry, WEIGHTS};
use crate::error::{Error, Result};
use crate::io::{self, Checkpoint, Tensor};
use crate::kernel::bits;
use serde_json::{Value, json};
use std::path::Path;

/// Which state of a tensor is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Base,
    Result,
}

impl Entry {
    pub(super) fn hash(&self, side: Side) -> Option<&str> {
        match side {
            Side::Base => self.base_hash.as_deref(),
            Side::Result => self.result_hash.as_deref(),
        }
    }
    /// Whether the tensor exists in that state.
    pub(super) fn exists(&self, side: Side) -> bool {
        use super::config::Kind::{Added, Removed};
        !matches!((self.kind, side), (Added, Side::Base) | (Removed, Side::Result))
    }
}

pub(super) fn hash(run: Run<'_>, t: Tensor<'_>) -> Result<String> {
    bits::fingerprint(run.threads, t.dtype, t.shape, t.bytes, None)
}

/// Whether a tensor is in that state, under every name that the checkpoint has for it. `sides` are the
/// states that will do.
fn matches(
    run: Run<'_>,
    checkpoint: &Checkpoint,
    delta: &Delta,
    name: &str,
    entry: &Entry,
    sides: &[Side],
) -> Result<bool> {
    let mut found = false;
    for tensor in delta.names_of(name).filter_map(|n| checkpoint.get(n)) {
        found = true;
        if tensor.dtype != entry.dtype || tensor.shape != entry.shape {
            return Ok(false);
        }
        let there = sides.iter().filter(|side| entry.exists(**side));
        let wanted: Vec<_> = there.map(|side| entry.hash(*side)).collect();
        if wanted.is_empty() {
            return Ok(false);
        }
        // a delta that was made without its base knows no hash: nothing to compare with
        // but what is added twice is wrong: there the state that is expected must be known to be one
        let known = if entry.kind.adds() {
            sides.first().is_some_and(|side| entry.hash(*side).is_some())
        } else {
            wanted.iter().all(Option::is_some)
        };
        if known && !wanted.contains(&Some(hash(run, tensor)?.as_str())) {
            return Ok(false);
        }
    }
    Ok(found || sides.iter().any(|side| !entry.exists(*side)))
}

/// The tensors of a checkpoint that are in none of the given states.
pub(super) fn differing(
    run: Run<'_>,
    checkpoint: &Checkpoint,
    delta: &Delta,
    sides: &[Side],
) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for (name, entry) in &delta.tensors {
        (run.go_on)()?;
        if !matches(run, checkpoint, delta, name, entry, sides)? {
            names.push(name.clone());
        }
    }
    Ok(names)
}

/// The tensors that are not as the delta wants its base (or, with `result`, as it leaves them).
pub fn verify(run: Run<'_>, checkpoint: &Path, delta: &Path, result: bool) -> Result<Vec<String>> {
    let (checkpoint, delta) = (Checkpoint::open(checkpoint)?, Delta::open(delta)?);
    let side = if result { Side::Result } else { Side::Base };
    differing(run, &checkpoint, &delta, &[side])
}

/// Everything a delta says of itself, and its sizes in bytes. Reads and checks all positions.
pub fn show(delta: &Path) -> Result<Value> {
    let delta = Delta::open(delta)?;
    let (mut index, mut values, mut old, mut whole) = (0, 0, 0, 0);
    for (name, entry) in &delta.tensors {
        let size = |suffix| delta.stored(name, suffix).map_or(0, |t| t.bytes.len());
        if entry.kind.has_index() {
            delta.positions(name, entry)?;
        }
        index += size(".idx");
        values += size(".val") + delta.added_bytes(name, entry);
        old += size(".old");
        whole += size("");
    }
    let bytes = io::file_size(&delta.path.join(WEIGHTS))?;
    let text = io::file_size(&delta.path.join(CONFIG))?;
    Ok(json!({
        "path": delta.path.display().to_string(), "config": delta.json,
        "bytes": {
            "total": bytes + text, "index": index, "values": values, "old": old, "whole": whole,
        },
        "changed": delta.tensors.values().map(|e| e.count).sum::<usize>(),
        "reversible": delta.reversible(),
    }))
}

impl Delta {
    /// Whether it holds the old values of everything that it changes.
    pub fn reversible(&self) -> bool {
        let restorable = |(name, e): (&String, &Entry)| {
            !e.exists(Side::Base) || self.stored(name, ".old").is_some()
        };
        self.tensors.iter().all(restorable)
    }
}

/// Refuses a checkpoint that cannot take the change whatever the caller wishes: shapes must fit.
pub(super) fn check_shapes(checkpoint: &Checkpoint, delta: &Delta) -> Result<()> {
    for (name, entry) in delta.tensors.iter().filter(|(_, e)| e.kind == super::Kind::Sparse) {
        let mut found = false;
        for n in delta.names_of(name) {
            let Some(t) = checkpoint.get(n) else { continue };
            found = true;
            if t.dtype != entry.dtype || t.shape != entry.shape {
                let why = format!(
                    "tensor {n} is {} {:?} here, but {} {:?} in the delta",
                    t.dtype, t.shape, entry.dtype, entry.shape
                );
                return Err(io::format(&checkpoint.path, why));
            }
        }
        if !found {
            return Err(io::format(&checkpoint.path, format!("it has no tensor {name}")));
        }
    }
    Ok(())
}

/// The error for tensors that are not as the delta needs them.
pub(super) fn refuse(names: Vec<String>) -> Result<()> {
    if names.is_empty() { Ok(()) } else { Err(Error::Base { names }) }
}

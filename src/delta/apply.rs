//! A checkpoint and a delta to another checkpoint, there and back.
use super::Run;
use super::check::{Side, check_shapes, differing, hash, refuse};
use super::config::{Delta, Entry, Kind};
use crate::error::{Error, Result};
use crate::io::{self, Checkpoint, Output, Shard, Tensor, Writer};
use crate::kernel::bits::{self, Changes, Hash};
use crate::kernel::change;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// What becomes of one tensor of a checkpoint.
enum Edit<'a> {
    /// it is left out
    Drop,
    /// elements at the delta's positions get the bytes of these values
    Values(&'a str, &'a Entry, &'a [u8]),
    /// elements at the delta's positions get the bytes that this whole tensor has there
    Copied(&'a str, &'a Entry, &'a [u8]),
    /// the delta's numbers are added
    Plus(&'a str, &'a Entry),
    /// it is this one
    Whole(&'a Entry, &'a [u8]),
}

struct Job<'a> {
    run: Run<'a>,
    source: &'a Checkpoint,
    delta: &'a Delta,
    edits: BTreeMap<&'a str, Edit<'a>>,
    /// the state that every touched tensor must have afterwards; nothing is checked without
    side: Option<Side>,
}

/// Writes `base` with the changes of the delta. `force` skips the checks of what it was made from.
pub fn apply(
    run: Run<'_>,
    base: &Path,
    delta: &Path,
    out: &Path,
    force: bool,
    overwrite: bool,
) -> Result<Value> {
    io::refuse_inputs(out, &[base, delta])?;
    let (source, delta) = (Checkpoint::open(base)?, Delta::open(delta)?);
    let output = Output::new(out, is_folder(out, &source)?, overwrite)?;
    if !force {
        // a tensor that has the result already stays as it is: applying twice is applying once
        refuse(differing(run, &source, &delta, &[Side::Base, Side::Result])?)?;
    }
    check_shapes(&source, &delta)?;
    let mut edits = BTreeMap::new();
    for (name, entry) in &delta.tensors {
        for target in targets(&source, &delta, name) {
            let edit = match entry.kind {
                Kind::Sparse => Edit::Values(name, entry, delta.bytes(name, ".val")?),
                Kind::Dense | Kind::Added => Edit::Whole(entry, delta.bytes(name, "")?),
                Kind::Removed => Edit::Drop,
                Kind::SparseAdd | Kind::DenseAdd | Kind::LowRank => {
                    let now = source.get(target).map(|t| hash(run, t)).transpose()?;
                    if now.is_some() && now == entry.result_hash {
                        continue; // added already
                    }
                    Edit::Plus(name, entry)
                }
            };
            edits.insert(target, edit);
        }
    }
    let side = (!force).then_some(Side::Result);
    Job { run, source: &source, delta: &delta, edits, side }.run(output, out)
}

/// Writes `tuned` without the changes of the delta, with the old values of the delta or of `base`.
pub fn revert(
    run: Run<'_>,
    tuned: &Path,
    delta: &Path,
    out: &Path,
    base: Option<&Path>,
    force: bool,
    overwrite: bool,
) -> Result<Value> {
    let inputs: Vec<_> = [tuned, delta].into_iter().chain(base).collect();
    io::refuse_inputs(out, &inputs)?;
    let (source, delta) = (Checkpoint::open(tuned)?, Delta::open(delta)?);
    let base = base.map(Checkpoint::open).transpose()?;
    if base.is_none() && !delta.reversible() {
        return Err(Error::Value {
            name: "delta".to_string(),
            rule: "one that holds the old values (made with --reversible); \
                   or name the base checkpoint with --base BASE"
                .to_string(),
            got: format!("{} without them", delta.path.display()),
        });
    }
    let output = Output::new(out, is_folder(out, &source)?, overwrite)?;
    if !force {
        refuse(differing(run, &source, &delta, &[Side::Result, Side::Base])?)?;
        if let Some(base) = &base {
            refuse(differing(run, base, &delta, &[Side::Base])?)?;
        }
    }
    check_shapes(&source, &delta)?;
    if let Some(base) = &base {
        check_shapes(base, &delta)?;
    }
    let mut edits = BTreeMap::new();
    for (name, entry) in &delta.tensors {
        let old = delta.stored(name, ".old").map(|t| t.bytes);
        let original = base.as_ref().and_then(|b| delta.names_of(name).find_map(|n| b.get(n)));
        for target in targets(&source, &delta, name) {
            let edit = match (entry.kind, old, original) {
                (Kind::Added, ..) => Edit::Drop,
                (kind, Some(old), _) if kind.has_index() => Edit::Values(name, entry, old),
                (kind, None, Some(t)) if kind.has_index() => Edit::Copied(name, entry, t.bytes),
                (_, Some(old), _) => Edit::Whole(entry, old),
                (_, None, Some(t)) if t.dtype == entry.dtype && t.shape == entry.shape => {
                    Edit::Whole(entry, t.bytes)
                }
                _ => {
                    let path = base.as_ref().map_or(&delta.path, |b| &b.path);
                    return Err(io::format(path, format!("no old values of tensor {name}")));
                }
            };
            edits.insert(target, edit);
        }
    }
    let side = (!force).then_some(Side::Base);
    Job { run, source: &source, delta: &delta, edits, side }.run(output, out)
}

/// The names to edit: those the checkpoint has, or the tensor's own if it has none.
fn targets<'a>(source: &Checkpoint, delta: &'a Delta, name: &'a str) -> Vec<&'a str> {
    let mut names: Vec<_> = delta.names_of(name).filter(|n| source.get(n).is_some()).collect();
    if names.is_empty() {
        names.push(name);
    }
    names
}

/// A name that ends in `.safetensors` is a file, any other a folder.
fn is_folder(out: &Path, source: &Checkpoint) -> Result<bool> {
    let file = out.extension().is_some_and(|e| e == "safetensors");
    if file && source.shards.len() > 1 {
        return Err(Error::Value {
            name: "out".to_string(),
            rule: format!("a folder, because {} has several files", source.path.display()),
            got: out.display().to_string(),
        });
    }
    Ok(!file)
}

impl Job<'_> {
    fn run(self, output: Output, out: &Path) -> Result<Value> {
        let folder = is_folder(out, self.source)?;
        let last = self.source.shards.len() - 1;
        let new = self
            .edits
            .iter()
            .filter(|(n, e)| !matches!(e, Edit::Drop) && self.source.get(n).is_none());
        let new: Vec<_> = new.map(|(n, _)| *n).collect();
        let mut weight_map = BTreeMap::new();
        let (mut bytes, mut tensors) = (0, 0);
        for (s, shard) in self.source.shards.iter().enumerate() {
            let name = if self.source.folder { shard.file_name() } else { io::SINGLE.to_string() };
            let path = if folder { output.path().join(&name) } else { output.path().to_path_buf() };
            let added: &[&str] = if s == last { &new } else { &[] };
            for (tensor, size) in self.shard(shard, added, &path)? {
                weight_map.insert(tensor, name.clone());
                (bytes, tensors) = (bytes + size, tensors + 1);
            }
        }
        if folder {
            if let Some(mut index) = self.source.index.clone() {
                index["weight_map"] = json!(weight_map);
                index["metadata"]["total_size"] = json!(bytes);
                output.write(io::INDEX, format!("{index:#}\n").as_bytes())?;
            }
            if self.source.folder {
                for file in self.source.side_files()? {
                    output.copy(&self.source.path, &file)?;
                }
            }
        }
        output.publish()?;
        Ok(json!({
            "out": out.display().to_string(), "bytes": bytes, "tensors": tensors,
            "changed_tensors": self.delta.tensors.len(),
            "changed": self.delta.tensors.values().map(|e| e.count).sum::<usize>(),
        }))
    }

    /// Writes one file; returns its tensors and their sizes.
    fn shard(&self, shard: &Shard, added: &[&str], path: &Path) -> Result<Vec<(String, usize)>> {
        let mut plan = Vec::new();
        let mut same = added.is_empty();
        for e in &shard.header.entries {
            match self.edits.get(e.name.as_str()) {
                Some(Edit::Drop) => same = false,
                Some(Edit::Whole(new, _)) => {
                    same &= new.dtype == e.dtype && new.shape == e.shape;
                    plan.push((e.name.clone(), new.dtype.clone(), new.shape.clone()));
                }
                _ => plan.push((e.name.clone(), e.dtype.clone(), e.shape.clone())),
            }
        }
        for name in added {
            if let Some(Edit::Whole(new, _)) = self.edits.get(name) {
                plan.push((name.to_string(), new.dtype.clone(), new.shape.clone()));
            }
        }
        let mut writer;
        let header;
        if same {
            // the head is kept byte for byte, so that only the changed values differ
            header = shard.header.clone();
            writer = Writer::with_head(path, &header, shard.head())?;
        } else {
            io::aligned(&mut plan);
            header = io::layout(path, plan, shard.header.metadata.clone())?;
            writer = Writer::create(path, &header)?;
        }
        for e in &header.entries {
            (self.run.go_on)()?;
            self.tensor(&mut writer, &e.name, shard.get(&e.name))?;
        }
        writer.finish()?;
        Ok(header.entries.iter().map(|e| (e.name.clone(), e.end - e.begin)).collect())
    }

    fn tensor(&self, writer: &mut Writer, name: &str, old: Option<Tensor<'_>>) -> Result<()> {
        let mut at = 0;
        let mut put = |writer: &mut Writer, block: &[u8]| {
            writer.put(name, at, block)?;
            at += block.len();
            Ok(())
        };
        let Some(edit) = self.edits.get(name) else {
            return old.map_or(Ok(()), |t| put(writer, t.bytes));
        };
        let sum;
        let (bytes, patch, entry) = match (edit, old) {
            (Edit::Plus(n, entry), Some(t)) if entry.kind.has_index() => {
                let positions = self.delta.positions(n, entry)?;
                let width = io::width(&entry.dtype).unwrap_or(1);
                let before = bits::take(n, width, t.bytes, positions.index())?;
                let numbers = self.delta.numbers(n, entry)?;
                let values = change::add(n, &entry.dtype, &before, &numbers)?;
                (t.bytes, Some((positions, std::borrow::Cow::Owned(values))), *entry)
            }
            (Edit::Plus(n, entry), Some(t)) => {
                sum = change::add(n, &entry.dtype, t.bytes, &self.delta.numbers(n, entry)?)?;
                (sum.as_slice(), None, *entry)
            }
            (Edit::Values(n, entry, values), Some(t)) => {
                let positions = self.delta.positions(n, entry)?;
                (t.bytes, Some((positions, std::borrow::Cow::Borrowed(*values))), *entry)
            }
            (Edit::Copied(n, entry, whole), Some(t)) => {
                let positions = self.delta.positions(n, entry)?;
                let width = io::width(&entry.dtype).unwrap_or(1);
                let values = bits::take(n, width, whole, positions.index())?;
                (t.bytes, Some((positions, std::borrow::Cow::Owned(values))), *entry)
            }
            (Edit::Whole(entry, bytes), _) => (*bytes, None, *entry),
            _ => return Ok(()),
        };
        let patch = match &patch {
            Some((positions, values)) => {
                let width = io::width(&entry.dtype).unwrap_or(1);
                Some(Changes::new(name, positions.index(), values, width, bytes.len())?)
            }
            None => None,
        };
        let wanted = self.side.and_then(|side| entry.hash(side));
        let mut hash = Hash::new(&entry.dtype, &entry.shape);
        bits::patched(bytes, patch, |block| {
            if wanted.is_some() {
                hash.update(self.run.threads, block);
            }
            put(writer, block)
        })?;
        if wanted.is_some_and(|w| w != hash.finish()) {
            let why = format!("tensor {name} does not come out as its hash in the delta says");
            return Err(io::format(&self.delta.path, why));
        }
        Ok(())
    }
}

//! Two checkpoints to a delta.
use super::Run;
use super::check::hash;
use super::config::{CONFIG, Encoding, Entry, Kind, WEIGHTS, config, encoding};
use crate::error::Result;
use crate::io::{self, Checkpoint, Output, Tensor, Writer};
use crate::kernel::{bits, pack};
use crate::view::{Index, Positions};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Positions that are encoded and written at a time.
const STEP: usize = 1 << 18;

/// What [`diff`] may be told.
#[derive(Debug, Clone)]
pub struct DiffOptions<'a> {
    /// store the old values too
    pub reversible: bool,
    /// replace an existing delta
    pub overwrite: bool,
    /// name of the base, for people
    pub base_model: Option<&'a str>,
    /// free metadata
    pub metadata: Value,
}

/// Compares two checkpoints and, with `out`, writes the delta from `base` to `tuned`.
pub fn diff(
    run: Run<'_>,
    base: &Path,
    tuned: &Path,
    out: Option<&Path>,
    options: &DiffOptions<'_>,
) -> Result<Value> {
    let output = match out {
        Some(out) => {
            io::refuse_inputs(out, &[base, tuned])?;
            Some(Output::new(out, true, options.overwrite)?)
        }
        None => None,
    };
    let (base, tuned) = (Checkpoint::open(base)?, Checkpoint::open(tuned)?);
    let names: BTreeSet<&str> = base.names().chain(tuned.names()).collect();
    let mut entries = BTreeMap::new();
    let mut held = Held::default();
    let (mut total, mut same) = (0_usize, 0_usize);
    for name in &names {
        (run.go_on)()?;
        let (old, new) = (base.get(name), tuned.get(name));
        total += new.map_or(0, |t| t.shape.iter().product());
        held.room = held.room.max(new.map_or(0, |t| t.bytes.len()));
        match compare(run, &tuned.path, name, old, new)? {
            Some((entry, positions)) => {
                if let Some(positions) = positions.filter(|_| output.is_some()) {
                    held.keep(name, positions);
                }
                entries.insert(name.to_string(), entry);
            }
            None => same += 1,
        }
    }
    let config = config(&entries, options.base_model, &options.metadata);
    let mut bytes = 0;
    if let Some(output) = output {
        bytes = write(run, &base, &tuned, &entries, held, options.reversible, &output)?;
        output.write(CONFIG, format!("{config:#}\n").as_bytes())?;
        output.publish()?;
    }
    Ok(json!({
        "out": out.map(|p| p.display().to_string()), "bytes": bytes, "numel": total,
        "changed": entries.values().map(|e| e.count).sum::<usize>(),
        "changed_tensors": entries.len(), "unchanged_tensors": same, "config": config,
    }))
}

/// Positions of the first pass that need not be found again in the second: as many as fit the room,
/// which is that of the largest tensor.
#[derive(Default)]
struct Held {
    room: usize,
    used: usize,
    positions: BTreeMap<String, Positions>,
}

impl Held {
    fn keep(&mut self, name: &str, positions: Positions) {
        let width = if matches!(positions, Positions::Small(_)) { 4 } else { 8 };
        let size = positions.len() * width;
        if self.used + size <= self.room {
            self.used += size;
            self.positions.insert(name.to_string(), positions);
        }
    }
}

/// What became of one tensor; nothing if it is the same.
fn compare(
    run: Run<'_>,
    tuned: &Path,
    name: &str,
    old: Option<Tensor<'_>>,
    new: Option<Tensor<'_>>,
) -> Result<Option<(Entry, Option<Positions>)>> {
    let Some(t) = new.or(old) else { return Ok(None) };
    let numel = t.shape.iter().product();
    let mut entry = Entry {
        kind: Kind::Dense,
        dtype: t.dtype.to_string(),
        shape: t.shape.to_vec(),
        count: numel,
        encoding: Encoding::I64,
        coding: None,
        base_hash: None,
        result_hash: None,
    };
    let mut positions = None;
    match (old, new) {
        (Some(a), Some(b)) => {
            if a.dtype != b.dtype || a.shape != b.shape {
                let why = format!(
                    "tensor {name} is {} {:?} here, but {} {:?} in the base; a delta keeps dtype and \
                     shape: convert or resize one of the two checkpoints first",
                    b.dtype, b.shape, a.dtype, a.shape
                );
                return Err(io::format(tuned, why));
            }
            if let Some(width) = io::width(a.dtype) {
                (entry.count, positions) =
                    bits::diff_up_to(run.threads, width, a.bytes, b.bytes, numel / 2)?;
                if entry.count == 0 {
                    return Ok(None);
                }
                if let Some(positions) = &positions {
                    entry.kind = Kind::Sparse;
                    entry.encoding = encoding(positions.index());
                }
            } else if a.bytes == b.bytes {
                return Ok(None);
            }
        }
        (None, _) => entry.kind = Kind::Added,
        (Some(_), None) => entry.kind = Kind::Removed,
    }
    entry.base_hash = old.map(|t| hash(run, t)).transpose()?;
    entry.result_hash = new.map(|t| hash(run, t)).transpose()?;
    Ok(Some((entry, positions)))
}

/// Writes the tensors of a delta; returns the size of the file.
fn write(
    run: Run<'_>,
    base: &Checkpoint,
    tuned: &Checkpoint,
    entries: &BTreeMap<String, Entry>,
    mut held: Held,
    reversible: bool,
    output: &Output,
) -> Result<usize> {
    let path = output.path().join(WEIGHTS);
    let mut tensors = Vec::new();
    for (name, e) in entries {
        let dtype = e.dtype.clone();
        if e.kind == Kind::Sparse {
            let shape = vec![e.count];
            tensors.push((format!("{name}.idx"), e.encoding.dtype().to_string(), shape.clone()));
            tensors.push((format!("{name}.val"), dtype.clone(), shape.clone()));
            if reversible {
                tensors.push((format!("{name}.old"), dtype, shape));
            }
            continue;
        }
        if e.kind != Kind::Removed {
            tensors.push((name.clone(), dtype.clone(), e.shape.clone()));
        }
        if e.kind != Kind::Added && reversible {
            tensors.push((format!("{name}.old"), dtype, e.shape.clone()));
        }
    }
    io::aligned(&mut tensors);
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    let header = io::layout(&path, tensors, metadata)?;
    let mut writer = Writer::create(&path, &header)?;
    for (name, e) in entries {
        (run.go_on)()?;
        let (old, new) = (base.get(name), tuned.get(name));
        match (e.kind, old, new) {
            (Kind::Sparse, Some(a), Some(b)) => {
                let width = io::width(&e.dtype).unwrap_or(1);
                let positions = match held.positions.remove(name) {
                    Some(positions) => positions,
                    None => bits::diff(run.threads, width, a.bytes, b.bytes)?,
                };
                sparse(&mut writer, name, e, positions.index(), [a, b], reversible)?;
                continue;
            }
            (_, _, Some(b)) => writer.put(name, 0, b.bytes)?,
            _ => {}
        }
        if let (true, Some(a)) = (reversible, old) {
            writer.put(&format!("{name}.old"), 0, a.bytes)?;
        }
    }
    let size = header.entries.last().map_or(0, |e| e.end) + header.to_bytes().len();
    writer.finish()?;
    Ok(size)
}

fn sparse(
    writer: &mut Writer,
    name: &str,
    entry: &Entry,
    index: Index<'_>,
    [old, new]: [Tensor<'_>; 2],
    reversible: bool,
) -> Result<()> {
    let width = io::width(&entry.dtype).unwrap_or(1);
    let names = [format!("{name}.idx"), format!("{name}.val"), format!("{name}.old")];
    let mut at = 0;
    for from in (0..index.len()).step_by(STEP) {
        let to = (from + STEP).min(index.len());
        let coded = match entry.encoding {
            Encoding::Gap16 => pack::gap16(index, from, to),
            _ => pack::raw(index, from, to),
        };
        writer.put(&names[0], at, &coded)?;
        at += coded.len();
        let part = index.part(from, to);
        writer.put(&names[1], from * width, &bits::take(name, width, new.bytes, part)?)?;
        if reversible {
            writer.put(&names[2], from * width, &bits::take(name, width, old.bytes, part)?)?;
        }
    }
    Ok(())
}

//! The delta folder: `delta_config.json` says what changed, `delta.safetensors` holds it.
use crate::error::{Error, Result};
use crate::io::{self, Checkpoint, Tensor};
use crate::kernel::{change, pack};
use crate::view::{Index, Positions, check_index};
use crate::with_index;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Name of the description.
pub const CONFIG: &str = "delta_config.json";
/// Name of the tensors.
pub const WEIGHTS: &str = "delta.safetensors";
const FORMAT: &str = "retouch-delta";
/// What is written; 2 has the kinds that add.
const VERSION: u64 = 1;
const NEWEST: u64 = 2;

/// How a tensor changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// some elements have new values
    Sparse,
    /// the whole tensor is stored
    Dense,
    /// it is new
    Added,
    /// it is gone
    Removed,
    /// numbers are added to some elements
    SparseAdd,
    /// numbers are added to all elements
    DenseAdd,
    /// the product of two matrices is added
    LowRank,
}

impl Kind {
    /// Whether positions are stored.
    pub(super) fn has_index(self) -> bool {
        matches!(self, Kind::Sparse | Kind::SparseAdd)
    }
    /// Whether the result is the base plus numbers.
    pub(super) fn adds(self) -> bool {
        matches!(self, Kind::SparseAdd | Kind::DenseAdd | Kind::LowRank)
    }
}

/// How the numbers that are added are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coding {
    /// F32
    Plain,
    /// one bit each, and one magnitude
    Sign,
    /// I8 with a scale for so many
    Int8(usize),
    /// half a byte, likewise
    Int4(usize),
    /// two F32 matrices
    LowRank,
}

/// How positions are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// U16: the first position, then each gap less one
    Gap16,
    /// I32 positions
    I32,
    /// I64 positions
    I64,
}

const KINDS: [(Kind, &str); 7] = [
    (Kind::Sparse, "sparse-replace"),
    (Kind::Dense, "dense"),
    (Kind::Added, "added"),
    (Kind::Removed, "removed"),
    (Kind::SparseAdd, "sparse-add"),
    (Kind::DenseAdd, "dense-add"),
    (Kind::LowRank, "low-rank"),
];
const ENCODINGS: [(Encoding, &str, &str); 3] = [
    (Encoding::Gap16, "gap16", "U16"),
    (Encoding::I32, "i32", "I32"),
    (Encoding::I64, "i64", "I64"),
];

impl Encoding {
    pub(super) fn dtype(self) -> &'static str {
        ENCODINGS.iter().find(|e| e.0 == self).map_or("", |e| e.2)
    }
}

/// One changed tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// how it changed
    pub kind: Kind,
    /// its dtype
    pub dtype: String,
    /// its sizes
    pub shape: Vec<usize>,
    /// how many elements changed
    pub count: usize,
    /// how positions are stored
    pub encoding: Encoding,
    /// how numbers are stored, of kinds that add
    pub coding: Option<Coding>,
    /// hash before
    pub base_hash: Option<String>,
    /// hash after
    pub result_hash: Option<String>,
}

impl Entry {
    pub(super) fn to_json(&self) -> Value {
        let kind = KINDS.iter().find(|k| k.0 == self.kind).map(|k| k.1);
        let encoding = ENCODINGS.iter().find(|e| e.0 == self.encoding).map(|e| e.1);
        json!({
            "kind": kind, "dtype": self.dtype, "shape": self.shape, "count": self.count,
            "index_encoding": encoding.filter(|_| self.kind.has_index()),
            "base_hash": self.base_hash, "result_hash": self.result_hash,
        })
    }

    fn from_json(value: &Value) -> Option<Entry> {
        let text = |key: &str| value.get(key).and_then(Value::as_str);
        let hash = |key: &str| match value.get(key) {
            None | Some(Value::Null) => Some(None),
            Some(hash) => Some(Some(hash.as_str()?.to_string())),
        };
        let kind = KINDS.iter().find(|k| Some(k.1) == text("kind"))?.0;
        let encoding = match text("index_encoding") {
            None if !kind.has_index() => Encoding::I64,
            name => ENCODINGS.iter().find(|e| Some(e.1) == name)?.0,
        };
        let size = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok());
        let block = || value.get("block").and_then(size).filter(|b| *b > 0);
        let coding = match text("coding") {
            None if !kind.adds() => None,
            Some("plain") => Some(Coding::Plain),
            Some("sign") => Some(Coding::Sign),
            Some("int8") => Some(Coding::Int8(block()?)),
            Some("int4") => Some(Coding::Int4(block()?)),
            Some("low-rank") => Some(Coding::LowRank),
            _ => return None,
        };
        if (kind == Kind::LowRank) != (coding == Some(Coding::LowRank)) {
            return None;
        }
        Some(Entry {
            kind,
            dtype: text("dtype")?.to_string(),
            shape: value.get("shape")?.as_array()?.iter().map(size).collect::<Option<_>>()?,
            count: value.get("count").and_then(size)?,
            encoding,
            coding,
            base_hash: hash("base_hash")?,
            result_hash: hash("result_hash")?,
        })
    }

    /// The tensors that hold the numbers to add: suffix, dtype, shape. `rank` is that of a low-rank one.
    fn parts(&self, rank: usize) -> Vec<(&'static str, &'static str, Vec<usize>)> {
        let n = self.count;
        match self.coding {
            None => vec![],
            Some(Coding::Plain) => vec![(".add", "F32", vec![n])],
            Some(Coding::Sign) => {
                vec![(".bits", "U8", vec![n.div_ceil(8)]), (".scale", "F32", vec![1])]
            }
            Some(Coding::Int8(block)) => {
                vec![(".codes", "I8", vec![n]), (".scale", "F32", vec![n.div_ceil(block)])]
            }
            Some(Coding::Int4(block)) => vec![
                (".codes", "U8", vec![n.div_ceil(2)]),
                (".scale", "F32", vec![n.div_ceil(block)]),
            ],
            Some(Coding::LowRank) => {
                let [out, inputs] = [0, 1].map(|i| self.shape.get(i).copied().unwrap_or(0));
                vec![(".A", "F32", vec![rank, inputs]), (".B", "F32", vec![out, rank])]
            }
        }
    }

    pub(super) fn numel(&self) -> Option<usize> {
        self.shape.iter().try_fold(1_usize, |n, s| n.checked_mul(*s))
    }
}

/// The description of a delta as JSON.
pub(super) fn config(
    tensors: &BTreeMap<String, Entry>,
    base_model: Option<&str>,
    metadata: &Value,
) -> Value {
    let tensors: Map<_, _> = tensors.iter().map(|(n, e)| (n.clone(), e.to_json())).collect();
    json!({
        "format": FORMAT, "format_version": VERSION, "retouch_version": env!("CARGO_PKG_VERSION"),
        "base_model": base_model, "metadata": metadata, "tensors": tensors, "aliases": {},
    })
}

/// Suffix, dtype and shape of a tensor that must or may be stored.
type Want<'a> = (&'a str, &'a str, &'a [usize]);

/// An open delta whose description and tensors agree.
#[derive(Debug)]
pub struct Delta {
    /// its folder
    pub path: PathBuf,
    /// the description as it was read
    pub json: Value,
    /// what changed
    pub tensors: BTreeMap<String, Entry>,
    /// other names of a tensor (tied weights): alias to name
    pub aliases: BTreeMap<String, String>,
    pub(super) weights: Checkpoint,
}

impl Delta {
    /// Opens a folder and checks everything but the positions, which are checked as they are read.
    pub fn open(path: &Path) -> Result<Delta> {
        let file = path.join(CONFIG);
        let json = io::read_json(&file)?;
        let bad = |why: String| Err(io::format(&file, why));
        if json.get("format").and_then(Value::as_str) != Some(FORMAT) {
            return bad(format!("not a delta: \"format\" is not \"{FORMAT}\""));
        }
        let version = json.get("format_version");
        if !version.and_then(Value::as_u64).is_some_and(|v| (VERSION..=NEWEST).contains(&v)) {
            let got = version.unwrap_or(&Value::Null);
            return bad(format!(
                "format_version is {got}, this retouch reads {VERSION} to {NEWEST}; a newer retouch may \
                 read it"
            ));
        }
        let mut tensors = BTreeMap::new();
        let Some(entries) = json.get("tensors").and_then(Value::as_object) else {
            return bad("\"tensors\" is missing".to_string());
        };
        for (name, value) in entries {
            match Entry::from_json(value) {
                Some(entry) => tensors.insert(name.clone(), entry),
                None => return bad(format!("the description of tensor {name} is not valid")),
            };
        }
        let mut aliases = BTreeMap::new();
        let none = Map::new();
        for (alias, name) in json.get("aliases").and_then(Value::as_object).unwrap_or(&none) {
            match name.as_str().filter(|n| tensors.contains_key(*n)) {
                Some(name) if !tensors.contains_key(alias) => {
                    aliases.insert(alias.clone(), name.to_string())
                }
                _ => return bad(format!("alias {alias} is not valid")),
            };
        }
        let weights = Checkpoint::open(&path.join(WEIGHTS))?;
        let delta = Delta { path: path.to_path_buf(), json, tensors, aliases, weights };
        delta.check()?;
        Ok(delta)
    }

    fn bad<T>(&self, why: String) -> Result<T> {
        Err(io::format(&self.path.join(WEIGHTS), why))
    }

    fn check(&self) -> Result<()> {
        let mut known = 0;
        for (name, entry) in &self.tensors {
            let full = entry.shape.as_slice();
            let some = [entry.count];
            let numel = entry.numel().filter(|n| entry.count <= *n);
            let whole = entry.kind.has_index() || !entry.kind.adds() || numel == Some(entry.count);
            let matrix = entry.kind != Kind::LowRank || full.len() == 2;
            let floats = ["F64", "F32", "F16", "BF16"].contains(&entry.dtype.as_str());
            // without a hash nobody could tell whether it was added already
            let adds =
                !entry.kind.adds() || (floats && whole && matrix && entry.base_hash.is_some());
            let width = !entry.kind.has_index() || io::width(&entry.dtype).is_some();
            if numel.is_none() || !adds || !width {
                return self.bad(format!("the description of tensor {name} is not valid"));
            }
            let rank = self.stored(name, ".A").and_then(|t| t.shape.first().copied()).unwrap_or(0);
            let parts = entry.parts(rank);
            let mut adding: Vec<Want<'_>> =
                parts.iter().map(|(s, d, n)| (*s, *d, &n[..])).collect();
            if entry.kind == Kind::SparseAdd {
                adding.push((".idx", entry.encoding.dtype(), &some));
            }
            let (must, may): (&[Want<'_>], &[Want<'_>]) = match entry.kind {
                Kind::SparseAdd => (&adding, &[(".old", &entry.dtype, &some)]),
                Kind::DenseAdd | Kind::LowRank => (&adding, &[(".old", &entry.dtype, full)]),
                Kind::Sparse => (
                    &[(".idx", entry.encoding.dtype(), &some), (".val", &entry.dtype, &some)],
                    &[(".old", &entry.dtype, &some)],
                ),
                Kind::Dense => (&[("", &entry.dtype, full)], &[(".old", &entry.dtype, full)]),
                Kind::Added => (&[("", &entry.dtype, full)], &[]),
                Kind::Removed => (&[], &[(".old", &entry.dtype, full)]),
            };
            for (suffix, dtype, shape) in must.iter().chain(may) {
                let found = self.weights.get(&format!("{name}{suffix}"));
                match found {
                    Some(t) if t.dtype == *dtype && t.shape == *shape => known += 1,
                    None if may.iter().any(|m| m.0 == *suffix) => {}
                    _ => {
                        let want = format!("{name}{suffix} of {dtype} {shape:?}");
                        return self.bad(format!("{CONFIG} promises a tensor {want}"));
                    }
                }
            }
        }
        let there = self.weights.names().count();
        if there != known {
            return self.bad(format!("{there} tensors, but {CONFIG} tells of {known}"));
        }
        Ok(())
    }

    /// The stored tensor of a changed tensor: `.val`, `.old`, or none of these for the whole one.
    pub fn stored(&self, name: &str, suffix: &str) -> Option<Tensor<'_>> {
        self.weights.get(&format!("{name}{suffix}"))
    }

    /// The bytes of a stored tensor that [`Delta::open`] has seen.
    pub(super) fn bytes(&self, name: &str, suffix: &str) -> Result<&[u8]> {
        match self.stored(name, suffix) {
            Some(tensor) => Ok(tensor.bytes),
            None => self.bad(format!("tensor {name}{suffix} is missing")),
        }
    }

    /// The positions of a changed tensor: ascending, unique, in range.
    pub fn positions(&self, name: &str, entry: &Entry) -> Result<Positions> {
        let bytes = self.bytes(name, ".idx")?;
        let numel = entry.numel().unwrap_or(0);
        let read = match entry.encoding {
            Encoding::Gap16 => pack::from_gap16(name, bytes, numel),
            Encoding::I32 => Ok(pack::from_raw(4, bytes)),
            Encoding::I64 => Ok(pack::from_raw(8, bytes)),
        };
        let checked = read.and_then(|positions| {
            with_index!(positions.index(), i => check_index(name, i, numel))?;
            Ok(positions)
        });
        checked.map_err(|e: Error| io::format(&self.path.join(WEIGHTS), e.to_string()))
    }

    /// The numbers that are added to a tensor: to all elements, or to those at its positions.
    pub(super) fn numbers(&self, name: &str, entry: &Entry) -> Result<Vec<f32>> {
        let part = |suffix| self.bytes(name, suffix);
        let n = entry.count;
        match entry.coding {
            None => Ok(Vec::new()),
            Some(Coding::Plain) => Ok(change::plain(part(".add")?)),
            Some(Coding::Sign) => change::signs(part(".bits")?, part(".scale")?, n),
            Some(Coding::Int8(block)) => {
                change::integers(8, part(".codes")?, part(".scale")?, block, n)
            }
            Some(Coding::Int4(block)) => {
                change::integers(4, part(".codes")?, part(".scale")?, block, n)
            }
            Some(Coding::LowRank) => {
                change::product(part(".B")?, part(".A")?, entry.shape[0], entry.shape[1])
            }
        }
    }

    /// The bytes of all tensors that hold what is added.
    pub(super) fn added_bytes(&self, name: &str, entry: &Entry) -> usize {
        let parts = entry.parts(0);
        parts.iter().filter_map(|(s, ..)| self.stored(name, s)).map(|t| t.bytes.len()).sum()
    }

    /// The names under which a checkpoint may hold this tensor.
    pub(super) fn names_of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        let aliases = self.aliases.iter().filter(move |(_, n)| *n == name);
        std::iter::once(name).chain(aliases.map(|(alias, _)| alias.as_str()))
    }
}

/// Ascending positions and how they are best stored.
pub(super) fn encoding(index: Index<'_>) -> Encoding {
    match index {
        _ if pack::fits_gap16(index) => Encoding::Gap16,
        Index::Small(_) => Encoding::I32,
        Index::Large(_) => Encoding::I64,
    }
}

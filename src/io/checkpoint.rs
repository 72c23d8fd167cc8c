//! Reading checkpoints: one file, or a folder with one file or with shards and an index.
use super::header::{Entry, Header};
use super::{INDEX, SINGLE, format, os};
use crate::error::{Error, Result};
use memmap2::Mmap;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// One safetensors file, mapped.
#[derive(Debug)]
pub struct Shard {
    /// where it lies
    pub path: PathBuf,
    /// what is in it
    pub header: Header,
    map: Mmap,
}

/// A tensor where it lies.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    /// dtype as the format spells it
    pub dtype: &'a str,
    /// sizes
    pub shape: &'a [usize],
    /// its bytes
    pub bytes: &'a [u8],
}

impl Shard {
    /// Maps a file and checks its header.
    pub fn open(path: &Path) -> Result<Shard> {
        // asked before it is opened: opening a pipe waits for whoever writes to it
        if !fs::metadata(path).map_err(os(path))?.is_file() {
            return Err(format(path, "not a regular file"));
        }
        let file = File::open(path).map_err(os(path))?;
        let meta = file.metadata().map_err(os(path))?;
        if meta.len() < 8 {
            return Err(format(path, "not a valid safetensors file: shorter than its header"));
        }
        // SAFETY: a read-only private map of a file that we opened. As for every reader of mapped
        // checkpoints, another process that shortens the file meanwhile would kill this one; bytes that
        // change meanwhile are only ever compared, hashed and copied, whatever their value.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(os(path))?;
        let header = Header::parse(path, &map)?;
        Ok(Shard { path: path.to_path_buf(), header, map })
    }

    /// The tensor of an entry of this file.
    pub fn tensor<'a>(&'a self, entry: &'a Entry) -> Tensor<'a> {
        let at = self.header.start;
        let bytes = &self.map[at + entry.begin..at + entry.end];
        Tensor { dtype: &entry.dtype, shape: &entry.shape, bytes }
    }

    /// The head of the file as it lies.
    pub fn head(&self) -> &[u8] {
        &self.map[..self.header.start]
    }

    /// The file's name in its folder.
    pub fn file_name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<Tensor<'_>> {
        self.header.entries.iter().find(|e| e.name == name).map(|e| self.tensor(e))
    }
}

/// A checkpoint: tensors by name over one or more files.
#[derive(Debug)]
pub struct Checkpoint {
    /// the file or folder as it was named
    pub path: PathBuf,
    /// whether it is a folder
    pub folder: bool,
    /// its files, by name
    pub shards: Vec<Shard>,
    /// the index as it was read, if there is one
    pub index: Option<Value>,
    at: BTreeMap<String, (usize, usize)>,
}

/// Reads JSON.
pub fn read_json(path: &Path) -> Result<Value> {
    let text = fs::read(path).map_err(os(path))?;
    serde_json::from_slice(&text).map_err(|e| format(path, format!("not valid JSON: {e}")))
}

impl Checkpoint {
    /// Opens every file and checks that they agree with each other and with the index.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        let folder = fs::metadata(path).map_err(os(path))?.is_dir();
        let (mut index, mut map) = (None, None);
        let files = if !folder {
            vec![path.to_path_buf()]
        } else if path.join(SINGLE).is_file() {
            vec![path.join(SINGLE)]
        } else if path.join(INDEX).is_file() {
            let json = read_json(&path.join(INDEX))?;
            let weights = weight_map(&path.join(INDEX), &json)?;
            let names: BTreeSet<_> = weights.values().cloned().collect();
            (index, map) = (Some(json), Some(weights));
            names.iter().map(|n| path.join(n)).collect()
        } else {
            safetensors_in(path)?
        };
        let mut shards = Vec::with_capacity(files.len());
        for file in &files {
            shards.push(Shard::open(file)?);
        }
        let mut at = BTreeMap::new();
        for (s, shard) in shards.iter().enumerate() {
            for (e, entry) in shard.header.entries.iter().enumerate() {
                if at.insert(entry.name.clone(), (s, e)).is_some() {
                    let why = format!("tensor {} is also in another shard", entry.name);
                    return Err(format(&shard.path, why));
                }
            }
        }
        let checkpoint = Checkpoint { path: path.to_path_buf(), folder, shards, index, at };
        if let Some(map) = map {
            checkpoint.check_index(&path.join(INDEX), &map)?;
        }
        Ok(checkpoint)
    }

    fn check_index(&self, index: &Path, map: &BTreeMap<String, String>) -> Result<()> {
        for (name, file) in map {
            let found = self.at.get(name).map(|(s, _)| self.shards[*s].file_name());
            if found.as_ref() != Some(file) {
                return Err(format(index, format!("tensor {name} is not in {file}")));
            }
        }
        match self.at.keys().find(|name| !map.contains_key(*name)) {
            Some(name) => Err(format(index, format!("tensor {name} is in a shard but not listed"))),
            None => Ok(()),
        }
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<Tensor<'_>> {
        let (s, e) = self.at.get(name)?;
        Some(self.shards[*s].tensor(&self.shards[*s].header.entries[*e]))
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.at.keys().map(String::as_str)
    }

    /// Files of the folder that are neither weights nor their index: config, tokenizer and such, as paths
    /// below the folder.
    pub fn side_files(&self) -> Result<Vec<PathBuf>> {
        if self.folder { side_files(&self.path) } else { Ok(Vec::new()) }
    }
}

/// Weights in any format and training state: beside changed weights they would be stale.
const STALE: &[&str] =
    &["safetensors", "bin", "pt", "pth", "ckpt", "h5", "msgpack", "onnx", "gguf", "ot"];

/// Files of a folder that are neither weights nor their index, as sorted paths below it.
pub fn side_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut out = Vec::new();
    walk(folder, Path::new(""), &mut out)?;
    out.sort();
    Ok(out)
}

fn walk(root: &Path, below: &Path, out: &mut Vec<PathBuf>) -> Result<()> {
    let dir = root.join(below);
    for item in fs::read_dir(&dir).map_err(os(&dir))? {
        let item = item.map_err(os(&dir))?;
        let name = item.file_name();
        let text = name.to_string_lossy();
        let path = below.join(&name);
        let kind = item.file_type().map_err(os(&dir))?;
        if kind.is_dir() {
            if !text.starts_with('.') && !text.starts_with("checkpoint-") {
                walk(root, &path, out)?;
            }
        } else if root.join(&path).is_file() {
            let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
            if !STALE.contains(&extension.as_str()) && !text.ends_with(".index.json") {
                out.push(path);
            }
        }
    }
    Ok(())
}

fn weight_map(path: &Path, json: &Value) -> Result<BTreeMap<String, String>> {
    let map = json.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| format(path, "it has no weight_map"))?;
    let mut out = BTreeMap::new();
    for (name, file) in map {
        let file = file.as_str().unwrap_or_default();
        // a plain name: a file of this folder and of no other
        let plain = Path::new(file).file_name().is_some_and(|f| f == file) && !file.contains('\\');
        if !plain || !file.ends_with(".safetensors") {
            return Err(format(path, format!("tensor {name} lies in {file:?}, which is no shard")));
        }
        out.insert(name.clone(), file.to_string());
    }
    Ok(out)
}

fn safetensors_in(path: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for item in fs::read_dir(path).map_err(os(path))? {
        let file = item.map_err(os(path))?.path();
        if file.extension().is_some_and(|e| e == "safetensors") && file.is_file() {
            files.push(file);
        }
    }
    if path.join("delta_config.json").is_file() {
        return Err(format(path, "this is a delta; a checkpoint was expected"));
    }
    if files.is_empty() {
        return Err(Error::Format {
            path: path.to_path_buf(),
            why: "no .safetensors file in this folder; convert the checkpoint with \
                  save_pretrained(..., safe_serialization=True)"
                .to_string(),
        });
    }
    files.sort();
    Ok(files)
}

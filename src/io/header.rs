//! The header of a safetensors file: eight bytes of length, JSON, then the tensors without holes.
use super::format;
use crate::error::Result;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;

/// The format's own limit for a header.
const MAX_HEADER: u64 = 100_000_000;

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// its name
    pub name: String,
    /// dtype as the format spells it
    pub dtype: String,
    /// sizes
    pub shape: Vec<usize>,
    /// first byte, counted from the end of the header
    pub begin: usize,
    /// the byte after its last
    pub end: usize,
}

/// All tensors of a file in the order of their bytes, and its free metadata.
#[derive(Debug, Clone, Default)]
pub struct Header {
    /// the tensors
    pub entries: Vec<Entry>,
    /// `__metadata__`
    pub metadata: BTreeMap<String, String>,
    /// where the bytes begin in the file
    pub start: usize,
}

/// Bits of one element.
pub fn bits(dtype: &str) -> Option<usize> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E4M3FNUZ"
        | "F8_E5M2FNUZ" => 8,
        "U16" | "I16" | "F16" | "BF16" => 16,
        "U32" | "I32" | "F32" => 32,
        "U64" | "I64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

/// Bytes of one element; none for those smaller than a byte.
pub fn width(dtype: &str) -> Option<usize> {
    bits(dtype).filter(|b| b % 8 == 0).map(|b| b / 8)
}

/// Bytes of a tensor, if that is a whole number that fits memory.
pub(crate) fn size(dtype: &str, shape: &[usize]) -> Option<usize> {
    let numel = shape.iter().try_fold(1_usize, |n, s| n.checked_mul(*s))?;
    let bits = numel.checked_mul(bits(dtype)?)?;
    (bits % 8 == 0).then_some(bits / 8)
}

/// Sizes out of JSON.
pub(crate) fn shape(value: Option<&Value>) -> Option<Vec<usize>> {
    let one = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok());
    value?.as_array()?.iter().map(one).collect()
}

impl Header {
    /// Reads and checks the header of a whole file.
    pub fn parse(path: &Path, file: &[u8]) -> Result<Header> {
        let bad = |why: &str| format(path, format!("not a valid safetensors file: {why}"));
        let length = file.first_chunk::<8>().ok_or_else(|| bad("shorter than its header"))?;
        let length = u64::from_le_bytes(*length);
        if length > MAX_HEADER {
            return Err(bad("header length out of range"));
        }
        let start = 8 + length as usize;
        let text = file.get(8..start).ok_or_else(|| bad("shorter than its header"))?;
        let json: Map<String, Value> =
            serde_json::from_slice(text).map_err(|e| bad(&format!("header: {e}")))?;
        let mut header = Header { start, ..Header::default() };
        for (name, value) in json {
            if name == "__metadata__" {
                for (key, text) in value.as_object().ok_or_else(|| bad("metadata"))? {
                    let text = text.as_str().ok_or_else(|| bad("metadata is not text"))?;
                    header.metadata.insert(key.clone(), text.to_string());
                }
                continue;
            }
            let entry = Self::entry(&name, &value);
            header.entries.push(entry.map_err(|why| bad(&format!("tensor {name}: {why}")))?);
        }
        header.entries.sort_by(|a, b| (a.begin, a.end, &a.name).cmp(&(b.begin, b.end, &b.name)));
        let mut at = 0;
        for entry in &header.entries {
            if entry.begin != at {
                return Err(bad(&format!("tensor {}: overlap or hole before it", entry.name)));
            }
            at = entry.end;
        }
        if file.len() - start != at {
            return Err(bad(&format!(
                "{} bytes of tensors, but the header tells of {at} (truncated?)",
                file.len() - start
            )));
        }
        Ok(header)
    }

    fn entry(name: &str, value: &Value) -> std::result::Result<Entry, String> {
        let dtype = value.get("dtype").and_then(Value::as_str).ok_or("no dtype")?;
        let sizes = shape(value.get("shape")).ok_or("no shape")?;
        let offsets = shape(value.get("data_offsets")).ok_or("no data_offsets")?;
        let &[begin, end] = offsets.as_slice() else { return Err("data_offsets".into()) };
        bits(dtype).ok_or_else(|| format!("unknown dtype {dtype}"))?;
        let size = size(dtype, &sizes).ok_or("its shape is too large")?;
        if end.checked_sub(begin) != Some(size) {
            return Err(format!("{size} bytes do not lie at {begin}..{end}"));
        }
        Ok(Entry { name: name.to_string(), dtype: dtype.to_string(), shape: sizes, begin, end })
    }

    /// The head of a file, padded with spaces so that the tensors begin at a multiple of eight.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut json = Map::new();
        if !self.metadata.is_empty() {
            json.insert("__metadata__".into(), serde_json::json!(self.metadata));
        }
        for e in &self.entries {
            let value = serde_json::json!({
                "dtype": e.dtype, "shape": e.shape, "data_offsets": [e.begin, e.end],
            });
            json.insert(e.name.clone(), value);
        }
        let mut text = Value::Object(json).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut out = (text.len() as u64).to_le_bytes().to_vec();
        out.append(&mut text);
        out
    }
}

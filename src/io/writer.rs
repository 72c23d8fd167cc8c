//! Writing a safetensors file tensor by tensor, in any order: all sizes are known before the first byte.
use super::header::{Entry, Header, bits, size};
use super::{format, os};
use crate::error::Result;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Places tensors one after the other in the given order.
pub fn layout(
    path: &Path,
    tensors: impl IntoIterator<Item = (String, String, Vec<usize>)>,
    metadata: BTreeMap<String, String>,
) -> Result<Header> {
    let mut header = Header { metadata, ..Header::default() };
    let mut names = BTreeSet::new();
    let mut at = 0_usize;
    for (name, dtype, shape) in tensors {
        if !names.insert(name.clone()) {
            return Err(format(path, format!("two tensors would be named {name}")));
        }
        let size = size(&dtype, &shape).and_then(|n| at.checked_add(n));
        let end =
            size.ok_or_else(|| format(path, format!("tensor {name} cannot be {dtype} {shape:?}")))?;
        header.entries.push(Entry { name, dtype, shape, begin: at, end });
        at = end;
    }
    Ok(header)
}

/// The order that keeps every tensor aligned to its elements: wide ones first, then by name.
pub(crate) fn aligned(tensors: &mut [(String, String, Vec<usize>)]) {
    tensors.sort_by(|a, b| (bits(&b.1), &a.0).cmp(&(bits(&a.1), &b.0)));
}

/// An open file with its head written.
#[derive(Debug)]
pub struct Writer {
    file: File,
    path: PathBuf,
    head: usize,
    at: BTreeMap<String, (usize, usize)>,
    written: usize,
    total: usize,
}

impl Writer {
    /// Creates the file (which must not exist) and writes its head.
    pub fn create(path: &Path, header: &Header) -> Result<Writer> {
        Self::with_head(path, header, &header.to_bytes())
    }

    /// The same with the head of another file that describes the same tensors.
    pub fn with_head(path: &Path, header: &Header, head: &[u8]) -> Result<Writer> {
        let mut file = File::create_new(path).map_err(os(path))?;
        file.write_all(head).map_err(os(path))?;
        let at = header.entries.iter().map(|e| (e.name.clone(), (e.begin, e.end))).collect();
        let total = header.entries.last().map_or(0, |e| e.end);
        Ok(Writer { file, path: path.to_path_buf(), head: head.len(), at, written: 0, total })
    }

    /// Writes some bytes of a tensor, `offset` bytes after its first.
    pub fn put(&mut self, name: &str, offset: usize, bytes: &[u8]) -> Result<()> {
        let room = self.at.get(name).map(|(begin, end)| (begin + offset, *end));
        let Some(begin) = room.and_then(|(b, end)| (b + bytes.len() <= end).then_some(b)) else {
            return Err(format(&self.path, format!("no room for these bytes of tensor {name}")));
        };
        self.file
            .seek(SeekFrom::Start((self.head + begin) as u64))
            .and_then(|_| self.file.write_all(bytes))
            .map_err(os(&self.path))?;
        self.written += bytes.len();
        Ok(())
    }

    /// What waits until the disk has all that was written so far, while more is written.
    pub fn flush(&self) -> Result<impl FnOnce() -> Result<()> + use<>> {
        let file = self.file.try_clone().map_err(os(&self.path))?;
        let path = self.path.clone();
        Ok(move || file.sync_data().map_err(os(&path)))
    }

    /// Checks that all bytes came, and waits until they are on the disk.
    pub fn finish(self) -> Result<()> {
        if self.written != self.total {
            let why = format!("{} of {} bytes were written", self.written, self.total);
            return Err(format(&self.path, why));
        }
        self.file.sync_all().map_err(os(&self.path))
    }
}

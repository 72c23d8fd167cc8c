//! Output that appears under its name only when it is complete.
use super::os;
use crate::error::{Error, Result};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A file or folder in the making, in a hidden folder beside its final name. Dropped before
/// [`Output::publish`], it disappears.
#[derive(Debug)]
pub struct Output {
    target: PathBuf,
    work: PathBuf,
    overwrite: bool,
    folder: bool,
    // before `made`: it lies in the folders that `made` removes
    temp: Option<TempDir>,
    made: Made,
}

/// Parent folders that did not exist before, innermost first; removed again unless kept.
#[derive(Debug)]
struct Made(Vec<PathBuf>);

impl Drop for Made {
    fn drop(&mut self) {
        // innermost first; those that somebody else filled meanwhile stay
        self.0.iter().for_each(|dir| drop(fs::remove_dir(dir)));
    }
}

fn refuse(path: &Path, rule: &str) -> Error {
    Error::Value {
        name: "out".to_string(),
        rule: rule.to_string(),
        got: path.display().to_string(),
    }
}

/// Refuses an output that is an input, lies around one, or has no name.
pub fn refuse_inputs(out: &Path, inputs: &[&Path]) -> Result<()> {
    let real = real(out)?;
    for input in inputs {
        let input = fs::canonicalize(input).map_err(os(input))?;
        if input.starts_with(&real) {
            return Err(refuse(out, "a place of its own (this one is or holds an input)"));
        }
    }
    Ok(())
}

/// The path without links, also when its last parts do not exist yet.
fn real(path: &Path) -> Result<PathBuf> {
    if let Ok(found) = fs::canonicalize(path) {
        return Ok(found);
    }
    let name = path.file_name().ok_or_else(|| refuse(path, "a path that ends in a name"))?;
    let parent = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    Ok(real(parent)?.join(name))
}

impl Output {
    /// Begins an output, after asking whether it may take that name.
    pub fn new(target: &Path, folder: bool, overwrite: bool) -> Result<Output> {
        let name =
            target.file_name().ok_or_else(|| refuse(target, "a path that ends in a name"))?;
        let output = Output::check(target, folder, overwrite);
        output?;
        let target = real(target)?;
        let parent = target.parent().unwrap_or(Path::new("/")).to_path_buf();
        let mut made = Made(Vec::new());
        let mut missing: Vec<_> = parent.ancestors().take_while(|p| !p.exists()).collect();
        while let Some(dir) = missing.pop() {
            fs::create_dir(dir).map_err(os(dir))?;
            made.0.insert(0, dir.to_path_buf());
        }
        let temp = tempfile::Builder::new().prefix(".retouch-").tempdir_in(&parent);
        let temp = temp.map_err(os(&parent))?;
        // inside of it, so that the result gets the permissions of an ordinary file or folder
        let work = temp.path().join(name);
        if folder {
            fs::create_dir(&work).map_err(os(&work))?;
        }
        Ok(Output { target, work, overwrite, folder, temp: Some(temp), made })
    }

    fn check(target: &Path, folder: bool, overwrite: bool) -> Result<()> {
        let Ok(meta) = fs::metadata(target) else { return Ok(()) };
        if meta.is_dir() != folder {
            let rule = if folder { "a folder" } else { "a file" };
            return Err(refuse(target, &format!("{rule}, but something else has that name")));
        }
        if !folder {
            let rule = "a new file (overwrite replaces an existing one)";
            return if overwrite { Ok(()) } else { Err(refuse(target, rule)) };
        }
        let mut items = fs::read_dir(target).map_err(os(target))?.filter_map(|i| i.ok()).peekable();
        if items.peek().is_none() {
            return Ok(());
        }
        if !overwrite {
            return Err(refuse(
                target,
                "a new or empty folder (overwrite replaces an existing one)",
            ));
        }
        // never delete a folder of other things because of a slip
        if !items.any(|i| i.path().extension().is_some_and(|e| e == "safetensors")) {
            let rule = "a folder of a checkpoint or a delta, if it is to be overwritten";
            return Err(refuse(target, rule));
        }
        Ok(())
    }

    /// Where to write: the file itself, or the folder.
    pub fn path(&self) -> &Path {
        &self.work
    }

    /// Writes a small file into the folder.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.work.join(name);
        let mut file = File::create_new(&path).map_err(os(&path))?;
        file.write_all(bytes).and_then(|()| file.sync_all()).map_err(os(&path))
    }

    /// Copies a file into the folder under the same relative path.
    pub fn copy(&self, from: &Path, relative: &Path) -> Result<()> {
        let (from, to) = (from.join(relative), self.work.join(relative));
        if let Some(dir) = to.parent() {
            fs::create_dir_all(dir).map_err(os(dir))?;
        }
        let mut source = File::open(&from).map_err(os(&from))?;
        let mut made = File::create_new(&to).map_err(os(&to))?;
        std::io::copy(&mut source, &mut made).and_then(|_| made.sync_all()).map_err(os(&to))
    }

    /// Gives the output its name.
    pub fn publish(mut self) -> Result<()> {
        let Some(temp) = self.temp.take() else { return Ok(()) };
        let target = &self.target;
        if self.folder {
            sync_dir(&self.work);
        }
        // asked again: long work lies between
        Output::check(target, self.folder, self.overwrite)?;
        if self.folder && target.exists() {
            let aside = temp.path().join(".replaced");
            fs::rename(target, &aside).map_err(os(target))?;
            if let Err(e) = fs::rename(&self.work, target) {
                let back = fs::rename(&aside, target);
                back.map_err(os(target))?;
                return Err(os(target)(e));
            }
        } else {
            fs::rename(&self.work, target).map_err(os(target))?;
        }
        self.made.0.clear();
        if let Some(parent) = target.parent() {
            sync_dir(parent);
        }
        temp.close().map_err(os(target))
    }
}

/// Makes a rename last. Not every file system can: then it is as safe as it gets.
fn sync_dir(path: &Path) {
    drop(File::open(path).and_then(|dir| dir.sync_all()));
}

//! Merging: tensors combined in one pass, and the files that the result goes to.
use super::threads;
use crate::bridge::{Tensor, disjoint};
use crate::error::{Error, Result};
use crate::io::{self, Output, Writer};
use crate::kernel::blend::{
    self, Band, Chance, Cut, Finish, Ramp, Request, Rule, Stream, Streams, Take, Vote,
};
use crate::kernel::rng;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

pub(super) fn add(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(blend_, m)?)?;
    m.add_function(wrap_pyfunction!(cuts, m)?)?;
    m.add_function(wrap_pyfunction!(draw_, m)?)?;
    m.add_function(wrap_pyfunction!(sums, m)?)?;
    m.add_function(wrap_pyfunction!(gram, m)?)?;
    m.add_function(wrap_pyfunction!(count_keys_, m)?)?;
    m.add_function(wrap_pyfunction!(key_value, m)?)?;
    m.add_function(wrap_pyfunction!(band_, m)?)?;
    m.add_function(wrap_pyfunction!(ramp_, m)?)?;
    m.add_class::<Sink>()
}

/// Tensors, their base, and what is kept of each.
#[derive(FromPyObject)]
struct Given {
    #[pyo3(attribute)]
    name: String,
    #[pyo3(attribute)]
    models: Vec<String>,
    #[pyo3(attribute)]
    base: Option<Tensor>,
    #[pyo3(attribute)]
    tensors: Vec<Tensor>,
    #[pyo3(attribute)]
    start: usize,
    #[pyo3(attribute)]
    weights: Vec<f32>,
    #[pyo3(attribute)]
    scales: Vec<f32>,
    #[pyo3(attribute)]
    low: Vec<Option<(f32, i64)>>,
    #[pyo3(attribute)]
    high: Vec<Option<(f32, i64)>>,
    #[pyo3(attribute)]
    chances: Vec<Option<(u64, String, f32)>>,
    #[pyo3(attribute)]
    drawn: Vec<Option<Tensor>>,
    #[pyo3(attribute)]
    factors: Vec<Option<Tensor>>,
}

fn cut(pair: Option<(f32, i64)>) -> Option<Cut> {
    pair.map(|(bound, last)| Cut { bound, last })
}

impl Given {
    fn streams(&self) -> Result<Streams<'_>> {
        let n = self.tensors.len();
        let lengths = [
            self.weights.len(),
            self.scales.len(),
            self.low.len(),
            self.high.len(),
            self.chances.len(),
            self.drawn.len(),
            self.factors.len(),
            self.models.len(),
        ];
        if let Some(&got) = lengths.iter().find(|l| **l != n) {
            let name = "what is given for each tensor".to_string();
            return Err(Error::Length { name, got, want: n });
        }
        let mut streams = Vec::with_capacity(n);
        for (t, tensor) in self.tensors.iter().enumerate() {
            let name = format!("{} of {}", self.name, self.models[t]);
            let mut stream = Stream::new(tensor.view(&name)?);
            stream.low = cut(self.low[t]);
            stream.high = cut(self.high[t]);
            stream.chance = self.chances[t].as_ref().map(|(seed, name, share)| Chance {
                seed: *seed,
                stream: rng::stream(name),
                share: *share,
            });
            stream.drawn = match &self.drawn[t] {
                Some(bits) => Some(bits.bytes(&format!("the bits of {name}"))?),
                None => None,
            };
            stream.factors = match &self.factors[t] {
                Some(f) => Some(f.f32(&format!("the factors of {name}"))?),
                None => None,
            };
            stream.scale = self.scales[t];
            stream.weight = self.weights[t];
            streams.push(stream);
        }
        let base = match &self.base {
            Some(base) => Some(base.view(&format!("{} of the base", self.name))?),
            None => None,
        };
        Ok(Streams { base, streams, start: self.start })
    }

    /// Every tensor, for `disjoint`.
    fn all(&self) -> Vec<(&str, &Tensor)> {
        let tensors = self.tensors.iter().chain(&self.base);
        let more = self.drawn.iter().chain(&self.factors).flatten();
        tensors.chain(more).map(|t| (self.name.as_str(), t)).collect()
    }
}

fn bad<T>(name: &str, rule: &str, got: &str) -> Result<T> {
    Err(Error::Value { name: name.to_string(), rule: rule.to_string(), got: got.to_string() })
}

fn get<'py, T: FromPyObject<'py>>(options: &Bound<'py, PyDict>, key: &str, or: T) -> PyResult<T> {
    options.get_item(key)?.map_or(Ok(or), |v| v.extract())
}

/// Combines tensors into `out`.
#[pyfunction]
#[pyo3(signature = (out, given, rule, **options))]
fn blend_(
    py: Python<'_>,
    mut out: Tensor,
    given: Given,
    rule: &str,
    options: Option<&Bound<'_, PyDict>>,
) -> PyResult<()> {
    let none = PyDict::new(py);
    let options = options.unwrap_or(&none);
    let factors: Vec<f32> = get(options, "per_model", Vec::new())?;
    let rule = match rule {
        "sum" => Rule::Sum,
        "largest" => Rule::Largest,
        "variance" => Rule::Variance,
        "active" => Rule::Active { alone: &factors },
        "standing" => Rule::Standing { factors: &factors, least: get(options, "least", 1)? },
        "elect" => Rule::Elect {
            vote: match get(options, "vote", "weighted".to_string())?.as_str() {
                "weighted" => Vote::Weighted,
                "mass" => Vote::Mass,
                "count" => Vote::Count,
                other => return Ok(bad("vote", "weighted, mass or count", other)?),
            },
            zero: get(options, "zero", 1.0)?,
            take: match get(options, "take", "weighted_mean".to_string())?.as_str() {
                "sum" => Take::Sum,
                "mean" => Take::Mean,
                "weighted_mean" => Take::WeightedMean,
                "largest" => Take::Largest,
                other => return Ok(bad("take", "sum, mean, weighted_mean or largest", other)?),
            },
        },
        other => return Ok(bad("rule", "a rule of the blend kernel", other)?),
    };
    let finish = Finish {
        divide: get(options, "divide", 1.0)?,
        lambda: get(options, "lam", 1.0)?,
        onto_base: get(options, "onto_base", given.base.is_some())?,
        own: get(options, "own", None)?,
    };
    let threads = threads(py)?;
    disjoint(&[("out", &out)], &given.all())?;
    let streams = given.streams()?;
    let models: Vec<&str> = given.models.iter().map(String::as_str).collect();
    let out = out.view_mut("out")?;
    let name = given.name.as_str();
    Ok(py.allow_threads(|| blend::blend(threads, (name, &models), &streams, &rule, &finish, out))?)
}

/// For each (tensor, k, from_end) bound and last position of the k largest magnitudes, and how many exceed
/// the bound. About `room` bytes are used beside the streams, a few where that is less than it can do with.
#[pyfunction]
#[pyo3(signature = (given, requests, *, room=None))]
fn cuts(
    py: Python<'_>,
    given: Given,
    requests: Vec<(usize, usize, bool)>,
    room: Option<usize>,
) -> PyResult<Vec<(f32, i64, usize)>> {
    let threads = threads(py)?;
    let streams = given.streams()?;
    let models: Vec<&str> = given.models.iter().map(String::as_str).collect();
    let name = given.name.as_str();
    let request = |(stream, k, from_end): (usize, usize, bool)| Request { stream, k, from_end };
    let requests: Vec<Request> = requests.into_iter().map(request).collect();
    // a collected magnitude is 4 bytes, twice while its list grows, and once more in the list of all
    let room = room.map(|bytes| bytes / 12);
    let all =
        py.allow_threads(|| blend::cuts(threads, (name, &models), &streams, &requests, room))?;
    Ok(all.into_iter().map(|(c, above)| (c.bound, c.last, above)).collect())
}

/// Writes the bits of the positions of a tensor that a random choice keeps.
#[pyfunction]
fn draw_(py: Python<'_>, mut out: Tensor, seed: u64, name: &str, share: f32) -> PyResult<()> {
    let threads = threads(py)?;
    let out = out.bytes_mut("out")?;
    if !out.len().is_multiple_of(8) {
        bad("the length of out", "a multiple of 8", &out.len().to_string())?;
    }
    py.allow_threads(|| rng::draw(threads, seed, rng::stream(name), share, out));
    Ok(())
}

/// For each tensor: sum of all magnitudes, and of the kept ones.
#[pyfunction]
fn sums(py: Python<'_>, given: Given) -> PyResult<Vec<(f64, f64)>> {
    let threads = threads(py)?;
    let streams = given.streams()?;
    let models: Vec<&str> = given.models.iter().map(String::as_str).collect();
    let name = given.name.as_str();
    let all = py.allow_threads(|| blend::sums(threads, (name, &models), &streams))?;
    Ok(all.into_iter().map(|s| (s.all, s.magnitude)).collect())
}

/// All dot products, row by row.
#[pyfunction]
fn gram(py: Python<'_>, given: Given) -> PyResult<Vec<f64>> {
    let threads = threads(py)?;
    let streams = given.streams()?;
    let models: Vec<&str> = given.models.iter().map(String::as_str).collect();
    let name = given.name.as_str();
    Ok(py.allow_threads(|| blend::gram(threads, (name, &models), &streams))?)
}

/// Adds a histogram of half a key to 65536 bins (a numpy array of int64).
#[pyfunction]
#[pyo3(signature = (bins, given, *, within=None, signed=false))]
fn count_keys_(
    py: Python<'_>,
    mut bins: numpy::PyReadwriteArray1<'_, i64>,
    given: Given,
    within: Option<u32>,
    signed: bool,
) -> PyResult<()> {
    let threads = threads(py)?;
    let streams = given.streams()?;
    let models: Vec<&str> = given.models.iter().map(String::as_str).collect();
    let name = given.name.as_str();
    let Ok(bins) = bins.as_slice_mut() else {
        return Ok(bad("bins", "contiguous", "a strided array")?);
    };
    Ok(py.allow_threads(|| {
        blend::count_keys(threads, (name, &models), &streams, within, signed, bins)
    })?)
}

/// The float that has this key.
#[pyfunction]
fn key_value(key: u32, signed: bool) -> f32 {
    blend::value_of(key, signed)
}

/// Writes 1 where a row's element is kept: after `top` largest the `keep` next.
#[pyfunction]
fn band_(
    py: Python<'_>,
    mut out: Tensor,
    given: Given,
    row: usize,
    top: usize,
    keep: usize,
) -> PyResult<()> {
    let threads = threads(py)?;
    disjoint(&[("out", &out)], &given.all())?;
    let streams = given.streams()?;
    let models: Vec<&str> = given.models.iter().map(String::as_str).collect();
    let (name, out) = (given.name.as_str(), out.f32_mut("out")?);
    let band = Band { top, keep };
    Ok(py.allow_threads(|| blend::band(threads, (name, &models), &streams, row, band, out))?)
}

/// Writes the factors of a random choice by rank in the row.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn ramp_(
    py: Python<'_>,
    mut out: Tensor,
    given: Given,
    row: usize,
    density: f32,
    epsilon: f32,
    key: (u64, String),
    rescale: bool,
) -> PyResult<()> {
    let threads = threads(py)?;
    disjoint(&[("out", &out)], &given.all())?;
    let streams = given.streams()?;
    let models: Vec<&str> = given.models.iter().map(String::as_str).collect();
    let (name, out) = (given.name.as_str(), out.f32_mut("out")?);
    let ramp = Ramp { density, epsilon, seed: key.0, stream: rng::stream(&key.1), rescale };
    Ok(py.allow_threads(|| blend::ramp(threads, (name, &models), &streams, row, ramp, out))?)
}

/// A checkpoint in the making: staged beside its name, published complete or not at all.
#[pyclass(frozen)]
struct Sink {
    output: Mutex<Option<Output>>,
    files: Mutex<HashMap<String, Writer>>,
}

fn gone() -> Error {
    Error::Value {
        name: "the output".to_string(),
        rule: "unpublished".to_string(),
        got: "one that was published or discarded".to_string(),
    }
}

impl Sink {
    fn with<T>(&self, f: impl FnOnce(&Output) -> Result<T>) -> Result<T> {
        let output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        f(output.as_ref().ok_or_else(gone)?)
    }

    fn files(&self) -> std::sync::MutexGuard<'_, HashMap<String, Writer>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl Sink {
    #[new]
    fn new(out: PathBuf, overwrite: bool, inputs: Vec<PathBuf>) -> PyResult<Self> {
        let inputs: Vec<&std::path::Path> = inputs.iter().map(PathBuf::as_path).collect();
        io::refuse_inputs(&out, &inputs)?;
        let output = Output::new(&out, true, overwrite)?;
        Ok(Sink { output: Mutex::new(Some(output)), files: Mutex::default() })
    }

    /// Begins a file of tensors (name, dtype as the format spells it, shape).
    fn begin(&self, file: String, tensors: Vec<(String, String, Vec<usize>)>) -> PyResult<()> {
        let mut tensors = tensors;
        io::aligned(&mut tensors);
        let writer = self.with(|output| {
            let path = output.path().join(&file);
            let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
            Writer::create(&path, &io::layout(&path, tensors, metadata)?)
        })?;
        self.files().insert(file, writer);
        Ok(())
    }

    /// Writes bytes of a tensor, `offset` bytes after its first.
    fn put(
        &self,
        py: Python<'_>,
        file: &str,
        name: &str,
        offset: usize,
        bytes: Tensor,
    ) -> PyResult<()> {
        let bytes = bytes.bytes(name)?;
        Ok(py.allow_threads(|| match self.files().get_mut(file) {
            Some(writer) => writer.put(name, offset, bytes),
            None => Err(gone()),
        })?)
    }

    /// Waits until the disk has what was written of a file so far; others may write meanwhile.
    fn flush(&self, py: Python<'_>, file: &str) -> PyResult<()> {
        Ok(py.allow_threads(|| {
            let wait = self.files().get(file).ok_or_else(gone)?.flush()?;
            wait()
        })?)
    }

    /// Checks that a file is complete and waits until it is on the disk.
    fn end(&self, py: Python<'_>, file: &str) -> PyResult<()> {
        let writer = self.files().remove(file).ok_or_else(gone)?;
        Ok(py.allow_threads(|| writer.finish())?)
    }

    /// Writes a small file.
    fn write(&self, name: &str, bytes: &[u8]) -> PyResult<()> {
        Ok(self.with(|output| output.write(name, bytes))?)
    }

    /// Copies what a checkpoint folder holds beside weights, but for what `skip` names.
    fn copy_side_files(&self, folder: PathBuf, skip: Vec<String>) -> PyResult<()> {
        Ok(self.with(|output| {
            let files = io::side_files(&folder)?;
            let wanted = files.iter().filter(|f| !skip.iter().any(|s| f.as_os_str() == s.as_str()));
            wanted.into_iter().try_for_each(|file| output.copy(&folder, file))
        })?)
    }

    /// Gives the output its name.
    fn publish(&self) -> PyResult<()> {
        let output = self.output.lock().unwrap_or_else(PoisonError::into_inner).take();
        Ok(output.ok_or_else(gone)?.publish()?)
    }

    /// Removes what was written.
    fn discard(&self) {
        self.files().clear();
        drop(self.output.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

//! Deltas between checkpoints on disk. Files are written and read by the `safetensors` crate, not by ours.
use retouch::delta::{
    CONFIG, Delta, DiffOptions, Kind, Run, WEIGHTS, apply, diff, revert, show, verify,
};
use retouch::io::Checkpoint;
use retouch::{Error, Result};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

pub(crate) type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn write(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    let info = Some([("format".to_string(), "pt".to_string())].into());
    fs::write(path, safetensors::serialize(views, info).unwrap()).unwrap();
}

fn read(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let one =
        |(n, t): (String, TensorView<'_>)| (n, (t.dtype(), t.shape().to_vec(), t.data().to_vec()));
    file.tensors().into_iter().map(one).collect()
}

fn read_all(folder: &Path) -> Tensors {
    let mut all = Tensors::new();
    for item in fs::read_dir(folder).unwrap() {
        let path = item.unwrap().path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            all.extend(read(&path));
        }
    }
    all
}

/// A folder of shards with an index and side files; tensor i lies in shard i % shards.
fn write_sharded(folder: &Path, tensors: &Tensors, shards: usize) {
    fs::create_dir_all(folder.join("extra")).unwrap();
    let mut map = serde_json::Map::new();
    for s in 0..shards {
        let file = format!("model-{:05}-of-{shards:05}.safetensors", s + 1);
        let part: Tensors = tensors.clone().into_iter().skip(s).step_by(shards).collect();
        part.keys().for_each(|n| drop(map.insert(n.clone(), json!(file))));
        write(&folder.join(file), &part);
    }
    let index = json!({"metadata": {"total_size": 1, "kept": true}, "weight_map": map});
    fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    fs::write(folder.join("config.json"), "{}").unwrap();
    fs::write(folder.join("extra/note.txt"), "side file").unwrap();
    fs::write(folder.join("optimizer.pt"), "stale").unwrap();
}

fn noise(seed: u64, n: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 32) as u8
    };
    (0..n).map(|_| next()).collect()
}

/// Base and tuned: every dtype sparse, one dense, one same, one scalar, one empty, one of wide gaps.
pub(crate) fn pair() -> (Tensors, Tensors) {
    let mut base = Tensors::new();
    for (i, (dtype, width)) in [
        (Dtype::F64, 8),
        (Dtype::F32, 4),
        (Dtype::F16, 2),
        (Dtype::BF16, 2),
        (Dtype::F8_E4M3, 1),
        (Dtype::F8_E5M2, 1),
        (Dtype::I64, 8),
        (Dtype::I32, 4),
        (Dtype::I16, 2),
        (Dtype::I8, 1),
        (Dtype::U8, 1),
        (Dtype::BOOL, 1),
    ]
    .into_iter()
    .enumerate()
    {
        let bytes = noise(i as u64 + 1, 15 * 20 * width);
        base.insert(format!("sparse.{dtype:?}"), (dtype, vec![15, 20], bytes));
    }
    base.insert("same".into(), (Dtype::F32, vec![3], noise(50, 12)));
    base.insert("dense".into(), (Dtype::BF16, vec![7, 3], noise(51, 42)));
    base.insert("scalar".into(), (Dtype::F32, vec![], 0.0_f32.to_le_bytes().to_vec()));
    base.insert("empty".into(), (Dtype::F32, vec![0, 4], vec![]));
    base.insert("wide".into(), (Dtype::F16, vec![200_000], noise(52, 400_000)));
    let mut tuned = base.clone();
    for (name, (dtype, _, bytes)) in &mut tuned {
        let width = dtype.bitsize() / 8;
        match name.as_str() {
            n if n.starts_with("sparse") => {
                bytes.iter_mut().step_by(9 * width).for_each(|b| *b ^= 1);
            }
            "dense" => bytes.iter_mut().for_each(|b| *b ^= 0x55),
            "scalar" => *bytes = (-0.0_f32).to_le_bytes().to_vec(),
            "wide" => bytes[399_999] ^= 1,
            _ => {}
        }
    }
    let nan = f32::from_bits(0x7f80_1234).to_le_bytes(); // a signalling NaN with a payload
    tuned.get_mut("sparse.F32").unwrap().2[40..44].copy_from_slice(&nan);
    (base, tuned)
}

fn options(reversible: bool) -> DiffOptions<'static> {
    DiffOptions {
        reversible,
        overwrite: false,
        base_model: Some("org/base"),
        metadata: json!({"k": 1}),
    }
}

/// A place with `base`, `tuned` and `delta` folders.
pub(crate) struct Place(TempDir);
impl Place {
    pub(crate) fn new(
        base: &Tensors,
        tuned: &Tensors,
        shards: [usize; 2],
        reversible: bool,
    ) -> Place {
        let place = Place(TempDir::new().unwrap());
        write_sharded(&place.at("base"), base, shards[0]);
        write_sharded(&place.at("tuned"), tuned, shards[1]);
        let (b, t, d) = (place.at("base"), place.at("tuned"), place.at("delta"));
        diff(Run::new(2), &b, &t, Some(&d), &options(reversible)).unwrap();
        place
    }
    pub(crate) fn ordinary() -> Place {
        let (base, tuned) = pair();
        Place::new(&base, &tuned, [1, 1], true)
    }
    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
    pub(crate) fn apply(&self, base: &str, out: &str) -> Result<Value> {
        apply(Run::new(2), &self.at(base), &self.at("delta"), &self.at(out), false, false)
    }
    fn revert(&self, tuned: &str, out: &str, base: Option<&str>) -> Result<Value> {
        let base = base.map(|b| self.at(b));
        let (t, d, o) = (self.at(tuned), self.at("delta"), self.at(out));
        revert(Run::new(2), &t, &d, &o, base.as_deref(), false, false)
    }
    /// Names in the place, to see litter.
    pub(crate) fn names(&self) -> Vec<String> {
        let name = |i: std::io::Result<fs::DirEntry>| i.unwrap().file_name().into_string().unwrap();
        let mut names: Vec<_> = fs::read_dir(self.0.path()).unwrap().map(name).collect();
        names.sort();
        names
    }
    pub(crate) fn config(&self) -> Value {
        serde_json::from_slice(&fs::read(self.at("delta").join(CONFIG)).unwrap()).unwrap()
    }
}

pub(crate) fn format_error<T: std::fmt::Debug>(result: Result<T>, path: &str, why: &str) {
    match result {
        Err(Error::Format { path: p, why: w }) => {
            assert!(p.to_string_lossy().contains(path), "{}: {w}", p.display());
            assert!(w.contains(why), "{w:?} does not say {why:?}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn there_and_back_over_dtypes_shards_and_thread_counts() {
    let (base, tuned) = pair();
    for shards in [[1, 1], [2, 1], [1, 3], [3, 2]] {
        for reversible in [true, false] {
            let place = Place::new(&base, &tuned, shards, reversible);
            place.apply("base", "applied").unwrap();
            assert_eq!(read_all(&place.at("applied")), tuned);
            let original = (!reversible).then_some("base");
            place.revert("tuned", "reverted", original).unwrap();
            assert_eq!(read_all(&place.at("reverted")), base);
            assert_eq!(fs::read(place.at("applied/extra/note.txt")).unwrap(), b"side file");
            assert!(!place.at("applied/optimizer.pt").exists());
            assert_eq!(Checkpoint::open(&place.at("applied")).unwrap().shards.len(), shards[0]);
            if shards == [1, 1] {
                // equal layouts: the very same files
                let name = "model-00001-of-00001.safetensors";
                let file = |folder: &str| fs::read(place.at(folder).join(name)).unwrap();
                assert!(file("applied") == file("tuned") && file("reverted") == file("base"));
            }
        }
    }
    let delta = |threads, shards| {
        let place = Place::new(&base, &tuned, shards, true);
        let (b, t, d) = (place.at("base"), place.at("tuned"), place.at("again"));
        diff(Run::new(threads), &b, &t, Some(&d), &options(true)).unwrap();
        [CONFIG, WEIGHTS].map(|f| fs::read(d.join(f)).unwrap())
    };
    assert!(delta(1, [1, 1]) == delta(4, [3, 2]));
}

#[test]
fn the_delta_is_what_the_format_says() {
    let place = Place::ordinary();
    let (base, tuned) = pair();
    let config = place.config();
    assert_eq!(config["format"], "retouch-delta");
    assert_eq!(config["format_version"], 1);
    assert_eq!(config["base_model"], "org/base");
    assert_eq!(config["metadata"], json!({"k": 1}));
    let f32 = &config["tensors"]["sparse.F32"];
    assert_eq!((&f32["kind"], &f32["dtype"]), (&json!("sparse-replace"), &json!("F32")));
    assert_eq!((&f32["shape"], &f32["index_encoding"]), (&json!([15, 20]), &json!("gap16")));
    assert_eq!(config["tensors"]["wide"]["index_encoding"], "i32");
    assert_eq!(config["tensors"]["dense"]["kind"], "dense");
    assert!(config["tensors"].get("same").is_none() && config["tensors"].get("empty").is_none());
    let stored = read(&place.at("delta").join(WEIGHTS));
    let wide = &stored["wide.idx"];
    assert_eq!((wide.0, wide.2.as_slice()), (Dtype::I32, &199_999_i32.to_le_bytes()[..]));
    assert_eq!(stored["dense"].2, tuned["dense"].2);
    assert_eq!(stored["dense.old"].2, base["dense"].2);
    // the changed elements of one tensor, decoded by hand
    let (mut at, mut got) = (-1_i64, base["sparse.I16"].2.clone());
    for (i, gap) in stored["sparse.I16.idx"].2.chunks(2).enumerate() {
        at += i64::from(u16::from_le_bytes([gap[0], gap[1]])) + 1;
        let place = at as usize * 2;
        got[place..place + 2].copy_from_slice(&stored["sparse.I16.val"].2[i * 2..i * 2 + 2]);
    }
    assert_eq!(got, tuned["sparse.I16"].2);
    let shown = show(&place.at("delta")).unwrap();
    assert_eq!(shown["config"], config);
    assert_eq!(shown["reversible"], true);
}

#[test]
fn tensors_come_and_go() {
    let (base, mut tuned) = pair();
    let gone = tuned.remove("same").unwrap();
    tuned.insert("new.weight".into(), (Dtype::F16, vec![2, 2], noise(9, 8)));
    tuned.insert("also_new".into(), gone);
    for shards in [1, 2] {
        let place = Place::new(&base, &tuned, [shards, 1], true);
        let kind = |n: &str| Delta::open(&place.at("delta")).unwrap().tensors[n].kind;
        assert_eq!((kind("new.weight"), kind("same")), (Kind::Added, Kind::Removed));
        place.apply("base", "applied").unwrap();
        assert_eq!(read_all(&place.at("applied")), tuned);
        Checkpoint::open(&place.at("applied")).unwrap(); // its index fits
        place.revert("applied", "reverted", None).unwrap();
        assert_eq!(read_all(&place.at("reverted")), base);
        // twice is once, both ways
        place.apply("applied", "twice").unwrap();
        assert_eq!(read_all(&place.at("twice")), tuned);
        place.revert("base", "unchanged", None).unwrap();
        assert_eq!(read_all(&place.at("unchanged")), base);
    }
}

#[test]
fn single_files_in_and_out() {
    let (base, tuned) = pair();
    let dir = TempDir::new().unwrap();
    let at = |n: &str| dir.path().join(n);
    write(&at("base.safetensors"), &base);
    write(&at("tuned.safetensors"), &tuned);
    diff(
        Run::new(1),
        &at("base.safetensors"),
        &at("tuned.safetensors"),
        Some(&at("d")),
        &options(false),
    )
    .unwrap();
    let run =
        |out: &str| apply(Run::new(1), &at("base.safetensors"), &at("d"), &at(out), false, false);
    run("deep/er/out.safetensors").unwrap();
    assert_eq!(
        fs::read(at("deep/er/out.safetensors")).unwrap(),
        fs::read(at("tuned.safetensors")).unwrap()
    );
    run("folder").unwrap();
    assert_eq!(read(&at("folder/model.safetensors")), tuned);
    assert!(matches!(run("deep/er/out.safetensors"), Err(Error::Value { .. })));
    assert_eq!(fs::read_dir(at("deep/er")).unwrap().count(), 1);
}

#[test]
fn without_an_output_diff_only_counts() {
    let (base, tuned) = pair();
    let place = Place::new(&base, &tuned, [1, 1], true);
    let before = place.names();
    let stats =
        diff(Run::new(1), &place.at("base"), &place.at("tuned"), None, &options(true)).unwrap();
    let differ = |n: &String| base[n] != tuned[n];
    assert_eq!(stats["changed_tensors"], base.keys().filter(|n| differ(n)).count());
    assert_eq!(stats["config"], place.config());
    assert_eq!(place.names(), before);
    let none = diff(
        Run::new(1),
        &place.at("base"),
        &place.at("base"),
        Some(&place.at("none")),
        &options(true),
    );
    assert_eq!(none.unwrap()["changed"], 0);
    let (b, d) = (place.at("base"), place.at("none"));
    apply(Run::new(1), &b, &d, &place.at("same"), false, false).unwrap();
    assert_eq!(read_all(&place.at("same")), base);
}

#[test]
fn another_base_is_refused_by_name_and_leaves_nothing() {
    let place = Place::ordinary();
    let (mut base, tuned) = pair();
    base.get_mut("sparse.BF16").unwrap().2[5] ^= 1;
    base.get_mut("dense").unwrap().2[0] ^= 1;
    write_sharded(&place.at("other"), &base, 1);
    let before = place.names();
    match place.apply("other", "out") {
        Err(Error::Base { names }) => assert_eq!(names, ["dense", "sparse.BF16"]),
        other => panic!("{other:?}"),
    }
    assert!(matches!(place.revert("other", "out", None), Err(Error::Base { .. })));
    let names = verify(Run::new(1), &place.at("other"), &place.at("delta"), false).unwrap();
    assert_eq!(names, ["dense", "sparse.BF16"]);
    assert_eq!(verify(Run::new(1), &place.at("base"), &place.at("delta"), false).unwrap(), [""; 0]);
    assert_eq!(verify(Run::new(1), &place.at("tuned"), &place.at("delta"), true).unwrap(), [""; 0]);
    assert!(!verify(Run::new(1), &place.at("base"), &place.at("delta"), true).unwrap().is_empty());
    assert_eq!(place.names(), before);
    let (o, d) = (place.at("other"), place.at("delta"));
    apply(Run::new(1), &o, &d, &place.at("out"), true, false).unwrap();
    let forced = read_all(&place.at("out"));
    assert_eq!(forced["dense"], tuned["dense"]);
    assert_eq!(forced["sparse.BF16"].2[5], base["sparse.BF16"].2[5]);
}

#[test]
fn a_change_of_dtype_or_shape_is_refused() {
    let (base, mut tuned) = pair();
    let place = Place::new(&base, &tuned, [1, 1], false);
    tuned.insert("same".into(), (Dtype::F32, vec![3, 1], base["same"].2.clone()));
    write_sharded(&place.at("reshaped"), &tuned, 1);
    let before = place.names();
    let (b, r, o) = (place.at("base"), place.at("reshaped"), place.at("out"));
    format_error(
        diff(Run::new(1), &b, &r, Some(&o), &options(false)),
        "reshaped",
        "tensor same is F32 [3, 1]",
    );
    assert_eq!(place.names(), before);
    let (d, wrong) = (place.at("delta"), place.at("wrong"));
    let mut other = base.clone();
    other.insert("wide".into(), (Dtype::BF16, vec![200_000], base["wide"].2.clone()));
    write_sharded(&wrong, &other, 1);
    format_error(apply(Run::new(1), &wrong, &d, &o, true, false), "wrong", "tensor wide is BF16");
    other.remove("wide");
    write_sharded(&wrong, &other, 1);
    format_error(apply(Run::new(1), &wrong, &d, &o, true, false), "wrong", "no tensor wide");
}

#[test]
fn revert_without_old_values_says_what_to_do() {
    let (base, tuned) = pair();
    let place = Place::new(&base, &tuned, [1, 1], false);
    let error = place.revert("tuned", "out", None).unwrap_err();
    assert!(matches!(error, Error::Value { .. }));
    let text = error.to_string();
    assert!(text.contains("--reversible") && text.contains("--base BASE"), "{text}");
}

#[test]
fn outputs_are_refused_or_replaced_whole() {
    let place = Place::ordinary();
    place.apply("base", "out").unwrap();
    let (b, d, o) = (place.at("base"), place.at("delta"), place.at("out"));
    fs::write(o.join("mine.txt"), "kept until overwritten").unwrap();
    let error = place.apply("base", "out").unwrap_err();
    assert!(error.to_string().contains("overwrite"), "{error}");
    assert!(o.join("mine.txt").exists());
    apply(Run::new(1), &b, &d, &o, false, true).unwrap();
    assert!(!o.join("mine.txt").exists());
    // never onto or around an input, and never over a folder of other things
    for out in [&b, &d, &place.0.path().to_path_buf(), &place.at("out/../base")] {
        assert!(
            matches!(apply(Run::new(1), &b, &d, out, false, true), Err(Error::Value { .. })),
            "{out:?}"
        );
    }
    fs::create_dir(place.at("home")).unwrap();
    fs::write(place.at("home/diary.txt"), "dear").unwrap();
    let home = apply(Run::new(1), &b, &d, &place.at("home"), false, true);
    assert!(matches!(home, Err(Error::Value { .. })));
    assert_eq!(fs::read(place.at("home/diary.txt")).unwrap(), b"dear");
    fs::create_dir(place.at("empty")).unwrap();
    place.apply("base", "empty").unwrap();
    assert_eq!(place.names(), ["base", "delta", "empty", "home", "out", "tuned"]);
}

#[test]
fn a_stopped_operation_leaves_nothing() {
    let place = Place::ordinary();
    let before = place.names();
    let (b, t, d, o) = (place.at("base"), place.at("tuned"), place.at("delta"), place.at("out"));
    let mut finished = 0;
    for left in 0..80 {
        let left = std::sync::atomic::AtomicIsize::new(left);
        let go_on = || match left.fetch_sub(1, std::sync::atomic::Ordering::Relaxed) {
            ..=0 => Err(Error::Stopped),
            _ => Ok(()),
        };
        let run = Run { threads: 2, go_on: &go_on };
        let made = diff(run, &b, &t, Some(&o), &options(true)).map(drop);
        let made = made.and_then(|()| fs::remove_dir_all(&o).map_err(|_| Error::Stopped));
        match made.and_then(|()| apply(run, &b, &d, &o, false, false).map(drop)) {
            Ok(()) => {
                finished += 1;
                fs::remove_dir_all(&o).unwrap();
            }
            Err(Error::Stopped) => {}
            Err(other) => panic!("{other}"),
        }
        assert_eq!(place.names(), before);
    }
    assert!(finished > 0 && finished < 80, "{finished}");
}

#[test]
fn a_tied_weight_changes_under_every_name_that_the_checkpoint_has() {
    let (base, tuned) = pair();
    let place = Place::new(&base, &tuned, [1, 1], true);
    let mut config = place.config();
    config["aliases"] = json!({"head": "wide"});
    fs::write(place.at("delta").join(CONFIG), config.to_string()).unwrap();
    let tie = |tensors: &Tensors, both: bool| {
        let mut tensors = tensors.clone();
        tensors.insert("head".into(), tensors["wide"].clone());
        if !both {
            tensors.remove("wide");
        }
        tensors
    };
    for both in [true, false] {
        let (b, a, r) = (format!("b{both}"), format!("a{both}"), format!("r{both}"));
        write_sharded(&place.at(&b), &tie(&base, both), 1);
        place.apply(&b, &a).unwrap();
        assert_eq!(read_all(&place.at(&a)), tie(&tuned, both));
        place.revert(&a, &r, None).unwrap();
        assert_eq!(read_all(&place.at(&r)), tie(&base, both));
    }
}

//! Damaged, truncated and hostile files: an error with the path, never a panic, and nothing left behind.
use crate::files::{Place, format_error, pair};
use proptest::prelude::*;
use retouch::delta::{CONFIG, Delta, Run, WEIGHTS, apply, show};
use retouch::io::Checkpoint;
use retouch::{Error, Result};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use tempfile::TempDir;

/// A file of this header text and these bytes.
fn raw(header: &str, bytes: &[u8]) -> Vec<u8> {
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(bytes);
    out
}

fn open(bytes: &[u8]) -> Result<Checkpoint> {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("hostile.safetensors");
    fs::write(&path, bytes).unwrap();
    Checkpoint::open(&path)
}

#[test]
fn headers_are_not_trusted() {
    let one = |dtype: &str, shape: &str, offsets: &str| {
        raw(
            &format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#),
            &[0; 8],
        )
    };
    open(&one("F32", "[2]", "[0,8]")).unwrap();
    let max = u64::MAX;
    for (file, why) in [
        (vec![], "shorter"),
        (vec![0; 7], "shorter"),
        (max.to_le_bytes().to_vec(), "length out of range"),
        (100_000_001_u64.to_le_bytes().to_vec(), "length out of range"),
        (50_u64.to_le_bytes().to_vec(), "shorter"),
        (raw("{", &[]), "header"),
        (raw("[]", &[]), "header"),
        (raw("\u{0}\u{1}", &[]), "header"),
        (raw(&"[".repeat(100_000), &[]), "header"),
        (raw(r#"{"a":null}"#, &[]), "tensor a: no dtype"),
        (raw(r#"{"__metadata__":[]}"#, &[]), "metadata"),
        (raw(r#"{"__metadata__":{"a":1}}"#, &[]), "metadata"),
        (one("F33", "[2]", "[0,8]"), "unknown dtype F33"),
        (one("F32", "[-2]", "[0,8]"), "no shape"),
        (one("F32", "2", "[0,8]"), "no shape"),
        (one("F32", "[3]", "[0,8]"), "12 bytes do not lie at 0..8"),
        (one("F32", "[2]", "[8,0]"), "do not lie"),
        (one("F32", "[2]", "[0,8,9]"), "data_offsets"),
        (one("F32", "[2]", "[1,9]"), "hole"),
        (one("F32", "[1]", "[0,4]"), "but the header tells of 4"),
        (one("F32", "[4]", "[0,16]"), "truncated?"),
        (one("F32", &format!("[{max},{max}]"), "[0,8]"), "too large"),
        (one("U8", &format!("[{max}]"), &format!("[0,{max}]")), "too large"),
        (one("F4", "[3]", "[0,8]"), "too large"),
        // two tensors in one place, and offsets whose sum would wrap around to the size of the file
        (
            raw(
                r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},
                    "b":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}"#,
                &[0; 8],
            ),
            "overlap",
        ),
        (
            raw(
                r#"{"a":{"dtype":"U8","shape":[1152921504606846976],"data_offsets":[0,1152921504606846976]},
                    "b":{"dtype":"U8","shape":[8],"data_offsets":[1152921504606846976,1152921504606846984]}}"#,
                &[0; 8],
            ),
            "truncated?",
        ),
    ] {
        format_error(open(&file), "hostile.safetensors", why);
    }
}

#[test]
fn an_index_must_fit_its_shards() {
    let (base, tuned) = pair();
    let place = Place::new(&base, &tuned, [2, 1], false);
    let folder = place.at("base");
    let index = folder.join("model.safetensors.index.json");
    let good: Value = serde_json::from_slice(&fs::read(&index).unwrap()).unwrap();
    let shard = |n| format!("model-0000{n}-of-00002.safetensors");
    let other = if good["weight_map"]["same"] == shard(1) { shard(2) } else { shard(1) };
    for (name, file, why) in [
        ("same", json!(other), "tensor same is not in"),
        ("ghost", json!(shard(1)), "tensor ghost is not in"),
        ("same", json!("../tuned/model-00001-of-00001.safetensors"), "no shard"),
        ("same", json!("/etc/passwd"), "no shard"),
        ("same", json!(".."), "no shard"),
        ("same", json!(7), "no shard"),
    ] {
        let mut bad = good.clone();
        bad["weight_map"][name] = file;
        fs::write(&index, bad.to_string()).unwrap();
        format_error(Checkpoint::open(&folder), "index.json", why);
    }
    let mut bad = good.clone();
    bad["weight_map"].as_object_mut().unwrap().remove("same");
    fs::write(&index, bad.to_string()).unwrap();
    format_error(
        Checkpoint::open(&folder),
        "index.json",
        "tensor same is in a shard but not listed",
    );
    fs::write(&index, "{}").unwrap();
    format_error(Checkpoint::open(&folder), "index.json", "no weight_map");
    fs::write(&index, "{").unwrap();
    format_error(Checkpoint::open(&folder), "index.json", "JSON");
    fs::write(&index, good.to_string()).unwrap();
    fs::remove_file(folder.join(shard(2))).unwrap();
    match Checkpoint::open(&folder) {
        Err(Error::Io { path, .. }) => assert_eq!(path, folder.join(shard(2))),
        other => panic!("{other:?}"),
    }
    // without an index every file counts, and none may repeat a tensor
    fs::remove_file(&index).unwrap();
    fs::copy(folder.join(shard(1)), folder.join("copy.safetensors")).unwrap();
    format_error(Checkpoint::open(&folder), "base", "also in another shard");
    format_error(Checkpoint::open(&place.at("delta")), "delta", "this is a delta");
    format_error(Checkpoint::open(&place.at("base/extra")), "extra", "no .safetensors file");
}

#[test]
fn descriptions_are_not_trusted() {
    let place = Place::ordinary();
    let good = place.config();
    let before = place.names();
    let check = |bad: &Value, why: &str| {
        fs::write(place.at("delta").join(CONFIG), bad.to_string()).unwrap();
        format_error(place.apply("base", "out"), "delta", why);
        format_error(show(&place.at("delta")), "delta", why);
        assert_eq!(place.names(), before);
    };
    for (pointer, value, why) in [
        ("/format", json!("other"), "not a delta"),
        ("/format_version", json!(3), "format_version is 3"),
        ("/format_version", json!("1"), "format_version"),
        ("/tensors", json!(7), "\"tensors\" is missing"),
        ("/tensors/dense/kind", json!("ternary"), "dense"),
        ("/tensors/dense/dtype", json!("F16"), "dense of F16"),
        ("/tensors/dense/shape", json!([7, 4]), "dense of BF16"),
        ("/tensors/dense/base_hash", json!(1), "dense"),
        ("/tensors/wide/count", json!(2), "wide.idx"),
        ("/tensors/wide/count", json!(-1), "wide"),
        ("/tensors/wide/shape", json!([u64::MAX, u64::MAX]), "wide"),
        ("/tensors/wide/shape", json!([0]), "wide"),
        ("/tensors/wide/shape", json!([199_999]), "outside"),
        ("/tensors/wide/index_encoding", json!("gap16"), "wide.idx"),
        ("/tensors/wide/index_encoding", json!("zip"), "wide"),
        ("/tensors/wide/dtype", json!("F4"), "wide"),
        ("/aliases", json!({"x": "ghost"}), "alias x"),
        ("/aliases", json!({"wide": "dense"}), "alias wide"),
    ] {
        let mut bad = good.clone();
        *bad.pointer_mut(pointer).unwrap() = value;
        if pointer == "/tensors/wide/shape" && why == "outside" {
            // positions are read after the base is known: only a description alone tells
            fs::write(place.at("delta").join(CONFIG), bad.to_string()).unwrap();
            format_error(show(&place.at("delta")), "delta", why);
            continue;
        }
        check(&bad, why);
    }
    let mut bad = good.clone();
    bad["tensors"].as_object_mut().unwrap().remove("wide");
    check(&bad, "tensors, but");
    fs::write(place.at("delta").join(CONFIG), "{").unwrap();
    format_error(Delta::open(&place.at("delta")), CONFIG, "JSON");
    fs::remove_file(place.at("delta").join(CONFIG)).unwrap();
    assert!(matches!(Delta::open(&place.at("delta")), Err(Error::Io { .. })));
}

/// Replaces `from` by `to` in the stored tensor.
fn overwrite(path: &Path, name: &str, f: impl Fn(&mut [u8])) {
    let mut bytes = fs::read(path).unwrap();
    let head = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..head]).unwrap();
    let at = |i: usize| head + header[name]["data_offsets"][i].as_u64().unwrap() as usize;
    let range = at(0)..at(1);
    f(&mut bytes[range]);
    fs::write(path, bytes).unwrap();
}

#[test]
fn positions_and_values_are_not_trusted() {
    let negative = (-1_i32).to_le_bytes();
    let large = 200_000_i32.to_le_bytes();
    type Change<'a> = (&'a str, Box<dyn Fn(&mut [u8])>, &'a str);
    let changes: [Change<'_>; 4] = [
        ("wide.idx", Box::new(move |b| b.copy_from_slice(&negative)), "outside"),
        ("wide.idx", Box::new(move |b| b.copy_from_slice(&large)), "outside"),
        ("sparse.I16.idx", Box::new(|b| b.fill(0xff)), "outside"),
        ("sparse.I16.val", Box::new(|b| b[0] ^= 1), "does not come out as its hash"),
    ];
    for (name, change, why) in changes {
        let place = Place::ordinary();
        let before = place.names();
        overwrite(&place.at("delta").join(WEIGHTS), name, change);
        format_error(place.apply("base", "out"), "delta", why);
        assert_eq!(place.names(), before, "{name}");
    }
    // unsorted positions in the raw encodings
    let (mut base, mut tuned) = pair();
    for tensors in [&mut base, &mut tuned] {
        tensors.retain(|n, _| n == "wide");
    }
    tuned.get_mut("wide").unwrap().2[0] ^= 1;
    let place = Place::new(&base, &tuned, [1, 1], false);
    for (a, b) in [(9_i32, 3_i32), (4, 4)] {
        overwrite(&place.at("delta").join(WEIGHTS), "wide.idx", |x| {
            x[..4].copy_from_slice(&a.to_le_bytes());
            x[4..].copy_from_slice(&b.to_le_bytes());
        });
        let forced = apply(
            Run::new(1),
            &place.at("base"),
            &place.at("delta"),
            &place.at("out"),
            true,
            false,
        );
        format_error(forced, WEIGHTS, "ascending");
        format_error(show(&place.at("delta")), WEIGHTS, "ascending");
    }
}

#[test]
fn truncated_files_are_refused_at_any_length() {
    let place = Place::ordinary();
    let before = place.names();
    for file in [place.at("delta").join(WEIGHTS), place.at("base/model-00001-of-00001.safetensors")]
    {
        let whole = fs::read(&file).unwrap();
        for cut in [0, 1, 8, 9, whole.len() / 2, whole.len() - 1] {
            fs::write(&file, &whole[..cut]).unwrap();
            format_error(place.apply("base", "out"), "safetensors", "");
        }
        fs::write(&file, [whole.as_slice(), b"x"].concat()).unwrap();
        format_error(place.apply("base", "out"), "safetensors", "truncated?");
        fs::write(&file, whole).unwrap();
    }
    assert_eq!(place.names(), before);
    place.apply("base", "out").unwrap();
}

proptest! {
    /// Any damage to the head of a file is an error or another valid file, never a panic.
    #[test]
    fn damaged_heads_do_not_panic(at in 0_usize..200, byte: u8) {
        let header = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[1],"data_offsets":[8,9]}}"#;
        let mut file = raw(header, &[0; 9]);
        let at = at % file.len();
        file[at] = byte;
        if let Ok(checkpoint) = open(&file) {
            for name in checkpoint.names() {
                let t = checkpoint.get(name).unwrap();
                prop_assert!(t.bytes.len() <= 9);
            }
        }
    }
}

#[cfg(unix)]
#[test]
fn a_pipe_is_refused_and_not_waited_for() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("model.safetensors");
    assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
    let error = Checkpoint::open(&path).unwrap_err().to_string();
    assert!(error.contains("not a regular file"), "{error}");
}

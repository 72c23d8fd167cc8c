//! Differing bits, patches and fingerprints against literal versions.
use proptest::prelude::*;
use retouch::kernel::bits::{Changes, diff, diff_up_to, fingerprint, patched, take};
use retouch::kernel::pack;
use retouch::view::{Index, Positions};
use retouch::{Error, Result};

fn literal(width: usize, a: &[u8], b: &[u8]) -> Vec<i32> {
    let pairs = a.chunks(width).zip(b.chunks(width)).enumerate();
    pairs.filter(|(_, (x, y))| x != y).map(|(i, _)| i as i32).collect()
}

/// `n` bytes that look random and are the same every time.
fn bytes(seed: u64, n: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 32) as u8
    };
    (0..n).map(|_| next()).collect()
}

/// `a` with every `step`-th element changed in its last byte.
fn changed(a: &[u8], width: usize, step: usize) -> Vec<u8> {
    let mut b = a.to_vec();
    b.iter_mut().skip(width - 1).step_by(step * width).for_each(|x| *x ^= 0x80);
    b
}

#[test]
fn diff_finds_what_differs_at_every_width_and_thread_count() {
    for width in [1, 2, 4, 8] {
        for numel in [0, 1, 63, 64, 65, 1000, (1 << 17) + 77] {
            let a = bytes(width as u64, numel * width);
            for step in [1, 3, 1000] {
                let b = changed(&a, width, step);
                let want = literal(width, &a, &b);
                for threads in [1, 2, 5] {
                    let got = diff(threads, width, &a, &b).unwrap();
                    assert_eq!(got, Positions::Small(want.clone()), "{width} {numel} {step}");
                    let most = diff_up_to(threads, width, &a, &b, want.len()).unwrap();
                    assert_eq!(most, (want.len(), Some(got)));
                    if let Some(less) = want.len().checked_sub(1) {
                        let none = diff_up_to(threads, width, &a, &b, less).unwrap();
                        assert_eq!(none, (want.len(), None));
                    }
                }
            }
        }
    }
}

#[test]
fn diff_sees_signs_of_zero_and_equal_nans() {
    let a: Vec<u8> = [0.0_f32, f32::NAN, 1.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut b: Vec<u8> = [-0.0_f32, f32::NAN, 1.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    assert_eq!(diff(1, 4, &a, &b).unwrap(), Positions::Small(vec![0]));
    b[4] ^= 1; // another NaN payload
    assert_eq!(diff(1, 4, &a, &b).unwrap(), Positions::Small(vec![0, 1]));
}

#[test]
fn diff_refuses_sizes_that_do_not_fit() {
    assert!(matches!(diff(1, 2, &[0; 4], &[0; 6]), Err(Error::Length { got: 6, want: 4, .. })));
    assert!(matches!(diff(1, 4, &[0; 6], &[0; 6]), Err(Error::Length { .. })));
    assert!(matches!(diff(1, 3, &[0; 6], &[0; 6]), Err(Error::Value { .. })));
}

#[test]
fn fingerprint_of_a_patch_is_that_of_the_patched_tensor() {
    // more than two blocks of four MiB, so that clean, patched and cut stretches all occur
    let (width, numel) = (2, 5 << 20);
    let a = bytes(1, width * numel);
    for index in [
        vec![],
        vec![0],
        vec![numel as i32 - 1],
        vec![0, (2 << 20) - 1, 2 << 20, numel as i32 - 1],
        (0..numel as i32).step_by(7).collect::<Vec<_>>(),
    ] {
        let values = bytes(2, index.len() * width);
        let mut b = a.clone();
        for (i, p) in index.iter().enumerate() {
            let p = *p as usize * width;
            b[p..p + width].copy_from_slice(&values[i * width..][..width]);
        }
        let shape = [5, 1 << 20];
        let want = fingerprint(1, "BF16", &shape, &b, None).unwrap();
        for threads in [1, 3] {
            let patch = Some((Index::Small(&index), values.as_slice()));
            assert_eq!(fingerprint(threads, "BF16", &shape, &a, patch).unwrap(), want);
            let long: Vec<i64> = index.iter().map(|p| i64::from(*p)).collect();
            let patch = Some((Index::Large(&long), values.as_slice()));
            assert_eq!(fingerprint(threads, "BF16", &shape, &a, patch).unwrap(), want);
        }
        assert_eq!(take("w", width, &b, Index::Small(&index)).unwrap(), values);
    }
}

#[test]
fn fingerprint_is_of_dtype_shape_and_bytes() {
    let hash =
        |dtype, shape: &[usize], bytes: &[u8]| fingerprint(1, dtype, shape, bytes, None).unwrap();
    let data = [1, 2, 3, 4, 5, 6, 7, 8];
    let all = [
        hash("F32", &[2], &data),
        hash("I32", &[2], &data),
        hash("F32", &[2, 1], &data),
        hash("F32", &[1, 2], &data),
        hash("F16", &[4], &data),
        hash("F32", &[2], &[1, 2, 3, 4, 5, 6, 7, 9]),
        hash("F32", &[], &data),
    ];
    for (i, a) in all.iter().enumerate() {
        assert!(a.len() == 32 && a.bytes().all(|c| c.is_ascii_hexdigit()), "{a}");
        assert!(all[..i].iter().all(|b| a != b), "{i}");
    }
    // hashes lie in files: what they are made of may never change
    let mut literal = b"retouch tensor 1".to_vec();
    for part in [&3_u64.to_le_bytes()[..], b"F32", &1_u64.to_le_bytes(), &2_u64.to_le_bytes()] {
        literal.extend_from_slice(part);
    }
    literal.extend_from_slice(&data);
    assert_eq!(all[0], blake3::hash(&literal).to_hex()[..32]);
}

#[test]
fn patches_are_checked() {
    let bytes = [0_u8; 8];
    let make = |index: &[i32], values: &[u8], width| -> Result<()> {
        Changes::new("w", Index::Small(index), values, width, bytes.len()).map(drop)
    };
    assert!(make(&[0, 3], &[1; 4], 2).is_ok());
    for bad in [&[3, 0][..], &[0, 4], &[-1, 0], &[1, 1]] {
        assert!(matches!(make(bad, &[1; 4], 2), Err(Error::Index { .. })), "{bad:?}");
    }
    assert!(matches!(make(&[0], &[1; 4], 2), Err(Error::Length { .. })));
    let odd = fingerprint(1, "U8", &[8], &bytes, Some((Index::Small(&[0, 1]), &[1, 2, 3])));
    assert!(matches!(odd, Err(Error::Length { .. })));
    let none = fingerprint(1, "U8", &[8], &bytes, Some((Index::Small(&[]), &[1])));
    assert!(matches!(none, Err(Error::Length { .. })));
}

#[test]
fn gaps_of_sixteen_bits_and_no_more() {
    let fits = |index: &[i32]| pack::fits_gap16(Index::Small(index));
    assert!(fits(&[]) && fits(&[65535]) && fits(&[0, 65536]) && fits(&[65535, 65535 + 65536]));
    assert!(!fits(&[65536]) && !fits(&[0, 65537]));
    assert!(pack::from_gap16("w", &[9, 0], 9).is_err());
    assert_eq!(pack::from_gap16("w", &[8, 0], 9).unwrap(), Positions::Small(vec![8]));
}

proptest! {
    #[test]
    fn gaps_round_trip(gaps in prop::collection::vec(0_u32..65536, 0..200), cut in 0_usize..200) {
        let mut at = -1_i64;
        let index: Vec<i64> = gaps.iter().map(|g| { at += i64::from(*g) + 1; at }).collect();
        let len = (at + 1) as usize;
        let cut = cut.min(index.len());
        let mut coded = pack::gap16(Index::Large(&index), 0, cut);
        coded.extend(pack::gap16(Index::Large(&index), cut, index.len()));
        let Positions::Small(got) = pack::from_gap16("w", &coded, len).unwrap() else { panic!() };
        prop_assert_eq!(got.iter().map(|p| i64::from(*p)).collect::<Vec<_>>(), index.clone());
        let raw = pack::raw(Index::Large(&index), 0, index.len());
        prop_assert_eq!(pack::from_raw(8, &raw), Positions::Large(index));
    }

    #[test]
    fn patched_bytes_come_in_order(at in 0_usize..50, step in 1_usize..50) {
        let a = bytes(3, 50);
        let index: Vec<i32> = (at as i32..50).step_by(step).collect();
        let values = vec![7; index.len()];
        let mut out = Vec::new();
        let patch = Changes::new("w", Index::Small(&index), &values, 1, 50).unwrap();
        patched(&a, Some(patch), |b| { out.extend_from_slice(b); Ok(()) }).unwrap();
        let want: Vec<u8> = (0..50).map(|i| if index.contains(&i) { 7 } else { a[i as usize] }).collect();
        prop_assert_eq!(out, want);
    }
}

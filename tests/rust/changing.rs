//! Compact differences decode to the numbers that they stand for, and are added with one rounding.
use half::bf16;
use proptest::prelude::*;
use retouch::Error;
use retouch::kernel::change::{add, integers, plain, product, signs};

fn bytes(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn is_length<T>(found: retouch::Result<T>) -> bool {
    matches!(found, Err(Error::Length { .. }))
}

#[test]
fn signs_are_read_from_the_lowest_bit_on() {
    let got = signs(&[0b0000_0101, 0b1], &bytes(&[0.5]), 9).unwrap();
    assert_eq!(got, [-0.5, 0.5, -0.5, 0.5, 0.5, 0.5, 0.5, 0.5, -0.5]);
    assert!(is_length(signs(&[0], &bytes(&[0.5]), 9)));
    assert!(is_length(signs(&[0, 0], &[0], 9)));
    assert!(signs(&[], &bytes(&[0.5]), 0).unwrap().is_empty());
}

#[test]
fn integers_have_the_scale_of_their_block() {
    let scales = bytes(&[2.0, 10.0]);
    assert_eq!(integers(8, &[1, 255, 128], &scales, 2, 3).unwrap(), [2.0, -2.0, -1280.0]);
    // 4 bits: the first in the low half, 8 is zero
    assert_eq!(integers(4, &[0xf8, 0x00], &scales, 2, 3).unwrap(), [0.0, 14.0, -80.0]);
    assert!(is_length(integers(4, &[0], &scales, 2, 3)));
    assert!(is_length(integers(8, &[1, 2, 3], &scales, 1, 3)));
    assert!(is_length(integers(8, &[1, 2, 3], &scales, 0, 3)), "a block of nothing");
}

#[test]
fn what_a_tensor_cannot_take_is_refused() {
    assert!(is_length(add("w", "F32", &[0; 7], &[1.0, 2.0])));
    let error = add("w", "I8", &[0; 2], &[1.0, 2.0]).unwrap_err().to_string();
    assert!(error.contains("w") && error.contains("I8"), "{error}");
    assert!(is_length(product(&bytes(&[1.0; 4]), &bytes(&[1.0; 5]), 2, 3)));
    assert_eq!(product(&[], &[], 2, 3).unwrap(), [0.0; 6], "rank 0");
}

proptest! {
    #[test]
    fn a_product_is_rounded_once(
        rows in 1usize..5, rank in 1usize..6, columns in 1usize..5, seed in 0u64..99,
    ) {
        let mut x = vec![0.0; rank * (rows + columns)];
        retouch::kernel::rng::uniform(1, seed, 1, &mut x);
        let (up, down) = x.split_at(rows * rank);
        let got = product(&bytes(up), &bytes(down), rows, columns).unwrap();
        for r in 0..rows {
            for c in 0..columns {
                let terms = (0..rank).map(|k| f64::from(up[r * rank + k]) * f64::from(down[k * columns + c]));
                prop_assert_eq!(got[r * columns + c], terms.sum::<f64>() as f32);
            }
        }
    }

    #[test]
    fn a_sum_is_rounded_once(x in -1e3f32..1e3, y in -1f32..1.0) {
        prop_assert_eq!(plain(&add("w", "F32", &bytes(&[x]), &[y]).unwrap()), [x + y]);
        let base = bf16::from_f32(x);
        let got = add("w", "BF16", &base.to_le_bytes(), &[y]).unwrap();
        prop_assert_eq!(got, bf16::from_f32(base.to_f32() + y).to_le_bytes());
        let wide = f64::from(x);
        let got = add("w", "F64", &wide.to_le_bytes(), &[y]).unwrap();
        prop_assert_eq!(got, (wide + f64::from(y)).to_le_bytes());
    }
}

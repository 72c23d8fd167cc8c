use half::{bf16, f16};
use proptest::prelude::*;
use retouch::Error;
use retouch::kernel::gather::{gather, put, scatter, take};
use retouch::kernel::reduce::{Map, accumulate};
use retouch::num::{Element, Position};

/// Every `step`-th position of `n`, shifted a little so that gaps vary.
fn positions<P: Position>(n: usize, step: usize) -> Vec<P> {
    (0..n).filter(|i| i % step == (i / step) % step).map(P::new).collect()
}

fn roundtrip<T: Element + std::fmt::Debug, P: Position>(n: usize, step: usize) {
    let src: Vec<T> = (0..n).map(|i| T::from_f32((i as f32 * 0.37).sin())).collect();
    let index: Vec<P> = positions(n, step);
    for threads in 1..=3 {
        let mut wide = vec![0.5f32; index.len()];
        gather(threads, "w", &src, &index, &mut wide, false).unwrap();
        for (x, p) in wide.iter().zip(&index) {
            assert_eq!(*x, src[p.at()].to_f32());
        }
        gather(threads, "w", &src, &index, &mut wide, true).unwrap();
        for (x, p) in wide.iter().zip(&index) {
            assert_eq!(*x, 2.0 * src[p.at()].to_f32());
        }
        let mut dst = src.clone();
        scatter(threads, "w", &mut dst, &index, &wide).unwrap();
        let mut want = src.clone();
        index.iter().zip(&wide).for_each(|(p, x)| want[p.at()] = T::from_f32(*x));
        assert!(dst == want);

        let mut old = vec![T::default(); index.len()];
        take(threads, "w", &src, &index, &mut old).unwrap();
        assert!(old.iter().zip(&index).all(|(x, p)| x.bits() == src[p.at()].bits()));
        put(threads, "w", &mut dst, &index, &old).unwrap();
        assert!(dst == src);
    }
}

#[test]
fn values_come_and_go() {
    for (n, step) in [(0, 1), (1, 1), (5, 2), (200_000, 1), (200_001, 3), (200_000, 17)] {
        roundtrip::<f32, i32>(n, step);
        roundtrip::<f16, i64>(n, step);
        roundtrip::<bf16, i32>(n, step);
    }
}

#[test]
fn bits_survive_take_and_put() {
    let odd = [f32::from_bits(0x7fa0_0001), -0.0, f32::NEG_INFINITY, f32::from_bits(1)];
    let mut out = [0.0f32; 4];
    take(1, "w", &odd, &[0i32, 1, 2, 3], &mut out).unwrap();
    assert_eq!(out.map(f32::to_bits), odd.map(f32::to_bits));
    let mut dst = [1.0f32; 5];
    put(1, "w", &mut dst, &[0i64, 1, 3, 4], &odd).unwrap();
    let want = [odd[0], odd[1], 1.0, odd[2], odd[3]];
    assert_eq!(dst.map(f32::to_bits), want.map(f32::to_bits));
}

#[test]
fn bad_positions_are_refused_before_anything_is_written() {
    let bad: [&[i32]; 6] = [&[0, 0], &[2, 1], &[0, 4], &[-1, 2], &[4], &[i32::MIN]];
    for index in bad {
        let mut dst = [1.0f32, 2.0, 3.0, 4.0];
        let values = vec![9.0f32; index.len()];
        let mut out = values.clone();
        let errors = [
            scatter(1, "w", &mut dst, index, &values),
            put(1, "w", &mut dst, index, &values),
            gather(1, "w", &[0.0f32; 4], index, &mut out, false),
            take(1, "w", &[0.0f32; 4], index, &mut out),
        ];
        for e in errors {
            assert!(
                matches!(&e, Err(Error::Index { name, .. }) if name == "w"),
                "{index:?}: {e:?}"
            );
        }
        assert_eq!(dst, [1.0, 2.0, 3.0, 4.0]);
        assert!(out.iter().all(|x| *x == 9.0));
    }
    // A bad position deep inside a long index is found as well.
    let mut long: Vec<i64> = (0..100_000).collect();
    long.swap(70_000, 70_001);
    let values = vec![0.0f32; long.len()];
    let mut dst = vec![1.0f32; 100_000];
    assert!(scatter(2, "w", &mut dst, &long, &values).is_err());
    long.swap(70_000, 70_001);
    long[3] = i64::MIN;
    assert!(scatter(2, "w", &mut dst, &long, &values).is_err());
    assert!(dst.iter().all(|x| *x == 1.0));
}

#[test]
fn lengths_are_checked() {
    let mut dst = [0.0f32; 4];
    let length = |e| matches!(e, Err(Error::Length { got: 1, want: 2, .. }));
    assert!(length(scatter(1, "w", &mut dst, &[0i32, 1], &[1.0])));
    assert!(length(put(1, "w", &mut dst, &[0i32, 1], &[1.0])));
    assert!(length(gather(1, "w", &[0.0f32; 4], &[0i32, 1], &mut [1.0], true)));
    assert!(length(take(1, "w", &[0.0f32; 4], &[0i32, 1], &mut [1.0f32])));
    assert!(length(accumulate(1, &mut [0.0, 0.0], &[1.0f32], Map::Id, 1.0)));
}

proptest! {
    #[test]
    fn one_rounding(x in any::<f32>()) {
        let mut dst = [bf16::ZERO; 3];
        scatter(1, "w", &mut dst, &[1i32], &[x]).unwrap();
        prop_assert_eq!(dst[1].to_bits(), bf16::from_f32(x).to_bits());
        prop_assert_eq!(dst[0].to_bits() | dst[2].to_bits(), 0);
    }

    #[test]
    fn statistics(start in -4.0f32..4.0, x in -4.0f32..4.0, weight in -2.0f32..2.0) {
        let one = |map| {
            let mut score = vec![start; 37];
            accumulate(2, &mut score, &[bf16::from_f32(x); 37], map, weight).unwrap();
            assert!(score.iter().all(|s| *s == score[0]));
            f64::from(score[0])
        };
        let (start, weight) = (f64::from(start), f64::from(weight));
        let x = f64::from(bf16::from_f32(x).to_f32());
        for (map, y) in [(Map::Id, x), (Map::Abs, x.abs()), (Map::Square, x * x)] {
            // bf16 squares are exact in f32, so that the multiply-add is the only rounding.
            prop_assert_eq!(one(map), f64::from((start + weight * y) as f32));
        }
    }
}

#[test]
fn statistics_do_not_depend_on_threads() {
    let value: Vec<f16> = (0..200_003).map(|i| f16::from_f32((i as f32).sin())).collect();
    let run = |threads| {
        let mut score: Vec<f32> = (0..value.len()).map(|i| (i as f32).cos()).collect();
        accumulate(threads, &mut score, &value, Map::Square, 0.3).unwrap();
        score.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
    };
    assert!(run(1) == run(2) && run(1) == run(3));
}

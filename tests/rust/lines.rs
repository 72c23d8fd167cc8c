use proptest::prelude::*;
use retouch::Error;
use retouch::kernel::lines::{self, Shape};

#[test]
fn means_are_over_what_is_selected() {
    // [[1, 2, _], [_, 3, _]] and, in a second table, [[_, _, 4], [_, _, _]]
    let (x, index) = ([1.0f32, 2.0, 3.0, -4.0], [0i32, 1, 4, 8]);
    let (mut rows, mut columns) = ([9.0f32; 4], [9.0f32; 6]);
    let shape = Shape { height: 2, width: 3 };
    lines::means(1, "w", &x, &index, shape, &mut rows, &mut columns).unwrap();
    assert_eq!(rows, [2.5, 9.0, 16.0, 0.0]);
    assert_eq!(columns, [1.0, 6.5, 0.0, 0.0, 0.0, 16.0]);
}

/// With all selected it is the product of means by the mean of all.
#[test]
fn a_whole_table_is_torchs_estimate() {
    let shape = Shape { height: 5, width: 7 };
    let x: Vec<f32> = (0..35).map(|i| 0.1 + (i as f32 * 0.7).sin().abs()).collect();
    let index: Vec<i32> = (0..35).collect();
    let (mut rows, mut columns, mut out) = ([0.0f32; 5], [0.0f32; 7], [0.0f32; 35]);
    lines::means(1, "w", &x, &index, shape, &mut rows, &mut columns).unwrap();
    let mean = rows.iter().sum::<f32>() / 5.0;
    lines::estimate(1, "w", &rows, &columns, &index, shape, 1e-9, None, &mut out).unwrap();
    for (i, got) in out.iter().enumerate() {
        let want = rows[i / 7] * columns[i % 7] / mean;
        assert!((got - want).abs() < 1e-5 * want, "{got} {want}");
    }
    // A mean below the floor shrinks all by its share of it.
    let mut small = [0.0f32; 35];
    let floor = f64::from(mean) * 4.0;
    lines::estimate(1, "w", &rows, &columns, &index, shape, floor, None, &mut small).unwrap();
    assert!(out.iter().zip(&small).all(|(a, b)| (a / 4.0 - b).abs() < 1e-5 * a));
}

proptest! {
    #[test]
    fn threads_change_nothing_and_a_gradient_is_divided(
        height in 1usize..40, width in 1usize..3000, batch in 1usize..3, every in 1usize..4,
    ) {
        let (shape, numel) = (Shape { height, width }, batch * height * width);
        let index: Vec<i64> = (0..numel as i64).filter(|i| i % 7 % every as i64 == 0).collect();
        let x: Vec<f32> = (0..index.len()).map(|i| (i as f32 * 0.3).sin()).collect();
        let run = |threads| {
            let (mut rows, mut columns) = (vec![0.0; batch * height], vec![0.0; batch * width]);
            lines::means(threads, "w", &x, &index, shape, &mut rows, &mut columns).unwrap();
            let (mut v, mut u) = (vec![0.0; x.len()], vec![0.0; x.len()]);
            let (r, c) = (&rows, &columns);
            lines::estimate(threads, "w", r, c, &index, shape, 1e-3, None, &mut v).unwrap();
            lines::estimate(threads, "w", r, c, &index, shape, 1e-3, Some(&x), &mut u).unwrap();
            (rows, columns, v, u)
        };
        let one = run(1);
        prop_assert!(one == run(2) && one == run(3));
        for ((v, u), g) in one.2.iter().zip(&one.3).zip(&x) {
            prop_assert_eq!(*u, 1.0 / v.max(1e-6).sqrt() * g);
        }
    }
}

#[test]
fn nan_is_not_hidden() {
    let (shape, index) = (Shape { height: 2, width: 2 }, [0i32, 1, 2, 3]);
    let mut out = [0.0f32; 4];
    let rows = [f32::NAN, 1.0];
    lines::estimate(1, "w", &rows, &[1.0; 2], &index, shape, 1e-3, Some(&[1.0; 4]), &mut out)
        .unwrap();
    assert!(out[0].is_nan() && out[1].is_nan());
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_written() {
    let shape = Shape { height: 2, width: 3 };
    let (mut rows, mut columns) = ([9.0f32; 2], [9.0f32; 3]);
    for index in [&[1i32, 1][..], &[0, 6], &[-1, 2]] {
        let e = lines::means(1, "w", &[1.0; 2], index, shape, &mut rows, &mut columns);
        assert!(matches!(e, Err(Error::Index { .. })));
        let mut out = [5.0f32; 2];
        let e = lines::estimate(1, "w", &rows, &columns, index, shape, 0.1, None, &mut out);
        assert!(e.is_err() && out == [5.0; 2]);
    }
    let e = lines::means(1, "w", &[1.0], &[0i32], shape, &mut [0.0; 2], &mut [0.0; 4]);
    assert!(matches!(e, Err(Error::Length { got: 4, want: 3, .. })));
    let e = lines::means(1, "w", &[1.0], &[0i32], shape, &mut [0.0; 3], &mut columns);
    assert!(matches!(e, Err(Error::Length { .. })));
    let none = Shape { height: 0, width: 3 };
    let nothing: [i32; 0] = [];
    lines::means(1, "w", &[], &nothing, none, &mut [], &mut []).unwrap();
    assert_eq!((rows, columns), ([9.0; 2], [9.0; 3]));
}

use half::{bf16, f16};
use proptest::prelude::*;
use retouch::Error;
use retouch::kernel::made::Made;
use retouch::kernel::reduce::finite;
use retouch::kernel::select::{
    Order, threshold, topk, topk_bytes, topk_each, topk_made, topk_rows,
};
use retouch::num::Element;
use retouch::view::Positions;

const ORDERS: [Order; 2] = [Order::Largest, Order::Smallest];

fn plain(p: &Positions) -> Vec<usize> {
    match p {
        Positions::Small(v) => v.iter().map(|x| *x as usize).collect(),
        Positions::Large(v) => v.iter().map(|x| *x as usize).collect(),
    }
}

fn named<T>(parts: &[Vec<T>]) -> Vec<(&str, &[T])> {
    parts.iter().map(|x| ("w", x.as_slice())).collect()
}

/// Larger is better.
fn merit<T: Element>(x: T, order: Order, absolute: bool) -> f32 {
    let x = if absolute { x.to_f32().abs() } else { x.to_f32() };
    if order == Order::Largest { x } else { -x }
}

/// The definition: a stable sort, best first, and then the first k.
fn oracle<T: Element>(parts: &[Vec<T>], k: usize, order: Order, absolute: bool) -> Vec<Vec<usize>> {
    let mut all: Vec<(f32, usize, usize)> = Vec::new();
    for (p, x) in parts.iter().enumerate() {
        all.extend(x.iter().enumerate().map(|(i, x)| (merit(*x, order, absolute), p, i)));
    }
    all.sort_by(|a, b| b.0.partial_cmp(&a.0).unwrap());
    let mut out = vec![Vec::new(); parts.len()];
    all[..k].iter().for_each(|(_, p, i)| out[*p].push(*i));
    out.iter_mut().for_each(|x| x.sort_unstable());
    out
}

fn check<T: Element>(parts: &[Vec<T>], k: usize) {
    for order in ORDERS {
        for absolute in [false, true] {
            let want = oracle(parts, k, order, absolute);
            for threads in 1..=3 {
                let got = topk(threads, &named(parts), k, order, absolute).unwrap();
                let got: Vec<_> = got.iter().map(plain).collect();
                assert!(got == want, "k={k} {order:?} absolute={absolute} threads={threads}");
            }
        }
    }
}

/// Scores of several flavours: continuous, heavily tied, with infinities and both zeros.
fn score() -> impl Strategy<Value = f32> {
    prop_oneof![
        3 => -2.0f32..2.0,
        2 => prop_oneof![Just(0.0f32), Just(-0.0), Just(1.0), Just(-1.0)],
        1 => prop_oneof![Just(f32::INFINITY), Just(f32::NEG_INFINITY), Just(f32::MIN_POSITIVE)],
    ]
}

fn cast<T: Element>(parts: &[Vec<f32>]) -> Vec<Vec<T>> {
    parts.iter().map(|x| x.iter().map(|x| T::from_f32(*x)).collect()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn topk_is_a_stable_sort(
        parts in prop::collection::vec(prop::collection::vec(score(), 0..70), 1..6),
        share in 0.0f64..=1.0,
    ) {
        let n: usize = parts.iter().map(Vec::len).sum();
        let k = (n as f64 * share) as usize;
        check::<f32>(&parts, k);
        check::<f16>(&cast(&parts), k);
        check::<bf16>(&cast(&parts), k);
    }

    #[test]
    fn rows_are_separate_topks(
        row_len in 1usize..40,
        rows in 0usize..9,
        seed in prop::collection::vec(score(), 360),
        share in 0.0f64..=1.0,
        absolute: bool,
    ) {
        let scores = &seed[..row_len * rows];
        let k = (row_len as f64 * share) as usize;
        for order in ORDERS {
            let want: Vec<usize> = scores.chunks(row_len).enumerate().flat_map(|(r, row)| {
                let one = oracle(&[row.to_vec()], k, order, absolute);
                one[0].iter().map(|i| r * row_len + i).collect::<Vec<_>>()
            }).collect();
            for threads in 1..=3 {
                let got = topk_rows(threads, "w", scores, row_len, k, order, absolute).unwrap();
                prop_assert_eq!(plain(&got), want.clone());
            }
        }
    }

    #[test]
    fn threshold_is_a_comparison(
        parts in prop::collection::vec(prop::collection::vec(score(), 0..70), 1..4),
        t in score(),
        absolute: bool,
    ) {
        for order in ORDERS {
            let reaches = |x: f32| {
                let x = if absolute { x.abs() } else { x };
                if order == Order::Largest { x >= t } else { x <= t }
            };
            let got = threshold(2, &named(&parts), t, order, absolute).unwrap();
            for (got, part) in got.iter().zip(&parts) {
                let want: Vec<_> = (0..part.len()).filter(|i| reaches(part[*i])).collect();
                prop_assert_eq!(plain(got), want);
            }
        }
    }
}

/// A cheap generator for large inputs.
fn noise(n: usize, mut state: u64) -> Vec<f32> {
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..n).map(|_| next() + next() + next()).collect()
}

#[test]
fn topk_of_many_chunks() {
    // Sizes around the chunk boundary, one empty part, one of a single element.
    let sizes = [65_536, 65_537, 1, 0, 200_000, 65_535, 63];
    let parts: Vec<_> = sizes.iter().enumerate().map(|(i, n)| noise(*n, i as u64)).collect();
    let n: usize = sizes.iter().sum();
    for k in [1, 37, n / 1000, n / 100, n / 2, n - 1, n] {
        check(&parts, k);
    }
    check(&cast::<bf16>(&parts), n / 100); // bf16 ties heavily
    check(&cast::<f16>(&parts), n / 100);
}

#[test]
fn topk_of_massive_ties() {
    let n = 300_000;
    let equal = vec![vec![0.25f32; n], vec![0.25; n / 3]];
    let mut half = vec![noise(n, 1), noise(n / 3, 2)];
    half.iter_mut().flatten().step_by(2).for_each(|x| *x = 0.0);
    for k in [1, n / 2, n + n / 3] {
        check(&equal, k);
    }
    for k in [n * 2 / 3, n] {
        check(&half, k); // at the edge of the zeros, and among them
    }
    let few: Vec<f32> = noise(n, 3).iter().map(|x| (x * 4.0).round()).collect();
    check(&[few], n / 3);
}

#[test]
fn topk_where_a_sample_misleads() {
    let n = 300_000;
    // The best are all in one place, which a stride can miss.
    let mut step = vec![0.0f32; n];
    step[n / 2..n / 2 + 40].fill(1.0);
    for k in [20, 60] {
        check(&[step.clone()], k);
    }
    check(&[(0..n).map(|i| i as f32).collect()], n / 100);
    // Whatever a stride of 256 sees is larger, or smaller, than the rest.
    for odd in [7.0, -7.0] {
        let mut lie = noise(n, 4);
        lie.iter_mut().enumerate().filter(|(i, _)| i % 256 / 8 == 16).for_each(|(_, x)| *x = odd);
        check(&[lie], n / 2);
    }
}

#[test]
fn zeros_of_both_signs_are_equal() {
    let parts = [vec![-0.0f32, 0.0, -0.0, 0.0]];
    for order in ORDERS {
        for absolute in [false, true] {
            let got = topk(1, &named(&parts), 2, order, absolute).unwrap();
            assert_eq!(plain(&got[0]), [0, 1]);
        }
    }
}

#[test]
fn budgets_are_exact() {
    let parts = [vec![3.0f32, 1.0], vec![2.0, 4.0, 0.0]];
    let all = |k| topk(2, &named(&parts), k, Order::Largest, false);
    let counts = |k| all(k).unwrap().iter().map(Positions::len).collect::<Vec<_>>();
    assert_eq!(counts(0), [0, 0]);
    assert_eq!(counts(3), [1, 2]);
    assert_eq!(counts(5), [2, 3]);
    assert!(matches!(all(6), Err(Error::Budget { k: 6, eligible: 5 })));
    let none: Vec<(&str, &[f32])> = Vec::new();
    assert!(topk(2, &none, 0, Order::Largest, false).unwrap().is_empty());
    let rows = topk_rows(1, "w", &[1.0f32; 6], 3, 4, Order::Largest, false);
    assert!(matches!(rows, Err(Error::Budget { k: 4, eligible: 3 })));
    assert!(topk_rows(1, "w", &[1.0f32; 6], 4, 1, Order::Largest, false).is_err());
    assert!(topk_rows::<f32>(1, "w", &[], 0, 0, Order::Largest, false).unwrap().is_empty());
}

#[test]
fn nan_is_named_with_its_first_position() {
    fn of<T: Element>(nan: T) {
        let mut parts = [("a", vec![T::from_f32(1.0); 7]), ("b", vec![T::from_f32(0.0); 200_000])];
        (parts[1].1[150_000], parts[1].1[70_001]) = (nan, nan);
        let parts: Vec<_> = parts.iter().map(|(n, x)| (*n, x.as_slice())).collect();
        for order in ORDERS {
            for absolute in [false, true] {
                let rows = topk_rows(2, "b", parts[1].1, 1000, 3, order, absolute).map(|_| ());
                for k in [0, 1, 1000, 200_007] {
                    let all = topk(2, &parts, k, order, absolute).map(|_| ());
                    let some = threshold(2, &parts, 0.5, order, absolute).map(|_| ());
                    for got in [&all, &some, &rows] {
                        let Err(Error::NotANumber { name, position }) = got else {
                            panic!("{got:?}");
                        };
                        assert_eq!((name.as_str(), *position), ("b", 70_001));
                    }
                }
            }
        }
    }
    of(f32::NAN);
    of(-f32::NAN);
    of(f16::NAN);
    of(bf16::from_bits(0xff81)); // negative, signalling
    assert!(threshold(1, &[("a", &[1.0f32][..])], f32::NAN, Order::Largest, false).is_err());
}

/// Values over several chunks: many, few and one level, with zeros of both signs.
fn grids(sizes: &[usize]) -> Vec<Vec<f32>> {
    let level = |i: usize, levels: usize| {
        let x = (i.wrapping_mul(2_654_435_761) >> 7) % levels;
        x as f32 / levels as f32 - 0.5
    };
    sizes
        .iter()
        .enumerate()
        .map(|(p, n)| (0..*n).map(|i| level(i, 7 + 5000 * p)).collect())
        .collect()
}

#[test]
fn bytes_and_groups_are_as_positions() {
    let parts = grids(&[3, 70_000, 65_536, 200_000]);
    for order in ORDERS {
        for (absolute, share) in [(true, 0), (true, 5), (false, 3), (true, 1)] {
            let ks: Vec<usize> = parts.iter().map(|x| x.len() * share / 5).collect();
            let each = topk_each(2, &named(&parts), &[1; 4], &ks, order, absolute).unwrap();
            for ((x, k), each) in parts.iter().zip(&ks).zip(each) {
                let want = topk(1, &[("w", &x[..])], *k, order, absolute).unwrap().remove(0);
                assert!(each == want);
                let mut bytes = vec![9; x.len()];
                topk_bytes(2, ("w", x), *k, order, absolute, &mut bytes).unwrap();
                let mut expected = vec![0; x.len()];
                plain(&want).into_iter().for_each(|i| expected[i] = 1);
                assert!(bytes == expected);
            }
        }
    }
    let names = named(&parts);
    let two = topk_each(2, &names, &[3, 1], &[90_000, 7], Order::Largest, true).unwrap();
    assert!(two[..3] == topk(1, &names[..3], 90_000, Order::Largest, true).unwrap());
    assert!(two[3..] == topk(1, &names[3..], 7, Order::Largest, true).unwrap());
    assert!(topk_each(1, &names, &[3, 2], &[1, 1], Order::Largest, true).is_err());
    assert!(topk_each(1, &names, &[1; 4], &[4, 1, 1, 1], Order::Largest, true).is_err());
    assert!(topk_bytes(1, names[0], 4, Order::Largest, true, &mut [0; 3]).is_err());
    assert!(topk_bytes(1, names[0], 1, Order::Largest, true, &mut [0; 2]).is_err());
}

#[test]
fn made_scores_are_as_filled_ones() {
    let (values, divisors) = (grids(&[70_000, 300_000]), grids(&[70_000, 300_000]));
    let pinned: Vec<Vec<i32>> = vec![(0..70_000).step_by(97).collect(), vec![65_535, 65_536]];
    for (over, pin) in [(true, f32::INFINITY), (false, f32::NEG_INFINITY), (true, -f32::INFINITY)] {
        let mut filled = Vec::new();
        let mut made = Vec::new();
        for ((x, d), pinned) in values.iter().zip(&divisors).zip(&pinned) {
            let ratio =
                |(x, d): (&f32, &f32)| if over { x.abs() / (d.abs() + 0.25) } else { x.abs() };
            let mut scores: Vec<f32> = x.iter().zip(d).map(ratio).collect();
            pinned.iter().for_each(|p| scores[*p as usize] = pin);
            filled.push(scores);
            let d = over.then_some((&d[..], 0.25));
            made.push(Made::new("w", x.len(), d, pinned, pin).unwrap());
        }
        for k in [0, 1, 900, 30_000, 369_500, 370_000] {
            for order in ORDERS {
                let want = topk(1, &named(&filled), k, order, false).unwrap();
                assert!(topk_made(2, &named(&values), &made, k, order).unwrap() == want, "{k}");
            }
        }
    }
}

#[test]
fn made_scores_are_checked() {
    let (x, short, all) = ([1.0f32, f32::NAN, 0.0], [1.0f32, 2.0], [0.0f32; 3]);
    assert!(Made::new("w", 3, Some((&short[..], 0.0)), &[], 0.0).is_err());
    assert!(Made::<f32>::new("w", 3, None, &[3], 0.0).is_err());
    assert!(Made::<f32>::new("w", 3, None, &[1, 1], 0.0).is_err());
    let made = |pinned| Made::new("w", 3, Some((&all[..], 0.0)), pinned, 1.0).unwrap();
    let best = |pinned| topk_made(1, &[("w", &x[..])], &[made(pinned)], 1, Order::Largest);
    assert!(matches!(best(&[]), Err(Error::NotANumber { position: 1, .. })));
    assert!(matches!(best(&[1]), Err(Error::NotANumber { position: 2, .. }))); // 0 / 0
    assert_eq!(plain(&best(&[1, 2]).unwrap()[0]), [0]);
    assert!(topk_made(1, &[("w", &x[..])], &[], 1, Order::Largest).is_err());
}

#[test]
fn finite_sees_every_element() {
    let mut x = vec![f32::MAX; 70_001];
    assert!(finite(2, &[&x[..], &[], &[-0.0]]));
    for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
        for at in [0, 63, 65_535, 65_536, 70_000] {
            x[at] = bad;
            assert!(!finite(2, &[&[1.0], &x[..]]), "{at}");
            x[at] = 0.0;
        }
    }
    assert!(!finite(1, &[&[f16::INFINITY][..]]) && finite(1, &[&[f16::MAX][..]]));
    assert!(!finite(1, &[&[bf16::NAN][..]]));
}

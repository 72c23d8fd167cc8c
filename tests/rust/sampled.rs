use half::{bf16, f16};
use proptest::prelude::*;
use retouch::Error;
use retouch::kernel::sampled::{Product, Sample, selected_entries};
use retouch::num::Position;

/// Numbers between -1 and 1 without structure.
fn numbers<T: Sample>(n: usize, seed: u32) -> Vec<T> {
    let mix = |i: u32| (i ^ i >> 15).wrapping_mul(0x2c1b_3c6d);
    let one = |i| mix(mix(i + seed * 0x0100_0193)) as f32 / u32::MAX as f32 * 2.0 - 1.0;
    (0..n as u32).map(|i| T::from_f32(one(i))).collect()
}

struct Case<T> {
    dy: Vec<T>,
    x: Vec<T>,
    tokens: usize,
    n_out: usize,
    n_in: usize,
}

impl<T: Sample> Case<T> {
    fn new(tokens: usize, n_out: usize, n_in: usize) -> Self {
        let (dy, x) = (numbers(tokens * n_out, 1), numbers(tokens * n_in, 2));
        Case { dy, x, tokens, n_out, n_in }
    }

    fn product(&self) -> Product<'_, T> {
        let Case { dy, x, tokens, n_out, n_in } = self;
        Product { dy, x, tokens: *tokens, n_out: *n_out, n_in: *n_in }
    }

    fn run<P: Position>(&self, threads: usize, index: &[P]) -> Vec<f32> {
        let mut out = vec![f32::NAN; index.len()];
        selected_entries(threads, "w", &self.product(), index, &mut out, false).unwrap();
        out
    }

    fn pairs(&self, at: usize) -> impl Iterator<Item = (f32, f32)> {
        let (o, i) = (at / self.n_in, at % self.n_in);
        let pair = move |t: usize| {
            (self.dy[t * self.n_out + o].to_f32(), self.x[t * self.n_in + i].to_f32())
        };
        (0..self.tokens).map(pair)
    }

    /// Within 1e-6 of the sum in f64, relative to the sum of magnitudes.
    fn check<P: Position>(&self, index: &[P], out: &[f32]) {
        for (p, got) in index.iter().zip(out) {
            let exact = self.pairs(p.at()).map(|(a, b)| f64::from(a) * f64::from(b));
            let (sum, size) = exact.fold((0.0, 0.0), |(s, m), x| (s + x, m + x.abs()));
            assert!((f64::from(*got) - sum).abs() <= 1e-6 * size, "{got} {sum} {size}");
        }
    }

    /// The sum in the order that the module promises.
    fn in_order(&self, at: usize) -> f32 {
        let all: Vec<(f32, f32)> = self.pairs(at).collect();
        let per_lane = T::TOKENS / 16;
        all.chunks(16 * T::TOKENS).fold(0.0, |sum, tile| {
            let mut lanes = [0.0f32; 16];
            for line in tile.chunks(T::TOKENS) {
                for (lane, pairs) in lanes.iter_mut().zip(line.chunks(per_lane)) {
                    for (a, b) in pairs.iter().rev() {
                        *lane = a.mul_add(*b, *lane);
                    }
                }
            }
            for half in [8, 4, 2, 1] {
                (0..half).for_each(|l| lanes[l] += lanes[l + half]);
            }
            sum + lanes[0]
        })
    }
}

/// Every `step`-th position, and the last.
fn every<P: Position>(n: usize, step: usize) -> Vec<P> {
    (0..n).filter(|i| i % step == 0 || i + 1 == n).map(P::new).collect()
}

fn all_sizes<T: Sample>() {
    for tokens in [0, 1, 2, 15, 16, 17, 31, 33, 255, 257, 513, 1030] {
        let shapes =
            [(1, 1, 1), (16, 16, 3), (7, 40, 1), (33, 17, 5), (130, 131, 97), (3, 1100, 2)];
        for (n_out, n_in, step) in shapes {
            let case = Case::<T>::new(tokens, n_out, n_in);
            let index: Vec<i32> = every(n_out * n_in, step);
            let out = case.run(1, &index);
            case.check(&index, &out);
        }
    }
}

#[test]
fn entries_are_those_of_the_product() {
    all_sizes::<f32>();
    all_sizes::<bf16>();
    all_sizes::<f16>();
}

fn ordered<T: Sample>() {
    let case = Case::<T>::new(1201, 5, 37);
    let index: Vec<i64> = every(5 * 37, 2);
    let want: Vec<u32> = index.iter().map(|p| case.in_order(p.at()).to_bits()).collect();
    let got: Vec<u32> = case.run(1, &index).iter().map(|x| x.to_bits()).collect();
    assert_eq!(got, want);
}

#[test]
fn the_order_of_a_sum_is_the_promised_one() {
    ordered::<f32>();
    ordered::<bf16>();
    ordered::<f16>();
}

fn threads<T: Sample>(tokens: usize, n_out: usize, n_in: usize, step: usize) {
    let case = Case::<T>::new(tokens, n_out, n_in);
    let index: Vec<i32> = every(n_out * n_in, step);
    let bits = |threads, index: &[i32]| -> Vec<u32> {
        case.run(threads, index).iter().map(|x| x.to_bits()).collect()
    };
    let one = bits(1, &index);
    assert!(one == bits(1, &index) && one == bits(2, &index) && one == bits(3, &index));
    // Nor do the neighbours of an entry matter.
    let few: Vec<i32> = index.iter().copied().step_by(5).collect();
    let some: Vec<u32> = one.iter().copied().step_by(5).collect();
    assert!(some == bits(2, &few));
}

#[test]
fn bits_do_not_depend_on_threads() {
    threads::<f32>(700, 300, 257, 7);
    threads::<bf16>(700, 300, 257, 7);
    threads::<f16>(300, 65, 1000, 3);
    threads::<f32>(600, 4, 9001, 11); // more than one panel
    threads::<f32>(2000, 3, 2100, 1); // more than one panel of several tiles
}

#[test]
fn a_transposed_weight_swaps_the_roles() {
    let case = Case::<f32>::new(300, 20, 50);
    let plain: Vec<i32> = every(20 * 50, 1);
    let want = case.run(1, &plain);
    let swapped =
        Product { dy: &case.x, x: &case.dy, tokens: 300, n_out: case.n_in, n_in: case.n_out };
    let mut got = vec![0.0; 20 * 50];
    selected_entries(1, "w", &swapped, &plain, &mut got, false).unwrap();
    for o in 0..20 {
        for i in 0..50 {
            assert_eq!(want[o * 50 + i], got[i * 20 + o]);
        }
    }
}

#[test]
fn nothing_selected_and_nothing_to_sum() {
    let case = Case::<f32>::new(9, 3, 4);
    assert!(case.run::<i32>(2, &[]).is_empty());
    let empty = Case::<bf16>::new(0, 3, 4);
    assert_eq!(empty.run(2, &[0i64, 11]), [0.0, 0.0]);
    let mut out = [1.5, 2.5];
    selected_entries(2, "w", &empty.product(), &[0i32, 11], &mut out, true).unwrap();
    assert_eq!(out, [1.5, 2.5]);
    let flat = Case::<f32>::new(5, 0, 4);
    assert!(flat.run::<i32>(1, &[]).is_empty());
}

#[test]
fn accumulates() {
    let case = Case::<bf16>::new(700, 6, 30);
    let index: Vec<i32> = every(180, 1);
    let once = case.run(1, &index);
    let mut twice = once.clone();
    selected_entries(1, "w", &case.product(), &index, &mut twice, true).unwrap();
    for (a, b) in once.iter().zip(&twice) {
        assert!((2.0 * a - b).abs() <= 1e-4, "{a} {b}");
    }
}

#[test]
fn what_is_not_selected_does_not_matter() {
    let mut case = Case::<f32>::new(100, 70, 70);
    let index: Vec<i32> = vec![2 * 70 + 3, 2 * 70 + 5, 66 * 70 + 69];
    let want = case.run(1, &index);
    for (i, x) in case.x.iter_mut().enumerate() {
        *x = if [3, 5, 69].contains(&(i % 70)) { *x } else { f32::NAN };
    }
    for (i, y) in case.dy.iter_mut().enumerate() {
        *y = if [2, 66].contains(&(i % 70)) { *y } else { f32::INFINITY };
    }
    assert_eq!(case.run(1, &index), want);
}

#[test]
fn infinities_and_nan_arrive() {
    let mut case = Case::<bf16>::new(40, 4, 4);
    case.x[4 * 7 + 1] = bf16::INFINITY;
    case.dy[4 * 7] = bf16::ONE;
    case.dy[4 * 7 + 1] = bf16::ZERO;
    let out = case.run(1, &[0i32, 1, 4, 5]);
    assert!(out[0].is_finite() && out[1] == f32::INFINITY && out[2].is_finite() && out[3].is_nan());
}

#[test]
fn bad_arguments_are_refused_before_anything_is_written() {
    let case = Case::<f32>::new(3, 2, 2);
    let bad: [&[i32]; 5] = [&[0, 0], &[2, 1], &[0, 4], &[-1, 2], &[i32::MIN]];
    for index in bad {
        let mut out = vec![9.0; index.len()];
        let e = selected_entries(1, "w", &case.product(), index, &mut out, false);
        assert!(matches!(&e, Err(Error::Index { name, .. }) if name == "w"), "{index:?}: {e:?}");
        assert!(out.iter().all(|x| *x == 9.0));
    }
    let mut out = [9.0];
    let refused = |product: Product<'_, f32>, out: &mut [f32]| {
        let e = selected_entries(1, "w", &product, &[1i32], out, false);
        matches!(e, Err(Error::Length { .. }))
    };
    assert!(refused(case.product(), &mut [9.0, 9.0]));
    assert!(refused(Product { dy: &case.dy[1..], ..case.product() }, &mut out));
    assert!(refused(Product { x: &case.x[1..], ..case.product() }, &mut out));
    assert!(refused(Product { n_out: usize::MAX, ..case.product() }, &mut out));
    assert!(refused(Product { tokens: usize::MAX, ..case.product() }, &mut out));
    assert_eq!(out, [9.0]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_shape(
        tokens in 0usize..600,
        n_out in 1usize..80,
        n_in in 1usize..80,
        density in 0.0f64..1.0,
        seed in any::<u64>(),
    ) {
        let mut state = seed | 1;
        let mut chance = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1u64 << 53) as f64
        };
        let index: Vec<i32> =
            (0..(n_out * n_in) as i32).filter(|_| chance() < density * density).collect();
        let case = Case::<f32>::new(tokens, n_out, n_in);
        case.check(&index, &case.run(2, &index));
        let case = Case::<bf16>::new(tokens, n_out, n_in);
        case.check(&index, &case.run(3, &index));
    }
}

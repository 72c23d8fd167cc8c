use proptest::prelude::*;
use retouch::Error;
use retouch::kernel::outer::{Samples, accumulate_outer};
use retouch::kernel::reduce::Map;

const MAPS: [Map; 3] = [Map::Id, Map::Abs, Map::Square];

/// Numbers between -1 and 1 without structure.
fn numbers(n: usize, seed: u32) -> Vec<f32> {
    let mix = |i: u32| (i ^ i >> 15).wrapping_mul(0x2c1b_3c6d);
    (0..n as u32)
        .map(|i| mix(mix(i + seed * 0x0100_0193)) as f32 / u32::MAX as f32 * 2.0 - 1.0)
        .collect()
}

struct Case {
    left: Vec<f32>,
    right: Vec<f32>,
    score: Vec<f32>,
    samples: usize,
    tokens: usize,
    rows: usize,
    columns: usize,
}

impl Case {
    fn new(samples: usize, tokens: usize, rows: usize, columns: usize) -> Self {
        let (left, right) =
            (numbers(samples * tokens * rows, 1), numbers(samples * tokens * columns, 2));
        let score = numbers(rows * columns, 3);
        Case { left, right, score, samples, tokens, rows, columns }
    }

    fn factors(&self) -> Samples<'_> {
        let &Case { ref left, ref right, samples, tokens, rows, columns, .. } = self;
        Samples { left, right, samples, tokens, rows, columns }
    }

    fn run(&self, threads: usize, map: Map) -> Vec<f32> {
        let mut score = self.score.clone();
        accumulate_outer(threads, &mut score, &self.factors(), map).unwrap();
        score
    }

    /// The factors of an element of the product of a sample.
    fn pairs(&self, sample: usize, row: usize, column: usize) -> impl Iterator<Item = (f32, f32)> {
        (sample * self.tokens..(sample + 1) * self.tokens)
            .map(move |t| (self.left[t * self.rows + row], self.right[t * self.columns + column]))
    }

    /// In f32 and in the order that the module promises, and in f64 with the sum of magnitudes.
    fn naive(&self, map: Map) -> Vec<(f32, f64, f64)> {
        let one = |i: usize| {
            let (row, column) = (i / self.columns, i % self.columns);
            let mut score = self.score[i];
            let (mut exact, mut size) = (f64::from(score), f64::from(score.abs()));
            for sample in 0..self.samples {
                let (mut x, mut wide, mut large) = (0.0f32, 0.0f64, 0.0f64);
                for (a, b) in self.pairs(sample, row, column) {
                    x = a.mul_add(b, x);
                    wide += f64::from(a) * f64::from(b);
                    large += (f64::from(a) * f64::from(b)).abs();
                }
                (score, wide, large) = match map {
                    Map::Id => (score + x, wide, large),
                    Map::Abs => (score + x.abs(), wide.abs(), large),
                    Map::Square => (x.mul_add(x, score), wide * wide, large * large),
                };
                exact += wide;
                size += large;
            }
            (score, exact, size)
        };
        (0..self.score.len()).map(one).collect()
    }

    fn check(&self, threads: usize) {
        for map in MAPS {
            for (got, (want, exact, size)) in self.run(threads, map).iter().zip(self.naive(map)) {
                assert!(got.to_bits() == want.to_bits(), "{map:?}: {got} {want}");
                assert!((f64::from(*got) - exact).abs() <= 1e-5 * size, "{map:?}: {got} {exact}");
            }
        }
    }
}

#[test]
fn sums_are_those_of_the_promised_order() {
    for tokens in [0, 1, 2, 7, 16, 33] {
        let shapes = [(1, 1), (6, 32), (7, 33), (5, 31), (1, 100), (100, 1), (50, 16), (13, 47)];
        for (rows, columns) in shapes {
            for samples in [0, 1, 2, 5] {
                Case::new(samples, tokens, rows, columns).check(1);
            }
        }
    }
}

#[test]
fn batches_and_samples_of_more_tokens_than_are_packed_together() {
    Case::new(40, 17, 9, 40).check(2);
    Case::new(3, 700, 8, 35).check(2);
    Case::new(2, 513, 100, 3).check(2);
}

#[test]
fn bits_do_not_depend_on_threads_nor_on_how_a_batch_is_cut() {
    let case = Case::new(9, 20, 301, 70);
    let one = case.run(1, Map::Square);
    for threads in [2, 3, 7] {
        assert!(one == case.run(threads, Map::Square));
    }
    let mut score = case.score.clone();
    let parts = case.left.chunks(4 * 20 * 301).zip(case.right.chunks(4 * 20 * 70));
    for (samples, (left, right)) in [4, 4, 1].into_iter().zip(parts) {
        let part = Samples { left, right, samples, ..case.factors() };
        accumulate_outer(2, &mut score, &part, Map::Square).unwrap();
    }
    assert!(one == score);
}

#[test]
fn infinities_and_nan_stay_in_their_row_or_column() {
    let mut case = Case::new(3, 4, 8, 40);
    case.left[(4 + 2) * 8 + 7] = f32::INFINITY; // second sample, third token
    case.right[(2 * 4) * 40 + 33] = f32::NAN;
    let score = case.run(2, Map::Square);
    for (i, x) in score.iter().enumerate() {
        let (row, column) = (i / 40, i % 40);
        assert_eq!(x.is_nan(), column == 33, "{row} {column}");
        assert_eq!(x.is_infinite(), column != 33 && row == 7, "{row} {column}");
    }
}

#[test]
fn wrong_lengths_are_refused_before_anything_is_written() {
    let case = Case::new(2, 3, 4, 5);
    let refused = |factors: Samples<'_>, score: &mut [f32], buffer: &str| {
        let e = accumulate_outer(1, score, &factors, Map::Abs);
        assert!(matches!(&e, Err(Error::Length { name, .. }) if name == buffer), "{e:?}");
    };
    let mut score = case.score.clone();
    let f = case.factors();
    refused(Samples { left: &f.left[1..], ..f }, &mut score, "left");
    refused(Samples { right: &f.right[1..], ..f }, &mut score, "right");
    refused(f, &mut score[1..], "score");
    refused(Samples { samples: 3, ..f }, &mut score, "left");
    refused(Samples { tokens: usize::MAX, ..f }, &mut score, "left");
    refused(Samples { rows: usize::MAX, columns: 5, ..f }, &mut score, "left");
    refused(Samples { columns: 6, ..f }, &mut score, "right");
    let empty =
        Samples { left: &[], right: &[], samples: 0, tokens: 3, rows: usize::MAX, columns: 2 };
    refused(empty, &mut score, "score");
    assert!(score == case.score);
}

#[test]
fn empty_sides() {
    Case::new(2, 3, 0, 5).check(2);
    Case::new(2, 3, 5, 0).check(2);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_shape(
        samples in 0usize..6,
        tokens in 0usize..40,
        rows in 1usize..130,
        columns in 1usize..70,
        threads in 1usize..4,
    ) {
        Case::new(samples, tokens, rows, columns).check(threads);
    }
}

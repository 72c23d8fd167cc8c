//! Streams combined in one pass: exact cuts, the same bits for any threads and any stretch.
use half::bf16;
use proptest::prelude::*;
use retouch::Error;
use retouch::kernel::blend::*;
use retouch::view::{View, ViewMut};

const NAMES: (&str, &[&str]) = ("w", &["a", "b", "c"]);
const PLAIN: Finish = Finish { divide: 1.0, lambda: 1.0, onto_base: true, own: None };

fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut out = vec![0.0; n];
    retouch::kernel::rng::uniform(1, seed, 1, &mut out);
    out.iter_mut().for_each(|x| *x = *x * 2.0 - 1.0);
    out
}

fn half(x: &[f32]) -> Vec<bf16> {
    x.iter().map(|x| bf16::from_f32(*x)).collect()
}

fn streams<'a>(base: &'a [bf16], models: &'a [Vec<bf16>]) -> Streams<'a> {
    let streams = models.iter().map(|m| Stream::new(View::BF16(m))).collect();
    Streams { base: Some(View::BF16(base)), streams, start: 0 }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn a_cut_parts_exactly_k(
        n in 1usize..150_000, share in 0.0..=1.0f64, step in 1u32..40, seed in 0u64..9,
        room in proptest::option::of(0usize..20_000),
    ) {
        // few distinct magnitudes: most of them tie
        let x: Vec<f32> =
            numbers(n, seed).iter().map(|x| (x * step as f32).round() / step as f32).collect();
        let k = (n as f64 * share) as usize;
        let field = Streams { base: None, streams: vec![Stream::new(View::F32(&x))], start: 0 };
        let ask = |from_end| cuts(2, NAMES, &field, &[Request { stream: 0, k, from_end }], room).unwrap()[0];
        let (cut, above) = ask(false);
        let kept: Vec<usize> = (0..n)
            .filter(|&i| x[i].abs() > cut.bound || (x[i].abs() == cut.bound && i as i64 <= cut.last))
            .collect();
        prop_assert_eq!(kept.len(), k);
        prop_assert_eq!(above, x.iter().filter(|x| x.abs() > cut.bound).count());
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&a, &b| x[b].abs().total_cmp(&x[a].abs()).then(a.cmp(&b)));
        order.truncate(k);
        order.sort_unstable();
        prop_assert_eq!(kept, order);
        let (cut, _) = ask(true);
        let dropped = (0..n)
            .filter(|&i| x[i].abs() > cut.bound || (x[i].abs() == cut.bound && i as i64 > cut.last));
        prop_assert_eq!(dropped.count(), k);
    }
}

#[test]
fn threads_and_stretches_change_no_bit() {
    let n = 200_003;
    let base = half(&numbers(n, 1));
    let models: Vec<_> = (2..5).map(|s| half(&numbers(n, s))).collect();
    let run = |threads, from: usize, to: usize| {
        let parts: Vec<Vec<bf16>> = models.iter().map(|m| m[from..to].to_vec()).collect();
        let mut field = streams(&base[from..to], &parts);
        field.start = from;
        for (t, stream) in field.streams.iter_mut().enumerate() {
            stream.low = Some(Cut { bound: 0.5, last: 70_000 });
            stream.chance = Some(Chance { seed: 3, stream: t as u64, share: 0.5 });
            stream.weight = 0.3;
        }
        let elect = Rule::Elect { vote: Vote::Weighted, zero: 1.0, take: Take::WeightedMean };
        let mut out = vec![bf16::ZERO; to - from];
        blend(threads, NAMES, &field, &elect, &PLAIN, ViewMut::BF16(&mut out)).unwrap();
        out
    };
    let whole = run(1, 0, n);
    assert!(whole == run(2, 0, n) && whole == run(5, 0, n));
    let cut = [run(1, 0, 1003), run(2, 1003, 150_001), run(1, 150_001, n)].concat();
    assert!(whole == cut);
    let field = streams(&base, &models);
    assert_eq!(gram(1, NAMES, &field).unwrap(), gram(3, NAMES, &field).unwrap());
    assert_eq!(sums(1, NAMES, &field).unwrap(), sums(3, NAMES, &field).unwrap());
}

#[test]
fn histograms_find_the_kth_value() {
    let x = numbers(100_000, 7);
    let field = Streams { base: None, streams: vec![Stream::new(View::F32(&x))], start: 0 };
    for signed in [false, true] {
        let mut order: Vec<f32> = x.iter().map(|x| if signed { *x } else { x.abs() }).collect();
        order.sort_by(|a, b| b.total_cmp(a));
        let find = |bins: &[i64], mut k: i64| {
            for (i, n) in bins.iter().enumerate().rev() {
                if k <= *n {
                    return (i as u32, k);
                }
                k -= n;
            }
            unreachable!()
        };
        for k in [1, 777, 100_000] {
            let (mut high, mut low) = (vec![0; 1 << 16], vec![0; 1 << 16]);
            count_keys(2, NAMES, &field, None, signed, &mut high).unwrap();
            let (upper, rest) = find(&high, k);
            count_keys(2, NAMES, &field, Some(upper), signed, &mut low).unwrap();
            let key = upper << 16 | find(&low, rest).0;
            assert_eq!(value_of(key, signed), order[k as usize - 1]);
        }
    }
}

#[test]
fn what_is_wrong_is_refused() {
    let (x, mut out) = (vec![1.0; 8], vec![0.0; 7]);
    let field = Streams { base: None, streams: vec![Stream::new(View::F32(&x))], start: 5 };
    let short = blend(1, NAMES, &field, &Rule::Sum, &PLAIN, ViewMut::F32(&mut out));
    assert!(matches!(short, Err(Error::Length { .. })));
    let own = Finish { own: Some(0), ..PLAIN };
    let mut out = vec![0.0; 8];
    assert!(blend(1, NAMES, &field, &Rule::Sum, &own, ViewMut::F32(&mut out)).is_err());
    let many = [Request { stream: 0, k: 9, from_end: false }];
    assert!(matches!(cuts(1, NAMES, &field, &many, None), Err(Error::Budget { .. })));
    assert!(band(1, NAMES, &field, 3, Band { top: 0, keep: 1 }, &mut out).is_err());
    let nan = [1.0, f32::NAN];
    let field = Streams { base: None, streams: vec![Stream::new(View::F32(&nan))], start: 5 };
    let mut out = vec![0.0; 2];
    let error = blend(1, NAMES, &field, &Rule::Sum, &PLAIN, ViewMut::F32(&mut out)).unwrap_err();
    assert!(error.to_string().contains("w of a is NaN at flat position 6"));
}

//! Streams combined in one pass: exact cuts, the same bits for any threads and any stretch.
use half::bf16;
use proptest::prelude::*;
use retouch::Error;
use retouch::kernel::blend::*;
use retouch::kernel::rng::philox;
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
    let bits: [Vec<u8>; 3] = std::array::from_fn(|t| {
        let mut bits = vec![0; n.div_ceil(64) * 8];
        retouch::kernel::rng::draw(2, 3, t as u64, 0.5, &mut bits);
        bits
    });
    let run = |threads, from: usize, to: usize, drawn: bool| {
        let parts: Vec<Vec<bf16>> = models.iter().map(|m| m[from..to].to_vec()).collect();
        let mut field = streams(&base[from..to], &parts);
        field.start = from;
        for (t, stream) in field.streams.iter_mut().enumerate() {
            stream.low = Some(Cut { bound: 0.5, last: 70_000 });
            if drawn {
                stream.drawn = Some(&bits[t]);
            } else {
                stream.chance = Some(Chance { seed: 3, stream: t as u64, share: 0.5 });
            }
            stream.scale = 1.5;
            stream.weight = 0.3;
        }
        let elect = Rule::Elect { vote: Vote::Weighted, zero: 1.0, take: Take::WeightedMean };
        let mut out = vec![bf16::ZERO; to - from];
        blend(threads, NAMES, &field, &elect, &PLAIN, ViewMut::BF16(&mut out)).unwrap();
        out
    };
    let whole = run(1, 0, n, false);
    assert!(whole == run(2, 0, n, false) && whole == run(5, 0, n, false));
    for drawn in [false, true] {
        let [a, b] = [1003, 150_001];
        let cut = [run(1, 0, a, drawn), run(2, a, b, drawn), run(1, b, n, drawn)].concat();
        assert!(whole == cut);
    }
    let field = streams(&base, &models);
    assert_eq!(gram(1, NAMES, &field).unwrap(), gram(3, NAMES, &field).unwrap());
    assert_eq!(sums(1, NAMES, &field).unwrap(), sums(3, NAMES, &field).unwrap());
}

/// One position, as the rules say it.
fn elected(x: &[f32], w: &[f32], (vote, zero, take): (Vote, f32, Take)) -> f32 {
    let side = |t: usize| if vote == Vote::Weighted { w[t] } else { 1.0 };
    let votes = (0..x.len()).fold(0.0_f32, |sum, t| match vote {
        Vote::Count => sum + if x[t] == 0.0 { 0.0 } else { x[t].signum() },
        _ => x[t].mul_add(side(t), sum),
    });
    let sign = if votes == 0.0 { zero } else { votes.signum() };
    if take == Take::Largest {
        let agree = x.iter().filter(|x| **x * sign > 0.0);
        return sign * agree.fold(0.0, |top, x| x.abs().max(top));
    }
    let side = |t: usize| if vote == Vote::Weighted { w[t] } else { 1.0 };
    let agree: Vec<usize> = (0..x.len()).filter(|&t| x[t] * side(t) * sign > 0.0).collect();
    let sum = agree.iter().fold(0.0_f32, |sum, &t| x[t].mul_add(w[t], sum));
    let share = match take {
        Take::Sum => 1.0,
        Take::Mean => agree.len() as f32,
        _ => agree.iter().fold(0.0, |sum, &t| sum + w[t]),
    };
    if share == 0.0 { sum } else { sum / share }
}

#[test]
fn elections_of_any_number_of_streams() {
    let n = 2 * 2048 + 77; // tiles, and a tail that no vector divides
    for models in 1..=9 {
        // few values: votes are even here and there
        let of = |seed| numbers(n, seed).iter().map(|x| (x * 3.0).round() / 4.0).collect();
        let values: Vec<Vec<f32>> = (0..models).map(of).collect();
        let weights: Vec<f32> = (0..models).map(|t| [0.5, 0.25, -0.5][t as usize % 3]).collect();
        let mut streams: Vec<_> = values.iter().map(|x| Stream::new(View::F32(x))).collect();
        streams.iter_mut().zip(&weights).for_each(|(stream, w)| stream.weight = *w);
        let field = Streams { base: None, streams, start: 0 };
        for vote in [Vote::Weighted, Vote::Mass, Vote::Count] {
            for take in [Take::Sum, Take::Mean, Take::WeightedMean, Take::Largest] {
                for zero in [1.0, 0.0] {
                    let (mut out, rule) = (vec![9.0; n], Rule::Elect { vote, zero, take });
                    let finish = Finish { onto_base: false, ..PLAIN };
                    let names = ("w", &["a"; 9] as &[&str]);
                    blend(2, names, &field, &rule, &finish, ViewMut::F32(&mut out)).unwrap();
                    for (i, got) in out.iter().enumerate() {
                        let x: Vec<f32> = values.iter().map(|v| v[i]).collect();
                        let want = elected(&x, &weights, (vote, zero, take));
                        assert_eq!(*got, want, "{models} {vote:?} {take:?} {zero} at {i}: {x:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn choices_of_far_positions_are_those_of_the_counter() {
    // beyond 2^34 a block's number has a second word
    let (start, share, x) = ((1_usize << 36) + 5, 0.3, [1.0; 500]);
    let mut stream = Stream::new(View::F32(&x));
    stream.chance = Some(Chance { seed: 3, stream: 9, share });
    let (field, mut out) = (Streams { base: None, streams: vec![stream], start }, vec![9.0; 500]);
    let finish = Finish { onto_base: false, ..PLAIN };
    blend(1, NAMES, &field, &Rule::Sum, &finish, ViewMut::F32(&mut out)).unwrap();
    for (i, got) in out.iter().enumerate() {
        let (block, word) = (((start + i) / 4) as u64, (start + i) % 4);
        let words = philox([block as u32, (block >> 32) as u32, 9, 0], [3, 0]);
        let kept = (words[word] >> 8) as f32 / 16_777_216.0 < share;
        assert_eq!(*got, f32::from(u8::from(kept)), "{i}");
    }
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
    let bits = [0; 8]; // of 64 positions: the ninth word is missing where a stretch begins at 60
    let mut chosen = Stream::new(View::F32(&x));
    chosen.drawn = Some(&bits);
    for (start, fine) in [(56, true), (60, false)] {
        let field = Streams { base: None, streams: vec![chosen], start };
        let done = blend(1, NAMES, &field, &Rule::Sum, &PLAIN, ViewMut::F32(&mut out));
        assert_eq!(done.is_ok(), fine);
    }
    let many = [Request { stream: 0, k: 9, from_end: false }];
    assert!(matches!(cuts(1, NAMES, &field, &many, None), Err(Error::Budget { .. })));
    assert!(band(1, NAMES, &field, 3, Band { top: 0, keep: 1 }, &mut out).is_err());
    let nan = [1.0, f32::NAN];
    let field = Streams { base: None, streams: vec![Stream::new(View::F32(&nan))], start: 5 };
    let mut out = vec![0.0; 2];
    let error = blend(1, NAMES, &field, &Rule::Sum, &PLAIN, ViewMut::F32(&mut out)).unwrap_err();
    assert!(error.to_string().contains("w of a is NaN at flat position 6"));
}

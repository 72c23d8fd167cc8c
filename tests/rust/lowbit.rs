use proptest::prelude::*;
use retouch::Error;
use retouch::kernel::adamw::{self, AdamW, Clock, Closed, Gate};
use retouch::kernel::lowbit::{self, BLOCK, Codes};

const CFG: AdamW = AdamW {
    lr: 0.01,
    beta1: 0.9,
    beta2: 0.999,
    eps: 1e-8,
    weight_decay: 0.1,
    maximize: false,
    scale: 1.0,
};
type Nowhere<'a> = Option<(&'a str, &'a mut [f32], &'a [i32])>;
const NOWHERE: Nowhere<'static> = None;

/// Codes and scales of 8-bit numbers.
#[derive(Clone, PartialEq, Debug)]
struct Kept(Vec<u8>, Vec<f32>);

impl Kept {
    fn of(x: &[f32], signed: bool) -> Self {
        let mut kept = Kept(vec![77; x.len()], vec![7.0; x.len().div_ceil(BLOCK)]);
        lowbit::quantise(1, x, signed, kept.codes()).unwrap();
        kept
    }
    fn codes(&mut self) -> Codes<'_> {
        Codes { codes: &mut self.0, scale: &mut self.1 }
    }
    fn wide(&self, signed: bool) -> Vec<f32> {
        let mut out = vec![9.0; self.0.len()];
        lowbit::dequantise(1, &self.0, &self.1, signed, &mut out).unwrap();
        out
    }
}

/// By search over the midpoints of neighbours.
fn searched(share: f32, signed: bool) -> usize {
    let levels = lowbit::levels(signed);
    let below = |pair: &&[f32]| ((f64::from(pair[0]) + f64::from(pair[1])) / 2.0) as f32 >= share;
    levels.windows(2).position(|pair| below(&pair)).unwrap_or(255)
}

#[test]
fn the_table_finds_what_a_search_finds() {
    for signed in [false, true] {
        let levels = lowbit::levels(signed);
        assert!(levels.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!(levels[255], 1.0);
        let mut x = vec![0.0f32, -0.0, 1e-30, f32::MIN_POSITIVE, 1e-9, 1.0];
        for pair in levels.windows(2) {
            let middle = ((f64::from(pair[0]) + f64::from(pair[1])) / 2.0) as f32;
            for edge in [pair[0], middle, pair[1]] {
                x.extend([edge.next_down(), edge, edge.next_up()]);
            }
        }
        x.extend((0..100_000).map(|i| (i as f32 * 0.37).sin() * 0.5f32.powi(i % 25)));
        x.retain(|x| x.abs() <= 1.0 && (signed || *x >= 0.0));
        for part in x.chunks(BLOCK - 1) {
            let block: Vec<f32> = [1.0].into_iter().chain(part.iter().copied()).collect();
            let kept = Kept::of(&block, signed);
            assert_eq!(kept.1, [1.0]);
            for (x, code) in block.iter().zip(&kept.0) {
                let want = searched(*x, signed).max(usize::from(!signed && *x > 0.0));
                assert_eq!(usize::from(*code), want, "{x:e} {signed}");
            }
        }
    }
}

#[test]
fn blocks_do_not_see_each_other() {
    let mut x = vec![0.5f32; 3 * BLOCK + 7];
    (x[3], x[BLOCK], x[2 * BLOCK + 1]) = (f32::NAN, f32::INFINITY, 0.0);
    let kept = Kept::of(&x, true);
    let back = kept.wide(true);
    assert!(back[..BLOCK].iter().all(|x| x.is_nan()));
    assert!(!back[BLOCK].is_finite());
    assert_eq!((back[2 * BLOCK], back[2 * BLOCK + 1]), (0.5, 0.0));
    assert_eq!(back[3 * BLOCK..], [0.5; 7]);
    assert_eq!(Kept::of(&vec![0.0; 300], false).wide(false), vec![0.0; 300]);
    let mut tiny = vec![1.0f32; 300];
    tiny[1] = 1e-20;
    let back = Kept::of(&tiny, false).wide(false);
    assert!(back[1] > 0.0, "a second moment never becomes 0");
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn a_coded_step_is_a_wide_one_between_roundings(
        n in prop_oneof![Just(1usize), Just(BLOCK), Just(3 * BLOCK + 17), Just(70_001)],
        kind in 0..4, each: bool, threads in 1usize..4, seed in 0u32..1000,
    ) {
        let noise = |i: usize, k: f32| (((i as f32) + seed as f32) * k).sin();
        let value: Vec<f32> = (0..n).map(|i| noise(i, 0.7)).collect();
        let grad: Vec<f32> = (0..n).map(|i| noise(i, 1.3) * 0.1f32.powi((i % 9) as i32)).collect();
        let m: Vec<f32> = (0..n).map(|i| noise(i, 0.3) * 0.01).collect();
        let v: Vec<f32> = (0..n).map(|i| noise(i, 0.2).powi(2) * 1e-4).collect();
        let open: Vec<u8> = (0..n).map(|i| u8::from(i % 3 != 0)).collect();
        let gate: Option<Gate<'_>> = match kind {
            0 => None,
            1 => Some((&open, Closed::Updated { decay: true })),
            2 => Some((&open, Closed::Frozen)),
            _ => Some((&open, Closed::Reset)),
        };
        let ages: Vec<i32> = (0..n as i32).map(|i| i % 5).collect();
        let index: Vec<i32> = (0..n as i32).map(|i| 2 * i).collect();
        let (first, second) = (Kept::of(&m, true), Kept::of(&v, false));

        let (mut x, mut a, mut w) = (value.clone(), ages.clone(), vec![half::bf16::ONE; 2 * n]);
        let (mut m, mut v) = (first.wide(true), second.wide(false));
        let clock = if each { Clock::Each(&mut a) } else { Clock::Shared(3) };
        let to = Some(("w", &mut w[..], &index[..]));
        adamw::step(1, &CFG, clock, gate, &mut x, &grad, &mut m, &mut v, to).unwrap();

        let (mut y, mut b, mut u) = (value, ages, vec![half::bf16::ONE; 2 * n]);
        let (mut first, mut second) = (first, second);
        let clock = if each { Clock::Each(&mut b) } else { Clock::Shared(3) };
        let to = Some(("w", &mut u[..], &index[..]));
        let (c, d) = (first.codes(), second.codes());
        adamw::step_coded(threads, &CFG, clock, gate, &mut y, &grad, c, d, to).unwrap();

        prop_assert_eq!(bits(&x), bits(&y));
        prop_assert!(a == b && w == u);
        prop_assert!(first == Kept::of(&m, true) && second == Kept::of(&v, false));
    }
}

#[test]
fn threads_change_nothing() {
    let x: Vec<f32> = (0..100_003).map(|i| (i as f32 * 0.11).sin()).collect();
    let one = Kept::of(&x, true);
    for threads in [2, 3] {
        let mut many = Kept(vec![0; x.len()], vec![0.0; one.1.len()]);
        lowbit::quantise(threads, &x, true, many.codes()).unwrap();
        assert_eq!(one, many);
        let mut out = vec![0.0; x.len()];
        lowbit::dequantise(threads, &one.0, &one.1, true, &mut out).unwrap();
        assert_eq!(bits(&out), bits(&one.wide(true)));
    }
}

#[test]
fn wrong_lengths_are_refused_before_anything_is_written() {
    let x = [1.0f32; 300];
    let mut codes = Kept(vec![5; 300], vec![5.0; 1]);
    let e = lowbit::quantise(1, &x, true, codes.codes());
    assert!(matches!(e, Err(Error::Length { got: 1, want: 2, .. })));
    let e = lowbit::dequantise(1, &codes.0, &codes.1, true, &mut [0.0; 300]);
    assert!(matches!(e, Err(Error::Length { got: 1, want: 2, .. })));
    let e = lowbit::dequantise(1, &codes.0, &codes.1, true, &mut [0.0; 2]);
    assert!(matches!(e, Err(Error::Length { got: 300, want: 2, .. })));
    let (mut y, mut good) = (x, Kept(vec![5; 300], vec![5.0; 2]));
    let t = Clock::Shared(1);
    let (a, b) = (good.codes(), codes.codes());
    let e = adamw::step_coded(1, &CFG, t, None, &mut y, &x, a, b, NOWHERE);
    assert!(matches!(e, Err(Error::Length { got: 1, want: 2, .. })));
    assert_eq!((y, good, codes.0), (x, Kept(vec![5; 300], vec![5.0; 2]), vec![5; 300]));
}

use half::bf16;
use proptest::prelude::*;
use retouch::Error;
use retouch::kernel::adamw::{self, AdamW, Clock, Closed};
use retouch::kernel::lion::{self, Lion};
use retouch::kernel::sgd::{self, Sgd};

const ADAMW: AdamW = AdamW {
    lr: 0.1,
    beta1: 0.9,
    beta2: 0.999,
    eps: 1e-8,
    weight_decay: 0.01,
    maximize: false,
    scale: 1.0,
};
const SGD: Sgd = Sgd {
    lr: 0.1,
    momentum: 0.9,
    dampening: 0.0,
    weight_decay: 0.01,
    nesterov: false,
    maximize: false,
};
type Nowhere<'a> = Option<(&'a str, &'a mut [f32], &'a [i32])>;
const NOWHERE: Nowhere<'static> = None;

fn close(got: &[f32], want: &[f64], tolerance: f64) {
    for (g, w) in got.iter().zip(want) {
        assert!((f64::from(*g) - w).abs() <= tolerance, "{got:?} {want:?}");
    }
}

/// Values that torch.optim.AdamW gave.
#[test]
fn adamw_golden() {
    let mut x = [1.0f32, -2.0, 0.5];
    let (mut m, mut v) = ([0.0; 3], [0.0; 3]);
    let mut weight = [7.0f32; 6];
    let steps = [
        ([0.3, -4.0, 0.0], [0.899, -1.898, 0.4995]),
        ([-0.1, 1.0, 0.2], [0.858079, -1.849155, 0.424587]),
    ];
    for (t, (g, want)) in (1..).zip(steps) {
        let target = Some(("w", &mut weight[..], &[0i32, 3, 5][..]));
        adamw::step(1, &ADAMW, Clock::Shared(t), None, &mut x, &g, &mut m, &mut v, target).unwrap();
        close(&x, &want, 5e-7);
        assert_eq!(weight, [x[0], 7.0, 7.0, x[1], 7.0, x[2]]);
    }
    // Ascending is descending along the negated gradient.
    let (mut y, mut m, mut v) = ([1.0f32, -2.0, 0.5], [0.0; 3], [0.0; 3]);
    let up = AdamW { maximize: true, ..ADAMW };
    adamw::step(1, &up, Clock::Shared(1), None, &mut y, &[-0.3, 4.0, 0.0], &mut m, &mut v, NOWHERE)
        .unwrap();
    close(&y, &steps[0].1, 5e-7);
}

/// x' of the formula in f64, from the f32 state.
fn adamw_wide(c: &AdamW, t: u64, s: [f32; 4]) -> [f64; 3] {
    let [x, g, m, v] = s.map(f64::from);
    let g = if c.maximize { -g } else { g };
    let m = m + (1.0 - c.beta1) * (g - m);
    let v = c.beta2 * v + (1.0 - c.beta2) * g * g;
    let t = t as f64;
    let root = v.sqrt() / (1.0 - c.beta2.powf(t)).sqrt() + c.eps;
    let x = x * (1.0 - c.lr * c.weight_decay) - c.lr / (1.0 - c.beta1.powf(t)) * m / root;
    [x, m, v]
}

proptest! {
    #[test]
    fn adamw_is_its_formula(
        x in -4.0f32..4.0, g in -4.0f32..4.0, m in -1.0f32..1.0, v in 0.0f32..1.0,
        t in 1u64..2000, lr in 1e-5f64..1e-1, wd in 0.0f64..0.2,
        beta1 in prop_oneof![Just(0.0), Just(0.5), Just(0.9), 0.0f64..0.99],
        beta2 in prop_oneof![Just(0.95), Just(0.999), 0.5f64..0.999],
        maximize: bool,
    ) {
        let c = AdamW { lr, beta1, beta2, eps: 1e-8, weight_decay: wd, maximize, scale: 1.0 };
        let want = adamw_wide(&c, t, [x, g, m, v]);
        // Lengths around the widths of vectors: no element may see another path.
        let n = 37;
        let (mut xs, mut ms, mut vs) = (vec![x; n], vec![m; n], vec![v; n]);
        adamw::step(1, &c, Clock::Shared(t), None, &mut xs, &vec![g; n], &mut ms, &mut vs, NOWHERE).unwrap();
        for (got, want) in [(&xs, want[0]), (&ms, want[1]), (&vs, want[2])] {
            prop_assert!(got.iter().all(|y| y.to_bits() == got[0].to_bits()));
            let scale = f64::from(x.abs().max(m.abs()).max(g.abs())).max(want.abs());
            let error = (f64::from(got[0]) - want).abs();
            // The update itself is a few roundings of a number that m/√v may make large.
            let update = (f64::from(xs[0]) - f64::from(x)).abs();
            prop_assert!(error <= 4e-7 * (scale + update), "{} {want}", got[0]);
        }
    }

    #[test]
    fn sgd_is_its_formula(
        x in -4.0f32..4.0, g in -4.0f32..4.0, b in -1.0f32..1.0,
        lr in 1e-5f64..1.0, wd in prop_oneof![Just(0.0), 0.0f64..0.2],
        momentum in prop_oneof![Just(0.0), 0.0f64..0.99], dampening in 0.0f64..0.9,
        nesterov: bool, maximize: bool, first: bool, buffered: bool,
    ) {
        let c = Sgd { lr, momentum, dampening, weight_decay: wd, nesterov, maximize };
        let buffered = buffered || momentum != 0.0;
        let d = f64::from(if maximize { -g } else { g }) + wd * f64::from(x);
        let buf = if first { d } else { momentum * f64::from(b) + (1.0 - dampening) * d };
        let way = match (buffered, nesterov) {
            (false, _) => d,
            (true, false) => buf,
            (true, true) => d + momentum * buf,
        };
        let want = f64::from(x) - lr * way;
        let n = 37;
        let (mut xs, mut bs) = (vec![x; n], vec![b; n]);
        let buffer = buffered.then_some(&mut bs[..]);
        sgd::step(1, &c, first, &mut xs, &vec![g; n], buffer, NOWHERE).unwrap();
        prop_assert!(xs.iter().all(|y| y.to_bits() == xs[0].to_bits()));
        prop_assert!((f64::from(xs[0]) - want).abs() <= 4e-6, "{} {want}", xs[0]);
        prop_assert!(!buffered || (f64::from(bs[0]) - buf).abs() <= 4e-6);
    }
}

#[test]
fn a_gate_closes_some() {
    let open = [1u8, 0, 1];
    for closed in [Closed::Updated { decay: false }, Closed::Frozen, Closed::Reset] {
        let (mut x, mut m, mut v) = ([1.0f32, -2.0, 0.5], [0.5f32; 3], [0.25f32; 3]);
        let (mut y, mut a, mut b, mut ages) = (x, m, v, [4i32; 3]);
        let gate = Some((&open[..], closed));
        let (g, clock) = ([0.3, -4.0, 0.2], Clock::Each(&mut ages));
        adamw::step(1, &ADAMW, clock, gate, &mut x, &g, &mut m, &mut v, NOWHERE).unwrap();
        let all = Clock::Shared(5);
        adamw::step(1, &ADAMW, all, None, &mut y, &g, &mut a, &mut b, NOWHERE).unwrap();
        assert_eq!(bits(&x), bits(&[y[0], -2.0, y[2]]));
        let want = match closed {
            Closed::Updated { .. } => (a[1], b[1], 5),
            Closed::Frozen => (0.5, 0.25, 4),
            Closed::Reset => (0.0, 0.0, 0),
        };
        assert_eq!((m[1], v[1], ages[1]), want);
        assert_eq!((bits(&[m[0], v[2]]), ages[0]), (bits(&[a[0], b[2]]), 5));
    }
}

#[test]
fn lion_goes_against_the_sign() {
    let c = Lion { lr: 0.1, beta1: 0.9, beta2: 0.99, weight_decay: 0.5, maximize: false };
    let (mut x, mut m) = ([1.0f32, -2.0, 0.5, 4.0], [0.0f32, 1.0, -1.0, 0.0]);
    lion::step(1, &c, &mut x, &[0.3, -4.0, 2.0, 0.0], &mut m, NOWHERE).unwrap();
    // β1 m + (1 − β1) g = .03, .5, −.7, 0
    close(&x, &[0.85, -2.0, 0.575, 3.8], 1e-6);
    close(&m, &[0.003, 0.95, -0.97, 0.0], 1e-6);
    assert!(lion::step(1, &c, &mut x, &[1.0; 3], &mut m, NOWHERE).is_err());
}

fn many(n: usize) -> (Vec<f32>, Vec<f32>, Vec<i32>, Vec<bf16>) {
    let x = (0..n).map(|i| (i as f32).sin()).collect();
    let g = (0..n).map(|i| (i as f32 * 0.7).cos()).collect();
    let index = (0..n as i32).map(|i| i * 3 + i % 2).collect();
    (x, g, index, vec![bf16::from_f32(0.5); 3 * n])
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn threads_change_nothing_and_frozen_weights_keep_their_bits() {
    let run = |threads| {
        let (mut x, g, index, mut w) = many(100_003);
        let (mut m, mut v, mut b) = (vec![0.0; x.len()], vec![0.0; x.len()], vec![0.0; x.len()]);
        let mut ages: Vec<i32> = (0..x.len() as i32).map(|i| i % 7 * 100).collect();
        for t in 1..=3 {
            let to = Some(("w", &mut w[..], &index[..]));
            let clock = if t == 2 { Clock::Each(&mut ages) } else { Clock::Shared(t) };
            adamw::step(threads, &ADAMW, clock, None, &mut x, &g, &mut m, &mut v, to).unwrap();
            let to = Some(("w", &mut w[..], &index[..]));
            sgd::step(threads, &SGD, t == 1, &mut x, &g, Some(&mut b), to).unwrap();
        }
        let mut selected = vec![false; w.len()];
        for (p, x) in index.iter().zip(&x) {
            selected[*p as usize] = true;
            assert_eq!(w[*p as usize], bf16::from_f32(*x));
        }
        assert!(w.iter().zip(&selected).all(|(w, s)| *s || w.to_f32() == 0.5));
        assert!((0..).zip(&ages).all(|(i, age)| *age == i % 7 * 100 + 1));
        [bits(&x), bits(&m), bits(&v), bits(&b)]
    };
    let one = run(1);
    assert!(one == run(2) && one == run(3));
}

#[test]
fn bad_arguments_are_refused_before_anything_is_written() {
    let mut x = [1.0f32, 2.0];
    let (mut m, mut v) = ([0.0f32; 2], [0.0f32; 2]);
    let e =
        adamw::step(1, &ADAMW, Clock::Shared(0), None, &mut x, &[1.0; 2], &mut m, &mut v, NOWHERE);
    assert!(matches!(e, Err(Error::Value { .. })));
    let early = Clock::Each(&mut [0]);
    let e = adamw::step(1, &ADAMW, early, None, &mut x, &[1.0; 2], &mut m, &mut v, NOWHERE);
    assert!(matches!(e, Err(Error::Length { got: 1, want: 2, .. })));
    let gate = Some((&[1u8][..], Closed::Frozen));
    let t = Clock::Shared(1);
    let e = adamw::step(1, &ADAMW, t, gate, &mut x, &[1.0; 2], &mut m, &mut v, NOWHERE);
    assert!(matches!(e, Err(Error::Length { got: 1, want: 2, .. })));
    let mut ages = [3, i32::MAX];
    let late = Clock::Each(&mut ages);
    let e = adamw::step(1, &ADAMW, late, None, &mut x, &[1.0; 2], &mut m, &mut v, NOWHERE);
    assert!(matches!(e, Err(Error::Value { .. })));
    assert_eq!(ages, [3, i32::MAX]);
    let e =
        adamw::step(1, &ADAMW, Clock::Shared(1), None, &mut x, &[1.0; 3], &mut m, &mut v, NOWHERE);
    assert!(matches!(e, Err(Error::Length { got: 3, want: 2, .. })));
    let e = adamw::step(
        1,
        &ADAMW,
        Clock::Shared(1),
        None,
        &mut x,
        &[1.0; 2],
        &mut m[..1],
        &mut v,
        NOWHERE,
    );
    assert!(matches!(e, Err(Error::Length { got: 1, want: 2, .. })));
    for index in [&[1i32, 0][..], &[0, 9], &[0], &[-1, 0]] {
        let mut w = [5.0f32; 4];
        let to = Some(("w", &mut w[..], index));
        assert!(
            adamw::step(1, &ADAMW, Clock::Shared(1), None, &mut x, &[1.0; 2], &mut m, &mut v, to)
                .is_err()
        );
        let to = Some(("w", &mut w[..], index));
        assert!(sgd::step(1, &SGD, true, &mut x, &[1.0; 2], Some(&mut m), to).is_err());
        assert_eq!(w, [5.0; 4]);
    }
    // Momentum without a place for it.
    assert!(sgd::step(1, &SGD, true, &mut x, &[1.0; 2], None, NOWHERE).is_err());
    assert_eq!((x, m, v), ([1.0, 2.0], [0.0; 2], [0.0; 2]));
}

/// An infinite weight does not poison the gradient where there is no decay.
#[test]
fn no_decay_does_not_look_at_the_weight() {
    let c = Sgd { momentum: 0.9, weight_decay: 0.0, ..SGD };
    let (mut x, mut b) = ([f32::INFINITY], [0.0f32]);
    sgd::step(1, &c, true, &mut x, &[2.0], Some(&mut b), NOWHERE).unwrap();
    assert_eq!((x, b), ([f32::INFINITY], [2.0]));
}

//! AdamW with decoupled weight decay (Loshchilov & Hutter, 2019) on compact values:
//!
//! ```text
//! x ← x (1 − lr·wd)      m ← m + (1 − β1)(g − m)      v ← β2 v + (1 − β2) g²
//! x ← x − lr / (1 − β1ᵗ) · m / (√v / √(1 − β2ᵗ) + ε)
//! ```
//!
//! in the order and with the roundings of `torch.optim.AdamW` (single tensor) on a processor with
//! fused multiply-add. Only the square root may differ: it is correctly rounded here, torch's vector
//! library errs by up to one unit in the last place.
use super::chunk::{Divide, check_len, each};
use super::gather::{GRAIN, Target};
use super::wide::{Isa, Loop, wide};
use crate::error::{Error, Result};
use crate::num::{Element, Position};

/// Hyperparameters, as Python gives them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// learning rate
    pub lr: f64,
    /// decay of the mean of gradients
    pub beta1: f64,
    /// decay of the mean of squares
    pub beta2: f64,
    /// added to the denominator
    pub eps: f64,
    /// decoupled weight decay
    pub weight_decay: f64,
    /// ascend instead of descend
    pub maximize: bool,
}

/// What one step multiplies by: computed in f64 and rounded once, as torch does with Python floats.
#[derive(Clone, Copy)]
struct Factors {
    decay: f32,
    lerp: f32,
    beta2: f32,
    one_minus_beta2: f32,
    root_bias2: f32,
    eps: f32,
    minus_step: f32,
    sign: f32,
}

impl Factors {
    fn new(cfg: &AdamW, t: u64) -> Self {
        let t = t as f64;
        let (bias1, bias2) = (1.0 - cfg.beta1.powf(t), 1.0 - cfg.beta2.powf(t));
        Factors {
            decay: (1.0 - cfg.lr * cfg.weight_decay) as f32,
            lerp: (1.0 - cfg.beta1) as f32,
            beta2: cfg.beta2 as f32,
            one_minus_beta2: (1.0 - cfg.beta2) as f32,
            root_bias2: bias2.sqrt() as f32,
            eps: cfg.eps as f32,
            minus_step: -(cfg.lr / bias1) as f32,
            sign: if cfg.maximize { -1.0 } else { 1.0 },
        }
    }

    /// One coordinate: the new value, m and v.
    #[inline(always)]
    fn update(&self, x: f32, g: f32, m: f32, v: f32) -> (f32, f32, f32) {
        let g = g * self.sign;
        let toward = g - m;
        // torch's lerp starts from the nearer end.
        let m = if self.lerp < 0.5 {
            self.lerp.mul_add(toward, m)
        } else {
            (self.lerp - 1.0).mul_add(toward, g)
        };
        let v = (self.one_minus_beta2 * g).mul_add(g, v * self.beta2);
        let denominator = v.sqrt() / self.root_bias2 + self.eps;
        (x * self.decay + self.minus_step * m / denominator, m, v)
    }
}

/// One step, the `t`-th (from 1) of these values. `value` holds the f32 master values; `target` is the
/// weight and the positions in it that receive them, rounded once.
#[allow(clippy::too_many_arguments)]
pub fn step<T: Element, P: Position>(
    threads: usize,
    cfg: &AdamW,
    t: u64,
    value: &mut [f32],
    grad: &[f32],
    m: &mut [f32],
    v: &mut [f32],
    target: Option<(&str, &mut [T], &[P])>,
) -> Result<()> {
    let n = value.len();
    check_len("grad", grad.len(), n)?;
    check_len("exp_avg", m.len(), n)?;
    check_len("exp_avg_sq", v.len(), n)?;
    if t == 0 {
        return Err(Error::Value {
            name: "step".to_string(),
            rule: "at least 1".to_string(),
            got: t.to_string(),
        });
    }
    let target = match target {
        None => None,
        Some((name, dst, index)) => {
            check_len("index", index.len(), n)?;
            Some(Target::new(threads, name, dst, index)?)
        }
    };
    let f = Factors::new(cfg, t);
    each(threads, GRAIN, State { value, grad, m, v, target }, |state| wide(Step { f, state }));
    Ok(())
}

/// A piece of one step.
struct Step<'a, T, P> {
    f: Factors,
    state: State<'a, T, P>,
}

impl<T: Element, P: Position> Loop for Step<'_, T, P> {
    type Output = ();
    #[inline(always)]
    fn run(self, _: impl Isa) {
        let (f, s) = (self.f, self.state);
        for (((x, g), m), v) in s.value.iter_mut().zip(s.grad).zip(s.m).zip(s.v) {
            (*x, *m, *v) = f.update(*x, *g, *m, *v);
        }
        if let Some(mut target) = s.target {
            target.write(s.value, T::from_f32);
        }
    }
}

struct State<'a, T, P> {
    value: &'a mut [f32],
    grad: &'a [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
    target: Option<Target<'a, T, P>>,
}

impl<T: Element, P: Position> Divide for State<'_, T, P> {
    fn len(&self) -> usize {
        self.value.len()
    }
    fn divide(self, at: usize) -> (Self, Self) {
        let (x, y) = self.value.split_at_mut(at);
        let (g, h) = self.grad.split_at(at);
        let (m, n) = self.m.split_at_mut(at);
        let (v, w) = self.v.split_at_mut(at);
        let (s, t) = self.target.map(|t| t.divide(at)).unzip();
        (
            State { value: x, grad: g, m, v, target: s },
            State { value: y, grad: h, m: n, v: w, target: t },
        )
    }
}
